// SPDX-License-Identifier: Apache-2.0
/*
 * Open directories.  Entries are read ahead of the guest into a buffer of the
 * handle's own, so that one getdents64(2) serves many replies; the offsets
 * that the guest sees are the host's.
 *
 * A guest that lists with attributes asks for one reply after the other, and
 * its way to the next takes longer than the reply itself.  So when there is
 * nothing else to do the next one is begun before it is asked for.  It is used
 * only if the guest was shown nothing else since (vf_show()): then the reply is
 * as if the request had come sooner, by VF_AHEAD_MS at most.
 */
#include "core.h"

#include <dirent.h>
#include <sys/syscall.h>

#include "events.h"
#include "file.h"
#include "inode.h"

#define READ_AHEAD (64u * 1024)
/* Bytes of a reply that is begun before it is asked for. */
#define MAX_AHEAD (16u * 1024)
/* And no longer than such a part of the time for which the guest may keep it. */
#define KEPT_PART 100u
/*
 * A directory is not looked into ahead where that may hold up other requests: an entry took so
 * long, or a reply so long for each of its bytes (some 160 for an entry) and that much more.
 */
#define SLOW_ENTRY_NS 50000u
#define SLOW_BYTE_NS 100u

/* What getdents64(2) writes; the C library's struct dirent64 has a fixed-size name. */
struct host_dirent {
	uint64_t ino;
	int64_t off;
	uint16_t reclen;
	uint8_t type;
	char name[];
};

/* How the next reply to READDIRPLUS begins; what it names is counted as looked up by the guest. */
struct ahead {
	uint8_t *reply;	    /* MAX_AHEAD bytes, or NULL */
	uint32_t used;	    /* 0: nothing is there */
	uint32_t n;	    /* entries */
	uint32_t room;	    /* of the last reply, for which the guest will ask again */
	uint32_t begin;	    /* of its first entry, in the buffer */
	int64_t offset;	    /* the same for the guest */
	uint32_t n_shown;   /* vf_n_shown() before anything was looked at */
	uint64_t looked_ns; /* and the time */
	bool off;	    /* it is not worth it here */
};

struct vf_dir {
	pthread_mutex_t lock; /* one READDIR of a handle at a time */
	uint8_t *buffer;
	uint32_t begin, end; /* entries not yet delivered */
	int64_t next;	     /* offset of the first of them */
	int64_t host_next;   /* where the descriptor stands; -1: not known */
	uint64_t root_ino;   /* what ".." of the share's root is shown as; 0: not asked yet */
	struct ahead ahead;
};

struct vf_dir *vf_dir_new(void)
{
	struct vf_dir *dir = calloc(1, sizeof(*dir));

	if (dir)
		pthread_mutex_init(&dir->lock, NULL);
	return dir;
}

/* The buffer is as it was before anything of it was looked up. */
static void undo_ahead(struct vf_share *share, struct vf_dir *dir)
{
	vf_keeps_ahead(share, false);
	dir->begin = dir->ahead.begin;
	dir->next = dir->ahead.offset;
}

/* The guest is not told of it, and so will not forget it. */
static void drop_ahead(struct vf_share *share, struct vf_dir *dir)
{
	struct ahead *ahead = &dir->ahead;
	uint32_t at = 0;

	if (!ahead->used)
		return;
	while (at < ahead->used) {
		const struct fuse_direntplus *d = (const void *)(ahead->reply + at);

		if (d->entry_out.nodeid)
			vf_inode_forget(share, d->entry_out.nodeid, 1);
		at += (uint32_t)FUSE_DIRENTPLUS_SIZE(d);
	}
	ahead->used = 0;
	ahead->off = true;
	undo_ahead(share, dir);
}

static void drop_buffer(struct vf_share *share, struct vf_dir *dir)
{
	if (!dir->buffer)
		return;
	drop_ahead(share, dir);
	free(dir->ahead.reply);
	dir->ahead.reply = NULL;
	free(dir->buffer);
	dir->buffer = NULL;
	dir->begin = dir->end = 0;
	vf_dir_buffer_give(share);
}

void vf_dir_free(struct vf_share *share, struct vf_dir *dir)
{
	drop_buffer(share, dir);
	pthread_mutex_destroy(&dir->lock);
	free(dir);
}

int32_t vf_op_opendir(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const struct fuse_open_in *in = vf_arg(r, sizeof(*in));
	struct fuse_open_out *out = (struct fuse_open_out *)t->reply;
	struct vf_inode *inode;
	bool told;
	int result;

	if (!in)
		return -EINVAL;
	inode = vf_inode_get(share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	told = vf_inode_is_told(share, inode);
	result = vf_inode_type(inode) == S_IFDIR
		     ? vf_inode_open(share, inode, O_RDONLY | O_DIRECTORY)
		     : -ENOTDIR;
	vf_inode_put(share, inode);
	if (result < 0)
		return result;
	result =
	    vf_file_new(share, r->header.nodeid, result, O_RDONLY | O_DIRECTORY, true, &out->fh);
	if (result < 0)
		return result;
	out->open_flags = vf_fopen_flags(share, in->flags, true, vf_lasting(t, told));
	out->padding = 0;
	return sizeof(*out);
}

int32_t vf_op_releasedir(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_release_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int error;

	(void)t;
	if (!in)
		return -EINVAL;
	file = vf_file_get_kind(r->share, r->header.nodeid, in->fh, true);
	if (!file)
		return vf_deferred_is_unopened(r->share, in->fh) ? 0 : -EBADF;
	error = vf_file_release(r->share, file);
	vf_file_put(r->share, file);
	vf_deferred_close(r->share, in->fh);
	return error;
}

/* ---- READDIR and READDIRPLUS -------------------------------------------- */

/* One reply under construction. */
struct listing {
	struct vf_thread *t;
	uint64_t nodeid;
	struct vf_file *file;
	struct vf_dir *dir;
	struct vf_inode *inode; /* READDIRPLUS: the directory; NULL for READDIR */
	uint8_t *out;
	uint32_t used, room;
};

/* Makes dir->next the guest's offset: usually it is where the last reply ended. */
static int seek_to(struct listing *l, int64_t offset)
{
	struct vf_dir *dir = l->dir;

	if (offset < 0)
		return -EINVAL;
	/* Offset 0 is rewinddir(3), which must show what the directory has now. */
	if (offset != dir->next || (offset == 0 && dir->begin < dir->end)) {
		dir->begin = dir->end = 0;
		dir->next = offset;
	}
	if (dir->begin == dir->end && dir->host_next != offset) {
		if (lseek(vf_file_fd(l->file), offset, SEEK_SET) < 0) {
			dir->host_next = -1;
			return -errno;
		}
		dir->host_next = offset;
	}
	return 0;
}

/* Reads entries when none are left.  1: there are some, 0: the end; negative errno. */
static int fill(struct listing *l)
{
	struct vf_dir *dir = l->dir;
	long got;

	if (dir->begin < dir->end)
		return 1;
	do {
		got = syscall(SYS_getdents64, vf_file_fd(l->file), dir->buffer, READ_AHEAD);
	} while (got < 0 && errno == EINTR);
	if (got < 0) {
		dir->host_next = -1;
		return -errno;
	}
	if (got == 0) {
		if (dir->next == 0) /* nothing yet: the next request asks again from the start */
			dir->host_next = -1;
		return 0;
	}
	dir->begin = 0;
	dir->end = (uint32_t)got;
	for (uint32_t at = 0; at < dir->end;) {
		const struct host_dirent *d = (const struct host_dirent *)(dir->buffer + at);

		dir->host_next = d->off;
		at += d->reclen;
	}
	return 1;
}

static bool is_dot(const char *name)
{
	return name[0] == '.' && name[1] == 0;
}

static bool is_dot_dot(const char *name)
{
	return name[0] == '.' && name[1] == '.' && name[2] == 0;
}

/* The number shown for an entry: what lies above the share is not the guest's to know. */
static uint64_t shown_ino(struct listing *l, const struct host_dirent *d)
{
	struct stat st;

	if (l->nodeid != FUSE_ROOT_ID || !is_dot_dot(d->name))
		return d->ino;
	if (!l->dir->root_ino)
		l->dir->root_ino = fstat(vf_file_fd(l->file), &st) == 0 ? st.st_ino : FUSE_ROOT_ID;
	return l->dir->root_ino;
}

/* Appends one entry.  false: it does not fit (and was not looked up). */
static bool emit(struct listing *l, const struct host_dirent *d)
{
	size_t length = strlen(d->name);
	size_t head = l->inode ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;
	size_t size = FUSE_REC_ALIGN(head + length);
	uint32_t type = d->type;
	struct fuse_dirent *out;

	if (size > l->room - l->used)
		return false;
	if (l->inode) {
		struct fuse_entry_out *entry = (struct fuse_entry_out *)(l->out + l->used);
		int error = 0;

		/* A nodeid of 0 says: there is such a name, ask for more if you need it. */
		if (is_dot(d->name) || is_dot_dot(d->name)) {
			memset(entry, 0, sizeof(*entry));
		} else {
			error = vf_inode_lookup_entry(l->t, l->inode, vf_file_fd(l->file), d->name,
						      d->ino, entry);
			if (error)
				memset(entry, 0, sizeof(*entry));
		}
		if (error == -ENOENT) /* removed since it was read */
			return true;
		if (!entry->nodeid) {
			entry->attr.ino = shown_ino(l, d);
			entry->attr.mode = DTTOIF(type);
		} else if (type == DT_UNKNOWN) {
			type = IFTODT(entry->attr.mode);
		}
	}
	out = (struct fuse_dirent *)(l->out + l->used + head - FUSE_NAME_OFFSET);
	out->ino = shown_ino(l, d);
	out->off = (uint64_t)d->off;
	out->namelen = (uint32_t)length;
	out->type = type;
	memcpy(out->name, d->name, length);
	memset(out->name + length, 0, size - head - length);
	l->used += (uint32_t)size;
	return true;
}

/* Appends the next entry of the buffer, which is not empty.  false: it does not fit. */
static bool emit_next(struct listing *l)
{
	struct vf_dir *dir = l->dir;
	const struct host_dirent *d = (const struct host_dirent *)(dir->buffer + dir->begin);

	if (!emit(l, d))
		return false;
	dir->begin += d->reclen;
	dir->next = d->off;
	return true;
}

/*
 * How old the beginning of a reply may be; 0: it must not be begun before it is asked for.  So it
 * is where the guest keeps things until it is told otherwise, which counts from its request.
 */
static uint64_t max_age_ns(const struct vf_share *share)
{
	const struct vf_share_config *config = &share->config;
	uint64_t kept_ns = config->attr_timeout_ns < config->entry_timeout_ns
			       ? config->attr_timeout_ns
			       : config->entry_timeout_ns;
	const uint64_t max_ns = VF_AHEAD_MS * 1000000ull;

	if (config->cache_mode == VF_CACHE_COHERENT)
		return 0;
	return kept_ns / KEPT_PART < max_ns ? kept_ns / KEPT_PART : max_ns;
}

/* Where the guest goes on, if it does. */
static int64_t next_offset(const struct vf_dir *dir)
{
	return dir->ahead.used ? dir->ahead.offset : dir->next;
}

/* True: the reply begins with what was begun before, and the directory is read on behind that. */
static bool use_ahead(struct listing *l, int64_t offset)
{
	struct vf_share *share = l->t->share;
	struct ahead *ahead = &l->dir->ahead;

	if (!ahead->used)
		return false;
	if (!l->inode || offset != ahead->offset || ahead->used > l->room ||
	    vf_n_shown(share) != ahead->n_shown ||
	    vf_now_ns() - ahead->looked_ns > max_age_ns(share)) {
		drop_ahead(share, l->dir);
		return false;
	}
	vf_keeps_ahead(share, false);
	memcpy(l->out, ahead->reply, ahead->used);
	l->used = ahead->used;
	ahead->used = 0;
	atomic_fetch_add_explicit(&share->entries_ahead, ahead->n, memory_order_relaxed);
	return true;
}

static int32_t list(struct listing *l, int64_t offset)
{
	struct vf_dir *dir = l->dir;
	uint8_t *borrowed = NULL;
	int result = 0;

	if (!dir->buffer) {
		uint8_t *memory = malloc(READ_AHEAD);

		if (!memory)
			return -ENOMEM;
		dir->buffer = memory;
		/* Past the limit the buffer is for this request only. */
		if (!vf_dir_buffer_take(l->t->share))
			borrowed = memory;
	}
	if (!use_ahead(l, offset))
		result = seek_to(l, offset);
	while (result >= 0) {
		result = fill(l);
		if (result <= 0)
			break;
		if (!emit_next(l)) {
			/* Not even one: the guest's buffer is smaller than a name may be. */
			if (!l->used)
				result = -EINVAL;
			break;
		}
	}
	if (borrowed) {
		if (dir->begin < dir->end)
			dir->host_next = -1;
		dir->begin = dir->end = 0;
		dir->buffer = NULL;
		free(borrowed);
	} else if (result == 0) {
		drop_buffer(l->t->share, dir);
	}
	/* What was delivered has been counted; an error comes back with the next request. */
	return l->used ? (int32_t)l->used : result < 0 ? result : 0;
}

/* ---- the next reply, before it is asked for -------------------------------- */

/* As many entries as there are in the buffer and is room for, until stop() is true. */
static void look_ahead(struct listing *l, bool (*stop)(const void *), const void *arg)
{
	struct vf_dir *dir = l->dir;
	struct ahead *ahead = &dir->ahead;
	uint64_t before_ns, now_ns;

	/* From the start on it must be what is there when the guest asks: rewinddir(3). */
	if (ahead->used || ahead->off || !dir->buffer || dir->begin == dir->end || !dir->next)
		return;
	/* Whether the guest holds an object that it was told of is asked there (watch_share.c). */
	if (l->t->share->events && atomic_load(&l->t->share->events->everywhere))
		return;
	if (!ahead->reply)
		ahead->reply = malloc(MAX_AHEAD);
	if (!ahead->reply)
		return;
	vf_keeps_ahead(l->t->share, true);
	now_ns = vf_now_ns();
	ahead->n_shown = vf_n_shown(l->t->share);
	ahead->looked_ns = now_ns;
	ahead->offset = dir->next;
	ahead->begin = dir->begin;
	ahead->n = 0;
	l->out = ahead->reply;
	l->room = ahead->room;
	while (dir->begin < dir->end && !ahead->off && !stop(arg) && emit_next(l)) {
		before_ns = now_ns;
		now_ns = vf_now_ns();
		ahead->off = now_ns - before_ns > SLOW_ENTRY_NS;
		ahead->n += ahead->used < l->used;
		ahead->used = l->used;
	}
	l->t->begun = ahead->used;
	if (!ahead->used)
		undo_ahead(l->t->share, dir);
}

/*
 * The directory that this thread has listed last, locked.  NULL: it is not open any more, or
 * another thread lists it, which may take long, and has used or dropped what was begun.
 */
static struct vf_dir *take_listed(struct vf_thread *t, struct vf_file **file)
{
	struct vf_dir *dir = NULL;

	*file = vf_file_get_kind(t->share, t->listed_nodeid, t->listed_fh, true);
	if (*file)
		dir = vf_file_dir(t->share, *file);
	return dir && !pthread_mutex_trylock(&dir->lock) ? dir : NULL;
}

static void give_listed(struct vf_thread *t, struct vf_dir *dir, struct vf_file *file)
{
	if (dir)
		pthread_mutex_unlock(&dir->lock);
	if (file)
		vf_file_put(t->share, file);
}

void vf_dir_look_ahead(struct vf_thread *t, bool (*stop)(const void *), const void *arg)
{
	struct listing l = {.t = t, .nodeid = t->listed_nodeid};

	l.dir = take_listed(t, &l.file);
	l.inode = l.dir ? vf_inode_get(t->share, l.nodeid) : NULL;
	if (l.inode) {
		look_ahead(&l, stop, arg);
		vf_inode_put(t->share, l.inode);
	}
	give_listed(t, l.dir, l.file);
}

void vf_dir_drop_ahead(struct vf_thread *t)
{
	struct vf_file *file;
	struct vf_dir *dir = take_listed(t, &file);

	if (dir)
		drop_ahead(t->share, dir);
	give_listed(t, dir, file);
}

/*
 * A reply was made.  Is another one like it likely to be asked for?  Only of who has asked with
 * attributes before: the guest's kernel begins every listing so, to see what becomes of them.
 */
static void note_listed(struct listing *l, uint64_t fh, uint64_t took_ns)
{
	struct vf_dir *dir = l->dir;

	if (dir->ahead.off || !dir->buffer || dir->begin == dir->end || !max_age_ns(l->t->share))
		return;
	if (took_ns > SLOW_ENTRY_NS + (uint64_t)l->used * SLOW_BYTE_NS) {
		dir->ahead.off = true;
		return;
	}
	dir->ahead.room = l->room < MAX_AHEAD ? l->room : MAX_AHEAD;
	l->t->listed_nodeid = l->nodeid;
	l->t->listed_fh = fh;
}

/* ---- READDIR and READDIRPLUS, the operations -------------------------------- */

static int32_t list_next(struct listing *l, const struct fuse_read_in *in)
{
	struct vf_thread *t = l->t;
	int64_t offset = (int64_t)in->offset;
	bool goes_on = l->inode && offset && offset == next_offset(l->dir);
	uint64_t begun_ns = goes_on ? vf_now_ns() : 0;
	int32_t result = list(l, offset);

	/* It was used or dropped, by this thread or before by another. */
	if (t->listed_nodeid == l->nodeid && t->listed_fh == in->fh)
		t->begun = false;
	if (!t->begun)
		t->listed_nodeid = 0;
	if (goes_on)
		note_listed(l, in->fh, vf_now_ns() - begun_ns);
	return result;
}

static int32_t read_directory(struct vf_thread *t, struct vf_req *r, bool plus)
{
	const struct fuse_read_in *in = vf_arg(r, sizeof(*in));
	struct listing l = {.t = t, .nodeid = r->header.nodeid};
	int32_t result;

	if (!in)
		return -EINVAL;
	if (r->out_size < sizeof(struct fuse_out_header))
		return -EINVAL;
	l.room = r->out_size - (uint32_t)sizeof(struct fuse_out_header);
	if (l.room > in->size)
		l.room = in->size;
	if (l.room > VF_MAX_REPLY)
		l.room = VF_MAX_REPLY;
	result = vf_file_use(r->share, r->header.nodeid, in->fh, VF_DIRECTORY, &l.file);
	if (result)
		return result;
	result = -ENOMEM;
	if (plus) {
		l.inode = vf_inode_get(r->share, r->header.nodeid);
		if (!l.inode) {
			vf_file_put(r->share, l.file);
			return -ESTALE;
		}
	}
	l.dir = vf_file_dir(r->share, l.file);
	l.out = vf_thread_reply(t, l.room);
	if (l.dir && l.out) {
		pthread_mutex_lock(&l.dir->lock);
		result = list_next(&l, in);
		pthread_mutex_unlock(&l.dir->lock);
	}
	if (l.inode)
		vf_inode_put(r->share, l.inode);
	vf_file_put(r->share, l.file);
	return result;
}

int32_t vf_op_readdir(struct vf_thread *t, struct vf_req *r)
{
	return read_directory(t, r, false);
}

int32_t vf_op_readdirplus(struct vf_thread *t, struct vf_req *r)
{
	return read_directory(t, r, true);
}
