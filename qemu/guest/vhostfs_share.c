// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: superblocks that are watched as a whole
 *
 * Every directory of such a share is held (vhostfs_held.c), so that the device
 * tells of them all.
 * docs/protocol.md of vhostfs, 4.3.1.
 */

#include <linux/fs.h>
#include <linux/fsnotify.h>
#include "vhostfs_internal.h"

/*
 * A mark on a superblock wants to hear of everything there, but the device
 * tells only of directories that this guest has looked up. So it is asked to
 * tell of all that is held here, and a walk looks every directory up and holds
 * it until the last mark goes.
 *
 * A mark of our own beside it says which directories come and go from then on,
 * whoever makes them: events of the host are raised, and come here as well.
 */

static int vhostfs_share_event(struct fsnotify_group *group, u32 mask,
			       const void *data, int data_type,
			       struct inode *dir, const struct qstr *name,
			       u32 cookie, struct fsnotify_iter_info *iter_info)
{
	struct fsnotify_mark *mark = fsnotify_iter_sb_mark(iter_info);
	struct inode *inode = fsnotify_data_inode(data, data_type);
	struct vhostfs_share *share;

	if (!mark || !inode || !S_ISDIR(inode->i_mode))
		return 0;
	share = container_of(mark, struct vhostfs_share, mark);
	if (mask & (FS_DELETE | FS_DELETE_SELF))
		vhostfs_let_go(share, inode);
	else
		vhostfs_hold(share, inode);
	return 0;
}

static void vhostfs_free_share(struct fsnotify_mark *mark)
{
	struct vhostfs_share *share = container_of(mark, struct vhostfs_share,
						   mark);

	vhostfs_put(share->notify);
	kfree(share);
}

const struct fsnotify_ops vhostfs_share_ops = {
	.handle_event	= vhostfs_share_event,
	.free_mark	= vhostfs_free_share,
};

/* Directories may have come that nobody told us of. Under fc->killsb */
void vhostfs_walk_again(struct vhostfs_notify *n)
{
	/* The worker does it, which may use the list */
	spin_lock(&n->watch_lock);
	if (n->share_mask) {
		n->shares_changed++;
		n->walk_again = true;
		vhostfs_wake_session(n);
	}
	spin_unlock(&n->watch_lock);
}

/* Under session_mutex, as all that follows */
void vhostfs_end_share(struct vhostfs_share *share)
{
	if (!share)
		return;
	list_del(&share->list);
	vhostfs_close_share(share);
	fsnotify_destroy_mark(&share->mark, vhostfs_share_group);
	fsnotify_put_mark(&share->mark);
}

struct vhostfs_share *vhostfs_find_share(struct vhostfs_notify *n,
					 const struct super_block *sb)
{
	struct vhostfs_share *share;

	list_for_each_entry(share, &n->shares, list)
		if (share->sb == sb)
			return share;
	return NULL;
}

static struct vhostfs_share *vhostfs_new_share(struct vhostfs_notify *n,
					       struct super_block *sb)
{
	struct vhostfs_share *share = kzalloc(sizeof(*share), GFP_KERNEL);

	if (!share)
		return NULL;
	share->sb = sb;
	spin_lock_init(&share->lock);
	share->held = RB_ROOT;
	INIT_LIST_HEAD(&share->unread);
	INIT_WORK(&share->walk_work, vhostfs_walk_work);
	kref_get(&n->kref);
	share->notify = n;
	fsnotify_init_mark(&share->mark, vhostfs_share_group);
	share->mark.mask = FS_CREATE | FS_DELETE | FS_MOVED_TO |
			   FS_DELETE_SELF | FS_ISDIR;
	if (vhostfs_add_mark(&share->mark, NULL, sb)) {
		fsnotify_put_mark(&share->mark);
		return NULL;
	}
	list_add(&share->list, &n->shares);
	return share;
}

/* What all marks on the superblock but ours want together */
static u32 vhostfs_others_mask(struct vhostfs_share *share)
{
	struct fsnotify_mark_connector *conn = share->mark.connector;
	struct fsnotify_mark *mark;
	u32 mask = 0;

	spin_lock(&conn->lock);
	hlist_for_each_entry(mark, &conn->list, obj_list)
		if (mark != &share->mark &&
		    mark->group != vhostfs_group &&
		    (mark->flags & FSNOTIFY_MARK_FLAG_ATTACHED))
			mask |= fsnotify_calc_mask(mark);
	spin_unlock(&conn->lock);
	return mask;
}

/* Of one superblock, or those whose watchers have left */
void vhostfs_drop_mount_marks(struct vhostfs_notify *n,
			      const struct super_block *sb)
{
	struct vhostfs_mount_mark *each, *next;
	LIST_HEAD(dropped);

	spin_lock(&n->watch_lock);
	list_for_each_entry_safe(each, next, &n->mount_marks, list) {
		if (sb ? each->sb != sb : vhostfs_is_attached(each->mark))
			continue;
		list_move(&each->list, &dropped);
		n->nmount_marks--;
	}
	spin_unlock(&n->watch_lock);
	list_for_each_entry_safe(each, next, &dropped, list) {
		fsnotify_put_mark(each->mark);
		kfree(each);
	}
}

/* What marks on mounts of this superblock want together */
static u32 vhostfs_mounts_mask(struct vhostfs_notify *n,
			       const struct super_block *sb)
{
	struct vhostfs_mount_mark *each;
	u32 mask = 0;

	spin_lock(&n->watch_lock);
	list_for_each_entry(each, &n->mount_marks, list)
		if (each->sb == sb && vhostfs_is_attached(each->mark) &&
		    vhostfs_reports_fids(each->mark->group))
			mask |= each->mark->mask;
	spin_unlock(&n->watch_lock);
	return mask & VHOSTFS_CHILD_EVENTS;
}

static u32 vhostfs_look_at_sb(struct vhostfs_notify *n, struct super_block *sb)
{
	struct vhostfs_share *share = vhostfs_find_share(n, sb);
	u32 wish = vhostfs_mounts_mask(n, sb);

	if (!share && (wish || READ_ONCE(sb->s_fsnotify_mask)))
		share = vhostfs_new_share(n, sb);
	if (!share)
		return 0;
	wish = vhostfs_wish(wish | vhostfs_others_mask(share));
	if (!wish)
		vhostfs_end_share(share);
	return wish;
}

static int vhostfs_send_share_watch(struct vhostfs_notify *n,
				    struct fuse_mount *fm, u32 mask)
{
	struct vhostfs_request *req;
	int err;

	req = vhostfs_new_request(FUSE_FSNOTIFY_WATCH, FUSE_ROOT_ID,
				  sizeof(req->watch_in), 0);
	if (!req)
		return -ENOMEM;
	req->watch_in.mask = cpu_to_le64(mask);
	req->watch_in.flags = cpu_to_le32(FSNOTIFY_WATCH_FILESYSTEM);
	vhostfs_count(n, VHOSTFS_WATCHES_SENT);
	err = vhostfs_ask(n, fm, req);
	kfree(req);
	return err;
}

static void vhostfs_share_refused(struct vhostfs_notify *n, int err)
{
	vhostfs_count(n, VHOSTFS_WATCHES_REFUSED);
	if (!n->share_refused)
		dev_warn(&n->vdev->dev,
			 "the host does not watch whole shares (%d): marks on the file system see this guest's changes, and the host's where single inodes are watched\n",
			 err);
	n->share_refused = true;
}

/* Brings the device up to date about marks on superblocks. Under session_mutex */
void vhostfs_watch_shares(struct vhostfs_notify *n,
			  struct fuse_mount *fm)
{
	struct vhostfs_share *share;
	unsigned int changed;
	struct fuse_mount *each;
	bool again;
	u32 wish = 0;
	int err = 0;

	spin_lock(&n->watch_lock);
	changed = n->shares_changed;
	again = n->walk_again;
	n->walk_again = false;
	spin_unlock(&n->watch_lock);
	vhostfs_drop_mount_marks(n, NULL);

	down_read(&n->fc->killsb);
	list_for_each_entry(each, &n->fc->mounts, fc_entry)
		if (each->sb)
			wish |= vhostfs_look_at_sb(n, each->sb);
	up_read(&n->fc->killsb);
	if (wish)
		wish |= VHOSTFS_TREE_EVENTS;
	if (wish != n->share_mask) {
		err = n->granted & FUSE_FSNOTIFY_WATCH_FILESYSTEM ?
		      vhostfs_send_share_watch(n, fm, wish) : -EOPNOTSUPP;
		if (!err)
			WRITE_ONCE(n->share_mask, wish);
		else
			vhostfs_share_refused(n, err);
	}
	list_for_each_entry(share, &n->shares, list) {
		if (n->share_mask && !share->open)
			vhostfs_open_share(share);
		else if (again)
			vhostfs_read_all(share);
	}

	if (list_empty(&n->shares) && !READ_ONCE(n->nwatches) &&
	    READ_ONCE(n->fid_wanted)) {
		WRITE_ONCE(n->fid_wanted, false);
		mutex_lock(&n->event_mutex);
		vhostfs_forget_recent(n, NULL, NULL);
		mutex_unlock(&n->event_mutex);
	}

	spin_lock(&n->watch_lock);
	n->shares_done = changed;
	vhostfs_wake_session(n);
	spin_unlock(&n->watch_lock);
	wake_up_all(&n->settled);
}
