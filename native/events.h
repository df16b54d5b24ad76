/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The event pipeline: changes on the host become elements in the guest's
 * notification buffers.
 *
 *   fanotify_source.c, inotify_source.c   read the host's records, find the guest's inodes
 *   fanotify_move.c, fanotify_overlap.c   from one mark to many, when the file system is busy
 *   order.c, order_*.c                    what fanotify cannot say: in which order
 *   route.c       vf_events_report()      does anybody in the guest watch it? an element is made
 *   unlinked.c                            what was done through a name that is gone
 *   outbox.c      vf_outbox_push()        bounded, ordered; identical neighbours merge
 *   notify_queue.c                        puts elements into the buffers of the virtqueue
 *   watch.c                               what the guest watches, and marks on the host for it
 *   watch_share.c                         a watch on everything in the share
 *   handle_index.c                        from a file handle to the guest's inodes
 *   coherent.c, fanotify_caches.c         what the guest keeps, and when it is told to forget
 *   events.c                              the thread, its life, counters, trace
 *
 * Threads: one thread of the share's reads the source and reports.  Watches
 * change in the threads of the request queues.  Elements leave in the source's
 * thread or in the notification queue's, whichever finds an element and a buffer.
 *
 * Lock order: watches->change_lock, a shard of the inode table, watches->lock;
 * outbox->lock after these, and no other within it but the device's, the queue's
 * and the trace's.
 */
#ifndef VHOSTFS_EVENTS_H
#define VHOSTFS_EVENTS_H

#include "core.h"
#include "inode.h"

/* FS_* of include/linux/fsnotify_backend.h; IN_* and FAN_* have the same values for these. */
#define VF_FS_ACCESS 0x00000001ULL
#define VF_FS_MODIFY 0x00000002ULL
#define VF_FS_ATTRIB 0x00000004ULL
#define VF_FS_CLOSE_WRITE 0x00000008ULL
#define VF_FS_CLOSE_NOWRITE 0x00000010ULL
#define VF_FS_OPEN 0x00000020ULL
#define VF_FS_MOVED_FROM 0x00000040ULL
#define VF_FS_MOVED_TO 0x00000080ULL
#define VF_FS_CREATE 0x00000100ULL
#define VF_FS_DELETE 0x00000200ULL
#define VF_FS_DELETE_SELF 0x00000400ULL
#define VF_FS_MOVE_SELF 0x00000800ULL
#define VF_FS_OPEN_EXEC 0x00001000ULL
#define VF_FS_UNMOUNT 0x00002000ULL
#define VF_FS_Q_OVERFLOW 0x00004000ULL
#define VF_FS_EXCL_UNLINK 0x04000000ULL /* inotify's alone */
#define VF_FS_EVENT_ON_CHILD 0x08000000ULL
#define VF_FS_RENAME 0x10000000ULL
#define VF_FS_ISDIR 0x40000000ULL

/* Events on a directory's entries; name is always there. */
#define VF_FS_ENTRY_EVENTS (VF_FS_CREATE | VF_FS_DELETE | VF_FS_MOVED_FROM | VF_FS_MOVED_TO)
/* Events on an object that its parent's watchers get too, with its name. */
#define VF_FS_CHILD_EVENTS                                                                         \
	(VF_FS_ACCESS | VF_FS_MODIFY | VF_FS_ATTRIB | VF_FS_CLOSE_WRITE | VF_FS_CLOSE_NOWRITE |    \
	 VF_FS_OPEN | VF_FS_OPEN_EXEC)
/* Those that Linux raises with a path. */
#define VF_FS_PATH_EVENTS (VF_FS_CHILD_EVENTS & ~VF_FS_ATTRIB)
#define VF_FS_SELF_EVENTS (VF_FS_DELETE_SELF | VF_FS_MOVE_SELF)

/* ---- from a source to the router ------------------------------------------ */

/* One thing that happened on the host, to objects that the guest holds. */
struct vf_change {
	uint64_t mask; /* one of VF_FS_*_EVENTS, and VF_FS_ISDIR when the object is a directory */
	/*
	 * Entry events: the directory.  Child events: the parent, or NULL when the guest does not
	 * hold it or the source cannot tell.  Self events: NULL.  References stay the caller's.
	 */
	struct vf_inode *dir;
	struct vf_inode *child; /* the object; NULL: the guest does not hold it */
	const char *name;	/* in dir, no NUL needed; namelen 0 when dir is NULL */
	uint32_t namelen;
	int32_t pid;	 /* of who made the change; 0: not known */
	uint32_t cookie; /* of the two halves of a rename; else 0 */
	uint32_t flags;	 /* of the element */
	/* The object and the directory on the host, whether the guest holds them or not; 0: the
	 * source cannot tell. */
	uint64_t object, place;
	bool unlinked;	  /* done through a name that was gone; found out ahead of its turn */
	bool not_its_end; /* whether the child has ended is told by another change */
	uint64_t seen_ns; /* CLOCK_MONOTONIC, when the record was read */
};

/* The change's name with NUL, in buffer. */
static inline const char *vf_change_name(const struct vf_change *change,
					 char buffer[VF_NAME_MAX + 1])
{
	memcpy(buffer, change->name, change->namelen);
	buffer[change->namelen] = 0;
	return buffer;
}

/*
 * Routes n changes that belong together (2: a rename whose both halves the guest holds), which
 * enter the outbox together or not at all.  The source's thread only.
 */
void vf_events_report(struct vf_events *events, const struct vf_change *changes, uint32_t n);
/* May anybody be told of this, or of what follows from it? */
bool vf_events_is_wanted(struct vf_events *events, const struct vf_change *change);
/* The server made these changes itself, for its guest, which is not told. */
void vf_events_trace_own(struct vf_events *events, const struct vf_change *changes, uint32_t n);
/* A rename whose both directories the guest holds: gives the two changes their cookie. */
void vf_events_report_rename(struct vf_events *events, struct vf_change changes[2]);
/* Has the object no link any more? */
bool vf_events_is_gone(struct vf_events *events, struct vf_inode *inode);
/* The host's queue overflowed: the guest is told that events were lost. */
void vf_events_report_overflow(struct vf_events *events);

/* ---- unlinked.c ------------------------------------------------------------- */

struct vf_unlinked;
/* An entry event, in its turn; of others nothing is noted. */
void vf_unlinked_note(struct vf_events *events, const struct vf_change *change);
/* Has the name left the change's object?  False, too, if that is not known. */
bool vf_name_is_gone(struct vf_events *events, const struct vf_change *change);
/* Did an object lose the name, or get it from another, not long ago? */
bool vf_name_has_changed(struct vf_events *events, const struct vf_change *change);
void vf_unlinked_forget(struct vf_events *events);

/* ---- sources --------------------------------------------------------------- */

/* Numbers that are kept with a watch. */
enum vf_wd {
	VF_WD_SOURCE, /* inotify's for the inode; fanotify: the parent's slot */
	VF_WD_ORDER,  /* fanotify: inotify's for the inode */
	VF_WD_PARENT, /* inotify's for the parent, which tells of the directory's removal */
	VF_WD_NAME,   /* made of that and the name in it */
	VF_N_WDS
};

struct vf_source_ops {
	/* Reads what waits and reports it; called when there is something, perhaps. */
	void (*read)(struct vf_events *events);
	/*
	 * The guest's wish for this inode went from old_mask to new_mask (0: none); makes the host
	 * report it.  wd: the source's own number for it, kept in the watch (-1: none yet).
	 * inode is referenced.  0 or negative errno (-ENOSPC: the host's limit).
	 * Under watches->change_lock.
	 */
	int (*mark)(struct vf_events *events, struct vf_inode *inode, uint64_t old_mask,
		    uint64_t new_mask, int32_t wd[VF_N_WDS]);
	/* What need not be asked for on this inode; may be NULL. */
	uint64_t (*covered)(struct vf_events *events, const struct vf_inode *inode);
	/*
	 * The inode, which was watched or has vf_inode_set_marked(), is being freed; its watch has
	 * ended.  May be NULL.  Under watches->change_lock.
	 */
	void (*gone)(struct vf_events *events, struct vf_inode *inode);
};
extern const struct vf_source_ops vf_fanotify_source, vf_inotify_source;
/* Each event of mask on its own, in the order in which programs mostly do these things. */
void vf_fanotify_report_ordered(struct vf_events *events, struct vf_change *change, uint64_t mask);

/* ---- events.c --------------------------------------------------------------- */

struct vf_outbox;
struct vf_own_changes;
struct vf_watches;
struct vf_order;
struct vf_parked;
struct vf_fanotify_move;

struct vf_events {
	struct vf_share *share;
	struct vf_events_config config;
	const struct vf_source_ops *ops;
	struct vf_watches *watches;
	struct vf_outbox *outbox;
	struct vf_parked *parked;
	struct vf_order *order;		      /* beside fanotify; NULL: fanotify's own order */
	atomic_uint_fast64_t filesystem_mask; /* as config has it, until the source moves */
	struct vf_unlinked *unlinked;	      /* NULL: nothing is noted */
	struct vf_fanotify_move *move;	      /* NULL: it stays with its group */
	bool again;	    /* read() is to be called again at once; its thread's */
	bool drained;	    /* the last read of fanotify had all that there was; likewise */
	uint64_t elsewhere; /* received, on objects that nobody watches; the source's thread's */
	/* Granted to the session; 0: none, and nothing is reported. */
	atomic_uint_fast64_t flags;
	atomic_uint_fast64_t mask;
	atomic_uint max_element; /* that its guest takes, in bytes with fuse_out_header */
	atomic_bool failed;	 /* the source has */
	/* Every change to what the guest holds is told; see coherent.c. */
	atomic_bool told_all;
	/* What the guest watches on everything that it holds of the share; 0: nothing. */
	atomic_uint_fast64_t everywhere;
	struct vf_announced *announced; /* watch_share.c */
	bool unmarked_said;
	uint32_t unseen_left, unseen_depth; /* see vf_watch_share_tell_unseen() */
	int32_t pid;			    /* our own, as the host's records name it */
	uint32_t last_cookie;		    /* the source's thread's */
	int order_error;		    /* as mark_error */
	atomic_uint_fast64_t order_watches; /* held for order */
	int mark_error; /* the last that people were told of; under watches->change_lock */
	pthread_t thread;
	bool running;
	pthread_mutex_t busy; /* held while records are read and reported; outermost of all */
	atomic_uint waiting;  /* for busy, besides the source's thread */
	int stop_fd, epoll_fd;
	/* marker.c */
	pthread_mutex_t marker_lock;
	uint32_t mark_wishes;
	bool is_marked;
	int marker_error; /* the last that people were told of */
	uint8_t *buffer;  /* the source's, VF_SOURCE_BUFFER bytes, 8-byte aligned */
	struct vf_backlog {
		struct vf_backlog_chunk *first, *last, *spare;
		uint32_t n;
	} backlog; /* of inotify's records; inotify_backlog.c */
	/* From the first watch by inotify on; NULL: own changes are told apart otherwise. */
	struct vf_own_changes *_Atomic own_changes;
	/* Counted by the source's thread; the outbox counts what follows. */
	atomic_uint_fast64_t received, own, unknown, unwatched, host_overflows, host_marks;
	struct vf_trace *trace;
};
#define VF_SOURCE_BUFFER (256u * 1024)

static inline void vf_count_n(atomic_uint_fast64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline void vf_count(atomic_uint_fast64_t *counter)
{
	vf_count_n(counter, 1);
}

void vf_events_free(struct vf_events *events);
/* A session begins or ends: watches, grant and what waits for the guest are forgotten. */
void vf_events_end_session(struct vf_events *events);
/* The source's descriptor can no longer be read; error: positive errno. */
void vf_events_source_failed(struct vf_events *events, const char *what, int error);
/* A line for the log. */
void vf_events_notice(struct vf_events *events, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- coherent.c ---------------------------------------------------------------- */

/*
 * A change that somebody else made, told at once and for the guest's caches only; change->mask may
 * have several events of one record.
 */
void vf_coherent_tell(struct vf_events *events, const struct vf_change *change);
/* Begins with FUSE_FSNOTIFY_INIT, where that granted it. */
void vf_coherent_begin(struct vf_events *events, uint64_t flags);
/* From now on the guest may not be told of something.  why: for people, NULL: the session ends. */
void vf_coherent_end(struct vf_events *events, const char *why);

/* ---- trace.c ----------------------------------------------------------------- */

/*
 * What people are told: lines for the log, and while tracing is on a record of each event.  Both
 * are bounded and share one descriptor.  Its lock is taken last of all.
 */
struct vf_trace;
struct vf_trace *vf_trace_new(int *error);
void vf_trace_free(struct vf_trace *trace);
/* Readable while a record or a line waits; the trace's own. */
int vf_trace_fd(const struct vf_trace *trace);
/* Off forgets what was not read.  0 or -ENOMEM. */
int vf_trace_set(struct vf_trace *trace, bool on);
bool vf_trace_is_on(const struct vf_trace *trace);
/* Does nothing while off; time_ns and skipped are filled in; name: element->namelen bytes. */
void vf_trace_add(struct vf_trace *trace, const struct vf_fsnotify_out *element, const char *name,
		  enum vf_event_fate fate, int32_t pid);
/* 1: the oldest was taken; 0: none waits. */
int vf_trace_next(struct vf_trace *trace, struct vf_event_trace *record);
void vf_trace_notice(struct vf_trace *trace, const char *text);
int vf_trace_next_notice(struct vf_trace *trace, char *text, uint32_t size);

/* ---- watch.c ------------------------------------------------------------------ */

struct vf_watches *vf_watches_new(struct vf_events *events, int *error);
void vf_watches_free(struct vf_watches *watches);
void vf_watches_clear(struct vf_watches *watches);
/* The guest's wish; inode is referenced.  0, -ENOSPC (quota), or what the host says. */
int vf_watch_set(struct vf_watches *watches, struct vf_inode *inode, uint64_t mask);
/* The events of which a watch can be, and nothing without any. */
uint64_t vf_watch_known(uint64_t mask);
/* What a watch on the share asks of the host for this inode has changed. */
int vf_watch_update(struct vf_watches *watches, struct vf_inode *inode);
/* What the host is asked for on this inode; 0: nothing.  Cheap when nothing. */
uint64_t vf_watch_mask(struct vf_watches *watches, const struct vf_inode *inode);
/* The union over all watches. */
uint64_t vf_watches_union(const struct vf_watches *watches);
/* The same wish again: where the inode lies has changed. */
void vf_watch_renew(struct vf_watches *watches, struct vf_inode *inode);
/*
 * The same for the next n of all watches.  *at: 0 at first, where to go on then; watches that are
 * new meanwhile may be left out.  False: that was all.
 */
bool vf_watches_renew(struct vf_watches *watches, uint32_t *at, uint32_t n);
/* Holds all changes of watches up. */
void vf_watches_hold(struct vf_watches *watches);
void vf_watches_go_on(struct vf_watches *watches);
/* The inode is being freed: its watch ends.  For those that are watched or marked. */
void vf_watch_inode_gone(struct vf_watches *watches, struct vf_inode *inode);
/*
 * inotify: the inodes of this number (more than one when they are one object of the host), at most
 * max (and 8), each referenced.  Returns how many.
 */
uint32_t vf_watches_by_wd(struct vf_watches *watches, enum vf_wd which, int32_t wd,
			  struct vf_inode **found, uint32_t max);
/* The number of this inode's watch; -1: there is none. */
int32_t vf_watch_wd(struct vf_watches *watches, enum vf_wd which, const struct vf_inode *inode);
/* What the guest watches on inodes of this number other than `but`, which may be NULL. */
uint64_t vf_watches_wd_mask(struct vf_watches *watches, enum vf_wd which, int32_t wd,
			    const struct vf_inode *but);
/* Is there any such inode? */
bool vf_watches_have_wd(struct vf_watches *watches, enum vf_wd which, int32_t wd,
			const struct vf_inode *but);
/* Those that have it have none from now on. */
void vf_watches_forget_wd(struct vf_watches *watches, enum vf_wd which, int32_t wd);
uint64_t vf_watches_count(const struct vf_watches *watches);

/* ---- watch_share.c --------------------------------------------------------------- */

int vf_watch_share_init(struct vf_events *events);
/*
 * The guest's wish for every object that it holds, now or later (0: no longer), besides the
 * watches of single ones.  0, or what the host says of the share's root.
 */
int vf_watch_share(struct vf_events *events, uint64_t mask);
/*
 * What of it the host has to be asked for on this inode.  single: the guest watches the inode by
 * itself, too, so that order.h is about it, and then about all that is told of it.
 */
uint64_t vf_watch_share_part(struct vf_events *events, const struct vf_inode *inode, bool single);
/* The guest holds this directory from now on. */
void vf_watch_share_new_directory(struct vf_events *events, struct vf_inode *dir);
/*
 * A directory has got this name in a directory that the guest holds, and everything is watched: it
 * is held for the guest, which will look it up when it hears of it, so that what happens within
 * meanwhile is told.  The inode, referenced; NULL: there is none, or no need.  The source's thread.
 */
struct vf_inode *vf_watch_share_announce(struct vf_events *events, struct vf_inode *dir,
					 const char *name, uint32_t namelen);
/*
 * This directory was removed: nobody comes for it any more, so it is not held either, and who
 * watches it on the host is told of its end.
 */
void vf_watch_share_removed(struct vf_events *events, struct vf_inode *dir);
/*
 * Reports as made what an announced directory, whose own event was reported, had in it before it
 * was marked.  The source's thread.
 */
void vf_watch_share_tell_unseen(struct vf_events *events, const struct vf_change *made);
/* The source no longer covers what it covered: marks are needed now. */
void vf_watch_share_renew(struct vf_events *events);
void vf_watch_share_end(struct vf_events *events);
void vf_watch_share_free(struct vf_events *events);

/* ---- handle_index.c ------------------------------------------------------------- */

struct vf_fsid {
	int32_t val[2];
};
/* Every inode that is held from now on, and those held now, can be found by handle. */
int vf_handle_index_start(struct vf_share *share);
/* No longer those that are held from now on. */
void vf_handle_index_stop(struct vf_share *share);
/*
 * The inodes (more than one where the file system is mounted in several places of the share) with
 * this handle, at most max, each referenced.  Returns how many.
 */
uint32_t vf_inodes_by_handle(struct vf_share *share, struct vf_fsid fsid, int32_t type,
			     const uint8_t *bytes, uint32_t size, struct vf_inode **found,
			     uint32_t max);
/* Counts on with each inode that can be found by handle, at the latest when it may be asked for. */
uint32_t vf_handle_index_additions(const struct vf_share *share);
/* The same for a name in a directory of the host. */
uint32_t vf_inodes_of_name(struct vf_share *share, struct vf_inode *dir, const char *name,
			   struct vf_inode **found, uint32_t max);
/* Has this name in the directory the object of this handle now? */
bool vf_name_has_handle(struct vf_share *share, struct vf_inode *dir, const char *name,
			int32_t type, const uint8_t *bytes, uint32_t size);
/* A number for the object of this handle, which another object hardly has; never 0. */
uint64_t vf_handle_identity(int32_t type, const uint8_t *bytes, uint32_t size);
/* The same of what has this name in the directory now; 0: nothing, or it cannot be told. */
uint64_t vf_identity_of_name(struct vf_share *share, struct vf_inode *dir, const char *name);
/* What the guest watches on other inodes that are the same object of the host. */
uint64_t vf_inode_twins_watch_mask(struct vf_share *share, struct vf_inode *inode);
/* Is one of these vf_inode_is_marked(), or vf_inode_is_moved()? */
bool vf_inode_twin_is_marked(struct vf_share *share, struct vf_inode *inode);
bool vf_inode_twin_is_moved(struct vf_share *share, struct vf_inode *inode);
/* Does it lie on the file system of the share's root? */
bool vf_inode_on_root_fs(struct vf_share *share, const struct vf_inode *inode);

/* ---- outbox.c -------------------------------------------------------------------- */

/* An element on its way. */
struct vf_outgoing {
	struct vf_fsnotify_out element;
	const char *name; /* element.namelen bytes */
	int32_t pid;
	uint64_t seen_ns; /* CLOCK_MONOTONIC */
};

/* Where elements leave: notify_queue.c, parked.c. */
struct vf_sink {
	/*
	 * Gives the guest one element; false: no buffer is free (the guest will say when there is
	 * one, and vf_outbox_flush() is called then).  Under the outbox's lock.
	 */
	bool (*put)(struct vf_sink *sink, const struct vf_fsnotify_out *element, const char *name);
	/* After the last put() of a flush: interrupts the guest if it asked for that. */
	void (*done)(struct vf_sink *sink);
	/* Buffers free now; only to be shown. */
	uint32_t (*buffers)(struct vf_sink *sink);
};

struct vf_outbox *vf_outbox_new(uint32_t max_elements, struct vf_trace *trace, int *error);
void vf_outbox_free(struct vf_outbox *outbox);
/*
 * Adds an element, or n (a few) that belong together: all of them or none.  A single one that
 * equals the newest that waits is merged into it (as inotify does; never part of a rename).
 * Without room they are lost, and an overflow element is put behind what waits, once until it was
 * delivered.  They leave by vf_outbox_flush() at the latest.
 */
void vf_outbox_push(struct vf_outbox *outbox, const struct vf_outgoing *elements, uint32_t n);
/* Events were lost before they came here. */
void vf_outbox_push_overflow(struct vf_outbox *outbox);
/* Gives the guest what waits, as far as it has buffers. */
void vf_outbox_flush(struct vf_outbox *outbox);
/* Forgets what waits. */
void vf_outbox_clear(struct vf_outbox *outbox);
/* One sink at a time; -EBUSY: there is one. */
int vf_outbox_attach(struct vf_outbox *outbox, struct vf_sink *sink);
/* When it returns this sink is no longer in use; what waits stays. */
void vf_outbox_detach(struct vf_outbox *outbox, struct vf_sink *sink);
/* They leave by this sink instead of the attached one; NULL: no longer, and it is not in use. */
void vf_outbox_use(struct vf_outbox *outbox, struct vf_sink *sink);
/* Fills in what it counts: merged to max_depth but host_overflows, buffers, latency. */
void vf_outbox_get_stats(struct vf_outbox *outbox, struct vf_events_stats *stats);

/* By these elements come to the outbox: the guest is shown what they tell of. */
static inline void vf_events_push(struct vf_events *events, const struct vf_outgoing *elements,
				  uint32_t n)
{
	vf_show(events->share, true);
	vf_outbox_push(events->outbox, elements, n);
}
static inline void vf_events_push_overflow(struct vf_events *events)
{
	vf_show(events->share, true);
	vf_outbox_push_overflow(events->outbox);
}

/* ---- parked.c -------------------------------------------------------------------- */

/* max: requests that may wait at a time. */
struct vf_parked *vf_parked_new(struct vf_events *events, uint32_t max, int *error);
/* None waits. */
void vf_parked_free(struct vf_parked *parked);
/* Requests may be parked, and events leave by them. */
void vf_parked_open(struct vf_parked *parked);
/* No longer; those that wait are answered with ENOTCONN.  What waits for the guest stays. */
void vf_parked_close(struct vf_parked *parked);
/* No more than these may wait until it is closed. */
void vf_parked_limit(struct vf_parked *parked, uint32_t max);
/* Those of one queue that wait (NULL: of all) are answered with ENOTCONN.  parked may be NULL. */
void vf_parked_send_back(struct vf_parked *parked, const struct vf_queue *queue);

#endif
