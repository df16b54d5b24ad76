/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A server that lies to its guest's driver: linked into the C core by VHOSTFS_HOSTILE=1
 * (native/build.py) for `scripts/debug-kernel check --hostile`, and into nothing else.
 *
 * The linker's --wrap puts the functions below between the core's files.  What they spoil is what a
 * hostile device could: elements and how long they are said to be, elements that nothing
 * happened for, answers to FUSE_FSNOTIFY_INIT and FUSE_FSNOTIFY_WATCH.  The share itself
 * is served honestly, so that what goes wrong in the guest comes from these.
 * VHOSTFS_HOSTILE_SEED: of the choices.
 */
#include <stdlib.h>

#include "../events.h"
#include "../request.h"
#include "../ring.h"

#define FSNOTIFY_INIT 0x5800
#define N_KNOWN 64

struct message {
	struct fuse_out_header header;
	struct vf_fsnotify_out element;
	char name[VF_NAME_MAX + 1];
	uint32_t n_name; /* bytes of name that are there, whatever the element says */
	uint32_t used;	 /* what the used ring says was written */
};

/* Between the outbox and a sink of it. */
struct liar {
	struct vf_sink sink;
	struct vf_sink *honest;
};
static struct liar queue_liar, parked_liar;

/* What was sent before, unspoilt; under the outbox's lock. */
static struct message known[N_KNOWN];
static uint32_t n_known;

/* What this thread puts into the ring instead of what it believes to put there. */
static _Thread_local const struct message *in_its_place;

/* ---- choices -------------------------------------------------------------------- */

static uint64_t choice(void)
{
	static atomic_uint_fast64_t state;
	uint64_t x = atomic_fetch_add(&state, 0x9e3779b97f4a7c15u);
	const char *seed;

	if (!x) {
		seed = getenv("VHOSTFS_HOSTILE_SEED");
		x = seed ? strtoull(seed, NULL, 0) : 1;
		atomic_fetch_add(&state, x);
	}
	/* splitmix64 */
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static uint32_t below(uint32_t n)
{
	return (uint32_t)(choice() >> 32) % n;
}

static bool one_in(uint32_t n)
{
	return !below(n);
}

/* ---- elements --------------------------------------------------------------------- */

static uint64_t one_event(void)
{
	return 1ull << below(15) | (one_in(3) ? VF_FS_ISDIR : 0);
}

static const struct message *some_known(void)
{
	return &known[below(n_known < N_KNOWN ? n_known : N_KNOWN)];
}

static void name_no_child(struct vf_fsnotify_out *e)
{
	e->child_nodeid = 0;
	e->child_generation = 0;
}

/* One thing is another than it was. */
static void spoil(struct message *m)
{
	const struct message *other = some_known();
	struct vf_fsnotify_out *e = &m->element;

	switch (below(18)) {
	case 0:
		e->nodeid = other->element.nodeid;
		e->generation = other->element.generation;
		break;
	case 1:
		e->nodeid = other->element.child_nodeid;
		e->generation = other->element.child_generation;
		break;
	case 2:
		e->child_nodeid = other->element.child_nodeid;
		e->child_generation = other->element.child_generation;
		break;
	case 3: /* a directory as its own or another's child */
		e->child_nodeid = other->element.nodeid;
		e->child_generation = other->element.generation;
		break;
	case 4:
		e->nodeid = 1;
		e->generation = below(2);
		break;
	case 5:
		e->child_nodeid = 1;
		e->child_generation = below(2);
		break;
	case 6:
		name_no_child(e);
		break;
	case 7:
		e->mask = one_event();
		break;
	case 8:
		e->mask = one_event() | one_event();
		break;
	case 9: /* a well-formed event on an object itself, the root too */
		e->mask = one_event();
		e->cookie = e->flags = e->namelen = m->n_name = 0;
		name_no_child(e);
		break;
	case 10:
		e->mask =
		    one_in(2) ? VF_FS_DELETE_SELF : VF_FS_DELETE | (one_in(2) ? VF_FS_ISDIR : 0);
		e->cookie = e->flags = 0;
		if (e->mask == VF_FS_DELETE_SELF) {
			e->namelen = m->n_name = 0;
			name_no_child(e);
		}
		break;
	case 11: /* halves that meet others, too many, or none */
		e->mask = one_in(2) ? VF_FS_MOVED_FROM : VF_FS_MOVED_TO;
		e->flags = VF_FSNOTIFY_SPLIT_RENAME;
		e->cookie = 1 + below(one_in(4) ? 100000 : 5);
		break;
	case 12:
		e->namelen = one_in(3) ? (uint32_t)choice() : below(300);
		m->n_name = e->namelen < VF_NAME_MAX ? e->namelen : VF_NAME_MAX;
		m->header.len = (uint32_t)(sizeof(m->header) + sizeof(*e)) + e->namelen;
		return;
	case 13:
		memcpy(m->name, other->name, sizeof(m->name));
		e->namelen = m->n_name = other->n_name;
		break;
	case 14:
		m->name[below(VF_NAME_MAX)] = "/\0.\xff"[below(4)];
		break;
	case 15:
		((uint8_t *)e)[below(sizeof(*e))] ^= (uint8_t)(1u << below(8));
		break;
	case 16:
		if (one_in(20)) {
			*e = (struct vf_fsnotify_out){.mask = VF_FS_Q_OVERFLOW};
			m->n_name = 0;
		}
		break;
	case 17:
		((uint8_t *)&m->header)[below(sizeof(m->header))] ^= (uint8_t)(1u << below(8));
		return;
	}
	m->header.len = (uint32_t)(sizeof(m->header) + sizeof(*e)) + m->n_name;
}

static bool send(struct vf_sink *honest_sink, struct message m)
{
	struct vf_fsnotify_out honest = m.element;
	uint32_t i;
	bool sent;

	for (i = one_in(2) ? 1 + below(3) : 0; i; i--)
		spoil(&m);
	honest.namelen = m.n_name;
	m.used = (uint32_t)(sizeof(m.header) + sizeof(m.element)) + m.n_name;
	if (one_in(30))
		m.used = one_in(2) ? below(m.used) : (uint32_t)choice();
	in_its_place = &m;
	sent = honest_sink->put(honest_sink, &honest, m.name);
	in_its_place = NULL;
	return sent;
}

/* Something happened: that or a lie is told, now and then with much that never was. */
static bool put(struct vf_sink *sink, const struct vf_fsnotify_out *element, const char *name)
{
	struct vf_sink *honest = vf_container_of(sink, struct liar, sink)->honest;
	struct message m = {.element = *element, .n_name = element->namelen};
	uint32_t more = one_in(6) ? below(5) : one_in(300) ? 300 : 0;

	m.header.error = VF_FUSE_NOTIFY_FSNOTIFY;
	m.header.len = (uint32_t)(sizeof(m.header) + sizeof(m.element)) + m.n_name;
	memset(m.name, 'a', sizeof(m.name));
	memcpy(m.name, name, m.n_name);
	known[n_known++ % N_KNOWN] = m;
	if (!send(honest, m))
		return false;
	while (more-- && send(honest, *some_known()))
		;
	return true;
}

static void done(struct vf_sink *sink)
{
	struct vf_sink *honest = vf_container_of(sink, struct liar, sink)->honest;

	honest->done(honest);
}

static uint32_t buffers(struct vf_sink *sink)
{
	struct vf_sink *honest = vf_container_of(sink, struct liar, sink)->honest;

	return honest->buffers(honest);
}

static struct vf_sink *replace(struct liar *liar, struct vf_sink *honest)
{
	*liar = (struct liar){{put, done, buffers}, honest};
	return &liar->sink;
}

/* ---- between the core's files -------------------------------------------------------- */

int __real_vf_outbox_attach(struct vf_outbox *outbox, struct vf_sink *sink);
int __wrap_vf_outbox_attach(struct vf_outbox *outbox, struct vf_sink *sink)
{
	int error;

	if (queue_liar.honest)
		return -EBUSY;
	error = __real_vf_outbox_attach(outbox, replace(&queue_liar, sink));
	if (error)
		queue_liar.honest = NULL;
	return error;
}

void __real_vf_outbox_detach(struct vf_outbox *outbox, struct vf_sink *sink);
void __wrap_vf_outbox_detach(struct vf_outbox *outbox, struct vf_sink *sink)
{
	if (sink != queue_liar.honest)
		return;
	__real_vf_outbox_detach(outbox, &queue_liar.sink);
	queue_liar.honest = NULL;
}

/* There is one for the share's whole life. */
void __real_vf_outbox_use(struct vf_outbox *outbox, struct vf_sink *sink);
void __wrap_vf_outbox_use(struct vf_outbox *outbox, struct vf_sink *sink)
{
	if (sink && parked_liar.honest != sink)
		replace(&parked_liar, sink);
	__real_vf_outbox_use(outbox, sink ? &parked_liar.sink : NULL);
}

/* A parked request is answered. */
void __real_vf_req_complete(struct vf_req *r, int error, const void *payload, uint32_t size);
void __wrap_vf_req_complete(struct vf_req *r, int error, const void *payload, uint32_t size)
{
	const struct message *m = in_its_place;
	uint8_t spoilt[sizeof(m->element) + VF_NAME_MAX];

	if (!m) {
		__real_vf_req_complete(r, error, payload, size);
		return;
	}
	/* Else with that header, too. */
	if (!one_in(40))
		in_its_place = NULL;
	memcpy(spoilt, &m->element, sizeof(m->element));
	memcpy(spoilt + sizeof(m->element), m->name, m->n_name);
	size = (uint32_t)sizeof(m->element) + m->n_name;
	if (one_in(50))
		size = below(size);
	__real_vf_req_complete(r, one_in(50) ? -(int)below(512) : 0, spoilt, size);
}

void __real_vf_req_scatter(struct vf_req *r, uint32_t offset, const void *from, uint32_t n);
void __wrap_vf_req_scatter(struct vf_req *r, uint32_t offset, const void *from, uint32_t n)
{
	if (in_its_place && !offset)
		from = &in_its_place->header;
	else if (in_its_place && offset == sizeof(in_its_place->header))
		from = &in_its_place->element;
	__real_vf_req_scatter(r, offset, from, n);
}

void __real_vf_ring_put(struct vf_ring *ring, uint16_t head, uint32_t size);
void __wrap_vf_ring_put(struct vf_ring *ring, uint16_t head, uint32_t size)
{
	__real_vf_ring_put(ring, head, in_its_place ? in_its_place->used : size);
}

int32_t __real_vf_op_fsnotify_watch(struct vf_thread *t, struct vf_req *r);
int32_t __wrap_vf_op_fsnotify_watch(struct vf_thread *t, struct vf_req *r)
{
	static const int32_t errors[] = {-ENOSPC, -ESTALE, -ENOMEM, -EIO, -ENOSYS, -EINVAL, -511};
	int32_t error = errors[below(sizeof(errors) / sizeof(errors[0]))];

	if (!one_in(20))
		return __real_vf_op_fsnotify_watch(t, r);
	if (one_in(2))
		__real_vf_op_fsnotify_watch(t, r);
	return error;
}

int __real_vf_upcall_reply(vf_upcall *upcall, int error, const void *payload, uint32_t size);
int __wrap_vf_upcall_reply(vf_upcall *upcall, int error, const void *payload, uint32_t size)
{
	static atomic_bool asked;
	static const int errors[] = {-ENOMEM, -EIO, -ENOSYS, -EOPNOTSUPP, -EPROTO};
	uint8_t spoilt[128];

	/* The first session has events for certain. */
	if (((struct vf_req *)upcall)->header.opcode != FSNOTIFY_INIT || error ||
	    size > sizeof(spoilt) || !atomic_exchange(&asked, true) || !one_in(6))
		return __real_vf_upcall_reply(upcall, error, payload, size);
	memcpy(spoilt, payload, size);
	switch (below(3)) {
	case 0:
		return __real_vf_upcall_reply(upcall, errors[below(5)], NULL, 0);
	case 1:
		return __real_vf_upcall_reply(upcall, 0, spoilt, below(size));
	default:
		spoilt[below(size)] ^= (uint8_t)(1u << below(8));
		return __real_vf_upcall_reply(upcall, 0, spoilt, size);
	}
}
