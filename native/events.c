/* SPDX-License-Identifier: Apache-2.0 */
/* The event pipeline's life: see events.h. */
#include <sys/eventfd.h>

#include "events.h"

int vf_share_start_events(vf_share *share, const struct vf_events_config *config)
{
	(void)share;
	close(config->source_fd);
	return -ENOSYS;
}

int vf_share_grant_events(vf_share *share, uint64_t flags, uint64_t mask)
{
	(void)share;
	(void)flags;
	(void)mask;
	return -ENOSYS;
}

void vf_share_get_events_stats(vf_share *share, struct vf_events_stats *stats)
{
	(void)share;
	memset(stats, 0, sizeof(*stats));
}

void vf_share_trace_events(vf_share *share, bool on)
{
	(void)share;
	(void)on;
}

int vf_share_next_event_trace(vf_share *share, struct vf_event_trace *trace)
{
	(void)share;
	(void)trace;
	return 0;
}

int vf_share_next_event_notice(vf_share *share, char *text, uint32_t size)
{
	(void)share;
	(void)text;
	(void)size;
	return 0;
}

int vf_share_events_fd(vf_share *share)
{
	(void)share;
	return -1;
}
