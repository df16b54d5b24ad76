// SPDX-License-Identifier: Apache-2.0
/*
 * Changes a file in ways that no tool of the guest's image has.
 *
 *   map      writes its first page by a mapping, until the device has it
 *   reserve  has blocks reserved behind its end, which stays where it is
 *
 * usage: change-file map|reserve FILE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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
	int fd = argc == 3 ? open(argv[2], O_RDWR) : -1;

	if (fd < 0)
		fail("usage: change-file map|reserve FILE");
	if (!strcmp(argv[1], "map"))
		map(fd);
	else if (fallocate(fd, FALLOC_FL_KEEP_SIZE, SIZE, SIZE))
		fail("fallocate");
	return 0;
}
