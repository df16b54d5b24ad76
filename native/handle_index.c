/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a file handle to the inodes that the guest holds: name_to_handle_at(2)
 * gives the same handles that fanotify(7) names objects by.
 *
 * Begun when events are granted to a session, so that it costs nothing
 * without: 4 bytes for each inode (its successor in a chain, beside the table's
 * slots) and 3 to 5 of hash.  The handle itself lies in the inode.
 *
 * Locks: a shard's lock guards its chains; within it only watches->lock is
 * taken, and references without waiting for anybody who holds a lock.
 */
#include <sys/vfs.h>

#include "events.h"
#include "inode_table.h"

#define N_INDEX_SHARDS 16u

struct handle_index {
	atomic_bool on;
	struct shard shards[N_INDEX_SHARDS];
	uint32_t *_Atomic next[MAX_CHUNKS]; /* as the table's chunks */
};

static uint32_t handle_hash(int32_t type, const uint8_t *bytes, uint32_t size)
{
	uint64_t h = ((uint64_t)size << 32 | (uint32_t)type) * 0x9e3779b97f4a7c15u;

	for (uint32_t i = 0; i < size; i += 8) {
		uint64_t word = 0;

		memcpy(&word, bytes + i, size - i < 8 ? size - i : 8);
		h = (h ^ word) * 0x9e3779b97f4a7c15u;
		h ^= h >> 32;
	}
	return (uint32_t)h;
}

static uint32_t inode_handle_hash(const struct vf_inode *inode)
{
	struct handle handle;

	inode_load_handle(inode, &handle);
	return handle_hash(handle.type, handle.bytes, handle.size);
}

static struct shard *shard_of(struct handle_index *index, uint32_t hash)
{
	return &index->shards[hash % N_INDEX_SHARDS];
}

static uint32_t *bucket(const struct shard *shard, uint32_t hash)
{
	return &shard->buckets[hash / N_INDEX_SHARDS & shard->mask];
}

static struct vf_inode *inode_at(const struct vf_inode_table *table, uint32_t slot)
{
	return &table->chunks[slot >> CHUNK_BITS][slot & (CHUNK_SLOTS - 1)];
}

static uint32_t *next_of(struct handle_index *index, uint32_t slot)
{
	return &index->next[slot >> CHUNK_BITS][slot & (CHUNK_SLOTS - 1)];
}

/* ---- life ------------------------------------------------------------------ */

static struct handle_index *index_new(void)
{
	struct handle_index *index = aligned_alloc(64, sizeof(*index));

	if (!index)
		return NULL;
	memset(index, 0, sizeof(*index));
	for (uint32_t i = 0; i < N_INDEX_SHARDS; i++) {
		struct shard *shard = &index->shards[i];

		pthread_mutex_init(&shard->lock, NULL);
		shard->mask = 63;
		shard->buckets = calloc(64, sizeof(uint32_t));
		if (!shard->buckets) {
			while (i--)
				free(index->shards[i].buckets);
			free(index);
			return NULL;
		}
	}
	return index;
}

void handle_index_free(struct vf_inode_table *table)
{
	struct handle_index *index = table->index;

	if (!index)
		return;
	for (uint32_t i = 0; i < N_INDEX_SHARDS; i++) {
		pthread_mutex_destroy(&index->shards[i].lock);
		free(index->shards[i].buckets);
	}
	for (uint32_t i = 0; i < MAX_CHUNKS; i++)
		free(index->next[i]);
	free(index);
	table->index = NULL;
}

bool handle_index_is_on(const struct vf_inode_table *table)
{
	struct handle_index *index = table->index;

	return index && atomic_load_explicit(&index->on, memory_order_acquire);
}

int vf_handle_index_start(struct vf_share *share)
{
	struct vf_inode_table *table = share->inodes;
	uint32_t n_slots;

	if (!table->index)
		table->index = index_new();
	if (!table->index)
		return -ENOMEM;
	atomic_store(&table->index->on, true);
	/*
	 * Who enters an inode looks whether the index is on under the lock of its shard: either
	 * that is after this, or the inode is seen below.
	 */
	for (uint32_t i = 0; i < N_SHARDS; i++) {
		pthread_mutex_lock(&table->shards[i].lock);
		pthread_mutex_unlock(&table->shards[i].lock);
	}
	pthread_mutex_lock(&table->free_lock);
	n_slots = table->n_slots;
	pthread_mutex_unlock(&table->free_lock);
	for (uint32_t slot = INODE_ROOT_SLOT; slot < n_slots; slot++) {
		struct vf_inode *inode = inode_ref_slot(table, slot);

		if (!inode)
			continue;
		handle_index_add(table, inode, atomic_load(&inode->fd));
		vf_inode_put(share, inode);
	}
	return 0;
}

void vf_handle_index_stop(struct vf_share *share)
{
	if (share->inodes->index)
		atomic_store(&share->inodes->index->on, false);
}

/* ---- adding and removing ---------------------------------------------------- */

/* To find it by, one that cannot be opened is as good (overlayfs, Linux 6.6). */
static int findable_handle(int dir_fd, const char *name, int flags, struct handle *handle)
{
	int error = handle_of(dir_fd, name, flags, handle);

	if (error == -EOPNOTSUPP)
		error = handle_of(dir_fd, name, flags | VF_AT_HANDLE_FID, handle);
	return error;
}

static void store_handle(struct vf_inode *inode, int fd)
{
	struct handle handle;

	if (fd >= 0 && !atomic_load(&inode->handle_size) &&
	    !findable_handle(fd, "", AT_EMPTY_PATH, &handle))
		inode_store_handle(inode, &handle);
}

void handle_index_prepare(struct vf_inode_table *table, struct vf_inode *inode, int fd)
{
	if (handle_index_is_on(table))
		store_handle(inode, fd);
}

static void learn_fsid(struct mount *mount, int fd)
{
	struct statfs fs;
	uint64_t fsid;

	if (atomic_load_explicit(&mount->fsid, memory_order_relaxed))
		return;
	if (fd < 0)
		fd = atomic_load(&mount->fd);
	if (fd < 0 || fstatfs(fd, &fs))
		return;
	_Static_assert(sizeof(fs.f_fsid) == sizeof(fsid), "two 32-bit numbers");
	memcpy(&fsid, &fs.f_fsid, sizeof(fsid));
	atomic_store(&mount->fsid, fsid);
}

/* Doubles the buckets when they fill up; without memory the chains just grow longer. */
static void shard_grow(struct vf_inode_table *table, struct shard *shard)
{
	uint32_t old_size = shard->mask + 1, *old = shard->buckets, *bigger;

	if (old_size >= 1u << 26)
		return;
	bigger = calloc(old_size * 2, sizeof(*bigger));
	if (!bigger)
		return;
	shard->buckets = bigger;
	shard->mask = old_size * 2 - 1;
	for (uint32_t i = 0; i < old_size; i++) {
		uint32_t slot = old[i];

		while (slot != INODE_SLOT_NONE) {
			uint32_t *head = bucket(shard, inode_handle_hash(inode_at(table, slot)));
			uint32_t *next = next_of(table->index, slot), moved = slot;

			slot = *next;
			*next = *head;
			*head = moved;
		}
	}
	free(old);
}

/* Room for the successor of this slot. */
static bool next_room(struct handle_index *index, uint32_t slot)
{
	uint32_t *_Atomic *chunk = &index->next[slot >> CHUNK_BITS];
	uint32_t *none = NULL, *made;

	if (atomic_load(chunk))
		return true;
	made = calloc(CHUNK_SLOTS, sizeof(*made));
	if (made && !atomic_compare_exchange_strong(chunk, &none, made))
		free(made);
	return made;
}

void handle_index_add(struct vf_inode_table *table, struct vf_inode *inode, int fd)
{
	struct handle_index *index = table->index;
	uint32_t hash, *head;
	struct shard *shard;

	if (atomic_fetch_or(&inode->flags, INODE_INDEXED) & INODE_INDEXED)
		return;
	if (!atomic_load(&inode->handle_size)) {
		/* Entered before the index was on: evict() may be about to store it, too. */
		pthread_mutex_lock(&table->evict_lock);
		store_handle(inode, fd);
		pthread_mutex_unlock(&table->evict_lock);
	}
	learn_fsid(&table->mounts.entries[inode->mount], fd);
	if (!atomic_load(&inode->handle_size) || !next_room(index, inode->slot)) {
		atomic_fetch_and(&inode->flags, (unsigned char)~INODE_INDEXED);
		return;
	}
	hash = inode_handle_hash(inode);
	shard = shard_of(index, hash);
	pthread_mutex_lock(&shard->lock);
	if (shard->count > shard->mask + shard->mask / 2)
		shard_grow(table, shard);
	head = bucket(shard, hash);
	*next_of(index, inode->slot) = *head;
	*head = inode->slot;
	shard->count++;
	pthread_mutex_unlock(&shard->lock);
	/* In this order: see vf_lasting_entry(). */
	atomic_fetch_add(&table->n_indexed, 1);
	atomic_store(&inode->indexed, 1);
}

void handle_index_remove(struct vf_inode_table *table, struct vf_inode *inode)
{
	uint32_t hash = inode_handle_hash(inode), *link;
	struct shard *shard = shard_of(table->index, hash);

	pthread_mutex_lock(&shard->lock);
	link = bucket(shard, hash);
	while (*link != inode->slot)
		link = next_of(table->index, *link);
	*link = *next_of(table->index, inode->slot);
	shard->count--;
	pthread_mutex_unlock(&shard->lock);
}

/* ---- finding ----------------------------------------------------------------- */

uint32_t vf_inodes_by_handle(struct vf_share *share, struct vf_fsid fsid, int32_t type,
			     const uint8_t *bytes, uint32_t size, struct vf_inode **found,
			     uint32_t max)
{
	struct vf_inode_table *table = share->inodes;
	struct handle_index *index = table->index;
	struct handle handle = {.size = size, .type = type};
	uint32_t n = 0, hash, slot;
	struct shard *shard;
	uint64_t fs;

	if (!index || !size || size > HANDLE_MAX)
		return 0;
	memcpy(&fs, &fsid, sizeof(fs));
	hash = handle_hash(type, bytes, size);
	shard = shard_of(index, hash);
	pthread_mutex_lock(&shard->lock);
	slot = *bucket(shard, hash);
	if (slot != INODE_SLOT_NONE)
		memcpy(handle.bytes, bytes, size);
	for (; slot != INODE_SLOT_NONE && n < max; slot = *next_of(index, slot)) {
		struct vf_inode *inode = inode_at(table, slot);

		/* The mount's entry is there as long as the inode is in the chain. */
		if (inode_handle_is(inode, &handle) &&
		    atomic_load(&table->mounts.entries[inode->mount].fsid) == fs &&
		    inode_try_ref(inode))
			found[n++] = inode;
	}
	pthread_mutex_unlock(&shard->lock);
	return n;
}

uint32_t vf_handle_index_additions(const struct vf_share *share)
{
	return atomic_load(&share->inodes->n_indexed);
}

uint32_t vf_inodes_of_name(struct vf_share *share, struct vf_inode *dir, const char *name,
			   struct vf_inode **found, uint32_t max)
{
	int fd = vf_inode_path_fd(share, dir);
	struct handle handle;
	struct vf_fsid fsid;
	struct statfs fs;

	if (fd < 0 || findable_handle(fd, name, 0, &handle) || fstatfs(fd, &fs))
		return 0;
	memcpy(&fsid, &fs.f_fsid, sizeof(fsid));
	return vf_inodes_by_handle(share, fsid, handle.type, handle.bytes, handle.size, found, max);
}

bool vf_name_has_handle(struct vf_share *share, struct vf_inode *dir, const char *name,
			int32_t type, const uint8_t *bytes, uint32_t size)
{
	int fd = vf_inode_path_fd(share, dir);
	struct handle handle;

	return fd >= 0 && !findable_handle(fd, name, 0, &handle) && handle.type == type &&
	       handle.size == size && !memcmp(handle.bytes, bytes, size);
}

uint64_t vf_handle_identity(int32_t type, const uint8_t *bytes, uint32_t size)
{
	uint64_t h = ((uint64_t)size << 32 | (uint32_t)type) * 0x9e3779b97f4a7c15u;

	for (uint32_t i = 0; i < size; i++)
		h = (h ^ bytes[i]) * 0x100000001b3u;
	return (h ^ h >> 32) | 1;
}

uint64_t vf_identity_of_name(struct vf_share *share, struct vf_inode *dir, const char *name)
{
	int fd = vf_inode_path_fd(share, dir);
	struct handle handle;

	return fd >= 0 && !findable_handle(fd, name, 0, &handle)
		   ? vf_handle_identity(handle.type, handle.bytes, handle.size)
		   : 0;
}

/* Adds to *sum what add() says of each other inode that is the same object of the host. */
static void sum_over_twins(struct vf_share *share, struct vf_inode *inode, uint64_t *sum,
			   uint64_t (*add)(struct vf_share *share, const struct vf_inode *twin))
{
	struct vf_inode_table *table = share->inodes;
	const struct mount *mounts = table->mounts.entries;
	struct handle handle;
	struct shard *shard;
	uint32_t hash;

	if (!(atomic_load(&inode->flags) & INODE_INDEXED))
		return;
	inode_load_handle(inode, &handle);
	hash = handle_hash(handle.type, handle.bytes, handle.size);
	shard = shard_of(table->index, hash);
	pthread_mutex_lock(&shard->lock);
	for (uint32_t slot = *bucket(shard, hash); slot != INODE_SLOT_NONE;
	     slot = *next_of(table->index, slot)) {
		struct vf_inode *other = inode_at(table, slot);

		if (other != inode && mounts[other->mount].fsid == mounts[inode->mount].fsid &&
		    inode_handle_is(other, &handle))
			*sum |= add(share, other);
	}
	pthread_mutex_unlock(&shard->lock);
}

static uint64_t watch_mask_of(struct vf_share *share, const struct vf_inode *inode)
{
	return vf_watch_mask(share->events->watches, inode);
}

uint64_t vf_inode_twins_watch_mask(struct vf_share *share, struct vf_inode *inode)
{
	uint64_t mask = 0;

	sum_over_twins(share, inode, &mask, watch_mask_of);
	return mask;
}

static uint64_t is_marked(struct vf_share *share, const struct vf_inode *inode)
{
	(void)share;
	return vf_inode_is_marked(inode);
}

bool vf_inode_twin_is_marked(struct vf_share *share, struct vf_inode *inode)
{
	uint64_t marked = 0;

	sum_over_twins(share, inode, &marked, is_marked);
	return marked;
}

static uint64_t is_moved(struct vf_share *share, const struct vf_inode *inode)
{
	(void)share;
	return vf_inode_is_moved(inode);
}

bool vf_inode_twin_is_moved(struct vf_share *share, struct vf_inode *inode)
{
	uint64_t moved = 0;

	sum_over_twins(share, inode, &moved, is_moved);
	return moved;
}

bool vf_inode_on_root_fs(struct vf_share *share, const struct vf_inode *inode)
{
	struct vf_inode_table *table = share->inodes;

	return inode->mount == table->root->mount ||
	       table->mounts.entries[inode->mount].fsid ==
		   table->mounts.entries[table->root->mount].fsid;
}
