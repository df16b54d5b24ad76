/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inode table from inside: what inode.c (slots, references, hash),
 * inode_fd.c (descriptors and file handles), mount.c and entry.c (lookups)
 * share.  Nobody else includes this.
 *
 * Life of an inode.  refs counts the operations that work on it, and has
 * INODE_HELD while nlookup is not 0.  Who brings it to 0 frees the slot, and
 * nobody raises it from 0.  INODE_LOCKED: the descriptor is being taken away,
 * which others wait out; it is set only when nothing but the guest's hold and
 * the evicting thread are there.
 *
 * Locks: a shard's lock guards its chains, and nlookup and INODE_HELD of every
 * inode in them.  evict_lock is the outermost; the others are never nested
 * (the index of handles has its own: handle_index.c).
 * No system call is made under a shard's lock.
 */
#ifndef VHOSTFS_INODE_TABLE_H
#define VHOSTFS_INODE_TABLE_H

#include "inode.h"

#define INODE_LOCKED 0x80000000u
#define INODE_HELD 0x40000000u
#define INODE_SLOT_NONE 0u
#define INODE_ROOT_SLOT 1u

#define CHUNK_BITS 12
#define CHUNK_SLOTS (1u << CHUNK_BITS)
#define MAX_CHUNKS (1u << 16)
#define N_SHARDS 64u

/* Handles up to this long lie in the inode itself: ext4, xfs, tmpfs, f2fs. */
#define HANDLE_INLINE 16u
#define HANDLE_MAX 128u /* MAX_HANDLE_SZ */

enum inode_flags {
	/* The last lookup in this directory met an inode that was known (see entry.c). */
	INODE_CHILDREN_KNOWN = 1,
	/* This regular file may have become large; see inode_drop_fd(). */
	INODE_LARGE = 1,
	/* Had no link when last looked at, so there may be no way back by handle. */
	INODE_KEEP_FD = 2,
	INODE_INDEXED = 4,	/* in the index of handles, or about to be */
	INODE_WATCHED = 8,	/* watch.c has an entry for it */
	INODE_DELETE_TOLD = 16, /* see vf_inode_tell_deleted() */
	INODE_MARKED = 32,	/* see vf_inode_set_marked() */
	INODE_UNSEEN = 64,	/* see vf_inode_set_unseen() */
	INODE_MOVED = 128,	/* see vf_inode_set_moved() */
};

/* One cache line; 64 bytes for each inode that the guest holds, beside 4 to 8 of hash. */
struct vf_inode {
	atomic_uint refs;
	atomic_int fd; /* O_PATH; -1: only the handle is left */
	uint64_t nlookup;
	uint64_t ino;
	uint32_t slot;
	atomic_uint generation;
	uint32_t next;		  /* in its hash chain, or in the list of free slots */
	atomic_uint pinned_since; /* the table's clock when fd began to pin the inode number */
	uint16_t mount;
	uint8_t type;	  /* S_IFMT >> 12 */
	atomic_uchar hot; /* used since the eviction hand last passed */
	atomic_uchar flags;
	/* Written once, before any other thread may read it; see inode_fd.c. */
	atomic_uchar handle_size; /* 0: not asked for yet */
	uint8_t handle_type;	  /* of an inline handle */
	atomic_uchar indexed;	  /* found by its handle from now on, until it is freed */
	union {
		uint8_t bytes[HANDLE_INLINE];
		struct handle *heap; /* handle_size > HANDLE_INLINE, or a type that needs 32 bits */
	} handle;
};

/* struct file_handle with its room, as name_to_handle_at(2) wants it. */
struct handle {
	uint32_t size;
	int32_t type;
	uint8_t bytes[HANDLE_MAX];
};

struct shard {
	pthread_mutex_t lock;
	uint32_t *buckets; /* slots */
	uint32_t mask;
	uint32_t count;
} __attribute__((aligned(64)));

/* A mounted file system that the share reaches: handles are opened by it. */
enum mount_handles { HANDLES_UNTRIED, HANDLES_WORK, HANDLES_DO_NOT_WORK };
struct mount {
	uint64_t dev;
	uint64_t mnt_id;
	atomic_uint count; /* inodes, and operations between finding and using it */
	atomic_int fd; /* a directory open for reading, for open_by_handle_at(2); -1: none yet */
	atomic_uchar handles;
	atomic_uchar attempts; /* to open fd */
	bool used;
	atomic_uint_fast64_t fsid; /* f_fsid; 0: not asked for yet, or the file system has none */
};
#define MAX_MOUNTS 1024u
#define MOUNT_NONE UINT16_MAX

struct mounts {
	pthread_mutex_t lock;
	uint32_t n; /* entries below this have been used */
	struct mount entries[MAX_MOUNTS];
};

struct handle_index;

struct vf_inode_table {
	struct vf_share *share;
	struct handle_index *_Atomic index; /* NULL until events are granted */
	struct vf_inode *_Atomic chunks[MAX_CHUNKS];
	struct vf_inode *root;
	uint64_t root_dev, root_mnt_id;
	struct shard shards[N_SHARDS];
	struct mounts mounts;

	pthread_mutex_t free_lock;
	uint32_t free_head;
	uint32_t n_slots; /* ever used, slot 0 included */

	atomic_uint clock;     /* see vf_inode.pinned_since */
	atomic_uint n_indexed; /* counts additions to the index; wraps around */
	atomic_uint_fast64_t n_inodes;

	/* Descriptors of inodes; owners[fd] is the slot that holds fd, 0 when none does. */
	atomic_uint n_fds;
	_Atomic uint32_t *owners;
	pthread_mutex_t evict_lock;
	uint32_t hand;	       /* descriptor at which the search for a cold inode goes on */
	atomic_uint top_fd;    /* no inode holds a higher one */
	atomic_bool by_handle; /* at least one descriptor was given up in this session */
};
#define MAX_OWNERS (4u << 20)

/* name_to_handle_at(2) of Linux 6.5: a handle that need not be good for opening. */
#define VF_AT_HANDLE_FID 0x200

/* What statx(2) tells and a lookup needs. */
#define INODE_STATX_MASK (STATX_BASIC_STATS | STATX_MNT_ID)

/* Did its descriptor pin its number when something was looked at, after the clock had shown that?
 */
static inline bool inode_was_pinned(struct vf_inode *inode, uint32_t seen_at)
{
	return atomic_load(&inode->fd) >= 0 &&
	       (int32_t)(seen_at - atomic_load(&inode->pinned_since)) >= 0;
}

static inline uint64_t statx_dev(const struct statx *sx)
{
	return (uint64_t)sx->stx_dev_major << 32 | sx->stx_dev_minor;
}

static inline uint64_t statx_mnt_id(const struct statx *sx)
{
	return sx->stx_mask & STATX_MNT_ID ? sx->stx_mnt_id : 0;
}

/* ---- inode.c ---- */
/* A reference to the inode in this slot, whatever it is; NULL: the slot is free. */
struct vf_inode *inode_ref_slot(struct vf_inode_table *table, uint32_t slot);
/* Takes a reference; false: the inode is being freed. */
bool inode_try_ref(struct vf_inode *inode);
struct shard *inode_shard(struct vf_inode_table *table, uint32_t hash);
uint32_t inode_hash(uint32_t mount, uint64_t ino);
/* Next inode of this key in its chain, after `after` or from the start; the shard is locked. */
struct vf_inode *inode_find(struct vf_inode_table *table, struct shard *shard, uint32_t hash,
			    uint32_t mount, uint64_t ino, struct vf_inode *after);
/* A free slot, blank, in nobody's sight; NULL: out of memory. */
struct vf_inode *inode_alloc(struct vf_inode_table *table);
/* Gives it back unused. */
void inode_unalloc(struct vf_inode_table *table, struct vf_inode *inode);
/* Makes it findable with one lookup of the guest; the shard is locked. */
void inode_publish(struct vf_inode_table *table, struct shard *shard, uint32_t hash,
		   struct vf_inode *inode);
/* One more lookup of the guest; the shard is locked.  False: the inode is being freed. */
bool inode_hold(struct vf_inode *inode);

/* ---- inode_fd.c ---- */
int fd_table_init(struct vf_inode_table *table);
void fd_table_free(struct vf_inode_table *table);
/* fd is now this inode's; false: it had one already.  The caller holds a reference, or made it. */
bool inode_adopt_fd(struct vf_inode_table *table, struct vf_inode *inode, int fd);
/*
 * The inode is being freed: closes and forgets what it holds.  To free a large file takes long, so
 * that is left to the pool.
 */
void inode_drop_fd(struct vf_inode_table *table, struct vf_inode *inode);
/*
 * Room for one more descriptor of an inode; sheds cold ones when the budget is used up.
 * -ENFILE: every descriptor must stay.
 */
int inode_fd_room(struct vf_inode_table *table);
/* 0, or -errno; flags: AT_EMPTY_PATH, VF_AT_HANDLE_FID. */
int handle_of(int dir_fd, const char *name, int flags, struct handle *handle);
void inode_store_handle(struct vf_inode *inode, const struct handle *handle);
void inode_load_handle(const struct vf_inode *inode, struct handle *handle);
void inode_free_handle(struct vf_inode *inode);
bool inode_handle_is(const struct vf_inode *inode, const struct handle *handle);
/* Works out how (whether) handles of this mount can be opened; fd: an object of it. */
bool mount_handles_work(struct vf_share *share, struct mount *mount, int fd);

/* ---- mount.c ---- */
void mounts_init(struct mounts *mounts);
void mounts_free(struct mounts *mounts);
/* The entry of (dev, mnt_id), made when there is none, with a reference; MOUNT_NONE: no room. */
uint16_t mount_get(struct mounts *mounts, uint64_t dev, uint64_t mnt_id);
void mount_ref(struct mounts *mounts, uint16_t index);
void mount_unref(struct mounts *mounts, uint16_t index);
/* fd is a directory of this mount: keeps it open for reading when none is yet. */
void mount_offer_dir(struct vf_share *share, struct mount *mount, int fd);

/* ---- handle_index.c ---- */
bool handle_index_is_on(const struct vf_inode_table *table);
/*
 * An inode that nobody else can reach yet gets its handle, when the index is on and it has none.
 * fd: of the object.
 */
void handle_index_prepare(struct vf_inode_table *table, struct vf_inode *inode, int fd);
/* The caller has a reference. */
void handle_index_add(struct vf_inode_table *table, struct vf_inode *inode, int fd);
/* The inode, which has INODE_INDEXED, is being freed. */
void handle_index_remove(struct vf_inode_table *table, struct vf_inode *inode);
void handle_index_free(struct vf_inode_table *table);

/* ---- entry.c ---- */
/* O_PATH; tries again when descriptors run out. Negative errno. */
int open_path(struct vf_share *share, int dir_fd, const char *name);
/* statx(2) of what fd refers to. */
int statx_fd(int fd, struct statx *sx);

#endif
