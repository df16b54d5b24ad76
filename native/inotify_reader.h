/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records of an inotify instance whose watches follow the guest's: read, taken
 * apart, found the inodes of, and the halves of renames brought together.
 * Knows nothing of what becomes of them.
 */
#ifndef VHOSTFS_INOTIFY_READER_H
#define VHOSTFS_INOTIFY_READER_H

#include <sys/inotify.h>

#include "events.h"

struct vf_inotify_reader {
	struct vf_events *events;
	int fd; /* the instance, non-blocking */
	enum vf_wd which;
	uint8_t *buffer; /* VF_SOURCE_BUFFER bytes, 8-byte aligned */
	uint32_t size;	 /* of what was read */
	uint64_t at;	 /* where in the instance's stream it began, if read() counts that */
	uint64_t now_ns; /* CLOCK_MONOTONIC, when it was read */
	/* read(2) of the instance; *at: where in its stream the first byte was. */
	ssize_t (*read)(struct vf_inotify_reader *reader, void *buffer, size_t size, uint64_t *at);
	/* One event, for each inode that its watch stands for. */
	void (*one)(struct vf_inotify_reader *reader, const struct inotify_event *record,
		    struct vf_inode *inode);
	/* A rename, for each mount that shows both directories. */
	void (*pair)(struct vf_inotify_reader *reader, const struct inotify_event *from,
		     struct vf_inode *from_dir, const struct inotify_event *to,
		     struct vf_inode *to_dir);
	/* The host's queue was full: events were lost here. */
	void (*overflow)(struct vf_inotify_reader *reader);
};

/* Reads what waits, as much as there is room for: its size in bytes, 0 when nothing waits, or a
 * negative errno. */
int32_t vf_inotify_fetch(struct vf_inotify_reader *reader);
/* Calls one(), pair() and overflow() for what was read.  How many events those were. */
uint32_t vf_inotify_take(struct vf_inotify_reader *reader);
/* An entry or child event when the record has a name (inode is the directory), else one of the
 * inode itself; without the child. */
struct vf_change vf_inotify_change(const struct vf_inotify_reader *reader,
				   const struct inotify_event *record, struct vf_inode *inode);
/* The change's name with NUL. */
const char *vf_inotify_name(const struct vf_change *change, char buffer[VF_NAME_MAX + 1]);

/*
 * Makes one of the instances report bits (0: nothing) on this inode, as vf_source_ops.mark. others:
 * what it is to report besides on the same object of the host, for inodes that share *wd.
 */
int vf_inotify_watch(struct vf_events *events, enum vf_wd which, struct vf_inode *inode,
		     uint32_t bits, uint32_t others, int32_t *wd);

#endif
