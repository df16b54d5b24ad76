// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: superblocks that are watched as a whole
 *
 * Holds every directory of such a share, so that the device tells of them all.
 * docs/protocol.md of vhostfs, 4.3.1.
 */

#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/module.h>
#include <linux/rbtree.h>
#include "vhostfs_internal.h"

static unsigned int max_directories = 524288;
module_param(max_directories, uint, 0644);
MODULE_PARM_DESC(max_directories,
		 "Most directories to hold for marks on the file system");

/*
 * A mark on a superblock wants to hear of everything there, but the device
 * tells only of directories that this guest has looked up. So it is asked to
 * tell of all that is held here, and a walk looks every directory up and holds
 * it until the last mark goes.
 *
 * A mark of our own beside it says which directories come and go from then on,
 * whoever makes them: events of the host are raised, and come here as well.
 */

static void vhostfs_put_held(struct vhostfs_notify *n,
			     struct vhostfs_held *held)
{
	iput(held->inode);
	kfree(held);
	atomic_dec(&n->nheld);
}

/* Under share->lock; false: the walk has been there */
static bool vhostfs_take_unread(struct vhostfs_share *share,
				struct vhostfs_held *held)
{
	if (list_empty(&held->unread))
		return false;
	list_del_init(&held->unread);
	atomic_dec(&share->notify->nunread);
	return true;
}

static void vhostfs_add_unread(struct vhostfs_share *share,
			       struct vhostfs_held *held)
{
	if (!list_empty(&held->unread))
		return;
	list_add_tail(&held->unread, &share->unread);
	atomic_inc(&share->notify->nunread);
}

/* Where the inode is or belongs in the tree. Under share->lock */
static struct vhostfs_held *vhostfs_find_held(struct vhostfs_share *share,
					      const struct inode *inode,
					      struct rb_node ***where,
					      struct rb_node **parent)
{
	struct rb_node **link = &share->held.rb_node;
	struct vhostfs_held *held;

	*parent = NULL;
	while (*link) {
		*parent = *link;
		held = rb_entry(*link, struct vhostfs_held, node);
		if (held->inode == inode)
			return held;
		link = inode < held->inode ? &(*link)->rb_left :
					     &(*link)->rb_right;
	}
	*where = link;
	return NULL;
}

static bool vhostfs_may_hold(struct vhostfs_share *share)
{
	struct vhostfs_notify *n = share->notify;

	if (atomic_read(&n->nheld) < READ_ONCE(max_directories))
		return true;
	if (!READ_ONCE(n->held_full_logged)) {
		WRITE_ONCE(n->held_full_logged, true);
		dev_warn(&n->vdev->dev,
			 "more than max_directories=%u in a share that is watched as a whole: what the host does in some is not seen\n",
			 max_directories);
	}
	return false;
}

/* Holds a directory, which the walk is then to read */
static void vhostfs_hold(struct vhostfs_share *share, struct inode *inode)
{
	struct vhostfs_held *held;
	struct rb_node **where, *parent;

	/* The root of a submount has a superblock of its own */
	if (!S_ISDIR(inode->i_mode) || IS_AUTOMOUNT(inode) ||
	    inode->i_sb != share->sb || fuse_is_bad(inode) ||
	    !vhostfs_may_hold(share))
		return;
	held = kzalloc(sizeof(*held), GFP_KERNEL);
	if (!held)
		return;
	held->inode = igrab(inode);
	INIT_LIST_HEAD(&held->unread);
	spin_lock(&share->lock);
	/* Without links it was let go already, or never had to be held */
	if (held->inode && share->open && inode->i_nlink &&
	    !vhostfs_find_held(share, inode, &where, &parent)) {
		rb_link_node(&held->node, parent, where);
		rb_insert_color(&held->node, &share->held);
		atomic_inc(&share->notify->nheld);
		vhostfs_add_unread(share, held);
		queue_work(vhostfs_wq, &share->walk_work);
		held = NULL;
	}
	spin_unlock(&share->lock);
	if (held) {
		iput(held->inode);
		kfree(held);
	}
}

/* It is gone */
static void vhostfs_let_go(struct vhostfs_share *share, struct inode *inode)
{
	struct vhostfs_held *held;
	struct rb_node **where, *parent;

	spin_lock(&share->lock);
	held = vhostfs_find_held(share, inode, &where, &parent);
	if (held) {
		rb_erase(&held->node, &share->held);
		vhostfs_take_unread(share, held);
	}
	spin_unlock(&share->lock);
	if (held)
		vhostfs_put_held(share->notify, held);
}

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

/* A request, and its answer; frees nothing */
static int vhostfs_ask(struct vhostfs_notify *n, struct fuse_mount *fm,
		       struct vhostfs_request *req)
{
	DECLARE_COMPLETION_ONSTACK(done);

	req->end = vhostfs_wake;
	req->done = &done;
	vhostfs_send(n, fm, req);
	wait_for_completion(&done);
	return req->error;
}

/*
 * Looks up the directories among the entries that a READDIR brought. Returns
 * where the next one goes on, 0 at the end or where it makes no sense.
 */
static u64 vhostfs_read_entries(struct vhostfs_share *share, struct inode *dir,
				const char *buf, size_t left)
{
	const struct fuse_dirent *entry;
	struct inode *inode;
	u64 offset = 0;

	while (left > FUSE_NAME_OFFSET && READ_ONCE(share->open)) {
		entry = (const struct fuse_dirent *)buf;
		if (!entry->namelen || entry->namelen > NAME_MAX ||
		    FUSE_DIRENT_SIZE(entry) > left)
			return 0;
		offset = entry->off;
		buf += FUSE_DIRENT_SIZE(entry);
		left -= FUSE_DIRENT_SIZE(entry);
		if ((entry->type != DT_DIR && entry->type != DT_UNKNOWN) ||
		    (entry->name[0] == '.' &&
		     (entry->namelen == 1 ||
		      (entry->namelen == 2 && entry->name[1] == '.'))))
			continue;
		inode = vhostfs_look_up(dir, entry->name, entry->namelen);
		if (inode)
			vhostfs_hold(share, inode);
		iput(inode);
		cond_resched();
	}
	return offset;
}

static void vhostfs_read_dir(struct vhostfs_share *share, struct inode *dir,
			     char *buf)
{
	struct fuse_mount *fm = get_fuse_mount_super(share->sb);
	struct vhostfs_notify *n = share->notify;
	u64 nodeid = get_node_id(dir), offset = 0, last, fh;
	struct vhostfs_request *req;
	int err;

	req = vhostfs_new_request(FUSE_OPENDIR, nodeid, sizeof(req->open_in),
				  sizeof(req->open_out));
	if (!req)
		return;
	req->open_in.flags = O_RDONLY | O_DIRECTORY;
	err = vhostfs_ask(n, fm, req);
	fh = req->open_out.fh;
	kfree(req);
	if (err)
		return;

	do {
		req = vhostfs_new_request(FUSE_READDIR, nodeid,
					  sizeof(req->read_in), 1);
		if (!req)
			break;
		req->read_in.fh = fh;
		req->read_in.offset = offset;
		req->read_in.size = VHOSTFS_READDIR_SIZE;
		req->args.out_args[0].size = VHOSTFS_READDIR_SIZE;
		req->args.out_args[0].value = buf;
		req->args.out_argvar = true;
		last = offset;
		offset = 0;
		if (!vhostfs_ask(n, fm, req))
			offset = vhostfs_read_entries(share, dir, buf,
						      req->args.out_args[0].size);
		kfree(req);
	} while (offset && offset != last && READ_ONCE(share->open));

	req = vhostfs_new_request(FUSE_RELEASEDIR, nodeid,
				  sizeof(req->release_in), 0);
	if (!req)
		return;
	req->release_in.fh = fh;
	vhostfs_ask(n, fm, req);
	kfree(req);
}

static struct inode *vhostfs_next_unread(struct vhostfs_share *share)
{
	struct vhostfs_held *held;
	struct inode *inode = NULL;

	spin_lock(&share->lock);
	held = list_first_entry_or_null(&share->unread, struct vhostfs_held,
					unread);
	if (held) {
		list_del_init(&held->unread);
		inode = held->inode;
		ihold(inode);
	}
	spin_unlock(&share->lock);
	return inode;
}

static void vhostfs_walk_work(struct work_struct *work)
{
	struct vhostfs_share *share = container_of(work, struct vhostfs_share,
						   walk_work);
	struct vhostfs_notify *n = share->notify;
	char *buf = kmalloc(VHOSTFS_READDIR_SIZE, GFP_KERNEL | __GFP_NOFAIL);
	struct inode *inode;

	while ((inode = vhostfs_next_unread(share))) {
		if (vhostfs_is_granted(n))
			vhostfs_read_dir(share, inode, buf);
		iput(inode);
		if (atomic_dec_and_test(&n->nunread))
			wake_up_all(&n->settled);
		cond_resched();
	}
	kfree(buf);
}

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

static void vhostfs_read_all(struct vhostfs_share *share)
{
	struct rb_node *node;

	spin_lock(&share->lock);
	for (node = rb_first(&share->held); node; node = rb_next(node))
		vhostfs_add_unread(share, rb_entry(node, struct vhostfs_held,
						   node));
	if (!list_empty(&share->unread))
		queue_work(vhostfs_wq, &share->walk_work);
	spin_unlock(&share->lock);
}

/* The walk begins at the root, and what it meets is held */
static void vhostfs_open_share(struct vhostfs_share *share)
{
	spin_lock(&share->lock);
	share->open = true;
	spin_unlock(&share->lock);
	vhostfs_hold(share, d_inode(share->sb->s_root));
}

/* Everything is let go. Under session_mutex, as all that follows */
static void vhostfs_close_share(struct vhostfs_share *share)
{
	struct vhostfs_held *held;
	struct rb_node *node;

	spin_lock(&share->lock);
	share->open = false;
	spin_unlock(&share->lock);
	cancel_work_sync(&share->walk_work);
	/* Nobody adds to it any more; who lets go takes one out at a time */
	spin_lock(&share->lock);
	while ((node = rb_first(&share->held))) {
		held = rb_entry(node, struct vhostfs_held, node);
		rb_erase(node, &share->held);
		vhostfs_take_unread(share, held);
		spin_unlock(&share->lock);
		vhostfs_put_held(share->notify, held);
		cond_resched();
		spin_lock(&share->lock);
	}
	spin_unlock(&share->lock);
}

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
