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

static int grow_iov(struct iovec **array, uint32_t *room)
{
	uint32_t want = *room ? *room * 2 : 16;
	struct iovec *bigger = realloc(*array, want * sizeof(**array));

	if (!bigger)
		return -ENOMEM;
	*array = bigger;
	*room = want;
	return 0;
}

/* A chain on its way into a request. */
struct chain {
	const struct vf_mem *mem;
	struct vf_mem_window window; /* of mem */
	const char **why;
};

/* The request's buffers of one direction */
struct side {
	struct iovec *v;
	uint32_t n, room, size;
};

/* Adds a piece of memory, joined to the one before it where it follows. */
static inline int add_piece(struct side *side, uint8_t *p, uint64_t len)
{
	struct iovec *next = side->v + side->n;

	if (side->n && (uint8_t *)next[-1].iov_base + next[-1].iov_len == p) {
		next[-1].iov_len += len;
		return 0;
	}
	if (side->n == side->room) {
		if (grow_iov(&side->v, &side->room))
			return -ENOMEM;
		next = side->v + side->n;
	}
	next->iov_base = p;
	next->iov_len = len;
	side->n++;
	return 0;
}

/* A buffer that is not as a whole in the window: moves the window, and cuts it where regions end.
 */
static __attribute__((noinline)) int add_across(struct chain *c, struct side *side, uint64_t addr,
						uint64_t len)
{
	while (len) {
		uint64_t here;
		uint8_t *p = vf_mem_in(c->mem, &c->window, addr, &here);

		if (!p) {
			*c->why = "a descriptor points outside guest memory";
			return -EFAULT;
		}
		if (here > len)
			here = len;
		if (add_piece(side, p, here)) {
			*c->why = "out of memory";
			return -ENOMEM;
		}
		addr += here;
		len -= here;
	}
	return 0;
}

/* Adds one descriptor's buffer. */
static inline int add_buffer(struct chain *c, struct side *side, uint64_t addr, uint32_t len)
{
	uint64_t offset = addr - c->window.guest_addr;

	if (side->size + (uint64_t)len > INT32_MAX) {
		*c->why = "a chain of more than 2 GiB";
		return -EINVAL;
	}
	side->size += len;
	if (len && offset < c->window.size && len <= c->window.size - offset &&
	    side->n < side->room)
		return add_piece(side, c->window.host + offset, len);
	return add_across(c, side, addr, len);
}

struct desc_copy {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

static inline struct desc_copy read_desc(const volatile struct vring_desc *d)
{
	return (struct desc_copy){d->addr, d->len, d->flags, d->next};
}

/* The table that an indirect descriptor points to and its number of entries; NULL: *c->why. */
static const volatile struct vring_desc *indirect_table(struct chain *c, const struct desc_copy *d,
							uint32_t *n)
{
	const volatile struct vring_desc *table;
	uint64_t room;

	if (!d->len || d->len % sizeof(*table) || d->len / sizeof(*table) > 32768) {
		*c->why = "an indirect table of an impossible length";
		return NULL;
	}
	/* Linux's tables are aligned; an unaligned one is read bytewise by x86 and arm64 alike. */
	table = vf_mem_in(c->mem, &c->window, d->addr, &room);
	if (!table || room < d->len) {
		*c->why = "an indirect table outside guest memory";
		return NULL;
	}
	*n = d->len / (uint32_t)sizeof(*table);
	return table;
}

/* Follows a chain in the ring's table from entry i, into an indirect one where it says so. */
static int walk(const struct vf_ring *ring, struct chain *c, uint32_t i, struct side *in,
		struct side *out)
{
	const volatile struct vring_desc *table = ring->desc;
	uint32_t n = ring->size, count = 0;
	bool indirect = ring->indirect; /* may there be such a descriptor (still)? */

	for (;;) {
		struct desc_copy d;
		int error;

		if (i >= n) {
			*c->why = "a descriptor index is outside its table";
			return -EINVAL;
		}
		if (count >= n || count >= VF_MAX_CHAIN) {
			*c->why = "a descriptor chain loops or is too long";
			return -ELOOP;
		}
		count++;
		d = read_desc(&table[i]);
		if (d.flags & VRING_DESC_F_INDIRECT) {
			if (!indirect || (d.flags & VRING_DESC_F_NEXT)) {
				*c->why = "an indirect descriptor where none is allowed";
				return -EINVAL;
			}
			indirect = false;
			table = indirect_table(c, &d, &n);
			if (!table)
				return -EINVAL;
			i = count = 0;
			continue;
		}
		if (!(d.flags & VRING_DESC_F_WRITE) && out->n) {
			*c->why = "a readable descriptor behind a writable one";
			return -EINVAL;
		}
		error = add_buffer(c, d.flags & VRING_DESC_F_WRITE ? out : in, d.addr, d.len);
		if (error || !(d.flags & VRING_DESC_F_NEXT))
			return error;
		i = d.next;
	}
}

/* Its arrays may have moved, whatever came of it. */
static int take_chain(const struct vf_ring *ring, const struct vf_mem *mem, struct vf_req *r,
		      const char **why)
{
	struct chain c = {.mem = mem, .why = why};
	struct side in = {.v = r->in, .room = r->in_room};
	struct side out = {.v = r->out, .room = r->out_room};
	int error = walk(ring, &c, r->head, &in, &out);

	r->in = in.v;
	r->n_in = in.n;
	r->in_room = in.room;
	r->in_size = in.size;
	r->out = out.v;
	r->n_out = out.n;
	r->out_room = out.room;
	r->out_size = out.size;
	return error;
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
	error = take_chain(ring, mem, r, why);
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
