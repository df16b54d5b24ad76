// SPDX-License-Identifier: Apache-2.0
/*
 * The oracle's watcher in the guest: one inotify group, its watches called by name.
 *
 * Lines on stdin, each answered when it is done:
 *
 *   watch NAME MASK PATH    "watched NAME ERRNO"; MASK in hex.  An object that is
 *                           watched already keeps the name that it has.
 *   unwatch NAME            "unwatched NAME"; nothing of it is printed any more
 *   look PATH               "looked ERRNO"
 *   forget                  "forgotten": what nobody uses is dropped from the caches
 *
 * and every event, as it is read:
 *
 *   e NAME MASK COOKIE ENTRY
 *
 * The end of stdin ends the program.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_WATCHES 1024

static int group;
static struct {
	char name[32];
	int wd;
} watches[MAX_WATCHES];
static int n_watches;

static void fail(const char *what)
{
	fprintf(stderr, "watcher: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* The first name that this watch was given, as long as it lives. */
static const char *name_of(int wd)
{
	for (int i = 0; i < n_watches; i++) {
		if (watches[i].wd == wd)
			return watches[i].name;
	}
	return NULL;
}

static void forget_watch(int wd)
{
	for (int i = 0; i < n_watches; i++) {
		if (watches[i].wd == wd)
			watches[i].wd = -1;
	}
}

static void watch(char *arguments)
{
	char *name = strsep(&arguments, " ");
	char *bits = strsep(&arguments, " ");
	int wd;

	if (!bits || !arguments || n_watches == MAX_WATCHES) {
		errno = EINVAL;
		fail("watch");
	}
	wd = inotify_add_watch(group, arguments, strtoul(bits, NULL, 16) | IN_DONT_FOLLOW);
	if (wd >= 0) {
		snprintf(watches[n_watches].name, sizeof(watches[0].name), "%s", name);
		watches[n_watches++].wd = wd;
	}
	printf("watched %s %d\n", name, wd < 0 ? errno : 0);
}

static void unwatch(const char *name)
{
	for (int i = n_watches - 1; i >= 0; i--) {
		int wd = watches[i].wd;

		if (wd >= 0 && !strcmp(watches[i].name, name)) {
			forget_watch(wd);
			inotify_rm_watch(group, wd);
			break;
		}
	}
	printf("unwatched %s\n", name);
}

static void look(const char *path)
{
	struct stat state;

	printf("looked %d\n", lstat(path, &state) ? errno : 0);
}

static void forget(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);

	if (fd < 0 || write(fd, "2", 1) != 1)
		fail("drop_caches");
	close(fd);
	printf("forgotten\n");
}

static void read_events(void)
{
	static char buffer[65536] __attribute__((aligned(__alignof__(struct inotify_event))));
	ssize_t n = read(group, buffer, sizeof(buffer));

	if (n < 0)
		fail("read");
	for (char *at = buffer; at < buffer + n;) {
		const struct inotify_event *event = (const struct inotify_event *)at;
		const char *name = event->mask & IN_Q_OVERFLOW ? "-" : name_of(event->wd);

		if (name)
			printf("e %s %x %u %s\n", name, event->mask, event->cookie,
			       event->len ? event->name : "");
		if (event->mask & IN_IGNORED)
			forget_watch(event->wd);
		at += sizeof(*event) + event->len;
	}
}

/* Zero at the end of stdin. */
static int obey(void)
{
	char line[4200];
	char *arguments = line;
	char *command;

	if (!fgets(line, sizeof(line), stdin))
		return 0;
	line[strcspn(line, "\n")] = 0;
	command = strsep(&arguments, " ");
	if (!strcmp(command, "watch")) {
		watch(arguments);
	} else if (!strcmp(command, "unwatch")) {
		unwatch(arguments);
	} else if (!strcmp(command, "look")) {
		look(arguments);
	} else if (!strcmp(command, "forget")) {
		forget();
	} else {
		errno = EINVAL;
		fail(command);
	}
	return 1;
}

int main(void)
{
	struct pollfd polls[2] = {{.events = POLLIN}, {.fd = 0, .events = POLLIN}};

	setvbuf(stdin, NULL, _IONBF, 0);
	group = polls[0].fd = inotify_init1(IN_CLOEXEC);
	if (group < 0)
		fail("inotify_init1");
	printf("ready\n");
	for (;;) {
		fflush(stdout);
		if (poll(polls, 2, -1) < 0)
			fail("poll");
		if (polls[0].revents)
			read_events();
		else if (polls[1].revents && !obey())
			return 0;
	}
}
