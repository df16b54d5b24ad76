// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: elements: checked, joined, and what each means here
 *
 * Knows the layout of an element, but not how it came. The layout, its forms and
 * what is done about each: docs/protocol.md of vhostfs, 5 and 8.
 */

#include <linux/dcache.h>
#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/iversion.h>
#include "vhostfs_internal.h"

/* ---- links ------------------------------------------------------------------------ */

/*
 * A watched object has lost or got a link: how many are there? The FUSE core
 * does not ask before it removes one for this guest, and when that is the last
 * but counts as one of several, nobody says that the object has ended. Nor does
 * a host source that knows removed names but not whose they were. And a dentry
 * of a name that only the host removed keeps the object from ending with its
 * last name; which one is not known, so all that nobody uses go.
 *
 * That there is none left may be ahead of what the device is about to tell, so
 * the end is told at once only if @late.
 *
 * The inode lock keeps the guest's own unlink() and link() away.
 */
static void vhostfs_check_links(struct vhostfs_notify *n, struct inode *inode,
				bool late)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct fuse_conn *fc = get_fuse_conn(inode);
	struct vhostfs_request *req;
	bool gone = false;

	inode_lock(inode);
	req = vhostfs_getattr(n, inode);
	if (req && !req->error) {
		gone = !req->getattr_out.attr.nlink;
		spin_lock(&fi->lock);
		fi->attr_version = atomic64_inc_return(&fc->attr_version);
		if (!gone && !S_ISDIR(inode->i_mode))
			set_nlink(inode, req->getattr_out.attr.nlink);
		spin_unlock(&fi->lock);
	} else if (req) {
		gone = req->error == -ESTALE || req->error == -ENOENT;
	}
	inode_unlock(inode);
	kfree(req);
	if (gone && (late || !vhostfs_keep(n, inode, true)))
		vhostfs_raise_delete_self(n, inode);
	else if (!gone && !S_ISDIR(inode->i_mode))
		d_prune_aliases(inode);
}

/* The same for who had a name, if anybody */
static void vhostfs_check_former(struct vhostfs_notify *n, struct inode *former)
{
	if (former)
		vhostfs_check_links(n, former, false);
	iput(former);
}

/* ---- events in directories and on objects ------------------------------------- */

/* The cookie that watchers get for the one on the wire, the same for both halves */
static u32 vhostfs_local_cookie(struct vhostfs_notify *n, u32 wire)
{
	unsigned int i;
	u32 local;

	if (wire)
		for (i = 0; i < VHOSTFS_MAX_COOKIES; i++)
			if (n->cookies[i].wire == wire)
				return n->cookies[i].local;

	local = fsnotify_get_cookie();
	if (wire) {
		i = n->next_cookie++ % VHOSTFS_MAX_COOKIES;
		n->cookies[i].wire = wire;
		n->cookies[i].local = local;
	}
	return local;
}

static void vhostfs_entry_event(struct vhostfs_notify *n, struct fuse_conn *fc,
				const struct vhostfs_event *event)
{
	struct inode *dir, *child;
	u32 cookie = 0;

	dir = vhostfs_find(fc, event->nodeid, event->generation);
	if (!dir || !S_ISDIR(dir->i_mode)) {
		vhostfs_count(n, VHOSTFS_STALE);
		iput(dir);
		return;
	}

	/* The name may be all that keeps them in memory */
	child = vhostfs_find_child(fc, NULL, event);
	vhostfs_keep_former(n, dir, event);
	vhostfs_check_former(n, vhostfs_stale_entry(dir, event));
	if (!child)
		child = vhostfs_find_child(fc, NULL, event);
	if (child)
		vhostfs_stale_attr(child, STATX_BASIC_STATS);
	else
		child = vhostfs_meet(n, dir, event);
	vhostfs_follow(dir, child, event);
	if (event->mask & (FS_MOVED_FROM | FS_MOVED_TO)) {
		cookie = vhostfs_local_cookie(n, event->cookie);
		vhostfs_raise_rename(n,
				     event->mask & FS_MOVED_FROM ? dir : NULL,
				     event->mask & FS_MOVED_TO ? dir : NULL,
				     child, event, event);
	}
	vhostfs_raise_entry(n, dir, child, event, cookie);
	if (child && (event->mask & FS_DELETE))
		vhostfs_forget_recent(n, NULL, child);
	iput(child);
	iput(dir);
}

static void vhostfs_rename_event(struct vhostfs_notify *n, struct fuse_conn *fc,
				 const struct vhostfs_event *from,
				 const struct vhostfs_event *to)
{
	struct inode *old_dir, *new_dir, *former, *child = NULL;
	u32 cookie;

	old_dir = vhostfs_find(fc, from->nodeid, from->generation);
	new_dir = vhostfs_find(fc, to->nodeid, to->generation);
	if (!old_dir || !new_dir || old_dir->i_sb != new_dir->i_sb ||
	    !S_ISDIR(old_dir->i_mode) || !S_ISDIR(new_dir->i_mode)) {
		vhostfs_entry_event(n, fc, from);
		vhostfs_entry_event(n, fc, to);
		goto out;
	}

	vhostfs_keep_former(n, new_dir, to);
	former = vhostfs_stale_entry(new_dir, to);
	child = vhostfs_find_child(fc, NULL, to);
	if (child)
		vhostfs_stale_attr(child, STATX_BASIC_STATS);
	else
		child = vhostfs_meet(n, new_dir, to);
	vhostfs_follow(new_dir, child, to);
	iput(vhostfs_stale_entry(old_dir, from));

	cookie = fsnotify_get_cookie();
	vhostfs_raise_rename(n, old_dir, new_dir, child, from, to);
	vhostfs_raise_entry(n, old_dir, child, from, cookie);
	vhostfs_raise_entry(n, new_dir, child, to, cookie);
	vhostfs_check_former(n, former);
out:
	iput(child);
	iput(new_dir);
	iput(old_dir);
}

static void vhostfs_self_event(struct vhostfs_notify *n, struct inode *inode,
			       u32 bit, bool for_parent, bool unlinked)
{
	vhostfs_stale_object(n, inode, bit);
	if (bit == FS_DELETE_SELF) {
		vhostfs_raise_delete_self(n, inode);
		return;
	}
	vhostfs_raise_self(n, inode, bit, for_parent, unlinked);
	/* Of a file and without a name: it may be the link count */
	if (bit == FS_ATTRIB && !S_ISDIR(inode->i_mode) &&
	    READ_ONCE(inode->i_fsnotify_mask))
		vhostfs_check_links(n, inode, false);
}

static void vhostfs_object_event(struct vhostfs_notify *n, struct fuse_conn *fc,
				 const struct vhostfs_event *event)
{
	/* An older server means the parent always, and one that knows it says so */
	bool for_parent = !(n->granted & FUSE_FSNOTIFY_PARENT) ||
			  (event->flags & FSNOTIFY_FOR_PARENT);
	bool unlinked = event->flags & FSNOTIFY_UNLINKED;
	u32 bit = event->mask & ~FS_ISDIR;
	struct inode *dir, *child;
	struct dentry *entry;

	dir = vhostfs_find(fc, event->nodeid, event->generation);
	if (!event->namelen) {
		if (dir)
			vhostfs_self_event(n, dir, bit, for_parent &&
					   (bit & VHOSTFS_CHILD_EVENTS),
					   unlinked);
		else
			vhostfs_count(n, VHOSTFS_STALE);
		iput(dir);
		return;
	}

	if (dir && !S_ISDIR(dir->i_mode)) {
		iput(dir);
		dir = NULL;
	}
	child = vhostfs_find_child(fc, dir, event);
	if (child) {
		vhostfs_stale_object(n, child, bit);
	} else if (dir && !event->child_nodeid) {
		/* Found since the device wrote this; caches only */
		entry = vhostfs_lookup_cached(dir, event->name, event->namelen);
		if (entry && d_really_is_positive(entry))
			vhostfs_stale_object(n, d_inode(entry), bit);
		dput(entry);
	}
	if (!child && dir)
		child = vhostfs_meet(n, dir, event);

	if (dir)
		vhostfs_raise_child(n, dir, child, event, bit);
	else if (child)
		vhostfs_raise_self(n, child, bit, false, unlinked);
	else
		vhostfs_count(n, VHOSTFS_STALE);
	iput(child);
	iput(dir);
}

/* ---- halves of renames ---------------------------------------------------------- */

static void vhostfs_drop_half(struct vhostfs_notify *n,
			      struct vhostfs_half *half)
{
	list_del(&half->list);
	n->nhalves--;
	kfree(half);
}

void vhostfs_free_halves(struct vhostfs_notify *n)
{
	struct vhostfs_half *half, *next;

	list_for_each_entry_safe(half, next, &n->halves, list)
		vhostfs_drop_half(n, half);
}

/* The partner did not come in time, or too many wait: it is a plain event */
static void vhostfs_give_up_half(struct vhostfs_notify *n, struct fuse_conn *fc,
				 struct vhostfs_half *half)
{
	vhostfs_count(n, VHOSTFS_HALVES_TIMED_OUT);
	vhostfs_entry_event(n, fc, &half->event);
	vhostfs_drop_half(n, half);
}

static void vhostfs_half_event(struct vhostfs_notify *n, struct fuse_conn *fc,
			       const struct vhostfs_event *event)
{
	struct vhostfs_half *half;

	list_for_each_entry(half, &n->halves, list) {
		if (half->event.cookie != event->cookie ||
		    !((half->event.mask ^ event->mask) & FS_MOVED_FROM))
			continue;
		if (event->mask & FS_MOVED_TO)
			vhostfs_rename_event(n, fc, &half->event, event);
		else
			vhostfs_rename_event(n, fc, event, &half->event);
		vhostfs_drop_half(n, half);
		return;
	}

	half = kmalloc(sizeof(*half), GFP_KERNEL);
	if (!half) {
		vhostfs_entry_event(n, fc, event);
		return;
	}
	if (n->nhalves == VHOSTFS_MAX_HALVES)
		vhostfs_give_up_half(n, fc, list_first_entry(&n->halves,
							     struct vhostfs_half,
							     list));
	half->event = *event;
	half->arrived = jiffies;
	list_add_tail(&half->list, &n->halves);
	if (!n->nhalves++)
		queue_delayed_work(vhostfs_wq, &n->half_work,
				   VHOSTFS_HALF_WAIT);
}

/* What has waited long enough; @all: nothing else waits in front of it */
void vhostfs_expire(struct vhostfs_notify *n, bool all)
{
	struct vhostfs_half *half, *next;
	struct fuse_conn *fc;
	struct inode *inode;

	mutex_lock(&n->event_mutex);
	fc = n->fc;
	if (fc)
		down_read(&fc->killsb);
	list_for_each_entry_safe(half, next, &n->halves, list) {
		if (time_before(jiffies, half->arrived + VHOSTFS_HALF_WAIT)) {
			queue_delayed_work(vhostfs_wq, &n->half_work,
					   half->arrived + VHOSTFS_HALF_WAIT -
					   jiffies);
			break;
		}
		if (fc)
			vhostfs_give_up_half(n, fc, half);
		else
			vhostfs_drop_half(n, half);
	}
	while (fc && all && (inode = vhostfs_next_ended(n))) {
		if (inode->i_nlink)
			vhostfs_check_links(n, inode, true);
		iput(inode);
	}
	if (fc)
		up_read(&fc->killsb);
	mutex_unlock(&n->event_mutex);
}

/* The one worker does it, after what has come, so that events stay in order */
void vhostfs_half_timeout(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(to_delayed_work(work),
						struct vhostfs_notify,
						half_work);

	queue_work(vhostfs_wq, &n->receive_work);
}

/* ---- elements ------------------------------------------------------------------- */

/* Checks an element and takes it over; says what is wrong with it, or NULL */
static const char *vhostfs_check(const struct vhostfs_wire_element *wire,
				 unsigned int len, struct vhostfs_event *event)
{
	u64 mask;

	if (len < sizeof(*wire))
		return "shorter than an element";
	if (le32_to_cpu(wire->error) != FUSE_NOTIFY_FSNOTIFY || wire->unique)
		return "not FUSE_NOTIFY_FSNOTIFY";
	if (wire->reserved || (le32_to_cpu(wire->flags) &
			       ~(FSNOTIFY_SPLIT_RENAME | FSNOTIFY_FOR_PARENT |
				 FSNOTIFY_CACHES | FSNOTIFY_UNLINKED)))
		return "reserved fields";

	mask = le64_to_cpu(wire->mask);
	event->mask = mask & (VHOSTFS_EVENTS | FS_Q_OVERFLOW | FS_ISDIR);
	if (event->mask != mask || !is_power_of_2(mask & ~(u64)FS_ISDIR))
		return "mask";
	event->nodeid = le64_to_cpu(wire->nodeid);
	event->generation = le32_to_cpu(wire->generation);
	event->child_nodeid = le64_to_cpu(wire->child_nodeid);
	event->child_generation = le32_to_cpu(wire->child_generation);
	event->cookie = le32_to_cpu(wire->cookie);
	event->flags = le32_to_cpu(wire->flags);
	event->namelen = le32_to_cpu(wire->namelen);

	if (event->namelen > NAME_MAX ||
	    le32_to_cpu(wire->len) != sizeof(*wire) + event->namelen ||
	    le32_to_cpu(wire->len) > len)
		return "length";
	memcpy(event->name, wire->name, event->namelen);
	event->name[event->namelen] = '\0';
	if (memchr(event->name, '/', event->namelen) ||
	    memchr(event->name, '\0', event->namelen) ||
	    !strcmp(event->name, ".") || !strcmp(event->name, ".."))
		return "its name";

	if (!event->child_nodeid && event->child_generation)
		return "generation of no child";
	if (mask & FS_Q_OVERFLOW) {
		if (event->mask != FS_Q_OVERFLOW || event->nodeid ||
		    event->generation || event->namelen ||
		    event->child_nodeid || event->cookie || event->flags)
			return "more in an overflow";
		return NULL;
	}
	if (!event->nodeid)
		return "no nodeid";
	if ((mask & VHOSTFS_ENTRY_EVENTS) && !event->namelen)
		return "event in a directory without a name";
	if (event->flags & FSNOTIFY_CACHES)
		return event->flags != FSNOTIFY_CACHES || event->cookie ||
		       (!event->namelen && event->child_nodeid) ?
		       "more than caches" : NULL;
	if ((event->flags & FSNOTIFY_UNLINKED) &&
	    (event->flags != FSNOTIFY_UNLINKED || !(mask & VHOSTFS_PATH_EVENTS)))
		return "unlinked, but not by a path";
	if ((event->flags & FSNOTIFY_FOR_PARENT) &&
	    (event->namelen || !(mask & FS_ISDIR) ||
	     !(mask & VHOSTFS_CHILD_EVENTS)))
		return "for the parent of no directory";
	if (mask & (FS_MOVED_FROM | FS_MOVED_TO))
		return event->flags && !event->cookie ?
		       "half of a rename without a cookie" : NULL;
	if (event->cookie || (event->flags & FSNOTIFY_SPLIT_RENAME))
		return "cookie without a rename";
	if ((mask & VHOSTFS_SELF_EVENTS) && event->namelen)
		return "name of the object itself";
	if (!event->namelen && event->child_nodeid)
		return "child without a name";
	return NULL;
}

bool vhostfs_is_granted(struct vhostfs_notify *n)
{
	return READ_ONCE(n->session) == VHOSTFS_GRANTED;
}

/* An element has come, and vhostfs_element() has it after those before it */
void vhostfs_first_look(struct vhostfs_notify *n, const void *data,
			unsigned int len)
{
	struct vhostfs_event *event = &n->look_event;

	if (vhostfs_check(data, len, event) ||
	    !(event->flags & FSNOTIFY_CACHES))
		return;
	mutex_lock(&n->look_mutex);
	if (n->fc && vhostfs_is_granted(n)) {
		down_read(&n->fc->killsb);
		vhostfs_expire_caches(n, n->fc, event);
		up_read(&n->fc->killsb);
	}
	mutex_unlock(&n->look_mutex);
}

void vhostfs_element(struct vhostfs_notify *n, const void *data,
		     unsigned int len)
{
	struct vhostfs_event *event = &n->event;
	struct fuse_conn *fc;
	const char *fault;

	vhostfs_count(n, VHOSTFS_RECEIVED);
	fault = vhostfs_check(data, len, event);
	if (fault) {
		vhostfs_count(n, VHOSTFS_MALFORMED);
		/* It may be acted on when the device has gone */
		spin_lock(&n->vq_lock);
		if (n->running)
			dev_warn_ratelimited(&n->vdev->dev,
					     "notification dropped, malformed: %s\n",
					     fault);
		spin_unlock(&n->vq_lock);
		if (!vhostfs_is_coherent(n))
			return;
		/* It may have said what is no longer right */
		event->mask = FS_Q_OVERFLOW;
		event->flags = 0;
	}

	mutex_lock(&n->event_mutex);
	fc = n->fc;
	if (!fc || !vhostfs_is_granted(n)) {
		vhostfs_count(n, VHOSTFS_STALE);
		goto out;
	}
	down_read(&fc->killsb);
	if (event->mask & FS_Q_OVERFLOW)
		vhostfs_overflow_event(n, fc);
	else if (event->flags & FSNOTIFY_CACHES)
		vhostfs_invalidate(n, fc, event);
	else if (event->flags & FSNOTIFY_SPLIT_RENAME)
		vhostfs_half_event(n, fc, event);
	else if (event->mask & VHOSTFS_ENTRY_EVENTS)
		vhostfs_entry_event(n, fc, event);
	else
		vhostfs_object_event(n, fc, event);
	up_read(&fc->killsb);
out:
	mutex_unlock(&n->event_mutex);
}
