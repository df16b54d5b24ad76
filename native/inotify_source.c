/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes on the host as inotify(7) tells them, where fanotify is not to be
 * had: one watch on the host for each object that the guest watches.  Limits
 * are in docs/events.md.
 *
 * A watch reports an entry of a directory by its name alone.  Which object that
 * is, the name is asked a moment later: when it was given to another meanwhile,
 * the event names that one.  What is no longer there is nobody's (child NULL).
 * Objects that are watched themselves are known by their own records.
 */
#include "inotify_reader.h"
#include "own_changes.h"

/* ---- what is reported --------------------------------------------------------- */

/* The object of the name, referenced, where the name should still mean it. */
static struct vf_inode *object_of(struct vf_events *events, const struct vf_change *change)
{
	char name[VF_NAME_MAX + 1];

	if (!change->dir || (change->mask & (VF_FS_DELETE | VF_FS_MOVED_FROM)))
		return NULL;
	return vf_inode_known(events->share, change->dir, vf_change_name(change, name));
}

/* Is it by one of our own operations?  Then it is not the guest's to be told. */
static bool is_own(struct vf_inotify_reader *reader, const struct inotify_event *record,
		   const struct vf_change *changes, uint32_t n)
{
	struct vf_events *events = reader->events;
	uint64_t at = reader->at + (uint64_t)((const uint8_t *)record - reader->buffer);

	if (!vf_own_changes_is(events->own_changes, events->share, at, changes))
		return false;
	vf_count_n(&events->own, n);
	vf_events_trace_own(events, changes, n);
	return true;
}

/* A directory that came: where everything is watched it is marked before its event is told. */
static struct vf_inode *announce(struct vf_events *events, struct vf_change *change)
{
	const uint64_t came = VF_FS_CREATE | VF_FS_MOVED_TO;

	if (!change->child && (change->mask & VF_FS_ISDIR) && (change->mask & came))
		change->child =
		    vf_watch_share_announce(events, change->dir, change->name, change->namelen);
	return change->child;
}

static struct vf_inode *child_of(struct vf_inotify_reader *reader,
				 const struct inotify_event *record, struct vf_inode *dir,
				 bool *certain)
{
	struct vf_change change = vf_inotify_change(reader, record, dir, NULL);

	*certain = false;
	return object_of(reader->events, &change);
}

static void report_one(struct vf_inotify_reader *reader, const struct inotify_event *record,
		       struct vf_inode *inode, struct vf_inode *child)
{
	struct vf_events *events = reader->events;
	struct vf_change change = vf_inotify_change(reader, record, inode, child);
	struct vf_inode *object = NULL;

	if (change.mask & VF_FS_ENTRY_EVENTS)
		object = object_of(events, &change);
	if (object)
		change.child = object;
	if (!is_own(reader, record, &change, 1)) {
		if (!change.child && change.dir)
			object = announce(events, &change);
		vf_events_report(events, &change, 1);
	}
	if (object)
		vf_inode_put(events->share, object);
}

static void report_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
			   struct vf_inode *dir)
{
	struct vf_change change = {
	    .mask = VF_FS_DELETE_SELF | VF_FS_ISDIR,
	    .child = dir,
	    .seen_ns = reader->now_ns,
	};

	if (!is_own(reader, record, &change, 1))
		vf_events_report(reader->events, &change, 1);
}

static void report_pair(struct vf_inotify_reader *reader, const struct inotify_event *from,
			struct vf_inode *from_dir, const struct inotify_event *to,
			struct vf_inode *to_dir)
{
	struct vf_events *events = reader->events;
	struct vf_change changes[2] = {vf_inotify_change(reader, from, from_dir, NULL),
				       vf_inotify_change(reader, to, to_dir, NULL)};
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
	    .joins_renames = true,
	    .child = child_of,
	    .one = report_one,
	    .removed = report_removal,
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
			uint64_t new_mask, int32_t wd[VF_N_WDS])
{
	uint64_t bits = vf_inotify_bits(inode, new_mask) & events->config.host_mask;
	int error;

	(void)old_mask;
	if (!events->own_changes)
		events->own_changes = vf_own_changes_new(events->config.source_fd);
	if (!events->own_changes)
		return -ENOMEM;
	error = vf_inotify_watch(events, VF_WD_SOURCE, inode, bits, wd);
	return error ? watch_failed(events, -error) : 0;
}

const struct vf_source_ops vf_inotify_source = {
    .read = inotify_read,
    .mark = inotify_mark,
};
