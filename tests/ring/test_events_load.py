# SPDX-License-Identifier: Apache-2.0
"""Many events and slow guests: latency, bursts, overflow, memory; what was measured is printed (pytest -rP).

Must not assert more about time than a loaded machine can keep.
Specification: docs/protocol.md, "Order, merging and loss".
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import statistics
import struct
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import event_counters
from tests.ring.event_sources import FILESYSTEM_MARK, SOURCES, Source, start_share
from tests.ring.events import EventGuest
from tests.ring.share import Share
from tests.server import awaited, held_up
from vhostfs.frontend.fsnotify import OVERFLOW, Element, ElementFlag, Event

pytestmark = pytest.mark.usefixtures("ours")

BURST = int(os.environ.get("VHOSTFS_EVENT_BURST", "100000"))
MEDIAN_LIMIT_S = 0.1
GROWTH_LIMIT_BYTES = 32 << 20


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


@pytest.fixture
def share(make_share: MakeShare, source: Source) -> Share:
    share = start_share(make_share, source)
    (share.path / "d").mkdir()
    return share


def in_a_child(work: Callable[..., None], *args: object) -> BaseProcess:
    """The changes come from a process of their own, so that this one can be the guest meanwhile."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


# ---- latency ---------------------------------------------------------------------------------------------


def turns_ns(thread: int) -> int:
    """How long a thread's turns are by sched_getattr(2); 0 before Linux 6.12."""
    number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    attributes = ctypes.create_string_buffer(48)
    assert not ctypes.CDLL(None).syscall(number, thread, attributes, len(attributes), 0)
    runtime_ns: int = struct.unpack_from("=Q", attributes, 24)[0]
    return runtime_ns


def test_the_thread_that_reads_events_asks_for_short_turns(make_share: MakeShare) -> None:
    """So that it need not wait until a busy thread is through with its own; Linux 6.12."""
    share = start_share(make_share, SOURCES[0])
    [task] = share.server.tasks("events\n")
    kernel = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    assert turns_ns(int(task.name)) == (100_000 if kernel >= (6, 12) else 0)


def test_an_event_is_there_at_once(share: Share, source: Source) -> None:
    guest = EventGuest(share)
    guest.watch("d")
    latencies_s = []
    for i in range(300):
        name = str(i)
        started = time.perf_counter()
        os.mknod(share.path / "d" / name)
        element = guest.notifications.take()
        latencies_s.append(time.perf_counter() - started)
        assert element.name == name.encode()
    cuts = statistics.quantiles(latencies_s, n=100)
    print(
        f"{source.name}: from mknod(2) to the element in the guest's hands, {len(latencies_s)} times:"
        f" median {cuts[49] * 1e6:.0f} us, 90% {cuts[89] * 1e6:.0f} us, 99% {cuts[98] * 1e6:.0f} us,"
        f" most {max(latencies_s) * 1e6:.0f} us"
    )
    assert cuts[49] < MEDIAN_LIMIT_S


# ---- bursts ----------------------------------------------------------------------------------------------


def create(directory: str, count: int) -> None:
    """Names for one file beside the directory: the cheapest that there is, at most 65,000 on ext4."""
    file = Path(f"{directory}.file")
    file.touch()
    fd = os.open(directory, os.O_RDONLY)
    for i in range(count):
        os.link(file, str(i), dst_dir_fd=fd)
    os.close(fd)


def remove(directory: str, count: int) -> None:
    fd = os.open(directory, os.O_RDONLY)
    for i in range(count):
        os.unlink(str(i), dir_fd=fd)
    os.close(fd)


def modify(directory: str, count: int) -> None:
    for i in range(count):
        os.truncate(f"{directory}/{i}", 0)


def rename(directory: str, count: int) -> None:
    fd = os.open(directory, os.O_RDONLY)
    for i in range(count):
        os.rename(str(i), f"new{i}", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)


def work_in_all(path: Path, count: int) -> None:
    """A process for each directory; every name is used for one thing only, so that nothing merges."""
    children = [
        in_a_child(work, str(path / name), count)
        for name, work in (
            ("created", create),
            ("removed", remove),
            ("modified", modify),
            ("renamed", rename),
        )
    ]
    for child in children:
        child.join()


def numbered(elements: list[Element]) -> list[tuple[str, str]]:
    return [((element.mask & ~Event.ISDIR).name or "?", element.name.decode()) for element in elements]


def test_a_burst_arrives_whole_and_in_order(make_share: MakeShare, source: Source) -> None:
    """100,000 changes in four directories through 16 buffers: nothing lost, nothing out of order in any."""
    count = BURST // 4 if source is FILESYSTEM_MARK else BURST // 40
    share = start_share(make_share, source, private=True)
    for name in ("created", "removed", "modified", "renamed"):
        (share.path / name).mkdir()
        if name != "created":
            create(str(share.path / name), count)
    guest = EventGuest(share, buffers=16, poison=False)
    for name in ("created", "removed", "modified", "renamed"):
        guest.watch(
            name, Event.CREATE | Event.DELETE | Event.MODIFY | Event.MOVED_FROM | Event.MOVED_TO | (1 << 27)
        )
    by_node: dict[int, list[Element]] = {
        guest.node(name).nodeid: [] for name in ("created", "removed", "modified", "renamed")
    }
    started = time.perf_counter()
    child = in_a_child(work_in_all, share.path, count)
    left = 5 * count
    while left:
        element = guest.notifications.take()
        assert element != OVERFLOW, f"events were lost, with {left} still to come"
        by_node[element.nodeid].append(element)
        left -= 1
    elapsed_s = time.perf_counter() - started
    child.join()
    assert guest.told() == [], "more came than happened"
    created, removed, modified, renamed = map(numbered, by_node.values())
    assert created == [("CREATE", str(i)) for i in range(count)]
    assert removed == [("DELETE", str(i)) for i in range(count)]
    assert modified == [("MODIFY", str(i)) for i in range(count)]
    assert renamed == [
        half for i in range(count) for half in (("MOVED_FROM", str(i)), ("MOVED_TO", f"new{i}"))
    ]
    halves = by_node[guest.node("renamed").nodeid]
    assert all(one.flags == two.flags == ElementFlag.SPLIT_RENAME for one, two in pairs(halves))
    assert all(one.cookie == two.cookie != 0 for one, two in pairs(halves))
    assert len({one.cookie for one, _ in pairs(halves)}) == count
    print(
        f"{source.name}: {4 * count} changes, {5 * count} elements through 16 buffers in {elapsed_s:.2f} s,"
        f" {5 * count / elapsed_s:.0f} a second (the host's changes included)"
    )


def pairs(halves: list[Element]) -> list[tuple[Element, Element]]:
    return list(zip(halves[::2], halves[1::2], strict=True))


def test_a_burst_with_a_single_buffer_arrives_whole(share: Share) -> None:
    guest = EventGuest(share, buffers=1, poison=False)
    guest.watch("d")
    child = in_a_child(create, str(share.path / "d"), 3000)
    elements = guest.notifications.receive(3000)
    child.join()
    assert numbered(elements) == [("CREATE", str(i)) for i in range(3000)]


def test_names_made_and_removed_at_once_lose_neither(share: Share) -> None:
    """The host merges what one process does to one name, but a name never ends as it is not."""
    guest = EventGuest(share)
    guest.watch("d", Event.CREATE | Event.DELETE)

    def work() -> None:
        for i in range(2000):
            os.mknod(share.path / f"d/{i}")
            os.unlink(share.path / f"d/{i}")

    child = in_a_child(work)
    child.join()
    told = guest.told()
    assert sorted(told) == sorted(f"{word} d[{i}]" for i in range(2000) for word in ("CREATE", "DELETE"))
    place = {line: i for i, line in enumerate(told)}
    assert all(place[f"CREATE d[{i}]"] < place[f"DELETE d[{i}]"] for i in range(2000))


def test_identical_neighbours_merge_while_they_wait(share: Share) -> None:
    guest = EventGuest(share, buffers=1)
    (share.path / "d/f").touch()
    guest.watch("d", Event.MODIFY | Event.EVENT_ON_CHILD)
    guest.notifications.give_back = False
    with open(share.path / "d/f", "wb", buffering=0) as file:
        for _ in range(500):
            file.write(b"x")
    guest.notifications.take()
    guest.notifications.give_back = True
    guest.notifications.give_back_all()
    told = guest.told()
    assert set(told) <= {"MODIFY d[f]"}
    assert len(told) < 100


# ---- overflow --------------------------------------------------------------------------------------------


def test_what_finds_no_room_is_announced_once_behind_what_waited(
    make_share: MakeShare, source: Source
) -> None:
    share = start_share(make_share, source, "--event-queue=64", private=True)
    (share.path / "d").mkdir()
    guest = EventGuest(share, buffers=16)
    guest.watch("d")
    for turn in range(3):
        guest.notifications.give_back = False
        names = [f"{turn}-{i}" for i in range(500)]
        for name in names:
            os.mknod(share.path / "d" / name)
        got = [element.name.decode() for element in guest.notifications.receive(16)]
        lost = (turn + 1) * (500 - 16 - 64)
        assert awaited(lambda lost=lost: event_counters(share)["lost"] == lost)  # type: ignore[misc]
        assert event_counters(share)["depth"] == 65
        guest.notifications.give_back = True
        guest.notifications.give_back_all()
        waited, _ = guest.notifications.until(lambda element: element == OVERFLOW)
        got += [element.name.decode() for element in waited]
        assert got == names[: 16 + 64]
        assert guest.told() == []
        os.mknod(share.path / f"d/after {turn}")
        assert guest.told() == [f"CREATE d[after {turn}]"]
    assert event_counters(share)["overflows"] == 3


def test_what_the_host_has_no_room_for_is_announced_where_it_is_lost(
    make_share: MakeShare, source: Source
) -> None:
    """The server cannot run for so long that inotify's queue overflows on the host: fanotify's does not."""
    kept = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    share = start_share(make_share, source, private=True)
    (share.path / "d").mkdir()
    guest = EventGuest(share, poison=False)
    guest.watch("d")
    for turn in range(2):
        names = [f"{turn}-{i}" for i in range(kept + 1000)]
        with held_up(share.server.pids()[0]):
            for name in names:
                os.mknod(share.path / "d" / name)
        waited, _ = guest.notifications.until(lambda element: element == OVERFLOW)
        told = [element.name.decode() for element in waited]
        assert told == names[: len(told)]
        assert kept <= len(told) < len(names), "a few may be read before the server stops"
        assert guest.told() == []
        os.mknod(share.path / f"d/after {turn}")
        os.rename(share.path / f"d/after {turn}", share.path / f"d/{turn}")
        (share.path / f"d/{names[-1]}").unlink()
        assert [line.partition("]")[0] for line in guest.told()] == [
            f"CREATE d[after {turn}",
            f"MOVED_FROM d[after {turn}",
            f"MOVED_TO d[{turn}",
            f"DELETE d[{names[-1]}",
        ]
    assert event_counters(share)["host_overflows"] == 2


def test_a_rename_is_told_whole_or_not_at_all(make_share: MakeShare) -> None:
    """Both halves or none fit into the queue."""
    share = start_share(make_share, FILESYSTEM_MARK, "--event-queue=63", private=True)
    (share.path / "d").mkdir()
    create(str(share.path / "d"), 300)
    guest = EventGuest(share, buffers=1)
    guest.watch("d")
    guest.notifications.give_back = False
    rename(str(share.path / "d"), 300)
    first = guest.notifications.take()
    assert awaited(lambda: event_counters(share)["lost"] >= 300)
    guest.notifications.give_back = True
    guest.notifications.give_back_all()
    waited, _ = guest.notifications.until(lambda element: element == OVERFLOW)
    assert guest.told() == []
    halves = [first, *waited]
    assert len(halves) == 64
    assert all(one.cookie == two.cookie for one, two in pairs(halves))


def test_a_guest_that_takes_nothing_costs_bounded_memory(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, "--event-queue=5000", private=True)
    (share.path / "d").mkdir()
    guest = EventGuest(share, buffers=16)
    guest.watch("d")
    guest.notifications.give_back = False
    resident = share.server.resident_bytes()
    child = in_a_child(churn, str(share.path / "d"), 30_000)
    child.join()
    assert awaited(lambda: event_counters(share)["lost"] > 0)
    assert event_counters(share)["depth"] <= 5001
    grown = share.server.resident_bytes() - resident
    print(f"{source.name}: {grown >> 20} MiB more for 5000 elements that wait")
    assert grown < GROWTH_LIMIT_BYTES
    assert guest.fs.getattr(guest.fs.root).nlink >= 2, "requests are served meanwhile"
    share.unmount()
    again = EventGuest(share)
    again.watch("d")
    os.mknod(share.path / "d/after")
    assert again.told() == ["CREATE d[after]"]


def churn(directory: str, count: int) -> None:
    fd = os.open(directory, os.O_RDONLY)
    for i in range(count // 2):
        os.symlink("x", f"{i:0200}", dir_fd=fd)
        os.unlink(f"{i:0200}", dir_fd=fd)
    os.close(fd)


def test_what_nobody_watches_is_counted_and_not_queued(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, private=True)
    for name in ("d", "u"):
        (share.path / name).mkdir()
    guest = EventGuest(share)
    guest.hold("u")
    guest.watch("d", Event.CREATE)
    before = event_counters(share)
    create(str(share.path / "u"), 200)
    (share.path / "d/f").touch()
    assert [line for line in guest.told() if "[f]" in line] == ["CREATE d[f]"]
    after = event_counters(share)
    assert after["unwatched"] - before["unwatched"] >= 200
    assert after["watches"] == 2
    assert after["delivered"] - before["delivered"] == 2  # the fence is the other
