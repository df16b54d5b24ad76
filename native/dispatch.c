/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One table: which function does an opcode, and what must hold before.
 * An opcode that is not here is Python's to decide (upcall.c), which answers
 * ENOSYS to what it does not know either.
 */
#include "own_changes.h"

const struct vf_op_entry vf_ops[] = {
    [FUSE_LOOKUP] = {vf_op_lookup, 0},
    [FUSE_FORGET] = {vf_op_forget, VF_OP_QUICK},
    [FUSE_BATCH_FORGET] = {vf_op_batch_forget, VF_OP_QUICK},
    [FUSE_GETATTR] = {vf_op_getattr, VF_OP_QUICK},
    [FUSE_SETATTR] = {vf_op_setattr, VF_OP_MODIFY},
    [VF_FUSE_STATX] = {vf_op_statx, VF_OP_QUICK},
    [FUSE_READLINK] = {vf_op_readlink, 0},
    [FUSE_SYMLINK] = {vf_op_symlink, VF_OP_MODIFY},
    [FUSE_MKNOD] = {vf_op_mknod, VF_OP_MODIFY},
    [FUSE_MKDIR] = {vf_op_mkdir, VF_OP_MODIFY},
    [FUSE_UNLINK] = {vf_op_unlink, VF_OP_MODIFY | VF_OP_REMOVES},
    [FUSE_RMDIR] = {vf_op_rmdir, VF_OP_MODIFY | VF_OP_REMOVES},
    [FUSE_RENAME] = {vf_op_rename, VF_OP_MODIFY | VF_OP_REMOVES},
    [FUSE_RENAME2] = {vf_op_rename2, VF_OP_MODIFY | VF_OP_REMOVES},
    [FUSE_LINK] = {vf_op_link, VF_OP_MODIFY},
    [FUSE_CREATE] = {vf_op_create, VF_OP_MODIFY},
    [FUSE_TMPFILE] = {vf_op_tmpfile, VF_OP_MODIFY},
    [FUSE_ACCESS] = {vf_op_access, 0},
    [FUSE_STATFS] = {vf_op_statfs, VF_OP_QUICK},
    [FUSE_SYNCFS] = {vf_op_syncfs, VF_OP_SLOW},
    [FUSE_OPEN] = {vf_op_open, VF_OP_TRUNCATES},
    [FUSE_READ] = {vf_op_read, VF_OP_QUICK | VF_OP_COPIES},
    [FUSE_WRITE] = {vf_op_write, VF_OP_MODIFY | VF_OP_QUICK},
    [FUSE_FLUSH] = {vf_op_flush, 0},
    [FUSE_RELEASE] = {vf_op_release, 0},
    [FUSE_FSYNC] = {vf_op_fsync, VF_OP_SLOW},
    [FUSE_FALLOCATE] = {vf_op_fallocate, VF_OP_MODIFY | VF_OP_SLOW},
    [FUSE_LSEEK] = {vf_op_lseek, 0},
    [FUSE_COPY_FILE_RANGE] = {vf_op_copy_file_range, VF_OP_MODIFY | VF_OP_SLOW},
    [VF_FUSE_COPY_FILE_RANGE_64] = {vf_op_copy_file_range, VF_OP_MODIFY | VF_OP_SLOW},
    [FUSE_OPENDIR] = {vf_op_opendir, 0},
    [FUSE_READDIR] = {vf_op_readdir, 0},
    [FUSE_READDIRPLUS] = {vf_op_readdirplus, 0},
    [FUSE_RELEASEDIR] = {vf_op_releasedir, 0},
    [FUSE_FSYNCDIR] = {vf_op_fsyncdir, VF_OP_SLOW},
    [FUSE_SETXATTR] = {vf_op_setxattr, VF_OP_MODIFY},
    [FUSE_GETXATTR] = {vf_op_getxattr, 0},
    [FUSE_LISTXATTR] = {vf_op_listxattr, 0},
    [FUSE_REMOVEXATTR] = {vf_op_removexattr, VF_OP_MODIFY},
    [FUSE_GETLK] = {vf_op_getlk, 0},
    [FUSE_SETLK] = {vf_op_setlk, 0},
    [FUSE_SETLKW] = {vf_op_setlkw, 0},
    [FUSE_INTERRUPT] = {vf_op_interrupt, 0},
    [FUSE_INIT] = {NULL, VF_OP_UPCALL | VF_OP_NO_SESSION},
    [FUSE_DESTROY] = {NULL, VF_OP_UPCALL | VF_OP_NO_SESSION},
};
const uint32_t vf_n_ops = sizeof(vf_ops) / sizeof(vf_ops[0]);

/* Our own opcodes, from VF_FUSE_FSNOTIFY_INIT on; see docs/protocol.md. */
static const struct vf_op_entry fsnotify_ops[] = {
    [VF_FUSE_FSNOTIFY_INIT - VF_FUSE_FSNOTIFY_INIT] = {NULL, VF_OP_UPCALL},
    [VF_FUSE_FSNOTIFY_WATCH - VF_FUSE_FSNOTIFY_INIT] = {vf_op_fsnotify_watch, 0},
    [VF_FUSE_FSNOTIFY_PARK - VF_FUSE_FSNOTIFY_INIT] = {vf_op_fsnotify_park, VF_OP_QUICK},
};
#define N_FSNOTIFY_OPS (sizeof(fsnotify_ops) / sizeof(fsnotify_ops[0]))

static const struct vf_op_entry *find_op(uint32_t opcode)
{
	static const struct vf_op_entry unknown = {NULL, VF_OP_UPCALL};
	const struct vf_op_entry *op = &unknown;

	if (opcode < vf_n_ops)
		op = &vf_ops[opcode];
	else if (opcode - VF_FUSE_FSNOTIFY_INIT < N_FSNOTIFY_OPS)
		op = &fsnotify_ops[opcode - VF_FUSE_FSNOTIFY_INIT];
	return op->run || op->flags ? op : &unknown;
}

bool vf_is_quick(const struct vf_req *r)
{
	return find_op(r->header.opcode)->flags & VF_OP_QUICK;
}

bool vf_may_remove(const struct vf_req *r)
{
	return find_op(r->header.opcode)->flags & VF_OP_REMOVES;
}

bool vf_only_copies(const struct vf_req *r)
{
	return find_op(r->header.opcode)->flags & VF_OP_COPIES;
}

/* Tells the source of host events, where it needs that, what the operation does. */
static int32_t run_noted(struct vf_thread *t, struct vf_req *r, vf_op run)
{
	struct vf_events *events = r->share->events;
	struct vf_own_changes *own = events ? events->own_changes : NULL;
	struct vf_own_window *noted = own ? vf_own_changes_begin(events, own, r) : NULL;
	int32_t result = run(t, r);

	if (own && result >= (int32_t)sizeof(struct fuse_entry_out))
		vf_own_changes_name(own, r, ((struct fuse_entry_out *)t->reply)->nodeid);
	if (noted)
		vf_own_changes_end(own, noted);
	return result;
}

/*
 * Before what works on a session; false: there is none.  Pairs with vf_share_start_session(): it
 * takes the flags away, then waits for busy threads; this thread says that it is busy, then looks
 * at the flags.
 */
static bool enter(struct vf_thread *t)
{
	atomic_store(&t->busy, true);
	return atomic_load(&t->share->init_flags);
}

static void leave(struct vf_thread *t)
{
	atomic_store_explicit(&t->busy, false, memory_order_release);
}

int32_t vf_dispatch(struct vf_thread *t, struct vf_req *r)
{
	const struct vf_op_entry *op = find_op(r->header.opcode);
	int32_t result;

	if (!op->run) {
		if (!(op->flags & VF_OP_NO_SESSION) && !vf_session_flags(r->share))
			return -EIO;
		vf_upcalls_submit(r->share->upcalls, r);
		return VF_ASYNC;
	}
	if ((op->flags & VF_OP_SLOW) && !t->may_block)
		return VF_TO_POOL;
	if ((op->flags & VF_OP_MODIFY) && r->share->config.readonly)
		return -EROFS;
	if (!enter(t)) {
		result = -EIO;
	} else {
		vf_lasting_begin(t);
		result = run_noted(t, r, op->run);
		if (result != VF_NO_REPLY)
			vf_show(r->share, op->flags & (VF_OP_MODIFY | VF_OP_TRUNCATES));
	}
	leave(t);
	return result;
}

void vf_dispatch_ahead(struct vf_thread *t, bool (*stop)(const void *), const void *arg)
{
	if (enter(t)) {
		vf_lasting_begin(t);
		vf_dir_look_ahead(t, stop, arg);
	}
	if (!t->begun)
		t->listed_nodeid = 0;
	leave(t);
}

void vf_dispatch_drop_ahead(struct vf_thread *t)
{
	if (t->begun) {
		if (enter(t))
			vf_dir_drop_ahead(t);
		t->begun = false;
		leave(t);
	}
	t->listed_nodeid = 0;
}
