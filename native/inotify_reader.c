/* SPDX-License-Identifier: Apache-2.0 */
/* inotify(7) for the event sources; see inotify_reader.h. */
#include "inotify_records.h"
#include "name_hash.h"

/* Whoever renames may be held up between the halves: so long the second one is waited for. */
#define SECOND_HALF_NS 10000000u
/* Of such waits, each for all that was read before it, between two reads. */
#define MAX_WAITS 8u
/* So often records are moved to make room for more, between two fetches. */
#define MAX_MOVES 4u
/* The halves of a rename are looked for this far apart. */
#define MAX_BETWEEN 512u
/* Records that are looked at for halves that have no other, between two reads: each for each. */
#define MAX_LOOKED (4u << 20)
/* Records that are taken before the host's queue is looked after: a fraction of what it keeps. */
#define RELIEVED_AFTER 512u

/* ---- renames ---------------------------------------------------------------------- */

/* False, too, when that would take too long: then what it was is told by fanotify as well. */
static bool is_alone(struct vf_inotify_reader *reader, const struct inotify_event *half)
{
	const struct inotify_event *other;

	for (uint32_t at = 0; (other = vf_record_at(reader, at)); at = vf_record_end(at, other)) {
		if (reader->looked >= MAX_LOOKED)
			return false;
		reader->looked++;
		if (other != half && other->cookie == half->cookie)
			return false;
	}
	return true;
}

/* Both halves are mostly neighbours. */
static bool is_joined(struct vf_inotify_reader *reader, uint32_t at,
		      const struct inotify_event *record, const struct inotify_event *before)
{
	const struct inotify_event *behind = vf_record_at(reader, vf_record_end(at, record));

	if (!(record->mask & (IN_MOVED_FROM | IN_MOVED_TO)))
		return false;
	return (before && before->cookie == record->cookie) ||
	       (behind && behind->cookie == record->cookie) || !is_alone(reader, record);
}

/* Of what happens to a name again and again fanotify says at most the first. */
static bool is_again(struct vf_entry *entries, uint32_t n, const struct vf_entry *next)
{
	if (next->events & ~VF_FS_CHILD_EVENTS)
		return false;
	for (uint32_t i = 0; i < n; i++)
		if (entries[i].key == next->key && (entries[i].events & next->events))
			return true;
	/* And all that happens to it in a row is one entry. */
	if (!n || entries[n - 1].key != next->key || (entries[n - 1].events & ~VF_FS_CHILD_EVENTS))
		return false;
	entries[n - 1].events |= next->events;
	return true;
}

uint32_t vf_inotify_entries(struct vf_inotify_reader *reader, int32_t wd, uint64_t events,
			    uint64_t nodeid, struct vf_entry *entries, uint32_t max)
{
	const struct inotify_event *record, *before = NULL;
	uint32_t n = 0;

	for (uint32_t at = reader->end;
	     n < max && reader->looked < MAX_LOOKED && (record = vf_record_at(reader, at));
	     at = vf_record_end(at, record), before = record) {
		uint32_t namelen = (uint32_t)strnlen(record->name, record->len);

		reader->looked++;
		if (record->wd != wd || !(record->mask & events) || record == reader->second)
			continue;
		entries[n] = (struct vf_entry){
		    .key = vf_name_hash(nodeid, record->name, namelen),
		    .events = record->mask & (uint32_t)events,
		    /* inotify does not say so of self events. */
		    .is_dir = !record->len || (record->mask & IN_ISDIR),
		    .joined = is_joined(reader, at, record, before),
		};
		n += !is_again(entries, n, &entries[n]);
	}
	return n;
}

bool vf_inotify_is_blind(const struct vf_inotify_reader *reader)
{
	return reader->looked >= MAX_LOOKED || !vf_records_have_room(reader);
}

/*
 * The record of the same rename's other half.  What others did in its directory before it is
 * overtaken: the rename had happened when its first half was told.
 */
static struct inotify_event *second_half(const struct vf_inotify_reader *reader, uint32_t cookie,
					 bool *cut_short)
{
	struct inotify_event *record = NULL;
	uint32_t at = reader->end, n;

	for (n = 0; n < MAX_BETWEEN && (record = vf_record_at(reader, at)); n++) {
		if ((record->mask & IN_MOVED_TO) && record->cookie == cookie)
			break;
		at = vf_record_end(at, record);
	}
	*cut_short = n < MAX_BETWEEN && !record;
	return n < MAX_BETWEEN ? record : NULL;
}

/* The kernel queues the second half right behind the first, but for what others do. */
static bool may_have_second(struct vf_inotify_reader *reader, uint32_t cookie)
{
	struct vf_walk walk = vf_walk_behind(reader, 0);
	const struct inotify_event *record;
	uint32_t n = 0;

	for (; n < MAX_BETWEEN && (record = vf_walk_next(&walk)); n++)
		if ((record->mask & IN_MOVED_TO) && record->cookie == cookie)
			return true;
	return !n || n == MAX_BETWEEN || vf_inotify_is_blind(reader);
}

bool vf_inotify_half_may_be_missing(struct vf_inotify_reader *reader, uint32_t half,
				    const struct vf_inode *other_dir, const char *name,
				    uint32_t namelen)
{
	const struct inotify_event *last = vf_record_at(reader, reader->last);

	if (half & IN_MOVED_FROM)
		return may_have_second(reader, vf_record_at(reader, reader->next)->cookie);
	if (reader->last == reader->next)
		return true;
	return (last->mask & IN_MOVED_FROM) &&
	       last->wd == vf_watch_wd(reader->events->watches, reader->which, other_dir) &&
	       strnlen(last->name, last->len) == namelen && !memcmp(last->name, name, namelen);
}

static void take_one(struct vf_inotify_reader *reader, const struct inotify_event *record)
{
	const uint32_t removal = IN_DELETE | IN_ISDIR;
	struct vf_events *events = reader->events;
	struct vf_places places;

	vf_places_find(reader, record->wd, &places);
	if (record->len && (record->mask & removal) == removal)
		vf_inotify_take_removal(reader, record, &places);
	else if (record->len && (record->mask & VF_FS_CHILD_EVENTS))
		vf_inotify_take_child(reader, record, &places);
	else if (!record->len)
		vf_inotify_take_own(reader, record, &places);
	else
		for (uint32_t i = 0; i < places.n; i++)
			reader->one(reader, record, places.inodes[i], NULL);
	if (!places.n)
		vf_count(&events->unknown);
	vf_places_put(events, &places);
}

/* Both directories have a watch: a pair on each mount that shows both. */
static void take_pair(struct vf_inotify_reader *reader, const struct inotify_event *from,
		      const struct inotify_event *to)
{
	struct vf_events *events = reader->events;
	struct vf_places froms, tos;

	vf_places_find(reader, from->wd, &froms);
	vf_places_find(reader, to->wd, &tos);
	for (uint32_t i = 0; i < froms.n; i++) {
		struct vf_inode *dir = vf_places_on_mount(&tos, vf_inode_mount(froms.inodes[i]));

		if (dir)
			reader->pair(reader, from, froms.inodes[i], to, dir);
		else
			reader->one(reader, from, froms.inodes[i], NULL);
	}
	for (uint32_t i = 0; i < tos.n; i++)
		if (!vf_places_on_mount(&froms, vf_inode_mount(tos.inodes[i])))
			reader->one(reader, to, tos.inodes[i], NULL);
	vf_places_put(events, &froms);
	vf_places_put(events, &tos);
}

static struct inotify_event *wait_for_half(struct vf_inotify_reader *reader, uint32_t cookie)
{
	uint64_t deadline_ns = vf_now_ns() + SECOND_HALF_NS, waited = reader->at + reader->size,
		 now;
	struct inotify_event *to = NULL;
	bool cut_short;

	/* Not kept waiting: what was told already, and who ends the session. */
	vf_outbox_flush(reader->events->outbox);
	reader->waits++;
	while (!to && (now = vf_now_ns()) < deadline_ns && !atomic_load(&reader->events->waiting)) {
		vf_records_make_room(reader);
		if (!vf_records_read_more(reader, deadline_ns - now))
			break;
		to = second_half(reader, cookie, &cut_short);
	}
	reader->waited = waited;
	return to;
}

/* 2: the other half was there. */
static uint32_t take_moved_from(struct vf_inotify_reader *reader)
{
	uint32_t cookie = vf_record_at(reader, reader->next)->cookie;
	bool cut_short;
	struct inotify_event *to = second_half(reader, cookie, &cut_short);

	/* It is queued right behind, perhaps since the read, or where there was no more room. */
	if (cut_short && (vf_records_have_room(reader) || reader->moves++ < MAX_MOVES)) {
		vf_records_make_room(reader);
		if (vf_records_read_more(reader, 0))
			to = second_half(reader, cookie, &cut_short);
	}
	if (!to && reader->joins_renames && reader->waits < MAX_WAITS &&
	    reader->at + reader->next >= reader->waited)
		to = wait_for_half(reader, cookie);
	if (!to) {
		take_one(reader, vf_record_at(reader, reader->next));
		return 1;
	}
	reader->second = to;
	take_pair(reader, vf_record_at(reader, reader->next), to);
	reader->second = NULL;
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
	if (!(record->mask & VF_INOTIFY_EVENTS))
		return 0;
	if (record->mask & IN_MOVED_FROM)
		return take_moved_from(reader);
	take_one(reader, record);
	return 1;
}

uint32_t vf_inotify_take(struct vf_inotify_reader *reader)
{
	const struct inotify_event *record;
	uint32_t n = 0, looked = 0;

	for (; (record = vf_record_at(reader, reader->next)); reader->next = reader->end) {
		reader->end = vf_record_end(reader->next, record);
		n += take(reader, record);
		if (reader->n_unseen)
			vf_inotify_tell_unseen(reader);
		reader->last = reader->next;
		if (!(++looked % RELIEVED_AFTER))
			vf_inotify_relieve(reader);
	}
	vf_inotify_forget_last(reader);
	return n;
}
