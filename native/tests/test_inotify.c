/* SPDX-License-Identifier: Apache-2.0 */
/* From a change on the host to the element, by inotify. */
#include <sys/inotify.h>

#include "taker.h"

/* ---- events on a share --------------------------------------------------------- */

static struct vf_events *start_events(struct guest *g, uint64_t flags)
{
	struct vf_events_config config = {
	    .source = VF_EVENTS_INOTIFY,
	    .source_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC),
	    .host_mask = IN_ALL_EVENTS,
	    .max_queued = 1000,
	    .max_watches = 2000,
	    .notify_buf_size = 320,
	};

	CHECK(config.source_fd >= 0);
	CHECK_EQ(vf_share_start_events(g->share, &config), 0);
	CHECK_EQ(vf_share_grant_events(g->share, flags, EVERYTHING), 0);
	taker_attach(g->share->events);
	return g->share->events;
}

/* Watches that the kernel has in the instance. */
static uint32_t kernel_watches(struct vf_events *events)
{
	char path[40], line[400];
	uint32_t n = 0;
	FILE *f;

	sprintf(path, "/proc/self/fdinfo/%d", events->config.source_fd);
	f = fopen(path, "r");
	CHECK(f);
	while (fgets(line, sizeof(line), f))
		n += !strncmp(line, "inotify wd:", 11);
	fclose(f);
	return n;
}

static struct vf_events_stats event_stats(struct guest *g)
{
	struct vf_events_stats s;

	settle(g->share->events);
	vf_share_get_events_stats(g->share, &s);
	CHECK_EQ(s.host_marks, kernel_watches(g->share->events));
	return s;
}

#define QUIET (VF_FS_ENTRY_EVENTS | VF_FS_MODIFY | VF_FS_ATTRIB | VF_FS_SELF_EVENTS | ON_CHILD)

/* ---- what is tested ---------------------------------------------------------------- */

static void entries_of_a_watched_directory(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t dir;

	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, VF_FS_ENTRY_EVENTS), 0);
	host_touch("unwatched");
	host_touch("dir/f");
	expect(events, "CREATE %llx f", U(dir));
	host_mkdir("dir/d");
	expect(events, "CREATE dir %llx d", U(dir));
	CHECK_EQ(symlinkat("nowhere", host_fd, "dir/l"), 0);
	expect(events, "CREATE %llx l", U(dir));
	CHECK_EQ(linkat(host_fd, "dir/f", host_fd, "dir/hard", 0), 0);
	expect(events, "CREATE %llx hard", U(dir));
	CHECK_EQ(unlinkat(host_fd, "dir/hard", 0), 0);
	expect(events, "DELETE %llx hard", U(dir));
	CHECK_EQ(unlinkat(host_fd, "dir/d", AT_REMOVEDIR), 0);
	expect(events, "DELETE dir %llx d", U(dir));
	host_append("dir/f");
	expect_nothing(events);
	CHECK_EQ(event_stats(g).watches, 1);
	CHECK_EQ(event_stats(g).host_marks, 1);
	CHECK_EQ(event_stats(g).received, 6);
	CHECK_EQ(event_stats(g).delivered, 6);
}

static void a_watch_ends(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);

	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	host_touch("a");
	expect(events, "CREATE 1 a");
	CHECK_EQ(watch(g, 1, VF_FS_CREATE | VF_FS_DELETE), 0);
	CHECK_EQ(unlinkat(host_fd, "a", 0), 0);
	expect(events, "DELETE 1 a");
	CHECK_EQ(watch(g, 1, VF_FS_DELETE), 0);
	host_touch("a");
	CHECK_EQ(unlinkat(host_fd, "a", 0), 0);
	expect(events, "DELETE 1 a");
	CHECK_EQ(event_stats(g).received, 3);
	CHECK_EQ(watch(g, 1, 0), 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
	host_write("b", "x");
	expect_nothing(events);
	CHECK_EQ(event_stats(g).received, 3);
	/* With the inode, at the latest. */
	CHECK_EQ(watch(g, must_lookup(g, 1, "b"), VF_FS_MODIFY), 0);
	CHECK_EQ(event_stats(g).host_marks, 1);
	forget(g, entry(g)->nodeid, 1);
	CHECK_EQ(event_stats(g).host_marks, 0);
	/* What inotify does not know needs no watch on the host. */
	CHECK_EQ(watch(g, 1, VF_FS_OPEN_EXEC), 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
	CHECK_EQ(event_stats(g).watches, 1);
	CHECK_EQ(watch(g, 1, VF_FS_OPEN_EXEC | VF_FS_CREATE), 0);
	host_touch("c");
	expect(events, "CREATE 1 c");
	CHECK_EQ(watch(g, 1, VF_FS_OPEN_EXEC), 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
}

static void children_of_a_watched_directory(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t f, d;

	host_touch("f");
	host_touch("stranger");
	host_mkdir("d");
	f = must_lookup(g, 1, "f");
	d = must_lookup(g, 1, "d");
	CHECK_EQ(watch(g, 1, QUIET), 0);
	host_append("f");
	expect(events, "MODIFY 1 f > %llx", U(f));
	host_append("stranger");
	expect(events, "MODIFY 1 stranger");
	CHECK_EQ(fchmodat(host_fd, "f", 0600, 0), 0);
	expect(events, "ATTRIB 1 f > %llx", U(f));
	CHECK_EQ(fchmodat(host_fd, "d", 0700, 0), 0);
	expect(events, "ATTRIB dir 1 d > %llx", U(d));
	/* What happens to the directory itself. */
	CHECK_EQ(fchmodat(host_fd, ".", 0755, 0), 0);
	expect(events, "ATTRIB dir 1");
	/* Without its children. */
	CHECK_EQ(watch(g, 1, QUIET & ~ON_CHILD), 0);
	host_append("f");
	CHECK_EQ(fchmodat(host_fd, ".", 0700, 0), 0);
	expect(events, "ATTRIB dir 1");
	expect_nothing(events);
}

static void an_object_and_its_directory_watched_are_told_once(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t f, d;

	host_touch("f");
	host_mkdir("d");
	f = must_lookup(g, 1, "f");
	d = must_lookup(g, 1, "d");
	CHECK_EQ(watch(g, f, QUIET), 0);
	CHECK_EQ(watch(g, d, QUIET), 0);
	host_append("f");
	expect(events, "MODIFY %llx", U(f));
	CHECK_EQ(fchmodat(host_fd, "d", 0700, 0), 0);
	expect(events, "ATTRIB dir %llx", U(d));
	CHECK_EQ(watch(g, 1, QUIET), 0);
	for (int i = 0; i < 50; i++) {
		host_append("f");
		expect(events, "MODIFY 1 f > %llx", U(f));
		CHECK_EQ(fchmodat(host_fd, "d", 0700, 0), 0);
		expect(events, "ATTRIB dir 1 d > %llx", U(d));
		CHECK_EQ(fchmodat(host_fd, "f", 0600, 0), 0);
		expect(events, "ATTRIB 1 f > %llx", U(f));
	}
	expect_nothing(events);
	/* By another name, whose directory nobody watches. */
	CHECK_EQ(linkat(host_fd, "f", host_fd, "d/hard", 0), 0);
	expect(events, "ATTRIB %llx", U(f));
	expect(events, "CREATE %llx hard > %llx", U(d), U(f));
	CHECK_EQ(watch(g, d, 0), 0);
	host_append("d/hard");
	expect(events, "MODIFY %llx", U(f));
	expect_nothing(events);
}

static void renames(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t a, b, f, d;
	uint32_t cookie;

	host_mkdir("a");
	host_mkdir("b");
	host_mkdir("c");
	host_touch("a/f");
	host_mkdir("a/d");
	a = must_lookup(g, 1, "a");
	b = must_lookup(g, 1, "b");
	f = must_lookup(g, a, "f");
	d = must_lookup(g, a, "d");
	CHECK_EQ(watch(g, a, QUIET), 0);
	CHECK_EQ(watch(g, b, VF_FS_RENAME), 0);
	CHECK_EQ(renameat(host_fd, "a/f", host_fd, "a/g"), 0);
	expect(events, "FROM %llx f > %llx split", U(a), U(f));
	cookie = taker.got[taker.read - 1].element.cookie;
	CHECK(cookie);
	expect(events, "TO %llx g > %llx split", U(a), U(f));
	CHECK_EQ(taker.got[taker.read - 1].element.cookie, cookie);
	CHECK_EQ(renameat(host_fd, "a/d", host_fd, "b/e"), 0);
	expect(events, "FROM dir %llx d > %llx split", U(a), U(d));
	CHECK(taker.got[taker.read - 1].element.cookie != cookie);
	expect(events, "TO dir %llx e > %llx split", U(b), U(d));
	/* Out of what is watched, and back. */
	CHECK_EQ(renameat(host_fd, "a/g", host_fd, "c/g"), 0);
	expect(events, "FROM %llx g", U(a));
	CHECK_EQ(taker.got[taker.read - 1].element.cookie, 0);
	CHECK_EQ(renameat(host_fd, "c/g", host_fd, "b/g"), 0);
	expect(events, "TO %llx g > %llx", U(b), U(f));
	CHECK_EQ(taker.got[taker.read - 1].element.cookie, 0);
	/* Of itself. */
	CHECK_EQ(watch(g, f, VF_FS_MOVE_SELF), 0);
	CHECK_EQ(renameat(host_fd, "b/g", host_fd, "c/g"), 0);
	expect(events, "FROM %llx g", U(b));
	expect(events, "MOVE_SELF %llx", U(f));
	CHECK_EQ(watch(g, d, VF_FS_MOVE_SELF), 0);
	CHECK_EQ(renameat(host_fd, "b/e", host_fd, "c/e"), 0);
	expect(events, "FROM dir %llx e", U(b));
	expect(events, "MOVE_SELF dir %llx", U(d));
	/* Many at once. */
	for (int i = 0; i < 100; i++) {
		CHECK_EQ(renameat(host_fd, i % 2 ? "b/g" : "c/g", host_fd, i % 2 ? "c/g" : "b/g"),
			 0);
		CHECK_EQ(renameat(host_fd, i % 2 ? "a/x" : "c/e", host_fd, i % 2 ? "c/e" : "a/x"),
			 0);
	}
	for (int i = 0; i < 100; i++) {
		/* Which object it was is asked for later, when the name may have gone again. */
		settle(events);
		CHECK(!strncmp(next_text(), i % 2 ? "FROM" : "TO", i % 2 ? 4 : 2));
		expect(events, "MOVE_SELF %llx", U(f));
		CHECK(!strncmp(next_text(), i % 2 ? "FROM dir" : "TO dir", i % 2 ? 8 : 6));
		expect(events, "MOVE_SELF dir %llx", U(d));
	}
	expect_nothing(events);
}

static void the_end_of_a_watched_file_is_told(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t f;

	host_touch("f");
	f = must_lookup(g, 1, "f");
	CHECK_EQ(watch(g, 1, VF_FS_ENTRY_EVENTS), 0);
	CHECK_EQ(watch(g, f, VF_FS_DELETE_SELF), 0);
	CHECK_EQ(linkat(host_fd, "f", host_fd, "g", 0), 0);
	expect(events, "CREATE 1 g > %llx", U(f));
	CHECK_EQ(unlinkat(host_fd, "f", 0), 0);
	expect(events, "DELETE 1 f");
	CHECK_EQ(unlinkat(host_fd, "g", 0), 0);
	expect(events, "DELETE_SELF %llx", U(f));
	expect(events, "DELETE 1 g");
	expect_nothing(events);
}

static void both_mounts_of_an_object_are_told(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	char from[100], to[100];
	uint64_t dir, other;

	host_mkdir("dir");
	host_mkdir("other");
	sprintf(from, "%s/dir", base);
	sprintf(to, "%s/other", base);
	CHECK_EQ(mount(from, to, NULL, MS_BIND, NULL), 0);
	dir = must_lookup(g, 1, "dir");
	other = must_lookup(g, 1, "other");
	CHECK(dir != other);
	CHECK_EQ(watch(g, dir, VF_FS_CREATE), 0);
	CHECK_EQ(watch(g, other, VF_FS_CREATE | VF_FS_DELETE), 0);
	CHECK_EQ(event_stats(g).host_marks, 1);
	host_touch("dir/f");
	settle(events);
	CHECK_EQ(taker.n, 2);
	CHECK_EQ(taker.got[0].element.nodeid + taker.got[1].element.nodeid, dir + other);
	taker.read = 2;
	CHECK_EQ(unlinkat(host_fd, "other/f", 0), 0);
	expect(events, "DELETE %llx f", U(other));
	CHECK_EQ(watch(g, dir, VF_FS_CREATE | VF_FS_ATTRIB), 0);
	CHECK_EQ(fchmodat(host_fd, "dir", 0700, 0), 0);
	expect(events, "ATTRIB dir %llx", U(dir));
	CHECK_EQ(watch(g, dir, VF_FS_CREATE), 0);
	host_touch("dir/f");
	CHECK_EQ(unlinkat(host_fd, "other/f", 0), 0);
	settle(events);
	CHECK_EQ(taker.n - taker.read, 3);
	taker.read += 3;
	/* One goes, the other stays. */
	CHECK_EQ(watch(g, other, 0), 0);
	CHECK_EQ(event_stats(g).host_marks, 1);
	host_touch("dir/f");
	expect(events, "CREATE %llx f", U(dir));
	CHECK_EQ(watch(g, dir, 0), 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
	expect_nothing(events);
	CHECK_EQ(umount2(to, MNT_DETACH), 0);
}

static void the_hosts_overflow_is_passed_on(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	unsigned int limit = 0;
	char name[20];
	FILE *f = fopen("/proc/sys/fs/inotify/max_queued_events", "r");

	CHECK(f && fscanf(f, "%u", &limit) == 1);
	fclose(f);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	pthread_mutex_lock(&events->busy);
	for (unsigned int i = 0; i < limit + 10; i++) {
		sprintf(name, "n%u", i);
		host_touch(name);
	}
	/* More than the outbox holds, too. */
	vf_outbox_detach(events->outbox, &taker.sink);
	pthread_mutex_unlock(&events->busy);
	CHECK_EQ(event_stats(g).host_overflows, 1);
	CHECK_EQ(vf_outbox_attach(events->outbox, &taker.sink), 0);
	vf_outbox_clear(events->outbox);
	host_touch("after");
	expect(events, "CREATE 1 after");
}

static void a_new_session_hears_nothing_of_the_old(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);

	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(event_stats(g).host_marks, 0);
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS, EVERYTHING), 0);
	host_touch("f");
	expect_nothing(events);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	host_touch("g");
	expect(events, "CREATE 1 g");
}

#define RUN_ALL(test)                                                                              \
	do {                                                                                       \
		RUN(test, VF_HANDLES_NEVER, 5000);                                                 \
		RUN(test, VF_HANDLES_PREFER, 1);                                                   \
	} while (0)

int main(void)
{
	set_up();
	RUN_ALL(entries_of_a_watched_directory);
	RUN_ALL(a_watch_ends);
	RUN_ALL(children_of_a_watched_directory);
	RUN_ALL(an_object_and_its_directory_watched_are_told_once);
	RUN_ALL(renames);
	RUN_ALL(the_end_of_a_watched_file_is_told);
	RUN_ALL(both_mounts_of_an_object_are_told);
	RUN_ALL(the_hosts_overflow_is_passed_on);
	RUN_ALL(a_new_session_hears_nothing_of_the_old);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
