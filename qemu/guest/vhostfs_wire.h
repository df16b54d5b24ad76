/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * vhostfs: what is on the wire
 *
 * The numbers and layouts are those of docs/protocol.md of vhostfs.
 */
#ifndef _VHOSTFS_WIRE_H
#define _VHOSTFS_WIRE_H

#include <linux/bits.h>
#include <linux/fsnotify_backend.h>
#include <linux/types.h>

#define VHOSTFS_CONFIG_BUF_SIZE	40	/* le32 notify_buf_size */

#define FUSE_NOTIFY_FSNOTIFY	0x5800
#define FUSE_FSNOTIFY_INIT	0x5800
#define FUSE_FSNOTIFY_WATCH	0x5801
#define FUSE_FSNOTIFY_PARK	0x5802

#define FUSE_FSNOTIFY_MAJOR	1
#define FUSE_FSNOTIFY_MINOR	0

/* Flags of FUSE_FSNOTIFY_INIT */
#define FUSE_FSNOTIFY_VIRTQUEUE	BIT_ULL(0)
#define FUSE_FSNOTIFY_PARKED	BIT_ULL(1)
#define FUSE_FSNOTIFY_RENAME	BIT_ULL(3)
#define FUSE_FSNOTIFY_CHILD	BIT_ULL(4)
#define FUSE_FSNOTIFY_INVALIDATE BIT_ULL(5)
#define FUSE_FSNOTIFY_WATCH_FILESYSTEM BIT_ULL(6)
#define FUSE_FSNOTIFY_PARENT	BIT_ULL(7)
#define FUSE_FSNOTIFY_DEFERRED_OPEN BIT_ULL(9)

/* Flags of FUSE_FSNOTIFY_WATCH */
#define FSNOTIFY_WATCH_FILESYSTEM BIT(0)

/* Flags of an element */
#define FSNOTIFY_SPLIT_RENAME	BIT(0)
#define FSNOTIFY_FOR_PARENT	BIT(1)
#define FSNOTIFY_CACHES		BIT(2)
#define FSNOTIFY_UNLINKED	BIT(3)

/* In the mask of FUSE_FSNOTIFY_WATCH: somebody does not want what is unlinked */
#define VHOSTFS_EXCL_UNLINK	BIT(26)		/* IN_EXCL_UNLINK */

struct fuse_fsnotify_init_in {
	__le32 major;
	__le32 minor;
	__le64 flags;
	__le64 mask;
	__le32 buf_size;
	__le32 reserved;
};

struct fuse_fsnotify_init_out {
	__le32 major;
	__le32 minor;
	__le64 flags;
	__le64 mask;
	__le32 notify_buf_size;
	__le32 max_watches;
	__le32 max_parked;
	__le32 reserved;
};

struct fuse_fsnotify_watch_in {
	__le64 mask;
	__le32 generation;
	__le32 flags;
};

struct vhostfs_wire_element {
	/* fuse_out_header */
	__le32 len;
	__le32 error;
	__le64 unique;

	__le64 nodeid;
	__le32 generation;
	__le32 reserved;
	__le64 mask;
	__le32 namelen;
	__le32 cookie;
	__le32 flags;
	__le32 child_generation;
	__le64 child_nodeid;
	char name[];
};

#define VHOSTFS_MIN_BUF_SIZE	sizeof(struct vhostfs_wire_element)
#define VHOSTFS_MAX_BUF_SIZE	4096
/* Room for the longest name; buffers are never smaller */
#define VHOSTFS_ELEMENT_SIZE	320

/* Events in a directory's listing; an element carries one of them */
#define VHOSTFS_ENTRY_EVENTS	(FS_CREATE | FS_DELETE | FS_MOVED_FROM | \
				 FS_MOVED_TO)
/* Events on an object, which watchers of its parent get as well */
#define VHOSTFS_CHILD_EVENTS	(FS_ACCESS | FS_MODIFY | FS_ATTRIB | \
				 FS_CLOSE_WRITE | FS_CLOSE_NOWRITE | \
				 FS_OPEN | FS_OPEN_EXEC)
/* Those that the VFS raises with a path; by that it finds what is unlinked */
#define VHOSTFS_PATH_EVENTS	(VHOSTFS_CHILD_EVENTS & ~FS_ATTRIB)
/* Events that only watchers of the object itself get */
#define VHOSTFS_SELF_EVENTS	(FS_MOVE_SELF | FS_DELETE_SELF)
#define VHOSTFS_EVENTS		(VHOSTFS_ENTRY_EVENTS | VHOSTFS_CHILD_EVENTS | \
				 VHOSTFS_SELF_EVENTS)

/* What a driver that holds all directories has to hear of */
#define VHOSTFS_TREE_EVENTS	(VHOSTFS_ENTRY_EVENTS | FS_DELETE_SELF | \
				 FS_EVENT_ON_CHILD)

#endif /* _VHOSTFS_WIRE_H */
