// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: superblocks
 *
 * What the FUSE core's superblocks lack for watchers, and that they come and
 * go. Knows nothing of elements.
 */

#include <linux/exportfs.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/statfs.h>
#include "vhostfs_internal.h"

/*
 * The FUSE core reports no f_fsid, and fanotify marks that report file ids want
 * one. The device number is unique while the system runs, which is what f_fsid
 * promises.
 */
static struct super_operations vhostfs_super_ops;
static const struct super_operations *vhostfs_fuse_super_ops;

static int vhostfs_statfs(struct dentry *dentry, struct kstatfs *buf)
{
	int err = vhostfs_fuse_super_ops->statfs(dentry, buf);

	if (!err && !buf->f_fsid.val[0] && !buf->f_fsid.val[1])
		buf->f_fsid = u64_to_fsid(huge_encode_dev(dentry->d_sb->s_dev));
	return err;
}

/*
 * A handle of what has no link any more leads nowhere, as on other file systems.
 * Else who opens what a DELETE_SELF names makes a dentry, and the end of that is
 * a DELETE_SELF again.
 */
#define VHOSTFS_FH		0x81	/* FILEID_INO64_GEN of newer kernels */
#define VHOSTFS_FH_PARENT	0x82

static struct export_operations vhostfs_export_ops;
static const struct export_operations *vhostfs_fuse_export_ops;

static struct dentry *vhostfs_fh_to_dentry(struct super_block *sb,
					   struct fid *fid, int fh_len,
					   int fh_type)
{
	struct inode *inode;
	u64 nodeid;
	bool gone;

	if (fh_len >= 3 && (fh_type == VHOSTFS_FH || fh_type == VHOSTFS_FH_PARENT)) {
		nodeid = (u64)fid->raw[0] << 32 | fid->raw[1];
		inode = ilookup5(sb, nodeid, vhostfs_inode_eq, &nodeid);
		gone = inode && !inode->i_nlink;
		iput(inode);
		if (gone)
			return ERR_PTR(-ESTALE);
	}
	return vhostfs_fuse_export_ops->fh_to_dentry(sb, fid, fh_len, fh_type);
}

static void vhostfs_wrap_super_ops(struct super_block *sb)
{
	mutex_lock(&vhostfs_devices_mutex);
	if (!vhostfs_fuse_export_ops && sb->s_export_op->fh_to_dentry) {
		vhostfs_export_ops = *sb->s_export_op;
		vhostfs_export_ops.fh_to_dentry = vhostfs_fh_to_dentry;
		vhostfs_fuse_export_ops = sb->s_export_op;
	}
	if (sb->s_export_op == vhostfs_fuse_export_ops)
		sb->s_export_op = &vhostfs_export_ops;
	if (!vhostfs_fuse_super_ops) {
		vhostfs_super_ops = *sb->s_op;
		vhostfs_super_ops.statfs = vhostfs_statfs;
		vhostfs_fuse_super_ops = sb->s_op;
	}
	if (sb->s_op == vhostfs_fuse_super_ops)
		sb->s_op = &vhostfs_super_ops;
	mutex_unlock(&vhostfs_devices_mutex);
}

static struct fs_context_operations vhostfs_submount_ops;
static const struct fs_context_operations *vhostfs_fuse_submount_ops;

/*
 * The FUSE core does not keep the generation of a directory that another file
 * system is mounted on, so the submount's root has none, either. This is where
 * the server of vhostfs has it; another one will say that it knows no such
 * object, and then there are no events on the root of its submounts.
 */
static int vhostfs_get_tree_submount(struct fs_context *fsc)
{
	struct inode *root;
	int err = vhostfs_fuse_submount_ops->get_tree(fsc);

	if (err)
		return err;
	root = d_inode(fsc->root);
	if (vhostfs_notify_of(get_fuse_conn(root))) {
		root->i_generation = upper_32_bits(get_node_id(root));
		vhostfs_wrap_super_ops(fsc->root->d_sb);
	}
	return 0;
}

int vhostfs_notify_init_submount(struct fs_context *fsc)
{
	int err = fuse_init_fs_context_submount(fsc);

	if (err)
		return err;
	mutex_lock(&vhostfs_devices_mutex);
	if (!vhostfs_fuse_submount_ops) {
		vhostfs_submount_ops = *fsc->ops;
		vhostfs_submount_ops.get_tree = vhostfs_get_tree_submount;
		vhostfs_fuse_submount_ops = fsc->ops;
	}
	mutex_unlock(&vhostfs_devices_mutex);
	fsc->ops = &vhostfs_submount_ops;
	return 0;
}

/* A connection begins; FUSE_INIT was sent, and may not have been answered yet */
void vhostfs_notify_mount(struct vhostfs_notify *n, struct super_block *sb)
{
	if (!n)
		return;
	vhostfs_wrap_super_ops(sb);
	mutex_lock(&n->session_mutex);
	mutex_lock(&n->event_mutex);
	mutex_lock(&n->look_mutex);
	n->fc = get_fuse_conn_super(sb);
	n->share_mask = 0;
	n->share_refused = false;
	n->held_full_logged = false;
	memset(n->cookies, 0, sizeof(n->cookies));
	n->granted = 0;
	vhostfs_reset_coherence(n);
	mutex_unlock(&n->look_mutex);
	mutex_unlock(&n->event_mutex);
	n->tries = 0;
	vhostfs_set_session(n, VHOSTFS_NEW);
	mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	mutex_unlock(&n->session_mutex);
}

/*
 * A superblock is about to go. Requests of ours were sent in its name and must
 * be over before that. What is done for an element needs no care: it is done
 * under fc->killsb, which fuse_mount_remove() takes next.
 */
void vhostfs_notify_kill_sb(struct vhostfs_notify *n, struct super_block *sb)
{
	if (!n)
		return;
	mutex_lock(&n->session_mutex);
	n->paused++;
	vhostfs_end_share(vhostfs_find_share(n, sb));
	vhostfs_drop_mount_marks(n, sb);
	mutex_lock(&n->event_mutex);
	vhostfs_forget_recent(n, sb, NULL);
	mutex_unlock(&n->event_mutex);
	mutex_unlock(&n->session_mutex);
	wait_event(n->idle, !atomic_read(&n->in_flight));
}

void vhostfs_notify_killed_sb(struct vhostfs_notify *n, bool last)
{
	if (!n)
		return;
	mutex_lock(&n->session_mutex);
	if (last) {
		mutex_lock(&n->event_mutex);
		mutex_lock(&n->look_mutex);
		n->fc = NULL;
		mutex_unlock(&n->look_mutex);
		vhostfs_free_halves(n);
		mutex_unlock(&n->event_mutex);

		spin_lock(&n->watch_lock);
		n->session = VHOSTFS_NONE;
		n->resync = false;
		n->retry = false;
		vhostfs_free_watches(n);
		spin_unlock(&n->watch_lock);
		wake_up_all(&n->settled);
	}
	n->paused--;
	mutex_unlock(&n->session_mutex);
	if (!last)
		mod_delayed_work(vhostfs_wq, &n->session_work, 0);
}
