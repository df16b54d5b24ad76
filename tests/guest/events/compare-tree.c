// SPDX-License-Identifier: Apache-2.0
/*
 * A guest that compares, for tests of coherent caches: says what it sees of a
 * tree when it is asked, while other processes of it use the same tree all the
 * time, so that everything is in the caches and requests are always under way.
 *
 * The tree: DIRS directories d0, d1... with NAMES names n0, n1... each, which may
 * be files, symlinks, directories (with names m0, m1, m2 in them) or not there;
 * and g0 to g3, which are this program's own to make, write, rename and remove.
 *
 * Lines on stdin:
 *   pause    the program's own changes stop; answered "paused"
 *   check    what it sees: lines "TIME PATH WHAT TEXT", then "end". TIME is when
 *            that was asked, in nanoseconds of CLOCK_MONOTONIC; WHAT is "is"
 *            (attributes, or "absent"), "has" (content or target), or "names" (of
 *            a directory, each with a slash behind it)
 *   clock    answered "TIME clock"
 *   go       they go on
 *
 * usage: compare-tree ROOT DIRS NAMES READERS
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { INNER = 3, OWN = 4 };

static int n_dirs, n_names;
/* Pauses have numbers, so that nobody takes the last one for this. 0: go on */
static struct {
	volatile int wanted, there;
} *pause_state;

static void fail(const char *what)
{
	fprintf(stderr, "compare-tree: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* What follows is asked from now on. */
static void begin(const char *path, const char *what)
{
	printf("%lld %s %s ", now_ns(), path, what);
}

static void say_names(const char *path)
{
	struct dirent *entry;
	DIR *d;

	begin(path, "names");
	d = opendir(path);
	while (d && (entry = readdir(d)))
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
			printf("%s/", entry->d_name);
	if (d)
		closedir(d);
	printf("\n");
}

static void say_content(const char *path, bool is_link)
{
	char text[512];
	ssize_t n;
	int fd;

	begin(path, "has");
	if (is_link) {
		n = readlink(path, text, sizeof(text) - 1);
	} else {
		fd = open(path, O_RDONLY);
		n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
		if (fd >= 0)
			close(fd);
	}
	if (n < 0)
		n = snprintf(text, sizeof(text), "error %d", errno);
	text[n] = 0;
	printf("%s\n", text);
}

static void describe(const char *dir, const char *name, bool deep)
{
	char path[256], inner[8];
	struct stat st;

	snprintf(path, sizeof(path), "%s%s%s", dir, *dir ? "/" : "", name);
	begin(path, "is");
	if (lstat(path, &st)) {
		printf("absent\n");
		return;
	}
	printf("%o %lu %ld %ld.%09ld %ld.%09ld\n", st.st_mode,
	       S_ISDIR(st.st_mode) ? 0 : (unsigned long)st.st_nlink,
	       S_ISREG(st.st_mode) ? (long)st.st_size : 0, (long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec,
	       (long)st.st_ctim.tv_sec, st.st_ctim.tv_nsec);
	if (S_ISREG(st.st_mode) || S_ISLNK(st.st_mode))
		say_content(path, S_ISLNK(st.st_mode));
	if (!deep || !S_ISDIR(st.st_mode))
		return;
	say_names(path);
	for (int i = 0; i < INNER; i++) {
		snprintf(inner, sizeof(inner), "m%d", i);
		describe(path, inner, false);
	}
}

static void check(void)
{
	char dir[32], name[32];

	say_names(".");
	for (int d = 0; d < n_dirs; d++) {
		snprintf(dir, sizeof(dir), "d%d", d);
		describe("", dir, false);
		say_names(dir);
		for (int i = 0; i < n_names; i++) {
			snprintf(name, sizeof(name), "n%d", i);
			describe(dir, name, true);
		}
		for (int i = 0; i < OWN; i++) {
			snprintf(name, sizeof(name), "g%d", i);
			describe(dir, name, false);
		}
	}
	printf("end\n");
}

/* ---- those who use it -------------------------------------------------------- */

static void some_path(char *path, size_t size)
{
	int d = rand() % n_dirs, i = rand() % n_names;

	if (rand() % 4)
		snprintf(path, size, "d%d/n%d", d, i);
	else
		snprintf(path, size, "d%d/n%d/m%d", d, i, rand() % INNER);
}

static void use(void)
{
	char path[64], text[512], *map;
	struct stat st;
	DIR *d;
	int fd;

	some_path(path, sizeof(path));
	switch (rand() % 6) {
	case 0:
		fd = open(path, O_RDONLY);
		if (fd >= 0 && read(fd, text, sizeof(text)) < 0)
			text[0] = 0;
		if (fd >= 0)
			close(fd);
		break;
	case 1:
		snprintf(path, sizeof(path), "d%d", rand() % n_dirs);
		d = opendir(path);
		while (d && readdir(d))
			;
		if (d)
			closedir(d);
		break;
	case 2:
		fd = open(path, O_RDONLY);
		map = fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode)
			  ? MAP_FAILED
			  : mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
		if (map != MAP_FAILED)
			munmap(map, 4096);
		if (fd >= 0)
			close(fd);
		break;
	default:
		lstat(path, &st);
	}
}

static void change(void)
{
	char path[64], other[64], text[64];
	int fd;

	snprintf(path, sizeof(path), "d%d/g%d", rand() % n_dirs, rand() % OWN);
	snprintf(other, sizeof(other), "d%d/g%d", rand() % n_dirs, rand() % OWN);
	switch (rand() % 6) {
	case 0:
		unlink(path);
		break;
	case 1:
		rename(path, other);
		break;
	case 2:
		chmod(path, rand() % 2 ? 0600 : 0644);
		break;
	case 3:
		if (link(path, other))
			truncate(path, rand() % 30);
		break;
	default:
		fd = open(path, O_WRONLY | O_CREAT | (rand() % 2 ? O_TRUNC : O_APPEND), 0644);
		if (fd >= 0 && write(fd, text, (size_t)snprintf(text, sizeof(text), "own%d", rand())) < 0)
			unlink(path);
		if (fd >= 0)
			close(fd);
	}
}

static void start_reader(int seed)
{
	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	srand((unsigned int)seed);
	for (;;) {
		use();
		if (!(rand() % 3))
			usleep(1000);
	}
}

static void start_changer(void)
{
	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	srand(99);
	for (int number;;) {
		while ((number = pause_state->wanted)) {
			pause_state->there = number;
			usleep(200);
		}
		change();
		usleep(1000);
	}
}

int main(int argc, char **argv)
{
	int n_pauses = 0;
	char line[64];

	if (argc != 5 || chdir(argv[1]))
		fail("usage: compare-tree ROOT DIRS NAMES READERS");
	n_dirs = atoi(argv[2]);
	n_names = atoi(argv[3]);
	pause_state = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (pause_state == MAP_FAILED)
		fail("mmap");
	for (int i = 0; i < atoi(argv[4]); i++)
		start_reader(i);
	start_changer();
	/* Those only use it; who asks is not to wait for them. */
	setpriority(PRIO_PROCESS, 0, -10);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "pause\n")) {
			pause_state->wanted = ++n_pauses;
			while (pause_state->there != n_pauses)
				usleep(200);
			printf("paused\n");
		} else if (!strcmp(line, "go\n")) {
			pause_state->wanted = 0;
		} else if (!strcmp(line, "check\n")) {
			check();
		} else if (!strcmp(line, "clock\n")) {
			printf("%lld clock\n", now_ns());
		}
		fflush(stdout);
	}
	return 0;
}
