/* SPDX-License-Identifier: Apache-2.0 */
/* A bounded list of faults and the descriptor that announces them.  Its lock is taken last. */
#ifndef VHOSTFS_FAULT_H
#define VHOSTFS_FAULT_H

#include "core.h"

#define VF_MAX_FAULTS 16u

struct vf_faults {
	pthread_mutex_t lock;
	int event_fd;
	uint32_t n;
	struct vf_fault list[VF_MAX_FAULTS];
};

int vf_faults_init(struct vf_faults *faults);
void vf_faults_destroy(struct vf_faults *faults);
/* queue: -1 when it is not tied to one. */
void vf_faults_add(struct vf_faults *faults, int32_t queue, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int vf_faults_next(struct vf_faults *faults, struct vf_fault *out);

#endif
