/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device: queues, each drained by a thread of its own, and guest memory.
 *
 * Locks: device->lock guards the memory map and the list of queues (control
 * path only); queue->lock guards the used ring and what follows it in the
 * structure.  A queue's thread owns the available side alone.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "file.h"
#include "mem.h"
#include "request.h"
#include "ring.h"

#define MAX_FAULTS 16u

struct vf_queue {
	struct vf_device *device;
	uint32_t index;
	struct vf_ring ring;
	struct vf_mem *ring_mem; /* keeps the ring itself mapped */
	struct vf_mem *mem;	 /* for buffers; the thread's own, renewed when the map changes */
	uint32_t mem_version;
	pthread_t thread;
	int kick_fd, stop_fd, epoll_fd;
	atomic_bool stopping;

	pthread_mutex_t lock;
	pthread_cond_t idle;
	int call_fd, err_fd;
	uint32_t taken;	      /* chains taken, ever (wraps); the thread's own */
	uint32_t finished;    /* chains returned, ever (wraps); under lock */
	struct vf_req *spare; /* requests that ended elsewhere, to use again */
	bool draining;	      /* its thread is at work and will see to the interrupt */
};

struct vf_device {
	struct vf_share *share;
	pthread_mutex_t lock;
	struct vf_mem *mem;
	atomic_uint mem_version;
	int fault_fd;
	struct vf_fault faults[MAX_FAULTS];
	uint32_t n_faults;
	uint32_t max_queues;
	struct vf_queue *queues[];
};

/* ---- faults ------------------------------------------------------------- */

static void fault(struct vf_device *device, int32_t queue, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void fault(struct vf_device *device, int32_t queue, const char *format, ...)
{
	uint64_t one = 1;
	va_list args;

	pthread_mutex_lock(&device->lock);
	/* The first ones tell most; a flood is cut off until they have been read. */
	if (device->n_faults < MAX_FAULTS) {
		struct vf_fault *f = &device->faults[device->n_faults++];

		f->queue = queue;
		va_start(args, format);
		vsnprintf(f->text, sizeof(f->text), format, args);
		va_end(args);
	}
	pthread_mutex_unlock(&device->lock);
	if (write(device->fault_fd, &one, sizeof(one)) < 0) {
		/* Full: it is readable, which is all that is wanted. */
	}
}

int vf_device_fault_fd(vf_device *device)
{
	return device->fault_fd;
}

int vf_device_next_fault(vf_device *device, struct vf_fault *out)
{
	uint64_t count;
	int found = 0;

	pthread_mutex_lock(&device->lock);
	if (device->n_faults) {
		*out = device->faults[0];
		memmove(device->faults, device->faults + 1,
			--device->n_faults * sizeof(device->faults[0]));
		found = 1;
	} else if (read(device->fault_fd, &count, sizeof(count)) < 0) {
		/* Nothing was pending. */
	}
	pthread_mutex_unlock(&device->lock);
	return found;
}

/* ---- completion --------------------------------------------------------- */

static void signal_fd(int fd)
{
	uint64_t one = 1;

	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0) {
		/* EAGAIN: an interrupt is pending there already. */
	}
}

static void finish(struct vf_req *r, int32_t result, const void *payload, bool recycle)
{
	struct vf_queue *q = r->queue;
	uint32_t written = 0;

	if (result != VF_NO_REPLY)
		written = vf_req_write_reply(r, result, payload);
	vf_mem_put(r->mem);
	r->mem = NULL;
	pthread_mutex_lock(&q->lock);
	vf_ring_put(&q->ring, r->head, written);
	if (recycle) {
		r->next = q->spare;
		q->spare = r;
	}
	if (!q->draining && vf_ring_needs_call(&q->ring))
		signal_fd(q->call_fd);
	q->finished++;
	if (atomic_load_explicit(&q->stopping, memory_order_relaxed))
		pthread_cond_signal(&q->idle);
	pthread_mutex_unlock(&q->lock);
}

void vf_req_complete(struct vf_req *r, int error, const void *payload, uint32_t size)
{
	r->in_place = false;
	finish(r, error ? error : (int32_t)size, payload, true);
}

/* True: the request has ended and is the caller's to use again or to recycle. */
static bool run(struct vf_thread *t, struct vf_req *r, bool recycle)
{
	int32_t result = vf_dispatch(t, r);

	if (result == VF_ASYNC)
		return false;
	if (result == VF_TO_POOL) {
		vf_req_rewind(r);
		vf_pool_submit(r->share->pool, r);
		return false;
	}
	atomic_store_explicit(&t->requests,
			      atomic_load_explicit(&t->requests, memory_order_relaxed) + 1,
			      memory_order_relaxed);
	finish(r, result, t->reply, recycle);
	return true;
}

void vf_req_run_in_pool(struct vf_thread *t, struct vf_req *r)
{
	run(t, r, true);
}

/* ---- the queue's thread ------------------------------------------------- */

static struct vf_req *new_request(struct vf_queue *q)
{
	struct vf_req *r;

	pthread_mutex_lock(&q->lock);
	r = q->spare;
	if (r)
		q->spare = r->next;
	pthread_mutex_unlock(&q->lock);
	if (!r) {
		r = calloc(1, sizeof(*r));
		if (!r)
			return NULL;
	}
	r->share = q->device->share;
	r->queue = q;
	return r;
}

static void renew_memory(struct vf_queue *q)
{
	struct vf_device *device = q->device;

	if (atomic_load_explicit(&device->mem_version, memory_order_acquire) == q->mem_version)
		return;
	pthread_mutex_lock(&device->lock);
	vf_mem_put(q->mem);
	q->mem = vf_mem_get(device->mem);
	q->mem_version = atomic_load(&device->mem_version);
	pthread_mutex_unlock(&device->lock);
}

static void call_if_needed(struct vf_queue *q, bool still_draining)
{
	pthread_mutex_lock(&q->lock);
	q->draining = still_draining;
	if (vf_ring_needs_call(&q->ring))
		signal_fd(q->call_fd);
	pthread_mutex_unlock(&q->lock);
}

/* Interrupt this often while a batch is drained, so that the guest works alongside (1 to 64
 * measured). */
#define CALL_EVERY 2

/* Answers what is available; 0, or negative when the ring is broken. */
static int drain(struct vf_queue *q, struct vf_thread *t)
{
	const char *why = "out of memory";
	struct vf_req *r = NULL;
	uint32_t since_call = 0;
	int taken = 0;

	pthread_mutex_lock(&q->lock);
	q->draining = true;
	pthread_mutex_unlock(&q->lock);
	while (!atomic_load_explicit(&q->stopping, memory_order_relaxed)) {
		bool ended = true;
		int error;

		if (!r)
			r = new_request(q);
		if (!r) {
			taken = -ENOMEM;
			break;
		}
		renew_memory(q);
		taken = vf_ring_take(&q->ring, q->mem, r, &why);
		if (taken <= 0)
			break;
		r->mem = vf_mem_get(q->mem);
		q->taken++;
		error = vf_req_parse(r);
		if (error == -EBADMSG) {
			why = "a request shorter than a FUSE header";
			finish(r, VF_NO_REPLY, NULL, false);
			taken = error;
			break;
		}
		if (error)
			finish(r, error, NULL, false);
		else
			ended = run(t, r, false);
		if (!ended)
			r = NULL;
		if (++since_call == CALL_EVERY) {
			since_call = 0;
			call_if_needed(q, true);
		}
	}
	if (r) {
		pthread_mutex_lock(&q->lock);
		r->next = q->spare;
		q->spare = r;
		pthread_mutex_unlock(&q->lock);
	}
	call_if_needed(q, false);
	if (taken < 0)
		fault(q->device, (int32_t)q->index, "queue %u stopped: %s", q->index, why);
	return taken < 0 ? taken : 0;
}

static void wait_for_stop(struct vf_queue *q)
{
	uint64_t count;

	while (!atomic_load(&q->stopping)) {
		if (read(q->stop_fd, &count, sizeof(count)) < 0 && errno != EINTR)
			return;
	}
}

static void *queue_main(void *arg)
{
	struct vf_queue *q = arg;
	struct vf_share *share = q->device->share;
	struct vf_thread t = {.may_block = !share->config.pool_threads};
	struct epoll_event events[2];
	char name[16];

	snprintf(name, sizeof(name), "vhostfs-vq%u", q->index);
	int error = vf_thread_enter(&t, share, name);

	if (error) {
		fault(q->device, (int32_t)q->index, "queue %u: its thread cannot start: %s",
		      q->index, strerror(-error));
		wait_for_stop(q);
		return NULL;
	}
	while (!atomic_load(&q->stopping)) {
		vf_ring_disable_kicks(&q->ring);
		if (drain(q, &t) < 0) {
			/* Only a reset helps; the front end learns it by the error descriptor. */
			pthread_mutex_lock(&q->lock);
			signal_fd(q->err_fd);
			pthread_mutex_unlock(&q->lock);
			wait_for_stop(q);
			break;
		}
		if (vf_ring_enable_kicks(&q->ring))
			continue;
		/* Edge-triggered: the kick descriptor need not be read. */
		if (epoll_wait(q->epoll_fd, events, 2, -1) < 0 && errno != EINTR)
			break;
	}
	vf_thread_leave(&t);
	return NULL;
}

/* ---- control ------------------------------------------------------------ */

vf_device *vf_device_new(vf_share *share, uint32_t max_queues, int *error)
{
	struct vf_device *device =
	    calloc(1, sizeof(*device) + max_queues * sizeof(device->queues[0]));

	*error = -ENOMEM;
	if (!device)
		return NULL;
	device->fault_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (device->fault_fd < 0) {
		*error = -errno;
		free(device);
		return NULL;
	}
	*error = 0;
	device->share = share;
	device->max_queues = max_queues;
	pthread_mutex_init(&device->lock, NULL);
	return device;
}

void vf_device_free(vf_device *device)
{
	if (!device)
		return;
	for (uint32_t i = 0; i < device->max_queues; i++)
		vf_queue_stop(device, i);
	vf_mem_put(device->mem);
	close(device->fault_fd);
	pthread_mutex_destroy(&device->lock);
	free(device);
}

static void use_memory(vf_device *device, struct vf_mem *mem)
{
	pthread_mutex_lock(&device->lock);
	vf_mem_put(device->mem);
	device->mem = mem;
	atomic_fetch_add(&device->mem_version, 1);
	pthread_mutex_unlock(&device->lock);
}

int vf_device_set_memory(vf_device *device, const struct vf_region *regions, const int *fds,
			 uint32_t n_regions)
{
	struct vf_mem *mem;
	int error;

	for (uint32_t i = 0; i < device->max_queues; i++)
		if (device->queues[i])
			return -EBUSY;
	mem = vf_mem_extend(NULL, regions, fds, n_regions, &error);
	if (!mem)
		return error;
	use_memory(device, mem);
	return 0;
}

int vf_device_add_region(vf_device *device, const struct vf_region *region, int fd)
{
	int error;
	struct vf_mem *mem = vf_mem_extend(device->mem, region, &fd, 1, &error);

	if (!mem)
		return error;
	use_memory(device, mem);
	return 0;
}

int vf_device_remove_region(vf_device *device, const struct vf_region *region)
{
	int error;
	struct vf_mem *mem = vf_mem_without(device->mem, region, &error);

	if (!mem)
		return error;
	use_memory(device, mem);
	return 0;
}

/* Duplicates a descriptor to signal on, which must never block its writer. */
static int keep_signal_fd(int fd, int *kept)
{
	int flags;

	*kept = -1;
	if (fd < 0)
		return 0;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	*kept = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	return *kept < 0 ? -errno : 0;
}

static void queue_free(struct vf_queue *q)
{
	int fds[] = {q->kick_fd, q->stop_fd, q->epoll_fd, q->call_fd, q->err_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	while (q->spare) {
		struct vf_req *r = q->spare;

		q->spare = r->next;
		vf_req_free(r);
	}
	vf_mem_put(q->mem);
	vf_mem_put(q->ring_mem);
	pthread_cond_destroy(&q->idle);
	pthread_mutex_destroy(&q->lock);
	free(q);
}

static int queue_open_fds(struct vf_queue *q, const struct vf_queue_config *config)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET};
	int error;

	q->kick_fd = fcntl(config->kick_fd, F_DUPFD_CLOEXEC, 3);
	if (q->kick_fd < 0)
		return -errno;
	error = keep_signal_fd(config->call_fd, &q->call_fd);
	if (!error)
		error = keep_signal_fd(config->err_fd, &q->err_fd);
	if (error)
		return error;
	q->stop_fd = eventfd(0, EFD_CLOEXEC);
	q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (q->stop_fd < 0 || q->epoll_fd < 0 ||
	    epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->kick_fd, &event) ||
	    epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->stop_fd, &event))
		return -errno;
	return 0;
}

int vf_queue_start(vf_device *device, const struct vf_queue_config *config)
{
	struct vf_queue *q;
	int error;

	if (config->index >= device->max_queues || config->role == VF_QUEUE_NOTIFICATION)
		return -EINVAL;
	if (device->queues[config->index])
		return -EBUSY;
	if (!device->mem)
		return -EFAULT;
	if (config->kick_fd < 0)
		return -ENOTSUP;
	q = calloc(1, sizeof(*q));
	if (!q)
		return -ENOMEM;
	q->device = device;
	q->index = config->index;
	q->kick_fd = q->stop_fd = q->epoll_fd = q->call_fd = q->err_fd = -1;
	pthread_mutex_init(&q->lock, NULL);
	pthread_cond_init(&q->idle, NULL);
	q->ring_mem = vf_mem_get(device->mem);
	q->mem = vf_mem_get(device->mem);
	q->mem_version = atomic_load(&device->mem_version);
	error = vf_ring_init(&q->ring, device->mem, config);
	if (!error)
		error = queue_open_fds(q, config);
	if (!error)
		error = -pthread_create(&q->thread, NULL, queue_main, q);
	if (error) {
		queue_free(q);
		return error;
	}
	device->queues[config->index] = q;
	return 0;
}

int vf_queue_stop(vf_device *device, uint32_t index)
{
	struct vf_queue *q;
	int base;

	if (index >= device->max_queues || !device->queues[index])
		return -ENOENT;
	q = device->queues[index];
	atomic_store(&q->stopping, true);
	signal_fd(q->stop_fd);
	pthread_join(q->thread, NULL);
	vf_lock_waiters_cancel(device->share, q);
	pthread_mutex_lock(&q->lock);
	while (q->finished != q->taken)
		pthread_cond_wait(&q->idle, &q->lock);
	pthread_mutex_unlock(&q->lock);
	base = q->ring.next_avail;
	device->queues[index] = NULL;
	queue_free(q);
	return base;
}

static int exchange_fd(struct vf_queue *q, int *held, int fd)
{
	int kept, old;
	int error = keep_signal_fd(fd, &kept);

	if (error)
		return error;
	pthread_mutex_lock(&q->lock);
	old = *held;
	*held = kept;
	/* What was completed while there was no descriptor must not stay unheard. */
	if (held == &q->call_fd && kept >= 0)
		signal_fd(kept);
	pthread_mutex_unlock(&q->lock);
	if (old >= 0)
		close(old);
	return 0;
}

int vf_queue_set_call(vf_device *device, uint32_t index, int call_fd)
{
	if (index >= device->max_queues || !device->queues[index])
		return -ENOENT;
	return exchange_fd(device->queues[index], &device->queues[index]->call_fd, call_fd);
}

int vf_queue_set_err(vf_device *device, uint32_t index, int err_fd)
{
	if (index >= device->max_queues || !device->queues[index])
		return -ENOENT;
	return exchange_fd(device->queues[index], &device->queues[index]->err_fd, err_fd);
}
