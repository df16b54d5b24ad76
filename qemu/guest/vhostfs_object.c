// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: requests to the device, and the objects of a share
 *
 * Knows inodes, dentries and the FUSE core, and nothing of watchers.
 */

#include <linux/dcache.h>
#include <linux/fs.h>
#include <linux/namei.h>
#include "vhostfs_internal.h"

/* ---- requests --------------------------------------------------------------- */

#if VHOSTFS_KERNEL < 700
static void vhostfs_request_end(struct fuse_mount *fm, struct fuse_args *args,
				int error)
#else
static void vhostfs_request_end(struct fuse_args *args, int error)
#endif
{
	struct vhostfs_request *req = container_of(args,
						   struct vhostfs_request,
						   args);
	struct vhostfs_notify *n = req->notify;
	bool counted = !req->done;

	req->end(req, error);
	if (counted && atomic_dec_and_test(&n->in_flight))
		wake_up_all(&n->idle);
	vhostfs_put(n);
}

/*
 * Sends a request whose nodeid, opcode and arguments are filled in. Its end()
 * is called in any case, and frees it. May wait, until FUSE_INIT was answered
 * and while many requests are in the background.
 */
void vhostfs_send(struct vhostfs_notify *n, struct fuse_mount *fm,
		  struct vhostfs_request *req)
{
	int err;

	req->notify = n;
	req->args.end = vhostfs_request_end;
	kref_get(&n->kref);
	/* What somebody waits for is over when he goes on */
	if (!req->done)
		atomic_inc(&n->in_flight);
	err = fuse_simple_background(fm, &req->args, GFP_KERNEL);
	if (err) {
#if VHOSTFS_KERNEL < 700
		vhostfs_request_end(fm, &req->args, err);
#else
		vhostfs_request_end(&req->args, err);
#endif
	}
}

struct vhostfs_request *vhostfs_new_request(u32 opcode, u64 nodeid,
					    size_t in_size,
					    size_t out_size)
{
	struct vhostfs_request *req = kzalloc(sizeof(*req), GFP_KERNEL);

	if (!req)
		return NULL;
	req->args.opcode = opcode;
	req->args.nodeid = nodeid;
	req->args.in_numargs = 1;
	req->args.in_args[0].size = in_size;
	req->args.in_args[0].value = &req->init_in;
	if (out_size) {
		req->args.out_numargs = 1;
		req->args.out_args[0].size = out_size;
		req->args.out_args[0].value = &req->init_out;
	}
	return req;
}

/* A request, and its answer; frees nothing */
int vhostfs_ask(struct vhostfs_notify *n, struct fuse_mount *fm,
		struct vhostfs_request *req)
{
	DECLARE_COMPLETION_ONSTACK(done);

	req->end = vhostfs_wake;
	req->done = &done;
	vhostfs_send(n, fm, req);
	wait_for_completion(&done);
	return req->error;
}

/* ---- objects ---------------------------------------------------------------- */

int vhostfs_inode_eq(struct inode *inode, void *nodeid)
{
	return get_node_id(inode) == *(u64 *)nodeid;
}

/*
 * The inode with this identity in any superblock of the connection, with a
 * reference, or NULL. The caller holds fc->killsb. A mount point of a submount
 * is not in the inode hash, so a nodeid is found once.
 */
struct inode *vhostfs_find(struct fuse_conn *fc, u64 nodeid,
			   u32 generation)
{
	struct fuse_mount *fm;
	struct inode *inode;

	lockdep_assert_held_read(&fc->killsb);
	list_for_each_entry(fm, &fc->mounts, fc_entry) {
		if (!fm->sb)
			continue;
		inode = ilookup5(fm->sb, nodeid, vhostfs_inode_eq, &nodeid);
		if (!inode)
			continue;
		if (inode->i_generation == generation && !fuse_is_bad(inode))
			return inode;
		iput(inode);
	}
	return NULL;
}

/* A dentry of this directory, as good as any; NULL without memory */
static struct dentry *vhostfs_any_alias(struct inode *dir)
{
	struct dentry *alias = d_find_any_alias(dir);

	if (alias)
		return alias;
	ihold(dir);
	alias = d_obtain_alias(dir);
	return IS_ERR(alias) ? NULL : alias;
}

/*
 * The object of a name as the device has it now, with a reference, or NULL.
 *
 * That may make known that the directory itself has no link left, and it would
 * end here with its dentry. But the device tells of what came before its end.
 */
struct inode *vhostfs_look_up(struct inode *dir, const char *name,
			      unsigned int namelen)
{
	struct dentry *parent = vhostfs_any_alias(dir), *entry;
	struct fuse_inode *fi = get_fuse_inode(dir);
	unsigned int nlink = dir->i_nlink;
	struct inode *inode = NULL;

	if (!parent)
		return NULL;
#if VHOSTFS_KERNEL < 700
	entry = lookup_one_len_unlocked(name, parent, namelen);
#else
	entry = lookup_noperm_unlocked(&QSTR_LEN(name, namelen), parent);
#endif
	if (!IS_ERR(entry)) {
		if (d_really_is_positive(entry))
			inode = igrab(d_inode(entry));
		dput(entry);
	}
	spin_lock(&fi->lock);
	if (nlink && !dir->i_nlink)
		set_nlink(dir, nlink);
	spin_unlock(&fi->lock);
	dput(parent);
	return inode;
}

/*
 * The walk of a superblock's inodes. look() is called for every inode with
 * s_inode_list_lock held; when it returns true, act() is called without it and
 * with a reference. Every now and then the lock is given up in any case. An
 * inode that is being made is nobody's yet.
 */
#define VHOSTFS_LOOKS	1024

static bool vhostfs_is_new(const struct inode *inode)
{
#if VHOSTFS_KERNEL < 619
	return READ_ONCE(inode->i_state) & I_NEW;
#else
	return inode_state_read_once((struct inode *)inode) & I_NEW;
#endif
}

void vhostfs_walk(struct super_block *sb,
		  bool (*look)(struct inode *inode, void *arg),
		  void (*act)(struct inode *inode, void *arg), void *arg)
{
	struct inode *inode, *held = NULL;
	unsigned int looks = 0;
	bool wanted;

	spin_lock(&sb->s_inode_list_lock);
	list_for_each_entry(inode, &sb->s_inodes, i_sb_list) {
		wanted = !vhostfs_is_new(inode) && look(inode, arg);
		if (!wanted && ++looks % VHOSTFS_LOOKS)
			continue;
		/* The reference keeps our place in the list */
		if (!igrab(inode))
			continue;
		spin_unlock(&sb->s_inode_list_lock);
		iput(held);
		held = inode;
		if (wanted)
			act(inode, arg);
		cond_resched();
		spin_lock(&sb->s_inode_list_lock);
	}
	spin_unlock(&sb->s_inode_list_lock);
	iput(held);
}

/* ---- the objects of events ----------------------------------------------------- */

/* Is this the inode of the event's child? */
bool vhostfs_is_object(const struct inode *inode,
		       const struct vhostfs_event *event)
{
	return event->child_nodeid == get_node_id((struct inode *)inode) &&
	       event->child_generation == inode->i_generation;
}

/* What the device calls a directory is one, and nothing else is; else it is another object */
static struct inode *vhostfs_find_named(struct fuse_conn *fc,
					const struct vhostfs_event *event)
{
	struct inode *inode = vhostfs_find(fc, event->child_nodeid,
					   event->child_generation);

	if (inode && !S_ISDIR(inode->i_mode) != !(event->mask & FS_ISDIR)) {
		iput(inode);
		return NULL;
	}
	return inode;
}

/*
 * The object of an event in a directory. If it is not there it may be about to
 * come: a LOOKUP that was sent before the event was, and would fill in what
 * was true then. The directory's lock waits for it.
 */
struct inode *vhostfs_find_child(struct fuse_conn *fc, struct inode *dir,
				 const struct vhostfs_event *event)
{
	struct inode *child;

	if (!event->child_nodeid)
		return NULL;
	child = vhostfs_find_named(fc, event);
	if (child || !dir)
		return child;
	inode_lock_nested(dir, I_MUTEX_PARENT);
	inode_unlock(dir);
	return vhostfs_find_named(fc, event);
}

/*
 * A file handle in an event leads to its object as long as this guest keeps
 * that in memory: once it is forgotten, the device knows it by another number.
 * So the last ones stay for a while.
 */
void vhostfs_remember(struct vhostfs_notify *n, struct inode *inode)
{
	struct inode **place = &n->recent[n->next_recent];
	unsigned int i;

	/* Who pauses us forgets them afterwards */
	if (!READ_ONCE(n->fid_wanted) || READ_ONCE(n->paused))
		return;
	for (i = 0; i < VHOSTFS_MAX_RECENT; i++)
		if (n->recent[i] == inode)
			return;
	iput(*place);
	*place = igrab(inode);
	n->next_recent = (n->next_recent + 1) % VHOSTFS_MAX_RECENT;
}

static void vhostfs_drop_kept(struct vhostfs_notify *n,
			      struct vhostfs_kept *kept)
{
	list_del(&kept->list);
	n->nkept--;
	iput(kept->inode);
	kfree(kept);
}

/* Who is held for its handle alone gives way; false: each has its end to be told */
static bool vhostfs_has_room(struct vhostfs_notify *n)
{
	struct vhostfs_kept *kept;

	if (n->nkept < VHOSTFS_MAX_KEPT)
		return true;
	list_for_each_entry(kept, &n->kept, list) {
		if (!kept->ending) {
			vhostfs_drop_kept(n, kept);
			return true;
		}
	}
	return false;
}

/*
 * Holds an object for VHOSTFS_HALF_WAIT. Either it is ending: it has no link any
 * more, but the device, which sends in order, may be about to tell of more before
 * it tells of the end. Only when it has not done so by then is the end told here.
 * Or it has ended, and the event by its name follows, which names the object, too.
 * False: there is no room. Under event_mutex.
 */
bool vhostfs_keep(struct vhostfs_notify *n, struct inode *inode, bool ending)
{
	struct vhostfs_kept *kept;

	list_for_each_entry(kept, &n->kept, list) {
		if (kept->inode == inode) {
			kept->ending = ending;
			return true;
		}
	}
	if (!ending && !READ_ONCE(n->fid_wanted))
		return true;
	if (READ_ONCE(n->paused) || !vhostfs_has_room(n))
		return false;
	kept = kmalloc(sizeof(*kept), GFP_KERNEL);
	if (!kept)
		return false;
	kept->inode = inode;
	ihold(inode);
	kept->since = jiffies;
	kept->ending = ending;
	list_add_tail(&kept->list, &n->kept);
	n->nkept++;
	queue_delayed_work(vhostfs_wq, &n->half_work, VHOSTFS_HALF_WAIT);
	return true;
}

/*
 * Holds the object that loses its name to another in a rename: the device may
 * be about to tell that it has moved itself (an exchange) or of its end, to
 * those who want objects by handle. Its dentry goes with the name, and may be
 * all that keeps it in memory.
 */
void vhostfs_keep_former(struct vhostfs_notify *n, struct inode *dir,
			 const struct vhostfs_event *event)
{
	struct vhostfs_kept *kept;
	struct inode *inode = NULL;
	struct dentry *entry;

	if (!(event->mask & FS_MOVED_TO) || !READ_ONCE(n->fid_wanted))
		return;
	entry = vhostfs_lookup_cached(dir, event->name, event->namelen);
	if (entry && d_really_is_positive(entry) &&
	    !vhostfs_is_object(d_inode(entry), event))
		inode = d_inode(entry);
	list_for_each_entry(kept, &n->kept, list)
		if (kept->inode == inode)
			inode = NULL;
	if (inode)
		vhostfs_keep(n, inode, false);
	dput(entry);
}

/*
 * The next whose time is over, with a reference if its end is to be told, or
 * NULL. It is put by the caller.
 */
struct inode *vhostfs_next_ended(struct vhostfs_notify *n)
{
	struct vhostfs_kept *kept, *next;
	struct inode *inode = NULL;

	list_for_each_entry_safe(kept, next, &n->kept, list) {
		if (time_before(jiffies, kept->since + VHOSTFS_HALF_WAIT)) {
			queue_delayed_work(vhostfs_wq, &n->half_work,
					   kept->since + VHOSTFS_HALF_WAIT -
					   jiffies);
			break;
		}
		if (kept->ending)
			inode = igrab(kept->inode);
		vhostfs_drop_kept(n, kept);
		if (inode)
			break;
	}
	return inode;
}

/* Of one superblock, or of all, or one object that is gone. Under event_mutex */
void vhostfs_forget_recent(struct vhostfs_notify *n,
			   const struct super_block *sb,
			   const struct inode *inode)
{
	struct vhostfs_kept *kept, *next;
	unsigned int i;

	for (i = 0; i < VHOSTFS_MAX_RECENT; i++) {
		if (!n->recent[i] || (sb && n->recent[i]->i_sb != sb) ||
		    (inode && n->recent[i] != inode))
			continue;
		iput(n->recent[i]);
		n->recent[i] = NULL;
	}
	list_for_each_entry_safe(kept, next, &n->kept, list)
		if ((!sb || kept->inode->i_sb == sb) &&
		    (!inode || (kept->inode == inode && !kept->ending)))
			vhostfs_drop_kept(n, kept);
}

/*
 * The object of a name in an event, which this guest does not know. It is asked
 * for where that matters: a directory that came has to be held before the next
 * event, which may be about what is in it; and who wants objects by handle
 * wants them of those, too.
 */
struct inode *vhostfs_meet(struct vhostfs_notify *n, struct inode *dir,
			   const struct vhostfs_event *event)
{
	bool is_dir = (event->mask & FS_ISDIR) && READ_ONCE(n->share_mask);
	struct inode *child;

	if ((!is_dir && !READ_ONCE(n->fid_wanted)) ||
	    (event->mask & (FS_DELETE | FS_MOVED_FROM)))
		return NULL;
	child = vhostfs_look_up(dir, event->name, event->namelen);
	if (!child)
		return NULL;
	/*
	 * The name may have been given to another since; to one that is
	 * watched, perhaps, of which the device would have said that it is.
	 */
	if (!event->child_nodeid ? !(event->mask & FS_ISDIR) ==
				   !S_ISDIR(child->i_mode) &&
				   !READ_ONCE(child->i_fsnotify_mask) :
	    vhostfs_is_object(child, event))
		return child;
	iput(child);
	return NULL;
}

/*
 * A directory has a new name. Events of its own come without one, and are told
 * to watchers of its parent by the dentry; so that is moved, by a lookup. Who
 * is in the directory, or has mounted something below it, keeps that.
 */
void vhostfs_follow(struct inode *dir, const struct inode *child,
		    const struct vhostfs_event *event)
{
	if (child && S_ISDIR(child->i_mode) && child->i_sb == dir->i_sb &&
	    (event->mask & FS_MOVED_TO))
		iput(vhostfs_look_up(dir, event->name, event->namelen));
}
