/* SPDX-License-Identifier: Apache-2.0 */
/* What a watched directory tells of what is in it, joined with what that tells itself. */
#include "inotify_records.h"

/* An object's own record follows its directory's; a few of others may come between. */
#define MAX_BEFORE_OWN 16u

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

/*
 * Can this be what a directory says itself of a change that its parent told by that record?  Not
 * when it has another name; but which one it had before it moved is not known any longer.
 */
static bool may_be_directory(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     const struct inotify_event *own, const struct vf_places *dirs)
{
	const struct inotify_event *other;

	for (uint32_t i = 0; i < dirs->n; i++)
		if (vf_watch_wd(reader->events->watches, VF_WD_PARENT, dirs->inodes[i]) < 0 ||
		    vf_record_is_of_its_name(reader, record, dirs->inodes[i]))
			return true;
	for (uint32_t at = 0; (other = vf_record_at(reader, at)); at = vf_record_end(at, other))
		if (other->wd == own->wd && (other->mask & IN_MOVE_SELF))
			return true;
	return false;
}

/* The record of an object itself at this place, of the same event; its inodes are in objects. */
static struct inotify_event *own_record_at(struct vf_inotify_reader *reader, uint32_t at,
					   const struct inotify_event *record,
					   struct vf_places *objects)
{
	struct inotify_event *own = vf_record_at(reader, at);

	/* Nothing is in itself. */
	if (!own || own->len || own->wd == record->wd ||
	    ((own->mask ^ record->mask) & (VF_INOTIFY_EVENTS | IN_ISDIR)))
		return NULL;
	vf_places_find(reader, own->wd, objects);
	if (objects->n && (record->mask & IN_ISDIR) &&
	    !may_be_directory(reader, record, own, objects)) {
		vf_places_put(reader->events, objects);
		objects->n = 0;
	}
	return objects->n ? own : NULL;
}

/* Has this name been given away since?  Then what it means by now is not whom it was about. */
static bool name_changed(struct vf_inotify_reader *reader, const struct inotify_event *record)
{
	struct vf_walk walk = vf_walk_behind(reader, 0);
	const struct inotify_event *other;

	while ((other = vf_walk_next(&walk)))
		if ((other->mask & VF_FS_ENTRY_EVENTS) && vf_record_is_of_same_name(other, record))
			return true;
	return false;
}

/*
 * When an object in a watched directory is watched too, its own record follows the directory's:
 * that says which object it was.  Its inodes, referenced, are in objects.
 */
static struct inotify_event *own_record(struct vf_inotify_reader *reader,
					const struct inotify_event *record,
					const struct vf_inode *known, bool certain,
					struct vf_places *objects)
{
	const struct inotify_event *before = record;
	struct inotify_event *own;
	uint32_t at = reader->end;

	if (!vf_record_at(reader, at) && known && tells_itself(reader, known, record))
		vf_records_read_more(reader, 1000000);
	/* What follows at once says it better than what the name means by now. */
	if (!certain && suits(reader, record, known, certain) &&
	    (own = own_record_at(reader, at, record, objects)))
		return own;
	for (uint32_t i = 0; known && i < MAX_BEFORE_OWN && vf_record_at(reader, at); i++) {
		/* Behind another of the same event with a name it is that one's. */
		bool others = before != record && before->len &&
			      !((before->mask ^ record->mask) & (VF_INOTIFY_EVENTS | IN_ISDIR));

		own = others ? NULL : own_record_at(reader, at, record, objects);
		if (own && vf_places_have(objects, known) &&
		    (!i || certain || !name_changed(reader, record)))
			return own;
		vf_places_put(reader->events, objects);
		objects->n = 0;
		before = vf_record_at(reader, at);
		at = vf_record_end(at, before);
	}
	if (!certain || !suits(reader, record, known, certain))
		return NULL;
	return own_record_at(reader, reader->end, record, objects);
}

/*
 * Linux counts an object's last link count as one with what changed just before, although that had
 * a name and this has none.  own: the record that was taken with that name.
 */
static void take_last_links(struct vf_inotify_reader *reader, struct inotify_event *own,
			    const struct vf_places *objects)
{
	for (uint32_t i = 0; i < objects->n; i++) {
		if (!vf_inotify_is_last_link(reader, own, objects->inodes[i]))
			continue;
		own->mask = IN_ATTRIB;
		reader->one(reader, own, objects->inodes[i], NULL);
		own->mask = 0;
	}
}

void vf_inotify_take_child(struct vf_inotify_reader *reader, const struct inotify_event *record,
			   const struct vf_places *dirs)
{
	struct vf_events *events = reader->events;
	struct vf_places objects = {.n = 0};
	struct inotify_event *own = NULL;

	for (uint32_t i = 0; i < dirs->n; i++) {
		bool certain = false;
		struct vf_inode *dir = dirs->inodes[i], *child;
		struct vf_inode *known = reader->child(reader, record, dir, &certain);

		if (!own)
			own = own_record(reader, record, known, certain, &objects);
		child = own ? vf_places_on_mount(&objects, vf_inode_mount(dir)) : NULL;
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
		if (!vf_places_on_mount(dirs, vf_inode_mount(objects.inodes[i])))
			reader->one(reader, own, objects.inodes[i], NULL);
	own->mask = 0; /* done */
	if ((record->mask & IN_ATTRIB) && !(record->mask & IN_ISDIR))
		take_last_links(reader, own, &objects);
	vf_places_put(events, &objects);
}
