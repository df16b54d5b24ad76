/* SPDX-License-Identifier: Apache-2.0 */
/* Operations on the attributes of an object. */
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "attr.h"
#include "cred.h"
#include "file.h"
#include "proc_name.h"

/* What a request is about: an inode, and an open file of it when it names one. */
struct object {
	struct vf_inode *inode; /* NULL when the file alone will do */
	struct vf_file *file;	/* NULL: none was named */
	int fd;			/* of the file, or an O_PATH one of the inode */
};

static void object_put(struct vf_share *share, const struct object *o)
{
	if (o->file)
		vf_file_put(share, o->file);
	if (o->inode)
		vf_inode_put(share, o->inode);
}

/* By fh when by_file; an object that an open file leads to needs no inode for its attributes. */
static int object_get(const struct vf_req *r, bool by_file, uint64_t fh, struct object *o)
{
	*o = (struct object){.fd = -1};
	if (by_file) {
		o->file = vf_file_get(r->share, r->header.nodeid, fh);
		if (o->file) {
			o->fd = vf_file_fd(o->file);
			return 0;
		}
		if (!vf_deferred_is_unopened(r->share, fh))
			return -EBADF;
	}
	o->inode = vf_inode_get(r->share, r->header.nodeid);
	if (!o->inode)
		return -ESTALE;
	o->fd = vf_inode_path_fd(r->share, o->inode);
	if (o->fd >= 0)
		return 0;
	vf_inode_put(r->share, o->inode);
	return o->fd;
}

/* ---- GETATTR, STATX ----------------------------------------------------- */

/* Will the guest be told of changes to what is looked at from now on? */
static bool is_told(const struct vf_req *r, const struct object *o)
{
	struct vf_inode *inode;
	bool told;

	if (!vf_told_all(r->share))
		return false;
	if (o->inode)
		return vf_inode_is_told(r->share, o->inode);
	inode = vf_inode_get(r->share, r->header.nodeid);
	told = inode && vf_inode_is_told(r->share, inode);
	if (inode)
		vf_inode_put(r->share, inode);
	return told;
}

static uint64_t attr_timeout_ns(const struct vf_thread *t, bool told)
{
	const struct vf_share_config *config = &t->share->config;

	return vf_lasting(t, told) ? config->lasting_timeout_ns : config->attr_timeout_ns;
}

static int32_t reply_attr(struct vf_thread *t, const struct vf_req *r, const struct object *o)
{
	struct fuse_attr_out *out = (struct fuse_attr_out *)t->reply;
	bool told = is_told(r, o);
	struct stat st;

	if (fstat(o->fd, &st))
		return -errno;
	vf_split_ns(attr_timeout_ns(t, told), &out->attr_valid, &out->attr_valid_nsec);
	out->dummy = 0;
	vf_fill_attr(t->share, &st, &out->attr);
	if (o->inode)
		vf_inode_note_blocks(o->inode, (uint64_t)st.st_blocks);
	return sizeof(*out);
}

int32_t vf_op_getattr(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_getattr_in *in = vf_arg(r, sizeof(*in));
	struct object o;
	int32_t result;

	if (!in)
		return -EINVAL;
	result = object_get(r, in->getattr_flags & FUSE_GETATTR_FH, in->fh, &o);
	if (result)
		return result;
	result = reply_attr(t, r, &o);
	object_put(r->share, &o);
	return result;
}

static void fill_time(struct vf_fuse_sx_time *to, const struct statx_timestamp *from)
{
	to->tv_sec = from->tv_sec;
	to->tv_nsec = from->tv_nsec;
	to->reserved = 0;
}

/* What FUSE_STATX carries; what the host's mount is, is not the guest's business. */
#define GUEST_STATX_MASK (STATX_BASIC_STATS | STATX_BTIME)
#define GUEST_STATX_ATTRIBUTES                                                                     \
	(STATX_ATTR_COMPRESSED | STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND | STATX_ATTR_NODUMP |    \
	 STATX_ATTR_ENCRYPTED | STATX_ATTR_VERITY)

static void fill_statx(struct vf_share *share, const struct statx *sx, struct vf_fuse_statx *out)
{
	out->mask = sx->stx_mask & GUEST_STATX_MASK;
	out->blksize = sx->stx_blksize;
	out->attributes = sx->stx_attributes & GUEST_STATX_ATTRIBUTES;
	out->attributes_mask = sx->stx_attributes_mask & GUEST_STATX_ATTRIBUTES;
	out->nlink = sx->stx_nlink;
	out->uid = vf_guest_uid(share, sx->stx_uid);
	out->gid = vf_guest_gid(share, sx->stx_gid);
	out->mode = sx->stx_mode;
	out->ino = sx->stx_ino;
	out->size = sx->stx_size;
	out->blocks = sx->stx_blocks;
	fill_time(&out->atime, &sx->stx_atime);
	if (out->mask & STATX_BTIME)
		fill_time(&out->btime, &sx->stx_btime);
	fill_time(&out->ctime, &sx->stx_ctime);
	fill_time(&out->mtime, &sx->stx_mtime);
	out->rdev_major = sx->stx_rdev_major;
	out->rdev_minor = sx->stx_rdev_minor;
	out->dev_major = sx->stx_dev_major;
	out->dev_minor = sx->stx_dev_minor;
}

int32_t vf_op_statx(struct vf_thread *t, struct vf_req *r)
{
	const struct vf_fuse_statx_in *in = vf_arg(r, sizeof(*in));
	struct vf_fuse_statx_out *out = (struct vf_fuse_statx_out *)t->reply;
	struct object o;
	struct statx sx;
	int error;
	bool told;

	if (!in)
		return -EINVAL;
	error = object_get(r, in->getattr_flags & FUSE_GETATTR_FH, in->fh, &o);
	if (error)
		return error;
	told = is_told(r, &o);
	/* The guest's kernel believes the basic ones in any case, so they are always asked for. */
	error =
	    statx(o.fd, "",
		  AT_EMPTY_PATH | ((int)in->sx_flags & (AT_STATX_FORCE_SYNC | AT_STATX_DONT_SYNC)),
		  STATX_BASIC_STATS | (in->sx_mask & GUEST_STATX_MASK), &sx)
		? -errno
		: 0;
	object_put(r->share, &o);
	if (error)
		return error;
	memset(out, 0, sizeof(*out));
	vf_split_ns(attr_timeout_ns(t, told), &out->attr_valid, &out->attr_valid_nsec);
	fill_statx(r->share, &sx, &out->stat);
	return sizeof(*out);
}

/* ---- SETATTR ------------------------------------------------------------ */

static int change_mode(struct vf_thread *t, const struct object *o, uint32_t mode)
{
	char number[PROC_NAME_SIZE];
	int error = vf_cred_need_fsetid(t);

	if (error)
		return error;
	if (o->file)
		return fchmod(o->fd, mode & 07777) ? -errno : 0;
	return fchmodat(t->share->config.proc_fd_dir, proc_name(number, o->fd), mode & 07777, 0)
		   ? -errno
		   : 0;
}

/* An id for chown(2), where -1 means no change and so is no guest's id. */
static int owner_id(const struct vf_id_rule *rules, uint32_t n_rules, uint32_t guest_id,
		    uint32_t *host_id)
{
	int error = vf_map_id(rules, n_rules, guest_id, host_id);

	return error ? error : *host_id == UINT32_MAX ? -EINVAL : 0;
}

static int change_owner(struct vf_thread *t, const struct object *o,
			const struct fuse_setattr_in *in)
{
	const struct vf_share_config *config = &t->share->config;
	uint32_t uid = UINT32_MAX, gid = UINT32_MAX;
	int error = 0;

	if (in->valid & FATTR_UID)
		error = owner_id(config->uid_rules, config->n_uid_rules, in->uid, &uid);
	if (!error && (in->valid & FATTR_GID))
		error = owner_id(config->gid_rules, config->n_gid_rules, in->gid, &gid);
	/* A set-group-id bit may survive it. */
	if (!error)
		error = vf_cred_need_fsetid(t);
	if (error)
		return error;
	return fchownat(o->fd, "", uid, gid, AT_EMPTY_PATH) ? -errno : 0;
}

static bool writable(const struct vf_file *file)
{
	return (vf_file_flags(file) & O_ACCMODE) != O_RDONLY;
}

static int truncate_object(const struct vf_req *r, const struct object *o, uint64_t size)
{
	char number[PROC_NAME_SIZE];
	struct vf_inode *inode;
	mode_t type;

	if (size > INT64_MAX)
		return -EFBIG;
	if (o->file && writable(o->file))
		return ftruncate(o->fd, (off_t)size) ? -errno : 0;
	/* Only a regular file, as with truncate(2), whatever the descriptor is. */
	inode = vf_inode_get(r->share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	type = vf_inode_type(inode);
	vf_inode_put(r->share, inode);
	if (type != S_IFREG)
		return type == S_IFDIR ? -EISDIR : -EINVAL;
	/* The thread's working directory is /proc/self/fd. */
	return truncate(proc_name(number, o->fd), (off_t)size) ? -errno : 0;
}

static int change_size(struct vf_thread *t, const struct vf_req *r, const struct object *o,
		       const struct fuse_setattr_in *in)
{
	int error =
	    in->valid & FATTR_KILL_SUIDGID ? vf_cred_drop_fsetid(t) : vf_cred_need_fsetid(t);

	return error ? error : truncate_object(r, o, in->size);
}

static struct timespec time_for(uint32_t valid, uint32_t set, uint32_t now, uint64_t s, uint32_t ns)
{
	if (!(valid & (set | now)))
		return (struct timespec){.tv_nsec = UTIME_OMIT};
	if (valid & now)
		return (struct timespec){.tv_nsec = UTIME_NOW};
	return (struct timespec){.tv_sec = (time_t)s, .tv_nsec = ns};
}

static int change_times(const struct object *o, const struct fuse_setattr_in *in)
{
	struct timespec times[2] = {
	    time_for(in->valid, FATTR_ATIME, FATTR_ATIME_NOW, in->atime, in->atimensec),
	    time_for(in->valid, FATTR_MTIME, FATTR_MTIME_NOW, in->mtime, in->mtimensec),
	};

	return utimensat(o->fd, "", times, AT_EMPTY_PATH) ? -errno : 0;
}

/*
 * Ownership goes before the mode, since chown(2) takes set-id bits away that a mode sets in the
 * same request; times go last, since the others change them.
 */
static int change(struct vf_thread *t, const struct vf_req *r, const struct object *o,
		  const struct fuse_setattr_in *in)
{
	int error = 0;

	if (in->valid & FATTR_SIZE)
		error = change_size(t, r, o, in);
	if (!error && (in->valid & (FATTR_UID | FATTR_GID)))
		error = change_owner(t, o, in);
	if (!error && (in->valid & FATTR_MODE))
		error = change_mode(t, o, in->mode);
	if (!error && (in->valid & (FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW)))
		error = change_times(o, in);
	return error;
}

int32_t vf_op_setattr(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_setattr_in *in = vf_arg(r, sizeof(*in));
	struct object o;
	int32_t result;

	if (!in)
		return -EINVAL;
	result = object_get(r, in->valid & FATTR_FH, in->fh, &o);
	if (result)
		return result;
	result = change(t, r, &o, in);
	if (!result)
		result = reply_attr(t, r, &o);
	object_put(r->share, &o);
	return result;
}

/* ---- ACCESS ------------------------------------------------------------- */

int32_t vf_op_access(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_access_in *in = vf_arg(r, sizeof(*in));
	struct object o;
	int error;

	if (!in || in->mask & ~(uint32_t)(R_OK | W_OK | X_OK))
		return -EINVAL;
	error = object_get(r, false, 0, &o);
	if (error)
		return error;
	if ((in->mask & W_OK) && r->share->config.readonly)
		error = -EROFS;
	/* The host's kernel decides, so that its ACLs and file system count. */
	if (!error)
		error = vf_cred_become_exactly(t, &r->header, VF_NO_GROUP);
	if (!error) {
		if (syscall(SYS_faccessat2, o.fd, "", (int)in->mask, AT_EACCESS | AT_EMPTY_PATH))
			error = -errno;
		vf_cred_restore(t);
	}
	object_put(r->share, &o);
	return error;
}
