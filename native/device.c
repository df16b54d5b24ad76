/* SPDX-License-Identifier: Apache-2.0 */
/* The device: guest memory, and the life of queues, each served by a thread of its own. */
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "events.h"
#include "file.h"
#include "queue.h"
#include "request.h"

/* ---- what all queues need ------------------------------------------------ */

void vf_signal_fd(int fd)
{
	uint64_t one = 1;

	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0) {
		/* EAGAIN: an interrupt is pending there already. */
	}
}

void vf_queue_renew_memory(struct vf_queue *q)
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

void vf_queue_wait_for_stop(struct vf_queue *q)
{
	uint64_t count;

	while (!atomic_load(&q->stopping)) {
		if (read(q->wake_fd, &count, sizeof(count)) < 0 && errno != EINTR)
			return;
	}
}

void vf_queue_signal_error(struct vf_queue *q)
{
	pthread_mutex_lock(&q->lock);
	vf_signal_fd(q->err_fd);
	pthread_mutex_unlock(&q->lock);
}

/* ---- control ------------------------------------------------------------ */

vf_device *vf_device_new(vf_share *share, uint32_t max_queues, int *error)
{
	struct vf_device *device =
	    calloc(1, sizeof(*device) + max_queues * sizeof(device->queues[0]));

	*error = -ENOMEM;
	if (!device)
		return NULL;
	*error = vf_faults_init(&device->faults);
	if (*error) {
		free(device);
		return NULL;
	}
	device->share = share;
	device->max_queues = max_queues;
	pthread_mutex_init(&device->lock, NULL);
	vf_lending_init(&device->lending);
	return device;
}

void vf_device_free(vf_device *device)
{
	if (!device)
		return;
	for (uint32_t i = 0; i < device->max_queues; i++)
		vf_queue_stop(device, i);
	vf_mem_put(device->mem);
	vf_faults_destroy(&device->faults);
	vf_lending_destroy(&device->lending);
	pthread_mutex_destroy(&device->lock);
	free(device);
}

int vf_device_fault_fd(vf_device *device)
{
	return device->faults.event_fd;
}

int vf_device_next_fault(vf_device *device, struct vf_fault *fault)
{
	return vf_faults_next(&device->faults, fault);
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
static int keep_vf_signal_fd(int fd, int *kept)
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
	int fds[] = {q->kick_fd, q->wake_fd, q->epoll_fd, q->call_fd, q->err_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	if (q->ready)
		vf_req_free(q->ready);
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
	error = keep_vf_signal_fd(config->call_fd, &q->call_fd);
	if (!error)
		error = keep_vf_signal_fd(config->err_fd, &q->err_fd);
	if (error)
		return error;
	q->wake_fd = eventfd(0, EFD_CLOEXEC);
	q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (q->wake_fd < 0 || q->epoll_fd < 0 ||
	    epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->kick_fd, &event) ||
	    epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, q->wake_fd, &event))
		return -errno;
	return 0;
}

int vf_queue_start(vf_device *device, const struct vf_queue_config *config)
{
	void *(*main)(void *) = vf_request_queue_main;
	struct vf_queue *q;
	int error;

	if (config->index >= device->max_queues)
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
	q->kick_fd = q->wake_fd = q->epoll_fd = q->call_fd = q->err_fd = -1;
	pthread_mutex_init(&q->lock, NULL);
	pthread_cond_init(&q->idle, NULL);
	q->ring_mem = vf_mem_get(device->mem);
	q->mem = vf_mem_get(device->mem);
	q->mem_version = atomic_load(&device->mem_version);
	error = vf_ring_init(&q->ring, device->mem, config);
	if (!error)
		error = queue_open_fds(q, config);
	if (config->role == VF_QUEUE_HIPRIO)
		main = vf_hiprio_queue_main;
	if (!error && config->role == VF_QUEUE_NOTIFICATION) {
		main = vf_notify_queue_main;
		error = vf_notifier_attach(q);
	}
	if (!error)
		error = -pthread_create(&q->thread, NULL, main, q);
	if (error) {
		vf_notifier_detach(q);
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
	vf_signal_fd(q->wake_fd);
	pthread_join(q->thread, NULL);
	vf_notifier_detach(q);
	vf_lock_waiters_cancel(device->share, q);
	if (device->share->events)
		vf_parked_send_back(device->share->events->parked, q);
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
	int error = keep_vf_signal_fd(fd, &kept);

	if (error)
		return error;
	pthread_mutex_lock(&q->lock);
	old = *held;
	*held = kept;
	/* What was completed while there was no descriptor must not stay unheard. */
	if (held == &q->call_fd && kept >= 0)
		vf_signal_fd(kept);
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
