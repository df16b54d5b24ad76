/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which of the inodes that the guest holds a name means, for who watches the
 * host: nothing is looked up for the guest, and nothing is added to the table.
 */
#include "inode_table.h"

/* The mount of sx, with a reference; MOUNT_NONE: no room for it. */
static uint16_t mount_of(struct vf_inode_table *table, const struct vf_inode *dir,
			 const struct statx *sx)
{
	const struct mount *m = &table->mounts.entries[dir->mount];

	if (m->dev != statx_dev(sx) || m->mnt_id != statx_mnt_id(sx))
		return mount_get(&table->mounts, statx_dev(sx), statx_mnt_id(sx));
	mount_ref(&table->mounts, dir->mount);
	return dir->mount;
}

/*
 * The inode of this number, referenced.  As in entry.c, an inode with a descriptor is the object
 * when it had it before the object was looked at, and one without only when its handle is the same.
 */
static struct vf_inode *find(struct vf_inode_table *table, uint16_t mount, uint64_t ino,
			     uint32_t seen_at, const struct handle *handle, bool *need_handle)
{
	uint32_t hash = inode_hash(mount, ino);
	struct shard *shard = inode_shard(table, hash);
	struct vf_inode *i = NULL;

	*need_handle = false;
	pthread_mutex_lock(&shard->lock);
	while ((i = inode_find(table, shard, hash, mount, ino, i))) {
		bool has_fd = atomic_load(&i->fd) >= 0;

		if (has_fd && (int32_t)(seen_at - atomic_load(&i->pinned_since)) < 0)
			continue;
		if (!has_fd && !handle)
			*need_handle = true;
		else if ((has_fd || inode_handle_is(i, handle)) && inode_try_ref(i))
			break;
	}
	pthread_mutex_unlock(&shard->lock);
	return i;
}

struct vf_inode *vf_inode_known(struct vf_share *share, struct vf_inode *dir, const char *name)
{
	struct vf_inode_table *table = share->inodes;
	uint32_t seen_at = atomic_load(&table->clock);
	int dir_fd = vf_inode_path_fd(share, dir);
	struct vf_inode *inode = NULL;
	struct handle handle;
	bool need_handle;
	struct statx sx;
	uint16_t mount;

	if (dir_fd < 0 ||
	    statx(dir_fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC,
		  STATX_TYPE | STATX_INO | STATX_MNT_ID, &sx))
		return NULL;
	mount = mount_of(table, dir, &sx);
	if (mount == MOUNT_NONE)
		return NULL;
	inode = find(table, mount, sx.stx_ino, seen_at, NULL, &need_handle);
	if (!inode && need_handle && !handle_of(dir_fd, name, 0, &handle))
		inode = find(table, mount, sx.stx_ino, seen_at, &handle, &need_handle);
	mount_unref(&table->mounts, mount);
	return inode;
}
