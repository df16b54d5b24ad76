// SPDX-License-Identifier: Apache-2.0
/* Operations on the file system as a whole. */
#include "core.h"

#include <sys/statvfs.h>

#include "inode.h"

int32_t vf_op_statfs(struct vf_thread *t, struct vf_req *r)
{
	struct fuse_statfs_out *out = (struct fuse_statfs_out *)t->reply;
	struct vf_inode *inode = vf_inode_get(r->share, r->header.nodeid);
	struct statvfs st;
	int result;

	if (!inode)
		return -ESTALE;
	result = vf_inode_path_fd(r->share, inode);
	if (result >= 0)
		result = fstatvfs(result, &st) ? -errno : 0;
	vf_inode_put(r->share, inode);
	if (result < 0)
		return result;
	*out = (struct fuse_statfs_out){
	    .st.blocks = st.f_blocks,
	    .st.bfree = st.f_bfree,
	    .st.bavail = st.f_bavail,
	    .st.files = st.f_files,
	    .st.ffree = st.f_ffree,
	    .st.bsize = (uint32_t)st.f_bsize,
	    .st.namelen = (uint32_t)st.f_namemax,
	    .st.frsize = (uint32_t)st.f_frsize,
	};
	return sizeof(*out);
}

/* syncfs(2) wants a descriptor that is open for more than its path. */
int32_t vf_op_syncfs(struct vf_thread *t, struct vf_req *r)
{
	struct vf_inode *inode;
	int fd, result;

	(void)t;
	inode = vf_inode_get(r->share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	fd = vf_inode_open(r->share, inode, O_RDONLY);
	vf_inode_put(r->share, inode);
	if (fd < 0)
		return fd;
	result = syncfs(fd) ? -errno : 0;
	close(fd);
	return result;
}
