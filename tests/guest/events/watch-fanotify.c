// SPDX-License-Identifier: Apache-2.0
/*
 * A watcher by fanotify for tests: one mark, events with file ids, and for each event one line of
 * what it says about objects below PATH,
 *
 *   MASK [fid OBJECT] [dir OBJECT NAME] [old OBJECT NAME] [new OBJECT NAME]
 *
 * after "ready", which says that the mark is set.  OBJECT is where the file handle leads to when it
 * is opened: for a directory a path below PATH ("." for itself), for anything else "#" and its
 * inode number, "gone" when it cannot be opened, or "none" for an empty handle; NAME is "" where
 * none is told.  Events of no object below PATH are left out, but for an overflow.
 *
 *   --report=fid|dfid|dfid_name|dfid_fid|dfid_name_fid|target   what the group reports
 *   --report=fd                 descriptors: a line is the mask and "fd"
 *   --mark=inode|mount|filesystem
 *   --ignore=MASK:PATH          and a mark on PATH that ignores these events
 *
 * Lines on stdin: "remove" takes the mark away, answered "removed"; "leave" makes it hold nothing of
 * the file system but the mark, answered "left"; the end ends the program.
 *
 * usage: watch-fanotify --report=... --mark=... [--ignore=...] MASK PATH
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

static int group_fd, mount_fd;
static unsigned int mark_type;
static uint64_t mask;
static const char *top;
static char top_path[PATH_MAX];
static struct statfs top_fs;

static const struct {
	const char *name;
	unsigned int flags;
} reports[] =
    {
	{"fd", 0},
	{"fid", FAN_REPORT_FID},
	{"dfid", FAN_REPORT_DIR_FID},
	{"dfid_name", FAN_REPORT_DFID_NAME},
	{"dfid_fid", FAN_REPORT_DIR_FID | FAN_REPORT_FID},
	{"dfid_name_fid", FAN_REPORT_DFID_NAME | FAN_REPORT_FID},
	{"target", FAN_REPORT_DFID_NAME_TARGET},
},
  marks[] = {
      {"inode", FAN_MARK_INODE},
      {"mount", FAN_MARK_MOUNT},
      {"filesystem", FAN_MARK_FILESYSTEM},
};

static void fail(const char *what)
{
	fprintf(stderr, "watch-fanotify: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* Where the handle leads; false: to somewhere else than below PATH. */
static bool describe(struct file_handle *handle, char *text)
{
	char link[64], path[PATH_MAX];
	size_t length = strlen(top_path);
	struct stat st;
	ssize_t n;
	int fd;

	if (!handle->handle_bytes) {
		strcpy(text, "none");
		return true;
	}
	strcpy(text, "gone");
	fd = open_by_handle_at(mount_fd, handle, O_PATH);
	if (fd < 0)
		return true;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, sizeof(path) - 1);
	if (n < 0 || fstat(fd, &st))
		fail(link);
	close(fd);
	path[n] = 0;
	if (n > 10 && !strcmp(path + n - 10, " (deleted)"))
		return true;
	if (!S_ISDIR(st.st_mode)) {
		sprintf(text, "#%lu", (unsigned long)st.st_ino);
		/* Without a name that the kernel knows, its path is "/". */
		return !path[1] || (!strncmp(path, top_path, length) && path[length] == '/');
	}
	if (strncmp(path, top_path, length) || (path[length] && path[length] != '/'))
		return false;
	strcpy(text, path[length] ? path + length + 1 : ".");
	return true;
}

static void print(const struct fanotify_event_metadata *event)
{
	static char line[8 * PATH_MAX], object[PATH_MAX];
	char *at = (char *)event + event->metadata_len, *end = (char *)event + event->event_len;
	bool below = event->mask & FAN_Q_OVERFLOW, gone = false;
	int n = sprintf(line, "%llx", (unsigned long long)event->mask);

	if (event->fd >= 0) {
		below = true;
		strcpy(line + n, " fd");
		close(event->fd);
	}
	for (; at < end; at += ((struct fanotify_event_info_header *)at)->len) {
		struct fanotify_event_info_fid *fid = (struct fanotify_event_info_fid *)at;
		struct file_handle *handle = (struct file_handle *)fid->handle;
		const char *name = (const char *)handle->f_handle + handle->handle_bytes;
		const char *kind = "fid";

		switch (fid->hdr.info_type) {
		case FAN_EVENT_INFO_TYPE_DFID_NAME:
			kind = "dir";
			break;
		case FAN_EVENT_INFO_TYPE_DFID:
			kind = "dir";
			name = "";
			break;
		case FAN_EVENT_INFO_TYPE_OLD_DFID_NAME:
			kind = "old";
			break;
		case FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
			kind = "new";
			break;
		case FAN_EVENT_INFO_TYPE_FID:
			name = NULL;
			break;
		default:
			continue;
		}
		if (memcmp(&fid->fsid, &top_fs.f_fsid, sizeof(fid->fsid)))
			kind = "foreign-fsid";
		if (!describe(handle, object))
			strcpy(object, "elsewhere");
		else if (!strcmp(object, "gone") || !strcmp(object, "none"))
			gone = true;
		else
			below = true;
		n += sprintf(line + n, " %s %s", kind, object);
		if (name)
			n += sprintf(line + n, " %s", *name ? name : "\"\"");
	}
	if (below || (gone && mark_type == FAN_MARK_INODE))
		puts(line);
}

static void read_events(void)
{
	static char buffer[65536] __attribute__((aligned(8)));
	ssize_t n = read(group_fd, buffer, sizeof(buffer));
	const struct fanotify_event_metadata *event = (void *)buffer;

	if (n < 0)
		fail("read");
	for (; FAN_EVENT_OK(event, n); event = FAN_EVENT_NEXT(event, n))
		print(event);
	fflush(stdout);
}

static bool read_command(void)
{
	char line[64];

	if (!fgets(line, sizeof(line), stdin))
		return false;
	if (!strcmp(line, "leave\n")) {
		close(mount_fd);
		puts("left");
		fflush(stdout);
		return true;
	}
	if (strcmp(line, "remove\n")) {
		errno = EINVAL;
		fail(line);
	}
	if (fanotify_mark(group_fd, FAN_MARK_REMOVE | mark_type, mask, AT_FDCWD, top))
		fail("FAN_MARK_REMOVE");
	puts("removed");
	fflush(stdout);
	return true;
}

static void add_ignore_mark(char *text)
{
	char *path = strchr(text, ':');

	if (!path ||
	    fanotify_mark(group_fd,
			  FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY,
			  strtoull(text, NULL, 16), AT_FDCWD, path + 1))
		fail("the mark that ignores");
}

int main(int argc, char **argv)
{
	unsigned int flags = 0;
	bool reporting = false;
	struct pollfd polls[2];
	char *ignore = NULL;
	int i = 1;

	setvbuf(stdin, NULL, _IONBF, 0);
	for (; i < argc && !strncmp(argv[i], "--", 2); i++) {
		for (size_t j = 0; j < sizeof(reports) / sizeof(*reports); j++)
			if (!strncmp(argv[i], "--report=", 9) &&
			    !strcmp(argv[i] + 9, reports[j].name)) {
				flags = reports[j].flags;
				reporting = true;
			}
		for (size_t j = 0; j < 3; j++)
			if (!strncmp(argv[i], "--mark=", 7) && !strcmp(argv[i] + 7, marks[j].name))
				mark_type = marks[j].flags;
		if (!strncmp(argv[i], "--ignore=", 9))
			ignore = argv[i] + 9;
	}
	if (i + 2 != argc || !reporting) {
		fprintf(stderr, "usage: watch-fanotify --report=... --mark=... MASK PATH\n");
		return 2;
	}
	mask = strtoull(argv[i], NULL, 16);
	top = argv[i + 1];
	mount_fd = open(top, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (mount_fd < 0 || !realpath(top, top_path) || fstatfs(mount_fd, &top_fs))
		fail(top);
	group_fd = fanotify_init(FAN_CLOEXEC | flags, O_RDONLY);
	if (group_fd < 0)
		fail("fanotify_init");
	if (fanotify_mark(group_fd, FAN_MARK_ADD | mark_type, mask, AT_FDCWD, top))
		fail("fanotify_mark");
	if (ignore)
		add_ignore_mark(ignore);
	puts("ready");
	fflush(stdout);
	polls[0] = (struct pollfd){.fd = group_fd, .events = POLLIN};
	polls[1] = (struct pollfd){.fd = 0, .events = POLLIN};
	for (;;) {
		if (poll(polls, 2, -1) < 0)
			fail("poll");
		if (polls[0].revents)
			read_events();
		if (polls[1].revents && !read_command())
			return 0;
	}
}
