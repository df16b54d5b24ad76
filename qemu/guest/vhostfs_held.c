// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: directories that are held because the whole share is watched
 *
 * Holds them, reads what is in them, and lets them go; who wants that, and
 * when, vhostfs_share.c knows. docs/protocol.md of vhostfs, 4.3.1.
 */

#include <linux/fs.h>
#include <linux/module.h>
#include <linux/rbtree.h>
#include "vhostfs_internal.h"

static unsigned int max_directories = 524288;
module_param(max_directories, uint, 0644);
MODULE_PARM_DESC(max_directories,
		 "Most directories to hold for marks on the file system");

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
	if (READ_ONCE(n->held_full_logged))
		return false;
	WRITE_ONCE(n->held_full_logged, true);
	/* Any task may come here */
	spin_lock(&n->vq_lock);
	if (n->running)
		dev_warn(&n->vdev->dev,
			 "more than max_directories=%u in a share that is watched as a whole: what the host does in some is not seen\n",
			 max_directories);
	spin_unlock(&n->vq_lock);
	return false;
}

/* Holds a directory, which the walk is then to read */
void vhostfs_hold(struct vhostfs_share *share, struct inode *inode)
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
void vhostfs_let_go(struct vhostfs_share *share, struct inode *inode)
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
		/* The size is what the device says that it sent */
		if (!vhostfs_ask(n, fm, req))
			offset = vhostfs_read_entries(share, dir, buf,
						      min(req->args.out_args[0].size,
							  VHOSTFS_READDIR_SIZE));
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

void vhostfs_walk_work(struct work_struct *work)
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

void vhostfs_read_all(struct vhostfs_share *share)
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
void vhostfs_open_share(struct vhostfs_share *share)
{
	spin_lock(&share->lock);
	share->open = true;
	spin_unlock(&share->lock);
	vhostfs_hold(share, d_inode(share->sb->s_root));
}

/* Everything is let go. Under session_mutex */
void vhostfs_close_share(struct vhostfs_share *share)
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
