// SPDX-License-Identifier: Apache-2.0
/*
 * Lock requests.  POSIX locks are lock_owner.c's, flock(2) locks are on the
 * handle's own descriptor.  A request that has to wait gets a thread; see
 * waiter_main().
 */
#include "core.h"

#include <limits.h>
#include <signal.h>
#include <sys/file.h>
#include <time.h>

#include "file.h"
#include "lock_owner.h"

#define MAX_DEADLOCK_STEPS 1024u
#define WAITER_STACK (128u * 1024)
#define N_INTERRUPTS (sizeof(((struct vf_lock_waiters *)0)->interrupts) / sizeof(uint64_t))
#define NUDGE_NS 2000000
#define WAITER_SIGNAL (SIGRTMIN + 1)

struct lock_waiter {
	struct lock_waiter *next;
	struct vf_share *share;
	struct vf_queue *queue;
	struct vf_req *request;
	uint64_t unique;
	struct lock_owner *owner; /* POSIX lock */
	struct vf_file *file;	  /* flock */
	struct lock_range range;
	pthread_t thread;
	bool started; /* thread is valid */
	bool interrupted;
};

static void on_waiter_signal(int number)
{
	(void)number;
}

static void catch_waiter_signal(void)
{
	/* No SA_RESTART: it is there to make fcntl(2) and flock(2) return. */
	struct sigaction action = {.sa_handler = on_waiter_signal};

	sigemptyset(&action.sa_mask);
	sigaction(WAITER_SIGNAL, &action, NULL);
}

struct vf_lock_waiters *vf_lock_waiters_new(struct vf_share *share, int *error)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct vf_lock_waiters *locks = calloc(1, sizeof(*locks));

	*error = locks ? 0 : -ENOMEM;
	if (!locks)
		return NULL;
	pthread_once(&once, catch_waiter_signal);
	locks->share = share;
	pthread_mutex_init(&locks->lock, NULL);
	pthread_cond_init(&locks->gone, NULL);
	return locks;
}

void vf_lock_waiters_free(struct vf_lock_waiters *locks)
{
	if (!locks)
		return;
	vf_locks_clear(locks->share);
	locks->share->locks = NULL;
	pthread_cond_destroy(&locks->gone);
	pthread_mutex_destroy(&locks->lock);
	free(locks);
}

uint32_t vf_locks_n_waiters(struct vf_share *share)
{
	return share->locks ? atomic_load(&share->locks->n_waiters) : 0;
}

/* ---- requests that wait ------------------------------------------------- */

/*
 * Whether waiting for `wanted` on nodeid closes a circle of the guest's own owners.  A process of
 * the host in the circle is not seen, as it would not be on a network file system.
 */
static bool reaches(struct vf_lock_waiters *locks, uint64_t nodeid, const struct lock_range *wanted,
		    uint64_t waiting_id, uint64_t goal, uint32_t depth, uint32_t *steps)
{
	if (!depth)
		return false;
	for (struct lock_owner *o = *lock_bucket(locks, nodeid); o; o = o->next) {
		if (++*steps > MAX_DEADLOCK_STEPS)
			return false;
		if (o->nodeid != nodeid || o->id == waiting_id || !lock_held_against(o, wanted))
			continue;
		if (o->id == goal)
			return true;
		for (struct lock_waiter *w = locks->waiters; w; w = w->next) {
			if (++*steps > MAX_DEADLOCK_STEPS)
				return false;
			if (w->owner && w->owner->id == o->id && !w->interrupted &&
			    reaches(locks, w->owner->nodeid, &w->range, o->id, goal, depth - 1,
				    steps))
				return true;
		}
	}
	return false;
}

static bool would_deadlock(struct vf_lock_waiters *locks, const struct lock_owner *owner,
			   const struct lock_range *wanted)
{
	uint32_t steps = 0;

	return reaches(locks, owner->nodeid, wanted, owner->id, owner->id, 10, &steps);
}

/*
 * A signal that comes between a waiter's look at `interrupted` and its system call is lost, so
 * interrupted waiters are signalled until they are gone.
 */
static void *nudger_main(void *arg)
{
	struct vf_lock_waiters *locks = arg;

	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	pthread_setname_np(pthread_self(), "vhostfs-nudge");
	pthread_mutex_lock(&locks->lock);
	for (;;) {
		bool any = false;

		for (struct lock_waiter *w = locks->waiters; w; w = w->next) {
			if (!w->interrupted)
				continue;
			any = true;
			if (w->started)
				pthread_kill(w->thread, WAITER_SIGNAL);
		}
		if (!any)
			break;
		pthread_mutex_unlock(&locks->lock);
		nanosleep(&(struct timespec){.tv_nsec = NUDGE_NS}, NULL);
		pthread_mutex_lock(&locks->lock);
	}
	locks->nudging = false;
	pthread_cond_broadcast(&locks->gone);
	pthread_mutex_unlock(&locks->lock);
	return NULL;
}

static int start_thread(void *(*run)(void *), void *arg)
{
	pthread_attr_t attributes;
	pthread_t thread;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, WAITER_STACK);
	error = pthread_create(&thread, &attributes, run, arg);
	pthread_attr_destroy(&attributes);
	return -error;
}

/* The lock is held. */
static void interrupt_waiter(struct vf_lock_waiters *locks, struct lock_waiter *w)
{
	w->interrupted = true;
	if (w->started)
		pthread_kill(w->thread, WAITER_SIGNAL);
	if (!locks->nudging && start_thread(nudger_main, locks) == 0)
		locks->nudging = true;
}

static int flock_operation(uint32_t type)
{
	return type == F_RDLCK ? LOCK_SH : type == F_WRLCK ? LOCK_EX : LOCK_UN;
}

/* 0 when the lock was got. */
static int wait_for_lock(struct lock_waiter *w)
{
	struct vf_lock_waiters *locks = w->share->locks;
	struct flock fl = lock_range_to_flock(&w->range);
	int error;

	for (;;) {
		bool interrupted;

		pthread_mutex_lock(&locks->lock);
		interrupted = w->interrupted;
		pthread_mutex_unlock(&locks->lock);
		if (interrupted)
			return -EINTR;
		if (w->owner)
			error = fcntl(w->owner->fd, F_OFD_SETLKW, &fl);
		else
			error = flock(vf_file_fd(w->file), flock_operation(w->range.type));
		if (error == 0)
			return 0;
		if (errno != EINTR)
			return -errno;
	}
}

static void remove_waiter(struct vf_lock_waiters *locks, struct lock_waiter *w)
{
	struct lock_waiter **p = &locks->waiters;

	while (*p != w)
		p = &(*p)->next;
	*p = w->next;
	atomic_fetch_sub(&locks->n_waiters, 1);
	pthread_cond_broadcast(&locks->gone);
}

static void *waiter_main(void *arg)
{
	struct lock_waiter *w = arg;
	struct vf_share *share = w->share;
	struct vf_lock_waiters *locks = share->locks;
	sigset_t signals;
	int error;

	pthread_setname_np(pthread_self(), "vhostfs-lock");
	sigemptyset(&signals);
	sigaddset(&signals, WAITER_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
	pthread_mutex_lock(&locks->lock);
	w->thread = pthread_self();
	w->started = true;
	pthread_mutex_unlock(&locks->lock);

	error = wait_for_lock(w);
	if (w->owner) {
		if (!error)
			error = lock_owner_granted(locks, w->owner, &w->range);
		lock_owner_end_use(locks, w->owner, false);
	} else {
		vf_file_put(share, w->file);
	}
	/* Whoever cancels waits until the answer is given, so it comes before the removal. */
	vf_req_complete(w->request, error, NULL, 0);
	pthread_mutex_lock(&locks->lock);
	remove_waiter(locks, w);
	pthread_mutex_unlock(&locks->lock);
	free(w);
	return NULL;
}

/* Whether an interrupt came before the request that it is for; it is used up. */
static bool take_interrupt(struct vf_lock_waiters *locks, uint64_t unique)
{
	for (uint32_t i = 0; unique && i < N_INTERRUPTS; i++) {
		if (locks->interrupts[i] == unique) {
			locks->interrupts[i] = 0;
			return true;
		}
	}
	return false;
}

/*
 * Lets a thread wait for the lock.  VF_ASYNC: it has the request, and the use of owner or file;
 * else a negative errno, and these are still the caller's.
 */
static int32_t wait_in_thread(struct vf_req *r, struct lock_owner *owner, struct vf_file *file,
			      const struct lock_range *range)
{
	struct vf_lock_waiters *locks = r->share->locks;
	struct lock_waiter *w = calloc(1, sizeof(*w));
	int32_t error = 0;

	if (!w)
		return -ENOLCK;
	w->share = r->share;
	w->queue = r->queue;
	w->request = r;
	w->unique = r->header.unique;
	w->owner = owner;
	w->file = file;
	w->range = *range;
	pthread_mutex_lock(&locks->lock);
	if (take_interrupt(locks, w->unique))
		error = -EINTR;
	else if (atomic_load(&locks->n_waiters) >= r->share->config.lock_waiters)
		error = -ENOLCK;
	else if (owner && would_deadlock(locks, owner, range))
		error = -EDEADLK;
	if (!error) {
		w->next = locks->waiters;
		locks->waiters = w;
		atomic_fetch_add(&locks->n_waiters, 1);
		if (start_thread(waiter_main, w)) {
			remove_waiter(locks, w);
			error = -ENOLCK;
		}
	}
	pthread_mutex_unlock(&locks->lock);
	if (!error)
		return VF_ASYNC;
	free(w);
	return error;
}

void vf_lock_waiters_cancel(struct vf_share *share, struct vf_queue *queue)
{
	struct vf_lock_waiters *locks = share->locks;

	pthread_mutex_lock(&locks->lock);
	for (;;) {
		struct timespec soon;
		bool any = false;

		for (struct lock_waiter *w = locks->waiters; w; w = w->next) {
			if (queue && w->queue != queue)
				continue;
			any = true;
			interrupt_waiter(locks, w);
		}
		/* The nudger works on this table, which may be freed next. */
		if (!any && (queue || !locks->nudging))
			break;
		clock_gettime(CLOCK_REALTIME, &soon);
		soon.tv_nsec += NUDGE_NS;
		if (soon.tv_nsec >= 1000000000) {
			soon.tv_nsec -= 1000000000;
			soon.tv_sec++;
		}
		pthread_cond_timedwait(&locks->gone, &locks->lock, &soon);
	}
	pthread_mutex_unlock(&locks->lock);
}

void vf_locks_clear(struct vf_share *share)
{
	struct vf_lock_waiters *locks = share->locks;

	vf_lock_waiters_cancel(share, NULL);
	lock_owners_clear(locks);
	memset(locks->interrupts, 0, sizeof(locks->interrupts));
}

/* ---- operations --------------------------------------------------------- */

static int check_range(const struct fuse_lk_in *in, struct lock_range *range)
{
	const struct fuse_file_lock *lk = &in->lk;

	if (lk->start > lk->end || lk->end > INT64_MAX ||
	    (lk->type != F_RDLCK && lk->type != F_WRLCK && lk->type != F_UNLCK))
		return -EINVAL;
	*range = (struct lock_range){lk->start, lk->end, lk->type, lk->pid};
	return 0;
}

/* The guest's process that holds what the host found in the way; 0: none that we know. */
static uint32_t holder_pid(struct vf_lock_waiters *locks, uint64_t nodeid, uint64_t asking,
			   const struct lock_range *found)
{
	uint32_t pid = 0;

	pthread_mutex_lock(&locks->lock);
	for (struct lock_owner *o = *lock_bucket(locks, nodeid); o && !pid; o = o->next) {
		const struct lock_range *held;

		if (o->nodeid != nodeid || o->id == asking)
			continue;
		held = lock_held_against(
		    o, &(struct lock_range){found->start, found->end, F_WRLCK, 0});
		if (held)
			pid = held->pid;
	}
	pthread_mutex_unlock(&locks->lock);
	return pid;
}

int32_t vf_op_getlk(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const struct fuse_lk_in *in = vf_arg(r, sizeof(*in));
	struct fuse_lk_out *out = (struct fuse_lk_out *)t->reply;
	struct lock_range range;
	struct lock_owner *owner;
	struct vf_file *file;
	struct flock fl;
	int error;

	if (!(vf_session_flags(share) & FUSE_POSIX_LOCKS))
		return -ENOSYS;
	if (!in || check_range(in, &range) || range.type == F_UNLCK)
		return -EINVAL;
	error = vf_file_use(share, r->header.nodeid, in->fh, VF_REGULAR, &file);
	if (error)
		return error;
	/* An owner's own locks are not in its way; the handle's descriptor never has any. */
	owner = lock_owner_use(share->locks, r->header.nodeid, in->owner, false, &error);
	fl = lock_range_to_flock(&range);
	if (fcntl(owner ? owner->fd : vf_file_fd(file), F_OFD_GETLK, &fl) < 0)
		error = -errno;
	if (owner)
		lock_owner_end_use(share->locks, owner, false);
	vf_file_put(share, file);
	if (error)
		return error;
	memset(out, 0, sizeof(*out));
	out->lk.type = (uint32_t)fl.l_type;
	if (fl.l_type != F_UNLCK) {
		out->lk.start = (uint64_t)fl.l_start;
		out->lk.end = fl.l_len ? (uint64_t)(fl.l_start + fl.l_len - 1) : INT64_MAX;
		range.start = out->lk.start;
		range.end = out->lk.end;
		/* A process of the host has no number in the guest. */
		if (fl.l_pid == -1)
			out->lk.pid = holder_pid(share->locks, r->header.nodeid, in->owner, &range);
	}
	return sizeof(*out);
}

static int32_t set_posix_lock(struct vf_req *r, const struct fuse_lk_in *in,
			      const struct lock_range *range, bool wait)
{
	struct vf_lock_waiters *locks = r->share->locks;
	bool unlock = range->type == F_UNLCK;
	struct lock_owner *owner;
	int error, result;

	owner = lock_owner_use(locks, r->header.nodeid, in->owner, !unlock, &error);
	if (!owner) /* nothing to unlock, or an error */
		return error;
	result = lock_owner_set(locks, owner, range);
	if (result == -EAGAIN && wait) {
		result = wait_in_thread(r, owner, NULL, range);
		if (result == VF_ASYNC)
			return result;
	}
	lock_owner_end_use(locks, owner, unlock && range->start == 0 && range->end == INT64_MAX);
	return result;
}

static int32_t set_flock(struct vf_req *r, struct vf_file *file, const struct lock_range *range,
			 bool wait)
{
	int32_t result = 0;

	if (flock(vf_file_fd(file), flock_operation(range->type) | LOCK_NB) < 0)
		result = -errno;
	if (result == -EWOULDBLOCK && wait)
		result = wait_in_thread(r, NULL, file, range);
	return result;
}

static int32_t set_lock(struct vf_req *r, bool wait)
{
	struct vf_share *share = r->share;
	const struct fuse_lk_in *in = vf_arg(r, sizeof(*in));
	bool whole_file;
	struct lock_range range;
	struct vf_file *file;
	int32_t result;

	if (!in)
		return -EINVAL;
	whole_file = in->lk_flags & FUSE_LK_FLOCK;
	if (!(vf_session_flags(share) & (whole_file ? FUSE_FLOCK_LOCKS : FUSE_POSIX_LOCKS)))
		return -ENOSYS;
	if (check_range(in, &range))
		return -EINVAL;
	/* flock(2) works on directories too. */
	result = vf_file_use(share, r->header.nodeid, in->fh, whole_file ? VF_EITHER : VF_REGULAR,
			     &file);
	if (result)
		return result;
	result =
	    whole_file ? set_flock(r, file, &range, wait) : set_posix_lock(r, in, &range, wait);
	if (!(whole_file && result == VF_ASYNC))
		vf_file_put(share, file);
	return result;
}

int32_t vf_op_setlk(struct vf_thread *t, struct vf_req *r)
{
	(void)t;
	return set_lock(r, false);
}

int32_t vf_op_setlkw(struct vf_thread *t, struct vf_req *r)
{
	(void)t;
	return set_lock(r, true);
}

/*
 * Only lock requests wait long enough to be worth it.  -EAGAIN for one that does not wait (the
 * kernel then asks again while it has no answer, Documentation/filesystems/fuse.rst); it is kept
 * in mind as well, for a driver that does not.
 */
int32_t vf_op_interrupt(struct vf_thread *t, struct vf_req *r)
{
	struct vf_lock_waiters *locks = r->share->locks;
	const struct fuse_interrupt_in *in = vf_arg(r, sizeof(*in));
	int32_t result = -EAGAIN;

	(void)t;
	if (!in)
		return -EINVAL;
	pthread_mutex_lock(&locks->lock);
	for (struct lock_waiter *w = locks->waiters; w; w = w->next) {
		if (w->unique == in->unique) {
			interrupt_waiter(locks, w);
			result = 0;
			break;
		}
	}
	if (result == -EAGAIN && in->unique)
		locks->interrupts[locks->next_interrupt++ % N_INTERRUPTS] = in->unique;
	pthread_mutex_unlock(&locks->lock);
	return r->out_size < sizeof(struct fuse_out_header) ? VF_NO_REPLY : result;
}
