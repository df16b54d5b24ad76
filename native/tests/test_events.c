/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a change on the host to the element: the index of handles, watches,
 * records of fanotify (real and hostile), the router.  The host's side is this
 * process, which the pipeline is told not to take for the server.
 */
#include <sys/fanotify.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>

#include "../fanotify_record.h"
#include "taker.h"

#define HOST_MASK                                                                                  \
	(VF_FS_ENTRY_EVENTS | VF_FS_SELF_EVENTS | VF_FS_RENAME |                                   \
	 (VF_FS_CHILD_EVENTS & ~VF_FS_OPEN_EXEC))
#define QUIET_MASK                                                                                 \
	(VF_FS_CREATE | VF_FS_DELETE | VF_FS_RENAME | VF_FS_SELF_EVENTS | VF_FS_MODIFY |           \
	 VF_FS_ATTRIB | VF_FS_CLOSE_WRITE)
/* ---- events on a share --------------------------------------------------------- */

enum marks { BY_INODE, BY_FILESYSTEM };

static void set_pid(struct vf_events *events, int32_t pid)
{
	pthread_mutex_lock(&events->busy);
	events->pid = pid;
	pthread_mutex_unlock(&events->busy);
}

static struct vf_events *start_events(struct guest *g, enum marks marks, uint64_t flags)
{
	struct vf_events_config config = {
	    .source = VF_EVENTS_FANOTIFY,
	    .order_fd = -1,
	    .next_fd = -1,
	    .marker_fd = -1,
	    .host_mask = HOST_MASK,
	    .max_queued = 1000,
	    .max_watches = 2000,
	    .notify_buf_size = 320,
	    .max_parked = 64,
	};

	config.source_fd =
	    fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC | FAN_REPORT_FID |
			      FAN_REPORT_DFID_NAME | FAN_REPORT_TARGET_FID,
			  O_RDONLY | O_CLOEXEC);
	CHECK(config.source_fd >= 0);
	if (marks == BY_FILESYSTEM) {
		config.filesystem_mask = QUIET_MASK;
		CHECK_EQ(fanotify_mark(config.source_fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
				       QUIET_MASK | FAN_ONDIR, AT_FDCWD, base),
			 0);
	}
	CHECK_EQ(vf_share_start_events(g->share, &config), 0);
	set_pid(g->share->events, -1); /* this process is the host, not the server */
	CHECK_EQ(vf_share_grant_events(g->share, flags, EVERYTHING), 0);
	taker_attach(g->share->events);
	return g->share->events;
}

static struct vf_events_stats event_stats(struct guest *g)
{
	struct vf_events_stats s;

	settle(g->share->events);
	vf_share_get_events_stats(g->share, &s);
	CHECK_EQ(s.host_marks, in_kernel(g->share->events, "fanotify ino:"));
	return s;
}

/* ---- the index of handles ------------------------------------------------------- */

static uint32_t by_name(struct guest *g, const char *name, struct vf_inode **found)
{
	struct {
		struct file_handle head;
		uint8_t bytes[MAX_HANDLE_SZ];
	} handle = {.head.handle_bytes = MAX_HANDLE_SZ};
	int mount_id, fd = openat(host_fd, name, O_PATH | O_NOFOLLOW);
	struct vf_fsid fsid;
	struct statfs fs;

	CHECK(fd >= 0);
	CHECK_EQ(name_to_handle_at(fd, "", &handle.head, &mount_id, AT_EMPTY_PATH), 0);
	CHECK_EQ(fstatfs(fd, &fs), 0);
	close(fd);
	memcpy(&fsid, &fs.f_fsid, sizeof(fsid));
	return vf_inodes_by_handle(g->share, fsid, handle.head.handle_type, handle.head.f_handle,
				   handle.head.handle_bytes, found, 8);
}

/* The nodeids by which the guest holds what has this name; sorted, at most 2. */
static uint32_t held(struct guest *g, const char *name, uint64_t ids[2])
{
	struct vf_inode *found[8];
	uint32_t n = by_name(g, name, found);

	CHECK(n <= 2);
	for (uint32_t i = 0; i < n; i++) {
		ids[i] = vf_inode_nodeid(found[i]);
		vf_inode_put(g->share, found[i]);
	}
	return n;
}

static bool is_held_as(struct guest *g, const char *name, uint64_t nodeid)
{
	uint64_t ids[2];

	return held(g, name, ids) == 1 && ids[0] == nodeid;
}

static void whatever_is_held_is_found_by_handle(struct guest *g)
{
	uint64_t before, after, ids[2];

	host_write("before", "x");
	host_write("after", "x");
	host_mkdir("dir");
	host_touch("dir/unheld");
	CHECK_EQ(symlinkat("nowhere", host_fd, "link"), 0);
	CHECK_EQ(mknodat(host_fd, "fifo", S_IFIFO | 0644, 0), 0);
	before = must_lookup(g, 1, "before");
	CHECK_EQ(held(g, "before", ids), 0); /* off: nothing is kept */
	start_events(g, BY_INODE, ALL_FLAGS);
	CHECK(is_held_as(g, ".", 1));
	CHECK(is_held_as(g, "before", before));
	CHECK_EQ(held(g, "after", ids), 0);
	after = must_lookup(g, 1, "after");
	CHECK(is_held_as(g, "after", after));
	CHECK(is_held_as(g, "dir", must_lookup(g, 1, "dir")));
	CHECK(is_held_as(g, "link", must_lookup(g, 1, "link")));
	CHECK(is_held_as(g, "fifo", must_lookup(g, 1, "fifo")));
	CHECK_EQ(held(g, "dir/unheld", ids), 0);
	forget(g, before, 1);
	CHECK_EQ(held(g, "before", ids), 0);
	CHECK(is_held_as(g, "after", after));
	/* The next session begins without, and what is held in it is found again when it asks. */
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(held(g, "after", ids), 0);
	after = must_lookup(g, 1, "after");
	CHECK_EQ(held(g, "after", ids), 0);
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS, EVERYTHING), 0);
	CHECK(is_held_as(g, "after", after));
	CHECK(is_held_as(g, ".", 1));
}

static void one_object_on_two_mounts_is_found_twice(struct guest *g)
{
	uint64_t dir, other, file, file_there, ids[2];
	char from[100], to[100];

	host_mkdir("dir");
	host_mkdir("other");
	host_touch("dir/file");
	sprintf(from, "%s/dir", base);
	sprintf(to, "%s/other", base);
	CHECK_EQ(mount(from, to, NULL, MS_BIND, NULL), 0);
	start_events(g, BY_INODE, ALL_FLAGS);
	dir = must_lookup(g, 1, "dir");
	other = must_lookup(g, 1, "other");
	file = must_lookup(g, dir, "file");
	file_there = must_lookup(g, other, "file");
	CHECK(file != file_there);
	CHECK_EQ(held(g, "dir/file", ids), 2);
	CHECK(ids[0] + ids[1] == file + file_there);
	forget(g, file, 1);
	CHECK(is_held_as(g, "dir/file", file_there));
	forget(g, file_there, 1);
	forget(g, other, 1);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(umount2(to, 0), 0);
}

static void many_inodes_come_and_go(struct guest *g)
{
	static uint64_t ids[3000];
	uint32_t n = sizeof(ids) / sizeof(ids[0]);
	uint64_t none[2];
	char name[20];

	for (uint32_t i = 0; i < n; i++) {
		sprintf(name, "f%u", i);
		host_touch(name);
		if (i == n / 2)
			start_events(g, BY_INODE, ALL_FLAGS);
		ids[i] = must_lookup(g, 1, name);
	}
	for (uint32_t i = 0; i < n; i++) {
		sprintf(name, "f%u", i);
		CHECK(is_held_as(g, name, ids[i]));
		if (i % 2)
			forget(g, ids[i], 1);
	}
	for (uint32_t i = 0; i < n; i++) {
		sprintf(name, "f%u", i);
		if (i % 2)
			CHECK_EQ(held(g, name, none), 0);
		else
			CHECK(is_held_as(g, name, ids[i]));
	}
}

struct churn {
	struct vf_share *share;
	atomic_bool stop;
};

static void *look_up_and_forget(void *arg)
{
	struct churn *churn = arg;
	struct guest g;
	uint32_t i = 0;

	guest_enter(&g, churn->share);
	while (!atomic_load(&churn->stop)) {
		char name[8];

		sprintf(name, "f%u", i++ % 8);
		forget(&g, must_lookup(&g, 1, name), 1);
	}
	guest_leave(&g);
	return NULL;
}

/* For the thread and address sanitizers. */
static void inodes_go_while_others_look(struct guest *g)
{
	struct churn churn = {.share = g->share};
	struct vf_inode *found[8];
	struct vf_events *events;
	pthread_t threads[2];
	char name[8];

	for (uint32_t i = 0; i < 8; i++) {
		sprintf(name, "f%u", i);
		host_touch(name);
	}
	for (uint32_t i = 0; i < 2; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, look_up_and_forget, &churn), 0);
	events = start_events(g, BY_INODE, ALL_FLAGS | VF_FSNOTIFY_WATCH_ALL);
	for (uint32_t i = 0; i < 2000; i++) {
		uint32_t n;

		sprintf(name, "f%u", i % 8);
		n = by_name(g, name, found);
		CHECK(n <= 1);
		if (n) {
			vf_watch_set(events->watches, found[0], VF_FS_MODIFY);
			vf_inode_put(g->share, found[0]);
		}
	}
	atomic_store(&churn.stop, true);
	for (uint32_t i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQ(event_stats(g).watches, 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
}

/* ---- watches ---------------------------------------------------------------------- */

static void a_watch_is_checked(struct guest *g)
{
	struct vf_fsnotify_watch_in in = {.mask = VF_FS_CREATE};
	uint64_t file;

	host_touch("file");
	file = must_lookup(g, 1, "file");
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), -ENOSYS);
	start_events(g, BY_INODE, ALL_FLAGS);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	CHECK_EQ(watch(g, file + 1, VF_FS_CREATE), -ESTALE);
	CHECK_EQ(watch(g, file + (1ull << 32), VF_FS_CREATE), -ESTALE);
	in.generation = (uint32_t)(file >> 32) + 1;
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_fsnotify_watch, file), -ESTALE);
	in = (struct vf_fsnotify_watch_in){.mask = 1, .flags = 1};
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_fsnotify_watch, 1), -EINVAL);
	arg(g, &in, sizeof(in) - 1);
	CHECK_EQ(run(g, vf_op_fsnotify_watch, 1), -EINVAL);
	CHECK_EQ(event_stats(g).watches, 1);
	/* Bits that nobody knows are no watch. */
	CHECK_EQ(watch(g, file, 1ull << 50 | 1u << 31), 0);
	CHECK_EQ(watch(g, file, ON_CHILD), 0);
	CHECK_EQ(event_stats(g).watches, 1);
	CHECK_EQ(watch(g, file, EVERYTHING), 0);
	CHECK_EQ(event_stats(g).watches, 2);
	CHECK_EQ(event_stats(g).host_marks, 2);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(event_stats(g).watches, 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), -ENOSYS);
}

static void watches_are_limited(struct guest *g)
{
	uint64_t ids[3];
	char name[8];

	for (uint32_t i = 0; i < 3; i++) {
		sprintf(name, "f%u", i);
		host_touch(name);
		ids[i] = must_lookup(g, 1, name);
	}
	start_events(g, BY_INODE, ALL_FLAGS);
	g->share->events->config.max_watches = 2;
	CHECK_EQ(watch(g, ids[0], VF_FS_MODIFY), 0);
	CHECK_EQ(watch(g, ids[1], VF_FS_MODIFY), 0);
	CHECK_EQ(watch(g, ids[2], VF_FS_MODIFY), -ENOSPC);
	CHECK_EQ(watch(g, ids[0], VF_FS_ATTRIB), 0);
	CHECK_EQ(watch(g, ids[2], 0), 0);
	CHECK_EQ(watch(g, ids[1], 0), 0);
	CHECK_EQ(watch(g, ids[2], VF_FS_MODIFY), 0);
	forget(g, ids[2], 1);
	CHECK_EQ(watch(g, ids[1], VF_FS_MODIFY), 0);
	CHECK_EQ(event_stats(g).watches, 2);
}

static int no_mark(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
		   uint64_t new_mask, int32_t *wd)
{
	(void)events, (void)old_mask;
	*wd = new_mask ? 100 + (int32_t)(vf_inode_nodeid(inode) & 0xffff) : -1;
	return 0;
}

static void watches_agree_with_a_model(struct guest *g)
{
	static const struct vf_source_ops no_source = {.mark = no_mark};
	const uint64_t bits[] = {VF_FS_ACCESS, VF_FS_CREATE, VF_FS_RENAME, VF_FS_MOVE_SELF};
	static uint64_t ids[300], masks[300];
	const uint32_t n = 300;
	struct vf_inode *root = vf_inode_get(g->share, 1);
	struct vf_watches *watches;
	struct vf_events *events;
	char name[8];

	for (uint32_t i = 0; i < n; i++) {
		sprintf(name, "f%u", i);
		host_touch(name);
		ids[i] = must_lookup(g, 1, name);
	}
	events = start_events(g, BY_INODE, ALL_FLAGS);
	events->ops = &no_source;
	watches = events->watches;
	srandom(5);
	for (uint32_t step = 0; step < 20000; step++) {
		uint32_t i = (uint32_t)random() % n, count = 0;
		struct vf_inode *inode = vf_inode_get(g->share, ids[i]), *found[8];
		int32_t wd = 100 + (int32_t)(ids[i] & 0xffff);
		uint64_t all = 0;

		masks[i] = 0;
		for (uint32_t b = 0; b < 4; b++)
			masks[i] |= random() % 3 ? 0 : bits[b];
		CHECK_EQ(vf_watch_set(watches, inode, masks[i]), 0);
		CHECK_EQ(vf_watch_mask(watches, inode), masks[i]);
		CHECK_EQ(vf_watches_by_wd(watches, VF_WD_SOURCE, wd, found, 8), !!masks[i]);
		if (masks[i]) {
			CHECK(found[0] == inode);
			vf_inode_put(g->share, inode);
		}
		CHECK_EQ(vf_watches_wd_mask(watches, VF_WD_SOURCE, wd, inode), 0);
		CHECK_EQ(vf_watches_wd_mask(watches, VF_WD_SOURCE, wd, root), masks[i]);
		vf_inode_put(g->share, inode);
		if (step % 100)
			continue;
		for (uint32_t k = 0; k < n; k++) {
			all |= masks[k];
			count += !!masks[k];
		}
		CHECK_EQ(vf_watches_union(watches), all);
		CHECK_EQ(vf_watches_count(watches), count);
	}
	for (uint32_t i = 0; i < n; i++)
		forget(g, ids[i], 1);
	CHECK_EQ(vf_watches_count(watches), 0);
	CHECK_EQ(vf_watches_union(watches), 0);
	vf_inode_put(g->share, root);
}

/* ---- records of the kernel's layout, made by hand ----------------------------------- */

struct maker {
	uint8_t bytes[1024];
	uint32_t size;
};

static void make(struct maker *m, uint64_t mask)
{
	struct fanotify_event_metadata head = {
	    .vers = FANOTIFY_METADATA_VERSION,
	    .metadata_len = sizeof(head),
	    .event_len = sizeof(head),
	    .mask = mask,
	    .fd = -1,
	    .pid = 7,
	};

	memset(m, 0, sizeof(*m));
	memcpy(m->bytes, &head, sizeof(head));
	m->size = sizeof(head);
}

static void make_info(struct maker *m, uint8_t type, uint32_t handle_size, const char *name)
{
	uint32_t size = 20 + handle_size + (name ? (uint32_t)strlen(name) + 1 : 0);
	struct fanotify_event_info_header header = {.info_type = type, .len = (uint16_t)size};
	uint32_t fields[] = {11, 22, handle_size, 1};
	uint8_t *p = m->bytes + m->size;

	memcpy(p, &header, sizeof(header));
	memcpy(p + 4, fields, sizeof(fields));
	memset(p + 20, type, handle_size);
	if (name)
		memcpy(p + 20 + handle_size, name, strlen(name) + 1);
	m->size += size;
	memcpy(m->bytes, &m->size, 4); /* event_len */
}

static int32_t parse(const struct maker *m, struct vf_fanotify_record *record)
{
	/* Of its exact size, so that the sanitizer sees a step too far. */
	uint8_t *bytes = malloc(m->size);
	int32_t result;

	memcpy(bytes, m->bytes, m->size);
	result = vf_fanotify_parse(bytes, m->size, record);
	free(bytes);
	return result;
}

static void records_are_taken_apart(struct guest *g)
{
	struct vf_fanotify_record r;
	struct maker m;

	(void)g;
	make(&m, FAN_RENAME);
	make_info(&m, FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, 8, "old");
	make_info(&m, FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, 12, "newer");
	make_info(&m, FAN_EVENT_INFO_TYPE_FID, 128, NULL);
	make_info(&m, 77, 3, NULL); /* of a kernel to come */
	CHECK_EQ(vf_fanotify_parse(m.bytes, m.size, &r), (int32_t)m.size);
	CHECK_EQ(r.mask, FAN_RENAME);
	CHECK_EQ(r.pid, 7);
	CHECK(r.old.there && r.new.there &&r.object.there && !r.dir.there);
	CHECK_EQ(r.old.handle_size, 8);
	CHECK_EQ(r.old.handle[7], FAN_EVENT_INFO_TYPE_OLD_DFID_NAME);
	CHECK_EQ(r.old.fsid.val[1], 22);
	CHECK(r.old.namelen == 3 && !memcmp(r.old.name, "old", 3));
	CHECK(r.new.namelen == 5 && !memcmp(r.new.name, "newer", 5));
	CHECK(r.object.handle_size == 128 && !r.object.name);
	/* A second record behind the first is the next call's. */
	memset(m.bytes + m.size, 0xff, 50);
	CHECK_EQ(vf_fanotify_parse(m.bytes, m.size + 50, &r), (int32_t)m.size);
}

static void broken_records_are_refused(struct guest *g)
{
	struct vf_fanotify_record r;
	char name[300];
	struct maker good, m;

	(void)g;
	make(&good, FAN_CREATE);
	make_info(&good, FAN_EVENT_INFO_TYPE_DFID_NAME, 8, "name");
	CHECK_EQ(parse(&good, &r), (int32_t)good.size);
	for (m = good; m.size; m.size--) {
		if (m.size != good.size)
			CHECK_EQ(parse(&m, &r), -EBADMSG);
		/* The record says that it ends here, which may be right for its head alone. */
		memcpy(m.bytes, &m.size, 4);
		if (m.size != good.size && m.size != sizeof(struct fanotify_event_metadata))
			CHECK_EQ(parse(&m, &r), -EBADMSG);
		memcpy(m.bytes, good.bytes, 4);
	}
#define BROKEN(offset, type, value)                                                                \
	do {                                                                                       \
		m = good;                                                                          \
		memcpy(m.bytes + (offset), &(type){value}, sizeof(type));                          \
		CHECK_EQ(parse(&m, &r), -EBADMSG);                                                 \
	} while (0)
	BROKEN(4, uint8_t, 4);	 /* version */
	BROKEN(6, uint16_t, 23); /* metadata_len */
	BROKEN(6, uint16_t, 65535);
	BROKEN(26, uint16_t, 0); /* info len: would never end */
	BROKEN(26, uint16_t, 3);
	BROKEN(26, uint16_t, 19); /* shorter than its handle's head */
	BROKEN(26, uint16_t, 65535);
	BROKEN(36, uint32_t, 129); /* handle_bytes */
	BROKEN(36, uint32_t, 14);  /* to beyond the name */
	BROKEN(36, uint32_t, UINT32_MAX);
	BROKEN(good.size - 1, uint8_t, 'x');		     /* a name without end */
	make_info(&good, FAN_EVENT_INFO_TYPE_DFID, 8, NULL); /* two directories */
	CHECK_EQ(parse(&good, &r), -EBADMSG);
	memset(name, 'n', sizeof(name));
	name[256] = 0;
	make(&m, FAN_CREATE);
	make_info(&m, FAN_EVENT_INFO_TYPE_DFID_NAME, 8, name);
	CHECK_EQ(parse(&m, &r), -EBADMSG);
	name[255] = 0;
	make(&m, FAN_CREATE);
	make_info(&m, FAN_EVENT_INFO_TYPE_DFID_NAME, 8, name);
	CHECK_EQ(parse(&m, &r), (int32_t)m.size);
	CHECK_EQ(r.dir.namelen, 255);
}

static void mutated_records_do_no_harm(struct guest *g)
{
	struct vf_fanotify_record r;
	struct maker good, m;
	uint32_t parsed = 0;

	(void)g;
	make(&good, FAN_RENAME);
	make_info(&good, FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, 8, "old");
	make_info(&good, FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, 12, "newer");
	make_info(&good, FAN_EVENT_INFO_TYPE_FID, 8, NULL);
	srandom(1);
	for (uint32_t i = 0; i < 200000; i++) {
		m = good;
		for (uint32_t k = (uint32_t)random() % 4; k < 4; k++)
			m.bytes[(uint32_t)random() % m.size] = (uint8_t)(random() >> 8);
		m.size -= random() % 3 ? 0 : (uint32_t)random() % m.size;
		if (parse(&m, &r) > 0) {
			parsed++;
			CHECK(r.old.namelen <= 255 && r.new.namelen <= 255);
		}
	}
	CHECK(parsed > 1000 && parsed < 190000);
}

/* With the handle of an object that the guest holds. */
static void make_object(struct maker *m, uint8_t type, const char *object, const char *name)
{
	struct {
		struct file_handle head;
		uint8_t bytes[MAX_HANDLE_SZ];
	} handle = {.head.handle_bytes = MAX_HANDLE_SZ};
	uint32_t start = m->size;
	struct statfs fs;
	int mount_id, fd = openat(host_fd, ".", O_RDONLY | O_DIRECTORY);

	CHECK_EQ(name_to_handle_at(host_fd, object, &handle.head, &mount_id, 0), 0);
	CHECK_EQ(fstatfs(fd, &fs), 0);
	close(fd);
	make_info(m, type, handle.head.handle_bytes, name);
	memcpy(m->bytes + start + 4, &fs.f_fsid, 8);
	memcpy(m->bytes + start + 16, &handle.head.handle_type, 4);
	memcpy(m->bytes + start + 20, handle.head.f_handle, handle.head.handle_bytes);
}

/* A pipe in place of the group: whatever comes through it, the guest is told of what it holds. */
static void mutated_streams_do_no_harm(struct guest *g)
{
	struct vf_events_config config = {
	    .source = VF_EVENTS_FANOTIFY,
	    .order_fd = -1,
	    .next_fd = -1,
	    .marker_fd = -1,
	    .host_mask = HOST_MASK,
	    .max_queued = 100,
	    .max_watches = 10,
	    .notify_buf_size = 320,
	    .max_parked = 64,
	};
	struct maker kinds[4], m;
	struct vf_events *events;
	int pipes[2];

	CHECK_EQ(pipe2(pipes, O_CLOEXEC | O_NONBLOCK), 0);
	config.source_fd = pipes[0];
	CHECK_EQ(vf_share_start_events(g->share, &config), 0);
	events = g->share->events;
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS | VF_FSNOTIFY_WATCH_ALL, EVERYTHING), 0);
	vf_share_trace_events(g->share, true);
	host_mkdir("dir");
	host_touch("dir/file");
	must_lookup(g, must_lookup(g, 1, "dir"), "file");
	make(&kinds[0], FAN_RENAME);
	make_object(&kinds[0], FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, "dir", "old");
	make_object(&kinds[0], FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, ".", "new");
	make_object(&kinds[0], FAN_EVENT_INFO_TYPE_FID, "dir/file", NULL);
	make(&kinds[1], FAN_CREATE | FAN_DELETE | FAN_MODIFY);
	make_object(&kinds[1], FAN_EVENT_INFO_TYPE_DFID_NAME, "dir", "file");
	make_object(&kinds[1], FAN_EVENT_INFO_TYPE_FID, "dir/file", NULL);
	make(&kinds[2], FAN_ATTRIB | FAN_ONDIR | FAN_MOVE_SELF);
	make_object(&kinds[2], FAN_EVENT_INFO_TYPE_DFID_NAME, "dir", ".");
	make(&kinds[3], FAN_DELETE_SELF);
	make_object(&kinds[3], FAN_EVENT_INFO_TYPE_FID, "dir/file", NULL);
	CHECK_EQ(write(pipes[1], kinds[1].bytes, kinds[1].size), kinds[1].size);
	settle(events);
	CHECK_EQ(events->received, 3);
	CHECK_EQ(vf_watches_count(events->watches), 0);
	srandom(2);
	for (uint32_t i = 0; i < 10000; i++) {
		m = kinds[random() % 4];
		/* Any kind of event; now and then a broken byte or a cut. */
		if (random() % 2)
			memcpy(m.bytes + 8, &(uint64_t){(uint64_t)random() & HOST_MASK}, 8);
		if (!(random() % 4))
			m.bytes[(uint32_t)random() % m.size] = (uint8_t)(random() >> 8);
		if (!(random() % 50))
			m.size = 1 + (uint32_t)random() % m.size;
		/* One at a time: what comes with a broken one is lost. */
		CHECK_EQ(write(pipes[1], m.bytes, m.size), m.size);
		settle(events);
	}
	CHECK(events->received > 10000);
	CHECK(events->host_overflows > 100); /* what was not understood is lost, and said so */
	close(pipes[1]);
	settle(events);
}

/* ---- what the guest is told of the host's changes -------------------------------------- */

static enum marks marks;

#define DIR_WATCH (VF_FS_ENTRY_EVENTS | VF_FS_CHILD_EVENTS | VF_FS_SELF_EVENTS | ON_CHILD)
#define FILE_WATCH (VF_FS_CHILD_EVENTS | VF_FS_SELF_EVENTS)

static void entries_of_a_watched_directory(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t dir, file, sub;

	host_mkdir("dir");
	host_touch("dir/file");
	host_mkdir("dir/sub");
	dir = must_lookup(g, 1, "dir");
	file = must_lookup(g, dir, "file");
	sub = must_lookup(g, dir, "sub");
	settle(events);
	expect_nothing(events); /* nobody watches yet */
	CHECK_EQ(watch(g, dir, VF_FS_ENTRY_EVENTS), 0);
	host_touch("dir/new");
	expect(events, "CREATE %llx new", U(dir));
	host_mkdir("dir/newdir");
	expect(events, "CREATE dir %llx newdir", U(dir));
	CHECK_EQ(linkat(host_fd, "dir/file", host_fd, "dir/other", 0), 0);
	expect(events, "CREATE %llx other > %llx", U(dir), U(file));
	CHECK_EQ(symlinkat("x", host_fd, "dir/link"), 0);
	expect(events, "CREATE %llx link", U(dir));
	CHECK_EQ(unlinkat(host_fd, "dir/file", 0), 0);
	expect(events, "DELETE %llx file > %llx", U(dir), U(file));
	CHECK_EQ(unlinkat(host_fd, "dir/sub", AT_REMOVEDIR), 0);
	expect(events, "DELETE dir %llx sub > %llx", U(dir), U(sub));
	/* Not asked for: */
	host_append("dir/other");
	CHECK_EQ(fchmodat(host_fd, "dir/other", 0600, 0), 0);
	host_touch("above");
	expect_nothing(events);
	CHECK_EQ(watch(g, dir, 0), 0);
	host_touch("dir/late");
	expect_nothing(events);
	CHECK_EQ(event_stats(g).watches, 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
}

static void children_of_a_watched_directory(struct guest *g)
{
	struct vf_events *events;
	uint64_t dir, file, sub;
	char byte;
	int fd;

	host_mkdir("dir");
	host_touch("dir/file");
	host_touch("dir/unheld");
	host_mkdir("dir/sub");
	events = start_events(g, marks, ALL_FLAGS);
	dir = must_lookup(g, 1, "dir");
	file = must_lookup(g, dir, "file");
	sub = must_lookup(g, dir, "sub");
	CHECK_EQ(watch(g, dir, DIR_WATCH), 0);
	fd = openat(host_fd, "dir/file", O_RDWR);
	expect(events, "OPEN %llx file > %llx", U(dir), U(file));
	CHECK_EQ(write(fd, "xy", 2), 2);
	expect(events, "MODIFY %llx file > %llx", U(dir), U(file));
	CHECK_EQ(pread(fd, &byte, 1, 0), 1);
	expect(events, "ACCESS %llx file > %llx", U(dir), U(file));
	CHECK_EQ(fchmod(fd, 0600), 0);
	expect(events, "ATTRIB %llx file > %llx", U(dir), U(file));
	CHECK_EQ(ftruncate(fd, 1), 0);
	expect(events, "MODIFY %llx file > %llx", U(dir), U(file));
	close(fd);
	expect(events, "CLOSE_WRITE %llx file > %llx", U(dir), U(file));
	/* One that the guest does not know has its name all the same. */
	fd = openat(host_fd, "dir/unheld", O_RDONLY);
	expect(events, "OPEN %llx unheld", U(dir));
	close(fd);
	expect(events, "CLOSE_NOWRITE %llx unheld", U(dir));
	/* A directory's own events come without its parent, for the driver to find. */
	CHECK_EQ(fchmodat(host_fd, "dir/sub", 0700, 0), 0);
	expect(events, "ATTRIB dir %llx", U(sub));
	CHECK_EQ(fchmodat(host_fd, "dir", 0700, 0), 0);
	expect(events, "ATTRIB dir %llx", U(dir));
	/* Which a driver that knows of that is told. */
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS | VF_FSNOTIFY_PARENT, EVERYTHING), 0);
	CHECK_EQ(fchmodat(host_fd, "dir/sub", 0755, 0), 0);
	expect(events, "ATTRIB dir %llx for parent", U(sub));
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS, EVERYTHING), 0);
	/* A watch without EVENT_ON_CHILD is for the directory alone. */
	CHECK_EQ(watch(g, dir, VF_FS_ATTRIB), 0);
	CHECK_EQ(fchmodat(host_fd, "dir/file", 0644, 0), 0);
	CHECK_EQ(fchmodat(host_fd, "dir/sub", 0700, 0), 0);
	expect_nothing(events);
	CHECK_EQ(fchmodat(host_fd, "dir", 0755, 0), 0);
	expect(events, "ATTRIB dir %llx", U(dir));
	expect_nothing(events);
}

static void a_watched_file(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t file, dir;

	host_touch("file");
	host_mkdir("dir");
	file = must_lookup(g, 1, "file");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, file, FILE_WATCH), 0);
	host_append("file");
	expect(events, "OPEN 1 file > %llx", U(file));
	expect(events, "MODIFY 1 file > %llx", U(file));
	expect(events, "CLOSE_WRITE 1 file > %llx", U(file));
	CHECK_EQ(linkat(host_fd, "file", host_fd, "dir/link", 0), 0);
	expect(events, "ATTRIB %llx", U(file));
	CHECK_EQ(renameat(host_fd, "file", host_fd, "moved"), 0);
	expect(events, "MOVE_SELF %llx", U(file));
	/* By its other name, in a directory that the guest knows, and in one that it does not. */
	CHECK_EQ(fchmodat(host_fd, "dir/link", 0600, 0), 0);
	expect(events, "ATTRIB %llx link > %llx", U(dir), U(file));
	forget(g, dir, 1);
	CHECK_EQ(fchmodat(host_fd, "dir/link", 0644, 0), 0);
	expect(events, "ATTRIB %llx", U(file));
	expect_nothing(events);
}

static void renames(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t a, b, file, sub;
	uint32_t first;

	host_mkdir("a");
	host_mkdir("b");
	host_mkdir("unheld");
	host_touch("a/file");
	host_mkdir("a/sub");
	a = must_lookup(g, 1, "a");
	b = must_lookup(g, 1, "b");
	file = must_lookup(g, a, "file");
	sub = must_lookup(g, a, "sub");
	CHECK_EQ(watch(g, a, VF_FS_MOVED_FROM | VF_FS_MOVED_TO), 0);
	CHECK_EQ(watch(g, b, VF_FS_RENAME), 0);
	CHECK_EQ(renameat(host_fd, "a/file", host_fd, "a/file2"), 0);
	expect(events, "FROM %llx file > %llx split", U(a), U(file));
	expect(events, "TO %llx file2 > %llx split", U(a), U(file));
	first = taker.got[0].element.cookie;
	CHECK(first && taker.got[1].element.cookie == first);
	CHECK_EQ(renameat(host_fd, "a/file2", host_fd, "b/file"), 0);
	expect(events, "FROM %llx file2 > %llx split", U(a), U(file));
	expect(events, "TO %llx file > %llx split", U(b), U(file));
	CHECK(taker.got[2].element.cookie && taker.got[2].element.cookie != first);
	CHECK_EQ(taker.got[2].element.cookie, taker.got[3].element.cookie);
	CHECK_EQ(renameat(host_fd, "a/sub", host_fd, "b/sub"), 0);
	expect(events, "FROM dir %llx sub > %llx split", U(a), U(sub));
	expect(events, "TO dir %llx sub > %llx split", U(b), U(sub));
	/* Half a rename is one plain event. */
	CHECK_EQ(renameat(host_fd, "b/file", host_fd, "unheld/file"), 0);
	expect(events, "FROM %llx file > %llx", U(b), U(file));
	CHECK_EQ(taker.got[6].element.cookie, 0);
	CHECK_EQ(renameat(host_fd, "unheld/file", host_fd, "a/file"), 0);
	expect(events, "TO %llx file > %llx", U(a), U(file));
	CHECK_EQ(watch(g, b, 0), 0);
	CHECK_EQ(renameat(host_fd, "a/file", host_fd, "b/file"), 0);
	expect(events, "FROM %llx file > %llx", U(a), U(file));
	CHECK_EQ(taker.got[8].element.cookie, 0);
	expect_nothing(events);
	/* Without the flag: plain events. */
	CHECK_EQ(watch(g, b, VF_FS_MOVED_FROM), 0);
	CHECK_EQ(vf_share_grant_events(g->share, VF_FSNOTIFY_VIRTQUEUE, EVERYTHING), 0);
	CHECK_EQ(renameat(host_fd, "b/file", host_fd, "a/file"), 0);
	expect(events, "FROM %llx file", U(b));
	expect(events, "TO %llx file", U(a));
	expect_nothing(events);
}

static void exchanged_names(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t a, b;

	host_touch("a");
	host_touch("b");
	a = must_lookup(g, 1, "a");
	b = must_lookup(g, 1, "b");
	CHECK_EQ(watch(g, 1, VF_FS_ENTRY_EVENTS), 0);
	CHECK_EQ(renameat2(host_fd, "a", host_fd, "b", RENAME_EXCHANGE), 0);
	expect(events, "FROM 1 a > %llx split", U(a));
	expect(events, "TO 1 b > %llx split", U(a));
	expect(events, "FROM 1 b > %llx split", U(b));
	expect(events, "TO 1 a > %llx split", U(b));
	expect_nothing(events);
}

static void the_end_of_a_watched_object_is_told_once(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t file, dir;

	host_touch("file");
	host_mkdir("dir");
	file = must_lookup(g, 1, "file");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(linkat(host_fd, "file", host_fd, "link", 0), 0);
	settle(events);
	CHECK_EQ(watch(g, 1, VF_FS_ENTRY_EVENTS), 0);
	CHECK_EQ(watch(g, file, VF_FS_ATTRIB | VF_FS_DELETE_SELF), 0);
	CHECK_EQ(watch(g, dir, VF_FS_DELETE_SELF), 0);
	CHECK_EQ(unlinkat(host_fd, "link", 0), 0);
	expect(events, "ATTRIB %llx", U(file));
	expect(events, "DELETE 1 link > %llx", U(file));
	CHECK_EQ(unlinkat(host_fd, "file", 0), 0);
	expect(events, "ATTRIB %llx", U(file));
	expect(events, "DELETE_SELF %llx", U(file));
	expect(events, "DELETE 1 file > %llx", U(file));
	CHECK_EQ(unlinkat(host_fd, "dir", AT_REMOVEDIR), 0);
	expect(events, "DELETE_SELF dir %llx", U(dir));
	expect(events, "DELETE dir 1 dir > %llx", U(dir));
	/* The server lets go of it, and the kernel's own DELETE_SELF comes too late. */
	forget(g, file, 1);
	forget(g, dir, 1);
	expect_nothing(events);
	CHECK_EQ(event_stats(g).watches, 1);
}

static void a_replaced_object_has_ended(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t old, new, empty;

	host_touch("file");
	host_touch("new");
	host_mkdir("empty");
	host_mkdir("newdir");
	old = must_lookup(g, 1, "file");
	new = must_lookup(g, 1, "new");
	empty = must_lookup(g, 1, "empty");
	CHECK_EQ(watch(g, 1, VF_FS_ENTRY_EVENTS), 0);
	CHECK_EQ(watch(g, old, VF_FS_DELETE_SELF), 0);
	CHECK_EQ(watch(g, new, VF_FS_MOVE_SELF), 0);
	CHECK_EQ(watch(g, empty, VF_FS_DELETE_SELF | VF_FS_ATTRIB), 0);
	CHECK_EQ(renameat(host_fd, "new", host_fd, "file"), 0);
	expect(events, "FROM 1 new > %llx split", U(new));
	expect(events, "TO 1 file > %llx split", U(new));
	expect(events, "DELETE_SELF %llx", U(old));
	expect(events, "MOVE_SELF %llx", U(new));
	CHECK_EQ(renameat(host_fd, "newdir", host_fd, "empty"), 0);
	expect(events, "FROM dir 1 newdir split");
	expect(events, "TO dir 1 empty split");
	expect(events, "ATTRIB dir %llx", U(empty));
	expect(events, "DELETE_SELF dir %llx", U(empty));
	expect_nothing(events);
}

static void a_watched_directory_ends_in_an_unwatched_one(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t a, b, sub, other;

	host_mkdir("a");
	host_mkdir("b");
	host_mkdir("a/sub");
	host_mkdir("a/other");
	a = must_lookup(g, 1, "a");
	b = must_lookup(g, 1, "b");
	sub = must_lookup(g, a, "sub");
	other = must_lookup(g, a, "other");
	CHECK_EQ(watch(g, sub, VF_FS_DELETE_SELF), 0);
	CHECK_EQ(watch(g, other, VF_FS_DELETE_SELF | VF_FS_CREATE), 0);
	CHECK_EQ(event_stats(g).host_marks, marks == BY_INODE ? 3 : 0);
	/* Moved by the host, and by the guest itself, it is still seen to go. */
	CHECK_EQ(renameat(host_fd, "a/sub", host_fd, "b/sub"), 0);
	expect_nothing(events);
	CHECK_EQ(event_stats(g).host_marks, marks == BY_INODE ? 4 : 0);
	set_pid(events, getpid());
	CHECK_EQ(renameat(host_fd, "a/other", host_fd, "b/other"), 0);
	expect_nothing(events);
	CHECK_EQ(event_stats(g).host_marks, marks == BY_INODE ? 3 : 0);
	set_pid(events, -1);
	/* The parent's own watch comes and goes. */
	CHECK_EQ(watch(g, b, VF_FS_CREATE | VF_FS_DELETE), 0);
	CHECK_EQ(watch(g, b, 0), 0);
	CHECK_EQ(unlinkat(host_fd, "b/sub", AT_REMOVEDIR), 0);
	expect(events, "DELETE_SELF dir %llx", U(sub));
	expect_nothing(events);
	CHECK_EQ(watch(g, sub, 0), 0);
	CHECK_EQ(event_stats(g).host_marks, marks == BY_INODE ? 2 : 0);
	/* A guest that forgets the parent first hears no more, and nothing is left behind. */
	forget(g, b, 1);
	CHECK_EQ(event_stats(g).host_marks, marks == BY_INODE ? 1 : 0);
	forget(g, other, 1);
	CHECK_EQ(event_stats(g).host_marks, 0);
	CHECK_EQ(watch(g, a, VF_FS_DELETE_SELF), 0);
	CHECK_EQ(watch(g, 1, VF_FS_DELETE_SELF), 0);
	CHECK_EQ(watch(g, 1, 0), 0);
	CHECK_EQ(watch(g, a, 0), 0);
	CHECK_EQ(event_stats(g).host_marks, 0);
}

static void merged_records_come_apart_in_the_usual_order(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	uint64_t file;

	host_touch("file");
	file = must_lookup(g, 1, "file");
	CHECK_EQ(watch(g, 1, DIR_WATCH), 0);
	settle(events);
	pthread_mutex_lock(&events->busy);
	host_write("new", "text");
	CHECK_EQ(fchmodat(host_fd, "new", 0600, 0), 0);
	pthread_mutex_unlock(&events->busy);
	expect(events, "CREATE 1 new");
	expect(events, "OPEN 1 new");
	expect(events, "MODIFY 1 new");
	expect(events, "ATTRIB 1 new");
	expect(events, "CLOSE_WRITE 1 new");
	pthread_mutex_lock(&events->busy);
	host_touch("temporary");
	CHECK_EQ(unlinkat(host_fd, "temporary", 0), 0);
	pthread_mutex_unlock(&events->busy);
	expect(events, "CREATE 1 temporary");
	expect(events, "DELETE 1 temporary");
	/* The same two events, but the name is there in the end. */
	CHECK_EQ(linkat(host_fd, "file", host_fd, "link", 0), 0);
	expect(events, "CREATE 1 link > %llx", U(file));
	pthread_mutex_lock(&events->busy);
	CHECK_EQ(unlinkat(host_fd, "link", 0), 0);
	CHECK_EQ(linkat(host_fd, "file", host_fd, "link", 0), 0);
	pthread_mutex_unlock(&events->busy);
	expect(events, "DELETE 1 link > %llx", U(file));
	expect(events, "CREATE 1 link > %llx", U(file));
	expect_nothing(events);
}

static void our_own_changes_are_not_told(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	struct vf_event_trace trace;
	uint64_t dir, own;
	pid_t child;

	host_mkdir("dir");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, dir, VF_FS_ENTRY_EVENTS), 0);
	settle(events);
	set_pid(events, getpid());
	own = event_stats(g).own;
	host_touch("dir/own");
	expect_nothing(events);
	CHECK(event_stats(g).own > own);
	CHECK_EQ(vf_share_next_event_trace(g->share, &trace), 0);
	vf_share_trace_events(g->share, true);
	host_touch("dir/own2");
	settle(events);
	CHECK_EQ(vf_share_next_event_trace(g->share, &trace), 1);
	CHECK_EQ(trace.fate, VF_EVENT_OWN);
	CHECK_EQ(trace.nodeid, dir);
	CHECK(trace.namelen == 4 && !memcmp(trace.name, "own2", 4));
	child = fork();
	if (!child)
		_exit(mkdirat(host_fd, "dir/foreign", 0755));
	CHECK_EQ(waitpid(child, NULL, 0), child);
	expect(events, "CREATE dir %llx foreign", U(dir));
	expect_nothing(events);
}

static void what_the_guest_does_not_hold_is_dropped(struct guest *g)
{
	struct vf_events *events;
	struct vf_event_trace trace;
	uint64_t unwatched;

	host_mkdir("dir");
	host_mkdir("dir/unheld");
	events = start_events(g, marks, ALL_FLAGS);
	must_lookup(g, 1, "dir");
	CHECK_EQ(watch(g, 1, DIR_WATCH), 0);
	vf_share_trace_events(g->share, true);
	host_touch("dir/unheld/secret");
	CHECK_EQ(unlinkat(host_fd, "dir/unheld/secret", 0), 0);
	expect_nothing(events);
	if (marks == BY_FILESYSTEM)
		CHECK(event_stats(g).unknown >= 2);
	else
		CHECK_EQ(event_stats(g).received, 0);
	CHECK_EQ(vf_share_next_event_trace(g->share, &trace), 0);
	unwatched = event_stats(g).unwatched;
	host_touch("dir/file");
	expect_nothing(events);
	if (marks == BY_FILESYSTEM) {
		CHECK_EQ(event_stats(g).unwatched, unwatched + 1);
		CHECK_EQ(vf_share_next_event_trace(g->share, &trace), 1);
		CHECK_EQ(trace.fate, VF_EVENT_UNWATCHED);
	}
}

static void everything_held_is_told_when_granted(struct guest *g)
{
	struct vf_events *events;
	uint64_t file, dir;

	if (marks == BY_INODE)
		return;
	host_touch("file");
	host_mkdir("dir");
	events = start_events(g, marks, ALL_FLAGS | VF_FSNOTIFY_WATCH_ALL);
	file = must_lookup(g, 1, "file");
	dir = must_lookup(g, 1, "dir");
	CHECK_EQ(fchmodat(host_fd, "file", 0600, 0), 0);
	expect(events, "ATTRIB 1 file > %llx", U(file));
	CHECK_EQ(fchmodat(host_fd, "dir", 0700, 0), 0);
	expect(events, "ATTRIB dir %llx", U(dir));
	CHECK_EQ(unlinkat(host_fd, "file", 0), 0);
	expect(events, "ATTRIB %llx", U(file));
	expect(events, "DELETE_SELF %llx", U(file));
	expect(events, "DELETE 1 file > %llx", U(file));
	host_touch("file");
	expect(events, "CREATE 1 file");
	host_touch("dir/a");
	expect(events, "CREATE %llx a", U(dir));
	/* What the driver cannot raise. */
	CHECK_EQ(vf_share_grant_events(g->share, VF_FSNOTIFY_WATCH_ALL, VF_FS_CREATE), 0);
	host_append("file");
	host_touch("dir/b");
	expect(events, "CREATE %llx b", U(dir));
	expect_nothing(events);
}

static void both_mounts_of_an_object_are_told(struct guest *g)
{
	struct vf_events *events;
	char from[100], to[100];
	uint64_t dir, other;

	host_mkdir("dir");
	host_mkdir("other");
	sprintf(from, "%s/dir", base);
	sprintf(to, "%s/other", base);
	CHECK_EQ(mount(from, to, NULL, MS_BIND, NULL), 0);
	events = start_events(g, marks, ALL_FLAGS);
	dir = must_lookup(g, 1, "dir");
	other = must_lookup(g, 1, "other");
	CHECK_EQ(watch(g, dir, VF_FS_CREATE | VF_FS_OPEN | ON_CHILD), 0);
	host_touch("dir/a");
	expect(events, "CREATE %llx a", U(dir));
	CHECK_EQ(watch(g, other, VF_FS_CREATE), 0);
	host_touch("other/b");
	expect(events, "CREATE %llx b", U(other));
	expect(events, "CREATE %llx b", U(dir));
	/* The one mark of the host serves both until the last goes. */
	CHECK_EQ(watch(g, dir, 0), 0);
	host_touch("dir/c");
	expect(events, "CREATE %llx c", U(other));
	CHECK_EQ(watch(g, other, 0), 0);
	expect_nothing(events);
	CHECK_EQ(event_stats(g).host_marks, 0);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(umount2(to, 0), 0);
}

static void other_file_systems_in_the_share(struct guest *g)
{
	struct vf_events *events;
	uint64_t dir, file;
	char path[100];

	host_mkdir("dir");
	sprintf(path, "%s/dir", base);
	CHECK_EQ(mount("t", path, "tmpfs", 0, NULL), 0);
	host_touch("dir/file");
	events = start_events(g, marks, ALL_FLAGS);
	dir = must_lookup(g, 1, "dir");
	file = must_lookup(g, dir, "file");
	host_touch("dir/early");
	CHECK_EQ(watch(g, dir, DIR_WATCH), 0);
	CHECK_EQ(event_stats(g).host_marks, 1);
	host_touch("dir/new");
	expect(events, "CREATE %llx new", U(dir));
	CHECK_EQ(fchmodat(host_fd, "dir/file", 0600, 0), 0);
	expect(events, "ATTRIB %llx file > %llx", U(dir), U(file));
	CHECK_EQ(renameat(host_fd, "dir/file", host_fd, "dir/moved"), 0);
	expect(events, "FROM %llx file > %llx split", U(dir), U(file));
	expect(events, "TO %llx moved > %llx split", U(dir), U(file));
	expect_nothing(events);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(umount2(path, 0), 0);
}

static void the_hosts_overflow_is_passed_on(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);
	FILE *f = fopen("/proc/sys/fs/fanotify/max_queued_events", "r");
	char name[20];
	uint32_t max;

	CHECK(f && fscanf(f, "%u", &max) == 1);
	fclose(f);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	vf_outbox_detach(events->outbox, &taker.sink);
	pthread_mutex_lock(&events->busy);
	for (uint32_t i = 0; i < max + 10; i++) {
		sprintf(name, "n%u", i);
		host_touch(name);
		CHECK_EQ(unlinkat(host_fd, name, 0), 0);
	}
	pthread_mutex_unlock(&events->busy);
	CHECK_EQ(event_stats(g).host_overflows, 1);
	CHECK_EQ(event_stats(g).depth, 1001);
	CHECK_EQ(event_stats(g).overflows, 0); /* it waits, too */
	CHECK_EQ(vf_outbox_attach(events->outbox, &taker.sink), 0);
}

static void a_new_session_hears_nothing_of_the_old(struct guest *g)
{
	struct vf_events *events = start_events(g, marks, ALL_FLAGS);

	vf_outbox_detach(events->outbox, &taker.sink);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	host_touch("old");
	CHECK_EQ(event_stats(g).depth, 1);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(event_stats(g).depth, 0);
	host_touch("between");
	CHECK_EQ(vf_share_grant_events(g->share, ALL_FLAGS, EVERYTHING), 0);
	CHECK_EQ(vf_outbox_attach(events->outbox, &taker.sink), 0);
	CHECK_EQ(watch(g, 1, VF_FS_CREATE), 0);
	host_touch("new");
	expect(events, "CREATE 1 new");
	expect_nothing(events);
}

/* ---- the runs ----------------------------------------------------------------------------- */

/* The test on a tmpfs of its own in place of the directory. */
static void on_tmpfs(const char *what, void (*test)(struct guest *), enum vf_handle_mode mode,
		     uint32_t budget)
{
	int below = host_fd;

	CHECK_EQ(mount("t", base, "tmpfs", 0, "size=64m"), 0);
	host_fd = open(base, O_PATH | O_DIRECTORY | O_CLOEXEC);
	with(what, test, mode, budget);
	close(host_fd);
	host_fd = below;
	CHECK_EQ(umount2(base, 0), 0);
}

#define RUN_ALL(test)                                                                              \
	do {                                                                                       \
		RUN(test, VF_HANDLES_NEVER, 5000);                                                 \
		RUN(test, VF_HANDLES_PREFER, 1);                                                   \
		on_tmpfs(#test " on tmpfs", test, VF_HANDLES_NEVER, 5000);                         \
	} while (0)
#define RUN_MARKS(test)                                                                            \
	do {                                                                                       \
		marks = BY_INODE;                                                                  \
		RUN_ALL(test);                                                                     \
		marks = BY_FILESYSTEM;                                                             \
		RUN_ALL(test);                                                                     \
	} while (0)

int main(void)
{
	set_up();
	RUN_ALL(whatever_is_held_is_found_by_handle);
	RUN_ALL(one_object_on_two_mounts_is_found_twice);
	RUN_ALL(many_inodes_come_and_go);
	RUN_ALL(inodes_go_while_others_look);
	RUN(a_watch_is_checked, VF_HANDLES_NEVER, 5000);
	RUN(watches_are_limited, VF_HANDLES_NEVER, 5000);
	RUN(watches_agree_with_a_model, VF_HANDLES_NEVER, 5000);
	RUN(records_are_taken_apart, VF_HANDLES_NEVER, 5000);
	RUN(broken_records_are_refused, VF_HANDLES_NEVER, 5000);
	RUN(mutated_records_do_no_harm, VF_HANDLES_NEVER, 5000);
	RUN(mutated_streams_do_no_harm, VF_HANDLES_NEVER, 5000);
	RUN_MARKS(entries_of_a_watched_directory);
	RUN_MARKS(children_of_a_watched_directory);
	RUN_MARKS(a_watched_file);
	RUN_MARKS(renames);
	RUN_MARKS(exchanged_names);
	RUN_MARKS(the_end_of_a_watched_object_is_told_once);
	RUN_MARKS(a_replaced_object_has_ended);
	RUN_MARKS(a_watched_directory_ends_in_an_unwatched_one);
	RUN_MARKS(merged_records_come_apart_in_the_usual_order);
	RUN_MARKS(our_own_changes_are_not_told);
	RUN_MARKS(what_the_guest_does_not_hold_is_dropped);
	RUN_MARKS(everything_held_is_told_when_granted);
	RUN_MARKS(both_mounts_of_an_object_are_told);
	RUN_MARKS(other_file_systems_in_the_share);
	RUN_MARKS(a_new_session_hears_nothing_of_the_old);
	marks = BY_INODE;
	RUN(the_hosts_overflow_is_passed_on, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
