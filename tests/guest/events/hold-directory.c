// SPDX-License-Identifier: Apache-2.0
/*
 * Reads a directory into memory that is not there until stdin ends: meanwhile
 * the kernel holds the directory's lock, as for somebody whose answer is long in
 * coming. Says "held" when it does.
 *
 * usage: hold-directory DIRECTORY
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIZE = 4096 };

static void *memory;

static void fail(const char *what)
{
	fprintf(stderr, "hold-directory: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void *read_directory(void *directory)
{
	int fd = open(directory, O_RDONLY | O_DIRECTORY);

	if (fd < 0 || syscall(SYS_getdents64, fd, memory, SIZE) < 0)
		fail(directory);
	close(fd);
	return NULL;
}

int main(int argc, char **argv)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register registered = {.mode = UFFDIO_REGISTER_MODE_MISSING};
	struct uffdio_zeropage page;
	struct uffd_msg message;
	pthread_t reader;
	char byte;
	int fd;

	if (argc != 2)
		fail("usage: hold-directory DIRECTORY");
	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (fd < 0 || memory == MAP_FAILED || ioctl(fd, UFFDIO_API, &api))
		fail("userfaultfd");
	registered.range.start = (unsigned long)memory;
	registered.range.len = SIZE;
	if (ioctl(fd, UFFDIO_REGISTER, &registered))
		fail("UFFDIO_REGISTER");
	if (pthread_create(&reader, NULL, read_directory, argv[1]))
		fail("pthread_create");
	if (read(fd, &message, sizeof(message)) != sizeof(message))
		fail("reading userfaultfd");
	printf("held\n");
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	memset(&page, 0, sizeof(page));
	page.range = registered.range;
	if (ioctl(fd, UFFDIO_ZEROPAGE, &page))
		fail("UFFDIO_ZEROPAGE");
	pthread_join(reader, NULL);
	return 0;
}
