// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's first process once init is done: runs commands for the launcher
 * on the host, many at a time, over one virtio-serial port.
 *
 * Protocol: frames as vhostfs/vm/frames.py lays them down; keep both in step.
 * The host is trusted here (it owns this machine); what is guarded against is
 * a command that reads or writes slowly, floods, forks or dies.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define PORT_NAME "vhostfs.agent"
#define PROTOCOL_VERSION 1

#define HEADER_SIZE 12
#define MAX_PAYLOAD (192 * 1024)
#define CHUNK (32 * 1024)
#define STDIN_WINDOW (64 * 1024)
#define MAX_COMMANDS 256

enum frame_type {
	/* host to guest */
	FRAME_START = 1,
	FRAME_STDIN = 2,
	FRAME_STDIN_END = 3,
	FRAME_SIGNAL = 4,
	FRAME_RESIZE = 5,
	FRAME_POWEROFF = 6,
	/* guest to host */
	FRAME_HELLO = 0x41,
	FRAME_STDOUT = 0x42,
	FRAME_STDERR = 0x43,
	FRAME_EXIT = 0x44,
	FRAME_CREDIT = 0x45,
	FRAME_FAILED = 0x46,
};

#define START_TTY 1u
#define START_STDIN 2u

struct frame_header {
	uint32_t length;
	uint32_t command;
	uint8_t type;
	uint8_t reserved[3];
};

_Static_assert(sizeof(struct frame_header) == HEADER_SIZE, "frame header is 12 bytes");

struct command {
	struct command *next;
	uint32_t id;
	pid_t pid;
	bool exited;
	int status;
	bool tty;
	int in_fd; /* write end of stdin, or the pty; -1 when closed */
	int out_fd; /* read end of stdout, or the pty; -1 when at its end */
	int err_fd; /* read end of stderr; -1 when at its end or with a pty */
	bool in_ended;
	uint32_t credit; /* bytes of stdin taken off the host's hands and not yet reported */
	size_t in_size;
	uint8_t in[STDIN_WINDOW];
};

static struct command *commands;
static size_t command_count;
static int port_fd = -1;

static uint8_t in_buf[HEADER_SIZE + MAX_PAYLOAD];
static size_t in_used;

/* Room for one chunk of each kind beyond the mark at which reading of outputs stops. */
static uint8_t out_buf[16 * CHUNK];
static size_t out_used;

static void die(const char *what)
{
	fprintf(stderr, "vhostfs agent: %s: %s\n", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	_exit(1);
}

static size_t out_room(void)
{
	return sizeof(out_buf) - out_used;
}

static void queue_frame(uint32_t command, enum frame_type type, const void *payload, size_t length)
{
	struct frame_header header = {
		.length = (uint32_t)length,
		.command = command,
		.type = (uint8_t)type,
	};

	/* Callers leave room; small frames always fit because reading stops well before the end. */
	if (out_room() < HEADER_SIZE + length) {
		errno = ENOBUFS;
		die("output buffer");
	}
	memcpy(out_buf + out_used, &header, HEADER_SIZE);
	if (length)
		memcpy(out_buf + out_used + HEADER_SIZE, payload, length);
	out_used += HEADER_SIZE + length;
}

static void flush_port(void)
{
	size_t done = 0;

	while (done < out_used) {
		ssize_t n = write(port_fd, out_buf + done, out_used - done);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			if (errno == EAGAIN)
				break;
			die("write to the port");
		}
		if (n == 0)
			break;
		done += (size_t)n;
	}
	memmove(out_buf, out_buf + done, out_used - done);
	out_used -= done;
}

static struct command *find_command(uint32_t id)
{
	for (struct command *c = commands; c; c = c->next)
		if (c->id == id)
			return c;
	return NULL;
}

static void close_stdin(struct command *c)
{
	if (c->in_fd >= 0 && c->in_fd != c->out_fd)
		close(c->in_fd);
	c->in_fd = -1;
	c->in_size = 0;
}

static void free_command(struct command *c)
{
	struct command **link = &commands;

	while (*link != c)
		link = &(*link)->next;
	*link = c->next;
	command_count--;
	close_stdin(c);
	if (c->out_fd >= 0)
		close(c->out_fd);
	if (c->err_fd >= 0)
		close(c->err_fd);
	free(c);
}

static void fail_start(uint32_t id, const char *what)
{
	char text[160];
	int n = snprintf(text, sizeof(text), "%s: %s", what, strerror(errno));

	queue_frame(id, FRAME_FAILED, text, (size_t)n);
}

static int open_pty(int *slave, uint16_t rows, uint16_t columns)
{
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	int unlock = 0;
	struct winsize size = { .ws_row = rows, .ws_col = columns };

	if (master < 0)
		return -1;
	if (ioctl(master, TIOCSPTLCK, &unlock) < 0 || ioctl(master, TIOCSWINSZ, &size) < 0 ||
	    (*slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
		close(master);
		return -1;
	}
	return master;
}

static void run_child(int in, int out, int err, bool tty, const char *cwd, char *text, char *env)
{
	char *argv[] = { "sh", "-c", text, NULL };
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	if (tty)
		ioctl(in, TIOCSCTTY, 0);
	dup2(in, 0);
	dup2(out, 1);
	dup2(err, 2);
	while (*env) {
		size_t length = strlen(env);

		putenv(env);
		env += length + 1;
	}
	if (chdir(cwd) < 0) {
		fprintf(stderr, "cannot enter %s in the guest: %s\n", cwd, strerror(errno));
		_exit(126);
	}
	execv("/bin/sh", argv);
	fprintf(stderr, "cannot start /bin/sh in the guest: %s\n", strerror(errno));
	_exit(127);
}

static void close_pair(int pair[2])
{
	for (int i = 0; i < 2; i++)
		if (pair[i] >= 0)
			close(pair[i]);
}

static void start_command(uint32_t id, uint8_t *payload, size_t length)
{
	int in[2] = { -1, -1 }, out[2] = { -1, -1 }, err[2] = { -1, -1 };
	struct command *c = NULL;
	uint32_t flags;
	uint16_t size[2];
	char *cwd, *text, *env, *end = (char *)payload + length;
	pid_t pid;
	bool tty;

	errno = EPROTO;
	/* flags, rows, columns, then three or more strings of which the last is empty */
	if (find_command(id) || length < 8 + 3 || end[-1] || end[-2])
		return fail_start(id, "start request");
	memcpy(&flags, payload, 4);
	memcpy(size, payload + 4, 4);
	tty = flags & START_TTY;
	cwd = (char *)payload + 8;
	text = cwd + strlen(cwd) + 1;
	if (text >= end)
		return fail_start(id, "start request");
	env = text + strlen(text) + 1;
	if (env >= end)
		return fail_start(id, "start request");

	errno = EAGAIN;
	if (command_count >= MAX_COMMANDS)
		return fail_start(id, "too many commands at once");
	c = calloc(1, sizeof(*c));
	if (!c)
		return fail_start(id, "memory");
	if (tty) {
		out[0] = open_pty(&out[1], size[0], size[1]);
		if (out[0] < 0)
			goto fail;
	} else {
		if (pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
			goto fail;
		if (flags & START_STDIN) {
			if (pipe2(in, O_CLOEXEC) < 0)
				goto fail;
		} else {
			in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
			if (in[0] < 0)
				goto fail;
		}
	}
	pid = fork();
	if (pid < 0)
		goto fail;
	if (pid == 0) {
		if (tty)
			run_child(out[1], out[1], out[1], true, cwd, text, env);
		else
			run_child(in[0], out[1], err[1], false, cwd, text, env);
	}
	if (in[0] >= 0)
		close(in[0]);
	close(out[1]);
	if (err[1] >= 0)
		close(err[1]);
	c->id = id;
	c->pid = pid;
	c->tty = tty;
	c->in_fd = tty ? out[0] : in[1];
	c->out_fd = out[0];
	c->err_fd = err[0];
	if (c->in_fd >= 0)
		fcntl(c->in_fd, F_SETFL, O_NONBLOCK);
	fcntl(c->out_fd, F_SETFL, O_NONBLOCK);
	if (c->err_fd >= 0)
		fcntl(c->err_fd, F_SETFL, O_NONBLOCK);
	c->next = commands;
	commands = c;
	command_count++;
	return;
fail:
	fail_start(id, "start of a command");
	free(c);
	close_pair(in);
	close_pair(out);
	close_pair(err);
}

static void feed_stdin(struct command *c)
{
	while (c->in_fd >= 0 && c->in_size) {
		ssize_t n = write(c->in_fd, c->in, c->in_size);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			if (errno == EAGAIN)
				return;
			/* Nobody reads any more: the host may send the rest, it is dropped. */
			c->credit += (uint32_t)c->in_size;
			close_stdin(c);
		} else {
			c->credit += (uint32_t)n;
			memmove(c->in, c->in + n, c->in_size - (size_t)n);
			c->in_size -= (size_t)n;
		}
	}
	if (c->in_ended && !c->in_size && !c->tty)
		close_stdin(c);
}

static void take_stdin(struct command *c, const uint8_t *data, size_t length)
{
	if (c->in_fd < 0 || c->in_ended) {
		c->credit += (uint32_t)length;
		return;
	}
	if (length > sizeof(c->in) - c->in_size) {
		errno = EPROTO;
		die("host sent more stdin than it was given credit for");
	}
	memcpy(c->in + c->in_size, data, length);
	c->in_size += length;
	feed_stdin(c);
}

static void grant_credit(struct command *c)
{
	if (!c->credit || out_room() < CHUNK)
		return;
	queue_frame(c->id, FRAME_CREDIT, &c->credit, sizeof(c->credit));
	c->credit = 0;
}

static void handle_frame(const struct frame_header *header, uint8_t *payload)
{
	struct command *c = find_command(header->command);
	uint32_t number = 0;

	if (header->length >= 4)
		memcpy(&number, payload, 4);
	switch (header->type) {
	case FRAME_START:
		start_command(header->command, payload, header->length);
		break;
	case FRAME_STDIN:
		if (c)
			take_stdin(c, payload, header->length);
		break;
	case FRAME_STDIN_END:
		if (c) {
			c->in_ended = true;
			feed_stdin(c);
		}
		break;
	case FRAME_SIGNAL:
		/* The group, which setsid() made, so that a shell's children get it too. */
		if (c && !c->exited)
			kill(-c->pid, (int)number);
		break;
	case FRAME_RESIZE:
		if (c && c->tty && header->length >= 4) {
			struct winsize size = {
				.ws_row = (uint16_t)(number & 0xffff),
				.ws_col = (uint16_t)(number >> 16),
			};

			ioctl(c->out_fd, TIOCSWINSZ, &size);
		}
		break;
	case FRAME_POWEROFF:
		sync();
		reboot(RB_POWER_OFF);
		break;
	default:
		errno = EPROTO;
		die("frame of unknown type");
	}
}

static void read_port(void)
{
	ssize_t n;
	size_t at = 0;

	n = read(port_fd, in_buf + in_used, sizeof(in_buf) - in_used);
	if (n < 0) {
		if (errno == EAGAIN || errno == EINTR)
			return;
		die("read from the port");
	}
	in_used += (size_t)n;
	while (in_used - at >= HEADER_SIZE) {
		struct frame_header header;

		memcpy(&header, in_buf + at, HEADER_SIZE);
		if (header.length > MAX_PAYLOAD) {
			errno = EPROTO;
			die("frame too long");
		}
		if (in_used - at < HEADER_SIZE + header.length)
			break;
		handle_frame(&header, in_buf + at + HEADER_SIZE);
		at += HEADER_SIZE + header.length;
	}
	memmove(in_buf, in_buf + at, in_used - at);
	in_used -= at;
}

/* Moves one chunk of output; true when there may be more at once. */
static bool read_output(struct command *c, int *fd, enum frame_type type)
{
	static uint8_t chunk[CHUNK];
	ssize_t n;

	if (*fd < 0)
		return false;
	n = read(*fd, chunk, sizeof(chunk));
	if (n > 0) {
		queue_frame(c->id, type, chunk, (size_t)n);
		return true;
	}
	if (n < 0 && errno == EINTR)
		return true;
	if (n < 0 && errno == EAGAIN)
		return false;
	/* End of file; of a pty, EIO when its last user has gone. */
	if (c->tty)
		c->in_fd = -1;
	close(*fd);
	*fd = -1;
	return false;
}

/* Room for a chunk of both outputs and the small frames of every command. */
static bool may_read_output(void)
{
	return out_room() >= 2 * (HEADER_SIZE + CHUNK) + 8 * CHUNK;
}

/* What a command wrote before it ended is in the pipes; what its children may write later is not waited for. */
static void finish_command(struct command *c)
{
	uint32_t result[2];

	while (may_read_output() && read_output(c, &c->out_fd, FRAME_STDOUT))
		;
	if (!may_read_output())
		return;
	while (may_read_output() && read_output(c, &c->err_fd, FRAME_STDERR))
		;
	if (!may_read_output())
		return;
	result[0] = WIFSIGNALED(c->status) ? 1 : 0;
	result[1] = (uint32_t)(WIFSIGNALED(c->status) ? WTERMSIG(c->status) : WEXITSTATUS(c->status));
	queue_frame(c->id, FRAME_EXIT, result, sizeof(result));
	free_command(c);
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		for (struct command *c = commands; c; c = c->next) {
			if (c->pid == pid && !c->exited) {
				c->exited = true;
				c->status = status;
				break;
			}
		}
	}
}

static int open_port(void)
{
	for (int attempt = 0; attempt < 500; attempt++) {
		DIR *ports = opendir("/sys/class/virtio-ports");
		struct dirent *entry;

		while (ports && (entry = readdir(ports))) {
			char path[300], name[64] = "";
			FILE *file;
			int fd;

			if (entry->d_name[0] == '.')
				continue;
			snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", entry->d_name);
			file = fopen(path, "re");
			if (!file)
				continue;
			if (!fgets(name, sizeof(name), file))
				name[0] = 0;
			fclose(file);
			name[strcspn(name, "\n")] = 0;
			if (strcmp(name, PORT_NAME))
				continue;
			snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
			fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
			if (fd >= 0) {
				closedir(ports);
				return fd;
			}
		}
		if (ports)
			closedir(ports);
		usleep(10000);
	}
	return -1;
}

static void serve(int signal_fd)
{
	static struct pollfd polls[2 + 3 * MAX_COMMANDS];
	static int *targets[2 + 3 * MAX_COMMANDS];
	bool connected = false;

	for (;;) {
		size_t count = 2;
		bool reading = may_read_output();
		int timeout_ms = -1;
		struct signalfd_siginfo info;

		polls[0] = (struct pollfd){ .fd = port_fd };
		/* Small answers to what is read need room too: a full buffer stops reading. */
		if (out_room() >= 2 * CHUNK)
			polls[0].events |= POLLIN;
		if (out_used) {
			polls[0].events |= POLLOUT;
			timeout_ms = 100;
		}
		polls[1] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
		for (struct command *c = commands; c; c = c->next) {
			if (c->exited)
				timeout_ms = 10;
			if (reading && c->out_fd >= 0) {
				targets[count] = &c->out_fd;
				polls[count++] = (struct pollfd){ .fd = c->out_fd, .events = POLLIN };
			}
			if (reading && c->err_fd >= 0) {
				targets[count] = &c->err_fd;
				polls[count++] = (struct pollfd){ .fd = c->err_fd, .events = POLLIN };
			}
			if (c->in_fd >= 0 && c->in_size) {
				targets[count] = NULL;
				polls[count++] = (struct pollfd){ .fd = c->in_fd, .events = POLLOUT };
			}
		}
		if (poll(polls, count, timeout_ms) < 0 && errno != EINTR)
			die("poll");

		if (polls[0].revents & POLLHUP) {
			if (connected) {
				errno = ENOTCONN;
				die("the host has gone");
			}
			usleep(2000);
		} else {
			connected = true;
		}
		while (read(signal_fd, &info, sizeof(info)) > 0)
			;
		for (struct command *c = commands; c; c = c->next) {
			for (size_t i = 2; i < count; i++) {
				if (!polls[i].revents || !targets[i] || !may_read_output())
					continue;
				if (targets[i] == &c->out_fd)
					read_output(c, &c->out_fd, FRAME_STDOUT);
				else if (targets[i] == &c->err_fd)
					read_output(c, &c->err_fd, FRAME_STDERR);
			}
			feed_stdin(c);
		}
		/* After the outputs, so that an exit is seen only with what came before it still readable. */
		reap();
		for (struct command *c = commands, *next; c; c = next) {
			next = c->next;
			if (c->exited)
				finish_command(c);
		}
		if (polls[0].revents & POLLIN)
			read_port();
		for (struct command *c = commands; c; c = c->next)
			grant_credit(c);
		flush_port();
	}
}

int main(void)
{
	uint32_t version = PROTOCOL_VERSION;
	sigset_t mask;
	int signal_fd;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	sigprocmask(SIG_BLOCK, &mask, NULL);
	signal_fd = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
	if (signal_fd < 0)
		die("signalfd");
	port_fd = open_port();
	if (port_fd < 0) {
		errno = ENODEV;
		die("no virtio-serial port " PORT_NAME);
	}
	queue_frame(0, FRAME_HELLO, &version, sizeof(version));
	serve(signal_fd);
}
