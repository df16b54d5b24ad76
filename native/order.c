/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Joins what inotify says with what fanotify says; order.h has the reason.
 *
 * The kernel queues an event with both within one system call, so what inotify
 * says in this round has its fact in this round or in one shortly before:
 * order_facts.h.  order_note.c makes facts of what fanotify says, order_pick.c
 * finds the fact of what inotify says, and order_tell.c tells what is fanotify's
 * alone.  Here is what becomes of inotify's records, and the round of both.
 */

#include "order_facts.h"

#define GENERATION_NS 20000000u
/* So old it may become while objects' own events keep coming. */
#define MAX_GENERATION_NS (5u * GENERATION_NS)
/* Rounds in one turn, while objects' own events keep coming. */
#define MAX_ROUNDS 8u
/* So long inotify may say of a rename what fanotify has said already. */
#define BEHIND_NS 1000000
/* Of fanotify, in one round: a flood elsewhere must not hold up what was read. */
#define MAX_READS 32u
/* fanotify says what happened before a loss so long after it at most. */
#define BEHIND_LOSS_NS 100000000u
/* When inotify has said so many of the younger facts it is through with the older ones. */
#define MANY_YOUNG 8192u

/* ---- what inotify says ------------------------------------------------------------ */

static void report(struct vf_order *order, const struct vf_change *changes, uint32_t n, bool silent)
{
	if (silent)
		vf_events_trace_own(order->events, changes, n);
	else
		vf_events_report(order->events, changes, n);
}

static uint32_t *told_cookie(struct vf_order *order, uint32_t cookie)
{
	return &order->told_cookies[cookie % VF_N_TOLD];
}

/* Is this the second half of a rename that was told with its first half? */
static bool was_told(struct vf_order *order, const struct inotify_event *record)
{
	return (record->mask & IN_MOVED_TO) && record->cookie &&
	       *told_cookie(order, record->cookie) == record->cookie;
}

/* Completes the change by its fact, which is returned; the child is referenced. */
static struct vf_fact *complete_by(struct vf_order *order, struct vf_change *change,
				   struct vf_fact *fact)
{
	if (!fact)
		return NULL;
	vf_facts_tell_deferred(order, &order->older, fact);
	vf_facts_tell_deferred(order, &order->newer, fact);
	if (change->dir && fact->child && (change->mask & VF_FS_DELETE)) {
		vf_facts_tell_deferred_of(order, &order->older, fact->child);
		vf_facts_tell_deferred_of(order, &order->newer, fact->child);
	}
	change->pid = fact->pid;
	change->object = fact->object;
	change->place = fact->place;
	change->unlinked = fact->unlinked;
	if (change->dir)
		change->child =
		    fact->child ? vf_inode_get(order->events->share, fact->child) : NULL;
	return fact;
}

static struct vf_fact *complete(struct vf_order *order, struct vf_change *change)
{
	return complete_by(order, change, vf_fact_pick_patiently(order, change));
}

/*
 * Only the first half was found in what inotify said, but fanotify knows both.  record: that half;
 * NULL: inotify says neither.
 */
static bool report_by_fact(struct vf_order *order, const struct inotify_event *record,
			   const struct vf_change *first, struct vf_fact *second)
{
	struct vf_change changes[2] = {*first};

	if (!second || second->used || second->silent)
		return false;
	changes[1] = vf_fact_change(order, second);
	if (changes[1].dir) {
		vf_events_report_rename(order->events, changes);
		vf_fact_set_silent(order, second);
		second->told = record;
		if (record)
			*told_cookie(order, record->cookie) = record->cookie;
		else
			second->used |= VF_FS_MOVED_TO;
	}
	vf_fact_put_change(order, &changes[1]);
	return second->silent;
}

/*
 * Only the second half was found in what inotify said: it had counted the first as one with the
 * first half of another rename, of the same name just before.
 */
static bool report_with_half(struct vf_order *order, const struct vf_change *second,
			     struct vf_fact *first)
{
	struct vf_change changes[2];

	if (!first || first->used || first->silent)
		return false;
	changes[0] = vf_fact_change(order, first);
	changes[1] = *second;
	if (changes[0].dir)
		vf_events_report_rename(order->events, changes);
	vf_fact_put_change(order, &changes[0]);
	vf_fact_set_silent(order, first);
	/* What comes of this name is another's. */
	first->used |= VF_FS_MOVED_FROM;
	return changes[0].dir;
}

/* The next half like this one that nobody was told of, without anything else of the name between.
 */
static struct vf_fact *untold_half(struct vf_order *order, const struct vf_fact *told,
				   uint64_t event, uint64_t key)
{
	for (unsigned int i = 0; i < 2; i++) {
		struct vf_fact_generation *g = &order->generations[order->young ^ 1 ^ i];
		struct vf_fact *fact = vf_fact_chain(g, key)->first;
		uint32_t compared = 0;

		for (; fact && compared < VF_FACTS_COMPARED; fact = fact->next) {
			if (fact->number <= told->number ||
			    !vf_fact_is_about(fact, told->nodeid, told->name, told->namelen))
				continue;
			compared++;
			if (!(fact->mask & VF_FS_ENTRY_EVENTS & ~fact->used))
				continue;
			return (fact->mask & event) && vf_fact_is_unsaid(fact) && !fact->joined &&
				       !((fact->mask ^ told->mask) & VF_FS_ISDIR)
				   ? fact
				   : NULL;
		}
	}
	return NULL;
}

/*
 * inotify counts halves of two renames of one name as one, when nothing stands between them and
 * nobody has read the first; fanotify does not.  But it counts the same rename again as one, so
 * there may be something between these two all the same: then inotify says each of them.
 */
static void tell_counted_as_one(struct vf_order *order, const struct inotify_event *record,
				const struct vf_fact *told)
{
	uint64_t event = record->mask & VF_ORDER_HALVES;
	struct vf_fact *untold;
	uint64_t key;

	if (!told || vf_order_counts_for_all(order, event))
		return;
	key = vf_name_hash(told->nodeid, told->name, told->namelen);
	/* It is there before inotify says so, but that may have been read later. */
	if (!vf_facts_are_ahead(order))
		vf_facts_read(order);
	while ((untold = untold_half(order, told, event, key)) &&
	       !vf_order_still_comes(order, told, untold, BEHIND_NS)) {
		struct vf_change change = vf_fact_change(order, untold);

		vf_fact_use(order, untold, event, key);
		change.mask = event | (untold->mask & VF_FS_ISDIR);
		if (change.dir && !report_by_fact(order, NULL, &change, untold->second) &&
		    !report_with_half(order, &change, untold->half))
			vf_events_report(order->events, &change, 1);
		vf_fact_put_change(order, &change);
	}
}

static ssize_t read_plainly(struct vf_inotify_reader *reader, void *buffer, size_t size,
			    uint64_t *at)
{
	struct vf_order *order = (struct vf_order *)reader;
	ssize_t n = read(reader->fd, buffer, size);

	*at = order->taken;
	if (n > 0)
		order->taken += (uint64_t)n;
	return n;
}

/* What inotify said of the object itself, by this same event. */
static struct vf_fact *use_own_fact(struct vf_order *order, struct vf_inode *inode, uint64_t event)
{
	struct vf_change change = {.mask = event, .child = inode};

	return vf_order_bits(order, inode) & event ? vf_fact_pick(order, &change, VF_FACT_ANY_LAST)
						   : NULL;
}

/* The session may have ended meanwhile; and what could not be noted is not guessed. */
static bool is_over(const struct vf_order *order)
{
	return order->full || !atomic_load(&order->events->flags);
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
	if (is_over(order))
		return NULL;
	if (!(change.mask & VF_FS_ISDIR)) {
		order->fact = complete(order, &change);
		*certain = order->fact;
		return change.child;
	}
	/* fanotify has directories by their own handle. The guest does nothing to one that it does
	 * not hold. */
	itself = (struct vf_change){.mask = change.mask};
	itself.child = vf_inode_known(order->events->share, dir, vf_change_name(&change, name));
	if (itself.child)
		order->fact = complete(order, &itself);
	return itself.child;
}

static struct vf_change end_of(const struct vf_order *order, struct vf_inode *dir)
{
	return (struct vf_change){
	    .mask = VF_FS_DELETE_SELF | VF_FS_ISDIR,
	    .child = dir,
	    .seen_ns = order->reader.now_ns,
	};
}

/* It is known to have gone; nobody waits for fanotify to say so, which it does not of one that is
 * held. */
static void tell_end(struct vf_order *order, struct vf_inode *dir)
{
	struct vf_change change = end_of(order, dir);

	report(order, &change, 1, vf_fact_is_silent(use_own_fact(order, dir, VF_FS_DELETE_SELF)));
}

static void take_removal(struct vf_inotify_reader *reader, const struct inotify_event *record,
			 struct vf_inode *dir)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change change = end_of(order, dir);
	struct vf_fact *fact;

	(void)record;
	if (is_over(order))
		return;
	fact = complete(order, &change);
	report(order, &change, 1, vf_fact_is_silent(fact));
}

static void take_one(struct vf_inotify_reader *reader, const struct inotify_event *record,
		     struct vf_inode *inode, struct vf_inode *child)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change change = vf_inotify_change(reader, record, inode, child);
	bool by_name = change.dir && (change.mask & VF_ORDER_CHILD_EVENTS);
	struct vf_inode *held = NULL;
	struct vf_fact *fact = order->fact;
	bool told = was_told(order, record), another;

	if (!(change.mask & VF_ORDER_EVENTS) || is_over(order))
		return;
	/* The host is asked for it because of directories there; no fact of the name is of this. */
	if (change.dir && (change.mask & VF_FS_DELETE) &&
	    !(vf_order_bits(order, inode) & VF_FS_DELETE)) {
		if (child)
			take_removal(reader, record, child);
		return;
	}
	if (!by_name) {
		fact = told ? complete_by(order, &change, vf_fact_pick_told(order, &change))
			    : complete(order, &change);
		if (fact && change.dir)
			held = change.child;
	} else if (fact) {
		change.object = fact->object;
		change.place = fact->place;
	}
	another =
	    child && fact && fact->child != vf_inode_nodeid(child) && (change.mask & VF_FS_DELETE);
	if (!change.child && !another)
		change.child = child;
	/*
	 * The one that was last known by this name has gone, but what is removed now is another:
	 * one that had replaced it, unless that one was there before.
	 */
	if (another && !vf_inotify_is_removed_later(reader, child))
		tell_end(order, child);
	if (change.dir && change.child) {
		bool is_dir = change.mask & VF_FS_ISDIR;

		if (by_name && !is_dir)
			use_own_fact(order, change.child, change.mask & VF_ORDER_CHILD_EVENTS);
		/* By its own record, when the name was another's already. */
		if (by_name && is_dir && !fact)
			fact =
			    use_own_fact(order, change.child, change.mask & VF_ORDER_CHILD_EVENTS);
		if ((change.mask & VF_FS_DELETE) && is_dir)
			use_own_fact(order, change.child, VF_FS_DELETE_SELF);
		change.not_its_end = (change.mask & VF_FS_DELETE) && !is_dir &&
				     (vf_order_bits(order, change.child) & VF_FS_DELETE_SELF);
	}
	if (!fact || vf_fact_is_silent(fact) ||
	    !(((change.mask & VF_FS_MOVED_FROM) &&
	       report_by_fact(order, record, &change, fact->second)) ||
	      ((change.mask & VF_FS_MOVED_TO) && report_with_half(order, &change, fact->half))))
		report(order, &change, 1, told || vf_fact_is_silent(fact));
	if (change.mask & VF_ORDER_HALVES)
		tell_counted_as_one(order, record, fact);
	if (held)
		vf_inode_put(order->events->share, held);
}

static void take_pair(struct vf_inotify_reader *reader, const struct inotify_event *from,
		      struct vf_inode *from_dir, const struct inotify_event *to,
		      struct vf_inode *to_dir)
{
	struct vf_order *order = (struct vf_order *)reader;
	struct vf_change changes[2] = {vf_inotify_change(reader, from, from_dir, NULL),
				       vf_inotify_change(reader, to, to_dir, NULL)};
	struct vf_fact *facts[2];
	bool joined;

	if (is_over(order))
		return;
	/* As its facts are: the host may still tell of more than the guest watches there. */
	joined = (vf_order_bits(order, from_dir) & VF_FS_MOVED_FROM) &&
		 (vf_order_bits(order, to_dir) & VF_FS_MOVED_TO);
	order->other = joined ? &changes[1] : NULL;
	facts[0] = complete(order, &changes[0]);
	order->other = joined ? &changes[0] : NULL;
	facts[1] =
	    complete_by(order, &changes[1], vf_fact_pick_second(order, &changes[1], facts[0]));
	order->other = NULL;
	if (vf_fact_is_silent(facts[0]) && vf_fact_is_silent(facts[1]))
		vf_events_trace_own(order->events, changes, 2);
	else
		vf_events_report_rename(order->events, changes);
	tell_counted_as_one(order, to, facts[1]);
	for (uint32_t i = 0; i < 2; i++)
		if (changes[i].child)
			vf_inode_put(order->events->share, changes[i].child);
}

/* What follows was queued since, perhaps while more was lost: it goes, too, after the round. */
static void overflow(struct vf_inotify_reader *reader)
{
	struct vf_order *order = (struct vf_order *)reader;

	reader->size = reader->end;
	order->lost = true;
}

/* ---- rounds ---------------------------------------------------------------------- */

static uint64_t age_ns(const struct vf_order *order)
{
	return order->reader.now_ns - order->generations[order->young].began_ns;
}

static bool is_held_up(const struct vf_order *order)
{
	return atomic_load(&order->events->waiting);
}

/* Notes what fanotify says, but a flood elsewhere must not hold up what was read.  True: there may
 * be more. */
static bool read_all_facts(struct vf_order *order)
{
	bool more = true;

	for (uint32_t i = 0; more && i < MAX_READS; i++)
		more = !is_held_up(order) && !vf_facts_are_ahead(order) && vf_facts_read(order) &&
		       !order->events->drained;
	return more;
}

static void tell_all_deferred(struct vf_order *order)
{
	vf_facts_tell_deferred(order, &order->older, NULL);
	vf_facts_tell_deferred(order, &order->newer, NULL);
}

/*
 * Everything that was told is right.  What happened since is lost, up to now, and the guest told
 * so; what happens from now on is right again.  Not while what was read is being looked at.
 */
static void begin_anew(struct vf_order *order)
{
	/* It has its place behind what was told, and is not inotify's to lose. */
	tell_all_deferred(order);
	vf_order_clear(order);
	/* inotify is told first: what is noted here is about what it has, or had. */
	read_all_facts(order);
	tell_all_deferred(order);
	vf_order_clear(order);
	vf_inotify_drop(&order->reader);
	order->full = order->lost = false;
	order->behind_until_ns = vf_now_ns() + BEHIND_LOSS_NS;
	vf_events_report_overflow(order->events);
}

static void grow_old(struct vf_order *order)
{
	struct vf_fact_generation *young = &order->generations[order->young];
	struct vf_fact_generation *old = &order->generations[order->young ^ 1];

	if ((young->empty && old->empty) || age_ns(order) < GENERATION_NS)
		return;
	young->due = order->taken + vf_inotify_waiting(&order->reader);
	if (old->lost)
		vf_facts_forget(order, old);
	else
		vf_facts_tell_unsaid(order, old);
	order->young ^= 1;
	order->used_young = 0;
	vf_facts_empty(order, old);
}

int32_t vf_order_wait_ms(const struct vf_order *order)
{
	if (order && order->older.first)
		return 0;
	return order && order->unsaid ? (int32_t)(GENERATION_NS / 1000000) + 1 : -1;
}

static void note_facts(struct vf_order *order)
{
	bool more = read_all_facts(order);

	if (order->reader.now_ns >= order->behind_until_ns)
		return;
	order->generations[order->young].lost = true;
	if (more)
		order->behind_until_ns = order->reader.now_ns + BEHIND_LOSS_NS;
}

/* May the older facts go?  Not while inotify may say more of what they are about. */
static bool is_through(struct vf_order *order)
{
	const struct vf_fact_generation *old = &order->generations[order->young ^ 1];
	/* It says something again only now and then, and there are too many of them. */
	bool enough = order->n_arenas >= VF_MAX_FACT_ARENAS / 2 && order->used_young >= MANY_YOUNG;

	if (!enough && old->due > order->reader.at + order->reader.size)
		return false;
	return !order->older.first || age_ns(order) >= MAX_GENERATION_NS;
}

/* False: there is nothing to go on with. */
static bool read_once(struct vf_order *order)
{
	int32_t n = vf_inotify_fetch(&order->reader);

	if (n < 0) {
		tell_all_deferred(order);
		vf_order_clear(order);
		vf_events_source_failed(order->events, "reading inotify", -n);
		return false;
	}
	order->waits = 0;
	note_facts(order);
	vf_inotify_take(&order->reader);
	/* These came before inotify was read, and are not behind anything that it said. */
	vf_facts_tell_deferred(order, &order->older, NULL);
	order->older = order->newer;
	if (!order->older.first)
		vf_fact_list_clear(&order->older);
	vf_fact_list_clear(&order->newer);
	if (order->full || order->lost) {
		begin_anew(order);
		return false;
	}
	if (is_through(order))
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
		*vf_begun_slot(order, nodeid) = (struct vf_begun){nodeid, vf_now_ns()};
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
	order->told_late = calloc(1, sizeof(*order->told_late));
	vf_order_clear(order);
	if (!order->reader.buffer || !order->told_late) {
		vf_order_free(order);
		return NULL;
	}
	order->told_late->own = order->told_late->silent = true;
	*error = 0;
	return order;
}

void vf_order_clear(struct vf_order *order)
{
	vf_facts_empty(order, &order->generations[0]);
	vf_facts_empty(order, &order->generations[1]);
	order->unsaid = 0;
	order->at_fact = order->noted;
	order->used_young = 0;
	vf_fact_list_clear(&order->older);
	vf_fact_list_clear(&order->newer);
}

void vf_order_free(struct vf_order *order)
{
	if (!order)
		return;
	vf_order_clear(order);
	free(order->spare);
	free(order->told_late);
	free(order->reader.buffer);
	free(order);
}
