/* SPDX-License-Identifier: Apache-2.0 */
/* What fanotify says of what inotify tells, as facts; order.h has the reason. */
#include "order_facts.h"

/* Facts that fit into one buffer of fanotify's, some times over. */
#define AHEAD 32768u

bool vf_facts_are_ahead(const struct vf_order *order)
{
	return order->n_arenas >= VF_MAX_FACT_ARENAS / 2 && order->noted - order->at_fact >= AHEAD;
}

bool vf_facts_read(struct vf_order *order)
{
	bool any = order->read_facts(order->events);
	/* To look at as much as there was room for takes a while, and inotify's queue is short. */
	if (any && !order->events->drained)
		vf_inotify_relieve(&order->reader);
	return any;
}

/* What of the events of this inode, and of the names in it, inotify tells. */
uint64_t vf_order_bits(const struct vf_order *order, const struct vf_inode *inode)
{
	struct vf_watches *watches = order->events->watches;

	if (vf_watch_wd(watches, VF_WD_ORDER, inode) < 0)
		return 0;
	return vf_inotify_bits(inode, vf_watch_mask(watches, inode));
}

uint64_t vf_order_note(struct vf_order *order, const struct vf_change *change, uint64_t mask,
		       bool own)
{
	uint64_t bits =
	    change->dir && change->namelen ? mask & vf_order_bits(order, change->dir) : 0;

	if (bits && !vf_fact_add(order, change, bits | (mask & VF_FS_ISDIR), own))
		order->full = true;
	return mask & ~bits & ~VF_FS_ISDIR;
}

/* said: what of it inotify may well say nothing of. */
static void note_own(struct vf_order *order, const struct vf_change *change, uint64_t mask,
		     uint64_t said, bool own)
{
	struct vf_change itself = {
	    .child = change->child,
	    .object = change->object,
	    .place = change->place,
	    .pid = change->pid,
	    .unlinked = change->unlinked,
	};
	struct vf_fact *fact;

	if (!mask)
		return;
	if (vf_inode_type(change->child) == S_IFDIR)
		mask |= VF_FS_ISDIR;
	fact = vf_fact_add(order, &itself, mask, own);
	if (fact)
		vf_fact_set_said(order, fact, said);
	else
		order->full = true;
}

/* Is what happens to this directory told by inotify's watch of its parent, if it is to be told? */
static bool is_told_by_parent(struct vf_order *order, struct vf_inode *dir)
{
	struct vf_events *events = order->events;
	struct vf_inode *found[8];
	bool watched = false;
	uint32_t n;

	if (atomic_load(&events->flags) & VF_FSNOTIFY_WATCH_ALL)
		return false;
	if (!atomic_load(&events->everywhere))
		return !events->order_error;
	n = vf_inodes_of_name(events->share, dir, "..", found, 8);
	for (uint32_t i = 0; i < n; i++) {
		watched |= vf_order_bits(order, found[i]) & VF_ORDER_CHILD_EVENTS;
		vf_inode_put(events->share, found[i]);
	}
	return watched;
}

uint64_t vf_order_note_own(struct vf_order *order, const struct vf_change *change, uint64_t mask,
			   bool own)
{
	uint64_t bits = mask & VF_ORDER_EVENTS & vf_order_bits(order, change->child);
	uint64_t left = mask & ~bits & ~VF_FS_ISDIR, by_parent = 0;

	if (vf_inode_type(change->child) == S_IFDIR) {
		by_parent = left & VF_ORDER_CHILD_EVENTS & vf_watches_union(order->events->watches);
		if ((left & VF_ORDER_CHILD_EVENTS) && is_told_by_parent(order, change->child))
			left &= ~VF_ORDER_CHILD_EVENTS;
	}
	note_own(order, change, bits | by_parent, by_parent, own);
	return left ? left | (mask & VF_FS_ISDIR) : 0;
}

uint64_t vf_order_note_child(struct vf_order *order, struct vf_change *change, uint64_t mask,
			     uint64_t left, bool own)
{
	struct vf_watches *watches = order->events->watches;
	bool is_dir = vf_inode_type(change->child) == S_IFDIR;
	uint64_t bits = vf_order_bits(order, change->child), events, by_name = 0;

	if (!bits)
		return left;
	if (vf_watch_mask(watches, change->dir) & VF_FS_EVENT_ON_CHILD)
		by_name = left & vf_watch_mask(watches, change->dir);
	if (mask & VF_FS_DELETE) {
		/* A file's end is told behind its link count, a directory's where its parent's
		 * watch tells of it. */
		change->not_its_end =
		    bits & VF_FS_DELETE_SELF &&
		    (!is_dir || vf_watch_wd(watches, VF_WD_PARENT, change->child) >= 0);
		if (is_dir && change->not_its_end)
			mask |= VF_FS_DELETE_SELF;
	}
	events = mask & bits & (VF_ORDER_CHILD_EVENTS | VF_FS_SELF_EVENTS);
	note_own(order, change, events & by_name, 0, true);
	note_own(order, change, events & ~by_name, 0, own);
	return left & ~(events & VF_ORDER_CHILD_EVENTS & ~by_name);
}

bool vf_order_note_rename(struct vf_order *order, const struct vf_change changes[2], bool own)
{
	bool from = vf_order_bits(order, changes[0].dir) & VF_FS_MOVED_FROM;
	bool to = vf_order_bits(order, changes[1].dir) & VF_FS_MOVED_TO;
	struct vf_fact *first, *second;

	if (!from && !to)
		return false;
	/* Who watches the share as a whole wants the half that inotify does not tell, too. */
	if (!(from && to) && !vf_events_is_wanted(order->events, &changes[from]))
		return false;
	first = vf_fact_add(order, &changes[0], changes[0].mask, own);
	second = vf_fact_add(order, &changes[1], changes[1].mask, own);
	if (first && second) {
		first->second = second;
		second->half = first;
		first->joined = second->joined = from && to;
	} else {
		order->full = true;
	}
	return true;
}
