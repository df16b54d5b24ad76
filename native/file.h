/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Open files and directories of the guest.
 *
 * fh is (reuse count << 32 | slot), like a nodeid; every use checks that the
 * handle belongs to the nodeid of the request and is of the kind asked for.
 * Bit 63 is never set: such handles are the guest's own (deferred.c).
 */
#ifndef VHOSTFS_FILE_H
#define VHOSTFS_FILE_H

#include "core.h"

struct vf_file;
struct vf_inode;

struct vf_file_table *vf_file_table_new(struct vf_share *share, int *error);
void vf_file_table_free(struct vf_file_table *table);
/* Closes everything (a new session). No request is under way. */
void vf_file_table_clear(struct vf_file_table *table);

/*
 * Registers fd (taken over, also when this fails) as a file or directory that the guest
 * has open on nodeid; flags: the open(2) flags it was opened with.  *fh is set.
 * -ENFILE when the share's open_budget is used up.
 */
int vf_file_new(struct vf_share *share, uint64_t nodeid, int fd, int flags, bool directory,
		uint64_t *fh);
/* Takes a reference for the length of an operation; NULL: no such handle for this nodeid (answer
 * EBADF). */
struct vf_file *vf_file_get(struct vf_share *share, uint64_t nodeid, uint64_t fh);
void vf_file_put(struct vf_share *share, struct vf_file *file);
int vf_file_fd(const struct vf_file *file);
/* The same, only of this kind. */
struct vf_file *vf_file_get_kind(struct vf_share *share, uint64_t nodeid, uint64_t fh,
				 bool directory);
/* The smallest unit in which a page cache fails or waits. */
#define VF_FS_PAGE 4096u

enum vf_file_kind {
	VF_REGULAR,
	VF_DIRECTORY,
	VF_EITHER,
};
/*
 * As vf_file_get() for an operation that works on the open file: one whose open was deferred is
 * opened now.  -EBADF, or the errno of that.
 */
int vf_file_use(struct vf_share *share, uint64_t nodeid, uint64_t fh, enum vf_file_kind kind,
		struct vf_file **file);
/* The open(2) flags that vf_file_new() was given. */
int vf_file_flags(const struct vf_file *file);
/* The guest has written or reserved up to there (bytes). */
void vf_file_written(struct vf_share *share, struct vf_file *file, uint64_t end);
/*
 * The guest gives the handle up: no lookup finds it any more, and the last vf_file_put() closes
 * it.  The caller holds a reference.  -EBADF: another request did so before.
 */
int vf_file_release(struct vf_share *share, struct vf_file *file);
/* One of config.open_budget descriptors, for what is kept beside open files (lock owners). */
bool vf_open_budget_take(struct vf_share *share);
void vf_open_budget_give(struct vf_share *share);

/* deferred.c: handles that the guest chose; docs/protocol.md, "Deferred opens". */
#define VF_FH_DEFERRED (1ULL << 63)
#define VF_MAX_DEFERRED 65536u /* at a time: the low bits of a handle tell them apart */
/* From now on in this session the guest may defer opens. -ENOMEM. */
int vf_deferred_start(struct vf_share *share);
/* No request is under way; what is open is closed with the table of files. */
void vf_deferred_end(struct vf_share *share);
/* What file.c calls it; 0: it is not open. */
uint64_t vf_deferred_handle(const struct vf_share *share, uint64_t fh);
/* One that the guest may have chosen, and that nothing has needed yet. */
bool vf_deferred_is_unopened(const struct vf_share *share, uint64_t fh);
/* 0: it is open, by this or by another request; or a negative errno. */
int vf_deferred_open(struct vf_share *share, uint64_t nodeid, uint64_t fh, enum vf_file_kind kind);
/* The file was released. */
void vf_deferred_close(struct vf_share *share, uint64_t fh);

/* Whether a read of this file can be tried without waiting for storage (RWF_NOWAIT). */
enum vf_wait_mode {
	VF_WAIT_UNKNOWN, /* try it */
	VF_WAIT_NEVER,	 /* it cannot, but reads never wait (tmpfs) */
	VF_WAIT_ALWAYS,	 /* it cannot, and reads may wait */
};
enum vf_wait_mode vf_file_wait_mode(struct vf_file *file);
void vf_file_set_wait_mode(struct vf_file *file, enum vf_wait_mode mode);

/* op_dir.c: how far the reading of an open directory has come; made when first asked for. */
struct vf_dir;
struct vf_dir *vf_dir_new(void);
void vf_dir_free(struct vf_share *share, struct vf_dir *dir);
/* NULL: out of memory. */
struct vf_dir *vf_file_dir(struct vf_share *share, struct vf_file *file);
/* At most VF_DIR_BUFFERS directories keep entries read ahead of the guest. */
#define VF_DIR_BUFFERS 256u
bool vf_dir_buffer_take(struct vf_share *share);
void vf_dir_buffer_give(struct vf_share *share);

/* What open(2) is called with for a guest's flags: the share's cache mode, writeback and direct I/O
 * applied. */
int vf_open_flags(const struct vf_share *share, uint32_t guest_flags);
/* FOPEN_* for a file or directory opened with the guest's flags. */
uint32_t vf_fopen_flags(const struct vf_share *share, uint32_t guest_flags, bool directory,
			bool lasting);

void vf_file_get_stats(struct vf_share *share, struct vf_share_stats *stats);

/* op_lock.c */
struct vf_lock_waiters *vf_lock_waiters_new(struct vf_share *share, int *error);
void vf_lock_waiters_free(struct vf_lock_waiters *waiters);
/* Answers every waiting request of this queue (all queues when NULL) with EINTR. */
void vf_lock_waiters_cancel(struct vf_share *share, struct vf_queue *queue);
/* FLUSH and RELEASE: drops the POSIX locks of an owner on an inode. */
void vf_locks_release_owner(struct vf_share *share, uint64_t nodeid, uint64_t owner);
/* A new session: waiting requests get EINTR, every lock is dropped. */
void vf_locks_clear(struct vf_share *share);
uint32_t vf_locks_n_waiters(struct vf_share *share);
/* The last reference of an inode went: its lock descriptors are closed. */
void vf_locks_release_inode(struct vf_share *share, uint64_t nodeid);

#endif
