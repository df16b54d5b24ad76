/* SPDX-License-Identifier: Apache-2.0 */
/* inotify(7) for the event sources; see inotify_reader.h. */
#include <poll.h>
#include <time.h>

#include "inotify_reader.h"

#define EVENTS VF_INOTIFY_EVENTS
/* In how many places of a share one object may be mounted; more are not told of. */
#define MAX_PLACES 8u
/* Whoever renames may be held up between the halves: so long the second one is waited for. */
#define SECOND_HALF_NS 10000000u
/* Of such waits, each for all that was read before it, between two reads. */
#define MAX_WAITS 8u
/* The halves of a rename are looked for this far apart. */
#define MAX_BETWEEN 512u
/* An object's own record follows its directory's; a few of others may come between. */
#define MAX_BEFORE_OWN 16u
/* A record fits, and a few more. */
#define READ_ROOM 4096u
/* So long a change may be under way between what it does and what inotify says of it. */
#define LAST_LINK_NS 1000000u

/* The inodes that one watch stands for: one object of the host, on different mounts. */
struct places {
	struct vf_inode *inodes[MAX_PLACES];
	uint32_t n;
};

static struct inotify_event *record_at(const struct vf_inotify_reader *reader, uint32_t at)
{
	struct inotify_event *record = (void *)(reader->buffer + at);

	if (at >= reader->size || reader->size - at < sizeof(*record) ||
	    reader->size - at - sizeof(*record) < record->len)
		return NULL;
	return record;
}

static uint32_t record_end(uint32_t at, const struct inotify_event *record)
{
	return at + (uint32_t)sizeof(*record) + record->len;
}

static void find(struct vf_inotify_reader *reader, int32_t wd, struct places *places)
{
	places->n = vf_watches_by_wd(reader->events->watches, reader->which, wd, places->inodes,
				     MAX_PLACES);
}

static void put(struct vf_events *events, struct places *places)
{
	for (uint32_t i = 0; i < places->n; i++)
		vf_inode_put(events->share, places->inodes[i]);
}

struct vf_change vf_inotify_change(const struct vf_inotify_reader *reader,
				   const struct inotify_event *record, struct vf_inode *inode,
				   struct vf_inode *child)
{
	struct vf_change change = {
	    .mask = record->mask & (EVENTS | VF_FS_ISDIR),
	    .child = child,
	    .not_its_end = reader->not_its_end,
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

const char *vf_inotify_name(const struct vf_change *change, char buffer[VF_NAME_MAX + 1])
{
	memcpy(buffer, change->name, change->namelen);
	buffer[change->namelen] = 0;
	return buffer;
}

static bool has(const struct places *places, const struct vf_inode *inode)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (places->inodes[i] == inode)
			return true;
	return false;
}

static struct vf_inode *on_mount(const struct places *places, uint16_t mount)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (vf_inode_mount(places->inodes[i]) == mount)
			return places->inodes[i];
	return NULL;
}

/* ---- reading ------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Reads behind what there is, if something comes in that time. */
static bool read_more(struct vf_inotify_reader *reader, uint64_t time_ns)
{
	struct timespec time = {.tv_nsec = (long)time_ns};
	struct pollfd more = {.fd = reader->fd, .events = POLLIN};
	uint64_t at;
	ssize_t n;

	if (VF_SOURCE_BUFFER - reader->size < READ_ROOM || ppoll(&more, 1, &time, NULL) != 1)
		return false;
	n = reader->read(reader, reader->buffer + reader->size, VF_SOURCE_BUFFER - reader->size,
			 &at);
	if (n <= 0)
		return false;
	reader->size += (uint32_t)n;
	return true;
}

/* Forgets what is behind us, so that there is room; records move. */
static void make_room(struct vf_inotify_reader *reader)
{
	if (VF_SOURCE_BUFFER - reader->size >= READ_ROOM)
		return;
	memmove(reader->buffer, reader->buffer + reader->next, reader->size - reader->next);
	reader->at += reader->next;
	reader->size -= reader->next;
	reader->end -= reader->next;
	reader->next = 0;
}

int32_t vf_inotify_fetch(struct vf_inotify_reader *reader)
{
	ssize_t n;

	reader->now_ns = now_ns();
	reader->size = reader->next = reader->end = 0;
	reader->waits = 0;
	n = reader->read(reader, reader->buffer, VF_SOURCE_BUFFER, &reader->at);
	reader->waited = reader->at;
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (!n)
		return -EIO;
	reader->size = (uint32_t)n;
	return (int32_t)n;
}

/* ---- child events ---------------------------------------------------------------- */

/* Is there a record of this object itself when this happens to it? */
static bool tells_itself(struct vf_inotify_reader *reader, const struct vf_inode *inode,
			 const struct inotify_event *record)
{
	struct vf_watches *watches = reader->events->watches;

	return (vf_watch_mask(watches, inode) & record->mask & VF_FS_CHILD_EVENTS) &&
	       vf_watch_wd(watches, reader->which, inode) >= 0;
}

/* Can the record of another object, which follows, be the other one of this event? */
static bool suits(struct vf_inotify_reader *reader, const struct inotify_event *record,
		  const struct vf_inode *known, bool certain)
{
	/* The name was given to another since: that one's own record would be here. */
	if (known)
		return tells_itself(reader, known, record);
	/* Or it is gone.  A file's watchers can be told apart; a directory's parent would be told
	 * twice. */
	return !certain && (record->mask & IN_ISDIR);
}

/* Is this record of the name by which the directory, which the guest watches, was last known? */
static bool is_of_its_name(struct vf_inotify_reader *reader, const struct inotify_event *record,
			   struct vf_inode *dir)
{
	struct vf_watches *watches = reader->events->watches;

	return record->len && record->wd == vf_watch_wd(watches, VF_WD_PARENT, dir) &&
	       vf_inotify_name_number(record->wd, record->name,
				      (uint32_t)strnlen(record->name, record->len)) ==
		   vf_watch_wd(watches, VF_WD_NAME, dir);
}

/*
 * Can this be what a directory says itself of a change that its parent told by that record?  Not
 * when it has another name; but which one it had before it moved is not known any longer.
 */
static bool may_be_directory(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     const struct inotify_event *own, const struct places *dirs)
{
	const struct inotify_event *other;

	for (uint32_t i = 0; i < dirs->n; i++)
		if (vf_watch_wd(reader->events->watches, VF_WD_PARENT, dirs->inodes[i]) < 0 ||
		    is_of_its_name(reader, record, dirs->inodes[i]))
			return true;
	for (uint32_t at = 0; (other = record_at(reader, at)); at = record_end(at, other))
		if (other->wd == own->wd && (other->mask & IN_MOVE_SELF))
			return true;
	return false;
}

/* The record of an object itself at this place, of the same event; its inodes are in objects. */
static struct inotify_event *own_record_at(struct vf_inotify_reader *reader, uint32_t at,
					   const struct inotify_event *record,
					   struct places *objects)
{
	struct inotify_event *own = record_at(reader, at);

	if (!own || own->len || ((own->mask ^ record->mask) & (EVENTS | IN_ISDIR)))
		return NULL;
	find(reader, own->wd, objects);
	if (objects->n && (record->mask & IN_ISDIR) &&
	    !may_be_directory(reader, record, own, objects)) {
		put(reader->events, objects);
		objects->n = 0;
	}
	return objects->n ? own : NULL;
}

static bool is_of_same_name(const struct inotify_event *a, const struct inotify_event *b)
{
	return a->wd == b->wd && a->len && b->len && !strcmp(a->name, b->name);
}

/* Has this name been given away since?  Then what it means by now is not whom it was about. */
static bool name_changed(struct vf_inotify_reader *reader, const struct inotify_event *record)
{
	uint32_t at = reader->end;
	const struct inotify_event *other;

	do {
		for (; (other = record_at(reader, at)); at = record_end(at, other))
			if ((other->mask & VF_FS_ENTRY_EVENTS) && is_of_same_name(other, record))
				return true;
	} while (read_more(reader, 0));
	return false;
}

static bool is_alone(const struct vf_inotify_reader *reader, const struct inotify_event *half)
{
	const struct inotify_event *other;

	for (uint32_t at = 0; (other = record_at(reader, at)); at = record_end(at, other))
		if (other != half && other->cookie == half->cookie)
			return false;
	return true;
}

uint32_t vf_inotify_lone_halves(struct vf_inotify_reader *reader,
				const struct inotify_event *record, uint32_t mask, uint32_t enough,
				uint64_t time_ns)
{
	uint64_t deadline_ns = now_ns() + time_ns, now;
	const struct inotify_event *other;
	uint32_t at = reader->end, n = 0;

	do {
		for (; (other = record_at(reader, at)); at = record_end(at, other)) {
			if (other == record || !(other->mask & VF_FS_ENTRY_EVENTS) ||
			    !is_of_same_name(other, record))
				continue;
			if (!(other->mask & mask) || !is_alone(reader, other))
				return n;
			n++;
		}
		now = now_ns();
	} while (n < enough && now <= deadline_ns && read_more(reader, deadline_ns - now));
	return n;
}

/*
 * When an object in a watched directory is watched too, its own record follows the directory's:
 * that says which object it was.  Its inodes, referenced, are in objects.
 */
static struct inotify_event *own_record(struct vf_inotify_reader *reader,
					const struct inotify_event *record,
					const struct vf_inode *known, bool certain,
					struct places *objects)
{
	const struct inotify_event *before = record;
	struct inotify_event *own;
	uint32_t at = reader->end;

	if (!record_at(reader, at) && known && tells_itself(reader, known, record))
		read_more(reader, 1000000);
	/* What follows at once says it better than what the name means by now. */
	if (!certain && suits(reader, record, known, certain) &&
	    (own = own_record_at(reader, at, record, objects)))
		return own;
	for (uint32_t i = 0; known && i < MAX_BEFORE_OWN && record_at(reader, at); i++) {
		/* Behind another of the same event with a name it is that one's. */
		bool others = before != record && before->len &&
			      !((before->mask ^ record->mask) & (EVENTS | IN_ISDIR));

		own = others ? NULL : own_record_at(reader, at, record, objects);
		if (own && has(objects, known) && (!i || certain || !name_changed(reader, record)))
			return own;
		put(reader->events, objects);
		objects->n = 0;
		before = record_at(reader, at);
		at = record_end(at, before);
	}
	if (!certain || !suits(reader, record, known, certain))
		return NULL;
	return own_record_at(reader, reader->end, record, objects);
}

/* ---- an object itself -------------------------------------------------------------- */

static bool is_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
		       struct vf_inode *dir)
{
	return (record->mask & IN_DELETE) && (record->mask & IN_ISDIR) &&
	       is_of_its_name(reader, record, dir);
}

/* Had another one come to the directory's name before this record of it? */
static bool was_replaced(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 struct vf_inode *dir)
{
	const struct inotify_event *other;
	bool replaced = false;

	for (uint32_t at = 0; (other = record_at(reader, at)) && other != record;
	     at = record_end(at, other)) {
		/* A second half that was taken with the first has no bits left. */
		if (other->cookie && !(other->mask & ~(uint32_t)(IN_MOVED_TO | IN_ISDIR)) &&
		    is_of_its_name(reader, other, dir))
			replaced = true;
		else if (other->wd == record->wd && (other->mask & IN_MOVE_SELF))
			replaced = false; /* it was this one that came */
	}
	return replaced;
}

/*
 * Does a record of its link count follow, or one of its end?  A directory has such a link count
 * only when it is replaced, so what shows that it lived on is enough.
 */
static bool has_more_links(struct vf_inotify_reader *reader, const struct inotify_event *record,
			   struct vf_inode *inode)
{
	bool dir = vf_inode_type(inode) == S_IFDIR;
	/* What is removed of its name then is the one that replaced it. */
	bool by_name = dir && !was_replaced(reader, record, inode);
	uint32_t mask = IN_ATTRIB | (dir ? IN_MOVE_SELF | VF_FS_ENTRY_EVENTS : 0);
	const struct inotify_event *other;
	uint32_t at = reader->end;

	do {
		for (; (other = record_at(reader, at)); at = record_end(at, other))
			if ((other->wd == record->wd && (other->mask & mask) &&
			     (dir || !other->len)) ||
			    (by_name && is_removal(reader, other, inode)))
				return true;
	} while (read_more(reader, 0));
	return false;
}

/* Moved out of its parent's sight, has it gone before the next one was watched? */
static bool is_removed_unseen(struct vf_inotify_reader *reader, struct vf_inode *inode)
{
	const struct inotify_event *record;
	uint32_t at = reader->end;

	if (vf_watch_wd(reader->events->watches, VF_WD_PARENT, inode) < 0 ||
	    !vf_events_is_gone(reader->events, inode))
		return false;
	do {
		for (; (record = record_at(reader, at)); at = record_end(at, record))
			if (is_removal(reader, record, inode))
				return false;
	} while (read_more(reader, 0));
	return true;
}

/* Whoever replaces it says so a moment after it has lost its last link. */
static void await_last_link(struct vf_inotify_reader *reader, int32_t wd)
{
	uint64_t now = now_ns(), until = now + LAST_LINK_NS;
	const struct inotify_event *record;
	uint32_t at = reader->end;

	do {
		for (; (record = record_at(reader, at)); at = record_end(at, record))
			if (record->wd == wd && (record->mask & IN_ATTRIB))
				return;
	} while ((now = now_ns()) < until && read_more(reader, until - now));
}

/* It is told behind the last record of what happened in it. */
static void note_unseen_removal(struct vf_inotify_reader *reader, int32_t wd,
				const struct vf_inode *inode)
{
	const struct inotify_event *record;
	uint32_t last = reader->end;

	await_last_link(reader, wd);
	while (read_more(reader, 0))
		;
	for (uint32_t at = last; (record = record_at(reader, at)); at = record_end(at, record))
		if (record->wd == wd)
			last = record_end(at, record);
	reader->unseen[reader->n_unseen].nodeid = vf_inode_nodeid(inode);
	reader->unseen[reader->n_unseen++].after = reader->at + last;
}

/* Of those whose last record is behind us. */
static void tell_unseen_removals(struct vf_inotify_reader *reader)
{
	struct vf_share *share = reader->events->share;
	uint32_t left = 0;

	for (uint32_t i = 0; i < reader->n_unseen; i++) {
		struct vf_inode *dir = NULL;

		if (reader->unseen[i].after > reader->at + reader->end)
			reader->unseen[left++] = reader->unseen[i];
		else
			dir = vf_inode_get(share, reader->unseen[i].nodeid);
		if (!dir)
			continue;
		reader->removed(reader, (void *)(reader->buffer + reader->next), dir);
		vf_inode_put(share, dir);
	}
	reader->n_unseen = left;
}

/* Of one that is watched for its end, whether this is its link count's last record. */
static bool is_last_link(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 struct vf_inode *inode)
{
	return (vf_watch_mask(reader->events->watches, inode) & VF_FS_DELETE_SELF) &&
	       vf_events_is_gone(reader->events, inode) && !has_more_links(reader, record, inode);
}

/*
 * Linux counts an object's last link count as one with what changed just before, although that had
 * a name and this has none.  own: the record that was taken with that name.
 */
static void take_last_links(struct vf_inotify_reader *reader, struct inotify_event *own,
			    const struct places *objects)
{
	for (uint32_t i = 0; i < objects->n; i++) {
		if (!is_last_link(reader, own, objects->inodes[i]))
			continue;
		own->mask = IN_ATTRIB;
		reader->one(reader, own, objects->inodes[i], NULL);
		own->mask = 0;
	}
}

static void take_child_event(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     const struct places *dirs)
{
	struct vf_events *events = reader->events;
	struct places objects = {.n = 0};
	struct inotify_event *own = NULL;

	for (uint32_t i = 0; i < dirs->n; i++) {
		bool certain = false;
		struct vf_inode *dir = dirs->inodes[i], *child;
		struct vf_inode *known = reader->child(reader, record, dir, &certain);

		if (!own)
			own = own_record(reader, record, known, certain, &objects);
		child = own ? on_mount(&objects, vf_inode_mount(dir)) : NULL;
		/* One that is watched for this would have had its own record. */
		if (!child && known && !tells_itself(reader, known, record))
			child = known;
		reader->one(reader, record, dir, child);
		if (known)
			vf_inode_put(events->share, known);
	}
	if (!own)
		return;
	for (uint32_t i = 0; i < objects.n; i++)
		if (!on_mount(dirs, vf_inode_mount(objects.inodes[i])))
			reader->one(reader, own, objects.inodes[i], NULL);
	own->mask = 0; /* done */
	if ((record->mask & IN_ATTRIB) && !(record->mask & IN_ISDIR))
		take_last_links(reader, own, &objects);
	put(events, &objects);
}

static void take_own_event(struct vf_inotify_reader *reader, const struct inotify_event *record,
			   const struct places *objects)
{
	struct vf_events *events = reader->events;

	for (uint32_t i = 0; i < objects->n; i++) {
		struct vf_inode *inode = objects->inodes[i];
		bool moved = (record->mask & IN_MOVE_SELF) && vf_inode_type(inode) == S_IFDIR;

		/* Whoever moved it: what tells of its removal is on its parent. */
		if (moved)
			vf_watch_renew(events->watches, inode);
		reader->not_its_end =
		    (record->mask & IN_ATTRIB) && !is_last_link(reader, record, inode);
		reader->one(reader, record, inode, NULL);
		reader->not_its_end = false;
		if (moved && reader->n_unseen < VF_MAX_UNSEEN && is_removed_unseen(reader, inode))
			note_unseen_removal(reader, record->wd, inode);
	}
}

/* A directory's name is gone: was it one that the guest watches? */
static void take_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 const struct places *dirs)
{
	uint32_t namelen = (uint32_t)strnlen(record->name, record->len);
	struct vf_events *events = reader->events;
	struct places named, removed = {.n = 0}, told = {.n = 0};

	named.n = vf_watches_by_wd(events->watches, VF_WD_NAME,
				   vf_inotify_name_number(record->wd, record->name, namelen),
				   named.inodes, MAX_PLACES);
	for (uint32_t i = 0; i < named.n; i++)
		if (vf_watch_wd(events->watches, VF_WD_PARENT, named.inodes[i]) == record->wd &&
		    vf_events_is_gone(events, named.inodes[i]))
			removed.inodes[removed.n++] = named.inodes[i];
	/* Of several on one mount the others had the name before. */
	for (uint32_t i = 0; i < dirs->n; i++)
		if ((told.inodes[told.n] = on_mount(&removed, vf_inode_mount(dirs->inodes[i]))))
			told.n++;
	for (uint32_t i = 0; i < removed.n; i++)
		if (!has(&told, removed.inodes[i]))
			reader->removed(reader, record, removed.inodes[i]);
	for (uint32_t i = 0; i < dirs->n; i++)
		reader->one(reader, record, dirs->inodes[i],
			    on_mount(&removed, vf_inode_mount(dirs->inodes[i])));
	put(events, &named);
}

static void take_one(struct vf_inotify_reader *reader, const struct inotify_event *record)
{
	const uint32_t removal = IN_DELETE | IN_ISDIR;
	struct vf_events *events = reader->events;
	struct places places;

	find(reader, record->wd, &places);
	if (record->len && (record->mask & removal) == removal)
		take_removal(reader, record, &places);
	else if (record->len && (record->mask & VF_FS_CHILD_EVENTS))
		take_child_event(reader, record, &places);
	else if (!record->len)
		take_own_event(reader, record, &places);
	else
		for (uint32_t i = 0; i < places.n; i++)
			reader->one(reader, record, places.inodes[i], NULL);
	if (!places.n)
		vf_count(&events->unknown);
	put(events, &places);
}

/* ---- renames ---------------------------------------------------------------------- */

/*
 * The record of the same rename's other half.  What others did in its directory before it is
 * overtaken: the rename had happened when its first half was told.
 */
static struct inotify_event *second_half(const struct vf_inotify_reader *reader, uint32_t cookie)
{
	struct inotify_event *record;
	uint32_t at = reader->end;

	for (uint32_t n = 0; n < MAX_BETWEEN && (record = record_at(reader, at)); n++) {
		if ((record->mask & IN_MOVED_TO) && record->cookie == cookie)
			return record;
		at = record_end(at, record);
	}
	return NULL;
}

/* Both directories have a watch: a pair on each mount that shows both. */
static void take_pair(struct vf_inotify_reader *reader, const struct inotify_event *from,
		      const struct inotify_event *to)
{
	struct vf_events *events = reader->events;
	struct places froms, tos;

	find(reader, from->wd, &froms);
	find(reader, to->wd, &tos);
	for (uint32_t i = 0; i < froms.n; i++) {
		struct vf_inode *dir = on_mount(&tos, vf_inode_mount(froms.inodes[i]));

		if (dir)
			reader->pair(reader, from, froms.inodes[i], to, dir);
		else
			reader->one(reader, from, froms.inodes[i], NULL);
	}
	for (uint32_t i = 0; i < tos.n; i++)
		if (!on_mount(&froms, vf_inode_mount(tos.inodes[i])))
			reader->one(reader, to, tos.inodes[i], NULL);
	put(events, &froms);
	put(events, &tos);
}

static struct inotify_event *wait_for_half(struct vf_inotify_reader *reader, uint32_t cookie)
{
	uint64_t deadline_ns = now_ns() + SECOND_HALF_NS, waited = reader->at + reader->size, now;
	struct inotify_event *to = NULL;

	/* Not kept waiting: what was told already, and who ends the session. */
	vf_outbox_flush(reader->events->outbox);
	reader->waits++;
	while (!to && (now = now_ns()) < deadline_ns && !atomic_load(&reader->events->waiting)) {
		make_room(reader);
		if (!read_more(reader, deadline_ns - now))
			break;
		to = second_half(reader, cookie);
	}
	reader->waited = waited;
	return to;
}

/* 2: the other half was there. */
static uint32_t take_moved_from(struct vf_inotify_reader *reader)
{
	uint32_t cookie = record_at(reader, reader->next)->cookie;
	struct inotify_event *to = second_half(reader, cookie);

	if (!to && reader->joins_renames && reader->waits < MAX_WAITS &&
	    reader->at + reader->next >= reader->waited)
		to = wait_for_half(reader, cookie);
	if (!to) {
		take_one(reader, record_at(reader, reader->next));
		return 1;
	}
	take_pair(reader, record_at(reader, reader->next), to);
	to->mask = 0; /* done */
	return 2;
}

/* ---- all records ---------------------------------------------------------------------- */

static uint32_t take(struct vf_inotify_reader *reader, const struct inotify_event *record)
{
	if (record->mask & IN_Q_OVERFLOW) {
		reader->overflow(reader);
		return 0;
	}
	/*
	 * One that was taken with another; or IN_IGNORED, IN_UNMOUNT: the watch is gone, and the
	 * guest's own ends with its inode.
	 */
	if (!(record->mask & EVENTS))
		return 0;
	if (record->mask & IN_MOVED_FROM)
		return take_moved_from(reader);
	take_one(reader, record);
	return 1;
}

uint32_t vf_inotify_take(struct vf_inotify_reader *reader)
{
	const struct inotify_event *record;
	uint32_t n = 0;

	for (; (record = record_at(reader, reader->next)); reader->next = reader->end) {
		reader->end = record_end(reader->next, record);
		n += take(reader, record);
		if (reader->n_unseen)
			tell_unseen_removals(reader);
	}
	return n;
}
