/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Watches of inotify(7) for what the guest watches; see inotify_reader.h.
 *
 * The removal of a directory whose descriptor the server holds shows nowhere
 * but in its parent, so that is watched for DELETE too, and the directory's
 * watch keeps the parent's number, and one that is made of it and the name.
 */
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "inotify_reader.h"
#include "name_hash.h"
#include "proc_name.h"

/* What a parent is asked for. */
#define REMOVALS (IN_DELETE | IN_ONLYDIR)

static int instance(const struct vf_events *events, enum vf_wd which)
{
	return which == VF_WD_ORDER ? events->config.order_fd : events->config.source_fd;
}

static atomic_uint_fast64_t *count(struct vf_events *events, enum vf_wd which)
{
	return which == VF_WD_ORDER ? &events->order_watches : &events->host_marks;
}

/* Does anything but this inode need the watch of this number? */
static bool is_needed(struct vf_events *events, enum vf_wd which, int32_t wd,
		      const struct vf_inode *but)
{
	return vf_watches_have_wd(events->watches, which, wd, but) ||
	       vf_watches_have_wd(events->watches, VF_WD_PARENT, wd, but);
}

static void end_watch(struct vf_events *events, enum vf_wd which, int32_t wd)
{
	/* Fails when the object is gone, and its watch with it. */
	inotify_rm_watch(instance(events, which), wd);
	vf_count_n(count(events, which), UINT64_MAX);
}

uint64_t vf_inotify_bits(const struct vf_inode *inode, uint64_t mask)
{
	uint64_t bits = mask & VF_INOTIFY_EVENTS;
	bool dir = vf_inode_type(inode) == S_IFDIR;

	if (mask & VF_FS_RENAME)
		bits |= VF_FS_MOVED_FROM | VF_FS_MOVED_TO;
	if (!dir)
		bits &= ~VF_FS_ENTRY_EVENTS;
	/* The end of an object whose descriptor we hold shows in its link count, and in its name.
	 */
	if (bits & VF_FS_DELETE_SELF)
		bits |= VF_FS_ATTRIB | (dir ? VF_FS_MOVE_SELF : 0);
	return bits;
}

static int watch_itself(struct vf_events *events, enum vf_wd which, struct vf_inode *inode,
			uint64_t bits, int32_t *wd)
{
	uint64_t others =
	    vf_inotify_bits(inode, vf_watches_wd_mask(events->watches, which, *wd, inode));
	/* It is noted when all has gone well. */
	uint64_t before = vf_inotify_bits(inode, vf_watch_mask(events->watches, inode));
	char name[PROC_NAME_SIZE];
	uint32_t how = 0;
	int path_fd, got;

	if (which == VF_WD_SOURCE)
		before &= events->config.host_mask;
	if (vf_watches_have_wd(events->watches, VF_WD_PARENT, *wd, inode))
		others |= VF_FS_DELETE;
	if (!bits) {
		if (*wd >= 0 && !others)
			end_watch(events, which, *wd);
		*wd = -1;
		return 0;
	}
	/*
	 * The host has one watch for an object, however many nodeids it has in the share: a new
	 * one must not take away what another asked for.  Nor is anything taken away without need:
	 * Linux makes the mask empty before it sets it, and what happens meanwhile is not told.
	 */
	if (*wd >= 0)
		bits |= others;
	if (*wd < 0 || !(before & ~bits))
		how = IN_MASK_ADD;
	path_fd = vf_inode_path_fd(events->share, inode);
	if (path_fd < 0)
		return path_fd;
	/* The descriptor's name, in the directory where this thread is: vf_thread_init(). */
	got = inotify_add_watch(instance(events, which), proc_name(name, path_fd),
				(uint32_t)bits | how);
	if (got < 0)
		return -errno;
	if (got != *wd && !is_needed(events, which, got, inode))
		vf_count(count(events, which));
	*wd = got;
	return 0;
}

/* ---- the parent ------------------------------------------------------------------ */

int32_t vf_inotify_name_number(int32_t parent, const char *name, uint32_t namelen)
{
	return (int32_t)(vf_name_hash((uint32_t)parent, name, namelen) >> 33);
}

/* The last name of this descriptor's path; a directory's that is gone is still known. */
static uint32_t name_of(struct vf_events *events, struct vf_inode *inode, int fd, char *path,
			const char **name)
{
	static const char gone[] = " (deleted)";
	const uint32_t gone_len = sizeof(gone) - 1;
	char link[PROC_NAME_SIZE];
	ssize_t n = readlink(proc_name(link, fd), path, PATH_MAX);
	uint32_t len;

	if (n <= 0 || n == PATH_MAX)
		return 0;
	path[n] = 0;
	*name = strrchr(path, '/');
	*name = *name ? *name + 1 : path;
	len = (uint32_t)strlen(*name);
	if (len > gone_len && !strcmp(*name + len - gone_len, gone) &&
	    vf_events_is_gone(events, inode))
		len -= gone_len;
	return len;
}

static int join_parent(struct vf_events *events, enum vf_wd which, struct vf_inode *dir,
		       int32_t wd[VF_N_WDS])
{
	int fd = vf_inode_path_fd(events->share, dir), got;
	char link[PROC_NAME_SIZE], parent[PROC_NAME_SIZE + 4], path[PATH_MAX + 1];
	const char *name;
	uint32_t namelen;

	if (fd < 0)
		return fd;
	snprintf(parent, sizeof(parent), "%s/..", proc_name(link, fd));
	got = inotify_add_watch(instance(events, which), parent, REMOVALS | IN_MASK_ADD);
	if (got < 0)
		return -errno;
	if (!is_needed(events, which, got, NULL))
		vf_count(count(events, which));
	wd[VF_WD_PARENT] = got;
	namelen = name_of(events, dir, fd, path, &name);
	if (namelen)
		wd[VF_WD_NAME] = vf_inotify_name_number(got, name, namelen);
	return 0;
}

int vf_inotify_watch(struct vf_events *events, enum vf_wd which, struct vf_inode *inode,
		     uint64_t bits, int32_t wd[VF_N_WDS])
{
	int32_t parent = wd[VF_WD_PARENT];
	int error = watch_itself(events, which, inode, bits, &wd[which]);

	if (error)
		return error;
	wd[VF_WD_PARENT] = wd[VF_WD_NAME] = -1;
	/* The share's root has none. */
	if ((bits & VF_FS_DELETE_SELF) && vf_inode_type(inode) == S_IFDIR &&
	    vf_inode_nodeid(inode) != FUSE_ROOT_ID)
		error = join_parent(events, which, inode, wd);
	if (parent >= 0 && parent != wd[VF_WD_PARENT] && !is_needed(events, which, parent, inode))
		end_watch(events, which, parent);
	/* What happens to itself is told all the same. */
	if (error && error != events->mark_error)
		vf_events_notice(events,
				 "inotify_add_watch of a parent: %s; the removal of some "
				 "directories is not told",
				 strerror(-error));
	if (error)
		events->mark_error = error;
	return 0;
}
