/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What waits for the guest: elements in the order in which they came, at most
 * max_elements of them and one that says that others were lost.  Knows no
 * queues and no sources; see events.h.
 *
 * They lie one behind the other in chunks of memory that come and go with the
 * number of those that wait: 64 bytes and the name for each, so 100,000 usual
 * ones take 9 MB and the longest possible 32 MB.
 */
#include <sys/mman.h>

#include "events.h"

#define CHUNK_SIZE (64u * 1024)

struct record {
	struct vf_fsnotify_out element;
	uint64_t seen_ns;
	int32_t pid;
	uint32_t size; /* from here to the next record: a multiple of 8 */
	char name[];
};
_Static_assert(sizeof(struct record) == 64, "a record's head");

struct chunk {
	struct chunk *next;
	uint32_t start, end; /* of what waits, in bytes[] */
	uint8_t bytes[CHUNK_SIZE - 16];
};
_Static_assert(sizeof(struct chunk) == CHUNK_SIZE, "whole pages");

#define N_LATENCIES (sizeof(((struct vf_events_stats *)0)->latency) / sizeof(uint64_t))

struct vf_outbox {
	pthread_mutex_t lock;
	struct vf_trace *trace;
	struct vf_sink *sink; /* the notification queue's */
	struct vf_sink *used; /* in its place */
	/* There is always one; the last has room left for an overflow element, or one waits. */
	struct chunk *first, *last;
	struct chunk *spare;   /* the one that was emptied last */
	struct record *newest; /* NULL: nothing waits */
	uint32_t max_elements;
	uint32_t depth;
	uint32_t since_flush; /* elements added */
	bool overflow_waits;
	uint64_t merged, queued, delivered, lost, overflows, max_depth;
	uint64_t latency[N_LATENCIES];
};

/* ---- memory ---------------------------------------------------------------- */

/* mmap(2), so that what is no longer needed goes back to the system for certain. */
static struct chunk *new_chunk(struct vf_outbox *outbox)
{
	struct chunk *chunk = outbox->spare;

	if (chunk) {
		outbox->spare = NULL;
	} else {
		chunk = mmap(NULL, CHUNK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			     -1, 0);
		if (chunk == MAP_FAILED)
			return NULL;
	}
	chunk->next = NULL;
	chunk->start = chunk->end = 0;
	return chunk;
}

static void drop_chunk(struct vf_outbox *outbox, struct chunk *chunk)
{
	if (outbox->spare)
		munmap(chunk, CHUNK_SIZE);
	else
		outbox->spare = chunk;
}

static uint32_t record_size(uint32_t namelen)
{
	return (uint32_t)sizeof(struct record) + ((namelen + 7) & ~7u);
}

/* Makes sure that records of size bytes in all, and an overflow element, fit into the last chunk.
 */
static bool make_room(struct vf_outbox *outbox, uint32_t size)
{
	uint32_t most = sizeof(outbox->last->bytes) - record_size(0);
	struct chunk *chunk;

	if (size <= most && outbox->last->end <= most - size)
		return true;
	chunk = size <= most ? new_chunk(outbox) : NULL;
	if (!chunk)
		return false;
	outbox->last->next = chunk;
	outbox->last = chunk;
	return true;
}

/* There is room for it in the last chunk. */
static void append(struct vf_outbox *outbox, const struct vf_outgoing *out)
{
	struct chunk *chunk = outbox->last;
	struct record *record = (struct record *)(chunk->bytes + chunk->end);

	record->element = out->element;
	record->seen_ns = out->seen_ns;
	record->pid = out->pid;
	record->size = record_size(out->element.namelen);
	if (out->element.namelen)
		memcpy(record->name, out->name, out->element.namelen);
	chunk->end += record->size;
	outbox->newest = record;
	outbox->queued++;
	if (++outbox->depth > outbox->max_depth)
		outbox->max_depth = outbox->depth;
}

static struct record *oldest(struct vf_outbox *outbox)
{
	return outbox->newest ? (struct record *)(outbox->first->bytes + outbox->first->start)
			      : NULL;
}

static void remove_oldest(struct vf_outbox *outbox)
{
	struct chunk *chunk = outbox->first;

	chunk->start += oldest(outbox)->size;
	if (!--outbox->depth) {
		chunk->start = chunk->end = 0;
		outbox->newest = NULL;
	} else if (chunk->start == chunk->end) {
		outbox->first = chunk->next;
		drop_chunk(outbox, chunk);
	}
}

/* ---- out ------------------------------------------------------------------- */

/* A long flush lets the guest begin when it has this many (1 to all of them measured). */
#define DONE_EVERY 16u

static void count_delivery(struct vf_outbox *outbox, const struct record *record)
{
	uint64_t us = (vf_now_ns() - record->seen_ns) / 1000;
	uint32_t i = us ? 64 - (uint32_t)__builtin_clzll(us) : 0;
	bool overflow = record->element.mask & VF_FS_Q_OVERFLOW;

	outbox->latency[i < N_LATENCIES ? i : N_LATENCIES - 1]++;
	outbox->delivered++;
	if (overflow)
		outbox->overflows++;
	/* One that is about a single directory may come beside the one. */
	if (overflow && !record->element.nodeid)
		outbox->overflow_waits = false;
	vf_trace_add(outbox->trace, &record->element, record->name,
		     overflow ? VF_EVENT_OVERFLOW : VF_EVENT_DELIVERED, record->pid);
}

static struct vf_sink *active(const struct vf_outbox *outbox)
{
	return outbox->used ? outbox->used : outbox->sink;
}

static void flush(struct vf_outbox *outbox)
{
	struct vf_sink *sink = active(outbox);
	struct record *record;
	uint32_t since_done = 0;

	outbox->since_flush = 0;
	while (sink && (record = oldest(outbox)) &&
	       sink->put(sink, &record->element, record->name)) {
		count_delivery(outbox, record);
		remove_oldest(outbox);
		if (++since_done == DONE_EVERY) {
			since_done = 0;
			sink->done(sink);
		}
	}
	if (since_done)
		sink->done(sink);
}

void vf_outbox_flush(struct vf_outbox *outbox)
{
	pthread_mutex_lock(&outbox->lock);
	flush(outbox);
	pthread_mutex_unlock(&outbox->lock);
}

/* ---- in -------------------------------------------------------------------- */

/*
 * Once is enough until the guest was told: who looks at everything again when told finds what was
 * lost up to that moment, wherever in the order it belonged.  For the same reason nothing is held
 * back after a loss until more of the queue is free: each element for which there is room is right,
 * and overflows cost at most one in max_elements.
 */
static void add_overflow(struct vf_outbox *outbox)
{
	struct vf_outgoing out = {.element.mask = VF_FS_Q_OVERFLOW, .seen_ns = vf_now_ns()};

	if (outbox->overflow_waits)
		return;
	append(outbox, &out);
	outbox->overflow_waits = true;
}

static bool same(const struct record *record, const struct vf_outgoing *out)
{
	const struct vf_fsnotify_out *a = &record->element, *b = &out->element;

	return a->nodeid == b->nodeid && a->mask == b->mask && !a->cookie && !b->cookie &&
	       a->flags == b->flags && !(a->flags & VF_FSNOTIFY_SPLIT_RENAME) &&
	       a->generation == b->generation && a->child_nodeid == b->child_nodeid &&
	       a->child_generation == b->child_generation && a->namelen == b->namelen &&
	       (!a->namelen || !memcmp(record->name, out->name, a->namelen));
}

/* The overflow element does not take that of another; a rename fits where nothing else waits. */
static bool has_room(const struct vf_outbox *outbox, uint32_t n)
{
	uint32_t waiting = outbox->depth - outbox->overflow_waits;

	return !waiting || (waiting < outbox->max_elements && n <= outbox->max_elements - waiting);
}

/* Elements that are added at once before they begin to leave. */
#define FLUSH_EVERY 64u

static void push(struct vf_outbox *outbox, const struct vf_outgoing *elements, uint32_t n)
{
	uint32_t size = 0;

	if (n == 1 && outbox->newest && same(outbox->newest, elements)) {
		outbox->merged++;
		vf_trace_add(outbox->trace, &elements->element, elements->name, VF_EVENT_MERGED,
			     elements->pid);
		return;
	}
	for (uint32_t i = 0; i < n; i++)
		size += record_size(elements[i].element.namelen);
	/* Let the guest begin while a large batch is still being added; nothing is lost to a full
	 * queue while there are buffers. */
	outbox->since_flush += n;
	if (!has_room(outbox, n) || outbox->since_flush >= FLUSH_EVERY)
		flush(outbox);
	if (!has_room(outbox, n) || !make_room(outbox, size)) {
		outbox->lost += n;
		for (uint32_t i = 0; i < n; i++)
			vf_trace_add(outbox->trace, &elements[i].element, elements[i].name,
				     VF_EVENT_LOST, elements[i].pid);
		add_overflow(outbox);
		return;
	}
	for (uint32_t i = 0; i < n; i++)
		append(outbox, &elements[i]);
}

void vf_outbox_push(struct vf_outbox *outbox, const struct vf_outgoing *elements, uint32_t n)
{
	pthread_mutex_lock(&outbox->lock);
	push(outbox, elements, n);
	pthread_mutex_unlock(&outbox->lock);
}

void vf_outbox_push_overflow(struct vf_outbox *outbox)
{
	pthread_mutex_lock(&outbox->lock);
	add_overflow(outbox);
	pthread_mutex_unlock(&outbox->lock);
}

/* ---- the sink ------------------------------------------------------------- */

int vf_outbox_attach(struct vf_outbox *outbox, struct vf_sink *sink)
{
	int error = 0;

	pthread_mutex_lock(&outbox->lock);
	if (outbox->sink)
		error = -EBUSY;
	else
		outbox->sink = sink;
	pthread_mutex_unlock(&outbox->lock);
	return error;
}

void vf_outbox_detach(struct vf_outbox *outbox, struct vf_sink *sink)
{
	pthread_mutex_lock(&outbox->lock);
	if (outbox->sink == sink)
		outbox->sink = NULL;
	pthread_mutex_unlock(&outbox->lock);
}

void vf_outbox_use(struct vf_outbox *outbox, struct vf_sink *sink)
{
	pthread_mutex_lock(&outbox->lock);
	outbox->used = sink;
	pthread_mutex_unlock(&outbox->lock);
}

/* ---- the rest -------------------------------------------------------------- */

struct vf_outbox *vf_outbox_new(uint32_t max_elements, struct vf_trace *trace, int *error)
{
	struct vf_outbox *outbox = calloc(1, sizeof(*outbox));

	*error = -ENOMEM;
	if (!outbox)
		return NULL;
	outbox->first = outbox->last = new_chunk(outbox);
	if (!outbox->first) {
		free(outbox);
		return NULL;
	}
	*error = 0;
	pthread_mutex_init(&outbox->lock, NULL);
	outbox->trace = trace;
	outbox->max_elements = max_elements;
	return outbox;
}

void vf_outbox_clear(struct vf_outbox *outbox)
{
	pthread_mutex_lock(&outbox->lock);
	while (oldest(outbox))
		remove_oldest(outbox);
	outbox->overflow_waits = false;
	pthread_mutex_unlock(&outbox->lock);
}

void vf_outbox_free(struct vf_outbox *outbox)
{
	if (!outbox)
		return;
	vf_outbox_clear(outbox);
	munmap(outbox->first, CHUNK_SIZE);
	if (outbox->spare)
		munmap(outbox->spare, CHUNK_SIZE);
	pthread_mutex_destroy(&outbox->lock);
	free(outbox);
}

void vf_outbox_get_stats(struct vf_outbox *outbox, struct vf_events_stats *stats)
{
	pthread_mutex_lock(&outbox->lock);
	stats->merged = outbox->merged;
	stats->queued = outbox->queued;
	stats->delivered = outbox->delivered;
	stats->lost = outbox->lost;
	stats->overflows = outbox->overflows;
	stats->depth = outbox->depth;
	stats->max_depth = outbox->max_depth;
	stats->buffers = active(outbox) ? active(outbox)->buffers(active(outbox)) : 0;
	memcpy(stats->latency, outbox->latency, sizeof(outbox->latency));
	pthread_mutex_unlock(&outbox->lock);
}
