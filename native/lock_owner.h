/* SPDX-License-Identifier: Apache-2.0 */
/*
 * POSIX lock owners: each (inode, lock owner) of the guest has a descriptor of
 * its own, and its locks are open file description locks on it (fcntl(2),
 * F_OFD_SETLK), so that owners conflict with each other and with the host's
 * processes.  What an owner holds is written down too: the host does not tell
 * which of our descriptors is in the way, and someone must bound it.
 */
#ifndef VHOSTFS_LOCK_OWNER_H
#define VHOSTFS_LOCK_OWNER_H

#include "core.h"

#define LOCK_BUCKETS 1024u

struct lock_range {
	uint64_t start, end; /* inclusive */
	uint32_t type;	     /* F_RDLCK or F_WRLCK */
	uint32_t pid;	     /* the guest's */
};

/* One lock owner on one inode. */
struct lock_owner {
	struct lock_owner *next; /* in its bucket */
	uint64_t nodeid;
	uint64_t id; /* fuse_lk_in.owner */
	int fd;
	uint32_t users;		   /* operations that work with it now */
	pthread_mutex_t changing;  /* keeps ranges in step with what the host has */
	struct lock_range *ranges; /* by start, never overlapping */
	uint32_t n_ranges, room;
	bool forgotten; /* the inode went; not in its bucket any more */
};

struct lock_waiter;

struct vf_lock_waiters {
	struct vf_share *share;
	pthread_mutex_t lock; /* everything below; taken after lock_owner.changing */
	struct lock_owner *buckets[LOCK_BUCKETS];
	atomic_uint n_owners;
	uint32_t n_ranges;
	/* op_lock.c */
	pthread_cond_t gone; /* a waiter, or the nudger, has ended */
	struct lock_waiter *waiters;
	atomic_uint n_waiters;
	bool nudging;
	uint64_t interrupts[64]; /* of requests not seen yet */
	uint32_t next_interrupt;
};

/* All owners of an inode are in this bucket's list, among others. The lock is held. */
struct lock_owner **lock_bucket(struct vf_lock_waiters *locks, uint64_t nodeid);
/* A range of the owner that conflicts with the wanted one, or NULL. The lock is held. */
const struct lock_range *lock_held_against(const struct lock_owner *owner,
					   const struct lock_range *wanted);

/* The owner, counted as used; made when there is none (create) or NULL, with *error 0 or negative.
 */
struct lock_owner *lock_owner_use(struct vf_lock_waiters *locks, uint64_t nodeid, uint64_t id,
				  bool create, int *error);
/* Ends the use; drop: an owner that holds nothing is given up. */
void lock_owner_end_use(struct vf_lock_waiters *locks, struct lock_owner *owner, bool drop);
/* Closes all of them; nothing uses any. */
void lock_owners_clear(struct vf_lock_waiters *locks);

struct flock lock_range_to_flock(const struct lock_range *range);
/* Sets or drops a lock without waiting; 0, -EAGAIN or another negative errno. */
int lock_owner_set(struct vf_lock_waiters *locks, struct lock_owner *owner,
		   const struct lock_range *range);
/* Writes down a lock that was waited for; what cannot be written down is dropped again. */
int lock_owner_granted(struct vf_lock_waiters *locks, struct lock_owner *owner,
		       const struct lock_range *range);

#endif
