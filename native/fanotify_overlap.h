/* SPDX-License-Identifier: Apache-2.0 */
/* What two groups with the same marks have said, each event reported once; fanotify_move.c. */
#ifndef VHOSTFS_FANOTIFY_OVERLAP_H
#define VHOSTFS_FANOTIFY_OVERLAP_H

#include "events.h"

/* Whole records, as they were read. */
struct vf_fanotify_records {
	uint8_t *bytes;
	size_t size, room;
	uint64_t seen_ns;
	bool lost; /* some are not here */
};

/*
 * Reads all that is in the queue now, and perhaps more.  records: where to; NULL: it is thrown
 * away.  0 or a negative errno.
 */
int vf_fanotify_empty_queue(struct vf_events *events, int fd, struct vf_fanotify_records *records);
/*
 * Reports both, the first one first, and empties them.  False: without memory to compare them, so
 * that some is told twice, and the guest should look for itself.
 */
bool vf_fanotify_report_both(struct vf_events *events, struct vf_fanotify_records *first,
			     struct vf_fanotify_records *next);

#endif
