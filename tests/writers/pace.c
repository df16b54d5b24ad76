// SPDX-License-Identifier: Apache-2.0
/*
 * Loaded into a writer (LD_PRELOAD), it makes each new directory wait until whoever
 * listens at the socket $PACE_SOCKET says that all watchers watch it.  A recursive
 * watcher cannot see what happens in a directory before it watches it, on a local
 * file system as little as here: so that two watchers can be compared at all, that
 * race is taken out.  Nothing else of the writer changes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

/* The path of the directory, a line, is answered by a line of any kind. */
static void pace(int at_fd, const char *name)
{
	const char *where = getenv("PACE_SOCKET");
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char link[64], path[PATH_MAX + 1], answer;
	int directory = -1, connection = -1;
	ssize_t length;

	if (!where || strlen(where) >= sizeof(address.sun_path))
		return;
	strcpy(address.sun_path, where);
	directory = openat(at_fd, name, O_PATH | O_DIRECTORY | O_CLOEXEC);
	connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (directory < 0 || connection < 0)
		goto out;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", directory);
	length = readlink(link, path, PATH_MAX);
	if (length < 0 || connect(connection, (struct sockaddr *)&address, sizeof(address)))
		goto out;
	path[length++] = '\n';
	if (write(connection, path, (size_t)length) != length)
		goto out;
	while (read(connection, &answer, 1) < 0 && errno == EINTR)
		;
out:
	if (directory >= 0)
		close(directory);
	if (connection >= 0)
		close(connection);
}

int mkdirat(int at_fd, const char *name, mode_t mode)
{
	int result = (int)syscall(SYS_mkdirat, at_fd, name, mode);

	if (!result) {
		int saved = errno;

		pace(at_fd, name);
		errno = saved;
	}
	return result;
}

int mkdir(const char *name, mode_t mode)
{
	return mkdirat(AT_FDCWD, name, mode);
}
