/* SPDX-License-Identifier: Apache-2.0 */
/* Records of inotify(7) in a buffer, and the inodes that their watches stand for. */
#include <poll.h>
#include <time.h>

#include "inotify_records.h"

/* So long in all, between two fetches, more is waited for: a flood could ask for it each time. */
#define MAX_IDLE_NS 200000000u

void vf_places_find(struct vf_inotify_reader *reader, int32_t wd, struct vf_places *places)
{
	places->n = vf_watches_by_wd(reader->events->watches, reader->which, wd, places->inodes,
				     VF_MAX_PLACES);
}

void vf_places_put(struct vf_events *events, struct vf_places *places)
{
	for (uint32_t i = 0; i < places->n; i++)
		vf_inode_put(events->share, places->inodes[i]);
}

bool vf_places_have(const struct vf_places *places, const struct vf_inode *inode)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (places->inodes[i] == inode)
			return true;
	return false;
}

struct vf_inode *vf_places_on_mount(const struct vf_places *places, uint16_t mount)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (vf_inode_mount(places->inodes[i]) == mount)
			return places->inodes[i];
	return NULL;
}

/* ---- reading ------------------------------------------------------------------------- */

bool vf_records_have_room(const struct vf_inotify_reader *reader)
{
	return VF_SOURCE_BUFFER - reader->size >= VF_READ_ROOM;
}

bool vf_records_read_more(struct vf_inotify_reader *reader, uint64_t time_ns)
{
	/* Nor while somebody waits for all of this. */
	bool waits = time_ns && !vf_inotify_has_backlog(reader->events) &&
		     reader->idle_ns < MAX_IDLE_NS && !atomic_load(&reader->events->waiting);
	struct timespec time = {.tv_nsec = waits ? (long)time_ns : 0};
	struct pollfd more = {.fd = reader->fd, .events = POLLIN};
	uint64_t began_ns = waits ? vf_now_ns() : 0, at;
	ssize_t n;
	bool ready;

	if (!vf_records_have_room(reader))
		return false;
	ready = vf_inotify_has_backlog(reader->events) || ppoll(&more, 1, &time, NULL) == 1;
	if (waits)
		reader->idle_ns += vf_now_ns() - began_ns;
	if (!ready)
		return false;
	n = vf_inotify_read(reader, reader->buffer + reader->size, VF_SOURCE_BUFFER - reader->size,
			    &at);
	if (n <= 0)
		return false;
	reader->size += (uint32_t)n;
	return true;
}

const struct inotify_event *vf_walk_next(struct vf_walk *walk)
{
	const struct inotify_event *record;

	while (!(record = vf_record_at(walk->reader, walk->at))) {
		uint64_t now = walk->until_ns ? vf_now_ns() : 0;

		if (!vf_records_read_more(walk->reader,
					  now < walk->until_ns ? walk->until_ns - now : 0))
			return NULL;
	}
	walk->at = vf_record_end(walk->at, record);
	return record;
}

void vf_records_make_room(struct vf_inotify_reader *reader)
{
	if (vf_records_have_room(reader))
		return;
	vf_inotify_forget_last(reader);
	memmove(reader->buffer, reader->buffer + reader->next, reader->size - reader->next);
	reader->at += reader->next;
	reader->size -= reader->next;
	reader->end -= reader->next;
	reader->next = reader->last = 0;
}

int32_t vf_inotify_fetch(struct vf_inotify_reader *reader)
{
	ssize_t n;

	reader->now_ns = vf_now_ns();
	reader->size = reader->next = reader->end = reader->last = 0;
	reader->waits = reader->moves = 0;
	reader->idle_ns = 0;
	reader->awaited = 0;
	reader->looked = 0;
	/* The rest is room for what is looked for behind it. */
	n = vf_inotify_read(reader, reader->buffer, VF_SOURCE_BUFFER / 2, &reader->at);
	reader->waited = reader->at;
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (!n)
		return -EIO;
	reader->size = (uint32_t)n;
	return (int32_t)n;
}

/* ---- names ---------------------------------------------------------------------------- */

struct vf_change vf_inotify_change(const struct vf_inotify_reader *reader,
				   const struct inotify_event *record, struct vf_inode *inode,
				   struct vf_inode *child)
{
	struct vf_change change = {
	    .mask = record->mask & (VF_INOTIFY_EVENTS | VF_FS_ISDIR),
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

bool vf_record_is_of_its_name(struct vf_inotify_reader *reader, const struct inotify_event *record,
			      struct vf_inode *dir)
{
	struct vf_watches *watches = reader->events->watches;

	return record->len && record->wd == vf_watch_wd(watches, VF_WD_PARENT, dir) &&
	       vf_inotify_name_number(record->wd, record->name,
				      (uint32_t)strnlen(record->name, record->len)) ==
		   vf_watch_wd(watches, VF_WD_NAME, dir);
}
