// SPDX-License-Identifier: Apache-2.0
/*
 * Extended attributes.  O_PATH descriptors have none of their own, so each
 * operation names the object by its link in /proc/self/fd, which is the
 * working directory of every thread that comes here (vf_thread_init()): the link leads to the
 * object itself, also when that is a symlink, and no guest can change it.
 */
#include "core.h"

#include <sys/xattr.h>

#include "cred.h"
#include "inode.h"
#include "proc_name.h"
#include "xattr.h"

/* ---- names -------------------------------------------------------------- */

static bool starts_with(const char *name, const char *prefix)
{
	return strncmp(name, prefix, strlen(prefix)) == 0;
}

/* ACLs that the guest's kernel does not know of must not be seen or changed behind its back. */
static bool hidden_acl(const struct vf_share *share, const char *host_name)
{
	return !(vf_session_flags(share) & FUSE_POSIX_ACL) &&
	       (!strcmp(host_name, "system.posix_acl_access") ||
		!strcmp(host_name, "system.posix_acl_default"));
}

int vf_xattr_map_client_name(struct vf_share *share, const char *name, char *out, size_t room)
{
	const struct vf_share_config *config = &share->config;
	const char *prefix = "";
	uint32_t i;

	for (i = 0; i < config->n_xattr_rules; i++) {
		const struct vf_xattr_rule *rule = &config->xattr_rules[i];

		if (!(rule->scope & VF_XATTR_CLIENT) || !starts_with(name, rule->key))
			continue;
		if (rule->kind == VF_XATTR_BAD)
			return -EPERM;
		if (rule->kind == VF_XATTR_UNSUPPORTED)
			return -EOPNOTSUPP;
		if (rule->kind == VF_XATTR_PREFIX)
			prefix = rule->prepend;
		break;
	}
	/* Rules that say nothing of a name do not let it through. */
	if (config->n_xattr_rules && i == config->n_xattr_rules)
		return -EPERM;
	if (strlen(prefix) + strlen(name) >= room)
		return -ERANGE;
	stpcpy(stpcpy(out, prefix), name);
	return hidden_acl(share, out) ? -EOPNOTSUPP : 0;
}

/* The guest's name for the host's, which it ends with; NULL: hidden. */
static const char *map_server_name(const struct vf_share *share, const char *name)
{
	const struct vf_share_config *config = &share->config;

	if (hidden_acl(share, name))
		return NULL;
	if (!config->n_xattr_rules)
		return name;
	for (uint32_t i = 0; i < config->n_xattr_rules; i++) {
		const struct vf_xattr_rule *rule = &config->xattr_rules[i];

		if (!(rule->scope & VF_XATTR_SERVER) || !starts_with(name, rule->prepend))
			continue;
		if (rule->kind == VF_XATTR_OK)
			return name;
		if (rule->kind != VF_XATTR_PREFIX)
			return NULL;
		name += strlen(rule->prepend);
		return *name ? name : NULL;
	}
	return NULL;
}

size_t vf_xattr_map_list(struct vf_share *share, char *list, size_t size)
{
	size_t used = 0;

	for (size_t at = 0; at < size;) {
		const char *name = list + at;
		const char *shown = map_server_name(share, name);

		at += strnlen(name, size - at) + 1;
		if (shown) {
			size_t length = strlen(shown) + 1;

			memmove(list + used, shown, length);
			used += length;
		}
	}
	return used;
}

/* ---- the object --------------------------------------------------------- */

/* One inode as a path relative to the thread's working directory. Not to be copied. */
struct target {
	struct vf_inode *inode;
	const char *path;
	char name[PROC_NAME_SIZE];
};

static int find_target(struct vf_req *r, struct target *target)
{
	int fd;

	target->inode = vf_inode_get(r->share, r->header.nodeid);
	if (!target->inode)
		return -ESTALE;
	fd = vf_inode_path_fd(r->share, target->inode);
	if (fd < 0) {
		vf_inode_put(r->share, target->inode);
		return fd;
	}
	target->path = proc_name(target->name, fd);
	return 0;
}

/* ---- operations --------------------------------------------------------- */

int32_t vf_op_setxattr(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	bool extended = vf_session_flags(share) & FUSE_SETXATTR_EXT;
	uint32_t head = extended ? sizeof(struct fuse_setxattr_in) : FUSE_COMPAT_SETXATTR_IN_SIZE;
	const struct fuse_setxattr_in *in = vf_arg(r, head);
	char host_name[VF_XATTR_NAME_ROOM];
	struct target target;
	const char *name;
	uint32_t value;
	bool kill_sgid;
	int error;

	if (!share->config.xattr)
		return -ENOSYS;
	name = in ? vf_arg_string(r, head, &value) : NULL;
	if (!name || r->args_size - value != in->size ||
	    (in->flags & ~(uint32_t)(XATTR_CREATE | XATTR_REPLACE)))
		return -EINVAL;
	if (in->size > XATTR_SIZE_MAX)
		return -E2BIG;
	error = vf_xattr_map_client_name(share, name, host_name, sizeof(host_name));
	if (error)
		return error;
	error = find_target(r, &target);
	if (error)
		return error;
	/*
	 * The host clears the set-group-id bit when someone outside the group sets an
	 * ACL, so the caller it must see is the guest's, without CAP_FSETID.
	 */
	kill_sgid = extended && (in->setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID);
	if (kill_sgid) {
		error = vf_cred_become_caller(t, &r->header, VF_NO_GROUP);
		if (!error) {
			error = vf_cred_drop_fsetid(t);
			if (error)
				vf_cred_restore(t);
		}
	} else {
		error = vf_cred_need_fsetid(t);
	}
	if (error)
		goto out;
	if (setxattr(target.path, host_name, r->args + value, in->size, (int)in->flags) < 0)
		error = -errno;
	if (kill_sgid)
		vf_cred_restore(t);
out:
	vf_inode_put(share, target.inode);
	return error;
}

/* The reply to a request for `asked` bytes (0: for the size) of what is `got` bytes in t->reply. */
static int32_t sized_reply(struct vf_thread *t, const struct vf_req *r, uint32_t asked, size_t got)
{
	struct fuse_getxattr_out *out = (struct fuse_getxattr_out *)t->reply;

	if (asked == 0) {
		out->size = (uint32_t)got;
		out->padding = 0;
		return sizeof(*out);
	}
	if (got > asked || got + sizeof(struct fuse_out_header) > r->out_size)
		return -ERANGE;
	return (int32_t)got;
}

int32_t vf_op_getxattr(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const struct fuse_getxattr_in *in = vf_arg(r, sizeof(*in));
	char host_name[VF_XATTR_NAME_ROOM];
	struct target target;
	const char *name;
	uint8_t *reply;
	int32_t result;
	ssize_t got;
	uint32_t size;

	if (!share->config.xattr)
		return -ENOSYS;
	name = in ? vf_arg_string(r, sizeof(*in), NULL) : NULL;
	if (!name)
		return -EINVAL;
	result = vf_xattr_map_client_name(share, name, host_name, sizeof(host_name));
	if (result) /* what may not be named is not there */
		return result == -EPERM ? -ENODATA : result;
	size = in->size < XATTR_SIZE_MAX ? in->size : XATTR_SIZE_MAX;
	reply = vf_thread_reply(t, size);
	if (!reply)
		return -ENOMEM;
	result = find_target(r, &target);
	if (result)
		return result;
	got = getxattr(target.path, host_name, size ? reply : NULL, size);
	result = got < 0 ? -errno : sized_reply(t, r, size, (size_t)got);
	vf_inode_put(share, target.inode);
	return result;
}

int32_t vf_op_listxattr(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const struct fuse_getxattr_in *in = vf_arg(r, sizeof(*in));
	struct target target;
	uint8_t *reply;
	int32_t result;
	ssize_t got;

	if (!share->config.xattr)
		return -ENOSYS;
	if (!in)
		return -EINVAL;
	/* The host's list is what gets shorter or longer by the rules, so all of it is needed. */
	reply = vf_thread_reply(t, XATTR_LIST_MAX);
	if (!reply)
		return -ENOMEM;
	result = find_target(r, &target);
	if (result)
		return result;
	got = listxattr(target.path, (char *)reply, XATTR_LIST_MAX);
	result = got < 0 ? -errno
			 : sized_reply(t, r, in->size,
				       vf_xattr_map_list(share, (char *)reply, (size_t)got));
	vf_inode_put(share, target.inode);
	return result;
}

int32_t vf_op_removexattr(struct vf_thread *t, struct vf_req *r)
{
	struct vf_share *share = r->share;
	const char *name = vf_arg_string(r, 0, NULL);
	char host_name[VF_XATTR_NAME_ROOM];
	struct target target;
	int32_t result;

	(void)t;
	if (!share->config.xattr)
		return -ENOSYS;
	if (!name)
		return -EINVAL;
	result = vf_xattr_map_client_name(share, name, host_name, sizeof(host_name));
	if (result)
		return result;
	result = find_target(r, &target);
	if (result)
		return result;
	result = removexattr(target.path, host_name) < 0 ? -errno : 0;
	vf_inode_put(share, target.inode);
	return result;
}
