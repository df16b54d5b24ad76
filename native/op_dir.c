// SPDX-License-Identifier: Apache-2.0
/*
 * Open directories.  Entries are read ahead of the guest into a buffer of the
 * handle's own, so that one getdents64(2) serves many replies; the offsets
 * that the guest sees are the host's.
 */
#include "core.h"

#include <dirent.h>
#include <sys/syscall.h>

#include "file.h"
#include "inode.h"

#define READ_AHEAD (64u * 1024)

/* What getdents64(2) writes; the C library's struct dirent64 has a fixed-size name. */
struct host_dirent {
	uint64_t ino;
	int64_t off;
	uint16_t reclen;
	uint8_t type;
	char name[];
};

struct vf_dir {
	pthread_mutex_t lock; /* one READDIR of a handle at a time */
	uint8_t *buffer;
	uint32_t begin, end; /* entries not yet delivered */
	int64_t next;	     /* offset of the first of them */
	int64_t host_next;   /* where the descriptor stands; -1: not known */
	uint64_t root_ino;   /* what ".." of the share's root is shown as; 0: not asked yet */
};

struct vf_dir *vf_dir_new(void)
{
	struct vf_dir *dir = calloc(1, sizeof(*dir));

	if (dir)
		pthread_mutex_init(&dir->lock, NULL);
	return dir;
}

static void drop_buffer(struct vf_share *share, struct vf_dir *dir)
{
	if (!dir->buffer)
		return;
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
	struct vf_req *r;
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

	if (l->r->header.nodeid != FUSE_ROOT_ID || !is_dot_dot(d->name))
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

static int32_t list(struct listing *l, int64_t offset)
{
	struct vf_dir *dir = l->dir;
	uint8_t *borrowed = NULL;
	int result;

	if (!dir->buffer) {
		uint8_t *memory = malloc(READ_AHEAD);

		if (!memory)
			return -ENOMEM;
		dir->buffer = memory;
		/* Past the limit the buffer is for this request only. */
		if (!vf_dir_buffer_take(l->r->share))
			borrowed = memory;
	}
	result = seek_to(l, offset);
	while (result >= 0) {
		const struct host_dirent *d;

		result = fill(l);
		if (result <= 0)
			break;
		d = (const struct host_dirent *)(dir->buffer + dir->begin);
		if (!emit(l, d)) {
			/* Not even one: the guest's buffer is smaller than a name may be. */
			if (!l->used)
				result = -EINVAL;
			break;
		}
		dir->begin += d->reclen;
		dir->next = d->off;
	}
	if (borrowed) {
		if (dir->begin < dir->end)
			dir->host_next = -1;
		dir->begin = dir->end = 0;
		dir->buffer = NULL;
		free(borrowed);
	} else if (result == 0) {
		drop_buffer(l->r->share, dir);
	}
	/* What was delivered has been counted; an error comes back with the next request. */
	return l->used ? (int32_t)l->used : result < 0 ? result : 0;
}

static int32_t read_directory(struct vf_thread *t, struct vf_req *r, bool plus)
{
	const struct fuse_read_in *in = vf_arg(r, sizeof(*in));
	struct listing l = {.t = t, .r = r};
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
		result = list(&l, (int64_t)in->offset);
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
