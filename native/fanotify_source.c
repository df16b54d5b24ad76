/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes on the host as fanotify(7) tells them: records become single events
 * on the guest's inodes.  The group is Python's choice; docs/events.md.
 *
 * What costs least comes first: our own changes by their pid, then one look
 * into the index of handles, where nearly all that happens elsewhere on the
 * file system ends.
 */
#include <sys/fanotify.h>

#include "fanotify_found.h"
#include "fanotify_marks.h"
#include "fanotify_move.h"
#include "fanotify_source.h"
#include "order.h"

/*
 * A record's mask is the sum of what happened to one object by one process since it was last read.
 * This is the order in which programs mostly do these things.
 */
static const uint64_t usual_order[] = {
    VF_FS_CREATE, VF_FS_MOVED_TO,  VF_FS_OPEN,	      VF_FS_OPEN_EXEC,	   VF_FS_ACCESS,
    VF_FS_MODIFY, VF_FS_ATTRIB,	   VF_FS_CLOSE_WRITE, VF_FS_CLOSE_NOWRITE, VF_FS_MOVED_FROM,
    VF_FS_DELETE, VF_FS_MOVE_SELF, VF_FS_DELETE_SELF,
};
/* More than any record: four handles and two names. */
#define MAX_RECORD 4096u
#define N_ORDERED (sizeof(usual_order) / sizeof(usual_order[0]))

struct reader {
	struct vf_events *events;
	uint64_t now_ns;
	bool own; /* the record at hand is of our own doing */
	/* The last directory that nobody in the guest holds, as of so many additions to the index;
	 * in the events' buffer.  What happens elsewhere mostly goes on in one place for a while.
	 */
	struct vf_fanotify_object elsewhere;
	uint32_t n_indexed;
};

static void find(struct vf_events *events, const struct vf_fanotify_object *object,
		 struct vf_fanotify_places *places)
{
	places->n = !object->there ? 0
				   : vf_inodes_by_handle(events->share, object->fsid, object->type,
							 object->handle, object->handle_size,
							 places->inodes, VF_FANOTIFY_PLACES);
}

/* What vf_change.object, or place, has for it. */
static uint64_t identity(const struct vf_fanotify_object *object)
{
	return object->there ? vf_handle_identity(object->type, object->handle, object->handle_size)
			     : 0;
}

static bool is_elsewhere(const struct reader *reader, const struct vf_fanotify_object *dir)
{
	const struct vf_fanotify_object *known = &reader->elsewhere;

	return known->there && dir->there && known->handle_size == dir->handle_size &&
	       !memcmp(known->handle, dir->handle, dir->handle_size) && known->type == dir->type &&
	       !memcmp(&known->fsid, &dir->fsid, sizeof(dir->fsid)) &&
	       reader->n_indexed == vf_handle_index_additions(reader->events->share);
}

/* As find(), for the directory that things happen in. */
static void find_dir(struct reader *reader, const struct vf_fanotify_object *dir,
		     struct vf_fanotify_places *places)
{
	uint32_t n_indexed;

	places->n = 0;
	if (is_elsewhere(reader, dir))
		return;
	n_indexed = vf_handle_index_additions(reader->events->share);
	find(reader->events, dir, places);
	if (!places->n) {
		reader->elsewhere = *dir;
		reader->n_indexed = n_indexed;
	}
}

static void put(struct vf_events *events, struct vf_fanotify_places *places)
{
	for (uint32_t i = 0; i < places->n; i++)
		vf_inode_put(events->share, places->inodes[i]);
}

static void report(struct reader *reader, const struct vf_change *changes, uint32_t n)
{
	struct vf_order *order = reader->events->order;

	/* What comes behind it may be told ahead of it. */
	for (uint32_t i = 0; i < n; i++)
		vf_unlinked_note(reader->events, &changes[i]);
	if (reader->own)
		vf_events_trace_own(reader->events, changes, n);
	else if (n != 1 || !order || !vf_events_is_wanted(reader->events, changes) ||
		 !vf_order_defer(order, changes))
		vf_events_report(reader->events, changes, n);
}

/* What of mask is not inotify's to tell. */
static uint64_t note(struct reader *reader, const struct vf_change *change, uint64_t mask)
{
	struct vf_order *order = reader->events->order;

	return order ? vf_order_note(order, change, mask, reader->own) : mask & ~VF_FS_ISDIR;
}

/* The same of what happened to the object itself. */
static uint64_t note_own(struct reader *reader, const struct vf_change *change, uint64_t mask)
{
	struct vf_order *order = reader->events->order;

	return order ? vf_order_note_own(order, change, mask, reader->own) : mask;
}

void vf_fanotify_report_ordered(struct vf_events *events, struct vf_change *change, uint64_t mask)
{
	for (uint32_t i = 0; i < N_ORDERED; i++) {
		if (!(mask & usual_order[i]))
			continue;
		change->mask = usual_order[i] | (mask & VF_FS_ISDIR);
		vf_events_report(events, change, 1);
	}
}

/* ---- one record ------------------------------------------------------------------ */

/*
 * A name that both came and went: which was last?  The usual temporary file came first.  True: the
 * object has the name now, so it went first.
 */
static bool came_last(struct reader *reader, const struct vf_change *change,
		      const struct vf_fanotify_object *object)
{
	uint64_t flags = atomic_load(&reader->events->flags);
	char name[VF_NAME_MAX + 1];

	if (!change->namelen || !object->there ||
	    !(vf_inode_is_watched(change->dir) || atomic_load(&reader->events->everywhere) ||
	      (flags & VF_FSNOTIFY_WATCH_ALL)))
		return false;
	return vf_name_has_handle(reader->events->share, change->dir, vf_change_name(change, name),
				  object->type, object->handle, object->handle_size);
}

/* Reports each event of mask on its own; change has all but its mask. */
static void report_ordered(struct reader *reader, struct vf_change *change, uint64_t mask)
{
	for (uint32_t i = 0; i < N_ORDERED; i++) {
		if (!(mask & usual_order[i]))
			continue;
		change->mask = usual_order[i] | (mask & VF_FS_ISDIR);
		report(reader, change, 1);
	}
}

static void report_each(struct reader *reader, struct vf_change *change, uint64_t mask,
			const struct vf_fanotify_object *object)
{
	uint64_t came = mask & (VF_FS_CREATE | VF_FS_MOVED_TO);
	uint64_t went = mask & (VF_FS_DELETE | VF_FS_MOVED_FROM);

	if (came && went && came_last(reader, change, object)) {
		report_ordered(reader, change, went | (mask & VF_FS_ISDIR));
		mask &= ~went;
	}
	report_ordered(reader, change, mask);
}

/* Was it done through a name that is gone, in a directory that the guest does not hold? */
static bool is_unlinked(const struct reader *reader, const struct vf_fanotify_record *record,
			struct vf_inode *object)
{
	struct vf_change change = {
	    .mask = record->mask & VF_FS_ENTRY_EVENTS,
	    .child = object,
	    .name = record->dir.name,
	    .namelen = record->dir.namelen,
	    .object = identity(&record->object),
	    .place = identity(&record->dir),
	};
	bool gone = (record->mask & VF_FS_PATH_EVENTS) && vf_name_is_gone(reader->events, &change);

	/* Which of several was last cannot be known, nor whether this came before it. */
	if (change.mask && !(change.mask & (change.mask - 1)))
		vf_unlinked_note(reader->events, &change);
	return gone && vf_name_is_gone(reader->events, &change);
}

/*
 * What happened to the objects themselves, or through a name that the guest does not know; but not
 * where the directory of that name is known.
 */
static void report_objects(struct reader *reader, const struct vf_fanotify_record *record,
			   const struct vf_fanotify_places *objects,
			   const struct vf_fanotify_places *dirs)
{
	uint64_t mask = record->mask & (VF_FS_CHILD_EVENTS | VF_FS_SELF_EVENTS | VF_FS_ISDIR);

	/* A directory has one name, so this was its end: the root of a share, usually. */
	if ((record->mask & VF_FS_DELETE) && (mask & VF_FS_ISDIR))
		mask |= VF_FS_DELETE_SELF;
	for (uint32_t i = 0; i < objects->n; i++) {
		struct vf_change change = {
		    .child = objects->inodes[i],
		    .pid = record->pid,
		    .flags = VF_FSNOTIFY_FOR_PARENT,
		    .seen_ns = reader->now_ns,
		};

		if (dirs && vf_fanotify_on_mount(dirs, vf_inode_mount(change.child)))
			continue;
		change.unlinked = dirs && is_unlinked(reader, record, change.child);
		report_ordered(reader, &change, note_own(reader, &change, mask));
	}
}

static void report_entry(struct reader *reader, const struct vf_fanotify_record *record,
			 const struct vf_fanotify_places *dirs,
			 const struct vf_fanotify_places *objects)
{
	uint64_t mask;

	for (uint32_t i = 0; i < dirs->n; i++) {
		struct vf_change change = {
		    .dir = dirs->inodes[i],
		    .child = vf_fanotify_on_mount(objects, vf_inode_mount(dirs->inodes[i])),
		    .name = record->dir.name,
		    .namelen = record->dir.namelen,
		    .pid = record->pid,
		    .object = identity(&record->object),
		    .place = identity(&record->dir),
		    .seen_ns = reader->now_ns,
		};

		/* What inotify tells is judged in its turn. */
		mask = note(reader, &change, record->mask & ~VF_FS_SELF_EVENTS);
		change.unlinked =
		    (record->mask & VF_FS_PATH_EVENTS) && vf_name_is_gone(reader->events, &change);
		if (reader->events->order && change.child)
			mask = vf_order_note_child(reader->events->order, &change, record->mask,
						   mask, reader->own);
		if (mask)
			report_each(reader, &change, mask | (record->mask & VF_FS_ISDIR),
				    &record->object);
	}
}

/* In its turn: what came before it may be deferred. */
static void report_whole(struct reader *reader, struct vf_change changes[2])
{
	struct vf_events *events = reader->events;
	bool wanted =
	    vf_events_is_wanted(events, &changes[0]) || vf_events_is_wanted(events, &changes[1]);

	if (!events->order || !wanted || !vf_order_defer_rename(events->order, changes))
		vf_events_report_rename(events, changes);
}

static void report_pair(struct reader *reader, struct vf_change changes[2])
{
	struct vf_order *order = reader->events->order;
	bool noted[2];

	if (order && vf_order_note_rename(order, changes, reader->own))
		return;
	noted[0] = !note(reader, &changes[0], changes[0].mask);
	noted[1] = !note(reader, &changes[1], changes[1].mask);

	if (reader->own && !noted[0] && !noted[1])
		vf_events_trace_own(reader->events, changes, 2);
	else if (!noted[0] && !noted[1])
		report_whole(reader, changes);
	else if (!noted[0] || !noted[1])
		report(reader, &changes[noted[0]], 1);
}

static void report_rename(struct reader *reader, const struct vf_fanotify_record *record,
			  const struct vf_fanotify_places *from,
			  const struct vf_fanotify_places *to,
			  const struct vf_fanotify_places *objects)
{
	for (uint32_t i = 0; i < from->n + to->n; i++) {
		bool is_from = i < from->n;
		struct vf_inode *dir = is_from ? from->inodes[i] : to->inodes[i - from->n];
		uint16_t mount = vf_inode_mount(dir);
		struct vf_change changes[2] = {
		    {
			.mask = VF_FS_MOVED_FROM | (record->mask & VF_FS_ISDIR),
			.dir = vf_fanotify_on_mount(from, mount),
			.child = vf_fanotify_on_mount(objects, mount),
			.name = record->old.name,
			.namelen = record->old.namelen,
			.pid = record->pid,
			.object = identity(&record->object),
			.place = identity(&record->old),
			.seen_ns = reader->now_ns,
		    },
		};

		changes[1] = changes[0];
		changes[1].mask ^= VF_FS_MOVED_FROM | VF_FS_MOVED_TO;
		changes[1].dir = vf_fanotify_on_mount(to, mount);
		changes[1].place = identity(&record->new);
		changes[1].name = record->new.name;
		changes[1].namelen = record->new.namelen;
		if (changes[0].dir && changes[1].dir) {
			if (is_from) /* else told of with its other half */
				report_pair(reader, changes);
		} else if (note(reader, &changes[!is_from], changes[!is_from].mask)) {
			report(reader, &changes[!is_from], 1);
		}
	}
}

/* Whoever moved it: the mark that tells of its removal is on its parent. */
static void directory_moved(struct vf_events *events, const struct vf_fanotify_record *record)
{
	struct vf_fanotify_places places;

	find(events, record->object.there ? &record->object : &record->dir, &places);
	for (uint32_t i = 0; i < places.n; i++)
		vf_watch_renew(events->watches, places.inodes[i]);
	put(events, &places);
}

static uint32_t count_events(uint64_t mask)
{
	return (uint32_t)__builtin_popcountll(mask & VF_FANOTIFY_EVENTS) + !!(mask & VF_FS_RENAME);
}

/*
 * A directory that came, in the guest's directories: where everything is watched it is held before
 * the next record, which may be about what it has in it.
 */
static void announce(struct reader *reader, const struct vf_fanotify_record *record,
		     const struct vf_fanotify_places *dirs, const struct vf_fanotify_places *to,
		     struct vf_fanotify_places *objects)
{
	bool rename = record->mask & VF_FS_RENAME;
	const struct vf_fanotify_places *where = rename ? to : dirs;
	const struct vf_fanotify_object *entry = rename ? &record->new : &record->dir;

	if (!(record->mask & VF_FS_ISDIR) || objects->n || reader->own || !entry->name ||
	    !(record->mask & (VF_FS_CREATE | VF_FS_MOVED_TO | VF_FS_RENAME)))
		return;
	for (uint32_t i = 0; i < where->n; i++) {
		struct vf_inode *made = vf_watch_share_announce(reader->events, where->inodes[i],
								entry->name, entry->namelen);

		if (made)
			vf_inode_put(reader->events->share, made);
	}
	/* The name may mean another by now. */
	find(reader->events, &record->object, objects);
}

/* It has the guest's inodes in it. */
static void take_known(struct reader *reader, const struct vf_fanotify_record *record,
		       const struct vf_fanotify_places *dirs, const struct vf_fanotify_places *to,
		       const struct vf_fanotify_places *objects)
{
	bool self = record->dir.there && (!record->dir.name || !strcmp(record->dir.name, "."));

	if (record->mask & VF_FS_RENAME)
		report_rename(reader, record, dirs, to, objects);
	else if (self && !objects->n)
		report_objects(reader, record, dirs, NULL);
	else if (self || !record->dir.there)
		report_objects(reader, record, objects, NULL);
	else {
		report_entry(reader, record, dirs, objects);
		report_objects(reader, record, objects, dirs);
	}
}

static bool has_watched(const struct vf_fanotify_places *places)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (vf_inode_is_watched(places->inodes[i]))
			return true;
	return false;
}

static void find_all(struct reader *reader, const struct vf_fanotify_record *record,
		     struct vf_fanotify_found *found)
{
	find_dir(reader, record->mask & VF_FS_RENAME ? &record->old : &record->dir, &found->dirs);
	find(reader->events, &record->new, &found->to);
	find(reader->events, &record->object, &found->objects);
}

static bool is_any_watched(const struct vf_fanotify_found *found)
{
	return has_watched(&found->dirs) || has_watched(&found->to) || has_watched(&found->objects);
}

static void put_all(struct vf_events *events, struct vf_fanotify_found *found)
{
	put(events, &found->dirs);
	put(events, &found->to);
	put(events, &found->objects);
}

/* ---- records ------------------------------------------------------------------------ */

static void take(struct reader *reader, const struct vf_fanotify_record *record)
{
	struct vf_events *events = reader->events;
	uint32_t n = count_events(record->mask);
	struct vf_fanotify_found found;

	if (record->mask & VF_FS_Q_OVERFLOW) {
		vf_events_report_overflow(events);
		return;
	}
	vf_count_n(&events->received, n);
	reader->own = record->pid && record->pid == events->pid;
	if ((record->mask & VF_FS_MOVE_SELF) && (record->mask & VF_FS_ISDIR))
		directory_moved(events, record);
	if (reader->own) {
		vf_count_n(&events->own, n);
		if (!events->order && !vf_trace_is_on(events->trace))
			return;
	}
	find_all(reader, record, &found);
	announce(reader, record, &found.dirs, &found.to, &found.objects);
	if (!is_any_watched(&found))
		events->elsewhere += n;
	if (!reader->own && atomic_load_explicit(&events->told_all, memory_order_relaxed))
		vf_fanotify_tell_caches(events, record, &found, reader->now_ns);
	if (found.dirs.n + found.to.n + found.objects.n)
		take_known(reader, record, &found.dirs, &found.to, &found.objects);
	else if (!reader->own)
		vf_count_n(&events->unknown, n);
	put_all(events, &found);
}

void vf_fanotify_take(struct vf_events *events, const struct vf_fanotify_record *record,
		      uint64_t now_ns)
{
	take(&(struct reader){.events = events, .now_ns = now_ns}, record);
}

bool vf_fanotify_is_wanted(struct vf_events *events, const struct vf_fanotify_record *record)
{
	struct vf_fanotify_found found;
	bool wanted;

	find_all(&(struct reader){.events = events}, record, &found);
	wanted = is_any_watched(&found) || atomic_load(&events->everywhere);
	put_all(events, &found);
	return wanted;
}

void vf_fanotify_report_garbage(struct vf_events *events, uint32_t size)
{
	vf_events_notice(events,
			 "fanotify: a record of %u bytes that is not understood; what came with "
			 "it is lost",
			 size);
	vf_events_report_overflow(events);
}

/* ---- reading ----------------------------------------------------------------------- */

/* True: there was something. */
static bool read_records(struct vf_events *events)
{
	struct reader reader = {.events = events};
	struct vf_fanotify_record record;
	uint32_t at = 0, size;
	ssize_t n;

	events->drained = false;
	if (vf_fanotify_move_report(events))
		return true;
	n = read(events->config.source_fd, events->buffer, VF_SOURCE_BUFFER);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (n <= 0) {
		vf_events_source_failed(events, "reading fanotify", n ? errno : EIO);
		return false;
	}
	size = (uint32_t)n;
	events->drained = size + MAX_RECORD <= VF_SOURCE_BUFFER;
	reader.now_ns = vf_now_ns();
	while (at < size) {
		int32_t length = vf_fanotify_parse(events->buffer + at, size - at, &record);

		if (length < 0) {
			vf_fanotify_report_garbage(events, size - at);
			return true;
		}
		take(&reader, &record);
		at += (uint32_t)length;
	}
	return true;
}

static void fanotify_read(struct vf_events *events)
{
	vf_fanotify_move_turn(events);
	if (events->order)
		vf_order_read(events->order, read_records);
	else
		read_records(events);
}

static int fanotify_mark_watch(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
			       uint64_t new_mask, int32_t wd[VF_N_WDS])
{
	int error = vf_fanotify_mark_inode(events, inode, old_mask, new_mask, &wd[VF_WD_SOURCE]);

	/* Last, so that there is a fact for each event. */
	if (!error && events->order)
		vf_order_mark(events->order, inode, new_mask, wd);
	return error;
}

const struct vf_source_ops vf_fanotify_source = {
    .read = fanotify_read,
    .mark = fanotify_mark_watch,
    .covered = vf_fanotify_covered,
    .gone = vf_fanotify_inode_gone,
};
