/* SPDX-License-Identifier: Apache-2.0 */
/* From one mark on the file system to marks on inodes, while things happen: each is told once. */
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <time.h>

#include "../fanotify_move.h"
#include "taker.h"

#define HOST_MASK                                                                                  \
	(VF_FS_ENTRY_EVENTS | VF_FS_SELF_EVENTS | VF_FS_RENAME |                                   \
	 (VF_FS_CHILD_EVENTS & ~VF_FS_OPEN_EXEC))
#define MARKED                                                                                     \
	(VF_FS_CREATE | VF_FS_DELETE | VF_FS_RENAME | VF_FS_SELF_EVENTS | VF_FS_MODIFY |           \
	 VF_FS_ATTRIB | VF_FS_CLOSE_WRITE)
#define FILES 150
#define PASSES 3

static int new_group(void)
{
	int fd = fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC | FAN_REPORT_FID |
				   FAN_REPORT_DFID_NAME | FAN_REPORT_TARGET_FID |
				   FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS,
			       O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0);
	return fd;
}

static struct vf_events *start_events(struct guest *g, int next_fd)
{
	struct vf_events_config config = {
	    .source = VF_EVENTS_FANOTIFY,
	    .source_fd = new_group(),
	    .order_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC),
	    .next_fd = next_fd,
	    .marker_fd = -1,
	    .host_mask = HOST_MASK,
	    .filesystem_mask = MARKED,
	    .max_queued = 1000,
	    .max_watches = 2000,
	    .notify_buf_size = 320,
	};

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

/* Wakes the source's thread until it has said this. */
static void await_notice(struct guest *g, const char *part)
{
	char text[256];

	for (;;) {
		host_touch("wake");
		CHECK_EQ(unlinkat(host_fd, "wake", 0), 0);
		if (vf_share_next_event_notice(g->share, text, sizeof(text)))
			break;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	fprintf(stderr, "(%s) ", text);
	CHECK(strstr(text, part));
}

static uint64_t host_marks(struct guest *g)
{
	struct vf_events_stats s;

	settle(g->share->events);
	vf_share_get_events_stats(g->share, &s);
	return s.host_marks;
}

/* A process that changes each file once, and makes a directory's entry for each. */
static pid_t start_changes(void)
{
	pid_t child = fork();
	char name[30];

	if (child)
		return child;
	for (int i = 0; i < FILES; i++) {
		sprintf(name, "files/%d", i);
		CHECK_EQ(fchmodat(host_fd, name, 0600, 0), 0);
		sprintf(name, "dir/%d", i);
		host_touch(name);
		CHECK_EQ(unlinkat(host_fd, name, 0), 0);
		nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
	}
	_exit(0);
}

/* ---- what is tested ---------------------------------------------------------------- */

static void everything_is_told_once(struct guest *g)
{
	struct vf_events *events = start_events(g, new_group());
	int changed[FILES] = {0}, made[FILES] = {0}, removed[FILES] = {0}, status;
	uint64_t dir, files[FILES];
	char name[30], reason[200];
	pid_t child;

	host_mkdir("files");
	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, MARKED | ON_CHILD), 0);
	for (int i = 0; i < FILES; i++) {
		sprintf(name, "files/%d", i);
		host_touch(name);
		files[i] = must_lookup(g, must_lookup(g, 1, "files"), strchr(name, '/') + 1);
		CHECK_EQ(watch(g, files[i], VF_FS_ATTRIB), 0);
	}
	CHECK_EQ(host_marks(g), 0);
	CHECK(!vf_share_events_moved(g->share, reason, sizeof(reason)));
	child = start_changes();
	vf_fanotify_move_want(events);
	await_notice(g, "events: now by fanotify, marks on watched inodes");
	CHECK(vf_share_events_moved(g->share, reason, sizeof(reason)));
	CHECK(strstr(reason, "the file system is busy"));
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	for (int i = 0; i < 40; i++) { /* for longer than anything is waited for */
		settle(events);
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	}
	for (uint32_t n = 0; n < taker.n; n++) {
		const struct vf_fsnotify_out *e = &taker.got[n].element;
		int i = e->nodeid == dir ? atoi(taker.got[n].name) : 0;

		while (e->nodeid != dir && i < FILES && e->nodeid != files[i])
			i++;
		CHECK(i >= 0 && i < FILES);
		if (e->nodeid != dir) {
			CHECK_EQ(e->mask, VF_FS_ATTRIB);
			CHECK_EQ(e->namelen, 0);
			CHECK_EQ(changed[i]++, 0);
		} else if (e->mask == VF_FS_CREATE) {
			CHECK_EQ(made[i]++, 0);
		} else {
			CHECK_EQ(e->mask, VF_FS_DELETE);
			CHECK_EQ(made[i], 1);
			CHECK_EQ(removed[i]++, 0);
		}
	}
	CHECK_EQ(taker.n, 3 * FILES);
	taker.read = taker.n;
	/* The directory, its parent, the files. */
	CHECK_EQ(in_kernel(events, "fanotify ino:"), FILES + 2);
	CHECK_EQ(host_marks(g), FILES + 2);
	for (int i = 0; i < FILES; i++)
		CHECK_EQ(watch(g, files[i], 0), 0);
	CHECK_EQ(host_marks(g), 2);
	CHECK_EQ(watch(g, must_lookup(g, 1, "files"), VF_FS_CREATE), 0);
	host_touch("files/new");
	expect(events, "CREATE %llx new", U(must_lookup(g, 1, "files")));
	CHECK_EQ(watch(g, must_lookup(g, 1, "files"), 0), 0);
	CHECK_EQ(watch(g, dir, 0), 0);
	CHECK_EQ(host_marks(g), 0);
	CHECK_EQ(in_kernel(events, "fanotify ino:"), 0);
}

/* What cannot be marked is not given up for it. */
static void without_all_marks_it_stays(struct guest *g)
{
	struct vf_events *events = start_events(g, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	char reason[200];
	uint64_t dir;

	host_mkdir("dir");
	host_mkdir("dir/sub");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, MARKED | ON_CHILD), 0);
	vf_fanotify_move_want(events);
	await_notice(g, "but the mark on it stays: marks on watched inodes: Invalid argument");
	CHECK(!vf_share_events_moved(g->share, reason, sizeof(reason)));
	host_touch("dir/f");
	expect(events, "CREATE %llx f", U(dir));
	CHECK_EQ(watch(g, must_lookup(g, dir, "sub"), MARKED), 0);
	CHECK_EQ(watch(g, must_lookup(g, dir, "sub"), 0), 0);
	CHECK_EQ(watch(g, dir, 0), 0);
	CHECK_EQ(host_marks(g), 0);
	host_touch("dir/g");
	expect_nothing(events);
}

/* A guest that watches everything needs the mark on the file system. */
static void a_watch_on_the_whole_share_keeps_the_mark(struct guest *g)
{
	struct vf_events *events = start_events(g, new_group());
	char reason[200];

	CHECK_EQ(vf_watch_share(events, VF_FS_CREATE), 0);
	vf_fanotify_move_want(events);
	for (int i = 0; i < 20; i++) {
		char name[20];

		sprintf(name, "f%d", i);
		host_touch(name);
		expect(events, "CREATE 1 f%d", i);
	}
	CHECK(!vf_share_events_moved(g->share, reason, sizeof(reason)));
	CHECK_EQ(vf_watch_share(events, 0), 0);
	await_notice(g, "events: now by fanotify, marks on watched inodes");
}

int main(void)
{
	set_up();
	for (int i = 0; i < PASSES; i++)
		RUN(everything_is_told_once, VF_HANDLES_NEVER, 5000);
	RUN(everything_is_told_once, VF_HANDLES_PREFER, 5);
	RUN(without_all_marks_it_stays, VF_HANDLES_NEVER, 5000);
	RUN(a_watch_on_the_whole_share_keeps_the_mark, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
