/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A queue of requests (hiprio or request): its thread takes chains and runs
 * the operations; answers come from that thread or, for what waits, another.
 */
#include <stdio.h>
#include <sys/epoll.h>

#include "polling.h"
#include "queue.h"
#include "request.h"

/* ---- completion --------------------------------------------------------- */

/*
 * While its thread is at work the guest is interrupted once for so many answers, so that it works
 * alongside and is not woken for each (1 to 64 measured); one with much data counts as two.
 */
#define CALL_EVERY 4u
#define MUCH_DATA 65536u
/*
 * But no answer waits for a request behind it that may take long: one that may have to wait for
 * storage, unless so many of its kind in a row, with answers before them, took less than this.
 */
#define PROMPT_ROW 32u
#define PROMPT_NS 50000u
/*
 * Worth to be offered to another thread is what leaves this one so many bytes to copy meanwhile:
 * a processor takes as long to wake up.
 */
#define WORTH_OFFERING 262144u
/* So long nobody need have begun it while this thread has other requests to answer. */
#define OFFER_NS 300000u

/* With the queue's lock. */
static void call_if_needed(struct vf_queue *q)
{
	q->uncalled = 0;
	if (vf_ring_needs_call(&q->ring))
		vf_signal_fd(q->call_fd);
}

/*
 * elsewhere: not by the queue's thread, which would see to the interrupt and use the request
 * again.
 */
static void finish(struct vf_req *r, int32_t result, const void *payload, bool elsewhere)
{
	struct vf_queue *q = r->queue;
	uint32_t written = 0;

	if (result != VF_NO_REPLY)
		written = vf_req_write_reply(r, result, payload);
	vf_mem_put(r->mem);
	r->mem = NULL;
	pthread_mutex_lock(&q->lock);
	vf_ring_put(&q->ring, r->head, written);
	q->uncalled += r->in_size + written < MUCH_DATA ? 1 : 2;
	if (elsewhere) {
		r->next = q->spare;
		q->spare = r;
	}
	if (elsewhere || q->uncalled >= CALL_EVERY)
		call_if_needed(q);
	q->finished++;
	if (atomic_load_explicit(&q->stopping, memory_order_relaxed))
		pthread_cond_signal(&q->idle);
	pthread_mutex_unlock(&q->lock);
}

void vf_req_complete(struct vf_req *r, int error, const void *payload, uint32_t size)
{
	r->in_place = false;
	vf_show(r->share, true); /* what an IOCTL has done, say */
	finish(r, error ? error : (int32_t)size, payload, true);
}

/* True: the request has ended and is the caller's to use again or to recycle. */
static bool conclude(struct vf_thread *t, struct vf_req *r, int32_t result, bool elsewhere)
{
	if (result == VF_ASYNC)
		return false;
	if (result == VF_TO_POOL) {
		vf_req_rewind(r);
		vf_pool_submit(r->share->pool, r);
		return false;
	}
	atomic_store_explicit(&t->requests,
			      atomic_load_explicit(&t->requests, memory_order_relaxed) + 1,
			      memory_order_relaxed);
	finish(r, result, t->reply, elsewhere);
	return true;
}

void vf_req_run_in_pool(struct vf_thread *t, struct vf_req *r)
{
	conclude(t, r, vf_dispatch(t, r), true);
}

/* ---- the queue's thread ------------------------------------------------- */

static struct vf_req *new_request(struct vf_queue *q)
{
	struct vf_req *r;

	pthread_mutex_lock(&q->lock);
	r = q->spare;
	if (r)
		q->spare = r->next;
	pthread_mutex_unlock(&q->lock);
	if (!r) {
		r = calloc(1, sizeof(*r));
		if (!r)
			return NULL;
	}
	r->share = q->device->share;
	r->queue = q;
	return r;
}

/* Tells of all answers that the guest has not been told of, if it wants to be; true: there were. */
static bool tell(struct vf_queue *q)
{
	bool any;

	pthread_mutex_lock(&q->lock);
	any = q->uncalled;
	if (any)
		call_if_needed(q);
	pthread_mutex_unlock(&q->lock);
	return any;
}

static bool has_untold(struct vf_queue *q)
{
	bool any;

	pthread_mutex_lock(&q->lock);
	any = q->uncalled;
	pthread_mutex_unlock(&q->lock);
	return any;
}

/* Is it worth it that another thread answers this one, which then answers what is behind it? */
static bool may_offer(const struct vf_queue *q, struct vf_req *r)
{
	uint32_t n_behind;

	r->alone = false;
	if (r->out_size < MUCH_DATA || !vf_only_copies(r))
		return false;
	n_behind = vf_ring_n_available(&q->ring);
	r->alone = !n_behind;
	return (uint64_t)r->out_size * n_behind >= WORTH_OFFERING;
}

static void run_offered(struct vf_thread *t, struct vf_offer *offer)
{
	vf_req_run_in_pool(t, vf_container_of(offer, struct vf_req, offer));
}

static bool offer_to_pool(struct vf_queue *q, struct vf_req *r)
{
	r->offer.run = run_offered;
	r->offer.owner = q;
	if (!vf_pool_offer(q->device->share->pool, &r->offer))
		return false;
	if (!q->offered_ns)
		q->offered_ns = vf_now_ns();
	return true;
}

/* Answers what was offered before then and nobody has begun. */
static void answer_offered(struct vf_queue *q, struct vf_thread *t, uint64_t before_ns)
{
	struct vf_offer *offer;

	while ((offer = vf_pool_take_back(q->device->share->pool, q, before_ns)))
		offer->run(t, offer);
}

static void answer_all_offered(struct vf_queue *q, struct vf_thread *t)
{
	if (!q->offered_ns)
		return;
	answer_offered(q, t, UINT64_MAX);
	q->offered_ns = 0;
}

/* Answers what was offered and is now this thread's own to answer. */
static void see_to_offered(struct vf_queue *q, struct vf_thread *t)
{
	uint64_t now_ns;

	if (!q->offered_ns)
		return;
	if (!vf_ring_has_work(&q->ring)) {
		answer_all_offered(q, t);
		return;
	}
	now_ns = vf_now_ns();
	if (now_ns - q->offered_ns >= OFFER_NS) {
		answer_offered(q, t, now_ns - OFFER_NS);
		q->offered_ns = now_ns;
	}
}

/* Does it ask for what this thread has begun? */
static bool asks_for_begun(const struct vf_thread *t, const struct vf_req *r)
{
	const struct fuse_read_in *in = vf_arg(r, sizeof(*in));

	return r->header.opcode == FUSE_READDIRPLUS && r->header.nodeid == t->listed_nodeid && in &&
	       in->fh == t->listed_fh;
}

/*
 * This request comes next.  What was begun is of no use after any other than the one that asks for
 * it, but for those that show the guest nothing.
 */
static void see_to_begun(struct vf_thread *t, const struct vf_req *r)
{
	if (!asks_for_begun(t, r) && r->header.opcode != FUSE_FORGET &&
	    r->header.opcode != FUSE_BATCH_FORGET)
		vf_dispatch_drop_ahead(t);
}

/* vf_dispatch(), for a request that may have to wait. */
static int32_t dispatch_unsure(struct vf_queue *q, struct vf_thread *t, struct vf_req *r)
{
	bool trusted = q->prompt >= PROMPT_ROW && !t->may_block;
	uint64_t begun_ns;
	int32_t result;

	/* What was offered may have been taken by nobody: it does not wait for this one. */
	answer_all_offered(q, t);
	/* Nor does the hiprio queue; and the FORGET after a removal is better done meanwhile. */
	if (atomic_load_explicit(&q->device->lending.awake, memory_order_relaxed)) {
		if (!trusted)
			vf_hiprio_asleep(q);
		if (vf_may_remove(r))
			vf_hiprio_give_back(q->device);
	}
	if (!(trusted ? has_untold(q) : tell(q)))
		return vf_dispatch(t, r);
	begun_ns = vf_now_ns();
	result = vf_dispatch(t, r);
	if (vf_now_ns() - begun_ns > PROMPT_NS)
		q->prompt = 0;
	else if (q->prompt < PROMPT_ROW)
		q->prompt++;
	return result;
}

void vf_queue_drain(struct vf_queue *q, struct vf_thread *t, uint32_t limit)
{
	const char *why = "out of memory";
	struct vf_req *r = q->ready;
	int taken = 0;

	while (limit-- && !atomic_load_explicit(&q->stopping, memory_order_relaxed)) {
		bool ended = true;
		int32_t result;
		int error;

		see_to_offered(q, t);
		if (!r)
			r = new_request(q);
		if (!r) {
			taken = -ENOMEM;
			break;
		}
		vf_queue_renew_memory(q);
		taken = vf_ring_take(&q->ring, q->mem, r, &why);
		if (taken <= 0)
			break;
		r->mem = vf_mem_get(q->mem);
		q->taken++;
		error = vf_req_parse(r);
		if (t->begun && !error)
			see_to_begun(t, r);
		if (error == -EBADMSG) {
			why = "a request shorter than a FUSE header";
			finish(r, VF_NO_REPLY, NULL, false);
			taken = error;
			break;
		}
		if (error) {
			finish(r, error, NULL, false);
		} else if (may_offer(q, r) && offer_to_pool(q, r)) {
			ended = false;
		} else {
			result = vf_is_quick(r) ? vf_dispatch(t, r) : dispatch_unsure(q, t, r);
			ended = conclude(t, r, result, false);
		}
		if (!ended)
			r = NULL;
	}
	answer_all_offered(q, t);
	q->ready = r;
	tell(q);
	q->broken = taken < 0;
	if (q->broken)
		vf_faults_add(&q->device->faults, (int32_t)q->index, "queue %u stopped: %s",
			      q->index, why);
}

/* Such turns, less four for each with one request, before the hiprio queue is asked for. */
#define MANY 16u

/*
 * The ring is empty.  Has the guest of late had several requests answered by then?  Where it waits
 * for each, a thread beside it is woken sooner than it is itself by a thread elsewhere.
 */
static bool several_at_once(struct vf_queue *q)
{
	uint32_t n = q->taken - q->taken_before;

	q->taken_before = q->taken;
	if (n > 1 && q->n_several < 2 * MANY)
		q->n_several++;
	else if (n == 1)
		q->n_several -= q->n_several < 4 ? q->n_several : 4;
	return q->n_several >= MANY;
}

static bool has_other_work(const void *arg)
{
	const struct vf_queue *q = arg;

	return vf_ring_has_work(&q->ring) ||
	       atomic_load_explicit(&q->stopping, memory_order_relaxed);
}

/* The ring is empty: begins what is likely to be asked for next. */
static void look_ahead(struct vf_queue *q, struct vf_thread *t)
{
	if (!t->listed_nodeid || t->begun)
		return;
	vf_hiprio_asleep(q);
	vf_dispatch_ahead(t, has_other_work, q);
}

/* The ring is empty, and kicks are not asked for.  True: something is there. */
static bool wait_awake(struct vf_queue *q, struct vf_thread *t, struct vf_polling *polling)
{
	uint64_t budget_ns = vf_polling_begin(polling, vf_now_ns()), last_ns = 0;

	if (!budget_ns)
		return false;
	if (several_at_once(q) && !t->may_block)
		vf_hiprio_awake(q);
	else
		vf_hiprio_asleep(q);
	do {
		if (vf_hiprio_serve(q, t))
			last_ns = 0;
		for (int i = 0; i < 8; i++) {
			if (vf_ring_has_work(&q->ring)) {
				vf_polling_hit(polling);
				return true;
			}
			vf_relax();
		}
	} while (!atomic_load_explicit(&q->stopping, memory_order_relaxed) &&
		 vf_polling_goes_on(polling, vf_now_ns(), budget_ns, &last_ns));
	return false;
}

/* False: it cannot. */
static bool sleep_until_kicked(struct vf_queue *q, struct vf_thread *t)
{
	struct epoll_event events[2];
	int woken;

	/* Edge-triggered: the kick descriptor need not be read. */
	while (!(woken = epoll_wait(q->epoll_fd, events, 2, t->begun ? VF_AHEAD_MS : -1)))
		vf_dispatch_drop_ahead(t);
	return woken > 0 || errno == EINTR;
}

bool vf_queue_enter(struct vf_queue *q, struct vf_thread *t)
{
	struct vf_share *share = q->device->share;
	char name[16];
	int error;

	memset(t, 0, sizeof(*t));
	t->may_block = !share->config.pool_threads;
	snprintf(name, sizeof(name), "vhostfs-vq%u", q->index);
	error = vf_thread_enter(t, share, name);
	if (error) {
		vf_faults_add(&q->device->faults, (int32_t)q->index,
			      "queue %u: its thread cannot start: %s", q->index, strerror(-error));
		vf_queue_wait_for_stop(q);
	}
	return !error;
}

void *vf_request_queue_main(void *arg)
{
	struct vf_queue *q = arg;
	struct vf_thread t;
	struct vf_polling polling;

	if (!vf_queue_enter(q, &t))
		return NULL;
	vf_polling_init(&polling);
	while (!atomic_load(&q->stopping)) {
		vf_ring_disable_kicks(&q->ring);
		vf_queue_drain(q, &t, UINT32_MAX);
		if (q->broken) {
			vf_hiprio_asleep(q);
			vf_dispatch_drop_ahead(&t);
			/* Only a reset helps; the front end learns it by the error descriptor. */
			vf_queue_signal_error(q);
			vf_queue_wait_for_stop(q);
			break;
		}
		look_ahead(q, &t);
		if (wait_awake(q, &t, &polling))
			continue;
		vf_hiprio_asleep(q);
		if (vf_ring_enable_kicks(&q->ring))
			continue;
		if (!sleep_until_kicked(q, &t))
			break;
		vf_polling_slept(&polling, vf_now_ns());
	}
	vf_hiprio_asleep(q);
	vf_dispatch_drop_ahead(&t);
	vf_thread_leave(&t);
	return NULL;
}
