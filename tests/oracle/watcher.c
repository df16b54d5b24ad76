// SPDX-License-Identifier: Apache-2.0
/*
 * The oracle's watcher: one inotify group, or with --fanotify one fanotify group
 * with marks on inodes, their watches called by name.
 *
 * Lines on stdin, each answered when it is done:
 *
 *   watch NAME MASK PATH    "watched NAME ERRNO"; MASK in hex.  An object that is
 *                           watched already keeps the name that it has.
 *   unwatch NAME            "unwatched NAME"; nothing of it is printed any more
 *   look PATH               "looked ERRNO"
 *   forget                  "forgotten": what nobody uses is dropped from the caches
 *   sync                    "synced": what is there already has been printed
 *
 * and every event, as it is read:
 *
 *   e NAME MASK COOKIE ENTRY
 *
 * For fanotify ENTRY is "entry" of the directory NAME, "=NAME" for the object if it
 * is watched itself, and "old>NAME/new" of FAN_RENAME; NAME is "?" for what nobody
 * watches.
 *
 * The end of stdin ends the program.
 */
#define _GNU_SOURCE
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

#define MAX_WATCHES 1024

#ifndef FAN_REPORT_TARGET_FID
#define FAN_REPORT_TARGET_FID 0x1000
#define FAN_RENAME 0x10000000
#define FAN_EVENT_INFO_TYPE_OLD_DFID_NAME 10
#define FAN_EVENT_INFO_TYPE_NEW_DFID_NAME 12
#endif

#define MAX_NAME 300

static int group;
static bool by_fanotify;
static struct {
	char name[32];
	int wd; /* of inotify; -1: it has ended */
	struct {
		struct file_handle head;
		unsigned char bytes[MAX_HANDLE_SZ];
	} handle; /* for fanotify */
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

static int mark(const char *name, uint64_t bits, const char *path)
{
	struct file_handle *handle = &watches[n_watches].handle.head;
	struct stat state;
	int mount;

	handle->handle_bytes = MAX_HANDLE_SZ;
	if (lstat(path, &state))
		return errno;
	if (S_ISDIR(state.st_mode))
		bits |= FAN_ONDIR | FAN_EVENT_ON_CHILD;
	else
		bits &= ~(FAN_CREATE | FAN_DELETE | FAN_MOVE | FAN_RENAME);
	if (fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_DONT_FOLLOW, bits, AT_FDCWD, path))
		return errno;
	/* Once it is marked, so that it is not forgotten and found again as another. */
	if (name_to_handle_at(AT_FDCWD, path, handle, &mount, 0))
		return errno;
	snprintf(watches[n_watches].name, sizeof(watches[0].name), "%s", name);
	watches[n_watches++].wd = 0;
	return 0;
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
	if (by_fanotify) {
		printf("watched %s %d\n", name, mark(name, strtoull(bits, NULL, 16), arguments));
		return;
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

/* Events of many kinds in a directory that nobody watches. */
static void be_busy(const char *directory)
{
	int fd;
	char c;

	/* Opening it would be told to who watches the directory that it is in. */
	if (chdir(directory))
		fail(directory);
	fd = open("a", O_RDWR | O_CREAT, 0644);
	if (fd < 0 || write(fd, "text", 4) != 4 || pread(fd, &c, 1, 0) != 1 || close(fd) ||
	    chmod("a", 0600) || rename("a", "b") || mkdir("c", 0755) || rmdir("c") || unlink("b") ||
	    chdir("/"))
		fail("busy");
	printf("was busy\n");
}

static const char *name_of_handle(const struct file_handle *handle)
{
	for (int i = 0; i < n_watches; i++) {
		const struct file_handle *known = &watches[i].handle.head;

		if (known->handle_type == handle->handle_type &&
		    known->handle_bytes == handle->handle_bytes &&
		    !memcmp(known->f_handle, handle->f_handle, handle->handle_bytes))
			return watches[i].name;
	}
	return "?";
}

struct told {
	char directory[32];
	char entry[MAX_NAME];
	char new_directory[32];
	char new_entry[MAX_NAME];
	char object[32];
};

static void take_record(const struct fanotify_event_info_header *record, struct told *told)
{
	const struct fanotify_event_info_fid *fid = (const void *)record;
	const struct file_handle *handle = (const void *)fid->handle;
	const char *name = name_of_handle(handle);
	const char *entry = (const char *)handle->f_handle + handle->handle_bytes;

	switch (record->info_type) {
	case FAN_EVENT_INFO_TYPE_DFID_NAME:
	case FAN_EVENT_INFO_TYPE_OLD_DFID_NAME:
		snprintf(told->directory, sizeof(told->directory), "%s", name);
		snprintf(told->entry, sizeof(told->entry), "%s", entry);
		break;
	case FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
		snprintf(told->new_directory, sizeof(told->new_directory), "%s", name);
		snprintf(told->new_entry, sizeof(told->new_entry), "%s", entry);
		break;
	case FAN_EVENT_INFO_TYPE_FID:
		snprintf(told->object, sizeof(told->object), "%s", name);
		break;
	}
}

/* One line for each kind of event that the record sums up. */
static void print_record(const struct fanotify_event_metadata *event)
{
	const char *at = (const char *)event + event->metadata_len;
	const char *end = (const char *)event + event->event_len;
	uint64_t dir = event->mask & FAN_ONDIR;
	struct told told = {0};

	while (at < end) {
		const struct fanotify_event_info_header *record = (const void *)at;

		take_record(record, &told);
		at += record->len;
	}
	for (int bit = 0; bit < 63; bit++) {
		uint64_t mask = 1ULL << bit;

		if (!(event->mask & mask) || mask == FAN_ONDIR)
			continue;
		printf("e %s %llx 0 %s", told.directory[0] ? told.directory : "-",
		       (unsigned long long)(mask | dir), told.entry);
		if (mask == FAN_RENAME)
			printf(">%s/%s", told.new_directory, told.new_entry);
		if (told.object[0])
			printf("=%s", told.object);
		printf("\n");
	}
}

static void read_fanotify(void)
{
	static char buffer[65536] __attribute__((aligned(8)));
	ssize_t n;

	while ((n = read(group, buffer, sizeof(buffer))) > 0) {
		const struct fanotify_event_metadata *event = (void *)buffer;

		for (; FAN_EVENT_OK(event, n); event = FAN_EVENT_NEXT(event, n))
			print_record(event);
	}
	if (n < 0 && errno != EAGAIN)
		fail("read");
}

static void read_inotify(void)
{
	static char buffer[65536] __attribute__((aligned(__alignof__(struct inotify_event))));
	ssize_t n = read(group, buffer, sizeof(buffer));

	if (n < 0 && errno != EAGAIN)
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

static void read_events(void)
{
	if (by_fanotify)
		read_fanotify();
	else
		read_inotify();
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
	} else if (!strcmp(command, "busy")) {
		be_busy(arguments);
	} else if (!strcmp(command, "sync")) {
		read_events();
		printf("synced\n");
	} else {
		errno = EINVAL;
		fail(command);
	}
	return 1;
}

static int open_group(void)
{
	unsigned int flags = FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_REPORT_FID |
			     FAN_REPORT_DFID_NAME | FAN_REPORT_TARGET_FID;

	return by_fanotify ? fanotify_init(flags, O_RDONLY)
			   : inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
}

int main(int argc, char **argv)
{
	struct pollfd polls[2] = {{.events = POLLIN}, {.fd = 0, .events = POLLIN}};

	setvbuf(stdin, NULL, _IONBF, 0);
	by_fanotify = argc > 1 && !strcmp(argv[1], "--fanotify");
	group = polls[0].fd = open_group();
	if (group < 0)
		fail(by_fanotify ? "fanotify_init" : "inotify_init1");
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
