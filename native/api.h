/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C core as Python sees it: the only header that cffi reads, so it holds
 * plain declarations and no preprocessor logic beyond this guard.
 *
 * Functions return 0 or a count when they succeed and a negative errno when
 * they fail.  Descriptors are borrowed (and duplicated where they are kept)
 * unless the comment says that they are taken over.
 */
#ifndef VHOSTFS_API_H
#define VHOSTFS_API_H

typedef struct vf_share vf_share;
typedef struct vf_device vf_device;
typedef struct vf_upcall vf_upcall;

/* ---- the share: one exported tree, its inode table and open files ------- */

/* How an inode that the guest holds is kept reachable. */
enum vf_handle_mode {
	VF_HANDLES_NEVER,     /* an O_PATH descriptor for each */
	VF_HANDLES_PREFER,    /* descriptors within a budget, then file handles */
	VF_HANDLES_MANDATORY, /* file handles; an inode without one is refused */
};

/* What the guest may keep of file data; see --cache. */
enum vf_cache_mode {
	VF_CACHE_NEVER,
	VF_CACHE_METADATA,
	VF_CACHE_AUTO,
	VF_CACHE_ALWAYS,
};

/* One rule of --translate-uid / --translate-gid. */
enum vf_id_rule_kind {
	VF_ID_GUEST_TO_HOST, /* guest ids [from, from+count) become to.. on the host */
	VF_ID_HOST_TO_GUEST, /* host ids [from, from+count) are shown as to.. */
	VF_ID_SQUASH_GUEST,  /* guest ids [from, from+count) all become to */
	VF_ID_SQUASH_HOST,   /* host ids [from, from+count) are all shown as to */
	VF_ID_FORBID_GUEST,  /* using guest ids [from, from+count) fails with EPERM */
};

struct vf_id_rule {
	uint32_t kind;
	uint32_t from;
	uint32_t to;
	uint32_t count;
};

/* One rule of --xattrmap; the first that matches decides.  virtiofsd's words. */
enum vf_xattr_rule_kind {
	VF_XATTR_OK,	      /* unchanged */
	VF_XATTR_BAD,	      /* hidden from listings, refused with EPERM */
	VF_XATTR_UNSUPPORTED, /* hidden from listings, refused with ENOTSUP */
	VF_XATTR_PREFIX,      /* prepend on the host, strip towards the guest */
};

enum vf_xattr_scope {
	VF_XATTR_CLIENT = 1, /* names that come from the guest */
	VF_XATTR_SERVER = 2, /* names that come from the host */
};

struct vf_xattr_rule {
	uint32_t kind;
	uint32_t scope;
	const char *key;     /* prefix matched in names from the guest */
	const char *prepend; /* prefix matched in names from the host */
};

struct vf_share_config {
	int root_fd;	 /* O_PATH directory: the share's root */
	int proc_fd_dir; /* O_PATH directory: /proc/self/fd */
	uint32_t handle_mode;
	uint32_t inode_fd_budget; /* descriptors that inodes may hold */
	uint32_t open_budget;	  /* files and directories that the guest may have open */
	uint32_t lock_waiters;	  /* blocking lock requests that may wait at once */
	uint32_t pool_threads; /* threads for requests that may block; 0: in the queue's thread */
	uint32_t cache_mode;
	uint64_t entry_timeout_ns;
	uint64_t negative_timeout_ns;
	uint64_t attr_timeout_ns;
	bool readonly;
	bool xattr;
	bool allow_direct_io;
	bool allow_mmap; /* shared mmap although files are opened with FOPEN_DIRECT_IO */
	bool preserve_noatime;
	const struct vf_id_rule *uid_rules;
	uint32_t n_uid_rules;
	const struct vf_id_rule *gid_rules;
	uint32_t n_gid_rules;
	const struct vf_xattr_rule *xattr_rules;
	uint32_t n_xattr_rules;
};

/* Copies all of config (duplicating both descriptors).  *error: negative errno when NULL is
 * returned. */
vf_share *vf_share_new(const struct vf_share_config *config, int *error);
/* All devices must have been freed. */
void vf_share_free(vf_share *share);

/*
 * A new FUSE session (FUSE_INIT) or the end of one (max_write 0, after
 * FUSE_DESTROY): forgets every inode and closes every file of the one before,
 * then works by these flags.  init_flags: the 64 FUSE_INIT flags granted
 * (flags | flags2 << 32); max_write in bytes.  Waits for operations under way,
 * so it may block on storage.
 */
void vf_share_start_session(vf_share *share, uint64_t init_flags, uint32_t max_write);

/* A new O_PATH descriptor for an inode that the guest holds; -ESTALE when it holds none such. */
int vf_share_inode_fd(vf_share *share, uint64_t nodeid);
/* A duplicate of the descriptor of an open file; -EBADF. */
int vf_share_file_fd(vf_share *share, uint64_t nodeid, uint64_t fh);

struct vf_share_stats {
	uint64_t inodes;       /* held by the guest, the root included */
	uint64_t inode_fds;    /* descriptors kept for them */
	uint64_t open_files;   /* files and directories open for the guest */
	uint64_t lock_waiters; /* blocking lock requests waiting now */
	uint64_t requests;     /* FUSE requests answered since the start */
};
void vf_share_get_stats(vf_share *share, struct vf_share_stats *stats);

/* ---- upcalls: requests that Python decides ------------------------------ */

struct vf_upcall_info {
	uint32_t opcode;
	uint32_t uid; /* as the guest sent them, not mapped */
	uint32_t gid;
	uint32_t pid;
	uint64_t unique;
	uint64_t nodeid;
	const uint8_t *args; /* what follows fuse_in_header, a private copy */
	uint32_t args_size;
	uint32_t reply_room; /* bytes that fit behind fuse_out_header */
};

/* Readable when an upcall waits; the share's own, never closed by the caller. */
int vf_share_upcall_fd(vf_share *share);
/* Takes the oldest upcall and describes it; NULL when none waits. */
vf_upcall *vf_share_next_upcall(vf_share *share, struct vf_upcall_info *info);
/* Answers and frees it.  error: 0 or negative errno.  -EMSGSIZE: the payload did not fit (EIO was
 * sent). */
int vf_upcall_reply(vf_upcall *upcall, int error, const void *payload, uint32_t payload_size);

/* ---- the device: one vhost-user connection ------------------------------ */

struct vf_region {
	uint64_t guest_addr;
	uint64_t size;
	uint64_t user_addr; /* where the front end has it mapped */
	uint64_t mmap_offset;
};

enum vf_queue_role { VF_QUEUE_HIPRIO, VF_QUEUE_NOTIFICATION, VF_QUEUE_REQUEST };

struct vf_queue_config {
	uint32_t index;
	uint32_t role;
	uint32_t size;	    /* a power of two, at most 32768 */
	uint32_t base;	    /* next available index, 0..65535 */
	uint64_t desc_addr; /* front-end user addresses, as SET_VRING_ADDR gives them */
	uint64_t avail_addr;
	uint64_t used_addr;
	int kick_fd; /* -1: the ring is polled (refused here with -ENOTSUP) */
	int call_fd; /* -1: no interrupts */
	int err_fd;  /* -1: none */
	bool event_idx;
	bool indirect;
};

vf_device *vf_device_new(vf_share *share, uint32_t max_queues, int *error);
/* Stops every queue, waits for requests under way, unmaps guest memory. */
void vf_device_free(vf_device *device);
/* Replaces the whole memory map; the queues must be stopped. fds[i] belongs to regions[i]. */
int vf_device_set_memory(vf_device *device, const struct vf_region *regions, const int *fds,
			 uint32_t n_regions);
int vf_device_add_region(vf_device *device, const struct vf_region *region, int fd);
/* -ENOENT when no such region is mapped. */
int vf_device_remove_region(vf_device *device, const struct vf_region *region);

/* Starts serving a queue in a thread of its own.  -EFAULT: an address is in no region. */
int vf_queue_start(vf_device *device, const struct vf_queue_config *config);
/*
 * Stops it: requests under way are finished first (lock requests that wait are
 * answered with EINTR).  Returns the next available index, 0..65535.
 * Blocks; -ENOENT when the queue does not run.
 */
int vf_queue_stop(vf_device *device, uint32_t index);
/* Exchanges a running queue's descriptor; -1 for none. */
int vf_queue_set_call(vf_device *device, uint32_t index, int call_fd);
int vf_queue_set_err(vf_device *device, uint32_t index, int err_fd);

/* A fault of the guest or front end: a line to log.  The queue, if any, has stopped serving. */
struct vf_fault {
	int32_t queue; /* -1: not tied to a queue */
	char text[200];
};
/* Readable when a fault waits. */
int vf_device_fault_fd(vf_device *device);
/* 1: a fault was taken; 0: none waits. */
int vf_device_next_fault(vf_device *device, struct vf_fault *fault);

/* ---- the process -------------------------------------------------------- */

/* unshare(2) and pivot_root(2), for the sandbox; Python 3.11 has neither. */
int vf_unshare(uint64_t clone_flags);
int vf_pivot_root(const char *new_root, const char *put_old);
int vf_mount(const char *source, const char *target, const char *type, uint64_t flags,
	     const char *data);
int vf_umount_detach(const char *target);
/* Keeps only these capabilities (bit = capability number) in every set, in this thread. */
int vf_keep_capabilities(uint64_t mask);
/* Effective capabilities of this thread. */
uint64_t vf_effective_capabilities(void);
/*
 * Loads a seccomp filter into all threads of the process by libseccomp:
 * the named system calls are allowed, every other one kills the process
 * (or is logged, when log_only).  A name that this kernel's libseccomp does
 * not know is skipped.
 */
int vf_seccomp_allow(const char *const *names, uint32_t n_names, bool log_only);

#endif
