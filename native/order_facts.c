/* SPDX-License-Identifier: Apache-2.0 */
/* Where facts are kept: by name, in generations, and those that are deferred in lists. */
#include "order_facts.h"

/* Whoever makes a change may be held up between telling inotify and telling fanotify. */
#define EARLY_NS 100000000u
/* For so long where it is known that a fact is still to come. */
#define OWED_NS 2000000000u
/* And for so long where it may be. */
#define REPEATS_NS 20000000u

static void set_chains(struct vf_fact_generation *g, struct vf_fact_chain *chains, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		chains[i] = (struct vf_fact_chain){.last = &chains[i].first};
	g->chains = chains;
	g->n_chains = n;
}

static void append(struct vf_fact_chain *chain, struct vf_fact *fact)
{
	fact->next = NULL;
	*chain->last = fact;
	chain->last = &fact->next;
}

static uint64_t key_of(const struct vf_fact *fact)
{
	return vf_name_hash(fact->nodeid, fact->name, fact->namelen);
}

/* Without memory chains are longer. */
static void lengthen(struct vf_fact_generation *g)
{
	uint32_t n = 4 * g->n_chains;
	struct vf_fact_chain *chains = malloc(n * sizeof(*chains));

	if (!chains)
		return;
	if (g->chains != g->few)
		free(g->chains);
	set_chains(g, chains, n);
	for (struct vf_fact *fact = g->oldest; fact; fact = fact->later)
		if (!fact->spent)
			append(vf_fact_chain(g, key_of(fact)), fact);
}

void vf_facts_empty(struct vf_order *order, struct vf_fact_generation *g)
{
	while (g->arenas) {
		struct vf_fact_arena *arena = g->arenas;

		g->arenas = arena->next;
		order->n_arenas--;
		if (order->spare)
			free(arena);
		else
			order->spare = arena;
	}
	if (g->chains != g->few)
		free(g->chains);
	set_chains(g, g->few, VF_FACT_CHAINS);
	g->n = 0;
	g->oldest = NULL;
	g->newest = &g->oldest;
	g->began_ns = order->reader.now_ns;
	g->empty = true;
	g->lost = false;
}

void vf_facts_forget(struct vf_order *order, const struct vf_fact_generation *g)
{
	for (struct vf_fact *fact = g->oldest; fact && order->unsaid; fact = fact->later)
		vf_fact_set_silent(order, fact);
}

static void *allocate(struct vf_order *order, struct vf_fact_generation *g, uint32_t size)
{
	struct vf_fact_arena *arena = g->arenas;

	size = (size + 7) & ~7u;
	if (!arena || arena->used + size > sizeof(arena->bytes)) {
		arena = order->spare;
		order->spare = NULL;
		if (!arena)
			arena =
			    order->n_arenas < VF_MAX_FACT_ARENAS ? malloc(sizeof(*arena)) : NULL;
		if (!arena)
			return NULL;
		order->n_arenas++;
		arena->used = 0;
		arena->next = g->arenas;
		g->arenas = arena;
	}
	arena->used += size;
	return arena->bytes + arena->used - size;
}

/* ---- what inotify said before its fact was there ------------------------------------ */

static struct vf_early *early_slot(struct vf_order *order, uint64_t key)
{
	return &order->early[(key >> 29) % VF_N_EARLY];
}

void vf_facts_note_early(struct vf_order *order, uint64_t key, uint64_t event, bool owed)
{
	struct vf_early *e = early_slot(order, key);

	if (e->key != key)
		*e = (struct vf_early){.key = key};
	e->events |= event;
	e->since_ns = order->reader.now_ns;
	if (!owed)
		return;
	e->owed |= event;
	e->owed_since_ns = order->reader.now_ns;
}

void vf_facts_note_repeat(struct vf_order *order, uint64_t key, uint64_t event)
{
	struct vf_early *e = early_slot(order, key);

	e->repeats |= event & VF_ORDER_HALVES;
	e->repeats_since_ns = order->reader.now_ns;
}

static uint64_t said_early(struct vf_order *order, uint64_t key, uint64_t mask)
{
	struct vf_early *e = early_slot(order, key);
	uint64_t said = 0;

	if (e->key != key)
		return 0;
	if (order->reader.now_ns - e->since_ns < EARLY_NS)
		said = e->events &
		       (vf_order_counts_for_all(order, VF_ORDER_HALVES) ? mask
									: mask & ~VF_ORDER_HALVES);
	if (order->reader.now_ns - e->owed_since_ns < OWED_NS)
		said |= e->owed & mask;
	if (order->reader.now_ns - e->repeats_since_ns < REPEATS_NS)
		said |= e->repeats & mask;
	e->owed &= ~mask;
	e->repeats &= ~mask;
	return said;
}

/* ---- what is told before inotify has said it ---------------------------------------- */

static void note_late(struct vf_order *order, const struct vf_fact *fact)
{
	uint64_t key = key_of(fact);
	struct vf_early *e = early_slot(order, key);

	if (e->key != key)
		*e = (struct vf_early){.key = key};
	e->late |= fact->mask & VF_ORDER_EVENTS & ~fact->used;
	e->late_since_ns = order->reader.now_ns;
}

void vf_facts_note_late(struct vf_order *order, const struct vf_fact *fact)
{
	note_late(order, fact);
	if (fact->second && !fact->second->silent)
		note_late(order, fact->second);
}

bool vf_facts_take_late(struct vf_order *order, const struct vf_change *change)
{
	uint64_t key = vf_name_hash(vf_fact_place(change), change->name, change->namelen);
	uint64_t event = change->mask & VF_ORDER_EVENTS;
	struct vf_early *e = early_slot(order, key);

	if (e->key != key || !(e->late & event) ||
	    order->reader.now_ns - e->late_since_ns >= OWED_NS)
		return false;
	e->late &= ~event;
	return true;
}

/* ---- facts ------------------------------------------------------------------------ */

static struct vf_fact *new_fact(struct vf_order *order, const struct vf_change *change,
				uint64_t mask)
{
	struct vf_fact_generation *g = &order->generations[order->young];
	struct vf_fact *fact = allocate(order, g, (uint32_t)sizeof(*fact) + change->namelen);

	if (!fact)
		return NULL;
	*fact = (struct vf_fact){
	    .nodeid = change->dir ? vf_inode_nodeid(change->dir) : 0,
	    .mask = mask,
	    .child = change->child ? vf_inode_nodeid(change->child) : 0,
	    .object = change->object,
	    .place = change->place,
	    .unlinked = change->unlinked,
	    .pid = change->pid,
	    .namelen = (uint8_t)change->namelen,
	    .number = ++order->facts,
	};
	if (change->namelen)
		memcpy(fact->name, change->name, change->namelen);
	if (g->empty)
		g->began_ns = order->reader.now_ns;
	g->empty = false;
	return fact;
}

/* Whose name it is, or what it happened to. */
uint64_t vf_fact_place(const struct vf_change *change)
{
	return vf_inode_nodeid(change->dir ? change->dir : change->child);
}

struct vf_fact *vf_fact_add(struct vf_order *order, const struct vf_change *change, uint64_t mask,
			    bool own)
{
	uint64_t key = vf_name_hash(vf_fact_place(change), change->name, change->namelen);
	struct vf_fact_generation *g = &order->generations[order->young];
	struct vf_fact *fact = new_fact(order, change, mask);

	if (!fact)
		return NULL;
	fact->nth = g->last = ++order->noted;
	fact->nodeid = vf_fact_place(change);
	fact->itself = !change->dir;
	fact->own = fact->silent = own;
	fact->said = said_early(order, key, mask);
	if (++g->n > g->n_chains && g->n_chains < VF_MAX_FACT_CHAINS)
		lengthen(g);
	append(vf_fact_chain(g, key), fact);
	*g->newest = fact;
	g->newest = &fact->later;
	order->unsaid += vf_fact_is_unsaid(fact);
	return fact;
}

/* ---- what is not inotify's to tell --------------------------------------------------- */

/* In its turn; second: told with it, and in no list. */
static void defer(struct vf_order *order, struct vf_fact *fact, struct vf_fact *second)
{
	fact->deferred = true;
	fact->second = second;
	*order->newer.last = fact;
	order->newer.last = &fact->later;
}

bool vf_order_defer(struct vf_order *order, const struct vf_change *change)
{
	struct vf_fact *fact = new_fact(order, change, change->mask);

	if (!fact)
		return false;
	fact->not_its_end = change->not_its_end;
	defer(order, fact, NULL);
	return true;
}

bool vf_order_defer_rename(struct vf_order *order, const struct vf_change changes[2])
{
	struct vf_fact *first = new_fact(order, &changes[0], changes[0].mask);
	struct vf_fact *second = first ? new_fact(order, &changes[1], changes[1].mask) : NULL;

	if (!second)
		return false;
	second->deferred = true;
	defer(order, first, second);
	return true;
}
