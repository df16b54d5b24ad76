/* SPDX-License-Identifier: Apache-2.0 */
/* Faults of the guest and the front end, until they have been read. */
#include <stdarg.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "fault.h"

int vf_faults_init(struct vf_faults *faults)
{
	faults->n = 0;
	faults->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (faults->event_fd < 0)
		return -errno;
	pthread_mutex_init(&faults->lock, NULL);
	return 0;
}

void vf_faults_destroy(struct vf_faults *faults)
{
	close(faults->event_fd);
	pthread_mutex_destroy(&faults->lock);
}

void vf_faults_add(struct vf_faults *faults, int32_t queue, const char *format, ...)
{
	uint64_t one = 1;
	va_list args;

	pthread_mutex_lock(&faults->lock);
	/* The first ones tell most; a flood is cut off until they have been read. */
	if (faults->n < VF_MAX_FAULTS) {
		struct vf_fault *f = &faults->list[faults->n++];

		f->queue = queue;
		va_start(args, format);
		vsnprintf(f->text, sizeof(f->text), format, args);
		va_end(args);
	}
	pthread_mutex_unlock(&faults->lock);
	if (write(faults->event_fd, &one, sizeof(one)) < 0) {
		/* Full: it is readable, which is all that is wanted. */
	}
}

int vf_faults_next(struct vf_faults *faults, struct vf_fault *out)
{
	uint64_t count;
	int found = 0;

	pthread_mutex_lock(&faults->lock);
	if (faults->n) {
		*out = faults->list[0];
		memmove(faults->list, faults->list + 1, --faults->n * sizeof(faults->list[0]));
		found = 1;
	} else if (read(faults->event_fd, &count, sizeof(count)) < 0) {
		/* Nothing was pending. */
	}
	pthread_mutex_unlock(&faults->lock);
	return found;
}
