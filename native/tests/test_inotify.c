/* SPDX-License-Identifier: Apache-2.0 */
/* From a change on the host to the element, by inotify. */
#include <sys/inotify.h>

#include "../inotify_reader.h"
#include "taker.h"

/* ---- events on a share --------------------------------------------------------- */

static struct vf_events *start_events(struct guest *g, uint64_t flags)
{
	struct vf_events_config config = {
	    .source = VF_EVENTS_INOTIFY,
	    .order_fd = -1,
	    .next_fd = -1,
	    .marker_fd = -1,
	    .source_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC),
	    .host_mask = IN_ALL_EVENTS,
	    .max_queued = 1000,
	    .max_watches = 2000,
	    .notify_buf_size = 320,
	    .max_parked = 64,
	};

	CHECK(config.source_fd >= 0);
	CHECK_EQ(vf_share_start_events(g->share, &config), 0);
	CHECK_EQ(vf_share_grant_events(g->share, flags, EVERYTHING), 0);
	taker_attach(g->share->events);
	return g->share->events;
}

static struct vf_events_stats event_stats(struct guest *g)
{
	struct vf_events_stats s;

	settle(g->share->events);
	vf_share_get_events_stats(g->share, &s);
	CHECK_EQ(s.host_marks, in_kernel(g->share->events, "inotify wd:"));
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
	FILE *f = fopen("/proc/sys/fs/inotify/max_queued_events", "r");

	CHECK(f && fscanf(f, "%u", &limit) == 1);
	fclose(f);
	host_touch("a");
	CHECK_EQ(watch(g, 1, VF_FS_RENAME | VF_FS_CREATE), 0);
	pthread_mutex_lock(&events->busy);
	/* Two records each. */
	for (unsigned int i = 0; i < limit / 2 + 10; i++)
		CHECK_EQ(renameat(host_fd, i % 2 ? "b" : "a", host_fd, i % 2 ? "a" : "b"), 0);
	/* More than this guest takes. */
	vf_outbox_detach(events->outbox, &taker.sink);
	pthread_mutex_unlock(&events->busy);
	CHECK_EQ(event_stats(g).host_overflows, 1);
	CHECK_EQ(event_stats(g).queued + event_stats(g).lost, limit + 1);
	vf_outbox_clear(events->outbox);
	CHECK_EQ(vf_outbox_attach(events->outbox, &taker.sink), 0);
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

/* ---- the guest's own ---------------------------------------------------------------- */

/* As the queue's thread runs it; payload: what a WRITE brings. */
static int32_t dispatch(struct guest *g, uint32_t opcode, uint64_t nodeid, const char *payload)
{
	struct iovec iov = {(char *)payload, payload ? strlen(payload) : 0};
	struct vf_req r = {
	    .share = g->share,
	    .header = g->header,
	    .args = g->args,
	    .args_size = g->args_size,
	    .in = &iov,
	    .n_in = payload ? 1 : 0,
	    .in_size = (uint32_t)iov.iov_len,
	    .out_size = 65536,
	};

	r.header.opcode = opcode;
	r.header.nodeid = nodeid;
	r.header.len = (uint32_t)sizeof(r.header) + r.args_size + r.in_size;
	g->args_size = 0;
	return vf_dispatch(&g->thread, &r);
}

static void guest_write(struct guest *g, uint64_t nodeid, uint64_t fh, const char *text)
{
	struct fuse_write_in in = {.fh = fh, .size = (uint32_t)strlen(text)};

	arg(g, &in, sizeof(in));
	CHECK_EQ(dispatch(g, FUSE_WRITE, nodeid, text), sizeof(struct fuse_write_out));
}

static void guest_chmod(struct guest *g, uint64_t nodeid, uint32_t mode)
{
	struct fuse_setattr_in in = {.valid = FATTR_MODE, .mode = mode};

	arg(g, &in, sizeof(in));
	CHECK_EQ(dispatch(g, FUSE_SETATTR, nodeid, NULL), sizeof(struct fuse_attr_out));
}

/* Creates a file and gives its nodeid. */
static uint64_t guest_create(struct guest *g, uint64_t dir, const char *name, uint64_t *fh)
{
	struct fuse_create_in in = {.flags = O_RDWR | O_CREAT, .mode = 0644};

	arg(g, &in, sizeof(in));
	arg_string(g, name);
	CHECK_EQ(dispatch(g, FUSE_CREATE, dir, NULL),
		 sizeof(struct fuse_entry_out) + sizeof(struct fuse_open_out));
	*fh = ((struct fuse_open_out *)(entry(g) + 1))->fh;
	return entry(g)->nodeid;
}

static void guest_release(struct guest *g, uint64_t nodeid, uint64_t fh)
{
	arg(g, &(struct fuse_release_in){.fh = fh}, sizeof(struct fuse_release_in));
	CHECK_EQ(dispatch(g, FUSE_RELEASE, nodeid, NULL), 0);
}

static void guest_rename(struct guest *g, uint64_t from, const char *old, uint64_t to,
			 const char *new)
{
	arg(g, &(struct fuse_rename2_in){.newdir = to}, sizeof(struct fuse_rename2_in));
	arg_string(g, old);
	arg_string(g, new);
	CHECK_EQ(dispatch(g, FUSE_RENAME2, from, NULL), 0);
}

static void guest_remove(struct guest *g, uint32_t opcode, uint64_t dir, const char *name)
{
	arg_string(g, name);
	CHECK_EQ(dispatch(g, opcode, dir, NULL), 0);
}

#define ALL_OF_INOTIFY (IN_ALL_EVENTS | ON_CHILD)

/* Everything that a guest does, with everything watched; nothing of it is told. */
static void guest_at_work(struct guest *g, uint64_t d, uint64_t e)
{
	struct fuse_mkdir_in mkdir_in = {.mode = 0755};
	struct fuse_link_in link_in;
	struct fuse_open_in open_in = {.flags = O_RDONLY};
	struct fuse_read_in read_in = {.size = 4096};
	struct fuse_setattr_in truncate = {.valid = FATTR_SIZE};
	uint64_t f, fh, other, sub;

	f = guest_create(g, d, "f", &fh);
	CHECK_EQ(watch(g, f, ALL_OF_INOTIFY), 0);
	guest_write(g, f, fh, "some text");
	guest_chmod(g, f, 0600);
	arg(g, &truncate, sizeof(truncate));
	CHECK_EQ(dispatch(g, FUSE_SETATTR, f, NULL), sizeof(struct fuse_attr_out));
	guest_release(g, f, fh);
	link_in.oldnodeid = f;
	arg(g, &link_in, sizeof(link_in));
	arg_string(g, "hard");
	CHECK_EQ(dispatch(g, FUSE_LINK, e, NULL), sizeof(struct fuse_entry_out));
	guest_remove(g, FUSE_UNLINK, e, "hard");
	guest_rename(g, d, "f", d, "g");
	guest_rename(g, d, "g", e, "f");
	/* Over another that is watched, too. */
	other = guest_create(g, d, "over", &fh);
	guest_release(g, other, fh);
	CHECK_EQ(watch(g, other, ALL_OF_INOTIFY), 0);
	guest_rename(g, d, "over", e, "f");
	forget(g, f, 2);
	guest_remove(g, FUSE_UNLINK, e, "f");
	forget(g, other, 1);
	arg(g, &mkdir_in, sizeof(mkdir_in));
	arg_string(g, "sub");
	CHECK_EQ(dispatch(g, FUSE_MKDIR, d, NULL), sizeof(struct fuse_entry_out));
	sub = entry(g)->nodeid;
	CHECK_EQ(watch(g, sub, ALL_OF_INOTIFY), 0);
	arg(g, &open_in, sizeof(open_in));
	CHECK_EQ(dispatch(g, FUSE_OPENDIR, sub, NULL), sizeof(struct fuse_open_out));
	read_in.fh = ((struct fuse_open_out *)g->thread.reply)->fh;
	fh = read_in.fh;
	arg(g, &read_in, sizeof(read_in));
	CHECK(dispatch(g, FUSE_READDIR, sub, NULL) >= 0);
	arg(g, &(struct fuse_release_in){.fh = fh}, sizeof(struct fuse_release_in));
	CHECK_EQ(dispatch(g, FUSE_RELEASEDIR, sub, NULL), 0);
	arg_string(g, "link");
	arg_string(g, "nowhere");
	CHECK_EQ(dispatch(g, FUSE_SYMLINK, d, NULL), sizeof(struct fuse_entry_out));
	forget(g, entry(g)->nodeid, 1);
	guest_remove(g, FUSE_UNLINK, d, "link");
	guest_remove(g, FUSE_RMDIR, d, "sub");
	forget(g, sub, 1);
}

static void our_own_changes_are_not_told(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t d, e;

	host_mkdir("d");
	host_mkdir("e");
	d = must_lookup(g, 1, "d");
	e = must_lookup(g, 1, "e");
	CHECK_EQ(watch(g, d, ALL_OF_INOTIFY), 0);
	CHECK_EQ(watch(g, e, ALL_OF_INOTIFY), 0);
	guest_at_work(g, d, e);
	expect_nothing(events);
	CHECK(event_stats(g).own > 20);
	CHECK_EQ(event_stats(g).host_marks, 3) /* d, e, and what they are in */;
	/* All of it while the source cannot read, which sees it later as one stream. */
	taker.read = taker.n;
	host_touch("d/before");
	pthread_mutex_lock(&events->busy);
	for (int i = 0; i < 5; i++) {
		struct fuse_mkdir_in in = {.mode = 0755};

		arg(g, &in, sizeof(in));
		arg_string(g, "sub");
		CHECK_EQ(dispatch(g, FUSE_MKDIR, d, NULL), sizeof(struct fuse_entry_out));
		forget(g, entry(g)->nodeid, 1);
		CHECK_EQ(mkdirat(host_fd, "d/host", 0755), 0);
		guest_remove(g, FUSE_RMDIR, d, "sub");
		CHECK_EQ(unlinkat(host_fd, "d/host", AT_REMOVEDIR), 0);
	}
	pthread_mutex_unlock(&events->busy);
	expect(events, "CREATE %llx before", U(d));
	for (int i = 0; i < 5; i++) {
		expect(events, "CREATE dir %llx host", U(d));
		expect(events, "DELETE dir %llx host", U(d));
	}
	expect_nothing(events);
}

/* Operations that could have caused something and did not leave nothing behind. */
static void operations_without_a_record_do_not_add_up(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	struct fuse_setattr_in nothing = {.valid = 0};
	uint64_t f;

	host_touch("f");
	f = must_lookup(g, 1, "f");
	CHECK_EQ(watch(g, f, VF_FS_ATTRIB), 0);
	for (int turn = 0; turn < 2; turn++) {
		for (int i = 0; i < 10000; i++) {
			arg(g, &nothing, sizeof(nothing));
			CHECK_EQ(dispatch(g, FUSE_SETATTR, f, NULL), sizeof(struct fuse_attr_out));
		}
		guest_chmod(g, f, 0600 + turn);
		expect_nothing(events);
		CHECK_EQ(event_stats(g).own, turn + 1);
	}
}

/* The host does the same as the guest just did, to the same object. */
static void the_hosts_same_change_is_told(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t f;

	host_touch("f");
	f = must_lookup(g, 1, "f");
	CHECK_EQ(watch(g, f, VF_FS_ATTRIB), 0);
	for (int i = 0; i < 100; i++) {
		guest_chmod(g, f, 0600);
		/* Else the kernel makes one record of both. */
		settle(events);
		CHECK_EQ(fchmodat(host_fd, "f", 0644, 0), 0);
		expect(events, "ATTRIB %llx", U(f));
		expect_nothing(events);
	}
	CHECK_EQ(event_stats(g).own, 100);
}

struct worker {
	struct guest g;
	uint64_t f;
	uint32_t n;
};

static void *worker_main(void *arg)
{
	struct worker *w = arg;

	guest_enter(&w->g, w->g.share);
	for (uint32_t i = 0; i < w->n; i++)
		guest_chmod(&w->g, w->f, i % 2 ? 0600 : 0644);
	guest_leave(&w->g);
	return NULL;
}

/* Threads of the server on their own files, the host on another: its changes all come. */
static void many_at_once_are_told_apart(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	struct worker workers[3];
	pthread_t threads[3];
	char name[16];
	uint64_t h;

	host_touch("h");
	h = must_lookup(g, 1, "h");
	CHECK_EQ(watch(g, 1, VF_FS_ATTRIB | VF_FS_CREATE | ON_CHILD), 0);
	for (int i = 0; i < 3; i++) {
		sprintf(name, "f%d", i);
		host_touch(name);
		workers[i].f = must_lookup(g, 1, name);
		workers[i].g.share = g->share;
		workers[i].n = 500;
	}
	settle(events);
	taker.read = taker.n;
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, worker_main, &workers[i]), 0);
	for (int i = 0; i < 100; i++) {
		CHECK_EQ(fchmodat(host_fd, "h", i % 2 ? 0600 : 0644, 0), 0);
		expect(events, "ATTRIB 1 h > %llx", U(h));
	}
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	expect_nothing(events);
}

/* The guest's work on one file does not hide the host's on others, of which it holds nothing. */
static void the_hosts_work_on_unknown_files_is_told(struct guest *g)
{
	struct vf_events *events = start_events(g, ALL_FLAGS);
	uint64_t d, f;

	host_mkdir("d");
	host_mkdir("d/sub");
	host_touch("d/f");
	host_touch("d/sub/f");
	host_touch("d/other");
	d = must_lookup(g, 1, "d");
	f = must_lookup(g, must_lookup(g, d, "sub"), "f");
	CHECK_EQ(watch(g, d, VF_FS_ATTRIB | VF_FS_CREATE | VF_FS_DELETE | ON_CHILD), 0);
	for (int i = 0; i < 5; i++) {
		/* Its records are all where the guest's change can have been. */
		pthread_mutex_lock(&events->busy);
		CHECK_EQ(fchmodat(host_fd, "d/other", i % 2 ? 0600 : 0644, 0), 0);
		guest_chmod(g, f, i % 2 ? 0600 : 0644);
		CHECK_EQ(fchmodat(host_fd, "d/f", i % 2 ? 0600 : 0644, 0), 0);
		host_touch("d/gone");
		CHECK_EQ(fchmodat(host_fd, "d/gone", 0600, 0), 0);
		CHECK_EQ(unlinkat(host_fd, "d/gone", 0), 0);
		pthread_mutex_unlock(&events->busy);
		expect(events, "ATTRIB %llx other", U(d));
		expect(events, "ATTRIB %llx f", U(d));
		expect(events, "CREATE %llx gone", U(d));
		expect(events, "ATTRIB %llx gone", U(d));
		expect(events, "DELETE %llx gone", U(d));
		expect_nothing(events);
	}
}

struct renewer {
	struct vf_events *events;
	uint64_t dir;
	atomic_bool stop;
};

static void *renewer_main(void *arg)
{
	struct renewer *r = arg;
	struct vf_inode *dir = vf_inode_get(r->events->share, r->dir);
	struct guest g;

	guest_enter(&g, r->events->share);
	while (!r->stop)
		vf_watch_renew(r->events->watches, dir);
	vf_inode_put(r->events->share, dir);
	guest_leave(&g);
	return NULL;
}

/* As when the watched directory has moved. */
static void what_happens_while_a_watch_is_renewed_is_told(struct guest *g)
{
	struct renewer renewer = {.events = start_events(g, ALL_FLAGS)};
	pthread_t thread;

	host_mkdir("d");
	renewer.dir = must_lookup(g, 1, "d");
	CHECK_EQ(watch(g, renewer.dir, VF_FS_CREATE | VF_FS_DELETE), 0);
	CHECK_EQ(pthread_create(&thread, NULL, renewer_main, &renewer), 0);
	for (int round = 0; round < 20; round++) {
		for (int i = 0; i < 400; i++) {
			host_touch("d/f");
			CHECK_EQ(unlinkat(host_fd, "d/f", 0), 0);
		}
		settle(renewer.events);
		CHECK_EQ(taker.n, 800);
		taker.n = 0;
	}
	renewer.stop = true;
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

#define RUN_ALL(test)                                                                              \
	do {                                                                                       \
		RUN(test, VF_HANDLES_NEVER, 5000);                                                 \
		RUN(test, VF_HANDLES_PREFER, 1);                                                   \
	} while (0)

/* ---- a queue full of halves -------------------------------------------------------- */

/* As one who moves two names out of a directory by turns makes them. */
static void halves_without_another_take_a_moment(struct guest *g)
{
	static struct vf_events events;
	struct vf_inotify_reader reader = {.events = &events, .fd = -1};
	const uint32_t record_size = sizeof(struct inotify_event) + 16;
	uint64_t began_ns = vf_now_ns();
	struct vf_entry entries[64];
	uint32_t n;

	(void)g;
	reader.buffer = aligned_alloc(64, VF_SOURCE_BUFFER);
	CHECK(reader.buffer);
	memset(reader.buffer, 0, VF_SOURCE_BUFFER);
	reader.size = VF_SOURCE_BUFFER / record_size * record_size;
	for (uint32_t at = 0; at < reader.size; at += record_size) {
		struct inotify_event *record = (struct inotify_event *)(reader.buffer + at);

		*record = (struct inotify_event){
		    .wd = 1, .mask = IN_MOVED_FROM, .cookie = at / record_size + 1, .len = 16};
		record->name[0] = at / record_size % 2 ? 'a' : 'b';
	}
	for (uint32_t at = 0; at < reader.size; at += record_size) {
		reader.end = at + record_size;
		n = vf_inotify_entries(&reader, 1, VF_FS_ENTRY_EVENTS, 1, entries, 64);
		CHECK(at || (n == 64 && !entries[0].joined));
	}
	CHECK(vf_now_ns() - began_ns < 10000000000);
	free(reader.buffer);
}

/* ---- what is taken out of the host's queue early ----------------------------------- */

/* More than is kept, of records of all sizes. */
#define STREAM_RECORDS 300000u

static struct stream {
	struct vf_inotify_reader reader; /* first */
	uint64_t place;
	uint32_t next, limit;
} stream;

static uint32_t length_of(uint32_t number)
{
	return number % 17 * 16;
}

static ssize_t read_stream(struct vf_inotify_reader *reader, void *buffer, size_t size,
			   uint64_t *at)
{
	struct stream *s = (struct stream *)reader;
	uint8_t *to = buffer;

	*at = s->place;
	while (s->next < s->limit) {
		struct inotify_event record = {
		    .wd = 1, .mask = IN_CREATE, .cookie = s->next, .len = length_of(s->next)};

		if (size < sizeof(record) + record.len)
			break;
		memcpy(to, &record, sizeof(record));
		memset(to + sizeof(record), 0, record.len);
		to += sizeof(record) + record.len;
		size -= sizeof(record) + record.len;
		s->place += sizeof(record) + record.len;
		s->next++;
	}
	if (to != buffer)
		return to - (uint8_t *)buffer;
	errno = EAGAIN;
	return -1;
}

/* Whole records, each once, each at its place. */
static void fetch_all(struct stream *s, uint32_t *number, uint64_t *place)
{
	while (vf_inotify_fetch(&s->reader) > 0) {
		CHECK_EQ(s->reader.at, *place);
		for (uint32_t at = 0; at < s->reader.size;) {
			const struct inotify_event *record = (void *)(s->reader.buffer + at);

			CHECK(s->reader.size - at >= sizeof(*record));
			CHECK_EQ(record->cookie, *number);
			CHECK_EQ(record->len, length_of(*number));
			at += (uint32_t)sizeof(*record) + record->len;
			CHECK(at <= s->reader.size);
			++*number;
		}
		*place += s->reader.size;
	}
}

static void what_is_taken_out_early_comes_in_order(void)
{
	static struct vf_events events;
	uint32_t number = 0;
	uint64_t place = 0;

	stream.reader.events = &events;
	stream.reader.which = VF_WD_ORDER;
	stream.reader.fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	CHECK(stream.reader.fd >= 0);
	stream.reader.read = read_stream;
	stream.reader.buffer = aligned_alloc(64, VF_SOURCE_BUFFER);
	CHECK(stream.reader.buffer);
	/* Little by little, with and without room in what is there already. */
	while (stream.limit < STREAM_RECORDS / 3) {
		stream.limit += 1 + stream.limit / 3;
		vf_inotify_relieve(&stream.reader);
		CHECK_EQ(stream.next, stream.limit);
	}
	CHECK(vf_inotify_has_backlog(&events));
	stream.limit += 1000;
	fetch_all(&stream, &number, &place);
	CHECK_EQ(number, stream.limit);
	CHECK(!vf_inotify_has_backlog(&events));
	/* It is bounded; what is not taken out is not lost. */
	stream.limit += STREAM_RECORDS;
	vf_inotify_relieve(&stream.reader);
	CHECK(stream.next < stream.limit);
	fetch_all(&stream, &number, &place);
	CHECK_EQ(number, stream.limit);
	stream.limit += 100;
	vf_inotify_relieve(&stream.reader);
	vf_inotify_drop(&stream.reader);
	CHECK_EQ(vf_inotify_fetch(&stream.reader), 0);
	vf_backlog_clear(&events.backlog);
	free(stream.reader.buffer);
	close(stream.reader.fd);
	printf("%s ok\n", __func__);
}

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
	RUN_ALL(our_own_changes_are_not_told);
	RUN_ALL(the_hosts_work_on_unknown_files_is_told);
	RUN_ALL(operations_without_a_record_do_not_add_up);
	RUN_ALL(the_hosts_same_change_is_told);
	RUN_ALL(many_at_once_are_told_apart);
	RUN(what_happens_while_a_watch_is_renewed_is_told, VF_HANDLES_NEVER, 5000);
	RUN(halves_without_another_take_a_moment, VF_HANDLES_NEVER, 5000);
	what_is_taken_out_early_comes_in_order();
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
