/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Descriptors and file handles of inodes: which inodes keep a descriptor, and
 * the way back to those that do not (name_to_handle_at(2)).
 *
 * A known limit, as with NFS: when the host removes the last link of an object
 * that is held by handle only and that nobody has open, it is gone (ESTALE).
 * Removals by the guest itself are caught, see vf_inode_guard_removal(), as long as there are
 * descriptors to keep for them.
 */
#include <sys/mman.h>

#include "inode_table.h"
#include "proc_name.h"

/* Beyond the budget while operations hold what could be shed. */
#define BUDGET_SLACK 32u
/* Freed at once when the process has run out of descriptors. */
#define SHED_BATCH 32u

int fd_table_init(struct vf_inode_table *table)
{
	/* Touched only as far as descriptors go. */
	void *owners = mmap(NULL, MAX_OWNERS * sizeof(*table->owners), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	pthread_mutex_init(&table->evict_lock, NULL);
	if (owners == MAP_FAILED)
		return -ENOMEM;
	table->owners = owners;
	return 0;
}

void fd_table_free(struct vf_inode_table *table)
{
	pthread_mutex_destroy(&table->evict_lock);
	if (table->owners)
		munmap(table->owners, MAX_OWNERS * sizeof(*table->owners));
}

bool inode_adopt_fd(struct vf_inode_table *table, struct vf_inode *inode, int fd)
{
	unsigned int top = atomic_load_explicit(&table->top_fd, memory_order_relaxed);
	int none = -1;

	/* Told before fd is: who sees fd and an older pinned_since would trust it too early. */
	atomic_store(&inode->pinned_since, atomic_fetch_add(&table->clock, 1) + 1);
	if (!atomic_compare_exchange_strong(&inode->fd, &none, fd))
		return false;
	atomic_fetch_add_explicit(&table->n_fds, 1, memory_order_relaxed);
	if ((unsigned int)fd >= MAX_OWNERS)
		return true; /* never shed */
	atomic_store_explicit(&table->owners[fd], inode->slot, memory_order_relaxed);
	while (top < (unsigned int)fd &&
	       !atomic_compare_exchange_weak(&table->top_fd, &top, (unsigned int)fd))
		;
	return true;
}

/* fd is not yet closed, so that no other inode can have taken its place in owners[]. */
static void disown(struct vf_inode_table *table, int fd)
{
	if ((unsigned int)fd < MAX_OWNERS)
		atomic_store_explicit(&table->owners[fd], INODE_SLOT_NONE, memory_order_relaxed);
	atomic_fetch_sub_explicit(&table->n_fds, 1, memory_order_relaxed);
}

/* Has no name any more, so that it ends with its last descriptor, and may be large. */
static bool ends_slowly(const struct vf_inode *inode, int fd)
{
	struct statx sx;

	return inode->type == S_IFREG >> 12 && (atomic_load(&inode->flags) & INODE_LARGE) &&
	       !statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_NLINK, &sx) &&
	       !sx.stx_nlink;
}

void inode_drop_fd(struct vf_inode_table *table, struct vf_inode *inode)
{
	int fd = atomic_exchange(&inode->fd, -1);

	if (fd < 0)
		return;
	disown(table, fd);
	if (table->share->pool && ends_slowly(inode, fd))
		vf_pool_close(table->share->pool, fd);
	else
		close(fd);
}

/* ---- file handles ------------------------------------------------------- */

_Static_assert(offsetof(struct handle, bytes) == offsetof(struct file_handle, f_handle),
	       "struct handle is struct file_handle with its room");

int handle_of(int dir_fd, const char *name, int flags, struct handle *handle)
{
	int mount_id;

	handle->size = HANDLE_MAX;
	if (name_to_handle_at(dir_fd, name, (void *)handle, &mount_id, flags))
		return -errno;
	return handle->size && handle->size <= HANDLE_MAX ? 0 : -EOPNOTSUPP;
}

int vf_encode_handle(int fd, bool for_events)
{
	struct handle handle;

	return handle_of(fd, "", AT_EMPTY_PATH | (for_events ? VF_AT_HANDLE_FID : 0), &handle);
}

int vf_open_by_own_handle(int fd, int mount_fd)
{
	struct handle handle;
	int error = handle_of(fd, "", AT_EMPTY_PATH, &handle);

	if (error)
		return error;
	fd = open_by_handle_at(mount_fd, (void *)&handle, O_PATH | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static bool fits_inline(const struct handle *handle)
{
	return handle->size <= HANDLE_INLINE && handle->type >= 0 && handle->type < UINT8_MAX;
}

/* handle_type of a handle that is on the heap; fits_inline() refuses this type. */
#define TYPE_ON_HEAP UINT8_MAX

void inode_store_handle(struct vf_inode *inode, const struct handle *handle)
{
	size_t size = offsetof(struct handle, bytes) + handle->size;

	if (fits_inline(handle)) {
		memcpy(inode->handle.bytes, handle->bytes, handle->size);
		inode->handle_type = (uint8_t)handle->type;
	} else {
		inode->handle.heap = malloc(size);
		if (!inode->handle.heap)
			return;
		memcpy(inode->handle.heap, handle, size);
		inode->handle_type = TYPE_ON_HEAP;
	}
	atomic_store_explicit(&inode->handle_size, (uint8_t)handle->size, memory_order_release);
}

void inode_free_handle(struct vf_inode *inode)
{
	if (atomic_load(&inode->handle_size) && inode->handle_type == TYPE_ON_HEAP)
		free(inode->handle.heap);
	atomic_store(&inode->handle_size, 0);
}

void inode_load_handle(const struct vf_inode *inode, struct handle *handle)
{
	handle->size = atomic_load(&((struct vf_inode *)inode)->handle_size);
	if (handle->size && inode->handle_type == TYPE_ON_HEAP) {
		memcpy(handle, inode->handle.heap, offsetof(struct handle, bytes) + handle->size);
		return;
	}
	handle->type = inode->handle_type;
	memcpy(handle->bytes, inode->handle.bytes, handle->size);
}

bool inode_handle_is(const struct vf_inode *inode, const struct handle *handle)
{
	uint32_t size =
	    atomic_load_explicit(&((struct vf_inode *)inode)->handle_size, memory_order_acquire);
	const uint8_t *bytes = inode->handle.bytes;
	int32_t type = inode->handle_type;

	if (!size || size != handle->size)
		return false;
	if (type == TYPE_ON_HEAP) {
		type = inode->handle.heap->type;
		bytes = inode->handle.heap->bytes;
	}
	return type == handle->type && !memcmp(bytes, handle->bytes, size);
}

static int open_handle(struct vf_share *share, struct vf_inode *inode, int flags)
{
	struct mount *mount = &share->inodes->mounts.entries[inode->mount];
	struct handle handle;
	int fd;

	inode_load_handle(inode, &handle);
	if (!handle.size)
		return -ESTALE;
	do {
		fd = open_by_handle_at(atomic_load(&mount->fd), (void *)&handle, flags | O_CLOEXEC);
	} while (fd < 0 && vf_fd_shortage(share, errno));
	if (fd >= 0)
		return fd;
	/* iget_locked() of Linux says so while the number is being given to another object. */
	return errno == ENOMEM ? -ESTALE : -errno;
}

/* Opens the object's own handle and looks whether that gives the object. */
static enum mount_handles try_handles(struct mount *mount, int fd)
{
	struct statx sx, back;
	struct handle handle;
	int opened;

	if (handle_of(fd, "", AT_EMPTY_PATH, &handle))
		return HANDLES_DO_NOT_WORK;
	opened = open_by_handle_at(atomic_load(&mount->fd), (void *)&handle, O_PATH | O_CLOEXEC);
	if (opened < 0) {
		/* The kernel looks for a free descriptor last, when the handle was good. */
		if (errno == EMFILE || errno == ENFILE)
			return HANDLES_WORK;
		return errno == ESTALE || errno == ENOMEM ? HANDLES_UNTRIED : HANDLES_DO_NOT_WORK;
	}
	if (statx_fd(fd, &sx) || statx_fd(opened, &back)) {
		close(opened);
		return HANDLES_UNTRIED;
	}
	close(opened);
	return sx.stx_ino == back.stx_ino && statx_dev(&sx) == statx_dev(&back)
		   ? HANDLES_WORK
		   : HANDLES_DO_NOT_WORK;
}

bool mount_handles_work(struct vf_share *share, struct mount *mount, int fd)
{
	unsigned char state = atomic_load(&mount->handles);

	if (share->config.handle_mode == VF_HANDLES_NEVER || atomic_load(&mount->fd) < 0)
		return false;
	if (state == HANDLES_UNTRIED) {
		state = try_handles(mount, fd);
		atomic_store(&mount->handles, state);
	}
	return state == HANDLES_WORK;
}

/* ---- giving descriptors up ---------------------------------------------- */

/*
 * The caller holds evict_lock and one reference.  An object without a link can be opened by handle
 * only while something else has it open, so it gives its descriptor up by force only.  True: a
 * descriptor was closed.
 */
static bool evict(struct vf_share *share, struct vf_inode *inode, bool by_force)
{
	struct vf_inode_table *table = share->inodes;
	unsigned int only_held = INODE_HELD + 1;
	int fd = atomic_load(&inode->fd);
	struct handle handle;
	struct statx sx;

	if (!mount_handles_work(share, &table->mounts.entries[inode->mount], fd))
		return false;
	if (!atomic_load(&inode->handle_size)) {
		if (handle_of(fd, "", AT_EMPTY_PATH, &handle))
			return false;
		inode_store_handle(inode, &handle);
		if (!atomic_load(&inode->handle_size))
			return false;
	}
	if (!atomic_compare_exchange_strong(&inode->refs, &only_held, INODE_LOCKED))
		return false;
	/* Asked while no operation of the guest can remove it, see vf_inode_guard_removal(). */
	if (!by_force && (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_NLINK, &sx) ||
			  !sx.stx_nlink)) {
		atomic_fetch_or(&inode->flags, INODE_KEEP_FD);
		atomic_store_explicit(&inode->refs, INODE_HELD + 1, memory_order_release);
		return false;
	}
	atomic_store(&table->by_handle, true);
	disown(table, fd);
	atomic_store_explicit(&inode->fd, -1, memory_order_release);
	atomic_store_explicit(&inode->refs, INODE_HELD + 1, memory_order_release);
	close(fd);
	return true;
}

/* Gives back a reference that is not the last; false: it is. */
static bool put_unless_last(struct vf_inode *inode)
{
	unsigned int refs = atomic_load_explicit(&inode->refs, memory_order_relaxed);

	do {
		if (refs == 1)
			return false;
	} while (!atomic_compare_exchange_weak_explicit(
	    &inode->refs, &refs, refs - 1, memory_order_acq_rel, memory_order_relaxed));
	return true;
}

/*
 * The hand goes round at most three times: the first takes the mark of use from each, and the
 * third, when all are without a link, uses force: that one of these is lost to the guest (unless it
 * has it open) is better than that nothing new can be looked up.
 */
uint32_t vf_inode_shed_fds(struct vf_share *share, uint32_t wanted)
{
	struct vf_inode_table *table = share->inodes;
	/* Their end may take locks that are held by others who wait for this one. */
	struct vf_inode *dead[16];
	uint32_t freed = 0, end, steps, n_dead = 0;

	if (share->config.handle_mode == VF_HANDLES_NEVER)
		return 0;
	pthread_mutex_lock(&table->evict_lock);
	end = atomic_load(&table->top_fd) + 1;
	for (steps = 0; freed < wanted && n_dead < 16 && steps < (freed ? 2 : 3) * end; steps++) {
		bool by_force = steps >= 2 * end;
		struct vf_inode *inode;
		uint32_t slot;

		table->hand = table->hand + 1 < end ? table->hand + 1 : 0;
		slot = atomic_load_explicit(&table->owners[table->hand], memory_order_relaxed);
		inode = slot ? inode_ref_slot(table, slot) : NULL;
		if (!inode)
			continue;
		if (atomic_load(&inode->fd) == (int)table->hand &&
		    !atomic_exchange(&inode->hot, 0) &&
		    (by_force || !(atomic_load(&inode->flags) & INODE_KEEP_FD)))
			freed += evict(share, inode, by_force);
		if (!put_unless_last(inode))
			dead[n_dead++] = inode;
	}
	pthread_mutex_unlock(&table->evict_lock);
	/* Each of them has given its descriptor up. */
	freed += n_dead;
	while (n_dead)
		vf_inode_put(share, dead[--n_dead]);
	return freed;
}

int inode_fd_room(struct vf_inode_table *table)
{
	uint32_t budget = table->share->config.inode_fd_budget;
	uint32_t n = atomic_load_explicit(&table->n_fds, memory_order_relaxed);

	if (n < budget)
		return 0;
	if (vf_inode_shed_fds(table->share, n - budget + 1))
		return 0;
	if (table->share->config.handle_mode == VF_HANDLES_NEVER)
		return -ENFILE;
	return atomic_load(&table->n_fds) < budget + BUDGET_SLACK ? 0 : -ENFILE;
}

bool vf_fd_shortage(struct vf_share *share, int error)
{
	bool freed =
	    (error == EMFILE || error == ENFILE) && vf_inode_shed_fds(share, SHED_BATCH) > 0;

	errno = error;
	return freed;
}

/* ---- getting at the object ---------------------------------------------- */

int vf_inode_path_fd(struct vf_share *share, struct vf_inode *inode)
{
	int fd = atomic_load_explicit(&inode->fd, memory_order_acquire);

	if (fd >= 0)
		return fd;
	/* Without room it is opened all the same: this one is in use now. */
	inode_fd_room(share->inodes);
	fd = open_handle(share, inode, O_PATH);
	if (fd < 0 || inode_adopt_fd(share->inodes, inode, fd))
		return fd;
	close(fd);
	return atomic_load_explicit(&inode->fd, memory_order_acquire);
}

int vf_inode_open(struct vf_share *share, struct vf_inode *inode, int flags)
{
	char name[PROC_NAME_SIZE];
	int path_fd, fd;

	if (vf_inode_type(inode) != S_IFREG && vf_inode_type(inode) != S_IFDIR)
		return -ENXIO;
	/* __O_TMPFILE goes, O_DIRECTORY (a part of O_TMPFILE) stays. */
	flags &= ~(O_NOFOLLOW | O_CREAT | O_EXCL | (O_TMPFILE & ~O_DIRECTORY));
	path_fd = atomic_load_explicit(&inode->fd, memory_order_acquire);
	if (path_fd < 0)
		return open_handle(share, inode, flags);
	do {
		fd = openat(share->config.proc_fd_dir, proc_name(name, path_fd), flags | O_CLOEXEC);
	} while (fd < 0 && vf_fd_shortage(share, errno));
	return fd < 0 ? -errno : fd;
}
