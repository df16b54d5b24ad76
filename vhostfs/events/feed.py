# SPDX-License-Identifier: Apache-2.0
"""Owns what the C core says about events while it runs: lines go to the log, records to whoever watches.
Must not know who watches, or how records are shown or sent.
Specification: native/api.h, vf_share_trace_events() and vf_share_next_event_notice()."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..record import Record
from .masks import FsEvent
from .paths import NodePaths
from .records import EventTrace

_log = logging.getLogger("vhostfs.events")

TURN = 256
"""Records taken at once; the C core keeps the others, and counts what it cannot keep."""
_MOVES = FsEvent.MOVED_FROM | FsEvent.MOVED_TO | FsEvent.MOVE_SELF


class EventRecords(Protocol):
    """What of the share is needed."""

    @property
    def events_fd(self) -> int: ...
    def trace_events(self, *, is_on: bool) -> None: ...
    def next_event_trace(self) -> EventTrace | None: ...
    def next_event_notice(self) -> str | None: ...


class SeenEvent(Record):
    """A record, and the path of its nodeid; None: it has none, or the event belongs to no node."""

    trace: EventTrace
    node_path: str | None


Watcher = Callable[[Sequence[SeenEvent]], None]
"""Called in the loop with records in order; must not block."""


class EventFeed:
    """Reads notices and records on the running loop until close()."""

    def __init__(self, records: EventRecords, paths: NodePaths) -> None:
        self._records = records
        self._paths = paths
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vhostfs-paths")
        self._watchers: list[Watcher] = []
        self._naming: asyncio.Task[None] | None = None
        self._fd = records.events_fd
        self._is_closed = False
        self._listen()

    def add_watcher(self, watcher: Watcher) -> None:
        """From now on it gets every record; recording begins with the first watcher."""
        self._watchers.append(watcher)
        if len(self._watchers) == 1:
            self._records.trace_events(is_on=True)

    def remove_watcher(self, watcher: Watcher) -> None:
        """Recording ends with the last one."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            if not self._watchers:
                self._records.trace_events(is_on=False)

    async def close(self) -> None:
        """While the share still lives."""
        self._is_closed = True
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        if self._naming is not None:
            await asyncio.wait({self._naming})
        self._thread.shutdown()
        if self._watchers:
            self._watchers.clear()
            self._records.trace_events(is_on=False)

    def _listen(self) -> None:
        if self._fd >= 0 and not self._is_closed:
            self._loop.add_reader(self._fd, self._take)

    def _take(self) -> None:
        for _ in range(TURN):
            notice = self._records.next_event_notice()
            if notice is None:
                break
            _log.warning("%s", notice)
        traces = []
        for _ in range(TURN):
            trace = self._records.next_event_trace()
            if trace is None:
                break
            traces.append(trace)
        if traces:
            # One batch at a time: what waits meanwhile waits in the C core, which bounds it.
            self._loop.remove_reader(self._fd)
            self._naming = self._loop.create_task(self._name_and_publish(traces))

    async def _name_and_publish(self, traces: Sequence[EventTrace]) -> None:
        try:
            seen = await self._loop.run_in_executor(self._thread, self._named, traces)
            for watcher in tuple(self._watchers):
                watcher(seen)
        finally:
            self._naming = None
            self._listen()

    def _named(self, traces: Sequence[EventTrace]) -> list[SeenEvent]:
        """In the thread: asking for a path may wait for storage."""
        seen = []
        for trace in traces:
            if trace.mask & FsEvent.ISDIR and trace.mask & _MOVES:
                self._paths.forget()
            seen.append(SeenEvent(trace, self._paths.path(trace.nodeid) if trace.nodeid else None))
        return seen
