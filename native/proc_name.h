/* SPDX-License-Identifier: Apache-2.0 */
/* Names of descriptors in /proc/self/fd. */
#ifndef VHOSTFS_PROC_NAME_H
#define VHOSTFS_PROC_NAME_H

#define PROC_NAME_SIZE 12

/* The decimal name of fd, which is not negative, written into buffer. */
static inline const char *proc_name(char buffer[PROC_NAME_SIZE], int fd)
{
	char *p = buffer + PROC_NAME_SIZE - 1;
	unsigned int n = (unsigned int)fd;

	*p = 0;
	do {
		*--p = (char)('0' + n % 10);
		n /= 10;
	} while (n);
	return p;
}

#endif
