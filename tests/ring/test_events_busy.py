# SPDX-License-Identifier: Apache-2.0
"""A file system that is busy with other things: the server moves from one mark to marks on inodes, unseen.

The flood is real, and lies beside the share on the same file system; what the guest watches goes on.
Specification: docs/events.md, "On a busy file system".
"""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event as Signal
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import stats
from tests.ring.event_sources import FILESYSTEM_MARK, Source, file_system_marks, start_share
from tests.ring.events import WATCHED, EventGuest
from tests.ring.share import Share
from tests.ring.test_events_order import EVENTS, HostWatcher, Seen, churn, without_repeats
from vhostfs.frontend.fsnotify import OVERFLOW, Element, Event

pytestmark = pytest.mark.usefixtures("ours")

AUTOMATIC = Source("automatic", "--events=fanotify")
MOVE_TIMEOUT_S = 180.0
MOVED = "events: now by fanotify, marks on watched inodes (the file system is busy: "
FILES = 3000
FLOOD = 100_000
_FORK = multiprocessing.get_context("fork")


@contextmanager
def in_children(*works: Callable[[Signal], None]) -> Iterator[Signal]:
    """Each in a process of its own, until the end of the block; they end when they see the signal."""
    stop = _FORK.Event()
    children = [_FORK.Process(target=work, args=(stop,)) for work in works]
    for child in children:
        child.start()
    try:
        yield stop
    finally:
        stop.set()
        for child in children:
            child.join()
    assert [child.exitcode for child in children] == [0] * len(children)


@contextmanager
def collecting(host: HostWatcher) -> Iterator[None]:
    """In a thread, so that the host's queue never overflows, however long the guest waits."""
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(0.005):
            host.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class Flood:
    """Names that come and go, as fast as they can."""

    directory: Path

    def __call__(self, stop: Signal) -> None:
        self.directory.mkdir()
        fd = os.open(self.directory, os.O_RDONLY)
        while not stop.is_set():
            for i in range(500):
                os.mknod(f"{i}", dir_fd=fd)
            for i in range(500):
                os.unlink(f"{i}", dir_fd=fd)
        os.close(fd)


def object_of(element: Element) -> int:
    """The object itself, also where its directory is told with it."""
    return element.child_nodeid or element.nodeid


def source_of(share: Share) -> str:
    return str(stats(share)["events"]["source"])


def busy_share(make_share: MakeShare, tmp_path: Path, *options: str, source: Source = AUTOMATIC) -> Share:
    (tmp_path / "export").mkdir()
    share = start_share(make_share, source, *options, directory=tmp_path / "export")
    if source_of(share) != "fanotify:filesystem":
        start_share(make_share, FILESYSTEM_MARK, private=True)  # says why not
    return share


def writes_to_files(root: Path) -> Callable[[Signal], None]:
    """Each file is written to once, evenly over the time that the move may take."""

    def work(stop: Signal) -> None:
        for i in range(FILES):
            os.truncate(root / f"lone/{i}", 7)
            if not stop.is_set():
                time.sleep(0.003)

    return work


def churn_without_end(root: Path, seed: int) -> Callable[[Signal], None]:
    def work(stop: Signal) -> None:
        for i in range(10_000):
            if stop.is_set():
                break
            churn(root, seed + i)

    return work


def test_what_the_guest_watches_goes_on_through_the_move(make_share: MakeShare, tmp_path: Path) -> None:
    """More may wait than by default: changes come faster than a guest in Python takes them."""
    share = busy_share(make_share, tmp_path, "--event-queue=1000000")
    for name in ("a", "b", "lone", "one"):
        (share.path / name).mkdir()
    for i in range(FILES):
        (share.path / f"lone/{i}").write_bytes(b"x")
    (share.path / "one/f").touch()
    guest = EventGuest(share, buffers=64, poison=False)
    for i in range(FILES):
        node = guest.node(f"lone/{i}")
        guest.fs.watch(node.nodeid, Event.MODIFY | Event.ATTRIB, node.generation)
    guest.watch("one/f", WATCHED | Event.OPEN)
    host = HostWatcher(share.path)
    guest.watch("a")
    guest.watch("b")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    told: list[Element] = []

    one = guest.node("one/f").nodeid
    changes = 0

    def change_one() -> None:
        """A file that is changed again when the guest has heard of it, so that it hears of each change."""
        nonlocal changes, told
        changes += 1
        os.chmod(share.path / "one/f", 0o600 | changes % 2)
        before, last = guest.notifications.until(lambda element: object_of(element) == one)
        told += [*before, last]

    deadline = time.monotonic() + MOVE_TIMEOUT_S
    with (
        collecting(host),
        in_children(
            *(Flood(tmp_path / f"flood{i}") for i in range(3)),
            churn_without_end(share.path, seed),
            writes_to_files(share.path),
        ),
    ):
        while source_of(share) == "fanotify:filesystem" and time.monotonic() < deadline:
            change_one()
        moved = time.monotonic()
        while time.monotonic() < moved + 1:
            change_one()
    host.collect()
    told += guest.elements()
    told += guest.elements()  # an object's own events may come behind the directories'
    if source_of(share) != "fanotify:inodes":
        counters = stats(share)["events"]["counters"]
        pytest.fail(f"the flood went unnoticed: {counters}\n{share.server.log()}")
    assert share.server.log().count(MOVED) == 1
    assert OVERFLOW not in told
    names = {guest.node(name).nodeid: name for name in ("a", "b")}
    seen: dict[str, list[Seen]] = defaultdict(list)
    files: dict[int, list[int]] = defaultdict(list)
    for element in told:
        if element.nodeid in names:
            name = element.name.decode()
            seen[names[element.nodeid]].append((int(element.mask & EVENTS), name))
        else:
            files[object_of(element)].append(element.mask)
    assert files[one] == [Event.ATTRIB] * changes
    lone = [files[guest.node(f"lone/{i}").nodeid] for i in range(FILES)]
    wrong = {i: masks for i, masks in enumerate(lone) if masks != [Event.MODIFY]}
    assert not wrong, "lost, or told twice"
    for name in ("a", "b"):
        assert without_repeats(seen[name]) == host.seen(name), f"seed {seed}"
    host.close()


def test_after_the_move_a_change_elsewhere_costs_nothing(make_share: MakeShare, tmp_path: Path) -> None:
    """Also behind all walls: rights are gone, and system calls that are not expected kill."""
    share = busy_share(make_share, tmp_path, "--sandbox=namespace", "--seccomp=kill")
    for name in ("d", "d/sub", "e", "u"):
        (share.path / name).mkdir()
    for name in ("d/f", "d/sub/g", "u/v"):
        (share.path / name).write_text("before")
    guest = EventGuest(share)
    guest.hold("d/f", "u")
    guest.watch("d")
    guest.watch("d/sub", WATCHED | Event.OPEN)
    guest.watch("u/v")
    assert file_system_marks(share)
    with in_children(Flood(tmp_path / "flood")):
        deadline = time.monotonic() + MOVE_TIMEOUT_S
        while source_of(share) == "fanotify:filesystem" and time.monotonic() < deadline:
            time.sleep(0.1)
        before = stats(share)["events"]
        started_s = cpu_s(share)
        time.sleep(1)
        assert cpu_s(share) - started_s < 0.2
        after = stats(share)["events"]
    assert before["source"] == after["source"] == "fanotify:inodes"
    assert "the file system is busy" in after["reason"]
    assert after["counters"]["received"] == before["counters"]["received"] > 0, "counters go on"
    assert after["counters"]["host_marks"] >= 3
    assert not file_system_marks(share)
    # What is watched is told of as by marks on inodes from the start.
    guest.hold("d/sub")
    (share.path / "d/sub/new").mkdir()
    os.chmod(share.path / "u/v", 0o600)
    os.rename(share.path / "d/f", share.path / "e/f")
    assert guest.told() == ["ISDIR|CREATE d/sub[new]", "ATTRIB u/v", "MOVED_FROM d[f]=d/f half"]
    guest.watch("e")
    os.rename(share.path / "e/f", share.path / "d/f")
    assert guest.told() == ["MOVED_FROM e[f]=d/f pair 1", "MOVED_TO d[f]=d/f pair 1"]
    (share.path / "d/sub/g").unlink()
    (share.path / "d/sub/new").rmdir()
    guest.told()
    (share.path / "d/sub").rmdir()
    told = guest.told()
    assert "ISDIR|DELETE_SELF d/sub" in told
    assert "ISDIR|DELETE d[sub]=d/sub" in told


def cpu_s(share: Share) -> float:
    """Of the whole server, user and system."""
    ticks = 0
    for pid in share.server.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_what_was_asked_for_by_name_does_not_move(make_share: MakeShare, tmp_path: Path) -> None:
    share = busy_share(make_share, tmp_path, source=FILESYSTEM_MARK)
    guest = EventGuest(share)
    guest.fs.watch(guest.node("").nodeid, WATCHED, guest.node("").generation)
    with in_children(Flood(tmp_path / "flood")):
        started = time.monotonic()
        received = 0
        while time.monotonic() < started + 8 or (
            received < FLOOD and time.monotonic() < started + MOVE_TIMEOUT_S
        ):
            time.sleep(0.2)
            received = stats(share)["events"]["counters"]["received"]
    assert received >= FLOOD, "that was no flood"
    assert source_of(share) == "fanotify:filesystem"
