# SPDX-License-Identifier: Apache-2.0
"""Watchers: one in the guest, one on the host beside it, and what each of them saw, compared step by step.

Must not know how guests and servers were started. Specification: inotify(7); watch-events.c; docs/events.md.
"""

from __future__ import annotations

import enum
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.guest.place import Place, awaited
from tests.limits import HANG_S
from vhostfs.control.client import ControlClient
from vhostfs.vm.agent import RunningCommand

PROGRAM = "/usr/local/bin/watch-events"
"""Of the guest; the host's is compiled from the same source."""
FANOTIFY_PROGRAM = "/usr/local/bin/watch-fanotify"


class In(enum.IntFlag):
    """Event bits of inotify."""

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
    UNMOUNT = 0x2000
    Q_OVERFLOW = 0x4000
    IGNORED = 0x8000
    ISDIR = 0x40000000


ALL = In(0xFFF)
CHANGES = ALL & ~(In.ACCESS | In.OPEN | In.CLOSE_NOWRITE)
"""What a person does to a directory, without who looks at it."""
_RENAMES = In.MOVED_FROM | In.MOVED_TO


@dataclass(frozen=True, slots=True)
class Seen:
    """One line of a watcher."""

    watch: int
    """Index of the watched path; -1 for events of no path, such as an overflow."""
    mask: In
    cookie: int
    name: str

    @property
    def text(self) -> str:
        """As expectations are written: "1 CREATE|ISDIR name", without the number for the first path."""
        words = [str(self.watch)] if self.watch else []
        words.append("|".join(str(bit.name) for bit in In if self.mask & bit))
        return " ".join([*words, *([self.name] if self.name else [])])


def read_lines(output: bytes) -> tuple[list[Seen], list[str]]:
    """A watcher's events, and what it said beside them ("ready", "saw ...")."""
    events, said = [], []
    for line in output[: output.rfind(b"\n") + 1].decode("utf-8", "surrogateescape").splitlines():
        first = line.split(" ", 1)[0]
        if first.lstrip("-").isdecimal():
            watch, mask, cookie, name = line.split(" ", 3)
            events.append(Seen(int(watch), In(int(mask, 16)), int(cookie), name))
        else:
            said.append(line)
    return events, said


def normalised(events: Sequence[Seen]) -> list[Seen]:
    """Identical neighbours as one, as inotify itself merges what waits; those of other names may lie between.

    (Both merge with what was queued last only; when that is read in between, they do not. And fanotify merges
    with the newest events of the same object and name, whatever came for others since.)
    """
    kept: list[Seen] = []
    newest: dict[tuple[int, str], Seen] = {}
    for event in events:
        at = (event.watch, event.name)
        if newest.get(at) == event and event.cookie == 0:
            continue
        newest[at] = event
        kept.append(event)
    return kept


def texts(events: Sequence[Seen]) -> list[str]:
    """The normalised events, with cookies as numbers of their own: the first is #1."""
    numbers: dict[int, int] = {}
    lines = []
    for event in normalised(events):
        number = numbers.setdefault(event.cookie, len(numbers) + 1) if event.cookie else 0
        wants_cookie = bool(event.mask & _RENAMES)
        assert wants_cookie == bool(number), f"cookie {event.cookie} of {event.text}"
        lines.append(f"{event.text} #{number}" if number else event.text)
    return lines


def by_name(lines: Sequence[str]) -> dict[str, list[str]]:
    """The lines of each watch and name, in order: what must be equal whatever was merged."""
    sorted_out: dict[str, list[str]] = {}
    for line in lines:
        words = line.split(" ")
        watch = words.pop(0) if words[0].isdecimal() else "0"
        name = " ".join(word for word in words[1:] if not word.startswith("#"))
        sorted_out.setdefault(f"{watch} {name}", []).append(line)
    return sorted_out


class Output(Protocol):
    """A watcher that runs."""

    @property
    def stdout(self) -> bytes: ...


class HostWatcher:
    """The same program on the host, on the same directory: what is expected, by Linux itself."""

    def __init__(self, program: Path, mask: In, paths: Sequence[Path]) -> None:
        self._process = subprocess.Popen(
            [str(program), f"{int(mask):x}", *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._output = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert awaited(lambda: b"ready\n" in self._output)

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            self._output += data

    @property
    def stdout(self) -> bytes:
        return bytes(self._output)

    def write_stdin(self, data: bytes) -> None:
        """A line that it understands."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(HANG_S) == 0
        self._thread.join(HANG_S)


class Control:
    """A server's counters."""

    def __init__(self, path: Path) -> None:
        self._client = ControlClient(str(path))

    def close(self) -> None:
        """Leaves the server alone."""
        self._client.close()

    def stats(self) -> dict[str, Any]:
        """As docs/events.md has it."""
        return self._client.stats()

    def negotiated(self) -> dict[str, Any]:
        """What server, VMM and guest have agreed on, as docs/caps.md has it."""
        return self._client.negotiated()

    def counters(self) -> dict[str, int]:
        """Those of events."""
        found: dict[str, int] = self.stats()["events"]["counters"]
        return found

    @property
    def watches(self) -> int:
        """How many inodes the guest watches, as the server knows."""
        return self.counters()["watches"]

    def awaited_watches(self, wanted: int) -> int:
        """The number once it is `wanted`, or when it does not come to be."""
        awaited(lambda: self.watches == wanted, HANG_S, 0.01)
        return self.watches


class Watch:
    """A watcher in the guest and its twin on the host."""

    def __init__(
        self,
        place: Place,
        control: Control,
        host_program: Path | None,
        mask: In = CHANGES,
        names: Sequence[str] = (".",),
        look: str = "",
        known: int = 0,
    ) -> None:
        """Watches `names` below `place` with one watcher, and waits until the server knows of each.

        `look`: an option for the watcher in the guest. Without `host_program` there is no twin.
        `known`: how many of the names are watched by others already.
        """
        self.place = place
        self.control = control
        self.names = names
        before = control.watches
        paths = " ".join(f"'{place.inside}/{name}'" for name in names)
        # From elsewhere, so that the mount can be taken away under it.
        self.command: RunningCommand = place.guest.start(
            f"exec {PROGRAM} {look} {int(mask):x} {paths}", stdin=True
        )
        self.command.wait_for_output(b"ready\n", HANG_S)
        new = len(names) - known
        assert control.awaited_watches(before + new) == before + new, "the server does not watch all"
        self._native = None
        if host_program is not None:
            self._native = HostWatcher(host_program, mask, [place.host / name for name in names])
        self._before = before
        self._guest_used = self._native_used = 0

    def events(self) -> list[Seen]:
        """All that the guest's watcher saw since it began."""
        return read_lines(self.command.stdout)[0]

    def said(self) -> list[str]:
        """What the guest's watcher said beside the events."""
        return [line for line in read_lines(self.command.stdout)[1] if line != "ready"]

    def step(self, action: Callable[[], object], *expected: str, ordered: bool = True) -> None:
        """Does something on the host: both watchers then see exactly `expected` since the last step.

        With `ordered=False` only the order of the events on one name counts: some of the host's may have
        been merged with earlier ones of their own.
        """
        action()
        wanted = list(expected)

        def fits(lines: list[str]) -> bool:
            return lines == wanted if ordered else by_name(lines) == by_name(wanted)

        def guest_lines() -> list[str]:
            return texts(self.events()[self._guest_used :])

        awaited(lambda: fits(guest_lines()), HANG_S, 0.01)
        if self._native is not None:
            native = self._native
            awaited(lambda: fits(texts(read_lines(native.stdout)[0][self._native_used :])), HANG_S, 0.01)
            native_events = read_lines(native.stdout)[0]
            native_lines = texts(native_events[self._native_used :])
            assert fits(native_lines), f"natively on the host: {native_lines}, expected: {wanted}"
            self._native_used = len(native_events)
        seen = self.events()
        lines = texts(seen[self._guest_used :])
        assert fits(lines), f"in the guest: {lines}, expected: {wanted}"
        self._guest_used = len(seen)

    def ends(self) -> None:
        """Nothing beyond the steps came: what is done last is what is seen next."""
        for index, name in enumerate(self.names):
            directory = self.place.host / name
            if directory.is_dir():
                end = directory / "the-end"
                self.step(end.mkdir, f"{index} CREATE|ISDIR the-end" if index else "CREATE|ISDIR the-end")

    def command_line(self, line: str, answer: str) -> None:
        """Tells the watcher in the guest to add or remove a path."""
        self.command.write_stdin(f"{line}\n".encode())
        self.command.wait_for_output(f"{answer}\n", HANG_S)

    def close(self) -> None:
        """Ends both watchers; the server no longer watches."""
        if self._native is not None:
            self._native.close()
        if self.command.status is None:
            self.command.close_stdin()
            self.command.wait(HANG_S).check()
        assert self.control.awaited_watches(self._before) == self._before, "the server still watches"


def monotonic_ms() -> int:
    """For latencies."""
    return time.monotonic_ns() // 1_000_000
