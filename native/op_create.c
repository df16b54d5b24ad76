/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations that make a new object.  They run under the caller's ids; in the
 * request the name (and a symlink's target) is followed by extensions: the
 * security context of the new object and the caller's group that matters.
 */
#include <sys/syscall.h>
#include <sys/xattr.h>

#include "cred.h"
#include "file.h"
#include "inode.h"
#include "proc_name.h"
#include "xattr.h"

/* ---- extensions --------------------------------------------------------- */

struct extensions {
	uint32_t group; /* VF_NO_GROUP: none */
	uint32_t context_size;
	const void *context;		       /* NULL: none */
	char context_name[VF_XATTR_NAME_ROOM]; /* the host's */
};

/* fuse_secctx, name, value; the whole of size bytes. */
static int parse_context(struct vf_share *share, const uint8_t *p, uint32_t size,
			 struct extensions *e)
{
	const char *name = (const char *)p + sizeof(struct fuse_secctx);
	struct fuse_secctx context;
	const char *nul;

	if (size < sizeof(context))
		return -EINVAL;
	memcpy(&context, p, sizeof(context));
	if (!context.size)
		return 0;
	nul = memchr(name, 0, size - sizeof(context));
	if (!nul || context.size > size - (uint32_t)((const uint8_t *)nul + 1 - p))
		return -EINVAL;
	if (!share->config.xattr)
		return -EOPNOTSUPP;
	e->context = nul + 1;
	e->context_size = context.size;
	return vf_xattr_map_client_name(share, name, e->context_name, sizeof(e->context_name));
}

static int parse_extension(struct vf_share *share, const uint8_t *p,
			   const struct fuse_ext_header *header, struct extensions *e)
{
	const uint8_t *body = p + sizeof(*header);
	uint32_t size = header->size - (uint32_t)sizeof(*header), groups[2];

	if (header->type == VF_FUSE_EXT_GROUPS) {
		if (size < sizeof(groups[0]))
			return -EINVAL;
		memcpy(groups, body, size < sizeof(groups) ? sizeof(groups[0]) : sizeof(groups));
		if (groups[0] > 1 || (groups[0] && size < sizeof(groups)))
			return -EINVAL;
		if (groups[0])
			e->group = groups[1];
		return 0;
	}
	/* A smaller type is fuse_secctx_header's number of contexts; Linux sends one at most. */
	if (header->type > FUSE_MAX_NR_SECCTX || !header->type)
		return 0;
	if (!(vf_session_flags(share) & FUSE_SECURITY_CTX))
		return 0;
	return header->type > 1 ? -EINVAL : parse_context(share, body, size, e);
}

/* What follows offset; from a guest before Linux 6.3 total_extlen is 0. */
static int parse_extensions(const struct vf_req *r, uint32_t offset, struct extensions *e)
{
	uint64_t wanted = FUSE_SECURITY_CTX | VF_FUSE_CREATE_SUPP_GROUP;
	struct fuse_ext_header header;
	int error;

	e->group = VF_NO_GROUP;
	e->context = NULL;
	if (!(vf_session_flags(r->share) & wanted))
		return 0;
	while (r->args_size - offset >= sizeof(header)) {
		memcpy(&header, r->args + offset, sizeof(header));
		if (header.size < sizeof(header) || header.size > r->args_size - offset)
			return -EINVAL;
		error = parse_extension(r->share, r->args + offset, &header, e);
		if (error)
			return error;
		offset += header.size;
	}
	return 0;
}

/* ---- acting as the caller ----------------------------------------------- */

static int begin(struct vf_thread *t, const struct vf_req *r, uint32_t umask_bits,
		 const struct extensions *e)
{
	int error = vf_cred_need_fsetid(t);

	if (error)
		return error;
	/* Without FUSE_DONT_MASK the guest's kernel has applied the umask. */
	vf_cred_umask(t, vf_session_flags(r->share) & FUSE_DONT_MASK ? umask_bits & 0777 : 0);
	return vf_cred_become_caller(t, &r->header, e->group);
}

/* ---- SYMLINK, MKNOD, MKDIR ---------------------------------------------- */

struct creation {
	const char *name;
	const char *target; /* symlink */
	mode_t mode;	    /* with the type */
	dev_t rdev;
	uint32_t umask_bits;
	struct extensions extensions;
};

static int make(int dir_fd, const struct creation *c)
{
	if (S_ISLNK(c->mode))
		return symlinkat(c->target, dir_fd, c->name);
	if (S_ISDIR(c->mode))
		return mkdirat(dir_fd, c->name, c->mode & 07777);
	return mknodat(dir_fd, c->name, c->mode, c->rdev);
}

/* The labels of a new object that has no open descriptor; it has just been looked up. */
static int label(struct vf_thread *t, uint64_t nodeid, const struct extensions *e)
{
	struct vf_inode *inode = vf_inode_get(t->share, nodeid);
	char number[PROC_NAME_SIZE];
	int fd, error;

	if (!inode)
		return -ESTALE;
	fd = vf_inode_path_fd(t->share, inode);
	error = fd < 0 ? fd : 0;
	/* The thread's working directory is /proc/self/fd. */
	if (!error &&
	    setxattr(proc_name(number, fd), e->context_name, e->context, e->context_size, 0))
		error = -errno;
	vf_inode_put(t->share, inode);
	return error;
}

static int32_t make_entry(struct vf_thread *t, struct vf_req *r, const struct creation *c)
{
	struct fuse_entry_out *out = (struct fuse_entry_out *)t->reply;
	struct vf_inode *dir;
	int fd, error;

	fd = vf_dir_get(r->share, r->header.nodeid, &dir);
	if (fd < 0)
		return fd;
	error = begin(t, r, c->umask_bits, &c->extensions);
	if (!error) {
		error = make(fd, c) ? -errno : 0;
		vf_cred_restore(t);
	}
	if (!error)
		error = vf_inode_lookup_new(t, dir, fd, c->name, out);
	if (!error && c->extensions.context) {
		error = label(t, out->nodeid, &c->extensions);
		if (error) {
			/* Better no object than one without its label. */
			vf_inode_forget(r->share, out->nodeid, 1);
			unlinkat(fd, c->name, S_ISDIR(c->mode) ? AT_REMOVEDIR : 0);
		}
	}
	vf_inode_put(r->share, dir);
	return error ? error : (int32_t)sizeof(*out);
}

/* The name at offset and, behind `strings - 1` more strings, the extensions. */
static int parse_creation(const struct vf_req *r, uint32_t offset, uint32_t strings,
			  struct creation *c)
{
	int error;

	c->name = vf_arg_string(r, offset, &offset);
	if (!c->name)
		return -EINVAL;
	if (strings > 1) {
		c->target = vf_arg_string(r, offset, &offset);
		if (!c->target)
			return -EINVAL;
	}
	error = vf_check_name(c->name);
	return error ? error : parse_extensions(r, offset, &c->extensions);
}

int32_t vf_op_symlink(struct vf_thread *t, struct vf_req *r)
{
	struct creation c = {.mode = S_IFLNK};
	int error = parse_creation(r, 0, 2, &c);

	return error ? error : make_entry(t, r, &c);
}

int32_t vf_op_mknod(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_mknod_in *in = vf_arg(r, sizeof(*in));
	struct creation c;
	int error;

	if (!in)
		return -EINVAL;
	c.mode = in->mode;
	c.rdev = in->rdev; /* the kernel's new_encode_dev(): the low half of dev_t's form */
	c.umask_bits = in->umask;
	if (S_ISLNK(c.mode) || S_ISDIR(c.mode) || in->mode & ~(uint32_t)(S_IFMT | 07777))
		return -EINVAL;
	error = parse_creation(r, sizeof(*in), 1, &c);
	return error ? error : make_entry(t, r, &c);
}

int32_t vf_op_mkdir(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_mkdir_in *in = vf_arg(r, sizeof(*in));
	struct creation c;
	int error;

	if (!in)
		return -EINVAL;
	c.mode = S_IFDIR | (in->mode & 07777);
	c.umask_bits = in->umask;
	error = parse_creation(r, sizeof(*in), 1, &c);
	return error ? error : make_entry(t, r, &c);
}

/* ---- CREATE, TMPFILE ---------------------------------------------------- */

struct create_reply {
	struct fuse_entry_out entry;
	struct fuse_open_out open;
};

/* A regular file made and opened in one step; the descriptor or a negative errno. */
static int open_new(struct vf_thread *t, const struct vf_req *r, int dir_fd, const char *name,
		    int flags, const struct fuse_create_in *in, const struct extensions *e)
{
	int fd, error;

	do {
		error = begin(t, r, in->umask, e);
		if (error)
			return error;
		fd = openat(dir_fd, name, flags | O_NOFOLLOW | O_CLOEXEC, in->mode & 07777);
		error = fd < 0 ? errno : 0;
		vf_cred_restore(t);
	} while (fd < 0 && vf_fd_shortage(r->share, error));
	if (fd < 0)
		return -error;
	if (e->context && fsetxattr(fd, e->context_name, e->context, e->context_size, 0)) {
		error = errno;
		close(fd);
		if (flags & O_CREAT)
			unlinkat(dir_fd, name, 0);
		return -error;
	}
	return fd;
}

/* May the caller open it so?  The guest's kernel has not been able to check. */
static int may_open(struct vf_thread *t, const struct vf_req *r, int path_fd, uint32_t guest_flags,
		    const struct extensions *e)
{
	static const int modes[] = {R_OK, W_OK, R_OK | W_OK, R_OK | W_OK};
	int mode = modes[guest_flags & O_ACCMODE] | (guest_flags & O_TRUNC ? W_OK : 0);
	int error = vf_cred_become_caller(t, &r->header, e->group);

	if (error)
		return error;
	if (syscall(SYS_faccessat2, path_fd, "", mode, AT_EACCESS | AT_EMPTY_PATH))
		error = -errno;
	vf_cred_restore(t);
	return error;
}

/* Someone else was first, and there was no O_EXCL. Sets *entry, looked up, when it succeeds. */
static int open_existing(struct vf_thread *t, const struct vf_req *r, struct vf_inode *dir,
			 int dir_fd, const char *name, const struct fuse_create_in *in,
			 const struct extensions *e, struct fuse_entry_out *entry)
{
	struct vf_share *share = r->share;
	bool kill = (in->open_flags & FUSE_OPEN_KILL_SUIDGID) && (in->flags & O_TRUNC);
	struct vf_inode *inode;
	int fd = vf_inode_lookup(t, dir, dir_fd, name, entry);

	if (fd < 0)
		return fd;
	inode = vf_inode_get(share, entry->nodeid);
	if (!inode)
		return -ESTALE;
	/* ESTALE: the guest's kernel looks again, then follows the symlink or opens its own FIFO.
	 */
	if (vf_inode_type(inode) != S_IFREG)
		fd = vf_inode_type(inode) == S_IFDIR ? -EISDIR : -ESTALE;
	else
		fd = vf_inode_path_fd(share, inode);
	if (fd >= 0)
		fd = may_open(t, r, fd, in->flags, e);
	if (!fd)
		fd = kill ? vf_cred_drop_fsetid(t) : vf_cred_need_fsetid(t);
	if (!fd)
		fd = vf_inode_open(share, inode, vf_open_flags(share, in->flags));
	vf_inode_put(share, inode);
	if (fd >= 0 && in->flags & O_TRUNC) {
		struct stat st;
		uint32_t flags = entry->attr.flags;

		/* What was looked up is the state before the truncation. */
		if (!fstat(fd, &st)) {
			vf_fill_attr(share, &st, &entry->attr);
			entry->attr.flags = flags;
		}
	}
	if (fd < 0)
		vf_inode_forget(share, entry->nodeid, 1);
	return fd;
}

/* Registers the open file of an entry that was looked up; takes fd over. */
static int32_t reply_open(struct vf_thread *t, struct vf_req *r, int fd, uint32_t guest_flags)
{
	struct create_reply *out = (struct create_reply *)t->reply;
	int error = vf_file_new(r->share, out->entry.nodeid, fd,
				vf_open_flags(r->share, guest_flags), false, &out->open.fh);

	if (error) {
		vf_inode_forget(r->share, out->entry.nodeid, 1);
		return error;
	}
	out->open.open_flags = vf_fopen_flags(r->share, guest_flags, false, false);
	out->open.padding = 0;
	return sizeof(*out);
}

/* Names that come and go under our hands are tried again this often. */
#define CREATE_ATTEMPTS 4

int32_t vf_op_create(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_create_in *in = vf_arg(r, sizeof(*in));
	struct create_reply *out = (struct create_reply *)t->reply;
	struct vf_inode *dir;
	struct creation c;
	int dir_fd, fd, error, flags;

	if (!in)
		return -EINVAL;
	error = parse_creation(r, sizeof(*in), 1, &c);
	if (error)
		return error;
	dir_fd = vf_dir_get(r->share, r->header.nodeid, &dir);
	if (dir_fd < 0)
		return dir_fd;
	flags = (vf_open_flags(r->share, in->flags) & ~O_TRUNC) | O_CREAT | O_EXCL;
	for (int attempt = 0; attempt < CREATE_ATTEMPTS; attempt++) {
		fd = open_new(t, r, dir_fd, c.name, flags, in, &c.extensions);
		if (fd >= 0) {
			error = vf_inode_lookup_fd(t, dir, fd, &out->entry);
			if (error) {
				close(fd);
				fd = error;
			}
			break;
		}
		if (fd != -EEXIST || (in->flags & O_EXCL))
			break;
		fd = open_existing(t, r, dir, dir_fd, c.name, in, &c.extensions, &out->entry);
		if (fd != -ENOENT)
			break;
	}
	vf_inode_put(r->share, dir);
	return fd < 0 ? fd : reply_open(t, r, fd, in->flags);
}

int32_t vf_op_tmpfile(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_create_in *in = vf_arg(r, sizeof(*in));
	struct create_reply *out = (struct create_reply *)t->reply;
	uint32_t extensions = sizeof(*in);
	struct extensions e;
	struct vf_inode *dir;
	int dir_fd, fd, error;

	/* The name means nothing. */
	if (!in || !vf_arg_string(r, extensions, &extensions))
		return -EINVAL;
	error = parse_extensions(r, extensions, &e);
	if (error)
		return error;
	dir_fd = vf_dir_get(r->share, r->header.nodeid, &dir);
	if (dir_fd < 0)
		return dir_fd;
	fd = open_new(t, r, dir_fd, ".",
		      (vf_open_flags(r->share, in->flags) & ~O_TRUNC) | O_TMPFILE |
			  ((int)in->flags & O_EXCL),
		      in, &e);
	if (fd >= 0) {
		error = vf_inode_lookup_fd(t, dir, fd, &out->entry);
		if (error) {
			close(fd);
			fd = error;
		}
	}
	vf_inode_put(r->share, dir);
	return fd < 0 ? fd : reply_open(t, r, fd, in->flags);
}
