# SPDX-License-Identifier: Apache-2.0
"""Owns what experiments do on the host: named lists of steps in a directory.
Must not know who watches.
Specification: docs/lab.md, "Workloads"."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Act:
    """One step. place: a directory with d and e, which are watched, and u, which is not."""

    label: str
    do: Callable[[Path], None]


class CellTimeoutError(Exception):
    """A cell has not come to its end in its time."""


class Deadline:
    """When a cell must be over, whatever its guest and server do: a time, and more for each change."""

    def __init__(self, least_s: float, count: int, each_s: float) -> None:
        self._limit_s = least_s + count * each_s
        self._end_s = time.monotonic() + self._limit_s

    def check(self) -> None:
        """Raises CellTimeoutError when it has passed."""
        if time.monotonic() > self._end_s:
            raise CellTimeoutError(f"the cell was not done after {self._limit_s:.0f} s")

    def each(self, acts: Iterator[Act]) -> Iterator[Act]:
        """The same, with a look at the clock before each and at the end."""
        for act in acts:
            self.check()
            yield act
        self.check()


WATCHED = ("d", "e")
KNOWN = "d/file"
"""Is there before the watch begins, and is looked up."""


def prepare(place: Path) -> None:
    """What every workload finds."""
    for name in (*WATCHED, "u", "fence"):
        (place / name).mkdir(parents=True)
    (place / KNOWN).write_bytes(b"known")
    (place / "u/in").touch()
    (place / "fence/end").touch()


def _write(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


CHANGES = (
    Act("create", lambda p: os.mknod(p / "d/new")),
    Act("write", lambda p: _write(p / KNOWN)),
    Act("truncate", lambda p: os.truncate(p / KNOWN, 0)),
    Act("chmod", lambda p: os.chmod(p / KNOWN, 0o600)),
    Act("link", lambda p: os.link(p / KNOWN, p / "d/link")),
    Act("symlink", lambda p: os.symlink("nowhere", p / "d/symlink")),
    Act("mkdir", lambda p: os.mkdir(p / "d/sub")),
    Act("rename in a directory", lambda p: os.rename(p / "d/new", p / "d/renamed")),
    Act("rename to another", lambda p: os.rename(p / "d/renamed", p / "e/moved")),
    Act("rename a directory", lambda p: os.rename(p / "d/sub", p / "e/sub")),
    Act("rename out", lambda p: os.rename(p / "e/moved", p / "u/out")),
    Act("rename in", lambda p: os.rename(p / "u/in", p / "e/in")),
    Act("replace", lambda p: os.rename(p / "e/in", p / "d/link")),
    Act("unlink", lambda p: os.unlink(p / "d/symlink")),
    Act("rmdir", lambda p: os.rmdir(p / "e/sub")),
)


def changes(_count: int, _names: tuple[int, ...]) -> Iterator[Act]:
    """Each kind of change once."""
    yield from CHANGES


def renames(_count: int, _names: tuple[int, ...]) -> Iterator[Act]:
    """Renames of every kind, one and many, faster than anybody reads."""
    yield CHANGES[0]
    yield CHANGES[6]
    yield from CHANGES[7:13]

    def chain(place: Path) -> None:
        os.mknod(place / "d/0")
        for number in range(10):
            os.rename(place / f"d/{number}", place / f"d/{number + 1}")

    def swap(place: Path) -> None:
        os.mknod(place / "d/one")
        os.mknod(place / "d/two")
        os.rename(place / "d/one", place / "d/three")
        os.rename(place / "d/two", place / "d/one")
        os.rename(place / "d/three", place / "d/two")

    yield Act("ten in a chain", chain)
    yield Act("two change places", swap)


def names(_count: int, lengths: tuple[int, ...]) -> Iterator[Act]:
    """Files whose names have so many bytes: made, renamed from a short name, removed."""

    def act(length: int) -> Act:
        def do(place: Path) -> None:
            long = "n" * length
            os.mknod(place / "d" / long)
            os.mknod(place / "e/abcd")
            os.rename(place / "e/abcd", place / "e" / long)
            os.unlink(place / "d" / long)
            os.unlink(place / "e" / long)

        return Act(f"{length} bytes", do)

    yield from map(act, lengths)


def burst(count: int, _names: tuple[int, ...]) -> Iterator[Act]:
    """So many files, one after the other, as fast as they go."""

    def do(place: Path) -> None:
        for number in range(count):
            os.mknod(place / f"d/{number}")

    yield Act(f"{count} files", do)


def single(count: int, _names: tuple[int, ...]) -> Iterator[Act]:
    """One change, and the next when it has been told."""
    for number in range(count):
        yield Act(str(number), lambda p, number=number: os.mknod(p / f"d/{number}"))  # type: ignore[misc]


WORKLOADS: dict[str, Callable[[int, tuple[int, ...]], Iterator[Act]]] = {
    "changes": changes,
    "renames": renames,
    "names": names,
    "burst": burst,
    "single": single,
}
MEASURED = frozenset({"burst", "single"})
"""Told by figures, not step by step."""
