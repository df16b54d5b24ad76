/* SPDX-License-Identifier: Apache-2.0 */
/* What becomes of facts of fanotify beside the order of inotify: each is told once. */
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <time.h>

#include "taker.h"

#define HOST_MASK                                                                                  \
	(VF_FS_ENTRY_EVENTS | VF_FS_SELF_EVENTS | VF_FS_RENAME |                                   \
	 (VF_FS_CHILD_EVENTS & ~VF_FS_OPEN_EXEC))
#define MARKED                                                                                     \
	(VF_FS_CREATE | VF_FS_DELETE | VF_FS_RENAME | VF_FS_SELF_EVENTS | VF_FS_MODIFY |           \
	 VF_FS_ATTRIB | VF_FS_CLOSE_WRITE)

static struct vf_events *start_events(struct guest *g)
{
	struct vf_events_config config = {
	    .source = VF_EVENTS_FANOTIFY,
	    .source_fd = fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC |
					   FAN_REPORT_FID | FAN_REPORT_DFID_NAME |
					   FAN_REPORT_TARGET_FID,
				       O_RDONLY | O_CLOEXEC),
	    .order_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC),
	    .next_fd = -1,
	    .marker_fd = -1,
	    .host_mask = HOST_MASK,
	    .filesystem_mask = MARKED,
	    .max_queued = 1000,
	    .max_watches = 2000,
	    .notify_buf_size = 320,
	};

	CHECK(config.source_fd >= 0 && config.order_fd >= 0);
	CHECK_EQ(fanotify_mark(config.source_fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
			       MARKED | FAN_ONDIR, AT_FDCWD, base),
		 0);
	CHECK_EQ(vf_share_start_events(g->share, &config), 0);
	pthread_mutex_lock(&g->share->events->busy);
	g->share->events->pid = -1; /* this process is the host, not the server */
	pthread_mutex_unlock(&g->share->events->busy);
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS, EVERYTHING), 0);
	taker_attach(g->share->events);
	return g->share->events;
}

/* For longer than anything is waited for. */
static void let_time_pass(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 150000000}, NULL);
}

static void inotify_falls_silent(struct vf_events *events)
{
	/* The directories' watches, behind the server's back. */
	for (int wd = 1; wd < 10; wd++)
		inotify_rm_watch(events->config.order_fd, wd);
	settle(events);
}

/* ---- what is tested ---------------------------------------------------------------- */

static void what_inotify_never_says_is_told_late(struct guest *g)
{
	struct vf_events *events = start_events(g);
	uint64_t dir;

	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, MARKED | ON_CHILD), 0);
	inotify_falls_silent(events);
	host_touch("dir/f");
	CHECK_EQ(renameat(host_fd, "dir/f", host_fd, "dir/g"), 0);
	/* Nothing else happens that could wake it. */
	for (int i = 0; i < 1000 && taker.n < 3; i++)
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	expect(events, "CREATE %llx f", U(dir));
	expect(events, "FROM %llx f split", U(dir));
	expect(events, "TO %llx g split", U(dir));
	let_time_pass();
	expect_nothing(events);
}

static void what_is_not_asked_for_is_not_told_late(struct guest *g)
{
	struct vf_events *events = start_events(g);
	uint64_t dir;

	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, VF_FS_CREATE), 0);
	inotify_falls_silent(events);
	pthread_mutex_lock(&events->busy);
	events->pid = getpid();
	pthread_mutex_unlock(&events->busy);
	host_touch("dir/own");
	let_time_pass();
	expect_nothing(events);
}

/* inotify makes one record of what two processes did, fanotify makes two. */
static void what_inotify_counts_as_one_is_told_once(struct guest *g)
{
	struct vf_events *events = start_events(g);
	uint64_t dir;
	pid_t child;

	host_mkdir("dir");
	host_touch("dir/f");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, VF_FS_MODIFY | ON_CHILD), 0);
	pthread_mutex_lock(&events->busy);
	host_append("dir/f");
	child = fork();
	if (!child) {
		host_append("dir/f");
		_exit(0);
	}
	CHECK_EQ(waitpid(child, NULL, 0), child);
	pthread_mutex_unlock(&events->busy);
	expect(events, "MODIFY %llx f", U(dir));
	let_time_pass();
	expect_nothing(events);
}

static void a_busy_directory_is_told_once(struct guest *g)
{
	struct vf_events *events = start_events(g);
	uint64_t dir;
	char name[20];

	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, VF_FS_CREATE | VF_FS_DELETE | VF_FS_CLOSE_WRITE | ON_CHILD), 0);
	for (int i = 0; i < 200; i++) {
		sprintf(name, "dir/f%d", i % 3);
		host_write(name, "x");
		CHECK_EQ(unlinkat(host_fd, name, 0), 0);
	}
	let_time_pass();
	for (int i = 0; i < 200; i++) {
		expect(events, "CREATE %llx f%d", U(dir), i % 3);
		expect(events, "CLOSE_WRITE %llx f%d", U(dir), i % 3);
		expect(events, "DELETE %llx f%d", U(dir), i % 3);
	}
	expect_nothing(events);
}

int main(void)
{
	set_up();
	RUN(what_inotify_never_says_is_told_late, VF_HANDLES_NEVER, 5000);
	RUN(what_is_not_asked_for_is_not_told_late, VF_HANDLES_NEVER, 5000);
	RUN(what_inotify_counts_as_one_is_told_once, VF_HANDLES_NEVER, 5000);
	RUN(a_busy_directory_is_told_once, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
