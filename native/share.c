/* SPDX-License-Identifier: Apache-2.0 */
/* The share: its configuration, its sessions, and the threads that serve it. */
#include <sched.h>
#include <signal.h>
#include <time.h>

#include "cred.h"
#include "events.h"
#include "file.h"
#include "inode.h"
#include "mem.h"

uint8_t *vf_thread_reply(struct vf_thread *t, uint32_t size)
{
	uint8_t *bigger;

	if (size <= t->reply_room)
		return t->reply;
	bigger = malloc(size);
	if (!bigger)
		return NULL;
	free(t->reply);
	t->reply = bigger;
	t->reply_room = size;
	return bigger;
}

int vf_thread_enter(struct vf_thread *t, struct vf_share *share, const char *name)
{
	sigset_t all;
	int error;

	/* Signals are the main thread's; faults and the lock waiters' own signal stay open. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGABRT);
	sigdelset(&all, SIGSYS);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	pthread_setname_np(pthread_self(), name);
	t->share = share;
	if (!vf_thread_reply(t, VF_REPLY_MIN))
		return -ENOMEM;
	error = vf_thread_init(t, share);
	if (error) {
		free(t->reply);
		return error;
	}
	pthread_mutex_lock(&share->threads_lock);
	t->next = share->threads;
	share->threads = t;
	pthread_mutex_unlock(&share->threads_lock);
	return 0;
}

void vf_thread_leave(struct vf_thread *t)
{
	struct vf_share *share = t->share;

	pthread_mutex_lock(&share->threads_lock);
	for (struct vf_thread **p = &share->threads; *p; p = &(*p)->next) {
		if (*p == t) {
			*p = t->next;
			break;
		}
	}
	share->requests_done += atomic_load(&t->requests);
	pthread_mutex_unlock(&share->threads_lock);
	vf_thread_finish(t);
	free(t->reply);
}

static void *copy(const void *from, size_t n, size_t size, bool *failed)
{
	void *to;

	if (!n)
		return NULL;
	to = calloc(n, size);
	if (!to)
		*failed = true;
	else
		memcpy(to, from, n * size);
	return to;
}

static char *copy_string(const char *from, bool *failed)
{
	char *to = strdup(from ? from : "");

	if (!to)
		*failed = true;
	return to;
}

static int copy_config(struct vf_share_config *to, const struct vf_share_config *from)
{
	struct vf_xattr_rule *rules;
	bool failed = false;

	*to = *from;
	to->uid_rules = copy(from->uid_rules, from->n_uid_rules, sizeof(*from->uid_rules), &failed);
	to->gid_rules = copy(from->gid_rules, from->n_gid_rules, sizeof(*from->gid_rules), &failed);
	rules = copy(from->xattr_rules, from->n_xattr_rules, sizeof(*from->xattr_rules), &failed);
	for (uint32_t i = 0; rules && i < from->n_xattr_rules; i++) {
		rules[i].key = copy_string(from->xattr_rules[i].key, &failed);
		rules[i].prepend = copy_string(from->xattr_rules[i].prepend, &failed);
	}
	to->xattr_rules = rules;
	to->root_fd = fcntl(from->root_fd, F_DUPFD_CLOEXEC, 3);
	to->proc_fd_dir = fcntl(from->proc_fd_dir, F_DUPFD_CLOEXEC, 3);
	if (to->root_fd < 0 || to->proc_fd_dir < 0)
		return -EBADF;
	return failed ? -ENOMEM : 0;
}

static void free_config(struct vf_share_config *config)
{
	for (uint32_t i = 0; config->xattr_rules && i < config->n_xattr_rules; i++) {
		free((char *)config->xattr_rules[i].key);
		free((char *)config->xattr_rules[i].prepend);
	}
	free((void *)config->xattr_rules);
	free((void *)config->uid_rules);
	free((void *)config->gid_rules);
	if (config->root_fd >= 0)
		close(config->root_fd);
	if (config->proc_fd_dir >= 0)
		close(config->proc_fd_dir);
}

vf_share *vf_share_new(const struct vf_share_config *config, int *error)
{
	struct vf_share *share = calloc(1, sizeof(*share));

	*error = -ENOMEM;
	if (!share)
		return NULL;
	pthread_mutex_init(&share->threads_lock, NULL);
	atomic_init(&share->max_write, VF_MAX_IO);
	*error = copy_config(&share->config, config);
	if (!*error)
		*error = vf_mem_catch_sigbus();
	if (!*error)
		share->inodes = vf_inode_table_new(share, error);
	if (!*error)
		share->files = vf_file_table_new(share, error);
	if (!*error)
		share->locks = vf_lock_waiters_new(share, error);
	if (!*error)
		share->upcalls = vf_upcalls_new(error);
	if (!*error)
		share->pool = vf_pool_new(share, config->pool_threads, error);
	if (!*error)
		return share;
	vf_share_free(share);
	return NULL;
}

void vf_share_free(vf_share *share)
{
	if (!share)
		return;
	vf_events_free(share->events);
	share->events = NULL;
	vf_pool_free(share->pool);
	share->pool = NULL;
	if (share->locks)
		vf_lock_waiters_free(share->locks);
	if (share->files)
		vf_file_table_free(share->files);
	if (share->inodes)
		vf_inode_table_free(share->inodes);
	vf_upcalls_free(share->upcalls);
	free_config(&share->config);
	pthread_mutex_destroy(&share->threads_lock);
	free(share);
}

/* Waits until no thread executes an operation; the flags are 0, so none begins one. */
static void wait_idle(struct vf_share *share)
{
	for (;;) {
		bool busy = atomic_load(&share->visitors);

		pthread_mutex_lock(&share->threads_lock);
		for (struct vf_thread *t = share->threads; t; t = t->next)
			busy |= atomic_load(&t->busy);
		pthread_mutex_unlock(&share->threads_lock);
		if (!busy)
			return;
		nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
}

void vf_share_start_session(vf_share *share, uint64_t init_flags, uint32_t max_write)
{
	atomic_store(&share->init_flags, 0);
	wait_idle(share);
	vf_lock_waiters_cancel(share, NULL);
	vf_events_end_session(share->events);
	vf_file_table_clear(share->files);
	vf_inode_table_clear(share->inodes);
	atomic_store(&share->max_write, max_write > VF_MAX_IO ? VF_MAX_IO : max_write);
	if (max_write)
		atomic_store(&share->init_flags, init_flags | VF_SESSION);
}

int vf_share_inode_fd(vf_share *share, uint64_t nodeid)
{
	struct vf_inode *inode = vf_inode_get(share, nodeid);
	int fd;

	if (!inode)
		return -ESTALE;
	fd = vf_inode_path_fd(share, inode);
	if (fd >= 0) {
		fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
		if (fd < 0)
			fd = -errno;
	}
	vf_inode_put(share, inode);
	return fd;
}

static int file_fd(vf_share *share, uint64_t nodeid, uint64_t fh)
{
	struct vf_file *file;
	int fd = vf_file_use(share, nodeid, fh, VF_EITHER, &file);

	if (fd)
		return fd;
	fd = fcntl(vf_file_fd(file), F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		fd = -errno;
	vf_file_put(share, file);
	return fd;
}

int vf_share_file_fd(vf_share *share, uint64_t nodeid, uint64_t fh)
{
	int fd = -EIO;

	/* As vf_dispatch() does: the guest may begin another session meanwhile. */
	atomic_fetch_add(&share->visitors, 1);
	if (atomic_load(&share->init_flags))
		fd = file_fd(share, nodeid, fh);
	atomic_fetch_sub(&share->visitors, 1);
	return fd;
}

void vf_share_get_stats(vf_share *share, struct vf_share_stats *stats)
{
	memset(stats, 0, sizeof(*stats));
	vf_inode_get_stats(share, stats);
	vf_file_get_stats(share, stats);
	stats->entries_ahead = atomic_load(&share->entries_ahead);
	pthread_mutex_lock(&share->threads_lock);
	stats->requests = share->requests_done;
	for (struct vf_thread *t = share->threads; t; t = t->next)
		stats->requests += atomic_load(&t->requests);
	pthread_mutex_unlock(&share->threads_lock);
}
