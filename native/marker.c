/* SPDX-License-Identifier: Apache-2.0 */
/* See marker.h.  The process knows one group, one directory and one mask, and two commands. */
#include <linux/capability.h>
#include <signal.h>
#include <sys/fanotify.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "fanotify_move.h"
#include "marker.h"

enum { SET_MARK = '+', REMOVE_MARK = '-' };

/* ---- the process ------------------------------------------------------------- */

struct marker {
	int group_fd, dir_fd, command_fd;
	uint64_t mask;
};

static int32_t obey(const struct marker *marker, char command)
{
	uint32_t how = command == SET_MARK ? FAN_MARK_ADD : FAN_MARK_REMOVE;

	/* By "." and not by the descriptor itself, which is O_PATH. */
	return fanotify_mark(marker->group_fd, how | FAN_MARK_FILESYSTEM | FAN_MARK_ONLYDIR,
			     marker->mask, marker->dir_fd, ".")
		   ? -errno
		   : 0;
}

/* The three, and nothing else, so that nobody waits for an end of file that never comes. */
static int keep_own_fds(struct marker *marker)
{
	int *const fds[] = {&marker->group_fd, &marker->dir_fd, &marker->command_fd};

	/* Out of the way of 0, 1 and 2 first. */
	for (int i = 0; i < 3; i++) {
		*fds[i] = fcntl(*fds[i], F_DUPFD, 3);
		if (*fds[i] < 0)
			return -errno;
	}
	for (int i = 0; i < 3; i++) {
		if (*fds[i] != i && dup2(*fds[i], i) < 0)
			return -errno;
		*fds[i] = i;
	}
	return close_range(3, ~0u, 0) ? -errno : 0;
}

static void ignore_signals(void)
{
	static const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2};

	/* It ends when the server has, which ends by these. */
	for (size_t i = 0; i < sizeof(ignored) / sizeof(ignored[0]); i++)
		signal(ignored[i], SIG_IGN);
}

static _Noreturn void marker_main(struct marker *marker)
{
	static const char *const allowed[] = {"read", "write", "fanotify_mark", "exit_group"};
	int32_t result;
	char command;

	ignore_signals();
	prctl(PR_SET_NAME, "vhostfs-mark");
	/* The other right is for a directory of the mark's that only its owner may look into. */
	if (keep_own_fds(marker) ||
	    vf_keep_capabilities(1ull << CAP_SYS_ADMIN | 1ull << CAP_DAC_READ_SEARCH) ||
	    vf_seccomp_allow(allowed, sizeof(allowed) / sizeof(allowed[0]), VF_SECCOMP_KILL))
		_exit(1);
	/* The mark is there already: the first answer says whether it could be set from here, too.
	 */
	for (result = obey(marker, SET_MARK);; result = obey(marker, command)) {
		if (write(marker->command_fd, &result, sizeof(result)) != sizeof(result) ||
		    read(marker->command_fd, &command, 1) != 1)
			_exit(0);
	}
}

/* ---- the server's side --------------------------------------------------------- */

/* Nobody answers: the process has ended.  fanotify_mark(2) has other errors. */
#define GONE (-EPIPE)

static int32_t read_answer(int fd)
{
	int32_t result;
	ssize_t n;

	do {
		n = recv(fd, &result, sizeof(result), MSG_WAITALL);
	} while (n < 0 && errno == EINTR);
	return n == sizeof(result) ? result : GONE;
}

int vf_marker_start(int group_fd, int dir_fd, uint64_t mask)
{
	struct marker marker = {.group_fd = group_fd, .dir_fd = dir_fd, .mask = mask};
	int pair[2], error;
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -errno;
	pid = fork();
	if (!pid) {
		marker.command_fd = pair[1];
		marker_main(&marker);
	}
	error = pid < 0 ? -errno : 0;
	close(pair[1]);
	if (!error)
		error = read_answer(pair[0]);
	if (!error)
		return pair[0];
	close(pair[0]);
	return error;
}

static int command(int fd, char what)
{
	return send(fd, &what, 1, MSG_NOSIGNAL) == 1 ? read_answer(fd) : GONE;
}

static void end(struct vf_events *events)
{
	if (events->config.marker_fd >= 0)
		close(events->config.marker_fd);
	events->config.marker_fd = -1;
}

static int set_mark(struct vf_events *events, bool on)
{
	int error;

	if (events->config.marker_fd < 0 || events->is_marked == on)
		return 0;
	error = command(events->config.marker_fd, on ? SET_MARK : REMOVE_MARK);
	if (!error)
		events->is_marked = on;
	if (error != GONE || !vf_fanotify_move_without_marker(events, events->is_marked))
		return error;
	end(events);
	return 0;
}

int vf_marker_want(struct vf_events *events, enum vf_mark_wish wish, bool on)
{
	uint32_t after;
	bool is_news;
	int error;

	pthread_mutex_lock(&events->marker_lock);
	/* What nobody reads would fill the host's memory. */
	after = on && !atomic_load(&events->failed) ? events->mark_wishes | wish
						    : events->mark_wishes & ~(uint32_t)wish;
	error = set_mark(events, after);
	if (!error || !on)
		events->mark_wishes = after;
	is_news = on && error && error != events->marker_error;
	if (on)
		events->marker_error = error;
	pthread_mutex_unlock(&events->marker_lock);
	/* The guest may ask as often as it likes. */
	if (is_news)
		vf_events_notice(events,
				 "marking the file system: %s; no changes on the host reach the "
				 "guest",
				 error == GONE ? "the process vhostfs-mark has ended"
					       : strerror(-error));
	return error;
}

void vf_marker_end(struct vf_events *events)
{
	pthread_mutex_lock(&events->marker_lock);
	end(events);
	pthread_mutex_unlock(&events->marker_lock);
}
