/* SPDX-License-Identifier: Apache-2.0 */
/*
 * In which order things happened to what the guest watches.
 *
 * fanotify sums up what one process does to one name until somebody reads it:
 * in which order the names of a directory changed, and how often, is lost as
 * soon as the reader is slower than the writer.  inotify keeps each event, in
 * order, but says neither who made it nor to which object.  So what has a
 * watch has one of inotify's on the host too: inotify says what happened and
 * when, and fanotify's records, noted as facts, say who did it and to what.
 */
#ifndef VHOSTFS_ORDER_H
#define VHOSTFS_ORDER_H

#include "events.h"

struct vf_order;

/* inotify_fd: non-blocking; stays the caller's. */
struct vf_order *vf_order_new(struct vf_events *events, int inotify_fd, int *error);
void vf_order_free(struct vf_order *order);

/*
 * The guest's wish for this inode, as vf_source_ops.mark has it: the host's watch in *wd, -1 for
 * one that cannot be had, whose events then come in fanotify's order.
 */
void vf_order_mark(struct vf_order *order, struct vf_inode *inode, uint64_t mask,
		   int32_t wd[VF_N_WDS]);

/*
 * What fanotify says: all of mask happened to change->child under change->name in change->dir,
 * which is reported when inotify says so.  own: by us, and not to be reported.  Returns the events
 * of which inotify was not asked to tell, which were not noted.
 */
uint64_t vf_order_note(struct vf_order *order, const struct vf_change *change, uint64_t mask,
		       bool own);
/* The same of what happened to change->child itself; returns what is to be reported. */
uint64_t vf_order_note_own(struct vf_order *order, const struct vf_change *change, uint64_t mask,
			   bool own);
/*
 * After vf_order_note(), which left `left` of mask, for the object that has the name: what its own
 * watch tells of that.  Returns what is still left.
 */
uint64_t vf_order_note_child(struct vf_order *order, struct vf_change *change, uint64_t mask,
			     uint64_t left, bool own);
/*
 * The same for the two halves of a rename, which are told as one when inotify tells of either and
 * the other is wanted, too; false: nothing was noted.
 */
bool vf_order_note_rename(struct vf_order *order, const struct vf_change changes[2], bool own);

/*
 * A change that fanotify reports itself, after everything that inotify said by then: an object's
 * own events follow those of its directory.  False: no memory; it may be reported at once.
 */
bool vf_order_defer(struct vf_order *order, const struct vf_change *change);
/* The same of both halves of a rename. */
bool vf_order_defer_rename(struct vf_order *order, const struct vf_change changes[2]);

/*
 * Reads what inotify says, then lets read_facts() note what fanotify says (true: there
 * was something), then reports; until neither has more.
 */
void vf_order_read(struct vf_order *order, bool (*read_facts)(struct vf_events *));

/*
 * So long at most vf_order_read() may be left uncalled although nothing can be read: what inotify
 * does not say is told then. -1: for ever.
 */
int32_t vf_order_wait_ms(const struct vf_order *order);

/* Forgets facts (a session has ended). */
void vf_order_clear(struct vf_order *order);

#endif
