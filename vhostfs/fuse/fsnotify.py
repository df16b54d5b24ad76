# SPDX-License-Identifier: Apache-2.0
"""FUSE_FSNOTIFY_INIT: what driver and server agree on about events; a pure function of what each can do.

Must not know sockets, rings, the C core or where events come from. All integers are little-endian.
Specification: docs/protocol.md.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from ..events.masks import DELIVERABLE, event_names
from ..record import Record

FSNOTIFY_MAJOR = 1
FSNOTIFY_MINOR = 0

NOTIFY_BUF_SIZE_BYTES = 320
"""Largest element: fuse_out_header (16), the fixed part (48) and a name of 255 bytes, rounded up to 8."""
ELEMENT_MIN_BYTES = 64
"""Smallest element: one without a name."""
NAME_MAX_BYTES = 255

MAX_PARKED = 64
"""Requests that a guest may keep waiting for events: a driver takes fewer where its ring is small."""

_VERSION = struct.Struct("<II")
_INIT_IN = struct.Struct("<IIQQII")
_INIT_OUT = struct.Struct("<IIQQIIII")

FSNOTIFY_INIT_IN_BYTES = _INIT_IN.size
FSNOTIFY_INIT_OUT_BYTES = _INIT_OUT.size


class FsnotifyFlag(enum.IntFlag):
    """Flags of FUSE_FSNOTIFY_INIT."""

    VIRTQUEUE = 1 << 0
    """Notifications travel on virtqueue 1; needs the feature bit."""
    PARKED = 1 << 1
    """Notifications answer parked requests."""
    WATCH_ALL = 1 << 2
    """On every inode that the guest holds, without watch requests."""
    RENAME = 1 << 3
    """Renames come as SPLIT_RENAME pairs."""
    CHILD = 1 << 4
    """child_nodeid and child_generation are filled."""
    INVALIDATE = 1 << 5
    """Every change to an inode that the guest holds is reported, watched or not."""
    WATCH_FILESYSTEM = 1 << 6
    """FUSE_FSNOTIFY_WATCH knows FILESYSTEM: one mask for everything that the guest holds."""
    PARENT = 1 << 7
    """A directory's own event is for its parent's watchers only where the element says so."""
    DIRECTORY_LOSS = 1 << 8
    """A loss may be about one directory: what happened there has a name that does not fit."""
    DEFERRED_OPEN = 1 << 9
    """The driver may answer opens for reading itself; needs INVALIDATE."""


TRANSPORTS = FsnotifyFlag.VIRTQUEUE | FsnotifyFlag.PARKED
"""The ways for events to travel; without one of them none are made."""

QUEUE_NOT_PASSED = (
    "this VMM does not pass VIRTIO_FS_F_NOTIFICATION "
    "(QEMU: needs vhost-user-test-device-pci of 10.1 or later, or the patch and notification=on)"
)
NO_NOTIFICATION_QUEUE = (
    "VIRTIO_FS_F_NOTIFICATION is not accepted: the guest's driver does not know it, or its device has it "
    "switched off"
)
REDUCTION = "events for the guest: less: "
"""Before each line about what the guest has less than it could."""


class Delivery(enum.Enum):
    """How events travel to a guest, as it was settled for one session; best first."""

    VIRTQUEUE = "virtqueue"
    PARKED = "parked"
    NONE = "none"

    @property
    def words(self) -> str:
        """For a line that people read."""
        return {"virtqueue": "the notification queue", "parked": "parked requests"}.get(self.value, "none")


def delivery_of(flags: int) -> Delivery:
    """What granted flags mean."""
    if flags & FsnotifyFlag.VIRTQUEUE:
        return Delivery.VIRTQUEUE
    return Delivery.PARKED if flags & FsnotifyFlag.PARKED else Delivery.NONE


class FsnotifyInitIn(Record):
    """What the driver asks for. Of a newer minor, the part that is known here."""

    major: int
    minor: int
    flags: int = 0
    mask: int = 0
    """FS_* bits that the driver can raise."""
    buf_size_bytes: int = 0
    """Size of the buffers in which the driver takes elements, fuse_out_header included."""

    @classmethod
    def unpack(cls, data: bytes, known_major: int = FSNOTIFY_MAJOR) -> FsnotifyInitIn:
        """Raises ValueError when it is too short. Of another major only the version is read."""
        if len(data) < _VERSION.size:
            raise ValueError(
                f"FUSE_FSNOTIFY_INIT of {len(data)} bytes, at least {_VERSION.size} hold a version"
            )
        major, minor = _VERSION.unpack_from(data)
        if major != known_major:
            return cls(major, minor)
        if len(data) < _INIT_IN.size:
            raise ValueError(f"FUSE_FSNOTIFY_INIT of {len(data)} bytes, at least {_INIT_IN.size} are needed")
        _, _, flags, mask, buf_size, _reserved = _INIT_IN.unpack_from(data)
        return cls(major, minor, flags, mask, buf_size)


class FsnotifyInitOut(Record):
    """The answer, 40 bytes."""

    major: int = FSNOTIFY_MAJOR
    minor: int = FSNOTIFY_MINOR
    flags: int = 0
    mask: int = 0
    """FS_* bits that the host can report."""
    notify_buf_size_bytes: int = NOTIFY_BUF_SIZE_BYTES
    """The longest element of the session."""
    max_watches: int = 0
    max_parked: int = 0

    def pack(self) -> bytes:
        return _INIT_OUT.pack(
            self.major,
            self.minor,
            self.flags,
            self.mask,
            self.notify_buf_size_bytes,
            self.max_watches,
            self.max_parked,
            0,
        )


class EventAbilities(Record, kw_only=True):
    """What the server can do for the session that asks.

    flags: granted if wanted, of VIRTQUEUE and PARKED only the first. no_queue, no_parking: why VIRTQUEUE and
    PARKED are not among them. withheld: why others are not, where more is known than that this server does
    not have them. reply_bytes: of the answer.
    """

    flags: int
    mask: int
    max_watches: int
    notify_buf_size_bytes: int = NOTIFY_BUF_SIZE_BYTES
    max_parked: int = 0
    no_queue: str = NO_NOTIFICATION_QUEUE
    no_parking: str = "this server parks no requests"
    withheld: Mapping[FsnotifyFlag, str] = MappingProxyType({})
    major: int = FSNOTIFY_MAJOR
    minor: int = FSNOTIFY_MINOR
    reply_bytes: int = FSNOTIFY_INIT_OUT_BYTES

    @property
    def can_deliver(self) -> bool:
        """Whether there is any way for events to travel."""
        return bool(self.flags & TRANSPORTS)


class FsnotifyAnswer(Record):
    """error: 0 or a positive errno, and then reply means nothing. note: one line for the log.

    driver_mask: FS_* bits that both sides know, of which elements are made. reductions: what the guest does
    not get that it could have from another server, VMM or driver; a line for the log each. missing: why
    events do not travel in a better way, or why the offer was refused; "": there is nothing better.
    """

    error: int
    reply: FsnotifyInitOut
    note: str
    driver_mask: int = 0
    reductions: tuple[str, ...] = ()
    offer: FsnotifyInitIn | None = None
    missing: str = ""

    @property
    def delivery(self) -> Delivery:
        """How events travel."""
        return Delivery.NONE if self.error else delivery_of(self.reply.flags)


def negotiate_events(offer: FsnotifyInitIn, abilities: EventAbilities) -> FsnotifyAnswer:
    """
    Answers FUSE_FSNOTIFY_INIT.

    Another major: EPROTO, for no field but the version means the same. Buffers that hold no element at all:
    EINVAL; buffers for some: elements are no longer than these, and what has a longer name is told as a loss.
    An older minor is answered with its own number, a newer one with ours; what either lacks is not used.
    """
    if offer.major != abilities.major:
        seen = f"version {offer.major}.{offer.minor}, expected {abilities.major}.x"
        return refused(offer, errno.EPROTO, seen)
    if offer.buf_size_bytes < ELEMENT_MIN_BYTES:
        needed = f"the smallest element takes {ELEMENT_MIN_BYTES}"
        return refused(offer, errno.EINVAL, f"its buffers hold {offer.buf_size_bytes} bytes, {needed}")
    granted = FsnotifyFlag(offer.flags & abilities.flags)
    if granted & FsnotifyFlag.VIRTQUEUE:
        granted &= ~FsnotifyFlag.PARKED
    if not granted & TRANSPORTS or not granted & FsnotifyFlag.CHILD:
        # Without the object's number nothing can be said of an object by another name.
        granted &= ~FsnotifyFlag.INVALIDATE
    if not granted & FsnotifyFlag.INVALIDATE:
        # What may be opened without asking is known only while every change is told.
        granted &= ~FsnotifyFlag.DEFERRED_OPEN
    mask = offer.mask & abilities.mask
    if not mask:
        seen = f"it can raise no event that the host can report ({offer.mask:#x})"
        return refused(offer, errno.EINVAL, seen)
    reply = FsnotifyInitOut(
        major=abilities.major,
        minor=min(offer.minor, abilities.minor),
        flags=int(granted),
        mask=abilities.mask,
        notify_buf_size_bytes=min(offer.buf_size_bytes, abilities.notify_buf_size_bytes),
        max_watches=abilities.max_watches,
        max_parked=abilities.max_parked if granted & FsnotifyFlag.PARKED else 0,
    )
    reductions = tuple(f"{REDUCTION}{text}" for text in _reductions(offer, granted, abilities))
    missing = _missing(offer, granted, abilities)
    return FsnotifyAnswer(0, reply, _note(offer, granted, missing), mask, reductions, offer, missing)


def refused(offer: FsnotifyInitIn | None, error: int, seen: str) -> FsnotifyAnswer:
    """The answer to an offer that cannot be taken; None: it could not even be read."""
    missing = f"its driver's offer is refused: {seen} ({errno.errorcode[error]})"
    return FsnotifyAnswer(error, FsnotifyInitOut(), missing, offer=offer, missing=missing)


def flag_list(flags: int) -> list[str]:
    """Names of the flags set, lowest first; unknown ones by number, as BIT9."""
    known = {member.value: member.name for member in FsnotifyFlag}
    return [known.get(1 << bit) or f"BIT{bit}" for bit in range(flags.bit_length()) if flags >> bit & 1]


def log_line(delivery: Delivery, missing: str = "", details: str = "") -> str:
    """The one line for the log of each session: how its events travel, and why in no better way."""
    way = delivery.words if delivery is Delivery.NONE else f"by {delivery.words}"
    return (
        f"events for the guest: {way}{f' ({details})' if details else ''}{f': {missing}' if missing else ''}"
    )


def _note(offer: FsnotifyInitIn, granted: FsnotifyFlag, missing: str) -> str:
    version = f"driver {offer.major}.{offer.minor}"
    extras = [name.lower() for name in flag_list(granted & ~TRANSPORTS)]
    return log_line(delivery_of(granted), missing, ", ".join([version, *extras]))


def _missing(offer: FsnotifyInitIn, granted: FsnotifyFlag, abilities: EventAbilities) -> str:
    if granted & FsnotifyFlag.VIRTQUEUE:
        return ""
    can_queue = bool(abilities.flags & FsnotifyFlag.VIRTQUEUE)
    missing = "its driver did not ask for the notification queue" if can_queue else abilities.no_queue
    if granted & FsnotifyFlag.PARKED:
        return missing
    if missing == abilities.no_parking:
        return missing
    if not abilities.flags & FsnotifyFlag.PARKED:
        return f"{missing}; {abilities.no_parking}"
    if can_queue:
        return "its driver asked for neither way that there is"
    return f"{missing}, and its driver did not ask for parked requests"


_WITHOUT = {
    FsnotifyFlag.RENAME: "renames come as plain halves",
    FsnotifyFlag.CHILD: "names come without their objects",
    FsnotifyFlag.WATCH_FILESYSTEM: "the share cannot be watched as a whole",
    FsnotifyFlag.PARENT: "whether an event of a directory is for its parent's watchers is not told",
    FsnotifyFlag.WATCH_ALL: "watches are needed",
    FsnotifyFlag.INVALIDATE: "caches live for a short time only",
}
"""What it means when a flag is not granted."""
_BEYOND = FsnotifyFlag.WATCH_ALL
"""What a driver that does not want it does not miss."""


def _reductions(offer: FsnotifyInitIn, granted: int, abilities: EventAbilities) -> Iterator[str]:
    """What the guest has less than it could; nothing when it has no events at all, which is said already."""
    if not granted & TRANSPORTS:
        return
    for flag, loss in _WITHOUT.items():
        if granted & flag:
            continue
        if offer.flags & flag:
            why = abilities.withheld.get(flag, "this server does not do it")
            if not why:
                continue
            yield f"{loss}: {flag.name} is not granted, {why}"
        elif not flag & _BEYOND and abilities.flags & flag:
            yield f"{loss}: its driver does not ask for {flag.name}"
    unknown = offer.flags & ~sum(FsnotifyFlag)
    if unknown:
        yield f"not known here: flags {unknown:#x}"
    for text, lacking in (
        ("its driver cannot raise", abilities.mask & ~offer.mask & DELIVERABLE),
        ("the host does not report", offer.mask & ~abilities.mask & DELIVERABLE),
    ):
        if lacking:
            yield f"{text} {', '.join(event_names(lacking))}"
    size = min(offer.buf_size_bytes, abilities.notify_buf_size_bytes)
    longest = size - ELEMENT_MIN_BYTES
    if longest < NAME_MAX_BYTES:
        where = "of their directory" if granted & FsnotifyFlag.DIRECTORY_LOSS else "of everything"
        whose = (
            f"its driver's buffers hold {size} bytes"
            if offer.buf_size_bytes < abilities.notify_buf_size_bytes
            else f"notify_buf_size is {size} here"
        )
        yield f"events on names of more than {longest} bytes are told as a loss {where}: {whose}"
    if not abilities.max_watches:
        yield "nothing can be watched: max_watches is 0"
