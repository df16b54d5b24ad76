# SPDX-License-Identifier: Apache-2.0
"""Owns the values that the C core's event pipeline takes and gives: configuration, counters, trace records.
Must not know cffi, asyncio or how anything is shown.
Specification: native/api.h, "events"."""

from __future__ import annotations

import enum

from ..record import Record, field_names

LATENCY_BUCKETS = 24


class NativeSource(enum.IntEnum):
    """enum vf_event_source."""

    FANOTIFY = 0
    INOTIFY = 1


class EventsConfig(Record, kw_only=True):
    """struct vf_events_config; the descriptors (-1: none) are handed over."""

    source: NativeSource
    source_fd: int
    order_fd: int
    next_fd: int
    marker_fd: int
    filesystem_mask: int
    host_mask: int
    max_queued: int
    max_watches: int
    notify_buf_size_bytes: int
    max_parked: int


class EventFate(enum.IntEnum):
    """enum vf_event_fate: what became of an event."""

    DELIVERED = 0
    MERGED = 1
    LOST = 2
    OWN = 3
    UNWATCHED = 4
    OVERFLOW = 5

    @property
    def reason(self) -> str:
        """A few words for people."""
        return _REASONS[self]


_REASONS = {
    EventFate.DELIVERED: "given to the guest",
    EventFate.MERGED: "the same as the one before, which still waits",
    EventFate.LOST: "no room: the guest takes them too slowly",
    EventFate.OWN: "made by the guest itself",
    EventFate.UNWATCHED: "nobody in the guest watches it",
    EventFate.OVERFLOW: "the guest was told that events were lost",
}


class EventTrace(Record):
    """struct vf_event_trace. name: as bytes, for it need not be text."""

    time_ns: int  # CLOCK_REALTIME
    nodeid: int
    child_nodeid: int
    mask: int
    cookie: int
    fate: EventFate
    pid: int
    skipped: int
    name: bytes


class EventsStats(Record, kw_only=True):
    """struct vf_events_stats. latency[i]: how many took less than 2**i us, and at least half of that."""

    received: int = 0
    own: int = 0
    unknown: int = 0
    unwatched: int = 0
    merged: int = 0
    queued: int = 0
    delivered: int = 0
    lost: int = 0
    overflows: int = 0
    host_overflows: int = 0
    depth: int = 0
    max_depth: int = 0
    watches: int = 0
    share_watches: int = 0
    host_marks: int = 0
    buffers: int = 0
    latency: tuple[int, ...] = (0,) * LATENCY_BUCKETS

    def latency_percentile_us(self, percent: float) -> int | None:
        """The bound, in microseconds, that percent of the elements were below; None when there were none."""
        total = sum(self.latency)
        if not total:
            return None
        needed = total * percent / 100
        seen = 0
        for exponent, count in enumerate(self.latency):
            seen += count
            if seen >= needed:
                return 1 << exponent
        return 1 << (len(self.latency) - 1)


COUNTERS = tuple(name for name in field_names(EventsStats) if name != "latency")
"""The single numbers of EventsStats, in the order of the C struct."""
