/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inotify reader from inside: what inotify_records.c (reading), inotify_child.c
 * (what a watched directory tells of what is in it), inotify_self.c (what an
 * object tells itself, and its end) and inotify_reader.c (renames, and which of
 * these a record is for) share.  Nobody else includes this.
 */
#ifndef VHOSTFS_INOTIFY_RECORDS_H
#define VHOSTFS_INOTIFY_RECORDS_H

#include "inotify_reader.h"

/* In how many places of a share one object may be mounted; more are not told of. */
#define VF_MAX_PLACES 8u

/* The inodes that one watch stands for: one object of the host, on different mounts. */
struct vf_places {
	struct vf_inode *inodes[VF_MAX_PLACES];
	uint32_t n;
};

/* ---- inotify_records.c ---- */

/* NULL: there is no whole record at this place of the buffer. */
static inline struct inotify_event *vf_record_at(const struct vf_inotify_reader *reader,
						 uint32_t at)
{
	struct inotify_event *record = (void *)(reader->buffer + at);

	if (at >= reader->size || reader->size - at < sizeof(*record) ||
	    reader->size - at - sizeof(*record) < record->len)
		return NULL;
	return record;
}

/* The place behind it. */
static inline uint32_t vf_record_end(uint32_t at, const struct inotify_event *record)
{
	return at + (uint32_t)sizeof(*record) + record->len;
}

static inline bool vf_record_is_of_same_name(const struct inotify_event *a,
					     const struct inotify_event *b)
{
	return a->wd == b->wd && a->len && b->len && !strcmp(a->name, b->name);
}

/* The inodes of a watch, each referenced until vf_places_put(). */
void vf_places_find(struct vf_inotify_reader *reader, int32_t wd, struct vf_places *places);
void vf_places_put(struct vf_events *events, struct vf_places *places);
bool vf_places_have(const struct vf_places *places, const struct vf_inode *inode);
/* NULL: it is not there. */
struct vf_inode *vf_places_on_mount(const struct vf_places *places, uint16_t mount);

/* A record fits, and a few more. */
#define VF_READ_ROOM 4096u
/* ---- inotify_backlog.c ---- */

/* reader->read() behind what waits. */
ssize_t vf_inotify_read(struct vf_inotify_reader *reader, void *buffer, size_t size, uint64_t *at);

/* ---- inotify_records.c ---- */

/* Is there room for more? */
bool vf_records_have_room(const struct vf_inotify_reader *reader);
/* Reads behind what there is, if something comes in that time. */
bool vf_records_read_more(struct vf_inotify_reader *reader, uint64_t time_ns);
/* What follows the record at hand, and what more can be read until then; records do not move. */
struct vf_walk {
	struct vf_inotify_reader *reader;
	uint32_t at;
	uint64_t until_ns; /* CLOCK_MONOTONIC; 0: without waiting */
};
static inline struct vf_walk vf_walk_behind(struct vf_inotify_reader *reader, uint64_t until_ns)
{
	return (struct vf_walk){.reader = reader, .at = reader->end, .until_ns = until_ns};
}
/* NULL: nothing more. */
const struct inotify_event *vf_walk_next(struct vf_walk *walk);
/* Forgets what is behind us, so that there is room; records move. */
void vf_records_make_room(struct vf_inotify_reader *reader);
/* Is this record of the name by which the directory, which the guest watches, was last known? */
bool vf_record_is_of_its_name(struct vf_inotify_reader *reader, const struct inotify_event *record,
			      struct vf_inode *dir);

/* ---- inotify_last.c ---- */

/* Records have moved, or were all taken. */
void vf_inotify_forget_last(struct vf_inotify_reader *reader);

/* ---- inotify_child.c ---- */

/* A child event; dirs: of the record's watch. */
void vf_inotify_take_child(struct vf_inotify_reader *reader, const struct inotify_event *record,
			   const struct vf_places *dirs);

/* ---- inotify_self.c ---- */

/* An event without a name. */
void vf_inotify_take_own(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 const struct vf_places *objects);
/* A directory's name is gone: was it one that the guest watches? */
void vf_inotify_take_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     const struct vf_places *dirs);
/* Of one that is watched for its end, whether this is its link count's last record. */
bool vf_inotify_is_last_link(struct vf_inotify_reader *reader, const struct inotify_event *record,
			     struct vf_inode *inode);
/* Of directories that went unseen and whose last record is behind us. */
void vf_inotify_tell_unseen(struct vf_inotify_reader *reader);

#endif
