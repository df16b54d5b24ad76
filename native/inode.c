/* SPDX-License-Identifier: Apache-2.0 */
/* The inode table: slots, references and the hash; inode.h and inode_table.h say the rules. */
#include <sched.h>

#include "events.h"
#include "file.h"
#include "inode_table.h"

/* ---- slots and references ----------------------------------------------- */

static struct vf_inode *slot_inode(struct vf_inode_table *table, uint32_t slot)
{
	struct vf_inode *chunk;

	if (slot >> CHUNK_BITS >= MAX_CHUNKS)
		return NULL;
	chunk = atomic_load_explicit(&table->chunks[slot >> CHUNK_BITS], memory_order_acquire);
	return chunk ? &chunk[slot & (CHUNK_SLOTS - 1)] : NULL;
}

bool inode_try_ref(struct vf_inode *inode)
{
	unsigned int refs = atomic_load_explicit(&inode->refs, memory_order_relaxed);
	unsigned int spins = 0;

	for (;;) {
		if (!refs)
			return false;
		if (refs & INODE_LOCKED) {
			/* One statx(2) at most; the other thread may need this processor. */
			if (++spins > 100)
				sched_yield();
			refs = atomic_load_explicit(&inode->refs, memory_order_relaxed);
			continue;
		}
		if (atomic_compare_exchange_weak_explicit(
			&inode->refs, &refs, refs + 1, memory_order_acquire, memory_order_relaxed))
			return true;
	}
}

struct vf_inode *inode_ref_slot(struct vf_inode_table *table, uint32_t slot)
{
	struct vf_inode *inode = slot_inode(table, slot);

	return inode && inode_try_ref(inode) ? inode : NULL;
}

struct vf_inode *vf_inode_get(struct vf_share *share, uint64_t nodeid)
{
	struct vf_inode *inode = inode_ref_slot(share->inodes, (uint32_t)nodeid);

	if (!inode)
		return NULL;
	if (vf_inode_generation(inode) != nodeid >> 32) {
		vf_inode_put(share, inode);
		return NULL;
	}
	if (!atomic_load_explicit(&inode->hot, memory_order_relaxed))
		atomic_store_explicit(&inode->hot, 1, memory_order_relaxed);
	return inode;
}

uint64_t vf_inode_nodeid(const struct vf_inode *inode)
{
	return (uint64_t)vf_inode_generation(inode) << 32 | inode->slot;
}

uint32_t vf_inode_generation(const struct vf_inode *inode)
{
	return atomic_load_explicit(&((struct vf_inode *)inode)->generation, memory_order_relaxed);
}

mode_t vf_inode_type(const struct vf_inode *inode)
{
	return (mode_t)inode->type << 12;
}

uint16_t vf_inode_mount(const struct vf_inode *inode)
{
	return inode->mount;
}

static unsigned char flags_of(const struct vf_inode *inode)
{
	return atomic_load_explicit(&((struct vf_inode *)inode)->flags, memory_order_relaxed);
}

bool vf_inode_is_watched(const struct vf_inode *inode)
{
	return flags_of(inode) & INODE_WATCHED;
}

static void set_flag(struct vf_inode *inode, unsigned char flag, bool on)
{
	if (on)
		atomic_fetch_or(&inode->flags, flag);
	else
		atomic_fetch_and(&inode->flags, (unsigned char)~flag);
}

void vf_inode_set_watched(struct vf_inode *inode, bool watched)
{
	set_flag(inode, INODE_WATCHED, watched);
}

bool vf_inode_is_marked(const struct vf_inode *inode)
{
	return flags_of(inode) & INODE_MARKED;
}

void vf_inode_set_marked(struct vf_inode *inode, bool marked)
{
	set_flag(inode, INODE_MARKED, marked);
}

void vf_inode_set_unseen(struct vf_inode *inode)
{
	set_flag(inode, INODE_UNSEEN, true);
}

bool vf_inode_take_unseen(struct vf_inode *inode)
{
	return (flags_of(inode) & INODE_UNSEEN) &&
	       (atomic_fetch_and(&inode->flags, (unsigned char)~INODE_UNSEEN) & INODE_UNSEEN);
}

bool vf_inode_is_moved(const struct vf_inode *inode)
{
	return flags_of(inode) & INODE_MOVED;
}

void vf_inode_set_moved(struct vf_inode *inode, bool moved)
{
	set_flag(inode, INODE_MOVED, moved);
}

static void note_large(struct vf_inode *inode)
{
	if (inode->type == S_IFREG >> 12 && !(flags_of(inode) & INODE_LARGE))
		set_flag(inode, INODE_LARGE, true);
}

void vf_inode_note_large(struct vf_share *share, uint64_t nodeid)
{
	struct vf_inode *inode = vf_inode_get(share, nodeid);

	if (!inode)
		return;
	note_large(inode);
	vf_inode_put(share, inode);
}

void vf_inode_note_blocks(struct vf_inode *inode, uint64_t blocks)
{
	if (blocks >= VF_LARGE_FILE / 512)
		note_large(inode);
}

int32_t vf_inode_slot(const struct vf_inode *inode)
{
	return (int32_t)inode->slot; /* MAX_CHUNKS << CHUNK_BITS of them */
}

struct vf_inode *vf_inode_in_slot(struct vf_share *share, int32_t slot)
{
	return inode_ref_slot(share->inodes, (uint32_t)slot);
}

uint32_t vf_inode_slots(struct vf_share *share)
{
	struct vf_inode_table *table = share->inodes;
	uint32_t n;

	pthread_mutex_lock(&table->free_lock);
	n = table->n_slots;
	pthread_mutex_unlock(&table->free_lock);
	return n;
}

bool vf_inode_is_held_once(struct vf_share *share, const struct vf_inode *inode)
{
	struct shard *shard = inode_shard(share->inodes, inode_hash(inode->mount, inode->ino));
	bool once;

	pthread_mutex_lock(&shard->lock);
	once = inode->nlookup == 1;
	pthread_mutex_unlock(&shard->lock);
	return once;
}

bool vf_inode_tell_deleted(struct vf_inode *inode)
{
	return !(atomic_fetch_or(&inode->flags, INODE_DELETE_TOLD) & INODE_DELETE_TOLD);
}

bool vf_inode_was_told_deleted(const struct vf_inode *inode)
{
	return atomic_load(&inode->flags) & INODE_DELETE_TOLD;
}

struct vf_inode *inode_alloc(struct vf_inode_table *table)
{
	struct vf_inode *inode = NULL, *chunk;
	uint32_t slot;

	pthread_mutex_lock(&table->free_lock);
	slot = table->free_head;
	if (slot != INODE_SLOT_NONE) {
		inode = slot_inode(table, slot);
		table->free_head = inode->next;
	} else if (table->n_slots >> CHUNK_BITS < MAX_CHUNKS) {
		slot = table->n_slots;
		inode = slot_inode(table, slot);
		if (!inode) {
			chunk = calloc(CHUNK_SLOTS, sizeof(*chunk));
			atomic_store_explicit(&table->chunks[slot >> CHUNK_BITS], chunk,
					      memory_order_release);
			inode = slot_inode(table, slot);
		}
		if (inode)
			table->n_slots++;
	}
	pthread_mutex_unlock(&table->free_lock);
	if (!inode)
		return NULL;
	inode->slot = slot;
	inode->nlookup = 0;
	atomic_store_explicit(&inode->fd, -1, memory_order_relaxed);
	atomic_store_explicit(&inode->flags, 0, memory_order_relaxed);
	atomic_store_explicit(&inode->hot, 0, memory_order_relaxed);
	atomic_store_explicit(&inode->handle_size, 0, memory_order_relaxed);
	atomic_store_explicit(&inode->indexed, 0, memory_order_relaxed);
	return inode;
}

void inode_unalloc(struct vf_inode_table *table, struct vf_inode *inode)
{
	inode_free_handle(inode);
	pthread_mutex_lock(&table->free_lock);
	inode->next = table->free_head;
	table->free_head = inode->slot;
	pthread_mutex_unlock(&table->free_lock);
}

/* ---- the hash ----------------------------------------------------------- */

uint32_t inode_hash(uint32_t mount, uint64_t ino)
{
	uint64_t h = (ino ^ (uint64_t)mount << 48) * 0x9e3779b97f4a7c15u;

	return (uint32_t)(h >> 32);
}

struct shard *inode_shard(struct vf_inode_table *table, uint32_t hash)
{
	return &table->shards[hash % N_SHARDS];
}

static uint32_t *bucket(const struct shard *shard, uint32_t hash)
{
	return &shard->buckets[hash / N_SHARDS & shard->mask];
}

struct vf_inode *inode_find(struct vf_inode_table *table, struct shard *shard, uint32_t hash,
			    uint32_t mount, uint64_t ino, struct vf_inode *after)
{
	uint32_t slot = after ? after->next : *bucket(shard, hash);

	while (slot != INODE_SLOT_NONE) {
		struct vf_inode *inode = slot_inode(table, slot);

		if (inode->ino == ino && inode->mount == mount)
			return inode;
		slot = inode->next;
	}
	return NULL;
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
			struct vf_inode *inode = slot_inode(table, slot);
			uint32_t *head = bucket(shard, inode_hash(inode->mount, inode->ino));

			slot = inode->next;
			inode->next = *head;
			*head = inode->slot;
		}
	}
	free(old);
}

void inode_publish(struct vf_inode_table *table, struct shard *shard, uint32_t hash,
		   struct vf_inode *inode)
{
	uint32_t *head;

	if (shard->count > shard->mask)
		shard_grow(table, shard);
	head = bucket(shard, hash);
	inode->next = *head;
	*head = inode->slot;
	shard->count++;
	inode->nlookup = 1;
	atomic_fetch_add_explicit(&table->n_inodes, 1, memory_order_relaxed);
	atomic_store_explicit(&inode->refs, INODE_HELD, memory_order_release);
}

static void unhash(struct vf_inode_table *table, struct shard *shard, uint32_t hash,
		   struct vf_inode *inode)
{
	uint32_t *link = bucket(shard, hash);

	while (*link != inode->slot)
		link = &slot_inode(table, *link)->next;
	*link = inode->next;
	shard->count--;
}

/* ---- the end of an inode ------------------------------------------------ */

static void inode_free(struct vf_share *share, struct vf_inode *inode)
{
	struct vf_inode_table *table = share->inodes;
	uint32_t hash = inode_hash(inode->mount, inode->ino), next;
	struct shard *shard = inode_shard(table, hash);

	pthread_mutex_lock(&shard->lock);
	unhash(table, shard, hash, inode);
	pthread_mutex_unlock(&shard->lock);
	if ((flags_of(inode) & (INODE_WATCHED | INODE_MARKED)) && share->events)
		vf_watch_inode_gone(share->events->watches, inode);
	if (flags_of(inode) & INODE_INDEXED)
		handle_index_remove(table, inode);
	vf_locks_release_inode(share, vf_inode_nodeid(inode));
	inode_drop_fd(table, inode);
	mount_unref(&table->mounts, inode->mount);
	atomic_fetch_sub_explicit(&table->n_inodes, 1, memory_order_relaxed);
	next = vf_inode_generation(inode) + 1;
	if (next) {
		atomic_store_explicit(&inode->generation, next, memory_order_relaxed);
		inode_unalloc(table, inode);
	} else {
		inode_free_handle(inode); /* the slot has had all its nodeids */
	}
}

void vf_inode_put(struct vf_share *share, struct vf_inode *inode)
{
	if (atomic_fetch_sub_explicit(&inode->refs, 1, memory_order_acq_rel) == 1)
		inode_free(share, inode);
}

bool inode_hold(struct vf_inode *inode)
{
	unsigned int refs;

	if (inode->nlookup) {
		inode->nlookup++;
		return true;
	}
	/* Given up by the guest, but an operation still works on it: never INODE_LOCKED. */
	refs = atomic_load(&inode->refs);
	do {
		if (!refs)
			return false;
	} while (!atomic_compare_exchange_weak(&inode->refs, &refs, refs + INODE_HELD));
	inode->nlookup = 1;
	return true;
}

void vf_inode_forget(struct vf_share *share, uint64_t nodeid, uint64_t n)
{
	struct vf_inode_table *table = share->inodes;
	struct vf_inode *inode;
	struct shard *shard;

	if (nodeid == FUSE_ROOT_ID || !n)
		return;
	inode = vf_inode_get(share, nodeid);
	if (!inode)
		return;
	shard = inode_shard(table, inode_hash(inode->mount, inode->ino));
	pthread_mutex_lock(&shard->lock);
	if (inode->nlookup) {
		inode->nlookup -= n < inode->nlookup ? n : inode->nlookup;
		if (!inode->nlookup)
			atomic_fetch_sub(&inode->refs, INODE_HELD);
	}
	pthread_mutex_unlock(&shard->lock);
	vf_inode_put(share, inode);
}

/* ---- the table ---------------------------------------------------------- */

/* Slot 0 stands for none; slot 1 is the root, which is never forgotten. */
static int add_root(struct vf_inode_table *table)
{
	struct vf_share *share = table->share;
	struct shard *shard;
	struct statx sx;
	uint32_t hash;
	int error = statx_fd(share->config.root_fd, &sx);

	if (error)
		return error;
	if (!S_ISDIR(sx.stx_mode))
		return -ENOTDIR;
	table->root_dev = statx_dev(&sx);
	table->root_mnt_id = statx_mnt_id(&sx);
	table->root = inode_alloc(table);
	if (!table->root)
		return -ENOMEM;
	table->root->ino = sx.stx_ino;
	table->root->type = S_IFDIR >> 12;
	table->root->mount = mount_get(&table->mounts, table->root_dev, table->root_mnt_id);
	atomic_store(&table->root->fd, share->config.root_fd);
	hash = inode_hash(table->root->mount, table->root->ino);
	shard = inode_shard(table, hash);
	pthread_mutex_lock(&shard->lock);
	inode_publish(table, shard, hash, table->root);
	pthread_mutex_unlock(&shard->lock);
	mount_offer_dir(share, &table->mounts.entries[table->root->mount], share->config.root_fd);
	return 0;
}

struct vf_inode_table *vf_inode_table_new(struct vf_share *share, int *error)
{
	struct vf_inode_table *table = aligned_alloc(64, sizeof(*table));
	bool failed = false;

	*error = -ENOMEM;
	if (!table)
		return NULL;
	memset(table, 0, sizeof(*table));
	table->share = share;
	table->n_slots = INODE_ROOT_SLOT;
	mounts_init(&table->mounts);
	pthread_mutex_init(&table->free_lock, NULL);
	for (uint32_t i = 0; i < N_SHARDS; i++) {
		pthread_mutex_init(&table->shards[i].lock, NULL);
		table->shards[i].mask = 15;
		table->shards[i].buckets = calloc(16, sizeof(uint32_t));
		failed |= !table->shards[i].buckets;
	}
	*error = fd_table_init(table);
	if (!*error && failed)
		*error = -ENOMEM;
	if (!*error)
		*error = add_root(table);
	if (!*error)
		return table;
	vf_inode_table_free(table);
	return NULL;
}

void vf_inode_table_free(struct vf_inode_table *table)
{
	for (uint32_t slot = INODE_ROOT_SLOT + 1; slot < table->n_slots; slot++) {
		struct vf_inode *inode = slot_inode(table, slot);

		if (!atomic_load(&inode->refs))
			continue;
		inode_drop_fd(table, inode);
		inode_free_handle(inode);
	}
	if (table->root)
		inode_free_handle(table->root); /* its descriptor is the configuration's */
	for (uint32_t i = 0; i < MAX_CHUNKS; i++)
		free(table->chunks[i]);
	for (uint32_t i = 0; i < N_SHARDS; i++) {
		pthread_mutex_destroy(&table->shards[i].lock);
		free(table->shards[i].buckets);
	}
	handle_index_free(table);
	pthread_mutex_destroy(&table->free_lock);
	mounts_free(&table->mounts);
	fd_table_free(table);
	free(table);
}

void vf_inode_table_clear(struct vf_inode_table *table)
{
	for (uint32_t slot = INODE_ROOT_SLOT + 1; slot < table->n_slots; slot++) {
		struct vf_inode *inode = slot_inode(table, slot);

		if (atomic_load(&inode->refs))
			vf_inode_forget(table->share, vf_inode_nodeid(inode), UINT64_MAX);
	}
	atomic_store(&table->by_handle, false);
}

void vf_inode_get_stats(struct vf_share *share, struct vf_share_stats *stats)
{
	stats->inodes = atomic_load(&share->inodes->n_inodes);
	stats->inode_fds = atomic_load(&share->inodes->n_fds);
}
