/* SPDX-License-Identifier: Apache-2.0 */
/* What becomes of facts of fanotify beside the order of inotify: each is told once. */
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <time.h>

#include "../order_facts.h"
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
	    .source_fd =
		fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC | FAN_REPORT_FID |
				  FAN_REPORT_DFID_NAME | FAN_REPORT_TARGET_FID,
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

/* fanotify's descriptor, while something else is in its place. */
static struct {
	atomic_int kept, source;
} late = {-1, -1};

/* In the place of libc's: the first wait is over when fanotify's records come. */
int nanosleep(const struct timespec *requested, struct timespec *remaining)
{
	int kept = atomic_exchange(&late.kept, -1);

	if (kept >= 0) {
		CHECK(dup2(kept, late.source) >= 0);
		close(kept);
		return 0;
	}
	return clock_nanosleep(CLOCK_MONOTONIC, 0, requested, remaining);
}

/*
 * The event's record of fanotify can be read only after the order has waited for it: whoever made
 * the change has lost the processor in between.
 */
static void append_with_fanotify_late(struct vf_events *events, int fd)
{
	int empty[2];

	CHECK_EQ(pipe2(empty, O_NONBLOCK | O_CLOEXEC), 0);
	pthread_mutex_lock(&events->busy);
	late.source = events->config.source_fd;
	late.kept = dup(events->config.source_fd);
	CHECK(late.kept >= 0);
	CHECK(dup2(empty[0], events->config.source_fd) >= 0);
	CHECK_EQ(write(fd, "x", 1), 1);
	pthread_mutex_unlock(&events->busy);
	settle(events);
	CHECK_EQ(late.kept, -1); /* it was waited for */
	close(empty[0]);
	close(empty[1]);
}

/* The same event by a name that is gone, by one that is there, and by the first again. */
static void write_by_two_names(struct vf_events *events, const char *gone, const char *there,
			       const int fds[2])
{
	for (int i = 0; i < 2; i++) {
		append_with_fanotify_late(events, fds[0]);
		expect(events, "MODIFY %s unlinked", gone);
		append_with_fanotify_late(events, fds[1]);
		expect(events, "MODIFY %s", there);
	}
	expect_nothing(events);
	close(fds[0]);
	close(fds[1]);
}

static void open_two(const char *first, const char *second, int fds[2])
{
	fds[0] = openat(host_fd, first, O_WRONLY);
	fds[1] = openat(host_fd, second, O_WRONLY);
	CHECK(fds[0] >= 0 && fds[1] >= 0);
}

static void of_a_file_alone_it_is_waited_for_which_name(struct guest *g)
{
	struct vf_events *events = start_events(g);
	char object[40];
	uint64_t file;
	int fds[2];

	host_mkdir("dir");
	host_touch("dir/f");
	CHECK_EQ(linkat(host_fd, "dir/f", host_fd, "dir/link", 0), 0);
	file = must_lookup(g, must_lookup(g, 1, "dir"), "f");
	CHECK_EQ(watch(g, file, VF_FS_MODIFY | VF_FS_EXCL_UNLINK), 0);
	open_two("dir/f", "dir/link", fds);
	CHECK_EQ(unlinkat(host_fd, "dir/f", 0), 0);
	settle(events); /* else fanotify makes one record of it and what follows */
	sprintf(object, "%llx", U(file));
	write_by_two_names(events, object, object, fds);
}

static void in_a_directory_it_is_waited_for_whose_name(struct guest *g)
{
	struct vf_events *events = start_events(g);
	char object[40];
	uint64_t dir;
	int fds[2];

	host_mkdir("dir");
	host_touch("dir/f");
	host_touch("dir/g");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, VF_FS_MODIFY | VF_FS_EXCL_UNLINK | ON_CHILD), 0);
	open_two("dir/f", "dir/g", fds);
	CHECK_EQ(renameat(host_fd, "dir/g", host_fd, "dir/f"), 0);
	/* Names are followed by what became of them. */
	expect(events, "FROM %llx g split", U(dir));
	expect(events, "TO %llx f split", U(dir));
	sprintf(object, "%llx f", U(dir));
	write_by_two_names(events, object, object, fds);
}

/* What inotify has said, read up to the first of such records. */
static struct {
	atomic_uint mask;
	size_t n;
	_Alignas(struct inotify_event) uint8_t bytes[8192];
} held;

static ssize_t read_partly(struct vf_inotify_reader *reader, void *buffer, size_t size,
			   uint64_t *at)
{
	ssize_t n = read(reader->fd, held.bytes + held.n, sizeof(held.bytes) - held.n);
	size_t given = 0;

	*at = 0;
	CHECK(size >= sizeof(held.bytes));
	held.n += n > 0 ? (size_t)n : 0;
	while (given < held.n) {
		const struct inotify_event *record = (void *)(held.bytes + given);

		if (record->mask & held.mask)
			break;
		given += sizeof(*record) + record->len;
	}
	if (!given) {
		errno = EAGAIN;
		return -1;
	}
	memcpy(buffer, held.bytes, given);
	held.n -= given;
	memmove(held.bytes, held.bytes + given, held.n);
	return (ssize_t)given;
}

/* Whoever makes the changes loses the processor for longer than facts are kept. */
static void let_facts_grow_old(struct vf_events *events)
{
	char name[30];

	for (int i = 0; i < 4; i++) {
		let_time_pass();
		sprintf(name, "elsewhere%d", i);
		host_touch(name);
		settle(events);
	}
}

static void a_second_half_may_come_late(struct guest *g)
{
	struct vf_events *events = start_events(g);
	uint64_t from, to;

	host_mkdir("from");
	host_mkdir("to");
	host_touch("from/x");
	host_touch("from/z");
	from = must_lookup(g, 1, "from");
	to = must_lookup(g, 1, "to");
	CHECK_EQ(watch(g, from, VF_FS_MOVED_FROM), 0);
	CHECK_EQ(watch(g, to, VF_FS_MOVED_TO | VF_FS_MOVED_FROM), 0);
	pthread_mutex_lock(&events->busy);
	held.mask = IN_MOVED_TO;
	events->order->reader.read = read_partly;
	CHECK_EQ(renameat(host_fd, "from/x", host_fd, "to/y"), 0);
	pthread_mutex_unlock(&events->busy);
	expect(events, "FROM %llx x split", U(from));
	expect(events, "TO %llx y split", U(to));
	let_facts_grow_old(events);
	pthread_mutex_lock(&events->busy);
	held.mask = 0;
	CHECK_EQ(renameat(host_fd, "from/z", host_fd, "to/y"), 0);
	pthread_mutex_unlock(&events->busy);
	expect(events, "FROM %llx z split", U(from));
	expect(events, "TO %llx y split", U(to));
	let_time_pass();
	expect_nothing(events);
}

/* The same before inotify has heard of anything. */
static void what_inotify_says_too_late_is_told_once(struct guest *g)
{
	struct vf_events *events = start_events(g);
	uint64_t dir;

	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, MARKED | VF_FS_MOVED_FROM | VF_FS_MOVED_TO | ON_CHILD), 0);
	pthread_mutex_lock(&events->busy);
	held.mask = IN_ALL_EVENTS;
	events->order->reader.read = read_partly;
	host_touch("dir/f");
	CHECK_EQ(renameat(host_fd, "dir/f", host_fd, "dir/g"), 0);
	pthread_mutex_unlock(&events->busy);
	let_facts_grow_old(events);
	expect(events, "CREATE %llx f", U(dir));
	expect(events, "FROM %llx f split", U(dir));
	expect(events, "TO %llx g split", U(dir));
	held.mask = 0;
	host_touch("dir/f");
	expect(events, "CREATE %llx f", U(dir));
	let_time_pass();
	expect_nothing(events);
}

/* ---- names that somebody has picked ----------------------------------------------- */

#define PICKED 2000

/* As anybody can compute it: FNV, to 11 bits. */
static uint32_t well_known(uint64_t place, const char *name)
{
	uint64_t h = place * 0x9e3779b97f4a7c15u;

	while (*name)
		h = (h ^ (uint8_t)*name++) * 0x100000001b3u;
	h ^= h >> 32;
	h *= 0x9e3779b97f4a7c15u;
	h ^= h >> 32;
	return (uint32_t)(h >> 29) % VF_FACT_CHAINS;
}

static void picked_names_do_not_meet(struct guest *g)
{
	static uint32_t met[VF_FACT_CHAINS];
	char name[16];
	uint64_t key;

	(void)g;
	for (uint32_t i = 0, n = 0; n < PICKED; i++) {
		snprintf(name, sizeof(name), "f%u", i);
		if (well_known(1, name))
			continue;
		key = vf_name_hash(1, name, (uint32_t)strlen(name));
		CHECK(++met[(key >> 29) % VF_FACT_CHAINS] < 20);
		n++;
	}
}

int main(void)
{
	set_up();
	RUN(picked_names_do_not_meet, VF_HANDLES_NEVER, 5000);
	RUN(what_inotify_never_says_is_told_late, VF_HANDLES_NEVER, 5000);
	RUN(what_is_not_asked_for_is_not_told_late, VF_HANDLES_NEVER, 5000);
	RUN(what_inotify_counts_as_one_is_told_once, VF_HANDLES_NEVER, 5000);
	RUN(a_busy_directory_is_told_once, VF_HANDLES_NEVER, 5000);
	RUN(of_a_file_alone_it_is_waited_for_which_name, VF_HANDLES_NEVER, 5000);
	RUN(in_a_directory_it_is_waited_for_whose_name, VF_HANDLES_NEVER, 5000);
	RUN(a_second_half_may_come_late, VF_HANDLES_NEVER, 5000);
	RUN(what_inotify_says_too_late_is_told_once, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
