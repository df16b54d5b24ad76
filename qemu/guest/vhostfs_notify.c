// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: file system notifications from the host for virtio-fs
 */
#define pr_fmt(fmt) "vhostfs: " fmt

#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/module.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include "fuse_i.h"
#include "vhostfs_notify.h"

int vhostfs_notify_register(struct file_system_type *type)
{
	int ret = register_filesystem(type);

	if (ret == -EBUSY) {
		type->name = "vhostfs";
		ret = register_filesystem(type);
	}
	return ret;
}

void vhostfs_notify_unregister(struct file_system_type *type)
{
	unregister_filesystem(type);
}

int vhostfs_notify_validate(struct virtio_device *vdev)
{
	__virtio_clear_bit(vdev, VIRTIO_FS_F_NOTIFICATION);
	return 0;
}

int vhostfs_notify_probe(struct virtio_device *vdev,
			 struct vhostfs_notify **notify)
{
	*notify = NULL;
	return 0;
}

bool vhostfs_notify_has_queue(const struct vhostfs_notify *notify)
{
	return false;
}

void vhostfs_notify_vq_done(struct virtqueue *vq)
{
}

void vhostfs_notify_start(struct vhostfs_notify *notify, struct virtqueue *vq)
{
}

void vhostfs_notify_stop(struct vhostfs_notify *notify)
{
}

void vhostfs_notify_release_buffers(struct vhostfs_notify *notify)
{
}

void vhostfs_notify_free(struct vhostfs_notify *notify)
{
}

int vhostfs_notify_init_submount(struct fs_context *fsc)
{
	return fuse_init_fs_context_submount(fsc);
}

void vhostfs_notify_mount(struct vhostfs_notify *notify,
			  struct super_block *sb)
{
}

void vhostfs_notify_kill_sb(struct vhostfs_notify *notify,
			    struct super_block *sb)
{
}

void vhostfs_notify_killed_sb(struct vhostfs_notify *notify, bool last)
{
}
