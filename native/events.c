/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The event pipeline's life: the thread that reads the host's records, what
 * the session was granted, counters.  See events.h.
 */
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>

#include "events.h"
#include "fanotify_move.h"
#include "file.h"
#include "inotify_reader.h"
#include "marker.h"
#include "order.h"
#include "own_changes.h"

/* ---- the source's thread ---------------------------------------------------- */

/*
 * While much happens on the host that the guest is not told of, waking up for each of it would cost
 * more than looking at it: a nap gathers some.  Where it is others' doing elsewhere the nap ends
 * with the first record of inotify's, which is of something that the guest watches; what only
 * fanotify tells waits for its end.  What the guest itself does is inotify's, too, and then the nap
 * is whole, but shorter.
 */
#define WINDOW_NS 1000000u
static const struct {
	uint64_t per_window; /* events in WINDOW_NS, from which on */
	enum { BY_INOTIFY, ELSEWHERE, ALL } of;
	long ns;
} naps[] = {
    {3, BY_INOTIFY, 1000000}, {30, ELSEWHERE, 1000000}, {150, ALL, 300000}, {30, ALL, 100000}};
#define N_NAPS (sizeof(naps) / sizeof(naps[0]))

/* The shortest that the scheduler takes. */
#define TURN_NS 100000u

struct pace {
	uint64_t received, elsewhere, dropped;	 /* when the last turn ended */
	uint64_t since_ns;			 /* of the window */
	uint64_t in_window, elsewhere_in_window; /* so far */
	uint32_t nap;				 /* by the last whole window; N_NAPS: none */
};

static void nap(struct vf_events *events, uint32_t which)
{
	struct pollfd wanted[2] = {{.fd = events->config.order_fd, .events = POLLIN},
				   {.fd = events->stop_fd, .events = POLLIN}};

	ppoll(wanted, naps[which].of == ALL ? 0 : 2, &(struct timespec){.tv_nsec = naps[which].ns},
	      NULL);
}

/* Is inotify told of everything that the guest is to be told? */
static bool inotify_has_all(struct vf_events *events)
{
	return !events->order_error && !atomic_load(&events->everywhere) &&
	       !atomic_load(&events->told_all) &&
	       !(atomic_load(&events->flags) & VF_FSNOTIFY_WATCH_ALL);
}

static bool is_worth(struct vf_events *events, const struct pace *pace, uint64_t passed_ns,
		     uint32_t which)
{
	uint64_t n = naps[which].of == ALL ? pace->in_window : pace->elsewhere_in_window;

	if (naps[which].of != ALL && events->config.order_fd < 0)
		return false;
	if (naps[which].of == BY_INOTIFY && !inotify_has_all(events))
		return false;
	return n * WINDOW_NS / passed_ns >= naps[which].per_window;
}

/* Is there something to do that no descriptor tells of? */
static bool is_more(const struct vf_events *events)
{
	return events->again || (vf_inotify_has_backlog(events) && !atomic_load(&events->failed));
}

static void pace(struct vf_events *events, struct pace *pace)
{
	uint64_t received = atomic_load(&events->received);
	uint64_t elsewhere = atomic_load(&events->unknown) + atomic_load(&events->unwatched);
	uint64_t dropped = elsewhere + atomic_load(&events->own);
	bool all_dropped = received - pace->received <= dropped - pace->dropped;
	uint64_t passed_ns = vf_now_ns() - pace->since_ns;

	pace->in_window += received - pace->received;
	pace->elsewhere_in_window += elsewhere - pace->elsewhere;
	pace->received = received;
	pace->elsewhere = elsewhere;
	pace->dropped = dropped;
	if (passed_ns >= WINDOW_NS) {
		pace->nap = N_NAPS;
		for (uint32_t i = N_NAPS; i--;)
			if (is_worth(events, pace, passed_ns, i))
				pace->nap = i;
		pace->since_ns += passed_ns;
		pace->in_window = pace->elsewhere_in_window = 0;
	}
	if (all_dropped && pace->nap < N_NAPS && !is_more(events))
		nap(events, pace->nap);
}

/*
 * Each turn takes some microseconds, so where all processors are taken this thread need not wait
 * until whoever has one is through with its own milliseconds: Linux 6.12 lets the one with shorter
 * turns go first, at no gain in processor time.  Older kernels take no notice.
 */
static void ask_for_short_turns(void)
{
	/* The first version of struct sched_attr, which not every C library has. */
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime_ns, deadline_ns, period_ns;
	} turns = {
	    .size = sizeof(turns),
	    .policy = SCHED_OTHER,
	    .nice = getpriority(PRIO_PROCESS, 0),
	    .runtime_ns = TURN_NS,
	};

	if (sched_getscheduler(0) == SCHED_OTHER)
		syscall(SYS_sched_setattr, 0, &turns, 0);
}

static void *events_main(void *arg)
{
	struct vf_events *events = arg;
	struct pace turns = {.nap = N_NAPS};
	struct epoll_event ready;
	int32_t wait_ms = -1;

	pthread_setname_np(pthread_self(), "events");
	prctl(PR_SET_TIMERSLACK, 1000);
	ask_for_short_turns();
	/* Watches name descriptors by their number, relative to this; see vf_thread_init(). */
	if (unshare(CLONE_FS) || fchdir(events->share->config.proc_fd_dir))
		vf_events_source_failed(events, "the thread for events cannot start", errno);
	for (;;) {
		int n = epoll_wait(events->epoll_fd, &ready, 1, is_more(events) ? 0 : wait_ms);

		if (n < 0)
			continue; /* EINTR */
		if (n && ready.data.fd == events->stop_fd)
			return NULL;
		pthread_mutex_lock(&events->busy);
		events->ops->read(events);
		vf_outbox_flush(events->outbox);
		wait_ms = vf_order_wait_ms(events->order);
		pthread_mutex_unlock(&events->busy);
		/* The lock is not handed over by itself, and there is always more to read. */
		while (atomic_load(&events->waiting))
			sched_yield();
		pace(events, &turns);
	}
}

static int start_thread(struct vf_events *events)
{
	sigset_t all, before;
	int error;

	/* Signals are the main thread's, but for faults: guest memory is written here. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGABRT);
	sigdelset(&all, SIGSYS);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = -pthread_create(&events->thread, NULL, events_main, events);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	events->running = !error;
	return error;
}

void vf_events_source_failed(struct vf_events *events, const char *what, int error)
{
	atomic_store(&events->failed, true);
	vf_events_notice(events, "%s: %s; no more changes on the host reach the guest", what,
			 strerror(error));
	vf_coherent_end(events, what);
	epoll_ctl(events->epoll_fd, EPOLL_CTL_DEL, events->config.source_fd, NULL);
	if (events->order)
		epoll_ctl(events->epoll_fd, EPOLL_CTL_DEL, events->config.order_fd, NULL);
	vf_marker_want(events, VF_MARK_ANYBODY, false);
	vf_events_report_overflow(events);
}

/* ---- life --------------------------------------------------------------------- */

static int open_fds(struct vf_events *events)
{
	struct epoll_event source = {.events = EPOLLIN, .data.fd = events->config.source_fd};
	struct epoll_event order = {.events = EPOLLIN, .data.fd = events->config.order_fd};
	struct epoll_event stop = {.events = EPOLLIN};

	events->stop_fd = stop.data.fd = eventfd(0, EFD_CLOEXEC);
	events->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (events->stop_fd < 0 || events->epoll_fd < 0 ||
	    epoll_ctl(events->epoll_fd, EPOLL_CTL_ADD, events->config.source_fd, &source) ||
	    (events->config.order_fd >= 0 &&
	     epoll_ctl(events->epoll_fd, EPOLL_CTL_ADD, events->config.order_fd, &order)) ||
	    epoll_ctl(events->epoll_fd, EPOLL_CTL_ADD, events->stop_fd, &stop))
		return -errno;
	return 0;
}

static void close_groups(const struct vf_events_config *config)
{
	close(config->source_fd);
	if (config->order_fd >= 0)
		close(config->order_fd);
}

static void close_all_groups(const struct vf_events_config *config)
{
	close_groups(config);
	if (config->next_fd >= 0)
		close(config->next_fd);
	if (config->marker_fd >= 0)
		close(config->marker_fd);
}

static struct vf_events *events_new(vf_share *share, const struct vf_events_config *config,
				    int *error)
{
	struct vf_events *events = calloc(1, sizeof(*events));

	*error = -ENOMEM;
	if (!events) {
		close_all_groups(config);
		return NULL;
	}
	events->share = share;
	events->config = *config;
	atomic_store(&events->filesystem_mask, config->filesystem_mask);
	atomic_store(&events->max_element, config->notify_buf_size);
	events->ops =
	    config->source == VF_EVENTS_INOTIFY ? &vf_inotify_source : &vf_fanotify_source;
	events->pid = getpid();
	events->stop_fd = events->epoll_fd = -1;
	pthread_mutex_init(&events->busy, NULL);
	pthread_mutex_init(&events->marker_lock, NULL);
	*error = 0;
	if (config->next_fd >= 0)
		events->move = vf_fanotify_move_new(config->next_fd, error);
	events->buffer = aligned_alloc(64, VF_SOURCE_BUFFER);
	if (!events->buffer)
		*error = -ENOMEM;
	if (!*error)
		*error = open_fds(events);
	if (!*error)
		events->trace = vf_trace_new(error);
	if (!*error)
		events->watches = vf_watches_new(events, error);
	if (!*error)
		*error = vf_watch_share_init(events);
	if (!*error)
		events->outbox = vf_outbox_new(config->max_queued, events->trace, error);
	if (!*error)
		events->parked = vf_parked_new(events, config->max_parked, error);
	if (!*error && config->order_fd >= 0)
		events->order = vf_order_new(events, config->order_fd, error);
	if (!*error)
		*error = start_thread(events);
	if (!*error)
		return events;
	vf_events_free(events);
	return NULL;
}

int vf_share_start_events(vf_share *share, const struct vf_events_config *config)
{
	int error;

	if (share->events) {
		close_all_groups(config);
		return -EBUSY;
	}
	share->events = events_new(share, config, &error);
	return error;
}

void vf_events_free(struct vf_events *events)
{
	uint64_t one = 1;

	if (!events)
		return;
	/* An eventfd that nobody else writes to takes it. */
	if (events->running && write(events->stop_fd, &one, sizeof(one)) == sizeof(one))
		pthread_join(events->thread, NULL);
	if (events->outbox)
		vf_outbox_free(events->outbox);
	vf_parked_free(events->parked);
	vf_order_free(events->order);
	vf_unlinked_forget(events);
	vf_watches_free(events->watches);
	vf_watch_share_free(events);
	vf_own_changes_free(events->own_changes);
	vf_trace_free(events->trace);
	vf_marker_end(events);
	close_groups(&events->config);
	vf_fanotify_move_free(events->move);
	if (events->epoll_fd >= 0)
		close(events->epoll_fd);
	if (events->stop_fd >= 0)
		close(events->stop_fd);
	pthread_mutex_destroy(&events->marker_lock);
	pthread_mutex_destroy(&events->busy);
	vf_backlog_clear(&events->backlog);
	free(events->buffer);
	free(events);
}

/* ---- sessions ------------------------------------------------------------------ */

int vf_share_grant_events(vf_share *share, uint64_t flags, uint64_t mask)
{
	struct vf_events *events = share->events;
	int error;

	if (!events)
		return -ENOSYS;
	error = vf_handle_index_start(share);
	if (!error && (flags & VF_FSNOTIFY_INVALIDATE))
		error = vf_marker_want(events, VF_MARK_INVALIDATE, true);
	if (!error && (flags & VF_FSNOTIFY_DEFERRED_OPEN))
		error = vf_deferred_start(share);
	if (error)
		return error;
	if (flags & VF_FSNOTIFY_PARKED)
		vf_parked_open(events->parked);
	atomic_store(&events->mask, mask);
	atomic_store(&events->flags, flags);
	vf_coherent_begin(events, flags);
	return 0;
}

int vf_share_limit_elements(vf_share *share, uint32_t size)
{
	if (!share->events)
		return -ENOSYS;
	if (size < VF_ELEMENT_MIN)
		return -EINVAL;
	atomic_store(&share->events->max_element, size);
	return 0;
}

int vf_share_limit_parked(vf_share *share, uint32_t max)
{
	if (!share->events)
		return -ENOSYS;
	vf_parked_limit(share->events->parked, max);
	return 0;
}

bool vf_share_events_failed(vf_share *share)
{
	return share->events && atomic_load(&share->events->failed);
}

/* Holds the source's thread up between two turns. */
static void lock_source(struct vf_events *events)
{
	atomic_fetch_add(&events->waiting, 1);
	pthread_mutex_lock(&events->busy);
	atomic_fetch_sub(&events->waiting, 1);
}

void vf_events_end_session(struct vf_events *events)
{
	if (!events)
		return;
	vf_coherent_end(events, NULL);
	atomic_store(&events->flags, 0);
	/* Nothing is held for the guest any more by who sees this. */
	atomic_store(&events->everywhere, 0);
	vf_parked_close(events->parked);
	/* What the source's thread was reporting has come as far as the outbox. */
	lock_source(events);
	pthread_mutex_unlock(&events->busy);
	vf_marker_want(events, VF_MARK_WATCHES | VF_MARK_INVALIDATE, false);
	vf_handle_index_stop(events->share);
	vf_watch_share_end(events);
	vf_watches_clear(events->watches);
	lock_source(events);
	if (events->order)
		vf_order_clear(events->order);
	vf_unlinked_forget(events);
	pthread_mutex_unlock(&events->busy);
	vf_outbox_clear(events->outbox);
	vf_outbox_use(events->outbox, NULL);
	atomic_store(&events->max_element, events->config.notify_buf_size);
}

/* ---- what people are told --------------------------------------------------------- */

void vf_events_notice(struct vf_events *events, const char *format, ...)
{
	char text[256];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	vf_trace_notice(events->trace, text);
}

void vf_share_get_events_stats(vf_share *share, struct vf_events_stats *stats)
{
	struct vf_events *events = share->events;

	memset(stats, 0, sizeof(*stats));
	if (!events)
		return;
	stats->received = atomic_load(&events->received);
	stats->own = atomic_load(&events->own);
	stats->unknown = atomic_load(&events->unknown);
	stats->unwatched = atomic_load(&events->unwatched);
	stats->host_overflows = atomic_load(&events->host_overflows);
	stats->host_marks = atomic_load(&events->host_marks);
	stats->watches = vf_watches_count(events->watches);
	stats->share_watches = !!atomic_load(&events->everywhere);
	vf_outbox_get_stats(events->outbox, stats);
}

void vf_share_trace_events(vf_share *share, bool on)
{
	if (!share->events)
		return;
	vf_trace_set(share->events->trace, on);
	vf_marker_want(share->events, VF_MARK_PEOPLE, on);
}

int vf_share_next_event_trace(vf_share *share, struct vf_event_trace *trace)
{
	return share->events ? vf_trace_next(share->events->trace, trace) : 0;
}

int vf_share_next_event_notice(vf_share *share, char *text, uint32_t size)
{
	return share->events ? vf_trace_next_notice(share->events->trace, text, size) : 0;
}

int vf_share_events_moved(vf_share *share, char *text, uint32_t size)
{
	return share->events && vf_fanotify_move_reason(share->events, text, size);
}

int vf_share_events_fd(vf_share *share)
{
	return share->events ? vf_trace_fd(share->events->trace) : -1;
}
