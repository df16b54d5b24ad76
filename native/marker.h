/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mark of fanotify(7) on a whole file system, set only while somebody
 * wants to hear: as long as it is there, every change on that file system
 * costs whoever makes it, the server too, a record.  Setting it takes
 * CAP_SYS_ADMIN, which the server gives up, so a process of its own does it
 * (vf_marker_start() in api.h).
 */
#ifndef VHOSTFS_MARKER_H
#define VHOSTFS_MARKER_H

#include "events.h"

/* Who wants to hear; the mark is there while anybody does. */
enum vf_mark_wish {
	VF_MARK_WATCHES = 1,	/* the guest watches something, or did in this session */
	VF_MARK_INVALIDATE = 2, /* the guest keeps what it knows until it is told */
	VF_MARK_PEOPLE = 4,	/* all that is seen is shown */
	VF_MARK_ANYBODY = 7,
};

/*
 * When it returns 0 and on, whatever happens from now on is seen, unless the source has failed.
 * Negative errno.
 */
int vf_marker_want(struct vf_events *events, enum vf_mark_wish wish, bool on);
/* The mark is not needed any more, or never was; the process ends. */
void vf_marker_end(struct vf_events *events);

#endif
