/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Facts: what fanotify said, until inotify says the same; only for order_*.c and order.c.
 *
 * Facts live in two generations: the younger becomes the older one after a while, when inotify has
 * said what the older ones are about, and then those go.  What inotify has not said by then is told
 * all the same, late.
 */
#ifndef VHOSTFS_ORDER_FACTS_H
#define VHOSTFS_ORDER_FACTS_H

#include "inotify_reader.h"
#include "name_hash.h"
#include "order.h"

#define VF_ORDER_CHILD_EVENTS (VF_FS_CHILD_EVENTS & ~VF_FS_OPEN_EXEC)
#define VF_ORDER_EVENTS (VF_FS_ENTRY_EVENTS | VF_ORDER_CHILD_EVENTS | VF_FS_SELF_EVENTS)
#define VF_ORDER_HALVES (VF_FS_MOVED_FROM | VF_FS_MOVED_TO)

/* Chains of facts in a generation, to begin with; as many as facts when there are more. */
#define VF_FACT_CHAINS 2048u
#define VF_MAX_FACT_CHAINS 131072u
/* So many facts of one name are compared, besides those that are used up. */
#define VF_FACTS_COMPARED 64u
#define VF_FACT_ARENA_SIZE (256u * 1024)
/* Beyond this much memory facts are forgotten, and the guest is told of a loss. */
#define VF_MAX_FACT_ARENAS 256u
#define VF_N_BEGUN 1024u
#define VF_N_EARLY 2048u
#define VF_N_TOLD 256u

struct vf_fact {
	struct vf_fact *next;	/* in its chain, in order of arrival */
	struct vf_fact *later;	/* of all in its generation */
	struct vf_fact *second; /* the other half of the rename that this is the first of */
	struct vf_fact *half;	/* that first half */
	uint64_t nodeid; /* of the directory; no references, since facts may lie here for long;
			    0: deferred */
	uint64_t child;	 /* nodeid, or 0 */
	uint64_t object, place; /* as the change had them */
	uint64_t mask;		/* what happened */
	uint64_t used;		/* what of it was reported or found to be ours */
	/* For what of it inotify said something: where it counts several events as one, only one
	 * of their facts is used. */
	uint64_t said;
	uint64_t picked; /* when it was last used; 0: not yet */
	uint64_t number; /* in the order of fanotify */
	uint64_t nth;	 /* likewise, of those that are inotify's to tell */
	int32_t pid;
	bool own;      /* our own doing */
	bool silent;   /* that, or reported already */
	bool repeated; /* what it was used for last it had been used for before */
	bool told;     /* with its other half, before inotify said this one */
	bool joined;   /* half of a rename of which inotify says both */
	bool spent;    /* used up, and another of its kind after it: in no chain, or soon */
	bool past;     /* of an object that had the name before the one that has it now */
	bool not_its_end;
	bool unlinked;
	bool itself;   /* of what happened to the object itself, which is also in nodeid */
	bool deferred; /* not inotify's to tell: it waits in a list, not in a generation */
	uint8_t namelen;
	char name[];
};

/*
 * What inotify said of a name not long ago.  A fact of the same that comes now may be of an event
 * that inotify had counted as one with others, or told before its fact was there.
 */
struct vf_early {
	uint64_t key, events, since_ns;
	uint64_t owed, owed_since_ns; /* of them, those without a fact */
	/* Halves of renames, with the fact of an earlier one that may be another. */
	uint64_t repeats, repeats_since_ns;
	uint64_t late, late_since_ns; /* what was told without inotify, which may still say it */
};

/* When inotify was last asked to watch something. */
struct vf_begun {
	uint64_t nodeid, since_ns;
};

struct vf_fact_arena {
	struct vf_fact_arena *next;
	uint64_t used;
	uint8_t bytes[VF_FACT_ARENA_SIZE - 16];
};

/* In order of arrival. */
struct vf_fact_list {
	struct vf_fact *first, **last;
};

struct vf_fact_chain {
	struct vf_fact *first, **last;
};

struct vf_fact_generation {
	struct vf_fact_chain *chains, few[VF_FACT_CHAINS]; /* by vf_name_hash() */
	uint32_t n_chains;				   /* a power of two */
	uint32_t n;
	struct vf_fact *oldest, **newest;
	struct vf_fact_arena *arenas;
	uint64_t began_ns;
	/* The place in inotify's stream up to which it says what these facts are about. */
	uint64_t due;
	uint64_t last; /* which of all was the last of them */
	bool empty;
	bool lost; /* of some of them inotify's records were lost */
};

struct vf_order {
	struct vf_inotify_reader reader; /* first: its callbacks are given this */
	struct vf_fact *fact;		 /* of the child event at hand */
	/* The other half, when at hand is one of a rename of which inotify said both; else NULL. */
	const struct vf_change *other;
	struct vf_events *events;
	bool (*read_facts)(struct vf_events *events);
	uint64_t picks, facts;
	uint64_t noted;			   /* of the facts, those that are inotify's to tell */
	uint64_t at_fact;		   /* which of these it told last for the first time */
	uint32_t used_young;		   /* how many of the younger generation */
	struct vf_early early[VF_N_EARLY]; /* by key */
	struct vf_fact *told_late;	   /* in the place of a fact that went when it was told */
	struct vf_begun begun[VF_N_BEGUN]; /* by nodeid */
	/* inotify's, of renames that were told when it had only said their first halves; by
	 * themselves.  The second halves come, later than facts are kept if need be. */
	uint32_t told_cookies[VF_N_TOLD];
	uint32_t unsaid; /* facts to be reported that inotify has not said anything of yet */
	uint32_t n_arenas;
	uint32_t waits; /* how often facts were waited for in this round */
	uint64_t taken; /* bytes, from the host's queue of inotify's */
	bool lost;	/* inotify's queue was full: what follows is forgotten after the round */
	bool full;	/* no memory for a fact: likewise */
	/* So long fanotify may still say what happened before either. */
	uint64_t behind_until_ns;
	struct vf_fact_arena *spare;
	struct vf_fact_generation generations[2];
	unsigned int young; /* which of them */
	/* What is not inotify's to tell; the older ones came before inotify was last read. */
	struct vf_fact_list older, newer;
};

/* ---- order_facts.c: where they are kept ---- */

/* Whose name it is, or what it happened to. */
uint64_t vf_fact_place(const struct vf_change *change);
/* NULL: no memory. */
struct vf_fact *vf_fact_add(struct vf_order *order, const struct vf_change *change, uint64_t mask,
			    bool own);
/* inotify said event of the name with this key; owed: and its fact is still to come. */
void vf_facts_note_early(struct vf_order *order, uint64_t key, uint64_t event, bool owed);
/* The same of half a rename that was told by the fact of an earlier one. */
void vf_facts_note_repeat(struct vf_order *order, uint64_t key, uint64_t event);
/* This fact, and its other half, are told without inotify. */
void vf_facts_note_late(struct vf_order *order, const struct vf_fact *fact);
/* Was this told like that not long ago, and has inotify said it only now? */
bool vf_facts_take_late(struct vf_order *order, const struct vf_change *change);
/* They are not to be told. */
void vf_facts_forget(struct vf_order *order, const struct vf_fact_generation *g);
/* The generation's facts are forgotten, and what was to be told of them was. */
void vf_facts_empty(struct vf_order *order, struct vf_fact_generation *g);

/* Where the facts of a key are, which is vf_name_hash() of a name in a directory, or of an object.
 */
static inline struct vf_fact_chain *vf_fact_chain(const struct vf_fact_generation *g, uint64_t key)
{
	return &g->chains[(key >> 29) & (g->n_chains - 1)];
}

/*
 * Are all facts of such events used up when inotify has said it once?  Each rename is a fact of its
 * own, whatever inotify counts as one.
 */
static inline bool vf_order_counts_for_all(const struct vf_order *order, uint64_t event)
{
	return !(event & VF_ORDER_HALVES) || !(order->events->config.host_mask & VF_FS_RENAME);
}

/* Something to be reported that inotify said nothing of. */
static inline bool vf_fact_is_unsaid(const struct vf_fact *fact)
{
	return fact->nodeid && !fact->silent && !fact->deferred &&
	       (fact->mask & VF_ORDER_EVENTS & ~fact->used & ~fact->said);
}

/* Is what it was used for last not to be reported? */
static inline bool vf_fact_is_silent(const struct vf_fact *fact)
{
	return fact && (fact->own || (fact->silent && !fact->repeated));
}

static inline void vf_fact_set_said(struct vf_order *order, struct vf_fact *fact, uint64_t events)
{
	bool before = vf_fact_is_unsaid(fact);

	fact->said |= events;
	order->unsaid -= before && !vf_fact_is_unsaid(fact);
}

static inline void vf_fact_set_silent(struct vf_order *order, struct vf_fact *fact)
{
	order->unsaid -= vf_fact_is_unsaid(fact);
	fact->silent = true;
}

static inline bool vf_fact_is_about(const struct vf_fact *fact, uint64_t nodeid, const char *name,
				    uint32_t namelen)
{
	return fact->nodeid == nodeid && fact->namelen == namelen &&
	       (!namelen || !memcmp(fact->name, name, namelen));
}

static inline void vf_fact_list_clear(struct vf_fact_list *list)
{
	list->first = NULL;
	list->last = &list->first;
}

static inline struct vf_begun *vf_begun_slot(struct vf_order *order, uint64_t nodeid)
{
	return &order->begun[(nodeid * 0x9e3779b97f4a7c15u >> 32) % VF_N_BEGUN];
}

/* ---- order_note.c: what fanotify says ---- */

/*
 * Are so many facts there that what inotify says next is about one of them?  They take memory, and
 * more can be read when it is needed.
 */
bool vf_facts_are_ahead(const struct vf_order *order);
/* Notes what one read of fanotify has to say; false: nothing. */
bool vf_facts_read(struct vf_order *order);
/* What of the events of this inode, and of the names in it, inotify tells. */
uint64_t vf_order_bits(const struct vf_order *order, const struct vf_inode *inode);

/* ---- order_pick.c: which fact is of what inotify says ---- */

enum vf_fact_choice {
	VF_FACT_UNUSED,	  /* one may still come */
	VF_FACT_ANY,	  /* one that was used before will do */
	VF_FACT_ANY_LAST, /* and if there is none, the change is told without */
};
/* The fact that says who did this and to what; NULL: there is none yet. */
struct vf_fact *vf_fact_pick(struct vf_order *order, const struct vf_change *change,
			     enum vf_fact_choice choice);
/* The same, after a moment if need be. */
struct vf_fact *vf_fact_pick_patiently(struct vf_order *order, const struct vf_change *change);
/* The fact of the second half of a rename that was told with the first; NULL: it is not kept. */
struct vf_fact *vf_fact_pick_told(struct vf_order *order, const struct vf_change *change);
/* The same of the second half of a rename, of whose first this is the fact (NULL: there is none).
 */
struct vf_fact *vf_fact_pick_second(struct vf_order *order, const struct vf_change *change,
				    struct vf_fact *first);
/* event of this fact is told, or found to be ours. */
void vf_fact_use(struct vf_order *order, struct vf_fact *fact, uint64_t event, uint64_t key);

/* ---- order_align.c: what belongs together where neither says everything ---- */

/*
 * Is what inotify says now rather the event of `repeated` again, which fanotify has counted as one,
 * than this fact's, which was not used?
 */
bool vf_order_is_repeat(struct vf_order *order, const struct vf_fact *repeated,
			const struct vf_fact *fact);
/*
 * Will inotify say this fact's event, behind what it says now, of which `told` was used?  While it
 * says nothing more of the directory, that is waited for.
 */
bool vf_order_still_comes(struct vf_order *order, const struct vf_fact *told,
			  const struct vf_fact *fact, uint64_t time_ns);

/* ---- order_tell.c: what is told by facts alone ---- */

/* With references, for vf_fact_put_change(). */
struct vf_change vf_fact_change(struct vf_order *order, const struct vf_fact *fact);
void vf_fact_put_change(struct vf_order *order, const struct vf_change *change);
/* All of it, with its other half. */
void vf_fact_tell(struct vf_order *order, struct vf_fact *fact);
/* What of a list came before that fact (NULL: all). */
void vf_facts_tell_deferred(struct vf_order *order, struct vf_fact_list *list,
			    const struct vf_fact *until);
/* What of a list is of this object. */
void vf_facts_tell_deferred_of(struct vf_order *order, struct vf_fact_list *list, uint64_t child);
/* What inotify has not said of a generation that goes. */
void vf_facts_tell_unsaid(struct vf_order *order, const struct vf_fact_generation *g);

#endif
