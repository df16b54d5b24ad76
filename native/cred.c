/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Credentials of the threads that execute operations; cred.h.
 *
 * A server that is root gives up its effective capabilities by taking another
 * effective uid and has them back with uid 0 (capabilities(7), "Effect of user
 * ID changes on capabilities"); the permitted set stays, since the real and
 * saved ids do.
 *
 * A server that is not root and has no CAP_SETUID can create objects only as
 * itself: for the guest's root and for its own uid; anybody else gets EPERM.
 */
#include <linux/capability.h>
#include <sched.h>
#include <sys/syscall.h>

#include "cred.h"

#define CAP_BIT(cap) (1ULL << (cap))
#define NO_CHANGE ((uid_t)-1)

static int set_capabilities(uint64_t effective, uint64_t permitted)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {
	    {.effective = (uint32_t)effective, .permitted = (uint32_t)permitted},
	    {.effective = (uint32_t)(effective >> 32), .permitted = (uint32_t)(permitted >> 32)},
	};

	return syscall(SYS_capset, &header, data) ? -errno : 0;
}

/* What is both effective and permitted; the rest of the permitted set is given up. */
static int own_capabilities(uint64_t *caps)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];
	uint64_t permitted;

	if (syscall(SYS_capget, &header, data))
		return -errno;
	*caps = data[0].effective | (uint64_t)data[1].effective << 32;
	permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
	return permitted == *caps ? 0 : set_capabilities(*caps, *caps);
}

int vf_thread_init(struct vf_thread *t, struct vf_share *share)
{
	int error;

	t->share = share;
	t->home_uid = t->cur_uid = geteuid();
	t->home_gid = t->cur_gid = getegid();
	t->cur_group = VF_NO_GROUP;
	t->cur_umask = 0;
	t->fsetid_dropped = false;
	error = own_capabilities(&t->caps);
	if (error)
		return error;
	if (unshare(CLONE_FS))
		return -errno;
	umask(0);
	/* Operations name descriptors by their number, relative to this. */
	if (fchdir(share->config.proc_fd_dir))
		return -errno;
	/* The server's own groups are not the guest's users'. */
	if ((t->caps & CAP_BIT(CAP_SETGID)) && syscall(SYS_setgroups, 0, NULL) && errno != EPERM)
		return -errno;
	return 0;
}

void vf_thread_finish(struct vf_thread *t)
{
	vf_cred_restore(t);
}

/* One supplementary group or none; it stays until another is asked for. */
static int set_group(struct vf_thread *t, uint32_t group)
{
	if (group == t->cur_group || !(t->caps & CAP_BIT(CAP_SETGID)))
		return 0;
	if (syscall(SYS_setgroups, group == VF_NO_GROUP ? 0 : 1, &group))
		return -errno;
	t->cur_group = group;
	return 0;
}

static int set_gid(struct vf_thread *t, uint32_t gid)
{
	if (gid == t->cur_gid)
		return 0;
	/* EINVAL: not an id of this user namespace. */
	if (syscall(SYS_setresgid, NO_CHANGE, gid, NO_CHANGE))
		return -EPERM;
	t->cur_gid = gid;
	return 0;
}

/* Leaves root, or takes another uid by CAP_SETUID, with no more than these capabilities. */
static int set_uid(struct vf_thread *t, uint32_t uid, uint64_t keep)
{
	if (syscall(SYS_setresuid, NO_CHANGE, uid, NO_CHANGE))
		return -EPERM;
	t->cur_uid = uid;
	keep &= t->caps;
	/* Away from root the kernel has cleared them already. */
	if (keep || (t->home_uid && t->caps))
		return set_capabilities(keep, t->caps);
	return 0;
}

static int become(struct vf_thread *t, const struct fuse_in_header *header, uint32_t group,
		  uint64_t keep)
{
	const struct vf_share_config *config = &t->share->config;
	uint32_t uid, gid;
	int error;

	error = vf_map_id(config->uid_rules, config->n_uid_rules, header->uid, &uid);
	if (!error)
		error = vf_map_id(config->gid_rules, config->n_gid_rules, header->gid, &gid);
	if (!error && group != VF_NO_GROUP)
		error = vf_map_id(config->gid_rules, config->n_gid_rules, group, &group);
	/* To the host's system calls (uid_t)-1 means "unchanged": the server itself. */
	if (!error && (uid == UINT32_MAX || gid == UINT32_MAX))
		error = -EINVAL;
	if (error)
		return error;
	/* A server that is not root stands for the guest's root. */
	if (!uid)
		uid = t->home_uid;
	if (!gid && t->home_uid)
		gid = t->home_gid;
	if (uid == t->home_uid)
		return set_gid(t, gid);
	error = set_group(t, group);
	if (!error)
		error = set_gid(t, gid); /* while there is CAP_SETGID */
	if (!error)
		error = set_uid(t, uid, keep);
	if (error)
		vf_cred_restore(t);
	return error;
}

int vf_cred_become_caller(struct vf_thread *t, const struct fuse_in_header *header, uint32_t group)
{
	uint64_t keep = 0;

	/*
	 * A guest before Linux 6.3 does not tell the caller's groups, and has checked itself what
	 * they allow: it must not fail here for the lack of them.
	 */
	if (!(vf_session_flags(t->share) & VF_FUSE_CREATE_SUPP_GROUP))
		keep = CAP_BIT(CAP_DAC_OVERRIDE);
	return become(t, header, group, keep);
}

int vf_cred_become_exactly(struct vf_thread *t, const struct fuse_in_header *header, uint32_t group)
{
	return become(t, header, group, 0);
}

void vf_cred_restore(struct vf_thread *t)
{
	if (t->cur_uid != t->home_uid) {
		/* Cannot fail: it is the real uid. Going on as anybody else would be unsafe. */
		if (syscall(SYS_setresuid, NO_CHANGE, t->home_uid, NO_CHANGE))
			abort();
		t->cur_uid = t->home_uid;
		t->fsetid_dropped = false;
		if (t->home_uid && t->caps && set_capabilities(t->caps, t->caps))
			abort();
	}
	if (set_gid(t, t->home_gid))
		abort();
}

void vf_cred_umask(struct vf_thread *t, uint32_t mask)
{
	if (mask == t->cur_umask)
		return;
	umask((mode_t)mask & 0777);
	t->cur_umask = mask;
}

int vf_cred_drop_fsetid(struct vf_thread *t)
{
	int error;

	if (t->fsetid_dropped || !(t->caps & CAP_BIT(CAP_FSETID)))
		return 0;
	error = set_capabilities(t->caps & ~CAP_BIT(CAP_FSETID), t->caps);
	t->fsetid_dropped = !error;
	return error;
}

int vf_cred_need_fsetid(struct vf_thread *t)
{
	int error;

	if (!t->fsetid_dropped)
		return 0;
	error = set_capabilities(t->caps, t->caps);
	t->fsetid_dropped = !!error;
	return error;
}
