/* SPDX-License-Identifier: Apache-2.0 */
/* What tests of events share: a guest that takes every element, and the host's side. */
#ifndef VHOSTFS_TESTS_TAKER_H
#define VHOSTFS_TESTS_TAKER_H

#include <sys/ioctl.h>

#include "../events.h"
#include "share.h"

#define EVERYTHING (~0ull)
#define ON_CHILD VF_FS_EVENT_ON_CHILD
#define ALL_FLAGS (VF_FSNOTIFY_VIRTQUEUE | VF_FSNOTIFY_RENAME | VF_FSNOTIFY_CHILD)

/* ---- a guest that takes every element ---------------------------------------- */

struct taker {
	struct vf_sink sink;
	atomic_uint n;
	uint32_t read;
	struct {
		struct vf_fsnotify_out element;
		char name[VF_NAME_MAX + 1];
	} got[1000];
};
static struct taker taker;

static bool take_element(struct vf_sink *sink, const struct vf_fsnotify_out *element,
			 const char *name)
{
	uint32_t n = taker.n;

	(void)sink;
	CHECK(n < sizeof(taker.got) / sizeof(taker.got[0]));
	taker.got[n].element = *element;
	memset(taker.got[n].name, 0, sizeof(taker.got[n].name));
	memcpy(taker.got[n].name, name, element->namelen);
	taker.n = n + 1;
	return true;
}

static void taker_done(struct vf_sink *sink)
{
	(void)sink;
}

static uint32_t taker_buffers(struct vf_sink *sink)
{
	(void)sink;
	return 1;
}

static void taker_attach(struct vf_events *events)
{
	memset(&taker, 0, sizeof(taker));
	taker.sink = (struct vf_sink){take_element, taker_done, taker_buffers};
	CHECK_EQ(vf_outbox_attach(events->outbox, &taker.sink), 0);
}

/*
 * Marks or watches that the kernel has in the source's group or instance, each a line of
 * proc_pid_fdinfo(5) that begins with this.
 */
static inline uint32_t in_kernel(struct vf_events *events, const char *line_begins)
{
	char path[40], line[400];
	uint32_t n = 0;
	FILE *f;

	sprintf(path, "/proc/self/fdinfo/%d", events->config.source_fd);
	f = fopen(path, "r");
	CHECK(f);
	while (fgets(line, sizeof(line), f))
		n += !strncmp(line, line_begins, strlen(line_begins));
	fclose(f);
	return n;
}

/* All that has happened so far was reported. */
static void settle(struct vf_events *events)
{
	int waiting, of_order;
	bool taken_out;

	for (;;) {
		of_order = 0;
		CHECK_EQ(ioctl(events->config.source_fd, FIONREAD, &waiting), 0);
		if (events->config.order_fd >= 0)
			CHECK_EQ(ioctl(events->config.order_fd, FIONREAD, &of_order), 0);
		pthread_mutex_lock(&events->busy);
		/* Out of inotify's queue, and still to be looked at. */
		taken_out = events->backlog.first;
		pthread_mutex_unlock(&events->busy);
		if (!waiting && !of_order && !taken_out)
			return;
		sched_yield();
	}
}

static int32_t watch(struct guest *g, uint64_t nodeid, uint64_t mask)
{
	struct vf_fsnotify_watch_in in = {.mask = mask, .generation = (uint32_t)(nodeid >> 32)};

	/* What happened before it is told all the same, when it waits to be read. */
	if (g->share->events)
		settle(g->share->events);
	arg(g, &in, sizeof(in));
	return run(g, vf_op_fsnotify_watch, nodeid);
}

/* ---- what came, in words ---- */

static const char *mask_text(uint64_t mask)
{
	static const char *const names[] = {
	    "ACCESS",	   "MODIFY",	"ATTRIB", "CLOSE_WRITE", "CLOSE_NOWRITE",
	    "OPEN",	   "FROM",	"TO",	  "CREATE",	 "DELETE",
	    "DELETE_SELF", "MOVE_SELF", "EXEC",	  "UNMOUNT",	 "OVERFLOW"};
	static char text[200];

	text[0] = 0;
	for (uint32_t bit = 0; bit < sizeof(names) / sizeof(names[0]); bit++)
		if (mask >> bit & 1)
			sprintf(text + strlen(text), "%s%s", *text ? "|" : "", names[bit]);
	if (mask & VF_FS_ISDIR)
		strcat(text, " dir");
	return text;
}

/* The next element in words: what, the object's nodeid, the name, the child. */
static const char *next_text(void)
{
	static char text[600];
	const struct vf_fsnotify_out *e;
	int n;

	if (taker.read == taker.n)
		return "nothing";
	e = &taker.got[taker.read].element;
	CHECK_EQ(e->generation, e->nodeid >> 32);
	CHECK_EQ(e->child_generation, e->child_nodeid >> 32);
	CHECK_EQ(e->reserved, 0);
	n = sprintf(text, "%s %llx", mask_text(e->mask), (unsigned long long)e->nodeid);
	if (e->namelen)
		n += sprintf(text + n, " %s", taker.got[taker.read].name);
	if (e->child_nodeid)
		n += sprintf(text + n, " > %llx", (unsigned long long)e->child_nodeid);
	if (e->flags)
		sprintf(text + n, "%s%s%s", e->flags & VF_FSNOTIFY_SPLIT_RENAME ? " split" : "",
			e->flags & VF_FSNOTIFY_FOR_PARENT ? " for parent" : "",
			e->flags & VF_FSNOTIFY_UNLINKED ? " unlinked" : "");
	taker.read++;
	return text;
}

static void expect(struct vf_events *events, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static void expect(struct vf_events *events, const char *format, ...)
{
	char wanted[600];
	const char *got;
	va_list args;

	settle(events);
	va_start(args, format);
	vsnprintf(wanted, sizeof(wanted), format, args);
	va_end(args);
	got = next_text();
	if (strcmp(wanted, got)) {
		fprintf(stderr, "wanted: %s\n   got: %s\n", wanted, got);
		for (got = next_text(); strcmp(got, "nothing"); got = next_text())
			fprintf(stderr, "   then: %s\n", got);
		abort();
	}
}

static void expect_nothing(struct vf_events *events)
{
	expect(events, "nothing");
}

#define U(nodeid) ((unsigned long long)(nodeid))

static void host_touch(const char *name)
{
	CHECK_EQ(mknodat(host_fd, name, S_IFREG | 0644, 0), 0);
}

static inline void host_append(const char *name)
{
	int fd = openat(host_fd, name, O_WRONLY | O_APPEND);

	CHECK(fd >= 0 && write(fd, "x", 1) == 1);
	close(fd);
}

static void host_mkdir(const char *name)
{
	CHECK_EQ(mkdirat(host_fd, name, 0755), 0);
}

#endif
