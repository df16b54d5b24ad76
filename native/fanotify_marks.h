/* SPDX-License-Identifier: Apache-2.0 */
/* What the host is asked to report inode by inode: the functions of struct vf_source_ops. */
#ifndef VHOSTFS_FANOTIFY_MARKS_H
#define VHOSTFS_FANOTIFY_MARKS_H

#include "events.h"

/* All that is told to guests. */
#define VF_FANOTIFY_EVENTS                                                                         \
	(VF_FS_ENTRY_EVENTS | VF_FS_CHILD_EVENTS | VF_FS_SELF_EVENTS | VF_FS_RENAME)

int vf_fanotify_mark_inode(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
			   uint64_t new_mask, int32_t *wd);
uint64_t vf_fanotify_covered(struct vf_events *events, const struct vf_inode *inode);
void vf_fanotify_inode_gone(struct vf_events *events, struct vf_inode *inode);

#endif
