/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device's side of a split virtqueue.  Virtio 1.2, section 2.7.
 *
 * Knows descriptors and indices, not FUSE.  Everything in the ring can change
 * under our eyes: each field is read once and checked before use.
 */
#ifndef VHOSTFS_RING_H
#define VHOSTFS_RING_H

#include <linux/virtio_ring.h>

#include "core.h"

/* Descriptors in one chain, after which it is refused: four times what a 1 MiB request of pages
 * needs. */
#define VF_MAX_CHAIN 1024u

struct vf_ring {
	uint32_t size;
	volatile struct vring_desc *desc;
	volatile struct vring_avail *avail;
	volatile struct vring_used *used;
	uint16_t next_avail;
	uint16_t used_idx;
	uint16_t signalled; /* used index at the last decision to interrupt */
	bool signalled_valid;
	bool event_idx;
	bool indirect;
};

/* Takes over the ring at these addresses; -EFAULT, -EINVAL. */
int vf_ring_init(struct vf_ring *ring, const struct vf_mem *mem,
		 const struct vf_queue_config *config);

/*
 * Takes the next available chain into r (head, in[], out[], sizes; r's arrays grow as needed).
 * 1: taken, 0: none available, negative: the ring is broken and *why says how.
 */
int vf_ring_take(struct vf_ring *ring, const struct vf_mem *mem, struct vf_req *r,
		 const char **why);
/* True when a chain is available. */
bool vf_ring_has_work(const struct vf_ring *ring);
/* How many are; 0 when the driver's index makes no sense. */
uint32_t vf_ring_n_available(const struct vf_ring *ring);
/* Asks the driver to kick from now on; true: something is available already, so do not sleep. */
bool vf_ring_enable_kicks(struct vf_ring *ring);
void vf_ring_disable_kicks(struct vf_ring *ring);

/* Returns a chain with size bytes written; visible to the driver at once. */
void vf_ring_put(struct vf_ring *ring, uint16_t head, uint32_t size);
/* Whether what was put since the last such question needs an interrupt. */
bool vf_ring_needs_call(struct vf_ring *ring);

#endif
