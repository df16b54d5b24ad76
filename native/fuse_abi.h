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

/* ---- host events: our own part of the protocol, docs/protocol.md ---------- */

#define VF_FUSE_FSNOTIFY_INIT 0x5800u  /* Python's (fuse/fsnotify.py) */
#define VF_FUSE_FSNOTIFY_WATCH 0x5801u /* op_fsnotify.c */
#define VF_FUSE_FSNOTIFY_PARK 0x5802u
#define VF_FUSE_NOTIFY_FSNOTIFY 0x5800 /* notify code, in fuse_out_header.error */

#define VF_FSNOTIFY_VIRTQUEUE (1ULL << 0)
#define VF_FSNOTIFY_PARKED (1ULL << 1)
#define VF_FSNOTIFY_WATCH_ALL (1ULL << 2)
#define VF_FSNOTIFY_RENAME (1ULL << 3)
#define VF_FSNOTIFY_CHILD (1ULL << 4)
#define VF_FSNOTIFY_INVALIDATE (1ULL << 5)
#define VF_FSNOTIFY_WATCH_FILESYSTEM (1ULL << 6)
#define VF_FSNOTIFY_PARENT (1ULL << 7)
#define VF_FSNOTIFY_DIRECTORY_LOSS (1ULL << 8)
#define VF_FSNOTIFY_DEFERRED_OPEN (1ULL << 9)

struct vf_fsnotify_watch_in {
	uint64_t mask; /* FS_* bits; 0: no longer watched */
	uint32_t generation;
	uint32_t flags;
};

/* flags of FSNOTIFY_WATCH: the mask is for every object of the share */
#define VF_FSNOTIFY_WATCH_ON_FILESYSTEM 1u

/* flags of an element */
#define VF_FSNOTIFY_SPLIT_RENAME 1u
#define VF_FSNOTIFY_CACHES 4u	  /* no event: only what the guest keeps of it is no longer right */
#define VF_FSNOTIFY_FOR_PARENT 2u /* PARENT */
#define VF_FSNOTIFY_UNLINKED 8u	  /* not for watchers with IN_EXCL_UNLINK */

#define VF_NAME_MAX 255u

/* The least that any element takes, and the most that one can take, with fuse_out_header. */
#define VF_ELEMENT_MIN ((uint32_t)(sizeof(struct fuse_out_header) + sizeof(struct vf_fsnotify_out)))
#define VF_ELEMENT_MAX (VF_ELEMENT_MIN + VF_NAME_MAX)

/* The notification element, behind fuse_out_header; name[namelen] follows, without NUL. */
struct vf_fsnotify_out {
	uint64_t nodeid;
	uint32_t generation;
	uint32_t reserved;
	uint64_t mask;
	uint32_t namelen;
	uint32_t cookie;
	uint32_t flags;
	uint32_t child_generation;
	uint64_t child_nodeid;
};

#endif
