/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --cache=coherent: what the guest may keep for as long as it likes, and what
 * of that is no longer right.  docs/protocol.md, "Coherent caches".
 *
 * The rule: a reply may last if every change to what it shows, from before it
 * was looked at on the host, is told.  So the inode must have been in the index
 * of handles by then, below a mark that sees the whole file system, and no
 * event may have been lost for good between that and the reply.  Which of reply
 * and element comes first to the guest does not matter: the driver lets no
 * reply last to a request that it had sent before it took an element about the
 * same object.
 */
#include "events.h"
#include "inode.h"
#include "inode_table.h"

/* ---- what may be kept ----------------------------------------------------------- */

bool vf_told_all(const struct vf_share *share)
{
	return share->events && atomic_load(&share->events->told_all);
}

bool vf_inode_is_told(const struct vf_share *share, const struct vf_inode *inode)
{
	return atomic_load(&inode->indexed) && inode->mount == share->inodes->root->mount;
}

void vf_lasting_begin(struct vf_thread *t)
{
	t->told_all = vf_told_all(t->share);
	if (t->told_all)
		t->n_indexed = atomic_load(&t->share->inodes->n_indexed);
}

bool vf_lasting(const struct vf_thread *t, bool told)
{
	return told && t->told_all && vf_told_all(t->share);
}

/*
 * Another thread may have added the inode to the index after this one looked at the object: what
 * happened in between was found by nobody.  Additions are counted before they can be seen.
 */
bool vf_lasting_is_sure(const struct vf_thread *t)
{
	return atomic_load(&t->share->inodes->n_indexed) == t->n_indexed;
}

/* ---- what is no longer right ------------------------------------------------------ */

static void push(struct vf_events *events, const struct vf_change *change, uint64_t event)
{
	const struct vf_inode *object = change->dir ? change->dir : change->child;
	struct vf_outgoing out = {
	    .element =
		{
		    .nodeid = vf_inode_nodeid(object),
		    .generation = vf_inode_generation(object),
		    .mask = event | (change->mask & VF_FS_ISDIR),
		    .namelen = change->dir ? change->namelen : 0,
		    .flags = VF_FSNOTIFY_CACHES,
		},
	    .name = change->name,
	    .pid = change->pid,
	    .seen_ns = change->seen_ns,
	};

	if (change->dir && change->child) {
		out.element.child_nodeid = vf_inode_nodeid(change->child);
		out.element.child_generation = vf_inode_generation(change->child);
	}
	if (VF_ELEMENT_MIN + out.element.namelen > atomic_load(&events->max_element))
		vf_events_push_overflow(events);
	else
		vf_events_push(events, &out, 1);
}

void vf_coherent_tell(struct vf_events *events, const struct vf_change *change)
{
	/* Each of these is a wish to look again, so of a name that came and went both are told. */
	static const uint64_t of_names[] = {VF_FS_DELETE, VF_FS_MOVED_FROM, VF_FS_CREATE,
					    VF_FS_MOVED_TO};
	const uint64_t of_contents = VF_FS_MODIFY | VF_FS_CLOSE_WRITE;

	for (uint32_t i = 0; change->dir && i < sizeof(of_names) / sizeof(of_names[0]); i++)
		if (change->mask & of_names[i])
			push(events, change, of_names[i]);
	if (!change->child)
		return; /* the guest knows nothing of it */
	/* What was written by a mapping shows when the file is closed. */
	if (change->mask & of_contents)
		push(events, change, VF_FS_MODIFY);
	else if (change->mask &
		 (VF_FS_ATTRIB |
		  (change->dir ? 0 : VF_FS_SELF_EVENTS | VF_FS_ENTRY_EVENTS | VF_FS_RENAME)))
		push(events, change, VF_FS_ATTRIB);
}

/* ---- life --------------------------------------------------------------------------- */

void vf_coherent_begin(struct vf_events *events, uint64_t flags)
{
	bool all = (flags & VF_FSNOTIFY_INVALIDATE) && (flags & VF_FSNOTIFY_CHILD) &&
		   events->share->config.cache_mode == VF_CACHE_COHERENT &&
		   atomic_load(&events->filesystem_mask);

	atomic_store(&events->told_all, all);
}

void vf_coherent_end(struct vf_events *events, const char *why)
{
	if (atomic_exchange(&events->told_all, false) && why)
		vf_events_notice(events,
				 "cache: %s: the guest keeps what it reads from now on for a short "
				 "time only",
				 why);
}
