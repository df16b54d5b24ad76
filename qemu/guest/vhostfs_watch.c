// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: tells the device which inodes are watched here
 *
 * Owns the table of watches, which probes keep up to date (vhostfs_probe.c), and
 * tells the device what differs; knows nothing of events. docs/protocol.md of
 * vhostfs, 4.3.
 */

#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/rbtree.h>
#include "vhostfs_internal.h"

/*
 * The table has an entry for every inode that is watched or that the device
 * believes to be. Probes write to it what an inode's marks want now; the worker
 * sends what differs from what the device was told, one request for an inode
 * at a time. What a probe could not write is found by a walk over the inodes.
 */

/* What the device is to report for marks that want @mask */
u32 vhostfs_wish(u32 mask)
{
	u32 wish = mask & (VHOSTFS_EVENTS | FS_EVENT_ON_CHILD);

	if (mask & FS_RENAME)
		wish |= FS_MOVED_FROM | FS_MOVED_TO;
	if (!(wish & VHOSTFS_EVENTS))
		return 0;
	/* A watch ends with its object, whether that was asked for or not */
	return wish | FS_DELETE_SELF;
}

struct vhostfs_watch *vhostfs_find_watch(struct vhostfs_notify *n, u64 nodeid)
{
	struct rb_node *node = n->watches.rb_node;
	struct vhostfs_watch *watch;

	while (node) {
		watch = rb_entry(node, struct vhostfs_watch, node);
		if (nodeid == watch->nodeid)
			return watch;
		node = nodeid < watch->nodeid ? node->rb_left : node->rb_right;
	}
	return NULL;
}

static struct vhostfs_watch *vhostfs_new_watch(struct vhostfs_notify *n,
					       u64 nodeid, u32 generation)
{
	struct rb_node **link = &n->watches.rb_node, *parent = NULL;
	struct vhostfs_watch *watch;

	watch = kzalloc(sizeof(*watch), GFP_ATOMIC | __GFP_NOWARN);
	if (!watch)
		return NULL;
	watch->nodeid = nodeid;
	watch->generation = generation;
	INIT_LIST_HEAD(&watch->changed);
	while (*link) {
		parent = *link;
		if (nodeid < rb_entry(parent, struct vhostfs_watch,
				      node)->nodeid)
			link = &parent->rb_left;
		else
			link = &parent->rb_right;
	}
	rb_link_node(&watch->node, parent, link);
	rb_insert_color(&watch->node, &n->watches);
	n->nwatches++;
	return watch;
}

static void vhostfs_set_refused(struct vhostfs_notify *n,
				struct vhostfs_watch *watch, bool refused)
{
	n->nrefused += refused - watch->refused;
	watch->refused = refused;
}

static void vhostfs_drop_watch(struct vhostfs_notify *n,
			       struct vhostfs_watch *watch)
{
	vhostfs_set_refused(n, watch, false);
	list_del(&watch->changed);
	rb_erase(&watch->node, &n->watches);
	n->nwatches--;
	kfree(watch);
}

void vhostfs_free_watches(struct vhostfs_notify *n)
{
	struct rb_node *node;

	while ((node = rb_first(&n->watches)))
		vhostfs_drop_watch(n, rb_entry(node, struct vhostfs_watch,
					       node));
}

/* The entry was changed: is there something to send, or is it done with? */
static void vhostfs_watch_changed(struct vhostfs_notify *n,
				  struct vhostfs_watch *watch)
{
	if (watch->sending)
		return;
	list_del_init(&watch->changed);
	if (!watch->mask && !watch->told)
		vhostfs_drop_watch(n, watch);
	else if (watch->mask != watch->told && !watch->refused)
		list_add_tail(&watch->changed, &n->changed);
}

/* Wants something else, which the device may not refuse */
static void vhostfs_set_mask(struct vhostfs_notify *n,
			     struct vhostfs_watch *watch, u32 mask)
{
	if (watch->mask == mask)
		return;
	watch->mask = mask;
	vhostfs_set_refused(n, watch, false);
}

/*
 * The device is to say what happens through names that are gone, and finds that
 * out by what happens to the names.
 */
static u32 vhostfs_excluding(u32 mask)
{
	if (!(mask & VHOSTFS_PATH_EVENTS))
		return mask;
	if (mask & FS_EVENT_ON_CHILD)
		mask |= VHOSTFS_ENTRY_EVENTS;
	return mask | VHOSTFS_EXCL_UNLINK;
}

/*
 * Writes down what the marks on an inode want now. The mask is read under the
 * lock: whoever comes last to the table saw the newest.
 */
void vhostfs_note(struct vhostfs_notify *n, u64 nodeid, u32 generation,
		  struct inode *inode, enum vhostfs_excl excl)
{
	struct vhostfs_watch *watch;
	u32 mask = 0;

	lockdep_assert_held(&n->watch_lock);
	if (inode)
		mask = vhostfs_wish(READ_ONCE(inode->i_fsnotify_mask));
	/* It tells of links, for vhostfs_check_links() */
	if (mask && !S_ISDIR(inode->i_mode))
		mask |= FS_ATTRIB;
	watch = vhostfs_find_watch(n, nodeid);
	if (excl == VHOSTFS_EXCL_AS_BEFORE && watch && watch->excl_unlink &&
	    watch->generation == generation)
		excl = VHOSTFS_EXCL_YES;
	if (excl == VHOSTFS_EXCL_YES)
		mask = vhostfs_excluding(mask);
	if (!watch && !mask)
		return;
	if (!watch)
		watch = vhostfs_new_watch(n, nodeid, generation);
	if (!watch) {
		n->resync = true;
		return;
	}
	if (watch->generation != generation) {
		/* Late news of an object whose number another one has got */
		if (!inode || fuse_is_bad(inode))
			return;
		watch->generation = generation;
		watch->told = 0;
		vhostfs_set_refused(n, watch, false);
	}
	vhostfs_set_mask(n, watch, mask);
	watch->excl_unlink = excl == VHOSTFS_EXCL_YES;
	watch->pass = n->pass;
	vhostfs_watch_changed(n, watch);
}

/* Under watch_lock: does the worker have to be woken, and when? */
void vhostfs_wake_session(struct vhostfs_notify *n)
{
	if (n->session == VHOSTFS_GRANTED &&
	    (!list_empty(&n->changed) || n->shares_done != n->shares_changed))
		mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	else if (n->resync || n->retry)
		queue_delayed_work(vhostfs_wq, &n->session_work,
				   VHOSTFS_REPAIR_WAIT);
}

/* ---- sending -------------------------------------------------------------------- */

static bool vhostfs_look_at_marks(struct inode *inode, void *arg)
{
	struct vhostfs_notify *n = arg;

	if (READ_ONCE(inode->i_fsnotify_mask) && !IS_AUTOMOUNT(inode)) {
		spin_lock(&n->watch_lock);
		vhostfs_note(n, get_node_id(inode), inode->i_generation,
			     inode, VHOSTFS_EXCL_AS_BEFORE);
		spin_unlock(&n->watch_lock);
	}
	return false;
}

static void vhostfs_no_act(struct inode *inode, void *arg)
{
}

/* Brings the table up to date by the marks on all inodes. Under session_mutex */
void vhostfs_resync(struct vhostfs_notify *n)
{
	struct vhostfs_watch *watch;
	struct rb_node *node, *next;
	struct fuse_mount *fm;

	vhostfs_count(n, VHOSTFS_RESYNCS);
	spin_lock(&n->watch_lock);
	n->resync = false;
	n->pass++;
	spin_unlock(&n->watch_lock);

	down_read(&n->fc->killsb);
	list_for_each_entry(fm, &n->fc->mounts, fc_entry)
		if (fm->sb)
			vhostfs_walk(fm->sb, vhostfs_look_at_marks,
				     vhostfs_no_act, n);
	up_read(&n->fc->killsb);

	spin_lock(&n->watch_lock);
	for (node = rb_first(&n->watches); node; node = next) {
		next = rb_next(node);
		watch = rb_entry(node, struct vhostfs_watch, node);
		/* Probes have marked what came meanwhile */
		if (watch->pass != n->pass)
			vhostfs_set_mask(n, watch, 0);
		vhostfs_watch_changed(n, watch);
	}
	n->next_resync = jiffies + VHOSTFS_REPAIR_WAIT;
	spin_unlock(&n->watch_lock);
}

/*
 * Perhaps there is room now for what was refused. The more it is, the longer
 * until the next try: a thousand in a second.
 */
void vhostfs_retry_refused(struct vhostfs_notify *n)
{
	struct vhostfs_watch *watch;
	struct rb_node *node, *next;

	spin_lock(&n->watch_lock);
	n->retry = false;
	n->next_retry = jiffies + VHOSTFS_REPAIR_WAIT *
			(1 + n->nrefused / VHOSTFS_RETRIES);
	for (node = rb_first(&n->watches); node; node = next) {
		next = rb_next(node);
		watch = rb_entry(node, struct vhostfs_watch, node);
		if (!watch->refused)
			continue;
		vhostfs_set_refused(n, watch, false);
		vhostfs_watch_changed(n, watch);
	}
	spin_unlock(&n->watch_lock);
}

/* Under watch_lock: is it time? Else the worker comes back then */
bool vhostfs_is_due(struct vhostfs_notify *n, bool wanted,
		    unsigned long when)
{
	if (!wanted)
		return false;
	if (time_after_eq(jiffies, when))
		return true;
	queue_delayed_work(vhostfs_wq, &n->session_work, when - jiffies);
	return false;
}

/*
 * What the device reports after its answer; true: it refused. Until then only
 * what it reported before and will report was certain.
 */
static bool vhostfs_watch_answered(struct vhostfs_notify *n,
				   struct vhostfs_watch *watch,
				   const struct vhostfs_request *req, int error)
{
	/* The number has another object, of which the device was told nothing */
	if (watch->generation != le32_to_cpu(req->watch_in.generation))
		return false;

	switch (error) {
	case 0:
	case -ESTALE:
		/* Not known any more: there is nothing to watch there */
		watch->told = req->mask;
		return false;
	case -ENOMEM:
		/* Perhaps ours; a walk sends it again */
		watch->told = req->told;
		n->resync = true;
		return false;
	default:
		/* The earlier watch stays; to end one is not to be refused */
		watch->told = req->mask ? req->told : 0;
		if (watch->mask == req->mask)
			vhostfs_set_refused(n, watch, true);
		/* Ours: the device has gone */
		return req->mask && error != -ENOTCONN &&
		       error != -ECONNABORTED;
	}
}

static void vhostfs_watch_end(struct vhostfs_request *req, int error)
{
	struct vhostfs_notify *n = req->notify;
	struct vhostfs_watch *watch = req->watch;
	bool log = false;

	spin_lock(&n->watch_lock);
	n->sending--;
	watch->sending = false;
	if (vhostfs_watch_answered(n, watch, req, error)) {
		log = !n->full_logged;
		n->full_logged = true;
	} else if (!error && !req->mask && n->nrefused) {
		n->retry = true;
	}
	/* That a watch on what is gone ends is no refusal */
	if (error && (error != -ESTALE || req->mask))
		vhostfs_count(n, VHOSTFS_WATCHES_REFUSED);
	if (!error || !n->resync || watch->mask == watch->told)
		vhostfs_watch_changed(n, watch);
	vhostfs_wake_session(n);
	spin_unlock(&n->watch_lock);
	wake_up_all(&n->settled);

	if (log)
		dev_warn(&n->vdev->dev,
			 "the host does not watch all that is watched here: error %d\n",
			 error);
	kfree(req);
}

/* Sends one of the changes; false: there is none, or enough are on their way */
bool vhostfs_send_watch(struct vhostfs_notify *n, struct fuse_mount *fm)
{
	struct vhostfs_watch *watch;
	struct vhostfs_request *req;
	u32 generation;

	req = vhostfs_new_request(FUSE_FSNOTIFY_WATCH, 0,
				  sizeof(req->watch_in), 0);
	spin_lock(&n->watch_lock);
	if (!req || n->sending >= VHOSTFS_WATCHES_IN_FLIGHT ||
	    list_empty(&n->changed)) {
		if (!req) {
			n->resync = true;
			vhostfs_wake_session(n);
		}
		spin_unlock(&n->watch_lock);
		kfree(req);
		return false;
	}
	watch = list_first_entry(&n->changed, struct vhostfs_watch, changed);
	list_del_init(&watch->changed);
	watch->sending = true;
	n->sending++;
	req->end = vhostfs_watch_end;
	req->watch = watch;
	req->mask = watch->mask;
	req->told = watch->told;
	watch->told &= watch->mask;
	req->args.nodeid = watch->nodeid;
	generation = watch->generation;
	spin_unlock(&n->watch_lock);

	req->watch_in.mask = cpu_to_le64(req->mask);
	req->watch_in.generation = cpu_to_le32(generation);
	vhostfs_count(n, VHOSTFS_WATCHES_SENT);
	vhostfs_send(n, fm, req);
	return true;
}
