// SPDX-License-Identifier: Apache-2.0
/*
 * A watcher for tests: prints every inotify event as it is read, one line each,
 *
 *   INDEX MASK COOKIE NAME     index of the watched path, mask in hex
 *
 * after "ready", which says that all watches are set.  In its handler, before it
 * takes the next event, it can look at what the event is about and print what it
 * sees as a further line:
 *
 *   --read    "saw SIZE CONTENT" of the file that the event names (its first line),
 *             or "gone"
 *   --list    "saw NAME/NAME/..." all names in the watched directory, sorted
 *
 * With --fanotify the events come from fanotify, by marks on the inodes, those of
 * their children included; there are no cookies then.
 *
 * Lines on stdin: "add PATH", answered "added INDEX"; "watch MASK PATH", answered
 * "watching INDEX" (of the watch that was there, if there was one) or "refused:
 * WHY"; "remove INDEX", answered "removed INDEX"; its end ends the program.
 *
 * usage: watch-events [--read | --list | --fanotify] MASK PATH...
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_WATCHES 256

static int group_fd;
static bool by_fanotify;
static uint32_t mask;
static enum { NOTHING, READ, LIST } look;
static struct {
	int wd;
	char path[4096];
} watches[MAX_WATCHES];
static int n_watches;

static void fail(const char *what)
{
	fprintf(stderr, "watch-events: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int add_mark(const char *path)
{
	uint64_t bits = mask | FAN_EVENT_ON_CHILD | FAN_ONDIR;

	return fanotify_mark(group_fd, FAN_MARK_ADD, bits, AT_FDCWD, path);
}

static int add(const char *path)
{
	int wd = by_fanotify ? add_mark(path) : inotify_add_watch(group_fd, path, mask);

	if (wd < 0)
		fail(path);
	if (n_watches == MAX_WATCHES) {
		errno = ENOSPC;
		fail("watches");
	}
	watches[n_watches].wd = wd;
	snprintf(watches[n_watches].path, sizeof(watches[0].path), "%s", path);
	return n_watches++;
}

static int index_of(int wd)
{
	for (int i = n_watches - 1; i >= 0; i--) {
		if (watches[i].wd == wd)
			return i;
	}
	return -1;
}

static void watch(const char *words)
{
	char *path;
	uint32_t bits = (uint32_t)strtoul(words, &path, 16);
	int wd = inotify_add_watch(group_fd, ++path, bits);
	int i = wd < 0 ? -1 : index_of(wd);

	if (wd < 0) {
		printf("refused: %s\n", strerror(errno));
		return;
	}
	if (i < 0) {
		i = n_watches++;
		if (i == MAX_WATCHES) {
			errno = ENOSPC;
			fail("watches");
		}
		watches[i].wd = wd;
		snprintf(watches[i].path, sizeof(watches[0].path), "%s", path);
	}
	printf("watching %d\n", i);
}

static void read_file(const char *path)
{
	char text[4096];
	struct stat state;
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		printf(errno == ENOENT ? "gone\n" : "cannot open: %s\n", strerror(errno));
		return;
	}
	n = read(fd, text, sizeof(text) - 1);
	if (n < 0 || fstat(fd, &state)) {
		printf("cannot read: %s\n", strerror(errno));
		n = -1;
	}
	close(fd);
	if (n < 0)
		return;
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	printf("saw %lld %s\n", (long long)state.st_size, text);
}

static int visible(const struct dirent *entry)
{
	return strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
}

static void list_directory(const char *path)
{
	struct dirent **entries;
	int n = scandir(path, &entries, visible, alphasort);

	if (n < 0) {
		printf("cannot list: %s\n", strerror(errno));
		return;
	}
	printf("saw ");
	for (int i = 0; i < n; i++) {
		printf("%s%s", i ? "/" : "", entries[i]->d_name);
		free(entries[i]);
	}
	printf("\n");
	free(entries);
}

static void handle(const struct inotify_event *event)
{
	int i = index_of(event->wd);
	const char *name = event->len ? event->name : "";
	char path[4096 + 256 + 2];

	printf("%d %x %u %s\n", i, event->mask, event->cookie, name);
	if (i < 0 || event->mask & IN_IGNORED)
		return;
	if (look == LIST) {
		list_directory(watches[i].path);
	} else if (look == READ) {
		snprintf(path, sizeof(path), "%s%s%s", watches[i].path, *name ? "/" : "", name);
		read_file(path);
	}
}

static void read_events(void)
{
	static char buffer[65536] __attribute__((aligned(__alignof__(struct inotify_event))));
	ssize_t n = read(group_fd, buffer, sizeof(buffer));

	if (n < 0)
		fail("read");
	for (char *at = buffer; at < buffer + n;) {
		const struct inotify_event *event = (const struct inotify_event *)at;

		handle(event);
		at += sizeof(*event) + event->len;
	}
	fflush(stdout);
}

/* The name in the directory's record, "" without; all watched paths are told as the first. */
static const char *fanotify_name(const struct fanotify_event_metadata *event)
{
	const char *at = (const char *)event + event->metadata_len;
	const char *end = (const char *)event + event->event_len;
	const struct fanotify_event_info_fid *fid;
	const struct file_handle *handle;

	for (; at < end; at += fid->hdr.len) {
		fid = (const struct fanotify_event_info_fid *)at;
		if (fid->hdr.info_type != FAN_EVENT_INFO_TYPE_DFID_NAME)
			continue;
		handle = (const struct file_handle *)fid->handle;
		return (const char *)handle->f_handle + handle->handle_bytes;
	}
	return "";
}

static void read_fanotify(void)
{
	static char buffer[65536] __attribute__((aligned(8)));
	ssize_t n = read(group_fd, buffer, sizeof(buffer));
	const struct fanotify_event_metadata *event = (void *)buffer;

	if (n < 0)
		fail("read");
	for (; FAN_EVENT_OK(event, n); event = FAN_EVENT_NEXT(event, n))
		printf("0 %llx 0 %s\n", (unsigned long long)event->mask, fanotify_name(event));
	fflush(stdout);
}

static int read_command(void)
{
	char line[4200];

	if (!fgets(line, sizeof(line), stdin))
		return 0;
	line[strcspn(line, "\n")] = 0;
	if (!strncmp(line, "add ", 4)) {
		printf("added %d\n", add(line + 4));
	} else if (!strncmp(line, "watch ", 6)) {
		watch(line + 6);
	} else if (!strncmp(line, "remove ", 7)) {
		int i = atoi(line + 7);

		if (inotify_rm_watch(group_fd, watches[i].wd))
			fail("inotify_rm_watch");
		printf("removed %d\n", i);
	} else {
		errno = EINVAL;
		fail(line);
	}
	fflush(stdout);
	return 1;
}

int main(int argc, char **argv)
{
	struct pollfd polls[2];
	int at = 1;

	setvbuf(stdin, NULL, _IONBF, 0);
	if (at < argc && !strcmp(argv[at], "--read")) {
		look = READ;
		at++;
	} else if (at < argc && !strcmp(argv[at], "--list")) {
		look = LIST;
		at++;
	} else if (at < argc && !strcmp(argv[at], "--fanotify")) {
		by_fanotify = true;
		at++;
	}
	if (at >= argc) {
		fprintf(stderr,
			"usage: watch-events [--read | --list | --fanotify] MASK PATH...\n");
		return 2;
	}
	mask = (uint32_t)strtoul(argv[at++], NULL, 16);
	group_fd = by_fanotify ? fanotify_init(FAN_CLOEXEC | FAN_REPORT_DFID_NAME, O_RDONLY)
			       : inotify_init1(IN_CLOEXEC);
	if (group_fd < 0)
		fail(by_fanotify ? "fanotify_init" : "inotify_init1");
	while (at < argc)
		add(argv[at++]);
	printf("ready\n");
	fflush(stdout);
	polls[0] = (struct pollfd){.fd = group_fd, .events = POLLIN};
	polls[1] = (struct pollfd){.fd = 0, .events = POLLIN};
	for (;;) {
		if (poll(polls, 2, -1) < 0)
			fail("poll");
		if (polls[0].revents && by_fanotify)
			read_fanotify();
		else if (polls[0].revents)
			read_events();
		if (polls[1].revents && !read_command())
			return 0;
	}
}
