// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: events were lost
 *
 * Tells everybody who watches, and drops what is cached. docs/protocol.md of
 * vhostfs, 5.6.
 */

#include <linux/fs.h>
#include <linux/fsnotify.h>
#include "vhostfs_internal.h"

/*
 * Events were lost, so nothing that is cached can be believed, and everybody
 * who watches has to look again: their groups are given the overflow event that
 * the kernel itself queues for them.
 *
 * No function to do so is exported. Its parts are: a mark of our own (for no
 * events) on a watched object keeps the list of all marks there, each of which
 * leads to its group. Groups that only have marks on a mount are not found.
 */
struct vhostfs_lost {
	struct fsnotify_group *groups[VHOSTFS_MAX_GROUPS];	/* referenced */
	unsigned int ngroups;
};

/* What fsnotify_queue_overflow() does */
static void vhostfs_queue_overflow(struct fsnotify_group *group)
{
	struct fsnotify_event *event = group->overflow_event;

	if (!event)
		return;
	spin_lock(&group->notification_lock);
	if (group->shutdown || !list_empty(&event->list)) {
		spin_unlock(&group->notification_lock);
		return;
	}
	group->q_len++;
	list_add_tail(&event->list, &group->notification_list);
	spin_unlock(&group->notification_lock);

	wake_up(&group->notification_waitq);
	kill_fasync(&group->fsn_fa, SIGIO, POLL_IN);
}

static void vhostfs_lost_group(struct vhostfs_lost *lost,
			       struct fsnotify_group *group)
{
	unsigned int i;

	for (i = 0; i < lost->ngroups; i++)
		if (lost->groups[i] == group)
			return;
	if (i == VHOSTFS_MAX_GROUPS) {
		/* Many: it may be told more than once */
		vhostfs_queue_overflow(group);
		return;
	}
	refcount_inc(&group->refcnt);
	lost->groups[lost->ngroups++] = group;
}

static void vhostfs_free_mark(struct fsnotify_mark *mark)
{
	kfree(mark);
}

static int vhostfs_no_event(struct fsnotify_mark *mark, u32 mask,
			    struct inode *inode, struct inode *dir,
			    const struct qstr *name, u32 cookie)
{
	return 0;
}

const struct fsnotify_ops vhostfs_group_ops = {
	.handle_inode_event	= vhostfs_no_event,
	.free_mark		= vhostfs_free_mark,
};

int vhostfs_add_mark(struct fsnotify_mark *mark, struct inode *inode,
		     struct super_block *sb)
{
	if (inode)
		return fsnotify_add_inode_mark(mark, inode, 0);
#if VHOSTFS_KERNEL < 610
	return fsnotify_add_mark(mark, &sb->s_fsnotify_marks,
				 FSNOTIFY_OBJ_TYPE_SB, 0, NULL);
#else
	return fsnotify_add_mark(mark, sb, FSNOTIFY_OBJ_TYPE_SB, 0);
#endif
}

/* The groups with marks on inode or, without one, on sb */
static void vhostfs_lost_groups(struct vhostfs_lost *lost, struct inode *inode,
				struct super_block *sb)
{
	struct fsnotify_mark *mark, *other;
	struct fsnotify_mark_connector *conn;

	mark = kzalloc(sizeof(*mark), GFP_KERNEL);
	if (!mark)
		return;
	fsnotify_init_mark(mark, vhostfs_group);
	if (!vhostfs_add_mark(mark, inode, sb)) {
		conn = mark->connector;
		spin_lock(&conn->lock);
		hlist_for_each_entry(other, &conn->list, obj_list)
			if (other != mark)
				vhostfs_lost_group(lost, other->group);
		spin_unlock(&conn->lock);
		fsnotify_destroy_mark(mark, vhostfs_group);
	}
	fsnotify_put_mark(mark);
}

static bool vhostfs_is_watched(struct inode *inode, void *arg)
{
	return READ_ONCE(inode->i_fsnotify_mask);
}

static void vhostfs_lose_watched(struct inode *inode, void *arg)
{
	struct vhostfs_lost *lost = arg;

	vhostfs_lost_groups(lost, inode, NULL);
}

void vhostfs_overflow_event(struct vhostfs_notify *n, struct fuse_conn *fc)
{
	struct vhostfs_mount_mark *mount_mark;
	struct vhostfs_lost *lost;
	struct fuse_mount *fm;
	unsigned int i;

	vhostfs_count(n, VHOSTFS_OVERFLOWS);
	lost = kzalloc(sizeof(*lost), GFP_KERNEL | __GFP_NOFAIL);
	vhostfs_walk_again(n);
	vhostfs_lose_all(n, fc);
	list_for_each_entry(fm, &fc->mounts, fc_entry) {
		if (!fm->sb)
			continue;
		vhostfs_walk(fm->sb, vhostfs_is_watched, vhostfs_lose_watched,
			     lost);
		if (READ_ONCE(fm->sb->s_fsnotify_mask))
			vhostfs_lost_groups(lost, NULL, fm->sb);
	}
	spin_lock(&n->watch_lock);
	list_for_each_entry(mount_mark, &n->mount_marks, list)
		if (vhostfs_is_attached(mount_mark->mark))
			vhostfs_lost_group(lost, mount_mark->mark->group);
	spin_unlock(&n->watch_lock);
	for (i = 0; i < lost->ngroups; i++) {
		vhostfs_queue_overflow(lost->groups[i]);
		fsnotify_put_group(lost->groups[i]);
	}
	kfree(lost);
}
