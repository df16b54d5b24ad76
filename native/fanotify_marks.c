/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Marks of fanotify(7) on what the guest watches and no mark on a whole file
 * system reports.  Knows nothing of records.
 *
 * One object of the host has one mark, however many inodes it is in the share,
 * and the mark has the sum of what is wanted of it.
 *
 * The removal of a watched directory shows nowhere but in its parent (a file's
 * shows in its link count), so its parent is marked for DELETE, and the watch
 * keeps the parent's slot as its wd.
 */
#include <sys/fanotify.h>

#include "fanotify_marks.h"
#include "fanotify_move.h"
#include "proc_name.h"

/* A group that is asked for marks; two while the source moves from one to the other. */
struct group {
	int fd;
	uint64_t filesystem_mask;
	bool is_next; /* the one that it moves to */
};

static uint32_t groups_of(struct vf_events *events, struct group groups[2])
{
	int next = vf_fanotify_move_fd(events);

	groups[0] = (struct group){.fd = events->config.source_fd,
				   .filesystem_mask = atomic_load(&events->filesystem_mask)};
	groups[1] = (struct group){.fd = next, .is_next = true};
	return next < 0 ? 1 : 2;
}

static bool is_covered(struct vf_events *events, const struct group *group,
		       const struct vf_inode *inode)
{
	return group->filesystem_mask && vf_inode_on_root_fs(events->share, inode);
}

static uint64_t with_host_moves(struct vf_events *events, uint64_t bits)
{
	const uint64_t halves = VF_FS_MOVED_FROM | VF_FS_MOVED_TO;

	if (events->config.host_mask & VF_FS_RENAME)
		return bits & halves ? (bits & ~halves) | VF_FS_RENAME : bits;
	return bits & VF_FS_RENAME ? (bits & ~VF_FS_RENAME) | halves : bits;
}

/* What is wanted of the host about one object. */
struct wish {
	uint64_t itself, twins; /* what the guest watches on the inode, and on others that are it */
	bool below;		/* it has watched directories in it */
};
#define BELOW (VF_FS_DELETE | VF_FS_ISDIR)

static uint64_t bits_of(struct vf_events *events, const struct group *group,
			const struct vf_inode *inode, uint64_t mask)
{
	bool dir = vf_inode_type(inode) == S_IFDIR;
	uint64_t bits = with_host_moves(events, mask & VF_FANOTIFY_EVENTS);

	if (!dir)
		bits &= ~(VF_FS_ENTRY_EVENTS | VF_FS_RENAME);
	/* The end of an object whose descriptor we hold is seen by other signs. */
	if (bits & VF_FS_DELETE_SELF)
		bits |= dir ? VF_FS_ATTRIB | VF_FS_MOVE_SELF : VF_FS_ATTRIB;
	bits &= events->config.host_mask;
	if (is_covered(events, group, inode))
		bits &= ~group->filesystem_mask;
	if (bits && dir)
		bits |= VF_FS_ISDIR | (mask & VF_FS_EVENT_ON_CHILD);
	return bits;
}

/* What the host is to report on this inode alone, so that the guest gets what it watches. */
static uint64_t bits_for(struct vf_events *events, const struct group *group,
			 const struct vf_inode *inode, const struct wish *wish)
{
	uint64_t bits = bits_of(events, group, inode, wish->itself) |
			bits_of(events, group, inode, wish->twins);

	return wish->below && !is_covered(events, group, inode) ? bits | BELOW : bits;
}

uint64_t vf_fanotify_covered(struct vf_events *events, const struct vf_inode *inode)
{
	const uint64_t halves = VF_FS_MOVED_FROM | VF_FS_MOVED_TO;
	const struct group group = {.filesystem_mask = atomic_load(&events->filesystem_mask)};
	uint64_t mask = is_covered(events, &group, inode) ? group.filesystem_mask : 0;

	if (mask & (VF_FS_RENAME | halves))
		mask |= VF_FS_RENAME | halves;
	return mask;
}

static int change_mark(struct vf_events *events, const struct group *group, struct vf_inode *inode,
		       uint32_t how, uint64_t bits)
{
	int fd = vf_inode_path_fd(events->share, inode);
	char name[PROC_NAME_SIZE];

	if (fd < 0)
		return fd;
	if (fanotify_mark(group->fd, how, bits, events->share->config.proc_fd_dir,
			  proc_name(name, fd)))
		return -errno;
	return 0;
}

static void tell_refusal(struct vf_events *events, int error)
{
	if (error != events->mark_error)
		vf_events_notice(events,
				 "fanotify_mark: %s; the guest misses events that it "
				 "watches for%s",
				 strerror(-error),
				 error == -ENOSPC ? " (fs.fanotify.max_user_marks)" : "");
	events->mark_error = error;
}

static int replace_bits(struct vf_events *events, const struct group *group, struct vf_inode *inode,
			uint64_t before, uint64_t after)
{
	atomic_uint_fast64_t *count =
	    group->is_next ? vf_fanotify_move_marks(events) : &events->host_marks;
	int error = 0;

	if (after & ~before)
		error = change_mark(events, group, inode, FAN_MARK_ADD, after);
	if (error && group->is_next)
		return error;
	if (error)
		tell_refusal(events, error);
	/* What it watches comes by the file system's mark, but for some events. */
	if (error && !(is_covered(events, group, inode) && error != -ENOSPC))
		return error;
	/* Fails when the object is gone, and its mark with it. */
	if (before & ~after)
		change_mark(events, group, inode, FAN_MARK_REMOVE, before & ~after);
	if (!before && after)
		vf_count(count);
	else if (before && !after)
		vf_count_n(count, UINT64_MAX);
	return 0;
}

/* Whatever was wished before its first mark there, the next group has nothing of it. */
static void replace_next(struct vf_events *events, const struct group *group,
			 struct vf_inode *inode, uint64_t before, uint64_t after)
{
	bool moved = vf_inode_is_moved(inode) || vf_inode_twin_is_moved(events->share, inode);
	int error = replace_bits(events, group, inode, moved ? before : 0, after);

	if (!error)
		vf_inode_set_moved(inode, after);
	else if (error != -ESTALE && error != -ENOENT && vf_inode_on_root_fs(events->share, inode))
		vf_fanotify_move_failed(events, error);
}

static int replace_wish(struct vf_events *events, struct vf_inode *inode, const struct wish *before,
			const struct wish *after)
{
	struct group groups[2];
	uint32_t n = groups_of(events, groups);
	int error =
	    replace_bits(events, &groups[0], inode, bits_for(events, &groups[0], inode, before),
			 bits_for(events, &groups[0], inode, after));

	if (n > 1 && !error)
		replace_next(events, &groups[1], inode, bits_for(events, &groups[1], inode, before),
			     bits_for(events, &groups[1], inode, after));
	return error;
}

/* Are there watched directories in it, other than `but`, on whatever mount? */
static bool has_below(struct vf_events *events, struct vf_inode *inode, const struct vf_inode *but)
{
	return vf_watches_have_wd(events->watches, VF_WD_SOURCE, vf_inode_slot(inode), but) ||
	       vf_inode_twin_is_marked(events->share, inode);
}

/* What is wanted now, but for the watched directory `but` in it. */
static struct wish wish_without(struct vf_events *events, struct vf_inode *inode,
				const struct vf_inode *but)
{
	return (struct wish){
	    .itself = vf_watch_mask(events->watches, inode),
	    .twins = vf_inode_twins_watch_mask(events->share, inode),
	    .below = has_below(events, inode, but),
	};
}

static struct vf_inode *parent_of(struct vf_events *events, struct vf_inode *inode)
{
	struct vf_inode *found[8], *parent = NULL;
	uint32_t n = vf_inodes_of_name(events->share, inode, "..", found, 8);

	for (uint32_t i = 0; i < n; i++) {
		if (!parent && vf_inode_mount(found[i]) == vf_inode_mount(inode))
			parent = found[i];
		else
			vf_inode_put(events->share, found[i]);
	}
	return parent;
}

/* The watch of this directory no longer counts on the parent in this slot. */
static void leave_parent(struct vf_events *events, const struct vf_inode *dir, int32_t slot)
{
	struct vf_inode *parent = vf_inode_in_slot(events->share, slot);
	struct wish before, after;

	if (!parent)
		return;
	if (vf_inode_is_marked(parent) &&
	    !vf_watches_have_wd(events->watches, VF_WD_SOURCE, slot, dir)) {
		vf_inode_set_marked(parent, false);
		before = after = wish_without(events, parent, dir);
		before.below = true;
		replace_wish(events, parent, &before, &after);
	}
	vf_inode_put(events->share, parent);
}

static bool has_parents_mark(struct vf_events *events, const struct vf_inode *parent)
{
	return vf_inode_is_marked(parent) &&
	       (vf_fanotify_move_fd(events) < 0 || vf_inode_is_moved(parent));
}

static int32_t join_parent(struct vf_events *events, struct vf_inode *dir)
{
	struct vf_inode *parent = parent_of(events, dir);
	struct wish before, after;
	int32_t slot = -1;

	/* The share's root has none that the guest could know. */
	if (!parent)
		return -1;
	before = after = wish_without(events, parent, dir);
	after.below = true;
	if (has_parents_mark(events, parent) || !replace_wish(events, parent, &before, &after)) {
		vf_inode_set_marked(parent, true);
		slot = vf_inode_slot(parent);
	}
	vf_inode_put(events->share, parent);
	/* That was the last reference, perhaps: its slot may be another inode's soon. */
	return vf_inode_is_marked(parent) ? slot : -1;
}

static void change_parent(struct vf_events *events, struct vf_inode *inode, uint64_t mask,
			  int32_t *wd)
{
	struct group groups[2];
	int32_t before = *wd;

	if (vf_inode_type(inode) != S_IFDIR ||
	    (groups_of(events, groups) == 1 && is_covered(events, &groups[0], inode)))
		return;
	*wd = mask & events->config.host_mask & VF_FS_DELETE_SELF ? join_parent(events, inode) : -1;
	if (before >= 0 && before != *wd)
		leave_parent(events, inode, before);
}

/* ---- the source's part ---------------------------------------------------------------- */

int vf_fanotify_mark_inode(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
			   uint64_t new_mask, int32_t *wd)
{
	struct wish before = wish_without(events, inode, inode), after = before;
	int error;

	before.itself = old_mask;
	after.itself = new_mask;
	error = replace_wish(events, inode, &before, &after);
	if (!error)
		change_parent(events, inode, new_mask, wd);
	return error;
}

void vf_fanotify_inode_gone(struct vf_events *events, struct vf_inode *inode)
{
	struct wish before, after;

	if (!vf_inode_is_marked(inode))
		return;
	vf_inode_set_marked(inode, false);
	vf_watches_forget_wd(events->watches, VF_WD_SOURCE, vf_inode_slot(inode));
	before = after = wish_without(events, inode, inode);
	before.below = true;
	replace_wish(events, inode, &before, &after);
}
