/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A device's queues from inside: what device.c (their life, guest memory),
 * request_queue.c and notify_queue.c (their work) share.  Nobody else
 * includes this.
 *
 * Locks: device->lock guards the memory map and the list of queues (control
 * path only); queue->lock guards the used ring and what follows it in the
 * structure.  The available side belongs to the thread of a request queue, to
 * the holder of lending.lock in the hiprio queue, and to the holder of the
 * outbox's lock in a notification queue; so do mem and what below is said to
 * be the thread's own.
 */
#ifndef VHOSTFS_QUEUE_H
#define VHOSTFS_QUEUE_H

#include "fault.h"
#include "mem.h"
#include "ring.h"

struct vf_notifier;

struct vf_queue {
	struct vf_device *device;
	uint32_t index;
	struct vf_ring ring;
	struct vf_mem *ring_mem; /* keeps the ring itself mapped */
	struct vf_mem *mem;	 /* for buffers; renewed when the map changes */
	uint32_t mem_version;
	pthread_t thread;
	int kick_fd, epoll_fd;
	int wake_fd; /* an eventfd: its thread is to look what there is to do, or to stop */
	atomic_bool stopping;
	struct vf_notifier *notifier; /* of a notification queue, else NULL */

	pthread_mutex_t lock;
	pthread_cond_t idle;
	int call_fd, err_fd;
	uint32_t taken;	       /* chains taken, ever (wraps); the thread's own */
	uint64_t offered_ns;   /* when something was offered to the pool; 0: none is left there */
	struct vf_req *ready;  /* for the next chain, or NULL; the thread's own */
	uint32_t finished;     /* chains returned, ever (wraps); under lock */
	struct vf_req *spare;  /* requests that ended elsewhere, to use again */
	uint32_t uncalled;     /* answers since an interrupt was last thought of */
	uint32_t prompt;       /* unsure requests in a row that were prompt; the thread's own */
	uint32_t taken_before; /* when the ring was last empty; the thread's own */
	uint32_t n_several;    /* see several_at_once(); the thread's own */
	bool broken;	       /* the ring is of no use any more; the thread's own */
};

/* hiprio.c: the hiprio queue, lent to the thread of a request queue. */
struct vf_lending {
	pthread_mutex_t lock;		  /* for the available side of the hiprio queue */
	struct vf_queue *hiprio;	  /* under it: while its thread runs, else NULL */
	atomic_bool lent;		  /* changed under it: another thread sees to that queue */
	_Atomic(struct vf_queue *) awake; /* whose thread that would be, or NULL */
	long take_back_ns;		  /* for no longer than this, under 1 s; 0: for ever */
};

struct vf_device {
	struct vf_share *share;
	struct vf_faults faults;
	pthread_mutex_t lock;
	struct vf_mem *mem;
	atomic_uint mem_version;
	struct vf_lending lending;
	uint32_t max_queues;
	struct vf_queue *queues[];
};

/* ---- device.c ---- */
/* An eventfd that never blocks; -1: none. */
void vf_signal_fd(int fd);
/* q->mem is the device's newest map from now on. */
void vf_queue_renew_memory(struct vf_queue *q);
/* The queue is of no use any more: waits for vf_queue_stop(). */
void vf_queue_wait_for_stop(struct vf_queue *q);
/* The front end learns by the error descriptor that only a reset helps. */
void vf_queue_signal_error(struct vf_queue *q);

/* ---- request_queue.c ---- */
void *vf_request_queue_main(void *queue);
/*
 * What the thread of a queue of requests does first; false: it cannot, and has been told to stop.
 */
bool vf_queue_enter(struct vf_queue *q, struct vf_thread *t);
/* Answers what is available, but no more than limit; or the ring is of no use: q->broken. */
void vf_queue_drain(struct vf_queue *q, struct vf_thread *t, uint32_t limit);

/* ---- hiprio.c ---- */
void vf_lending_init(struct vf_lending *lending);
void vf_lending_destroy(struct vf_lending *lending);
void *vf_hiprio_queue_main(void *queue);
/* The request queue's thread waits awake: it could see to the hiprio queue, too. */
void vf_hiprio_awake(struct vf_queue *q);
/* Answers some of what is on the hiprio queue if that is for this queue's thread; true: it did. */
bool vf_hiprio_serve(struct vf_queue *q, struct vf_thread *t);
/* The request queue's thread goes to sleep, or may have to wait: it can no longer do so. */
void vf_hiprio_asleep(struct vf_queue *q);
/* What comes next on the hiprio queue is for its own thread, whoever is awake. */
void vf_hiprio_give_back(struct vf_device *device);

/* ---- notify_queue.c ---- */
/* Makes q->notifier and gives it to the share's outbox; -EBUSY: another queue has it. */
int vf_notifier_attach(struct vf_queue *q);
/* When it returns nobody touches the ring. */
void vf_notifier_detach(struct vf_queue *q);
void *vf_notify_queue_main(void *queue);

#endif
