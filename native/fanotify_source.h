/* SPDX-License-Identifier: Apache-2.0 */
/* The rest of fanotify_source.c beside its struct vf_source_ops; the source's thread's. */
#ifndef VHOSTFS_FANOTIFY_SOURCE_H
#define VHOSTFS_FANOTIFY_SOURCE_H

#include "fanotify_record.h"

/* Reports what a record tells, which was read at now_ns (CLOCK_MONOTONIC). */
void vf_fanotify_take(struct vf_events *events, const struct vf_fanotify_record *record,
		      uint64_t now_ns);
/* Is it about something that the guest watches? */
bool vf_fanotify_is_wanted(struct vf_events *events, const struct vf_fanotify_record *record);
/* The record that is not understood, and what came with it, is lost. */
void vf_fanotify_report_garbage(struct vf_events *events, uint32_t size);

#endif
