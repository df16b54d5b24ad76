/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest without a ring: builds requests by hand and runs the operations on
 * them in the calling thread.  For tests of the C core.
 */
#ifndef VHOSTFS_TESTS_GUEST_H
#define VHOSTFS_TESTS_GUEST_H

#include <stdarg.h>
#include <stdio.h>
#include <sys/mount.h>

#include "../cred.h"
#include "../file.h"
#include "../inode.h"

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s: failed: %s (errno %d)\n", __FILE__, __LINE__,  \
				__func__, #condition, errno);                                      \
			abort();                                                                   \
		}                                                                                  \
	} while (0)
#define CHECK_EQ(a, b)                                                                             \
	do {                                                                                       \
		long long a_ = (long long)(a), b_ = (long long)(b);                                \
		if (a_ != b_) {                                                                    \
			fprintf(stderr, "%s:%d: %s: %s is %lld, not %lld\n", __FILE__, __LINE__,   \
				__func__, #a, a_, b_);                                             \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

/* The flags of a session as a Linux 6.12 guest gets them. */
#define SESSION                                                                                    \
	(FUSE_EXPORT_SUPPORT | FUSE_DONT_MASK | FUSE_SUBMOUNTS | FUSE_HANDLE_KILLPRIV_V2 |         \
	 FUSE_ATOMIC_O_TRUNC | FUSE_SECURITY_CTX | VF_FUSE_CREATE_SUPP_GROUP)

struct guest {
	struct vf_share *share;
	struct vf_thread thread;
	struct fuse_in_header header; /* uid, gid, total_extlen of the next requests */
	_Alignas(8) uint8_t args[8192];
	uint32_t args_size;
};

static inline void guest_enter(struct guest *g, struct vf_share *share)
{
	memset(g, 0, sizeof(*g));
	g->share = share;
	CHECK_EQ(vf_thread_enter(&g->thread, share, "guest"), 0);
}

static inline void guest_leave(struct guest *g)
{
	vf_thread_leave(&g->thread);
}

static inline void arg(struct guest *g, const void *bytes, size_t size)
{
	CHECK(g->args_size + size <= sizeof(g->args));
	memcpy(g->args + g->args_size, bytes, size);
	g->args_size += (uint32_t)size;
}

static inline void arg_string(struct guest *g, const char *s)
{
	arg(g, s, strlen(s) + 1);
}

/* Runs an operation with the arguments gathered; the payload is in g->thread.reply. */
static inline int32_t run(struct guest *g, vf_op op, uint64_t nodeid)
{
	struct vf_req r = {
	    .share = g->share,
	    .header = g->header,
	    .args = g->args,
	    .args_size = g->args_size,
	    .out_size = 65536,
	};
	int32_t result;

	r.header.nodeid = nodeid;
	r.header.len = (uint32_t)sizeof(r.header) + r.args_size;
	result = op(&g->thread, &r);
	g->args_size = 0;
	return result;
}

static inline struct fuse_entry_out *entry(struct guest *g)
{
	return (struct fuse_entry_out *)g->thread.reply;
}

/* Each gives 0 or a negative errno; entry() has what came back. */
static inline int lookup(struct guest *g, uint64_t dir, const char *name)
{
	int32_t result;

	arg_string(g, name);
	result = run(g, vf_op_lookup, dir);
	return result == sizeof(struct fuse_entry_out) ? 0 : result;
}

static inline uint64_t must_lookup(struct guest *g, uint64_t dir, const char *name)
{
	CHECK_EQ(lookup(g, dir, name), 0);
	return entry(g)->nodeid;
}

static inline void forget(struct guest *g, uint64_t nodeid, uint64_t n)
{
	arg(g, &(struct fuse_forget_in){.nlookup = n}, sizeof(struct fuse_forget_in));
	CHECK_EQ(run(g, vf_op_forget, nodeid), VF_NO_REPLY);
}

static inline int getattr(struct guest *g, uint64_t nodeid, struct fuse_attr *attr)
{
	int32_t result;

	arg(g, &(struct fuse_getattr_in){0}, sizeof(struct fuse_getattr_in));
	result = run(g, vf_op_getattr, nodeid);
	if (result == sizeof(struct fuse_attr_out) && attr)
		*attr = ((struct fuse_attr_out *)g->thread.reply)->attr;
	return result == sizeof(struct fuse_attr_out) ? 0 : result;
}

static inline int setattr(struct guest *g, uint64_t nodeid, const struct fuse_setattr_in *in)
{
	int32_t result;

	arg(g, in, sizeof(*in));
	result = run(g, vf_op_setattr, nodeid);
	return result == sizeof(struct fuse_attr_out) ? 0 : result;
}

static inline int remove_file(struct guest *g, uint64_t dir, const char *name)
{
	arg_string(g, name);
	return run(g, vf_op_unlink, dir);
}

static inline int rename_flags(struct guest *g, uint64_t dir, const char *old, uint64_t new_dir,
			       const char *new, uint32_t flags)
{
	struct fuse_rename2_in in = {.newdir = new_dir, .flags = flags};

	arg(g, &in, sizeof(in));
	arg_string(g, old);
	arg_string(g, new);
	return run(g, vf_op_rename2, dir);
}

/* *fh is set when it succeeds. */
static inline int create(struct guest *g, uint64_t dir, const char *name, uint32_t flags,
			 uint32_t mode, uint32_t mask, uint64_t *fh)
{
	struct fuse_create_in in = {.flags = flags, .mode = mode, .umask = mask};
	int32_t result;

	arg(g, &in, sizeof(in));
	arg_string(g, name);
	result = run(g, vf_op_create, dir);
	if (result != sizeof(struct fuse_entry_out) + sizeof(struct fuse_open_out))
		return result;
	*fh = ((struct fuse_open_out *)(entry(g) + 1))->fh;
	return 0;
}

static inline void release(struct guest *g, uint64_t nodeid, uint64_t fh)
{
	arg(g, &(struct fuse_release_in){.fh = fh}, sizeof(struct fuse_release_in));
	CHECK_EQ(run(g, vf_op_release, nodeid), 0);
}

static inline struct vf_share_stats stats(struct guest *g)
{
	struct vf_share_stats s;

	vf_share_get_stats(g->share, &s);
	return s;
}

#endif
