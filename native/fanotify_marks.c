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
#include "proc_name.h"

static bool is_covered(struct vf_events *events, const struct vf_inode *inode)
{
	return events->config.filesystem_mask && vf_inode_on_root_fs(events->share, inode);
}

static uint64_t with_host_moves(struct vf_events *events, uint64_t bits)
{
	const uint64_t halves = VF_FS_MOVED_FROM | VF_FS_MOVED_TO;

	if (events->config.host_mask & VF_FS_RENAME)
		return bits & halves ? (bits & ~halves) | VF_FS_RENAME : bits;
	return bits & VF_FS_RENAME ? (bits & ~VF_FS_RENAME) | halves : bits;
}

/* What the host is to report on this inode alone, so that the guest gets what it watches. */
static uint64_t bits_of(struct vf_events *events, const struct vf_inode *inode, uint64_t mask)
{
	bool dir = vf_inode_type(inode) == S_IFDIR;
	uint64_t bits = with_host_moves(events, mask & VF_FANOTIFY_EVENTS);

	if (!dir)
		bits &= ~(VF_FS_ENTRY_EVENTS | VF_FS_RENAME);
	/* The end of an object whose descriptor we hold is seen by other signs. */
	if (bits & VF_FS_DELETE_SELF)
		bits |= dir ? VF_FS_ATTRIB | VF_FS_MOVE_SELF : VF_FS_ATTRIB;
	bits &= events->config.host_mask;
	if (is_covered(events, inode))
		bits &= ~events->config.filesystem_mask;
	if (bits && dir)
		bits |= VF_FS_ISDIR | (mask & VF_FS_EVENT_ON_CHILD);
	return bits;
}

uint64_t vf_fanotify_covered(struct vf_events *events, const struct vf_inode *inode)
{
	const uint64_t halves = VF_FS_MOVED_FROM | VF_FS_MOVED_TO;
	uint64_t mask = is_covered(events, inode) ? events->config.filesystem_mask : 0;

	if (mask & (VF_FS_RENAME | halves))
		mask |= VF_FS_RENAME | halves;
	/* Of no use on an inode, either. */
	return mask | VF_FS_OPEN_EXEC;
}

static int change_mark(struct vf_events *events, struct vf_inode *inode, uint32_t how,
		       uint64_t bits)
{
	int fd = vf_inode_path_fd(events->share, inode);
	char name[PROC_NAME_SIZE];

	if (fd < 0)
		return fd;
	if (fanotify_mark(events->config.source_fd, how, bits, events->share->config.proc_fd_dir,
			  proc_name(name, fd)))
		return -errno;
	return 0;
}

static int replace_bits(struct vf_events *events, struct vf_inode *inode, uint64_t before,
			uint64_t after)
{
	int error = 0;

	if (after & ~before)
		error = change_mark(events, inode, FAN_MARK_ADD, after);
	if (error && error != events->mark_error) {
		vf_events_notice(events,
				 "fanotify_mark: %s; the guest misses events that it "
				 "watches for%s",
				 strerror(-error),
				 error == -ENOSPC ? " (fs.fanotify.max_user_marks)" : "");
		events->mark_error = error;
	}
	/* What it watches comes by the file system's mark, but for some events. */
	if (error && !(is_covered(events, inode) && error != -ENOSPC))
		return error;
	/* Fails when the object is gone, and its mark with it. */
	if (before & ~after)
		change_mark(events, inode, FAN_MARK_REMOVE, before & ~after);
	if (!before && after)
		vf_count(&events->host_marks);
	else if (before && !after)
		vf_count_n(&events->host_marks, UINT64_MAX);
	return 0;
}

/* ---- parents of watched directories ---------------------------------------------- */

/* What its mark has for watched directories in it, other than `but`, on whatever mount. */
static uint64_t bits_below(struct vf_events *events, struct vf_inode *inode,
			   const struct vf_inode *but)
{
	return vf_watches_have_wd(events->watches, VF_WD_SOURCE, vf_inode_slot(inode), but) ||
		       vf_inode_twin_is_marked(events->share, inode)
		   ? VF_FS_DELETE | VF_FS_ISDIR
		   : 0;
}

/* All but what is wanted for watched directories in it. */
static uint64_t bits_for_itself(struct vf_events *events, struct vf_inode *inode)
{
	uint64_t mask = vf_watch_mask(events->watches, inode);

	return bits_of(events, inode, mask) |
	       bits_of(events, inode, vf_inode_twins_watch_mask(events->share, inode));
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
	uint64_t itself;

	if (!parent)
		return;
	if (vf_inode_is_marked(parent) &&
	    !vf_watches_have_wd(events->watches, VF_WD_SOURCE, slot, dir)) {
		vf_inode_set_marked(parent, false);
		itself = bits_for_itself(events, parent);
		replace_bits(events, parent, itself | VF_FS_DELETE | VF_FS_ISDIR,
			     itself | bits_below(events, parent, dir));
	}
	vf_inode_put(events->share, parent);
}

static int32_t join_parent(struct vf_events *events, struct vf_inode *dir)
{
	struct vf_inode *parent = parent_of(events, dir);
	int32_t slot = -1;
	uint64_t itself;

	/* The share's root has none that the guest could know. */
	if (!parent)
		return -1;
	itself = bits_for_itself(events, parent) | bits_below(events, parent, dir);
	if (vf_inode_is_marked(parent) ||
	    !replace_bits(events, parent, itself, itself | VF_FS_DELETE | VF_FS_ISDIR)) {
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
	int32_t before = *wd;

	if (vf_inode_type(inode) != S_IFDIR || is_covered(events, inode))
		return;
	*wd = mask & events->config.host_mask & VF_FS_DELETE_SELF ? join_parent(events, inode) : -1;
	if (before >= 0 && before != *wd)
		leave_parent(events, inode, before);
}

/* ---- the source's part ---------------------------------------------------------------- */

int vf_fanotify_mark_inode(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
			   uint64_t new_mask, int32_t *wd)
{
	uint64_t others = bits_of(events, inode, vf_inode_twins_watch_mask(events->share, inode)) |
			  bits_below(events, inode, inode);
	int error = replace_bits(events, inode, bits_of(events, inode, old_mask) | others,
				 bits_of(events, inode, new_mask) | others);

	if (!error)
		change_parent(events, inode, new_mask, wd);
	return error;
}

void vf_fanotify_inode_gone(struct vf_events *events, struct vf_inode *inode)
{
	uint64_t others;

	if (!vf_inode_is_marked(inode))
		return;
	vf_inode_set_marked(inode, false);
	vf_watches_forget_wd(events->watches, VF_WD_SOURCE, vf_inode_slot(inode));
	others = bits_of(events, inode, vf_inode_twins_watch_mask(events->share, inode)) |
		 bits_below(events, inode, inode);
	replace_bits(events, inode, others | VF_FS_DELETE | VF_FS_ISDIR, others);
}
