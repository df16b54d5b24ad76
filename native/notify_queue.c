/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The notification queue: elements leave the share's outbox in the buffers
 * that the guest keeps here.  Virtio 1.2, section 5.11; docs/protocol.md.
 *
 * A buffer is taken only when there is an element for it, by whichever thread
 * flushes the outbox, under the outbox's lock: no hop to another thread lies
 * between the host's record and the used ring.  The queue's own thread waits
 * for the guest's kicks, which are asked for only while an element lacks a
 * buffer.
 */
#include <stdio.h>
#include <sys/epoll.h>

#include "events.h"
#include "queue.h"
#include "request.h"

struct vf_notifier {
	struct vf_sink sink;
	struct vf_queue *queue;
	struct vf_events *events; /* NULL: events are off */
	struct vf_outbox *outbox; /* theirs */
	struct vf_req buffer;
	bool kicks;   /* were asked for */
	bool stopped; /* the guest's fault */
};

/* The fault has been said.  The outbox's lock is held. */
static void stop(struct vf_notifier *n)
{
	n->stopped = true;
	vf_ring_disable_kicks(&n->queue->ring);
	vf_queue_signal_error(n->queue);
	vf_coherent_end(n->queue->device->share->events, "the notification queue has stopped");
}

/* 1: taken; 0: none is there, and the guest will kick; negative: the ring is broken. */
static int take_buffer(struct vf_notifier *n, const char **why)
{
	struct vf_queue *q = n->queue;
	int taken;

	vf_queue_renew_memory(q);
	taken = vf_ring_take(&q->ring, q->mem, &n->buffer, why);
	if (!taken) {
		n->kicks = true;
		if (!vf_ring_enable_kicks(&q->ring))
			return 0;
		taken = vf_ring_take(&q->ring, q->mem, &n->buffer, why);
	}
	if (taken > 0 && n->kicks) {
		n->kicks = false;
		vf_ring_disable_kicks(&q->ring);
	}
	return taken;
}

/* An element that the guest's buffers cannot hold must not vanish without a word. */
static const struct vf_fsnotify_out too_long = {.mask = VF_FS_Q_OVERFLOW};

static bool put(struct vf_sink *sink, const struct vf_fsnotify_out *element, const char *name)
{
	struct vf_notifier *n = vf_container_of(sink, struct vf_notifier, sink);
	struct fuse_out_header header = {.error = VF_FUSE_NOTIFY_FSNOTIFY};
	struct vf_queue *q = n->queue;
	const char *why;
	uint32_t least;
	int taken;

	if (n->stopped)
		return false;
	taken = take_buffer(n, &why);
	if (!taken)
		return false;
	if (taken < 0) {
		vf_faults_add(&q->device->faults, (int32_t)q->index, "queue %u stopped: %s",
			      q->index, why);
		stop(n);
		return false;
	}
	least = atomic_load(&n->events->max_element);
	if (n->buffer.in_size || n->buffer.out_size < least) {
		q->ring.next_avail--;
		vf_faults_add(&q->device->faults, (int32_t)q->index,
			      "queue %u stopped: a notification buffer of %u readable and %u "
			      "writable bytes, where none and at least %u (notify_buf_size) were "
			      "expected",
			      q->index, n->buffer.in_size, n->buffer.out_size, least);
		stop(n);
		return false;
	}
	header.len = (uint32_t)(sizeof(header) + sizeof(*element)) + element->namelen;
	if (header.len > n->buffer.out_size) {
		element = &too_long;
		header.len = (uint32_t)(sizeof(header) + sizeof(*element));
	}
	vf_req_scatter(&n->buffer, sizeof(header) + sizeof(*element), name, element->namelen);
	vf_req_scatter(&n->buffer, sizeof(header), element, sizeof(*element));
	vf_req_scatter(&n->buffer, 0, &header, sizeof(header));
	vf_ring_put(&q->ring, n->buffer.head, header.len);
	return true;
}

static void done(struct vf_sink *sink)
{
	struct vf_queue *q = vf_container_of(sink, struct vf_notifier, sink)->queue;

	pthread_mutex_lock(&q->lock);
	if (vf_ring_needs_call(&q->ring))
		vf_signal_fd(q->call_fd);
	pthread_mutex_unlock(&q->lock);
}

static uint32_t buffers(struct vf_sink *sink)
{
	return vf_ring_n_available(&vf_container_of(sink, struct vf_notifier, sink)->queue->ring);
}

int vf_notifier_attach(struct vf_queue *q)
{
	struct vf_events *events = q->device->share->events;
	struct vf_notifier *n = calloc(1, sizeof(*n));
	int error = 0;

	if (!n)
		return -ENOMEM;
	n->sink = (struct vf_sink){put, done, buffers};
	n->queue = q;
	vf_ring_disable_kicks(&q->ring);
	if (events) {
		n->events = events;
		n->outbox = events->outbox;
		error = vf_outbox_attach(n->outbox, &n->sink);
	}
	if (error)
		free(n);
	else
		q->notifier = n;
	return error;
}

void vf_notifier_detach(struct vf_queue *q)
{
	struct vf_notifier *n = q->notifier;

	if (!n)
		return;
	if (n->outbox)
		vf_outbox_detach(n->outbox, &n->sink);
	q->notifier = NULL;
	free(n->buffer.in);
	free(n->buffer.out);
	free(n);
}

void *vf_notify_queue_main(void *queue)
{
	struct vf_queue *q = queue;
	struct vf_thread t = {.may_block = true};
	struct epoll_event events[2];
	char name[16];
	int error;

	snprintf(name, sizeof(name), "vhostfs-nq%u", q->index);
	error = vf_thread_enter(&t, q->device->share, name);
	if (error) {
		vf_faults_add(&q->device->faults, (int32_t)q->index,
			      "queue %u: its thread cannot start: %s", q->index, strerror(-error));
		vf_queue_wait_for_stop(q);
		return NULL;
	}
	while (!atomic_load(&q->stopping)) {
		if (q->notifier->outbox)
			vf_outbox_flush(q->notifier->outbox);
		/* Edge-triggered: the kick descriptor need not be read. */
		if (epoll_wait(q->epoll_fd, events, 2, -1) < 0 && errno != EINTR)
			break;
	}
	vf_thread_leave(&t);
	return NULL;
}
