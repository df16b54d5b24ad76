# SPDX-License-Identifier: Apache-2.0
"""Owns the shape of what is told on the control socket about what server, VMM and guest have agreed on.
Must not know sockets or how people are shown it.
Specification: docs/caps.md, "A running server"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..caps import names
from ..fuse.abi import KERNEL_VERSION
from ..fuse.fsnotify import REDUCTION, Delivery, FsnotifyAnswer, FsnotifyFlag, delivery_of
from ..fuse.operations import AgreedSession
from ..record import Record
from ..vhost_user.device import Negotiated, queue_role
from ..virtio.config import FsConfig


class NegotiatedState(Record, kw_only=True):
    """Everything that is told, at one moment; None: not (yet) there.

    shared_dir, sandbox, source and reason as the server was started or has moved; host_mask: FS_* bits of
    its source; transports: those of VIRTQUEUE and PARKED that it offers.
    """

    shared_dir: str
    sandbox: str
    tag: str | None
    source: str
    reason: str
    host_mask: int
    transports: int
    config: FsConfig | None
    max_queues: int
    delivery: Delivery
    missing: str
    front_end: Negotiated | None
    session: AgreedSession | None
    events: FsnotifyAnswer | None


def negotiated_message(state: NegotiatedState) -> dict[str, Any]:
    """All that is agreed, by the names of the specifications."""
    return {
        "type": "negotiated",
        "server": {
            "version": __version__,
            "shared_dir": state.shared_dir,
            "tag": state.tag,
            "sandbox": state.sandbox,
            "max_queues": state.max_queues,
            "config": _config(state.config),
        },
        "source": {
            "chosen": state.source,
            "reason": state.reason,
            "reports": names.event_bit_names(state.host_mask),
        },
        "delivery": {
            "chosen": state.delivery.value,
            "missing": state.missing,
            "offered": [
                way.value
                for way in Delivery
                if way is not Delivery.NONE and delivery_of(state.transports & _BIT_OF[way]) is way
            ],
        },
        "vmm": None if state.front_end is None else _vmm(state.front_end),
        "fuse": None if state.session is None else _fuse(state.session),
        "fsnotify": None if state.events is None else _fsnotify(state.events),
    }


_BIT_OF = {
    Delivery.VIRTQUEUE: int(FsnotifyFlag.VIRTQUEUE),
    Delivery.PARKED: int(FsnotifyFlag.PARKED),
}


def _config(config: FsConfig | None) -> Mapping[str, Any] | None:
    if config is None:
        return None
    return {
        "tag": config.tag,
        "num_request_queues": config.num_request_queues,
        "notify_buf_size_bytes": config.notify_buf_size_bytes,
    }


def _vmm(front_end: Negotiated) -> Mapping[str, Any]:
    acked = front_end.features_acked
    return {
        "state": front_end.state.name.lower(),
        "features_offered": names.virtio_feature_names(front_end.features_offered),
        "features_acked": names.virtio_feature_names(acked),
        "protocol_features_offered": names.protocol_feature_names(front_end.protocol_features_offered),
        "protocol_features_acked": names.protocol_feature_names(front_end.protocol_features_acked),
        "device_status": names.device_status_names(front_end.status),
        "memory_regions": len(front_end.regions),
        "memory_bytes": sum(region.size_bytes for region in front_end.regions),
        "queues": [
            {"index": index, "role": queue_role(index, acked).name.lower(), "size": size}
            for index, size in sorted(front_end.queue_sizes.items())
        ],
    }


def _fuse(session: AgreedSession) -> Mapping[str, Any]:
    offer, reply = session.offer, session.reply
    return {
        "guest_version": f"{offer.major}.{offer.minor}",
        "version": f"{KERNEL_VERSION}.{reply.minor}",
        "flags_offered": names.fuse_init_names(offer.flags),
        "flags_granted": names.fuse_init_names(reply.flags),
        "max_write_bytes": reply.max_write_bytes,
        "max_readahead_bytes": reply.max_readahead_bytes,
        "max_background": reply.max_background,
        "max_pages": reply.max_pages,
    }


def _fsnotify(answer: FsnotifyAnswer) -> Mapping[str, Any]:
    offer, reply = answer.offer, answer.reply
    told: dict[str, Any] = {"refused": answer.missing if answer.error else None}
    if offer is not None:
        told |= {
            "driver_version": f"{offer.major}.{offer.minor}",
            "flags_wanted": names.fsnotify_flag_names(offer.flags),
            "driver_can_raise": names.event_bit_names(offer.mask),
            "driver_buf_size_bytes": offer.buf_size_bytes,
        }
    if not answer.error:
        told |= {
            "flags_granted": names.fsnotify_flag_names(reply.flags),
            "host_can_report": names.event_bit_names(reply.mask),
            "events": names.event_bit_names(answer.driver_mask),
            "notify_buf_size_bytes": reply.notify_buf_size_bytes,
            "max_watches": reply.max_watches,
            "max_parked": reply.max_parked,
            "reductions": [line.removeprefix(REDUCTION) for line in answer.reductions],
        }
    return told
