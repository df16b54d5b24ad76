/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hiprio queue (FORGET, INTERRUPT).  It has a thread of its own, so that
 * no other request holds it up.  But while a request queue's thread is awake
 * anyway, the queue is lent to that: then the guest need not kick for each
 * FORGET (an exit from its processor), nor this thread be woken for it.
 *
 * The lender looks again every now and then, should the borrower be stuck.
 */
#include <sys/epoll.h>

#include "queue.h"

/* The least that epoll_wait(2) knows is one; an INTERRUPT may wait as long. */
#define LOOK_AGAIN_MS 5

static bool try_lock(struct vf_device *device)
{
	return pthread_mutex_trylock(&device->hiprio_lock) == 0;
}

void vf_hiprio_awake(struct vf_queue *q)
{
	struct vf_queue *nobody = NULL;

	if (!atomic_load_explicit(&q->device->awake, memory_order_relaxed))
		atomic_compare_exchange_strong(&q->device->awake, &nobody, q);
}

bool vf_hiprio_serve(struct vf_queue *q, struct vf_thread *t)
{
	struct vf_device *device = q->device;
	struct vf_queue *hiprio;
	bool any;

	if (!atomic_load_explicit(&device->lent, memory_order_relaxed) ||
	    atomic_load_explicit(&device->awake, memory_order_relaxed) != q || !try_lock(device))
		return false;
	hiprio = device->hiprio;
	any = atomic_load(&device->lent) && !hiprio->broken && vf_ring_has_work(&hiprio->ring);
	if (any)
		vf_queue_drain(hiprio, t, hiprio->ring.size);
	pthread_mutex_unlock(&device->hiprio_lock);
	return any;
}

void vf_hiprio_asleep(struct vf_queue *q, struct vf_thread *t)
{
	struct vf_device *device = q->device;
	struct vf_queue *expected = q, *hiprio;

	if (atomic_load_explicit(&device->awake, memory_order_relaxed) != q ||
	    !atomic_compare_exchange_strong(&device->awake, &expected, NULL))
		return;
	/* Its own thread may have the lock and have to wait, but then the queue is not lent. */
	do {
		if (!atomic_load(&device->lent))
			return;
		vf_relax();
	} while (!try_lock(device));
	hiprio = device->hiprio;
	if (atomic_exchange(&device->lent, false)) {
		/* What a guest adds after that, without end perhaps, its own thread will find. */
		for (int i = 0; i < 2 && !hiprio->broken; i++) {
			if (!vf_ring_enable_kicks(&hiprio->ring))
				break;
			vf_queue_drain(hiprio, t, hiprio->ring.size);
		}
	}
	pthread_mutex_unlock(&device->hiprio_lock);
}

/* With the lock: nothing is in the ring.  True: another thread will look from now on. */
static bool lend(struct vf_device *device)
{
	atomic_store(&device->lent, true);
	/* Whoever goes to sleep says so, then looks whether it is lent. */
	if (atomic_load(&device->awake))
		return true;
	atomic_store(&device->lent, false);
	return false;
}

enum next { AGAIN, SLEEP, SLEEP_SHORTLY, BROKEN };

static enum next serve_own(struct vf_queue *q, struct vf_thread *t)
{
	struct vf_device *device = q->device;
	enum next next;

	pthread_mutex_lock(&device->hiprio_lock);
	atomic_store(&device->lent, false);
	vf_ring_disable_kicks(&q->ring);
	if (q->broken || vf_queue_drain(q, t, UINT32_MAX))
		next = BROKEN;
	else if (lend(device))
		next = SLEEP_SHORTLY;
	else
		next = vf_ring_enable_kicks(&q->ring) ? AGAIN : SLEEP;
	pthread_mutex_unlock(&device->hiprio_lock);
	return next;
}

/* NULL: from now on nobody else touches the queue. */
static void announce(struct vf_device *device, struct vf_queue *hiprio)
{
	pthread_mutex_lock(&device->hiprio_lock);
	device->hiprio = hiprio;
	atomic_store(&device->lent, false);
	pthread_mutex_unlock(&device->hiprio_lock);
}

void *vf_hiprio_queue_main(void *arg)
{
	struct vf_queue *q = arg;
	struct vf_device *device = q->device;
	struct vf_thread t;
	struct epoll_event events[2];

	if (!vf_queue_enter(q, &t))
		return NULL;
	announce(device, q);
	while (!atomic_load(&q->stopping)) {
		enum next next = serve_own(q, &t);

		if (next == AGAIN)
			continue;
		if (next == BROKEN) {
			/* Only a reset helps; the front end learns it by the error descriptor. */
			vf_queue_signal_error(q);
			vf_queue_wait_for_stop(q);
			break;
		}
		/* Edge-triggered: the kick descriptor need not be read. */
		if (epoll_wait(q->epoll_fd, events, 2, next == SLEEP ? -1 : LOOK_AGAIN_MS) < 0 &&
		    errno != EINTR)
			break;
	}
	announce(device, NULL);
	vf_thread_leave(&t);
	return NULL;
}
