/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the guest watches: a hash by nodeid (and by the number that inotify
 * gave), the union over all, and the marks on the host for it.  Knows nothing
 * of events; see events.h.  watch_share.c has the watch on the whole share.
 *
 * A watch ends with its inode at the latest.  72 bytes for each, beside 20 to
 * 40 of hash.
 */
#include "events.h"

#define KNOWN                                                                                      \
	(VF_FS_ENTRY_EVENTS | VF_FS_CHILD_EVENTS | VF_FS_SELF_EVENTS | VF_FS_RENAME |              \
	 VF_FS_EVENT_ON_CHILD | VF_FS_EXCL_UNLINK)
/* Without others they ask for nothing. */
#define ATTRIBUTES (VF_FS_EVENT_ON_CHILD | VF_FS_EXCL_UNLINK)
#define N_BITS 64u
#define NO_WDS                                                                                     \
	{                                                                                          \
		-1, -1, -1, -1                                                                     \
	}
_Static_assert(VF_N_WDS == 4, "NO_WDS");

struct watch {
	uint64_t nodeid;
	/* All of KNOWN fits. */
	uint32_t mask; /* what the host is asked for: own, and its part of a watch on the share */
	uint32_t own;  /* what the guest watches on this object */
	uint32_t next; /* in its chain, or in the list of free ones; 0: the end, as everywhere */
	int32_t wd[VF_N_WDS];
	/* In the chains of its wds, which may be as long as there are watches. */
	uint32_t next_wd[VF_N_WDS], previous_wd[VF_N_WDS];
};

struct vf_watches {
	struct vf_events *events;
	/*
	 * Watches change one after the other, with their marks.  Recursive: a source may give the
	 * last reference to another inode back, whose watch ends then.
	 */
	pthread_mutex_t change_lock;
	pthread_mutex_t lock;	   /* what follows */
	struct watch *all;	   /* [0] is none */
	uint32_t room, used, free; /* entries there, ever used, first free one */
	uint32_t *buckets, *wd_buckets[VF_N_WDS];
	uint32_t bucket_mask;
	uint32_t of_bit[N_BITS]; /* watches that have this bit */
	atomic_uint count;	 /* entries */
	atomic_uint own_count;
	atomic_uint_fast64_t all_masks;
};

struct vf_watches *vf_watches_new(struct vf_events *events, int *error)
{
	struct vf_watches *w = calloc(1, sizeof(*w));
	pthread_mutexattr_t attributes;
	bool all;

	*error = -ENOMEM;
	if (!w)
		return NULL;
	w->events = events;
	w->room = 64;
	w->used = 1;
	w->bucket_mask = 63;
	w->all = calloc(w->room, sizeof(*w->all));
	w->buckets = calloc(w->bucket_mask + 1, sizeof(*w->buckets));
	all = w->all && w->buckets;
	for (enum vf_wd which = 0; which < VF_N_WDS; which++) {
		w->wd_buckets[which] = calloc(w->bucket_mask + 1, sizeof(uint32_t));
		all = all && w->wd_buckets[which];
	}
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
	pthread_mutex_init(&w->change_lock, &attributes);
	pthread_mutexattr_destroy(&attributes);
	pthread_mutex_init(&w->lock, NULL);
	if (!all) {
		vf_watches_free(w);
		return NULL;
	}
	*error = 0;
	return w;
}

void vf_watches_free(struct vf_watches *w)
{
	if (!w)
		return;
	pthread_mutex_destroy(&w->change_lock);
	pthread_mutex_destroy(&w->lock);
	free(w->all);
	free(w->buckets);
	for (enum vf_wd which = 0; which < VF_N_WDS; which++)
		free(w->wd_buckets[which]);
	free(w);
}

/* ---- the hash; under lock ----------------------------------------------------- */

static uint32_t *bucket(struct vf_watches *w, uint64_t nodeid)
{
	return &w->buckets[(nodeid * 0x9e3779b97f4a7c15u >> 32) & w->bucket_mask];
}

static uint32_t *wd_bucket(struct vf_watches *w, enum vf_wd which, int32_t wd)
{
	return &w->wd_buckets[which][((uint32_t)wd * 0x9e3779b9u >> 4) & w->bucket_mask];
}

static struct watch *find(struct vf_watches *w, uint64_t nodeid)
{
	for (uint32_t i = *bucket(w, nodeid); i; i = w->all[i].next)
		if (w->all[i].nodeid == nodeid)
			return &w->all[i];
	return NULL;
}

static void link_in(struct vf_watches *w, uint32_t i)
{
	uint32_t *head = bucket(w, w->all[i].nodeid);

	w->all[i].next = *head;
	*head = i;
}

static void link_wds(struct vf_watches *w, uint32_t i)
{
	for (enum vf_wd which = 0; which < VF_N_WDS; which++) {
		uint32_t *head = wd_bucket(w, which, w->all[i].wd[which]);

		if (w->all[i].wd[which] < 0)
			continue;
		w->all[i].next_wd[which] = *head;
		w->all[i].previous_wd[which] = 0;
		if (*head)
			w->all[*head].previous_wd[which] = i;
		*head = i;
	}
}

/* Its wd stays as it is. */
static void unlink_wd(struct vf_watches *w, enum vf_wd which, const struct watch *watch)
{
	uint32_t next = watch->next_wd[which], previous = watch->previous_wd[which];

	if (next)
		w->all[next].previous_wd[which] = previous;
	if (previous)
		w->all[previous].next_wd[which] = next;
	else
		*wd_bucket(w, which, watch->wd[which]) = next;
}

static void unlink_wds(struct vf_watches *w, uint32_t i)
{
	for (enum vf_wd which = 0; which < VF_N_WDS; which++)
		if (w->all[i].wd[which] >= 0)
			unlink_wd(w, which, &w->all[i]);
}

/* Twice the entries, twice the buckets; the hash is built anew. */
static bool grow(struct vf_watches *w)
{
	uint32_t room = w->room * 2;
	struct watch *all = room > w->room ? realloc(w->all, room * sizeof(*all)) : NULL;
	uint32_t *buckets, *wd_buckets[VF_N_WDS];
	bool have_all;

	if (!all)
		return false;
	w->all = all;
	w->room = room;
	buckets = calloc(room, sizeof(*buckets));
	have_all = buckets;
	for (enum vf_wd which = 0; which < VF_N_WDS; which++) {
		wd_buckets[which] = calloc(room, sizeof(uint32_t));
		have_all = have_all && wd_buckets[which];
	}
	if (!have_all) {
		free(buckets);
		for (enum vf_wd which = 0; which < VF_N_WDS; which++)
			free(wd_buckets[which]);
		return true; /* longer chains */
	}
	free(w->buckets);
	for (enum vf_wd which = 0; which < VF_N_WDS; which++) {
		free(w->wd_buckets[which]);
		w->wd_buckets[which] = wd_buckets[which];
	}
	w->buckets = buckets;
	w->bucket_mask = room - 1;
	/* Only when none is free, so all that were ever used are there. */
	for (uint32_t i = 1; i < w->used; i++) {
		link_in(w, i);
		link_wds(w, i);
	}
	return true;
}

static struct watch *add(struct vf_watches *w, uint64_t nodeid)
{
	uint32_t i = w->free;

	if (i) {
		w->free = w->all[i].next;
	} else {
		if (w->used == w->room && !grow(w))
			return NULL;
		i = w->used++;
	}
	w->all[i] = (struct watch){.nodeid = nodeid, .wd = NO_WDS};
	link_in(w, i);
	atomic_fetch_add_explicit(&w->count, 1, memory_order_relaxed);
	return &w->all[i];
}

static void drop(struct vf_watches *w, struct watch *watch)
{
	uint32_t i = (uint32_t)(watch - w->all), *link = bucket(w, watch->nodeid);

	while (*link != i)
		link = &w->all[*link].next;
	*link = watch->next;
	unlink_wds(w, i);
	watch->nodeid = 0;
	watch->next = w->free;
	w->free = i;
	atomic_fetch_sub_explicit(&w->count, 1, memory_order_relaxed);
}

static void count_bits(struct vf_watches *w, uint64_t old_mask, uint64_t mask)
{
	uint64_t all = atomic_load(&w->all_masks);

	for (uint64_t left = old_mask ^ mask; left; left &= left - 1) {
		uint32_t bit = (uint32_t)__builtin_ctzll(left);

		w->of_bit[bit] += mask >> bit & 1 ? 1 : UINT32_MAX;
		all &= ~(1ull << bit);
		all |= (uint64_t)(w->of_bit[bit] != 0) << bit;
	}
	atomic_store(&w->all_masks, all);
}

/* ---- changes ------------------------------------------------------------------- */

/* Notes what was agreed with the host. */
static int store(struct vf_watches *w, struct vf_inode *inode, uint64_t own, uint64_t mask,
		 const int32_t *wd)
{
	uint64_t nodeid = vf_inode_nodeid(inode);
	struct watch *watch;
	int error = 0;

	pthread_mutex_lock(&w->lock);
	watch = find(w, nodeid);
	if (!watch && mask)
		watch = add(w, nodeid);
	if (watch) {
		count_bits(w, watch->mask, mask);
		unlink_wds(w, (uint32_t)(watch - w->all));
		memcpy(watch->wd, wd, sizeof(watch->wd));
		link_wds(w, (uint32_t)(watch - w->all));
		atomic_fetch_add(&w->own_count, (own != 0) - (watch->own != 0));
		watch->mask = (uint32_t)mask;
		watch->own = (uint32_t)own;
		if (!mask)
			drop(w, watch);
		vf_inode_set_watched(inode, mask);
	} else if (mask) {
		error = -ENOMEM;
	}
	pthread_mutex_unlock(&w->lock);
	return error;
}

static uint64_t load(struct vf_watches *w, const struct vf_inode *inode, uint64_t *own, int32_t *wd)
{
	const struct watch *watch;
	uint64_t mask = 0;

	*own = 0;
	memcpy(wd, (const int32_t[VF_N_WDS])NO_WDS, sizeof(int32_t) * VF_N_WDS);
	pthread_mutex_lock(&w->lock);
	watch = find(w, vf_inode_nodeid(inode));
	if (watch) {
		mask = watch->mask;
		*own = watch->own;
		memcpy(wd, watch->wd, sizeof(watch->wd));
	}
	pthread_mutex_unlock(&w->lock);
	return mask;
}

/* Under change_lock.  At the same mask, nothing but where the inode lies may have changed. */
static int change(struct vf_watches *w, struct vf_inode *inode, uint64_t own, bool again)
{
	const struct vf_source_ops *ops = w->events->ops;
	uint64_t mask = own | vf_watch_share_part(w->events, inode, own), old_mask, old_own;
	int32_t wd[VF_N_WDS];
	int error = 0;

	old_mask = load(w, inode, &old_own, wd);
	if (mask && !old_mask && atomic_load(&w->count) >= w->events->config.max_watches)
		return -ENOSPC;
	if (mask != old_mask || (again && mask))
		error = ops->mark(w->events, inode, old_mask, mask, wd);
	if (error || (mask == old_mask && own == old_own && !again))
		return error;
	error = store(w, inode, own, mask, wd);
	if (error)
		ops->mark(w->events, inode, mask, 0, wd);
	return error;
}

int vf_watch_set(struct vf_watches *w, struct vf_inode *inode, uint64_t mask)
{
	int error;

	pthread_mutex_lock(&w->change_lock);
	error = change(w, inode, vf_watch_known(mask), false);
	pthread_mutex_unlock(&w->change_lock);
	return error;
}

uint64_t vf_watch_known(uint64_t mask)
{
	/* Which names are gone is known by what became of them, in its turn. */
	if ((mask & VF_FS_EXCL_UNLINK) && (mask & VF_FS_EVENT_ON_CHILD) &&
	    (mask & VF_FS_PATH_EVENTS))
		mask |= VF_FS_ENTRY_EVENTS;
	return mask & KNOWN & ~ATTRIBUTES ? mask & KNOWN : 0;
}

int vf_watch_update(struct vf_watches *w, struct vf_inode *inode)
{
	uint64_t own;
	int32_t wd[VF_N_WDS];
	int error;

	pthread_mutex_lock(&w->change_lock);
	load(w, inode, &own, wd);
	error = change(w, inode, own, false);
	pthread_mutex_unlock(&w->change_lock);
	return error;
}

void vf_watch_inode_gone(struct vf_watches *w, struct vf_inode *inode)
{
	uint64_t mask, own;
	int32_t wd[VF_N_WDS];

	pthread_mutex_lock(&w->change_lock);
	mask = load(w, inode, &own, wd);
	if (mask) {
		w->events->ops->mark(w->events, inode, mask, 0, wd);
		store(w, inode, 0, 0, (const int32_t[VF_N_WDS])NO_WDS);
	}
	if (w->events->ops->gone)
		w->events->ops->gone(w->events, inode);
	pthread_mutex_unlock(&w->change_lock);
}

void vf_watch_renew(struct vf_watches *w, struct vf_inode *inode)
{
	uint64_t own;
	int32_t wd[VF_N_WDS];

	if (!vf_inode_is_watched(inode))
		return;
	pthread_mutex_lock(&w->change_lock);
	load(w, inode, &own, wd);
	change(w, inode, own, true);
	pthread_mutex_unlock(&w->change_lock);
}

/* The inode of the watch there, referenced; NULL: there is none, or it is being freed. */
static struct vf_inode *inode_at(struct vf_watches *w, uint32_t i)
{
	uint64_t nodeid;

	pthread_mutex_lock(&w->lock);
	nodeid = i < w->used ? w->all[i].nodeid : 0;
	pthread_mutex_unlock(&w->lock);
	return nodeid ? vf_inode_get(w->events->share, nodeid) : NULL;
}

static bool is_at_end(struct vf_watches *w, uint32_t i)
{
	bool end;

	pthread_mutex_lock(&w->lock);
	end = i >= w->used;
	pthread_mutex_unlock(&w->lock);
	return end;
}

bool vf_watches_renew(struct vf_watches *w, uint32_t *at, uint32_t n)
{
	for (; n-- && !is_at_end(w, *at); ++*at) {
		struct vf_inode *inode = inode_at(w, *at);

		if (!inode)
			continue;
		vf_watch_renew(w, inode);
		vf_inode_put(w->events->share, inode);
	}
	return !is_at_end(w, *at);
}

void vf_watches_clear(struct vf_watches *w)
{
	for (uint32_t i = 1; !is_at_end(w, i); i++) {
		struct vf_inode *inode = inode_at(w, i);

		/* One that is being freed ends its watch itself. */
		if (!inode)
			continue;
		vf_watch_set(w, inode, 0);
		vf_inode_put(w->events->share, inode);
	}
}

void vf_watches_hold(struct vf_watches *w)
{
	pthread_mutex_lock(&w->change_lock);
}

void vf_watches_go_on(struct vf_watches *w)
{
	pthread_mutex_unlock(&w->change_lock);
}

/* ---- looking -------------------------------------------------------------------- */

uint64_t vf_watch_mask(struct vf_watches *w, const struct vf_inode *inode)
{
	uint64_t own;
	int32_t wd[VF_N_WDS];

	return vf_inode_is_watched(inode) ? load(w, inode, &own, wd) : 0;
}

int32_t vf_watch_wd(struct vf_watches *w, enum vf_wd which, const struct vf_inode *inode)
{
	int32_t wd[VF_N_WDS] = NO_WDS;
	uint64_t own;

	if (vf_inode_is_watched(inode))
		load(w, inode, &own, wd);
	return wd[which];
}

uint64_t vf_watches_union(const struct vf_watches *w)
{
	return atomic_load_explicit(&((struct vf_watches *)w)->all_masks, memory_order_relaxed);
}

uint64_t vf_watches_count(const struct vf_watches *w)
{
	return atomic_load_explicit(&((struct vf_watches *)w)->own_count, memory_order_relaxed);
}

uint32_t vf_watches_by_wd(struct vf_watches *w, enum vf_wd which, int32_t wd,
			  struct vf_inode **found, uint32_t max)
{
	uint64_t nodeids[8];
	uint32_t n = 0, n_found = 0;

	if (wd < 0)
		return 0;
	pthread_mutex_lock(&w->lock);
	for (uint32_t i = *wd_bucket(w, which, wd); i && n < 8; i = w->all[i].next_wd[which])
		if (w->all[i].wd[which] == wd)
			nodeids[n++] = w->all[i].nodeid;
	pthread_mutex_unlock(&w->lock);
	for (uint32_t i = 0; i < n && n_found < max; i++) {
		found[n_found] = vf_inode_get(w->events->share, nodeids[i]);
		n_found += !!found[n_found];
	}
	return n_found;
}

uint64_t vf_watches_wd_mask(struct vf_watches *w, enum vf_wd which, int32_t wd,
			    const struct vf_inode *but)
{
	uint64_t mask = 0;

	if (wd < 0)
		return 0;
	pthread_mutex_lock(&w->lock);
	for (uint32_t i = *wd_bucket(w, which, wd); i; i = w->all[i].next_wd[which])
		if (w->all[i].wd[which] == wd && (!but || w->all[i].nodeid != vf_inode_nodeid(but)))
			mask |= w->all[i].mask;
	pthread_mutex_unlock(&w->lock);
	return mask;
}

bool vf_watches_have_wd(struct vf_watches *w, enum vf_wd which, int32_t wd,
			const struct vf_inode *but)
{
	uint64_t excepted = but ? vf_inode_nodeid(but) : 0;
	uint32_t i;

	if (wd < 0)
		return false;
	pthread_mutex_lock(&w->lock);
	i = *wd_bucket(w, which, wd);
	while (i && (w->all[i].wd[which] != wd || w->all[i].nodeid == excepted))
		i = w->all[i].next_wd[which];
	pthread_mutex_unlock(&w->lock);
	return i;
}

void vf_watches_forget_wd(struct vf_watches *w, enum vf_wd which, int32_t wd)
{
	pthread_mutex_lock(&w->lock);
	for (uint32_t i = *wd_bucket(w, which, wd), next; i; i = next) {
		struct watch *watch = &w->all[i];

		next = watch->next_wd[which];
		if (watch->wd[which] == wd) {
			unlink_wd(w, which, watch);
			watch->wd[which] = -1;
		}
	}
	pthread_mutex_unlock(&w->lock);
}
