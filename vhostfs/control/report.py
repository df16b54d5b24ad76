# SPDX-License-Identifier: Apache-2.0
"""Owns the shape of what is told on the control socket: events and statistics as JSON objects.
Must not know sockets or how people are shown them.
Specification: docs/events.md, "The control socket"."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..events.feed import SeenEvent
from ..events.masks import FsEvent, event_names
from ..events.records import COUNTERS, EventsStats
from ..fuse.fsnotify import Delivery, FsnotifyAnswer, flag_list
from ..record import Record, as_dict
from ..share.native_share import ShareStats
from ..vhost_user.device import Negotiated
from ..vhost_user.messages import ProtocolFeature
from ..virtio.features import VirtioFeature, flag_names


def event_message(event: SeenEvent) -> dict[str, Any]:
    """One event. path: of the object; name: its name where the event is on a directory's entry, else ""."""
    trace = event.trace
    name = trace.name.decode(errors="surrogateescape")
    path = event.node_path
    if path is not None and name:
        path = f"{path.rstrip('/')}/{name}"
    return {
        "type": "event",
        "time": utc_text(trace.time_ns),
        "path": path,
        "name": name,
        "nodeid": trace.nodeid,
        "child_nodeid": trace.child_nodeid,
        "events": event_names(trace.mask),
        "is_dir": bool(trace.mask & FsEvent.ISDIR),
        "cookie": trace.cookie,
        "fate": trace.fate.name.lower(),
        "reason": trace.fate.reason,
        "pid": trace.pid,
    }


def utc_text(time_ns: int) -> str:
    """Microseconds, as 2026-11-21T07:14:56.123456Z."""
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest_ns // 1000:06d}Z"


class ServerState(Record, kw_only=True):
    """Everything that statistics are made of, at one moment."""

    uptime_s: float
    tag: str | None
    share: ShareStats
    source: str
    reason: str
    events: EventsStats
    front_end: Negotiated | None
    agreed: FsnotifyAnswer | None
    delivery: Delivery = Delivery.NONE
    missing: str = ""


def stats_message(state: ServerState) -> dict[str, Any]:
    """All counters count from the server's start, but those that say "now"."""
    return {
        "type": "stats",
        "server": {"version": __version__, "uptime_s": round(state.uptime_s, 3), "tag": state.tag},
        "share": as_dict(state.share),
        "events": {
            "source": state.source,
            "reason": state.reason,
            "counters": {name: getattr(state.events, name) for name in COUNTERS},
            "latency": _latency(state.events),
        },
        "guest": None if state.front_end is None else _guest(state, state.front_end),
    }


def _latency(stats: EventsStats) -> dict[str, Any]:
    return {
        "below_us": [1 << exponent for exponent in range(len(stats.latency))],
        "counts": list(stats.latency),
        "p50_us": stats.latency_percentile_us(50),
        "p99_us": stats.latency_percentile_us(99),
    }


def _guest(state: ServerState, front_end: Negotiated) -> Mapping[str, Any]:
    agreed = state.agreed
    return {
        "virtio_features_offered": _names(front_end.features_offered, VirtioFeature),
        "virtio_features": _names(front_end.features_acked, VirtioFeature),
        "protocol_features": _names(front_end.protocol_features_acked, ProtocolFeature),
        "queue_sizes": {str(index): size for index, size in sorted(front_end.queue_sizes.items())},
        "delivery": {"chosen": state.delivery.value, "missing": state.missing},
        "fsnotify": None
        if agreed is None
        else {
            "flags": flag_list(agreed.reply.flags),
            "driver_mask": event_names(agreed.driver_mask),
            "host_mask": event_names(agreed.reply.mask),
            "notify_buf_size_bytes": agreed.reply.notify_buf_size_bytes,
            "max_watches": agreed.reply.max_watches,
        },
    }


def _names(flags: int, kind: type[VirtioFeature] | type[ProtocolFeature]) -> list[str]:
    return flag_names(flags, kind).split() if flags else []
