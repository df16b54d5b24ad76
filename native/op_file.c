// SPDX-License-Identifier: Apache-2.0
/*
 * Operations on open regular files.  File data goes between the host's page
 * cache and guest memory in one step, READ and WRITE never copy it.
 */
#include "core.h"

#include <limits.h>
#include <sys/file.h>
#include <sys/vfs.h>

#include "cred.h"
#include "file.h"
#include "inode.h"
#include "proc_name.h"

#ifndef RWF_NOAPPEND
#define RWF_NOAPPEND 0x20 /* Linux 6.9 */
#endif
#define TMPFS_MAGIC 0x01021994
#define RAMFS_MAGIC 0x858458f6
#define FS_PAGE 4096u /* the smallest unit in which a page cache fails or waits */

/* For FLUSH and RELEASE, which open nothing: NULL where nothing is open. */
static struct vf_file *regular_file(const struct vf_req *r, uint64_t fh)
{
	return vf_file_get_kind(r->share, r->header.nodeid, fh, false);
}

static int use_regular(const struct vf_req *r, uint64_t fh, struct vf_file **file)
{
	return vf_file_use(r->share, r->header.nodeid, fh, VF_REGULAR, file);
}

/* ---- OPEN, RELEASE, FLUSH ----------------------------------------------- */

/*
 * CAP_FSETID as the operation needs it.  It stays as it is until another operation of this thread
 * needs it otherwise, since a row of writes by one user is the common case.
 */
static int set_fsetid(struct vf_thread *t, bool kill_suidgid)
{
	return kill_suidgid ? vf_cred_drop_fsetid(t) : vf_cred_need_fsetid(t);
}

static int open_inode(struct vf_thread *t, struct vf_inode *inode, int flags, uint32_t open_flags)
{
	if (flags & O_TRUNC) {
		int error =
		    set_fsetid(t, (open_flags & FUSE_OPEN_KILL_SUIDGID) &&
				      (vf_session_flags(t->share) & FUSE_HANDLE_KILLPRIV_V2));

		if (error)
			return error;
	}
	return vf_inode_open(t->share, inode, flags);
}

int32_t vf_op_open(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const struct fuse_open_in *in = vf_arg(r, sizeof(*in));
	struct fuse_open_out *out = (struct fuse_open_out *)t->reply;
	struct vf_inode *inode;
	int flags, result;
	bool told;

	if (!in)
		return -EINVAL;
	flags = vf_open_flags(share, in->flags);
	if (share->config.readonly && ((in->flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC)))
		return -EROFS;
	inode = vf_inode_get(share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	told = vf_inode_is_told(share, inode);
	switch (vf_inode_type(inode)) {
	case S_IFREG:
		result = open_inode(t, inode, flags, in->open_flags);
		break;
	case S_IFDIR:
		result = -EISDIR;
		break;
	case S_IFLNK:
		result = -ELOOP;
		break;
	default: /* the guest's kernel opens its own */
		result = -ENXIO;
	}
	vf_inode_put(share, inode);
	if (result < 0)
		return result;
	result = vf_file_new(share, r->header.nodeid, result, flags, false, &out->fh);
	if (result < 0)
		return result;
	out->open_flags = vf_fopen_flags(share, in->flags, false, vf_lasting(t, told));
	out->padding = 0;
	return sizeof(*out);
}

int32_t vf_op_release(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_release_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int error;

	(void)t;
	if (!in)
		return -EINVAL;
	file = regular_file(r, in->fh);
	if (!file) {
		if (!vf_deferred_is_unopened(r->share, in->fh))
			return -EBADF;
		if (in->release_flags & FUSE_RELEASE_FLUSH)
			vf_locks_release_owner(r->share, r->header.nodeid, in->lock_owner);
		return 0;
	}
	/* Another request may still hold the descriptor, so closing it is not enough. */
	if (in->release_flags & FUSE_RELEASE_FLOCK_UNLOCK)
		flock(vf_file_fd(file), LOCK_UN);
	/* Without this flag lock_owner is that of flock locks, or nothing. */
	if (in->release_flags & FUSE_RELEASE_FLUSH)
		vf_locks_release_owner(r->share, r->header.nodeid, in->lock_owner);
	error = vf_file_release(r->share, file);
	vf_file_put(r->share, file);
	vf_deferred_close(r->share, in->fh);
	return error;
}

int32_t vf_op_flush(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_flush_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int error = 0;

	(void)t;
	if (!in)
		return -EINVAL;
	file = regular_file(r, in->fh);
	if (!file && !vf_deferred_is_unopened(r->share, in->fh))
		return -EBADF;
	vf_locks_release_owner(r->share, r->header.nodeid, in->lock_owner);
	if (!file)
		return 0;
	/* Network file systems tell of failed writes at close(2), whichever descriptor it is. */
	if ((vf_file_flags(file) & O_ACCMODE) != O_RDONLY) {
		int fd = fcntl(vf_file_fd(file), F_DUPFD_CLOEXEC, 0);

		if (fd >= 0 && close(fd) < 0 && errno != EINTR)
			error = -errno;
	}
	vf_file_put(r->share, file);
	return error;
}

/* ---- READ and WRITE ----------------------------------------------------- */

/*
 * Describes `size` bytes behind the first `skip` of from[], neighbours joined, in at most IOV_MAX
 * entries.  *bytes: how many they hold.  from[] is left as it is: a request may be run twice.
 */
static int slice_iov(const struct iovec *from, uint32_t n_from, size_t skip, size_t size,
		     struct iovec *to, size_t *bytes)
{
	int n = 0;

	*bytes = 0;
	for (uint32_t i = 0; i < n_from && size; i++) {
		char *base = from[i].iov_base;
		size_t len = from[i].iov_len;

		if (skip >= len) {
			skip -= len;
			continue;
		}
		base += skip;
		len -= skip;
		skip = 0;
		if (len > size)
			len = size;
		if (!len)
			continue;
		if (n && (char *)to[n - 1].iov_base + to[n - 1].iov_len == base) {
			to[n - 1].iov_len += len;
		} else {
			if (n == IOV_MAX)
				break;
			to[n++] = (struct iovec){base, len};
		}
		size -= len;
		*bytes += len;
	}
	return n;
}

/*
 * slice_iov(), but from[] itself where what is wanted begins and ends where entries do, as it
 * nearly always does.  In the other case entries are written to to[].
 */
static const struct iovec *cut_iov(const struct iovec *from, uint32_t n_from, size_t total,
				   size_t skip, size_t size, struct iovec *to, int *n,
				   size_t *bytes)
{
	if (skip && n_from && from->iov_len == skip) {
		from++;
		n_from--;
		total -= skip;
		skip = 0;
	}
	if (skip || total != size || n_from > IOV_MAX) {
		*n = slice_iov(from, n_from, skip, size, to, bytes);
		return to;
	}
	*n = (int)n_from;
	*bytes = size;
	return from;
}

/*
 * The guest takes a short READ for the end of the file, so one that ends early for another reason
 * is an error as a whole.
 */
static int32_t read_to_guest(const struct vf_req *r, int fd, uint64_t offset, size_t size,
			     int flags)
{
	struct iovec iov[IOV_MAX];
	size_t done = 0;

	while (done < size) {
		size_t asked;
		int n;
		const struct iovec *to =
		    cut_iov(r->out, r->n_out, r->out_size, sizeof(struct fuse_out_header) + done,
			    size - done, iov, &n, &asked);
		ssize_t got = preadv2(fd, to, n, (off_t)(offset + done), flags);

		if (got < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		done += (size_t)got;
		/* What the page cache lacks, or storage fails to give, begins at a page. */
		if (got == 0 || ((size_t)got < asked && (offset + done) % FS_PAGE))
			break;
	}
	return (int32_t)done;
}

static void find_wait_mode(struct vf_file *file)
{
	struct statfs st;
	bool in_memory = fstatfs(vf_file_fd(file), &st) == 0 &&
			 (st.f_type == TMPFS_MAGIC || st.f_type == RAMFS_MAGIC);

	vf_file_set_wait_mode(file, in_memory ? VF_WAIT_NEVER : VF_WAIT_ALWAYS);
}

/* In a queue's thread only what needs no waiting for storage; VF_TO_POOL otherwise. */
static int32_t read_now(const struct vf_thread *t, const struct vf_req *r, struct vf_file *file,
			uint64_t offset, size_t size)
{
	int fd = vf_file_fd(file);
	int32_t result;

	if (t->may_block)
		return read_to_guest(r, fd, offset, size, 0);
	if (vf_file_flags(file) & O_DIRECT) /* RWF_NOWAIT does not keep it from waiting */
		return VF_TO_POOL;
	if (vf_file_wait_mode(file) == VF_WAIT_UNKNOWN) {
		result = read_to_guest(r, fd, offset, size, RWF_NOWAIT);
		if (result == -EAGAIN)
			return VF_TO_POOL;
		if (result != -EOPNOTSUPP)
			return result;
		find_wait_mode(file);
	}
	if (vf_file_wait_mode(file) == VF_WAIT_ALWAYS)
		return VF_TO_POOL;
	return read_to_guest(r, fd, offset, size, 0);
}

int32_t vf_op_read(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_read_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int32_t result;
	size_t size;

	if (!in || in->offset > INT64_MAX)
		return -EINVAL;
	result = use_regular(r, in->fh, &file);
	if (result)
		return result;
	size = in->size < VF_MAX_IO ? in->size : VF_MAX_IO;
	if (r->out_size < sizeof(struct fuse_out_header))
		size = 0;
	else if (size > r->out_size - sizeof(struct fuse_out_header))
		size = r->out_size - sizeof(struct fuse_out_header);
	result = read_now(t, r, file, in->offset, size);
	vf_file_put(r->share, file);
	if (result > 0)
		r->in_place = true;
	return result;
}

/* As Linux before 6.9 cannot be told to ignore O_APPEND once: through a descriptor without it. */
static ssize_t write_at_reopened(const struct vf_share *share, int fd, const struct iovec *iov,
				 int n, off_t offset)
{
	char name[PROC_NAME_SIZE];
	ssize_t done;
	int plain;

	plain = openat(share->config.proc_fd_dir, proc_name(name, fd), O_WRONLY | O_CLOEXEC);
	if (plain < 0)
		return -1;
	done = pwritev(plain, iov, n, offset);
	if (done < 0) {
		int error = errno;

		close(plain);
		errno = error;
		return -1;
	}
	close(plain);
	return done;
}

/* The guest may have changed O_APPEND since OPEN; pages written back go to their place always. */
static int append_flags(const struct vf_share *share, const struct vf_file *file,
			const struct fuse_write_in *in)
{
	bool opened = vf_file_flags(file) & O_APPEND;
	bool wanted = (in->flags & O_APPEND) && !(in->write_flags & FUSE_WRITE_CACHE) &&
		      !(vf_session_flags(share) & FUSE_WRITEBACK_CACHE);

	return opened == wanted ? 0 : wanted ? RWF_APPEND : RWF_NOAPPEND;
}

static int32_t write_from_guest(const struct vf_req *r, int fd, uint64_t offset, size_t size,
				int flags)
{
	struct iovec iov[IOV_MAX];
	size_t done = 0;

	while (done < size) {
		size_t asked;
		int n;
		const struct iovec *from =
		    cut_iov(r->in, r->n_in, r->in_size, done, size - done, iov, &n, &asked);
		off_t at = (off_t)(offset + done);
		ssize_t put = pwritev2(fd, from, n, at, flags);

		if (put < 0 && errno == EOPNOTSUPP && flags == RWF_NOAPPEND)
			put = write_at_reopened(r->share, fd, from, n, at);
		if (put < 0) {
			if (errno == EINTR)
				continue;
			return done ? (int32_t)done : -errno;
		}
		done += (size_t)put;
		/* A short write has a reason (space, a limit); the next one would say which. */
		if (put == 0)
			break;
	}
	return (int32_t)done;
}

int32_t vf_op_write(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_write_in *in = vf_arg(r, sizeof(*in));
	struct fuse_write_out *out = (struct fuse_write_out *)t->reply;
	struct vf_file *file;
	int32_t result;

	if (!in || in->offset > INT64_MAX || in->size > VF_MAX_IO || in->size != r->in_size)
		return -EINVAL;
	result = use_regular(r, in->fh, &file);
	if (result)
		return result;
	if (!t->may_block && (vf_file_flags(file) & (O_DIRECT | O_SYNC | O_DSYNC)))
		result = VF_TO_POOL;
	else
		result = set_fsetid(t, in->write_flags & FUSE_WRITE_KILL_SUIDGID);
	if (!result)
		result = write_from_guest(r, vf_file_fd(file), in->offset, in->size,
					  append_flags(r->share, file, in));
	vf_file_put(r->share, file);
	if (result < 0)
		return result;
	out->size = (uint32_t)result;
	out->padding = 0;
	return sizeof(*out);
}

/* ---- FSYNC, FALLOCATE, LSEEK, COPY_FILE_RANGE --------------------------- */

int32_t vf_op_fsync(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_fsync_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int32_t result;
	int fd;

	(void)t;
	if (!in)
		return -EINVAL;
	result = use_regular(r, in->fh, &file);
	if (result)
		return result;
	fd = vf_file_fd(file);
	result =
	    (in->fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(fd) : fsync(fd)) < 0 ? -errno : 0;
	vf_file_put(r->share, file);
	return result;
}

int32_t vf_op_fallocate(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_fallocate_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int32_t result;

	if (!in || in->offset > INT64_MAX || in->length > INT64_MAX || in->mode > INT_MAX)
		return -EINVAL;
	/* The guest has dealt with set-id bits; the host must leave them. */
	result = set_fsetid(t, false);
	if (result)
		return result;
	result = use_regular(r, in->fh, &file);
	if (result)
		return result;
	do {
		result = fallocate(vf_file_fd(file), (int)in->mode, (off_t)in->offset,
				   (off_t)in->length) < 0
			     ? -errno
			     : 0;
	} while (result == -EINTR);
	vf_file_put(r->share, file);
	return result;
}

int32_t vf_op_lseek(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_lseek_in *in = vf_arg(r, sizeof(*in));
	struct fuse_lseek_out *out = (struct fuse_lseek_out *)t->reply;
	struct vf_file *file;
	off_t offset;
	int result;

	if (!in)
		return -EINVAL;
	/* SEEK_CUR has no meaning here: the position is the guest's own. */
	if (in->whence != SEEK_SET && in->whence != SEEK_END && in->whence != SEEK_DATA &&
	    in->whence != SEEK_HOLE)
		return -EINVAL;
	result = use_regular(r, in->fh, &file);
	if (result)
		return result;
	/* Nothing else uses the descriptor's position. */
	offset = lseek(vf_file_fd(file), (off_t)in->offset, (int)in->whence);
	if (offset < 0)
		result = -errno;
	vf_file_put(r->share, file);
	if (result)
		return result;
	out->offset = (uint64_t)offset;
	return sizeof(*out);
}

int32_t vf_op_copy_file_range(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_copy_file_range_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *from = NULL, *to = NULL;
	loff_t from_offset, to_offset;
	ssize_t copied = 0;
	int32_t result;

	if (!in || in->flags > UINT_MAX || in->off_in > INT64_MAX || in->off_out > INT64_MAX)
		return -EINVAL;
	result = set_fsetid(t, false);
	if (result)
		return result;
	result = use_regular(r, in->fh_in, &from);
	if (from)
		to = vf_file_get_kind(r->share, in->nodeid_out, in->fh_out, false);
	if (to) {
		/* Both answers can say this much; Linux itself copies less than 2 GiB at once. */
		size_t size = in->len < INT_MAX ? in->len : INT_MAX & ~(FS_PAGE - 1);

		from_offset = (loff_t)in->off_in;
		to_offset = (loff_t)in->off_out;
		do {
			copied = copy_file_range(vf_file_fd(from), &from_offset, vf_file_fd(to),
						 &to_offset, size, (unsigned int)in->flags);
			result = copied < 0 ? -errno : 0;
		} while (result == -EINTR);
		vf_file_put(r->share, to);
	} else if (from) {
		result = -EBADF;
	}
	if (from)
		vf_file_put(r->share, from);
	if (result < 0)
		return result;
	if (r->header.opcode == VF_FUSE_COPY_FILE_RANGE_64) {
		struct vf_fuse_copy_file_range_out *out = (void *)t->reply;

		out->bytes_copied = (uint64_t)copied;
		return sizeof(*out);
	} else {
		struct fuse_write_out *out = (void *)t->reply;

		out->size = (uint32_t)copied;
		out->padding = 0;
		return sizeof(*out);
	}
}
