/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hiprio queue (FORGET, INTERRUPT).  It has a thread of its own, so that
 * no other request holds it up.  But while a request queue's thread waits
 * awake for its next request, the queue is lent to that: then the guest need
 * not kick for each FORGET (an exit from its processor), nor this thread be
 * woken for it.  What comes on the hiprio queue keeps nobody awake: where
 * that is all that comes, its own thread has it.
 *
 * Who was lent the queue may be stuck in a request of its own, so this thread
 * takes it back after some milliseconds, if nobody has before.  In the end of
 * an object without a name the host may wait for its journal, so after a
 * removal the queue is given back, too; removals of what is open, and by
 * others, are not waited for, and may hold up a request as UNLINK itself does.
 */
#include <sys/epoll.h>

#include "queue.h"

/* The least that epoll_wait(2) knows is one; an INTERRUPT may wait as long. */
#define LOOK_AGAIN_MS 5
/* So many at once keep those on the other's own queue waiting. */
#define AT_ONCE 16u

void vf_lending_init(struct vf_lending *l)
{
	pthread_mutex_init(&l->lock, NULL);
	l->look_again_ms = LOOK_AGAIN_MS;
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

/* With the lock; true: another thread will look from now on. */
static bool lend(struct vf_lending *l)
{
	if (!atomic_load(&l->awake))
		return false;
	atomic_store(&l->lent, true);
	/* Who goes to sleep says so, then looks whether it is lent. */
	if (atomic_load(&l->awake))
		return true;
	atomic_store(&l->lent, false);
	return false;
}

enum next { AGAIN, SLEEP, SLEEP_SHORTLY, BROKEN };

/* unasked: nobody has woken this thread. */
static enum next serve_own(struct vf_queue *q, struct vf_thread *t, bool unasked)
{
	struct vf_lending *l = &q->device->lending;
	enum next next;

	pthread_mutex_lock(&l->lock);
	atomic_store(&l->lent, false);
	/* Who is awake may be stuck.  If not, it says so again, and is lent the queue after a kick.
	 */
	if (unasked)
		atomic_store(&l->awake, NULL);
	vf_ring_disable_kicks(&q->ring);
	if (q->broken || vf_queue_drain(q, t, UINT32_MAX))
		next = BROKEN;
	else if (lend(l))
		next = SLEEP_SHORTLY;
	else
		next = vf_ring_enable_kicks(&q->ring) ? AGAIN : SLEEP;
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
	struct epoll_event events[2];
	struct vf_thread t;
	bool unasked = false;

	if (!vf_queue_enter(q, &t))
		return NULL;
	announce(l, q);
	while (!atomic_load(&q->stopping)) {
		enum next next = serve_own(q, &t, unasked);
		int n;

		if (next == AGAIN)
			continue;
		if (next == BROKEN) {
			/* Only a reset helps; the front end learns it by the error descriptor. */
			vf_queue_signal_error(q);
			vf_queue_wait_for_stop(q);
			break;
		}
		/* Edge-triggered: neither descriptor need be read. */
		n = epoll_wait(q->epoll_fd, events, 2, next == SLEEP ? -1 : l->look_again_ms);
		if (n < 0 && errno != EINTR)
			break;
		unasked = !n;
	}
	announce(l, NULL);
	vf_thread_leave(&t);
	return NULL;
}
