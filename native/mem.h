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
 * The memory at a guest address; *room: bytes from there to the end of its
 * region.  NULL: no such memory.
 */
void *vf_mem_at(const struct vf_mem *mem, uint64_t guest_addr, uint64_t *room);
/* The same by the front end's user address, for ring addresses; size bytes must be there. */
void *vf_mem_at_user(const struct vf_mem *mem, uint64_t user_addr, uint64_t size);

/*
 * A front end may shrink the file behind guest memory while it is mapped.
 * Touching what is gone raises SIGBUS: pages of zeros are put there instead.
 * Installed once for the process.
 */
int vf_mem_catch_sigbus(void);

#endif
