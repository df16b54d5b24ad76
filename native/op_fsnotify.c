/* SPDX-License-Identifier: Apache-2.0 */
/*
 * FUSE_FSNOTIFY_WATCH: what the guest's processes watch, told by its driver.
 * docs/protocol.md; FUSE_FSNOTIFY_INIT is Python's.
 */
#include "marker.h"

int32_t vf_op_fsnotify_watch(struct vf_thread *t, struct vf_req *r)
{
	const struct vf_fsnotify_watch_in *in = vf_arg(r, sizeof(*in));
	struct vf_events *events = t->share->events;
	struct vf_inode *inode;
	int error = -ESTALE;

	if (!events || !atomic_load(&events->flags))
		return -ENOSYS;
	if (!in || in->flags & ~VF_FSNOTIFY_WATCH_ON_FILESYSTEM)
		return -EINVAL;
	if (in->mask && vf_marker_want(events, VF_MARK_WATCHES, true))
		return -EIO;
	if (in->flags) {
		if (!(atomic_load(&events->flags) & VF_FSNOTIFY_WATCH_FILESYSTEM) ||
		    r->header.nodeid != FUSE_ROOT_ID || in->generation)
			return -EINVAL;
		return vf_watch_share(events, in->mask);
	}
	inode = vf_inode_get(t->share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	if (vf_inode_generation(inode) == in->generation)
		error = vf_watch_set(events->watches, inode, in->mask);
	vf_inode_put(t->share, inode);
	return error;
}
