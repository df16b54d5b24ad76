// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: tells the device which inodes are watched here
 *
 * Owns the table of watches and the probes that keep it up to date; knows
 * nothing of events. docs/protocol.md of vhostfs, 4.3.
 */
#define pr_fmt(fmt) "vhostfs: " fmt

#include <linux/fanotify.h>
#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/rbtree.h>
#include <linux/task_work.h>
#include "vhostfs_internal.h"

static bool sync_watches = true;
module_param(sync_watches, bool, 0644);
MODULE_PARM_DESC(sync_watches,
		 "A task that adds a watch continues when the host watches, too (at most 1 s later)");

static bool ignore_probes;
module_param(ignore_probes, bool, 0644);
MODULE_PARM_DESC(ignore_probes,
		 "For tests: behave as if every probe was missed");

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

static struct vhostfs_watch *vhostfs_find_watch(struct vhostfs_notify *n,
						u64 nodeid)
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

/* Does one of the marks have IN_EXCL_UNLINK? */
enum vhostfs_excl {
	VHOSTFS_EXCL_NO,
	VHOSTFS_EXCL_YES,
	VHOSTFS_EXCL_AS_BEFORE,		/* nobody has looked */
};

/*
 * Writes down what the marks on an inode want now. The mask is read under the
 * lock: whoever comes last to the table saw the newest.
 */
static void vhostfs_note(struct vhostfs_notify *n, u64 nodeid, u32 generation,
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

/* ---- the task that adds a watch waits for the host to watch, too --------------- */

/*
 * Who has added a watch may read the file next, and expects an event for every
 * change from then on. The probe runs within the system call, where nothing can
 * wait; so the task waits on its way back to user mode, where it holds nothing.
 */
struct vhostfs_settle {
	struct callback_head work;
	struct vhostfs_notify *notify;
	u64 nodeid;			/* 0: marks on superblocks */
};

/* Whoever marks a superblock waits until the walk has been everywhere */
static bool vhostfs_shares_settled(struct vhostfs_notify *n)
{
	return n->shares_done == n->shares_changed && !atomic_read(&n->nunread);
}

static bool vhostfs_is_settled(struct vhostfs_notify *n, u64 nodeid)
{
	const struct vhostfs_watch *watch;
	bool settled = false;

	spin_lock(&n->watch_lock);
	if (n->session == VHOSTFS_GRANTED) {
		watch = vhostfs_find_watch(n, nodeid);
		settled = nodeid ? !watch || watch->refused ||
				   !(watch->mask & ~watch->told) :
				   vhostfs_shares_settled(n);
	} else {
		settled = n->session == VHOSTFS_NONE ||
			  n->session == VHOSTFS_REFUSED || READ_ONCE(n->tries);
	}
	spin_unlock(&n->watch_lock);
	return settled;
}

static void vhostfs_settle_work(struct callback_head *work)
{
	struct vhostfs_settle *settle = container_of(work,
						     struct vhostfs_settle,
						     work);
	struct vhostfs_notify *n = settle->notify;

	wait_event_killable_timeout(n->settled,
				    vhostfs_is_settled(n, settle->nodeid),
				    settle->nodeid ? VHOSTFS_SETTLE_WAIT :
						     VHOSTFS_WALK_WAIT);
	kfree(settle);
	vhostfs_put(n);
	module_put(THIS_MODULE);
}

static void vhostfs_settle_later(struct vhostfs_notify *n, u64 nodeid)
{
	struct vhostfs_settle *settle;

	if (!READ_ONCE(sync_watches) || (current->flags & PF_KTHREAD))
		return;
	settle = kmalloc(sizeof(*settle), GFP_ATOMIC | __GFP_NOWARN);
	if (!settle)
		return;
	settle->notify = n;
	settle->nodeid = nodeid;
	init_task_work(&settle->work, vhostfs_settle_work);
	/* The inode's superblock holds the module */
	__module_get(THIS_MODULE);
	kref_get(&n->kref);
	if (task_work_add(current, &settle->work, TWA_RESUME)) {
		kfree(settle);
		vhostfs_put(n);
		module_put(THIS_MODULE);
	}
}

/* ---- probes --------------------------------------------------------------------- */

/*
 * Marks come and go in these two functions of fs/notify/mark.c, both called
 * with the connector's lock held. That keeps the inode alive, with its
 * superblock and all that belongs to it, until the first has returned; of the
 * second only what was copied at its entry is used at its return.
 *
 * What stands where a submount will be has the nodeid of the submount's root,
 * and is passed over: the device means the root by it.
 */
struct vhostfs_probe {
	struct vhostfs_notify *notify;
	struct inode *inode;		/* not looked at once it is detached */
	u64 nodeid;			/* 0: a superblock */
	u32 generation;
	enum vhostfs_excl excl;
};

/* Does any of the marks exclude what is unlinked? It is a flag, and in no mask */
static enum vhostfs_excl vhostfs_excludes(struct fsnotify_mark_connector *conn)
{
	struct fsnotify_mark *mark;

	hlist_for_each_entry(mark, &conn->list, obj_list)
		if (vhostfs_is_attached(mark) &&
		    (mark->flags & FSNOTIFY_MARK_FLAG_EXCL_UNLINK))
			return VHOSTFS_EXCL_YES;
	return VHOSTFS_EXCL_NO;
}

/* Does any of the marks want to have objects by handle, and not only names? */
static bool vhostfs_wants_fid(struct fsnotify_mark_connector *conn)
{
	const struct fsnotify_group *group;
	struct fsnotify_mark *mark;

	hlist_for_each_entry(mark, &conn->list, obj_list) {
		group = mark->group;
		/* Of those who take events so, all are fanotify but ourselves */
		if (group->ops->handle_event && group != vhostfs_share_group &&
		    (group->fanotify_data.flags &
		     (FAN_REPORT_FID | FAN_REPORT_TARGET_FID)))
			return true;
	}
	return false;
}

static struct super_block *vhostfs_marked_sb(struct fsnotify_mark_connector *conn)
{
#if VHOSTFS_KERNEL < 610
	return container_of(conn->obj, struct super_block, s_fsnotify_marks);
#else
	return conn->obj;
#endif
}

static int vhostfs_probe_sb(struct vhostfs_probe *probe,
			    struct fsnotify_mark_connector *conn)
{
	struct super_block *sb = vhostfs_marked_sb(conn);
	struct vhostfs_notify *n;

	if (sb->s_type != vhostfs_type)
		return 1;
	n = vhostfs_notify_of(get_fuse_conn_super(sb));
	if (!n || READ_ONCE(ignore_probes))
		return 1;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	probe->notify = n;
	probe->nodeid = 0;
	return 0;
}

#if VHOSTFS_KERNEL >= 610
/*
 * The marks of a mount, found through its own connector. Those that are
 * referenced here stay in that list when their watcher leaves, so nobody is
 * told by a probe then: vhostfs_check_probes() looks for it.
 */
static void vhostfs_note_mount_marks(struct vhostfs_notify *n,
				     struct super_block *sb,
				     struct fsnotify_mark_connector *conn)
{
	struct vhostfs_mount_mark *each;
	struct fsnotify_mark *mark;
	bool known;

	spin_lock(&n->watch_lock);
	hlist_for_each_entry(mark, &conn->list, obj_list) {
		if (!mark->group->ops->handle_event ||
		    n->nmount_marks == VHOSTFS_MAX_MOUNT_MARKS)
			continue;
		known = false;
		list_for_each_entry(each, &n->mount_marks, list)
			known |= each->mark == mark;
		each = known ? NULL : kmalloc(sizeof(*each),
					      GFP_ATOMIC | __GFP_NOWARN);
		if (!each)
			continue;
		refcount_inc(&mark->refcnt);
		each->mark = mark;
		each->sb = sb;
		list_add_tail(&each->list, &n->mount_marks);
		n->nmount_marks++;
	}
	spin_unlock(&n->watch_lock);
}

static int vhostfs_probe_mount(struct vhostfs_probe *probe,
			       struct fsnotify_mark_connector *conn)
{
	struct super_block *sb = ((struct vfsmount *)conn->obj)->mnt_sb;
	struct vhostfs_notify *n;

	if (sb->s_type != vhostfs_type)
		return 1;
	n = vhostfs_notify_of(get_fuse_conn_super(sb));
	if (!n || READ_ONCE(ignore_probes))
		return 1;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	vhostfs_note_mount_marks(n, sb, conn);
	probe->notify = n;
	probe->nodeid = 0;
	return 0;
}
#endif

static int vhostfs_probe_entry(struct kretprobe_instance *ri,
			       struct pt_regs *regs)
{
	struct vhostfs_probe *probe = (struct vhostfs_probe *)ri->data;
	struct fsnotify_mark_connector *conn;
	struct vhostfs_notify *n;
	struct inode *inode;

	conn = (struct fsnotify_mark_connector *)
		regs_get_kernel_argument(regs, 0);
	if (conn->obj && READ_ONCE(conn->type) == FSNOTIFY_OBJ_TYPE_SB)
		return vhostfs_probe_sb(probe, conn);
#if VHOSTFS_KERNEL >= 610
	if (conn->obj && READ_ONCE(conn->type) == FSNOTIFY_OBJ_TYPE_VFSMOUNT)
		return vhostfs_probe_mount(probe, conn);
#endif
	if (READ_ONCE(conn->type) != FSNOTIFY_OBJ_TYPE_INODE || !conn->obj)
		return 1;
#if VHOSTFS_KERNEL < 610
	inode = container_of(conn->obj, struct inode, i_fsnotify_marks);
#else
	inode = conn->obj;
#endif
	if (inode->i_sb->s_type != vhostfs_type || IS_AUTOMOUNT(inode))
		return 1;
	n = vhostfs_notify_of(get_fuse_conn(inode));
	if (!n || READ_ONCE(ignore_probes))
		return 1;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	probe->notify = n;
	probe->inode = inode;
	probe->nodeid = get_node_id(inode);
	probe->generation = inode->i_generation;
	probe->excl = vhostfs_excludes(conn);
	return 0;
}

static void vhostfs_probed(struct kretprobe_instance *ri, bool attached)
{
	struct vhostfs_probe *probe = (struct vhostfs_probe *)ri->data;
	struct vhostfs_notify *n = probe->notify;
	bool waits;

	spin_lock(&n->watch_lock);
	if (!probe->nodeid) {
		n->shares_changed++;
		vhostfs_wake_session(n);
	} else if (n->session != VHOSTFS_NONE) {
		vhostfs_note(n, probe->nodeid, probe->generation,
			     attached ? probe->inode : NULL, probe->excl);
		vhostfs_wake_session(n);
	}
	waits = attached && n->session != VHOSTFS_NONE &&
		n->session != VHOSTFS_REFUSED;
	spin_unlock(&n->watch_lock);
	if (waits && !vhostfs_is_settled(n, probe->nodeid))
		vhostfs_settle_later(n, probe->nodeid);
}

static int vhostfs_recalc_return(struct kretprobe_instance *ri,
				 struct pt_regs *regs)
{
	vhostfs_probed(ri, true);
	return 0;
}

static int vhostfs_detach_return(struct kretprobe_instance *ri,
				 struct pt_regs *regs)
{
	vhostfs_probed(ri, false);
	return 0;
}

static bool vhostfs_no_probes;

/* Neither can sleep, so no more of them than CPUs run at a time */
static struct kretprobe vhostfs_probes[] = {
	{
		.kp.symbol_name	= "__fsnotify_recalc_mask",
		.entry_handler	= vhostfs_probe_entry,
		.handler	= vhostfs_recalc_return,
		.data_size	= sizeof(struct vhostfs_probe),
		.maxactive	= 64,
	}, {
		.kp.symbol_name	= "fsnotify_detach_connector_from_object",
		.entry_handler	= vhostfs_probe_entry,
		.handler	= vhostfs_detach_return,
		.data_size	= sizeof(struct vhostfs_probe),
		.maxactive	= 64,
	},
};

unsigned long vhostfs_probes_missed(void)
{
	unsigned long missed = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(vhostfs_probes); i++)
		missed += vhostfs_probes[i].nmissed +
			  vhostfs_probes[i].kp.nmissed;
	return missed;
}

/* Without probes, or when some were missed, only walks find all watches */
static void vhostfs_check_probes(struct work_struct *work);
static DECLARE_DELAYED_WORK(vhostfs_probe_work, vhostfs_check_probes);

static void vhostfs_check_probes(struct work_struct *work)
{
	static unsigned long seen;
	unsigned long missed = vhostfs_probes_missed();
	struct vhostfs_mount_mark *each;
	struct vhostfs_notify *n;
	bool left = false;

	mutex_lock(&vhostfs_devices_mutex);
	list_for_each_entry(n, &vhostfs_devices, list) {
		spin_lock(&n->watch_lock);
		if (missed != seen || vhostfs_no_probes)
			n->resync = true;
		list_for_each_entry(each, &n->mount_marks, list)
			if (!vhostfs_is_attached(each->mark))
				left = true;
		n->shares_changed += left;
		if (n->resync || left)
			vhostfs_wake_session(n);
		spin_unlock(&n->watch_lock);
		left = false;
	}
	mutex_unlock(&vhostfs_devices_mutex);
	seen = missed;
	queue_delayed_work(vhostfs_wq, &vhostfs_probe_work, 2 * HZ);
}

static void vhostfs_remove_probes(int count)
{
	while (count--)
		unregister_kretprobe(&vhostfs_probes[count]);
}

static void vhostfs_add_probes(void)
{
	int i, err;

	for (i = 0; i < ARRAY_SIZE(vhostfs_probes); i++) {
		err = register_kretprobe(&vhostfs_probes[i]);
		if (err) {
			pr_warn("no probe on %s (%d): watches are found by walks\n",
				vhostfs_probes[i].kp.symbol_name, err);
			vhostfs_remove_probes(i);
			vhostfs_no_probes = true;
			return;
		}
	}
}

void vhostfs_register_probes(void)
{
	vhostfs_add_probes();
	queue_delayed_work(vhostfs_wq, &vhostfs_probe_work, 2 * HZ);
}

void vhostfs_unregister_probes(void)
{
	if (!vhostfs_no_probes)
		vhostfs_remove_probes(ARRAY_SIZE(vhostfs_probes));
	cancel_delayed_work_sync(&vhostfs_probe_work);
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
