/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Names of extended attributes between guest and host.  The first rule of
 * config.xattr_rules that matches decides; without rules names are unchanged.
 */
#ifndef VHOSTFS_XATTR_H
#define VHOSTFS_XATTR_H

#include <linux/limits.h>

#include "core.h"

/* A guest's name may be this long with a rule's prefix and NUL; the host refuses more than 255
 * bytes. */
#define VF_XATTR_NAME_ROOM (2 * XATTR_NAME_MAX + 2)

/*
 * The host's name for a name that the guest uses, in out (room bytes).  0; -EPERM: the rules forbid
 * it; -EOPNOTSUPP: the rules, or a session without FUSE_POSIX_ACL, say that there is no such thing;
 * -ERANGE: too long.
 */
int vf_xattr_map_client_name(struct vf_share *share, const char *name, char *out, size_t room);
/*
 * Rewrites a listxattr(2) result of size bytes in place as the guest may see it; the new size.
 */
size_t vf_xattr_map_list(struct vf_share *share, char *list, size_t size);

#endif
