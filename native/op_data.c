/* SPDX-License-Identifier: Apache-2.0 */
/*
 * READ and WRITE.  File data goes between the host's page cache and guest
 * memory in one step and is never copied here.
 */
#include "core.h"

#include <limits.h>
#include <semaphore.h>
#include <sys/vfs.h>

#include "cred.h"
#include "file.h"
#include "proc_name.h"

#ifndef RWF_NOAPPEND
#define RWF_NOAPPEND 0x20 /* Linux 6.9 */
#endif
#define TMPFS_MAGIC 0x01021994
#define RAMFS_MAGIC 0x858458f6

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
 * Bytes `from` to `to` of what is asked for.  Less, where the file ends there: the guest takes a
 * short READ for that, so one that ends early for another reason is an error as a whole.
 */
static int32_t read_part(const struct vf_req *r, int fd, uint64_t offset, size_t from, size_t to,
			 int flags)
{
	struct iovec iov[IOV_MAX];
	size_t done = from;

	while (done < to) {
		size_t asked;
		int n;
		const struct iovec *into =
		    cut_iov(r->out, r->n_out, r->out_size, sizeof(struct fuse_out_header) + done,
			    to - done, iov, &n, &asked);
		ssize_t got = preadv2(fd, into, n, (off_t)(offset + done), flags);

		if (got < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		done += (size_t)got;
		/* What the page cache lacks, or storage fails to give, begins at a page. */
		if (got == 0 || ((size_t)got < asked && (offset + done) % VF_FS_PAGE))
			break;
	}
	return (int32_t)(done - from);
}

/* ---- one READ by two threads -------------------------------------------- */

/* With less than this the other thread would hardly have begun before all is done. */
#define WORTH_SPLITTING 524288u

/* The end of a READ, which another thread may copy. */
struct rest {
	struct vf_offer offer;
	const struct vf_req *r;
	int fd, flags;
	uint64_t offset;
	size_t from, to;
	int32_t result;
	sem_t done;
};

static void read_rest(struct vf_thread *t, struct vf_offer *offer)
{
	struct rest *rest = vf_container_of(offer, struct rest, offer);

	(void)t;
	rest->result =
	    read_part(rest->r, rest->fd, rest->offset, rest->from, rest->to, rest->flags);
	sem_post(&rest->done);
}

static void wait_for(struct rest *rest)
{
	/* As long as it takes to sleep and to be woken. */
	for (int i = 0; i < 1000; i++) {
		if (!sem_trywait(&rest->done))
			return;
		vf_relax();
	}
	while (sem_wait(&rest->done))
		;
}

static __attribute__((noinline)) int32_t read_split(const struct vf_req *r, int fd, uint64_t offset,
						    size_t size, int flags)
{
	struct vf_pool *pool = r->share->pool;
	struct rest rest = {.r = r, .fd = fd, .flags = flags, .offset = offset, .to = size};
	int32_t result;

	/* More than half, since the other thread begins later; the file's pages stay whole. */
	rest.from = size / 8 * 5;
	rest.from -= (offset + rest.from) % VF_FS_PAGE;
	rest.offer.run = read_rest;
	rest.offer.owner = &rest;
	sem_init(&rest.done, 0, 0);
	if (!vf_pool_offer(pool, &rest.offer))
		rest.from = size;
	result = read_part(r, fd, offset, 0, rest.from, flags);
	if (rest.from < size && !vf_pool_take_back(pool, &rest, UINT64_MAX))
		wait_for(&rest);
	else if (rest.from < size && result == (int32_t)rest.from)
		read_rest(NULL, &rest.offer);
	sem_destroy(&rest.done);
	if (result < (int32_t)rest.from) /* an error, or the file's end */
		return result;
	return rest.result < 0 ? rest.result : result + rest.result;
}

/* Where nothing may be waited for: where there is a pool, that is. */
static int32_t read_to_guest(const struct vf_req *r, int fd, uint64_t offset, size_t size,
			     int flags)
{
	if (size >= WORTH_SPLITTING && r->alone)
		return read_split(r, fd, offset, size, flags);
	return read_part(r, fd, offset, 0, size, flags);
}

/* ---- READ --------------------------------------------------------------- */

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
		return read_part(r, fd, offset, 0, size, 0);
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
	result = vf_file_use(r->share, r->header.nodeid, in->fh, VF_REGULAR, &file);
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

/* ---- WRITE -------------------------------------------------------------- */

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
	result = vf_file_use(r->share, r->header.nodeid, in->fh, VF_REGULAR, &file);
	if (result)
		return result;
	if (!t->may_block && (vf_file_flags(file) & (O_DIRECT | O_SYNC | O_DSYNC)))
		result = VF_TO_POOL;
	else
		result = vf_cred_set_fsetid(t, in->write_flags & FUSE_WRITE_KILL_SUIDGID);
	if (!result)
		result = write_from_guest(r, vf_file_fd(file), in->offset, in->size,
					  append_flags(r->share, file, in));
	if (result > 0)
		vf_file_written(r->share, file, in->offset + (uint64_t)result);
	vf_file_put(r->share, file);
	if (result < 0)
		return result;
	out->size = (uint32_t)result;
	out->padding = 0;
	return sizeof(*out);
}
