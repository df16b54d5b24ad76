/* SPDX-License-Identifier: Apache-2.0 */
/* What a watched object tells itself, and how the end of a directory is learnt of. */
#include "inotify_records.h"

/* So long a change may be under way between what it does and what inotify says of it. */
#define LAST_LINK_NS 1000000u
/* And so long where it is known that one may be. */
#define LATE_LINK_NS 5000000u
/* So many last link counts are waited for between two reads. */
#define MAX_AWAITED 16u

static bool is_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
		       struct vf_inode *dir)
{
	return (record->mask & IN_DELETE) && (record->mask & IN_ISDIR) &&
	       vf_record_is_of_its_name(reader, record, dir);
}

/* Had another one come to the directory's name before this record of it? */
static bool was_replaced(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 struct vf_inode *dir)
{
	const struct inotify_event *other;
	bool replaced = false;

	for (uint32_t at = 0; (other = vf_record_at(reader, at)) && other != record;
	     at = vf_record_end(at, other)) {
		/* A second half that was taken with the first has no bits left. */
		if (other->cookie && !(other->mask & ~(uint32_t)(IN_MOVED_TO | IN_ISDIR)) &&
		    vf_record_is_of_its_name(reader, other, dir))
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
	struct vf_walk walk = vf_walk_behind(reader, 0);
	const struct inotify_event *other;

	while ((other = vf_walk_next(&walk))) {
		if ((other->wd == record->wd && (other->mask & mask) && (dir || !other->len)) ||
		    (by_name && is_removal(reader, other, inode)))
			return true;
		/* It lived on after this; that it lost its last link may not be told yet. */
		if (!dir && other != record && other->wd == record->wd && !walk.until_ns)
			walk.until_ns = vf_now_ns() + LATE_LINK_NS;
	}
	return false;
}

bool vf_inotify_is_removed_later(struct vf_inotify_reader *reader, struct vf_inode *dir)
{
	struct vf_walk walk = vf_walk_behind(reader, 0);
	const struct inotify_event *record;

	while ((record = vf_walk_next(&walk)))
		if (is_removal(reader, record, dir))
			return true;
	return false;
}

/* Moved out of its parent's sight, has it gone before the next one was watched? */
static bool is_removed_unseen(struct vf_inotify_reader *reader, struct vf_inode *inode)
{
	return vf_watch_wd(reader->events->watches, VF_WD_PARENT, inode) >= 0 &&
	       vf_events_is_gone(reader->events, inode) &&
	       !vf_inotify_is_removed_later(reader, inode);
}

/* Whoever replaces it says so a moment after it has lost its last link. */
static void await_last_link(struct vf_inotify_reader *reader, int32_t wd)
{
	uint64_t time_ns = reader->awaited++ < MAX_AWAITED ? LAST_LINK_NS : 0;
	struct vf_walk walk = vf_walk_behind(reader, vf_now_ns() + time_ns);
	const struct inotify_event *record;

	while ((record = vf_walk_next(&walk)))
		if (record->wd == wd && (record->mask & IN_ATTRIB))
			return;
}

static void tell_unseen(struct vf_inotify_reader *reader, struct vf_inode *dir)
{
	reader->removed(reader, vf_record_at(reader, reader->next), dir);
}

/*
 * It is told behind the last record of what happened in it; where there is no room to note that, at
 * once, before those.
 */
static void take_unseen_removal(struct vf_inotify_reader *reader, int32_t wd,
				struct vf_inode *inode)
{
	const uint64_t goes = VF_FS_DELETE | VF_FS_MOVED_FROM;
	/* Behind the last of its names only who has a file open that is gone does anything. */
	bool tells_names = !(goes & ~vf_watch_mask(reader->events->watches, inode));
	struct vf_walk walk = vf_walk_behind(reader, 0);
	const struct inotify_event *record;
	uint32_t last = reader->end;

	/* One that is noted was gone by then: its last record was there. */
	for (uint32_t i = 0; i < reader->n_unseen; i++)
		if (reader->unseen[i].nodeid == vf_inode_nodeid(inode))
			return;
	if (!is_removed_unseen(reader, inode))
		return;
	if (reader->n_unseen == VF_MAX_UNSEEN) {
		tell_unseen(reader, inode);
		return;
	}
	await_last_link(reader, wd);
	while ((record = vf_walk_next(&walk)))
		if (record->wd == wd &&
		    (!tells_names || !record->len || (record->mask & VF_FS_ENTRY_EVENTS)))
			last = walk.at;
	reader->unseen[reader->n_unseen].nodeid = vf_inode_nodeid(inode);
	reader->unseen[reader->n_unseen].after = reader->at + last;
	if (!reader->n_unseen++ || reader->at + last < reader->first_unseen)
		reader->first_unseen = reader->at + last;
}

void vf_inotify_tell_unseen(struct vf_inotify_reader *reader)
{
	struct vf_share *share = reader->events->share;
	uint32_t left = 0;

	if (reader->first_unseen > reader->at + reader->end)
		return;
	reader->first_unseen = UINT64_MAX;
	for (uint32_t i = 0; i < reader->n_unseen; i++) {
		struct vf_inode *dir = NULL;

		if (reader->unseen[i].after > reader->at + reader->end) {
			if (reader->unseen[i].after < reader->first_unseen)
				reader->first_unseen = reader->unseen[i].after;
			reader->unseen[left++] = reader->unseen[i];
		} else {
			dir = vf_inode_get(share, reader->unseen[i].nodeid);
		}
		if (!dir)
			continue;
		tell_unseen(reader, dir);
		vf_inode_put(share, dir);
	}
	reader->n_unseen = left;
}

bool vf_inotify_is_last_link(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     struct vf_inode *inode)
{
	return (vf_watch_mask(reader->events->watches, inode) & VF_FS_DELETE_SELF) &&
	       vf_events_is_gone(reader->events, inode) && !has_more_links(reader, record, inode);
}

void vf_inotify_take_own(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 const struct vf_places *objects)
{
	struct vf_events *events = reader->events;

	for (uint32_t i = 0; i < objects->n; i++) {
		struct vf_inode *inode = objects->inodes[i];
		bool moved = (record->mask & IN_MOVE_SELF) && vf_inode_type(inode) == S_IFDIR;

		/* Whoever moved it: what tells of its removal is on its parent. */
		if (moved)
			vf_watch_renew(events->watches, inode);
		reader->not_its_end =
		    (record->mask & IN_ATTRIB) && !vf_inotify_is_last_link(reader, record, inode);
		reader->one(reader, record, inode, NULL);
		reader->not_its_end = false;
		if (moved)
			take_unseen_removal(reader, record->wd, inode);
	}
}

void vf_inotify_take_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     const struct vf_places *dirs)
{
	uint32_t namelen = (uint32_t)strnlen(record->name, record->len);
	struct vf_events *events = reader->events;
	struct vf_places named, removed = {.n = 0}, told = {.n = 0};

	named.n = vf_watches_by_wd(events->watches, VF_WD_NAME,
				   vf_inotify_name_number(record->wd, record->name, namelen),
				   named.inodes, VF_MAX_PLACES);
	for (uint32_t i = 0; i < named.n; i++)
		/* Its name may be one that it got after this: then another had it here. */
		if (vf_watch_wd(events->watches, VF_WD_PARENT, named.inodes[i]) == record->wd &&
		    !vf_inode_was_told_deleted(named.inodes[i]) &&
		    vf_events_is_gone(events, named.inodes[i]) &&
		    !vf_inotify_lives_on(reader, named.inodes[i]))
			removed.inodes[removed.n++] = named.inodes[i];
	/* Of several on one mount the others had the name before. */
	for (uint32_t i = 0; i < dirs->n; i++)
		if ((told.inodes[told.n] =
			 vf_places_on_mount(&removed, vf_inode_mount(dirs->inodes[i]))))
			told.n++;
	for (uint32_t i = 0; i < removed.n; i++)
		if (!vf_places_have(&told, removed.inodes[i]))
			reader->removed(reader, record, removed.inodes[i]);
	for (uint32_t i = 0; i < dirs->n; i++)
		reader->one(reader, record, dirs->inodes[i],
			    vf_places_on_mount(&removed, vf_inode_mount(dirs->inodes[i])));
	vf_places_put(events, &named);
}
