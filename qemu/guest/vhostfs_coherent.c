// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: caches that live until the host says otherwise (INVALIDATE)
 *
 * The server gives long times with attributes, names, listings and pages, and
 * sends an element, not to be raised, for each change to what this guest holds.
 * docs/protocol.md of vhostfs, "Coherent caches".
 *
 * A reply with an old state may come after the element that speaks of the
 * change, or may be in the hands of a task that has not put it into the caches
 * yet. So:
 *
 *  - no reply to a request that was sent before an element about the same
 *    object was acted on gets any time: who uses it asks again;
 *  - tasks that have their reply already hold the lock of the directory in which
 *    they look something up, and that of the inode whose attributes they set.
 *    Entries are dropped under the one; where the other is taken, or the object
 *    is not here (yet), the element is acted on again a little later;
 *  - attributes have versions, and pages that are being read are locked. An inode
 *    that is being made has none yet: see vhostfs_doubt_news().
 *
 * Of what this guest changes itself no element comes: see vhostfs_own_change().
 */

#include <linux/dcache.h>
#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/highmem.h>
#include "vhostfs_internal.h"

#define VHOSTFS_AGAIN_WAIT	msecs_to_jiffies(4)
/* For a task to put into the caches what it has in its hands */
#define VHOSTFS_AGAIN_FOR	(HZ / 2)

bool vhostfs_is_coherent(const struct vhostfs_notify *n)
{
	return READ_ONCE(n->granted) & FUSE_FSNOTIFY_INVALIDATE;
}

/* A connection begins, and with it the numbers of its requests */
void vhostfs_reset_coherence(struct vhostfs_notify *n)
{
	atomic64_set(&n->last_sent, 0);
	n->touched_any = 0;
	n->touched_all = 0;
#if VHOSTFS_KERNEL < 612
	n->doubted = 0;
#endif
	memset(n->touched, 0, sizeof(n->touched));
	memset(n->again, 0, sizeof(n->again));
	n->lose_again = false;
	vhostfs_reset_opens(n);
}

/* ---- replies that were sent for before ------------------------------------------- */

static u64 *vhostfs_touched(struct vhostfs_notify *n, u64 nodeid)
{
	return &n->touched[hash_64(nodeid, VHOSTFS_TOUCHED_BITS)];
}

/* Two workers do it */
static void vhostfs_raise_number(u64 *number, u64 to)
{
	u64 old = READ_ONCE(*number);

	while (old < to && !try_cmpxchg64(number, &old, to))
		;
}

/* All that was sent until now may be answered with what is no longer right */
static void vhostfs_touch(struct vhostfs_notify *n, u64 *which)
{
	u64 sent = atomic64_read(&n->last_sent);

	vhostfs_raise_number(which, sent);
	vhostfs_raise_number(&n->touched_any, sent);
	/* Before the caches are looked at; see vhostfs_notify_reply() */
	smp_mb();
}

bool vhostfs_is_old(struct vhostfs_notify *n, u64 unique, u64 nodeid)
{
	return unique <= READ_ONCE(n->touched_all) ||
	       unique <= READ_ONCE(*vhostfs_touched(n, nodeid));
}

/*
 * An element is about an object that is not here. A task may be making its inode
 * of an answer from before, as long as that takes it: its attributes count for
 * nothing then. The FUSE core has that for inodes that were evicted meanwhile;
 * before it had, vhostfs_probe.c sees what is made. An inode that was made before
 * this is found afterwards.
 */
static void vhostfs_doubt_news(struct vhostfs_notify *n, struct fuse_conn *fc)
{
#if VHOSTFS_KERNEL < 612
	vhostfs_raise_number(&n->doubted, atomic64_inc_return(&fc->attr_version));
#else
	atomic64_inc(&fc->evict_ctr);
#endif
	smp_mb();
}

/* An object that an element is about, with a reference, or NULL */
static struct inode *vhostfs_find_touched(struct vhostfs_notify *n,
					  struct fuse_conn *fc, u64 nodeid,
					  u32 generation)
{
	struct inode *inode;

	vhostfs_touch(n, vhostfs_touched(n, nodeid));
	inode = vhostfs_find(fc, nodeid, generation);
	if (inode)
		return inode;
	vhostfs_doubt_news(n, fc);
	return vhostfs_find(fc, nodeid, generation);
}

/* A request is about to be given to the device. True: it has its answer already */
bool vhostfs_notify_sent(struct vhostfs_notify *n,
			 const struct fuse_in_header *in,
			 struct fuse_args *args, bool background)
{
	u64 unique = in->unique, last;

	if (!n)
		return false;
	if (vhostfs_open_sent(n, in, args, background))
		return true;
	last = atomic64_read(&n->last_sent);
	while (last < unique) {
		u64 seen = atomic64_cmpxchg(&n->last_sent, last, unique);

		if (seen == last)
			break;
		last = seen;
	}
	return false;
}

static void vhostfs_no_entry_attr_time(struct fuse_entry_out *out)
{
	out->attr_valid = 0;
	out->attr_valid_nsec = 0;
}

static void vhostfs_no_attr_time(struct fuse_attr_out *out)
{
	out->attr_valid = 0;
	out->attr_valid_nsec = 0;
}

static void vhostfs_shorten_entry(struct vhostfs_notify *n, u64 unique,
				  u64 dir, struct fuse_entry_out *out)
{
	if (vhostfs_is_old(n, unique, dir)) {
		out->entry_valid = 0;
		out->entry_valid_nsec = 0;
	}
	if (out->nodeid && vhostfs_is_old(n, unique, out->nodeid))
		vhostfs_no_entry_attr_time(out);
}

static struct page *vhostfs_reply_page(struct fuse_args_pages *ap,
				       unsigned int i)
{
#if VHOSTFS_KERNEL < 610
	return i < ap->num_pages ? ap->pages[i] : NULL;
#else
	return i < ap->num_folios ? folio_page(ap->folios[i], 0) : NULL;
#endif
}

/* Between a reply in pages, one after the other, and @buf; false: not all is there */
static bool vhostfs_copy_reply(struct fuse_args_pages *ap, size_t offset,
			       void *buf, size_t len, bool to_reply)
{
	while (len) {
		struct page *page = vhostfs_reply_page(ap, offset / PAGE_SIZE);
		size_t part = min(len, PAGE_SIZE - offset_in_page(offset));
		void *at;

		if (!page)
			return false;
		at = kmap_local_page(page);
		if (to_reply)
			memcpy(at + offset_in_page(offset), buf, part);
		else
			memcpy(buf, at + offset_in_page(offset), part);
		kunmap_local(at);
		offset += part;
		buf += part;
		len -= part;
	}
	return true;
}

static void vhostfs_shorten_listing(struct vhostfs_notify *n, u64 unique,
				    u64 dir, struct fuse_args *args)
{
	struct fuse_args_pages *ap = container_of(args, typeof(*ap), args);
	size_t offset = 0, left = args->out_args[args->out_numargs - 1].size;
	struct fuse_direntplus entry;
	size_t size;

	while (left >= FUSE_NAME_OFFSET_DIRENTPLUS &&
	       vhostfs_copy_reply(ap, offset, &entry,
				  FUSE_NAME_OFFSET_DIRENTPLUS, false)) {
		size = FUSE_DIRENTPLUS_SIZE(&entry);
		if (entry.dirent.namelen > NAME_MAX || size > left)
			break;
		vhostfs_shorten_entry(n, unique, dir, &entry.entry_out);
		vhostfs_copy_reply(ap, offset, &entry.entry_out,
				   sizeof(entry.entry_out), true);
		offset += size;
		left -= size;
	}
}

/* All that is kept, a little later */
static void vhostfs_lose_later(struct vhostfs_notify *n)
{
	WRITE_ONCE(n->lose_again, true);
	queue_delayed_work(vhostfs_wq, &n->again_work, VHOSTFS_AGAIN_WAIT);
}

/* ---- this guest's own changes ------------------------------------------------------ */

struct vhostfs_aged {
	u64 nodeid;
	bool hold;
	unsigned int count;	/* superblocks that have it */
	struct inode *inode;	/* the first, with a reference, if that was asked for */
};

/* With the lock of all inodes */
#if VHOSTFS_KERNEL < 700
static int vhostfs_age_found(struct inode *inode, unsigned long hash, void *arg)
#else
static int vhostfs_age_found(struct inode *inode, u64 hash, void *arg)
#endif
{
	struct vhostfs_aged *aged = arg;

	if (get_node_id(inode) != aged->nodeid)
		return 0;
	vhostfs_age(inode);
	if (!aged->count++ && aged->hold)
		aged->inode = igrab(inode);
	return -1;
}

/* Waits for nobody: who waits for that inode to go may wait for this answer */
static void vhostfs_age_all(struct fuse_conn *fc, struct vhostfs_aged *aged)
{
	struct fuse_mount *fm;

	lockdep_assert_held_read(&fc->killsb);
	list_for_each_entry(fm, &fc->mounts, fc_entry)
		if (fm->sb)
			find_inode_nowait(fm->sb, aged->nodeid,
					  vhostfs_age_found, aged);
}

static void vhostfs_age_nodeid(struct fuse_conn *fc, u64 nodeid)
{
	struct vhostfs_aged aged = { .nodeid = nodeid };

	vhostfs_age_all(fc, &aged);
}

/*
 * What has the name that is being changed, and its directory. False: it is not
 * known what that is. A submount may be mounted twice, and only what is in use
 * by who makes the change may be let go of here: a reference that is the last
 * waits for pages, and these for answers.
 */
static bool vhostfs_age_entry(struct fuse_conn *fc, u64 nodeid,
			      const struct fuse_in_arg *name)
{
	struct vhostfs_aged aged = { .nodeid = nodeid, .hold = true };
	struct dentry *entry = NULL;
	bool known;

	vhostfs_age_all(fc, &aged);
	if (aged.inode && aged.count == 1)
		entry = vhostfs_lookup_cached(aged.inode, name->value,
					      name->size - 1);
	known = entry && d_really_is_positive(entry);
	if (known)
		vhostfs_age(d_inode(entry));
	dput(entry);
	iput(aged.inode);
	return known;
}

/*
 * This guest has changed what the FUSE core will ask for again. It only notes
 * that, and a task with an answer from before the change would say otherwise, for
 * as long as the answer lasts. So the new version comes before it is noted. Who
 * has made the change waits for this, and all that is named here is in use.
 */
static bool vhostfs_own_change(struct fuse_conn *fc,
			       const struct fuse_in_header *in,
			       const struct fuse_args *args)
{
	const struct fuse_rename2_in *rename = args->in_args[0].value;
	bool known;

	if (in->opcode != FUSE_RENAME && in->opcode != FUSE_RENAME2) {
		vhostfs_age_nodeid(fc, in->nodeid);
		return true;
	}
	known = vhostfs_age_entry(fc, in->nodeid, &args->in_args[1]);
	if (in->opcode == FUSE_RENAME2 && (rename->flags & RENAME_EXCHANGE))
		return vhostfs_age_entry(fc, rename->newdir,
					 &args->in_args[2]) && known;
	vhostfs_age_nodeid(fc, rename->newdir);
	return known;
}

/* Those after which the FUSE core only notes it */
static bool vhostfs_is_change(u32 opcode)
{
	switch (opcode) {
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_SYMLINK:
	case FUSE_LINK:
	case FUSE_CREATE:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_SETXATTR:
	case FUSE_REMOVEXATTR:
	case FUSE_FALLOCATE:
	case FUSE_WRITE:
		return true;
	default:
		return false;
	}
}

static void vhostfs_note_own_change(struct vhostfs_notify *n,
				    struct fuse_conn *fc,
				    const struct fuse_in_header *in,
				    const struct fuse_args *args)
{
	bool known = false;

	if (!vhostfs_is_change(in->opcode))
		return;
	/* Who has it may wait for an answer behind this one */
	if (down_read_trylock(&fc->killsb)) {
		known = vhostfs_own_change(fc, in, args);
		up_read(&fc->killsb);
	}
	if (!known)
		vhostfs_lose_later(n);
}

/*
 * An answer, before the FUSE core has it. It gets no time where an element may
 * have said that it is no longer right: one that was acted on since the request
 * was sent. One that comes after this look finds in the caches what was made of
 * the answer, or waits for that.
 */
void vhostfs_notify_reply(struct vhostfs_notify *n, struct fuse_conn *fc,
			  const struct fuse_in_header *in,
			  struct fuse_args *args)
{
	u64 unique = in->unique;

	if (!n)
		return;
	vhostfs_open_answered(n, in, args);
	if (!vhostfs_is_coherent(n))
		return;
	vhostfs_note_own_change(n, fc, in, args);
	/* Of an object that is there, and the FUSE core takes these however old they are */
	if (in->opcode == FUSE_LINK)
		vhostfs_no_entry_attr_time(args->out_args[0].value);
#if VHOSTFS_KERNEL < 612
	if (in->opcode == FUSE_SETATTR)
		vhostfs_no_attr_time(args->out_args[0].value);
#endif
	if (!args->out_numargs || unique > READ_ONCE(n->touched_any))
		return;

	switch (in->opcode) {
	case FUSE_LOOKUP:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_SYMLINK:
	case FUSE_LINK:
	case FUSE_CREATE:
	case FUSE_TMPFILE:
		vhostfs_shorten_entry(n, unique, in->nodeid,
				      args->out_args[0].value);
		break;
	case FUSE_GETATTR:
	case FUSE_SETATTR:
#if VHOSTFS_KERNEL >= 606
	case FUSE_STATX:	/* both begin with the time */
#endif
		if (vhostfs_is_old(n, unique, in->nodeid))
			vhostfs_no_attr_time(args->out_args[0].value);
		break;
	case FUSE_READDIRPLUS:
		if (args->out_pages)
			vhostfs_shorten_listing(n, unique, in->nodeid, args);
		break;
	}
}

/* ---- once more ---------------------------------------------------------------------- */

/* Under event_mutex. The oldest goes, which has had the most time */
static void vhostfs_later(struct vhostfs_notify *n, u64 nodeid, u32 generation,
			  u32 bit)
{
	struct vhostfs_again *again = &n->again[n->next_again];

	n->next_again = (n->next_again + 1) % VHOSTFS_MAX_AGAIN;
	again->nodeid = nodeid;
	again->generation = generation;
	again->bit = bit;
	again->until = jiffies + VHOSTFS_AGAIN_FOR;
	queue_delayed_work(vhostfs_wq, &n->again_work, VHOSTFS_AGAIN_WAIT);
}

/*
 * False: it is not here, or a task that changes its attributes has the lock, and
 * perhaps the answer.
 */
static bool vhostfs_forget_object(struct vhostfs_notify *n, struct inode *inode,
				  u32 bit)
{
	bool locked;

	if (!inode)
		return false;
	/* Who takes it from now on is answered with what is */
	locked = inode_trylock(inode);
	if (locked)
		inode_unlock(inode);
	if (bit == FS_MOVE_SELF)
		vhostfs_stale_inode(n, inode);
	else
		vhostfs_stale_object(n, inode, bit);
	return locked;
}

void vhostfs_again_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(to_delayed_work(work),
						struct vhostfs_notify,
						again_work);
	struct vhostfs_again *again;
	struct inode *inode;
	bool left = false;

	mutex_lock(&n->event_mutex);
	if (n->fc)
		down_read(&n->fc->killsb);
	for (again = n->again; again < n->again + VHOSTFS_MAX_AGAIN; again++) {
		if (!again->nodeid)
			continue;
		inode = n->fc ? vhostfs_find(n->fc, again->nodeid,
					     again->generation) : NULL;
		/* In use, and free of others: that was the last word */
		if (!n->fc || vhostfs_forget_object(n, inode, again->bit) ||
		    (!inode && time_after(jiffies, again->until)))
			again->nodeid = 0;
		else
			left = true;
		iput(inode);
	}
	if (n->fc && n->lose_again) {
		n->lose_again = false;
		vhostfs_lose_caches(n, n->fc);
	}
	if (n->fc)
		up_read(&n->fc->killsb);
	if (left)
		queue_delayed_work(vhostfs_wq, &n->again_work,
				   VHOSTFS_AGAIN_WAIT);
	mutex_unlock(&n->event_mutex);
}

/* ---- what an element says ------------------------------------------------------------ */

static void vhostfs_forget(struct vhostfs_notify *n, struct inode *inode,
			   u64 nodeid, u32 generation, u32 bit)
{
	if (!vhostfs_forget_object(n, inode, bit))
		vhostfs_later(n, nodeid, generation, bit);
}

/*
 * The entry was not unhashed, if a directory is in use there that was found after
 * the event. A task may be about to confirm it that asked before.
 */
static void vhostfs_expire_again(struct vhostfs_notify *n, struct inode *dir,
				 const struct vhostfs_event *event)
{
	struct dentry *entry;
	struct inode *inode;

	if (event->child_nodeid)
		return;
	entry = vhostfs_lookup_cached(dir, event->name, event->namelen);
	if (entry && d_really_is_positive(entry)) {
		inode = d_inode(entry);
		vhostfs_later(n, get_node_id(inode), inode->i_generation,
			      FS_MOVE_SELF);
	}
	dput(entry);
}

/*
 * An element that is for the caches alone has come, and is acted on after those
 * before it. What waits for nobody is done now: acting waits for those who look
 * something up in the directory, and for pages that are being read, each as long
 * as the device takes. Under look_mutex and fc->killsb.
 */
void vhostfs_expire_caches(struct vhostfs_notify *n, struct fuse_conn *fc,
			   const struct vhostfs_event *event)
{
	struct inode *object, *child = NULL;

	object = vhostfs_find_touched(n, fc, event->nodeid, event->generation);
	if (event->child_nodeid)
		child = vhostfs_find_touched(n, fc, event->child_nodeid,
					     event->child_generation);
	if (object && S_ISDIR(object->i_mode) &&
	    (event->mask & VHOSTFS_ENTRY_EVENTS))
		vhostfs_expire_entry(object, event);
	if (object && (!event->namelen || (event->mask & VHOSTFS_ENTRY_EVENTS)))
		vhostfs_expire_object(object, event->mask);
	if (child)
		vhostfs_expire_object(child, event->mask);
	iput(child);
	iput(object);
}

/* The same element in its turn. Under event_mutex and fc->killsb */
void vhostfs_invalidate(struct vhostfs_notify *n, struct fuse_conn *fc,
			const struct vhostfs_event *event)
{
	u32 bit = event->mask & ~FS_ISDIR;
	struct inode *dir, *child;

	vhostfs_count(n, VHOSTFS_INVALIDATED);
	vhostfs_touch(n, vhostfs_touched(n, event->nodeid));
	if (event->child_nodeid)
		vhostfs_touch(n, vhostfs_touched(n, event->child_nodeid));
	vhostfs_forget_open(n, event->nodeid);
	vhostfs_forget_open(n, event->child_nodeid);

	dir = vhostfs_find(fc, event->nodeid, event->generation);
	if (!event->namelen) {
		vhostfs_forget(n, dir, event->nodeid, event->generation, bit);
		iput(dir);
		return;
	}
	if (dir && !S_ISDIR(dir->i_mode)) {
		iput(dir);
		dir = NULL;
	}
	if (event->mask & VHOSTFS_ENTRY_EVENTS) {
		bit = FS_ATTRIB;
		if (dir) {
			iput(vhostfs_stale_entry(dir, event));
			vhostfs_expire_again(n, dir, event);
		}
		/* Its times and links; a setattr may be on its way */
		vhostfs_forget(n, dir, event->nodeid, event->generation, bit);
	}
	child = vhostfs_find_child(fc, dir, event);
	if (event->child_nodeid)
		vhostfs_forget(n, child, event->child_nodeid,
			       event->child_generation, bit);
	if (dir && (event->mask & FS_MOVED_TO))
		vhostfs_follow(dir, child, event);
	iput(child);
	iput(dir);
}

/* ---- everything ------------------------------------------------------------------------ */

static bool vhostfs_is_dir(struct inode *inode, void *arg)
{
	return S_ISDIR(inode->i_mode);
}

static void vhostfs_wait_for_lookups(struct inode *inode, void *arg)
{
	inode_lock_nested(inode, I_MUTEX_PARENT);
	inode_unlock(inode);
}

static bool vhostfs_is_any(struct inode *inode, void *arg)
{
	return true;
}

static void vhostfs_lose_object(struct inode *inode, void *arg)
{
	vhostfs_stale_inode(arg, inode);
}

/* Nothing that is kept can be believed. Under event_mutex and fc->killsb */
void vhostfs_lose_caches(struct vhostfs_notify *n, struct fuse_conn *fc)
{
	struct fuse_mount *fm;

	vhostfs_touch(n, &n->touched_all);
	if (vhostfs_is_coherent(n))
		vhostfs_doubt_news(n, fc);
	vhostfs_forget_opens(n);
#if VHOSTFS_KERNEL >= 616
	/* Every dentry and listing is checked again, those in use, too */
	atomic_inc(&fc->epoch);
#endif
	list_for_each_entry(fm, &fc->mounts, fc_entry) {
		if (!fm->sb)
			continue;
		if (vhostfs_is_coherent(n))
			vhostfs_walk(fm->sb, vhostfs_is_dir,
				     vhostfs_wait_for_lookups, NULL);
		/* Dentries that nobody uses: all the negative ones are such */
		shrink_dcache_sb(fm->sb);
		vhostfs_walk(fm->sb, vhostfs_is_any, vhostfs_lose_object, n);
	}
}

/*
 * The same, and a second time for those who were about to use their answers.
 * Under event_mutex and fc->killsb.
 */
void vhostfs_lose_all(struct vhostfs_notify *n, struct fuse_conn *fc)
{
	vhostfs_lose_caches(n, fc);
	if (!vhostfs_is_coherent(n))
		return;
	vhostfs_lose_later(n);
}

/*
 * The session has begun: what the server gave long times since it granted this
 * may have changed, and its elements were not acted on.
 */
void vhostfs_begin_coherence(struct vhostfs_notify *n)
{
	if (!vhostfs_is_coherent(n))
		return;
	mutex_lock(&n->event_mutex);
	if (n->fc) {
		down_read(&n->fc->killsb);
		vhostfs_lose_all(n, n->fc);
		up_read(&n->fc->killsb);
	}
	mutex_unlock(&n->event_mutex);
}
