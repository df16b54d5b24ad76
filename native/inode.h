/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inode table: every object that the guest holds by nodeid.
 *
 * A nodeid is (reuse count of the slot << 32 | slot): it is never given to a
 * second object, and its generation is the reuse count.  The root is slot 1,
 * reuse 0: FUSE_ROOT_ID.  Slots are type-stable memory, so a stale nodeid is
 * recognised without a lock.  Objects are found by (device, inode number) and
 * by file handle where no descriptor pins the inode number.
 */
#ifndef VHOSTFS_INODE_H
#define VHOSTFS_INODE_H

#include "core.h"

struct vf_inode; /* inode.c has the layout (a static inline may be put here where it is hot) */

struct vf_inode_table *vf_inode_table_new(struct vf_share *share, int *error);
void vf_inode_table_free(struct vf_inode_table *table);
/* Forgets all but the root (a new session). No request is under way. */
void vf_inode_table_clear(struct vf_inode_table *table);

/* Takes a reference for the length of an operation; NULL: the guest holds no such nodeid (answer
 * ESTALE). */
struct vf_inode *vf_inode_get(struct vf_share *share, uint64_t nodeid);
void vf_inode_put(struct vf_share *share, struct vf_inode *inode);

uint64_t vf_inode_nodeid(const struct vf_inode *inode);
uint32_t vf_inode_generation(const struct vf_inode *inode);
/* S_IFMT bits, fixed for the life of an inode. */
mode_t vf_inode_type(const struct vf_inode *inode);
/* A number for the mount on which it lies; one host object on two mounts is two inodes. */
uint16_t vf_inode_mount(const struct vf_inode *inode);

/* watch.c: whether the guest watches it; told to the table so that others cost one load. */
bool vf_inode_is_watched(const struct vf_inode *inode);
void vf_inode_set_watched(struct vf_inode *inode, bool watched);
/* A source's: the host has something for it although the guest may not watch it. */
bool vf_inode_is_marked(const struct vf_inode *inode);
void vf_inode_set_marked(struct vf_inode *inode, bool marked);
/* watch_share.c: what the directory had in it before it was marked was told to nobody. */
void vf_inode_set_unseen(struct vf_inode *inode);
/* It no longer is; was it? */
bool vf_inode_take_unseen(struct vf_inode *inode);
/* fanotify_marks.c: it has a mark in the group that the source moves to. */
bool vf_inode_is_moved(const struct vf_inode *inode);
void vf_inode_set_moved(struct vf_inode *inode, bool moved);
/*
 * Is every change to it, by whatever name, found by its handle, and on the share's own mount?  It
 * counts for what is looked at on the host after this was asked.
 */
bool vf_inode_is_told(const struct vf_share *share, const struct vf_inode *inode);
/* A number that no other inode has at the same time. */
int32_t vf_inode_slot(const struct vf_inode *inode);
/* All numbers in use are below this. */
uint32_t vf_inode_slots(struct vf_share *share);
/* Is there one lookup count that the guest has not given back?  It may change at once. */
bool vf_inode_is_held_once(struct vf_share *share, const struct vf_inode *inode);
/* The inode that has it now, referenced, or NULL. */
struct vf_inode *vf_inode_in_slot(struct vf_share *share, int32_t slot);
/* route.c: true for the first who tells the guest that the object was deleted. */
bool vf_inode_tell_deleted(struct vf_inode *inode);
/* Has it been told? */
bool vf_inode_was_told_deleted(const struct vf_inode *inode);

/*
 * An O_PATH descriptor for a referenced inode: the table's own (valid as long as
 * the reference) or one opened by file handle.  Negative errno (ESTALE: the
 * object is gone from the host).
 */
int vf_inode_path_fd(struct vf_share *share, struct vf_inode *inode);
/*
 * Opens the object itself with these open(2) flags (O_CLOEXEC is added,
 * O_NOFOLLOW and O_CREAT are removed), by /proc/self/fd or by file handle.  Only regular files and
 * directories: anything else gives -ENXIO, so that no FIFO or device can be opened.
 */
int vf_inode_open(struct vf_share *share, struct vf_inode *inode, int flags);

/*
 * The object `name` in directory dir (whose descriptor is dir_fd): finds or makes its inode, adds
 * one to its lookup count and fills out (attributes, timeouts, submount flag).  The name has been
 * checked. Never follows a symlink.  Negative errno.
 */
int vf_inode_lookup(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
		    struct fuse_entry_out *out);
/* The same for an object that path_fd (any descriptor) refers to, as for O_TMPFILE. path_fd stays
 * the caller's. */
int vf_inode_lookup_fd(struct vf_thread *t, struct vf_inode *dir, int fd,
		       struct fuse_entry_out *out);
/* The same for a name that was made just now, which is not likely to be known. */
int vf_inode_lookup_new(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
			struct fuse_entry_out *out);
/* The same for a name that getdents64(2) gave, with its d_ino: that saves a system call. */
int vf_inode_lookup_entry(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
			  uint64_t ino, struct fuse_entry_out *out);
/* The same for a referenced inode, as a new name in dir (the inode itself when there is none). */
int vf_inode_lookup_self(struct vf_thread *t, struct vf_inode *dir, struct vf_inode *inode,
			 struct fuse_entry_out *out);
/* Holds the directory of this name as a lookup of the guest's would; anything else is -ENOTDIR. */
int vf_inode_hold_directory(struct vf_share *share, struct vf_inode *dir, const char *name,
			    uint64_t *nodeid);
/* The parent of a referenced directory, which must lie in the share: -ESTALE. */
int vf_inode_lookup_parent(struct vf_thread *t, struct vf_inode *inode, struct fuse_entry_out *out);
/*
 * Before a name is removed or replaced: when its object is held by file handle only, it gets its
 * descriptor back, without which its last link would take it from the guest.  Returns a reference
 * to be given back after the removal, or NULL.
 */
struct vf_inode *vf_inode_guard_removal(struct vf_share *share, struct vf_inode *dir, int dir_fd,
					const char *name);
/*
 * known_name.c: the inode that the guest holds for this name on the host, referenced; NULL: none,
 * or it is not certain.
 */
struct vf_inode *vf_inode_known(struct vf_share *share, struct vf_inode *dir, const char *name);
/*
 * known_name.c: a moment ago something was done by this name, of which vf_inode_known() knows
 * nothing.  Can it have been done to one of these nodeids?  No, where all of them have other names,
 * or have gone while something has this one.
 */
bool vf_inode_may_have_had_name(struct vf_share *share, struct vf_inode *dir, const char *name,
				const uint64_t *nodeids, uint32_t n);
/* Takes n from the lookup count; too large an n is cut to what is there. */
void vf_inode_forget(struct vf_share *share, uint64_t nodeid, uint64_t n);
/*
 * To free a file without a name that is smaller than this takes the host some tens of microseconds.
 * Bytes.
 */
#define VF_LARGE_FILE (1u << 20)
/* This file may have become as large as that. */
void vf_inode_note_large(struct vf_share *share, uint64_t nodeid);
/* What the host says of this object: so many blocks of 512 bytes. */
void vf_inode_note_blocks(struct vf_inode *inode, uint64_t blocks);

/* Closes descriptors that inodes hold until `wanted` were freed; the number freed. Called on
 * EMFILE. */
uint32_t vf_inode_shed_fds(struct vf_share *share, uint32_t wanted);
/*
 * After an open has failed with this errno: true when descriptors were freed, so that it is worth
 * another try.  errno is left as it was.  Not while acting as the guest's caller.
 */
bool vf_fd_shortage(struct vf_share *share, int error);
void vf_inode_get_stats(struct vf_share *share, struct vf_share_stats *stats);

/*
 * op_names.c: the directory of this nodeid, referenced, and its descriptor.  -ESTALE, -ENOTDIR, or
 * what the host says; then there is no reference.
 */
int vf_dir_get(struct vf_share *share, uint64_t nodeid, struct vf_inode **dir);

/* attr.c: host attributes as the guest sees them (ids mapped). */
void vf_fill_attr(struct vf_share *share, const struct stat *st, struct fuse_attr *attr);

#endif
