/* SPDX-License-Identifier: Apache-2.0 */
/* Split virtqueue, device side; see ring.h. */
#include "mem.h"
#include "ring.h"

static uint16_t load_acquire(const volatile uint16_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static volatile uint16_t *used_event(const struct vf_ring *ring)
{
	return &ring->avail->ring[ring->size];
}

static volatile uint16_t *avail_event(const struct vf_ring *ring)
{
	return (volatile uint16_t *)&ring->used->ring[ring->size];
}

int vf_ring_init(struct vf_ring *ring, const struct vf_mem *mem,
		 const struct vf_queue_config *config)
{
	uint64_t n = config->size;

	if (!n || n > 32768 || (n & (n - 1)) || config->base > UINT16_MAX)
		return -EINVAL;
	/* Alignments of section 2.7: 16, 2, 4. */
	if (config->desc_addr % 16 || config->avail_addr % 2 || config->used_addr % 4)
		return -EINVAL;
	memset(ring, 0, sizeof(*ring));
	ring->size = config->size;
	ring->event_idx = config->event_idx;
	ring->indirect = config->indirect;
	ring->desc = vf_mem_at_user(mem, config->desc_addr, 16 * n);
	ring->avail = vf_mem_at_user(mem, config->avail_addr, 6 + 2 * n);
	ring->used = vf_mem_at_user(mem, config->used_addr, 6 + 8 * n);
	if (!ring->desc || !ring->avail || !ring->used)
		return -EFAULT;
	/* The mapping's own offset in its file may spoil what the guest aligned. */
	if ((uintptr_t)ring->desc % 16 || (uintptr_t)ring->avail % 2 || (uintptr_t)ring->used % 4)
		return -EINVAL;
	ring->next_avail = (uint16_t)config->base;
	ring->used_idx = load_acquire(&ring->used->idx);
	return 0;
}

static int grow_iov(struct iovec **array, uint32_t *room, uint32_t n)
{
	uint32_t want = *room ? *room * 2 : 16;
	struct iovec *bigger;

	if (n < *room)
		return 0;
	bigger = realloc(*array, want * sizeof(**array));
	if (!bigger)
		return -ENOMEM;
	*array = bigger;
	*room = want;
	return 0;
}

/* Adds one descriptor's buffer, in pieces where it crosses regions, joined to its neighbour where
 * it can be. */
static int add_buffer(const struct vf_mem *mem, struct vf_req *r, uint64_t addr, uint32_t len,
		      bool writable, const char **why)
{
	struct iovec **array = writable ? &r->out : &r->in;
	uint32_t *n = writable ? &r->n_out : &r->n_in;
	uint32_t *room = writable ? &r->out_room : &r->in_room;
	uint32_t *total = writable ? &r->out_size : &r->in_size;

	if (*total + (uint64_t)len > INT32_MAX) {
		*why = "a chain of more than 2 GiB";
		return -EINVAL;
	}
	*total += len;
	while (len) {
		uint64_t here;
		void *p = vf_mem_at(mem, addr, &here);

		if (!p) {
			*why = "a descriptor points outside guest memory";
			return -EFAULT;
		}
		if (here > len)
			here = len;
		if (*n && (uint8_t *)(*array)[*n - 1].iov_base + (*array)[*n - 1].iov_len == p) {
			(*array)[*n - 1].iov_len += here;
		} else {
			if (grow_iov(array, room, *n)) {
				*why = "out of memory";
				return -ENOMEM;
			}
			(*array)[*n].iov_base = p;
			(*array)[(*n)++].iov_len = here;
		}
		addr += here;
		len -= (uint32_t)here;
	}
	return 0;
}

struct desc_copy {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

static struct desc_copy read_desc(const volatile struct vring_desc *d)
{
	return (struct desc_copy){d->addr, d->len, d->flags, d->next};
}

/* Follows a chain in a table of n descriptors from entry i. */
static int walk(struct vf_ring *ring, const struct vf_mem *mem, struct vf_req *r,
		const volatile struct vring_desc *table, uint32_t n, uint32_t i, bool in_indirect,
		const char **why)
{
	uint32_t limit = n < VF_MAX_CHAIN ? n : VF_MAX_CHAIN;

	for (uint32_t count = 0;; count++) {
		if (i >= n) {
			*why = "a descriptor index is outside its table";
			return -EINVAL;
		}
		if (count >= limit) {
			*why = "a descriptor chain loops or is too long";
			return -ELOOP;
		}
		struct desc_copy d = read_desc(&table[i]);

		if (d.flags & VRING_DESC_F_INDIRECT) {
			uint64_t room;
			const volatile struct vring_desc *sub;

			if (!ring->indirect || in_indirect || (d.flags & VRING_DESC_F_NEXT)) {
				*why = "an indirect descriptor where none is allowed";
				return -EINVAL;
			}
			if (!d.len || d.len % sizeof(struct vring_desc) ||
			    d.len / sizeof(struct vring_desc) > 32768) {
				*why = "an indirect table of an impossible length";
				return -EINVAL;
			}
			sub = vf_mem_at(mem, d.addr, &room);
			if (!sub || room < d.len) {
				*why = "an indirect table outside guest memory";
				return -EFAULT;
			}
			/* Linux's tables are aligned; an unaligned one is read bytewise by x86 and
			 * arm64 alike. */
			return walk(ring, mem, r, sub, d.len / (uint32_t)sizeof(struct vring_desc),
				    0, true, why);
		}
		bool writable = d.flags & VRING_DESC_F_WRITE;

		if (!writable && r->n_out) {
			*why = "a readable descriptor behind a writable one";
			return -EINVAL;
		}
		int error = add_buffer(mem, r, d.addr, d.len, writable, why);

		if (error)
			return error;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return 0;
		i = d.next;
	}
}

bool vf_ring_has_work(const struct vf_ring *ring)
{
	return load_acquire(&ring->avail->idx) != ring->next_avail;
}

uint32_t vf_ring_n_available(const struct vf_ring *ring)
{
	uint16_t n = (uint16_t)(load_acquire(&ring->avail->idx) - ring->next_avail);

	return n > ring->size ? 0 : n;
}

int vf_ring_take(struct vf_ring *ring, const struct vf_mem *mem, struct vf_req *r, const char **why)
{
	uint16_t available = (uint16_t)(load_acquire(&ring->avail->idx) - ring->next_avail);
	int error;

	if (!available)
		return 0;
	if (available > ring->size) {
		*why = "the available index ran ahead of the ring";
		return -EINVAL;
	}
	r->head = ring->avail->ring[ring->next_avail & (ring->size - 1)];
	r->n_in = r->n_out = r->in_size = r->out_size = 0;
	error = walk(ring, mem, r, ring->desc, ring->size, r->head, false, why);
	if (error)
		return error;
	ring->next_avail++;
	return 1;
}

bool vf_ring_enable_kicks(struct vf_ring *ring)
{
	if (ring->event_idx)
		*avail_event(ring) = ring->next_avail;
	else
		ring->used->flags = 0;
	/* The store must be seen before the index is read again, or a kick is lost. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return vf_ring_has_work(ring);
}

void vf_ring_disable_kicks(struct vf_ring *ring)
{
	/* With EVENT_IDX an avail_event that lies behind asks for nothing. */
	if (!ring->event_idx)
		ring->used->flags = VRING_USED_F_NO_NOTIFY;
}

void vf_ring_put(struct vf_ring *ring, uint16_t head, uint32_t size)
{
	volatile struct vring_used_elem *e = &ring->used->ring[ring->used_idx & (ring->size - 1)];

	e->id = head;
	e->len = size;
	__atomic_store_n(&ring->used->idx, ++ring->used_idx, __ATOMIC_RELEASE);
}

bool vf_ring_needs_call(struct vf_ring *ring)
{
	uint16_t before = ring->signalled;
	bool valid = ring->signalled_valid;

	if (valid && before == ring->used_idx)
		return false;
	ring->signalled = ring->used_idx;
	ring->signalled_valid = true;
	/* The used index must be seen before the driver's wish is read. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!ring->event_idx)
		return !(ring->avail->flags & VRING_AVAIL_F_NO_INTERRUPT);
	if (!valid)
		return true;
	return vring_need_event(*used_event(ring), ring->used_idx, before);
}
