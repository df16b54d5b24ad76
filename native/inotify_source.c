/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes on the host as inotify(7) tells them, where fanotify is not to be
 * had: one watch on the host for each object that the guest watches.  Limits
 * are in docs/events.md.
 *
 * A watch reports an entry of a directory by its name alone.  Which object that
 * is, the name is asked a moment later: when it was given to another meanwhile,
 * the event names that one.  What is no longer there is nobody's (child NULL).
 */
#include <poll.h>
#include <sys/inotify.h>
#include <time.h>

#include "own_changes.h"
#include "proc_name.h"

/* All that inotify can be asked for. */
#define EVENTS ((uint64_t)IN_ALL_EVENTS)
/* In how many places of a share one object may be mounted; more are not told of. */
#define MAX_PLACES 8u
/* The kernel adds the second half of a rename right after the first, but not at the same moment. */
#define SECOND_HALF_MS 1
/* An object's own record follows its directory's; a few of others may come between. */
#define MAX_ECHOES (sizeof(((struct vf_events *)0)->echoes) / sizeof(struct vf_echo))
#define ECHO_NS 100000000u
/* Left in the buffer for that second half and a few more. */
#define READ_ROOM 4096u
/* The halves of a rename are looked for this far apart. */
#define MAX_BETWEEN 64u

/* The inodes that one watch stands for: one object of the host, on different mounts. */
struct places {
	struct vf_inode *inodes[MAX_PLACES];
	uint32_t n;
};

struct reader {
	struct vf_events *events;
	uint64_t now_ns;
	uint32_t size; /* of what was read */
	uint64_t at;   /* where in the instance's stream it began */
};

static struct inotify_event *record_at(const struct reader *reader, uint32_t at)
{
	struct inotify_event *record = (void *)(reader->events->buffer + at);

	if (reader->size - at < sizeof(*record) ||
	    reader->size - at - sizeof(*record) < record->len)
		return NULL;
	return record;
}

static uint32_t record_end(uint32_t at, const struct inotify_event *record)
{
	return at + (uint32_t)sizeof(*record) + record->len;
}

static void find(struct vf_events *events, int32_t wd, struct places *places)
{
	places->n = vf_watches_by_wd(events->watches, wd, places->inodes, MAX_PLACES);
}

static void put(struct vf_events *events, struct places *places)
{
	for (uint32_t i = 0; i < places->n; i++)
		vf_inode_put(events->share, places->inodes[i]);
}

/* ---- one record twice ------------------------------------------------------- */

/*
 * When both a directory and an object in it are watched, what happens to the object comes by both
 * watches, the directory's first.  The guest's driver tells both watchers of the first, so the
 * second must not be reported.
 */
static void expect_echo(struct reader *reader, const struct vf_change *change)
{
	struct vf_events *events = reader->events;
	uint64_t event = change->mask & VF_FS_CHILD_EVENTS;

	if (!change->child || !(vf_watch_mask(events->watches, change->child) & event))
		return;
	events->echoes[events->next_echo++ % MAX_ECHOES] =
	    (struct vf_echo){vf_inode_nodeid(change->child), event, reader->now_ns};
}

static bool is_echo(struct reader *reader, const struct vf_change *change)
{
	uint64_t event = change->mask & VF_FS_CHILD_EVENTS, nodeid = vf_inode_nodeid(change->child);

	for (uint32_t i = 0; event && i < MAX_ECHOES; i++) {
		struct vf_echo *echo = &reader->events->echoes[i];

		if (echo->event == event && echo->nodeid == nodeid &&
		    reader->now_ns - echo->seen_ns < ECHO_NS) {
			echo->event = 0;
			return true;
		}
	}
	return false;
}

/* ---- one record ----------------------------------------------------------------- */

static struct vf_change change_of(const struct reader *reader, const struct inotify_event *record,
				  struct vf_inode *inode)
{
	struct vf_change change = {
	    .mask = record->mask & (EVENTS | VF_FS_ISDIR),
	    .seen_ns = reader->now_ns,
	};

	if (record->len) {
		change.dir = inode;
		change.name = record->name;
		change.namelen = (uint32_t)strnlen(record->name, record->len);
		if (change.namelen > VF_NAME_MAX)
			change.namelen = VF_NAME_MAX;
	} else {
		/* inotify does not say so of self events. */
		if (vf_inode_type(inode) == S_IFDIR)
			change.mask |= VF_FS_ISDIR;
		change.child = inode;
	}
	return change;
}

/* The object of the name, referenced, where the name should still mean it. */
static struct vf_inode *object_of(struct vf_events *events, const struct vf_change *change)
{
	char name[VF_NAME_MAX + 1];

	if (!change->dir || (change->mask & (VF_FS_DELETE | VF_FS_MOVED_FROM)))
		return NULL;
	memcpy(name, change->name, change->namelen);
	name[change->namelen] = 0;
	return vf_inode_known(events->share, change->dir, name);
}

/* Changes of one record, or of two that belong together. */
static void report(struct reader *reader, const struct inotify_event *record,
		   const struct vf_change *changes, uint32_t n)
{
	struct vf_events *events = reader->events;
	uint64_t at = reader->at + (uint64_t)((const uint8_t *)record - events->buffer);

	if (!vf_own_changes_is(events->own_changes, at, changes)) {
		vf_events_report(events, changes, n);
		return;
	}
	vf_count_n(&events->own, n);
	vf_events_trace_own(events, changes, n);
}

static void report_entry(struct reader *reader, const struct inotify_event *record,
			 struct vf_inode *dir)
{
	struct vf_events *events = reader->events;
	struct vf_change change = change_of(reader, record, dir);

	change.child = object_of(events, &change);
	expect_echo(reader, &change);
	report(reader, record, &change, 1);
	if (change.child)
		vf_inode_put(events->share, change.child);
}

static void report_object(struct reader *reader, const struct inotify_event *record,
			  struct vf_inode *object)
{
	struct vf_change change = change_of(reader, record, object);

	if (!is_echo(reader, &change))
		report(reader, record, &change, 1);
}

static void take_one(struct reader *reader, const struct inotify_event *record)
{
	struct vf_events *events = reader->events;
	struct places places;

	find(events, record->wd, &places);
	for (uint32_t i = 0; i < places.n; i++) {
		if (record->len)
			report_entry(reader, record, places.inodes[i]);
		else
			report_object(reader, record, places.inodes[i]);
	}
	if (!places.n)
		vf_count(&events->unknown);
	put(events, &places);
}

/* ---- renames ---------------------------------------------------------------------- */

/*
 * The record behind offset at of the same rename's other half.  NULL: it was not read yet, or
 * something happened in its directory before it, which must not be overtaken.
 */
static struct inotify_event *second_half(const struct reader *reader, uint32_t at, uint32_t cookie)
{
	int32_t between[MAX_BETWEEN];
	struct inotify_event *record;

	for (uint32_t n = 0; n < MAX_BETWEEN && (record = record_at(reader, at));
	     at = record_end(at, record)) {
		if ((record->mask & IN_MOVED_TO) && record->cookie == cookie) {
			while (n && between[n - 1] != record->wd)
				n--;
			return n ? NULL : record;
		}
		between[n++] = record->wd;
	}
	return NULL;
}

static struct vf_inode *on_mount(const struct places *places, uint16_t mount)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (vf_inode_mount(places->inodes[i]) == mount)
			return places->inodes[i];
	return NULL;
}

static void report_pair(struct reader *reader, const struct inotify_event *from,
			struct vf_inode *from_dir, const struct inotify_event *to,
			struct vf_inode *to_dir)
{
	struct vf_events *events = reader->events;
	struct vf_change changes[2] = {change_of(reader, from, from_dir),
				       change_of(reader, to, to_dir)};
	struct vf_inode *object = object_of(events, &changes[1]);

	if (!++events->last_cookie)
		events->last_cookie = 1;
	for (uint32_t i = 0; i < 2; i++) {
		changes[i].child = object;
		changes[i].cookie = events->last_cookie;
		changes[i].flags = VF_FSNOTIFY_SPLIT_RENAME;
	}
	report(reader, from, changes, 2);
	if (object)
		vf_inode_put(events->share, object);
}

/* Both directories have a watch: a pair on each mount that shows both. */
static void take_pair(struct reader *reader, const struct inotify_event *from,
		      const struct inotify_event *to)
{
	struct vf_events *events = reader->events;
	struct places froms, tos;

	find(events, from->wd, &froms);
	find(events, to->wd, &tos);
	for (uint32_t i = 0; i < froms.n; i++) {
		struct vf_inode *dir = on_mount(&tos, vf_inode_mount(froms.inodes[i]));

		if (dir)
			report_pair(reader, from, froms.inodes[i], to, dir);
		else
			report_entry(reader, from, froms.inodes[i]);
	}
	for (uint32_t i = 0; i < tos.n; i++)
		if (!on_mount(&froms, vf_inode_mount(tos.inodes[i])))
			report_entry(reader, to, tos.inodes[i]);
	put(events, &froms);
	put(events, &tos);
}

static void read_more(struct reader *reader)
{
	struct vf_events *events = reader->events;
	struct pollfd more = {.fd = events->config.source_fd, .events = POLLIN};
	uint64_t at;
	ssize_t n;

	if (poll(&more, 1, SECOND_HALF_MS) != 1)
		return;
	n = vf_own_changes_read(events->own_changes, events->buffer + reader->size,
				VF_SOURCE_BUFFER - reader->size, &at);
	if (n > 0)
		reader->size += (uint32_t)n;
}

static void take_moved_from(struct reader *reader, const struct inotify_event *record, uint32_t end)
{
	struct inotify_event *to = second_half(reader, end, record->cookie);

	/* Nothing behind it: it was read as soon as it was there. */
	if (!to && end == reader->size) {
		read_more(reader);
		to = second_half(reader, end, record->cookie);
	}
	if (!to) {
		take_one(reader, record);
		return;
	}
	vf_count(&reader->events->received);
	take_pair(reader, record, to);
	to->mask = 0; /* done */
}

/* ---- reading ------------------------------------------------------------------------- */

static void take(struct reader *reader, const struct inotify_event *record, uint32_t end)
{
	struct vf_events *events = reader->events;

	if (record->mask & IN_Q_OVERFLOW) {
		memset(events->echoes, 0, sizeof(events->echoes));
		vf_events_report_overflow(events);
		return;
	}
	/*
	 * A half that was reported with the other; or IN_IGNORED, IN_UNMOUNT: the watch is gone,
	 * and the guest's own ends with its inode.
	 */
	if (!(record->mask & EVENTS))
		return;
	vf_count(&events->received);
	if (record->mask & IN_MOVED_FROM)
		take_moved_from(reader, record, end);
	else
		take_one(reader, record);
}

static void inotify_read(struct vf_events *events)
{
	struct reader reader = {.events = events};
	const struct inotify_event *record;
	struct timespec now;
	ssize_t n;

	n = vf_own_changes_read(events->own_changes, events->buffer, VF_SOURCE_BUFFER - READ_ROOM,
				&reader.at);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		vf_events_source_failed(events, "reading inotify", n ? errno : EIO);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	reader.now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	reader.size = (uint32_t)n;
	for (uint32_t at = 0; (record = record_at(&reader, at)); at = record_end(at, record))
		take(&reader, record, record_end(at, record));
	vf_own_changes_pass(events->own_changes, reader.at + reader.size);
}

/* ---- watches ---------------------------------------------------------------------------- */

static uint32_t bits_of(const struct vf_events *events, const struct vf_inode *inode, uint64_t mask)
{
	uint64_t bits = mask & EVENTS;

	if (mask & VF_FS_RENAME)
		bits |= VF_FS_MOVED_FROM | VF_FS_MOVED_TO;
	if (vf_inode_type(inode) != S_IFDIR) {
		bits &= ~VF_FS_ENTRY_EVENTS;
		/* The end of an object whose descriptor we hold shows in its link count. */
		if (bits & VF_FS_DELETE_SELF)
			bits |= VF_FS_ATTRIB;
	}
	return (uint32_t)(bits & events->config.host_mask);
}

static int watch_failed(struct vf_events *events, int error)
{
	if (error != events->mark_error)
		vf_events_notice(events,
				 "inotify_add_watch: %s%s; the guest misses events that it "
				 "watches for",
				 strerror(error),
				 error == ENOSPC ? ": the limit is in "
						   "/proc/sys/fs/inotify/max_user_watches"
						 : "");
	events->mark_error = error;
	return -error;
}

/*
 * The host has one watch for an object, however many nodeids it has in the share: a new one must
 * not take away what another asked for, and the last one ends it.  What is asked for too much
 * after that is dropped by the router.
 */
static int inotify_mark(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
			uint64_t new_mask, int32_t *wd)
{
	uint32_t bits = bits_of(events, inode, new_mask), how = 0;
	uint64_t others = vf_watches_wd_mask(events->watches, *wd, inode);
	char name[PROC_NAME_SIZE];
	int fd, got;

	(void)old_mask;
	if (!bits) {
		/* Fails when the object is gone, and its watch with it. */
		if (*wd >= 0 && !others) {
			inotify_rm_watch(events->config.source_fd, *wd);
			vf_count_n(&events->host_marks, UINT64_MAX);
		}
		*wd = -1;
		return 0;
	}
	if (*wd < 0)
		how = IN_MASK_ADD;
	else
		bits |= bits_of(events, inode, others);
	if (!events->own_changes)
		events->own_changes = vf_own_changes_new(events->config.source_fd);
	if (!events->own_changes)
		return -ENOMEM;
	fd = vf_inode_path_fd(events->share, inode);
	if (fd < 0)
		return fd;
	/* The descriptor's name, in the directory where this thread is: vf_thread_init(). */
	got = inotify_add_watch(events->config.source_fd, proc_name(name, fd), bits | how);
	if (got < 0)
		return watch_failed(events, errno);
	if (got != *wd && !vf_watches_wd_mask(events->watches, got, inode))
		vf_count(&events->host_marks);
	*wd = got;
	return 0;
}

const struct vf_source_ops vf_inotify_source = {
    .read = inotify_read,
    .mark = inotify_mark,
};
