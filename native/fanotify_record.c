/* SPDX-License-Identifier: Apache-2.0 */
/* See fanotify_record.h; layout: linux/fanotify.h, fanotify(7). */
#include <sys/fanotify.h>

#include "fanotify_record.h"

/* Two 32-bit numbers, then the handle, then the name with NUL (and padding). */
#define FID_HANDLE offsetof(struct fanotify_event_info_fid, handle)

static bool parse_object(const uint8_t *info, uint32_t size, bool named,
			 struct vf_fanotify_object *object)
{
	const uint8_t *handle = info + FID_HANDLE;
	uint32_t room, bytes;
	const char *nul;

	_Static_assert(sizeof(object->fsid) == sizeof(__kernel_fsid_t), "f_fsid");
	if (object->there || size < FID_HANDLE + offsetof(struct file_handle, f_handle))
		return false;
	memcpy(&object->fsid, info + offsetof(struct fanotify_event_info_fid, fsid),
	       sizeof(object->fsid));
	memcpy(&bytes, handle + offsetof(struct file_handle, handle_bytes), sizeof(bytes));
	memcpy(&object->type, handle + offsetof(struct file_handle, handle_type),
	       sizeof(object->type));
	room = size - (uint32_t)(FID_HANDLE + offsetof(struct file_handle, f_handle));
	if (bytes > room || bytes > MAX_HANDLE_SZ)
		return false;
	object->there = true;
	object->handle = handle + offsetof(struct file_handle, f_handle);
	object->handle_size = bytes;
	if (!named)
		return true;
	object->name = (const char *)object->handle + bytes;
	nul = memchr(object->name, 0, room - bytes);
	if (!nul || nul - object->name > VF_NAME_MAX)
		return false;
	object->namelen = (uint32_t)(nul - object->name);
	return true;
}

static bool parse_info(const uint8_t *info, uint32_t size, uint8_t type,
		       struct vf_fanotify_record *record)
{
	switch (type) {
	case FAN_EVENT_INFO_TYPE_FID:
		return parse_object(info, size, false, &record->object);
	case FAN_EVENT_INFO_TYPE_DFID:
		return parse_object(info, size, false, &record->dir);
	case FAN_EVENT_INFO_TYPE_DFID_NAME:
		return parse_object(info, size, true, &record->dir);
	case FAN_EVENT_INFO_TYPE_OLD_DFID_NAME:
		return parse_object(info, size, true, &record->old);
	case FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
		return parse_object(info, size, true, &record->new);
	default:
		return true; /* pidfd, error: nothing that was asked for, but harmless */
	}
}

int32_t vf_fanotify_parse(const uint8_t *bytes, uint32_t size, struct vf_fanotify_record *record)
{
	struct fanotify_event_info_header info;
	struct fanotify_event_metadata head;
	uint32_t at;

	memset(record, 0, sizeof(*record));
	if (size < sizeof(head))
		return -EBADMSG;
	memcpy(&head, bytes, sizeof(head));
	if (head.vers != FANOTIFY_METADATA_VERSION || head.metadata_len < sizeof(head) ||
	    head.event_len < head.metadata_len || head.event_len > size)
		return -EBADMSG;
	record->mask = head.mask;
	record->pid = head.pid;
	for (at = head.metadata_len; at < head.event_len; at += info.len) {
		if (head.event_len - at < sizeof(info))
			return -EBADMSG;
		memcpy(&info, bytes + at, sizeof(info));
		if (info.len < sizeof(info) || info.len > head.event_len - at ||
		    !parse_info(bytes + at, info.len, info.info_type, record))
			return -EBADMSG;
	}
	return (int32_t)head.event_len;
}
