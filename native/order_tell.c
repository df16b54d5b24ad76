/* SPDX-License-Identifier: Apache-2.0 */
/* What is told by fanotify's facts alone: what inotify never says, and what is deferred. */
#include "order_facts.h"

/* So long fanotify's record of what happened before a watch may be read after that began. */
#define BEGUN_NS 1000000000u

/* Has a directory's parent, if it is watched, no watch of inotify's that would have told this? */
static bool for_parent(const struct vf_order *order, const struct vf_fact *fact)
{
	return fact->deferred ? order->events->order_error : fact->itself;
}

/* With references. */
struct vf_change vf_fact_change(struct vf_order *order, const struct vf_fact *fact)
{
	struct vf_share *share = order->events->share;

	return (struct vf_change){
	    .mask = fact->mask,
	    .dir = fact->nodeid && !fact->itself ? vf_inode_get(share, fact->nodeid) : NULL,
	    .child = fact->child ? vf_inode_get(share, fact->child) : NULL,
	    .name = fact->name,
	    .namelen = fact->namelen,
	    .pid = fact->pid,
	    .object = fact->object,
	    .place = fact->place,
	    .unlinked = fact->unlinked,
	    .not_its_end = fact->not_its_end,
	    .flags = for_parent(order, fact) ? VF_FSNOTIFY_FOR_PARENT : 0,
	    .seen_ns = order->reader.now_ns,
	};
}

void vf_fact_put_change(struct vf_order *order, const struct vf_change *change)
{
	if (change->dir)
		vf_inode_put(order->events->share, change->dir);
	if (change->child)
		vf_inode_put(order->events->share, change->child);
}

void vf_fact_tell(struct vf_order *order, struct vf_fact *fact)
{
	struct vf_change changes[2] = {vf_fact_change(order, fact)};
	struct vf_fact *second = fact->second;

	if (second && !second->silent && !second->used && !fact->used) {
		changes[1] = vf_fact_change(order, second);
		if (changes[0].dir && changes[1].dir)
			vf_events_report_rename(order->events, changes);
		else if (changes[0].dir || changes[1].dir)
			vf_events_report(order->events, &changes[!changes[0].dir], 1);
		vf_fact_put_change(order, &changes[1]);
		vf_fact_set_silent(order, second);
	} else if (changes[0].dir || ((!fact->nodeid || fact->itself) && changes[0].child)) {
		vf_fanotify_report_ordered(order->events, changes, fact->mask & ~fact->used);
	}
	vf_fact_put_change(order, &changes[0]);
	vf_fact_set_silent(order, fact);
}

/* ---- in its turn ---------------------------------------------------------------- */

/* What fanotify reports itself, as far as it came before that fact (NULL: all). */
void vf_facts_tell_deferred(struct vf_order *order, struct vf_fact_list *list,
			    const struct vf_fact *until)
{
	struct vf_fact *fact;

	while ((fact = list->first) && (!until || fact->number < until->number)) {
		list->first = fact->later;
		if (!list->first)
			vf_fact_list_clear(list);
		vf_fact_tell(order, fact);
	}
}

/*
 * The name of this object goes: what it was told of its links comes before that, although fanotify
 * may have summed up the end with the beginning.
 */
void vf_facts_tell_deferred_of(struct vf_order *order, struct vf_fact_list *list, uint64_t child)
{
	struct vf_fact **link = &list->first, *fact;

	list->last = link;
	while ((fact = *link)) {
		if (fact->child == child && !fact->nodeid) {
			*link = fact->later;
			vf_fact_tell(order, fact);
		} else {
			link = &fact->later;
			list->last = link;
		}
	}
}

/* ---- late ----------------------------------------------------------------------- */

/*
 * The host ends inotify's watch of a file with its last name, although somebody may have it open.
 * Whoever watches it has been told of the end, and of nothing behind that.
 */
static bool is_behind_its_end(struct vf_order *order, const struct vf_fact *fact)
{
	const uint64_t end = VF_FS_ATTRIB | VF_FS_SELF_EVENTS;
	struct vf_inode *inode;
	bool gone;

	if (!fact->itself || (fact->mask & (end | VF_FS_ISDIR)))
		return false;
	inode = vf_inode_get(order->events->share, fact->child);
	gone = inode && vf_events_is_gone(order->events, inode);
	if (inode)
		vf_inode_put(order->events->share, inode);
	return gone;
}

/*
 * It was done to an object before anybody watched for it, and fanotify, with its one mark on the
 * file system, had it all the same.
 */
static bool is_from_before(struct vf_order *order, const struct vf_fact *fact)
{
	const struct vf_begun *begun = vf_begun_slot(order, fact->nodeid);

	return begun->nodeid == fact->nodeid && order->reader.now_ns - begun->since_ns < BEGUN_NS &&
	       !(fact->mask & VF_ORDER_EVENTS & ~VF_ORDER_CHILD_EVENTS & ~fact->used & ~fact->said);
}

/* What inotify should have said by now, and did not: late, but not lost. */
void vf_facts_tell_unsaid(struct vf_order *order, const struct vf_fact_generation *g)
{
	for (struct vf_fact *fact = g->oldest; fact && order->unsaid; fact = fact->later) {
		if (!vf_fact_is_unsaid(fact))
			continue;
		fact->used |= fact->said;
		if (is_behind_its_end(order, fact) || is_from_before(order, fact)) {
			vf_fact_set_silent(order, fact);
			continue;
		}
		vf_facts_note_late(order, fact);
		vf_fact_tell(order, fact);
	}
}
