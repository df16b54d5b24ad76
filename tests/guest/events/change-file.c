// SPDX-License-Identifier: Apache-2.0
/*
 * Changes a file in ways that no tool of the guest's image has.
 *
 *   map       writes its first page by a mapping, until the device has it
 *   reserve   has blocks reserved behind its end, which stays where it is
 *   label     gives it the attribute user.new
 *   unlabel   takes user.old from it
 *   exchange  gives it the name of another, and that one its own
 *
 * usage: change-file map|reserve|label|unlabel FILE
 *        change-file exchange FILE OTHER
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { SIZE = 4096 };

static void fail(const char *what)
{
	fprintf(stderr, "change-file: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void map(int fd)
{
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (memory == MAP_FAILED)
		fail("mmap");
	memory[0] ^= 1;
	if (msync(memory, SIZE, MS_SYNC) || munmap(memory, SIZE))
		fail("msync");
}

int main(int argc, char **argv)
{
	const char *change = argc == 3 ? argv[1] : "";
	int fd;

	if (argc == 4 && !strcmp(argv[1], "exchange")) {
		if (renameat2(AT_FDCWD, argv[2], AT_FDCWD, argv[3], RENAME_EXCHANGE))
			fail("renameat2");
		return 0;
	}
	fd = argc == 3 ? open(argv[2], O_RDWR) : -1;
	if (fd < 0)
		fail("opening it; usage: change-file map|reserve|label|unlabel FILE");
	errno = EINVAL; /* for a change that is none of these */
	if (!strcmp(change, "map"))
		map(fd);
	else if (!strcmp(change, "label") ? fsetxattr(fd, "user.new", "", 0, XATTR_CREATE)
		 : !strcmp(change, "unlabel") ? fremovexattr(fd, "user.old")
		 : !strcmp(change, "reserve") ? fallocate(fd, FALLOC_FL_KEEP_SIZE, SIZE, SIZE)
					      : -1)
		fail(change);
	return 0;
}
