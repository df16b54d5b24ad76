/* SPDX-License-Identifier: Apache-2.0 */
/* Host attributes in the guest's terms; vf_fill_attr() for struct stat is in inode.h. */
#ifndef VHOSTFS_ATTR_H
#define VHOSTFS_ATTR_H

#include "inode.h"

void vf_fill_attr_statx(struct vf_share *share, const struct statx *sx, struct fuse_attr *attr);
/* The uid and gid of the host as the guest sees them. */
uint32_t vf_guest_uid(const struct vf_share *share, uint32_t host_uid);
uint32_t vf_guest_gid(const struct vf_share *share, uint32_t host_gid);

static inline void vf_split_ns(uint64_t ns, uint64_t *s, uint32_t *rest_ns)
{
	*s = ns / 1000000000u;
	*rest_ns = (uint32_t)(ns % 1000000000u);
}

#endif
