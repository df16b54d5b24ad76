/* SPDX-License-Identifier: Apache-2.0 */
/* Attributes of host objects on the FUSE wire. */
#include "attr.h"
#include "cred.h"

uint32_t vf_guest_uid(const struct vf_share *share, uint32_t host_uid)
{
	return vf_unmap_id(share->config.uid_rules, share->config.n_uid_rules, host_uid);
}

uint32_t vf_guest_gid(const struct vf_share *share, uint32_t host_gid)
{
	return vf_unmap_id(share->config.gid_rules, share->config.n_gid_rules, host_gid);
}

/* The kernel's new_encode_dev(), which FUSE carries. */
static uint32_t encode_dev(uint32_t major, uint32_t minor)
{
	return (minor & 0xff) | major << 8 | (minor & ~0xffu) << 12;
}

void vf_fill_attr(struct vf_share *share, const struct stat *st, struct fuse_attr *attr)
{
	attr->ino = st->st_ino;
	attr->size = (uint64_t)st->st_size;
	attr->blocks = (uint64_t)st->st_blocks;
	attr->atime = (uint64_t)st->st_atim.tv_sec;
	attr->mtime = (uint64_t)st->st_mtim.tv_sec;
	attr->ctime = (uint64_t)st->st_ctim.tv_sec;
	attr->atimensec = (uint32_t)st->st_atim.tv_nsec;
	attr->mtimensec = (uint32_t)st->st_mtim.tv_nsec;
	attr->ctimensec = (uint32_t)st->st_ctim.tv_nsec;
	attr->mode = st->st_mode;
	attr->nlink = (uint32_t)st->st_nlink;
	attr->uid = vf_guest_uid(share, st->st_uid);
	attr->gid = vf_guest_gid(share, st->st_gid);
	attr->rdev = (uint32_t)st->st_rdev; /* the low half of dev_t is new_encode_dev()'s form */
	attr->blksize = (uint32_t)st->st_blksize;
	attr->flags = 0;
}

void vf_fill_attr_statx(struct vf_share *share, const struct statx *sx, struct fuse_attr *attr)
{
	attr->ino = sx->stx_ino;
	attr->size = sx->stx_size;
	attr->blocks = sx->stx_blocks;
	attr->atime = (uint64_t)sx->stx_atime.tv_sec;
	attr->mtime = (uint64_t)sx->stx_mtime.tv_sec;
	attr->ctime = (uint64_t)sx->stx_ctime.tv_sec;
	attr->atimensec = sx->stx_atime.tv_nsec;
	attr->mtimensec = sx->stx_mtime.tv_nsec;
	attr->ctimensec = sx->stx_ctime.tv_nsec;
	attr->mode = sx->stx_mode;
	attr->nlink = sx->stx_nlink;
	attr->uid = vf_guest_uid(share, sx->stx_uid);
	attr->gid = vf_guest_gid(share, sx->stx_gid);
	attr->rdev = encode_dev(sx->stx_rdev_major, sx->stx_rdev_minor);
	attr->blksize = sx->stx_blksize;
	attr->flags = 0;
}
