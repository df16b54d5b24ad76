// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: how elements travel: the notification queue, or parked requests
 *
 * Owns buffers and parked requests, and copies what comes in them; knows
 * nothing of what it means. docs/protocol.md of vhostfs, 3 and 4.4.
 */

#include <linux/module.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include "vhostfs_internal.h"

static unsigned int queue_buffers = VHOSTFS_MAX_BUFFERS;
module_param(queue_buffers, uint, 0444);
MODULE_PARM_DESC(queue_buffers,
		 "Most buffers to keep in a notification queue (1 to 256)");

/* ---- queue 1 -------------------------------------------------------------------- */

/* Under vq_lock. A queue that takes no buffer is broken; it stays as it is. */
void vhostfs_give_buffer(struct vhostfs_notify *n, void *buf)
{
	struct scatterlist sg;

	sg_init_one(&sg, buf, n->buf_size);
	virtqueue_add_inbuf(n->vq, &sg, 1, buf, GFP_ATOMIC);
}

static struct vhostfs_copy *vhostfs_copied(struct vhostfs_notify *n,
					   unsigned int number)
{
	return &n->copied[number % VHOSTFS_BATCH];
}

static bool vhostfs_has_room(struct vhostfs_notify *n)
{
	return n->ntaken - smp_load_acquire(&n->nacted) < VHOSTFS_BATCH;
}

/* What was copied is the acting worker's from now on */
static void vhostfs_add_copied(struct vhostfs_notify *n)
{
	smp_store_release(&n->ntaken, n->ntaken + 1);
}

/*
 * Copies what came, as there is room, and returns the buffers before anything is
 * done about it: acting takes time, and few buffers may be all there are.
 * Nothing is read from a buffer that the device may write to. False: there was
 * no room for all, and no interrupt comes.
 */
static bool vhostfs_take_buffers(struct vhostfs_notify *n)
{
	unsigned int before = n->ntaken, len;
	bool kick = false, room = true;
	struct vhostfs_copy *copy;
	void *buf;

	spin_lock(&n->vq_lock);
	if (!n->running || !n->has_queue)
		goto out;
	virtqueue_disable_cb(n->vq);
	do {
		/* A batch at most, however fast room is made and filled */
		while ((room = vhostfs_has_room(n) &&
			       n->ntaken - before < VHOSTFS_BATCH)) {
			buf = virtqueue_get_buf(n->vq, &len);
			if (!buf)
				break;
			copy = vhostfs_copied(n, n->ntaken);
			copy->len = min_t(unsigned int, len,
					  VHOSTFS_ELEMENT_SIZE);
			memcpy(copy->data, buf, copy->len);
			vhostfs_add_copied(n);
			vhostfs_give_buffer(n, buf);
		}
	} while (room && !virtqueue_enable_cb(n->vq) &&
		 !virtqueue_is_broken(n->vq));
	if (n->ntaken != before)
		kick = virtqueue_kick_prepare(n->vq);
	/* Under the lock, so that the queue cannot go meanwhile */
	if (kick)
		virtqueue_notify(n->vq);
out:
	spin_unlock(&n->vq_lock);
	return room;
}

/* Buffers for queue 1. Without memory it has fewer */
void vhostfs_alloc_buffers(struct vhostfs_notify *n,
			   struct virtqueue *vq)
{
	unsigned int count;

	count = clamp_t(unsigned int, queue_buffers, 1, VHOSTFS_MAX_BUFFERS);
	count = min(count, virtqueue_get_vring_size(vq));
	n->bufs = kcalloc(count, sizeof(*n->bufs), GFP_KERNEL);
	while (n->bufs && n->nbufs < count) {
		n->bufs[n->nbufs] = kzalloc(n->buf_size, GFP_KERNEL);
		if (!n->bufs[n->nbufs])
			break;
		n->nbufs++;
	}
}

/* ---- parked requests ------------------------------------------------------------- */

/* Under vq_lock: parks what may be; what finds no place in the ring tries again */
static void vhostfs_post(struct vhostfs_notify *n)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };
	struct vhostfs_parked *parked;
	bool posted = false;

	while (n->nposted < n->max_parked && !list_empty(&n->unposted)) {
		parked = list_first_entry(&n->unposted, struct vhostfs_parked,
					  list);
		parked->unique = VHOSTFS_PARK_UNIQUE | n->next_unique;
		n->next_unique += 2;	/* an odd one is an interrupt's */
		memset(&parked->in, 0, sizeof(parked->in));
		parked->in.len = sizeof(parked->in);
		parked->in.opcode = FUSE_FSNOTIFY_PARK;
		parked->in.unique = parked->unique;
		parked->in.nodeid = FUSE_ROOT_ID;
		sg_init_one(&out, &parked->in, sizeof(parked->in));
		sg_init_one(&in, parked->out, sizeof(parked->out));
		/* Its answer may be there before this returns */
		list_del_init(&parked->list);
		if (vhostfs_notify_post(n->vdev, sgs, parked)) {
			list_add(&parked->list, &n->unposted);
			queue_delayed_work(vhostfs_wq, &n->park_work,
					   VHOSTFS_PARK_WAIT);
			break;
		}
		n->nposted++;
		posted = true;
	}
	if (posted)
		vhostfs_notify_kick(n->vdev);
}

void vhostfs_park_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(to_delayed_work(work),
						struct vhostfs_notify,
						park_work);

	spin_lock(&n->vq_lock);
	if (n->running && READ_ONCE(n->session) == VHOSTFS_GRANTED)
		vhostfs_post(n);
	spin_unlock(&n->vq_lock);
}

/*
 * Makes of an answer what the notification queue would have brought. False: the
 * device has sent the request back, or answers what was not asked.
 */
static bool vhostfs_to_element(struct vhostfs_notify *n, void *data,
			       unsigned int len, u64 unique)
{
	struct vhostfs_wire_element *wire = data;

	if (len < sizeof(struct fuse_out_header) ||
	    le64_to_cpu(wire->unique) != unique) {
		vhostfs_count(n, VHOSTFS_RECEIVED);
		vhostfs_count(n, VHOSTFS_MALFORMED);
		return false;
	}
	if (wire->error)
		return false;
	wire->error = cpu_to_le32(FUSE_NOTIFY_FSNOTIFY);
	wire->unique = 0;
	return true;
}

/* Copies answers likewise, and parks their requests again */
static bool vhostfs_take_parked(struct vhostfs_notify *n)
{
	bool granted, sent_back = false, room = true;
	struct vhostfs_parked *parked;
	struct vhostfs_copy *copy;

	spin_lock(&n->vq_lock);
	granted = READ_ONCE(n->session) == VHOSTFS_GRANTED;
	while (n->running && (room = vhostfs_has_room(n))) {
		spin_lock(&n->answered_lock);
		parked = list_first_entry_or_null(&n->answered,
						  struct vhostfs_parked, list);
		if (parked)
			list_del(&parked->list);
		spin_unlock(&n->answered_lock);
		if (!parked)
			break;
		copy = vhostfs_copied(n, n->ntaken);
		copy->len = min_t(unsigned int, parked->len,
				  VHOSTFS_ELEMENT_SIZE);
		memcpy(copy->data, parked->out, copy->len);
		if (vhostfs_to_element(n, copy->data, copy->len,
				       parked->unique))
			vhostfs_add_copied(n);
		else
			sent_back = true;
		list_add_tail(&parked->list, &n->unposted);
		n->nposted--;
	}
	if (n->running && granted && sent_back)
		queue_delayed_work(vhostfs_wq, &n->park_work,
				   VHOSTFS_PARK_WAIT);
	else if (n->running && granted)
		vhostfs_post(n);
	spin_unlock(&n->vq_lock);
	return room;
}

/* Is this one of ours, among what comes out of a request queue? */
bool vhostfs_notify_is_parked(const struct vhostfs_notify *n, const void *token)
{
	const struct vhostfs_parked *parked = token;

	return n && n->parked && parked >= n->parked &&
	       parked < n->parked + n->nparked;
}

/* Called with the request queue's lock: true when it was one of ours */
bool vhostfs_notify_answered(struct vhostfs_notify *n, void *token,
			     unsigned int len)
{
	struct vhostfs_parked *parked = token;

	if (!vhostfs_notify_is_parked(n, token))
		return false;
	parked->len = len;
	spin_lock(&n->answered_lock);
	list_add_tail(&parked->list, &n->answered);
	spin_unlock(&n->answered_lock);
	queue_work(vhostfs_wq, &n->receive_work);
	return true;
}

/*
 * Descriptors for a request of the FUSE core, which makes none that needs more
 * than all there are. What parked requests have comes off: a request that does
 * not fit beside them would wait until the host has something to tell.
 */
unsigned int vhostfs_notify_room(const struct vhostfs_notify *n,
				 struct virtqueue *vq)
{
	unsigned int size = virtqueue_get_vring_size(vq), taken;

	if (!n)
		return size;
	taken = n->nparked;
	if (!virtio_has_feature(n->vdev, VIRTIO_RING_F_INDIRECT_DESC))
		taken *= VHOSTFS_PARKED_DESCS;
	return size - min(taken, size);
}

void vhostfs_alloc_parked(struct vhostfs_notify *n, struct virtqueue *vq)
{
	unsigned int i, count;

	count = clamp_t(unsigned int, queue_buffers, 1, VHOSTFS_MAX_PARKED);
	count = min(count, virtqueue_get_vring_size(vq) / VHOSTFS_PARKED_SHARE);
	count = max(count, 1U);
	n->parked_vq = vq;
	n->parked = kcalloc(count, sizeof(*n->parked), GFP_KERNEL);
	n->nparked = n->parked ? count : 0;
	for (i = 0; i < n->nparked; i++)
		list_add_tail(&n->parked[i].list, &n->unposted);
}

/* ---- the workers -------------------------------------------------------------------- */

/*
 * Acting on an element may wait for others, so it has a worker of its own, and
 * coherent caches learn here what has come meanwhile.
 */
void vhostfs_receive_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(work, struct vhostfs_notify,
						receive_work);
	unsigned int number = n->ntaken;
	struct vhostfs_copy *copy;
	bool room;

	room = vhostfs_take_buffers(n);
	room = vhostfs_take_parked(n) && room;
	for (; vhostfs_is_coherent(n) && number != n->ntaken; number++) {
		copy = vhostfs_copied(n, number);
		vhostfs_first_look(n, copy->data, copy->len);
		cond_resched();
	}
	/* A run that sees this begins after it */
	if (!room)
		WRITE_ONCE(n->more, true);
	queue_work(vhostfs_wq, &n->act_work);
}

static unsigned int vhostfs_nwaiting(struct vhostfs_notify *n)
{
	return smp_load_acquire(&n->ntaken) - n->nacted;
}

void vhostfs_act_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(work, struct vhostfs_notify,
						act_work);
	unsigned int left = VHOSTFS_BATCH * VHOSTFS_BATCHES;
	struct vhostfs_copy *copy;
	bool more = false;

	while (left-- && vhostfs_nwaiting(n)) {
		copy = vhostfs_copied(n, n->nacted);
		vhostfs_element(n, copy->data, copy->len);
		smp_store_release(&n->nacted, n->nacted + 1);
		cond_resched();
	}
	if (READ_ONCE(n->more)) {
		WRITE_ONCE(n->more, false);
		more = true;
		queue_work(vhostfs_wq, &n->receive_work);
	}
	more = more || vhostfs_nwaiting(n);
	vhostfs_expire(n, !more);
	/* Others get their turn, however much the device sends */
	if (vhostfs_nwaiting(n))
		queue_work(vhostfs_wq, &n->act_work);
}

/* Called in interrupts */
void vhostfs_notify_received(struct vhostfs_notify *n)
{
	if (n)
		queue_work(vhostfs_wq, &n->receive_work);
}
