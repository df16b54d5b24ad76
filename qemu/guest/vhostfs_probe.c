// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: sees marks come and go
 *
 * Writes what it sees to the table of watches (vhostfs_watch.c), and has the
 * task that adds a watch wait until the device watches, too.
 */
#define pr_fmt(fmt) "vhostfs: " fmt

#include <linux/fanotify.h>
#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/kprobes.h>
#include <linux/module.h>
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

static struct inode *vhostfs_marked_inode(struct fsnotify_mark_connector *conn)
{
#if VHOSTFS_KERNEL < 610
	return container_of(conn->obj, struct inode, i_fsnotify_marks);
#else
	return conn->obj;
#endif
}

static struct super_block *vhostfs_marked_sb(struct fsnotify_mark_connector *conn)
{
#if VHOSTFS_KERNEL < 610
	return container_of(conn->obj, struct super_block, s_fsnotify_marks);
#else
	return conn->obj;
#endif
}

/* Marks on @sb itself, to begin with; false: they are nothing to us */
static bool vhostfs_probe_sb(struct vhostfs_probe *probe,
			     struct fsnotify_mark_connector *conn,
			     struct super_block *sb)
{
	struct vhostfs_notify *n;

	if (sb->s_type != vhostfs_type)
		return false;
	n = vhostfs_notify_of(get_fuse_conn_super(sb));
	if (!n || READ_ONCE(ignore_probes))
		return false;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	probe->notify = n;
	probe->nodeid = 0;
	return true;
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

/* What is marked on a mount is its superblock, too */
static bool vhostfs_probe_mount(struct vhostfs_probe *probe,
				struct fsnotify_mark_connector *conn)
{
	struct super_block *sb = ((struct vfsmount *)conn->obj)->mnt_sb;

	if (!vhostfs_probe_sb(probe, conn, sb))
		return false;
	vhostfs_note_mount_marks(probe->notify, sb, conn);
	return true;
}
#endif

static bool vhostfs_probe_inode(struct vhostfs_probe *probe,
				struct fsnotify_mark_connector *conn)
{
	struct inode *inode = vhostfs_marked_inode(conn);

	if (IS_AUTOMOUNT(inode) || !vhostfs_probe_sb(probe, conn, inode->i_sb))
		return false;
	probe->inode = inode;
	probe->nodeid = get_node_id(inode);
	probe->generation = inode->i_generation;
	probe->excl = vhostfs_excludes(conn);
	return true;
}

/* Returns 0 if the function's return is to be seen as well, as kprobes want it */
static int vhostfs_probe_entry(struct kretprobe_instance *ri,
			       struct pt_regs *regs)
{
	struct vhostfs_probe *probe = (struct vhostfs_probe *)ri->data;
	struct fsnotify_mark_connector *conn;

	conn = (struct fsnotify_mark_connector *)
		regs_get_kernel_argument(regs, 0);
	if (!conn->obj)
		return 1;
	switch (READ_ONCE(conn->type)) {
	case FSNOTIFY_OBJ_TYPE_INODE:
		return !vhostfs_probe_inode(probe, conn);
	case FSNOTIFY_OBJ_TYPE_SB:
		return !vhostfs_probe_sb(probe, conn, vhostfs_marked_sb(conn));
#if VHOSTFS_KERNEL >= 610
	case FSNOTIFY_OBJ_TYPE_VFSMOUNT:
		return !vhostfs_probe_mount(probe, conn);
#endif
	default:
		return 1;
	}
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

#if VHOSTFS_KERNEL < 612
/* ---- inodes that are made of answers, see vhostfs_doubt_news() -------------------- */

struct vhostfs_made {
	struct vhostfs_notify *notify;
	u64 version;			/* of attributes, when it was asked for */
};

static int vhostfs_iget_entry(struct kretprobe_instance *ri,
			      struct pt_regs *regs)
{
	struct vhostfs_made *made = (struct vhostfs_made *)ri->data;
	struct super_block *sb;
	struct vhostfs_notify *n;

	sb = (struct super_block *)regs_get_kernel_argument(regs, 0);
	if (sb->s_type != vhostfs_type)
		return 1;
	n = vhostfs_notify_of(get_fuse_conn_super(sb));
	if (!n || !vhostfs_is_coherent(n))
		return 1;
	made->notify = n;
	made->version = regs_get_kernel_argument(regs, 5);
	/* 0: the guest has made the object itself */
	return !made->version;
}

/* Its caller has the superblock in use, and with it all that belongs to that */
static int vhostfs_iget_return(struct kretprobe_instance *ri,
			       struct pt_regs *regs)
{
	struct vhostfs_made *made = (struct vhostfs_made *)ri->data;
	struct inode *inode = (struct inode *)regs_return_value(regs);

	/* Who doubts it from now on finds it */
	smp_mb();
	if (inode && READ_ONCE(made->notify->doubted) > made->version)
		vhostfs_stale_attr(inode, STATX_BASIC_STATS);
	return 0;
}

/* It may sleep; what is missed is dropped a little later */
static struct kretprobe vhostfs_iget_probe = {
	.kp.symbol_name	= "fuse_iget",
	.entry_handler	= vhostfs_iget_entry,
	.handler	= vhostfs_iget_return,
	.data_size	= sizeof(struct vhostfs_made),
	.maxactive	= 64,
};

static bool vhostfs_has_iget_probe;

static void vhostfs_add_iget_probe(void)
{
	vhostfs_has_iget_probe = !register_kretprobe(&vhostfs_iget_probe);
}

static void vhostfs_remove_iget_probe(void)
{
	if (vhostfs_has_iget_probe)
		unregister_kretprobe(&vhostfs_iget_probe);
}
#else
static void vhostfs_add_iget_probe(void)
{
}

static void vhostfs_remove_iget_probe(void)
{
}
#endif

/* ---- life ------------------------------------------------------------------------- */

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
	vhostfs_add_iget_probe();
	queue_delayed_work(vhostfs_wq, &vhostfs_probe_work, 2 * HZ);
}

void vhostfs_unregister_probes(void)
{
	if (!vhostfs_no_probes)
		vhostfs_remove_probes(ARRAY_SIZE(vhostfs_probes));
	vhostfs_remove_iget_probe();
	cancel_delayed_work_sync(&vhostfs_probe_work);
}
