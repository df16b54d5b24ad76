# SPDX-License-Identifier: Apache-2.0
"""The watching program (watcher.c) as the runner sees it: in the guest on a share, or on the host beside it.

Must not know how it was started. Specification: watcher.c.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tests.limits import HANG_S
from tests.oracle.native import without_number
from tests.oracle.streams import In, Seen
from vhostfs.vm.agent import GuestError

_FENCE = ".fence"
_BUSY = ".busy"


def _plain(entry: str) -> str:
    # An object that nobody watches has no name here; in a guest it often has no handle either.
    return without_number(entry.removesuffix("=?"))


def _without(entry: str, ended: set[str]) -> str:
    name, equals, target = entry.rpartition("=")
    return name if equals and target in ended else entry


def _is_of(event: Seen, ended: set[str]) -> bool:
    """Does only who watches the object itself get it?"""
    return event.watch in ended or (not event.watch and event.name.removeprefix("=") in ended)


def _seen(watch: str, mask: In, entry: str, cookie: int) -> Seen:
    # By which name in a directory that the guest does not hold, a guest is not told.
    if watch == "?" and "=" in entry:
        return Seen("", mask, entry[entry.rindex("=") :], cookie)
    return Seen("" if watch == "-" else watch, mask, entry, cookie)


class Command(Protocol):
    """A program that runs somewhere; RunningCommand of a guest, or HostCommand."""

    def write_stdin(self, data: bytes) -> None: ...
    def close_stdin(self) -> None: ...
    def wait_for_output(self, condition: Callable[[bytes], bool], timeout_s: float) -> bytes: ...


class HostCommand:
    """A program on the host, driven as one in the guest."""

    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._output = bytearray()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            with self._changed:
                self._output += data
                self._changed.notify_all()

    def write_stdin(self, data: bytes) -> None:
        """Gives it something to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def wait_for_output(self, condition: Callable[[bytes], bool], timeout_s: float) -> bytes:
        """All that it wrote until now, once that fulfils the condition. Raises GuestError."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(bytes(self._output)), timeout_s):
                raise GuestError(f"the watcher on the host does not answer: {bytes(self._output)[-500:]!r}")
            return bytes(self._output)

    def close_stdin(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(HANG_S)
        self._thread.join(HANG_S)


class Program:
    """One watcher; `inside` is the watched directory as it sees it.

    `with_all`: what else is watched for where a script says ALL.
    """

    def __init__(self, command: Command, inside: str, with_all: In) -> None:
        self._with_all = with_all
        self._command = command
        self._inside = inside
        self._used_bytes = 0
        self._asked_bytes = 0
        self._lines: list[str] = []
        command.wait_for_output(lambda seen: b"ready\n" in seen, HANG_S)

    def close(self) -> None:
        """Ends it."""
        self._command.close_stdin()

    def _asked(self, line: str, answer: str) -> str:
        """Sends a line; the answer that begins so."""
        begin = self._asked_bytes
        self._command.write_stdin(f"{line}\n".encode())
        wanted = re.compile(rb"^" + re.escape(answer.encode()) + rb".*\n", re.MULTILINE)
        output = self._command.wait_for_output(lambda seen: bool(wanted.search(seen, begin)), HANG_S)
        found = wanted.search(output, begin)
        assert found is not None
        self._asked_bytes = found.end()
        return found.group().decode().strip()

    def _at(self, path: str) -> str:
        return self._inside if path == "." else f"{self._inside}/{path}"

    def watch(self, name: str, path: str, mask: In) -> int:
        """The errno."""
        if mask & In.ALL == In.ALL:
            mask |= self._with_all
        answer = self._asked(f"watch {name} {int(mask):x} {self._at(path)}", f"watched {name} ")
        return int(answer.split()[2])

    def unwatch(self, name: str) -> None:
        """Nothing when the watch has ended."""
        self._asked(f"unwatch {name}", f"unwatched {name}")

    def look(self, path: str) -> object:
        """Looks the path up."""
        return self._asked(f"look {self._at(path)}", "looked ")

    def forget(self) -> None:
        """Drops what the caches hold and nobody uses."""
        self._asked("forget", "forgotten")

    def busy(self) -> None:
        """Works on files that nobody watches."""
        self._asked(f"busy {self._at(_BUSY)}", "was busy")

    def _read_until(self, end: bytes) -> list[Seen]:
        begin = self._used_bytes
        try:
            output = self._command.wait_for_output(lambda seen: seen.find(end, begin) >= 0, HANG_S)
        except GuestError as error:
            raise TimeoutError(f"the watcher was not told of the end: {str(error)[-500:]}") from error
        at = output.find(end, begin)
        self._used_bytes = at + len(end)
        self._lines = output[begin:at].decode("utf-8", "surrogateescape").splitlines()
        events = [line.split(" ", 4)[1:] for line in self._lines if line.startswith("e ")]
        return [
            _seen(watch, In(int(mask, 16)), _plain(entry), int(cookie))
            for watch, mask, cookie, entry in events
            if watch != "fence"
        ]

    def explained(self) -> list[str]:
        """What the watcher printed since the last `read`."""
        return ["the watcher in the guest:", *(f"  {line}" for line in self._lines)]


class HostProgram(Program):
    """On the host, where all events are there at once."""

    def __init__(self, command: HostCommand, root: Path, with_all: In) -> None:
        super().__init__(command, str(root), with_all)
        self._watched: dict[tuple[int, int], tuple[str, In]] = {}
        self._ended: set[str] = set()

    def watch(self, name: str, path: str, mask: In) -> int:
        """The errno."""
        error = super().watch(name, path, mask)
        if not error:
            state = os.lstat(self._at(path))
            is_dir = In.ISDIR if stat.S_ISDIR(state.st_mode) else In(0)
            first, before = self._watched.get((state.st_dev, state.st_ino), (name, is_dir))
            self._watched[state.st_dev, state.st_ino] = first, before | mask
        return error

    def end_of(self, identity: tuple[int, int]) -> list[Seen]:
        """What an object's end tells, that lost its last name and still lives; no more is told of it."""
        name, mask = self._watched.pop(identity, ("", In(0)))
        if name:
            self._ended.add(name)
        if not mask & In.DELETE_SELF:
            return []
        if mask & In.ISDIR:
            return [Seen(name, In.DELETE_SELF | In.ISDIR, ".")]
        return [Seen("", In.DELETE_SELF, f"={name}")]

    def read(self) -> list[Seen]:
        """What came since the last time."""
        ended = self._ended.copy()
        self._command.write_stdin(b"sync\n")
        seen = [event for event in self._read_until(b"synced\n") if not _is_of(event, ended)]
        return [Seen(event.watch, event.mask, _without(event.name, ended), event.cookie) for event in seen]


class RealGuest(Program):
    """In the guest, where an event made for this shows that all before has come."""

    def __init__(self, command: Command, host: Path, inside: str, with_all: In) -> None:
        super().__init__(command, inside, with_all)
        self._host = host
        self._fences = itertools.count()
        (host / _FENCE).mkdir()
        (host / _BUSY).mkdir()
        self._asked(f"watch fence {int(In.CREATE):x} {inside}/{_FENCE}", "watched fence 0")

    def stall(self) -> None:
        """A guest's watcher that does not read stalls nothing: the queue is its kernel's."""

    def resume(self) -> None:
        """See `stall`."""

    def read(self) -> list[Seen]:
        """What the watcher got for all that happened on the host before now. TimeoutError: it is cut off."""
        name = str(next(self._fences))
        (self._host / _FENCE / name).mkdir()
        # fanotify says of the new directory that nobody watches it.
        end = f"e fence {int(In.CREATE | In.ISDIR):x} 0 {name}".encode()
        return self._read_until(end)
