/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which fact is of what inotify says: whose doing an event was, and which object it is about.
 *
 * That is asked of the facts that can mean it.  Where the guest and the host change the same name
 * at the same time more than one can: then it is reported, since a second event does less harm
 * than none.
 */
#include <time.h>

#include "order_facts.h"

/* An object that has its name from now on. */
#define ARRIVALS (VF_FS_CREATE | VF_FS_MOVED_TO)
/* And one that has it no longer. */
#define DEPARTURES (VF_FS_DELETE | VF_FS_MOVED_FROM)
/*
 * The kernel tells inotify first, and whoever makes the change may lose the processor before it
 * tells fanotify: for the time that others have it by turns, if nothing else is known of the name.
 */
static const uint32_t waits_ns[] = {50000, 50000, 50000, 50000, 400000, 1600000, 4000000};
#define N_WAITS (sizeof(waits_ns) / sizeof(waits_ns[0]))
/* After so many of them a fact that was used before will do. */
#define N_SHORT 4u
/* Of what is read meanwhile about other things, before a wait. */
#define MAX_READS 32u
/* The same, when it should have been there long since. */
#define MAX_READS_AHEAD 2u

/*
 * May an event like one of this fact, which was told, be one that came by another name, or of
 * another object that had this one?
 */
static bool may_be_by_another(struct vf_order *order, const struct vf_fact *fact)
{
	struct vf_change change = {
	    .name = fact->name,
	    .namelen = fact->namelen,
	    .place = fact->place,
	};

	if (fact->itself)
		return vf_watches_union(order->events->watches) & VF_FS_EXCL_UNLINK;
	return fact->unlinked || vf_name_has_changed(order->events, &change);
}

struct candidates {
	struct vf_fact *current;  /* the one that was used last */
	struct vf_fact *unused;	  /* the first that was not used for this event yet */
	struct vf_fact *foreign;  /* the first such that is to be reported */
	struct vf_fact *unlinked; /* the first unused of an object that lost the name before */
	struct vf_fact *arrival;  /* the first of an object of which inotify has not said it yet */
	struct vf_fact *any;
	struct vf_fact *repeated; /* one that was used for this event */
	struct vf_fact *similar;  /* such a one, of a rename to or from elsewhere */
	struct vf_fact *unfit; /* the first unused of a rename that inotify would say otherwise */
};

/*
 * Of which fact such an event is inotify shows, too: it says both halves of a rename, or one.
 * fanotify counts a rename as one with the same one before it, so there need not be a fact that was
 * not used.
 */
static bool fits(struct vf_order *order, const struct vf_fact *fact, uint64_t event)
{
	struct vf_fact *other = fact->second ? fact->second : fact->half;
	struct vf_inode *dir;
	bool fit;

	if (vf_order_counts_for_all(order, event))
		return true;
	if (order->other)
		return fact->joined && vf_fact_is_about(other, vf_fact_place(order->other),
							order->other->name, order->other->namelen);
	if (!fact->joined)
		return true;
	dir = vf_inode_get(order->events->share, other->nodeid);
	fit = !dir || vf_inotify_half_may_be_missing(&order->reader, (uint32_t)event, dir,
						     other->name, other->namelen);
	if (dir)
		vf_inode_put(order->events->share, dir);
	return fit;
}

/*
 * Is it of the end of a directory to which something happens after what inotify says now?  fanotify
 * may have said all of that, and of several directories that had the name.
 */
static bool is_of_later_end(struct vf_order *order, const struct vf_fact *fact, uint64_t event)
{
	struct vf_inode *dir;
	bool later;

	if (!(fact->mask & event & VF_FS_DELETE) || !(fact->mask & VF_FS_ISDIR) || !fact->child)
		return false;
	dir = vf_inode_get(order->events->share, fact->child);
	later = dir && vf_inotify_lives_on(&order->reader, dir);
	if (dir)
		vf_inode_put(order->events->share, dir);
	return later;
}

/* Used up facts of one kind say no more than the last of them. */
enum { OTHERS, FIRST = 1, SECOND = 2, JOINED = 2, DIRECTORY = 4, N_KINDS = 9 };

static unsigned int kind_of(const struct vf_order *order, const struct vf_fact *fact)
{
	if (vf_order_counts_for_all(order, fact->mask) ||
	    (fact->mask & ~VF_ORDER_HALVES & VF_ORDER_EVENTS))
		return OTHERS;
	return (fact->mask & VF_FS_MOVED_FROM ? FIRST : SECOND) + JOINED * fact->joined +
	       (fact->mask & VF_FS_ISDIR ? DIRECTORY : 0);
}

static bool is_used_up(const struct vf_fact *fact)
{
	/* What had the name before may leave it behind what comes: two names are exchanged. */
	uint64_t events = fact->past ? ARRIVALS | DEPARTURES : VF_ORDER_EVENTS;

	return !(fact->mask & events & ~fact->used);
}

static void unlink_fact(struct vf_fact_chain *chain, struct vf_fact **link)
{
	struct vf_fact *fact = *link;

	*link = fact->next;
	if (chain->last == &fact->next)
		chain->last = link;
}

static void keep_last(struct vf_fact **last, struct vf_fact *fact)
{
	if (*last && (*last)->picked > fact->picked) {
		fact->spent = true;
		return;
	}
	if (*last)
		(*last)->spent = true;
	*last = fact;
}

/*
 * Of the facts of one name that are used up only the last one of its kind that was used stays in
 * the chain.
 */
static void look(struct vf_order *order, struct vf_fact_chain *chain, uint64_t nodeid,
		 const struct vf_change *change, uint64_t event, struct candidates *c)
{
	struct vf_fact **link = &chain->first, *used_up[N_KINDS] = {NULL}, *fact;
	uint32_t compared = 0;

	while ((fact = *link) && compared < VF_FACTS_COMPARED) {
		if (!vf_fact_is_about(fact, nodeid, change->name, change->namelen)) {
			link = &fact->next;
			continue;
		}
		if (is_used_up(fact))
			keep_last(&used_up[kind_of(order, fact)], fact);
		else
			compared++;
		if (fact->spent) {
			unlink_fact(chain, link);
			continue;
		}
		if (is_of_later_end(order, fact, event)) {
			link = &fact->next;
			continue;
		}
		if (fact->picked && (!c->current || fact->picked > c->current->picked))
			c->current = fact;
		link = &fact->next;
		if (!c->arrival && !fact->past && (fact->mask & ARRIVALS & ~fact->used))
			c->arrival = fact;
		if (!(fact->mask & event) ||
		    ((event & (ARRIVALS | DEPARTURES)) ? (fact->mask ^ change->mask) & VF_FS_ISDIR
						       : fact->past))
			continue;
		if (vf_order_counts_for_all(order, event))
			vf_fact_set_said(order, fact, event);
		if (!fits(order, fact, event)) {
			if (!c->unfit && !(fact->used & event))
				c->unfit = fact;
			if (order->other && fact->joined && (fact->used & event))
				c->similar = fact;
			continue;
		}
		c->any = fact;
		if (fact->used & event)
			c->repeated = fact;
		if ((fact->past && !(event & DEPARTURES)) || (fact->used & event))
			continue;
		if (!c->unused)
			c->unused = fact;
		if (!c->foreign && !fact->silent)
			c->foreign = fact;
		if (!c->unlinked && fact->unlinked)
			c->unlinked = fact;
	}
}

static bool is_of_same_object(const struct vf_fact *fact, const struct vf_fact *other)
{
	if (fact->object && other->object && fact->object != other->object)
		return false;
	return fact->child == other->child;
}

/*
 * The object of this fact has got the name: what is known of another that had it before is not of
 * what comes now.  Some is left where inotify counted several events as one.
 */
static void supersede(struct vf_order *order, struct vf_fact *arrival, uint64_t key)
{
	arrival->past = false;
	for (unsigned int i = 0; i < 2; i++) {
		struct vf_fact *fact = vf_fact_chain(&order->generations[i], key)->first;

		for (uint32_t n = 0; fact && n < VF_FACTS_COMPARED; fact = fact->next) {
			if (!vf_fact_is_about(fact, arrival->nodeid, arrival->name,
					      arrival->namelen))
				continue;
			n++;
			if (fact->number < arrival->number && !is_of_same_object(fact, arrival))
				fact->past = true;
		}
	}
}

/* How far inotify has got in what fanotify says. */
static void note_use(struct vf_order *order, const struct vf_fact *fact)
{
	if (fact->used)
		return;
	order->at_fact = fact->nth;
	order->used_young += fact->nth > order->generations[order->young ^ 1].last;
}

void vf_fact_use(struct vf_order *order, struct vf_fact *fact, uint64_t event, uint64_t key)
{
	vf_fact_set_said(order, fact, event);
	note_use(order, fact);
	fact->repeated = fact->used & event;
	fact->used |= event;
	fact->picked = ++order->picks;
	if (event & ARRIVALS)
		supersede(order, fact, key);
}

/*
 * Of an event of which this fact was told already: that of the next object, or of the next name,
 * unless inotify has not said yet that it came.  NULL: there may be one.
 */
static struct vf_fact *next_by_name(struct vf_fact *told, const struct candidates *c,
				    enum vf_fact_choice choice)
{
	if (c->arrival && (!c->unused || c->arrival->number <= c->unused->number))
		return told;
	return c->unused || choice != VF_FACT_ANY_LAST ? c->unused : told;
}

/*
 * The fact that says who did this and to what; NULL: there is none yet.  It goes on with the same
 * object until that has left the name, since fanotify may have counted several events as one.
 */
struct vf_fact *vf_fact_pick(struct vf_order *order, const struct vf_change *change,
			     enum vf_fact_choice choice)
{
	uint64_t event = change->mask & VF_ORDER_EVENTS, nodeid = vf_fact_place(change);
	uint64_t key = vf_name_hash(nodeid, change->name, change->namelen);
	struct candidates c = {.any = NULL};
	struct vf_fact *fact;
	bool is_repeat;

	for (unsigned int i = 0; i < 2; i++)
		look(order, vf_fact_chain(&order->generations[order->young ^ 1 ^ i], key), nodeid,
		     change, event, &c);
	if (c.current && !(c.current->used & DEPARTURES) && (c.current->mask & event) &&
	    (!(event & ARRIVALS) || !(c.current->used & event)))
		fact = c.current;
	else
		fact = c.unused ? c.unused : choice != VF_FACT_UNUSED ? c.any : NULL;
	if (!fact && choice != VF_FACT_UNUSED)
		fact = c.similar;
	is_repeat = fact && c.repeated && !fact->used && !vf_order_counts_for_all(order, event) &&
		    vf_order_is_repeat(order, c.repeated, fact);
	if (is_repeat)
		fact = c.repeated;
	/* It was told already, and fanotify says what has become of the name as well. */
	if (fact && !is_repeat && (fact->used & event)) {
		if (c.unlinked)
			fact = c.unlinked;
		else if (may_be_by_another(order, fact))
			fact = next_by_name(fact, &c, choice);
	}
	if (fact && !is_repeat && fact->silent && c.foreign)
		fact = c.foreign;
	if (!fact && choice == VF_FACT_ANY_LAST)
		fact = c.unfit;
	if (fact || choice == VF_FACT_ANY_LAST)
		vf_facts_note_early(order, key, event, !fact);
	if (fact && !is_repeat && !fact->own && (fact->used & event & VF_ORDER_HALVES))
		vf_facts_note_repeat(order, key, event);
	if (fact)
		vf_fact_use(order, fact, event, key);
	return fact;
}

struct vf_fact *vf_fact_pick_second(struct vf_order *order, const struct vf_change *change,
				    struct vf_fact *first)
{
	uint64_t event = change->mask & VF_ORDER_HALVES, nodeid = vf_fact_place(change);
	uint64_t key = vf_name_hash(nodeid, change->name, change->namelen);

	if (!first || !first->second || vf_order_counts_for_all(order, event) ||
	    !vf_fact_is_about(first->second, nodeid, change->name, change->namelen))
		return vf_fact_pick_patiently(order, change);
	vf_facts_note_early(order, key, event, false);
	if (first->repeated && !first->own)
		vf_facts_note_repeat(order, key, event);
	vf_fact_use(order, first->second, event, key);
	return first->second;
}

struct vf_fact *vf_fact_pick_told(struct vf_order *order, const struct vf_change *change)
{
	uint64_t nodeid = vf_fact_place(change);
	uint64_t key = vf_name_hash(nodeid, change->name, change->namelen);

	for (unsigned int i = 0; i < 2; i++) {
		struct vf_fact_generation *g = &order->generations[order->young ^ 1 ^ i];
		struct vf_fact *fact = vf_fact_chain(g, key)->first;

		for (; fact; fact = fact->next) {
			if (!fact->told ||
			    !vf_fact_is_about(fact, nodeid, change->name, change->namelen))
				continue;
			fact->told = false;
			vf_fact_use(order, fact, change->mask & VF_ORDER_HALVES, key);
			return fact;
		}
	}
	return NULL;
}

static enum vf_fact_choice choice(const struct vf_order *order)
{
	/* Nor while somebody waits for all of this. */
	if (order->waits == N_WAITS || atomic_load(&order->events->waiting))
		return VF_FACT_ANY_LAST;
	return order->waits < N_SHORT ? VF_FACT_UNUSED : VF_FACT_ANY;
}

/* vf_fact_pick(), and for the last choice also what was told without inotify before it said so. */
static struct vf_fact *pick_or_late(struct vf_order *order, const struct vf_change *change,
				    enum vf_fact_choice last)
{
	struct vf_fact *fact;

	if (last != VF_FACT_ANY_LAST)
		return vf_fact_pick(order, change, last);
	fact = vf_fact_pick(order, change, VF_FACT_ANY);
	/* Not all that fanotify has need have been read. */
	for (uint32_t i = 0; !fact && i < MAX_READS_AHEAD && vf_facts_read(order); i++)
		fact = vf_fact_pick(order, change, VF_FACT_ANY);
	if (fact)
		return fact;
	return vf_facts_take_late(order, change) ? order->told_late
						 : vf_fact_pick(order, change, last);
}

struct vf_fact *vf_fact_pick_patiently(struct vf_order *order, const struct vf_change *change)
{
	enum vf_fact_choice last = choice(order);
	struct vf_fact *fact;

	/* One that was used is taken for another only when that is not there. */
	if (last != VF_FACT_UNUSED && (change->mask & VF_ORDER_HALVES) &&
	    !vf_facts_are_ahead(order))
		vf_facts_read(order);
	fact = pick_or_late(order, change, last);
	for (uint32_t reads = 0; !fact && last != VF_FACT_ANY_LAST; reads++) {
		if (reads == MAX_READS_AHEAD && vf_facts_are_ahead(order))
			return pick_or_late(order, change, VF_FACT_ANY_LAST);
		if (reads == MAX_READS || !vf_facts_read(order)) {
			long ns = (long)waits_ns[order->waits++];

			nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
			vf_facts_read(order);
			reads = 0;
		}
		last = choice(order);
		fact = pick_or_late(order, change, last);
	}
	return fact;
}
