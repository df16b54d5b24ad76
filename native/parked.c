/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parked requests: where no notification queue can be had, the guest keeps
 * FUSE_FSNOTIFY_PARK requests waiting here, and each is answered with one
 * element.  docs/protocol.md, 4.4.
 *
 * They leave in the order in which they came.  A request is either in the
 * list, or taken out of it by the one thread that answers it: nobody waits
 * for anybody.  Locks: the outbox's, this one, a queue's.
 */
#include "events.h"

struct vf_parked {
	struct vf_sink sink;
	struct vf_events *events;
	uint32_t max;
	pthread_mutex_t lock;
	uint32_t limit; /* of this session, at most max */
	struct vf_req *first, **end;
	uint32_t n;
	bool open;
};

/* What the answer to each takes at most. */
static uint32_t largest(const struct vf_events *events)
{
	uint32_t agreed = atomic_load(&events->max_element);

	return agreed < VF_ELEMENT_MAX ? agreed : VF_ELEMENT_MAX;
}

static struct vf_req *take_first(struct vf_parked *parked)
{
	struct vf_req *r;

	pthread_mutex_lock(&parked->lock);
	r = parked->first;
	if (r) {
		parked->first = r->next;
		if (!parked->first)
			parked->end = &parked->first;
		parked->n--;
	}
	pthread_mutex_unlock(&parked->lock);
	return r;
}

static bool put(struct vf_sink *sink, const struct vf_fsnotify_out *element, const char *name)
{
	struct vf_req *r = take_first(vf_container_of(sink, struct vf_parked, sink));
	struct {
		struct vf_fsnotify_out element;
		char name[VF_NAME_MAX];
	} payload;

	if (!r)
		return false;
	payload.element = *element;
	if (element->namelen)
		memcpy(payload.name, name, element->namelen);
	vf_req_complete(r, 0, &payload, (uint32_t)sizeof(*element) + element->namelen);
	return true;
}

/* Each answer interrupts the guest as any other does. */
static void done(struct vf_sink *sink)
{
	(void)sink;
}

static uint32_t buffers(struct vf_sink *sink)
{
	struct vf_parked *parked = vf_container_of(sink, struct vf_parked, sink);
	uint32_t n;

	pthread_mutex_lock(&parked->lock);
	n = parked->n;
	pthread_mutex_unlock(&parked->lock);
	return n;
}

struct vf_parked *vf_parked_new(struct vf_events *events, uint32_t max, int *error)
{
	struct vf_parked *parked = calloc(1, sizeof(*parked));

	*error = parked ? 0 : -ENOMEM;
	if (!parked)
		return NULL;
	parked->sink = (struct vf_sink){put, done, buffers};
	parked->events = events;
	parked->max = parked->limit = max;
	parked->end = &parked->first;
	pthread_mutex_init(&parked->lock, NULL);
	return parked;
}

void vf_parked_free(struct vf_parked *parked)
{
	if (!parked)
		return;
	pthread_mutex_destroy(&parked->lock);
	free(parked);
}

void vf_parked_open(struct vf_parked *parked)
{
	pthread_mutex_lock(&parked->lock);
	parked->open = true;
	pthread_mutex_unlock(&parked->lock);
	vf_outbox_use(parked->events->outbox, &parked->sink);
}

void vf_parked_close(struct vf_parked *parked)
{
	pthread_mutex_lock(&parked->lock);
	parked->open = false;
	parked->limit = parked->max;
	pthread_mutex_unlock(&parked->lock);
	vf_parked_send_back(parked, NULL);
}

void vf_parked_limit(struct vf_parked *parked, uint32_t max)
{
	pthread_mutex_lock(&parked->lock);
	parked->limit = max < parked->max ? max : parked->max;
	pthread_mutex_unlock(&parked->lock);
}

void vf_parked_send_back(struct vf_parked *parked, const struct vf_queue *queue)
{
	struct vf_req *sent_back = NULL, **last = &sent_back, *r;

	if (!parked)
		return;
	pthread_mutex_lock(&parked->lock);
	for (struct vf_req **p = &parked->first; (r = *p);) {
		if (queue && r->queue != queue) {
			p = &r->next;
			continue;
		}
		*p = r->next;
		r->next = NULL;
		*last = r;
		last = &r->next;
		parked->n--;
	}
	for (parked->end = &parked->first; *parked->end;)
		parked->end = &(*parked->end)->next;
	pthread_mutex_unlock(&parked->lock);
	while ((r = sent_back)) {
		sent_back = r->next;
		vf_req_complete(r, -ENOTCONN, NULL, 0);
	}
}

int32_t vf_op_fsnotify_park(struct vf_thread *t, struct vf_req *r)
{
	struct vf_events *events = t->share->events;
	struct vf_parked *parked = events ? events->parked : NULL;
	int32_t result = VF_ASYNC;

	if (!parked)
		return -ENOSYS;
	pthread_mutex_lock(&parked->lock);
	if (!parked->open) {
		result = -ENOSYS;
	} else if (r->out_size < largest(events)) {
		result = -EINVAL;
	} else if (parked->n >= parked->limit) {
		result = -ENOSPC;
	} else {
		r->next = NULL;
		*parked->end = r;
		parked->end = &r->next;
		parked->n++;
	}
	pthread_mutex_unlock(&parked->lock);
	/* From here on the request may have been answered. */
	if (result == VF_ASYNC)
		vf_outbox_flush(events->outbox);
	return result;
}
