/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which object a name was last seen to have, for watchers with IN_EXCL_UNLINK:
 * what is written through a name that is gone is not told to them.  inotify
 * asks the dentry with which the file was opened; a record of the host names
 * that by directory and name, and nobody says whether it still means the
 * object.  What came before says so: the events of the directory, in order.
 *
 * Kept while the guest has such a watch, and forgotten with the session: the
 * names that changed last.  Of one that is not there any more, and where it
 * cannot be known which object is meant, the event is told to everybody.  The
 * source's thread only, or under `busy`.
 */
#include "events.h"
#include "name_hash.h"

#define N_WAYS 4u
#define N_SETS 4096u
#define DEPARTURES (VF_FS_DELETE | VF_FS_MOVED_FROM)

struct name {
	uint64_t key;	 /* 0: none */
	uint64_t nodeid; /* of what has the name; 0: not known */
	uint64_t object; /* as vf_change has it; 0: not known */
	bool gone;	 /* nothing has it */
};

struct vf_unlinked {
	struct name sets[N_SETS][N_WAYS]; /* the last that was used is the first */
};

enum match { SAME, ANOTHER, UNCERTAIN };

static uint64_t key_of(const struct vf_change *change)
{
	uint64_t place = change->place ? change->place : vf_inode_nodeid(change->dir);
	uint64_t h = vf_name_hash(place, change->name, change->namelen);

	return h ? h : 1;
}

static enum match compare(const struct name *name, const struct vf_change *change)
{
	uint64_t nodeid = change->child ? vf_inode_nodeid(change->child) : 0;

	if (name->object && change->object)
		return name->object == change->object ? SAME : ANOTHER;
	if (name->nodeid && nodeid)
		return name->nodeid == nodeid ? SAME : ANOTHER;
	return UNCERTAIN;
}

/* The first n of a set move back by one. */
static void move_back(struct name *set, uint32_t n)
{
	for (; n; n--)
		set[n] = set[n - 1];
}

/* The name, now first in its set; NULL: it is not kept. */
static struct name *find(struct vf_unlinked *unlinked, uint64_t key)
{
	struct name *set = unlinked->sets[key % N_SETS], found;

	for (uint32_t i = 0; i < N_WAYS; i++) {
		if (set[i].key != key)
			continue;
		found = set[i];
		move_back(set, i);
		set[0] = found;
		return set;
	}
	return NULL;
}

static struct name *add(struct vf_unlinked *unlinked, uint64_t key)
{
	struct name *set = unlinked->sets[key % N_SETS];

	move_back(set, N_WAYS - 1);
	set[0] = (struct name){.key = key, .gone = true};
	return set;
}

/* Renames are told half by half: an exchanged name has got its other object when it "goes". */
static void depart(struct name *name, const struct vf_change *change)
{
	enum match match = name->gone ? SAME : compare(name, change);

	if (match == UNCERTAIN)
		name->key = 0;
	if (match == SAME)
		*name = (struct name){.key = name->key, .gone = true};
}

static bool has_name(const struct vf_change *change)
{
	return change->namelen && (change->dir || change->place);
}

/* What was made with O_TMPFILE is called # and its inode number, and is by that name nowhere. */
static bool is_of_no_name(const struct vf_change *change)
{
	uint32_t i = 1;

	while (i < change->namelen && change->name[i] >= '0' && change->name[i] <= '9')
		i++;
	return change->name[0] == '#' && i > 1 && i == change->namelen;
}

static bool is_active(struct vf_events *events)
{
	return vf_watches_union(events->watches) & VF_FS_EXCL_UNLINK;
}

void vf_unlinked_note(struct vf_events *events, const struct vf_change *change)
{
	struct name *name;
	uint64_t key;

	if (!(change->mask & VF_FS_ENTRY_EVENTS) || !has_name(change) || !is_active(events))
		return;
	if (!events->unlinked)
		events->unlinked = calloc(1, sizeof(*events->unlinked));
	if (!events->unlinked)
		return;
	key = key_of(change);
	name = find(events->unlinked, key);
	if (change->mask & DEPARTURES) {
		if (name)
			depart(name, change);
		else
			add(events->unlinked, key);
		return;
	}
	/* What is made where nothing was takes the name from nobody. */
	if (!name && ((change->mask & VF_FS_MOVED_TO) || is_of_no_name(change)))
		name = add(events->unlinked, key);
	if (name)
		*name = (struct name){
		    .key = key,
		    .nodeid = change->child ? vf_inode_nodeid(change->child) : 0,
		    .object = change->object,
		};
}

/*
 * What was told last of a name need not have happened last.  That an event is told in vain is
 * better than that it is missed, so the host is asked; where it cannot be known which object the
 * event is of, any that has the name is.
 */
static bool is_there(struct vf_events *events, const struct vf_change *change)
{
	struct vf_share *share = events->share;
	struct vf_inode *inode;
	char buffer[VF_NAME_MAX + 1];
	const char *name;
	uint64_t object;

	if (!change->dir)
		return false;
	name = vf_change_name(change, buffer);
	object = vf_identity_of_name(share, change->dir, name);
	if (change->object || !change->child)
		return object && (!change->object || object == change->object);
	inode = vf_inode_known(share, change->dir, name);
	if (inode)
		vf_inode_put(share, inode);
	return inode == change->child;
}

bool vf_name_is_gone(struct vf_events *events, const struct vf_change *change)
{
	const struct name *name;

	if (!has_name(change) || !is_active(events))
		return false;
	name = events->unlinked ? find(events->unlinked, key_of(change)) : NULL;
	if (!name)
		return is_of_no_name(change) && !is_there(events, change);
	return (name->gone || compare(name, change) == ANOTHER) && !is_there(events, change);
}

bool vf_name_has_changed(struct vf_events *events, const struct vf_change *change)
{
	return has_name(change) && events->unlinked && is_active(events) &&
	       find(events->unlinked, key_of(change));
}

void vf_unlinked_forget(struct vf_events *events)
{
	free(events->unlinked);
	events->unlinked = NULL;
}
