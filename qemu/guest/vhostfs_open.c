// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: opens for reading that this driver answers itself (DEFERRED_OPEN)
 *
 * While caches are coherent, what a file or directory is opened for is in them
 * most of the time, and OPEN, FLUSH and RELEASE would be all that is asked. So
 * what the server has let open once, to be kept, is opened again without asking,
 * under a handle of ours. The server opens when a request needs that, and only
 * of such handles is it told of the end. docs/protocol.md of vhostfs, 8.2.
 *
 *  - What may be opened is forgotten by the same rule as what is cached:
 *    first the numbers of the requests until now are noted, then it is
 *    forgotten; an answer first makes known, and then looks at the numbers.
 *  - The low bits of a handle are its place in the table, free again when
 *    nothing at the server has its name any more.
 *  - A FLUSH drops the POSIX locks of its owner on the object, whatever handle
 *    they were made by. It is sent where there may be some.
 */

#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/mm.h>
#include "vhostfs_internal.h"

#define VHOSTFS_FH		BIT_ULL(63)
#define VHOSTFS_FH_BITS		16
#define VHOSTFS_FH_TRIES	16
#define VHOSTFS_KNOWN_BITS	14
#define VHOSTFS_KNOWN_WAYS	8

/* What says nothing about what may be done with an open file, as far as the server goes */
#define VHOSTFS_OPEN_FLAGS	(O_NONBLOCK | O_LARGEFILE | O_DIRECTORY | \
				 O_NOFOLLOW | O_CLOEXEC | O_NOCTTY | \
				 (__force unsigned int)__FMODE_EXEC)
/* More than that in an answer is not known here */
#define VHOSTFS_KEPT_FLAGS	(FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR | FOPEN_NOFLUSH)

struct vhostfs_opens {
	/* nodeids; 0: none */
	u64 known[1 << VHOSTFS_KNOWN_BITS][VHOSTFS_KNOWN_WAYS];
	atomic_t next_way;
	atomic64_t next;		/* number of a handle */
	/* By the low bits of handles: given out; and the server has heard of it */
	DECLARE_BITMAP(taken, 1 << VHOSTFS_FH_BITS);
	DECLARE_BITMAP(used, 1 << VHOSTFS_FH_BITS);
};

/* ---- what may be opened ----------------------------------------------------------- */

static u64 *vhostfs_known(struct vhostfs_opens *opens, u64 nodeid)
{
	return opens->known[hash_64(nodeid, VHOSTFS_KNOWN_BITS)];
}

static bool vhostfs_is_known(struct vhostfs_opens *opens, u64 nodeid)
{
	u64 *known = vhostfs_known(opens, nodeid);
	unsigned int i;

	for (i = 0; i < VHOSTFS_KNOWN_WAYS; i++)
		if (READ_ONCE(known[i]) == nodeid)
			return true;
	return false;
}

static void vhostfs_know(struct vhostfs_opens *opens, u64 nodeid)
{
	u64 *known = vhostfs_known(opens, nodeid);
	unsigned int i;

	if (vhostfs_is_known(opens, nodeid))
		return;
	for (i = 0; i < VHOSTFS_KNOWN_WAYS; i++)
		if (!cmpxchg64(&known[i], 0, nodeid))
			return;
	/* One that is as good as any other */
	i = (unsigned int)atomic_inc_return(&opens->next_way) %
	    VHOSTFS_KNOWN_WAYS;
	WRITE_ONCE(known[i], nodeid);
}

/* After the numbers of requests were noted, see vhostfs_open_answered() */
void vhostfs_forget_open(struct vhostfs_notify *n, u64 nodeid)
{
	struct vhostfs_opens *opens = READ_ONCE(n->opens);
	u64 *known;
	unsigned int i;

	if (!opens || !nodeid)
		return;
	known = vhostfs_known(opens, nodeid);
	for (i = 0; i < VHOSTFS_KNOWN_WAYS; i++)
		if (READ_ONCE(known[i]) == nodeid)
			cmpxchg64(&known[i], nodeid, 0);
}

void vhostfs_forget_opens(struct vhostfs_notify *n)
{
	struct vhostfs_opens *opens = READ_ONCE(n->opens);
	unsigned int set, way;

	if (!opens)
		return;
	/* Never a part of a number */
	for (set = 0; set < 1 << VHOSTFS_KNOWN_BITS; set++)
		for (way = 0; way < VHOSTFS_KNOWN_WAYS; way++)
			WRITE_ONCE(opens->known[set][way], 0);
}

/* ---- life ---------------------------------------------------------------------------- */

/* A connection begins: handles of an earlier one are over */
void vhostfs_reset_opens(struct vhostfs_notify *n)
{
	WRITE_ONCE(n->deferring, false);
	bitmap_zero(n->locked, 1 << VHOSTFS_LOCKED_BITS);
}

/* The session is about to begin. Without memory everything is asked for */
void vhostfs_begin_opens(struct vhostfs_notify *n)
{
	struct vhostfs_opens *opens = n->opens;

	if (!(READ_ONCE(n->granted) & FUSE_FSNOTIFY_DEFERRED_OPEN) ||
	    !vhostfs_is_coherent(n))
		return;
	if (!opens)
		opens = kvzalloc(sizeof(*opens), GFP_KERNEL);
	if (!opens)
		return;
	bitmap_zero(opens->taken, 1 << VHOSTFS_FH_BITS);
	bitmap_zero(opens->used, 1 << VHOSTFS_FH_BITS);
	WRITE_ONCE(n->opens, opens);
	vhostfs_forget_opens(n);
	smp_store_release(&n->deferring, true);
}

void vhostfs_free_opens(struct vhostfs_notify *n)
{
	kvfree(n->opens);
}

/* ---- requests -------------------------------------------------------------------------- */

/* NULL: none of ours can be under way */
static struct vhostfs_opens *vhostfs_opens_of(struct vhostfs_notify *n)
{
	return smp_load_acquire(&n->deferring) ? n->opens : NULL;
}

static unsigned int vhostfs_slot(u64 fh)
{
	return fh & (BIT(VHOSTFS_FH_BITS) - 1);
}

static u64 vhostfs_new_handle(struct vhostfs_opens *opens)
{
	unsigned int tries;
	u64 fh;

	for (tries = 0; tries < VHOSTFS_FH_TRIES; tries++) {
		fh = VHOSTFS_FH | (u64)atomic64_inc_return(&opens->next);
		if (!test_and_set_bit(vhostfs_slot(fh), opens->taken))
			return fh;
	}
	return 0;
}

/* Would the server's answer, but for the handle, be the one that it gave before? */
static bool vhostfs_is_plain_open(const struct fuse_args *args)
{
	const struct fuse_open_in *arg = args->in_args[0].value;

	return !(arg->flags & ~VHOSTFS_OPEN_FLAGS) && !arg->open_flags;
}

static bool vhostfs_open_here(struct vhostfs_notify *n,
			      struct vhostfs_opens *opens,
			      const struct fuse_in_header *in,
			      struct fuse_args *args)
{
	struct fuse_open_out *out = args->out_args[0].value;
	u64 fh;

	if (!vhostfs_is_plain_open(args) ||
	    !vhostfs_is_known(opens, in->nodeid))
		return false;
	fh = vhostfs_new_handle(opens);
	if (!fh)
		return false;
	memset(out, 0, sizeof(*out));
	out->fh = fh;
	out->open_flags = FOPEN_KEEP_CACHE;
	if (in->opcode == FUSE_OPENDIR)
		out->open_flags |= FOPEN_CACHE_DIR;
	vhostfs_count(n, VHOSTFS_OPENED);
	return true;
}

static u64 vhostfs_fh_of(const struct fuse_args *args)
{
	return *(const u64 *)args->in_args[0].value;
}

static unsigned int vhostfs_locked(u64 nodeid)
{
	return hash_64(nodeid, VHOSTFS_LOCKED_BITS);
}

static void vhostfs_note_lock(struct vhostfs_notify *n,
			      const struct fuse_in_header *in,
			      const struct fuse_args *args)
{
	const struct fuse_lk_in *arg = args->in_args[0].value;

	if (!(arg->lk_flags & FUSE_LK_FLOCK) && arg->lk.type != F_UNLCK)
		set_bit(vhostfs_locked(in->nodeid), n->locked);
}

/*
 * A request of the FUSE core is about to be sent. True: it need not be, and its
 * answer is there. @background: nobody waits for it in its task. Under no lock
 * but, with @background, the one of background requests.
 */
bool vhostfs_open_sent(struct vhostfs_notify *n, const struct fuse_in_header *in,
		       struct fuse_args *args, bool background)
{
	struct vhostfs_opens *opens = vhostfs_opens_of(n);
	u64 fh;

	switch (in->opcode) {
	case FUSE_SETLK:
	case FUSE_SETLKW:
		vhostfs_note_lock(n, in, args);
		break;
	case FUSE_SETATTR:	/* whether it can be opened may be decided anew */
	case FUSE_SETXATTR:
	case FUSE_REMOVEXATTR:
		if (opens)
			vhostfs_forget_open(n, in->nodeid);
		return false;
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		return opens && !background &&
		       vhostfs_open_here(n, opens, in, args);
	case FUSE_READ:
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
	case FUSE_WRITE:
	case FUSE_FSYNC:
	case FUSE_FSYNCDIR:
	case FUSE_LSEEK:
	case FUSE_FALLOCATE:
	case FUSE_COPY_FILE_RANGE:
#if VHOSTFS_KERNEL >= 700
	case FUSE_COPY_FILE_RANGE_64:
#endif
	case FUSE_GETLK:
	case FUSE_IOCTL:
	case FUSE_POLL:
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		break;
	default:
		return false;
	}

	/* All of these begin with the handle */
	fh = vhostfs_fh_of(args);
	if (!opens || !(fh & VHOSTFS_FH))
		return false;
	switch (in->opcode) {
	case FUSE_FLUSH:
		return !test_bit(vhostfs_locked(in->nodeid), n->locked);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		if (test_bit(vhostfs_slot(fh), opens->used))
			return false;
		clear_bit(vhostfs_slot(fh), opens->taken);
		return true;
	}
	set_bit(vhostfs_slot(fh), opens->used);
	return false;
}

static bool vhostfs_may_know(const struct fuse_in_header *in,
			     const struct fuse_args *args)
{
	const struct fuse_open_out *out = args->out_args[0].value;
	u32 wanted = FOPEN_KEEP_CACHE |
		     (in->opcode == FUSE_OPENDIR ? FOPEN_CACHE_DIR : 0);

	return vhostfs_is_plain_open(args) &&
	       (out->open_flags & wanted) == wanted &&
	       !(out->open_flags & ~VHOSTFS_KEPT_FLAGS);
}

/* The server has answered, without an error */
void vhostfs_open_answered(struct vhostfs_notify *n,
			   const struct fuse_in_header *in,
			   struct fuse_args *args)
{
	struct vhostfs_opens *opens = vhostfs_opens_of(n);
	u64 fh;

	if (!opens)
		return;
	switch (in->opcode) {
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		if (!vhostfs_may_know(in, args))
			break;
		vhostfs_know(opens, in->nodeid);
		/* Before the numbers are looked at */
		smp_mb();
		if (vhostfs_is_old(n, in->unique, in->nodeid))
			vhostfs_forget_open(n, in->nodeid);
		break;
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		fh = vhostfs_fh_of(args);
		if (!(fh & VHOSTFS_FH))
			break;
		clear_bit(vhostfs_slot(fh), opens->used);
		smp_mb__after_atomic();
		clear_bit(vhostfs_slot(fh), opens->taken);
		break;
	}
}
