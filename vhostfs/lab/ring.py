# SPDX-License-Identifier: Apache-2.0
"""Runs cells without a VM: a real server, and our own front end as VMM and guest, in milliseconds.
Must not know the server's insides.
Specification: docs/lab.md; docs/protocol.md."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..control.client import ControlError
from ..frontend import (
    BackendGoneError,
    ElementSource,
    FuseClient,
    FuseError,
    Machine,
    NotificationQueue,
    ParkedRequests,
    ProtocolFeature,
    RingBrokenError,
    Session,
    Vmm,
)
from ..frontend import fsnotify as wire
from ..frontend.fsnotify import CHANGES, HEAD_BYTES, Element, Event, Granted
from ..frontend.vhost_user import ProtocolError
from ..vm.lifeline import Lifeline
from .experiment import Cell, Experiment
from .native import HostWatcher, paired, word
from .results import LESS, LOSS, CellResult, Step
from .servers import LabServer
from .workloads import KNOWN, MEASURED, WATCHED, WORKLOADS, Act, Deadline, prepare

_MEMORY_BYTES = 16 << 20
_FENCE_WAIT_S = 0.5
_FENCE_TRIES = 4
_QUIET_S = 0.06
_SINGLE_TIMEOUT_S = 20.0
_CELL_TIMEOUT_S = 240.0
_CHANGE_TIMEOUT_S = 0.005
_numbers = itertools.count()


def machine_of(cell: Cell) -> Machine:
    """stock: a VMM with a configuration space of its own; the others pass all features."""
    machine = Machine(region_bytes=_MEMORY_BYTES, queue_size=256)
    if cell.vmm == "stock":
        features = machine.protocol_features & ~ProtocolFeature.CONFIG
        return replace(machine, protocol_features=features)
    # The kernel's own driver accepts no feature bit that it does not know.
    return machine.with_notifications() if cell.driver_choice.is_ours else machine


class RingGuest:
    """One guest: connects, mounts, asks for events and watches."""

    def __init__(self, server: LabServer, cell: Cell, place: Path, deadline: Deadline) -> None:
        self.cell = cell
        self.deadline = deadline
        self.place = place
        self.vmm = Vmm.boot(server.socket_path, machine_of(cell))
        self.elements: ElementSource | None = None
        self._directories: dict[int, str] = {}
        self._fence = frozenset[int]()
        self._fence_works = True
        self._is_granted = False

    def mount(self, result: CellResult) -> None:
        """What is agreed goes into the result. Raises FuseError where even FUSE_INIT fails."""
        fs = FuseClient(Session(self.vmm))
        fs.init()
        self._fs = fs
        driver = self.cell.driver_choice
        if not driver.is_ours:
            return
        room = wire.NOTIFY_BUF_BYTES
        if self.vmm.has_notification_queue:
            room = max(self.vmm.config().notify_buf_size or 0, HEAD_BYTES)
        buf_size = driver.buf_size if driver.buf_size != wire.NOTIFY_BUF_BYTES else max(room, driver.buf_size)
        if self.vmm.has_notification_queue and driver.flags & Granted.VIRTQUEUE:
            self.elements = NotificationQueue(self.vmm, buffers=self.cell.buffers, size_bytes=buf_size)
        call = wire.init(driver.flags, driver.mask, major=driver.major, minor=driver.minor, buf_size=buf_size)
        try:
            answer = fs.call(call)
        except FuseError as error:
            result.refused = str(error).partition(":")[0]
            return
        result.flags = [str(flag.name).lower() for flag in Granted if flag & answer.flags]
        result.notify_buf_size = answer.notify_buf_size
        self._fence_works = bool(driver.mask & answer.mask & Event.ATTRIB)
        if answer.flags & Granted.VIRTQUEUE:
            result.way = "virtqueue"
        elif answer.flags & Granted.PARKED:
            result.way = "parked"
            count = min(self.cell.buffers, answer.max_parked)
            self.elements = ParkedRequests(fs.session, count=count, room_bytes=answer.notify_buf_size - 16)
            result.figures["parked requests"] = count
        self._is_granted = result.way != "none"

    def watch(self) -> None:
        """The workload's directories, and a file that marks the end of each step. Raises FuseError."""
        fs = self._fs
        top = fs.walk(self.place.name).nodeid
        for name in WATCHED:
            entry = fs.lookup(top, name)
            self._directories[entry.nodeid] = name
            fs.watch(entry.nodeid, int(CHANGES | Event.EVENT_ON_CHILD), entry.generation)
        directory, _, known = KNOWN.partition("/")
        fs.lookup(next(nodeid for nodeid, name in self._directories.items() if name == directory), known)
        fence = fs.lookup(top, "fence")
        end = fs.lookup(fence.nodeid, "end")
        self._fence = frozenset({fence.nodeid, end.nodeid})
        fs.watch(end.nodeid, int(Event.ATTRIB), end.generation)

    def nothing_marks_the_end(self) -> None:
        """Of a step, for it could not be watched."""
        self._fence_works = False

    def told(self) -> tuple[str, ...]:
        """Everything until now, in words."""
        told: list[tuple[str, int]] = []
        for element in self._until_fence():
            cookie = element.cookie if element.flags else 0
            told.append((self._word(element), cookie))
        return paired(told)

    def _until_fence(self) -> Iterator[Element]:
        """What comes until an event that is made for this; it may be lost as others, and is made again."""
        if not self._is_granted:
            return
        assert self.elements is not None
        # Where ATTRIB is not told nothing marks the end, and it has to be waited out.
        tries = _FENCE_TRIES if self._fence_works else 1
        for _ in range(tries):
            os.chmod(self.place / "fence/end", 0o600)
            try:
                while True:
                    element = self.elements.take(_FENCE_WAIT_S if self._fence_works else _QUIET_S)
                    if element.nodeid in self._fence:
                        return
                    self.deadline.check()
                    yield element
            except TimeoutError:
                continue
        self._fence_works = False

    def _word(self, element: Element) -> str:
        directory = self._directories.get(element.nodeid, "")
        if element.mask & Event.Q_OVERFLOW:
            return f"{LOSS} in {directory}" if directory else LOSS
        return word(int(element.mask), directory or "?", os.fsdecode(element.name))

    def count_all(self) -> tuple[int, int]:
        """Elements that came until now, and losses among them."""
        losses = [bool(element.mask & Event.Q_OVERFLOW) for element in self._until_fence()]
        return len(losses) - sum(losses), sum(losses)

    def await_one(self) -> None:
        """The next element. Raises TimeoutError."""
        assert self.elements is not None
        self.elements.take(_SINGLE_TIMEOUT_S)

    def close(self) -> None:
        self.vmm.close()


def run_ring(experiment: Experiment, lifeline: Lifeline) -> Iterator[CellResult]:
    """Each cell, in the order of the experiment. What cannot be run is a result that says why."""
    servers: dict[tuple[str, ...], LabServer] = {}
    try:
        for cell in experiment.cells:
            started_s = time.monotonic()
            result = CellResult(cell)
            try:
                options = cell.server_options
                # One at a time: what others would do on the same file system is not this one's cost.
                if options not in servers or experiment.workload in MEASURED:
                    for server in servers.values():
                        server.stop()
                    servers.clear()
                    servers[options] = LabServer(lifeline, options, f"server{next(_numbers)}")
                _run_cell(experiment, cell, servers[options], result)
            except (ProtocolError, BackendGoneError, RingBrokenError, ControlError) as error:
                result.trouble = f"{type(error).__name__}: {error}"
            except Exception as error:
                result.trouble = " ".join(str(error).split()) or type(error).__name__
            result.took_s = time.monotonic() - started_s
            yield result
    finally:
        for server in servers.values():
            server.stop()


def _run_cell(experiment: Experiment, cell: Cell, server: LabServer, result: CellResult) -> None:
    place = server.directory / f"cell{next(_numbers)}"
    prepare(place)
    server.begin()
    count = experiment.count if experiment.workload in MEASURED else 0
    guest = RingGuest(server, cell, place, Deadline(_CELL_TIMEOUT_S, count, _CHANGE_TIMEOUT_S))
    try:
        guest.mount(result)
        result.said = server.said()
        try:
            if result.way != "none":
                guest.watch()
        except FuseError as error:
            result.said.append(f"{LESS}a watch is refused: {str(error).partition(':')[0]}")
            guest.nothing_marks_the_end()
        acts = guest.deadline.each(WORKLOADS[experiment.workload](experiment.count, experiment.names))
        if experiment.workload not in MEASURED:
            result.steps = list(_steps(guest, acts, place))
        elif result.way != "none":
            _measure(experiment, guest, server, acts, place, result)
    finally:
        guest.close()


def _steps(guest: RingGuest, acts: Iterator[Act], place: Path) -> Iterator[Step]:
    watcher = HostWatcher(place)
    try:
        for act in acts:
            act.do(place)
            yield Step(act.label, watcher.take(), guest.told())
    finally:
        watcher.close()


def _measure(
    experiment: Experiment,
    guest: RingGuest,
    server: LabServer,
    acts: Iterator[Act],
    place: Path,
    result: CellResult,
) -> None:
    before = server.stats()["events"]["counters"]
    server.begin()
    came = losses = 0
    started_s = time.perf_counter()
    delays_s: list[float] = []
    for act in acts:
        act_s = time.perf_counter()
        act.do(place)
        if experiment.workload == "single":
            guest.await_one()
            delays_s.append(time.perf_counter() - act_s)
    if experiment.workload == "burst":
        came, losses = guest.count_all()
    else:
        came = len(delays_s)
    seconds = time.perf_counter() - started_s
    cpu_s = server.cpu_s()
    after = server.stats()["events"]["counters"]
    figures = result.figures
    figures["told"] = came
    figures["losses told"] = losses
    figures["lost"] = after["lost"] - before["lost"]
    figures["events/s"] = round(came / seconds)
    figures["waited at most"] = after["max_depth"]
    figures["server us/event"] = round(1e6 * cpu_s / max(1, came), 1)
    if delays_s:
        delays_s.sort()
        figures["p50 us"] = round(1e6 * delays_s[len(delays_s) // 2])
        figures["p99 us"] = round(1e6 * delays_s[len(delays_s) * 99 // 100])
