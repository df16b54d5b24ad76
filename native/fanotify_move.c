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
 *      later one.  This is as the kernel does with what waits unread.
 *   6. What is left of the first is reported, then what the next one said.  The
 *      first is closed, which takes its marks away.
 *
 * The barrier is the kernel's own: closing a group returns when nobody can see
 * its marks any more, so after everybody has left who was telling something
 * (synchronize_srcu() in fs/notify/mark.c, since Linux 4.12).
 */
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <time.h>

#include "fanotify_move.h"
#include "fanotify_source.h"
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
/* More of what was read twice is not kept: then the guest is told of a loss. */
#define MAX_KEPT (64u << 20)
#define MAX_REASON 200u

enum phase { MEASURING, MARKING, STAYED, MOVED };

/* Whole records, as they were read. */
struct records {
	uint8_t *bytes;
	size_t size, room;
	uint64_t seen_ns;
};

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
	struct records first, next;
	bool lost; /* something is, and the guest is told */
};

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* ---- whether to ------------------------------------------------------------------ */

static void begin_window(struct vf_events *events, uint64_t now_ns)
{
	struct vf_fanotify_move *move = events->move;

	move->since_ns = now_ns;
	move->since_cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	move->received = atomic_load(&events->received);
	move->elsewhere = events->elsewhere;
}

static void end_window(struct vf_events *events, uint64_t passed_ns)
{
	struct vf_fanotify_move *move = events->move;
	uint64_t received = atomic_load(&events->received) - move->received;
	uint64_t elsewhere = events->elsewhere - move->elsewhere;
	uint64_t spent_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - move->since_cpu_ns;

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
	uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);

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

/* ---- both queues -------------------------------------------------------------------- */

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

static bool keep(struct vf_fanotify_move *move, struct records *records, const uint8_t *bytes,
		 uint32_t size)
{
	if (records->size + size > records->room) {
		size_t room = records->room ? records->room * 2 : 65536;
		uint8_t *more = room <= MAX_KEPT ? realloc(records->bytes, room) : NULL;

		if (!more) {
			move->lost = true;
			return false;
		}
		records->bytes = more;
		records->room = room;
	}
	memcpy(records->bytes + records->size, bytes, size);
	records->size += size;
	return true;
}

/* What was read at once: how many records, those that the guest wants are kept. */
static uint32_t sort_out(struct vf_events *events, struct records *records, uint32_t size)
{
	struct vf_fanotify_record record;
	uint32_t n = 0;

	for (uint32_t at = 0; at < size; n++) {
		int32_t length = vf_fanotify_parse(events->buffer + at, size - at, &record);

		if (length < 0) {
			vf_fanotify_report_garbage(events, size - at);
			break;
		}
		if (!vf_fanotify_is_wanted(events, &record))
			vf_fanotify_take(events, &record, records->seen_ns);
		else
			keep(events->move, records, events->buffer + at, (uint32_t)length);
		at += (uint32_t)length;
	}
	return n;
}

static uint32_t count(const uint8_t *bytes, uint32_t size)
{
	struct fanotify_event_metadata head;
	uint32_t n = 0;

	for (uint32_t at = 0; size - at >= sizeof(head); at += head.event_len, n++) {
		memcpy(&head, bytes + at, sizeof(head));
		if (head.event_len < sizeof(head) || head.event_len > size - at)
			break;
	}
	return n;
}

/*
 * Reads all that is in the queue now, and perhaps more.  records: where to; NULL: it is thrown
 * away.  0 or a negative errno.
 */
static int empty_queue(struct vf_events *events, int fd, struct records *records)
{
	int bytes = 0;
	uint32_t left;

	if (ioctl(fd, FIONREAD, &bytes))
		return -errno;
	/* The size of that many records without what follows their heads, or all of it. */
	left = (uint32_t)bytes / FAN_EVENT_METADATA_LEN;
	while (left) {
		ssize_t size = read(fd, events->buffer, VF_SOURCE_BUFFER);
		uint32_t n;

		if (size < 0 && errno == EINTR)
			continue;
		if (size <= 0)
			return size && errno != EAGAIN ? -errno : 0;
		n = records ? sort_out(events, records, (uint32_t)size)
			    : count(events->buffer, (uint32_t)size);
		left = n < left ? left - n : 0;
	}
	return 0;
}

/* ---- what both have said -------------------------------------------------------------- */

#define N_BUCKETS 4096u
#define NONE UINT32_MAX

/* Records of the next group by process and object. */
struct index {
	const struct records *records;
	struct entry {
		uint32_t at, next;
	} * entries;
	uint32_t n, room;
	uint32_t buckets[N_BUCKETS];
};

static uint32_t hash(const struct vf_fanotify_record *record)
{
	const struct vf_fanotify_object *object =
	    record->object.there ? &record->object : &record->dir;
	uint64_t h = (uint32_t)record->pid;

	for (uint32_t i = 0; object->there && i < object->handle_size; i++)
		h = (h ^ object->handle[i]) * 0x100000001b3u;
	return (uint32_t)(h ^ h >> 32) % N_BUCKETS;
}

static void index_free(struct index *index)
{
	if (index)
		free(index->entries);
	free(index);
}

static struct index *index_new(const struct records *records)
{
	struct index *index = calloc(1, sizeof(*index));
	struct vf_fanotify_record record;
	int32_t length;

	if (!index)
		return NULL;
	index->records = records;
	memset(index->buckets, 0xff, sizeof(index->buckets));
	for (uint32_t at = 0; at < records->size; at += (uint32_t)length) {
		uint32_t *bucket;

		length =
		    vf_fanotify_parse(records->bytes + at, (uint32_t)records->size - at, &record);
		if (length < 0)
			break; /* not after it was parsed once */
		if (index->n == index->room) {
			uint32_t room = index->room ? index->room * 2 : 256;
			struct entry *more = realloc(index->entries, room * sizeof(*more));

			if (!more) {
				index_free(index);
				return NULL;
			}
			index->entries = more;
			index->room = room;
		}
		bucket = &index->buckets[hash(&record)];
		index->entries[index->n] = (struct entry){.at = at, .next = *bucket};
		*bucket = index->n++;
	}
	return index;
}

static bool is_same(const struct vf_fanotify_object *a, const struct vf_fanotify_object *b)
{
	if (!a->there || !b->there)
		return a->there == b->there;
	return !memcmp(&a->fsid, &b->fsid, sizeof(a->fsid)) && a->type == b->type &&
	       a->handle_size == b->handle_size && !memcmp(a->handle, b->handle, a->handle_size) &&
	       !a->name == !b->name && a->namelen == b->namelen &&
	       (!a->name || !memcmp(a->name, b->name, a->namelen));
}

/*
 * What the other record tells, too.  Of a rename, marks on inodes tell the sides that they are on.
 */
static uint64_t in_common(const struct vf_fanotify_record *record,
			  const struct vf_fanotify_record *other)
{
	if (record->pid != other->pid || !is_same(&record->object, &other->object) ||
	    ((record->mask ^ other->mask) & (VF_FS_RENAME | VF_FS_ISDIR)))
		return 0;
	if (record->mask & VF_FS_RENAME)
		return (!other->old.there || is_same(&record->old, &other->old)) &&
			       (!other->new.there || is_same(&record->new, &other->new))
			   ? record->mask
			   : 0;
	return is_same(&record->dir, &other->dir) ? record->mask & other->mask : 0;
}

/* Takes from the record of the first group what the next one tells. */
static void strip(const struct index *index, struct vf_fanotify_record *record)
{
	struct vf_fanotify_record other;

	for (uint32_t i = index->buckets[hash(record)]; i != NONE; i = index->entries[i].next) {
		uint32_t at = index->entries[i].at;

		if (vf_fanotify_parse(index->records->bytes + at,
				      (uint32_t)index->records->size - at, &other) > 0)
			record->mask &= ~(in_common(record, &other) & ~VF_FS_ISDIR);
	}
}

static void report(struct vf_events *events, struct records *records, const struct index *index)
{
	struct vf_fanotify_record record;
	int32_t length;

	for (uint32_t at = 0; at < records->size; at += (uint32_t)length) {
		length =
		    vf_fanotify_parse(records->bytes + at, (uint32_t)records->size - at, &record);
		if (length < 0)
			break;
		if (index)
			strip(index, &record);
		if (record.mask & ~VF_FS_ISDIR)
			vf_fanotify_take(events, &record, records->seen_ns);
	}
	free(records->bytes);
	*records = (struct records){.size = 0};
}

bool vf_fanotify_move_report(struct vf_events *events)
{
	struct vf_fanotify_move *move = events->move;
	struct index *index;

	if (!move || (!move->first.size && !move->next.size && !move->lost))
		return false;
	index = index_new(&move->next);
	if (!index)
		move->lost = true;
	report(events, &move->first, index);
	report(events, &move->next, NULL);
	index_free(index);
	if (move->lost) {
		vf_events_notice(events, "some events were lost while their source was changed; "
					 "the guest is told so");
		vf_events_report_overflow(events);
	}
	move->lost = false;
	return true;
}

/* ---- the move ---------------------------------------------------------------------------- */

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
	int error = empty_queue(events, move->next_fd, NULL);

	if (!error)
		error = barrier(events);
	if (error) {
		stay(events, "the order of events cannot be kept", error);
		return;
	}
	move->first.seen_ns = clock_ns(CLOCK_MONOTONIC);
	error = empty_queue(events, events->config.source_fd, &move->first);
	if (!error)
		error = barrier(events);
	move->next.seen_ns = clock_ns(CLOCK_MONOTONIC);
	if (!error)
		error = empty_queue(events, move->next_fd, &move->next);
	/* The first group has been read already. */
	if (error)
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
		error = empty_queue(events, move->next_fd, NULL);
	if (error)
		stay(events, "marks on watched inodes", error);
	else if (!more)
		move_over(events);
}

/* The mark on the file system is needed again for now: what is marked stays so. */
static void wait_for_need(struct vf_events *events)
{
	int error = empty_queue(events, events->move->next_fd, NULL);

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
