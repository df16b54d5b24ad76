// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: the session with the server
 *
 * What is asked for and what was granted; the worker that asks, and that tells
 * of watches from then on. docs/protocol.md of vhostfs, 4.1 and 9.
 */

#include <linux/module.h>
#include <linux/virtio.h>
#include "vhostfs_internal.h"

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

/* Experiments may have it that there is no queue */
bool vhostfs_is_queue_wanted(void)
{
	return !(without & FUSE_FSNOTIFY_VIRTQUEUE);
}

void vhostfs_set_session(struct vhostfs_notify *n,
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
		flush_work(&n->act_work);
	}
	vhostfs_set_session(n, VHOSTFS_GRANTED);
	vhostfs_begin_coherence(n);
	vhostfs_begin_opens(n);
	mod_delayed_work(vhostfs_wq, &n->park_work, 0);
}

void vhostfs_session_work(struct work_struct *work)
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
