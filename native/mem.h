/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest memory: the regions that the front end shares, mapped here.
 *
 * A map is immutable and reference-counted: a change makes a new one, and a
 * request keeps the one that its addresses were translated with.
 */
#ifndef VHOSTFS_MEM_H
#define VHOSTFS_MEM_H

#include "core.h"

/* vhost-user lets a back end choose (GET_MAX_MEM_SLOTS); KVM's own limit is of this size. */
#define VF_MAX_REGIONS 512u

struct vf_mem;

/* A map of n regions besides those of `base` (which may be NULL).  NULL: *error. */
struct vf_mem *vf_mem_extend(struct vf_mem *base, const struct vf_region *regions, const int *fds,
			     uint32_t n, int *error);
/* A map without this region; NULL: *error (-ENOENT). */
struct vf_mem *vf_mem_without(struct vf_mem *base, const struct vf_region *region, int *error);
struct vf_mem *vf_mem_get(struct vf_mem *mem);
void vf_mem_put(struct vf_mem *mem);

/*
 * A region that addresses were found in: most of a chain's lie in the same one, so whoever looks
 * up many keeps this.  {0} at first; of one map only.
 */
struct vf_mem_window {
	uint64_t guest_addr, size;
	uint8_t *host; /* of guest_addr */
};
/* Moves the window to the region of an address.  False: no such memory. */
bool vf_mem_find(const struct vf_mem *mem, uint64_t guest_addr, struct vf_mem_window *window);
/*
 * The memory at a guest address; *room: bytes from there to the end of its region.  NULL: no such
 * memory.
 */
static inline void *vf_mem_in(const struct vf_mem *mem, struct vf_mem_window *window,
			      uint64_t guest_addr, uint64_t *room)
{
	uint64_t offset = guest_addr - window->guest_addr;

	if (offset >= window->size) {
		if (!vf_mem_find(mem, guest_addr, window))
			return NULL;
		offset = guest_addr - window->guest_addr;
	}
	*room = window->size - offset;
	return window->host + offset;
}
/* The same by the front end's user address, for ring addresses; size bytes must be there. */
void *vf_mem_at_user(const struct vf_mem *mem, uint64_t user_addr, uint64_t size);

/*
 * A front end may shrink the file behind guest memory while it is mapped.
 * Touching what is gone raises SIGBUS: pages of zeros are put there instead.
 * Installed once for the process.
 */
int vf_mem_catch_sigbus(void);

#endif
