/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From one mark on a whole file system to marks on what the guest watches,
 * when the file system turns out to be busy with other things.
 *
 * One mark costs the server for every change on the file system; marks on
 * inodes cost for each watch, once.  So the source moves when what nobody
 * watches has cost as much as the marks would, and when the process that sets
 * the one mark has ended.  It does not come back: a mark on a file system takes
 * rights that are given up before the first guest.
 */
#ifndef VHOSTFS_FANOTIFY_MOVE_H
#define VHOSTFS_FANOTIFY_MOVE_H

#include "events.h"

/* next_fd: a group like the source's own, without marks; taken over also when this fails. */
struct vf_fanotify_move *vf_fanotify_move_new(int next_fd, int *error);
void vf_fanotify_move_free(struct vf_fanotify_move *move);

/* The source's thread, ahead of reading: measures, and moves a bit. */
void vf_fanotify_move_turn(struct vf_events *events);
/* The source's thread: reports what was read while it moved; false: nothing was. */
bool vf_fanotify_move_report(struct vf_events *events);
/* Moves at the next turn, whatever it costs. */
void vf_fanotify_move_want(struct vf_events *events);
/*
 * Nobody can set the mark on the file system any more.  is_marked: it is there, and the source
 * moves at the next turn.  Else from now on what the guest watches is marked; it watches nothing
 * yet.  False: the source cannot do without.
 */
bool vf_fanotify_move_without_marker(struct vf_events *events, bool is_marked);

/* Under watches->change_lock.  The group that gets all marks, too; -1: there is none. */
int vf_fanotify_move_fd(const struct vf_events *events);
/* How many it has. */
atomic_uint_fast64_t *vf_fanotify_move_marks(struct vf_events *events);
/* One of them cannot be had: the source stays as it is. */
void vf_fanotify_move_failed(struct vf_events *events, int error);

/* Any thread.  False: it has not moved; else why, for people. */
bool vf_fanotify_move_reason(const struct vf_events *events, char *text, size_t size);

#endif
