/* SPDX-License-Identifier: Apache-2.0 */
/*
 * FUSE wire structures: the kernel's uapi header, and what headers newer than
 * Debian 12's add to it (fs/fuse uapi, protocol 7.39 to 7.45).
 * Names defined here carry VF_ so that a newer header does not collide.
 */
#ifndef VHOSTFS_FUSE_ABI_H
#define VHOSTFS_FUSE_ABI_H

#include <stdint.h>
#include <linux/fuse.h>

#define VF_FUSE_STATX 52u
#define VF_FUSE_COPY_FILE_RANGE_64 53u
#define VF_FUSE_MAX_OPCODE 53u

/* INIT flags (bit numbers of flags | flags2 << 32) newer than protocol 7.38. */
#define VF_FUSE_CREATE_SUPP_GROUP (1ULL << 34)
#define VF_FUSE_HAS_EXPIRE_ONLY (1ULL << 35)
#define VF_FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#define VF_FUSE_PASSTHROUGH (1ULL << 37)
#define VF_FUSE_NO_EXPORT_SUPPORT (1ULL << 38)
#define VF_FUSE_HAS_RESEND (1ULL << 39)
#define VF_FUSE_ALLOW_IDMAP (1ULL << 40)

/* fuse_in_header: the padding of 7.37 became the length of extensions, in 8-byte units (7.38). */
#define VF_FUSE_EXT_GROUPS 32u /* fuse_ext_header.type; smaller types are security contexts */

struct vf_fuse_sx_time {
	int64_t tv_sec;
	uint32_t tv_nsec;
	int32_t reserved;
};

struct vf_fuse_statx {
	uint32_t mask;
	uint32_t blksize;
	uint64_t attributes;
	uint32_t nlink;
	uint32_t uid;
	uint32_t gid;
	uint16_t mode;
	uint16_t spare0[1];
	uint64_t ino;
	uint64_t size;
	uint64_t blocks;
	uint64_t attributes_mask;
	struct vf_fuse_sx_time atime;
	struct vf_fuse_sx_time btime;
	struct vf_fuse_sx_time ctime;
	struct vf_fuse_sx_time mtime;
	uint32_t rdev_major;
	uint32_t rdev_minor;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint64_t spare2[14];
};

struct vf_fuse_statx_in {
	uint32_t getattr_flags;
	uint32_t reserved;
	uint64_t fh;
	uint32_t sx_flags;
	uint32_t sx_mask;
};

struct vf_fuse_statx_out {
	uint64_t attr_valid;
	uint32_t attr_valid_nsec;
	uint32_t flags;
	uint64_t spare[2];
	struct vf_fuse_statx stat;
};

struct vf_fuse_copy_file_range_out {
	uint64_t bytes_copied;
};

#endif
