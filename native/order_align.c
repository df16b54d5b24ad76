/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which of what both say of one directory belongs together, where neither says everything: inotify
 * counts an event as one with the same right before it, fanotify with the same at any time before,
 * as long as nobody has read that.  Names of one directory come and go, and it moves, in the same
 * order for both, so what is still to come is laid side by side, such that as much as possible
 * fits.
 */
#include "inotify_records.h"
#include "order_facts.h"

/* So much of either is looked at: what is further away changes little. */
#define WINDOW 32u
/*
 * When inotify counts two as one nothing stands between them that it says; but whoever did it may
 * have told fanotify later than others, who were on another processor.
 */
#define NEAR 2u
/* Of inotify, which sums up less. */
#define RECORDS (2 * WINDOW)
/* What shows most of the order: fanotify counts few of them as one. */
#define ENTRIES (VF_FS_ENTRY_EVENTS | VF_FS_MOVE_SELF)
/* So many facts are passed in search of those of one directory. */
#define MAX_WALKED 512u
/* Of fanotify, at a time. */
#define MAX_READS 4u

/* Points for two that belong together, and for halves of which one side has not seen the other. */
#define FITS 8u
#define MAY_FIT 4u
/* And for what happens often and to one name again and again, of which either counts much as one.
 */
#define SHOWS_WHERE 5u
/*
 * For a record that is left without a fact, but repeats what was told (or would be, by the facts
 * that are left out); or that repeats another one here, which is likelier.
 */
#define REPEATS 2u
#define SAYS_AGAIN 3u
/* Where it makes no difference, what is asked about is rather there than not. */
#define ASKED 1u

struct side {
	struct vf_entry entries[RECORDS];
	uint32_t n;
	uint32_t asked, asked_end; /* of facts: those that are asked about */
	uint16_t repeats[RECORDS]; /* of records: points if they repeat something */
};

static const struct vf_fact *next_fact(const struct vf_order *order, const struct vf_fact *fact)
{
	const struct vf_fact_generation *old = &order->generations[order->young ^ 1];

	return old->newest == &fact->later ? order->generations[order->young].oldest : fact->later;
}

/* What was not used of the directory behind this fact; `which` is among it: its place there. */
static uint32_t facts_behind(const struct vf_order *order, const struct vf_fact *fact,
			     const struct vf_fact *which, uint64_t bits, struct side *side)
{
	uint32_t place = WINDOW;

	side->n = side->asked = side->asked_end = 0;
	for (uint32_t i = 0; i < MAX_WALKED && side->n < WINDOW; i++) {
		uint64_t events;

		fact = next_fact(order, fact);
		if (!fact)
			break;
		events = fact->mask & bits & (fact->itself ? VF_FS_MOVE_SELF : VF_FS_ENTRY_EVENTS);
		if (!events)
			events = fact->mask & bits & VF_FS_CHILD_EVENTS;
		/* Of what was used in part nobody knows where the rest belongs. */
		if (!events || (events & fact->used) || fact->nodeid != which->nodeid)
			continue;
		if (fact == which)
			place = side->n;
		side->entries[side->n++] = (struct vf_entry){
		    .key = vf_name_hash(fact->nodeid, fact->name, fact->namelen),
		    .events = (uint32_t)events,
		    .joined = fact->joined,
		    .is_dir = fact->mask & VF_FS_ISDIR,
		};
	}
	return place;
}

static uint16_t points(const struct vf_entry *fact, const struct vf_entry *record)
{
	uint32_t events = fact->events & record->events;

	if (fact->key != record->key || fact->is_dir != record->is_dir || !events)
		return 0;
	if (!(events & VF_FS_ENTRY_EVENTS))
		return SHOWS_WHERE;
	return (events & VF_ORDER_HALVES) && record->joined && !fact->joined ? MAY_FIT : FITS;
}

/* The points for a record that is left without a fact, when these facts are left out. */
static uint16_t alone(const struct side *facts, const struct side *records, uint32_t record,
		      uint32_t first, uint32_t end)
{
	uint16_t repeats = records->repeats[record];

	for (uint32_t f = first; f < end && !repeats; f++)
		if (points(&facts->entries[f], &records->entries[record]) == FITS)
			repeats = REPEATS;
	return repeats;
}

/* The most points that can be had without changing the order of either, without these facts. */
static uint32_t best(const struct side *facts, const struct side *records, uint32_t first,
		     uint32_t end)
{
	uint16_t row[RECORDS + 1] = {0}, lone[RECORDS];

	for (uint32_t r = 0; r < records->n; r++) {
		lone[r] = alone(facts, records, r, first, end);
		row[r + 1] = (uint16_t)(row[r] + lone[r]);
	}
	for (uint32_t f = 0; f < facts->n; f++) {
		uint16_t before = 0; /* of the row before, one to the left */

		if (f >= first && f < end)
			continue;
		for (uint32_t r = 0; r < records->n; r++) {
			uint16_t above = row[r + 1];
			uint16_t both = points(&facts->entries[f], &records->entries[r]);

			if (both && f >= facts->asked && f < facts->asked_end)
				both = (uint16_t)(both + ASKED);
			both = (uint16_t)(both + before);

			if (both > row[r + 1])
				row[r + 1] = both;
			if (row[r] + lone[r] > row[r + 1])
				row[r + 1] = (uint16_t)(row[r] + lone[r]);
			before = above;
		}
	}
	return row[records->n];
}

static int32_t number_of(const struct vf_order *order, uint64_t nodeid, uint64_t *bits)
{
	struct vf_inode *dir = vf_inode_get(order->events->share, nodeid);
	int32_t wd = -1;

	if (!dir)
		return -1;
	wd = vf_watch_wd(order->events->watches, VF_WD_ORDER, dir);
	*bits = vf_order_bits(order, dir);
	vf_inode_put(order->events->share, dir);
	return wd;
}

static bool is_same(const struct vf_entry *a, const struct vf_entry *b)
{
	return a->key == b->key && a->events == b->events && a->joined == b->joined &&
	       a->is_dir == b->is_dir;
}

/* Has something of a fact like this been told? */
static bool was_told(const struct vf_order *order, uint64_t nodeid, const struct vf_entry *record)
{
	for (unsigned int i = 0; i < 2; i++) {
		const struct vf_fact *fact =
		    vf_fact_chain(&order->generations[i], record->key)->first;
		uint32_t compared = 0;

		for (; fact && compared < VF_FACTS_COMPARED; fact = fact->next, compared++)
			if (fact->nodeid == nodeid && (fact->used & record->events) &&
			    fact->joined == record->joined &&
			    !(fact->mask & VF_FS_ISDIR) == !record->is_dir &&
			    vf_name_hash(nodeid, fact->name, fact->namelen) == record->key)
				return true;
	}
	return false;
}

static void find_repeats(const struct vf_order *order, uint64_t nodeid, struct side *records)
{
	for (uint32_t r = 0; r < records->n; r++) {
		const struct vf_entry *entry = &records->entries[r];

		records->repeats[r] = was_told(order, nodeid, entry) ? REPEATS : 0;
		for (uint32_t i = 0; i < r; i++)
			if (is_same(&records->entries[i], entry))
				records->repeats[r] = SAYS_AGAIN;
	}
}

static bool records_of(struct vf_order *order, const struct vf_fact *fact, uint64_t events,
		       uint64_t *bits, struct side *side)
{
	int32_t wd;

	*bits = 0;
	wd = number_of(order, fact->nodeid, bits);
	*bits &= events;
	/* One as far as the other. */
	vf_records_read_more(&order->reader, 0);
	for (uint32_t i = 0; i < MAX_READS && !vf_facts_are_ahead(order) && vf_facts_read(order);
	     i++)
		;
	side->n = wd < 0 ? 0
			 : vf_inotify_entries(&order->reader, wd, events, fact->nodeid,
					      side->entries, RECORDS);
	find_repeats(order, fact->nodeid, side);
	return side->n;
}

bool vf_order_is_repeat(struct vf_order *order, const struct vf_fact *repeated,
			const struct vf_fact *fact)
{
	struct side facts, records;
	uint32_t place;
	uint64_t bits;

	if (fact->number < repeated->number || !records_of(order, fact, ENTRIES, &bits, &records))
		return false;
	place = facts_behind(order, repeated, fact, bits, &facts);
	return place < WINDOW &&
	       best(&facts, &records, 0, 0) > FITS + best(&facts, &records, 0, place + 1);
}

bool vf_order_still_comes(struct vf_order *order, const struct vf_fact *told,
			  const struct vf_fact *fact, uint64_t time_ns)
{
	uint64_t deadline_ns = vf_now_ns() + time_ns, now, bits;
	struct side facts, records;
	uint32_t place, end, all;

	do {
		records_of(order, fact, ENTRIES | VF_FS_CHILD_EVENTS, &bits, &records);
		place = end = facts_behind(order, told, fact, bits, &facts);
		/* Too far behind to be counted as one with what is at hand. */
		if (place > NEAR)
			return true;
		/* Of several that are alike inotify may say one. */
		while (end < facts.n && is_same(&facts.entries[end], &facts.entries[place]))
			end++;
		facts.asked = place;
		facts.asked_end = end;
		all = best(&facts, &records, 0, 0);
		if (all > best(&facts, &records, place, end))
			return true;
		/* Something behind it was said. */
		if (all > best(&facts, &records, end, facts.n))
			return false;
		if (vf_inotify_is_blind(&order->reader))
			return true;
		now = vf_now_ns();
	} while (now < deadline_ns && vf_records_read_more(&order->reader, deadline_ns - now));
	return false;
}
