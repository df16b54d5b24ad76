// SPDX-License-Identifier: GPL-2.0-only
/*
 * vhostfs: file system notifications from the host for virtio-fs
 *
 * What somebody does to the shared directory on the host reaches inotify and
 * fanotify watchers in this guest: the device puts one element for each event
 * into the buffers of the notification queue or, where the VMM has none, into
 * the answers of requests that are parked at the device. Here it is checked, the caches
 * are brought up to date, and then the event is raised. In the other direction
 * the device is told which inodes are watched.
 *
 * The wire format, its numbers and who may send what when: docs/protocol.md of
 * vhostfs. This file knows virtio_fs.c only by the hooks of vhostfs_notify.h,
 * and uses nothing of fs/fuse and fs/notify but what those export.
 *
 * Locks, outermost first:
 *
 *   session_mutex   FUSE_FSNOTIFY_INIT and WATCH requests are being sent
 *   event_mutex     one element is acted on
 *   fc->killsb      (read) no superblock of the connection goes away
 *   i_rwsem, s_inode_list_lock, connector lock
 *   share->lock     directories that are held
 *   watch_lock      the table of watches; also taken by the probes
 *   vq_lock         queue 1, and which requests are parked (on its own)
 *   fsvq->lock      of virtio_fs.c: the request queue
 *   answered_lock   parked requests that were answered
 *
 * The worker that acts on elements may wait for replies of the device, for it
 * takes inode locks that tasks hold meanwhile. The device answers requests
 * independently of notifications, so these waits end.
 */
#define pr_fmt(fmt) "vhostfs: " fmt

#include <linux/dcache.h>
#include <linux/exportfs.h>
#include <linux/fanotify.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/fsnotify.h>
#include <linux/iversion.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/namei.h>
#include <linux/pagemap.h>
#include <linux/posix_acl.h>
#include <linux/rbtree.h>
#include <linux/rcupdate.h>
#include <linux/statfs.h>
#include <linux/task_work.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include "fuse_i.h"
#include "vhostfs_notify.h"

/* VHOSTFS_KERNEL is 100 * VERSION + PATCHLEVEL of the kernel; Kbuild sets it */

/* ---- what is on the wire -------------------------------------------------- */

#define VHOSTFS_CONFIG_BUF_SIZE	40	/* le32 notify_buf_size */

#define FUSE_NOTIFY_FSNOTIFY	0x5800
#define FUSE_FSNOTIFY_INIT	0x5800
#define FUSE_FSNOTIFY_WATCH	0x5801
#define FUSE_FSNOTIFY_PARK	0x5802

#define FUSE_FSNOTIFY_MAJOR	1
#define FUSE_FSNOTIFY_MINOR	0

/* Flags of FUSE_FSNOTIFY_INIT */
#define FUSE_FSNOTIFY_VIRTQUEUE	BIT_ULL(0)
#define FUSE_FSNOTIFY_PARKED	BIT_ULL(1)
#define FUSE_FSNOTIFY_RENAME	BIT_ULL(3)
#define FUSE_FSNOTIFY_CHILD	BIT_ULL(4)
#define FUSE_FSNOTIFY_WATCH_FILESYSTEM BIT_ULL(6)

/* Flags of FUSE_FSNOTIFY_WATCH */
#define FSNOTIFY_WATCH_FILESYSTEM BIT(0)

/* Flags of an element */
#define FSNOTIFY_SPLIT_RENAME	BIT(0)

struct fuse_fsnotify_init_in {
	__le32 major;
	__le32 minor;
	__le64 flags;
	__le64 mask;
	__le32 buf_size;
	__le32 reserved;
};

struct fuse_fsnotify_init_out {
	__le32 major;
	__le32 minor;
	__le64 flags;
	__le64 mask;
	__le32 notify_buf_size;
	__le32 max_watches;
	__le32 max_parked;
	__le32 reserved;
};

struct fuse_fsnotify_watch_in {
	__le64 mask;
	__le32 generation;
	__le32 flags;
};

struct vhostfs_wire_element {
	/* fuse_out_header */
	__le32 len;
	__le32 error;
	__le64 unique;

	__le64 nodeid;
	__le32 generation;
	__le32 reserved;
	__le64 mask;
	__le32 namelen;
	__le32 cookie;
	__le32 flags;
	__le32 child_generation;
	__le64 child_nodeid;
	char name[];
};

#define VHOSTFS_MIN_BUF_SIZE	sizeof(struct vhostfs_wire_element)
#define VHOSTFS_MAX_BUF_SIZE	4096
/* Room for the longest name; buffers are never smaller */
#define VHOSTFS_ELEMENT_SIZE	320

/* Events in a directory's listing; an element carries one of them */
#define VHOSTFS_ENTRY_EVENTS	(FS_CREATE | FS_DELETE | FS_MOVED_FROM | \
				 FS_MOVED_TO)
/* Events on an object, which watchers of its parent get as well */
#define VHOSTFS_CHILD_EVENTS	(FS_ACCESS | FS_MODIFY | FS_ATTRIB | \
				 FS_CLOSE_WRITE | FS_CLOSE_NOWRITE | \
				 FS_OPEN | FS_OPEN_EXEC)
/* Events that only watchers of the object itself get */
#define VHOSTFS_SELF_EVENTS	(FS_MOVE_SELF | FS_DELETE_SELF)
#define VHOSTFS_EVENTS		(VHOSTFS_ENTRY_EVENTS | VHOSTFS_CHILD_EVENTS | \
				 VHOSTFS_SELF_EVENTS)

/* What a driver that holds all directories has to hear of */
#define VHOSTFS_TREE_EVENTS	(VHOSTFS_ENTRY_EVENTS | FS_DELETE_SELF | \
				 FS_EVENT_ON_CHILD)

/* ---- state ------------------------------------------------------------------ */

#define VHOSTFS_MAX_BUFFERS	256
#define VHOSTFS_MAX_PARKED	64
#define VHOSTFS_PARKED_SHARE	8	/* of the ring: one in so many */
#define VHOSTFS_PARK_WAIT	(HZ / 4)	/* after the device sent some back */
#define VHOSTFS_PARK_UNIQUE	BIT_ULL(62)	/* the FUSE core does not get there */
#define VHOSTFS_BATCH		16	/* elements copied before acting */
#define VHOSTFS_BATCHES		8	/* of them in one run of the worker */
#define VHOSTFS_MAX_HALVES	64
#define VHOSTFS_HALF_WAIT	HZ
#define VHOSTFS_MAX_COOKIES	64
#define VHOSTFS_WATCHES_IN_FLIGHT 8
#define VHOSTFS_SETTLE_WAIT	HZ
#define VHOSTFS_REPAIR_WAIT	HZ
#define VHOSTFS_RETRIES		1024	/* of refused watches, in that time */
#define VHOSTFS_MAX_TRIES	6U	/* of FUSE_FSNOTIFY_INIT, for the wait */
#define VHOSTFS_MAX_GROUPS	64
#define VHOSTFS_WALK_WAIT	(10 * HZ)
#define VHOSTFS_READDIR_SIZE	8192
#define VHOSTFS_MAX_RECENT	1024
#define VHOSTFS_MAX_MOUNT_MARKS	64

/* An element that was checked, in the CPU's byte order */
struct vhostfs_event {
	u64 nodeid;
	u64 child_nodeid;
	u32 generation;
	u32 child_generation;
	u32 mask;
	u32 cookie;
	u32 flags;
	u32 namelen;
	char name[NAME_MAX + 1];	/* NUL at the end: inotify copies strings */
};

/*
 * A request that waits at the device to be answered with an element. It is none
 * of the FUSE core's: nothing waits for it and nothing times it out.
 */
struct vhostfs_parked {
	struct list_head list;		/* on ->unposted or ->answered, or posted */
	u64 unique;
	unsigned int len;		/* of the answer */
	struct fuse_in_header in;
	/* The device's while it is posted */
	u8 out[VHOSTFS_ELEMENT_SIZE] ____cacheline_aligned;
};

/* Half of a rename, waiting for the other */
struct vhostfs_half {
	struct list_head list;
	unsigned long arrived;
	struct vhostfs_event event;
};

/* What the device is told about one inode */
struct vhostfs_watch {
	struct rb_node node;		/* by nodeid */
	struct list_head changed;	/* on ->changed while mask != told */
	u64 nodeid;
	u32 generation;
	u32 mask;			/* what is wanted now */
	u32 told;			/* what the device surely reports */
	u32 pass;			/* of the last walk that saw it */
	bool sending;
	bool refused;			/* the device does not want ->mask */
};

/*
 * A superblock with marks on it: everything there is watched, and every
 * directory is held.
 */
struct vhostfs_share {
	struct fsnotify_mark mark;	/* ours; its references are this one's */
	struct list_head list;		/* on ->shares, under session_mutex */
	struct vhostfs_notify *notify;	/* referenced */
	struct super_block *sb;
	struct work_struct walk_work;
	spinlock_t lock;		/* what follows */
	bool open;			/* directories are being held */
	struct rb_root held;		/* by the inode's address */
	struct list_head unread;	/* those that the walk has not been to */
};

struct vhostfs_held {
	struct rb_node node;
	struct list_head unread;
	struct inode *inode;		/* referenced */
};

/* A mark on a mount, which cannot be found when an event comes */
struct vhostfs_mount_mark {
	struct list_head list;
	struct fsnotify_mark *mark;	/* referenced */
	struct super_block *sb;
};

enum vhostfs_session {
	VHOSTFS_NONE,			/* not mounted */
	VHOSTFS_NEW,			/* FUSE_FSNOTIFY_INIT is to be sent */
	VHOSTFS_ASKED,
	VHOSTFS_ANSWERED,		/* elements of before may be there */
	VHOSTFS_GRANTED,
	VHOSTFS_REFUSED,
};

enum vhostfs_counter {
	VHOSTFS_RECEIVED,
	VHOSTFS_RAISED,
	VHOSTFS_STALE,
	VHOSTFS_MALFORMED,
	VHOSTFS_OVERFLOWS,
	VHOSTFS_HALVES_TIMED_OUT,
	VHOSTFS_WATCHES_SENT,
	VHOSTFS_WATCHES_REFUSED,
	VHOSTFS_RESYNCS,
	VHOSTFS_NR_COUNTERS,
};

struct vhostfs_notify {
	struct kref kref;
	struct list_head list;		/* on vhostfs_devices */
	struct virtio_device *vdev;
	bool has_attrs;
	atomic64_t counters[VHOSTFS_NR_COUNTERS];

	/* Queue 1 */
	spinlock_t vq_lock;		/* calls for vq, and running */
	struct virtqueue *vq;
	bool running;			/* vq may be used */
	unsigned int buf_size;
	unsigned int nbufs;
	void **bufs;
	bool has_queue;

	/* Parked requests, where there is no queue 1; under vq_lock */
	struct vhostfs_parked *parked;
	struct virtqueue *parked_vq;
	unsigned int nparked;
	unsigned int max_parked;	/* what the server allows, 0: nothing */
	unsigned int nposted;
	u64 next_unique;
	struct list_head unposted;
	struct delayed_work park_work;
	spinlock_t answered_lock;	/* the list */
	struct list_head answered;	/* in order */

	struct work_struct receive_work;
	struct delayed_work half_work;

	/* Of the receiving worker; the session's under event_mutex as well */
	struct mutex event_mutex;
	struct fuse_conn *fc;		/* also under session_mutex */
	unsigned int nhalves;
	struct list_head halves;	/* oldest first */
	struct {
		u32 wire;
		u32 local;
	} cookies[VHOSTFS_MAX_COOKIES];
	unsigned int next_cookie;
	struct vhostfs_event event;
	struct inode *recent[VHOSTFS_MAX_RECENT];	/* referenced, or NULL */
	unsigned int next_recent;
	struct inode unknown_inode;	/* see vhostfs_raise_child() */
	struct dentry unknown_dentry;	/* see vhostfs_stand_in() */
	struct dentry unknown_parent;	/* see vhostfs_raise_rename() */
	unsigned int batch_len[VHOSTFS_BATCH];
	u8 batch[VHOSTFS_BATCH][VHOSTFS_ELEMENT_SIZE] __aligned(8);

	/* Session and watches */
	struct mutex session_mutex;
	struct delayed_work session_work;
	unsigned int paused;
	unsigned int tries;		/* of FUSE_FSNOTIFY_INIT, in vain */
	atomic_t in_flight;
	wait_queue_head_t idle;
	spinlock_t watch_lock;		/* what follows */
	enum vhostfs_session session;
	struct rb_root watches;
	struct list_head changed;
	unsigned int nwatches;		/* in the table */
	unsigned int sending;
	unsigned int pass;
	unsigned int nrefused;
	bool resync;			/* a walk is due, not before: */
	unsigned long next_resync;
	bool retry;			/* what was refused; not before: */
	unsigned long next_retry;
	bool full_logged;
	unsigned int shares_changed;	/* counted by the probes */
	unsigned int shares_done;	/* how far the worker has come */
	bool walk_again;
	struct list_head mount_marks;
	unsigned int nmount_marks;
	wait_queue_head_t settled;

	/* Whole superblocks, under session_mutex */
	u64 granted;			/* flags of FUSE_FSNOTIFY_INIT */
	struct list_head shares;
	u32 share_mask;			/* what the device was last told */
	bool share_refused;
	bool held_full_logged;
	bool fid_wanted;		/* somebody wants objects by handle */
	atomic_t nheld;
	atomic_t nunread;
};

/* A request of ours to the device */
struct vhostfs_request {
	struct fuse_args args;
	struct vhostfs_notify *notify;
	void (*end)(struct vhostfs_request *req, int error);
	struct vhostfs_watch *watch;
	u32 mask;
	u32 told;			/* of the watch, before this */
	struct completion *done;
	int error;
	union {
		struct fuse_fsnotify_init_in init_in;
		struct fuse_fsnotify_watch_in watch_in;
		struct fuse_getattr_in getattr_in;
		struct fuse_open_in open_in;
		struct fuse_read_in read_in;
		struct fuse_release_in release_in;
	};
	union {
		struct fuse_fsnotify_init_out init_out;
		struct fuse_open_out open_out;
		struct fuse_attr_out getattr_out;
	};
};

static unsigned int queue_buffers = VHOSTFS_MAX_BUFFERS;
module_param(queue_buffers, uint, 0444);
MODULE_PARM_DESC(queue_buffers,
		 "Most buffers to keep in a notification queue (1 to 256)");

static bool sync_watches = true;
module_param(sync_watches, bool, 0644);
MODULE_PARM_DESC(sync_watches,
		 "A task that adds a watch continues when the host watches, too (at most 1 s later)");

static bool ignore_probes;
module_param(ignore_probes, bool, 0644);
MODULE_PARM_DESC(ignore_probes,
		 "For tests: behave as if every probe was missed");

static unsigned int max_directories = 524288;
module_param(max_directories, uint, 0644);
MODULE_PARM_DESC(max_directories,
		 "Most directories to hold for marks on the file system");

static struct workqueue_struct *vhostfs_wq;
static DEFINE_MUTEX(vhostfs_devices_mutex);
static LIST_HEAD(vhostfs_devices);
static struct fsnotify_group *vhostfs_group;
static struct fsnotify_group *vhostfs_share_group;
static const struct file_system_type *vhostfs_type;
static bool vhostfs_no_probes;

static inline void vhostfs_count(struct vhostfs_notify *n,
				 enum vhostfs_counter counter)
{
	atomic64_inc(&n->counters[counter]);
}

static void vhostfs_free_watches(struct vhostfs_notify *n);
static void vhostfs_walk_again(struct vhostfs_notify *n);
static void vhostfs_free_halves(struct vhostfs_notify *n);

static void vhostfs_release(struct kref *kref)
{
	struct vhostfs_notify *n = container_of(kref, struct vhostfs_notify,
						kref);

	vhostfs_free_halves(n);
	vhostfs_free_watches(n);
	kfree(n);
}

static void vhostfs_put(struct vhostfs_notify *n)
{
	kref_put(&n->kref, vhostfs_release);
}

/* ---- requests --------------------------------------------------------------- */

#if VHOSTFS_KERNEL < 700
static void vhostfs_request_end(struct fuse_mount *fm, struct fuse_args *args,
				int error)
#else
static void vhostfs_request_end(struct fuse_args *args, int error)
#endif
{
	struct vhostfs_request *req = container_of(args,
						   struct vhostfs_request,
						   args);
	struct vhostfs_notify *n = req->notify;
	bool counted = !req->done;

	req->end(req, error);
	if (counted && atomic_dec_and_test(&n->in_flight))
		wake_up_all(&n->idle);
	vhostfs_put(n);
}

/*
 * Sends a request whose nodeid, opcode and arguments are filled in. Its end()
 * is called in any case, and frees it. May wait, until FUSE_INIT was answered
 * and while many requests are in the background.
 */
static void vhostfs_send(struct vhostfs_notify *n, struct fuse_mount *fm,
			 struct vhostfs_request *req)
{
	int err;

	req->notify = n;
	req->args.end = vhostfs_request_end;
	kref_get(&n->kref);
	/* What somebody waits for is over when he goes on */
	if (!req->done)
		atomic_inc(&n->in_flight);
	err = fuse_simple_background(fm, &req->args, GFP_KERNEL);
	if (err) {
#if VHOSTFS_KERNEL < 700
		vhostfs_request_end(fm, &req->args, err);
#else
		vhostfs_request_end(&req->args, err);
#endif
	}
}

static struct vhostfs_request *vhostfs_new_request(u32 opcode, u64 nodeid,
						   size_t in_size,
						   size_t out_size)
{
	struct vhostfs_request *req = kzalloc(sizeof(*req), GFP_KERNEL);

	if (!req)
		return NULL;
	req->args.opcode = opcode;
	req->args.nodeid = nodeid;
	req->args.in_numargs = 1;
	req->args.in_args[0].size = in_size;
	req->args.in_args[0].value = &req->init_in;
	if (out_size) {
		req->args.out_numargs = 1;
		req->args.out_args[0].size = out_size;
		req->args.out_args[0].value = &req->init_out;
	}
	return req;
}

/* ---- objects ---------------------------------------------------------------- */

static int vhostfs_inode_eq(struct inode *inode, void *nodeid)
{
	return get_node_id(inode) == *(u64 *)nodeid;
}

/*
 * The inode with this identity in any superblock of the connection, with a
 * reference, or NULL. The caller holds fc->killsb. A mount point of a submount
 * is not in the inode hash, so a nodeid is found once.
 */
static struct inode *vhostfs_find(struct fuse_conn *fc, u64 nodeid,
				  u32 generation)
{
	struct fuse_mount *fm;
	struct inode *inode;

	lockdep_assert_held_read(&fc->killsb);
	list_for_each_entry(fm, &fc->mounts, fc_entry) {
		if (!fm->sb)
			continue;
		inode = ilookup5(fm->sb, nodeid, vhostfs_inode_eq, &nodeid);
		if (!inode)
			continue;
		if (inode->i_generation == generation && !fuse_is_bad(inode))
			return inode;
		iput(inode);
	}
	return NULL;
}

/* A dentry of this directory, as good as any; NULL without memory */
static struct dentry *vhostfs_any_alias(struct inode *dir)
{
	struct dentry *alias = d_find_any_alias(dir);

	if (alias)
		return alias;
	ihold(dir);
	alias = d_obtain_alias(dir);
	return IS_ERR(alias) ? NULL : alias;
}

/* The object of a name as the device has it now, with a reference, or NULL */
static struct inode *vhostfs_look_up(struct inode *dir, const char *name,
				     unsigned int namelen)
{
	struct dentry *parent = vhostfs_any_alias(dir), *entry;
	struct inode *inode = NULL;

	if (!parent)
		return NULL;
#if VHOSTFS_KERNEL < 700
	entry = lookup_one_len_unlocked(name, parent, namelen);
#else
	entry = lookup_noperm_unlocked(&QSTR_LEN(name, namelen), parent);
#endif
	if (!IS_ERR(entry)) {
		if (d_really_is_positive(entry))
			inode = igrab(d_inode(entry));
		dput(entry);
	}
	dput(parent);
	return inode;
}

/*
 * The walk of a superblock's inodes. look() is called for every inode with
 * s_inode_list_lock held; when it returns true, act() is called without it and
 * with a reference. Every now and then the lock is given up in any case. An
 * inode that is being made is nobody's yet.
 */
#define VHOSTFS_LOOKS	1024

static bool vhostfs_is_new(const struct inode *inode)
{
#if VHOSTFS_KERNEL < 619
	return READ_ONCE(inode->i_state) & I_NEW;
#else
	return inode_state_read_once((struct inode *)inode) & I_NEW;
#endif
}

static void vhostfs_walk(struct super_block *sb,
			 bool (*look)(struct inode *inode, void *arg),
			 void (*act)(struct inode *inode, void *arg), void *arg)
{
	struct inode *inode, *held = NULL;
	unsigned int looks = 0;
	bool wanted;

	spin_lock(&sb->s_inode_list_lock);
	list_for_each_entry(inode, &sb->s_inodes, i_sb_list) {
		wanted = !vhostfs_is_new(inode) && look(inode, arg);
		if (!wanted && ++looks % VHOSTFS_LOOKS)
			continue;
		/* The reference keeps our place in the list */
		if (!igrab(inode))
			continue;
		spin_unlock(&sb->s_inode_list_lock);
		iput(held);
		held = inode;
		if (wanted)
			act(inode, arg);
		cond_resched();
		spin_lock(&sb->s_inode_list_lock);
	}
	spin_unlock(&sb->s_inode_list_lock);
	iput(held);
}

/* ---- caches ------------------------------------------------------------------ */

/*
 * Attributes. The new version makes the FUSE core drop the attributes in
 * replies to requests that were sent before now, which may be older than the
 * event.
 */
static void vhostfs_stale_attr(struct inode *inode, u32 mask)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct fuse_conn *fc = get_fuse_conn(inode);

	spin_lock(&fi->lock);
	fi->attr_version = atomic64_inc_return(&fc->attr_version);
	spin_unlock(&fi->lock);
	set_mask_bits(&fi->inval_mask, 0, mask);
	forget_all_cached_acls(inode);
}

static void vhostfs_wake(struct vhostfs_request *req, int error)
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
static struct vhostfs_request *vhostfs_getattr(struct vhostfs_notify *n,
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
static void vhostfs_stale_object(struct vhostfs_notify *n, struct inode *inode,
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
static void vhostfs_expire_dentry(struct dentry *dentry)
{
	/* In all kernels the time comes first of what d_fsdata stands for */
#if VHOSTFS_KERNEL < 618 && BITS_PER_LONG >= 64
	dentry->d_fsdata = NULL;
#else
	*(u64 *)dentry->d_fsdata = 0;
#endif
}

static struct dentry *vhostfs_lookup_cached(struct inode *dir,
					    const struct vhostfs_event *event)
{
	struct qstr name = { .name = event->name, .len = event->namelen };
	struct dentry *alias = d_find_any_alias(dir);
	struct dentry *entry;

	if (!alias)
		return NULL;
	name.hash = full_name_hash(alias, event->name, event->namelen);
	entry = d_lookup(alias, &name);
	dput(alias);
	return entry;
}

/* Is this the inode of the event's child? */
static bool vhostfs_is_object(const struct inode *inode,
			      const struct vhostfs_event *event)
{
	return event->child_nodeid == get_node_id((struct inode *)inode) &&
	       event->child_generation == inode->i_generation;
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
static struct inode *vhostfs_stale_entry(struct inode *dir,
					 const struct vhostfs_event *event)
{
	bool gone = event->mask & (FS_DELETE | FS_MOVED_FROM);
	struct inode *inode, *former = NULL;
	struct dentry *entry;
	bool same;

	inode_lock_nested(dir, I_MUTEX_PARENT);
	vhostfs_stale_attr(dir, STATX_BASIC_STATS);
	inode_maybe_inc_iversion(dir, false);
	entry = vhostfs_lookup_cached(dir, event);
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

/*
 * The object of an event in a directory. If it is not there it may be about to
 * come: a LOOKUP that was sent before the event was, and would fill in what
 * was true then. The directory's lock waits for it.
 */
static struct inode *vhostfs_find_child(struct fuse_conn *fc, struct inode *dir,
					const struct vhostfs_event *event)
{
	struct inode *child;

	if (!event->child_nodeid)
		return NULL;
	child = vhostfs_find(fc, event->child_nodeid, event->child_generation);
	if (child || !dir)
		return child;
	inode_lock_nested(dir, I_MUTEX_PARENT);
	inode_unlock(dir);
	return vhostfs_find(fc, event->child_nodeid, event->child_generation);
}

/*
 * A file handle in an event leads to its object as long as this guest keeps
 * that in memory: once it is forgotten, the device knows it by another number.
 * So the last ones stay for a while.
 */
static void vhostfs_remember(struct vhostfs_notify *n, struct inode *inode)
{
	struct inode **place = &n->recent[n->next_recent];
	unsigned int i;

	if (!READ_ONCE(n->fid_wanted))
		return;
	for (i = 0; i < VHOSTFS_MAX_RECENT; i++)
		if (n->recent[i] == inode)
			return;
	iput(*place);
	*place = igrab(inode);
	n->next_recent = (n->next_recent + 1) % VHOSTFS_MAX_RECENT;
}

/* Of one superblock, or of all, or one object that is gone. Under event_mutex */
static void vhostfs_forget_recent(struct vhostfs_notify *n,
				  const struct super_block *sb,
				  const struct inode *inode)
{
	unsigned int i;

	for (i = 0; i < VHOSTFS_MAX_RECENT; i++) {
		if (!n->recent[i] || (sb && n->recent[i]->i_sb != sb) ||
		    (inode && n->recent[i] != inode))
			continue;
		iput(n->recent[i]);
		n->recent[i] = NULL;
	}
}

/*
 * The object of a name in an event, which this guest does not know. It is asked
 * for where that matters: a directory that came has to be held before the next
 * event, which may be about what is in it; and who wants objects by handle
 * wants them of those, too.
 */
static struct inode *vhostfs_meet(struct vhostfs_notify *n, struct inode *dir,
				  const struct vhostfs_event *event)
{
	bool is_dir = (event->mask & FS_ISDIR) && READ_ONCE(n->share_mask);
	struct inode *child;

	if ((!is_dir && !READ_ONCE(n->fid_wanted)) ||
	    (event->mask & (FS_DELETE | FS_MOVED_FROM)))
		return NULL;
	child = vhostfs_look_up(dir, event->name, event->namelen);
	if (!child)
		return NULL;
	/* The name may have been given to another since */
	if (!event->child_nodeid ? !(event->mask & FS_ISDIR) ==
				   !S_ISDIR(child->i_mode) :
	    event->child_nodeid == get_node_id(child) &&
	    event->child_generation == child->i_generation)
		return child;
	iput(child);
	return NULL;
}

/*
 * A directory has a new name. Events of its own come without one, and are told
 * to watchers of its parent by the dentry; so that is moved, by a lookup. Who
 * is in the directory, or has mounted something below it, keeps that.
 */
static void vhostfs_follow(struct inode *dir, const struct inode *child,
			   const struct vhostfs_event *event)
{
	if (child && S_ISDIR(child->i_mode) && child->i_sb == dir->i_sb &&
	    (event->mask & FS_MOVED_TO))
		iput(vhostfs_look_up(dir, event->name, event->namelen));
}

/* ---- raising ------------------------------------------------------------------ */

static inline u32 vhostfs_isdir(const struct inode *inode)
{
	return inode && S_ISDIR(inode->i_mode) ? FS_ISDIR : 0;
}

/*
 * fsnotify() wants to be told the superblock and, in a rename, the new name by
 * a dentry. This one is in no tree: it is only looked at while the event is
 * raised, and what is of use is copied. One is enough, for one worker raises.
 */
static struct dentry *vhostfs_stand_in(struct vhostfs_notify *n,
				       struct inode *dir, struct dentry *parent,
				       struct inode *inode,
				       const struct qstr *name)
{
	struct dentry *dentry = &n->unknown_dentry;

	dentry->d_sb = dir->i_sb;
	dentry->d_parent = parent ? parent : dentry;
	dentry->d_inode = inode;
#if VHOSTFS_KERNEL < 616
	dentry->d_name = *name;
#else
	dentry->__d_name = *name;
#endif
	return dentry;
}

/* Whether the mark is one of a watcher that is still there */
static bool vhostfs_is_attached(const struct fsnotify_mark *mark)
{
	return READ_ONCE(mark->flags) & FSNOTIFY_MARK_FLAG_ATTACHED;
}

/* Can its group be told of what happened by no mount of this guest? */
static bool vhostfs_reports_fids(const struct fsnotify_group *group)
{
	return group->fanotify_data.flags &
	       (FAN_REPORT_FID | FAN_REPORT_DIR_FID);
}

#if VHOSTFS_KERNEL >= 610
/* The group's mark on another object of an event, for what it ignores; true: it wants the event */
static bool vhostfs_other_mark(struct fsnotify_iter_info *iter,
			       enum fsnotify_iter_type type, void *obj,
			       enum fsnotify_obj_type obj_type, u32 mask)
{
	struct fsnotify_mark *mark;

	if (!obj)
		return false;
	mark = fsnotify_find_mark(obj, obj_type, iter->current_group);
	if (!mark)
		return false;
	iter->marks[type] = mark;
	if (type == FSNOTIFY_ITER_TYPE_PARENT &&
	    !((mark->mask | mark->ignore_mask) & FS_EVENT_ON_CHILD))
		return false;
	fsnotify_iter_set_report_type(iter, type);
	return (mask & mark->mask & ALL_FSNOTIFY_EVENTS) &&
	       fsnotify_mask_applicable(mark->mask, mask & FS_ISDIR, type);
}

static void vhostfs_raise_on_mount(struct fsnotify_mark *mark, u32 mask,
				   const void *data, int data_type,
				   struct inode *dir, const struct qstr *name,
				   struct inode *inode, struct super_block *sb)
{
	struct fsnotify_group *group = mark->group;
	struct fsnotify_iter_info iter = { .current_group = group };
	bool told;
	int type;

	iter.marks[FSNOTIFY_ITER_TYPE_VFSMOUNT] = mark;
	fsnotify_iter_set_report_type(&iter, FSNOTIFY_ITER_TYPE_VFSMOUNT);
	told = vhostfs_other_mark(&iter, FSNOTIFY_ITER_TYPE_SB, sb,
				  FSNOTIFY_OBJ_TYPE_SB, mask);
	told |= vhostfs_other_mark(&iter, FSNOTIFY_ITER_TYPE_INODE, inode,
				   FSNOTIFY_OBJ_TYPE_INODE, mask);
	told |= vhostfs_other_mark(&iter, FSNOTIFY_ITER_TYPE_PARENT, dir,
				   FSNOTIFY_OBJ_TYPE_INODE, mask);
	/* By its other marks it was told already */
	if (!told)
		group->ops->handle_event(group, mask, data, data_type, dir,
					 name, 0, &iter);
	for (type = 0; type < FSNOTIFY_ITER_TYPE_COUNT; type++)
		if (iter.marks[type] && iter.marks[type] != mark)
			fsnotify_put_mark(iter.marks[type]);
}
#endif

/*
 * fsnotify() finds marks on a mount by the path that was used, and the host
 * uses none of this guest's. All mounts of the superblock show what happened,
 * so who has marked any is told, where he can be: by file handle.
 */
static void vhostfs_raise_on_mounts(struct vhostfs_notify *n, u32 mask,
				    const void *data, int data_type,
				    struct inode *dir, const struct qstr *name,
				    struct inode *inode, struct super_block *sb)
{
#if VHOSTFS_KERNEL >= 610
	struct fsnotify_mark *marks[VHOSTFS_MAX_MOUNT_MARKS];
	struct vhostfs_mount_mark *each;
	unsigned int count = 0, i;

	if (!READ_ONCE(n->nmount_marks))
		return;
	spin_lock(&n->watch_lock);
	list_for_each_entry(each, &n->mount_marks, list) {
		if (each->sb != sb || !vhostfs_is_attached(each->mark) ||
		    !(each->mark->mask & mask & ALL_FSNOTIFY_EVENTS) ||
		    !vhostfs_reports_fids(each->mark->group))
			continue;
		refcount_inc(&each->mark->refcnt);
		marks[count++] = each->mark;
	}
	spin_unlock(&n->watch_lock);
	for (i = 0; i < count; i++) {
		vhostfs_raise_on_mount(marks[i], mask & ~FS_EVENT_ON_CHILD,
				       data, data_type, dir, name, inode, sb);
		fsnotify_put_mark(marks[i]);
	}
#endif
}

/* An event in a directory's listing; child: NULL if this guest does not know it */
static void vhostfs_raise_entry(struct vhostfs_notify *n, struct inode *dir,
				struct inode *child,
				const struct vhostfs_event *event, u32 cookie)
{
	struct qstr name = { .name = event->name, .len = event->namelen };
	u32 mask = event->mask | vhostfs_isdir(child);

	vhostfs_count(n, VHOSTFS_RAISED);
	if (child && !(mask & FS_DELETE))
		vhostfs_remember(n, child);
	if (child && child->i_sb == dir->i_sb)
		fsnotify(mask, child, FSNOTIFY_EVENT_INODE, dir, &name, NULL,
			 cookie);
	else
		fsnotify(mask, vhostfs_stand_in(n, dir, NULL, NULL, &name),
			 FSNOTIFY_EVENT_DENTRY, dir, &name, NULL, cookie);
}

/*
 * An event on an object, by its name in dir: once to who watches dir's children
 * and once to who watches the object, as fsnotify_parent() does for a dentry.
 *
 * Who watches a directory may never have looked at what is in it. Then there is
 * no inode to give to fsnotify(), which would take this for an event on the
 * directory itself. An inode that nobody can watch takes its place.
 */
static void vhostfs_raise_child(struct vhostfs_notify *n, struct inode *dir,
				struct inode *child,
				const struct vhostfs_event *event, u32 bit)
{
	struct qstr name = { .name = event->name, .len = event->namelen };
	u32 mask = event->mask | vhostfs_isdir(child);

	vhostfs_count(n, VHOSTFS_RAISED);
	if (child)
		vhostfs_remember(n, child);
	if (bit & fsnotify_inode_watches_children(dir))
		mask |= FS_EVENT_ON_CHILD;
	if (child && child->i_sb == dir->i_sb) {
		fsnotify(mask, child, FSNOTIFY_EVENT_INODE, dir, &name, child,
			 0);
		vhostfs_raise_on_mounts(n, mask, child, FSNOTIFY_EVENT_INODE,
					dir, &name, child, dir->i_sb);
	} else {
		struct dentry *entry = vhostfs_stand_in(n, dir, NULL, NULL,
							&name);

		n->unknown_inode.i_sb = dir->i_sb;
		fsnotify(mask, entry, FSNOTIFY_EVENT_DENTRY, dir, &name,
			 &n->unknown_inode, 0);
		vhostfs_raise_on_mounts(n, mask, entry, FSNOTIFY_EVENT_DENTRY,
					dir, &name, NULL, dir->i_sb);
	}
}

/*
 * An event on an object of which the device knows no name. A directory has one
 * here, so that watchers of its parent get it; a file's parent is not involved
 * (the link count changed, or it was done by a name that this guest does not
 * know).
 */
static void vhostfs_raise_self(struct vhostfs_notify *n, struct inode *inode,
			       u32 bit)
{
	struct dentry *alias = NULL;

	vhostfs_count(n, VHOSTFS_RAISED);
	if (S_ISDIR(inode->i_mode) && !(bit & VHOSTFS_SELF_EVENTS))
		alias = d_find_any_alias(inode);
	/* One that is invalid is of an earlier name */
	if (alias && !d_unhashed(alias))
		fsnotify_parent(alias, bit, inode, FSNOTIFY_EVENT_INODE);
	else
		fsnotify_inode(inode, bit);
	dput(alias);
	vhostfs_raise_on_mounts(n, bit | vhostfs_isdir(inode), inode,
				FSNOTIFY_EVENT_INODE, NULL, NULL, inode,
				inode->i_sb);
}

/*
 * The last link is gone. Linux says so, and ends the watches, when the last
 * dentry of an inode without links goes. So take the dentries as far as nobody
 * uses them, and then the links; for a dentry that is in use (an open file) it
 * happens when that ends, as in any file system. Only of an inode that has no
 * dentry any more it is said here; once, so not if it had no links before.
 */
#define VHOSTFS_MAX_ALIASES	1000

static void vhostfs_raise_delete_self(struct vhostfs_notify *n,
				      struct inode *inode)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct dentry *alias;
	bool first;
	int i;

	vhostfs_count(n, VHOSTFS_RAISED);
	vhostfs_forget_recent(n, NULL, inode);
	vhostfs_stale_attr(inode, STATX_BASIC_STATS);
	/* What is mounted stays mounted */
	if (inode == d_inode(inode->i_sb->s_root)) {
		fsnotify_inode(inode, FS_DELETE_SELF);
		return;
	}

	for (i = 0; i < VHOSTFS_MAX_ALIASES; i++) {
		alias = d_find_alias(inode);
		if (!alias)
			break;
		d_invalidate(alias);
		/* It may have been invalid before, and then kept its children */
		if (S_ISDIR(inode->i_mode))
			shrink_dcache_parent(alias);
		dput(alias);
		/* A directory has one alias, and it is found unhashed as well */
		if (S_ISDIR(inode->i_mode))
			break;
	}

	alias = d_find_any_alias(inode);
	spin_lock(&fi->lock);
	first = inode->i_nlink;
	if (first)
		clear_nlink(inode);
	spin_unlock(&fi->lock);
	if (alias) {
		dput(alias);
	} else if (first) {
		fsnotify_inode(inode, FS_DELETE_SELF);
		__fsnotify_inode_delete(inode);
	}
}

/*
 * A watched object has lost or got a link: how many are there? The FUSE core
 * does not ask before it removes one for this guest, and when that is the last
 * but counts as one of several, nobody says that the object has ended. Nor does
 * a host source that knows removed names but not whose they were. And a dentry
 * of a name that only the host removed keeps the object from ending with its
 * last name; which one is not known, so all that nobody uses go.
 *
 * The inode lock keeps the guest's own unlink() and link() away.
 */
static void vhostfs_check_links(struct vhostfs_notify *n, struct inode *inode)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct fuse_conn *fc = get_fuse_conn(inode);
	struct vhostfs_request *req;
	bool gone = false;

	inode_lock(inode);
	req = vhostfs_getattr(n, inode);
	if (req && !req->error) {
		gone = !req->getattr_out.attr.nlink;
		spin_lock(&fi->lock);
		fi->attr_version = atomic64_inc_return(&fc->attr_version);
		if (!gone && !S_ISDIR(inode->i_mode))
			set_nlink(inode, req->getattr_out.attr.nlink);
		spin_unlock(&fi->lock);
	} else if (req) {
		gone = req->error == -ESTALE || req->error == -ENOENT;
	}
	inode_unlock(inode);
	kfree(req);
	if (gone)
		vhostfs_raise_delete_self(n, inode);
	else if (!S_ISDIR(inode->i_mode))
		d_prune_aliases(inode);
}

/* The same for who had a name, if anybody */
static void vhostfs_check_former(struct vhostfs_notify *n, struct inode *former)
{
	if (former)
		vhostfs_check_links(n, former);
	iput(former);
}

/*
 * Both names at once, for fanotify; both directories are in one superblock.
 * One of them may be NULL: what happens there is not known. Each mark on a
 * directory gets the name in that one only. One on the superblock gets both, so
 * where there is such a mark, nobody is told of half a rename.
 */
static void vhostfs_raise_rename(struct vhostfs_notify *n,
				 struct inode *old_dir, struct inode *new_dir,
				 struct inode *child,
				 const struct vhostfs_event *from,
				 const struct vhostfs_event *to)
{
	struct inode *dir = old_dir ? old_dir : new_dir;
	struct qstr old_name = { .name = from->name, .len = from->namelen };
	struct qstr new_name = { .name = to->name, .len = to->namelen };
	u32 mask = FS_RENAME | (from->mask & FS_ISDIR) | vhostfs_isdir(child);
	u32 wanted = 0, wanted_on_sb = READ_ONCE(dir->i_sb->s_fsnotify_mask);
	struct dentry *moved;

	if (old_dir)
		wanted |= READ_ONCE(old_dir->i_fsnotify_mask);
	if (new_dir)
		wanted |= READ_ONCE(new_dir->i_fsnotify_mask);
	if (old_dir && new_dir)
		wanted |= wanted_on_sb;
	else
		wanted &= ~wanted_on_sb;
	if (!(wanted & FS_RENAME))
		return;

	if (child && child->i_sb != dir->i_sb)
		child = NULL;
	n->unknown_parent.d_inode = new_dir;
	moved = vhostfs_stand_in(n, dir, &n->unknown_parent, child, &new_name);
	if (!old_dir) {
		n->unknown_inode.i_sb = dir->i_sb;
		old_dir = &n->unknown_inode;
	}
#if VHOSTFS_KERNEL < 700
	fsnotify(mask, moved, FSNOTIFY_EVENT_DENTRY, old_dir, &old_name, NULL,
		 0);
#else
	{
		struct fsnotify_rename_data data = { .moved = moved };

		fsnotify(mask, &data, FSNOTIFY_EVENT_RENAME, old_dir,
			 &old_name, NULL, 0);
	}
#endif
}

/* ---- events in directories and on objects ------------------------------------- */

/* The cookie that watchers get for the one on the wire, the same for both halves */
static u32 vhostfs_local_cookie(struct vhostfs_notify *n, u32 wire)
{
	unsigned int i;
	u32 local;

	if (wire)
		for (i = 0; i < VHOSTFS_MAX_COOKIES; i++)
			if (n->cookies[i].wire == wire)
				return n->cookies[i].local;

	local = fsnotify_get_cookie();
	if (wire) {
		i = n->next_cookie++ % VHOSTFS_MAX_COOKIES;
		n->cookies[i].wire = wire;
		n->cookies[i].local = local;
	}
	return local;
}

static void vhostfs_entry_event(struct vhostfs_notify *n, struct fuse_conn *fc,
				const struct vhostfs_event *event)
{
	struct inode *dir, *child;
	u32 cookie = 0;

	dir = vhostfs_find(fc, event->nodeid, event->generation);
	if (!dir || !S_ISDIR(dir->i_mode)) {
		vhostfs_count(n, VHOSTFS_STALE);
		iput(dir);
		return;
	}

	vhostfs_check_former(n, vhostfs_stale_entry(dir, event));
	child = vhostfs_find_child(fc, NULL, event);
	if (child)
		vhostfs_stale_attr(child, STATX_BASIC_STATS);
	else
		child = vhostfs_meet(n, dir, event);
	vhostfs_follow(dir, child, event);
	if (event->mask & (FS_MOVED_FROM | FS_MOVED_TO)) {
		cookie = vhostfs_local_cookie(n, event->cookie);
		vhostfs_raise_rename(n,
				     event->mask & FS_MOVED_FROM ? dir : NULL,
				     event->mask & FS_MOVED_TO ? dir : NULL,
				     child, event, event);
	}
	vhostfs_raise_entry(n, dir, child, event, cookie);
	if (child && (event->mask & FS_DELETE))
		vhostfs_forget_recent(n, NULL, child);
	iput(child);
	iput(dir);
}

static void vhostfs_rename_event(struct vhostfs_notify *n, struct fuse_conn *fc,
				 const struct vhostfs_event *from,
				 const struct vhostfs_event *to)
{
	struct inode *old_dir, *new_dir, *former, *child = NULL;
	u32 cookie;

	old_dir = vhostfs_find(fc, from->nodeid, from->generation);
	new_dir = vhostfs_find(fc, to->nodeid, to->generation);
	if (!old_dir || !new_dir || old_dir->i_sb != new_dir->i_sb ||
	    !S_ISDIR(old_dir->i_mode) || !S_ISDIR(new_dir->i_mode)) {
		vhostfs_entry_event(n, fc, from);
		vhostfs_entry_event(n, fc, to);
		goto out;
	}

	former = vhostfs_stale_entry(new_dir, to);
	child = vhostfs_find_child(fc, NULL, to);
	if (child)
		vhostfs_stale_attr(child, STATX_BASIC_STATS);
	else
		child = vhostfs_meet(n, new_dir, to);
	vhostfs_follow(new_dir, child, to);
	iput(vhostfs_stale_entry(old_dir, from));

	cookie = fsnotify_get_cookie();
	vhostfs_raise_rename(n, old_dir, new_dir, child, from, to);
	vhostfs_raise_entry(n, old_dir, child, from, cookie);
	vhostfs_raise_entry(n, new_dir, child, to, cookie);
	vhostfs_check_former(n, former);
out:
	iput(child);
	iput(new_dir);
	iput(old_dir);
}

static void vhostfs_self_event(struct vhostfs_notify *n, struct inode *inode,
			       u32 bit)
{
	vhostfs_stale_object(n, inode, bit);
	if (bit == FS_DELETE_SELF) {
		vhostfs_raise_delete_self(n, inode);
		return;
	}
	vhostfs_raise_self(n, inode, bit);
	/* Of a file and without a name: it may be the link count */
	if (bit == FS_ATTRIB && !S_ISDIR(inode->i_mode) &&
	    READ_ONCE(inode->i_fsnotify_mask))
		vhostfs_check_links(n, inode);
}

static void vhostfs_object_event(struct vhostfs_notify *n, struct fuse_conn *fc,
				 const struct vhostfs_event *event)
{
	u32 bit = event->mask & ~FS_ISDIR;
	struct inode *dir, *child;
	struct dentry *entry;

	dir = vhostfs_find(fc, event->nodeid, event->generation);
	if (!event->namelen) {
		if (dir)
			vhostfs_self_event(n, dir, bit);
		else
			vhostfs_count(n, VHOSTFS_STALE);
		iput(dir);
		return;
	}

	if (dir && !S_ISDIR(dir->i_mode)) {
		iput(dir);
		dir = NULL;
	}
	child = vhostfs_find_child(fc, dir, event);
	if (child) {
		vhostfs_stale_object(n, child, bit);
	} else if (dir && !event->child_nodeid) {
		/* Found since the device wrote this; caches only */
		entry = vhostfs_lookup_cached(dir, event);
		if (entry && d_really_is_positive(entry))
			vhostfs_stale_object(n, d_inode(entry), bit);
		dput(entry);
	}
	if (!child && dir)
		child = vhostfs_meet(n, dir, event);

	if (dir)
		vhostfs_raise_child(n, dir, child, event, bit);
	else if (child)
		vhostfs_raise_self(n, child, bit);
	else
		vhostfs_count(n, VHOSTFS_STALE);
	iput(child);
	iput(dir);
}

/* ---- halves of renames ---------------------------------------------------------- */

static void vhostfs_drop_half(struct vhostfs_notify *n,
			      struct vhostfs_half *half)
{
	list_del(&half->list);
	n->nhalves--;
	kfree(half);
}

static void vhostfs_free_halves(struct vhostfs_notify *n)
{
	struct vhostfs_half *half, *next;

	list_for_each_entry_safe(half, next, &n->halves, list)
		vhostfs_drop_half(n, half);
}

/* The partner did not come in time, or too many wait: it is a plain event */
static void vhostfs_give_up_half(struct vhostfs_notify *n, struct fuse_conn *fc,
				 struct vhostfs_half *half)
{
	vhostfs_count(n, VHOSTFS_HALVES_TIMED_OUT);
	vhostfs_entry_event(n, fc, &half->event);
	vhostfs_drop_half(n, half);
}

static void vhostfs_half_event(struct vhostfs_notify *n, struct fuse_conn *fc,
			       const struct vhostfs_event *event)
{
	struct vhostfs_half *half;

	list_for_each_entry(half, &n->halves, list) {
		if (half->event.cookie != event->cookie ||
		    !((half->event.mask ^ event->mask) & FS_MOVED_FROM))
			continue;
		if (event->mask & FS_MOVED_TO)
			vhostfs_rename_event(n, fc, &half->event, event);
		else
			vhostfs_rename_event(n, fc, event, &half->event);
		vhostfs_drop_half(n, half);
		return;
	}

	half = kmalloc(sizeof(*half), GFP_KERNEL);
	if (!half) {
		vhostfs_entry_event(n, fc, event);
		return;
	}
	if (n->nhalves == VHOSTFS_MAX_HALVES)
		vhostfs_give_up_half(n, fc, list_first_entry(&n->halves,
							     struct vhostfs_half,
							     list));
	half->event = *event;
	half->arrived = jiffies;
	list_add_tail(&half->list, &n->halves);
	if (!n->nhalves++)
		queue_delayed_work(vhostfs_wq, &n->half_work,
				   VHOSTFS_HALF_WAIT);
}

static void vhostfs_expire_halves(struct vhostfs_notify *n)
{
	struct vhostfs_half *half, *next;
	struct fuse_conn *fc;

	mutex_lock(&n->event_mutex);
	fc = n->fc;
	if (fc)
		down_read(&fc->killsb);
	list_for_each_entry_safe(half, next, &n->halves, list) {
		if (time_before(jiffies, half->arrived + VHOSTFS_HALF_WAIT)) {
			queue_delayed_work(vhostfs_wq, &n->half_work,
					   half->arrived + VHOSTFS_HALF_WAIT -
					   jiffies);
			break;
		}
		if (fc)
			vhostfs_give_up_half(n, fc, half);
		else
			vhostfs_drop_half(n, half);
	}
	if (fc)
		up_read(&fc->killsb);
	mutex_unlock(&n->event_mutex);
}

/* The one worker does it, so that events stay in order */
static void vhostfs_half_timeout(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(to_delayed_work(work),
						struct vhostfs_notify,
						half_work);

	queue_work(vhostfs_wq, &n->receive_work);
}

/* ---- overflow ------------------------------------------------------------------- */

/*
 * Events were lost, so nothing that is cached can be believed, and everybody
 * who watches has to look again: their groups are given the overflow event that
 * the kernel itself queues for them.
 *
 * No function to do so is exported. Its parts are: a mark of our own (for no
 * events) on a watched object keeps the list of all marks there, each of which
 * leads to its group. Groups that only have marks on a mount are not found.
 */
struct vhostfs_lost {
	struct vhostfs_notify *notify;
	struct fsnotify_group *groups[VHOSTFS_MAX_GROUPS];	/* referenced */
	unsigned int ngroups;
};

/* What fsnotify_queue_overflow() does */
static void vhostfs_queue_overflow(struct fsnotify_group *group)
{
	struct fsnotify_event *event = group->overflow_event;

	if (!event)
		return;
	spin_lock(&group->notification_lock);
	if (group->shutdown || !list_empty(&event->list)) {
		spin_unlock(&group->notification_lock);
		return;
	}
	group->q_len++;
	list_add_tail(&event->list, &group->notification_list);
	spin_unlock(&group->notification_lock);

	wake_up(&group->notification_waitq);
	kill_fasync(&group->fsn_fa, SIGIO, POLL_IN);
}

static void vhostfs_lost_group(struct vhostfs_lost *lost,
			       struct fsnotify_group *group)
{
	unsigned int i;

	for (i = 0; i < lost->ngroups; i++)
		if (lost->groups[i] == group)
			return;
	if (i == VHOSTFS_MAX_GROUPS) {
		/* Many: it may be told more than once */
		vhostfs_queue_overflow(group);
		return;
	}
	refcount_inc(&group->refcnt);
	lost->groups[lost->ngroups++] = group;
}

static void vhostfs_free_mark(struct fsnotify_mark *mark)
{
	kfree(mark);
}

static int vhostfs_no_event(struct fsnotify_mark *mark, u32 mask,
			    struct inode *inode, struct inode *dir,
			    const struct qstr *name, u32 cookie)
{
	return 0;
}

static const struct fsnotify_ops vhostfs_group_ops = {
	.handle_inode_event	= vhostfs_no_event,
	.free_mark		= vhostfs_free_mark,
};

static int vhostfs_add_mark(struct fsnotify_mark *mark, struct inode *inode,
			    struct super_block *sb)
{
	if (inode)
		return fsnotify_add_inode_mark(mark, inode, 0);
#if VHOSTFS_KERNEL < 610
	return fsnotify_add_mark(mark, &sb->s_fsnotify_marks,
				 FSNOTIFY_OBJ_TYPE_SB, 0, NULL);
#else
	return fsnotify_add_mark(mark, sb, FSNOTIFY_OBJ_TYPE_SB, 0);
#endif
}

/* The groups with marks on inode or, without one, on sb */
static void vhostfs_lost_groups(struct vhostfs_lost *lost, struct inode *inode,
				struct super_block *sb)
{
	struct fsnotify_mark *mark, *other;
	struct fsnotify_mark_connector *conn;

	mark = kzalloc(sizeof(*mark), GFP_KERNEL);
	if (!mark)
		return;
	fsnotify_init_mark(mark, vhostfs_group);
	if (!vhostfs_add_mark(mark, inode, sb)) {
		conn = mark->connector;
		spin_lock(&conn->lock);
		hlist_for_each_entry(other, &conn->list, obj_list)
			if (other != mark)
				vhostfs_lost_group(lost, other->group);
		spin_unlock(&conn->lock);
		fsnotify_destroy_mark(mark, vhostfs_group);
	}
	fsnotify_put_mark(mark);
}

static bool vhostfs_is_any(struct inode *inode, void *arg)
{
	return true;
}

static void vhostfs_lose_inode(struct inode *inode, void *arg)
{
	struct vhostfs_lost *lost = arg;
	struct dentry *alias;

	vhostfs_stale_object(lost->notify, inode, FS_MODIFY);
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
	if (READ_ONCE(inode->i_fsnotify_mask))
		vhostfs_lost_groups(lost, inode, NULL);
}

static void vhostfs_overflow_event(struct vhostfs_notify *n,
				   struct fuse_conn *fc)
{
	struct vhostfs_mount_mark *mount_mark;
	struct vhostfs_lost *lost;
	struct fuse_mount *fm;
	unsigned int i;

	vhostfs_count(n, VHOSTFS_OVERFLOWS);
	lost = kzalloc(sizeof(*lost), GFP_KERNEL | __GFP_NOFAIL);
	lost->notify = n;
	vhostfs_walk_again(n);
#if VHOSTFS_KERNEL >= 616
	/* Every dentry and listing is checked again, those in use, too */
	atomic_inc(&fc->epoch);
#endif
	list_for_each_entry(fm, &fc->mounts, fc_entry) {
		if (!fm->sb)
			continue;
		/* Dentries that nobody uses: all the negative ones are such */
		shrink_dcache_sb(fm->sb);
		vhostfs_walk(fm->sb, vhostfs_is_any, vhostfs_lose_inode, lost);
		if (READ_ONCE(fm->sb->s_fsnotify_mask))
			vhostfs_lost_groups(lost, NULL, fm->sb);
	}
	spin_lock(&n->watch_lock);
	list_for_each_entry(mount_mark, &n->mount_marks, list)
		if (vhostfs_is_attached(mount_mark->mark))
			vhostfs_lost_group(lost, mount_mark->mark->group);
	spin_unlock(&n->watch_lock);
	for (i = 0; i < lost->ngroups; i++) {
		vhostfs_queue_overflow(lost->groups[i]);
		fsnotify_put_group(lost->groups[i]);
	}
	kfree(lost);
}

/* ---- elements ------------------------------------------------------------------- */

/* Checks an element and takes it over; says what is wrong with it, or NULL */
static const char *vhostfs_check(const struct vhostfs_wire_element *wire,
				 unsigned int len, struct vhostfs_event *event)
{
	u64 mask;

	if (len < sizeof(*wire))
		return "shorter than an element";
	if (le32_to_cpu(wire->error) != FUSE_NOTIFY_FSNOTIFY || wire->unique)
		return "not FUSE_NOTIFY_FSNOTIFY";
	if (wire->reserved || (le32_to_cpu(wire->flags) & ~FSNOTIFY_SPLIT_RENAME))
		return "reserved fields";

	mask = le64_to_cpu(wire->mask);
	event->mask = mask & (VHOSTFS_EVENTS | FS_Q_OVERFLOW | FS_ISDIR);
	if (event->mask != mask || !is_power_of_2(mask & ~(u64)FS_ISDIR))
		return "mask";
	event->nodeid = le64_to_cpu(wire->nodeid);
	event->generation = le32_to_cpu(wire->generation);
	event->child_nodeid = le64_to_cpu(wire->child_nodeid);
	event->child_generation = le32_to_cpu(wire->child_generation);
	event->cookie = le32_to_cpu(wire->cookie);
	event->flags = le32_to_cpu(wire->flags);
	event->namelen = le32_to_cpu(wire->namelen);

	if (event->namelen > NAME_MAX ||
	    le32_to_cpu(wire->len) != sizeof(*wire) + event->namelen ||
	    le32_to_cpu(wire->len) > len)
		return "length";
	memcpy(event->name, wire->name, event->namelen);
	event->name[event->namelen] = '\0';
	if (memchr(event->name, '/', event->namelen) ||
	    memchr(event->name, '\0', event->namelen) ||
	    !strcmp(event->name, ".") || !strcmp(event->name, ".."))
		return "its name";

	if (!event->child_nodeid && event->child_generation)
		return "generation of no child";
	if (mask & FS_Q_OVERFLOW) {
		if (event->mask != FS_Q_OVERFLOW || event->nodeid ||
		    event->generation || event->namelen ||
		    event->child_nodeid || event->cookie || event->flags)
			return "more in an overflow";
		return NULL;
	}
	if (!event->nodeid)
		return "no nodeid";
	if ((mask & VHOSTFS_ENTRY_EVENTS) && !event->namelen)
		return "event in a directory without a name";
	if (mask & (FS_MOVED_FROM | FS_MOVED_TO))
		return event->flags && !event->cookie ?
		       "half of a rename without a cookie" : NULL;
	if (event->cookie || event->flags)
		return "cookie without a rename";
	if ((mask & VHOSTFS_SELF_EVENTS) && event->namelen)
		return "name of the object itself";
	if (!event->namelen && event->child_nodeid)
		return "child without a name";
	return NULL;
}

static bool vhostfs_is_granted(struct vhostfs_notify *n)
{
	return READ_ONCE(n->session) == VHOSTFS_GRANTED;
}

static void vhostfs_element(struct vhostfs_notify *n, const void *data,
			    unsigned int len)
{
	struct vhostfs_event *event = &n->event;
	struct fuse_conn *fc;
	const char *fault;

	vhostfs_count(n, VHOSTFS_RECEIVED);
	fault = vhostfs_check(data, len, event);
	if (fault) {
		vhostfs_count(n, VHOSTFS_MALFORMED);
		dev_warn_ratelimited(&n->vdev->dev,
				     "notification dropped, malformed: %s\n",
				     fault);
		return;
	}

	mutex_lock(&n->event_mutex);
	fc = n->fc;
	if (!fc || !vhostfs_is_granted(n)) {
		vhostfs_count(n, VHOSTFS_STALE);
		goto out;
	}
	down_read(&fc->killsb);
	if (event->mask & FS_Q_OVERFLOW)
		vhostfs_overflow_event(n, fc);
	else if (event->flags & FSNOTIFY_SPLIT_RENAME)
		vhostfs_half_event(n, fc, event);
	else if (event->mask & VHOSTFS_ENTRY_EVENTS)
		vhostfs_entry_event(n, fc, event);
	else
		vhostfs_object_event(n, fc, event);
	up_read(&fc->killsb);
out:
	mutex_unlock(&n->event_mutex);
}

/* ---- queue 1 -------------------------------------------------------------------- */

/* Under vq_lock. A queue that takes no buffer is broken; it stays as it is. */
static void vhostfs_give_buffer(struct vhostfs_notify *n, void *buf)
{
	struct scatterlist sg;

	sg_init_one(&sg, buf, n->buf_size);
	virtqueue_add_inbuf(n->vq, &sg, 1, buf, GFP_ATOMIC);
}

/*
 * Copies what came, at most a batch, and returns the buffers before anything is
 * done about it: acting takes time, and few buffers may be all there are.
 * Nothing is read from a buffer that the device may write to.
 */
static unsigned int vhostfs_take_buffers(struct vhostfs_notify *n)
{
	unsigned int count = 0, len;
	bool kick = false;
	void *buf;

	spin_lock(&n->vq_lock);
	if (!n->running || !n->has_queue)
		goto out;
	virtqueue_disable_cb(n->vq);
	do {
		while (count < VHOSTFS_BATCH) {
			buf = virtqueue_get_buf(n->vq, &len);
			if (!buf)
				break;
			n->batch_len[count] = min_t(unsigned int, len,
						    VHOSTFS_ELEMENT_SIZE);
			memcpy(n->batch[count], buf, n->batch_len[count]);
			count++;
			vhostfs_give_buffer(n, buf);
		}
	} while (count < VHOSTFS_BATCH && !virtqueue_enable_cb(n->vq) &&
		 !virtqueue_is_broken(n->vq));
	if (count)
		kick = virtqueue_kick_prepare(n->vq);
	/* Under the lock, so that the queue cannot go meanwhile */
	if (kick)
		virtqueue_notify(n->vq);
out:
	spin_unlock(&n->vq_lock);
	return count;
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

static void vhostfs_park_work(struct work_struct *work)
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

/* Adds answers to the batch, and parks their requests again */
static unsigned int vhostfs_take_parked(struct vhostfs_notify *n,
					unsigned int count)
{
	struct vhostfs_parked *parked;
	bool granted, sent_back = false;

	spin_lock(&n->vq_lock);
	granted = READ_ONCE(n->session) == VHOSTFS_GRANTED;
	while (n->running && count < VHOSTFS_BATCH) {
		spin_lock(&n->answered_lock);
		parked = list_first_entry_or_null(&n->answered,
						  struct vhostfs_parked, list);
		if (parked)
			list_del(&parked->list);
		spin_unlock(&n->answered_lock);
		if (!parked)
			break;
		n->batch_len[count] = min_t(unsigned int, parked->len,
					    VHOSTFS_ELEMENT_SIZE);
		memcpy(n->batch[count], parked->out, n->batch_len[count]);
		if (vhostfs_to_element(n, n->batch[count], n->batch_len[count],
				       parked->unique))
			count++;
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
	return count;
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

static void vhostfs_alloc_parked(struct vhostfs_notify *n, struct virtqueue *vq)
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

/* ---- the receiving worker --------------------------------------------------------- */

static unsigned int vhostfs_take_batch(struct vhostfs_notify *n)
{
	return vhostfs_take_parked(n, vhostfs_take_buffers(n));
}

static void vhostfs_receive_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(work, struct vhostfs_notify,
						receive_work);
	unsigned int batches = VHOSTFS_BATCHES;
	unsigned int count, i;

	do {
		count = vhostfs_take_batch(n);
		for (i = 0; i < count; i++) {
			vhostfs_element(n, n->batch[i], n->batch_len[i]);
			cond_resched();
		}
	} while (count == VHOSTFS_BATCH && --batches);

	vhostfs_expire_halves(n);
	/* Others get their turn, however much the device sends */
	if (count == VHOSTFS_BATCH)
		queue_work(vhostfs_wq, &n->receive_work);
}

/* Called in interrupts */
void vhostfs_notify_received(struct vhostfs_notify *n)
{
	if (n)
		queue_work(vhostfs_wq, &n->receive_work);
}

/* ---- watches ------------------------------------------------------------------- */

/*
 * The table has an entry for every inode that is watched or that the device
 * believes to be. Probes write to it what an inode's marks want now; the worker
 * sends what differs from what the device was told, one request for an inode
 * at a time. What a probe could not write is found by a walk over the inodes.
 */

/* What the device is to report for marks that want @mask */
static u32 vhostfs_wish(u32 mask)
{
	u32 wish = mask & (VHOSTFS_EVENTS | FS_EVENT_ON_CHILD);

	if (mask & FS_RENAME)
		wish |= FS_MOVED_FROM | FS_MOVED_TO;
	if (!(wish & VHOSTFS_EVENTS))
		return 0;
	/* A watch ends with its object, whether that was asked for or not */
	return wish | FS_DELETE_SELF;
}

static struct vhostfs_watch *vhostfs_find_watch(struct vhostfs_notify *n,
						u64 nodeid)
{
	struct rb_node *node = n->watches.rb_node;
	struct vhostfs_watch *watch;

	while (node) {
		watch = rb_entry(node, struct vhostfs_watch, node);
		if (nodeid == watch->nodeid)
			return watch;
		node = nodeid < watch->nodeid ? node->rb_left : node->rb_right;
	}
	return NULL;
}

static struct vhostfs_watch *vhostfs_new_watch(struct vhostfs_notify *n,
					       u64 nodeid, u32 generation)
{
	struct rb_node **link = &n->watches.rb_node, *parent = NULL;
	struct vhostfs_watch *watch;

	watch = kzalloc(sizeof(*watch), GFP_ATOMIC | __GFP_NOWARN);
	if (!watch)
		return NULL;
	watch->nodeid = nodeid;
	watch->generation = generation;
	INIT_LIST_HEAD(&watch->changed);
	while (*link) {
		parent = *link;
		if (nodeid < rb_entry(parent, struct vhostfs_watch,
				      node)->nodeid)
			link = &parent->rb_left;
		else
			link = &parent->rb_right;
	}
	rb_link_node(&watch->node, parent, link);
	rb_insert_color(&watch->node, &n->watches);
	n->nwatches++;
	return watch;
}

static void vhostfs_set_refused(struct vhostfs_notify *n,
				struct vhostfs_watch *watch, bool refused)
{
	n->nrefused += refused - watch->refused;
	watch->refused = refused;
}

static void vhostfs_drop_watch(struct vhostfs_notify *n,
			       struct vhostfs_watch *watch)
{
	vhostfs_set_refused(n, watch, false);
	list_del(&watch->changed);
	rb_erase(&watch->node, &n->watches);
	n->nwatches--;
	kfree(watch);
}

static void vhostfs_free_watches(struct vhostfs_notify *n)
{
	struct rb_node *node;

	while ((node = rb_first(&n->watches)))
		vhostfs_drop_watch(n, rb_entry(node, struct vhostfs_watch,
					       node));
}

/* The entry was changed: is there something to send, or is it done with? */
static void vhostfs_watch_changed(struct vhostfs_notify *n,
				  struct vhostfs_watch *watch)
{
	if (watch->sending)
		return;
	list_del_init(&watch->changed);
	if (!watch->mask && !watch->told)
		vhostfs_drop_watch(n, watch);
	else if (watch->mask != watch->told && !watch->refused)
		list_add_tail(&watch->changed, &n->changed);
}

/* Wants something else, which the device may not refuse */
static void vhostfs_set_mask(struct vhostfs_notify *n,
			     struct vhostfs_watch *watch, u32 mask)
{
	if (watch->mask == mask)
		return;
	watch->mask = mask;
	vhostfs_set_refused(n, watch, false);
}

/*
 * Writes down what the marks on an inode want now. The mask is read under the
 * lock: whoever comes last to the table saw the newest.
 */
static void vhostfs_note(struct vhostfs_notify *n, u64 nodeid, u32 generation,
			 struct inode *inode)
{
	struct vhostfs_watch *watch;
	u32 mask = 0;

	lockdep_assert_held(&n->watch_lock);
	if (inode)
		mask = vhostfs_wish(READ_ONCE(inode->i_fsnotify_mask));
	/* It tells of links, for vhostfs_check_links() */
	if (mask && !S_ISDIR(inode->i_mode))
		mask |= FS_ATTRIB;
	watch = vhostfs_find_watch(n, nodeid);
	if (!watch && !mask)
		return;
	if (!watch)
		watch = vhostfs_new_watch(n, nodeid, generation);
	if (!watch) {
		n->resync = true;
		return;
	}
	if (watch->generation != generation) {
		/* Late news of an object whose number another one has got */
		if (!inode || fuse_is_bad(inode))
			return;
		watch->generation = generation;
		watch->told = 0;
		vhostfs_set_refused(n, watch, false);
	}
	vhostfs_set_mask(n, watch, mask);
	watch->pass = n->pass;
	vhostfs_watch_changed(n, watch);
}

/* Under watch_lock: does the worker have to be woken, and when? */
static void vhostfs_wake_session(struct vhostfs_notify *n)
{
	if (n->session == VHOSTFS_GRANTED &&
	    (!list_empty(&n->changed) || n->shares_done != n->shares_changed))
		mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	else if (n->resync || n->retry)
		queue_delayed_work(vhostfs_wq, &n->session_work,
				   VHOSTFS_REPAIR_WAIT);
}

/* ---- the task that adds a watch waits for the host to watch, too --------------- */

/*
 * Who has added a watch may read the file next, and expects an event for every
 * change from then on. The probe runs within the system call, where nothing can
 * wait; so the task waits on its way back to user mode, where it holds nothing.
 */
struct vhostfs_settle {
	struct callback_head work;
	struct vhostfs_notify *notify;
	u64 nodeid;			/* 0: marks on superblocks */
};

/* Whoever marks a superblock waits until the walk has been everywhere */
static bool vhostfs_shares_settled(struct vhostfs_notify *n)
{
	return n->shares_done == n->shares_changed && !atomic_read(&n->nunread);
}

static bool vhostfs_is_settled(struct vhostfs_notify *n, u64 nodeid)
{
	const struct vhostfs_watch *watch;
	bool settled = false;

	spin_lock(&n->watch_lock);
	if (n->session == VHOSTFS_GRANTED) {
		watch = vhostfs_find_watch(n, nodeid);
		settled = nodeid ? !watch || watch->refused ||
				   !(watch->mask & ~watch->told) :
				   vhostfs_shares_settled(n);
	} else {
		settled = n->session == VHOSTFS_NONE ||
			  n->session == VHOSTFS_REFUSED || READ_ONCE(n->tries);
	}
	spin_unlock(&n->watch_lock);
	return settled;
}

static void vhostfs_settle_work(struct callback_head *work)
{
	struct vhostfs_settle *settle = container_of(work,
						     struct vhostfs_settle,
						     work);
	struct vhostfs_notify *n = settle->notify;

	wait_event_killable_timeout(n->settled,
				    vhostfs_is_settled(n, settle->nodeid),
				    settle->nodeid ? VHOSTFS_SETTLE_WAIT :
						     VHOSTFS_WALK_WAIT);
	kfree(settle);
	vhostfs_put(n);
	module_put(THIS_MODULE);
}

static void vhostfs_settle_later(struct vhostfs_notify *n, u64 nodeid)
{
	struct vhostfs_settle *settle;

	if (!READ_ONCE(sync_watches) || (current->flags & PF_KTHREAD))
		return;
	settle = kmalloc(sizeof(*settle), GFP_ATOMIC | __GFP_NOWARN);
	if (!settle)
		return;
	settle->notify = n;
	settle->nodeid = nodeid;
	init_task_work(&settle->work, vhostfs_settle_work);
	/* The inode's superblock holds the module */
	__module_get(THIS_MODULE);
	kref_get(&n->kref);
	if (task_work_add(current, &settle->work, TWA_RESUME)) {
		kfree(settle);
		vhostfs_put(n);
		module_put(THIS_MODULE);
	}
}

/* ---- probes --------------------------------------------------------------------- */

/*
 * Marks come and go in these two functions of fs/notify/mark.c, both called
 * with the connector's lock held. That keeps the inode alive, with its
 * superblock and all that belongs to it, until the first has returned; of the
 * second only what was copied at its entry is used at its return.
 *
 * What stands where a submount will be has the nodeid of the submount's root,
 * and is passed over: the device means the root by it.
 */
struct vhostfs_probe {
	struct vhostfs_notify *notify;
	struct inode *inode;		/* not looked at once it is detached */
	u64 nodeid;			/* 0: a superblock */
	u32 generation;
};

/* Does any of the marks want to have objects by handle, and not only names? */
static bool vhostfs_wants_fid(struct fsnotify_mark_connector *conn)
{
	const struct fsnotify_group *group;
	struct fsnotify_mark *mark;

	hlist_for_each_entry(mark, &conn->list, obj_list) {
		group = mark->group;
		/* Of those who take events so, all are fanotify but ourselves */
		if (group->ops->handle_event && group != vhostfs_share_group &&
		    (group->fanotify_data.flags &
		     (FAN_REPORT_FID | FAN_REPORT_TARGET_FID)))
			return true;
	}
	return false;
}

static struct super_block *vhostfs_marked_sb(struct fsnotify_mark_connector *conn)
{
#if VHOSTFS_KERNEL < 610
	return container_of(conn->obj, struct super_block, s_fsnotify_marks);
#else
	return conn->obj;
#endif
}

static int vhostfs_probe_sb(struct vhostfs_probe *probe,
			    struct fsnotify_mark_connector *conn)
{
	struct super_block *sb = vhostfs_marked_sb(conn);
	struct vhostfs_notify *n;

	if (sb->s_type != vhostfs_type)
		return 1;
	n = vhostfs_notify_of(get_fuse_conn_super(sb));
	if (!n || READ_ONCE(ignore_probes))
		return 1;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	probe->notify = n;
	probe->nodeid = 0;
	return 0;
}

#if VHOSTFS_KERNEL >= 610
/*
 * The marks of a mount, found through its own connector. Those that are
 * referenced here stay in that list when their watcher leaves, so nobody is
 * told by a probe then: vhostfs_check_probes() looks for it.
 */
static void vhostfs_note_mount_marks(struct vhostfs_notify *n,
				     struct super_block *sb,
				     struct fsnotify_mark_connector *conn)
{
	struct vhostfs_mount_mark *each;
	struct fsnotify_mark *mark;
	bool known;

	spin_lock(&n->watch_lock);
	hlist_for_each_entry(mark, &conn->list, obj_list) {
		if (!mark->group->ops->handle_event ||
		    n->nmount_marks == VHOSTFS_MAX_MOUNT_MARKS)
			continue;
		known = false;
		list_for_each_entry(each, &n->mount_marks, list)
			known |= each->mark == mark;
		each = known ? NULL : kmalloc(sizeof(*each),
					      GFP_ATOMIC | __GFP_NOWARN);
		if (!each)
			continue;
		refcount_inc(&mark->refcnt);
		each->mark = mark;
		each->sb = sb;
		list_add_tail(&each->list, &n->mount_marks);
		n->nmount_marks++;
	}
	spin_unlock(&n->watch_lock);
}

static int vhostfs_probe_mount(struct vhostfs_probe *probe,
			       struct fsnotify_mark_connector *conn)
{
	struct super_block *sb = ((struct vfsmount *)conn->obj)->mnt_sb;
	struct vhostfs_notify *n;

	if (sb->s_type != vhostfs_type)
		return 1;
	n = vhostfs_notify_of(get_fuse_conn_super(sb));
	if (!n || READ_ONCE(ignore_probes))
		return 1;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	vhostfs_note_mount_marks(n, sb, conn);
	probe->notify = n;
	probe->nodeid = 0;
	return 0;
}
#endif

static int vhostfs_probe_entry(struct kretprobe_instance *ri,
			       struct pt_regs *regs)
{
	struct vhostfs_probe *probe = (struct vhostfs_probe *)ri->data;
	struct fsnotify_mark_connector *conn;
	struct vhostfs_notify *n;
	struct inode *inode;

	conn = (struct fsnotify_mark_connector *)
		regs_get_kernel_argument(regs, 0);
	if (conn->obj && READ_ONCE(conn->type) == FSNOTIFY_OBJ_TYPE_SB)
		return vhostfs_probe_sb(probe, conn);
#if VHOSTFS_KERNEL >= 610
	if (conn->obj && READ_ONCE(conn->type) == FSNOTIFY_OBJ_TYPE_VFSMOUNT)
		return vhostfs_probe_mount(probe, conn);
#endif
	if (READ_ONCE(conn->type) != FSNOTIFY_OBJ_TYPE_INODE || !conn->obj)
		return 1;
#if VHOSTFS_KERNEL < 610
	inode = container_of(conn->obj, struct inode, i_fsnotify_marks);
#else
	inode = conn->obj;
#endif
	if (inode->i_sb->s_type != vhostfs_type || IS_AUTOMOUNT(inode))
		return 1;
	n = vhostfs_notify_of(get_fuse_conn(inode));
	if (!n || READ_ONCE(ignore_probes))
		return 1;
	if (vhostfs_wants_fid(conn))
		WRITE_ONCE(n->fid_wanted, true);
	probe->notify = n;
	probe->inode = inode;
	probe->nodeid = get_node_id(inode);
	probe->generation = inode->i_generation;
	return 0;
}

static void vhostfs_probed(struct kretprobe_instance *ri, bool attached)
{
	struct vhostfs_probe *probe = (struct vhostfs_probe *)ri->data;
	struct vhostfs_notify *n = probe->notify;
	bool waits;

	spin_lock(&n->watch_lock);
	if (!probe->nodeid) {
		n->shares_changed++;
		vhostfs_wake_session(n);
	} else if (n->session != VHOSTFS_NONE) {
		vhostfs_note(n, probe->nodeid, probe->generation,
			     attached ? probe->inode : NULL);
		vhostfs_wake_session(n);
	}
	waits = attached && n->session != VHOSTFS_NONE &&
		n->session != VHOSTFS_REFUSED;
	spin_unlock(&n->watch_lock);
	if (waits && !vhostfs_is_settled(n, probe->nodeid))
		vhostfs_settle_later(n, probe->nodeid);
}

static int vhostfs_recalc_return(struct kretprobe_instance *ri,
				 struct pt_regs *regs)
{
	vhostfs_probed(ri, true);
	return 0;
}

static int vhostfs_detach_return(struct kretprobe_instance *ri,
				 struct pt_regs *regs)
{
	vhostfs_probed(ri, false);
	return 0;
}

/* Neither can sleep, so no more of them than CPUs run at a time */
static struct kretprobe vhostfs_probes[] = {
	{
		.kp.symbol_name	= "__fsnotify_recalc_mask",
		.entry_handler	= vhostfs_probe_entry,
		.handler	= vhostfs_recalc_return,
		.data_size	= sizeof(struct vhostfs_probe),
		.maxactive	= 64,
	}, {
		.kp.symbol_name	= "fsnotify_detach_connector_from_object",
		.entry_handler	= vhostfs_probe_entry,
		.handler	= vhostfs_detach_return,
		.data_size	= sizeof(struct vhostfs_probe),
		.maxactive	= 64,
	},
};

static unsigned long vhostfs_probes_missed(void)
{
	unsigned long missed = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(vhostfs_probes); i++)
		missed += vhostfs_probes[i].nmissed +
			  vhostfs_probes[i].kp.nmissed;
	return missed;
}

/* ---- sending -------------------------------------------------------------------- */

static bool vhostfs_look_at_marks(struct inode *inode, void *arg)
{
	struct vhostfs_notify *n = arg;

	if (READ_ONCE(inode->i_fsnotify_mask) && !IS_AUTOMOUNT(inode)) {
		spin_lock(&n->watch_lock);
		vhostfs_note(n, get_node_id(inode), inode->i_generation,
			     inode);
		spin_unlock(&n->watch_lock);
	}
	return false;
}

static void vhostfs_no_act(struct inode *inode, void *arg)
{
}

/* Brings the table up to date by the marks on all inodes. Under session_mutex */
static void vhostfs_resync(struct vhostfs_notify *n)
{
	struct vhostfs_watch *watch;
	struct rb_node *node, *next;
	struct fuse_mount *fm;

	vhostfs_count(n, VHOSTFS_RESYNCS);
	spin_lock(&n->watch_lock);
	n->resync = false;
	n->pass++;
	spin_unlock(&n->watch_lock);

	down_read(&n->fc->killsb);
	list_for_each_entry(fm, &n->fc->mounts, fc_entry)
		if (fm->sb)
			vhostfs_walk(fm->sb, vhostfs_look_at_marks,
				     vhostfs_no_act, n);
	up_read(&n->fc->killsb);

	spin_lock(&n->watch_lock);
	for (node = rb_first(&n->watches); node; node = next) {
		next = rb_next(node);
		watch = rb_entry(node, struct vhostfs_watch, node);
		/* Probes have marked what came meanwhile */
		if (watch->pass != n->pass)
			vhostfs_set_mask(n, watch, 0);
		vhostfs_watch_changed(n, watch);
	}
	n->next_resync = jiffies + VHOSTFS_REPAIR_WAIT;
	spin_unlock(&n->watch_lock);
}

/*
 * Perhaps there is room now for what was refused. The more it is, the longer
 * until the next try: a thousand in a second.
 */
static void vhostfs_retry_refused(struct vhostfs_notify *n)
{
	struct vhostfs_watch *watch;
	struct rb_node *node, *next;

	spin_lock(&n->watch_lock);
	n->retry = false;
	n->next_retry = jiffies + VHOSTFS_REPAIR_WAIT *
			(1 + n->nrefused / VHOSTFS_RETRIES);
	for (node = rb_first(&n->watches); node; node = next) {
		next = rb_next(node);
		watch = rb_entry(node, struct vhostfs_watch, node);
		if (!watch->refused)
			continue;
		vhostfs_set_refused(n, watch, false);
		vhostfs_watch_changed(n, watch);
	}
	spin_unlock(&n->watch_lock);
}

/* Under watch_lock: is it time? Else the worker comes back then */
static bool vhostfs_is_due(struct vhostfs_notify *n, bool wanted,
			   unsigned long when)
{
	if (!wanted)
		return false;
	if (time_after_eq(jiffies, when))
		return true;
	queue_delayed_work(vhostfs_wq, &n->session_work, when - jiffies);
	return false;
}

/*
 * What the device reports after its answer; true: it refused. Until then only
 * what it reported before and will report was certain.
 */
static bool vhostfs_watch_answered(struct vhostfs_notify *n,
				   struct vhostfs_watch *watch,
				   const struct vhostfs_request *req, int error)
{
	/* The number has another object, of which the device was told nothing */
	if (watch->generation != le32_to_cpu(req->watch_in.generation))
		return false;

	switch (error) {
	case 0:
	case -ESTALE:
		/* Not known any more: there is nothing to watch there */
		watch->told = req->mask;
		return false;
	case -ENOMEM:
		/* Perhaps ours; a walk sends it again */
		watch->told = req->told;
		n->resync = true;
		return false;
	default:
		/* The earlier watch stays; to end one is not to be refused */
		watch->told = req->mask ? req->told : 0;
		if (watch->mask == req->mask)
			vhostfs_set_refused(n, watch, true);
		/* Ours: the device has gone */
		return req->mask && error != -ENOTCONN &&
		       error != -ECONNABORTED;
	}
}

static void vhostfs_watch_end(struct vhostfs_request *req, int error)
{
	struct vhostfs_notify *n = req->notify;
	struct vhostfs_watch *watch = req->watch;
	bool log = false;

	spin_lock(&n->watch_lock);
	n->sending--;
	watch->sending = false;
	if (vhostfs_watch_answered(n, watch, req, error)) {
		log = !n->full_logged;
		n->full_logged = true;
	} else if (!error && !req->mask && n->nrefused) {
		n->retry = true;
	}
	/* That a watch on what is gone ends is no refusal */
	if (error && (error != -ESTALE || req->mask))
		vhostfs_count(n, VHOSTFS_WATCHES_REFUSED);
	if (!error || !n->resync || watch->mask == watch->told)
		vhostfs_watch_changed(n, watch);
	vhostfs_wake_session(n);
	spin_unlock(&n->watch_lock);
	wake_up_all(&n->settled);

	if (log)
		dev_warn(&n->vdev->dev,
			 "the host does not watch all that is watched here: error %d\n",
			 error);
	kfree(req);
}

/* Sends one of the changes; false: there is none, or enough are on their way */
static bool vhostfs_send_watch(struct vhostfs_notify *n, struct fuse_mount *fm)
{
	struct vhostfs_watch *watch;
	struct vhostfs_request *req;
	u32 generation;

	req = vhostfs_new_request(FUSE_FSNOTIFY_WATCH, 0,
				  sizeof(req->watch_in), 0);
	spin_lock(&n->watch_lock);
	if (!req || n->sending >= VHOSTFS_WATCHES_IN_FLIGHT ||
	    list_empty(&n->changed)) {
		if (!req) {
			n->resync = true;
			vhostfs_wake_session(n);
		}
		spin_unlock(&n->watch_lock);
		kfree(req);
		return false;
	}
	watch = list_first_entry(&n->changed, struct vhostfs_watch, changed);
	list_del_init(&watch->changed);
	watch->sending = true;
	n->sending++;
	req->end = vhostfs_watch_end;
	req->watch = watch;
	req->mask = watch->mask;
	req->told = watch->told;
	watch->told &= watch->mask;
	req->args.nodeid = watch->nodeid;
	generation = watch->generation;
	spin_unlock(&n->watch_lock);

	req->watch_in.mask = cpu_to_le64(req->mask);
	req->watch_in.generation = cpu_to_le32(generation);
	vhostfs_count(n, VHOSTFS_WATCHES_SENT);
	vhostfs_send(n, fm, req);
	return true;
}

/* ---- whole superblocks ------------------------------------------------------------ */

/*
 * A mark on a superblock wants to hear of everything there, but the device
 * tells only of directories that this guest has looked up. So it is asked to
 * tell of all that is held here, and a walk looks every directory up and holds
 * it until the last mark goes.
 *
 * A mark of our own beside it says which directories come and go from then on,
 * whoever makes them: events of the host are raised, and come here as well.
 */

static void vhostfs_put_held(struct vhostfs_notify *n,
			     struct vhostfs_held *held)
{
	iput(held->inode);
	kfree(held);
	atomic_dec(&n->nheld);
}

/* Under share->lock; false: the walk has been there */
static bool vhostfs_take_unread(struct vhostfs_share *share,
				struct vhostfs_held *held)
{
	if (list_empty(&held->unread))
		return false;
	list_del_init(&held->unread);
	atomic_dec(&share->notify->nunread);
	return true;
}

static void vhostfs_add_unread(struct vhostfs_share *share,
			       struct vhostfs_held *held)
{
	if (!list_empty(&held->unread))
		return;
	list_add_tail(&held->unread, &share->unread);
	atomic_inc(&share->notify->nunread);
}

/* Where the inode is or belongs in the tree. Under share->lock */
static struct vhostfs_held *vhostfs_find_held(struct vhostfs_share *share,
					      const struct inode *inode,
					      struct rb_node ***where,
					      struct rb_node **parent)
{
	struct rb_node **link = &share->held.rb_node;
	struct vhostfs_held *held;

	*parent = NULL;
	while (*link) {
		*parent = *link;
		held = rb_entry(*link, struct vhostfs_held, node);
		if (held->inode == inode)
			return held;
		link = inode < held->inode ? &(*link)->rb_left :
					     &(*link)->rb_right;
	}
	*where = link;
	return NULL;
}

static bool vhostfs_may_hold(struct vhostfs_share *share)
{
	struct vhostfs_notify *n = share->notify;

	if (atomic_read(&n->nheld) < READ_ONCE(max_directories))
		return true;
	if (!READ_ONCE(n->held_full_logged)) {
		WRITE_ONCE(n->held_full_logged, true);
		dev_warn(&n->vdev->dev,
			 "more than max_directories=%u in a share that is watched as a whole: what the host does in some is not seen\n",
			 max_directories);
	}
	return false;
}

/* Holds a directory, which the walk is then to read */
static void vhostfs_hold(struct vhostfs_share *share, struct inode *inode)
{
	struct vhostfs_held *held;
	struct rb_node **where, *parent;

	/* The root of a submount has a superblock of its own */
	if (!S_ISDIR(inode->i_mode) || IS_AUTOMOUNT(inode) ||
	    inode->i_sb != share->sb || fuse_is_bad(inode) ||
	    !vhostfs_may_hold(share))
		return;
	held = kzalloc(sizeof(*held), GFP_KERNEL);
	if (!held)
		return;
	held->inode = igrab(inode);
	INIT_LIST_HEAD(&held->unread);
	spin_lock(&share->lock);
	/* Without links it was let go already, or never had to be held */
	if (held->inode && share->open && inode->i_nlink &&
	    !vhostfs_find_held(share, inode, &where, &parent)) {
		rb_link_node(&held->node, parent, where);
		rb_insert_color(&held->node, &share->held);
		atomic_inc(&share->notify->nheld);
		vhostfs_add_unread(share, held);
		queue_work(vhostfs_wq, &share->walk_work);
		held = NULL;
	}
	spin_unlock(&share->lock);
	if (held) {
		iput(held->inode);
		kfree(held);
	}
}

/* It is gone */
static void vhostfs_let_go(struct vhostfs_share *share, struct inode *inode)
{
	struct vhostfs_held *held;
	struct rb_node **where, *parent;

	spin_lock(&share->lock);
	held = vhostfs_find_held(share, inode, &where, &parent);
	if (held) {
		rb_erase(&held->node, &share->held);
		vhostfs_take_unread(share, held);
	}
	spin_unlock(&share->lock);
	if (held)
		vhostfs_put_held(share->notify, held);
}

static int vhostfs_share_event(struct fsnotify_group *group, u32 mask,
			       const void *data, int data_type,
			       struct inode *dir, const struct qstr *name,
			       u32 cookie, struct fsnotify_iter_info *iter_info)
{
	struct fsnotify_mark *mark = fsnotify_iter_sb_mark(iter_info);
	struct inode *inode = fsnotify_data_inode(data, data_type);
	struct vhostfs_share *share;

	if (!mark || !inode || !S_ISDIR(inode->i_mode))
		return 0;
	share = container_of(mark, struct vhostfs_share, mark);
	if (mask & (FS_DELETE | FS_DELETE_SELF))
		vhostfs_let_go(share, inode);
	else
		vhostfs_hold(share, inode);
	return 0;
}

static void vhostfs_free_share(struct fsnotify_mark *mark)
{
	struct vhostfs_share *share = container_of(mark, struct vhostfs_share,
						   mark);

	vhostfs_put(share->notify);
	kfree(share);
}

static const struct fsnotify_ops vhostfs_share_ops = {
	.handle_event	= vhostfs_share_event,
	.free_mark	= vhostfs_free_share,
};

/* A request, and its answer; frees nothing */
static int vhostfs_ask(struct vhostfs_notify *n, struct fuse_mount *fm,
		       struct vhostfs_request *req)
{
	DECLARE_COMPLETION_ONSTACK(done);

	req->end = vhostfs_wake;
	req->done = &done;
	vhostfs_send(n, fm, req);
	wait_for_completion(&done);
	return req->error;
}

/*
 * Looks up the directories among the entries that a READDIR brought. Returns
 * where the next one goes on, 0 at the end or where it makes no sense.
 */
static u64 vhostfs_read_entries(struct vhostfs_share *share, struct inode *dir,
				const char *buf, size_t left)
{
	const struct fuse_dirent *entry;
	struct inode *inode;
	u64 offset = 0;

	while (left > FUSE_NAME_OFFSET && READ_ONCE(share->open)) {
		entry = (const struct fuse_dirent *)buf;
		if (!entry->namelen || entry->namelen > NAME_MAX ||
		    FUSE_DIRENT_SIZE(entry) > left)
			return 0;
		offset = entry->off;
		buf += FUSE_DIRENT_SIZE(entry);
		left -= FUSE_DIRENT_SIZE(entry);
		if ((entry->type != DT_DIR && entry->type != DT_UNKNOWN) ||
		    (entry->name[0] == '.' &&
		     (entry->namelen == 1 ||
		      (entry->namelen == 2 && entry->name[1] == '.'))))
			continue;
		inode = vhostfs_look_up(dir, entry->name, entry->namelen);
		if (inode)
			vhostfs_hold(share, inode);
		iput(inode);
		cond_resched();
	}
	return offset;
}

static void vhostfs_read_dir(struct vhostfs_share *share, struct inode *dir,
			     char *buf)
{
	struct fuse_mount *fm = get_fuse_mount_super(share->sb);
	struct vhostfs_notify *n = share->notify;
	u64 nodeid = get_node_id(dir), offset = 0, last, fh;
	struct vhostfs_request *req;
	int err;

	req = vhostfs_new_request(FUSE_OPENDIR, nodeid, sizeof(req->open_in),
				  sizeof(req->open_out));
	if (!req)
		return;
	req->open_in.flags = O_RDONLY | O_DIRECTORY;
	err = vhostfs_ask(n, fm, req);
	fh = req->open_out.fh;
	kfree(req);
	if (err)
		return;

	do {
		req = vhostfs_new_request(FUSE_READDIR, nodeid,
					  sizeof(req->read_in), 1);
		if (!req)
			break;
		req->read_in.fh = fh;
		req->read_in.offset = offset;
		req->read_in.size = VHOSTFS_READDIR_SIZE;
		req->args.out_args[0].size = VHOSTFS_READDIR_SIZE;
		req->args.out_args[0].value = buf;
		req->args.out_argvar = true;
		last = offset;
		offset = 0;
		if (!vhostfs_ask(n, fm, req))
			offset = vhostfs_read_entries(share, dir, buf,
						      req->args.out_args[0].size);
		kfree(req);
	} while (offset && offset != last && READ_ONCE(share->open));

	req = vhostfs_new_request(FUSE_RELEASEDIR, nodeid,
				  sizeof(req->release_in), 0);
	if (!req)
		return;
	req->release_in.fh = fh;
	vhostfs_ask(n, fm, req);
	kfree(req);
}

static struct inode *vhostfs_next_unread(struct vhostfs_share *share)
{
	struct vhostfs_held *held;
	struct inode *inode = NULL;

	spin_lock(&share->lock);
	held = list_first_entry_or_null(&share->unread, struct vhostfs_held,
					unread);
	if (held) {
		list_del_init(&held->unread);
		inode = held->inode;
		ihold(inode);
	}
	spin_unlock(&share->lock);
	return inode;
}

static void vhostfs_walk_work(struct work_struct *work)
{
	struct vhostfs_share *share = container_of(work, struct vhostfs_share,
						   walk_work);
	struct vhostfs_notify *n = share->notify;
	char *buf = kmalloc(VHOSTFS_READDIR_SIZE, GFP_KERNEL | __GFP_NOFAIL);
	struct inode *inode;

	while ((inode = vhostfs_next_unread(share))) {
		if (vhostfs_is_granted(n))
			vhostfs_read_dir(share, inode, buf);
		iput(inode);
		if (atomic_dec_and_test(&n->nunread))
			wake_up_all(&n->settled);
		cond_resched();
	}
	kfree(buf);
}

/* Directories may have come that nobody told us of. Under fc->killsb */
static void vhostfs_walk_again(struct vhostfs_notify *n)
{
	/* The worker does it, which may use the list */
	spin_lock(&n->watch_lock);
	if (n->share_mask) {
		n->shares_changed++;
		n->walk_again = true;
		vhostfs_wake_session(n);
	}
	spin_unlock(&n->watch_lock);
}

static void vhostfs_read_all(struct vhostfs_share *share)
{
	struct rb_node *node;

	spin_lock(&share->lock);
	for (node = rb_first(&share->held); node; node = rb_next(node))
		vhostfs_add_unread(share, rb_entry(node, struct vhostfs_held,
						   node));
	if (!list_empty(&share->unread))
		queue_work(vhostfs_wq, &share->walk_work);
	spin_unlock(&share->lock);
}

/* The walk begins at the root, and what it meets is held */
static void vhostfs_open_share(struct vhostfs_share *share)
{
	spin_lock(&share->lock);
	share->open = true;
	spin_unlock(&share->lock);
	vhostfs_hold(share, d_inode(share->sb->s_root));
}

/* Everything is let go. Under session_mutex, as all that follows */
static void vhostfs_close_share(struct vhostfs_share *share)
{
	struct vhostfs_held *held;
	struct rb_node *node;

	spin_lock(&share->lock);
	share->open = false;
	spin_unlock(&share->lock);
	cancel_work_sync(&share->walk_work);
	/* Nobody adds to it any more; who lets go takes one out at a time */
	spin_lock(&share->lock);
	while ((node = rb_first(&share->held))) {
		held = rb_entry(node, struct vhostfs_held, node);
		rb_erase(node, &share->held);
		vhostfs_take_unread(share, held);
		spin_unlock(&share->lock);
		vhostfs_put_held(share->notify, held);
		cond_resched();
		spin_lock(&share->lock);
	}
	spin_unlock(&share->lock);
}

static void vhostfs_end_share(struct vhostfs_share *share)
{
	if (!share)
		return;
	list_del(&share->list);
	vhostfs_close_share(share);
	fsnotify_destroy_mark(&share->mark, vhostfs_share_group);
	fsnotify_put_mark(&share->mark);
}

static struct vhostfs_share *vhostfs_find_share(struct vhostfs_notify *n,
						const struct super_block *sb)
{
	struct vhostfs_share *share;

	list_for_each_entry(share, &n->shares, list)
		if (share->sb == sb)
			return share;
	return NULL;
}

static struct vhostfs_share *vhostfs_new_share(struct vhostfs_notify *n,
					       struct super_block *sb)
{
	struct vhostfs_share *share = kzalloc(sizeof(*share), GFP_KERNEL);

	if (!share)
		return NULL;
	share->sb = sb;
	spin_lock_init(&share->lock);
	share->held = RB_ROOT;
	INIT_LIST_HEAD(&share->unread);
	INIT_WORK(&share->walk_work, vhostfs_walk_work);
	kref_get(&n->kref);
	share->notify = n;
	fsnotify_init_mark(&share->mark, vhostfs_share_group);
	share->mark.mask = FS_CREATE | FS_DELETE | FS_MOVED_TO |
			   FS_DELETE_SELF | FS_ISDIR;
	if (vhostfs_add_mark(&share->mark, NULL, sb)) {
		fsnotify_put_mark(&share->mark);
		return NULL;
	}
	list_add(&share->list, &n->shares);
	return share;
}

/* What all marks on the superblock but ours want together */
static u32 vhostfs_others_mask(struct vhostfs_share *share)
{
	struct fsnotify_mark_connector *conn = share->mark.connector;
	struct fsnotify_mark *mark;
	u32 mask = 0;

	spin_lock(&conn->lock);
	hlist_for_each_entry(mark, &conn->list, obj_list)
		if (mark != &share->mark &&
		    mark->group != vhostfs_group &&
		    (mark->flags & FSNOTIFY_MARK_FLAG_ATTACHED))
			mask |= fsnotify_calc_mask(mark);
	spin_unlock(&conn->lock);
	return mask;
}

/* Of one superblock, or those whose watchers have left */
static void vhostfs_drop_mount_marks(struct vhostfs_notify *n,
				     const struct super_block *sb)
{
	struct vhostfs_mount_mark *each, *next;
	LIST_HEAD(dropped);

	spin_lock(&n->watch_lock);
	list_for_each_entry_safe(each, next, &n->mount_marks, list) {
		if (sb ? each->sb != sb : vhostfs_is_attached(each->mark))
			continue;
		list_move(&each->list, &dropped);
		n->nmount_marks--;
	}
	spin_unlock(&n->watch_lock);
	list_for_each_entry_safe(each, next, &dropped, list) {
		fsnotify_put_mark(each->mark);
		kfree(each);
	}
}

/* What marks on mounts of this superblock want together */
static u32 vhostfs_mounts_mask(struct vhostfs_notify *n,
			       const struct super_block *sb)
{
	struct vhostfs_mount_mark *each;
	u32 mask = 0;

	spin_lock(&n->watch_lock);
	list_for_each_entry(each, &n->mount_marks, list)
		if (each->sb == sb && vhostfs_is_attached(each->mark) &&
		    vhostfs_reports_fids(each->mark->group))
			mask |= each->mark->mask;
	spin_unlock(&n->watch_lock);
	return mask & VHOSTFS_CHILD_EVENTS;
}

static u32 vhostfs_look_at_sb(struct vhostfs_notify *n, struct super_block *sb)
{
	struct vhostfs_share *share = vhostfs_find_share(n, sb);
	u32 wish = vhostfs_mounts_mask(n, sb);

	if (!share && (wish || READ_ONCE(sb->s_fsnotify_mask)))
		share = vhostfs_new_share(n, sb);
	if (!share)
		return 0;
	wish = vhostfs_wish(wish | vhostfs_others_mask(share));
	if (!wish)
		vhostfs_end_share(share);
	return wish;
}

static int vhostfs_send_share_watch(struct vhostfs_notify *n,
				    struct fuse_mount *fm, u32 mask)
{
	struct vhostfs_request *req;
	int err;

	req = vhostfs_new_request(FUSE_FSNOTIFY_WATCH, FUSE_ROOT_ID,
				  sizeof(req->watch_in), 0);
	if (!req)
		return -ENOMEM;
	req->watch_in.mask = cpu_to_le64(mask);
	req->watch_in.flags = cpu_to_le32(FSNOTIFY_WATCH_FILESYSTEM);
	vhostfs_count(n, VHOSTFS_WATCHES_SENT);
	err = vhostfs_ask(n, fm, req);
	kfree(req);
	return err;
}

static void vhostfs_share_refused(struct vhostfs_notify *n, int err)
{
	vhostfs_count(n, VHOSTFS_WATCHES_REFUSED);
	if (!n->share_refused)
		dev_warn(&n->vdev->dev,
			 "the host does not watch whole shares (%d): marks on the file system see this guest's changes, and the host's where single inodes are watched\n",
			 err);
	n->share_refused = true;
}

/* Brings the device up to date about marks on superblocks. Under session_mutex */
static void vhostfs_watch_shares(struct vhostfs_notify *n,
				 struct fuse_mount *fm)
{
	struct vhostfs_share *share;
	unsigned int changed;
	struct fuse_mount *each;
	bool again;
	u32 wish = 0;
	int err = 0;

	spin_lock(&n->watch_lock);
	changed = n->shares_changed;
	again = n->walk_again;
	n->walk_again = false;
	spin_unlock(&n->watch_lock);
	vhostfs_drop_mount_marks(n, NULL);

	down_read(&n->fc->killsb);
	list_for_each_entry(each, &n->fc->mounts, fc_entry)
		if (each->sb)
			wish |= vhostfs_look_at_sb(n, each->sb);
	up_read(&n->fc->killsb);
	if (wish)
		wish |= VHOSTFS_TREE_EVENTS;
	if (wish != n->share_mask) {
		err = n->granted & FUSE_FSNOTIFY_WATCH_FILESYSTEM ?
		      vhostfs_send_share_watch(n, fm, wish) : -EOPNOTSUPP;
		if (!err)
			WRITE_ONCE(n->share_mask, wish);
		else
			vhostfs_share_refused(n, err);
	}
	list_for_each_entry(share, &n->shares, list) {
		if (n->share_mask && !share->open)
			vhostfs_open_share(share);
		else if (again)
			vhostfs_read_all(share);
	}

	if (list_empty(&n->shares) && !READ_ONCE(n->nwatches) &&
	    READ_ONCE(n->fid_wanted)) {
		WRITE_ONCE(n->fid_wanted, false);
		mutex_lock(&n->event_mutex);
		vhostfs_forget_recent(n, NULL, NULL);
		mutex_unlock(&n->event_mutex);
	}

	spin_lock(&n->watch_lock);
	n->shares_done = changed;
	vhostfs_wake_session(n);
	spin_unlock(&n->watch_lock);
	wake_up_all(&n->settled);
}

/* ---- session -------------------------------------------------------------------- */

static void vhostfs_set_session(struct vhostfs_notify *n,
				enum vhostfs_session session)
{
	spin_lock(&n->watch_lock);
	n->session = session;
	n->resync = session == VHOSTFS_GRANTED;
	n->next_resync = jiffies;
	n->retry = false;
	n->next_retry = jiffies;
	n->full_logged = false;
	spin_unlock(&n->watch_lock);
	wake_up_all(&n->settled);
}

/* The way for elements to travel that there is */
static u64 vhostfs_deliveries(const struct vhostfs_notify *n)
{
	if (n->has_queue)
		return FUSE_FSNOTIFY_VIRTQUEUE;
	return n->nparked ? FUSE_FSNOTIFY_PARKED : 0;
}

static const char *vhostfs_why_refused(struct vhostfs_notify *n,
				       const struct vhostfs_request *req,
				       int error)
{
	const struct fuse_fsnotify_init_out *out = &req->init_out;

	if (error)
		return "the server does not offer them";
	/* The size is what the device says that it sent */
	if (req->args.out_args[0].size < sizeof(*out))
		return "its answer is too short";
	if (le32_to_cpu(out->major) != FUSE_FSNOTIFY_MAJOR)
		return "its version is not known";
	if (!(le64_to_cpu(out->flags) & vhostfs_deliveries(n)))
		return n->has_queue ?
		       "the server does not use the queue" :
		       "there is no queue for them, and the server parks no requests";
	if (le32_to_cpu(out->notify_buf_size) > n->buf_size)
		return "its notifications are too long";
	return NULL;
}

/* Not the server's no: it may never have seen the request */
static bool vhostfs_is_unanswered(int error)
{
	switch (error) {
	case -ENOMEM:
	case -EINTR:
	case -EAGAIN:
	case -ENOTCONN:
	case -ECONNREFUSED:
	case -ECONNABORTED:
		return true;
	default:
		return false;
	}
}

/* Later each time: a connection that has failed does not come back */
static void vhostfs_ask_again(struct vhostfs_notify *n, int error)
{
	unsigned int tries = min(n->tries++, VHOSTFS_MAX_TRIES);

	if (!tries)
		dev_info(&n->vdev->dev,
			 "the server could not be asked for notifications (%d), trying again\n",
			 error);
	vhostfs_set_session(n, VHOSTFS_NEW);
	queue_delayed_work(vhostfs_wq, &n->session_work,
			   VHOSTFS_REPAIR_WAIT << tries);
}

static void vhostfs_init_end(struct vhostfs_request *req, int error)
{
	struct vhostfs_notify *n = req->notify;
	const char *why = vhostfs_why_refused(n, req, error);

	if (vhostfs_is_unanswered(error)) {
		vhostfs_ask_again(n, error);
	} else if (why) {
		dev_info(&n->vdev->dev,
			 "no notifications from the host: %s (%d)\n", why,
			 error);
		vhostfs_set_session(n, VHOSTFS_REFUSED);
	} else {
		dev_info(&n->vdev->dev, "notifications from the host by %s\n",
			 n->has_queue ? "the notification queue" :
			 "parked requests: the device has no queue for them");
		if (!n->has_queue)
			n->max_parked = min(le32_to_cpu(req->init_out.max_parked),
					    n->nparked);
		n->granted = le64_to_cpu(req->init_out.flags);
		vhostfs_set_session(n, VHOSTFS_ANSWERED);
		mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	}
	kfree(req);
}

static void vhostfs_send_init(struct vhostfs_notify *n, struct fuse_mount *fm)
{
	struct vhostfs_request *req;
	struct fuse_fsnotify_init_in *in;

	req = vhostfs_new_request(FUSE_FSNOTIFY_INIT, FUSE_ROOT_ID,
				  sizeof(req->init_in), sizeof(req->init_out));
	if (!req) {
		queue_delayed_work(vhostfs_wq, &n->session_work,
				   VHOSTFS_REPAIR_WAIT);
		return;
	}
	in = &req->init_in;
	in->major = cpu_to_le32(FUSE_FSNOTIFY_MAJOR);
	in->minor = cpu_to_le32(FUSE_FSNOTIFY_MINOR);
	in->flags = cpu_to_le64(vhostfs_deliveries(n) |
				FUSE_FSNOTIFY_RENAME | FUSE_FSNOTIFY_CHILD |
				FUSE_FSNOTIFY_WATCH_FILESYSTEM);
	in->mask = cpu_to_le64(VHOSTFS_EVENTS | FS_ISDIR | FS_Q_OVERFLOW);
	in->buf_size = cpu_to_le32(n->buf_size);
	/* A server with a newer minor number answers with the prefix it has */
	req->args.out_argvar = true;
	req->end = vhostfs_init_end;
	vhostfs_set_session(n, VHOSTFS_ASKED);
	vhostfs_send(n, fm, req);
}

/*
 * Nothing is watched yet, so whatever is in the queue is of an earlier session,
 * and could mean objects of this one by the same numbers. It is taken out while
 * nothing is raised.
 */
static void vhostfs_begin(struct vhostfs_notify *n)
{
	unsigned int left;

	for (left = 0; left <= n->nbufs + n->nparked; left += VHOSTFS_BATCH) {
		queue_work(vhostfs_wq, &n->receive_work);
		flush_work(&n->receive_work);
	}
	vhostfs_set_session(n, VHOSTFS_GRANTED);
	mod_delayed_work(vhostfs_wq, &n->park_work, 0);
}

static void vhostfs_session_work(struct work_struct *work)
{
	struct vhostfs_notify *n = container_of(to_delayed_work(work),
						struct vhostfs_notify,
						session_work);
	enum vhostfs_session session;
	struct fuse_mount *fm;
	bool resync, retry;

	mutex_lock(&n->session_mutex);
	if (n->paused || !n->fc)
		goto out;
	/*
	 * Of the connection's mounts any will do. It stays: before one goes,
	 * vhostfs_notify_kill_sb() waits for us and for our requests.
	 */
	down_read(&n->fc->killsb);
	fm = list_first_entry_or_null(&n->fc->mounts, struct fuse_mount,
				      fc_entry);
	up_read(&n->fc->killsb);
	if (!fm)
		goto out;

	if (READ_ONCE(n->session) == VHOSTFS_ANSWERED)
		vhostfs_begin(n);
	spin_lock(&n->watch_lock);
	session = n->session;
	resync = vhostfs_is_due(n, n->resync, n->next_resync);
	retry = vhostfs_is_due(n, n->retry, n->next_retry);
	spin_unlock(&n->watch_lock);
	if (session == VHOSTFS_NEW) {
		vhostfs_send_init(n, fm);
	} else if (session == VHOSTFS_GRANTED) {
		if (resync)
			vhostfs_resync(n);
		if (retry)
			vhostfs_retry_refused(n);
		while (vhostfs_send_watch(n, fm))
			cond_resched();
		vhostfs_watch_shares(n, fm);
	}
out:
	mutex_unlock(&n->session_mutex);
}

/* Without probes, or when some were missed, only walks find all watches */
static void vhostfs_check_probes(struct work_struct *work);
static DECLARE_DELAYED_WORK(vhostfs_probe_work, vhostfs_check_probes);

static void vhostfs_check_probes(struct work_struct *work)
{
	static unsigned long seen;
	unsigned long missed = vhostfs_probes_missed();
	struct vhostfs_mount_mark *each;
	struct vhostfs_notify *n;
	bool left = false;

	mutex_lock(&vhostfs_devices_mutex);
	list_for_each_entry(n, &vhostfs_devices, list) {
		spin_lock(&n->watch_lock);
		if (missed != seen || vhostfs_no_probes)
			n->resync = true;
		list_for_each_entry(each, &n->mount_marks, list)
			if (!vhostfs_is_attached(each->mark))
				left = true;
		n->shares_changed += left;
		if (n->resync || left)
			vhostfs_wake_session(n);
		spin_unlock(&n->watch_lock);
		left = false;
	}
	mutex_unlock(&vhostfs_devices_mutex);
	seen = missed;
	queue_delayed_work(vhostfs_wq, &vhostfs_probe_work, 2 * HZ);
}

/* ---- superblocks ---------------------------------------------------------------- */

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
	n->fc = get_fuse_conn_super(sb);
	n->share_mask = 0;
	n->share_refused = false;
	n->held_full_logged = false;
	memset(n->cookies, 0, sizeof(n->cookies));
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
		n->fc = NULL;
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

/* ---- sysfs: the folder "notifications" of the virtio device -------------------- */

static struct vhostfs_notify *vhostfs_of_device(struct device *dev)
{
	struct vhostfs_notify *n, *found = NULL;

	/* It stays: removing the attributes waits for their users */
	mutex_lock(&vhostfs_devices_mutex);
	list_for_each_entry(n, &vhostfs_devices, list)
		if (&n->vdev->dev == dev)
			found = n;
	mutex_unlock(&vhostfs_devices_mutex);
	return found;
}

static ssize_t vhostfs_counter_show(struct device *dev,
				    struct device_attribute *attr, char *buf)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);
	struct dev_ext_attribute *ext;

	if (!n)
		return -ENODEV;
	ext = container_of(attr, struct dev_ext_attribute, attr);
	return sysfs_emit(buf, "%lld\n",
			  atomic64_read(&n->counters[(uintptr_t)ext->var]));
}

#define VHOSTFS_COUNTER(name, counter)					\
static struct dev_ext_attribute vhostfs_attr_##name = {			\
	__ATTR(name, 0444, vhostfs_counter_show, NULL),			\
	(void *)(uintptr_t)(counter)					\
}

VHOSTFS_COUNTER(received, VHOSTFS_RECEIVED);
VHOSTFS_COUNTER(raised, VHOSTFS_RAISED);
VHOSTFS_COUNTER(stale, VHOSTFS_STALE);
VHOSTFS_COUNTER(malformed, VHOSTFS_MALFORMED);
VHOSTFS_COUNTER(overflows, VHOSTFS_OVERFLOWS);
VHOSTFS_COUNTER(halves_timed_out, VHOSTFS_HALVES_TIMED_OUT);
VHOSTFS_COUNTER(watches_sent, VHOSTFS_WATCHES_SENT);
VHOSTFS_COUNTER(watches_refused, VHOSTFS_WATCHES_REFUSED);
VHOSTFS_COUNTER(resyncs, VHOSTFS_RESYNCS);

static ssize_t state_show(struct device *dev, struct device_attribute *attr,
			  char *buf)
{
	static const char * const names[] = {
		[VHOSTFS_NONE]		= "unmounted",
		[VHOSTFS_NEW]		= "mounting",
		[VHOSTFS_ASKED]		= "asked",
		[VHOSTFS_ANSWERED]	= "asked",
		[VHOSTFS_GRANTED]	= "virtqueue",
		[VHOSTFS_REFUSED]	= "none",
	};
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	if (READ_ONCE(n->session) == VHOSTFS_GRANTED && !n->has_queue)
		return sysfs_emit(buf, "parked\n");
	return sysfs_emit(buf, "%s\n", names[READ_ONCE(n->session)]);
}
static DEVICE_ATTR_RO(state);

/* Inodes that the host watches or is about to */
static ssize_t watches_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	return sysfs_emit(buf, "%u\n", READ_ONCE(n->nwatches));
}
static DEVICE_ATTR_RO(watches);

/* Directories that are held because the whole share is watched */
static ssize_t directories_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	return sysfs_emit(buf, "%d\n", atomic_read(&n->nheld));
}
static DEVICE_ATTR_RO(directories);

static ssize_t probes_missed_show(struct device *dev,
				  struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%lu\n", vhostfs_probes_missed());
}
static DEVICE_ATTR_RO(probes_missed);

/* Anything written starts a walk over all inodes and tries again what was refused */
static ssize_t resync_store(struct device *dev, struct device_attribute *attr,
			    const char *buf, size_t count)
{
	struct vhostfs_notify *n = vhostfs_of_device(dev);

	if (!n)
		return -ENODEV;
	spin_lock(&n->watch_lock);
	n->resync = true;
	n->next_resync = jiffies;
	n->retry = true;
	n->next_retry = jiffies;
	spin_unlock(&n->watch_lock);
	mod_delayed_work(vhostfs_wq, &n->session_work, 0);
	return count;
}
static DEVICE_ATTR_WO(resync);

static struct attribute *vhostfs_attrs[] = {
	&vhostfs_attr_received.attr.attr,
	&vhostfs_attr_raised.attr.attr,
	&vhostfs_attr_stale.attr.attr,
	&vhostfs_attr_malformed.attr.attr,
	&vhostfs_attr_overflows.attr.attr,
	&vhostfs_attr_halves_timed_out.attr.attr,
	&vhostfs_attr_watches_sent.attr.attr,
	&vhostfs_attr_watches_refused.attr.attr,
	&vhostfs_attr_resyncs.attr.attr,
	&dev_attr_state.attr,
	&dev_attr_watches.attr,
	&dev_attr_directories.attr,
	&dev_attr_probes_missed.attr,
	&dev_attr_resync.attr,
	NULL
};

static const struct attribute_group vhostfs_attr_group = {
	.name	= "notifications",
	.attrs	= vhostfs_attrs,
};

/* ---- device --------------------------------------------------------------------- */

static u32 vhostfs_config_buf_size(struct virtio_device *vdev)
{
	__le32 size;

	vdev->config->get(vdev, VHOSTFS_CONFIG_BUF_SIZE, &size, sizeof(size));
	return le32_to_cpu(size);
}

/* Takes the feature only where the device makes sense; it works without */
int vhostfs_notify_validate(struct virtio_device *vdev)
{
	u32 size;

	if (!__virtio_test_bit(vdev, VIRTIO_FS_F_NOTIFICATION))
		return 0;
	size = vhostfs_config_buf_size(vdev);
	if (size < VHOSTFS_MIN_BUF_SIZE || size > VHOSTFS_MAX_BUF_SIZE) {
		dev_warn(&vdev->dev,
			 "no notifications: the device says notify_buf_size %u, %zu to %u were expected\n",
			 size, VHOSTFS_MIN_BUF_SIZE, VHOSTFS_MAX_BUF_SIZE);
		__virtio_clear_bit(vdev, VIRTIO_FS_F_NOTIFICATION);
	}
	return 0;
}

int vhostfs_notify_probe(struct virtio_device *vdev,
			 struct vhostfs_notify **notify)
{
	struct vhostfs_notify *n;
	u32 size;

	*notify = NULL;
	n = kzalloc(sizeof(*n), GFP_KERNEL);
	if (!n)
		return -ENOMEM;
	kref_init(&n->kref);
	INIT_LIST_HEAD(&n->list);
	n->vdev = vdev;
	n->has_queue = virtio_has_feature(vdev, VIRTIO_FS_F_NOTIFICATION);
	/* Read again, so not trusted again */
	size = n->has_queue ? vhostfs_config_buf_size(vdev) : 0;
	n->buf_size = clamp_t(u32, size, VHOSTFS_ELEMENT_SIZE,
			      VHOSTFS_MAX_BUF_SIZE);
	INIT_LIST_HEAD(&n->unposted);
	INIT_LIST_HEAD(&n->answered);
	spin_lock_init(&n->answered_lock);
	INIT_DELAYED_WORK(&n->park_work, vhostfs_park_work);
	spin_lock_init(&n->vq_lock);
	INIT_WORK(&n->receive_work, vhostfs_receive_work);
	INIT_DELAYED_WORK(&n->half_work, vhostfs_half_timeout);
	mutex_init(&n->event_mutex);
	INIT_LIST_HEAD(&n->halves);
	mutex_init(&n->session_mutex);
	INIT_DELAYED_WORK(&n->session_work, vhostfs_session_work);
	init_waitqueue_head(&n->idle);
	spin_lock_init(&n->watch_lock);
	n->watches = RB_ROOT;
	INIT_LIST_HEAD(&n->changed);
	init_waitqueue_head(&n->settled);
	INIT_LIST_HEAD(&n->shares);
	INIT_LIST_HEAD(&n->mount_marks);
	*notify = n;
	return 0;
}

bool vhostfs_notify_has_queue(const struct vhostfs_notify *n)
{
	return n && n->has_queue;
}

/* Buffers for queue 1. Without memory it has fewer */
static void vhostfs_alloc_buffers(struct vhostfs_notify *n,
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

/*
 * The device is running: fills queue 1, @vq, where there is one; @requests is
 * the queue for parked requests otherwise.
 */
void vhostfs_notify_start(struct vhostfs_notify *n, struct virtqueue *vq,
			  struct virtqueue *requests)
{
	unsigned int i;

	if (!n)
		return;
	if (n->has_queue)
		vhostfs_alloc_buffers(n, vq);
	else
		vhostfs_alloc_parked(n, requests);

	mutex_lock(&vhostfs_devices_mutex);
	list_add_tail(&n->list, &vhostfs_devices);
	mutex_unlock(&vhostfs_devices_mutex);
	n->has_attrs = !sysfs_create_group(&n->vdev->dev.kobj,
					   &vhostfs_attr_group);
	if (!(n->nbufs + n->nparked) || !n->has_attrs)
		dev_warn(&n->vdev->dev, "no memory for %s\n",
			 n->has_attrs ? "notifications" : "counters");

	spin_lock(&n->vq_lock);
	n->running = true;
	if (n->has_queue) {
		n->vq = vq;
		for (i = 0; i < n->nbufs; i++)
			vhostfs_give_buffer(n, n->bufs[i]);
		virtqueue_kick(vq);
	}
	spin_unlock(&n->vq_lock);
}

/* The device is about to be reset; tasks that wait for it have been released */
void vhostfs_notify_stop(struct vhostfs_notify *n)
{
	if (!n)
		return;
	if (n->has_attrs)
		sysfs_remove_group(&n->vdev->dev.kobj, &vhostfs_attr_group);
	mutex_lock(&vhostfs_devices_mutex);
	list_del_init(&n->list);
	mutex_unlock(&vhostfs_devices_mutex);

	/* It may be mounted still, and be for long */
	mutex_lock(&n->session_mutex);
	n->paused++;
	mutex_unlock(&n->session_mutex);
	cancel_delayed_work_sync(&n->session_work);
	wait_event(n->idle, !atomic_read(&n->in_flight));
	if (READ_ONCE(n->session) != VHOSTFS_NONE)
		vhostfs_set_session(n, VHOSTFS_REFUSED);

	spin_lock(&n->vq_lock);
	n->running = false;
	spin_unlock(&n->vq_lock);
	cancel_delayed_work_sync(&n->park_work);
	cancel_work_sync(&n->receive_work);
}

/* The device was reset and gives no buffer back any more */
void vhostfs_notify_release_buffers(struct vhostfs_notify *n)
{
	if (!n)
		return;
	/* Nothing but parked requests is left in a request queue */
	while (n->vq && virtqueue_detach_unused_buf(n->vq))
		;
	while (n->parked_vq && virtqueue_detach_unused_buf(n->parked_vq))
		;
	kfree(n->parked);
	n->parked = NULL;
	n->nparked = 0;
	while (n->nbufs)
		kfree(n->bufs[--n->nbufs]);
	kfree(n->bufs);
	n->bufs = NULL;
}

/* Neither the device nor a superblock uses it any more */
void vhostfs_notify_free(struct vhostfs_notify *n)
{
	if (!n)
		return;
	cancel_work_sync(&n->receive_work);
	cancel_delayed_work_sync(&n->half_work);
	cancel_delayed_work_sync(&n->session_work);
	cancel_delayed_work_sync(&n->park_work);
	/* A late interrupt or timeout; it found nothing to do */
	cancel_work_sync(&n->receive_work);
	/* A probe may be at its end, on an inode that went meanwhile */
	synchronize_rcu();
	vhostfs_put(n);
}

/* ---- module --------------------------------------------------------------------- */

static void vhostfs_unregister_probes(int count)
{
	while (count--)
		unregister_kretprobe(&vhostfs_probes[count]);
}

static void vhostfs_register_probes(void)
{
	int i, err;

	for (i = 0; i < ARRAY_SIZE(vhostfs_probes); i++) {
		err = register_kretprobe(&vhostfs_probes[i]);
		if (err) {
			pr_warn("no probe on %s (%d): watches are found by walks\n",
				vhostfs_probes[i].kp.symbol_name, err);
			vhostfs_unregister_probes(i);
			vhostfs_no_probes = true;
			return;
		}
	}
}

int vhostfs_notify_register(struct file_system_type *type)
{
	int err = -ENOMEM;

	vhostfs_type = type;
	vhostfs_wq = alloc_workqueue("vhostfs", WQ_UNBOUND | WQ_HIGHPRI, 0);
	if (!vhostfs_wq)
		return err;
	vhostfs_group = fsnotify_alloc_group(&vhostfs_group_ops, 0);
	if (IS_ERR(vhostfs_group)) {
		err = PTR_ERR(vhostfs_group);
		goto destroy_wq;
	}
	vhostfs_share_group = fsnotify_alloc_group(&vhostfs_share_ops, 0);
	if (IS_ERR(vhostfs_share_group)) {
		err = PTR_ERR(vhostfs_share_group);
		goto put_group;
	}

	err = register_filesystem(type);
	if (err == -EBUSY) {
		type->name = "vhostfs";
		pr_info("the kernel has a virtiofs of its own, mount this one with -t %s\n",
			type->name);
		err = register_filesystem(type);
	}
	if (err)
		goto put_share_group;

	vhostfs_register_probes();
	queue_delayed_work(vhostfs_wq, &vhostfs_probe_work, 2 * HZ);
	return 0;

put_share_group:
	fsnotify_put_group(vhostfs_share_group);
put_group:
	fsnotify_put_group(vhostfs_group);
destroy_wq:
	destroy_workqueue(vhostfs_wq);
	return err;
}

void vhostfs_notify_unregister(struct file_system_type *type)
{
	unregister_filesystem(type);
	if (!vhostfs_no_probes)
		vhostfs_unregister_probes(ARRAY_SIZE(vhostfs_probes));
	cancel_delayed_work_sync(&vhostfs_probe_work);
	/* Marks are freed later, by a function of ours */
	fsnotify_wait_marks_destroyed();
	fsnotify_put_group(vhostfs_share_group);
	fsnotify_put_group(vhostfs_group);
	destroy_workqueue(vhostfs_wq);
	/* The last request's end may have been in an RCU section of the core */
	rcu_barrier();
	/* A task that waited for a watch has let go of us, but not left yet */
	synchronize_rcu_tasks();
}
