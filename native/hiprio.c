/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hiprio queue (FORGET, INTERRUPT).  It has a thread of its own, so that
 * no other request holds it up.  But while a request queue's thread that is
 * given several requests at once waits awake for the next, the queue is lent
 * to that: then the guest need not kick for each FORGET (an exit from its
 * processor), nor this thread be woken for it.  What comes on the hiprio queue
 * keeps nobody awake: where that is all that comes, its own thread has it.
 *
 * Who was lent the queue may be stuck in a request of its own, so this thread
 * takes it back after some milliseconds, if nobody has before.  In the end of
 * an object without a name the host may wait for its journal, so after a
 * removal the queue is given back, too; removals of what is open, and by
 * others, are not waited for, and may hold up a request as UNLINK itself does.
 */
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include "queue.h"

/* An INTERRUPT may wait as long. */
#define TAKE_BACK_NS 5000000
/* So many at once keep those on the other's own queue waiting. */
#define AT_ONCE 16u

void vf_lending_init(struct vf_lending *l)
{
	pthread_mutex_init(&l->lock, NULL);
	l->take_back_ns = TAKE_BACK_NS;
}

void vf_lending_destroy(struct vf_lending *l)
{
	pthread_mutex_destroy(&l->lock);
}

/* ---- the other's side ---------------------------------------------------- */

static bool is_awake(const struct vf_queue *q)
{
	return atomic_load_explicit(&q->device->lending.awake, memory_order_relaxed) == q;
}

void vf_hiprio_awake(struct vf_queue *q)
{
	struct vf_lending *l = &q->device->lending;
	struct vf_queue *nobody = NULL;

	if (!atomic_load_explicit(&l->awake, memory_order_relaxed))
		atomic_compare_exchange_strong(&l->awake, &nobody, q);
}

bool vf_hiprio_serve(struct vf_queue *q, struct vf_thread *t)
{
	struct vf_lending *l = &q->device->lending;
	bool any;

	if (!atomic_load_explicit(&l->lent, memory_order_relaxed) || !is_awake(q) ||
	    pthread_mutex_trylock(&l->lock))
		return false;
	any = atomic_load(&l->lent) && is_awake(q) && !l->hiprio->broken &&
	      vf_ring_has_work(&l->hiprio->ring);
	if (any)
		vf_queue_drain(l->hiprio, t, AT_ONCE);
	pthread_mutex_unlock(&l->lock);
	return any;
}

/* With the lock. */
static void give_back(struct vf_lending *l)
{
	if (atomic_exchange(&l->lent, false) && vf_ring_enable_kicks(&l->hiprio->ring))
		vf_signal_fd(l->hiprio->wake_fd);
	pthread_mutex_unlock(&l->lock);
}

void vf_hiprio_asleep(struct vf_queue *q)
{
	struct vf_lending *l = &q->device->lending;
	struct vf_queue *expected = q;

	if (!is_awake(q) || !atomic_compare_exchange_strong(&l->awake, &expected, NULL))
		return;
	/* Who has the lock is its own thread, and then it is not lent, or who is awake now. */
	do {
		if (!atomic_load(&l->lent) || atomic_load(&l->awake))
			return;
		vf_relax();
	} while (pthread_mutex_trylock(&l->lock));
	give_back(l);
}

void vf_hiprio_give_back(struct vf_device *device)
{
	struct vf_lending *l = &device->lending;

	if (atomic_load_explicit(&l->lent, memory_order_relaxed) &&
	    !pthread_mutex_trylock(&l->lock))
		give_back(l);
}

/* ---- its own thread ------------------------------------------------------- */

/*
 * The queue is taken back when it expires.  To set a timer is expensive: where the queue is given
 * back and lent again meanwhile it is left running.  Then it expires early, which does no harm.
 */
struct timer {
	int fd; /* -1: there is none, and nothing is lent */
	bool is_set;
};

#define TIMER 1u /* what epoll_wait(2) calls it */

static void timer_open(struct timer *timer, const struct vf_queue *q)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = TIMER};

	timer->is_set = false;
	timer->fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (timer->fd < 0 || !epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, timer->fd, &event))
		return;
	close(timer->fd);
	timer->fd = -1;
}

static bool timer_set(struct timer *timer, long ns)
{
	struct itimerspec in = {.it_value.tv_nsec = ns};

	if (!timer->is_set && timer->fd >= 0)
		timer->is_set = !timerfd_settime(timer->fd, 0, &in, NULL);
	return timer->is_set;
}

/* With the lock; true: another thread will look from now on. */
static bool lend(struct vf_lending *l, struct timer *timer)
{
	if (!atomic_load(&l->awake) || !timer_set(timer, l->take_back_ns))
		return false;
	atomic_store(&l->lent, true);
	/* Who goes to sleep says so, then looks whether it is lent. */
	if (atomic_load(&l->awake))
		return true;
	atomic_store(&l->lent, false);
	return false;
}

enum next { AGAIN, SLEEP, BROKEN };

/* expired: the timer has. */
static enum next serve_own(struct vf_queue *q, struct vf_thread *t, struct timer *timer,
			   bool expired)
{
	struct vf_lending *l = &q->device->lending;
	enum next next;

	pthread_mutex_lock(&l->lock);
	/* Who is awake may be stuck; if not, it says so again, and is lent it after a kick. */
	if (atomic_exchange(&l->lent, false) && expired)
		atomic_store(&l->awake, NULL);
	vf_ring_disable_kicks(&q->ring);
	if (!q->broken)
		vf_queue_drain(q, t, UINT32_MAX);
	if (q->broken)
		next = BROKEN;
	else
		next = !lend(l, timer) && vf_ring_enable_kicks(&q->ring) ? AGAIN : SLEEP;
	pthread_mutex_unlock(&l->lock);
	return next;
}

/* NULL: from now on nobody else touches the queue. */
static void announce(struct vf_lending *l, struct vf_queue *hiprio)
{
	pthread_mutex_lock(&l->lock);
	l->hiprio = hiprio;
	atomic_store(&l->lent, false);
	pthread_mutex_unlock(&l->lock);
}

void *vf_hiprio_queue_main(void *arg)
{
	struct vf_queue *q = arg;
	struct vf_lending *l = &q->device->lending;
	struct epoll_event events[3];
	struct timer timer;
	struct vf_thread t;
	bool expired = false;

	if (!vf_queue_enter(q, &t))
		return NULL;
	timer_open(&timer, q);
	announce(l, q);
	while (!atomic_load(&q->stopping)) {
		enum next next = serve_own(q, &t, &timer, expired);
		int n;

		expired = false;
		if (next == AGAIN)
			continue;
		if (next == BROKEN) {
			/* Only a reset helps; the front end learns it by the error descriptor. */
			vf_queue_signal_error(q);
			vf_queue_wait_for_stop(q);
			break;
		}
		/* Edge-triggered: no descriptor need be read. */
		n = epoll_wait(q->epoll_fd, events, 3, -1);
		if (n < 0 && errno != EINTR)
			break;
		while (n-- > 0)
			expired |= events[n].data.u32 == TIMER;
		if (expired)
			timer.is_set = false;
	}
	announce(l, NULL);
	if (timer.fd >= 0)
		close(timer.fd);
	vf_thread_leave(&t);
	return NULL;
}
