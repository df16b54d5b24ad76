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
#include "inotify_reader.h"
#include "own_changes.h"

/* All that inotify can be asked for. */
#define EVENTS ((uint64_t)IN_ALL_EVENTS)
/* An object's own record follows its directory's; a few of others may come between. */
#define MAX_ECHOES (sizeof(((struct vf_events *)0)->echoes) / sizeof(struct vf_echo))
#define ECHO_NS 100000000u

/* ---- one record twice ------------------------------------------------------- */

/*
 * When both a directory and an object in it are watched, what happens to the object comes by both
 * watches, the directory's first.  The guest's driver tells both watchers of the first, so the
 * second must not be reported.
 */
static void expect_echo(struct vf_inotify_reader *reader, const struct vf_change *change)
{
	struct vf_events *events = reader->events;
	uint64_t event = change->mask & VF_FS_CHILD_EVENTS;

	if (!change->child || !(vf_watch_mask(events->watches, change->child) & event))
		return;
	events->echoes[events->next_echo++ % MAX_ECHOES] =
	    (struct vf_echo){vf_inode_nodeid(change->child), event, reader->now_ns};
}

static bool is_echo(struct vf_inotify_reader *reader, const struct vf_change *change)
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

/* ---- what is reported --------------------------------------------------------- */

/* The object of the name, referenced, where the name should still mean it. */
static struct vf_inode *object_of(struct vf_events *events, const struct vf_change *change)
{
	char name[VF_NAME_MAX + 1];

	if (!change->dir || (change->mask & (VF_FS_DELETE | VF_FS_MOVED_FROM)))
		return NULL;
	return vf_inode_known(events->share, change->dir, vf_inotify_name(change, name));
}

/* Is it by one of our own operations?  Then it is not the guest's to be told. */
static bool is_own(struct vf_inotify_reader *reader, const struct inotify_event *record,
		   const struct vf_change *changes, uint32_t n)
{
	struct vf_events *events = reader->events;
	uint64_t at = reader->at + (uint64_t)((const uint8_t *)record - reader->buffer);

	if (!vf_own_changes_is(events->own_changes, at, changes))
		return false;
	vf_count_n(&events->own, n);
	vf_events_trace_own(events, changes, n);
	return true;
}

/* A directory that came: where everything is watched it is marked before its event is told. */
static void announce(struct vf_events *events, struct vf_change *change)
{
	const uint64_t came = VF_FS_CREATE | VF_FS_MOVED_TO;

	if (!change->child && (change->mask & VF_FS_ISDIR) && (change->mask & came))
		change->child =
		    vf_watch_share_announce(events, change->dir, change->name, change->namelen);
}

static void report_one(struct vf_inotify_reader *reader, const struct inotify_event *record,
		       struct vf_inode *inode)
{
	struct vf_events *events = reader->events;
	struct vf_change change = vf_inotify_change(reader, record, inode);

	if (!change.dir) {
		if (!is_echo(reader, &change) && !is_own(reader, record, &change, 1))
			vf_events_report(events, &change, 1);
		return;
	}
	change.child = object_of(events, &change);
	expect_echo(reader, &change);
	if (!is_own(reader, record, &change, 1)) {
		announce(events, &change);
		vf_events_report(events, &change, 1);
	}
	if (change.child)
		vf_inode_put(events->share, change.child);
}

static void report_pair(struct vf_inotify_reader *reader, const struct inotify_event *from,
			struct vf_inode *from_dir, const struct inotify_event *to,
			struct vf_inode *to_dir)
{
	struct vf_events *events = reader->events;
	struct vf_change changes[2] = {vf_inotify_change(reader, from, from_dir),
				       vf_inotify_change(reader, to, to_dir)};
	struct vf_inode *object = object_of(events, &changes[1]);

	changes[1].child = object;
	if (!is_own(reader, from, changes, 2)) {
		announce(events, &changes[1]);
		changes[0].child = object = changes[1].child;
		vf_events_report_rename(events, changes);
	}
	if (object)
		vf_inode_put(events->share, object);
}

static void overflow(struct vf_inotify_reader *reader)
{
	memset(reader->events->echoes, 0, sizeof(reader->events->echoes));
	vf_events_report_overflow(reader->events);
}

static ssize_t read_noted(struct vf_inotify_reader *reader, void *buffer, size_t size, uint64_t *at)
{
	return vf_own_changes_read(reader->events->own_changes, buffer, size, at);
}

static void inotify_read(struct vf_events *events)
{
	struct vf_inotify_reader reader = {
	    .events = events,
	    .fd = events->config.source_fd,
	    .which = VF_WD_SOURCE,
	    .buffer = events->buffer,
	    .read = read_noted,
	    .one = report_one,
	    .pair = report_pair,
	    .overflow = overflow,
	};
	int32_t n = vf_inotify_fetch(&reader);

	if (n < 0)
		vf_events_source_failed(events, "reading inotify", -n);
	if (n <= 0)
		return;
	vf_count_n(&events->received, vf_inotify_take(&reader));
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

/* What is asked for too much once the last of several nodeids is gone is dropped by the router. */
static int inotify_mark(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
			uint64_t new_mask, int32_t *wd)
{
	uint32_t others =
	    bits_of(events, inode,
		    vf_watches_wd_mask(events->watches, VF_WD_SOURCE, wd[VF_WD_SOURCE], inode));
	int error;

	(void)old_mask;
	if (!events->own_changes)
		events->own_changes = vf_own_changes_new(events->config.source_fd);
	if (!events->own_changes)
		return -ENOMEM;
	error = vf_inotify_watch(events, VF_WD_SOURCE, inode, bits_of(events, inode, new_mask),
				 others, &wd[VF_WD_SOURCE]);
	return error ? watch_failed(events, -error) : 0;
}

const struct vf_source_ops vf_inotify_source = {
    .read = inotify_read,
    .mark = inotify_mark,
};
