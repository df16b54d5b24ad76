// SPDX-License-Identifier: Apache-2.0
/*
 * Open files and directories: a table of type-stable slots.
 *
 * A slot's state word is (reuse count << 32 | OPEN | references).  A handle is
 * looked up without a lock: the slot's memory never goes away, and a
 * reference is taken only while the reuse count is the handle's own and the
 * slot is open.  RELEASE clears OPEN; whoever then drops the last reference
 * closes the descriptor and gives the slot back under a new reuse count.
 */
#include "file.h"
#include "inode.h"

#define CHUNK_SLOTS 512u
#define STATE_OPEN (1u << 31)
#define STATE_REFS (STATE_OPEN - 1)

struct vf_file {
	_Alignas(64) atomic_uint_fast64_t state;
	/* Written before the slot opens, constant until it is given back. */
	uint64_t nodeid;
	struct vf_dir *dir; /* made by the first READDIR, under dir_lock */
	int fd;
	int flags;
	uint32_t slot;
	uint32_t next_free; /* slot + 1; 0 ends the list */
	bool directory;
	atomic_uchar wait_mode;
	atomic_bool large; /* vf_inode_note_large() was called */
};

struct vf_file_table {
	struct vf_share *share;
	struct vf_file **chunks; /* filled from the front, never emptied */
	uint32_t n_slots;	 /* slots ever used; under lock */
	uint32_t max_slots;
	uint32_t free_head; /* slot + 1; under lock */
	pthread_mutex_t lock;
	atomic_uint used;	     /* of config.open_budget */
	atomic_uint_fast64_t n_open; /* slots open */
	atomic_uint n_dir_buffers;
};

struct vf_file_table *vf_file_table_new(struct vf_share *share, int *error)
{
	struct vf_file_table *table = calloc(1, sizeof(*table));
	uint32_t n_chunks;

	*error = -ENOMEM;
	if (!table)
		return NULL;
	table->share = share;
	table->max_slots = share->config.open_budget;
	n_chunks = table->max_slots / CHUNK_SLOTS + 1;
	table->chunks = calloc(n_chunks, sizeof(*table->chunks));
	if (!table->chunks) {
		free(table);
		return NULL;
	}
	pthread_mutex_init(&table->lock, NULL);
	*error = 0;
	return table;
}

static struct vf_file *slot_file(const struct vf_file_table *table, uint32_t slot)
{
	return &table->chunks[slot / CHUNK_SLOTS][slot % CHUNK_SLOTS];
}

bool vf_open_budget_take(struct vf_share *share)
{
	struct vf_file_table *table = share->files;

	if (atomic_fetch_add_explicit(&table->used, 1, memory_order_relaxed) <
	    share->config.open_budget)
		return true;
	atomic_fetch_sub_explicit(&table->used, 1, memory_order_relaxed);
	return false;
}

void vf_open_budget_give(struct vf_share *share)
{
	atomic_fetch_sub_explicit(&share->files->used, 1, memory_order_relaxed);
}

/* A slot that nobody uses, or NULL. */
static struct vf_file *slot_take(struct vf_file_table *table)
{
	struct vf_file *file = NULL;

	pthread_mutex_lock(&table->lock);
	if (table->free_head) {
		file = slot_file(table, table->free_head - 1);
		table->free_head = file->next_free;
	} else if (table->n_slots < table->max_slots) {
		uint32_t slot = table->n_slots;
		struct vf_file **chunk = &table->chunks[slot / CHUNK_SLOTS];

		if (!*chunk) {
			size_t size = CHUNK_SLOTS * sizeof(struct vf_file);
			struct vf_file *memory = aligned_alloc(64, size);

			if (memory)
				memset(memory, 0, size);
			/* Lookups read the pointer without the lock. */
			__atomic_store_n(chunk, memory, __ATOMIC_RELEASE);
		}
		if (*chunk) {
			file = slot_file(table, slot);
			file->slot = slot;
			/* No handle is 0: reuse counts start at 1. */
			atomic_store(&file->state, 1ull << 32);
			__atomic_store_n(&table->n_slots, slot + 1, __ATOMIC_RELEASE);
		}
	}
	pthread_mutex_unlock(&table->lock);
	return file;
}

static void slot_give(struct vf_file_table *table, struct vf_file *file)
{
	pthread_mutex_lock(&table->lock);
	file->next_free = table->free_head;
	table->free_head = file->slot + 1;
	pthread_mutex_unlock(&table->lock);
}

int vf_file_new(struct vf_share *share, uint64_t nodeid, int fd, int flags, bool directory,
		uint64_t *fh)
{
	struct vf_file_table *table = share->files;
	struct vf_file *file;
	uint64_t reuse;

	if (!vf_open_budget_take(share)) {
		close(fd);
		return -ENFILE;
	}
	file = slot_take(table);
	if (!file) {
		vf_open_budget_give(share);
		close(fd);
		return -ENFILE;
	}
	file->nodeid = nodeid;
	file->fd = fd;
	file->flags = flags;
	file->directory = directory;
	file->dir = NULL;
	atomic_store_explicit(&file->wait_mode, VF_WAIT_UNKNOWN, memory_order_relaxed);
	atomic_store_explicit(&file->large, false, memory_order_relaxed);
	reuse = atomic_load_explicit(&file->state, memory_order_relaxed) >> 32;
	/* The reference that STATE_OPEN stands for is not counted in the low bits. */
	atomic_store_explicit(&file->state, reuse << 32 | STATE_OPEN, memory_order_release);
	atomic_fetch_add_explicit(&table->n_open, 1, memory_order_relaxed);
	*fh = reuse << 32 | file->slot;
	return 0;
}

/* Nobody refers to the slot any more and its OPEN bit is clear. */
static void file_destroy(struct vf_share *share, struct vf_file *file)
{
	struct vf_file_table *table = share->files;
	uint64_t reuse = atomic_load_explicit(&file->state, memory_order_relaxed) >> 32;

	if (file->dir) {
		vf_dir_free(share, file->dir);
		file->dir = NULL;
	}
	close(file->fd);
	file->fd = -1;
	/* Handles with bit 63 are the guest's. */
	if (++reuse >> 31)
		reuse = 1;
	atomic_store_explicit(&file->state, reuse << 32, memory_order_relaxed);
	atomic_fetch_sub_explicit(&table->n_open, 1, memory_order_relaxed);
	slot_give(table, file);
	vf_open_budget_give(share);
}

struct vf_file *vf_file_get(struct vf_share *share, uint64_t nodeid, uint64_t fh)
{
	struct vf_file_table *table = share->files;
	struct vf_file *file;
	uint64_t state;
	uint32_t slot;

	if (fh & VF_FH_DEFERRED)
		fh = vf_deferred_handle(share, fh);
	slot = (uint32_t)fh;
	if (slot >= __atomic_load_n(&table->n_slots, __ATOMIC_ACQUIRE))
		return NULL;
	file = slot_file(table, slot);
	state = atomic_load_explicit(&file->state, memory_order_relaxed);
	do {
		if (state >> 32 != fh >> 32 || !(state & STATE_OPEN))
			return NULL;
	} while (!atomic_compare_exchange_weak_explicit(
	    &file->state, &state, state + 1, memory_order_acquire, memory_order_relaxed));
	if (file->nodeid != nodeid) {
		vf_file_put(share, file);
		return NULL;
	}
	return file;
}

struct vf_file *vf_file_get_kind(struct vf_share *share, uint64_t nodeid, uint64_t fh,
				 bool directory)
{
	struct vf_file *file = vf_file_get(share, nodeid, fh);

	if (file && file->directory != directory) {
		vf_file_put(share, file);
		return NULL;
	}
	return file;
}

static struct vf_file *get_any(struct vf_share *share, uint64_t nodeid, uint64_t fh,
			       enum vf_file_kind kind)
{
	return kind == VF_EITHER ? vf_file_get(share, nodeid, fh)
				 : vf_file_get_kind(share, nodeid, fh, kind == VF_DIRECTORY);
}

int vf_file_use(struct vf_share *share, uint64_t nodeid, uint64_t fh, enum vf_file_kind kind,
		struct vf_file **file)
{
	int error;

	*file = get_any(share, nodeid, fh, kind);
	if (*file)
		return 0;
	error = vf_deferred_open(share, nodeid, fh, kind);
	if (error)
		return error;
	/* It may be of another object, or of another kind. */
	*file = get_any(share, nodeid, fh, kind);
	return *file ? 0 : -EBADF;
}

void vf_file_put(struct vf_share *share, struct vf_file *file)
{
	uint64_t state = atomic_fetch_sub_explicit(&file->state, 1, memory_order_acq_rel) - 1;

	if (!(state & (STATE_OPEN | STATE_REFS)))
		file_destroy(share, file);
}

int vf_file_release(struct vf_share *share, struct vf_file *file)
{
	uint64_t state =
	    atomic_fetch_and_explicit(&file->state, ~(uint64_t)STATE_OPEN, memory_order_acq_rel);

	(void)share;
	return state & STATE_OPEN ? 0 : -EBADF;
}

int vf_file_fd(const struct vf_file *file)
{
	return file->fd;
}

int vf_file_flags(const struct vf_file *file)
{
	return file->flags;
}

void vf_file_written(struct vf_share *share, struct vf_file *file, uint64_t end)
{
	if (end < VF_LARGE_FILE || atomic_load_explicit(&file->large, memory_order_relaxed))
		return;
	atomic_store_explicit(&file->large, true, memory_order_relaxed);
	vf_inode_note_large(share, file->nodeid);
}

enum vf_wait_mode vf_file_wait_mode(struct vf_file *file)
{
	return atomic_load_explicit(&file->wait_mode, memory_order_relaxed);
}

void vf_file_set_wait_mode(struct vf_file *file, enum vf_wait_mode mode)
{
	atomic_store_explicit(&file->wait_mode, (unsigned char)mode, memory_order_relaxed);
}

struct vf_dir *vf_file_dir(struct vf_share *share, struct vf_file *file)
{
	struct vf_file_table *table = share->files;
	struct vf_dir *dir = __atomic_load_n(&file->dir, __ATOMIC_ACQUIRE);

	if (dir)
		return dir;
	pthread_mutex_lock(&table->lock);
	if (!file->dir) {
		dir = vf_dir_new();
		__atomic_store_n(&file->dir, dir, __ATOMIC_RELEASE);
	}
	dir = file->dir;
	pthread_mutex_unlock(&table->lock);
	return dir;
}

bool vf_dir_buffer_take(struct vf_share *share)
{
	atomic_uint *n = &share->files->n_dir_buffers;

	if (atomic_fetch_add_explicit(n, 1, memory_order_relaxed) < VF_DIR_BUFFERS)
		return true;
	atomic_fetch_sub_explicit(n, 1, memory_order_relaxed);
	return false;
}

void vf_dir_buffer_give(struct vf_share *share)
{
	atomic_fetch_sub_explicit(&share->files->n_dir_buffers, 1, memory_order_relaxed);
}

/* No request is under way: every slot that is open is closed, whatever its references. */
static void table_close_all(struct vf_file_table *table)
{
	for (uint32_t slot = 0; slot < table->n_slots; slot++) {
		struct vf_file *file = slot_file(table, slot);
		uint64_t state = atomic_load(&file->state);

		if (!(state & STATE_OPEN))
			continue;
		atomic_store(&file->state, state & ~(uint64_t)(STATE_OPEN | STATE_REFS));
		file_destroy(table->share, file);
	}
}

void vf_file_table_clear(struct vf_file_table *table)
{
	if (table->share->locks)
		vf_locks_clear(table->share);
	table_close_all(table);
	vf_deferred_end(table->share);
}

void vf_file_table_free(struct vf_file_table *table)
{
	if (!table)
		return;
	table_close_all(table);
	vf_deferred_end(table->share);
	for (uint32_t i = 0; i <= table->max_slots / CHUNK_SLOTS; i++)
		free(table->chunks[i]);
	free(table->chunks);
	pthread_mutex_destroy(&table->lock);
	free(table);
}

void vf_file_get_stats(struct vf_share *share, struct vf_share_stats *stats)
{
	stats->open_files = atomic_load(&share->files->n_open);
	stats->lock_waiters = vf_locks_n_waiters(share);
}

int vf_open_flags(const struct vf_share *share, uint32_t guest_flags)
{
	uint64_t session = vf_session_flags(share);
	/* O_SYNC contains O_DSYNC; creation, controlling terminals and the like are not the guest's
	 * to ask. */
	int flags = (int)guest_flags & (O_ACCMODE | O_APPEND | O_SYNC | O_LARGEFILE);

	if (session & FUSE_ATOMIC_O_TRUNC)
		flags |= (int)guest_flags & O_TRUNC;
	if (share->config.allow_direct_io)
		flags |= (int)guest_flags & O_DIRECT;
	if (share->config.preserve_noatime)
		flags |= (int)guest_flags & O_NOATIME;
	if (session & FUSE_WRITEBACK_CACHE) {
		/*
		 * The guest's kernel reads pages that are written in part, and
		 * knows best where the file ends.
		 */
		if ((flags & O_ACCMODE) == O_WRONLY)
			flags = (flags & ~O_ACCMODE) | O_RDWR;
		flags &= ~O_APPEND;
	}
	return flags;
}

uint32_t vf_fopen_flags(const struct vf_share *share, uint32_t guest_flags, bool directory,
			bool lasting)
{
	uint64_t session = vf_session_flags(share);
	uint32_t mode = share->config.cache_mode;
	uint32_t fopen = 0;

	if (directory)
		return mode == VF_CACHE_ALWAYS || mode == VF_CACHE_METADATA || lasting
			   ? FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE
			   : 0;
	if (mode == VF_CACHE_NEVER || mode == VF_CACHE_METADATA ||
	    ((guest_flags & O_DIRECT) && share->config.allow_direct_io))
		/* The host's file system orders writes to one file. */
		fopen |= FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
	else if (mode == VF_CACHE_ALWAYS || lasting)
		fopen |= FOPEN_KEEP_CACHE;
	/* FLUSH does nothing for a file that cannot be written, but it is what drops POSIX locks.
	 */
	if ((guest_flags & O_ACCMODE) == O_RDONLY && !(session & FUSE_POSIX_LOCKS))
		fopen |= FOPEN_NOFLUSH;
	return fopen;
}
