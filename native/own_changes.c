/* SPDX-License-Identifier: Apache-2.0 */
/* The server's own changes among inotify's records; see own_changes.h. */
#include <sys/inotify.h>
#include <sys/ioctl.h>

#include "inode.h"
#include "inotify_reader.h"
#include "name_hash.h"
#include "own_changes.h"

/*
 * Operations that run, or whose records were not all looked at yet.  When there are more, those
 * that find no place have their changes told to the guest a second time.
 */
#define MAX_WINDOWS 4096u
#define MAX_KEYS 5u
#define N_BUCKETS 4096u
#define STILL_RUNNING UINT64_MAX
/* Objects to which a change by a name that the guest does not know is compared. */
#define MAX_SUSPECTS 64u
#define N_NAMES 4096u

/* These events on an object, or on a name in a directory. */
struct expected {
	uint64_t key, events;
	uint64_t nodeid;	       /* 0: a name */
	struct expected *next, **link; /* in its bucket */
	struct window *window;
};

/* What an operation may cause. */
struct window {
	uint64_t from, to;
	uint32_t n; /* 0: not in use */
	struct expected expected[MAX_KEYS];
	struct window *next; /* of those that are free, or that have ended */
};

/* By which name the guest last came to an object, and by which before that. */
struct last_name {
	uint64_t nodeid, key, before;
};

struct vf_own_changes {
	pthread_mutex_t lock;
	int fd;
	uint64_t taken;			    /* bytes read from the instance, ever */
	uint64_t passed;		    /* of them, those that were looked at */
	struct window *free;		    /* the last freed first, so that few are ever touched */
	uint32_t used;			    /* no window was ever in use from here on */
	struct window *ended, **last_ended; /* in the order of their ends */
	struct expected *buckets[N_BUCKETS];
	struct window windows[MAX_WINDOWS];
	struct last_name names[N_NAMES]; /* by nodeid; the last that fell there */
};

struct vf_own_changes *vf_own_changes_new(int source_fd)
{
	struct vf_own_changes *own = calloc(1, sizeof(*own));

	if (!own)
		return NULL;
	own->fd = source_fd;
	own->last_ended = &own->ended;
	pthread_mutex_init(&own->lock, NULL);
	return own;
}

void vf_own_changes_free(struct vf_own_changes *own)
{
	if (!own)
		return;
	pthread_mutex_destroy(&own->lock);
	free(own);
}

static uint64_t object_key(uint64_t nodeid)
{
	return nodeid * 0x9e3779b97f4a7c15u;
}

static struct expected **bucket(struct vf_own_changes *own, uint64_t key)
{
	return &own->buckets[(key ^ key >> 32) % N_BUCKETS];
}

/* ---- names of objects ---------------------------------------------------------- */

static struct last_name *last_name(struct vf_own_changes *own, uint64_t nodeid)
{
	return &own->names[(uint32_t)nodeid % N_NAMES];
}

static void note_name(struct vf_own_changes *own, uint64_t nodeid, uint64_t key)
{
	struct last_name *known = last_name(own, nodeid);

	pthread_mutex_lock(&own->lock);
	if (known->nodeid != nodeid)
		*known = (struct last_name){.nodeid = nodeid, .key = key};
	if (known->key != key) {
		known->before = known->key;
		known->key = key;
	}
	pthread_mutex_unlock(&own->lock);
}

/* ---- what an operation causes ----------------------------------------------- */

#define CLOSED (VF_FS_CLOSE_WRITE | VF_FS_CLOSE_NOWRITE)
#define LISTED (VF_FS_OPEN | VF_FS_ACCESS | VF_FS_CLOSE_NOWRITE)
#define MADE (VF_FS_CREATE | VF_FS_ATTRIB | VF_FS_OPEN | CLOSED)
#define GONE (VF_FS_ATTRIB | VF_FS_DELETE_SELF | VF_FS_MOVE_SELF)

static const struct own_op {
	uint64_t object;  /* events on the request's nodeid */
	uint64_t name;	  /* events on the name in that directory */
	uint64_t named;	  /* events on the object that has the name beforehand */
	uint16_t name_at; /* where in the arguments the name begins */
} own_ops[] = {
    [FUSE_SETATTR] = {.object = VF_FS_ATTRIB | VF_FS_MODIFY | VF_FS_ACCESS},
    [FUSE_READ] = {.object = VF_FS_ACCESS},
    [FUSE_READDIR] = {.object = VF_FS_ACCESS},
    [FUSE_READDIRPLUS] = {.object = VF_FS_ACCESS},
    [FUSE_WRITE] = {.object = VF_FS_MODIFY | VF_FS_ATTRIB},
    [FUSE_FALLOCATE] = {.object = VF_FS_MODIFY | VF_FS_ATTRIB},
    [FUSE_COPY_FILE_RANGE] = {.object = VF_FS_ACCESS},
    [VF_FUSE_COPY_FILE_RANGE_64] = {.object = VF_FS_ACCESS},
    [FUSE_OPEN] = {.object = VF_FS_OPEN | VF_FS_MODIFY | VF_FS_ATTRIB | CLOSED},
    [FUSE_OPENDIR] = {.object = VF_FS_OPEN | VF_FS_CLOSE_NOWRITE},
    [FUSE_RELEASE] = {.object = CLOSED},
    [FUSE_RELEASEDIR] = {.object = VF_FS_CLOSE_NOWRITE},
    [FUSE_GETLK] = {.object = VF_FS_OPEN | CLOSED},
    [FUSE_SETLK] = {.object = VF_FS_OPEN | CLOSED},
    [FUSE_SETLKW] = {.object = VF_FS_OPEN | CLOSED},
    [FUSE_SETXATTR] = {.object = VF_FS_ATTRIB},
    [FUSE_REMOVEXATTR] = {.object = VF_FS_ATTRIB},
    [FUSE_CREATE] = {.name = MADE | VF_FS_MODIFY,
		     .named = VF_FS_OPEN | VF_FS_MODIFY | VF_FS_ATTRIB | CLOSED,
		     .name_at = sizeof(struct fuse_create_in)},
    [FUSE_MKNOD] = {.name = MADE, .name_at = sizeof(struct fuse_mknod_in)},
    [FUSE_MKDIR] = {.name = MADE, .name_at = sizeof(struct fuse_mkdir_in)},
    [FUSE_SYMLINK] = {.name = MADE},
    [FUSE_LINK] = {.name = VF_FS_CREATE, .name_at = sizeof(struct fuse_link_in)},
    [FUSE_UNLINK] = {.name = VF_FS_DELETE, .named = GONE},
    [FUSE_RMDIR] = {.name = VF_FS_DELETE, .named = GONE},
    [FUSE_RENAME] = {.name = VF_FS_MOVED_FROM | VF_FS_MOVED_TO,
		     .named = GONE,
		     .name_at = sizeof(struct fuse_rename_in)},
    [FUSE_RENAME2] = {.name = VF_FS_MOVED_FROM | VF_FS_MOVED_TO,
		      .named = GONE,
		      .name_at = sizeof(struct fuse_rename2_in)},
};
#define N_OWN_OPS (sizeof(own_ops) / sizeof(own_ops[0]))

/* Events that the host reports because of what is watched for. */
static uint64_t reported(struct vf_events *events)
{
	uint64_t mask = vf_watches_union(events->watches);

	if (mask & VF_FS_RENAME)
		mask |= VF_FS_MOVED_FROM | VF_FS_MOVED_TO;
	if (mask & VF_FS_DELETE_SELF)
		mask |= VF_FS_ATTRIB;
	return mask;
}

static void add(struct window *w, uint64_t key, uint64_t events, uint64_t nodeid)
{
	if (!events)
		return;
	w->expected[w->n].key = key;
	w->expected[w->n].nodeid = nodeid;
	w->expected[w->n++].events = events;
}

static void add_object(struct window *w, uint64_t nodeid, uint64_t events)
{
	add(w, object_key(nodeid), events, nodeid);
}

/* A name, and the object that has it now: its nodeid, or 0 where that is not known. */
static uint64_t add_name(struct window *w, struct vf_share *share, uint64_t dir_id,
			 const char *name, const struct own_op *op, uint64_t mask)
{
	struct vf_inode *dir = NULL, *named = NULL;
	uint64_t nodeid = 0;

	add(w, vf_name_hash(dir_id, name, (uint32_t)strlen(name)), op->name & mask, 0);
	if (!(op->named & mask) || vf_check_name(name))
		return 0;
	dir = vf_inode_get(share, dir_id);
	if (dir)
		named = vf_inode_known(share, dir, name);
	if (named) {
		nodeid = vf_inode_nodeid(named);
		add_object(w, nodeid, op->named & mask);
		vf_inode_put(share, named);
	}
	if (dir)
		vf_inode_put(share, dir);
	return nodeid;
}

/* The ids that the arguments of three operations begin with. */
static uint64_t other_id(const struct vf_req *r)
{
	const struct fuse_copy_file_range_in *copy = vf_arg(r, sizeof(*copy));
	const uint64_t *first = vf_arg(r, sizeof(*first));

	switch (r->header.opcode) {
	case FUSE_LINK:
	case FUSE_RENAME:
	case FUSE_RENAME2:
		return first ? *first : 0;
	case FUSE_COPY_FILE_RANGE:
	case VF_FUSE_COPY_FILE_RANGE_64:
		return copy ? copy->nodeid_out : 0;
	default:
		return 0;
	}
}

static void foresee(struct vf_own_changes *own, struct window *w, const struct vf_req *r,
		    const struct own_op *op, uint64_t mask)
{
	uint64_t dir = r->header.nodeid, other = other_id(r), renamed = 0;
	const char *name = op->name ? vf_arg_string(r, op->name_at, NULL) : NULL;
	uint32_t next = op->name_at;

	add_object(w, r->header.nodeid, op->object & mask);
	switch (r->header.opcode) {
	case FUSE_LINK:
		add_object(w, other, VF_FS_ATTRIB & mask);
		break;
	case FUSE_COPY_FILE_RANGE:
	case VF_FUSE_COPY_FILE_RANGE_64:
		add_object(w, other, (VF_FS_MODIFY | VF_FS_ATTRIB) & mask);
		break;
	case FUSE_RENAME:
	case FUSE_RENAME2:
		name = vf_arg_string(r, next, &next);
		if (name)
			renamed = add_name(w, r->share, dir, name, op, mask);
		name = name ? vf_arg_string(r, next, NULL) : NULL;
		dir = other;
		break;
	default:
		break;
	}
	if (!name)
		return;
	add_name(w, r->share, dir, name, op, mask);
	if (renamed)
		note_name(own, renamed, vf_name_hash(dir, name, (uint32_t)strlen(name)));
}

/* ---- windows in the stream ----------------------------------------------------- */

/* The lock is held; NULL: all are in use. */
static struct window *new_window(struct vf_own_changes *own, const struct window *made)
{
	struct window *w = own->free;

	if (w)
		own->free = w->next;
	else if (own->used < MAX_WINDOWS)
		w = &own->windows[own->used++];
	else
		return NULL;
	*w = *made;
	for (uint32_t i = 0; i < w->n; i++) {
		struct expected *e = &w->expected[i];

		e->window = w;
		e->link = bucket(own, e->key);
		e->next = *e->link;
		if (e->next)
			e->next->link = &e->next;
		*e->link = e;
	}
	return w;
}

static void drop_window(struct vf_own_changes *own, struct window *w)
{
	for (uint32_t i = 0; i < w->n; i++) {
		struct expected *e = &w->expected[i];

		*e->link = e->next;
		if (e->next)
			e->next->link = e->link;
	}
	w->n = 0;
	w->next = own->free;
	own->free = w;
}

static struct vf_own_window *begin(struct vf_own_changes *own, struct window *made)
{
	struct window *w;

	pthread_mutex_lock(&own->lock);
	made->from = own->taken;
	made->to = STILL_RUNNING;
	w = new_window(own, made);
	pthread_mutex_unlock(&own->lock);
	return (struct vf_own_window *)w;
}

struct vf_own_window *vf_own_changes_begin_listing(struct vf_own_changes *own,
						   const struct vf_inode *dir)
{
	struct window made = {.n = 0};

	add_object(&made, vf_inode_nodeid(dir), LISTED);
	return begin(own, &made);
}

struct vf_own_window *vf_own_changes_begin(struct vf_events *events, struct vf_own_changes *own,
					   const struct vf_req *r)
{
	struct window made;
	const struct own_op *op;
	uint64_t mask;

	if (r->header.opcode >= N_OWN_OPS)
		return NULL;
	op = &own_ops[r->header.opcode];
	mask = reported(events);
	if (!((op->object | op->name | op->named) & mask))
		return NULL;
	made.n = 0;
	foresee(own, &made, r, op, mask);
	return made.n ? begin(own, &made) : NULL;
}

void vf_own_changes_name(struct vf_own_changes *own, const struct vf_req *r, uint64_t nodeid)
{
	const char *name = NULL;

	switch (r->header.opcode) {
	case FUSE_LOOKUP:
	case FUSE_CREATE:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_SYMLINK:
	case FUSE_LINK:
		name = vf_arg_string(r, own_ops[r->header.opcode].name_at, NULL);
		break;
	default:
		break;
	}
	if (name)
		note_name(own, nodeid,
			  vf_name_hash(r->header.nodeid, name, (uint32_t)strlen(name)));
}

void vf_own_changes_end(struct vf_own_changes *own, struct vf_own_window *window)
{
	struct window *w = (struct window *)window;
	int waiting = 0;

	pthread_mutex_lock(&own->lock);
	/* Never fails for inotify; what waits is in whole records. */
	if (ioctl(own->fd, FIONREAD, &waiting))
		waiting = 0;
	w->to = own->taken + (uint64_t)waiting;
	w->next = NULL;
	if (w->to <= own->passed) {
		/* It caused nothing, or what it caused has been looked at. */
		drop_window(own, w);
	} else {
		*own->last_ended = w;
		own->last_ended = &w->next;
	}
	pthread_mutex_unlock(&own->lock);
}

ssize_t vf_own_changes_read(struct vf_own_changes *own, void *buffer, size_t size, uint64_t *at)
{
	ssize_t n;

	/* Under the lock, so that taken and what waits belong together. */
	pthread_mutex_lock(&own->lock);
	*at = own->taken;
	n = read(own->fd, buffer, size);
	if (n > 0)
		own->taken += (uint64_t)n;
	pthread_mutex_unlock(&own->lock);
	return n;
}

static bool covers(const struct window *w, uint64_t at)
{
	return w->n && at >= w->from && at < w->to;
}

static bool is_expected(struct vf_own_changes *own, uint64_t at, uint64_t key, uint64_t event)
{
	for (const struct expected *e = *bucket(own, key); e; e = e->next)
		if (e->key == key && (e->events & event) && covers(e->window, at))
			return true;
	return false;
}

/* Was anything of this name renamed by an operation of late? */
static bool is_renamed(struct vf_own_changes *own, uint64_t key)
{
	for (const struct expected *e = *bucket(own, key); e; e = e->next)
		if (e->key == key && (e->events & VF_FS_MOVED_FROM))
			return true;
	return false;
}

/*
 * Something happened by a name (key) of whose object the guest holds nothing, or nothing any
 * longer: the objects to which an operation did the same at that time and whose names are not
 * known.  MAX_SUSPECTS + 1: there are more.  *found: it was one that had this name, or may have,
 * since something of that name was renamed.
 */
static uint32_t find_suspects(struct vf_own_changes *own, uint64_t at, uint64_t event, uint64_t key,
			      uint64_t nodeids[MAX_SUSPECTS], bool *found)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < own->used; i++) {
		const struct window *w = &own->windows[i];

		for (uint32_t k = 0; covers(w, at) && k < w->n; k++) {
			uint64_t nodeid = w->expected[k].nodeid;
			const struct last_name *known = last_name(own, nodeid);

			if (!(w->expected[k].events & event) || !nodeid)
				continue;
			if (known->nodeid == nodeid) {
				*found |= known->key == key || known->before == key ||
					  is_renamed(own, key);
				continue;
			}
			if (n == MAX_SUSPECTS)
				return n + 1;
			nodeids[n++] = nodeid;
		}
	}
	return n;
}

bool vf_own_changes_is(struct vf_own_changes *own, struct vf_share *share, uint64_t at,
		       const struct vf_change *change)
{
	uint64_t event = change->mask & ~VF_FS_ISDIR, key = 0, suspects[MAX_SUSPECTS];
	char name[VF_NAME_MAX + 1];
	uint32_t n_suspects = 0;
	bool found = false;

	if (change->dir)
		key = vf_name_hash(vf_inode_nodeid(change->dir), change->name, change->namelen);
	pthread_mutex_lock(&own->lock);
	if (change->child)
		found = is_expected(own, at, object_key(vf_inode_nodeid(change->child)), event);
	if (!found && change->dir)
		found = is_expected(own, at, key, event);
	if (!found && !change->child && (event & VF_FS_CHILD_EVENTS)) {
		n_suspects = find_suspects(own, at, event, key, suspects, &found);
		found |= n_suspects && is_renamed(own, key);
	}
	pthread_mutex_unlock(&own->lock);
	if (found || !n_suspects)
		return found;
	return n_suspects > MAX_SUSPECTS ||
	       vf_inode_may_have_had_name(share, change->dir, vf_change_name(change, name),
					  suspects, n_suspects);
}

void vf_own_changes_pass(struct vf_own_changes *own, uint64_t at)
{
	pthread_mutex_lock(&own->lock);
	own->passed = at;
	while (own->ended && own->ended->to <= at) {
		struct window *w = own->ended;

		own->ended = w->next;
		if (!own->ended)
			own->last_ended = &own->ended;
		drop_window(own, w);
	}
	pthread_mutex_unlock(&own->lock);
}
