/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a name to an inode.  What a lookup costs in system calls:
 *
 *   known, holds a descriptor    statx
 *   known by handle only         statx, name_to_handle_at
 *   new                          openat, statx    (statx more, when it was expected to be known)
 *
 * and name_to_handle_at more for a new one while events are reported to the guest.
 *
 * A held descriptor keeps the inode number from being given to another object,
 * so (device, mount, inode number) from statx(2) is proof, if the descriptor
 * was there before the statx(2): pinned_since.  Which of the two ways to begin
 * with is guessed from the last lookup in the same directory.
 */
#include "attr.h"
#include "events.h"
#include "inode_table.h"
#include "proc_name.h"

int statx_fd(int fd, struct statx *sx)
{
	return statx(fd, "", AT_EMPTY_PATH, INODE_STATX_MASK, sx) ? -errno : 0;
}

static int statx_name(int dir_fd, const char *name, struct statx *sx)
{
	int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT;

	return statx(dir_fd, name, flags, INODE_STATX_MASK, sx) ? -errno : 0;
}

int open_path(struct vf_share *share, int dir_fd, const char *name)
{
	int fd;

	do {
		fd = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	} while (fd < 0 && vf_fd_shortage(share, errno));
	return fd < 0 ? -errno : fd;
}

/* What a lookup found, copied while it was sure to be there. */
struct found {
	uint64_t nodeid;
	uint16_t mount;
	bool made; /* it was not known before */
	bool told; /* vf_inode_is_told() */
};

/* dir_told: vf_inode_is_told() of it before anything was looked at. */
static void fill_entry(struct vf_thread *t, const struct vf_inode *dir, bool dir_told,
		       const struct found *found, const struct statx *sx,
		       struct fuse_entry_out *out)
{
	struct vf_share *share = t->share;
	const struct vf_share_config *config = &share->config;
	uint64_t entry_ns = config->entry_timeout_ns, attr_ns = config->attr_timeout_ns;

	out->nodeid = found->nodeid;
	out->generation = found->nodeid >> 32;
	/* What is mounted where is nothing that the host tells of. */
	if (vf_lasting(t, dir_told && found->mount == dir->mount))
		entry_ns = config->lasting_timeout_ns;
	if (vf_lasting(t, found->told) && (found->made || vf_lasting_is_sure(t)))
		attr_ns = config->lasting_timeout_ns;
	vf_split_ns(entry_ns, &out->entry_valid, &out->entry_valid_nsec);
	vf_split_ns(attr_ns, &out->attr_valid, &out->attr_valid_nsec);
	vf_fill_attr_statx(share, sx, &out->attr);
	if (found->mount != dir->mount && S_ISDIR(sx->stx_mode) &&
	    (vf_session_flags(share) & FUSE_SUBMOUNTS))
		out->attr.flags |= FUSE_ATTR_SUBMOUNT;
}

/* ---- matching what is known --------------------------------------------- */

enum match {
	MATCH,	     /* held once more for the guest */
	NO_MATCH,    /* no such object is known */
	NEED_HANDLE, /* only the object's handle can tell */
	NOT_SURE,    /* one is known, but was not pinned when the object was looked at */
};

/* What is known of the object that a name was found to mean. */
struct candidate {
	uint16_t mount;
	uint64_t ino;
	uint32_t seen_at; /* the table's clock before it was looked at */
	uint64_t blocks;
	bool pinned;		     /* we hold a descriptor to it, so seen_at does not matter */
	const struct handle *handle; /* NULL: not asked for yet; size 0: there is none */
};

/*
 * Looks for the object among the inodes; the shard is locked.  By MATCH *found is set, and *bare,
 * when not NULL, is an inode without a descriptor, with a reference (NULL: it has one).
 */
static enum match match_known(struct vf_inode_table *table, struct shard *shard, uint32_t hash,
			      const struct candidate *c, struct found *found,
			      struct vf_inode **bare)
{
	enum match result = NO_MATCH;
	struct vf_inode *i = NULL;

	while ((i = inode_find(table, shard, hash, c->mount, c->ino, i))) {
		bool has_fd = atomic_load(&i->fd) >= 0;

		if (has_fd && !c->pinned && !inode_was_pinned(i, c->seen_at)) {
			result = NOT_SURE;
			continue;
		}
		if (!has_fd && !c->handle) {
			result = NEED_HANDLE;
			continue;
		}
		if (!has_fd && !inode_handle_is(i, c->handle))
			continue;
		if (!inode_hold(i))
			continue; /* being freed */
		if (bare && !has_fd && inode_try_ref(i))
			*bare = i;
		atomic_store_explicit(&i->hot, 1, memory_order_relaxed);
		vf_inode_note_blocks(i, c->blocks);
		found->nodeid = vf_inode_nodeid(i);
		found->mount = c->mount;
		found->made = false;
		found->told = vf_inode_is_told(table->share, i);
		return MATCH;
	}
	return result;
}

static enum match match_locked(struct vf_inode_table *table, const struct candidate *c,
			       struct found *found, struct vf_inode **bare)
{
	uint32_t hash = inode_hash(c->mount, c->ino);
	struct shard *shard = inode_shard(table, hash);
	enum match result;

	pthread_mutex_lock(&shard->lock);
	result = match_known(table, shard, hash, c, found, bare);
	pthread_mutex_unlock(&shard->lock);
	return result;
}

/* The mount that sx names, with a reference. */
static uint16_t mount_of(struct vf_inode_table *table, const struct vf_inode *dir,
			 const struct statx *sx)
{
	const struct mount *m = &table->mounts.entries[dir->mount];

	if (m->dev != statx_dev(sx) || m->mnt_id != statx_mnt_id(sx))
		return mount_get(&table->mounts, statx_dev(sx), statx_mnt_id(sx));
	mount_ref(&table->mounts, dir->mount);
	return dir->mount;
}

/* ---- objects that are new ----------------------------------------------- */

/* An inode for the object of fd, not yet in the table; it takes over a reference to its mount. */
static struct vf_inode *prepare(struct vf_share *share, int fd, const struct statx *sx,
				uint16_t mount, int *error)
{
	struct vf_inode_table *table = share->inodes;
	struct mount *m = &table->mounts.entries[mount];
	struct vf_inode *inode;
	struct handle handle;

	if (S_ISDIR(sx->stx_mode))
		mount_offer_dir(share, m, fd);
	*error = inode_fd_room(table);
	if (*error)
		return NULL;
	if (share->config.handle_mode == VF_HANDLES_MANDATORY) {
		*error = -EOPNOTSUPP;
		if (!mount_handles_work(share, m, fd) || handle_of(fd, "", AT_EMPTY_PATH, &handle))
			return NULL;
	}
	*error = -ENOMEM;
	inode = inode_alloc(table);
	if (!inode)
		return NULL;
	inode->ino = sx->stx_ino;
	inode->type = (uint8_t)(sx->stx_mode >> 12);
	inode->mount = mount;
	vf_inode_note_blocks(inode, sx->stx_blocks);
	if (share->config.handle_mode == VF_HANDLES_MANDATORY)
		inode_store_handle(inode, &handle);
	handle_index_prepare(table, inode, fd);
	*error = 0;
	return inode;
}

/* The descriptor in hand is worth keeping: the inode has none. */
static void give_fd(struct vf_share *share, struct vf_inode *bare, int fd)
{
	if (inode_fd_room(share->inodes) || !inode_adopt_fd(share->inodes, bare, fd))
		close(fd);
	vf_inode_put(share, bare);
}

/*
 * A new inode, with a reference that is given back, can be found by handle from now on.  What
 * happened to it before was told to nobody, so a guest that keeps attributes until it is told
 * otherwise needs those of now.  True: it will be told.
 */
static bool index_new(struct vf_share *share, struct vf_inode *inode, int fd, struct statx *sx)
{
	bool told;

	handle_index_add(share->inodes, inode, fd);
	if (vf_inode_type(inode) == S_IFDIR && share->events)
		vf_watch_share_new_directory(share->events, inode);
	told = vf_inode_is_told(share, inode) && vf_told_all(share) && !statx_fd(fd, sx);
	vf_inode_put(share, inode);
	return told;
}

/* The object of path_fd (taken over), which sx describes. */
static int enter(struct vf_share *share, const struct vf_inode *dir, int path_fd, struct statx *sx,
		 struct found *found)
{
	struct vf_inode_table *table = share->inodes;
	uint32_t hash;
	struct candidate c = {.ino = sx->stx_ino, .blocks = sx->stx_blocks, .pinned = true};
	struct vf_inode *inode, *bare = NULL;
	struct handle handle;
	struct shard *shard;
	bool index = false;
	enum match match;
	int error;

	c.mount = mount_of(table, dir, sx);
	if (c.mount == MOUNT_NONE) {
		close(path_fd);
		return -ENFILE;
	}
	hash = inode_hash(c.mount, c.ino);
	shard = inode_shard(table, hash);
	inode = prepare(share, path_fd, sx, c.mount, &error);
	for (;;) {
		pthread_mutex_lock(&shard->lock);
		match = match_known(table, shard, hash, &c, found, &bare);
		if (match == NO_MATCH && inode) {
			inode_adopt_fd(table, inode, path_fd);
			found->nodeid = vf_inode_nodeid(inode);
			found->mount = c.mount;
			found->made = true;
			found->told = false;
			inode_publish(table, shard, hash, inode);
			index = handle_index_is_on(table) && inode_try_ref(inode);
		}
		pthread_mutex_unlock(&shard->lock);
		if (match != NEED_HANDLE)
			break;
		if (handle_of(path_fd, "", AT_EMPTY_PATH, &handle))
			handle.size = 0;
		c.handle = &handle;
	}
	if (match == NO_MATCH && inode) {
		if (index)
			found->told = index_new(share, inode, path_fd, sx);
		return 0;
	}
	mount_unref(&table->mounts, c.mount);
	if (inode)
		inode_unalloc(table, inode);
	if (bare)
		give_fd(share, bare, path_fd);
	else
		close(path_fd);
	return match == MATCH ? 0 : error;
}

static int enter_name(struct vf_share *share, const struct vf_inode *dir, int dir_fd,
		      const char *name, struct statx *sx, struct found *found)
{
	int fd = open_path(share, dir_fd, name), error;

	if (fd < 0)
		return fd;
	error = statx_fd(fd, sx);
	if (!error)
		return enter(share, dir, fd, sx, found);
	close(fd);
	return error;
}

/* ---- lookups ------------------------------------------------------------ */

/* 0: found; 1: nothing of it is known for sure; or an error. */
static int known_name(struct vf_share *share, const struct vf_inode *dir, int dir_fd,
		      const char *name, struct statx *sx, struct found *found)
{
	struct vf_inode_table *table = share->inodes;
	struct candidate c = {.seen_at = atomic_load(&table->clock)};
	struct handle handle;
	enum match match;
	int error = statx_name(dir_fd, name, sx);

	if (error)
		return error;
	c.mount = mount_of(table, dir, sx);
	if (c.mount == MOUNT_NONE)
		return -ENFILE;
	c.ino = sx->stx_ino;
	c.blocks = sx->stx_blocks;
	match = match_locked(table, &c, found, NULL);
	if (match == NEED_HANDLE && !handle_of(dir_fd, name, 0, &handle)) {
		c.handle = &handle;
		match = match_locked(table, &c, found, NULL);
	}
	mount_unref(&table->mounts, c.mount);
	return match == MATCH ? 0 : 1;
}

/* by_statx: begin with statx(2), for what is likely to be known or not to be there. */
static int lookup(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
		  bool by_statx, struct found *found, struct fuse_entry_out *out)
{
	struct vf_share *share = t->share;
	bool dir_told = vf_inode_is_told(share, dir);
	struct statx sx;
	int error = 1;

	if (by_statx)
		error = known_name(share, dir, dir_fd, name, &sx, found);
	if (error == 1)
		error = enter_name(share, dir, dir_fd, name, &sx, found);
	if (!error)
		fill_entry(t, dir, dir_told, found, &sx, out);
	return error;
}

int vf_inode_lookup(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
		    struct fuse_entry_out *out)
{
	bool guess = atomic_load_explicit(&dir->flags, memory_order_relaxed) & INODE_CHILDREN_KNOWN;
	struct found found = {.made = false};
	int error = lookup(t, dir, dir_fd, name, guess, &found, out);

	if (found.made && guess)
		atomic_fetch_and(&dir->flags, (unsigned char)~INODE_CHILDREN_KNOWN);
	else if (!found.made && !guess)
		atomic_fetch_or(&dir->flags, INODE_CHILDREN_KNOWN);
	return error;
}

int vf_inode_lookup_entry(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
			  uint64_t ino, struct fuse_entry_out *out)
{
	struct vf_inode_table *table = t->share->inodes;
	uint32_t hash = inode_hash(dir->mount, ino);
	struct shard *shard = inode_shard(table, hash);
	struct found found;
	bool known;

	pthread_mutex_lock(&shard->lock);
	known = inode_find(table, shard, hash, dir->mount, ino, NULL);
	pthread_mutex_unlock(&shard->lock);
	return lookup(t, dir, dir_fd, name, known, &found, out);
}

int vf_inode_lookup_new(struct vf_thread *t, struct vf_inode *dir, int dir_fd, const char *name,
			struct fuse_entry_out *out)
{
	struct found found;

	return lookup(t, dir, dir_fd, name, false, &found, out);
}

int vf_inode_lookup_fd(struct vf_thread *t, struct vf_inode *dir, int fd,
		       struct fuse_entry_out *out)
{
	struct vf_share *share = t->share;
	char name[PROC_NAME_SIZE];
	bool dir_told = vf_inode_is_told(share, dir);
	struct found found;
	struct statx sx;
	int error = statx_fd(fd, &sx), path_fd;

	if (error)
		return error;
	do {
		path_fd =
		    openat(share->config.proc_fd_dir, proc_name(name, fd), O_PATH | O_CLOEXEC);
	} while (path_fd < 0 && vf_fd_shortage(share, errno));
	if (path_fd < 0)
		return -errno;
	error = enter(share, dir, path_fd, &sx, &found);
	if (!error)
		fill_entry(t, dir, dir_told, &found, &sx, out);
	return error;
}

int vf_inode_lookup_self(struct vf_thread *t, struct vf_inode *dir, struct vf_inode *inode,
			 struct fuse_entry_out *out)
{
	struct vf_share *share = t->share;
	uint32_t hash = inode_hash(inode->mount, inode->ino);
	struct shard *shard = inode_shard(share->inodes, hash);
	struct found found = {.nodeid = vf_inode_nodeid(inode), .mount = inode->mount};
	bool dir_told = vf_inode_is_told(share, dir);
	int fd = vf_inode_path_fd(share, inode), error;
	struct statx sx;

	if (fd < 0)
		return fd;
	found.told = vf_inode_is_told(share, inode);
	error = statx_fd(fd, &sx);
	if (error)
		return error;
	/* A handle of what is gone leads nowhere, as on the host. */
	if (dir == inode && !sx.stx_nlink && inode != share->inodes->root)
		return -ESTALE;
	pthread_mutex_lock(&shard->lock);
	inode_hold(inode); /* the caller's reference keeps it from being freed */
	pthread_mutex_unlock(&shard->lock);
	fill_entry(t, dir, dir_told, &found, &sx, out);
	return 0;
}

int vf_inode_hold_directory(struct vf_share *share, struct vf_inode *dir, const char *name,
			    uint64_t *nodeid)
{
	int dir_fd = vf_inode_path_fd(share, dir), fd, error;
	struct found found;
	struct statx sx;

	if (dir_fd < 0)
		return dir_fd;
	fd = open_path(share, dir_fd, name);
	if (fd < 0)
		return fd;
	error = statx_fd(fd, &sx);
	if (!error && !S_ISDIR(sx.stx_mode))
		error = -ENOTDIR;
	if (error)
		close(fd);
	else
		error = enter(share, dir, fd, &sx, &found);
	*nodeid = found.nodeid;
	return error;
}

/* ---- the way up, for the guest's NFS server ----------------------------- */

/* Deeper than any path that could have been walked down. */
#define MAX_DEPTH 4096

/* Is the directory of fd the root of the share, or below it now?  0 or -ESTALE. */
static int below_root(const struct vf_inode_table *table, int fd)
{
	struct statx sx, last = {.stx_mask = 0};
	int cur = fd, next, error = -ESTALE;

	for (int depth = 0; depth < MAX_DEPTH; depth++) {
		if (statx_fd(cur, &sx))
			break;
		if (sx.stx_ino == table->root->ino && statx_dev(&sx) == table->root_dev &&
		    statx_mnt_id(&sx) == table->root_mnt_id) {
			error = 0;
			break;
		}
		if (depth && sx.stx_ino == last.stx_ino && statx_dev(&sx) == statx_dev(&last) &&
		    statx_mnt_id(&sx) == statx_mnt_id(&last))
			break; /* the top of this name space */
		last = sx;
		next = openat(cur, "..", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (cur != fd)
			close(cur);
		cur = next;
		if (cur < 0)
			return -ESTALE;
	}
	if (cur != fd)
		close(cur);
	return error;
}

int vf_inode_lookup_parent(struct vf_thread *t, struct vf_inode *inode, struct fuse_entry_out *out)
{
	struct vf_share *share = t->share;
	struct found found;
	struct statx sx;
	int fd, error;

	if (vf_inode_type(inode) != S_IFDIR)
		return -ENOTDIR;
	if (inode == share->inodes->root)
		return vf_inode_lookup_self(t, inode, inode, out);
	fd = vf_inode_path_fd(share, inode);
	if (fd < 0)
		return fd;
	fd = open_path(share, fd, "..");
	if (fd < 0)
		return fd;
	error = below_root(share->inodes, fd);
	if (!error)
		error = statx_fd(fd, &sx);
	if (error) {
		close(fd);
		return error;
	}
	error = enter(share, inode, fd, &sx, &found);
	if (error)
		return error;
	fill_entry(t, inode, false, &found, &sx, out);
	/* That the child lies on another mount does not make the parent a mount's root. */
	out->attr.flags &= ~(uint32_t)FUSE_ATTR_SUBMOUNT;
	return 0;
}

/* ---- removals ----------------------------------------------------------- */

struct vf_inode *vf_inode_guard_removal(struct vf_share *share, struct vf_inode *dir, int dir_fd,
					const char *name)
{
	struct vf_inode *inode;
	struct found found;
	struct statx sx;

	if (!atomic_load_explicit(&share->inodes->by_handle, memory_order_relaxed) ||
	    known_name(share, dir, dir_fd, name, &sx, &found))
		return NULL;
	inode = vf_inode_get(share, found.nodeid);
	vf_inode_forget(share, found.nodeid, 1); /* known_name() counted it for the guest */
	if (inode)
		vf_inode_path_fd(share, inode);
	return inode;
}
