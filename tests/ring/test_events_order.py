# SPDX-License-Identifier: Apache-2.0
"""Under load a directory's events come in the order in which they happened, and as often.

The measure is inotify's own watcher on the host, on the same directories at the same time.
Specification: docs/protocol.md, "Order, merging and loss".
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import struct
from collections import defaultdict
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import SOURCES, Source, start_share
from tests.ring.events import EventGuest
from vhostfs.frontend.fsnotify import Element, Event

ROUNDS = 2500
DIRECTORIES = ("a", "b")
EVENTS = (
    Event.CREATE
    | Event.DELETE
    | Event.MODIFY
    | Event.ATTRIB
    | Event.CLOSE_WRITE
    | Event.MOVED_FROM
    | Event.MOVED_TO
)
_RECORD = struct.Struct("=iIII")

Seen = tuple[int, str]
"""Event bits, and the name."""


class HostWatcher:
    """What a program on the host sees by inotify."""

    def __init__(self, root: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names = {
            libc.inotify_add_watch(self._fd, os.fsencode(root / name), int(EVENTS)): name
            for name in DIRECTORIES
        }
        assert -1 not in self._names
        self._seen: dict[str, list[Seen]] = defaultdict(list)

    def collect(self) -> None:
        """Often enough that the host's queue never overflows."""
        while True:
            try:
                data = os.read(self._fd, 1 << 20)
            except BlockingIOError:
                return
            at = 0
            while at < len(data):
                watch, mask, _cookie, size = _RECORD.unpack_from(data, at)
                name = data[at + _RECORD.size : at + _RECORD.size + size].rstrip(b"\0").decode()
                at += _RECORD.size + size
                assert watch in self._names, "the host's own watcher lost events: the test asks too much"
                self._seen[self._names[watch]].append((mask & int(EVENTS), name))

    def seen(self, directory: str) -> list[Seen]:
        return without_repeats(self._seen[directory])

    def close(self) -> None:
        os.close(self._fd)


def without_repeats(events: list[Seen]) -> list[Seen]:
    """Identical neighbours are one: where two meet depends on when each watcher reads."""
    return [event for i, event in enumerate(events) if not i or events[i - 1] != event]


def churn(root: Path, seed: int) -> None:
    """Short lives of a few names at a time, in two directories: what a build or an unpacking does."""
    choose = random.Random(seed)
    alive: list[Path] = []
    for i in range(ROUNDS):
        path = root / choose.choice(DIRECTORIES) / f"f{i % 50}"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        alive.append(path)
        if len(alive) > 3:
            gone = alive.pop(choose.randrange(len(alive)))
            if choose.random() < 0.5:
                gone.unlink(missing_ok=True)
            elif gone.exists():
                moved = root / choose.choice(DIRECTORIES) / f"m{i % 7}"
                gone.rename(moved)
                os.truncate(moved, 0)
        again = choose.choice(alive)
        if again.exists():
            os.truncate(again, 0)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_directory_is_seen_to_change_as_by_a_watcher_on_the_host(
    make_share: MakeShare, source: Source
) -> None:
    share = start_share(make_share, source)
    for name in DIRECTORIES:
        (share.path / name).mkdir()
    guest = EventGuest(share, buffers=64, poison=False)
    host = HostWatcher(share.path)
    for name in DIRECTORIES:
        guest.watch(name)
    node = {guest.node(name).nodeid: name for name in DIRECTORIES}
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    child = multiprocessing.get_context("fork").Process(target=churn, args=(share.path, seed))
    child.start()
    told: list[Element] = []
    while child.is_alive():
        host.collect()
        told += guest.elements()
    child.join()
    assert child.exitcode == 0
    host.collect()
    told += guest.elements()
    by_directory: dict[str, list[Seen]] = defaultdict(list)
    for element in told:
        assert not element.mask & Event.Q_OVERFLOW
        by_directory[node[element.nodeid]].append((int(element.mask & EVENTS), element.name.decode()))
    for name in DIRECTORIES:
        expected = host.seen(name)
        assert len(expected) > ROUNDS
        assert without_repeats(by_directory[name]) == expected, f"seed {seed}"
    host.close()
