/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * vhostfs: what virtio_fs.c (with our patch) calls
 *
 * Every function accepts a NULL state and then does nothing.
 */
#ifndef _VHOSTFS_NOTIFY_H
#define _VHOSTFS_NOTIFY_H

#include <linux/types.h>

#ifndef VIRTIO_FS_F_NOTIFICATION
#define VIRTIO_FS_F_NOTIFICATION 0
#endif

struct file_system_type;
struct fs_context;
struct fuse_args;
struct fuse_conn;
struct fuse_in_header;
struct scatterlist;
struct super_block;
struct vhostfs_notify;
struct virtio_device;
struct virtqueue;

/* Provided by the patched virtio_fs.c; safe while @fc has a superblock */
struct vhostfs_notify *vhostfs_notify_of(struct fuse_conn *fc);

/*
 * Likewise: puts a request (one readable part, one writable) into the first
 * request queue, from which it comes back by vhostfs_notify_answered(); and
 * tells the device of those that were put there.
 */
int vhostfs_notify_post(struct virtio_device *vdev, struct scatterlist *sgs[2],
			void *token);
void vhostfs_notify_kick(struct virtio_device *vdev);

/*
 * Module. Registers the file system as "virtiofs", or as "vhostfs" where that
 * name is taken by the kernel's own driver.
 */
int vhostfs_notify_register(struct file_system_type *type);
void vhostfs_notify_unregister(struct file_system_type *type);

/*
 * Device, in the order of its life: features, state, queue 1 filled; then
 * stopped (device still running), buffers taken back (device reset), freed.
 * Tokens come out of request queues: those of parked requests are not virtio_fs.c's;
 * room is what these leave of a queue, in descriptors.
 */
int vhostfs_notify_validate(struct virtio_device *vdev);
int vhostfs_notify_probe(struct virtio_device *vdev,
			 struct vhostfs_notify **notify);
bool vhostfs_notify_has_queue(const struct vhostfs_notify *notify);
void vhostfs_notify_received(struct vhostfs_notify *notify);
bool vhostfs_notify_is_parked(const struct vhostfs_notify *notify,
			      const void *token);
bool vhostfs_notify_answered(struct vhostfs_notify *notify, void *token,
			     unsigned int len);
unsigned int vhostfs_notify_room(const struct vhostfs_notify *notify,
				 struct virtqueue *vq);
void vhostfs_notify_start(struct vhostfs_notify *notify, struct virtqueue *vq,
			  struct virtqueue *requests);
void vhostfs_notify_stop(struct vhostfs_notify *notify);
void vhostfs_notify_release_buffers(struct vhostfs_notify *notify);
void vhostfs_notify_free(struct vhostfs_notify *notify);

/*
 * Requests of the FUSE core: one is about to be sent, unless this is true: then
 * its answer is filled in, and it has none but success; one was answered, its
 * arguments are filled in, and the FUSE core does not know yet.
 */
bool vhostfs_notify_sent(struct vhostfs_notify *notify,
			 const struct fuse_in_header *in,
			 struct fuse_args *args, bool background);
void vhostfs_notify_reply(struct vhostfs_notify *notify, struct fuse_conn *fc,
			  const struct fuse_in_header *in,
			  struct fuse_args *args);

/*
 * Superblocks. kill_sb comes before fuse_mount_remove(), killed_sb after it;
 * @last says that the connection ends.
 */
int vhostfs_notify_init_submount(struct fs_context *fsc);
void vhostfs_notify_mount(struct vhostfs_notify *notify,
			  struct super_block *sb);
void vhostfs_notify_kill_sb(struct vhostfs_notify *notify,
			    struct super_block *sb);
void vhostfs_notify_killed_sb(struct vhostfs_notify *notify, bool last);

#endif /* _VHOSTFS_NOTIFY_H */
