# SPDX-License-Identifier: Apache-2.0
"""Owns how flags and masks are called wherever they are told: by the names of their own specifications.
Must not try or ask anything: numbers in, names out.
Specification: virtio 1.3; vhost-user.rst of QEMU; linux/fuse.h, linux/fanotify.h; docs/protocol.md."""

from __future__ import annotations

import enum

from ..events.masks import FsEvent
from ..fuse.abi import InitFlag
from ..fuse.fsnotify import Delivery as Delivery
from ..fuse.fsnotify import FsnotifyFlag
from ..fuse.fsnotify import delivery_of as delivery_of
from ..share.options import EventsMode
from ..vhost_user.messages import ProtocolFeature
from ..virtio.features import DeviceStatus, VirtioFeature


class FanInit(enum.IntFlag):
    """Flags of fanotify_init(2), but for its classes."""

    CLOEXEC = 0x1
    NONBLOCK = 0x2
    UNLIMITED_QUEUE = 0x10
    UNLIMITED_MARKS = 0x20
    ENABLE_AUDIT = 0x40
    REPORT_PIDFD = 0x80
    REPORT_TID = 0x100
    REPORT_FID = 0x200
    REPORT_DIR_FID = 0x400
    REPORT_NAME = 0x800
    REPORT_TARGET_FID = 0x1000
    REPORT_FD_ERROR = 0x2000
    REPORT_MNT = 0x4000


class FanMark(enum.IntFlag):
    """Flags of fanotify_mark(2). What is marked is an inode where neither MOUNT nor FILESYSTEM is set."""

    ADD = 0x1
    REMOVE = 0x2
    DONT_FOLLOW = 0x4
    ONLYDIR = 0x8
    MOUNT = 0x10
    IGNORED_MASK = 0x20
    IGNORED_SURV_MODIFY = 0x40
    FLUSH = 0x80
    FILESYSTEM = 0x100
    EVICTABLE = 0x200
    IGNORE = 0x400


HOST_SOURCES = (EventsMode.FANOTIFY_FILESYSTEM, EventsMode.FANOTIFY_INODES, EventsMode.INOTIFY)
"""Where a server can learn of changes, best first; the values are those of `--events=`."""


_VIRTIO_NAMES = {
    VirtioFeature.FS_NOTIFICATION: "VIRTIO_FS_F_NOTIFICATION",
    VirtioFeature.LOG_ALL: "VHOST_F_LOG_ALL",
    VirtioFeature.RING_INDIRECT_DESC: "VIRTIO_F_INDIRECT_DESC",
    VirtioFeature.RING_EVENT_IDX: "VIRTIO_F_EVENT_IDX",
    VirtioFeature.PROTOCOL_FEATURES: "VHOST_USER_F_PROTOCOL_FEATURES",
}


def virtio_feature_names(bits: int) -> list[str]:
    """As VIRTIO_F_VERSION_1, lowest bit first; unknown ones as BIT37."""
    known = {
        member.value: _VIRTIO_NAMES.get(member, f"VIRTIO_F_{member.name}")
        for member in VirtioFeature
        if member.name
    }
    return _names(bits, known)


def protocol_feature_names(bits: int) -> list[str]:
    """As VHOST_USER_PROTOCOL_F_MQ."""
    return _names(bits, _prefixed(ProtocolFeature, "VHOST_USER_PROTOCOL_F_"))


def device_status_names(bits: int) -> list[str]:
    """As DRIVER_OK."""
    return _names(bits, _prefixed(DeviceStatus, ""))


def fuse_init_names(bits: int) -> list[str]:
    """FUSE_INIT flags, all 64 bits, as FUSE_ASYNC_READ."""
    return _names(bits, _prefixed(InitFlag, "FUSE_"))


def fsnotify_flag_names(bits: int) -> list[str]:
    """Flags of FUSE_FSNOTIFY_INIT, as FUSE_FSNOTIFY_PARKED."""
    return _names(bits, _prefixed(FsnotifyFlag, "FUSE_FSNOTIFY_"))


def event_bit_names(mask: int) -> list[str]:
    """Event bits as docs/protocol.md, 5.2 has them: CREATE."""
    return _names(mask, _prefixed(FsEvent, ""))


def fan_init_names(flags: int) -> list[str]:
    """As FAN_REPORT_FID."""
    return _names(flags, _prefixed(FanInit, "FAN_"))


def fan_mark_names(flags: int) -> list[str]:
    """As FAN_MARK_FILESYSTEM."""
    return _names(flags, _prefixed(FanMark, "FAN_MARK_"))


def _prefixed(kind: type[enum.IntFlag], prefix: str) -> dict[int, str]:
    return {member.value: f"{prefix}{member.name}" for member in kind}


def _names(bits: int, known: dict[int, str]) -> list[str]:
    return [known.get(1 << bit, f"BIT{bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]
