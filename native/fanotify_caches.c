/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a record of fanotify(7) means to what the guest keeps: its caches are told all of it at
 * once, since order does not matter to who only forgets; coherent.c.
 */
#include "fanotify_found.h"

static void tell_caches(struct vf_events *events, const struct vf_fanotify_record *record,
			uint64_t mask, const struct vf_fanotify_object *entry,
			const struct vf_fanotify_places *dirs,
			const struct vf_fanotify_places *objects, uint64_t now_ns)
{
	for (uint32_t i = 0; i < dirs->n; i++) {
		struct vf_change change = {
		    .mask = mask | (record->mask & VF_FS_ISDIR),
		    .dir = dirs->inodes[i],
		    .child = vf_fanotify_on_mount(objects, vf_inode_mount(dirs->inodes[i])),
		    .name = entry->name,
		    .namelen = entry->namelen,
		    .pid = record->pid,
		    .seen_ns = now_ns,
		};

		vf_coherent_tell(events, &change);
	}
}

static void tell_caches_of_objects(struct vf_events *events,
				   const struct vf_fanotify_record *record,
				   const struct vf_fanotify_places *objects,
				   const struct vf_fanotify_places *dirs, uint64_t now_ns)
{
	for (uint32_t i = 0; i < objects->n; i++) {
		struct vf_change change = {
		    .mask = record->mask,
		    .child = objects->inodes[i],
		    .pid = record->pid,
		    .seen_ns = now_ns,
		};

		if (!dirs || !vf_fanotify_on_mount(dirs, vf_inode_mount(change.child)))
			vf_coherent_tell(events, &change);
	}
}

void vf_fanotify_tell_caches(struct vf_events *events, const struct vf_fanotify_record *record,
			     const struct vf_fanotify_found *found, uint64_t now_ns)
{
	bool self = record->dir.there && (!record->dir.name || !strcmp(record->dir.name, "."));
	const struct vf_fanotify_places *dirs = &found->dirs, *objects = &found->objects;

	/* There may be more than were found. */
	if (dirs->n == VF_FANOTIFY_PLACES || found->to.n == VF_FANOTIFY_PLACES ||
	    objects->n == VF_FANOTIFY_PLACES) {
		vf_events_push_overflow(events);
		return;
	}
	if (record->mask & VF_FS_RENAME) {
		/* The new name first: a directory moves there in the guest, with who is in it. */
		tell_caches(events, record, VF_FS_MOVED_TO, &record->new, &found->to, objects,
			    now_ns);
		tell_caches(events, record, VF_FS_MOVED_FROM, &record->old, dirs, objects, now_ns);
		if (!dirs->n && !found->to.n)
			tell_caches_of_objects(events, record, objects, NULL, now_ns);
	} else if (self && !objects->n) {
		tell_caches_of_objects(events, record, dirs, NULL, now_ns);
	} else if (self || !record->dir.there) {
		tell_caches_of_objects(events, record, objects, NULL, now_ns);
	} else {
		tell_caches(events, record, record->mask, &record->dir, dirs, objects, now_ns);
		tell_caches_of_objects(events, record, objects, dirs, now_ns);
	}
}
