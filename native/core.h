/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the parts of the C core share: requests, threads, the share.
 *
 * The way of a request: ring.c takes a descriptor chain, request_queue.c makes a
 * vf_req of it (all of it copied out of guest memory but bulk data),
 * dispatch.c finds the operation by opcode, the operation (op_*.c) works on
 * inodes (inode.c) and open files (file.c) and leaves its answer in the
 * thread's reply buffer or straight in guest memory; request_queue.c puts it on the
 * used ring.  Operations know nothing of rings.
 */
#ifndef VHOSTFS_CORE_H
#define VHOSTFS_CORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "fuse_abi.h"

/* What a clock shows, in nanoseconds. */
static inline uint64_t vf_clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t vf_now_ns(void)
{
	return vf_clock_ns(CLOCK_MONOTONIC);
}

/* In a loop that waits for another thread. */
static inline void vf_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ __volatile__("yield");
#endif
}

#define vf_container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

/* ---- requests ----------------------------------------------------------- */

/* Largest private copy of a request's arguments: a 64 KiB xattr and its name, with room. */
#define VF_MAX_ARGS (72u * 1024)
/* Largest reply that is built in private memory (readdir, listxattr). */
#define VF_MAX_REPLY (1u << 20)
/* Largest WRITE payload or READ reply. */
#define VF_MAX_IO (1u << 20)

struct vf_queue;
struct vf_mem;
struct vf_thread;

/* Work that another thread may take over, but need not; see pool.c. */
struct vf_offer {
	void (*run)(struct vf_thread *t, struct vf_offer *offer);
	const void *owner; /* who may have to take it back */
	/* pool.c */
	struct vf_offer *next;
	uint64_t offered_ns;
};

/* One FUSE request.  Memory that the guest can write is reached only through in[] and out[]. */
struct vf_req {
	struct vf_share *share;
	struct vf_queue *queue;
	struct vf_mem *mem; /* keeps the pages behind in[] and out[] mapped */
	struct vf_req *next;
	struct vf_offer offer;
	struct iovec *in;  /* device-readable, after what was copied into header and args */
	struct iovec *out; /* device-writable, fuse_out_header included */
	uint32_t n_in, n_out;
	uint32_t in_room, out_room; /* entries allocated in in[] and out[] */
	uint32_t in_size;	    /* bytes left in in[] (WRITE and IOCTL payload) */
	uint32_t out_size;	    /* bytes in out[] */
	uint16_t head;
	bool alone;    /* nothing is in the ring behind it */
	bool in_place; /* the reply's payload already lies in out[] behind 16 bytes */
	struct fuse_in_header header; /* private copy */
	uint8_t *args;		      /* private copy of what follows the header, 8-byte aligned */
	uint32_t args_size;	      /* for WRITE: sizeof(struct fuse_write_in) */
	uint32_t args_room;
	/* What vf_req_out_iov() trimmed from out[], to be put back for the header. */
	uint32_t trim_head, trim_head_bytes, trim_tail, trim_tail_len;
	bool trimmed;
};

/*
 * A thread that executes operations.  Each has its own file system attributes
 * (unshare(CLONE_FS), umask 0) and credentials.
 */
struct vf_thread {
	struct vf_share *share;
	uint8_t *reply; /* private reply buffer, at least VF_REPLY_MIN bytes */
	uint32_t reply_room;
	/* cred.c: what this thread's credentials are at the moment */
	uint32_t home_uid, home_gid; /* the server's own */
	uint32_t cur_uid, cur_gid;
	uint32_t cur_group; /* one supplementary group, or VF_NO_GROUP */
	uint32_t cur_umask;
	bool fsetid_dropped;
	uint64_t caps; /* effective and permitted set when it acts as the server */
	/* share.c: the list of threads, so that a new session can wait for all of them */
	struct vf_thread *next;
	atomic_bool busy; /* executing an operation */
	bool may_block;	  /* slow storage may be waited for here */
	/* coherent.c: as it was when the operation began */
	bool told_all;
	uint32_t n_indexed;
	/* op_dir.c: more of this directory is likely to be asked for next; nodeid 0: of none */
	uint64_t listed_nodeid, listed_fh;
	bool begun;		       /* it was looked up, not long ago */
	atomic_uint_fast64_t requests; /* answered by this thread */
};
#define VF_REPLY_MIN 4096u
#define VF_NO_GROUP UINT32_MAX

/* Makes room for size bytes in t->reply (contents are lost); NULL: out of memory. */
uint8_t *vf_thread_reply(struct vf_thread *t, uint32_t size);

/*
 * An operation returns the payload's size in bytes (it lies in t->reply, or in
 * r->out when r->in_place is set), a negative errno, or one of these.
 */
enum {
	VF_NO_REPLY = INT32_MIN, /* FORGET and the like: the chain is returned with length 0 */
	VF_ASYNC =
	    INT32_MIN + 1, /* the operation has taken the request; vf_req_complete() ends it */
	/*
	 * Would block for storage (say, preadv2 with RWF_NOWAIT gave EAGAIN): the operation is run
	 * again from its start by a pool thread.  Only while t->may_block is false.
	 */
	VF_TO_POOL = INT32_MIN + 2,
};
typedef int32_t (*vf_op)(struct vf_thread *t, struct vf_req *r);

/*
 * Ends a request that an operation took with VF_ASYNC, from any thread:
 * error is 0 or a negative errno; payload is copied.
 */
void vf_req_complete(struct vf_req *r, int error, const void *payload, uint32_t size);

/* The fixed-size head of the arguments, or NULL when they are too short. */
static inline const void *vf_arg(const struct vf_req *r, size_t size)
{
	return r->args_size >= size ? r->args : NULL;
}

/*
 * The name at offset of the arguments, which must end with NUL inside them;
 * *end (when not NULL) is the offset behind that NUL.  NULL: there is no such string.
 */
const char *vf_arg_string(const struct vf_req *r, uint32_t offset, uint32_t *end);
/*
 * Checks a name for one directory entry: not empty, no '/', not "." nor "..",
 * at most 255 bytes.  Returns 0, -EINVAL or -ENAMETOOLONG.
 */
int vf_check_name(const char *name);

/*
 * The first size bytes of r->in (or of r->out behind offset bytes) as an iovec array
 * that may be used until the request ends; *n entries.  size must not exceed what is there.
 * The arrays are changed in place: call it once for a request.
 */
struct iovec *vf_req_in_iov(struct vf_req *r, uint32_t size, uint32_t *n);
struct iovec *vf_req_out_iov(struct vf_req *r, uint32_t offset, uint32_t size, uint32_t *n);

/* ---- the operations, each implemented once ------------------------------ */

enum vf_op_flags {
	VF_OP_SLOW = 1,	  /* may block for long (storage): goes to the pool where there is one */
	VF_OP_MODIFY = 2, /* refused with EROFS on a read-only share */
	VF_OP_NO_SESSION = 4,  /* allowed before FUSE_INIT */
	VF_OP_UPCALL = 8,      /* decided in Python */
	VF_OP_QUICK = 16,      /* hardly ever has to wait: see vf_is_quick() */
	VF_OP_COPIES = 32,     /* where its answer is large, to write that is all its work */
	VF_OP_REMOVES = 64,    /* may take an object's last name */
	VF_OP_TRUNCATES = 128, /* may change something although it is not refused with EROFS */
};
struct vf_op_entry {
	vf_op run;
	uint32_t flags;
};
/* Indexed by opcode; run is NULL and flags 0: ENOSYS. */
extern const struct vf_op_entry vf_ops[];
extern const uint32_t vf_n_ops;
int32_t vf_dispatch(struct vf_thread *t, struct vf_req *r);
/* May answers to requests before this one be told of together with its own, in any case? */
bool vf_is_quick(const struct vf_req *r);
/* May the FORGET that follows free the object on the host, which takes as long as a removal? */
bool vf_may_remove(const struct vf_req *r);
/* Is a large answer of it nothing but data that is copied, in any order with others? */
bool vf_only_copies(const struct vf_req *r);

#define VF_DECLARE_OP(name) int32_t vf_op_##name(struct vf_thread *t, struct vf_req *r)
/* op_names.c: names in directories */
VF_DECLARE_OP(lookup);
VF_DECLARE_OP(forget);
VF_DECLARE_OP(batch_forget);
VF_DECLARE_OP(readlink);
VF_DECLARE_OP(symlink);
VF_DECLARE_OP(mknod);
VF_DECLARE_OP(mkdir);
VF_DECLARE_OP(unlink);
VF_DECLARE_OP(rmdir);
VF_DECLARE_OP(rename);
VF_DECLARE_OP(rename2);
VF_DECLARE_OP(link);
VF_DECLARE_OP(create);
VF_DECLARE_OP(tmpfile);
/* op_attr.c */
VF_DECLARE_OP(getattr);
VF_DECLARE_OP(setattr);
VF_DECLARE_OP(statx);
VF_DECLARE_OP(access);
/* op_fs.c */
VF_DECLARE_OP(statfs);
VF_DECLARE_OP(syncfs);
/* op_file.c */
VF_DECLARE_OP(open);
VF_DECLARE_OP(read);
VF_DECLARE_OP(write);
VF_DECLARE_OP(flush);
VF_DECLARE_OP(release);
VF_DECLARE_OP(fsync);
VF_DECLARE_OP(fsyncdir);
VF_DECLARE_OP(fallocate);
VF_DECLARE_OP(lseek);
VF_DECLARE_OP(copy_file_range); /* COPY_FILE_RANGE and COPY_FILE_RANGE_64 */
/* op_dir.c */
VF_DECLARE_OP(opendir);
VF_DECLARE_OP(readdir);
VF_DECLARE_OP(readdirplus);
VF_DECLARE_OP(releasedir);
/* op_xattr.c */
VF_DECLARE_OP(setxattr);
VF_DECLARE_OP(getxattr);
VF_DECLARE_OP(listxattr);
VF_DECLARE_OP(removexattr);
/* op_lock.c */
VF_DECLARE_OP(getlk);
VF_DECLARE_OP(setlk);
VF_DECLARE_OP(setlkw);
VF_DECLARE_OP(interrupt);
/* op_fsnotify.c */
VF_DECLARE_OP(fsnotify_watch);
/* parked.c */
VF_DECLARE_OP(fsnotify_park);

/* ---- the share ---------------------------------------------------------- */

struct vf_inode_table;
struct vf_deferred;
struct vf_file_table;
struct vf_lock_waiters;
struct vf_pool;
struct vf_upcalls;
struct vf_events;

struct vf_share {
	struct vf_share_config config;	 /* rules and strings are the share's own copies */
	atomic_uint_fast64_t init_flags; /* granted, and VF_SESSION; 0: no session */
	atomic_uint max_write;
	struct vf_inode_table *inodes;
	struct vf_file_table *files;
	_Atomic(struct vf_deferred *) deferred; /* NULL: not granted in this session */
	struct vf_lock_waiters *locks;
	struct vf_pool *pool;
	struct vf_upcalls *upcalls;
	struct vf_events *events; /* NULL: off */
	pthread_mutex_t threads_lock;
	struct vf_thread *threads;
	atomic_uint visitors;		    /* others at work on what a session owns */
	atomic_uint n_keep_ahead, n_shown;  /* see vf_show() */
	atomic_uint_fast64_t entries_ahead; /* see vf_share_stats */
	uint64_t requests_done;		    /* by threads that have ended */
};

/*
 * What is looked up before it is asked for must not be older than what the guest has been shown
 * meanwhile.  Who keeps such a thing says so, remembers the count, looks, and compares the count
 * when he is asked.
 */
static inline void vf_keeps_ahead(struct vf_share *share, bool yes)
{
	atomic_fetch_add(&share->n_keep_ahead, yes ? 1u : -1u);
}
static inline uint32_t vf_n_shown(struct vf_share *share)
{
	return atomic_load(&share->n_shown);
}
/*
 * Something was looked at or changed on the host; now the guest is shown it, by an answer or an
 * element.  Either this finds that somebody keeps what he has looked up, or he says so later, and
 * looks after that.  So what was done on the host must come before the load.
 */
static inline void vf_show(struct vf_share *share, bool changed)
{
	if (changed)
		atomic_thread_fence(memory_order_seq_cst);
	else
		atomic_thread_fence(memory_order_acquire);
	if (atomic_load_explicit(&share->n_keep_ahead, memory_order_relaxed))
		atomic_fetch_add(&share->n_shown, 1);
}
/* op_dir.c: begins what is likely to be asked for next, until stop(arg) is true. */
void vf_dir_look_ahead(struct vf_thread *t, bool (*stop)(const void *), const void *arg);
/* What this thread has begun, and nobody has asked for: forgotten. */
void vf_dir_drop_ahead(struct vf_thread *t);
/* dispatch.c: each of them, as a request. */
void vf_dispatch_ahead(struct vf_thread *t, bool (*stop)(const void *), const void *arg);
void vf_dispatch_drop_ahead(struct vf_thread *t);
/* After that much time, in ms, what was begun is of no use. */
#define VF_AHEAD_MS 10

/* share.c: what each thread that executes operations does first and last. */
int vf_thread_enter(struct vf_thread *t, struct vf_share *share, const char *name);
void vf_thread_leave(struct vf_thread *t);

/* pool.c */
struct vf_pool *vf_pool_new(struct vf_share *share, uint32_t n_threads, int *error);
void vf_pool_free(struct vf_pool *pool);
void vf_pool_submit(struct vf_pool *pool, struct vf_req *r);
/* Closes a descriptor, sooner or later, where that takes long: by one of the threads if it can. */
void vf_pool_close(struct vf_pool *pool, int fd);
/*
 * For a thread that has time.  False: nobody would have, it is the caller's.  An offer that is not
 * begun its owner must take back, sooner or later.
 */
bool vf_pool_offer(struct vf_pool *pool, struct vf_offer *offer);
/*
 * The first of the owner's offers that nobody has begun and that was made before then, which is
 * the caller's again; or NULL.
 */
struct vf_offer *vf_pool_take_back(struct vf_pool *pool, const void *owner, uint64_t before_ns);

/* upcall.c */
struct vf_upcalls *vf_upcalls_new(int *error);
void vf_upcalls_free(struct vf_upcalls *upcalls);
void vf_upcalls_submit(struct vf_upcalls *upcalls, struct vf_req *r);

/* request_queue.c: runs a request that its queue's thread has put aside, for the pool or another.
 */
void vf_req_run_in_pool(struct vf_thread *t, struct vf_req *r);

/* coherent.c: what the guest may keep for as long as it likes. */
/* Is it told of every change to what it holds? */
bool vf_told_all(const struct vf_share *share);
/* At the start of each operation. */
void vf_lasting_begin(struct vf_thread *t);
/*
 * May the guest keep what the operation has seen on the host of an object or directory?
 * told: vf_inode_is_told() of it before that.
 */
bool vf_lasting(const struct vf_thread *t, bool told);
/* Also of what vf_inode_is_told() was asked about only after it was looked at? */
bool vf_lasting_is_sure(const struct vf_thread *t);

/* Set in init_flags while there is a session; FUSE has no flag of this number. */
#define VF_SESSION (1ULL << 63)

static inline uint64_t vf_session_flags(const struct vf_share *s)
{
	return atomic_load_explicit(&s->init_flags, memory_order_relaxed);
}

#endif
