// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: file system notifications from the host for virtio-fs
 *
 * What somebody does to the shared directory on the host reaches inotify and
 * fanotify watchers in this guest: the device puts one element for each event
 * into the buffers of the notification queue or, where the VMM has none, into
 * the answers of requests that are parked at the device. There it is taken out
 * (vhostfs_queue.c) and checked (vhostfs_event.c), the caches are brought up to
 * date (vhostfs_object.c), and then the event is raised (vhostfs_raise.c). In
 * the other direction the device is told which inodes are watched
 * (vhostfs_watch.c), and which superblocks (vhostfs_share.c). Here is what holds
 * this together: the module, the device, the session, superblocks and sysfs.
 *
 * The wire format, its numbers and who may send what when: docs/protocol.md of
 * vhostfs. The driver knows virtio_fs.c only by the hooks of vhostfs_notify.h,
 * and uses nothing of fs/fuse and fs/notify but what those export.
 *
 * Locks, outermost first:
 *
 *   session_mutex   FUSE_FSNOTIFY_INIT and WATCH requests are being sent
 *   event_mutex     one element is acted on
 *   fc->killsb      (read) no superblock of the connection goes away
 *   i_rwsem, s_inode_list_lock, connector lock
 *   share->lock     directories that are held
 *   watch_lock      the table of watches; also taken by the probes
 *   vq_lock         queue 1, and which requests are parked (on its own)
 *   fsvq->lock      of virtio_fs.c: the request queue
 *   answered_lock   parked requests that were answered
 *
 * The worker that acts on elements may wait for replies of the device, for it
 * takes inode locks that tasks hold meanwhile. The device answers requests
 * independently of notifications, so these waits end.
 */
#define pr_fmt(fmt) "vhostfs: " fmt

#include <linux/dcache.h>
#define pr_fmt(fmt) "vhostfs: " fmt

#include <linux/dcache.h>
#include <linux/exportfs.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/fsnotify.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/rcupdate.h>
#include <linux/statfs.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include "vhostfs_internal.h"

struct workqueue_struct *vhostfs_wq;
DEFINE_MUTEX(vhostfs_devices_mutex);	/* the list */
LIST_HEAD(vhostfs_devices);
struct fsnotify_group *vhostfs_group;
struct fsnotify_group *vhostfs_share_group;
const struct file_system_type *vhostfs_type;

/* For experiments: what FUSE_FSNOTIFY_INIT says */
static unsigned long without;
module_param(without, ulong, 0444);
MODULE_PARM_DESC(without,
		 "Flags not to ask for (bit 0: the queue is not accepted either)");

static unsigned int major = FUSE_FSNOTIFY_MAJOR;
module_param(major, uint, 0444);
MODULE_PARM_DESC(major, "Version of the protocol to speak");

static unsigned int minor = FUSE_FSNOTIFY_MINOR;
module_param(minor, uint, 0444);
MODULE_PARM_DESC(minor, "Likewise");

static unsigned int buf_size;
module_param(buf_size, uint, 0444);
MODULE_PARM_DESC(buf_size,
		 "Most bytes to take in one notification (0: what a buffer holds)");

static void vhostfs_release(struct kref *kref)
{
	struct vhostfs_notify *n = container_of(kref, struct vhostfs_notify,
						kref);

	vhostfs_free_halves(n);
	vhostfs_free_watches(n);
	vhostfs_free_opens(n);
	kfree(n);
}

void vhostfs_put(struct vhostfs_notify *n)
{
	kref_put(&n->kref, vhostfs_release);
}

/* ---- session -------------------------------------------------------------------- */

static void vhostfs_set_session(struct vhostfs_notify *n,
				enum vhostfs_session session)
{
	spin_lock(&n->watch_lock);
	n->session = session;
	n->resync = session == VHOSTFS_GRANTED;
	n->next_resync = jiffies;
	n->retry = false;
	n->next_retry = jiffies;
	n->full_logged = false;
	spin_unlock(&n->watch_lock);
	wake_up_all(&n->settled);
}

/* The way for elements to travel that there is */
static u64 vhostfs_deliveries(const struct vhostfs_notify *n)
{
	if (n->has_queue)
		return FUSE_FSNOTIFY_VIRTQUEUE;
	return n->nparked ? FUSE_FSNOTIFY_PARKED : 0;
}

static const char *vhostfs_why_refused(struct vhostfs_notify *n,
				       const struct vhostfs_request *req,
				       int error)
{
	const struct fuse_fsnotify_init_out *out = &req->init_out;

	if (error)
		return "the server does not offer them";
	/* The size is what the device says that it sent */
	if (req->args.out_args[0].size < sizeof(*out))
		return "its answer is too short";
	if (le32_to_cpu(out->major) != FUSE_FSNOTIFY_MAJOR)
		return "its version is not known";
	if (!(le64_to_cpu(out->flags) & vhostfs_deliveries(n)))
		return n->has_queue ?
		       "the server does not use the queue" :
		       "the device has no VIRTIO_FS_F_NOTIFICATION, and the server parks no requests";
	if (le32_to_cpu(out->notify_buf_size) > n->buf_size)
		return "its notifications are too long";
	return NULL;
}

/* Not the server's no: it may never have seen the request */
static bool vhostfs_is_unanswered(int error)
{
	switch (error) {
	case -ENOMEM:
	case -EINTR:
	case -EAGAIN:
	case -ENOTCONN:
	case -ECONNREFUSED:
	case -ECONNABORTED:
		return true;
	default:
		return false;
	}
}

/* Later each time: a connection that has failed does not come back */
static void vhostfs_ask_again(struct vhostfs_notify *n, int error)
{
	unsigned int tries = min(n->tries++, VHOSTFS_MAX_TRIES);

	if (!tries)
		dev_info(&n->vdev->dev,
			 "the server could not be asked for notifications (%d), trying again\n",
			 error);
	vhostfs_set_session(n, VHOSTFS_NEW);
	queue_delayed_work(vhostfs_wq, &n->session_work,
			   VHOSTFS_REPAIR_WAIT << tries);
}

static void vhostfs_init_end(struct vhostfs_request *req, int error)
{
	struct vhostfs_notify *n = req->notify;
	const char *why = vhostfs_why_refused(n, req, error);

	if (vhostfs_is_unanswered(error)) {
		vhostfs_ask_again(n, error);
	} else if (why) {
		dev_info(&n->vdev->dev,
			 "no notifications from the host: %s (%d)\n", why,
			 error);
		vhostfs_set_session(n, VHOSTFS_REFUSED);
	} else {
		dev_info(&n->vdev->dev, "notifications from the host by %s\n",
			 n->has_queue ? "the notification queue" :
			 "parked requests: the device has no VIRTIO_FS_F_NOTIFICATION, which both VMM and server must offer");
		if (!n->has_queue)
			n->max_parked = min(le32_to_cpu(req->init_out.max_parked),
					    n->nparked);
		n->granted = le64_to_cpu(req->init_out.flags);
		vhostfs_set_session(n, VHOSTFS_ANSWERED);
		mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	}
	kfree(req);
}

static void vhostfs_send_init(struct vhostfs_notify *n, struct fuse_mount *fm)
{
	struct vhostfs_request *req;
	struct fuse_fsnotify_init_in *in;

	req = vhostfs_new_request(FUSE_FSNOTIFY_INIT, FUSE_ROOT_ID,
				  sizeof(req->init_in), sizeof(req->init_out));
	if (!req) {
		queue_delayed_work(vhostfs_wq, &n->session_work,
				   VHOSTFS_REPAIR_WAIT);
		return;
	}
	in = &req->init_in;
	in->major = cpu_to_le32(major);
	in->minor = cpu_to_le32(minor);
	in->flags = cpu_to_le64((vhostfs_deliveries(n) |
				 FUSE_FSNOTIFY_RENAME | FUSE_FSNOTIFY_CHILD |
				 FUSE_FSNOTIFY_INVALIDATE |
				 FUSE_FSNOTIFY_WATCH_FILESYSTEM |
				 FUSE_FSNOTIFY_PARENT |
				 FUSE_FSNOTIFY_DEFERRED_OPEN) & ~(u64)without);
	in->mask = cpu_to_le64(VHOSTFS_EVENTS | FS_ISDIR | FS_Q_OVERFLOW);
	in->buf_size = cpu_to_le32(buf_size ? min(buf_size, n->buf_size) :
				   n->buf_size);
	/* A server with a newer minor number answers with the prefix it has */
	req->args.out_argvar = true;
	req->end = vhostfs_init_end;
	vhostfs_set_session(n, VHOSTFS_ASKED);
	vhostfs_send(n, fm, req);
}

/*
 * Nothing is watched yet, so whatever is in the queue is of an earlier session,
 * and could mean objects of this one by the same numbers. It is taken out while
 * nothing is raised.
 */
static void vhostfs_begin(struct vhostfs_notify *n)
{
	unsigned int left;

	for (left = 0; left <= n->nbufs + n->nparked; left += VHOSTFS_BATCH) {
		queue_work(vhostfs_wq, &n->receive_work);
		flush_work(&n->receive_work);
	}
	vhostfs_set_session(n, VHOSTFS_GRANTED);
	vhostfs_begin_coherence(n);
	vhostfs_begin_opens(n);
	mod_delayed_work(vhostfs_wq, &n->park_work, 0);
}

static void vhostfs_session_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(to_delayed_work(work),
						struct vhostfs_notify,
						session_work);
	enum vhostfs_session session;
	struct fuse_mount *fm;
	bool resync, retry;

	mutex_lock(&n->session_mutex);
	if (n->paused || !n->fc)
		goto out;
	/*
	 * Of the connection's mounts any will do. It stays: before one goes,
	 * vhostfs_notify_kill_sb() waits for us and for our requests.
	 */
	down_read(&n->fc->killsb);
	fm = list_first_entry_or_null(&n->fc->mounts, struct fuse_mount,
				      fc_entry);
	up_read(&n->fc->killsb);
	if (!fm)
		goto out;

	if (READ_ONCE(n->session) == VHOSTFS_ANSWERED)
		vhostfs_begin(n);
	spin_lock(&n->watch_lock);
	session = n->session;
	resync = vhostfs_is_due(n, n->resync, n->next_resync);
	retry = vhostfs_is_due(n, n->retry, n->next_retry);
	spin_unlock(&n->watch_lock);
	if (session == VHOSTFS_NEW) {
		vhostfs_send_init(n, fm);
	} else if (session == VHOSTFS_GRANTED) {
		if (resync)
			vhostfs_resync(n);
		if (retry)
			vhostfs_retry_refused(n);
		while (vhostfs_send_watch(n, fm))
			cond_resched();
		vhostfs_watch_shares(n, fm);
	}
out:
	mutex_unlock(&n->session_mutex);
}

/* ---- superblocks ---------------------------------------------------------------- */

/*
 * The FUSE core reports no f_fsid, and fanotify marks that report file ids want
 * one. The device number is unique while the system runs, which is what f_fsid
 * promises.
 */
static struct super_operations vhostfs_super_ops;
static const struct super_operations *vhostfs_fuse_super_ops;

static int vhostfs_statfs(struct dentry *dentry, struct kstatfs *buf)
{
	int err = vhostfs_fuse_super_ops->statfs(dentry, buf);

	if (!err && !buf->f_fsid.val[0] && !buf->f_fsid.val[1])
		buf->f_fsid = u64_to_fsid(huge_encode_dev(dentry->d_sb->s_dev));
	return err;
}

/*
 * A handle of what has no link any more leads nowhere, as on other file systems.
 * Else who opens what a DELETE_SELF names makes a dentry, and the end of that is
 * a DELETE_SELF again.
 */
#define VHOSTFS_FH		0x81	/* FILEID_INO64_GEN of newer kernels */
#define VHOSTFS_FH_PARENT	0x82

static struct export_operations vhostfs_export_ops;
static const struct export_operations *vhostfs_fuse_export_ops;

static struct dentry *vhostfs_fh_to_dentry(struct super_block *sb,
					   struct fid *fid, int fh_len,
					   int fh_type)
{
	struct inode *inode;
	u64 nodeid;
	bool gone;

	if (fh_len >= 3 && (fh_type == VHOSTFS_FH || fh_type == VHOSTFS_FH_PARENT)) {
		nodeid = (u64)fid->raw[0] << 32 | fid->raw[1];
		inode = ilookup5(sb, nodeid, vhostfs_inode_eq, &nodeid);
		gone = inode && !inode->i_nlink;
		iput(inode);
		if (gone)
			return ERR_PTR(-ESTALE);
	}
	return vhostfs_fuse_export_ops->fh_to_dentry(sb, fid, fh_len, fh_type);
}

static void vhostfs_wrap_super_ops(struct super_block *sb)
{
	mutex_lock(&vhostfs_devices_mutex);
	if (!vhostfs_fuse_export_ops && sb->s_export_op->fh_to_dentry) {
		vhostfs_export_ops = *sb->s_export_op;
		vhostfs_export_ops.fh_to_dentry = vhostfs_fh_to_dentry;
		vhostfs_fuse_export_ops = sb->s_export_op;
	}
	if (sb->s_export_op == vhostfs_fuse_export_ops)
		sb->s_export_op = &vhostfs_export_ops;
	if (!vhostfs_fuse_super_ops) {
		vhostfs_super_ops = *sb->s_op;
		vhostfs_super_ops.statfs = vhostfs_statfs;
		vhostfs_fuse_super_ops = sb->s_op;
	}
	if (sb->s_op == vhostfs_fuse_super_ops)
		sb->s_op = &vhostfs_super_ops;
	mutex_unlock(&vhostfs_devices_mutex);
}

static struct fs_context_operations vhostfs_submount_ops;
static const struct fs_context_operations *vhostfs_fuse_submount_ops;

/*
 * The FUSE core does not keep the generation of a directory that another file
 * system is mounted on, so the submount's root has none, either. This is where
 * the server of vhostfs has it; another one will say that it knows no such
 * object, and then there are no events on the root of its submounts.
 */
static int vhostfs_get_tree_submount(struct fs_context *fsc)
{
	struct inode *root;
	int err = vhostfs_fuse_submount_ops->get_tree(fsc);

	if (err)
		return err;
	root = d_inode(fsc->root);
	if (vhostfs_notify_of(get_fuse_conn(root))) {
		root->i_generation = upper_32_bits(get_node_id(root));
		vhostfs_wrap_super_ops(fsc->root->d_sb);
	}
	return 0;
}

int vhostfs_notify_init_submount(struct fs_context *fsc)
{
	int err = fuse_init_fs_context_submount(fsc);

	if (err)
		return err;
	mutex_lock(&vhostfs_devices_mutex);
	if (!vhostfs_fuse_submount_ops) {
		vhostfs_submount_ops = *fsc->ops;
		vhostfs_submount_ops.get_tree = vhostfs_get_tree_submount;
		vhostfs_fuse_submount_ops = fsc->ops;
	}
	mutex_unlock(&vhostfs_devices_mutex);
	fsc->ops = &vhostfs_submount_ops;
	return 0;
}

/* A connection begins; FUSE_INIT was sent, and may not have been answered yet */
void vhostfs_notify_mount(struct vhostfs_notify *n, struct super_block *sb)
{
	if (!n)
		return;
	vhostfs_wrap_super_ops(sb);
	mutex_lock(&n->session_mutex);
	mutex_lock(&n->event_mutex);
	n->fc = get_fuse_conn_super(sb);
	n->share_mask = 0;
	n->share_refused = false;
	n->held_full_logged = false;
	memset(n->cookies, 0, sizeof(n->cookies));
	n->granted = 0;
	vhostfs_reset_coherence(n);
	mutex_unlock(&n->event_mutex);
	n->tries = 0;
	vhostfs_set_session(n, VHOSTFS_NEW);
	mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	mutex_unlock(&n->session_mutex);
}

/*
 * A superblock is about to go. Requests of ours were sent in its name and must
 * be over before that. What is done for an element needs no care: it is done
 * under fc->killsb, which fuse_mount_remove() takes next.
 */
void vhostfs_notify_kill_sb(struct vhostfs_notify *n, struct super_block *sb)
{
	if (!n)
		return;
	mutex_lock(&n->session_mutex);
	n->paused++;
	vhostfs_end_share(vhostfs_find_share(n, sb));
	vhostfs_drop_mount_marks(n, sb);
	mutex_lock(&n->event_mutex);
	vhostfs_forget_recent(n, sb, NULL);
	mutex_unlock(&n->event_mutex);
	mutex_unlock(&n->session_mutex);
	wait_event(n->idle, !atomic_read(&n->in_flight));
}

void vhostfs_notify_killed_sb(struct vhostfs_notify *n, bool last)
{
	if (!n)
		return;
	mutex_lock(&n->session_mutex);
	if (last) {
		mutex_lock(&n->event_mutex);
		n->fc = NULL;
		vhostfs_free_halves(n);
		mutex_unlock(&n->event_mutex);

		spin_lock(&n->watch_lock);
		n->session = VHOSTFS_NONE;
		n->resync = false;
		n->retry = false;
		vhostfs_free_watches(n);
		spin_unlock(&n->watch_lock);
		wake_up_all(&n->settled);
	}
	n->paused--;
	mutex_unlock(&n->session_mutex);
	if (!last)
		mod_delayed_work(vhostfs_wq, &n->session_work, 0);
}

/* ---- sysfs: the folder "notifications" of the virtio device -------------------- */

static struct vhostfs_notify *vhostfs_of_device(struct device *dev)
{
	struct vhostfs_notify *n, *found = NULL;

	/* It stays: removing the attributes waits for their users */
	mutex_lock(&vhostfs_devices_mutex);
	list_for_each_entry(n, &vhostfs_devices, list)
		if (&n->vdev->dev == dev)
			found = n;
	mutex_unlock(&vhostfs_devices_mutex);
	return found;
}

static ssize_t vhostfs_counter_show(struct device *dev,
				    struct device_attribute *attr, char *buf)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);
	struct dev_ext_attribute *ext;

	if (!n)
		return -ENODEV;
	ext = container_of(attr, struct dev_ext_attribute, attr);
	return sysfs_emit(buf, "%lld\n",
			  atomic64_read(&n->counters[(uintptr_t)ext->var]));
}

#define VHOSTFS_COUNTER(name, counter)					\
static struct dev_ext_attribute vhostfs_attr_##name = {			\
	__ATTR(name, 0444, vhostfs_counter_show, NULL),			\
	(void *)(uintptr_t)(counter)					\
}

VHOSTFS_COUNTER(received, VHOSTFS_RECEIVED);
VHOSTFS_COUNTER(raised, VHOSTFS_RAISED);
VHOSTFS_COUNTER(stale, VHOSTFS_STALE);
VHOSTFS_COUNTER(malformed, VHOSTFS_MALFORMED);
VHOSTFS_COUNTER(overflows, VHOSTFS_OVERFLOWS);
VHOSTFS_COUNTER(halves_timed_out, VHOSTFS_HALVES_TIMED_OUT);
VHOSTFS_COUNTER(watches_sent, VHOSTFS_WATCHES_SENT);
VHOSTFS_COUNTER(watches_refused, VHOSTFS_WATCHES_REFUSED);
VHOSTFS_COUNTER(resyncs, VHOSTFS_RESYNCS);
VHOSTFS_COUNTER(invalidated, VHOSTFS_INVALIDATED);
VHOSTFS_COUNTER(opened, VHOSTFS_OPENED);

static ssize_t state_show(struct device *dev, struct device_attribute *attr,
			  char *buf)
{
	static const char * const names[] = {
		[VHOSTFS_NONE]		= "unmounted",
		[VHOSTFS_NEW]		= "mounting",
		[VHOSTFS_ASKED]		= "asked",
		[VHOSTFS_ANSWERED]	= "asked",
		[VHOSTFS_GRANTED]	= "virtqueue",
		[VHOSTFS_REFUSED]	= "none",
	};
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	if (READ_ONCE(n->session) == VHOSTFS_GRANTED && !n->has_queue)
		return sysfs_emit(buf, "parked\n");
	return sysfs_emit(buf, "%s\n", names[READ_ONCE(n->session)]);
}
static DEVICE_ATTR_RO(state);

/* Inodes that the host watches or is about to */
static ssize_t watches_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	return sysfs_emit(buf, "%u\n", READ_ONCE(n->nwatches));
}
static DEVICE_ATTR_RO(watches);

/* Directories that are held because the whole share is watched */
static ssize_t directories_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	return sysfs_emit(buf, "%d\n", atomic_read(&n->nheld));
}
static DEVICE_ATTR_RO(directories);

static ssize_t probes_missed_show(struct device *dev,
				  struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%lu\n", vhostfs_probes_missed());
}
static DEVICE_ATTR_RO(probes_missed);

/* Anything written starts a walk over all inodes and tries again what was refused */
static ssize_t resync_store(struct device *dev, struct device_attribute *attr,
			    const char *buf, size_t count)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	spin_lock(&n->watch_lock);
	n->resync = true;
	n->next_resync = jiffies;
	n->retry = true;
	n->next_retry = jiffies;
	spin_unlock(&n->watch_lock);
	mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	return count;
}
static DEVICE_ATTR_WO(resync);

static struct attribute *vhostfs_attrs[] = {
	&vhostfs_attr_received.attr.attr,
	&vhostfs_attr_raised.attr.attr,
	&vhostfs_attr_stale.attr.attr,
	&vhostfs_attr_malformed.attr.attr,
	&vhostfs_attr_overflows.attr.attr,
	&vhostfs_attr_halves_timed_out.attr.attr,
	&vhostfs_attr_watches_sent.attr.attr,
	&vhostfs_attr_watches_refused.attr.attr,
	&vhostfs_attr_resyncs.attr.attr,
	&vhostfs_attr_invalidated.attr.attr,
	&vhostfs_attr_opened.attr.attr,
	&dev_attr_state.attr,
	&dev_attr_watches.attr,
	&dev_attr_directories.attr,
	&dev_attr_probes_missed.attr,
	&dev_attr_resync.attr,
	NULL
};

static const struct attribute_group vhostfs_attr_group = {
	.name	= "notifications",
	.attrs	= vhostfs_attrs,
};

/* ---- device --------------------------------------------------------------------- */

static u32 vhostfs_config_buf_size(struct virtio_device *vdev)
{
	__le32 size;

	vdev->config->get(vdev, VHOSTFS_CONFIG_BUF_SIZE, &size, sizeof(size));
	return le32_to_cpu(size);
}

/* Takes the feature only where the device makes sense; it works without */
int vhostfs_notify_validate(struct virtio_device *vdev)
{
	u32 size;

	if (!__virtio_test_bit(vdev, VIRTIO_FS_F_NOTIFICATION))
		return 0;
	if (without & FUSE_FSNOTIFY_VIRTQUEUE) {
		__virtio_clear_bit(vdev, VIRTIO_FS_F_NOTIFICATION);
		return 0;
	}
	size = vhostfs_config_buf_size(vdev);
	if (size < VHOSTFS_MIN_BUF_SIZE || size > VHOSTFS_MAX_BUF_SIZE) {
		dev_warn(&vdev->dev,
			 "VIRTIO_FS_F_NOTIFICATION is not accepted: the device says notify_buf_size %u, %zu to %u were expected\n",
			 size, VHOSTFS_MIN_BUF_SIZE, VHOSTFS_MAX_BUF_SIZE);
		__virtio_clear_bit(vdev, VIRTIO_FS_F_NOTIFICATION);
	}
	return 0;
}

int vhostfs_notify_probe(struct virtio_device *vdev,
			 struct vhostfs_notify **notify)
{
	struct vhostfs_notify *n;
	u32 size;

	*notify = NULL;
	n = kzalloc(sizeof(*n), GFP_KERNEL);
	if (!n)
		return -ENOMEM;
	kref_init(&n->kref);
	INIT_LIST_HEAD(&n->list);
	n->vdev = vdev;
	n->has_queue = virtio_has_feature(vdev, VIRTIO_FS_F_NOTIFICATION);
	/* Read again, so not trusted again */
	size = n->has_queue ? vhostfs_config_buf_size(vdev) : 0;
	n->buf_size = clamp_t(u32, size, VHOSTFS_ELEMENT_SIZE,
			      VHOSTFS_MAX_BUF_SIZE);
	INIT_LIST_HEAD(&n->unposted);
	INIT_LIST_HEAD(&n->answered);
	spin_lock_init(&n->answered_lock);
	INIT_DELAYED_WORK(&n->park_work, vhostfs_park_work);
	spin_lock_init(&n->vq_lock);
	INIT_WORK(&n->receive_work, vhostfs_receive_work);
	INIT_DELAYED_WORK(&n->half_work, vhostfs_half_timeout);
	INIT_DELAYED_WORK(&n->again_work, vhostfs_again_work);
	mutex_init(&n->event_mutex);
	INIT_LIST_HEAD(&n->halves);
	INIT_LIST_HEAD(&n->kept);
	mutex_init(&n->session_mutex);
	INIT_DELAYED_WORK(&n->session_work, vhostfs_session_work);
	init_waitqueue_head(&n->idle);
	spin_lock_init(&n->watch_lock);
	n->watches = RB_ROOT;
	INIT_LIST_HEAD(&n->changed);
	init_waitqueue_head(&n->settled);
	INIT_LIST_HEAD(&n->shares);
	INIT_LIST_HEAD(&n->mount_marks);
	*notify = n;
	return 0;
}

bool vhostfs_notify_has_queue(const struct vhostfs_notify *n)
{
	return n && n->has_queue;
}

/*
 * The device is running: fills queue 1, @vq, where there is one; @requests is
 * the queue for parked requests otherwise.
 */
void vhostfs_notify_start(struct vhostfs_notify *n, struct virtqueue *vq,
			  struct virtqueue *requests)
{
	unsigned int i;

	if (!n)
		return;
	if (n->has_queue)
		vhostfs_alloc_buffers(n, vq);
	else
		vhostfs_alloc_parked(n, requests);

	mutex_lock(&vhostfs_devices_mutex);
	list_add_tail(&n->list, &vhostfs_devices);
	mutex_unlock(&vhostfs_devices_mutex);
	n->has_attrs = !sysfs_create_group(&n->vdev->dev.kobj,
					   &vhostfs_attr_group);
	if (!(n->nbufs + n->nparked) || !n->has_attrs)
		dev_warn(&n->vdev->dev, "no memory for %s\n",
			 n->has_attrs ? "notifications" : "counters");

	spin_lock(&n->vq_lock);
	n->running = true;
	if (n->has_queue) {
		n->vq = vq;
		for (i = 0; i < n->nbufs; i++)
			vhostfs_give_buffer(n, n->bufs[i]);
		virtqueue_kick(vq);
	}
	spin_unlock(&n->vq_lock);
}

/* The device is about to be reset; tasks that wait for it have been released */
void vhostfs_notify_stop(struct vhostfs_notify *n)
{
	if (!n)
		return;
	if (n->has_attrs)
		sysfs_remove_group(&n->vdev->dev.kobj, &vhostfs_attr_group);
	mutex_lock(&vhostfs_devices_mutex);
	list_del_init(&n->list);
	mutex_unlock(&vhostfs_devices_mutex);

	/* It may be mounted still, and be for long */
	mutex_lock(&n->session_mutex);
	n->paused++;
	mutex_unlock(&n->session_mutex);
	cancel_delayed_work_sync(&n->session_work);
	wait_event(n->idle, !atomic_read(&n->in_flight));
	if (READ_ONCE(n->session) != VHOSTFS_NONE)
		vhostfs_set_session(n, VHOSTFS_REFUSED);
	vhostfs_forget_opens(n);

	spin_lock(&n->vq_lock);
	n->running = false;
	spin_unlock(&n->vq_lock);
	cancel_delayed_work_sync(&n->park_work);
	cancel_work_sync(&n->receive_work);
}

/* The device was reset and gives no buffer back any more */
void vhostfs_notify_release_buffers(struct vhostfs_notify *n)
{
	if (!n)
		return;
	/* Nothing but parked requests is left in a request queue */
	while (n->vq && virtqueue_detach_unused_buf(n->vq))
		;
	while (n->parked_vq && virtqueue_detach_unused_buf(n->parked_vq))
		;
	kfree(n->parked);
	n->parked = NULL;
	n->nparked = 0;
	while (n->nbufs)
		kfree(n->bufs[--n->nbufs]);
	kfree(n->bufs);
	n->bufs = NULL;
}

/* Neither the device nor a superblock uses it any more */
void vhostfs_notify_free(struct vhostfs_notify *n)
{
	if (!n)
		return;
	cancel_work_sync(&n->receive_work);
	cancel_delayed_work_sync(&n->half_work);
	cancel_delayed_work_sync(&n->again_work);
	cancel_delayed_work_sync(&n->session_work);
	cancel_delayed_work_sync(&n->park_work);
	/* A late interrupt or timeout; it found nothing to do */
	cancel_work_sync(&n->receive_work);
	/* A probe may be at its end, on an inode that went meanwhile */
	synchronize_rcu();
	vhostfs_put(n);
}

/* ---- module --------------------------------------------------------------------- */

int vhostfs_notify_register(struct file_system_type *type)
{
	int err = -ENOMEM;

	vhostfs_type = type;
	vhostfs_wq = alloc_workqueue("vhostfs", WQ_UNBOUND | WQ_HIGHPRI, 0);
	if (!vhostfs_wq)
		return err;
	vhostfs_group = fsnotify_alloc_group(&vhostfs_group_ops, 0);
	if (IS_ERR(vhostfs_group)) {
		err = PTR_ERR(vhostfs_group);
		goto destroy_wq;
	}
	vhostfs_share_group = fsnotify_alloc_group(&vhostfs_share_ops, 0);
	if (IS_ERR(vhostfs_share_group)) {
		err = PTR_ERR(vhostfs_share_group);
		goto put_group;
	}

	err = register_filesystem(type);
	if (err == -EBUSY) {
		type->name = "vhostfs";
		pr_info("the kernel has a virtiofs of its own, mount this one with -t %s\n",
			type->name);
		err = register_filesystem(type);
	}
	if (err)
		goto put_share_group;

	vhostfs_register_probes();
	return 0;

put_share_group:
	fsnotify_put_group(vhostfs_share_group);
put_group:
	fsnotify_put_group(vhostfs_group);
destroy_wq:
	destroy_workqueue(vhostfs_wq);
	return err;
}

void vhostfs_notify_unregister(struct file_system_type *type)
{
	unregister_filesystem(type);
	vhostfs_unregister_probes();
	/* Marks are freed later, by a function of ours */
	fsnotify_wait_marks_destroyed();
	fsnotify_put_group(vhostfs_share_group);
	fsnotify_put_group(vhostfs_group);
	destroy_workqueue(vhostfs_wq);
	/* The last request's end may have been in an RCU section of the core */
	rcu_barrier();
	/* A task that waited for a watch has let go of us, but not left yet */
	synchronize_rcu_tasks();
}
