# SPDX-License-Identifier: Apache-2.0
"""Owns the event bits: FS_* inside the kernel, IN_* of inotify and FAN_* of fanotify are the same numbers.
Must not know where events come from or go to.
Specification: include/linux/fsnotify_backend.h; inotify(7), fanotify_mark(2)."""

from __future__ import annotations

import enum


class FsEvent(enum.IntFlag):
    """One bit for each thing that can happen, and two that describe the event."""

    ACCESS = 0x0000_0001
    MODIFY = 0x0000_0002
    ATTRIB = 0x0000_0004
    CLOSE_WRITE = 0x0000_0008
    CLOSE_NOWRITE = 0x0000_0010
    OPEN = 0x0000_0020
    MOVED_FROM = 0x0000_0040
    MOVED_TO = 0x0000_0080
    CREATE = 0x0000_0100
    DELETE = 0x0000_0200
    DELETE_SELF = 0x0000_0400
    MOVE_SELF = 0x0000_0800
    OPEN_EXEC = 0x0000_1000
    UNMOUNT = 0x0000_2000
    Q_OVERFLOW = 0x0000_4000
    EVENT_ON_CHILD = 0x0800_0000
    RENAME = 0x1000_0000
    ISDIR = 0x4000_0000


INOTIFY_EVENTS = FsEvent(0xFFF)
"""IN_ALL_EVENTS."""

DELIVERABLE = INOTIFY_EVENTS | FsEvent.OPEN_EXEC
"""What an element can carry besides ISDIR and Q_OVERFLOW; a rename travels as MOVED_FROM and MOVED_TO."""


def event_names(mask: int) -> list[str]:
    """Names of the bits set, lowest first; unknown bits by number, as BIT7."""
    known = {member.value: member.name for member in FsEvent}
    return [known.get(1 << bit) or f"BIT{bit}" for bit in range(mask.bit_length()) if mask >> bit & 1]
