/* SPDX-License-Identifier: Apache-2.0 */
/* FUSE requests: private copies in, replies out; see core.h and request.h. */
#include <limits.h>

#include "mem.h"
#include "request.h"

/* Copies n bytes from the front of r->in and drops them there. */
static void consume(struct vf_req *r, void *to, uint32_t n)
{
	uint8_t *out = to;
	uint32_t used = 0;

	r->in_size -= n;
	while (n) {
		struct iovec *v = &r->in[used];
		uint32_t part = v->iov_len < n ? (uint32_t)v->iov_len : n;

		memcpy(out, v->iov_base, part);
		out += part;
		n -= part;
		v->iov_base = (uint8_t *)v->iov_base + part;
		v->iov_len -= part;
		if (!v->iov_len)
			used++;
	}
	if (used) {
		r->n_in -= used;
		memmove(r->in, r->in + used, r->n_in * sizeof(*r->in));
	}
}

int vf_req_parse(struct vf_req *r)
{
	uint32_t size;

	r->args_size = 0;
	r->in_place = false;
	r->trimmed = false;
	if (r->in_size < sizeof(r->header))
		return -EBADMSG;
	consume(r, &r->header, sizeof(r->header));
	if (r->header.len != r->in_size + sizeof(r->header))
		return -EINVAL;
	size = r->in_size;
	if (r->header.opcode == FUSE_WRITE && size > sizeof(struct fuse_write_in))
		size = sizeof(struct fuse_write_in);
	if (size > VF_MAX_ARGS)
		return -E2BIG;
	if (size > r->args_room) {
		uint32_t room = size < 1024 ? 1024 : (size + 4095) & ~4095u;
		uint8_t *bigger = realloc(r->args, room);

		if (!bigger)
			return -ENOMEM;
		r->args = bigger;
		r->args_room = room;
	}
	consume(r, r->args, size);
	r->args_size = size;
	return 0;
}

const char *vf_arg_string(const struct vf_req *r, uint32_t offset, uint32_t *end)
{
	const char *s = (const char *)r->args + offset;
	const char *nul;

	if (offset >= r->args_size)
		return NULL;
	nul = memchr(s, 0, r->args_size - offset);
	if (!nul)
		return NULL;
	if (end)
		*end = (uint32_t)(nul + 1 - (const char *)r->args);
	return s;
}

int vf_check_name(const char *name)
{
	size_t length = strlen(name);

	if (!length || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, ".."))
		return -EINVAL;
	return length > NAME_MAX ? -ENAMETOOLONG : 0;
}

struct iovec *vf_req_in_iov(struct vf_req *r, uint32_t size, uint32_t *n)
{
	uint32_t i = 0;

	for (; i < r->n_in && size; i++) {
		if (r->in[i].iov_len > size)
			r->in[i].iov_len = size;
		size -= (uint32_t)r->in[i].iov_len;
	}
	*n = i;
	return r->in;
}

struct iovec *vf_req_out_iov(struct vf_req *r, uint32_t offset, uint32_t size, uint32_t *n)
{
	uint32_t first = 0, last;

	while (first < r->n_out && offset >= r->out[first].iov_len)
		offset -= (uint32_t)r->out[first++].iov_len;
	r->trimmed = true;
	r->trim_head = first;
	r->trim_head_bytes = offset;
	r->trim_tail = r->n_out;
	*n = 0;
	if (first == r->n_out)
		return r->out + first;
	r->out[first].iov_base = (uint8_t *)r->out[first].iov_base + offset;
	r->out[first].iov_len -= offset;
	for (last = first; last < r->n_out && size; last++) {
		if (r->out[last].iov_len > size) {
			r->trim_tail = last;
			r->trim_tail_len = (uint32_t)r->out[last].iov_len;
			r->out[last].iov_len = size;
		}
		size -= (uint32_t)r->out[last].iov_len;
	}
	*n = last - first;
	return r->out + first;
}

static void untrim(struct vf_req *r)
{
	if (!r->trimmed)
		return;
	r->trimmed = false;
	if (r->trim_tail < r->n_out)
		r->out[r->trim_tail].iov_len = r->trim_tail_len;
	if (r->trim_head < r->n_out) {
		struct iovec *v = &r->out[r->trim_head];

		v->iov_base = (uint8_t *)v->iov_base - r->trim_head_bytes;
		v->iov_len += r->trim_head_bytes;
	}
}

void vf_req_scatter(struct vf_req *r, uint32_t offset, const void *from, uint32_t n)
{
	const uint8_t *p = from;

	for (uint32_t i = 0; i < r->n_out && n; i++) {
		uint32_t length = (uint32_t)r->out[i].iov_len, part;

		if (offset >= length) {
			offset -= length;
			continue;
		}
		part = length - offset < n ? length - offset : n;
		memcpy((uint8_t *)r->out[i].iov_base + offset, p, part);
		p += part;
		n -= part;
		offset = 0;
	}
}

uint32_t vf_req_write_reply(struct vf_req *r, int32_t result, const void *payload)
{
	struct fuse_out_header header = {.unique = r->header.unique};
	uint32_t size = result > 0 ? (uint32_t)result : 0;

	untrim(r);
	if (r->out_size < sizeof(header))
		return 0;
	if (size > r->out_size - sizeof(header)) {
		size = 0;
		result = -EIO;
	}
	header.error = result < 0 ? result : 0;
	header.len = (uint32_t)sizeof(header) + size;
	if (size && !r->in_place)
		vf_req_scatter(r, sizeof(header), payload, size);
	vf_req_scatter(r, 0, &header, sizeof(header));
	return header.len;
}

void vf_req_rewind(struct vf_req *r)
{
	untrim(r);
	r->in_place = false;
}

void vf_req_free(struct vf_req *r)
{
	free(r->in);
	free(r->out);
	free(r->args);
	free(r);
}
