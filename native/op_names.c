/* SPDX-License-Identifier: Apache-2.0 */
/* Operations on names in directories, but for those that make a new object (op_create.c). */
#include <limits.h>
#include <linux/capability.h>
#include <stdio.h>

#include "attr.h"
#include "cred.h"
#include "events.h"
#include "inode.h"
#include "proc_name.h"

int vf_dir_get(struct vf_share *share, uint64_t nodeid, struct vf_inode **dir)
{
	int fd = -ENOTDIR;

	*dir = vf_inode_get(share, nodeid);
	if (!*dir)
		return -ESTALE;
	if (vf_inode_type(*dir) == S_IFDIR)
		fd = vf_inode_path_fd(share, *dir);
	if (fd < 0)
		vf_inode_put(share, *dir);
	return fd;
}

/* ---- LOOKUP, FORGET ----------------------------------------------------- */

/* "." and "..": what an NFS server in the guest asks to get from its handles to objects. */
static int32_t lookup_dots(struct vf_thread *t, struct vf_req *r, bool parent)
{
	struct fuse_entry_out *out = (struct fuse_entry_out *)t->reply;
	struct vf_inode *inode;
	int error;

	if (!(vf_session_flags(r->share) & FUSE_EXPORT_SUPPORT))
		return -EINVAL;
	inode = vf_inode_get(r->share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	if (parent)
		error = vf_inode_lookup_parent(t, inode, out);
	else
		error = vf_inode_lookup_self(t, inode, inode, out);
	vf_inode_put(r->share, inode);
	return error ? error : (int32_t)sizeof(*out);
}

int32_t vf_op_lookup(struct vf_thread *t, struct vf_req *r)
{
	const struct vf_share_config *config = &r->share->config;
	struct fuse_entry_out *out = (struct fuse_entry_out *)t->reply;
	const char *name = vf_arg_string(r, 0, NULL);
	struct vf_inode *dir;
	uint64_t valid_ns;
	int fd, error;
	bool told;

	if (!name)
		return -EINVAL;
	if (name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2])))
		return lookup_dots(t, r, name[1]);
	error = vf_check_name(name);
	if (error)
		return error;
	fd = vf_dir_get(r->share, r->header.nodeid, &dir);
	if (fd < 0)
		return fd;
	told = vf_inode_is_told(r->share, dir);
	error = vf_inode_lookup(t, dir, fd, name, out);
	vf_inode_put(r->share, dir);
	valid_ns = vf_lasting(t, told) ? config->lasting_timeout_ns : config->negative_timeout_ns;
	if (error == -ENOENT && valid_ns) {
		memset(out, 0, sizeof(*out));
		vf_split_ns(valid_ns, &out->entry_valid, &out->entry_valid_nsec);
		error = 0;
	}
	return error ? error : (int32_t)sizeof(*out);
}

int32_t vf_op_forget(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_forget_in *in = vf_arg(r, sizeof(*in));

	(void)t;
	if (in)
		vf_inode_forget(r->share, r->header.nodeid, in->nlookup);
	return VF_NO_REPLY;
}

int32_t vf_op_batch_forget(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_batch_forget_in *in = vf_arg(r, sizeof(*in));
	const struct fuse_forget_one *one;
	uint32_t n;

	(void)t;
	if (!in)
		return VF_NO_REPLY;
	one = (const struct fuse_forget_one *)(in + 1);
	n = (r->args_size - (uint32_t)sizeof(*in)) / (uint32_t)sizeof(*one);
	if (in->count < n)
		n = in->count;
	for (uint32_t i = 0; i < n; i++)
		vf_inode_forget(r->share, one[i].nodeid, one[i].nlookup);
	return VF_NO_REPLY;
}

/* ---- READLINK ----------------------------------------------------------- */

int32_t vf_op_readlink(struct vf_thread *t, struct vf_req *r)
{
	/* One byte more than the longest target, so that a cut can be told. */
	char *target = (char *)vf_thread_reply(t, PATH_MAX + 1);
	struct vf_inode *inode;
	ssize_t size;
	int fd;

	if (!target)
		return -ENOMEM;
	inode = vf_inode_get(r->share, r->header.nodeid);
	if (!inode)
		return -ESTALE;
	fd = vf_inode_type(inode) == S_IFLNK ? vf_inode_path_fd(r->share, inode) : -EINVAL;
	size = fd;
	if (fd >= 0) {
		size = readlinkat(fd, "", target, PATH_MAX + 1);
		if (size < 0)
			size = -errno;
	}
	vf_inode_put(r->share, inode);
	return size > PATH_MAX ? -ENAMETOOLONG : (int32_t)size;
}

/* ---- UNLINK, RMDIR ------------------------------------------------------ */

static int32_t remove_name(struct vf_req *r, int flags)
{
	const char *name = vf_arg_string(r, 0, NULL);
	struct vf_events *events = r->share->events;
	struct vf_inode *dir, *removed, *announced = NULL;
	int fd, error;

	if (!name)
		return -EINVAL;
	error = vf_check_name(name);
	if (error)
		return error;
	fd = vf_dir_get(r->share, r->header.nodeid, &dir);
	if (fd < 0)
		return fd;
	removed = vf_inode_guard_removal(r->share, dir, fd, name);
	if ((flags & AT_REMOVEDIR) && events && atomic_load(&events->everywhere))
		announced = vf_inode_known(r->share, dir, name);
	error = unlinkat(fd, name, flags) ? -errno : 0;
	if (announced) {
		if (!error)
			vf_watch_share_removed(events, announced);
		vf_inode_put(r->share, announced);
	}
	if (removed)
		vf_inode_put(r->share, removed);
	vf_inode_put(r->share, dir);
	return error;
}

int32_t vf_op_unlink(struct vf_thread *t, struct vf_req *r)
{
	(void)t;
	return remove_name(r, 0);
}

int32_t vf_op_rmdir(struct vf_thread *t, struct vf_req *r)
{
	(void)t;
	return remove_name(r, AT_REMOVEDIR);
}

/* ---- RENAME ------------------------------------------------------------- */

static int rename_in(struct vf_share *share, int old_fd, const char *old_name,
		     struct vf_inode *new_dir, int new_fd, const char *new_name, uint32_t flags)
{
	struct vf_inode *replaced = NULL;
	int error;

	if (!(flags & (RENAME_NOREPLACE | RENAME_EXCHANGE)))
		replaced = vf_inode_guard_removal(share, new_dir, new_fd, new_name);
	error = renameat2(old_fd, old_name, new_fd, new_name, flags) ? -errno : 0;
	if (replaced)
		vf_inode_put(share, replaced);
	return error;
}

/* Both names lie behind the fixed arguments. */
static int32_t do_rename(struct vf_req *r, uint32_t names, uint64_t new_nodeid, uint32_t flags)
{
	struct vf_share *share = r->share;
	const char *old_name, *new_name = NULL;
	struct vf_inode *old_dir, *new_dir;
	int old_fd, new_fd, error;

	old_name = vf_arg_string(r, names, &names);
	if (old_name)
		new_name = vf_arg_string(r, names, NULL);
	if (!new_name ||
	    (flags & ~(uint32_t)(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT)))
		return -EINVAL;
	error = vf_check_name(old_name);
	if (!error)
		error = vf_check_name(new_name);
	if (error)
		return error;
	old_fd = vf_dir_get(share, r->header.nodeid, &old_dir);
	if (old_fd < 0)
		return old_fd;
	new_fd = vf_dir_get(share, new_nodeid, &new_dir);
	error = new_fd;
	if (new_fd >= 0) {
		error = rename_in(share, old_fd, old_name, new_dir, new_fd, new_name, flags);
		vf_inode_put(share, new_dir);
	}
	vf_inode_put(share, old_dir);
	return error;
}

int32_t vf_op_rename(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_rename_in *in = vf_arg(r, sizeof(*in));

	(void)t;
	return in ? do_rename(r, sizeof(*in), in->newdir, 0) : -EINVAL;
}

int32_t vf_op_rename2(struct vf_thread *t, struct vf_req *r)
{
	const struct fuse_rename2_in *in = vf_arg(r, sizeof(*in));

	(void)t;
	return in ? do_rename(r, sizeof(*in), in->newdir, in->flags) : -EINVAL;
}

/* ---- LINK --------------------------------------------------------------- */

static int link_fd(struct vf_thread *t, int fd, int dir_fd, const char *name)
{
	char number[PROC_NAME_SIZE];

	if ((t->caps & 1ULL << CAP_DAC_READ_SEARCH) && !linkat(fd, "", dir_fd, name, AT_EMPTY_PATH))
		return 0;
	/* A refusal for want of privilege shows as ENOENT, as does an object without links. */
	if ((t->caps & 1ULL << CAP_DAC_READ_SEARCH) && errno != ENOENT)
		return -errno;
	if (linkat(t->share->config.proc_fd_dir, proc_name(number, fd), dir_fd, name,
		   AT_SYMLINK_FOLLOW))
		return -errno;
	return 0;
}

int32_t vf_op_link(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const struct fuse_link_in *in = vf_arg(r, sizeof(*in));
	struct fuse_entry_out *out = (struct fuse_entry_out *)t->reply;
	const char *name = in ? vf_arg_string(r, sizeof(*in), NULL) : NULL;
	struct vf_inode *dir, *inode;
	int dir_fd, fd, error;

	if (!name)
		return -EINVAL;
	error = vf_check_name(name);
	if (error)
		return error;
	dir_fd = vf_dir_get(share, r->header.nodeid, &dir);
	if (dir_fd < 0)
		return dir_fd;
	inode = vf_inode_get(share, in->oldnodeid);
	error = -ESTALE;
	if (inode) {
		fd = vf_inode_path_fd(share, inode);
		error = fd < 0 ? fd : link_fd(t, fd, dir_fd, name);
		if (!error)
			error = vf_inode_lookup_self(t, dir, inode, out);
		vf_inode_put(share, inode);
	}
	vf_inode_put(share, dir);
	return error ? error : (int32_t)sizeof(*out);
}
