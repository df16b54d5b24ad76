# SPDX-License-Identifier: Apache-2.0
"""Records of the event pipeline: their paths as the guest sees them, and their way to whoever watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.limits import HANG_S
from vhostfs.events.feed import TURN, EventFeed, SeenEvent
from vhostfs.events.masks import FsEvent
from vhostfs.events.paths import KEPT_S, MAX_KEPT, NodePaths
from vhostfs.events.records import LATENCY_BUCKETS, EventFate, EventsStats, EventTrace
from vhostfs.record import replace

TRACE = EventTrace(
    time_ns=0,
    nodeid=1,
    child_nodeid=0,
    mask=int(FsEvent.CREATE),
    cookie=0,
    fate=EventFate.DELIVERED,
    pid=0,
    skipped=0,
    name=b"f",
)


class Nodes:
    """Nodes by number, each a path on this machine; how often they were asked for."""

    def __init__(self, paths: dict[int, Path]) -> None:
        self.paths = paths
        self.asked = 0
        self.gate: Callable[[], object] = lambda: None

    def open_inode(self, nodeid: int) -> int:
        self.asked += 1
        self.gate()
        return os.open(self.paths[nodeid], os.O_PATH | os.O_NOFOLLOW)


@pytest.fixture
def proc_fd_dir() -> Iterator[int]:
    fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    share = tmp_path.resolve() / "share"
    (share / "sub").mkdir(parents=True)
    (share / "sub" / "file").touch()
    return share


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_paths_begin_at_the_root_of_the_share(share: Path, proc_fd_dir: int) -> None:
    outside = share.parent / "share-of-another"
    outside.mkdir()
    nodes = Nodes({1: share, 2: share / "sub", 3: share / "sub" / "file", 4: outside})
    paths = NodePaths(nodes, proc_fd_dir, str(share), Clock())
    assert [paths.path(nodeid) for nodeid in (1, 2, 3, 4)] == ["/", "/sub", "/sub/file", None]


def test_behind_a_root_of_its_own_a_server_sees_the_guests_paths_already(
    share: Path, proc_fd_dir: int
) -> None:
    paths = NodePaths(Nodes({1: Path("/"), 2: share}), proc_fd_dir, "/", Clock())
    assert paths.path(1) == "/"
    assert paths.path(2) == str(share)


def test_a_path_is_asked_for_again_after_a_moment_or_when_told_so(share: Path, proc_fd_dir: int) -> None:
    clock = Clock()
    nodes = Nodes({2: share / "sub"})
    paths = NodePaths(nodes, proc_fd_dir, str(share), clock)
    assert paths.path(2) == paths.path(2) == "/sub"
    assert nodes.asked == 1
    nodes.paths[2] = (share / "sub").rename(share / "moved")
    clock.now_s += KEPT_S
    assert paths.path(2) == "/moved"
    nodes.paths[2] = (share / "moved").rename(share / "again")
    paths.forget()
    assert paths.path(2) == "/again"


def test_what_is_remembered_is_bounded(share: Path, proc_fd_dir: int) -> None:
    nodes = Nodes(dict.fromkeys(range(1, MAX_KEPT + 2), share))
    paths = NodePaths(nodes, proc_fd_dir, str(share), Clock())
    for nodeid in nodes.paths:
        paths.path(nodeid)
    asked = nodes.asked
    paths.path(1)
    assert nodes.asked == asked + 1


def test_a_node_that_is_gone_keeps_the_name_that_it_had(share: Path, proc_fd_dir: int) -> None:
    fd = os.open(share / "sub" / "file", os.O_PATH)
    (share / "sub" / "file").unlink()
    nodes = Nodes({3: Path(f"/proc/self/fd/{fd}")})
    nodes.open_inode = lambda nodeid: os.dup(fd)  # type: ignore[method-assign]
    paths = NodePaths(nodes, proc_fd_dir, str(share), Clock())
    assert paths.path(3) == "/sub/file"
    os.close(fd)


def test_a_name_that_only_looks_like_one_that_is_gone_stays(share: Path, proc_fd_dir: int) -> None:
    (share / "f (deleted)").touch()
    paths = NodePaths(Nodes({3: share / "f (deleted)"}), proc_fd_dir, str(share), Clock())
    assert paths.path(3) == "/f (deleted)"


def test_a_node_that_the_guest_does_not_hold_has_no_path(share: Path, proc_fd_dir: int) -> None:
    assert NodePaths(Nodes({9: share / "none"}), proc_fd_dir, str(share), Clock()).path(9) is None


class FakeRecords:
    """A pipeline's records and notices, readable as the C core's are."""

    def __init__(self) -> None:
        self.events_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.traces: deque[EventTrace] = deque()
        self.notices: deque[str] = deque()
        self.switched: list[bool] = []

    def add(self, *traces: EventTrace) -> None:
        self.traces += traces
        os.eventfd_write(self.events_fd, 1)

    def say(self, text: str) -> None:
        self.notices.append(text)
        os.eventfd_write(self.events_fd, 1)

    def trace_events(self, *, is_on: bool) -> None:
        self.switched.append(is_on)

    def next_event_trace(self) -> EventTrace | None:
        if self.traces:
            return self.traces.popleft()
        self._drained()
        return None

    def next_event_notice(self) -> str | None:
        if self.notices:
            return self.notices.popleft()
        self._drained()
        return None

    def _drained(self) -> None:
        if not self.traces and not self.notices:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.events_fd)


class Watching:
    """What a watcher got; `until` waits for a number of events."""

    def __init__(self) -> None:
        self.seen: list[SeenEvent] = []
        self._more = asyncio.Event()

    def __call__(self, events: Sequence[SeenEvent]) -> None:
        self.seen += events
        self._more.set()

    async def until(self, count: int) -> list[SeenEvent]:
        async with asyncio.timeout(10):
            while len(self.seen) < count:
                self._more.clear()
                await self._more.wait()
        return self.seen


class Pipeline:
    """A feed and what is around it."""

    def __init__(self, share: Path, proc_fd_dir: int) -> None:
        self.records = FakeRecords()
        self.nodes = Nodes({1: share, 2: share / "sub"})
        self.feed = EventFeed(self.records, NodePaths(self.nodes, proc_fd_dir, str(share), Clock()))


@pytest.fixture
async def pipeline(share: Path, proc_fd_dir: int) -> AsyncIterator[Pipeline]:
    made = Pipeline(share, proc_fd_dir)
    yield made
    await made.feed.close()
    os.close(made.records.events_fd)


async def test_events_come_in_order_with_their_paths(pipeline: Pipeline) -> None:
    watching = Watching()
    pipeline.feed.add_watcher(watching)
    pipeline.records.add(replace(TRACE, nodeid=2), TRACE, replace(TRACE, nodeid=0))
    seen = await watching.until(3)
    assert [event.node_path for event in seen] == ["/sub", "/", None]


async def test_more_than_a_turn_takes_nothing_out_of_order(pipeline: Pipeline) -> None:
    watching = Watching()
    pipeline.feed.add_watcher(watching)
    pipeline.records.add(*(replace(TRACE, cookie=number) for number in range(3 * TURN + 5)))
    seen = await watching.until(3 * TURN + 5)
    assert [event.trace.cookie for event in seen] == list(range(3 * TURN + 5))


async def test_the_loop_goes_on_while_storage_keeps_a_path_waiting(pipeline: Pipeline) -> None:
    gate, asked = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        assert gate.wait(HANG_S)

    pipeline.nodes.gate = wait
    watching = Watching()
    pipeline.feed.add_watcher(watching)
    pipeline.records.add(TRACE)
    while not asked.is_set():
        await asyncio.sleep(0)
    assert watching.seen == []
    gate.set()
    await watching.until(1)


async def test_a_directory_that_moves_changes_the_paths_that_follow(pipeline: Pipeline, share: Path) -> None:
    watching = Watching()
    pipeline.feed.add_watcher(watching)
    pipeline.records.add(replace(TRACE, nodeid=2))
    await watching.until(1)
    pipeline.nodes.paths[2] = (share / "sub").rename(share / "moved")
    pipeline.records.add(replace(TRACE, mask=int(FsEvent.MOVED_TO | FsEvent.ISDIR)), replace(TRACE, nodeid=2))
    assert (await watching.until(3))[2].node_path == "/moved"


async def test_recording_is_on_only_while_somebody_watches(pipeline: Pipeline) -> None:
    first, second = Watching(), Watching()
    pipeline.feed.add_watcher(first)
    pipeline.feed.add_watcher(second)
    pipeline.feed.remove_watcher(first)
    assert pipeline.records.switched == [True]
    pipeline.feed.remove_watcher(second)
    pipeline.feed.remove_watcher(second)
    assert pipeline.records.switched == [True, False]


async def test_notices_go_to_the_log_although_nobody_watches(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    pipeline.records.say("the host lost events")
    async with asyncio.timeout(10):
        while "the host lost events" not in caplog.text:
            await asyncio.sleep(0)
    assert caplog.records[0].levelno == logging.WARNING


def test_percentiles_are_the_bounds_of_their_buckets() -> None:
    def stats(**counts: int) -> EventsStats:
        latency = [0] * LATENCY_BUCKETS
        for bucket, count in counts.items():
            latency[int(bucket.removeprefix("b"))] = count
        return EventsStats(latency=tuple(latency))

    assert stats().latency_percentile_us(50) is None
    assert stats(b5=99, b9=1).latency_percentile_us(50) == 32
    assert stats(b5=99, b9=1).latency_percentile_us(99) == 32
    assert stats(b5=98, b9=2).latency_percentile_us(99) == 512
    assert stats(b23=1).latency_percentile_us(99) == 1 << 23
