// SPDX-License-Identifier: Apache-2.0
/*
 * A recursive watcher for tests, as programs write them: a watch on every directory
 * below PATH, and on each that comes.  One line each:
 *
 *   watching INDEX NAME            a new watch; NAME is the path below PATH, "." for it
 *   INDEX MASK COOKIE NAME         an event as it was read; INDEX -1: of no watch
 *   gone INDEX                     that directory was removed, says an event of its parent
 *   cannot watch NAME: WHY         anything but that it is gone again
 *
 * and "ready" after the first walk.  A directory that is renamed keeps its index and
 * its name here, whatever it is called now.  The end of stdin ends the program.
 *
 * usage: follow-events MASK PATH
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_WATCHES 16384

static int group_fd;
static uint32_t mask;
static const char *root;
static struct watch {
	int wd;
	char *path; /* below root, as it is now; NULL when the watch has ended */
	int gone;
} watches[MAX_WATCHES];
static int n_watches;
static char *moving; /* where the directory was whose MOVED_FROM was the last event */
static uint32_t moving_cookie;

static void fail(const char *what)
{
	fprintf(stderr, "follow-events: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int index_of(int wd)
{
	for (int i = n_watches - 1; i >= 0; i--) {
		if (watches[i].wd == wd && watches[i].path)
			return i;
	}
	return -1;
}

static char *joined(const char *directory, const char *name)
{
	char *path;

	if (asprintf(&path, "%s%s%s", directory, *directory && *name ? "/" : "", name) < 0)
		fail("asprintf");
	return path;
}

static void add_tree(const char *path)
{
	char *full = joined(root, path);
	struct dirent *entry;
	DIR *directory = NULL;
	int wd = inotify_add_watch(group_fd, full, mask | IN_ONLYDIR | IN_DONT_FOLLOW);

	if (wd < 0) {
		if (errno != ENOENT && errno != ENOTDIR)
			printf("cannot watch %s: %s\n", path, strerror(errno));
		goto out;
	}
	if (index_of(wd) < 0) {
		if (n_watches == MAX_WATCHES) {
			errno = ENOSPC;
			fail("watches");
		}
		watches[n_watches].wd = wd;
		watches[n_watches].path = strdup(path);
		printf("watching %d %s\n", n_watches++, *path ? path : ".");
	}
	directory = opendir(full);
	while (directory && (entry = readdir(directory))) {
		char *below;

		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (entry->d_type != DT_DIR)
			continue;
		below = joined(path, entry->d_name);
		add_tree(below);
		free(below);
	}
out:
	if (directory)
		closedir(directory);
	free(full);
}

/* A directory was renamed: what is watched below it goes on under the new name. */
static void moved(const char *from, const char *to)
{
	size_t length = strlen(from);

	for (int i = 0; i < n_watches; i++) {
		char *path = watches[i].path;

		if (!path || watches[i].gone || strncmp(path, from, length) || (path[length] && path[length] != '/'))
			continue;
		watches[i].path = joined(to, path + length + !!path[length]);
		free(path);
	}
}

static void removed(const char *path)
{
	for (int i = 0; i < n_watches; i++) {
		if (watches[i].path && !watches[i].gone && !strcmp(watches[i].path, path)) {
			watches[i].gone = 1;
			printf("gone %d\n", i);
		}
	}
}

static void handle(const struct inotify_event *event)
{
	int i = index_of(event->wd);
	const char *name = event->len ? event->name : "";
	char *path;

	printf("%d %x %u %s\n", i, event->mask, event->cookie, name);
	if (i < 0)
		return;
	if (event->mask & IN_IGNORED) {
		free(watches[i].path);
		watches[i].path = NULL;
		return;
	}
	if (!(event->mask & IN_ISDIR) || !*name)
		return;
	path = joined(watches[i].path, name);
	if (event->mask & (IN_DELETE | IN_MOVED_TO))
		removed(path);
	if (event->mask & IN_MOVED_FROM) {
		free(moving);
		moving = strdup(path);
		moving_cookie = event->cookie;
	} else if (event->mask & IN_MOVED_TO && moving && moving_cookie == event->cookie) {
		moved(moving, path);
	}
	if (event->mask & (IN_CREATE | IN_MOVED_TO))
		add_tree(path);
	free(path);
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

int main(int argc, char **argv)
{
	struct pollfd polls[2];
	char byte;

	if (argc != 3) {
		fprintf(stderr, "usage: follow-events MASK PATH\n");
		return 2;
	}
	mask = (uint32_t)strtoul(argv[1], NULL, 16);
	root = argv[2];
	group_fd = inotify_init1(IN_CLOEXEC);
	if (group_fd < 0)
		fail("inotify_init1");
	add_tree("");
	printf("ready\n");
	fflush(stdout);
	polls[0] = (struct pollfd){.fd = group_fd, .events = POLLIN};
	polls[1] = (struct pollfd){.fd = 0, .events = POLLIN};
	for (;;) {
		if (poll(polls, 2, -1) < 0)
			fail("poll");
		if (polls[0].revents)
			read_events();
		if (polls[1].revents && read(0, &byte, 1) <= 0)
			return 0;
	}
}
