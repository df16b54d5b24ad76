/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What people are told of the events: lines for the log and, while somebody
 * looks, a record of what becomes of each.  Both lose their oldest when nobody
 * reads; knows nothing of where they come from.
 */
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>

#include "events.h"

#define TRACE_RECORDS 4096u
#define NOTICES 64u
#define NOTICE_SIZE 256u

struct vf_trace {
	atomic_bool on;
	int event_fd;
	pthread_mutex_t lock;
	struct vf_event_trace *records; /* TRACE_RECORDS of them while on */
	uint32_t first, n;
	uint32_t skipped; /* overwritten since one was read */
	uint32_t first_notice, n_notices;
	char notices[NOTICES][NOTICE_SIZE];
};

struct vf_trace *vf_trace_new(int *error)
{
	struct vf_trace *trace = calloc(1, sizeof(*trace));

	*error = -ENOMEM;
	if (!trace)
		return NULL;
	trace->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (trace->event_fd < 0) {
		*error = -errno;
		free(trace);
		return NULL;
	}
	*error = 0;
	pthread_mutex_init(&trace->lock, NULL);
	return trace;
}

void vf_trace_free(struct vf_trace *trace)
{
	if (!trace)
		return;
	close(trace->event_fd);
	pthread_mutex_destroy(&trace->lock);
	free(trace->records);
	free(trace);
}

int vf_trace_fd(const struct vf_trace *trace)
{
	return trace->event_fd;
}

/* Before the first of either kind is added; the lock is held. */
static void wake(struct vf_trace *trace)
{
	uint64_t one = 1;

	if (!trace->n && !trace->n_notices && write(trace->event_fd, &one, sizeof(one)) < 0) {
		/* EAGAIN: it is readable, which is all that is wanted. */
	}
}

/* After one was taken, or none was there; the lock is held. */
static void rest(struct vf_trace *trace)
{
	uint64_t count;

	if (!trace->n && !trace->n_notices && read(trace->event_fd, &count, sizeof(count)) < 0) {
		/* EAGAIN: it was not readable. */
	}
}

/* ---- records ------------------------------------------------------------- */

int vf_trace_set(struct vf_trace *trace, bool on)
{
	struct vf_event_trace *unused = on ? malloc(TRACE_RECORDS * sizeof(*unused)) : NULL;

	if (on && !unused)
		return -ENOMEM;
	pthread_mutex_lock(&trace->lock);
	if (on != !!trace->records) {
		struct vf_event_trace *old = trace->records;

		trace->records = unused;
		unused = old;
		trace->first = trace->n = trace->skipped = 0;
		atomic_store_explicit(&trace->on, on, memory_order_relaxed);
		rest(trace);
	}
	pthread_mutex_unlock(&trace->lock);
	free(unused);
	return 0;
}

bool vf_trace_is_on(const struct vf_trace *trace)
{
	return atomic_load_explicit(&((struct vf_trace *)trace)->on, memory_order_relaxed);
}

void vf_trace_add(struct vf_trace *trace, const struct vf_fsnotify_out *element, const char *name,
		  enum vf_event_fate fate, int32_t pid)
{
	struct vf_event_trace *record;

	if (!vf_trace_is_on(trace))
		return;
	pthread_mutex_lock(&trace->lock);
	if (trace->records) {
		wake(trace);
		if (trace->n == TRACE_RECORDS) {
			trace->first = (trace->first + 1) % TRACE_RECORDS;
			trace->n--;
			if (trace->skipped < UINT32_MAX)
				trace->skipped++;
		}
		record = &trace->records[(trace->first + trace->n++) % TRACE_RECORDS];
		record->time_ns = vf_clock_ns(CLOCK_REALTIME);
		record->nodeid = element->nodeid;
		record->child_nodeid = element->child_nodeid;
		record->mask = element->mask;
		record->cookie = element->cookie;
		record->fate = fate;
		record->pid = pid;
		record->namelen = element->namelen < sizeof(record->name)
				      ? element->namelen
				      : (uint32_t)sizeof(record->name);
		memcpy(record->name, name ? name : "", record->namelen);
	}
	pthread_mutex_unlock(&trace->lock);
}

int vf_trace_next(struct vf_trace *trace, struct vf_event_trace *record)
{
	int found = 0;

	pthread_mutex_lock(&trace->lock);
	if (trace->n) {
		*record = trace->records[trace->first];
		record->skipped = trace->skipped;
		trace->skipped = 0;
		trace->first = (trace->first + 1) % TRACE_RECORDS;
		trace->n--;
		found = 1;
	}
	rest(trace);
	pthread_mutex_unlock(&trace->lock);
	return found;
}

/* ---- lines for the log ----------------------------------------------------- */

void vf_trace_notice(struct vf_trace *trace, const char *text)
{
	pthread_mutex_lock(&trace->lock);
	/* The first ones tell most; a flood is cut off until they have been read. */
	if (trace->n_notices < NOTICES) {
		wake(trace);
		snprintf(trace->notices[(trace->first_notice + trace->n_notices++) % NOTICES],
			 NOTICE_SIZE, "%s", text);
	}
	pthread_mutex_unlock(&trace->lock);
}

int vf_trace_next_notice(struct vf_trace *trace, char *text, uint32_t size)
{
	int found = 0;

	pthread_mutex_lock(&trace->lock);
	if (trace->n_notices) {
		snprintf(text, size, "%s", trace->notices[trace->first_notice]);
		trace->first_notice = (trace->first_notice + 1) % NOTICES;
		trace->n_notices--;
		found = 1;
	}
	rest(trace);
	pthread_mutex_unlock(&trace->lock);
	return found;
}
