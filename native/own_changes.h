/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which of inotify's records the server caused itself, for its guest.
 *
 * inotify does not say who made a change.  But it queues what an operation
 * causes while the operation runs, so an operation notes what it is about to
 * cause, and where in the stream of records that can be: from what was taken out
 * of the stream when it begins to the end of the stream when it has ended.  A
 * record in there that fits is the server's own.
 *
 * A change of the same kind to the same object by somebody else in that short
 * stretch is taken for the guest's own, too: it has just been told of one.
 */
#ifndef VHOSTFS_OWN_CHANGES_H
#define VHOSTFS_OWN_CHANGES_H

#include "events.h"

struct vf_own_changes;

/* source_fd: the inotify instance, of which nothing was read yet.  NULL: out of memory. */
struct vf_own_changes *vf_own_changes_new(int source_fd);
void vf_own_changes_free(struct vf_own_changes *own);

/* ---- operations ---- */

struct vf_own_window;
/* The operation for this request begins.  NULL: it causes nothing that anybody watches for. */
struct vf_own_window *vf_own_changes_begin(struct vf_events *events, struct vf_own_changes *own,
					   const struct vf_req *r);
/* This directory is about to be listed, not for a request. NULL: that may be told. */
struct vf_own_window *vf_own_changes_begin_listing(struct vf_own_changes *own,
						   const struct vf_inode *dir);
void vf_own_changes_end(struct vf_own_changes *own, struct vf_own_window *window);
/* The operation was told of the object (nodeid) that has the name in its request. */
void vf_own_changes_name(struct vf_own_changes *own, const struct vf_req *r, uint64_t nodeid);

/* ---- the source's thread ---- */

/* read(2) of the instance; *at: where in the stream the first byte was. */
ssize_t vf_own_changes_read(struct vf_own_changes *own, void *buffer, size_t size, uint64_t *at);
/* Is the change of the record at this place of the stream the server's own? */
bool vf_own_changes_is(struct vf_own_changes *own, struct vf_share *share, uint64_t at,
		       const struct vf_change *change);
/* Everything before this place has been looked at. */
void vf_own_changes_pass(struct vf_own_changes *own, uint64_t at);

#endif
