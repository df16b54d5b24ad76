# SPDX-License-Identifier: Apache-2.0
"""Owns what `--negotiate KEY=VALUE` makes a server say about itself, for experiments and tests of mismatches.
Must not know how it is acted on: without any, every value is the server's own.
Specification: docs/lab.md, "What can be forced"."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..events.masks import FsEvent
from ..record import Record, as_dict, replace
from .fsnotify import (
    FSNOTIFY_INIT_OUT_BYTES,
    FSNOTIFY_MAJOR,
    FSNOTIFY_MINOR,
    MAX_PARKED,
    NOTIFY_BUF_SIZE_BYTES,
    FsnotifyFlag,
)

FLAG_KEYS = {member.name.lower(): member for member in FsnotifyFlag if member.name}
"""Flags of FUSE_FSNOTIFY_INIT by key; what they can be is off."""

_NO_FLAGS = FsnotifyFlag(0)
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


class Forced(Record, kw_only=True):
    """What a server says and does in an experiment. Sizes are in bytes."""

    flags_off: FsnotifyFlag = _NO_FLAGS
    """Never granted."""
    feature_bit: bool = True
    """Whether VIRTIO_FS_F_NOTIFICATION is offered where it can be."""
    major: int = FSNOTIFY_MAJOR
    minor: int = FSNOTIFY_MINOR
    reply_bytes: int = FSNOTIFY_INIT_OUT_BYTES
    """Of the answer to FUSE_FSNOTIFY_INIT: cut off, or zeros behind it."""
    notify_buf_size: int = NOTIFY_BUF_SIZE_BYTES
    """In the configuration space and the answer; longer elements are not sent."""
    max_parked: int = MAX_PARKED
    max_watches: int | None = None
    """None: --max-watches."""
    mask: int = _U64
    """Events that the host can report; others are as if it could not."""
    target_fid: bool = True
    """Whether the host's fanotify names the child of an event (Linux 5.17)."""
    inotify: bool = True
    """Whether the host's inotify can be had, as the source or beside fanotify for the order of events."""
    sys_admin: bool = True
    """Whether the server may use CAP_SYS_ADMIN for its source where it has it."""
    source_works: bool = True
    """Else the host's source fails at the start."""


class ForcedError(ValueError):
    """A KEY=VALUE that cannot be meant; the text says what would be right."""


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ForcedError("it is on or off")
    return text == "on"


def _up_to(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise ForcedError("it is a number") from None
        if not 0 <= value <= most:
            raise ForcedError(f"it is 0 to {most}")
        return value

    return parse


def _events(text: str) -> int:
    known = {member.name: member.value for member in FsEvent if member.name}
    mask = 0
    for word in text.upper().split("+"):
        if word in known:
            mask |= known[word]
            continue
        try:
            mask |= _up_to(_U64)(word)
        except ForcedError:
            raise ForcedError("it is names of events with + between, as CREATE+MODIFY, or a number") from None
    return mask


_VALUES: dict[str, Callable[[str], int]] = {
    "feature_bit": _switch,
    "major": _up_to(_U32),
    "minor": _up_to(_U32),
    "reply_bytes": _up_to(4096),
    "notify_buf_size": _up_to(1 << 20),
    "max_parked": _up_to(4096),
    "max_watches": _up_to(1 << 24),
    "mask": _events,
    "target_fid": _switch,
    "inotify": _switch,
    "sys_admin": _switch,
    "source_works": _switch,
    **dict.fromkeys(FLAG_KEYS, _switch),
}

KEYS = tuple(_VALUES)
"""What can be forced."""

Pairs = tuple[tuple[str, int], ...]


def parse_pair(text: str) -> Pairs:
    """KEY=VALUE. Raises ForcedError."""
    key, equals, value = text.partition("=")
    key = key.strip().lower().replace("-", "_")
    if key not in _VALUES:
        raise ForcedError(f"expected KEY=VALUE, with a key of: {', '.join(KEYS)}")
    if not equals:
        raise ForcedError(f"{key} needs a value, as in {key}=...")
    try:
        return ((key, int(_VALUES[key](value.strip()))),)
    except ForcedError as error:
        raise ForcedError(f"{key}: {error}") from None


def forced(pairs: Iterable[tuple[str, int]]) -> Forced:
    """All of them together; the last of a key counts."""
    values = dict(pairs)
    flags_off = FsnotifyFlag(0)
    for key, flag in FLAG_KEYS.items():
        if not values.pop(key, 1):
            flags_off |= flag
    usual = as_dict(Forced())
    given = {key: bool(value) if isinstance(usual[key], bool) else value for key, value in values.items()}
    return replace(Forced(flags_off=flags_off), **given)
