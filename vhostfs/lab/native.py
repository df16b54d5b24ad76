# SPDX-License-Identifier: Apache-2.0
"""What a watcher on the host is told, by inotify: what one in the guest is compared with.
Must not know servers or guests.
Specification: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from .results import LOSS, PAIR
from .workloads import WATCHED

IN_NONBLOCK = os.O_NONBLOCK
IN_CLOEXEC = os.O_CLOEXEC
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ISDIR = 0x4000_0000
_RECORD = struct.Struct("iIII")
_NAMES = {
    0x2: "MODIFY",
    0x4: "ATTRIB",
    0x8: "CLOSE_WRITE",
    0x40: "MOVED_FROM",
    0x80: "MOVED_TO",
    0x100: "CREATE",
    0x200: "DELETE",
    0x400: "DELETE_SELF",
    0x800: "MOVE_SELF",
}
MASK = sum(_NAMES)
"""What both watchers ask for."""


class HostWatcher:
    """Watches the directories of a workload."""

    def __init__(self, place: Path) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._call("inotify_init1", IN_NONBLOCK | IN_CLOEXEC)
        self._directories = {
            self._call("inotify_add_watch", self._fd, os.fsencode(place / name), MASK): name
            for name in WATCHED
        }

    def _call(self, name: str, *args: int | bytes) -> int:
        result: int = getattr(self._libc, name)(*args)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def take(self) -> tuple[str, ...]:
        """What happened since it was last asked: `CREATE d/new`."""
        told: list[tuple[str, int]] = []
        while True:
            try:
                data = os.read(self._fd, 1 << 20)
            except BlockingIOError:
                return paired(told)
            at = 0
            while at < len(data):
                wd, mask, cookie, length = _RECORD.unpack_from(data, at)
                name = data[at + _RECORD.size : at + _RECORD.size + length].rstrip(b"\0")
                at += _RECORD.size + length
                if mask & IN_Q_OVERFLOW:
                    told.append((LOSS, 0))
                elif not mask & IN_IGNORED:
                    told.append((word(mask, self._directories[wd], os.fsdecode(name)), cookie))

    def close(self) -> None:
        os.close(self._fd)


def word(mask: int, directory: str, name: str) -> str:
    """`CREATE|ISDIR d/new`; an event of a directory itself has no name."""
    events = [text for bit, text in _NAMES.items() if mask & bit]
    if mask & IN_ISDIR:
        events.append("ISDIR")
    return f"{'|'.join(events)} {directory}{'/' if name else ''}{name}"


def paired(told: list[tuple[str, int]]) -> tuple[str, ...]:
    """Marks what has the same cookie as another."""
    cookies = [cookie for _, cookie in told if cookie]
    return tuple(line + PAIR if cookie and cookies.count(cookie) > 1 else line for line, cookie in told)
