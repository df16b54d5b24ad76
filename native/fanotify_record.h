/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One record of a fanotify(7) group that reports file handles, taken apart.
 * Knows the layout and nothing of what it means.
 */
#ifndef VHOSTFS_FANOTIFY_RECORD_H
#define VHOSTFS_FANOTIFY_RECORD_H

#include "events.h"

/* An object, and for a directory the name in it. */
struct vf_fanotify_object {
	bool there;
	struct vf_fsid fsid;
	int32_t type; /* of the handle */
	uint32_t handle_size;
	const uint8_t *handle;
	const char *name; /* namelen bytes; NULL: none was told */
	uint32_t namelen;
};

/* Pointers go into the buffer. */
struct vf_fanotify_record {
	uint64_t mask;
	int32_t pid;
	struct vf_fanotify_object object; /* FAN_EVENT_INFO_TYPE_FID */
	struct vf_fanotify_object dir;	  /* DFID_NAME or DFID */
	struct vf_fanotify_object old,
	    new; /* OLD_DFID_NAME, NEW_DFID_NAME: the sides of a rename */
};

/*
 * Takes apart the record at the start of size bytes.  Returns its length, or
 * -EBADMSG: it is not what a kernel that we know would write.
 */
int32_t vf_fanotify_parse(const uint8_t *bytes, uint32_t size, struct vf_fanotify_record *record);

#endif
