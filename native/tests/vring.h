/* SPDX-License-Identifier: Apache-2.0 */
/* The driver's side of a split virtqueue, for tests that play the guest. */
#ifndef VHOSTFS_TESTS_VRING_H
#define VHOSTFS_TESTS_VRING_H

#include <stdbool.h>

#include "../ring.h"

/*
 * Makes available what was put into the ring behind index old, up to avail; true: the device wants
 * a kick for it.
 */
static inline bool vring_publish(struct vring *ring, bool event_idx, uint16_t old, uint16_t avail)
{
	__atomic_store_n(&ring->avail->idx, avail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (event_idx)
		return vring_need_event(*(volatile uint16_t *)&vring_avail_event(ring), avail, old);
	return !(*(volatile uint16_t *)&ring->used->flags & VRING_USED_F_NO_NOTIFY);
}

#endif
