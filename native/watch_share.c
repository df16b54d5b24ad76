/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A watch on everything that the guest holds of the share: what a mark of
 * fanotify's on a file system in the guest wants.  events.h.
 *
 * Where the host's source sees all there is nothing to ask of it.  Where it
 * does not, every directory that the guest holds is marked as if it were
 * watched, from the moment it is held, and its files are seen through it.
 *
 * The guest walks the share, so it holds all directories but the newest.
 * Those the server holds itself, until the guest has heard of them.
 */
#include <dirent.h>

#include "events.h"
#include "inode.h"
#include "own_changes.h"

/* Directories that are held for the guest: the newest. */
#define MAX_ANNOUNCED 16384u
/* Entries that are told of one directory that was made, those below included. */
#define MAX_UNSEEN 10000u
#define MAX_UNSEEN_DEPTH 64u

struct vf_announced {
	pthread_mutex_t lock;
	uint32_t next;
	uint64_t nodeids[MAX_ANNOUNCED];
};

/* ---- marks, where the source needs them ------------------------------------- */

uint64_t vf_watch_share_part(struct vf_events *events, const struct vf_inode *inode, bool single)
{
	uint64_t mask = atomic_load_explicit(&events->everywhere, memory_order_relaxed);

	if (!mask || vf_inode_type(inode) != S_IFDIR)
		return 0;
	if (events->ops->covered && !single)
		mask &= ~events->ops->covered(events, inode);
	return vf_watch_known(mask | VF_FS_EVENT_ON_CHILD);
}

/* A directory without its mark: who watches it is not told, but people are, once. */
static void say_unmarked(struct vf_events *events, int error)
{
	if (error != -ENOSPC || events->unmarked_said)
		return;
	events->unmarked_said = true;
	vf_events_notice(events,
			 "the guest watches the whole share, in which there are too many "
			 "directories for --max-watches=%u or the host's own limit: what "
			 "happens in some is not told",
			 events->config.max_watches);
}

static int update(struct vf_events *events, struct vf_inode *inode)
{
	int error = vf_watch_update(events->watches, inode);

	if (error)
		say_unmarked(events, error);
	return error;
}

void vf_watch_share_new_directory(struct vf_events *events, struct vf_inode *dir)
{
	if (atomic_load(&events->everywhere) && vf_watch_share_part(events, dir, false))
		update(events, dir);
}

static int update_all(struct vf_events *events)
{
	struct vf_share *share = events->share;
	uint32_t slots = vf_inode_slots(share);
	int error = 0, failed;

	for (uint32_t slot = 1; slot < slots; slot++) {
		struct vf_inode *inode = vf_inode_in_slot(share, (int32_t)slot);

		if (!inode)
			continue;
		failed = vf_inode_type(inode) == S_IFDIR ? update(events, inode) : 0;
		if (vf_inode_nodeid(inode) == FUSE_ROOT_ID)
			error = failed;
		vf_inode_put(share, inode);
	}
	return error;
}

/* ---- directories that the guest is about to hear of ---------------------------- */

int vf_watch_share_init(struct vf_events *events)
{
	events->announced = calloc(1, sizeof(*events->announced));
	if (!events->announced)
		return -ENOMEM;
	pthread_mutex_init(&events->announced->lock, NULL);
	return 0;
}

/* It has been held long enough.  A guest that has not come for it yet misses something. */
static void give_up(struct vf_events *events, uint64_t nodeid)
{
	struct vf_inode *inode = nodeid ? vf_inode_get(events->share, nodeid) : NULL;
	bool waited_for;

	if (!inode)
		return;
	waited_for =
	    vf_inode_is_held_once(events->share, inode) && !vf_events_is_gone(events, inode);
	vf_inode_forget(events->share, nodeid, 1);
	vf_inode_put(events->share, inode);
	if (waited_for && atomic_load(&events->everywhere))
		vf_events_push_overflow(events);
}

static void keep(struct vf_events *events, uint64_t nodeid)
{
	struct vf_announced *announced = events->announced;
	uint64_t oldest;

	pthread_mutex_lock(&announced->lock);
	oldest = announced->nodeids[announced->next];
	announced->nodeids[announced->next] = nodeid;
	announced->next = (announced->next + 1) % MAX_ANNOUNCED;
	pthread_mutex_unlock(&announced->lock);
	give_up(events, oldest);
}

void vf_watch_share_removed(struct vf_events *events, struct vf_inode *dir)
{
	struct vf_announced *announced = events->announced;
	uint64_t nodeid = vf_inode_nodeid(dir);
	bool held = false;

	if (!announced || !atomic_load(&events->everywhere))
		return;
	pthread_mutex_lock(&announced->lock);
	for (uint32_t i = 0; !held && i < MAX_ANNOUNCED; i++) {
		uint64_t *newest = &announced->nodeids[(announced->next - 1 - i) % MAX_ANNOUNCED];

		held = *newest == nodeid;
		if (held)
			*newest = 0;
	}
	pthread_mutex_unlock(&announced->lock);
	if (held)
		vf_inode_forget(events->share, nodeid, 1);
}

static void give_all_up(struct vf_events *events)
{
	struct vf_announced *announced = events->announced;

	for (uint32_t i = 0; announced && i < MAX_ANNOUNCED; i++) {
		uint64_t nodeid;

		pthread_mutex_lock(&announced->lock);
		nodeid = announced->nodeids[i];
		announced->nodeids[i] = 0;
		pthread_mutex_unlock(&announced->lock);
		give_up(events, nodeid);
	}
}

struct vf_inode *vf_watch_share_announce(struct vf_events *events, struct vf_inode *dir,
					 const char *name, uint32_t namelen)
{
	struct vf_share *share = events->share;
	char text[VF_NAME_MAX + 1];
	struct vf_inode *inode;
	uint64_t nodeid;

	if (!atomic_load_explicit(&events->everywhere, memory_order_relaxed) || !namelen ||
	    namelen > VF_NAME_MAX)
		return NULL;
	memcpy(text, name, namelen);
	text[namelen] = 0;
	if (vf_inode_hold_directory(share, dir, text, &nodeid))
		return NULL;
	inode = vf_inode_get(share, nodeid);
	keep(events, nodeid);
	if (inode && vf_watch_share_part(events, inode, false))
		vf_inode_set_unseen(inode);
	return inode;
}

static void tell_entry(struct vf_events *events, struct vf_inode *dir, const struct vf_change *made,
		       const struct dirent *entry, int dir_fd)
{
	static const uint64_t written[] = {VF_FS_MODIFY, VF_FS_CLOSE_WRITE};
	struct vf_change change = {
	    .mask = VF_FS_CREATE,
	    .dir = dir,
	    .name = entry->d_name,
	    .namelen = (uint32_t)strlen(entry->d_name),
	    .seen_ns = made->seen_ns,
	};
	struct stat st;

	if (fstatat(dir_fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW))
		return;
	if (S_ISDIR(st.st_mode)) {
		change.mask |= VF_FS_ISDIR;
		change.child = vf_watch_share_announce(events, dir, change.name, change.namelen);
	}
	vf_events_report(events, &change, 1);
	if (change.child)
		vf_inode_put(events->share, change.child);
	for (uint32_t i = 0; S_ISREG(st.st_mode) && st.st_size && i < 2; i++) {
		change.mask = written[i];
		vf_events_report(events, &change, 1);
	}
}

void vf_watch_share_tell_unseen(struct vf_events *events, const struct vf_change *made)
{
	struct vf_own_changes *own = events->own_changes;
	struct vf_own_window *noted;
	struct dirent *entry;
	DIR *dir;
	int fd;

	if (!vf_inode_take_unseen(made->child))
		return;
	if (!events->unseen_depth)
		events->unseen_left = MAX_UNSEEN;
	/* More than can be told here: the guest looks for itself. */
	if (events->unseen_depth == MAX_UNSEEN_DEPTH)
		events->unseen_left = 0;
	noted = own ? vf_own_changes_begin_listing(own, made->child) : NULL;
	fd = events->unseen_left ? vf_inode_open(events->share, made->child, O_RDONLY | O_DIRECTORY)
				 : -1;
	dir = fd < 0 ? NULL : fdopendir(fd);
	if (!dir && fd >= 0)
		close(fd);
	events->unseen_depth++;
	while (dir && events->unseen_left && atomic_load(&events->flags) &&
	       (entry = readdir(dir))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (--events->unseen_left)
			tell_entry(events, made->child, made, entry, fd);
	}
	events->unseen_depth--;
	if (dir)
		closedir(dir);
	if (noted)
		vf_own_changes_end(own, noted);
	if (!events->unseen_depth && !events->unseen_left)
		vf_events_push_overflow(events);
}

/* ---- the watch ------------------------------------------------------------------- */

int vf_watch_share(struct vf_events *events, uint64_t mask)
{
	uint64_t before = atomic_load(&events->everywhere);
	int error;

	mask = vf_watch_known(mask);
	if (mask)
		mask |= VF_FS_EVENT_ON_CHILD;
	atomic_store(&events->everywhere, mask);
	error = update_all(events);
	if (error) {
		atomic_store(&events->everywhere, before);
		update_all(events);
	}
	if (!atomic_load(&events->everywhere))
		give_all_up(events);
	return error;
}

void vf_watch_share_renew(struct vf_events *events)
{
	update_all(events);
}

void vf_watch_share_end(struct vf_events *events)
{
	atomic_store(&events->everywhere, 0);
	events->unmarked_said = false;
	give_all_up(events);
}

void vf_watch_share_free(struct vf_events *events)
{
	if (events->announced)
		pthread_mutex_destroy(&events->announced->lock);
	free(events->announced);
}
