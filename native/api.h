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
	VF_CACHE_COHERENT, /* lasting while VF_FSNOTIFY_INVALIDATE is granted, else as AUTO */
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
	uint64_t lasting_timeout_ns; /* of what the guest is told when it changes */
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
	/* Entries of READDIRPLUS that were looked up before they were asked for. */
	uint64_t entries_ahead;
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

/* ---- events: changes on the host, told to the guest ---------------------- */

enum vf_event_source {
	VF_EVENTS_FANOTIFY, /* fanotify group with FAN_REPORT_DFID_NAME_TARGET (or DFID_NAME) */
	VF_EVENTS_INOTIFY,  /* inotify instance */
};

struct vf_events_config {
	uint32_t source;
	int source_fd; /* the group, non-blocking; taken over, also when the call fails */
	/*
	 * fanotify: an inotify instance that keeps the order of events, non-blocking and taken over
	 * likewise; -1: none, and under load events of one directory may come out of order.
	 */
	int order_fd;
	/*
	 * fanotify: another group like source_fd without any marks, taken over likewise, to which
	 * the source moves when the mark on the file system costs more than marks on what the guest
	 * watches would; -1: none, and it never does.
	 */
	int next_fd;
	/*
	 * fanotify: events that a mark on the root's whole file system reports already, whose
	 * setting took rights that are gone by now; 0: no such mark.  What a guest watches beyond
	 * that is marked inode by inode.
	 */
	uint64_t filesystem_mask;
	/*
	 * From vf_marker_start(), which was given that mask: the mark is set only while somebody
	 * wants to hear; taken over likewise.  -1: it is there all the time, or never.
	 */
	int marker_fd;
	uint64_t host_mask;  /* FS_* bits that the host can report; others are not asked of it */
	uint32_t max_queued; /* elements that wait for the guest; more are lost, and announced */
	uint32_t max_watches;
	uint32_t notify_buf_size; /* largest element, in bytes with fuse_out_header */
	uint32_t max_parked;	  /* requests that the guest may keep waiting for events */
};
/*
 * Begins to read the group, in a thread of its own, until vf_share_free().  Once for a share and
 * before its first session.
 */
int vf_share_start_events(vf_share *share, const struct vf_events_config *config);
/*
 * What FUSE_FSNOTIFY_INIT granted for the session: VF_FSNOTIFY_* flags, and the FS_* bits that the
 * driver can raise.  Ends with the session.  -ENOSYS: no events were started.
 */
int vf_share_grant_events(vf_share *share, uint64_t flags, uint64_t mask);
/*
 * The largest element that the session's guest takes, in bytes with fuse_out_header; before
 * vf_share_grant_events(), and until the session ends.  Without it: notify_buf_size.
 */
int vf_share_limit_elements(vf_share *share, uint32_t size);
/* Likewise the requests that may be parked.  Without it: max_parked. */
int vf_share_limit_parked(vf_share *share, uint32_t max);
/* Has the host's source failed, so that nothing comes of it any more? */
bool vf_share_events_failed(vf_share *share);

struct vf_events_stats {
	uint64_t received;  /* events read from the host; a merged record counts as its parts */
	uint64_t own;	    /* made by this process for its guest: dropped */
	uint64_t unknown;   /* on objects that the guest does not hold: dropped */
	uint64_t unwatched; /* on objects that nobody in the guest watches: dropped */
	uint64_t merged;    /* with the newest that waited, which was the same */
	uint64_t queued;    /* elements put in the queue */
	uint64_t delivered; /* elements that the guest was given */
	uint64_t lost;	    /* elements for which there was no room */
	uint64_t overflows; /* times that the guest was told of a loss */
	uint64_t host_overflows; /* times that the host's own queue overflowed */
	uint64_t depth;		 /* elements that wait now */
	uint64_t max_depth;	 /* the most that ever waited */
	uint64_t watches;	 /* inodes that the guest watches now */
	uint64_t share_watches;	 /* 1: it also watches the share as a whole */
	uint64_t host_marks;	 /* inode marks or inotify watches held for them on the host */
	uint64_t buffers; /* notification buffers that the guest has given and that are free */
	/* Time from reading the host's record to the used element: [i] counts those below 2^i us.
	 */
	uint64_t latency[24];
};
/* All 0 when no events were started. */
void vf_share_get_events_stats(vf_share *share, struct vf_events_stats *stats);

/* What became of an event; for people who look at a running server. */
enum vf_event_fate {
	VF_EVENT_DELIVERED,
	VF_EVENT_MERGED,
	VF_EVENT_LOST,
	VF_EVENT_OWN,
	VF_EVENT_UNWATCHED,
	VF_EVENT_OVERFLOW, /* the guest was told of a loss */
};
struct vf_event_trace {
	uint64_t time_ns; /* CLOCK_REALTIME */
	uint64_t nodeid;
	uint64_t child_nodeid;
	uint64_t mask;
	uint32_t cookie;
	uint32_t fate;
	int32_t pid;	  /* of who made the change; 0: not known */
	uint32_t skipped; /* records before this one that were not kept: read too slowly */
	uint32_t namelen;
	char name[255];
};
/* Keeps a bounded record of what becomes of each event while on (events on unknown objects are
 * never recorded: they may lie outside the share). */
void vf_share_trace_events(vf_share *share, bool on);
/* 1: the oldest was taken; 0: none waits. */
int vf_share_next_event_trace(vf_share *share, struct vf_event_trace *trace);
/* A line for the log, at least 200 bytes; 1: one was taken; 0: none waits. */
int vf_share_next_event_notice(vf_share *share, char *text, uint32_t size);
/* 1: the source has moved to next_fd, and this (at least 200 bytes) says why; 0: it has not. */
int vf_share_events_moved(vf_share *share, char *text, uint32_t size);
/* Readable when a trace or a notice waits; the share's own; -1 when no events were started. */
int vf_share_events_fd(vf_share *share);

/* fanotify_init(2), fanotify_mark(2), inotify_init1(2): a descriptor or 0, or a negative errno. */
int vf_fanotify_init(uint32_t flags, uint32_t event_f_flags);
int vf_fanotify_mark(int group_fd, uint32_t flags, uint64_t mask, int dir_fd, const char *path);
/*
 * A process that keeps CAP_SYS_ADMIN and sets and removes the mark with this mask, which is there
 * already, on the file system of dir_fd for the group, when it is told to; it ends with the last
 * copy of the descriptor that is returned.  Nobody waits for it: the caller ignores SIGCHLD.
 * Before there are threads.  Negative errno.
 */
int vf_marker_start(int group_fd, int dir_fd, uint64_t mask);
int vf_inotify_init(uint32_t flags);

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
 * answered with EINTR, parked ones with ENOTCONN).  Returns the next available index, 0..65535.
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
/* This signal comes when the parent ends; a change of ids undoes it (PR_SET_PDEATHSIG(2const)). */
int vf_die_with_parent(int signal_number);
/*
 * Whether the object behind any descriptor has a file handle: 0, or why not.
 * for_events: one that need not lead back to it, as fanotify reports it.
 */
int vf_encode_handle(int fd, bool for_events);
/* An O_PATH descriptor of the object behind fd, by its handle; mount_fd: open for reading. */
int vf_open_by_own_handle(int fd, int mount_fd);
/*
 * Loads a seccomp filter into all threads of the process by libseccomp:
 * the named system calls are allowed, ioctl(2) only for the few requests that a
 * share needs; what libraries try and do without is answered with ENOSYS; every
 * other one has the action for its result.  A name that this kernel's
 * libseccomp does not know is skipped.
 */
enum vf_seccomp_action {
	VF_SECCOMP_KILL = 0, /* the process is gone at once */
	VF_SECCOMP_TRAP = 1, /* it is gone by SIGSYS, and says on stderr which call it was */
	VF_SECCOMP_LOG = 2,  /* the call is done, and the kernel logs it */
};
int vf_seccomp_allow(const char *const *names, uint32_t n_names, uint32_t action);

#endif
