/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which changes on the host somebody in the guest may care about, and the
 * element that tells of each.  docs/protocol.md has the forms.
 *
 * The server holds a descriptor to what it knows, so the host does not say
 * DELETE_SELF when the last link of a watched object goes: it is said here, at
 * the place in the stream where Linux says it for an object that nobody has
 * open: behind ATTRIB (the link count, files only), ahead of the directory's
 * DELETE; for a replaced object behind both halves of the rename.
 */
#include "events.h"
#include "inode.h"

/* Masks that want this event: MOVED_FROM and MOVED_TO are parts of RENAME. */
static uint64_t wanting(uint64_t event)
{
	return event & (VF_FS_MOVED_FROM | VF_FS_MOVED_TO) ? event | VF_FS_RENAME : event;
}

static bool watched_everywhere(struct vf_events *events, uint64_t event)
{
	return atomic_load_explicit(&events->everywhere, memory_order_relaxed) & wanting(event);
}

static bool watched(struct vf_events *events, const struct vf_inode *inode, uint64_t event)
{
	return inode && (vf_watch_mask(events->watches, inode) & wanting(event));
}

static bool watched_as_child(struct vf_events *events, const struct vf_inode *dir, uint64_t event)
{
	uint64_t mask = dir ? vf_watch_mask(events->watches, dir) : 0;

	return (mask & event) && (mask & VF_FS_EVENT_ON_CHILD);
}

/*
 * What happened to a directory itself, without its parent, which nothing else tells of it. Somebody
 * may watch the parent when anybody watches any directory's children for this.
 */
static bool parent_may_be_watched(struct vf_events *events, uint64_t flags,
				  const struct vf_change *change)
{
	uint64_t mask = vf_watches_union(events->watches);

	/* A driver that does not know the flag tells the parent whatever has no name. */
	if ((flags & VF_FSNOTIFY_PARENT) && !(change->flags & VF_FSNOTIFY_FOR_PARENT))
		return false;
	return !change->dir && (change->mask & VF_FS_ISDIR) && (mask & change->mask) &&
	       (mask & VF_FS_EVENT_ON_CHILD);
}

static bool wanted(struct vf_events *events, uint64_t flags, const struct vf_change *change)
{
	uint64_t event = change->mask & ~VF_FS_ISDIR;

	if (!(atomic_load_explicit(&events->mask, memory_order_relaxed) & wanting(event)))
		return false;
	if (flags & VF_FSNOTIFY_WATCH_ALL)
		return true;
	if (watched_everywhere(events, event))
		return true;
	if (event & VF_FS_ENTRY_EVENTS)
		return watched(events, change->dir, event);
	if (event & VF_FS_SELF_EVENTS)
		return watched(events, change->child, event);
	return watched_as_child(events, change->dir, event) ||
	       watched(events, change->child, event) ||
	       parent_may_be_watched(events, flags, change);
}

/* The element's flags, of those that the session has. */
static uint32_t flags_of(uint64_t flags, const struct vf_change *change)
{
	uint32_t known = flags & VF_FSNOTIFY_RENAME ? VF_FSNOTIFY_SPLIT_RENAME : 0;

	if ((flags & VF_FSNOTIFY_PARENT) && !change->dir && (change->mask & VF_FS_ISDIR) &&
	    (change->mask & VF_FS_CHILD_EVENTS))
		known |= VF_FSNOTIFY_FOR_PARENT;
	return change->flags & known;
}

bool vf_events_is_wanted(struct vf_events *events, const struct vf_change *change)
{
	return wanted(events, atomic_load(&events->flags), change) ||
	       (change->child && vf_inode_is_watched(change->child));
}

static struct vf_outgoing element_of(uint64_t flags, const struct vf_change *change)
{
	const struct vf_inode *object = change->dir ? change->dir : change->child;
	struct vf_outgoing out = {
	    .element =
		{
		    .nodeid = vf_inode_nodeid(object),
		    .generation = vf_inode_generation(object),
		    .mask = change->mask,
		    .namelen = change->dir ? change->namelen : 0,
		    .cookie = change->cookie,
		    .flags = flags_of(flags, change),
		},
	    .name = change->name,
	    .pid = change->pid,
	    .seen_ns = change->seen_ns,
	};

	if (change->dir && change->child && (flags & VF_FSNOTIFY_CHILD)) {
		out.element.child_nodeid = vf_inode_nodeid(change->child);
		out.element.child_generation = vf_inode_generation(change->child);
	}
	return out;
}

static void trace(struct vf_events *events, uint64_t flags, const struct vf_change *change,
		  enum vf_event_fate fate)
{
	struct vf_outgoing out;

	if (!vf_trace_is_on(events->trace))
		return;
	out = element_of(flags | VF_FSNOTIFY_CHILD, change);
	vf_trace_add(events->trace, &out.element, out.name, fate, out.pid);
}

/* ---- the end of a watched object ------------------------------------------------- */

bool vf_events_is_gone(struct vf_events *events, struct vf_inode *inode)
{
	int fd = vf_inode_path_fd(events->share, inode);
	struct statx sx;

	if (fd < 0)
		return fd == -ESTALE;
	return !statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_NLINK, &sx) &&
	       (sx.stx_mask & STATX_NLINK) && !sx.stx_nlink;
}

/* change took a link from its child: was it the last? */
static void report_end(struct vf_events *events, uint64_t flags, const struct vf_change *change)
{
	struct vf_change end = {
	    .mask = VF_FS_DELETE_SELF | (change->mask & VF_FS_ISDIR),
	    .child = change->child,
	    .pid = change->pid,
	    .seen_ns = change->seen_ns,
	};
	bool removed = (change->mask & VF_FS_DELETE) && (change->mask & VF_FS_ISDIR);
	struct vf_outgoing out;

	if (!change->child || change->not_its_end || !wanted(events, flags, &end) ||
	    (!removed && !vf_events_is_gone(events, change->child)) ||
	    !vf_inode_tell_deleted(change->child))
		return;
	out = element_of(flags, &end);
	vf_events_push(events, &out, 1);
}

/* ---- names that do not fit ------------------------------------------------------------- */

static bool fits(struct vf_events *events, const struct vf_outgoing *out)
{
	return VF_ELEMENT_MIN + out->element.namelen <= atomic_load(&events->max_element);
}

/*
 * The guest takes no element as long as this change's, with its name.  Watchers of the object
 * itself need no name; those of its directory are told that something about it was lost.
 */
static void report_nameless(struct vf_events *events, uint64_t flags,
			    const struct vf_change *change)
{
	uint64_t event = change->mask & ~VF_FS_ISDIR;
	bool everywhere = watched_everywhere(events, event);
	struct vf_change own = *change;
	struct vf_outgoing out;

	if ((event & VF_FS_CHILD_EVENTS) && change->child &&
	    (everywhere || watched(events, change->child, event))) {
		own.dir = NULL;
		out = element_of(flags, &own);
		vf_events_push(events, &out, 1);
		if (!everywhere && !watched_as_child(events, change->dir, event))
			return;
	}
	if (!(flags & VF_FSNOTIFY_DIRECTORY_LOSS)) {
		vf_events_push_overflow(events);
		return;
	}
	own = (struct vf_change){.mask = VF_FS_Q_OVERFLOW,
				 .dir = change->dir,
				 .pid = change->pid,
				 .seen_ns = change->seen_ns};
	out = element_of(flags, &own);
	vf_events_push(events, &out, 1);
}

/* ---- names that are gone ------------------------------------------------------------ */

/* Linux tells it to nobody who said IN_EXCL_UNLINK; that is the guest's to do. */
static bool is_unlinked(struct vf_events *events, const struct vf_change *change)
{
	return (change->mask & VF_FS_PATH_EVENTS) &&
	       (change->unlinked || vf_name_is_gone(events, change));
}

/* Of a directory that was removed all has been told. */
static bool is_over(const struct vf_change *change)
{
	return (change->mask & VF_FS_ISDIR) && change->child && !change->not_its_end &&
	       (change->mask & (VF_FS_DELETE | VF_FS_DELETE_SELF));
}

/* ---- reports ------------------------------------------------------------------------ */

void vf_events_report(struct vf_events *events, const struct vf_change *changes, uint32_t n)
{
	uint64_t flags = atomic_load(&events->flags);
	const struct vf_change *source[2];
	struct vf_outgoing out[2];
	uint32_t wanted_n = 0;
	bool all_fit = true;

	if (!flags || n > 2) {
		vf_count_n(&events->unwatched, n);
		return;
	}
	for (uint32_t i = 0; i < n; i++) {
		const struct vf_change *change = &changes[i];

		vf_unlinked_note(events, change);
		if (change->mask & VF_FS_DELETE)
			report_end(events, flags, change);
		if (!wanted(events, flags, change) ||
		    ((change->mask & VF_FS_DELETE_SELF) && !vf_inode_tell_deleted(change->child))) {
			vf_count(&events->unwatched);
			trace(events, flags, change, VF_EVENT_UNWATCHED);
			continue;
		}
		source[wanted_n] = change;
		out[wanted_n] = element_of(flags, change);
		if (is_unlinked(events, change))
			out[wanted_n].element.flags |= VF_FSNOTIFY_UNLINKED;
		all_fit &= fits(events, &out[wanted_n++]);
	}
	if (n == 2 && (wanted_n == 1 || !all_fit)) {
		/* The other half of the rename is not sent. */
		for (uint32_t i = 0; i < wanted_n; i++) {
			out[i].element.flags &= ~VF_FSNOTIFY_SPLIT_RENAME;
			out[i].element.cookie = 0;
		}
	}
	if (wanted_n && all_fit)
		vf_events_push(events, out, wanted_n);
	for (uint32_t i = 0; i < wanted_n && !all_fit; i++) {
		if (fits(events, &out[i]))
			vf_events_push(events, &out[i], 1);
		else
			report_nameless(events, flags, source[i]);
	}
	if (n == 1 && (changes->mask & VF_FS_ATTRIB) && !changes->dir)
		report_end(events, flags, changes);
	if (n == 1 && (changes->mask & VF_FS_CREATE) && changes->child)
		vf_watch_share_tell_unseen(events, changes);
	if (n == 1 && is_over(changes))
		vf_watch_share_removed(events, changes->child);
}

void vf_events_report_rename(struct vf_events *events, struct vf_change changes[2])
{
	if (!++events->last_cookie)
		events->last_cookie = 1;
	for (uint32_t i = 0; i < 2; i++) {
		changes[i].cookie = events->last_cookie;
		changes[i].flags = VF_FSNOTIFY_SPLIT_RENAME;
	}
	vf_events_report(events, changes, 2);
}

void vf_events_trace_own(struct vf_events *events, const struct vf_change *changes, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		vf_unlinked_note(events, &changes[i]);
		trace(events, 0, &changes[i], VF_EVENT_OWN);
	}
}

void vf_events_report_overflow(struct vf_events *events)
{
	vf_count(&events->host_overflows);
	if (atomic_load(&events->flags))
		vf_events_push_overflow(events);
}
