// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: file system notifications from the host for virtio-fs
 *
 * What somebody does to the shared directory on the host reaches inotify and
 * fanotify watchers in this guest: the device puts one element for each event
 * into the buffers of the notification queue or, where the VMM has none, into
 * the answers of requests that are parked at the device. There it is taken out
 * (vhostfs_queue.c) and checked (vhostfs_event.c), the caches are brought up to
 * date (vhostfs_cache.c), and then the event is raised (vhostfs_raise.c). In
 * the other direction the device is told which inodes are watched
 * (vhostfs_watch.c), and which superblocks (vhostfs_share.c); that is agreed on
 * in a session (vhostfs_session.c). Here is what holds this together: the module
 * and the device.
 *
 * The wire format, its numbers and who may send what when: docs/protocol.md of
 * vhostfs. The driver knows virtio_fs.c only by the hooks of vhostfs_notify.h,
 * and uses nothing of fs/fuse and fs/notify but what those export.
 *
 * Locks, outermost first:
 *
 *   session_mutex   FUSE_FSNOTIFY_INIT and WATCH requests are being sent
 *   event_mutex     one element is acted on
 *   look_mutex      what has come is looked at before that
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

#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include "vhostfs_internal.h"

struct workqueue_struct *vhostfs_wq;
DEFINE_MUTEX(vhostfs_devices_mutex);	/* the list */
LIST_HEAD(vhostfs_devices);
struct fsnotify_group *vhostfs_group;
struct fsnotify_group *vhostfs_share_group;
const struct file_system_type *vhostfs_type;

static void vhostfs_release(struct kref *kref)
{
	struct vhostfs_notify *n = container_of(kref, struct vhostfs_notify,
						kref);

	vhostfs_free_halves(n);
	vhostfs_free_watches(n);
	vhostfs_free_opens(n);
	kvfree(n);
}

void vhostfs_put(struct vhostfs_notify *n)
{
	kref_put(&n->kref, vhostfs_release);
}

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
	if (!vhostfs_is_queue_wanted()) {
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
	n = kvzalloc(sizeof(*n), GFP_KERNEL);
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
	INIT_WORK(&n->act_work, vhostfs_act_work);
	mutex_init(&n->look_mutex);
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
	cancel_work_sync(&n->act_work);
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
	cancel_work_sync(&n->act_work);
	cancel_delayed_work_sync(&n->half_work);
	cancel_delayed_work_sync(&n->again_work);
	cancel_delayed_work_sync(&n->session_work);
	cancel_delayed_work_sync(&n->park_work);
	/* A late interrupt or timeout; it found nothing to do */
	cancel_work_sync(&n->receive_work);
	cancel_work_sync(&n->act_work);
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
