# SPDX-License-Identifier: Apache-2.0
"""Host events on the wire: numbers, requests, and a decoder of elements that accepts nothing doubtful.

Written down apart from the server's own tables on purpose, so that a mistake is not made twice.
Specification: docs/protocol.md.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from vhostfs.frontend.fuse_abi import OUT_HEADER
from vhostfs.frontend.operations import Call, nothing, the_bytes
from vhostfs.frontend.vhost_user import ProtocolError

NOTIFY_FSNOTIFY = 0x5800
OPCODE_INIT = 0x5800
OPCODE_WATCH = 0x5801
OPCODE_PARK = 0x5802

MAJOR = 1
MINOR = 0
NAME_MAX = 255
NOTIFY_BUF_BYTES = 320

INIT_IN = struct.Struct("<IIQQII")
INIT_OUT = struct.Struct("<IIQQIIII")
WATCH_IN = struct.Struct("<QII")
ELEMENT = struct.Struct("<QIIQIIIIQ")
HEAD_BYTES = OUT_HEADER.size + ELEMENT.size


class Event(enum.IntFlag):
    """Event bits; the values of FS_*, IN_* and FAN_* in Linux."""

    ACCESS = 0x1
    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    CLOSE_NOWRITE = 0x10
    OPEN = 0x20
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    OPEN_EXEC = 0x1000
    UNMOUNT = 0x2000
    Q_OVERFLOW = 0x4000
    EXCL_UNLINK = 0x0400_0000
    EVENT_ON_CHILD = 0x0800_0000
    RENAME = 0x1000_0000
    ISDIR = 0x4000_0000


ENTRY_EVENTS = Event.CREATE | Event.DELETE | Event.MOVED_FROM | Event.MOVED_TO
CHILD_EVENTS = (
    Event.ACCESS
    | Event.MODIFY
    | Event.ATTRIB
    | Event.CLOSE_WRITE
    | Event.CLOSE_NOWRITE
    | Event.OPEN
    | Event.OPEN_EXEC
)
SELF_EVENTS = Event.DELETE_SELF | Event.MOVE_SELF
ALL_EVENTS = ENTRY_EVENTS | CHILD_EVENTS | SELF_EVENTS
CHANGES = ENTRY_EVENTS | SELF_EVENTS | Event.MODIFY | Event.ATTRIB | Event.CLOSE_WRITE
"""What happens when somebody changes something; without opening, reading and closing unchanged."""


class Granted(enum.IntFlag):
    """Flags of FSNOTIFY_INIT, wanted and granted."""

    VIRTQUEUE = 1 << 0
    PARKED = 1 << 1
    WATCH_ALL = 1 << 2
    RENAME = 1 << 3
    CHILD = 1 << 4
    INVALIDATE = 1 << 5
    WATCH_FILESYSTEM = 1 << 6
    PARENT = 1 << 7
    DIRECTORY_LOSS = 1 << 8
    DEFERRED_OPEN = 1 << 9


class WatchFlag(enum.IntFlag):
    FILESYSTEM = 1


class ElementFlag(enum.IntFlag):
    SPLIT_RENAME = 1
    FOR_PARENT = 2
    CACHES = 4
    UNLINKED = 8


@dataclass(frozen=True, slots=True)
class InitAnswer:
    """struct fsnotify_init_out."""

    major: int
    minor: int
    flags: Granted
    mask: Event
    notify_buf_size: int
    max_watches: int
    max_parked: int
    reserved: int


def unpack_init(data: bytes) -> InitAnswer:
    """A newer server's answer may be longer; what follows is for newer drivers."""
    major, minor, flags, mask, size, watches, parked, reserved = INIT_OUT.unpack_from(data)
    return InitAnswer(major, minor, Granted(flags), Event(mask), size, watches, parked, reserved)


def init(
    flags: int = Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD,
    mask: int = ALL_EVENTS,
    *,
    major: int = MAJOR,
    minor: int = MINOR,
    buf_size: int = NOTIFY_BUF_BYTES,
) -> Call[InitAnswer]:
    args = INIT_IN.pack(major, minor, flags, mask, buf_size, 0)
    return Call(OPCODE_INIT, 0, unpack_init, args, reply_room=INIT_OUT.size)


def watch(nodeid: int, mask: int, generation: int = 0, flags: int = 0) -> Call[None]:
    return Call(OPCODE_WATCH, nodeid, nothing, WATCH_IN.pack(mask, generation, flags))


def park(room: int = NOTIFY_BUF_BYTES - OUT_HEADER.size) -> Call[bytes]:
    """room: for the element, behind fuse_out_header."""
    return Call(OPCODE_PARK, 0, the_bytes, reply_room=room)


NO_FLAGS = ElementFlag(0)


@dataclass(frozen=True, slots=True)
class Element:
    """One notification: struct fsnotify_out and its name."""

    nodeid: int
    generation: int
    mask: Event
    name: bytes = b""
    cookie: int = 0
    flags: ElementFlag = NO_FLAGS
    child_nodeid: int = 0
    child_generation: int = 0


OVERFLOW = Element(0, 0, Event.Q_OVERFLOW)


def unpack_element(data: bytes) -> Element:
    """What the device wrote into one buffer; ProtocolError for whatever the specification does not allow."""
    if len(data) < HEAD_BYTES:
        raise ProtocolError(f"an element of {len(data)} bytes is shorter than its fixed part of {HEAD_BYTES}")
    size, code, unique = OUT_HEADER.unpack_from(data)
    nodeid, generation, reserved, mask, namelen, cookie, flags, child_generation, child = ELEMENT.unpack_from(
        data, OUT_HEADER.size
    )
    name = data[HEAD_BYTES:]
    element = Element(
        nodeid, generation, Event(mask), name, cookie, ElementFlag(flags), child, child_generation
    )
    for rule, kept in (
        (f"header.len {size} is the used length {len(data)}", size == len(data)),
        (f"header.error {code:#x} is FUSE_NOTIFY_FSNOTIFY", code == NOTIFY_FSNOTIFY),
        (f"header.unique {unique} is 0", unique == 0),
        (f"reserved {reserved} is 0", reserved == 0),
        (f"namelen {namelen} is what follows", namelen == len(name)),
        (f"namelen {namelen} is at most {NAME_MAX}", namelen <= NAME_MAX),
        ("the name is one component", not {0, ord("/")} & set(name) and name not in (b".", b"..")),
        (f"flags {flags:#x} are known", not flags & ~sum(ElementFlag)),
        ("an unknown child has generation 0", bool(child) or not child_generation),
    ):
        if not kept:
            raise ProtocolError(f"element {element} breaks the rule: {rule}")
    _check_form(element)
    return element


def _check_form(element: Element) -> None:
    kind = element.mask & ~Event.ISDIR
    halves = Event.MOVED_FROM | Event.MOVED_TO
    if kind == Event.Q_OVERFLOW:
        # Of the share, or with DIRECTORY_LOSS granted of one directory.
        sound = element in (OVERFLOW, Element(element.nodeid or 1, element.generation, Event.Q_OVERFLOW))
    elif kind.bit_count() != 1 or not kind & ALL_EVENTS or not element.nodeid:
        sound = False
    elif element.flags & ElementFlag.CACHES:
        sound = (
            element.flags == ElementFlag.CACHES
            and not element.cookie
            and bool(
                kind & (ENTRY_EVENTS | Event.MODIFY | Event.ATTRIB)
                if element.name
                else not element.child_nodeid
            )
        )
    elif kind & ENTRY_EVENTS:
        sound = bool(element.name) and (bool(kind & halves) or not element.cookie)
        split = ElementFlag.SPLIT_RENAME
        sound = sound and (
            not element.flags or bool(element.flags == split and kind & halves and element.cookie)
        )
    elif element.flags & ElementFlag.UNLINKED:
        sound = (
            bool(kind & CHILD_EVENTS & ~Event.ATTRIB)
            and element.flags == ElementFlag.UNLINKED
            and not element.cookie
            and bool(element.name or not element.child_nodeid)
        )
    elif kind & SELF_EVENTS or not element.name:
        for_parent = (
            element.flags == ElementFlag.FOR_PARENT and kind & CHILD_EVENTS and element.mask & Event.ISDIR
        )
        sound = not (element.name or element.cookie or element.child_nodeid)
        sound = sound and (not element.flags or bool(for_parent))
    else:
        sound = not (element.cookie or element.flags)
    if not sound:
        raise ProtocolError(f"element {element} has no form that the specification knows")
