/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What was taken out of an inotify instance's queue and is still to be looked at.
 *
 * The kernel keeps max_queued_events (16,384) and then loses what comes.  While one buffer of
 * records is looked at, on a machine where all processors are taken, more than that can happen.
 */
#include <stdlib.h>
#include <sys/ioctl.h>

#include "inotify_records.h"

/* 32 MB: some hundred thousand records. */
#define MAX_CHUNKS 128u
/* Where own changes are told apart by when they were made, of which so many are not remembered. */
#define MAX_CHUNKS_OF_SOURCE 8u

struct vf_backlog_chunk {
	struct vf_backlog_chunk *next;
	uint64_t at; /* where in the stream it begins */
	uint32_t from, size;
	uint8_t bytes[VF_SOURCE_BUFFER];
};

static void put_chunk(struct vf_backlog *backlog, struct vf_backlog_chunk *chunk)
{
	if (backlog->spare)
		free(chunk);
	else
		backlog->spare = chunk;
}

static void drop_first(struct vf_backlog *backlog)
{
	struct vf_backlog_chunk *chunk = backlog->first;

	backlog->first = chunk->next;
	if (!chunk->next)
		backlog->last = NULL;
	backlog->n--;
	put_chunk(backlog, chunk);
}

void vf_backlog_clear(struct vf_backlog *backlog)
{
	while (backlog->first)
		drop_first(backlog);
	free(backlog->spare);
	backlog->spare = NULL;
}

/* An empty one that is not in the list. */
static struct vf_backlog_chunk *new_chunk(struct vf_backlog *backlog, uint32_t max)
{
	struct vf_backlog_chunk *chunk = backlog->spare;

	if (backlog->n >= max)
		return NULL;
	backlog->spare = NULL;
	if (!chunk)
		chunk = malloc(sizeof(*chunk));
	if (chunk) {
		chunk->next = NULL;
		chunk->from = chunk->size = 0;
	}
	return chunk;
}

static void add_chunk(struct vf_backlog *backlog, struct vf_backlog_chunk *chunk)
{
	if (backlog->last)
		backlog->last->next = chunk;
	else
		backlog->first = chunk;
	backlog->last = chunk;
	backlog->n++;
}

void vf_inotify_relieve(struct vf_inotify_reader *reader)
{
	struct vf_backlog *backlog = &reader->events->backlog;
	uint32_t max = reader->which == VF_WD_SOURCE ? MAX_CHUNKS_OF_SOURCE : MAX_CHUNKS;

	for (;;) {
		struct vf_backlog_chunk *chunk = backlog->last;
		bool is_new = !chunk || VF_SOURCE_BUFFER - chunk->size < VF_READ_ROOM;
		uint32_t room;
		uint64_t at;
		ssize_t n;

		if (is_new)
			chunk = new_chunk(backlog, max);
		if (!chunk)
			return;
		room = VF_SOURCE_BUFFER - chunk->size;
		n = reader->read(reader, chunk->bytes + chunk->size, room, &at);
		if (n <= 0) {
			if (is_new)
				put_chunk(backlog, chunk);
			return;
		}
		if (is_new) {
			chunk->at = at;
			add_chunk(backlog, chunk);
		}
		chunk->size += (uint32_t)n;
		if ((uint32_t)n + VF_READ_ROOM <= room)
			return;
	}
}

/* Of the whole records in the chunk that fit. */
static uint32_t fitting(const struct vf_backlog_chunk *chunk, size_t size)
{
	const struct inotify_event *record;
	uint32_t at = chunk->from, end;

	while (at < chunk->size) {
		record = (const void *)(chunk->bytes + at);
		end = vf_record_end(at, record);
		if (end - chunk->from > size)
			break;
		at = end;
	}
	return at - chunk->from;
}

ssize_t vf_inotify_read(struct vf_inotify_reader *reader, void *buffer, size_t size, uint64_t *at)
{
	struct vf_backlog *backlog = &reader->events->backlog;
	struct vf_backlog_chunk *chunk = backlog->first;
	uint32_t n;

	if (!chunk)
		return reader->read(reader, buffer, size, at);
	*at = chunk->at + chunk->from;
	n = fitting(chunk, size);
	memcpy(buffer, chunk->bytes + chunk->from, n);
	chunk->from += n;
	if (chunk->from == chunk->size)
		drop_first(backlog);
	return n;
}

uint32_t vf_inotify_waiting(const struct vf_inotify_reader *reader)
{
	int bytes;

	return ioctl(reader->fd, FIONREAD, &bytes) ? 0 : (uint32_t)bytes;
}

void vf_inotify_drop(struct vf_inotify_reader *reader)
{
	int64_t left = vf_inotify_waiting(reader);
	ssize_t n = 1;
	uint64_t at;

	vf_backlog_clear(&reader->events->backlog);
	for (; left > 0 && n > 0; left -= n)
		n = reader->read(reader, reader->buffer, VF_SOURCE_BUFFER, &at);
	reader->size = reader->next = reader->end = reader->last = 0;
	reader->n_unseen = 0;
}
