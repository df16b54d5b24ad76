// SPDX-License-Identifier: Apache-2.0
/*
 * Preloaded into tests that format a block device and mount it: they get the virtio-fs share with the tag
 * VHOSTFS_LTP_TAG in place of the device VHOSTFS_LTP_DEVICE, and never notice. scripts/ltp uses it.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data)
{
	const char *device = getenv("VHOSTFS_LTP_DEVICE");
	const char *tag = getenv("VHOSTFS_LTP_TAG");

	if (source && device && tag && !strcmp(source, device)) {
		source = tag;
		type = "virtiofs";
		data = NULL; /* options of another file system */
	}
	return (int)syscall(SYS_mount, source, target, type, flags, data);
}
