// SPDX-License-Identifier: Apache-2.0
/*
 * Files and directories that the guest's driver opened by itself, under handles
 * of its own choice, and that are opened here when something needs that.
 * docs/protocol.md, "Deferred opens".
 *
 * The low bits of such a handle say which entry of a table it has, so the guest
 * decides nothing about how long anything takes. What is opened is an open file
 * like any other (file.c), counted like any other; the entry only names it.
 */
#include "core.h"

#include "file.h"
#include "inode.h"

#define N_ENTRIES VF_MAX_DEFERRED

struct entry {
	atomic_uint_fast64_t fh;     /* the guest's; 0: nothing is open */
	atomic_uint_fast64_t handle; /* of file.c; written before fh is */
};

struct vf_deferred {
	pthread_mutex_t lock; /* changes of entries */
	struct entry entries[N_ENTRIES];
};

static struct vf_deferred *deferred_of(const struct vf_share *share)
{
	return atomic_load_explicit(&share->deferred, memory_order_acquire);
}

static struct entry *entry_of(struct vf_deferred *deferred, uint64_t fh)
{
	return &deferred->entries[fh % N_ENTRIES];
}

int vf_deferred_start(struct vf_share *share)
{
	struct vf_deferred *deferred;

	if (deferred_of(share))
		return 0;
	deferred = calloc(1, sizeof(*deferred));
	if (!deferred)
		return -ENOMEM;
	pthread_mutex_init(&deferred->lock, NULL);
	atomic_store_explicit(&share->deferred, deferred, memory_order_release);
	return 0;
}

void vf_deferred_end(struct vf_share *share)
{
	struct vf_deferred *deferred = deferred_of(share);

	if (!deferred)
		return;
	atomic_store(&share->deferred, NULL);
	pthread_mutex_destroy(&deferred->lock);
	free(deferred);
}

uint64_t vf_deferred_handle(const struct vf_share *share, uint64_t fh)
{
	struct vf_deferred *deferred = deferred_of(share);
	struct entry *entry;

	if (!deferred)
		return 0;
	entry = entry_of(deferred, fh);
	if (atomic_load_explicit(&entry->fh, memory_order_acquire) != fh)
		return 0;
	return atomic_load_explicit(&entry->handle, memory_order_relaxed);
}

bool vf_deferred_is_unopened(const struct vf_share *share, uint64_t fh)
{
	struct vf_deferred *deferred = deferred_of(share);

	return deferred && (fh & VF_FH_DEFERRED) &&
	       atomic_load_explicit(&entry_of(deferred, fh)->fh, memory_order_acquire) != fh;
}

/* What OPEN or OPENDIR would open for reading; a descriptor or a negative errno. */
static int open_for_reading(struct vf_share *share, uint64_t nodeid, enum vf_file_kind kind,
			    int *flags)
{
	struct vf_inode *inode = vf_inode_get(share, nodeid);
	int fd = -EBADF;

	if (!inode)
		return -ESTALE;
	switch (vf_inode_type(inode)) {
	case S_IFREG:
		*flags = vf_open_flags(share, O_RDONLY | O_LARGEFILE);
		if (kind != VF_DIRECTORY)
			fd = vf_inode_open(share, inode, *flags);
		break;
	case S_IFDIR:
		*flags = O_RDONLY | O_DIRECTORY;
		if (kind != VF_REGULAR)
			fd = vf_inode_open(share, inode, *flags);
		break;
	}
	vf_inode_put(share, inode);
	return fd;
}

static void drop(struct vf_share *share, uint64_t nodeid, uint64_t handle)
{
	struct vf_file *file = vf_file_get(share, nodeid, handle);

	if (!file)
		return;
	vf_file_release(share, file);
	vf_file_put(share, file);
}

int vf_deferred_open(struct vf_share *share, uint64_t nodeid, uint64_t fh, enum vf_file_kind kind)
{
	struct vf_deferred *deferred = deferred_of(share);
	struct entry *entry;
	uint64_t handle, has;
	int flags, result;

	if (!deferred || !(fh & VF_FH_DEFERRED))
		return -EBADF;
	entry = entry_of(deferred, fh);
	has = atomic_load(&entry->fh);
	if (has)
		return has == fh ? 0 : -EBADF;
	result = open_for_reading(share, nodeid, kind, &flags);
	if (result < 0)
		return result;
	result = vf_file_new(share, nodeid, result, flags, flags & O_DIRECTORY, &handle);
	if (result < 0)
		return result;
	pthread_mutex_lock(&deferred->lock);
	has = atomic_load(&entry->fh);
	if (!has) {
		atomic_store(&entry->handle, handle);
		atomic_store_explicit(&entry->fh, fh, memory_order_release);
	}
	pthread_mutex_unlock(&deferred->lock);
	if (!has)
		return 0;
	/* Two requests were the first: the other one has opened it. */
	drop(share, nodeid, handle);
	return has == fh ? 0 : -EBADF;
}

void vf_deferred_close(struct vf_share *share, uint64_t fh)
{
	struct vf_deferred *deferred = deferred_of(share);
	struct entry *entry;

	if (!deferred || !(fh & VF_FH_DEFERRED))
		return;
	entry = entry_of(deferred, fh);
	pthread_mutex_lock(&deferred->lock);
	if (atomic_load(&entry->fh) == fh)
		atomic_store(&entry->fh, 0);
	pthread_mutex_unlock(&deferred->lock);
}
