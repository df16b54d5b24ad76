/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records of an inotify instance whose watches follow the guest's: read, taken
 * apart, found the inodes of, and the halves of renames brought together.
 * Knows nothing of what becomes of them.
 */
#ifndef VHOSTFS_INOTIFY_READER_H
#define VHOSTFS_INOTIFY_READER_H

#include <sys/inotify.h>

#include "events.h"

/* All that inotify can be asked for. */
#define VF_INOTIFY_EVENTS ((uint64_t)IN_ALL_EVENTS)

/* Directories of which it is known at a time that they went unseen: 16 bytes each. */
#define VF_MAX_UNSEEN 1024u

struct vf_inotify_reader {
	struct vf_events *events;
	int fd; /* the instance, non-blocking */
	enum vf_wd which;
	/* Only its cookie joins the halves of a rename: the second one is waited for. */
	bool joins_renames;
	uint8_t *buffer;		    /* VF_SOURCE_BUFFER bytes, 8-byte aligned */
	uint32_t size;			    /* of what was read */
	uint32_t next;			    /* the record at hand, in what was read */
	uint32_t end;			    /* behind it */
	uint32_t last;			    /* the record before it; next: none is left there */
	const struct inotify_event *second; /* the other half of the record at hand; else NULL */
	uint32_t waits;			    /* for second halves, since the first read */
	uint32_t moves;			    /* of records, to make room for such, likewise */
	uint64_t idle_ns;		    /* time waited for anything, likewise */
	uint32_t looked; /* records looked at for the other halves of later ones, likewise */
	uint64_t waited; /* what came before this place of the stream was waited for long enough */
	uint64_t at;	 /* where in the instance's stream it began */
	uint64_t now_ns; /* CLOCK_MONOTONIC, when it was read */
	/* Directories that moved and then went where nothing told of it: from where on to say so.
	 */
	struct {
		uint64_t nodeid, after;
	} unseen[VF_MAX_UNSEEN];
	uint32_t n_unseen;
	uint64_t first_unseen;		       /* the smallest of these places */
	uint32_t awaited;		       /* last link counts, since the first read */
	struct vf_inotify_last *last_of_watch; /* of what follows, once it was asked for */
	/* Another record of this object's link count follows: its end is not to be told yet. */
	bool not_its_end;
	/* read(2) of the instance; *at: where in its stream the first byte was. */
	ssize_t (*read)(struct vf_inotify_reader *reader, void *buffer, size_t size, uint64_t *at);
	/*
	 * A child event: the object of its name in dir, referenced, as far as it is known; and
	 * whether that is certain.  one() follows for the same record and dir.
	 */
	struct vf_inode *(*child)(struct vf_inotify_reader *reader,
				  const struct inotify_event *record, struct vf_inode *dir,
				  bool *certain);
	/*
	 * One event, for each inode that its watch stands for.  child: of child events, and of the
	 * removal of a watched directory; else NULL.
	 */
	void (*one)(struct vf_inotify_reader *reader, const struct inotify_event *record,
		    struct vf_inode *inode, struct vf_inode *child);
	/* A rename, for each mount that shows both directories. */
	void (*pair)(struct vf_inotify_reader *reader, const struct inotify_event *from,
		     struct vf_inode *from_dir, const struct inotify_event *to,
		     struct vf_inode *to_dir);
	/* This watched directory was removed from a parent that is not watched.  record: only its
	 * place in the stream counts. */
	void (*removed)(struct vf_inotify_reader *reader, const struct inotify_event *record,
			struct vf_inode *dir);
	/* The host's queue was full: events were lost here. */
	void (*overflow)(struct vf_inotify_reader *reader);
};

/* Reads what waits, as much as there is room for: its size in bytes, 0 when nothing waits, or a
 * negative errno. */
int32_t vf_inotify_fetch(struct vf_inotify_reader *reader);
/*
 * Takes what waits out of the host's queue, as far as there is room, to be fetched later: to be
 * called when looking at what was read takes long.
 */
void vf_inotify_relieve(struct vf_inotify_reader *reader);
/* Does anything wait that was taken out of the host's queue? */
static inline bool vf_inotify_has_backlog(const struct vf_events *events)
{
	return events->backlog.first;
}
/* Bytes in the host's queue. */
uint32_t vf_inotify_waiting(const struct vf_inotify_reader *reader);
/* Forgets all that waits, there and in the host's queue, and what was read. */
void vf_inotify_drop(struct vf_inotify_reader *reader);
/* Forgets what was taken out of the host's queue, and frees the memory for it. */
void vf_backlog_clear(struct vf_backlog *backlog);
/* Calls one(), pair() and overflow() for what was read.  How many events those were. */
uint32_t vf_inotify_take(struct vf_inotify_reader *reader);
/* An entry or child event when the record has a name (inode is the directory), else one of the
 * inode itself. */
struct vf_change vf_inotify_change(const struct vf_inotify_reader *reader,
				   const struct inotify_event *record, struct vf_inode *inode,
				   struct vf_inode *child);
/* What follows of one directory's watch: an event of a name in it, or its own (without a name). */
struct vf_entry {
	uint64_t key; /* vf_name_hash() */
	uint32_t events;
	bool is_dir;
	bool joined; /* half of a rename whose other half is there as well */
};
/* Of these events as many as there are in what was read and not taken, up to max; nodeid: the
 * directory's. */
uint32_t vf_inotify_entries(struct vf_inotify_reader *reader, int32_t wd, uint64_t events,
			    uint64_t nodeid, struct vf_entry *entries, uint32_t max);
/* Does more follow than can be looked at? */
bool vf_inotify_is_blind(const struct vf_inotify_reader *reader);
/*
 * Only one half of a rename is taken, of which inotify says both: may the other one, of this name
 * in this directory, have come right before it and been counted as one with another, or be still
 * to come, or have come since?  Reads more if nothing is there.
 */
bool vf_inotify_half_may_be_missing(struct vf_inotify_reader *reader, uint32_t half,
				    const struct vf_inode *other_dir, const char *name,
				    uint32_t namelen);

/*
 * Does anything follow that happened to this directory, which the guest watches, or in it, while it
 * had a name?  Reads all that there is room for.
 */
bool vf_inotify_lives_on(struct vf_inotify_reader *reader, const struct vf_inode *dir);

/* Does another removal of the name follow by which this directory was last known? */
bool vf_inotify_is_removed_later(struct vf_inotify_reader *reader, struct vf_inode *dir);

/* ---- inotify_watch.c ---- */

/* What inotify is to be asked for on an inode that the guest watches like this. */
uint64_t vf_inotify_bits(const struct vf_inode *inode, uint64_t mask);
/*
 * Makes one of the instances report bits (of vf_inotify_bits(); 0: nothing) on this inode, and a
 * directory's removal; as vf_source_ops.mark.
 */
int vf_inotify_watch(struct vf_events *events, enum vf_wd which, struct vf_inode *inode,
		     uint64_t bits, int32_t wd[VF_N_WDS]);
/* VF_WD_NAME of a directory with this name in the parent of that number. */
int32_t vf_inotify_name_number(int32_t parent, const char *name, uint32_t namelen);

#endif
