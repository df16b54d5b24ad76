/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes in a directory at a steady pace, and how long each takes to be seen;
 * and the least that a reader of fanotify(7) has to do to see them.
 * Knows nothing of servers or rings: tests/bench/event_latency.py lays out where to look.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/fanotify.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000u
#define TIMEOUT_NS (5ull * SECOND_NS)

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/*
 * mknodat(2) of names first, first + 1, ... in the directory, one each interval.  *seen counts one
 * on for each.  latency_ns: from the end of the system call to that.  How many were seen in time.
 */
uint64_t event_latency_run(int dir_fd, uint32_t first, uint32_t count, uint64_t interval_ns,
			   const volatile uint16_t *seen, uint32_t *latency_ns)
{
	uint64_t next = now_ns() + interval_ns;
	uint16_t before = *seen;

	for (uint32_t i = 0; i < count; i++, next += interval_ns) {
		struct timespec until = {(time_t)(next / SECOND_NS), (long)(next % SECOND_NS)};
		uint64_t ended, now;
		char name[16];

		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		snprintf(name, sizeof(name), "%u", first + i);
		if (mknodat(dir_fd, name, S_IFREG | 0600, 0))
			return i;
		ended = now = now_ns();
		while ((uint16_t)(*seen - before) <= i) {
			now = now_ns();
			if (now - ended > TIMEOUT_NS)
				return i;
		}
		latency_ns[i] = (uint32_t)(now_ns() - ended);
	}
	return count;
}

/* Counts on *seen for each event in the directory, of a group with FAN_REPORT_DFID_NAME; for ever. */
void event_latency_read(int group_fd, int dir_fd, volatile uint16_t *seen)
{
	static uint8_t buffer[256 * 1024] __attribute__((aligned(8)));
	struct epoll_event ready = {.events = EPOLLIN};
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC), mount;
	union {
		struct file_handle handle;
		uint8_t bytes[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} own = {.handle.handle_bytes = MAX_HANDLE_SZ};

	if (name_to_handle_at(dir_fd, "", &own.handle, &mount, AT_EMPTY_PATH) ||
	    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, group_fd, &ready))
		return;
	++*seen;
	for (;;) {
		const struct fanotify_event_metadata *event = (const void *)buffer;
		ssize_t size;

		epoll_wait(epoll_fd, &ready, 1, -1);
		size = read(group_fd, buffer, sizeof(buffer));
		for (; FAN_EVENT_OK(event, size); event = FAN_EVENT_NEXT(event, size)) {
			const struct fanotify_event_info_fid *info = (const void *)(event + 1);

			*seen += !memcmp(info->handle, &own.handle,
					 sizeof(own.handle) + own.handle.handle_bytes);
		}
	}
}
