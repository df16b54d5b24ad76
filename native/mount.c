/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mounts that inodes lie on, by (device, mount id).  An entry lives as long as an inode
 * counts on it; its descriptor, or those of its inodes, keep the mount itself from going, so that
 * the kernel cannot give its id to another.
 */
#include "inode_table.h"
#include "proc_name.h"

#define MAX_ATTEMPTS 16

void mounts_init(struct mounts *mounts)
{
	pthread_mutex_init(&mounts->lock, NULL);
}

void mounts_free(struct mounts *mounts)
{
	for (uint32_t i = 0; i < mounts->n; i++) {
		if (mounts->entries[i].used && mounts->entries[i].fd >= 0)
			close(mounts->entries[i].fd);
	}
	pthread_mutex_destroy(&mounts->lock);
}

uint16_t mount_get(struct mounts *mounts, uint64_t dev, uint64_t mnt_id)
{
	uint32_t free_entry = MAX_MOUNTS, i;
	struct mount *m;

	pthread_mutex_lock(&mounts->lock);
	for (i = 0; i < mounts->n; i++) {
		m = &mounts->entries[i];
		if (!m->used)
			free_entry = i;
		else if (m->dev == dev && m->mnt_id == mnt_id)
			break;
	}
	if (i == mounts->n) {
		if (free_entry < MAX_MOUNTS)
			i = free_entry;
		else if (i < MAX_MOUNTS)
			mounts->n++;
		if (i == MAX_MOUNTS) {
			pthread_mutex_unlock(&mounts->lock);
			return MOUNT_NONE;
		}
		m = &mounts->entries[i];
		m->dev = dev;
		m->mnt_id = mnt_id;
		atomic_store(&m->attempts, 0);
		m->used = true;
		atomic_store(&m->count, 0);
		atomic_store(&m->fd, -1);
		atomic_store(&m->handles, HANDLES_UNTRIED);
		atomic_store(&m->fsid, 0);
	}
	atomic_fetch_add(&mounts->entries[i].count, 1);
	pthread_mutex_unlock(&mounts->lock);
	return (uint16_t)i;
}

void mount_ref(struct mounts *mounts, uint16_t index)
{
	atomic_fetch_add_explicit(&mounts->entries[index].count, 1, memory_order_relaxed);
}

void mount_unref(struct mounts *mounts, uint16_t index)
{
	struct mount *m = &mounts->entries[index];
	int fd = -1;

	if (atomic_fetch_sub(&m->count, 1) != 1)
		return;
	/* Another may have taken it up again, or have come here first. */
	pthread_mutex_lock(&mounts->lock);
	if (m->used && !atomic_load(&m->count)) {
		m->used = false;
		fd = atomic_exchange(&m->fd, -1);
	}
	pthread_mutex_unlock(&mounts->lock);
	if (fd >= 0)
		close(fd);
}

void mount_offer_dir(struct vf_share *share, struct mount *m, int fd)
{
	char name[PROC_NAME_SIZE];
	int opened, none = -1;

	if (share->config.handle_mode == VF_HANDLES_NEVER || atomic_load(&m->fd) >= 0 ||
	    atomic_load(&m->attempts) >= MAX_ATTEMPTS)
		return;
	atomic_fetch_add(&m->attempts, 1);
	opened = openat(share->config.proc_fd_dir, proc_name(name, fd),
			O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (opened < 0)
		return;
	if (!atomic_compare_exchange_strong(&m->fd, &none, opened))
		close(opened);
}
