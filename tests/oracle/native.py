# SPDX-License-Identifier: Apache-2.0
"""Linux's own inotify on a directory that no server holds: what is right.

Must not know scripts. Specification: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from pathlib import Path

from tests.oracle.streams import In, Seen

_LIBC = ctypes.CDLL(None, use_errno=True)
_RECORD = struct.Struct("=iIII")
_NAMELESS = re.compile(r"#\d+$")


def without_number(name: str) -> str:
    """What O_TMPFILE makes is called by its inode number until it has a name."""
    return "#inode" if _NAMELESS.match(name) else name


class NativeOverflowError(Exception):
    """The measure itself lost events: the script does too much between two reads."""


class NativeWatcher:
    """One inotify group; watches have the names that the script gives them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fd = self._checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._watch_of_name: dict[str, int] = {}
        self._name_of_watch: dict[int, str] = {}
        self._identities: dict[int, tuple[int, int]] = {}
        self._masks: dict[int, In] = {}

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def watch(self, name: str, path: str, mask: In) -> int:
        """The errno. An object that is watched already keeps the name of its watch and gets the new mask."""
        full = os.path.join(self._root, path)
        try:
            number = self._checked(
                _LIBC.inotify_add_watch(self._fd, os.fsencode(full), ctypes.c_uint32(mask | In.DONT_FOLLOW))
            )
        except OSError as error:
            assert error.errno is not None
            return error.errno
        self._watch_of_name[name] = number
        self._name_of_watch.setdefault(number, name)
        state = os.lstat(full)
        self._identities[number] = state.st_dev, state.st_ino
        self._masks[number] = mask
        return 0

    def unwatch(self, name: str) -> None:
        """Nothing when the watch has ended."""
        self._end(self._watch_of_name.pop(name, -1))

    def _end(self, number: int) -> None:
        self._identities.pop(number, None)
        if self._name_of_watch.pop(number, None) is not None:
            _LIBC.inotify_rm_watch(self._fd, number)

    def end_of(self, identity: tuple[int, int]) -> list[Seen]:
        """Ends the watch of an object that lost its last name and still lives: what its end tells."""
        for number, watched in self._identities.items():
            if watched == identity:
                name = self._name_of_watch[number]
                # Who does not ask for DELETE_SELF is told only that the watch is over.
                asked = bool(self._masks[number] & In.DELETE_SELF)
                self._end(number)
                return [Seen(name, In.DELETE_SELF)] * asked + [Seen(name, In.IGNORED)]
        return []

    def read(self) -> list[Seen]:
        """What came since the last time."""
        seen: list[Seen] = []
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return seen
            at = 0
            while at < len(data):
                number, mask, cookie, size = _RECORD.unpack_from(data, at)
                name = without_number(
                    os.fsdecode(data[at + _RECORD.size : at + _RECORD.size + size].rstrip(b"\0"))
                )
                at += _RECORD.size + size
                if mask & In.Q_OVERFLOW:
                    raise NativeOverflowError
                if number not in self._name_of_watch:
                    continue
                seen.append(Seen(self._name_of_watch[number], In(mask), name, cookie))
                if mask & In.IGNORED:
                    del self._name_of_watch[number]
                    self._identities.pop(number, None)

    def close(self) -> None:
        """Ends all watches."""
        os.close(self._fd)
