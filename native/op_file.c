/* SPDX-License-Identifier: Apache-2.0 */
/* Operations on open regular files, but READ and WRITE (op_data.c). */
#include "core.h"

#include <limits.h>
#include <sys/file.h>

#include "cred.h"
#include "file.h"
#include "inode.h"

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

static int open_inode(struct vf_thread *t, struct vf_inode *inode, int flags, uint32_t open_flags)
{
	if (flags & O_TRUNC) {
		int error = vf_cred_set_fsetid(
		    t, (open_flags & FUSE_OPEN_KILL_SUIDGID) &&
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

/* ---- FSYNC and FSYNCDIR, FALLOCATE, LSEEK, COPY_FILE_RANGE --------------- */

static int32_t sync_file(const struct vf_req *r, enum vf_file_kind kind)
{
	const struct fuse_fsync_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int32_t result;
	int fd;

	if (!in)
		return -EINVAL;
	result = vf_file_use(r->share, r->header.nodeid, in->fh, kind, &file);
	if (result)
		return result;
	fd = vf_file_fd(file);
	result =
	    (in->fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(fd) : fsync(fd)) < 0 ? -errno : 0;
	vf_file_put(r->share, file);
	return result;
}

int32_t vf_op_fsync(struct vf_thread *t, struct vf_req *r)
{
	(void)t;
	return sync_file(r, VF_REGULAR);
}

int32_t vf_op_fsyncdir(struct vf_thread *t, struct vf_req *r)
{
	(void)t;
	return sync_file(r, VF_DIRECTORY);
}

int32_t vf_op_fallocate(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_fallocate_in *in = vf_arg(r, sizeof(*in));
	struct vf_file *file;
	int32_t result;

	if (!in || in->offset > INT64_MAX || in->length > INT64_MAX || in->mode > INT_MAX)
		return -EINVAL;
	/* The guest has dealt with set-id bits; the host must leave them. */
	result = vf_cred_set_fsetid(t, false);
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
	/* Where it fails, too, there may be more than before. */
	vf_file_written(r->share, file, in->offset + in->length);
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
	result = vf_cred_set_fsetid(t, false);
	if (result)
		return result;
	result = use_regular(r, in->fh_in, &from);
	if (from)
		to = vf_file_get_kind(r->share, in->nodeid_out, in->fh_out, false);
	if (to) {
		/* Both answers can say this much; Linux itself copies less than 2 GiB at once. */
		size_t size = in->len < INT_MAX ? in->len : INT_MAX & ~(VF_FS_PAGE - 1);

		from_offset = (loff_t)in->off_in;
		to_offset = (loff_t)in->off_out;
		do {
			copied = copy_file_range(vf_file_fd(from), &from_offset, vf_file_fd(to),
						 &to_offset, size, (unsigned int)in->flags);
			result = copied < 0 ? -errno : 0;
		} while (result == -EINTR);
		if (!result)
			vf_file_written(r->share, to, in->off_out + (uint64_t)copied);
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
