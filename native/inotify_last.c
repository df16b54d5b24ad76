/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The last record of each watch among what was read: asked for each directory that is removed, of
 * which there may be as many as records.
 */
#include <stdlib.h>

#include "inotify_records.h"

/* Of what happens to a directory, and in it, while it has a name. */
#define OF_THE_LIVING (IN_MOVE_SELF | VF_FS_ENTRY_EVENTS)
#define MIN_ROOM 64u

struct last {
	int32_t wd; /* 0: none; inotify's begin with 1 */
	uint32_t end;
};

struct vf_inotify_last {
	uint32_t room; /* a power of two */
	uint32_t used;
	uint32_t end; /* of what was looked at */
	struct last places[];
};

void vf_inotify_forget_last(struct vf_inotify_reader *reader)
{
	free(reader->last_of_watch);
	reader->last_of_watch = NULL;
}

static struct last *place_of(struct vf_inotify_last *last, int32_t wd)
{
	uint32_t i = (uint32_t)wd * 0x9e3779b1u & (last->room - 1);

	while (last->places[i].wd && last->places[i].wd != wd)
		i = (i + 1) & (last->room - 1);
	return &last->places[i];
}

/* All of it anew, with room for more. */
static struct vf_inotify_last *begin(struct vf_inotify_reader *reader)
{
	struct vf_inotify_last *last = reader->last_of_watch;
	uint32_t room = last ? 4 * last->room : MIN_ROOM;

	vf_inotify_forget_last(reader);
	last = calloc(1, sizeof(*last) + room * sizeof(last->places[0]));
	if (last) {
		last->room = room;
		last->end = reader->end;
	}
	reader->last_of_watch = last;
	return last;
}

/* NULL: no memory. */
static struct vf_inotify_last *look_up_to_here(struct vf_inotify_reader *reader)
{
	struct vf_inotify_last *last = reader->last_of_watch;
	const struct inotify_event *record;

	if (!last)
		last = begin(reader);
	while (last && (record = vf_record_at(reader, last->end))) {
		struct last *place = place_of(last, record->wd);

		if (!place->wd && 2 * ++last->used > last->room) {
			last = begin(reader);
			continue;
		}
		last->end = vf_record_end(last->end, record);
		place->wd = record->wd;
		if (record->mask & OF_THE_LIVING)
			place->end = last->end;
	}
	return last;
}

bool vf_inotify_lives_on(struct vf_inotify_reader *reader, const struct vf_inode *dir)
{
	int32_t wd = vf_watch_wd(reader->events->watches, reader->which, dir);
	struct vf_inotify_last *last;

	if (wd < 0)
		return false;
	while (vf_records_read_more(reader, 0))
		;
	last = look_up_to_here(reader);
	return last && place_of(last, wd)->end > reader->end;
}
