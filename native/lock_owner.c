// SPDX-License-Identifier: Apache-2.0
/* Lock owners and the ranges that they hold: see lock_owner.h. */
#include "lock_owner.h"

#include "file.h"
#include "inode.h"

#define MAX_RANGES 65536u /* held by all owners of a share together */

/* ---- what an owner holds ------------------------------------------------ */

static bool overlap(const struct lock_range *a, const struct lock_range *b)
{
	return a->start <= b->end && b->start <= a->end;
}

static bool conflict(const struct lock_range *a, const struct lock_range *b)
{
	return overlap(a, b) && (a->type == F_WRLCK || b->type == F_WRLCK);
}

/*
 * Room for the two entries by which one change can lengthen the list; it stays reserved as long as
 * the caller holds owner->changing.
 */
static int reserve_ranges(struct vf_lock_waiters *locks, struct lock_owner *owner, uint32_t type)
{
	if (type != F_UNLCK && locks->n_ranges >= MAX_RANGES)
		return -ENOLCK;
	if (owner->n_ranges + 2 > owner->room) {
		uint32_t room = owner->room ? owner->room * 2 : 4;
		struct lock_range *bigger = realloc(owner->ranges, room * sizeof(*bigger));

		if (!bigger)
			return -ENOLCK;
		owner->ranges = bigger;
		owner->room = room;
	}
	return 0;
}

/* The first range that ends at or behind offset. */
static uint32_t first_ending_at(const struct lock_owner *owner, uint64_t offset)
{
	uint32_t low = 0, high = owner->n_ranges;

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (owner->ranges[middle].end < offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Writes down that the host granted (or dropped) a range; room has been reserved. */
static void record(struct vf_lock_waiters *locks, struct lock_owner *owner, struct lock_range new)
{
	struct lock_range parts[3];
	uint32_t n_parts = 0, first, last;
	struct lock_range *at;

	first = first_ending_at(owner, new.start ? new.start - 1 : 0);
	/* A neighbour of the same kind becomes one with the new range, as on the host. */
	if (first < owner->n_ranges && owner->ranges[first].end < new.start &&
	    (new.type == F_UNLCK || owner->ranges[first].type != new.type))
		first++;
	last = first;
	for (; last < owner->n_ranges; last++) {
		const struct lock_range *old = &owner->ranges[last];
		bool same = old->type == new.type;

		if (old->start > new.end && !(same && old->start == new.end + 1))
			break;
		if (same) {
			if (old->start < new.start)
				new.start = old->start;
			if (old->end > new.end)
				new.end = old->end;
			continue;
		}
		if (old->start < new.start) {
			parts[n_parts] = *old;
			parts[n_parts++].end = new.start - 1;
		}
		if (old->end > new.end) {
			/* Only the last one overlapped reaches behind the new range. */
			struct lock_range tail = *old;

			tail.start = new.end + 1;
			last++;
			if (new.type != F_UNLCK)
				parts[n_parts++] = new;
			parts[n_parts++] = tail;
			goto replace;
		}
	}
	if (new.type != F_UNLCK)
		parts[n_parts++] = new;
replace:
	at = owner->ranges + first;
	memmove(at + n_parts, owner->ranges + last,
		(owner->n_ranges - last) * sizeof(*owner->ranges));
	memcpy(at, parts, n_parts * sizeof(*parts));
	locks->n_ranges += n_parts - (last - first);
	owner->n_ranges += n_parts - (last - first);
}

const struct lock_range *lock_held_against(const struct lock_owner *owner,
					   const struct lock_range *wanted)
{
	for (uint32_t i = first_ending_at(owner, wanted->start);
	     i < owner->n_ranges && owner->ranges[i].start <= wanted->end; i++) {
		if (conflict(&owner->ranges[i], wanted))
			return &owner->ranges[i];
	}
	return NULL;
}

/* ---- the table of owners ------------------------------------------------ */

_Static_assert(LOCK_BUCKETS == 1u << (64 - 54), "lock_bucket() takes ten bits");

struct lock_owner **lock_bucket(struct vf_lock_waiters *locks, uint64_t nodeid)
{
	return &locks->buckets[(nodeid * 0x9e3779b97f4a7c15ull) >> 54];
}

static struct lock_owner *find_owner(struct vf_lock_waiters *locks, uint64_t nodeid, uint64_t id)
{
	struct lock_owner *owner = *lock_bucket(locks, nodeid);

	while (owner && (owner->nodeid != nodeid || owner->id != id))
		owner = owner->next;
	return owner;
}

static void unlink_owner(struct vf_lock_waiters *locks, struct lock_owner *owner)
{
	struct lock_owner **p = lock_bucket(locks, owner->nodeid);

	while (*p != owner)
		p = &(*p)->next;
	*p = owner->next;
	locks->n_ranges -= owner->n_ranges;
	owner->n_ranges = 0;
	owner->forgotten = true;
}

/* Closing the descriptor drops whatever is still locked by it. Nobody may use it any more. */
static void destroy_owner(struct vf_lock_waiters *locks, struct lock_owner *owner)
{
	close(owner->fd);
	vf_open_budget_give(locks->share);
	atomic_fetch_sub(&locks->n_owners, 1);
	pthread_mutex_destroy(&owner->changing);
	free(owner->ranges);
	free(owner);
}

/* Takes out the owners of one bucket (of one inode, when nodeid is not 0) that hold and do nothing.
 */
static struct lock_owner *take_idle(struct vf_lock_waiters *locks, struct lock_owner **bucket)
{
	struct lock_owner *idle = NULL;

	for (struct lock_owner *owner = *bucket, *next; owner; owner = next) {
		next = owner->next;
		if (owner->users || owner->n_ranges)
			continue;
		unlink_owner(locks, owner);
		owner->next = idle;
		idle = owner;
	}
	return idle;
}

static void destroy_list(struct vf_lock_waiters *locks, struct lock_owner *list)
{
	while (list) {
		struct lock_owner *next = list->next;

		destroy_owner(locks, list);
		list = next;
	}
}

/* Descriptors are short: owners that hold nothing give theirs back. */
static void destroy_idle(struct vf_lock_waiters *locks)
{
	for (uint32_t i = 0; i < LOCK_BUCKETS; i++) {
		struct lock_owner *idle;

		pthread_mutex_lock(&locks->lock);
		idle = take_idle(locks, &locks->buckets[i]);
		pthread_mutex_unlock(&locks->lock);
		destroy_list(locks, idle);
	}
}

/* Write locks need a descriptor that can write; where there is none read locks still work. */
static int open_for_locks(struct vf_share *share, uint64_t nodeid)
{
	struct vf_inode *inode = vf_inode_get(share, nodeid);
	int fd = -EROFS;

	if (!inode)
		return -ESTALE;
	if (!share->config.readonly)
		fd = vf_inode_open(share, inode, O_RDWR);
	if (fd == -EROFS || fd == -EACCES || fd == -EPERM || fd == -ETXTBSY)
		fd = vf_inode_open(share, inode, O_RDONLY);
	vf_inode_put(share, inode);
	return fd;
}

static struct lock_owner *new_owner(struct vf_lock_waiters *locks, uint64_t nodeid, uint64_t id,
				    int *error)
{
	struct vf_share *share = locks->share;
	struct lock_owner *owner = calloc(1, sizeof(*owner));

	*error = -ENOLCK;
	if (!owner)
		return NULL;
	if (!vf_open_budget_take(share)) {
		destroy_idle(locks);
		if (!vf_open_budget_take(share)) {
			free(owner);
			return NULL;
		}
	}
	owner->fd = open_for_locks(share, nodeid);
	if (owner->fd < 0) {
		*error = owner->fd;
		vf_open_budget_give(share);
		free(owner);
		return NULL;
	}
	owner->nodeid = nodeid;
	owner->id = id;
	pthread_mutex_init(&owner->changing, NULL);
	atomic_fetch_add(&locks->n_owners, 1);
	return owner;
}

struct lock_owner *lock_owner_use(struct vf_lock_waiters *locks, uint64_t nodeid, uint64_t id,
				  bool create, int *error)
{
	struct lock_owner *owner, *made = NULL;

	*error = 0;
	pthread_mutex_lock(&locks->lock);
	owner = find_owner(locks, nodeid, id);
	if (!owner && create) {
		pthread_mutex_unlock(&locks->lock);
		made = new_owner(locks, nodeid, id, error);
		if (!made)
			return NULL;
		pthread_mutex_lock(&locks->lock);
		owner = find_owner(locks, nodeid, id);
		if (!owner) {
			struct lock_owner **bucket = lock_bucket(locks, nodeid);

			owner = made;
			made = NULL;
			owner->next = *bucket;
			*bucket = owner;
		}
	}
	if (owner)
		owner->users++;
	pthread_mutex_unlock(&locks->lock);
	if (made)
		destroy_owner(locks, made);
	return owner;
}

void lock_owner_end_use(struct vf_lock_waiters *locks, struct lock_owner *owner, bool drop)
{
	bool last;

	pthread_mutex_lock(&locks->lock);
	last = --owner->users == 0 && !owner->n_ranges && (drop || owner->forgotten);
	if (last && !owner->forgotten)
		unlink_owner(locks, owner);
	pthread_mutex_unlock(&locks->lock);
	if (last)
		destroy_owner(locks, owner);
}

struct flock lock_range_to_flock(const struct lock_range *range)
{
	struct flock fl = {
	    .l_type = (short)range->type,
	    .l_whence = SEEK_SET,
	    .l_start = (off_t)range->start,
	    .l_len = range->end == INT64_MAX ? 0 : (off_t)(range->end - range->start + 1),
	};
	return fl;
}

int lock_owner_set(struct vf_lock_waiters *locks, struct lock_owner *owner,
		   const struct lock_range *range)
{
	struct flock fl = lock_range_to_flock(range);
	int error;

	pthread_mutex_lock(&owner->changing);
	pthread_mutex_lock(&locks->lock);
	error = reserve_ranges(locks, owner, range->type);
	pthread_mutex_unlock(&locks->lock);
	if (!error && fcntl(owner->fd, F_OFD_SETLK, &fl) < 0)
		error = errno == EACCES ? -EAGAIN : -errno;
	if (!error) {
		pthread_mutex_lock(&locks->lock);
		if (!owner->forgotten)
			record(locks, owner, *range);
		pthread_mutex_unlock(&locks->lock);
	}
	pthread_mutex_unlock(&owner->changing);
	return error;
}

/* What the host granted while this request waited; the guest may hold too many by now. */
int lock_owner_granted(struct vf_lock_waiters *locks, struct lock_owner *owner,
		       const struct lock_range *range)
{
	int error;

	/* Another request of the owner's may have reserved the room that there is. */
	pthread_mutex_lock(&owner->changing);
	pthread_mutex_lock(&locks->lock);
	error = owner->forgotten ? -ENOLCK : reserve_ranges(locks, owner, range->type);
	if (!error)
		record(locks, owner, *range);
	pthread_mutex_unlock(&locks->lock);
	if (error) {
		struct flock fl = lock_range_to_flock(range);

		fl.l_type = F_UNLCK;
		fcntl(owner->fd, F_OFD_SETLK, &fl);
	}
	pthread_mutex_unlock(&owner->changing);
	return error;
}

static const struct lock_range everything = {.end = INT64_MAX, .type = F_UNLCK};

void vf_locks_release_owner(struct vf_share *share, uint64_t nodeid, uint64_t id)
{
	struct vf_lock_waiters *locks = share->locks;
	struct lock_owner *owner;
	int error;

	if (!atomic_load_explicit(&locks->n_owners, memory_order_relaxed))
		return;
	owner = lock_owner_use(locks, nodeid, id, false, &error);
	if (!owner)
		return;
	/* Another thread of the guest's process may use it too, so it may outlive this. */
	lock_owner_set(locks, owner, &everything);
	lock_owner_end_use(locks, owner, true);
}

void vf_locks_release_inode(struct vf_share *share, uint64_t nodeid)
{
	struct vf_lock_waiters *locks = share->locks;
	struct lock_owner **p, *gone = NULL;

	if (!locks || !atomic_load_explicit(&locks->n_owners, memory_order_relaxed))
		return;
	pthread_mutex_lock(&locks->lock);
	p = lock_bucket(locks, nodeid);
	for (struct lock_owner *owner = *p, *next; owner; owner = next) {
		next = owner->next;
		if (owner->nodeid != nodeid)
			continue;
		unlink_owner(locks, owner);
		if (!owner->users) { /* else lock_owner_end_use() does the rest */
			owner->next = gone;
			gone = owner;
		}
	}
	pthread_mutex_unlock(&locks->lock);
	destroy_list(locks, gone);
}

void lock_owners_clear(struct vf_lock_waiters *locks)
{
	for (uint32_t i = 0; i < LOCK_BUCKETS; i++) {
		while (locks->buckets[i]) {
			struct lock_owner *owner = locks->buckets[i];

			unlink_owner(locks, owner);
			destroy_owner(locks, owner);
		}
	}
}
