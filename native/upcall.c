/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests that Python decides: a list and an eventfd.  A vf_upcall is the
 * request itself; the list is bounded by the rings.
 */
#include <sys/eventfd.h>

#include "core.h"

struct vf_upcalls {
	pthread_mutex_t lock;
	struct vf_req *first, **last;
	int event_fd;
};

struct vf_upcalls *vf_upcalls_new(int *error)
{
	struct vf_upcalls *u = calloc(1, sizeof(*u));

	if (!u) {
		*error = -ENOMEM;
		return NULL;
	}
	u->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->event_fd < 0) {
		*error = -errno;
		free(u);
		return NULL;
	}
	pthread_mutex_init(&u->lock, NULL);
	u->last = &u->first;
	return u;
}

void vf_upcalls_free(struct vf_upcalls *u)
{
	if (!u)
		return;
	close(u->event_fd);
	pthread_mutex_destroy(&u->lock);
	free(u);
}

void vf_upcalls_submit(struct vf_upcalls *u, struct vf_req *r)
{
	uint64_t one = 1;
	bool first;

	r->next = NULL;
	pthread_mutex_lock(&u->lock);
	first = !u->first;
	*u->last = r;
	u->last = &r->next;
	pthread_mutex_unlock(&u->lock);
	if (first && write(u->event_fd, &one, sizeof(one)) < 0) {
		/* EAGAIN only: the counter is full, so the reader is awake anyway. */
	}
}

int vf_share_upcall_fd(vf_share *share)
{
	return share->upcalls->event_fd;
}

vf_upcall *vf_share_next_upcall(vf_share *share, struct vf_upcall_info *info)
{
	struct vf_upcalls *u = share->upcalls;
	struct vf_req *r;
	uint64_t count;

	pthread_mutex_lock(&u->lock);
	r = u->first;
	if (r) {
		u->first = r->next;
		if (!u->first)
			u->last = &u->first;
	} else if (read(u->event_fd, &count, sizeof(count)) < 0) {
		/* EAGAIN: it was read before; under the lock, so no wake-up is lost. */
	}
	pthread_mutex_unlock(&u->lock);
	if (!r)
		return NULL;
	*info = (struct vf_upcall_info){
	    .opcode = r->header.opcode,
	    .uid = r->header.uid,
	    .gid = r->header.gid,
	    .pid = r->header.pid,
	    .unique = r->header.unique,
	    .nodeid = r->header.nodeid,
	    .args = r->args,
	    .args_size = r->args_size,
	    .reply_room = r->out_size > sizeof(struct fuse_out_header)
			      ? r->out_size - (uint32_t)sizeof(struct fuse_out_header)
			      : 0,
	};
	return (vf_upcall *)r;
}

int vf_upcall_reply(vf_upcall *upcall, int error, const void *payload, uint32_t payload_size)
{
	struct vf_req *r = (struct vf_req *)upcall;
	uint32_t room = r->out_size > sizeof(struct fuse_out_header)
			    ? r->out_size - (uint32_t)sizeof(struct fuse_out_header)
			    : 0;

	if (!error && payload_size > room) {
		vf_req_complete(r, -EIO, NULL, 0);
		return -EMSGSIZE;
	}
	vf_req_complete(r, error, payload, payload_size);
	return 0;
}
