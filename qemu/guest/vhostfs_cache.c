// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: what is cached of objects and names, and is no longer right
 *
 * Knows inodes, dentries and the FUSE core, and nothing of watchers.
 * What is no longer valid after which event: docs/protocol.md of vhostfs, 8.
 */

#include <linux/dcache.h>
#include <linux/fs.h>
#include <linux/iversion.h>
#include <linux/pagemap.h>
#include <linux/posix_acl.h>
#include "vhostfs_internal.h"

/*
 * A new version makes the FUSE core drop the attributes in replies to requests
 * that were sent before now, which may be older than an event, or a change.
 */
void vhostfs_age(struct inode *inode)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct fuse_conn *fc = get_fuse_conn(inode);

	spin_lock(&fi->lock);
	fi->attr_version = atomic64_inc_return(&fc->attr_version);
	spin_unlock(&fi->lock);
}

void vhostfs_stale_attr(struct inode *inode, u32 mask)
{
	vhostfs_age(inode);
	set_mask_bits(&get_fuse_inode(inode)->inval_mask, 0, mask);
	forget_all_cached_acls(inode);
}

void vhostfs_wake(struct vhostfs_request *req, int error)
{
	req->error = error;
	complete(req->done);
}

static void vhostfs_set_times(struct inode *inode, const struct fuse_attr *attr)
{
	u32 mtimensec = min_t(u32, attr->mtimensec, NSEC_PER_SEC - 1);
	u32 ctimensec = min_t(u32, attr->ctimensec, NSEC_PER_SEC - 1);

#if VHOSTFS_KERNEL < 607
	inode->i_mtime.tv_sec = attr->mtime;
	inode->i_mtime.tv_nsec = mtimensec;
	inode->i_ctime.tv_sec = attr->ctime;
	inode->i_ctime.tv_nsec = ctimensec;
#else
	inode_set_mtime(inode, attr->mtime, mtimensec);
	inode_set_ctime(inode, attr->ctime, ctimensec);
#endif
}

/* Asks the device for attributes, by a request that the caller frees; or NULL */
struct vhostfs_request *vhostfs_getattr(struct vhostfs_notify *n,
					struct inode *inode)
{
	DECLARE_COMPLETION_ONSTACK(done);
	struct vhostfs_request *req;

	req = vhostfs_new_request(FUSE_GETATTR, get_node_id(inode),
				  sizeof(req->getattr_in),
				  sizeof(req->getattr_out));
	if (!req)
		return NULL;
	req->end = vhostfs_wake;
	req->done = &done;
	vhostfs_send(n, get_fuse_mount(inode), req);
	wait_for_completion(&done);
	if (!req->error && inode_wrong_type(inode, req->getattr_out.attr.mode))
		req->error = -EIO;
	return req;
}

/*
 * With write-back caching the FUSE core never believes the device's size and
 * times of a file that it knows. So ask for them here, when nothing that this
 * guest wrote is missing in them: the inode lock keeps writers away, and what
 * is dirty is written back first.
 */
static void vhostfs_refetch(struct vhostfs_notify *n, struct inode *inode)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct fuse_conn *fc = get_fuse_conn(inode);
	struct vhostfs_request *req = NULL;
	const struct fuse_attr *attr;
	bool shrunk;

	inode_lock(inode);
	if (filemap_write_and_wait(inode->i_mapping))
		goto out;
	/* Older kernels end a page's writeback before the WRITE is answered */
	wait_event(fi->page_waitq, !READ_ONCE(fi->writectr));

	req = vhostfs_getattr(n, inode);
	if (!req)
		goto out;
	attr = &req->getattr_out.attr;
	if (req->error || attr->size > LLONG_MAX ||
	    mapping_tagged(inode->i_mapping, PAGECACHE_TAG_DIRTY))
		goto out;

	spin_lock(&fi->lock);
	fi->attr_version = atomic64_inc_return(&fc->attr_version);
	shrunk = attr->size < inode->i_size;
	i_size_write(inode, attr->size);
	vhostfs_set_times(inode, attr);
	spin_unlock(&fi->lock);
	if (shrunk)
		truncate_pagecache(inode, attr->size);
out:
	inode_unlock(inode);
	kfree(req);
}

/*
 * What is known of an object's attributes and content. Pages: those that are
 * being read are locked until their READ was answered, so this waits for old
 * content that is on its way and drops it, too.
 */
void vhostfs_stale_object(struct vhostfs_notify *n, struct inode *inode,
			  u32 mask)
{
	if (!(mask & ~(FS_ACCESS | FS_OPEN | FS_OPEN_EXEC | FS_CLOSE_NOWRITE))) {
		if (mask & FS_ACCESS)
			vhostfs_stale_attr(inode, STATX_ATIME);
		return;
	}

	vhostfs_stale_attr(inode, STATX_BASIC_STATS);
	if (!S_ISREG(inode->i_mode) ||
	    !(mask & (FS_MODIFY | FS_CLOSE_WRITE | FS_ATTRIB)))
		return;
	if (get_fuse_conn(inode)->writeback_cache)
		vhostfs_refetch(n, inode);
	if ((mask & (FS_MODIFY | FS_CLOSE_WRITE)) && inode->i_mapping->nrpages)
		invalidate_inode_pages2(inode->i_mapping);
}

/* Makes the next walk through this dentry ask the device */
void vhostfs_expire_dentry(struct dentry *dentry)
{
	/* In all kernels the time comes first of what d_fsdata stands for */
#if VHOSTFS_KERNEL < 618 && BITS_PER_LONG >= 64
	dentry->d_fsdata = NULL;
#else
	*(u64 *)dentry->d_fsdata = 0;
#endif
}

/* All that is known of an object; its names have to be confirmed */
void vhostfs_stale_inode(struct vhostfs_notify *n, struct inode *inode)
{
	struct dentry *alias;

	vhostfs_stale_object(n, inode, FS_MODIFY);
	if (S_ISDIR(inode->i_mode))
		inode_maybe_inc_iversion(inode, false);

	spin_lock(&inode->i_lock);
#ifdef for_each_alias
	for_each_alias(alias, inode)
#else
	hlist_for_each_entry(alias, &inode->i_dentry, d_u.d_alias)
#endif
		vhostfs_expire_dentry(alias);
	spin_unlock(&inode->i_lock);
}

struct dentry *vhostfs_lookup_cached(struct inode *dir, const char *text,
				     unsigned int len)
{
	struct qstr name = { .name = text, .len = len };
	struct dentry *alias = d_find_any_alias(dir);
	struct dentry *entry;

	if (!alias)
		return NULL;
	name.hash = full_name_hash(alias, text, len);
	entry = d_lookup(alias, &name);
	dput(alias);
	return entry;
}

/* Was the name's object found after the event, or may it have been? */
static bool vhostfs_is_newer(const struct dentry *entry,
			     const struct vhostfs_event *event)
{
	const struct inode *inode = d_inode(entry);

	if (!inode)
		return false;
	/* It is in use beside us */
	if (!event->child_nodeid)
		return S_ISDIR(inode->i_mode) && d_count(entry) > 1;
	return (event->mask & (FS_DELETE | FS_MOVED_FROM)) &&
	       !vhostfs_is_object(inode, event);
}

/*
 * What can be done about an entry and an object without waiting for anybody: the
 * next who uses it asks, unless a task with an old answer says otherwise, which
 * is what vhostfs_stale_entry() and vhostfs_stale_object() wait for.
 */
void vhostfs_expire_entry(struct inode *dir, const struct vhostfs_event *event)
{
	struct dentry *entry;

	inode_maybe_inc_iversion(dir, false);
	entry = vhostfs_lookup_cached(dir, event->name, event->namelen);
	if (!entry)
		return;
	if (d_really_is_positive(entry))
		vhostfs_stale_attr(d_inode(entry), STATX_BASIC_STATS);
	vhostfs_expire_dentry(entry);
	dput(entry);
}

void vhostfs_expire_object(struct inode *inode, u32 mask)
{
	vhostfs_stale_attr(inode, STATX_BASIC_STATS);
	/* Pages that are locked, dirty or mapped stay for now */
	if (S_ISREG(inode->i_mode) && (mask & (FS_MODIFY | FS_CLOSE_WRITE)))
		invalidate_mapping_pages(inode->i_mapping, 0, -1);
}

/*
 * What is known of a directory's entry and of its listing. The directory's
 * lock waits for every LOOKUP and READDIRPLUS in it that was sent before now,
 * so that none of them can put an old answer into the dcache afterwards.
 *
 * A dentry may be in revalidation meanwhile, which needs no such lock and may
 * give it a new time from an old answer. So what is wrong is unhashed; a new
 * time alone is given only where the dentry holds a newer object than the
 * event speaks of, which the next walk confirms. The same for a directory
 * of which the device knew nothing: who uses it here, as a mount point or from
 * within, has found it after the event.
 *
 * A cached listing is dropped by its readers, for its iversion differs.
 *
 * Returns the directory that had the name and is watched, with a reference, if
 * this may be its end; or NULL.
 */
struct inode *vhostfs_stale_entry(struct inode *dir,
				  const struct vhostfs_event *event)
{
	bool gone = event->mask & (FS_DELETE | FS_MOVED_FROM);
	struct inode *inode, *former = NULL;
	struct dentry *entry;
	bool same;

	inode_lock_nested(dir, I_MUTEX_PARENT);
	vhostfs_stale_attr(dir, STATX_BASIC_STATS);
	inode_maybe_inc_iversion(dir, false);
	entry = vhostfs_lookup_cached(dir, event->name, event->namelen);
	if (entry) {
		inode = d_inode(entry);
		same = inode && vhostfs_is_object(inode, event);
		if (inode)
			vhostfs_stale_attr(inode, STATX_BASIC_STATS);
		/* Of a file's end its link count tells */
		if (inode && S_ISDIR(inode->i_mode) && (gone || !same) &&
		    !(event->mask & FS_MOVED_FROM) &&
		    READ_ONCE(inode->i_fsnotify_mask))
			former = igrab(inode);
		if (vhostfs_is_newer(entry, event))
			vhostfs_expire_dentry(entry);
		else if (gone ? !!inode : !same)
			d_invalidate(entry);
		dput(entry);
	}
	inode_unlock(dir);
	return former;
}
