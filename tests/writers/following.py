# SPDX-License-Identifier: Apache-2.0
"""Recursive watchers of one tree, in step with who writes in it, and their streams compared.

Must not know writers, nor how a guest is reached. Specification: follow-events.c, pace.c; docs/events.md.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tests.guest.place import awaited
from tests.limits import HANG_S, SETTLED_S
from tests.oracle.native import without_number
from tests.oracle.streams import In, Seen, differences

PROGRAM = "/usr/local/bin/follow-events"
"""Of the guest."""


class Follower(Protocol):
    """A recursive watcher, wherever it runs."""

    def watched(self) -> Counter[str]:
        """How often a watch was set on a directory of this path."""

    def events(self) -> list[Seen]:
        """What it saw, by the path that the directory had when its watch was set ("a", the second "a 2")."""

    def gone(self) -> set[str]:
        """The watches whose directories were removed, by their own end or by what their parents told."""


class Output(Protocol):
    """A running program."""

    @property
    def stdout(self) -> bytes: ...


class ProgramFollower:
    """follow-events, by what it printed."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._names = {-1: "no watch"}
        self._watched: Counter[str] = Counter()
        self._events: list[Seen] = []
        self._gone: set[str] = set()

    def watched(self) -> Counter[str]:
        self._read()
        return self._watched

    def events(self) -> list[Seen]:
        self._read()
        return self._events

    def gone(self) -> set[str]:
        self._read()
        return self._gone

    def _read(self) -> None:
        """Takes the lines that came since."""
        with self._lock:
            text = self._output.stdout
            end = text.rfind(b"\n") + 1
            new, self._done_bytes = text[self._done_bytes : end], max(end, self._done_bytes)
            for line in new.decode("utf-8", "surrogateescape").split("\n")[:-1]:
                self._take(line)

    def _take(self, line: str) -> None:
        words = line.split(" ", 3)
        if words[0] == "watching":
            name = line.split(" ", 2)[2]
            self._watched[name] += 1
            times = self._watched[name]
            self._names[int(words[1])] = f"{name} {times}" if times > 1 else name
        elif words[0] == "gone":
            self._gone.add(self._names[int(words[1])])
        elif words[0].lstrip("-").isdecimal():
            name = without_number(words[3])
            event = Seen(self._names[int(words[0])], In(int(words[1], 16)), name, int(words[2]))
            self._events.append(event)
            if event.mask & In.IGNORED:
                self._gone.add(event.watch)
        else:
            assert line == "ready", line


class Pacer:
    """Lets a writer go on from a new directory when all followers watch it."""

    def __init__(self, tree: Path, scratch: Path, library: Path, followers: Mapping[str, Follower]) -> None:
        self.tree = tree
        self.complaints: list[str] = []
        self.paced = 0
        self._followers = followers
        self._due = {name: follower.watched().copy() for name, follower in followers.items()}
        path = scratch / "pace.sock"
        self.environment = {"LD_PRELOAD": str(library), "PACE_SOCKET": str(path)}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError):
                self._wait_for(Path(os.fsdecode(stream.readline().rstrip(b"\n"))))
                connection.sendall(b"\n")

    def _wait_for(self, directory: Path) -> None:
        if self.tree not in directory.parents:
            return
        self.paced += 1
        name = str(directory.relative_to(self.tree))
        for who, follower in self._followers.items():
            self._due[who][name] += 1
            due = self._due[who][name]

            def watches(follower: Follower = follower, due: int = due) -> bool:
                return follower.watched()[name] >= due

            # Once is enough to know that it is stuck.
            if not self.complaints and not awaited(watches, HANG_S, 0.003):
                self.complaints.append(f"{who} does not watch {name} for the time number {due}")

    def close(self) -> None:
        """No writer waits any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


_ENDS = In.DELETE_SELF | In.IGNORED


def differing(native: Follower, follower: Follower) -> list[str]:
    """What differs between two streams.

    A server holds the directories that its guest watches. So the native watcher does not see their end, and
    what is right is taken from the events of their parents.
    """
    got = follower.events()
    lines = differences(_without_ends(native.events()), _without_ends(got), one_operation=False)
    ends: dict[str, list[Seen]] = {}
    for event in got:
        if event.watch in ends or event.mask & _ENDS:
            ends.setdefault(event.watch, []).append(event)
    gone = native.gone()
    for watch in sorted(ends.keys() | gone):
        wanted_end = [Seen(watch, In.DELETE_SELF), Seen(watch, In.IGNORED)] if watch in gone else []
        if ends.get(watch, []) != wanted_end:
            told = ", ".join(map(str, ends.get(watch, ["nothing"])))
            lines.append(
                f"{watch}: {'removed' if watch in gone else 'not removed'}, its end is told as: {told}"
            )
    return lines


def _without_ends(events: list[Seen]) -> list[Seen]:
    return [event for event in events if not event.mask & _ENDS]


def compared(native: Follower, followers: Mapping[str, Follower], directory: Path) -> list[str]:
    """What differs between the native stream and each of the others, after an end that all have seen."""
    (directory / "the-end").mkdir()
    for who, follower in {"the host": native, **followers}.items():
        if not awaited(lambda: follower.watched()["the-end"] > 0, HANG_S, 0.01):  # noqa: B023
            return [f"{who}: the end did not come"]
    lines: list[str] = []
    for who, follower in followers.items():

        def found(follower: Follower = follower) -> list[str]:
            return differing(native, follower)

        # The halves of renames may wait a second for each other.
        awaited(lambda: not found(), SETTLED_S, 0.1)
        lines += [f"{who}: {line}" for line in found()]
    return lines


def compile_static(source: Path, target: Path) -> Path:
    """One of the C programs of tests, for host and guest."""
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-static", "-s"]
    subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", target, source], check=True)
    return target


def compile_pace(target: Path) -> Path:
    """What paces writers."""
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC"]
    source = Path(__file__).with_name("pace.c")
    subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", target, source], check=True)
    return target
