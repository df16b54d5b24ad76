/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the sandbox asks of the kernel and Python 3.11 has no call for:
 * namespaces, mounts, capabilities, the system call filter.  The order in
 * which they are used is vhostfs/share/sandbox.py's business.
 *
 * Specification: unshare(2), pivot_root(2), mount(2), capabilities(7),
 * seccomp_rule_add(3).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <sched.h>
#include <seccomp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "api.h"

int vf_unshare(uint64_t clone_flags)
{
	return unshare((int)clone_flags) ? -errno : 0;
}

int vf_pivot_root(const char *new_root, const char *put_old)
{
	return syscall(SYS_pivot_root, new_root, put_old) ? -errno : 0;
}

int vf_mount(const char *source, const char *target, const char *type, uint64_t flags,
	     const char *data)
{
	return mount(source, target, type, flags, data) ? -errno : 0;
}

int vf_umount_detach(const char *target)
{
	return umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW) ? -errno : 0;
}

uint64_t vf_effective_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {0};

	if (syscall(SYS_capget, &header, data))
		return 0;
	return data[0].effective | (uint64_t)data[1].effective << 32;
}

int vf_keep_capabilities(uint64_t mask)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {0};

	/*
	 * The bounding set first: dropping from it takes CAP_SETPCAP, which is
	 * gone afterwards.  Without that right (an unprivileged server) there is
	 * nothing that execve(2) could give back either: no_new_privs is set.
	 */
	for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++) {
		if (mask & 1ULL << cap)
			continue;
		if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) && errno != EPERM)
			return -errno;
	}
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
		return -errno;
	if (syscall(SYS_capget, &header, data))
		return -errno;
	for (size_t i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
		/* Only what the process has can be kept. */
		data[i].permitted &= (uint32_t)(mask >> 32 * i);
		data[i].effective = data[i].permitted;
		data[i].inheritable = 0;
	}
	if (syscall(SYS_capset, &header, data))
		return -errno;
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0;
}

int vf_die_with_parent(int signal_number)
{
	return prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) ? -errno : 0;
}

int vf_fanotify_init(uint32_t flags, uint32_t event_f_flags)
{
	int fd = fanotify_init(flags, event_f_flags);

	return fd < 0 ? -errno : fd;
}

int vf_fanotify_mark(int group_fd, uint32_t flags, uint64_t mask, int dir_fd, const char *path)
{
	return fanotify_mark(group_fd, flags, mask, dir_fd, path) ? -errno : 0;
}

int vf_inotify_init(uint32_t flags)
{
	int fd = inotify_init1((int)flags);

	return fd < 0 ? -errno : fd;
}

/*
 * System calls that libraries try and do without: answered as an old kernel
 * would, where killing the process would be too much.
 */
static const char *const tried_by_libraries[] = {
    "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "statmount",
};

/* Where ioctl(2) is allowed: TIOCSTI, for one, would type into the user's terminal. */
static const uint32_t allowed_ioctls[] = {
    FIONBIO,	     FIOCLEX,	      FIONCLEX,		 FIONREAD,	    TCGETS,
    FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_IOC_GETVERSION,
    FICLONE,	     FICLONERANGE,
};

static int add_ioctl_rules(scmp_filter_ctx filter)
{
	for (size_t i = 0; i < sizeof(allowed_ioctls) / sizeof(allowed_ioctls[0]); i++) {
		/* The kernel looks at the low 32 bits alone. */
		int error =
		    seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1,
				     SCMP_A1(SCMP_CMP_MASKED_EQ, UINT32_MAX, allowed_ioctls[i]));
		if (error)
			return error;
	}
	return 0;
}

static int add_rules(scmp_filter_ctx filter, uint32_t action, const char *const *names,
		     uint32_t n_names)
{
	for (uint32_t i = 0; i < n_names; i++) {
		int number = seccomp_syscall_resolve_name(names[i]);
		int error;

		if (number == __NR_SCMP_ERROR)
			continue;
		error = number == SCMP_SYS(ioctl) ? add_ioctl_rules(filter)
						  : seccomp_rule_add(filter, action, number, 0);
		/* A name that this architecture does not have gives -EDOM. */
		if (error && error != -EDOM)
			return error;
	}
	return 0;
}

/* In a signal handler: nothing but write(2) and the end. */
static void tell_trapped_call(int number, siginfo_t *info, void *context)
{
	static const char before[] = "vhostfs: forbidden system call, number ";
	char text[sizeof(before) + 12], *end = text + sizeof(text), *p = end;
	unsigned int call = (unsigned int)info->si_syscall;

	(void)number;
	(void)context;
	*--p = '\n';
	do {
		*--p = (char)('0' + call % 10);
		call /= 10;
	} while (call);
	p -= sizeof(before) - 1;
	memcpy(p, before, sizeof(before) - 1);
	if (write(STDERR_FILENO, p, (size_t)(end - p)) < 0) {
		/* Then it is not said. */
	}
	/*
	 * SA_RESETHAND: once more, and the default action ends the process.  That of a signal sent
	 * by raise(3) would not, as the server is process 1 of its namespace.
	 */
	syscall(info->si_syscall, -1, -1, -1, -1, -1, -1);
	_exit(128 + SIGSYS);
}

int vf_seccomp_allow(const char *const *names, uint32_t n_names, uint32_t action)
{
	static const uint32_t actions[] = {
	    [VF_SECCOMP_KILL] = SCMP_ACT_KILL_PROCESS,
	    [VF_SECCOMP_TRAP] = SCMP_ACT_TRAP,
	    [VF_SECCOMP_LOG] = SCMP_ACT_LOG,
	};
	struct sigaction trapped = {
	    .sa_sigaction = tell_trapped_call,
	    .sa_flags = SA_SIGINFO | (int)SA_RESETHAND | SA_NODEFER,
	};
	scmp_filter_ctx filter;
	int error;

	if (action >= sizeof(actions) / sizeof(actions[0]))
		return -EINVAL;
	filter = seccomp_init(actions[action]);
	if (!filter)
		return -ENOMEM;
	if (action == VF_SECCOMP_TRAP)
		sigaction(SIGSYS, &trapped, NULL);
	error = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
	if (!error)
		error = add_rules(filter, SCMP_ACT_ALLOW, names, n_names);
	if (!error)
		error = add_rules(filter, SCMP_ACT_ERRNO(ENOSYS), tried_by_libraries,
				  sizeof(tried_by_libraries) / sizeof(tried_by_libraries[0]));
	if (!error) {
		/* A binary search instead of a list: some 150 calls are allowed. */
		seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2);
		error = seccomp_load(filter);
	}
	seccomp_release(filter);
	return error;
}
