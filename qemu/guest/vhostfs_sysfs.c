// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: the folder "notifications" of the virtio device in sysfs
 *
 * Shows counters and the state; README.md has what they mean.
 */

#include <linux/device.h>
#include <linux/sysfs.h>
#include <linux/virtio.h>
#include "vhostfs_internal.h"

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

const struct attribute_group vhostfs_attr_group = {
	.name	= "notifications",
	.attrs	= vhostfs_attrs,
};
