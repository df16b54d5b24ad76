/* SPDX-License-Identifier: Apache-2.0 */
/* What a test program on a real directory needs: a share of it, the host's side, and the runs. */
#ifndef VHOSTFS_TESTS_SHARE_H
#define VHOSTFS_TESTS_SHARE_H

#include <ftw.h>
#include <sched.h>

#include "guest.h"

static char base[] = "/tmp/vhostfs-test-XXXXXX";
static int host_fd;	      /* the share's root, for what the host does */
static uint32_t pool_threads; /* of the next share */

static struct vf_share *open_share(enum vf_handle_mode mode, uint32_t budget)
{
	struct vf_share_config config = {
	    .root_fd = host_fd,
	    .proc_fd_dir = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC),
	    .handle_mode = mode,
	    .inode_fd_budget = budget,
	    .open_budget = 100,
	    .lock_waiters = 10,
	    .pool_threads = pool_threads,
	    .entry_timeout_ns = 1500000000,
	    .attr_timeout_ns = 1,
	    .xattr = true,
	};
	struct vf_share *share;
	int error;

	share = vf_share_new(&config, &error);
	CHECK(share);
	close(config.proc_fd_dir);
	vf_share_start_session(share, SESSION, 1 << 20);
	return share;
}

static inline void host_write(const char *name, const char *text)
{
	int fd = openat(host_fd, name, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type;
	return ftw->level ? remove(path) : 0;
}

static inline void host_clean(void)
{
	CHECK_EQ(nftw(base, remove_one, 20, FTW_DEPTH | FTW_PHYS | FTW_MOUNT), 0);
}

static inline void with(const char *what, void (*test)(struct guest *), enum vf_handle_mode mode,
			uint32_t budget)
{
	struct vf_share *share = open_share(mode, budget);
	struct guest g;

	fprintf(stderr, "%s, handles %d, budget %u ", what, mode, budget);
	guest_enter(&g, share);
	test(&g);
	guest_leave(&g);
	vf_share_free(share);
	host_clean();
	fprintf(stderr, "ok\n");
}

#define RUN(test, mode, budget) with(#test, test, mode, budget)
#define RUN_ALL_MODES(test)                                                                        \
	do {                                                                                       \
		RUN(test, VF_HANDLES_NEVER, 5000);                                                 \
		RUN(test, VF_HANDLES_PREFER, 5000);                                                \
		RUN(test, VF_HANDLES_PREFER, 1);                                                   \
		RUN(test, VF_HANDLES_MANDATORY, 5);                                                \
	} while (0)

/* A directory in a mount namespace of its own, since tests mount things. */
static void set_up(void)
{
	if (geteuid()) {
		fprintf(stderr, "needs root\n");
		exit(1);
	}
	umask(0);
	CHECK_EQ(unshare(CLONE_NEWNS), 0);
	CHECK_EQ(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), 0);
	CHECK(mkdtemp(base));
	host_fd = open(base, O_PATH | O_DIRECTORY | O_CLOEXEC);
	CHECK(host_fd >= 0);
}

#endif
