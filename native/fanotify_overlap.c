/* SPDX-License-Identifier: Apache-2.0 */
/*
 * See fanotify_overlap.h.  An event that both groups have told is dropped from what the first one
 * said, since the other may have summed it up with a later one.  This is as the kernel does with
 * what waits unread.
 */
#include <sys/fanotify.h>
#include <sys/ioctl.h>

#include "fanotify_overlap.h"
#include "fanotify_source.h"

/* More of what was read is not kept: then the guest is told of a loss. */
#define MAX_KEPT (64u << 20)
#define N_BUCKETS 4096u
/* Records that are looked at in all; they can be made so that each is like all others. */
#define MAX_COMPARED (1u << 20)
#define NONE UINT32_MAX

/* ---- queues ------------------------------------------------------------------------ */

static void keep(struct vf_fanotify_records *records, const uint8_t *bytes, uint32_t size)
{
	if (records->size + size > records->room) {
		size_t room = records->room ? records->room * 2 : 65536;
		uint8_t *more = room <= MAX_KEPT ? realloc(records->bytes, room) : NULL;

		if (!more) {
			records->lost = true;
			return;
		}
		records->bytes = more;
		records->room = room;
	}
	memcpy(records->bytes + records->size, bytes, size);
	records->size += size;
}

/* What was read at once: how many records, those that the guest wants are kept. */
static uint32_t sort_out(struct vf_events *events, struct vf_fanotify_records *records,
			 uint32_t size)
{
	struct vf_fanotify_record record;
	uint32_t n = 0;

	for (uint32_t at = 0; at < size; n++) {
		int32_t length = vf_fanotify_parse(events->buffer + at, size - at, &record);

		if (length < 0) {
			vf_fanotify_report_garbage(events, size - at);
			break;
		}
		if (!vf_fanotify_is_wanted(events, &record))
			vf_fanotify_take(events, &record, records->seen_ns);
		else
			keep(records, events->buffer + at, (uint32_t)length);
		at += (uint32_t)length;
	}
	return n;
}

static uint32_t count(const uint8_t *bytes, uint32_t size)
{
	struct fanotify_event_metadata head;
	uint32_t n = 0;

	for (uint32_t at = 0; size - at >= sizeof(head); at += head.event_len, n++) {
		memcpy(&head, bytes + at, sizeof(head));
		if (head.event_len < sizeof(head) || head.event_len > size - at)
			break;
	}
	return n;
}

int vf_fanotify_empty_queue(struct vf_events *events, int fd, struct vf_fanotify_records *records)
{
	int bytes = 0;
	uint32_t left;

	if (ioctl(fd, FIONREAD, &bytes))
		return -errno;
	/* The size of that many records without what follows their heads, or all of it. */
	left = (uint32_t)bytes / FAN_EVENT_METADATA_LEN;
	while (left) {
		ssize_t size = read(fd, events->buffer, VF_SOURCE_BUFFER);
		uint32_t n;

		if (size < 0 && errno == EINTR)
			continue;
		if (size <= 0)
			return size && errno != EAGAIN ? -errno : 0;
		n = records ? sort_out(events, records, (uint32_t)size)
			    : count(events->buffer, (uint32_t)size);
		left = n < left ? left - n : 0;
	}
	return 0;
}

/* ---- what both have said -------------------------------------------------------------- */

/* Records of the next group by process and object. */
struct index {
	const struct vf_fanotify_records *records;
	struct entry {
		uint32_t at, next;
	} * entries;
	uint32_t n, room;
	uint32_t compared;
	uint32_t buckets[N_BUCKETS];
};

static uint32_t hash(const struct vf_fanotify_record *record)
{
	const struct vf_fanotify_object *object =
	    record->object.there ? &record->object : &record->dir;
	uint64_t h = (uint32_t)record->pid;

	for (uint32_t i = 0; object->there && i < object->handle_size; i++)
		h = (h ^ object->handle[i]) * 0x100000001b3u;
	return (uint32_t)(h ^ h >> 32) % N_BUCKETS;
}

static void index_free(struct index *index)
{
	if (index)
		free(index->entries);
	free(index);
}

static struct index *index_new(const struct vf_fanotify_records *records)
{
	struct index *index = calloc(1, sizeof(*index));
	struct vf_fanotify_record record;
	int32_t length;

	if (!index)
		return NULL;
	index->records = records;
	memset(index->buckets, 0xff, sizeof(index->buckets));
	for (uint32_t at = 0; at < records->size; at += (uint32_t)length) {
		uint32_t *bucket;

		length =
		    vf_fanotify_parse(records->bytes + at, (uint32_t)records->size - at, &record);
		if (length < 0)
			break; /* not after it was parsed once */
		if (index->n == index->room) {
			uint32_t room = index->room ? index->room * 2 : 256;
			struct entry *more = realloc(index->entries, room * sizeof(*more));

			if (!more) {
				index_free(index);
				return NULL;
			}
			index->entries = more;
			index->room = room;
		}
		bucket = &index->buckets[hash(&record)];
		index->entries[index->n] = (struct entry){.at = at, .next = *bucket};
		*bucket = index->n++;
	}
	return index;
}

static bool is_same(const struct vf_fanotify_object *a, const struct vf_fanotify_object *b)
{
	if (!a->there || !b->there)
		return a->there == b->there;
	return !memcmp(&a->fsid, &b->fsid, sizeof(a->fsid)) && a->type == b->type &&
	       a->handle_size == b->handle_size && !memcmp(a->handle, b->handle, a->handle_size) &&
	       !a->name == !b->name && a->namelen == b->namelen &&
	       (!a->name || !memcmp(a->name, b->name, a->namelen));
}

/*
 * What the other record tells, too.  Of a rename, marks on inodes tell the sides that they are on.
 */
static uint64_t in_common(const struct vf_fanotify_record *record,
			  const struct vf_fanotify_record *other)
{
	if (record->pid != other->pid || !is_same(&record->object, &other->object) ||
	    ((record->mask ^ other->mask) & (VF_FS_RENAME | VF_FS_ISDIR)))
		return 0;
	if (record->mask & VF_FS_RENAME)
		return (!other->old.there || is_same(&record->old, &other->old)) &&
			       (!other->new.there || is_same(&record->new, &other->new))
			   ? record->mask
			   : 0;
	return is_same(&record->dir, &other->dir) ? record->mask & other->mask : 0;
}

/* Takes from the record of the first group what the next one tells, up to MAX_COMPARED. */
static void strip(struct index *index, struct vf_fanotify_record *record)
{
	struct vf_fanotify_record other;

	for (uint32_t i = index->buckets[hash(record)]; i != NONE; i = index->entries[i].next) {
		uint32_t at = index->entries[i].at;

		if (index->compared == MAX_COMPARED)
			return;
		index->compared++;
		if (vf_fanotify_parse(index->records->bytes + at,
				      (uint32_t)index->records->size - at, &other) > 0)
			record->mask &= ~(in_common(record, &other) & ~VF_FS_ISDIR);
	}
}

static void report(struct vf_events *events, struct vf_fanotify_records *records,
		   struct index *index)
{
	struct vf_fanotify_record record;
	int32_t length;

	for (uint32_t at = 0; at < records->size; at += (uint32_t)length) {
		length =
		    vf_fanotify_parse(records->bytes + at, (uint32_t)records->size - at, &record);
		if (length < 0)
			break;
		if (index)
			strip(index, &record);
		if (record.mask & ~VF_FS_ISDIR)
			vf_fanotify_take(events, &record, records->seen_ns);
	}
	free(records->bytes);
	*records = (struct vf_fanotify_records){.size = 0};
}

bool vf_fanotify_report_both(struct vf_events *events, struct vf_fanotify_records *first,
			     struct vf_fanotify_records *next)
{
	struct index *index = index_new(next);
	bool told_once;

	report(events, first, index);
	told_once = index && index->compared < MAX_COMPARED;
	report(events, next, NULL);
	index_free(index);
	return told_once;
}
