/* SPDX-License-Identifier: Apache-2.0 */
/*
 * See fanotify_move.h.  How nothing is lost on the way, and nothing told twice:
 *
 * The marks are made in the next group, a few at a turn, while the first one
 * is read as ever.  So everything that is watched is in both queues from then
 * on.  What the next group has is thrown away, until the end:
 *
 *   1. The next group is emptied once more.
 *   2. A barrier: whatever the kernel began to tell before it is in the queues
 *      behind it.  What did not see the marks of the next group is in the first.
 *   3. The first group is read for the last time.
 *   4. A barrier: what step 3 has read, the next group has, if it came after step 1.
 *   5. The next group is read.  An event that both have told is dropped from
 *      what the first one said, since the other may have summed it up with a
 *      later one (fanotify_overlap.c).
 *   6. What is left of the first is reported, then what the next one said.  The
 *      first is closed, which takes its marks away.
 *
 * The barrier is the kernel's own: closing a group returns when nobody can see
 * its marks any more, so after everybody has left who was telling something
 * (synchronize_srcu() in fs/notify/mark.c, since Linux 4.12).
 */
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <time.h>

#include "fanotify_move.h"
#include "fanotify_overlap.h"
#include "marker.h"
#include "proc_name.h"

#define SECOND_NS 1000000000u
/* From this share of a processor on, in thousandths, the file system is busy. */
#define BUSY_PERMILLE 25u
/* For so long, in seconds. */
#define BUSY_WINDOWS 3u
/* And in all so much, so that a short burst of much work does not count. */
#define MIN_SPENT_NS 125000000u
/* What a watch costs to be marked, as measured. */
#define MARK_COST_NS 10000u
/* Watches that are marked in a turn. */
#define MARKS_A_TURN 256u
#define MAX_REASON 200u

enum phase { MEASURING, MARKING, STAYED, MOVED };

struct vf_fanotify_move {
	int next_fd; /* -1 when it is the source's, or was given up */
	atomic_uint phase;
	atomic_bool wanted, markerless;
	/* MEASURING */
	uint64_t since_ns, since_cpu_ns, received, elsewhere; /* when the window began */
	uint64_t spent_ns; /* on what nobody watches, in the busy windows by now */
	uint32_t busy_windows;
	uint32_t permille, a_second; /* of the last window: of a processor; events */
	/* MARKING */
	bool marking; /* next_fd gets marks; under watches->change_lock */
	int error;    /* likewise: one that was refused */
	uint32_t at;
	atomic_uint_fast64_t marks;
	/* From the end of MARKING to the report. */
	struct vf_fanotify_records first, next;
	bool lost; /* something is, and the guest is told */
};

/* ---- whether to ------------------------------------------------------------------ */

static void begin_window(struct vf_events *events, uint64_t now_ns)
{
	struct vf_fanotify_move *move = events->move;

	move->since_ns = now_ns;
	move->since_cpu_ns = vf_clock_ns(CLOCK_THREAD_CPUTIME_ID);
	move->received = atomic_load(&events->received);
	move->elsewhere = events->elsewhere;
}

static void end_window(struct vf_events *events, uint64_t passed_ns)
{
	struct vf_fanotify_move *move = events->move;
	uint64_t received = atomic_load(&events->received) - move->received;
	uint64_t elsewhere = events->elsewhere - move->elsewhere;
	uint64_t spent_ns = vf_clock_ns(CLOCK_THREAD_CPUTIME_ID) - move->since_cpu_ns;

	spent_ns = received ? spent_ns * elsewhere / received : 0;
	move->permille = (uint32_t)(spent_ns * 1000 / passed_ns);
	move->a_second = (uint32_t)(elsewhere * 1000 / (passed_ns / 1000000u));
	if (move->permille >= BUSY_PERMILLE) {
		move->busy_windows++;
		move->spent_ns += spent_ns;
	} else {
		move->busy_windows = 0;
		move->spent_ns = passed_ns > 8 * (uint64_t)SECOND_NS ? 0 : move->spent_ns / 2;
	}
}

/* Has what nobody watches cost as much by now as marks on what is watched would? */
static bool is_busy(struct vf_events *events)
{
	const struct vf_fanotify_move *move = events->move;
	uint64_t marks_ns = vf_watches_count(events->watches) * MARK_COST_NS;

	return move->busy_windows >= BUSY_WINDOWS && move->spent_ns >= MIN_SPENT_NS &&
	       move->spent_ns >= marks_ns;
}

static bool measure(struct vf_events *events)
{
	struct vf_fanotify_move *move = events->move;
	uint64_t now_ns = vf_now_ns();

	if (now_ns - move->since_ns >= SECOND_NS) {
		if (move->since_ns)
			end_window(events, now_ns - move->since_ns);
		begin_window(events, now_ns);
		if (is_busy(events))
			return true;
	}
	return atomic_load(&move->wanted);
}

/* A guest that is to hear of everything needs the mark on the file system. */
static bool is_needed(struct vf_events *events)
{
	return atomic_load(&events->everywhere) ||
	       (atomic_load(&events->flags) & (VF_FSNOTIFY_WATCH_ALL | VF_FSNOTIFY_INVALIDATE));
}

/* ---- marks ------------------------------------------------------------------------- */

static void set_marking(struct vf_events *events, bool marking)
{
	vf_watches_hold(events->watches);
	events->move->marking = marking;
	vf_watches_go_on(events->watches);
}

static int error_of(struct vf_events *events)
{
	int error;

	vf_watches_hold(events->watches);
	error = events->move->error;
	vf_watches_go_on(events->watches);
	return error;
}

static void stay(struct vf_events *events, const char *what, int error)
{
	struct vf_fanotify_move *move = events->move;

	vf_events_notice(events,
			 "the file system is busy (%u events a second that nobody in the "
			 "guest watches), but the mark on it stays: %s: %s%s",
			 move->a_second, what, strerror(-error),
			 error == -ENOSPC ? " (fs.fanotify.max_user_marks)" : "");
	set_marking(events, false);
	close(move->next_fd);
	move->next_fd = -1;
	atomic_store(&move->phase, STAYED);
}

int vf_fanotify_move_fd(const struct vf_events *events)
{
	return events->move && events->move->marking ? events->move->next_fd : -1;
}

atomic_uint_fast64_t *vf_fanotify_move_marks(struct vf_events *events)
{
	return &events->move->marks;
}

void vf_fanotify_move_failed(struct vf_events *events, int error)
{
	if (!events->move->error)
		events->move->error = error;
}

/* ---- the move ---------------------------------------------------------------------------- */

/* 0, or a negative errno: see above. */
static int barrier(struct vf_events *events)
{
	int fd = inotify_init1(IN_CLOEXEC), error = 0;
	char name[PROC_NAME_SIZE];

	if (fd < 0)
		return -errno;
	/* Relative to where this thread is: vf_inotify_watch(). */
	if (inotify_add_watch(fd, proc_name(name, events->share->config.root_fd), IN_DELETE_SELF) <
	    0)
		error = -errno;
	close(fd);
	return error;
}

static void tell_reason(struct vf_events *events)
{
	char reason[MAX_REASON];

	if (vf_fanotify_move_reason(events, reason, sizeof(reason)))
		vf_events_notice(events, "events: now by %s", reason);
}

static void become_source(struct vf_events *events)
{
	struct epoll_event source = {.events = EPOLLIN, .data.fd = events->move->next_fd};
	struct vf_fanotify_move *move = events->move;
	int first = events->config.source_fd;

	vf_watches_hold(events->watches);
	move->marking = false;
	events->config.source_fd = move->next_fd;
	atomic_store(&events->filesystem_mask, 0);
	move->next_fd = -1;
	atomic_store(&events->host_marks, atomic_load(&move->marks));
	vf_watches_go_on(events->watches);
	epoll_ctl(events->epoll_fd, EPOLL_CTL_DEL, first, NULL);
	if (epoll_ctl(events->epoll_fd, EPOLL_CTL_ADD, events->config.source_fd, &source))
		vf_events_source_failed(events, "epoll_ctl", errno);
	/* It has the first group open, too. */
	vf_marker_end(events);
	close(first);
	/* Since the move began: what happened before these marks is lost. */
	if (atomic_load(&events->everywhere)) {
		vf_watch_share_renew(events);
		move->lost = true;
	}
	atomic_store(&move->phase, MOVED);
	tell_reason(events);
}

static void move_over(struct vf_events *events)
{
	struct vf_fanotify_move *move = events->move;
	int error = vf_fanotify_empty_queue(events, move->next_fd, NULL);

	if (!error)
		error = barrier(events);
	if (error) {
		stay(events, "the order of events cannot be kept", error);
		return;
	}
	move->first.seen_ns = vf_now_ns();
	error = vf_fanotify_empty_queue(events, events->config.source_fd, &move->first);
	if (!error)
		error = barrier(events);
	move->next.seen_ns = vf_now_ns();
	if (!error)
		error = vf_fanotify_empty_queue(events, move->next_fd, &move->next);
	/* The first group has been read already. */
	if (error || move->first.lost || move->next.lost)
		move->lost = true;
	become_source(events);
}

static void mark_some(struct vf_events *events)
{
	struct vf_fanotify_move *move = events->move;
	bool more = vf_watches_renew(events->watches, &move->at, MARKS_A_TURN);
	int error = error_of(events);

	/* The first group tells it all as yet. */
	if (!error)
		error = vf_fanotify_empty_queue(events, move->next_fd, NULL);
	if (error)
		stay(events, "marks on watched inodes", error);
	else if (!more)
		move_over(events);
}

/* The mark on the file system is needed again for now: what is marked stays so. */
static void wait_for_need(struct vf_events *events)
{
	int error = vf_fanotify_empty_queue(events, events->move->next_fd, NULL);

	if (error)
		stay(events, "marks on watched inodes", error);
}

/* False: another thread was faster. */
static bool enter(struct vf_fanotify_move *move, uint32_t from, uint32_t to)
{
	return atomic_compare_exchange_strong(&move->phase, &from, to);
}

void vf_fanotify_move_turn(struct vf_events *events)
{
	struct vf_fanotify_move *move = events->move;

	if (!move)
		return;
	if (atomic_load(&move->phase) == MEASURING && measure(events) && !is_needed(events) &&
	    enter(move, MEASURING, MARKING)) {
		set_marking(events, true);
	} else if (atomic_load(&move->phase) == MARKING && is_needed(events)) {
		wait_for_need(events);
	} else if (atomic_load(&move->phase) == MARKING) {
		mark_some(events);
	}
	events->again = atomic_load(&move->phase) == MARKING && !is_needed(events);
}

bool vf_fanotify_move_report(struct vf_events *events)
{
	struct vf_fanotify_move *move = events->move;

	if (!move || (!move->first.size && !move->next.size && !move->lost))
		return false;
	if (!vf_fanotify_report_both(events, &move->first, &move->next))
		move->lost = true;
	if (move->lost) {
		vf_events_notice(events, "some events were lost while their source was changed; "
					 "the guest is told so");
		vf_events_report_overflow(events);
	}
	move->lost = false;
	return true;
}

void vf_fanotify_move_want(struct vf_events *events)
{
	if (events->move)
		atomic_store(&events->move->wanted, true);
}

bool vf_fanotify_move_without_marker(struct vf_events *events, bool is_marked)
{
	struct vf_fanotify_move *move = events->move;

	if (!move)
		return false;
	atomic_store(&move->markerless, true);
	if (is_marked) {
		vf_fanotify_move_want(events);
		return true;
	}
	/* One that is under way goes on, and the first group has what is watched meanwhile. */
	vf_watches_hold(events->watches);
	atomic_store(&events->filesystem_mask, 0);
	vf_watches_go_on(events->watches);
	if (enter(move, MEASURING, MOVED) || enter(move, STAYED, MOVED))
		tell_reason(events);
	return true;
}

bool vf_fanotify_move_reason(const struct vf_events *events, char *text, size_t size)
{
	const struct vf_fanotify_move *move = events->move;

	if (!move || atomic_load(&move->phase) != MOVED)
		return false;
	if (atomic_load(&move->markerless))
		snprintf(text, size,
			 "fanotify, marks on watched inodes (the process vhostfs-mark has ended)");
	else
		snprintf(text, size,
			 "fanotify, marks on watched inodes (the file system is busy: %u"
			 " events a second that nobody in the guest watches took %u.%u"
			 "%% of a processor)",
			 move->a_second, move->permille / 10, move->permille % 10);
	return true;
}

/* ---- life ---------------------------------------------------------------------------------- */

struct vf_fanotify_move *vf_fanotify_move_new(int next_fd, int *error)
{
	struct vf_fanotify_move *move = calloc(1, sizeof(*move));

	if (!move) {
		close(next_fd);
		*error = -ENOMEM;
		return NULL;
	}
	move->next_fd = next_fd;
	move->at = 1;
	*error = 0;
	return move;
}

void vf_fanotify_move_free(struct vf_fanotify_move *move)
{
	if (!move)
		return;
	if (move->next_fd >= 0)
		close(move->next_fd);
	free(move->first.bytes);
	free(move->next.bytes);
	free(move);
}
