/* SPDX-License-Identifier: Apache-2.0 */
/* The guest's inodes that a record of fanotify(7) is about. */
#ifndef VHOSTFS_FANOTIFY_FOUND_H
#define VHOSTFS_FANOTIFY_FOUND_H

#include "fanotify_record.h"

/* In how many places of a share one object may be mounted; more are not told of. */
#define VF_FANOTIFY_PLACES 8u

/* The inodes that are one object of the host, on different mounts. */
struct vf_fanotify_places {
	struct vf_inode *inodes[VF_FANOTIFY_PLACES];
	uint32_t n;
};

/* The inodes that it is about: the directory (of a rename: both), the object. */
struct vf_fanotify_found {
	struct vf_fanotify_places dirs, to, objects;
};

static inline struct vf_inode *vf_fanotify_on_mount(const struct vf_fanotify_places *places,
						    uint16_t mount)
{
	for (uint32_t i = 0; i < places->n; i++)
		if (vf_inode_mount(places->inodes[i]) == mount)
			return places->inodes[i];
	return NULL;
}

/* ---- fanotify_caches.c ---- */

/* Tells the guest's caches all that a record says, at once; read at now_ns (CLOCK_MONOTONIC). */
void vf_fanotify_tell_caches(struct vf_events *events, const struct vf_fanotify_record *record,
			     const struct vf_fanotify_found *found, uint64_t now_ns);

#endif
