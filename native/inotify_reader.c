/* SPDX-License-Identifier: Apache-2.0 */
/* inotify(7) for the event sources; see inotify_reader.h. */
#include <poll.h>
#include <time.h>

#include "inotify_reader.h"
#include "proc_name.h"

/* All that inotify can be asked for. */
#define EVENTS ((uint64_t)IN_ALL_EVENTS)
/* In how many places of a share one object may be mounted; more are not told of. */
#define MAX_PLACES 8u
/* The kernel adds the second half of a rename right after the first, but not at the same moment. */
#define SECOND_HALF_MS 1
/* Left in the buffer for that second half and a few more. */
#define READ_ROOM 4096u
/* The halves of a rename are looked for this far apart. */
#define MAX_BETWEEN 64u

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
				   const struct inotify_event *record, struct vf_inode *inode)
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

const char *vf_inotify_name(const struct vf_change *change, char buffer[VF_NAME_MAX + 1])
{
	memcpy(buffer, change->name, change->namelen);
	buffer[change->namelen] = 0;
	return buffer;
}

static void take_one(struct vf_inotify_reader *reader, const struct inotify_event *record)
{
	struct vf_events *events = reader->events;
	struct places places;

	find(reader, record->wd, &places);
	for (uint32_t i = 0; i < places.n; i++)
		reader->one(reader, record, places.inodes[i]);
	if (!places.n)
		vf_count(&events->unknown);
	put(events, &places);
}

/* ---- renames ---------------------------------------------------------------------- */

/*
 * The record behind offset at of the same rename's other half.  NULL: it was not read yet (*more),
 * or something happened in its directory before it, which must not be overtaken.
 */
static struct inotify_event *second_half(const struct vf_inotify_reader *reader, uint32_t at,
					 uint32_t cookie, bool *more)
{
	int32_t between[MAX_BETWEEN];
	struct inotify_event *record;
	uint32_t n;

	for (n = 0; n < MAX_BETWEEN && (record = record_at(reader, at));
	     at = record_end(at, record)) {
		if ((record->mask & IN_MOVED_TO) && record->cookie == cookie) {
			*more = false;
			while (n && between[n - 1] != record->wd)
				n--;
			return n ? NULL : record;
		}
		between[n++] = record->wd;
	}
	*more = n < MAX_BETWEEN;
	return NULL;
}

static struct vf_inode *on_mount(const struct places *places, uint16_t mount)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (vf_inode_mount(places->inodes[i]) == mount)
			return places->inodes[i];
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
			reader->one(reader, from, froms.inodes[i]);
	}
	for (uint32_t i = 0; i < tos.n; i++)
		if (!on_mount(&froms, vf_inode_mount(tos.inodes[i])))
			reader->one(reader, to, tos.inodes[i]);
	put(events, &froms);
	put(events, &tos);
}

static bool read_more(struct vf_inotify_reader *reader)
{
	struct pollfd more = {.fd = reader->fd, .events = POLLIN};
	uint64_t at;
	ssize_t n;

	if (poll(&more, 1, SECOND_HALF_MS) != 1)
		return false;
	n = reader->read(reader, reader->buffer + reader->size, VF_SOURCE_BUFFER - reader->size,
			 &at);
	if (n <= 0)
		return false;
	reader->size += (uint32_t)n;
	return true;
}

/* 2: the other half was there. */
static uint32_t take_moved_from(struct vf_inotify_reader *reader,
				const struct inotify_event *record, uint32_t end)
{
	bool more;
	struct inotify_event *to = second_half(reader, end, record->cookie, &more);

	/* It was read as soon as it was there. */
	while (!to && more && read_more(reader))
		to = second_half(reader, end, record->cookie, &more);
	if (!to) {
		take_one(reader, record);
		return 1;
	}
	take_pair(reader, record, to);
	to->mask = 0; /* done */
	return 2;
}

/* ---- reading ------------------------------------------------------------------------- */

static uint32_t take(struct vf_inotify_reader *reader, const struct inotify_event *record,
		     uint32_t end)
{
	if (record->mask & IN_Q_OVERFLOW) {
		reader->overflow(reader);
		return 0;
	}
	/*
	 * A half that was taken with the other; or IN_IGNORED, IN_UNMOUNT: the watch is gone,
	 * and the guest's own ends with its inode.
	 */
	if (!(record->mask & EVENTS))
		return 0;
	if (record->mask & IN_MOVED_FROM)
		return take_moved_from(reader, record, end);
	take_one(reader, record);
	return 1;
}

uint32_t vf_inotify_take(struct vf_inotify_reader *reader)
{
	const struct inotify_event *record;
	uint32_t n = 0;

	for (uint32_t at = 0; (record = record_at(reader, at)); at = record_end(at, record))
		n += take(reader, record, record_end(at, record));
	return n;
}

int32_t vf_inotify_fetch(struct vf_inotify_reader *reader)
{
	struct timespec now;
	ssize_t n;

	clock_gettime(CLOCK_MONOTONIC, &now);
	reader->now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	reader->size = 0;
	n = reader->read(reader, reader->buffer, VF_SOURCE_BUFFER - READ_ROOM, &reader->at);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (!n)
		return -EIO;
	reader->size = (uint32_t)n;
	return (int32_t)n;
}

/* ---- watches ---------------------------------------------------------------------------- */

int vf_inotify_watch(struct vf_events *events, enum vf_wd which, struct vf_inode *inode,
		     uint32_t bits, uint32_t others, int32_t *wd)
{
	char name[PROC_NAME_SIZE];
	int fd = which == VF_WD_ORDER ? events->config.order_fd : events->config.source_fd;
	atomic_uint_fast64_t *count =
	    which == VF_WD_ORDER ? &events->order_watches : &events->host_marks;
	uint32_t how = 0;
	int path_fd, got;

	if (!bits) {
		/* Fails when the object is gone, and its watch with it. */
		if (*wd >= 0 && !others) {
			inotify_rm_watch(fd, *wd);
			vf_count_n(count, UINT64_MAX);
		}
		*wd = -1;
		return 0;
	}
	/*
	 * The host has one watch for an object, however many nodeids it has in the share: a new
	 * one must not take away what another asked for.
	 */
	if (*wd < 0)
		how = IN_MASK_ADD;
	else
		bits |= others;
	path_fd = vf_inode_path_fd(events->share, inode);
	if (path_fd < 0)
		return path_fd;
	/* The descriptor's name, in the directory where this thread is: vf_thread_init(). */
	got = inotify_add_watch(fd, proc_name(name, path_fd), bits | how);
	if (got < 0)
		return -errno;
	if (got != *wd && !vf_watches_wd_mask(events->watches, which, got, inode))
		vf_count(count);
	*wd = got;
	return 0;
}
