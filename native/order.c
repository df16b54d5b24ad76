/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Joins what inotify says with what fanotify says; order.h has the reason.
 *
 * The kernel queues an event with both within one system call, so what inotify
 * says in this round has its fact in this round or in one shortly before.
 * Facts live in two generations: the younger becomes the older one after
 * GENERATION_NS, when all that inotify had was read, and then the older goes.
 * What inotify has not said by then is told all the same, late.
 *
 * Whose doing an event was is asked of the facts that can mean it.  Where the
 * guest and the host change the same name at the same time more than one can:
 * then it is reported, since a second event does less harm than none.
 */
#include <time.h>

#include "inotify_reader.h"
#include "order.h"

#define CHILD_EVENTS (VF_FS_CHILD_EVENTS & ~VF_FS_OPEN_EXEC)
#define EVENTS (VF_FS_ENTRY_EVENTS | CHILD_EVENTS | VF_FS_SELF_EVENTS)
/* An object that has its name from now on. */
#define ARRIVALS (VF_FS_CREATE | VF_FS_MOVED_TO)
/* And one that has it no longer. */
#define DEPARTURES (VF_FS_DELETE | VF_FS_MOVED_FROM)
#define HALVES (VF_FS_MOVED_FROM | VF_FS_MOVED_TO)

#define N_BUCKETS 8192u
#define ARENA_SIZE (256u * 1024)
/* Beyond this much memory order is given up for once, and the guest told of a loss. */
#define MAX_ARENAS 256u
#define GENERATION_NS 20000000u
/* So old it may become while objects' own events keep coming. */
#define MAX_GENERATION_NS (5u * GENERATION_NS)
/* A fact may come a moment behind its event. */
#define PATIENCE 4u
/* So many facts of one name are compared, besides those that are used up. */
#define MAX_COMPARED 64u
/* Rounds in one turn, while objects' own events keep coming. */
#define MAX_ROUNDS 8u
#define RETRY_NS 50000
/* So long inotify may say of a rename what fanotify has said already. */
#define BEHIND_NS 1000000
#define N_BEGUN 1024u
/* So long fanotify's record of what happened before a watch may be read after that began. */
#define BEGUN_NS 1000000000u
#define N_EARLY 2048u
/* Whoever makes a change may be held up between telling inotify and telling fanotify. */
#define EARLY_NS 100000000u
/* For so long where it is known that a fact is still to come. */
#define OWED_NS 2000000000u
/* Of fanotify, in one round: a flood elsewhere must not hold up what was read. */
#define MAX_READS 32u

struct fact {
	struct fact *next;   /* in its bucket, in order of arrival */
	struct fact *later;  /* of all in its generation */
	struct fact *second; /* the other half of the rename that this is the first of */
	struct fact *half;   /* that first half */
	uint64_t nodeid;     /* of the directory; no references, since facts may lie here for long;
				0: deferred */
	uint64_t child;	     /* nodeid, or 0 */
	uint64_t mask;	     /* what happened */
	uint64_t used;	     /* what of it was reported or found to be ours */
	/* For what of it inotify said something: where it counts several events as one, only one
	 * of their facts is used. */
	uint64_t said;
	uint64_t picked; /* when it was last used; 0: not yet */
	uint64_t number; /* in the order of fanotify */
	int32_t pid;
	bool silent; /* our own doing, or reported already */
	bool told;   /* with its other half, before inotify said this one */
	bool past;   /* of an object that had the name before the one that has it now */
	bool not_its_end;
	bool itself;   /* of what happened to the object itself, which is also in nodeid */
	bool deferred; /* not inotify's to tell: it waits in a list, not in a generation */
	uint8_t namelen;
	char name[];
};

/*
 * What inotify said of a name not long ago.  A fact of the same that comes now may be of an event
 * that inotify had counted as one with others, or told before its fact was there.
 */
struct early {
	uint64_t key, events, since_ns;
	uint64_t owed, owed_since_ns; /* of them, those without a fact */
};

/* When inotify was last asked to watch something. */
struct begun {
	uint64_t nodeid, since_ns;
};

struct arena {
	struct arena *next;
	uint64_t used;
	uint8_t bytes[ARENA_SIZE - 16];
};

/* In order of arrival. */
struct list {
	struct fact *first, **last;
};

struct generation {
	struct fact *first[N_BUCKETS], **last[N_BUCKETS];
	struct fact *oldest, **newest;
	struct arena *arenas;
	uint64_t began_ns;
	bool empty;
};

struct vf_order {
	struct vf_inotify_reader reader; /* first: its callbacks are given this */
	struct fact *fact;		 /* of the child event at hand */
	struct vf_events *events;
	bool (*read_facts)(struct vf_events *events);
	uint64_t picks, facts;
	struct early early[N_EARLY]; /* by key */
	struct begun begun[N_BEGUN]; /* by nodeid */
	uint32_t unsaid; /* facts to be reported that inotify has not said anything of yet */
	uint32_t n_arenas;
	uint32_t patience; /* how often facts may still be waited for in this round */
	bool behind;	   /* inotify lost something, and fanotify may not have said all of it */
	bool full;	   /* no memory for a fact: order is given up at the end of the round */
	struct arena *spare;
	struct generation generations[2];
	unsigned int young; /* which of them */
	/* What is not inotify's to tell; the older ones came before inotify was last read. */
	struct list older, newer;
};

/* ---- facts ------------------------------------------------------------------- */

static uint64_t name_key(uint64_t nodeid, const char *name, uint32_t namelen)
{
	uint64_t h = nodeid * 0x9e3779b97f4a7c15u;

	for (uint32_t i = 0; i < namelen; i++)
		h = (h ^ (uint8_t)name[i]) * 0x100000001b3u;
	/* Short names of one directory differ in the lowest bits only. */
	h ^= h >> 32;
	h *= 0x9e3779b97f4a7c15u;
	return h ^ h >> 32;
}

static void empty(struct vf_order *order, struct generation *g)
{
	while (g->arenas) {
		struct arena *arena = g->arenas;

		g->arenas = arena->next;
		order->n_arenas--;
		if (order->spare)
			free(arena);
		else
			order->spare = arena;
	}
	memset(g->first, 0, sizeof(g->first));
	for (uint32_t i = 0; i < N_BUCKETS; i++)
		g->last[i] = &g->first[i];
	g->oldest = NULL;
	g->newest = &g->oldest;
	g->began_ns = order->reader.now_ns;
	g->empty = true;
}

static void *allocate(struct vf_order *order, struct generation *g, uint32_t size)
{
	struct arena *arena = g->arenas;

	size = (size + 7) & ~7u;
	if (!arena || arena->used + size > sizeof(arena->bytes)) {
		arena = order->spare;
		order->spare = NULL;
		if (!arena)
			arena = order->n_arenas < MAX_ARENAS ? malloc(sizeof(*arena)) : NULL;
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

static struct early *early_slot(struct vf_order *order, uint64_t key)
{
	return &order->early[(key >> 29) % N_EARLY];
}

static void note_early(struct vf_order *order, uint64_t key, uint64_t event, bool owed)
{
	struct early *e = early_slot(order, key);

	if (e->key != key)
		*e = (struct early){.key = key};
	e->events |= event;
	e->since_ns = order->reader.now_ns;
	if (!owed)
		return;
	e->owed |= event;
	e->owed_since_ns = order->reader.now_ns;
}

/*
 * Are all facts of such events used up when inotify has said it once?  Each rename is a fact of its
 * own, whatever inotify counts as one.
 */
static bool counts_for_all(const struct vf_order *order, uint64_t event)
{
	return !(event & HALVES) || !(order->events->config.host_mask & VF_FS_RENAME);
}

static uint64_t said_early(struct vf_order *order, uint64_t key, uint64_t mask)
{
	struct early *e = early_slot(order, key);
	uint64_t said = 0;

	if (e->key != key)
		return 0;
	if (order->reader.now_ns - e->since_ns < EARLY_NS)
		said = e->events & (counts_for_all(order, HALVES) ? mask : mask & ~HALVES);
	if (order->reader.now_ns - e->owed_since_ns < OWED_NS)
		said |= e->owed & mask;
	e->owed &= ~mask;
	return said;
}

/* Something to be reported that inotify said nothing of. */
static bool is_unsaid(const struct fact *fact)
{
	return fact->nodeid && !fact->silent && !fact->deferred &&
	       (fact->mask & EVENTS & ~fact->used & ~fact->said);
}

static void set_said(struct vf_order *order, struct fact *fact, uint64_t events)
{
	bool before = is_unsaid(fact);

	fact->said |= events;
	order->unsaid -= before && !is_unsaid(fact);
}

static void set_silent(struct vf_order *order, struct fact *fact)
{
	order->unsaid -= is_unsaid(fact);
	fact->silent = true;
}

static bool is_about(const struct fact *fact, uint64_t nodeid, const char *name, uint32_t namelen)
{
	return fact->nodeid == nodeid && fact->namelen == namelen &&
	       (!namelen || !memcmp(fact->name, name, namelen));
}

static void list_clear(struct list *list)
{
	list->first = NULL;
	list->last = &list->first;
}

static struct fact *new_fact(struct vf_order *order, const struct vf_change *change, uint64_t mask)
{
	struct generation *g = &order->generations[order->young];
	struct fact *fact = allocate(order, g, (uint32_t)sizeof(*fact) + change->namelen);

	if (!fact)
		return NULL;
	*fact = (struct fact){
	    .nodeid = change->dir ? vf_inode_nodeid(change->dir) : 0,
	    .mask = mask,
	    .child = change->child ? vf_inode_nodeid(change->child) : 0,
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
static uint64_t place_of(const struct vf_change *change)
{
	return vf_inode_nodeid(change->dir ? change->dir : change->child);
}

static struct fact *add_fact(struct vf_order *order, const struct vf_change *change, uint64_t mask,
			     bool own)
{
	uint64_t key = name_key(place_of(change), change->name, change->namelen);
	uint32_t bucket = (uint32_t)(key >> 29) % N_BUCKETS;
	struct generation *g = &order->generations[order->young];
	struct fact *fact = new_fact(order, change, mask);

	if (!fact)
		return NULL;
	fact->nodeid = place_of(change);
	fact->itself = !change->dir;
	fact->silent = own;
	fact->said = said_early(order, key, mask);
	*g->last[bucket] = fact;
	g->last[bucket] = &fact->next;
	*g->newest = fact;
	g->newest = &fact->later;
	order->unsaid += is_unsaid(fact);
	return fact;
}

/* In its turn; second: told with it, and in no list. */
static void defer(struct vf_order *order, struct fact *fact, struct fact *second)
{
	fact->deferred = true;
	fact->second = second;
	*order->newer.last = fact;
	order->newer.last = &fact->later;
}

bool vf_order_defer(struct vf_order *order, const struct vf_change *change)
{
	struct fact *fact = new_fact(order, change, change->mask);

	if (!fact)
		return false;
	fact->not_its_end = change->not_its_end;
	defer(order, fact, NULL);
	return true;
}

bool vf_order_defer_rename(struct vf_order *order, const struct vf_change changes[2])
{
	struct fact *first = new_fact(order, &changes[0], changes[0].mask);
	struct fact *second = first ? new_fact(order, &changes[1], changes[1].mask) : NULL;

	if (!second)
		return false;
	second->deferred = true;
	defer(order, first, second);
	return true;
}

/* ---- reports ------------------------------------------------------------------- */

static void report(struct vf_order *order, const struct vf_change *changes, uint32_t n, bool silent)
{
	if (silent)
		vf_events_trace_own(order->events, changes, n);
	else
		vf_events_report(order->events, changes, n);
}

/* Has a directory's parent, if it is watched, no watch of inotify's that would have told this? */
static bool for_parent(const struct vf_order *order, const struct fact *fact)
{
	return fact->deferred ? order->events->order_error : fact->itself;
}

/* With references. */
static struct vf_change change_of(struct vf_order *order, const struct fact *fact)
{
	struct vf_share *share = order->events->share;

	return (struct vf_change){
	    .mask = fact->mask,
	    .dir = fact->nodeid && !fact->itself ? vf_inode_get(share, fact->nodeid) : NULL,
	    .child = fact->child ? vf_inode_get(share, fact->child) : NULL,
	    .name = fact->name,
	    .namelen = fact->namelen,
	    .pid = fact->pid,
	    .not_its_end = fact->not_its_end,
	    .flags = for_parent(order, fact) ? VF_FSNOTIFY_FOR_PARENT : 0,
	    .seen_ns = order->reader.now_ns,
	};
}

static void put_change(struct vf_order *order, const struct vf_change *change)
{
	if (change->dir)
		vf_inode_put(order->events->share, change->dir);
	if (change->child)
		vf_inode_put(order->events->share, change->child);
}

static void tell_fact(struct vf_order *order, struct fact *fact)
{
	struct vf_change changes[2] = {change_of(order, fact)};
	struct fact *second = fact->second;

	if (second && !second->silent && !second->used && !fact->used) {
		changes[1] = change_of(order, second);
		if (changes[0].dir && changes[1].dir)
			vf_events_report_rename(order->events, changes);
		else if (changes[0].dir || changes[1].dir)
			vf_events_report(order->events, &changes[!changes[0].dir], 1);
		put_change(order, &changes[1]);
		set_silent(order, second);
	} else if (changes[0].dir || ((!fact->nodeid || fact->itself) && changes[0].child)) {
		vf_fanotify_report_ordered(order->events, changes, fact->mask & ~fact->used);
	}
	put_change(order, &changes[0]);
	set_silent(order, fact);
}

/* What inotify has lost, in the order of fanotify, which loses none. */
static void tell_facts(struct vf_order *order)
{
	for (unsigned int i = 0; i < 2; i++) {
		/* The older ones first. */
		struct generation *g = &order->generations[order->young ^ 1 ^ i];

		for (struct fact *fact = g->oldest; fact; fact = fact->later)
			if (!fact->silent)
				tell_fact(order, fact);
	}
}

/* Not while what was read is being looked at. */
static void give_up(struct vf_order *order)
{
	tell_facts(order);
	vf_order_clear(order);
	for (uint32_t i = 0; i < MAX_READS && vf_inotify_fetch(&order->reader) > 0; i++)
		;
	order->reader.size = 0;
	vf_events_report_overflow(order->events);
}

/* What of the events of this inode, and of the names in it, inotify tells. */
static uint64_t bits_of(const struct vf_order *order, const struct vf_inode *inode)
{
	struct vf_watches *watches = order->events->watches;

	if (vf_watch_wd(watches, VF_WD_ORDER, inode) < 0)
		return 0;
	return vf_inotify_bits(inode, vf_watch_mask(watches, inode));
}

uint64_t vf_order_note(struct vf_order *order, const struct vf_change *change, uint64_t mask,
		       bool own)
{
	uint64_t bits = change->dir && change->namelen ? mask & bits_of(order, change->dir) : 0;

	if (bits && !add_fact(order, change, bits | (mask & VF_FS_ISDIR), own))
		order->full = true;
	return mask & ~bits & ~VF_FS_ISDIR;
}

/* said: what of it inotify may well say nothing of. */
static void note_own(struct vf_order *order, const struct vf_change *change, uint64_t mask,
		     uint64_t said, bool own)
{
	struct vf_change itself = {.child = change->child, .pid = change->pid};
	struct fact *fact;

	if (!mask)
		return;
	if (vf_inode_type(change->child) == S_IFDIR)
		mask |= VF_FS_ISDIR;
	fact = add_fact(order, &itself, mask, own);
	if (fact)
		set_said(order, fact, said);
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
		watched |= bits_of(order, found[i]) & CHILD_EVENTS;
		vf_inode_put(events->share, found[i]);
	}
	return watched;
}

uint64_t vf_order_note_own(struct vf_order *order, const struct vf_change *change, uint64_t mask,
			   bool own)
{
	uint64_t bits = mask & EVENTS & bits_of(order, change->child);
	uint64_t left = mask & ~bits & ~VF_FS_ISDIR, by_parent = 0;

	if (vf_inode_type(change->child) == S_IFDIR) {
		by_parent = left & CHILD_EVENTS & vf_watches_union(order->events->watches);
		if ((left & CHILD_EVENTS) && is_told_by_parent(order, change->child))
			left &= ~CHILD_EVENTS;
	}
	note_own(order, change, bits | by_parent, by_parent, own);
	return left ? left | (mask & VF_FS_ISDIR) : 0;
}

uint64_t vf_order_note_child(struct vf_order *order, struct vf_change *change, uint64_t mask,
			     uint64_t left, bool own)
{
	struct vf_watches *watches = order->events->watches;
	bool is_dir = vf_inode_type(change->child) == S_IFDIR;
	uint64_t bits = bits_of(order, change->child), events, by_name = 0;

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
	events = mask & bits & (CHILD_EVENTS | VF_FS_SELF_EVENTS);
	note_own(order, change, events & by_name, 0, true);
	note_own(order, change, events & ~by_name, 0, own);
	return left & ~(events & CHILD_EVENTS & ~by_name);
}

bool vf_order_note_rename(struct vf_order *order, const struct vf_change changes[2], bool own)
{
	struct fact *first, *second;

	if (!(bits_of(order, changes[0].dir) & VF_FS_MOVED_FROM) ||
	    !(bits_of(order, changes[1].dir) & VF_FS_MOVED_TO))
		return false;
	first = add_fact(order, &changes[0], changes[0].mask, own);
	second = add_fact(order, &changes[1], changes[1].mask, own);
	if (first && second) {
		first->second = second;
		second->half = first;
	} else {
		order->full = true;
	}
	return true;
}

/* ---- joining -------------------------------------------------------------------- */

struct candidates {
	struct fact *current; /* the one that was used last */
	struct fact *unused;  /* the first that was not used for this event yet */
	struct fact *foreign; /* the first such that is to be reported */
	struct fact *told;    /* the first that was told with its other half */
	struct fact *any;
};

static bool is_used_up(const struct fact *fact)
{
	/* What had the name before may leave it behind what comes: two names are exchanged. */
	uint64_t events = fact->past ? ARRIVALS | DEPARTURES : EVENTS;

	return !(fact->mask & events & ~fact->used);
}

static void unlink_fact(struct generation *g, uint32_t bucket, struct fact **link)
{
	struct fact *fact = *link;

	*link = fact->next;
	if (g->last[bucket] == &fact->next)
		g->last[bucket] = link;
}

/* Facts that are used up go from the chain when there is another of the same name. */
static void look(struct vf_order *order, struct generation *g, uint32_t bucket, uint64_t nodeid,
		 const struct vf_change *change, uint64_t event, struct candidates *c)
{
	struct fact **link = &g->first[bucket], **used_up = NULL, *fact;
	uint32_t compared = 0;

	while ((fact = *link) && compared < MAX_COMPARED) {
		if (!is_about(fact, nodeid, change->name, change->namelen)) {
			link = &fact->next;
			continue;
		}
		if (used_up) {
			bool was_next = link == &(*used_up)->next;

			unlink_fact(g, bucket, used_up);
			if (was_next)
				link = used_up;
			used_up = NULL;
		}
		if (fact->picked && (!c->current || fact->picked > c->current->picked))
			c->current = fact;
		if (is_used_up(fact))
			used_up = link;
		else
			compared++;
		link = &fact->next;
		if (!(fact->mask & event) || (fact->past && !(event & (ARRIVALS | DEPARTURES))))
			continue;
		if (counts_for_all(order, event))
			set_said(order, fact, event);
		c->any = fact;
		if (fact->told && !c->told)
			c->told = fact;
		if ((fact->past && !(event & DEPARTURES)) || (fact->used & event))
			continue;
		if (!c->unused)
			c->unused = fact;
		if (!c->foreign && !fact->silent)
			c->foreign = fact;
	}
}

/*
 * The object of this fact has got the name: what is known of another that had it before is not of
 * what comes now.  Some is left where inotify counted several events as one.
 */
static void supersede(struct vf_order *order, struct fact *arrival, uint32_t bucket)
{
	arrival->past = false;
	for (unsigned int i = 0; i < 2; i++) {
		struct fact *fact = order->generations[i].first[bucket];

		for (uint32_t n = 0; fact && n < MAX_COMPARED; fact = fact->next) {
			if (!is_about(fact, arrival->nodeid, arrival->name, arrival->namelen))
				continue;
			n++;
			if (fact->number < arrival->number && fact->child != arrival->child)
				fact->past = true;
		}
	}
}

static void use(struct vf_order *order, struct fact *fact, uint64_t event, uint32_t bucket)
{
	set_said(order, fact, event);
	fact->used |= event;
	fact->picked = ++order->picks;
	if (event & ARRIVALS)
		supersede(order, fact, bucket);
}

/*
 * The fact that says who did this and to what; NULL: there is none yet.  It goes on with the same
 * object until that has left the name, since fanotify may have counted several events as one.
 */
static struct fact *pick(struct vf_order *order, const struct vf_change *change, bool now)
{
	uint64_t event = change->mask & EVENTS, nodeid = place_of(change);
	uint64_t key = name_key(nodeid, change->name, change->namelen);
	uint32_t bucket = (uint32_t)(key >> 29) % N_BUCKETS;
	struct candidates c = {.any = NULL};
	struct fact *fact;

	look(order, &order->generations[order->young ^ 1], bucket, nodeid, change, event, &c);
	look(order, &order->generations[order->young], bucket, nodeid, change, event, &c);
	if (c.current && !(c.current->used & DEPARTURES) && (c.current->mask & event) &&
	    (!(event & ARRIVALS) || !(c.current->used & event)))
		fact = c.current;
	else
		fact = c.unused ? c.unused : now ? c.any : NULL;
	if (fact && fact->silent && c.foreign)
		fact = c.foreign;
	if (c.told) {
		fact = c.told;
		fact->told = false;
	}
	if (fact || now)
		note_early(order, key, event, !fact);
	if (fact)
		use(order, fact, event, bucket);
	return fact;
}

static struct fact *pick_patiently(struct vf_order *order, const struct vf_change *change)
{
	struct fact *fact = pick(order, change, !order->patience);

	while (!fact && order->patience) {
		order->patience--;
		if (!order->read_facts(order->events))
			nanosleep(&(struct timespec){.tv_nsec = RETRY_NS}, NULL);
		fact = pick(order, change, !order->patience);
	}
	return fact;
}

/* ---- what inotify says ------------------------------------------------------------ */

/* What fanotify reports itself, as far as it came before that fact (NULL: all). */
static void tell_deferred(struct vf_order *order, struct list *list, const struct fact *until)
{
	struct fact *fact;

	while ((fact = list->first) && (!until || fact->number < until->number)) {
		list->first = fact->later;
		if (!list->first)
			list_clear(list);
		tell_fact(order, fact);
	}
}

/*
 * The name of this object goes: what it was told of its links comes before that, although fanotify
 * may have summed up the end with the beginning.
 */
static void tell_deferred_of(struct vf_order *order, struct list *list, uint64_t child)
{
	struct fact **link = &list->first, *fact;

	list->last = link;
	while ((fact = *link)) {
		if (fact->child == child && !fact->nodeid) {
			*link = fact->later;
			tell_fact(order, fact);
		} else {
			link = &fact->later;
			list->last = link;
		}
	}
}

/* Completes the change by its fact, which is returned; the child is referenced. */
static struct fact *complete(struct vf_order *order, struct vf_change *change)
{
	struct fact *fact = pick_patiently(order, change);

	if (!fact)
		return NULL;
	tell_deferred(order, &order->older, fact);
	tell_deferred(order, &order->newer, fact);
	if (change->dir && fact->child && (change->mask & VF_FS_DELETE)) {
		tell_deferred_of(order, &order->older, fact->child);
		tell_deferred_of(order, &order->newer, fact->child);
	}
	change->pid = fact->pid;
	if (change->dir)
		change->child =
		    fact->child ? vf_inode_get(order->events->share, fact->child) : NULL;
	return fact;
}

/* Only the first half was found in what inotify said, but fanotify knows both. */
static bool report_by_fact(struct vf_order *order, const struct vf_change *first,
			   struct fact *second)
{
	struct vf_change changes[2] = {*first};

	if (!second || second->used || second->silent)
		return false;
	changes[1] = change_of(order, second);
	if (changes[1].dir) {
		vf_events_report_rename(order->events, changes);
		set_silent(order, second);
		second->told = true;
	}
	put_change(order, &changes[1]);
	return second->silent;
}

/*
 * Only the second half was found in what inotify said: it had counted the first as one with the
 * first half of another rename, of the same name just before.
 */
static bool report_with_half(struct vf_order *order, const struct vf_change *second,
			     struct fact *first)
{
	struct vf_change changes[2];

	if (!first || first->used || first->silent)
		return false;
	changes[0] = change_of(order, first);
	changes[1] = *second;
	if (changes[0].dir)
		vf_events_report_rename(order->events, changes);
	put_change(order, &changes[0]);
	set_silent(order, first);
	return changes[0].dir;
}

/*
 * Halves of renames of that name, right behind this one, that nobody was told of, nor of their
 * other halves; n: how many.
 */
static struct fact *untold_halves(struct vf_order *order, const struct fact *told, uint64_t event,
				  uint32_t bucket, uint32_t *n)
{
	struct fact *first = NULL;

	*n = 0;
	for (unsigned int i = 0; i < 2; i++) {
		struct fact *fact = order->generations[order->young ^ 1 ^ i].first[bucket];
		uint32_t compared = 0;

		for (; fact && compared < MAX_COMPARED; fact = fact->next) {
			if (fact->number <= told->number ||
			    !is_about(fact, told->nodeid, told->name, told->namelen))
				continue;
			compared++;
			if (!(fact->mask & VF_FS_ENTRY_EVENTS & ~fact->used))
				continue;
			if (!(fact->mask & event) || !is_unsaid(fact) || fact->half || fact->second)
				return first;
			++*n;
			if (!first)
				first = fact;
		}
	}
	return first;
}

/*
 * inotify counts halves of two renames of one name as one, when nothing stands between them and
 * nobody has read the first; fanotify does not.
 */
static void tell_counted_as_one(struct vf_order *order, const struct inotify_event *record,
				const struct fact *told)
{
	uint64_t event = record->mask & HALVES;
	struct fact *fact;
	uint32_t bucket, n;

	if (!told || counts_for_all(order, event))
		return;
	bucket = (uint32_t)(name_key(told->nodeid, told->name, told->namelen) >> 29) % N_BUCKETS;
	/* It is there before inotify says so, but that may have been read later. */
	order->read_facts(order->events);
	while ((fact = untold_halves(order, told, event, bucket, &n)) &&
	       vf_inotify_lone_halves(&order->reader, record, (uint32_t)event, n, BEHIND_NS) < n) {
		struct vf_change change = change_of(order, fact);

		use(order, fact, event, bucket);
		change.mask = event | (fact->mask & VF_FS_ISDIR);
		if (change.dir)
			vf_events_report(order->events, &change, 1);
		put_change(order, &change);
	}
}

static ssize_t read_plainly(struct vf_inotify_reader *reader, void *buffer, size_t size,
			    uint64_t *at)
{
	*at = 0;
	return read(reader->fd, buffer, size);
}

/* What inotify said of the object itself, by this same event. */
static struct fact *use_own_fact(struct vf_order *order, struct vf_inode *inode, uint64_t event)
{
	struct vf_change change = {.mask = event, .child = inode};

	return bits_of(order, inode) & event ? pick(order, &change, true) : NULL;
}

static struct vf_inode *child_of(struct vf_inotify_reader *reader,
				 const struct inotify_event *record, struct vf_inode *dir,
				 bool *certain)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change change = vf_inotify_change(reader, record, dir, NULL), itself;
	char name[VF_NAME_MAX + 1];

	order->fact = NULL;
	*certain = false;
	if (!atomic_load(&order->events->flags))
		return NULL;
	if (!(change.mask & VF_FS_ISDIR)) {
		order->fact = complete(order, &change);
		*certain = order->fact;
		return change.child;
	}
	/* fanotify has directories by their own handle. The guest does nothing to one that it does
	 * not hold. */
	itself = (struct vf_change){.mask = change.mask};
	itself.child = vf_inode_known(order->events->share, dir, vf_inotify_name(&change, name));
	if (itself.child)
		order->fact = complete(order, &itself);
	return itself.child;
}

static void take_one(struct vf_inotify_reader *reader, const struct inotify_event *record,
		     struct vf_inode *inode, struct vf_inode *child)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change change = vf_inotify_change(reader, record, inode, child);
	bool by_name = change.dir && (change.mask & CHILD_EVENTS);
	struct vf_inode *held = NULL;
	struct fact *fact = order->fact;

	/* The session may have ended meanwhile. */
	if (!(change.mask & EVENTS) || !atomic_load(&order->events->flags))
		return;
	if (!by_name) {
		fact = complete(order, &change);
		if (fact && change.dir)
			held = change.child;
	}
	if (!change.child)
		change.child = child;
	if (change.dir && change.child) {
		bool is_dir = change.mask & VF_FS_ISDIR;

		if (by_name && !is_dir)
			use_own_fact(order, change.child, change.mask & CHILD_EVENTS);
		/* By its own record, when the name was another's already. */
		if (by_name && is_dir && !fact)
			fact = use_own_fact(order, change.child, change.mask & CHILD_EVENTS);
		if ((change.mask & VF_FS_DELETE) && is_dir)
			use_own_fact(order, change.child, VF_FS_DELETE_SELF);
		change.not_its_end = (change.mask & VF_FS_DELETE) && !is_dir &&
				     (bits_of(order, change.child) & VF_FS_DELETE_SELF);
	}
	if (!fact || fact->silent ||
	    !(((change.mask & VF_FS_MOVED_FROM) && report_by_fact(order, &change, fact->second)) ||
	      ((change.mask & VF_FS_MOVED_TO) && report_with_half(order, &change, fact->half))))
		report(order, &change, 1, fact && fact->silent);
	if (change.mask & HALVES)
		tell_counted_as_one(order, record, fact);
	if (held)
		vf_inode_put(order->events->share, held);
}

static void take_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 struct vf_inode *dir)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change change = {
	    .mask = VF_FS_DELETE_SELF | VF_FS_ISDIR,
	    .child = dir,
	    .seen_ns = reader->now_ns,
	};
	struct fact *fact;

	(void)record;
	if (!atomic_load(&order->events->flags))
		return;
	fact = complete(order, &change);
	report(order, &change, 1, fact && fact->silent);
}

static void take_pair(struct vf_inotify_reader *reader, const struct inotify_event *from,
		      struct vf_inode *from_dir, const struct inotify_event *to,
		      struct vf_inode *to_dir)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change changes[2] = {vf_inotify_change(reader, from, from_dir, NULL),
				       vf_inotify_change(reader, to, to_dir, NULL)};
	struct fact *facts[2];

	facts[0] = complete(order, &changes[0]);
	facts[1] = complete(order, &changes[1]);
	if (facts[0] && facts[0]->silent && facts[1] && facts[1]->silent)
		vf_events_trace_own(order->events, changes, 2);
	else
		vf_events_report_rename(order->events, changes);
	tell_counted_as_one(order, to, facts[1]);
	for (uint32_t i = 0; i < 2; i++)
		if (changes[i].child)
			vf_inode_put(order->events->share, changes[i].child);
}

static void overflow(struct vf_inotify_reader *reader)
{
	struct vf_order *order = (struct vf_order *)reader;

	tell_facts(order);
	order->behind = true;
}

/*
 * The host ends inotify's watch of a file with its last name, although somebody may have it open.
 * Whoever watches it has been told of the end, and of nothing behind that.
 */
static bool is_behind_its_end(struct vf_order *order, const struct fact *fact)
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

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct begun *begun_slot(struct vf_order *order, uint64_t nodeid)
{
	return &order->begun[(nodeid * 0x9e3779b97f4a7c15u >> 32) % N_BEGUN];
}

/*
 * It was done to an object before anybody watched for it, and fanotify, with its one mark on the
 * file system, had it all the same.
 */
static bool is_from_before(struct vf_order *order, const struct fact *fact)
{
	const struct begun *begun = begun_slot(order, fact->nodeid);

	return begun->nodeid == fact->nodeid && order->reader.now_ns - begun->since_ns < BEGUN_NS &&
	       !(fact->mask & EVENTS & ~CHILD_EVENTS & ~fact->used & ~fact->said);
}

/*
 * What inotify should have said by now, and did not: the host's queue of it had no room, say, while
 * fanotify's had. Late, but not lost.
 */
static void tell_unsaid(struct vf_order *order, const struct generation *g)
{
	for (struct fact *fact = g->oldest; fact && order->unsaid; fact = fact->later) {
		if (!is_unsaid(fact))
			continue;
		fact->used |= fact->said;
		if (is_behind_its_end(order, fact) || is_from_before(order, fact))
			set_silent(order, fact);
		else
			tell_fact(order, fact);
	}
}

static uint64_t age_ns(const struct vf_order *order)
{
	return order->reader.now_ns - order->generations[order->young].began_ns;
}

static void grow_old(struct vf_order *order)
{
	struct generation *young = &order->generations[order->young];
	struct generation *old = &order->generations[order->young ^ 1];

	if ((young->empty && old->empty) || age_ns(order) < GENERATION_NS)
		return;
	tell_unsaid(order, old);
	order->young ^= 1;
	empty(order, old);
}

int32_t vf_order_wait_ms(const struct vf_order *order)
{
	if (order && order->older.first)
		return 0;
	return order && order->unsaid ? (int32_t)(GENERATION_NS / 1000000) + 1 : -1;
}

static bool is_held_up(const struct vf_order *order)
{
	return atomic_load(&order->events->waiting);
}

/* False: inotify cannot be read. */
static bool read_once(struct vf_order *order)
{
	int32_t n = vf_inotify_fetch(&order->reader);
	bool more = true;

	if (n < 0) {
		tell_facts(order);
		vf_order_clear(order);
		vf_events_source_failed(order->events, "reading inotify", -n);
		return false;
	}
	order->patience = PATIENCE;
	for (uint32_t i = 0; more && i < MAX_READS && !is_held_up(order); i++)
		more = order->read_facts(order->events);
	vf_inotify_take(&order->reader);
	if (order->behind) {
		tell_facts(order);
		order->behind = more;
	}
	/* These came before inotify was read, and are not behind anything that it said. */
	tell_deferred(order, &order->older, NULL);
	order->older = order->newer;
	if (!order->older.first)
		list_clear(&order->older);
	list_clear(&order->newer);
	if (order->full) {
		order->full = false;
		give_up(order);
		return false;
	}
	/* There may be more of inotify's that these facts are about. */
	if ((uint32_t)n < VF_SOURCE_BUFFER / 2 &&
	    (!order->older.first || age_ns(order) >= MAX_GENERATION_NS))
		grow_old(order);
	return true;
}

void vf_order_read(struct vf_order *order, bool (*read_facts)(struct vf_events *))
{
	order->read_facts = read_facts;
	for (uint32_t i = 0; i < MAX_ROUNDS && read_once(order) && order->older.first; i++)
		if (is_held_up(order))
			break;
}

/* ---- watches ------------------------------------------------------------------------ */

void vf_order_mark(struct vf_order *order, struct vf_inode *inode, uint64_t mask,
		   int32_t wd[VF_N_WDS])
{
	uint64_t bits = mask & ~VF_FS_EVENT_ON_CHILD ? vf_inotify_bits(inode, mask) : 0;
	struct vf_events *events = order->events;
	int error = vf_inotify_watch(events, VF_WD_ORDER, inode, bits, wd);
	uint64_t nodeid = vf_inode_nodeid(inode);

	if (bits)
		*begun_slot(order, nodeid) = (struct begun){nodeid, now_ns()};
	if (!error)
		return;
	if (error != events->order_error)
		vf_events_notice(events,
				 "inotify_add_watch: %s%s; events may reach the guest out of order",
				 strerror(-error),
				 error == -ENOSPC ? ": the limit is in "
						    "/proc/sys/fs/inotify/max_user_watches"
						  : "");
	events->order_error = error;
}

/* ---- life --------------------------------------------------------------------------- */

struct vf_order *vf_order_new(struct vf_events *events, int inotify_fd, int *error)
{
	struct vf_order *order = calloc(1, sizeof(*order));

	*error = -ENOMEM;
	if (!order)
		return NULL;
	order->events = events;
	order->reader = (struct vf_inotify_reader){
	    .events = events,
	    .fd = inotify_fd,
	    .which = VF_WD_ORDER,
	    .buffer = aligned_alloc(64, VF_SOURCE_BUFFER),
	    .joins_renames = !(events->config.host_mask & VF_FS_RENAME),
	    .read = read_plainly,
	    .child = child_of,
	    .one = take_one,
	    .removed = take_removal,
	    .pair = take_pair,
	    .overflow = overflow,
	};
	vf_order_clear(order);
	if (!order->reader.buffer) {
		free(order);
		return NULL;
	}
	*error = 0;
	return order;
}

void vf_order_clear(struct vf_order *order)
{
	empty(order, &order->generations[0]);
	empty(order, &order->generations[1]);
	order->unsaid = 0;
	list_clear(&order->older);
	list_clear(&order->newer);
}

void vf_order_free(struct vf_order *order)
{
	if (!order)
		return;
	vf_order_clear(order);
	free(order->spare);
	free(order->reader.buffer);
	free(order);
}
