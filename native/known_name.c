/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which of the inodes that the guest holds a name means or meant, for who
 * watches the host: nothing is looked up for the guest, and nothing is added to
 * the table.
 */
#include <limits.h>

#include "inode_table.h"
#include "proc_name.h"

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
 * when it had it before the object was looked at; else only its handle can tell, which one that was
 * given its descriptor back since has, too.
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
		bool pinned = inode_was_pinned(i, seen_at);

		if (!pinned && !handle)
			*need_handle = true;
		else if ((pinned || inode_handle_is(i, handle)) && inode_try_ref(i))
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

/* The path of a descriptor, with NUL; its length, or 0. */
static uint32_t path_of(struct vf_share *share, int fd, char path[PATH_MAX + 1])
{
	char link[PROC_NAME_SIZE];
	ssize_t n =
	    fd < 0 ? -1
		   : readlinkat(share->config.proc_fd_dir, proc_name(link, fd), path, PATH_MAX);

	if (n <= 0 || n == PATH_MAX)
		return 0;
	path[n] = 0;
	return (uint32_t)n;
}

static bool is_path_of(const char *path, const char *dir, uint32_t dir_len, const char *name)
{
	if (dir_len == 1)
		dir_len = 0; /* the root */
	return !strncmp(path, dir, dir_len) && path[dir_len] == '/' &&
	       !strcmp(path + dir_len + 1, name);
}

/* sx: what has the name by now, if anything. */
static bool had_name(struct vf_share *share, struct vf_inode *inode, const struct statx *sx,
		     const char *dir_path, uint32_t dir_len, const char *name)
{
	const struct mount *m = &share->inodes->mounts.entries[inode->mount];
	char path[PATH_MAX + 1];
	struct stat st;
	int fd;

	if (sx && inode->ino == sx->stx_ino && m->dev == statx_dev(sx))
		return true;
	fd = vf_inode_path_fd(share, inode);
	if (fd < 0 || fstat(fd, &st) || !st.st_nlink)
		return !sx; /* gone: nobody knows what its name was, but this one is there */
	return !dir_len || !path_of(share, fd, path) || is_path_of(path, dir_path, dir_len, name);
}

bool vf_inode_may_have_had_name(struct vf_share *share, struct vf_inode *dir, const char *name,
				const uint64_t *nodeids, uint32_t n)
{
	int dir_fd = vf_inode_path_fd(share, dir);
	char dir_path[PATH_MAX + 1];
	uint32_t dir_len = path_of(share, dir_fd, dir_path);
	bool had = false;
	struct statx sx;
	bool exists =
	    dir_fd >= 0 &&
	    !statx(dir_fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC,
		   STATX_TYPE | STATX_INO, &sx);

	for (uint32_t i = 0; !had && i < n; i++) {
		struct vf_inode *inode = vf_inode_get(share, nodeids[i]);

		had = inode ? had_name(share, inode, exists ? &sx : NULL, dir_path, dir_len, name)
			    : !exists;
		if (inode)
			vf_inode_put(share, inode);
	}
	return had;
}
