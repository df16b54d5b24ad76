/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * vhostfs: what the files of the driver share: the state, their functions
 *
 * VHOSTFS_KERNEL is 100 * VERSION + PATCHLEVEL of the kernel; Kbuild sets it.
 */
#ifndef _VHOSTFS_INTERNAL_H
#define _VHOSTFS_INTERNAL_H

#include <linux/fsnotify_backend.h>
#include <linux/kref.h>
#include <linux/mutex.h>
#include <linux/rbtree.h>
#include <linux/virtio.h>
#include <linux/workqueue.h>
#include "fuse_i.h"
#include "vhostfs_notify.h"
#include "vhostfs_wire.h"

/* ---- state ------------------------------------------------------------------ */

#define VHOSTFS_MAX_BUFFERS	256
#define VHOSTFS_MAX_PARKED	64
#define VHOSTFS_PARKED_SHARE	8	/* of the ring: one in so many */
#define VHOSTFS_PARKED_DESCS	2	/* of each: one to read, one to write */
#define VHOSTFS_PARK_WAIT	(HZ / 4)	/* after the device sent some back */
#define VHOSTFS_PARK_UNIQUE	BIT_ULL(62)	/* the FUSE core does not get there */
#define VHOSTFS_BATCH		64	/* elements copied and not acted on; 2^n */
#define VHOSTFS_BATCHES		2	/* of them in one run of a worker */
#define VHOSTFS_MAX_HALVES	64
#define VHOSTFS_HALF_WAIT	HZ
#define VHOSTFS_MAX_COOKIES	64
#define VHOSTFS_MAX_KEPT	64
#define VHOSTFS_WATCHES_IN_FLIGHT 8
#define VHOSTFS_SETTLE_WAIT	HZ
#define VHOSTFS_REPAIR_WAIT	HZ
#define VHOSTFS_RETRIES		1024	/* of refused watches, in that time */
#define VHOSTFS_MAX_TRIES	6U	/* of FUSE_FSNOTIFY_INIT, for the wait */
#define VHOSTFS_MAX_GROUPS	64
#define VHOSTFS_WALK_WAIT	(10 * HZ)
#define VHOSTFS_READDIR_SIZE	8192U
#define VHOSTFS_MAX_RECENT	1024
#define VHOSTFS_MAX_MOUNT_MARKS	64
#define VHOSTFS_TOUCHED_BITS	11
#define VHOSTFS_MAX_AGAIN	1024
#define VHOSTFS_LOCKED_BITS	12
#define VHOSTFS_NO_MOUNT_SIZE	2048

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

/* What came in a buffer or as an answer */
struct vhostfs_copy {
	unsigned int len;
	u8 data[VHOSTFS_ELEMENT_SIZE] __aligned(8);
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

/* An object that is held for a moment, see vhostfs_keep() */
struct vhostfs_kept {
	struct list_head list;		/* oldest first */
	struct inode *inode;		/* referenced */
	unsigned long since;
	bool ending;
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
	bool excl_unlink;		/* a mark has IN_EXCL_UNLINK */
};

/* Does one of the marks have IN_EXCL_UNLINK? */
enum vhostfs_excl {
	VHOSTFS_EXCL_NO,
	VHOSTFS_EXCL_YES,
	VHOSTFS_EXCL_AS_BEFORE,		/* nobody has looked */
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

/* An object that is to be forgotten again; 0: none */
struct vhostfs_again {
	u64 nodeid;
	u32 generation;
	u32 bit;
	unsigned long until;
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
	VHOSTFS_INVALIDATED,
	VHOSTFS_OPENED,
	VHOSTFS_NR_COUNTERS,
};

struct vhostfs_opens;

struct vhostfs_notify {
	struct kref kref;
	struct list_head list;		/* on vhostfs_devices */
	struct virtio_device *vdev;
	bool has_attrs;
	atomic64_t counters[VHOSTFS_NR_COUNTERS];

	/* Queue 1 */
	spinlock_t vq_lock;		/* calls for vq, and running */
	struct virtqueue *vq;
	bool running;			/* vq may be used, and vdev by anybody */
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

	struct work_struct receive_work;	/* copies what came */
	struct work_struct act_work;	/* acts on it, in order */
	struct delayed_work half_work;

	/*
	 * Copied and not acted on yet, by the number that each has of all: the
	 * one worker writes before it raises ntaken, the other raises nacted.
	 */
	struct vhostfs_copy copied[VHOSTFS_BATCH];
	unsigned int ntaken;
	unsigned int nacted;
	bool more;			/* there was no room for all */
	struct mutex look_mutex;	/* within event_mutex */
	struct vhostfs_event look_event;

	/* Of the acting worker; the session's under event_mutex as well */
	struct mutex event_mutex;
	/* Also under session_mutex, and changed under look_mutex */
	struct fuse_conn *fc;
	unsigned int nhalves;
	struct list_head halves;	/* oldest first */
	unsigned int nkept;
	struct list_head kept;
	struct {
		u32 wire;
		u32 local;
	} cookies[VHOSTFS_MAX_COOKIES];
	unsigned int next_cookie;
	struct vhostfs_event event;
	struct inode *recent[VHOSTFS_MAX_RECENT];	/* referenced, or NULL */
	unsigned int next_recent;
	struct fuse_inode unknown;	/* see vhostfs_raise_child() */
	struct dentry unknown_dentry;	/* see vhostfs_stand_in() */
	struct dentry unknown_parent;	/* see vhostfs_raise_rename() */
	struct path unlinked;		/* see vhostfs_unlinked() */
	u8 no_mount[VHOSTFS_NO_MOUNT_SIZE] ____cacheline_aligned;

	/* Coherent caches; numbers of requests, those until then are old */
	atomic64_t last_sent;
	u64 touched_any;
	u64 touched_all;
	u64 touched[1 << VHOSTFS_TOUCHED_BITS];		/* by nodeid */
#if VHOSTFS_KERNEL < 612
	u64 doubted;			/* a version of attributes, likewise */
#endif
	struct vhostfs_again again[VHOSTFS_MAX_AGAIN];	/* under event_mutex */
	unsigned int next_again;
	bool lose_again;
	struct delayed_work again_work;

	/* Opens that are answered here */
	bool deferring;			/* in this session */
	struct vhostfs_opens *opens;	/* once made it stays */
	/* By nodeid: there may be POSIX locks of this guest's */
	DECLARE_BITMAP(locked, 1 << VHOSTFS_LOCKED_BITS);

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

extern struct workqueue_struct *vhostfs_wq;
extern struct mutex vhostfs_devices_mutex;
extern struct list_head vhostfs_devices;
extern struct fsnotify_group *vhostfs_group;
extern struct fsnotify_group *vhostfs_share_group;
extern const struct file_system_type *vhostfs_type;

static inline void vhostfs_count(struct vhostfs_notify *n,
				 enum vhostfs_counter counter)
{
	atomic64_inc(&n->counters[counter]);
}

/* vhostfs_object.c */
void vhostfs_send(struct vhostfs_notify *n, struct fuse_mount *fm,
		  struct vhostfs_request *req);
struct vhostfs_request *vhostfs_new_request(u32 opcode, u64 nodeid,
					    size_t in_size,
					    size_t out_size);
int vhostfs_ask(struct vhostfs_notify *n, struct fuse_mount *fm,
		struct vhostfs_request *req);
int vhostfs_inode_eq(struct inode *inode, void *nodeid);
struct inode *vhostfs_find(struct fuse_conn *fc, u64 nodeid,
			   u32 generation);
struct inode *vhostfs_look_up(struct inode *dir, const char *name,
			      unsigned int namelen);
void vhostfs_walk(struct super_block *sb,
		  bool (*look)(struct inode *inode, void *arg),
		  void (*act)(struct inode *inode, void *arg), void *arg);
bool vhostfs_is_object(const struct inode *inode,
		       const struct vhostfs_event *event);
struct inode *vhostfs_find_child(struct fuse_conn *fc, struct inode *dir,
				 const struct vhostfs_event *event);
void vhostfs_remember(struct vhostfs_notify *n, struct inode *inode);
bool vhostfs_keep(struct vhostfs_notify *n, struct inode *inode, bool ending);
void vhostfs_keep_former(struct vhostfs_notify *n, struct inode *dir,
			 const struct vhostfs_event *event);
struct inode *vhostfs_next_ended(struct vhostfs_notify *n);
void vhostfs_forget_recent(struct vhostfs_notify *n,
			   const struct super_block *sb,
			   const struct inode *inode);
struct inode *vhostfs_meet(struct vhostfs_notify *n, struct inode *dir,
			   const struct vhostfs_event *event);
void vhostfs_follow(struct inode *dir, const struct inode *child,
		    const struct vhostfs_event *event);

/* vhostfs_cache.c */
void vhostfs_age(struct inode *inode);
void vhostfs_stale_attr(struct inode *inode, u32 mask);
void vhostfs_wake(struct vhostfs_request *req, int error);
struct vhostfs_request *vhostfs_getattr(struct vhostfs_notify *n,
					struct inode *inode);
void vhostfs_stale_object(struct vhostfs_notify *n, struct inode *inode,
			  u32 mask);
void vhostfs_expire_dentry(struct dentry *dentry);
void vhostfs_expire_entry(struct inode *dir, const struct vhostfs_event *event);
void vhostfs_expire_object(struct inode *inode, u32 mask);
void vhostfs_stale_inode(struct vhostfs_notify *n, struct inode *inode);
struct dentry *vhostfs_lookup_cached(struct inode *dir, const char *text,
				     unsigned int len);
struct inode *vhostfs_stale_entry(struct inode *dir,
				  const struct vhostfs_event *event);

/* vhostfs_raise.c */
bool vhostfs_is_attached(const struct fsnotify_mark *mark);
bool vhostfs_reports_fids(const struct fsnotify_group *group);
void vhostfs_raise_entry(struct vhostfs_notify *n, struct inode *dir,
			 struct inode *child,
			 const struct vhostfs_event *event, u32 cookie);
void vhostfs_raise_child(struct vhostfs_notify *n, struct inode *dir,
			 struct inode *child,
			 const struct vhostfs_event *event, u32 bit);
void vhostfs_raise_self(struct vhostfs_notify *n, struct inode *inode,
			u32 bit, bool for_parent, bool unlinked);
void vhostfs_raise_delete_self(struct vhostfs_notify *n,
			       struct inode *inode);
void vhostfs_raise_rename(struct vhostfs_notify *n,
			  struct inode *old_dir, struct inode *new_dir,
			  struct inode *child,
			  const struct vhostfs_event *from,
			  const struct vhostfs_event *to);

/* vhostfs_event.c */
void vhostfs_free_halves(struct vhostfs_notify *n);
void vhostfs_expire(struct vhostfs_notify *n, bool all);
void vhostfs_half_timeout(struct work_struct *work);
bool vhostfs_is_granted(struct vhostfs_notify *n);
void vhostfs_first_look(struct vhostfs_notify *n, const void *data,
			unsigned int len);
void vhostfs_element(struct vhostfs_notify *n, const void *data,
		     unsigned int len);

/* vhostfs_overflow.c */
extern const struct fsnotify_ops vhostfs_group_ops;
int vhostfs_add_mark(struct fsnotify_mark *mark, struct inode *inode,
		     struct super_block *sb);
void vhostfs_overflow_event(struct vhostfs_notify *n, struct fuse_conn *fc);

/* vhostfs_queue.c */
void vhostfs_give_buffer(struct vhostfs_notify *n, void *buf);
void vhostfs_alloc_buffers(struct vhostfs_notify *n,
			   struct virtqueue *vq);
void vhostfs_park_work(struct work_struct *work);
void vhostfs_alloc_parked(struct vhostfs_notify *n, struct virtqueue *vq);
void vhostfs_receive_work(struct work_struct *work);
void vhostfs_act_work(struct work_struct *work);

/* vhostfs_probe.c */
void vhostfs_register_probes(void);
void vhostfs_unregister_probes(void);
unsigned long vhostfs_probes_missed(void);

/* vhostfs_watch.c */
u32 vhostfs_wish(u32 mask);
struct vhostfs_watch *vhostfs_find_watch(struct vhostfs_notify *n, u64 nodeid);
void vhostfs_note(struct vhostfs_notify *n, u64 nodeid, u32 generation,
		  struct inode *inode, enum vhostfs_excl excl);
void vhostfs_free_watches(struct vhostfs_notify *n);
void vhostfs_wake_session(struct vhostfs_notify *n);
void vhostfs_resync(struct vhostfs_notify *n);
void vhostfs_retry_refused(struct vhostfs_notify *n);
bool vhostfs_is_due(struct vhostfs_notify *n, bool wanted,
		    unsigned long when);
bool vhostfs_send_watch(struct vhostfs_notify *n, struct fuse_mount *fm);

/* vhostfs_held.c */
void vhostfs_hold(struct vhostfs_share *share, struct inode *inode);
void vhostfs_let_go(struct vhostfs_share *share, struct inode *inode);
void vhostfs_walk_work(struct work_struct *work);
void vhostfs_read_all(struct vhostfs_share *share);
void vhostfs_open_share(struct vhostfs_share *share);
void vhostfs_close_share(struct vhostfs_share *share);

/* vhostfs_share.c */
extern const struct fsnotify_ops vhostfs_share_ops;
void vhostfs_walk_again(struct vhostfs_notify *n);
void vhostfs_end_share(struct vhostfs_share *share);
struct vhostfs_share *vhostfs_find_share(struct vhostfs_notify *n,
					 const struct super_block *sb);
void vhostfs_drop_mount_marks(struct vhostfs_notify *n,
			      const struct super_block *sb);
void vhostfs_watch_shares(struct vhostfs_notify *n,
			  struct fuse_mount *fm);

/* vhostfs_coherent.c */
bool vhostfs_is_coherent(const struct vhostfs_notify *n);
void vhostfs_reset_coherence(struct vhostfs_notify *n);
bool vhostfs_is_old(struct vhostfs_notify *n, u64 unique, u64 nodeid);
void vhostfs_again_work(struct work_struct *work);
void vhostfs_expire_caches(struct vhostfs_notify *n, struct fuse_conn *fc,
			   const struct vhostfs_event *event);
void vhostfs_invalidate(struct vhostfs_notify *n, struct fuse_conn *fc,
			const struct vhostfs_event *event);
void vhostfs_lose_caches(struct vhostfs_notify *n, struct fuse_conn *fc);
void vhostfs_lose_all(struct vhostfs_notify *n, struct fuse_conn *fc);
void vhostfs_begin_coherence(struct vhostfs_notify *n);

/* vhostfs_open.c */
void vhostfs_forget_open(struct vhostfs_notify *n, u64 nodeid);
void vhostfs_forget_opens(struct vhostfs_notify *n);
void vhostfs_reset_opens(struct vhostfs_notify *n);
void vhostfs_begin_opens(struct vhostfs_notify *n);
void vhostfs_free_opens(struct vhostfs_notify *n);
bool vhostfs_open_sent(struct vhostfs_notify *n, const struct fuse_in_header *in,
		       struct fuse_args *args, bool background);
void vhostfs_open_answered(struct vhostfs_notify *n,
			   const struct fuse_in_header *in,
			   struct fuse_args *args);

/* vhostfs_session.c */
bool vhostfs_is_queue_wanted(void);
void vhostfs_set_session(struct vhostfs_notify *n,
			 enum vhostfs_session session);
void vhostfs_session_work(struct work_struct *work);

/* vhostfs_sysfs.c */
extern const struct attribute_group vhostfs_attr_group;

/* vhostfs_notify.c */
void vhostfs_put(struct vhostfs_notify *n);

#endif /* _VHOSTFS_INTERNAL_H */
