// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: wakes the watchers of this guest
 *
 * Raises one event by fs/notify, on the objects that it is given, whose caches
 * are right by then. Which event that is, vhostfs_event.c decides.
 */

#include <linux/dcache.h>
#include <linux/fanotify.h>
#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/mount.h>
#include "vhostfs_internal.h"

static inline u32 vhostfs_isdir(const struct inode *inode)
{
	return inode && S_ISDIR(inode->i_mode) ? FS_ISDIR : 0;
}

/*
 * fsnotify() wants to be told the superblock and, in a rename, the new name by
 * a dentry. This one is in no tree: it is only looked at while the event is
 * raised, and what is of use is copied. One is enough, for one worker raises.
 */
static struct dentry *vhostfs_stand_in(struct vhostfs_notify *n,
				       struct inode *dir, struct dentry *parent,
				       struct inode *inode,
				       const struct qstr *name)
{
	struct dentry *dentry = &n->unknown_dentry;

	dentry->d_sb = dir->i_sb;
	dentry->d_parent = parent ? parent : dentry;
	dentry->d_inode = inode;
#if VHOSTFS_KERNEL < 616
	dentry->d_name = *name;
#else
	dentry->__d_name = *name;
#endif
	return dentry;
}

/* Whether the mark is one of a watcher that is still there */
bool vhostfs_is_attached(const struct fsnotify_mark *mark)
{
	return READ_ONCE(mark->flags) & FSNOTIFY_MARK_FLAG_ATTACHED;
}

/* Can its group be told of what happened by no mount of this guest? */
bool vhostfs_reports_fids(const struct fsnotify_group *group)
{
	return group->fanotify_data.flags &
	       (FAN_REPORT_FID | FAN_REPORT_DIR_FID);
}

#if VHOSTFS_KERNEL >= 610
/* The group's mark on another object of an event, for what it ignores; true: it wants the event */
static bool vhostfs_other_mark(struct fsnotify_iter_info *iter,
			       enum fsnotify_iter_type type, void *obj,
			       enum fsnotify_obj_type obj_type, u32 mask)
{
	struct fsnotify_mark *mark;

	if (!obj)
		return false;
	mark = fsnotify_find_mark(obj, obj_type, iter->current_group);
	if (!mark)
		return false;
	iter->marks[type] = mark;
	if (type == FSNOTIFY_ITER_TYPE_PARENT &&
	    !((mark->mask | mark->ignore_mask) & FS_EVENT_ON_CHILD))
		return false;
	fsnotify_iter_set_report_type(iter, type);
	return (mask & mark->mask & ALL_FSNOTIFY_EVENTS) &&
	       fsnotify_mask_applicable(mark->mask, mask & FS_ISDIR, type);
}

static void vhostfs_raise_on_mount(struct fsnotify_mark *mark, u32 mask,
				   const void *data, int data_type,
				   struct inode *dir, const struct qstr *name,
				   struct inode *inode, struct super_block *sb)
{
	struct fsnotify_group *group = mark->group;
	struct fsnotify_iter_info iter = { .current_group = group };
	bool told;
	int type;

	iter.marks[FSNOTIFY_ITER_TYPE_VFSMOUNT] = mark;
	fsnotify_iter_set_report_type(&iter, FSNOTIFY_ITER_TYPE_VFSMOUNT);
	told = vhostfs_other_mark(&iter, FSNOTIFY_ITER_TYPE_SB, sb,
				  FSNOTIFY_OBJ_TYPE_SB, mask);
	told |= vhostfs_other_mark(&iter, FSNOTIFY_ITER_TYPE_INODE, inode,
				   FSNOTIFY_OBJ_TYPE_INODE, mask);
	told |= vhostfs_other_mark(&iter, FSNOTIFY_ITER_TYPE_PARENT, dir,
				   FSNOTIFY_OBJ_TYPE_INODE, mask);
	/* By its other marks it was told already */
	if (!told)
		group->ops->handle_event(group, mask, data, data_type, dir,
					 name, 0, &iter);
	for (type = 0; type < FSNOTIFY_ITER_TYPE_COUNT; type++)
		if (iter.marks[type] && iter.marks[type] != mark)
			fsnotify_put_mark(iter.marks[type]);
}
#endif

/*
 * fsnotify() finds marks on a mount by the path that was used, and the host
 * uses none of this guest's. All mounts of the superblock show what happened,
 * so who has marked any is told, where he can be: by file handle.
 */
static void vhostfs_raise_on_mounts(struct vhostfs_notify *n, u32 mask,
				    const void *data, int data_type,
				    struct inode *dir, const struct qstr *name,
				    struct inode *inode, struct super_block *sb)
{
#if VHOSTFS_KERNEL >= 610
	struct fsnotify_mark *marks[VHOSTFS_MAX_MOUNT_MARKS];
	struct vhostfs_mount_mark *each;
	unsigned int count = 0, i;

	if (!READ_ONCE(n->nmount_marks))
		return;
	spin_lock(&n->watch_lock);
	list_for_each_entry(each, &n->mount_marks, list) {
		if (each->sb != sb || !vhostfs_is_attached(each->mark) ||
		    !(each->mark->mask & mask & ALL_FSNOTIFY_EVENTS) ||
		    !vhostfs_reports_fids(each->mark->group))
			continue;
		refcount_inc(&each->mark->refcnt);
		marks[count++] = each->mark;
	}
	spin_unlock(&n->watch_lock);
	for (i = 0; i < count; i++) {
		vhostfs_raise_on_mount(marks[i], mask & ~FS_EVENT_ON_CHILD,
				       data, data_type, dir, name, inode, sb);
		fsnotify_put_mark(marks[i]);
	}
#endif
}

/* An event in a directory's listing; child: NULL if this guest does not know it */
void vhostfs_raise_entry(struct vhostfs_notify *n, struct inode *dir,
			 struct inode *child,
			 const struct vhostfs_event *event, u32 cookie)
{
	struct qstr name = { .name = event->name, .len = event->namelen };
	u32 mask = event->mask | vhostfs_isdir(child);

	vhostfs_count(n, VHOSTFS_RAISED);
	if (child && !(mask & FS_DELETE))
		vhostfs_remember(n, child);
	if (child && child->i_sb == dir->i_sb)
		fsnotify(mask, child, FSNOTIFY_EVENT_INODE, dir, &name, NULL,
			 cookie);
	else
		fsnotify(mask, vhostfs_stand_in(n, dir, NULL, NULL, &name),
			 FSNOTIFY_EVENT_DENTRY, dir, &name, NULL, cookie);
}

/*
 * A directory that nobody can watch, and that nobody finds by its handle: stands
 * for the one that is at this name and that this guest does not know.
 */
static struct inode *vhostfs_unknown_dir(struct vhostfs_notify *n,
					 struct super_block *sb,
					 const struct vhostfs_event *event)
{
	struct inode *inode = &n->unknown.inode;

	inode->i_sb = sb;
	inode->i_mode = S_IFDIR;
	inode->i_generation = event->child_generation;
	n->unknown.nodeid = event->child_nodeid;
	return inode;
}

/* The same for any object, of which nothing is said */
static struct inode *vhostfs_unknown(struct vhostfs_notify *n,
				     struct super_block *sb)
{
	struct inode *inode = &n->unknown.inode;

	inode->i_sb = sb;
	inode->i_mode = 0;
	return inode;
}

/*
 * The path of what happened through a name that is gone, for fsnotify() to find
 * out that and nothing else: it leaves the event out for inotify's marks with
 * IN_EXCL_UNLINK. The dentry is in no hash, and not the root of a tree. It is of
 * no type, either, so who wants paths to open (fanotify, without file ids) is
 * told nothing, as of all that the host does. The mount has no marks; of it
 * fsnotify() looks at nothing else. It is part of a structure that only the
 * kernel knows, and so lies amid zeroes that are more than that takes.
 */
static struct path *vhostfs_unlinked(struct vhostfs_notify *n,
				     struct inode *of, struct inode *inode,
				     const struct qstr *name)
{
	struct path *path = &n->unlinked;

	path->dentry = vhostfs_stand_in(n, of, &n->unknown_parent, inode, name);
	path->mnt = (struct vfsmount *)&n->no_mount[VHOSTFS_NO_MOUNT_SIZE / 2];
	return path;
}

/*
 * An event on an object, by its name in dir: once to who watches dir's children
 * and once to who watches the object, as fsnotify_parent() does for a dentry.
 *
 * Who watches a directory may never have looked at what is in it. Then there is
 * no inode to give to fsnotify(), which would take this for an event on the
 * directory itself. An inode that nobody can watch takes its place; also as the
 * object, if that is a directory, of which fanotify says nothing but the handle.
 */
void vhostfs_raise_child(struct vhostfs_notify *n, struct inode *dir,
			 struct inode *child,
			 const struct vhostfs_event *event, u32 bit)
{
	struct qstr name = { .name = event->name, .len = event->namelen };
	u32 mask = event->mask | vhostfs_isdir(child);

	vhostfs_count(n, VHOSTFS_RAISED);
	if (child)
		vhostfs_remember(n, child);
	if (bit & fsnotify_inode_watches_children(dir))
		mask |= FS_EVENT_ON_CHILD;
	if (!child && (mask & FS_ISDIR))
		child = vhostfs_unknown_dir(n, dir->i_sb, event);
	if (child && child->i_sb == dir->i_sb) {
		if (event->flags & FSNOTIFY_UNLINKED)
			fsnotify(mask, vhostfs_unlinked(n, dir, child, &name),
				 FSNOTIFY_EVENT_PATH, dir, &name, child, 0);
		else
			fsnotify(mask, child, FSNOTIFY_EVENT_INODE, dir, &name,
				 child, 0);
		vhostfs_raise_on_mounts(n, mask, child, FSNOTIFY_EVENT_INODE,
					dir, &name, child, dir->i_sb);
	} else {
		struct dentry *entry = vhostfs_stand_in(n, dir, NULL, NULL,
							&name);

		if (event->flags & FSNOTIFY_UNLINKED)
			fsnotify(mask, vhostfs_unlinked(n, dir, NULL, &name),
				 FSNOTIFY_EVENT_PATH, dir, &name,
				 vhostfs_unknown(n, dir->i_sb), 0);
		else
			fsnotify(mask, entry, FSNOTIFY_EVENT_DENTRY, dir, &name,
				 vhostfs_unknown(n, dir->i_sb), 0);
		vhostfs_raise_on_mounts(n, mask, entry, FSNOTIFY_EVENT_DENTRY,
					dir, &name, NULL, dir->i_sb);
	}
}

/*
 * An event on an object of which the device knows no name. A directory has one
 * here, and where nothing else tells the watchers of its parent, they are told
 * by that; a file's parent is not involved (the link count changed, or it was
 * done by a name that this guest does not know).
 */
void vhostfs_raise_self(struct vhostfs_notify *n, struct inode *inode,
			u32 bit, bool for_parent, bool unlinked)
{
	const struct qstr no_name = { .name = "" };
	struct dentry *alias = NULL;

	vhostfs_count(n, VHOSTFS_RAISED);
	if (for_parent && S_ISDIR(inode->i_mode))
		alias = d_find_any_alias(inode);
	/* One that is invalid is of an earlier name */
	if (alias && !d_unhashed(alias))
		fsnotify_parent(alias, bit, inode, FSNOTIFY_EVENT_INODE);
	else if (unlinked)
		fsnotify(bit | vhostfs_isdir(inode),
			 vhostfs_unlinked(n, inode, inode, &no_name),
			 FSNOTIFY_EVENT_PATH, NULL, NULL, inode, 0);
	else
		fsnotify_inode(inode, bit);
	dput(alias);
	vhostfs_raise_on_mounts(n, bit | vhostfs_isdir(inode), inode,
				FSNOTIFY_EVENT_INODE, NULL, NULL, inode,
				inode->i_sb);
}

/*
 * The last link is gone. Linux says so, and ends the watches, when the last
 * dentry of an inode without links goes. So take the dentries as far as nobody
 * uses them, and then the links; for a dentry that is in use (an open file) it
 * happens when that ends, as in any file system. Only of an inode that has no
 * dentry any more it is said here; once, so not if it had no links before.
 */
#define VHOSTFS_MAX_ALIASES	1000

void vhostfs_raise_delete_self(struct vhostfs_notify *n,
			       struct inode *inode)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct dentry *alias;
	bool first;
	int i;

	vhostfs_count(n, VHOSTFS_RAISED);
	vhostfs_forget_recent(n, NULL, inode);
	vhostfs_keep(n, inode, false);
	vhostfs_stale_attr(inode, STATX_BASIC_STATS);
	/* What is mounted stays mounted */
	if (inode == d_inode(inode->i_sb->s_root)) {
		fsnotify_inode(inode, FS_DELETE_SELF);
		return;
	}

	for (i = 0; i < VHOSTFS_MAX_ALIASES; i++) {
		alias = d_find_alias(inode);
		if (!alias)
			break;
		d_invalidate(alias);
		/* It may have been invalid before, and then kept its children */
		if (S_ISDIR(inode->i_mode))
			shrink_dcache_parent(alias);
		dput(alias);
		/* A directory has one alias, and it is found unhashed as well */
		if (S_ISDIR(inode->i_mode))
			break;
	}

	alias = d_find_any_alias(inode);
	spin_lock(&fi->lock);
	first = inode->i_nlink;
	if (first)
		clear_nlink(inode);
	spin_unlock(&fi->lock);
	if (alias) {
		dput(alias);
	} else if (first) {
		fsnotify_inode(inode, FS_DELETE_SELF);
		__fsnotify_inode_delete(inode);
	}
}

/*
 * Both names at once, for fanotify; both directories are in one superblock.
 * One of them may be NULL: what happens there is not known. Each mark on a
 * directory gets the name in that one only. One on the superblock gets both, so
 * where there is such a mark, nobody is told of half a rename.
 */
void vhostfs_raise_rename(struct vhostfs_notify *n,
			  struct inode *old_dir, struct inode *new_dir,
			  struct inode *child,
			  const struct vhostfs_event *from,
			  const struct vhostfs_event *to)
{
	struct inode *dir = old_dir ? old_dir : new_dir;
	struct qstr old_name = { .name = from->name, .len = from->namelen };
	struct qstr new_name = { .name = to->name, .len = to->namelen };
	u32 mask = FS_RENAME | (from->mask & FS_ISDIR) | vhostfs_isdir(child);
	u32 wanted = 0, wanted_on_sb = READ_ONCE(dir->i_sb->s_fsnotify_mask);
	struct dentry *moved;

	if (old_dir)
		wanted |= READ_ONCE(old_dir->i_fsnotify_mask);
	if (new_dir)
		wanted |= READ_ONCE(new_dir->i_fsnotify_mask);
	if (old_dir && new_dir)
		wanted |= wanted_on_sb;
	else
		wanted &= ~wanted_on_sb;
	if (!(wanted & FS_RENAME))
		return;

	if (child && child->i_sb != dir->i_sb)
		child = NULL;
	n->unknown_parent.d_inode = new_dir;
	moved = vhostfs_stand_in(n, dir, &n->unknown_parent, child, &new_name);
	if (!old_dir)
		old_dir = vhostfs_unknown(n, dir->i_sb);
#if VHOSTFS_KERNEL < 700
	fsnotify(mask, moved, FSNOTIFY_EVENT_DENTRY, old_dir, &old_name, NULL,
		 0);
#else
	{
		struct fsnotify_rename_data data = { .moved = moved };

		fsnotify(mask, &data, FSNOTIFY_EVENT_RENAME, old_dir,
			 &old_name, NULL, 0);
	}
#endif
}
