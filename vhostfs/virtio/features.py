# SPDX-License-Identifier: Apache-2.0
"""virtio feature bits and device status bits, with the names that logs use.

Must not know vhost-user messages or FUSE.
Specification: virtio 1.3, sections 2.1, 2.2, 5.11.3 and 6.
"""

from __future__ import annotations

import enum


class VirtioFeature(enum.IntFlag):
    """Feature bits that concern a vhost-user virtio-fs device."""

    FS_NOTIFICATION = 1 << 0
    LOG_ALL = 1 << 26
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    """VHOST_USER_F_PROTOCOL_FEATURES: between front end and back end only, no guest sees it."""
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class DeviceStatus(enum.IntFlag):
    """The device status byte (virtio 1.3, 2.1)."""

    ACKNOWLEDGE = 0x01
    DRIVER = 0x02
    DRIVER_OK = 0x04
    FEATURES_OK = 0x08
    NEEDS_RESET = 0x40
    FAILED = 0x80


def flag_names(flags: int, kind: type[enum.IntFlag]) -> str:
    """Names of the bits set, lowest first, separated by a space; unknown bits by number; "none" for 0."""
    known = {member.value: member.name for member in kind if member.name}
    names = [
        (known.get(1 << bit) or f"bit{bit}").lower() for bit in range(flags.bit_length()) if flags >> bit & 1
    ]
    return " ".join(names) or "none"
