/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Per-thread credentials.  Linux keeps them by thread; the C library's
 * wrappers change the whole process, so raw system calls are used
 * (credentials(7), nptl(7)).
 */
#ifndef VHOSTFS_CRED_H
#define VHOSTFS_CRED_H

#include "core.h"

/* Called once in each thread before its first operation. */
int vf_thread_init(struct vf_thread *t, struct vf_share *share);
void vf_thread_finish(struct vf_thread *t);

/*
 * Acts as the guest's caller: maps the header's uid and gid by the share's rules and changes
 * effective ids (no system call when nothing changes); group: one supplementary group as the guest
 * sent it (FUSE_CREATE_SUPP_GROUP) or VF_NO_GROUP.  Negative errno.  vf_cred_restore() must follow.
 */
int vf_cred_become_caller(struct vf_thread *t, const struct fuse_in_header *header, uint32_t group);
/* The same without the allowance that vf_cred_become_caller() makes for groups that are not known.
 */
int vf_cred_become_exactly(struct vf_thread *t, const struct fuse_in_header *header,
			   uint32_t group);
void vf_cred_restore(struct vf_thread *t);
/* The file mode creation mask of this thread, for creations only. */
void vf_cred_umask(struct vf_thread *t, uint32_t mask);
/* CAP_FSETID off for a write or truncation that must clear set-id bits; on again. Cheap when
 * nothing changes. */
int vf_cred_drop_fsetid(struct vf_thread *t);
int vf_cred_need_fsetid(struct vf_thread *t);
/*
 * As an operation needs it.  It stays as it is until another operation of this thread needs it
 * otherwise, since a row of writes by one user is the common case.
 */
static inline int vf_cred_set_fsetid(struct vf_thread *t, bool kill_suidgid)
{
	return kill_suidgid ? vf_cred_drop_fsetid(t) : vf_cred_need_fsetid(t);
}

/* idmap.c: one id of the guest to the host's; -EPERM: a forbid rule. And back. */
int vf_map_id(const struct vf_id_rule *rules, uint32_t n_rules, uint32_t guest_id,
	      uint32_t *host_id);
uint32_t vf_unmap_id(const struct vf_id_rule *rules, uint32_t n_rules, uint32_t host_id);

#endif
