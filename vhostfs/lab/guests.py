# SPDX-License-Identifier: Apache-2.0
"""Runs cells in real guests: one boot for all cells of a kernel and VMM, a share and a server for each.
Must not know how a guest is made (vhostfs/vm), or what is right.
Specification: docs/lab.md; qemu/guest/README.md for the driver's parameters."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..control.client import ControlError
from ..vm.accel import choose_accelerator
from ..vm.agent import GuestError, RunningCommand
from ..vm.cache import cache_root
from ..vm.driver import MODULE_NAME
from ..vm.errors import VmError
from ..vm.guest import Guest
from ..vm.image import Image, ImageSpec, build_image
from ..vm.lifeline import Lifeline
from ..vm.machine import Accelerator, Machine, Share, ShareDevice, smallest_memory_bytes
from ..vm.qemu import KIT, PATCHED, Qemu, find_qemu
from .experiment import Cell, Experiment
from .native import HostWatcher, paired
from .results import LOSS, CellResult, Step
from .servers import LabServer
from .workloads import (
    KNOWN,
    MEASURED,
    WATCHED,
    WORKLOADS,
    Act,
    CellTimeoutError,
    Deadline,
    prepare,
)

Progress = Callable[[str], None]

_FREE_MEMORY_BYTES = 512 << 20
_COMMAND_TIMEOUT_S = 180.0
_WATCHER_TIMEOUT_S = 120.0
_STEP_TIMEOUT_S = 5.0
_QUIET_S = 3.0
_CELL_TIMEOUT_S = 400.0
_CHANGE_TIMEOUT_S = 0.05
_MOUNT_POINT = "/lab"
_numbers = itertools.count()
_DEVICES = {
    "stock": ShareDevice.STOCK,
    "test-device": ShareDevice.PASS_THROUGH,
    "patched": ShareDevice.QUEUE,
}
_COUNTERS = "/sys/bus/virtio/devices/*/notifications"
_EVENTS = "modify,attrib,close_write,move,create,delete"


@dataclass(frozen=True, slots=True)
class _Group:
    """What one boot is for: no more can differ between the cells of a guest."""

    kernel: str
    vmm: str
    is_ours: bool


def run_guests(experiment: Experiment, lifeline: Lifeline, progress: Progress) -> Iterator[CellResult]:
    """Each cell, one guest after the other. What cannot be run is a result that says why."""
    groups: dict[_Group, list[Cell]] = {}
    for cell in experiment.cells:
        group = _Group(cell.kernel, cell.vmm, cell.driver_choice.is_ours)
        groups.setdefault(group, []).append(cell)
    results: dict[Cell, CellResult] = {}
    for group, cells in groups.items():
        try:
            results.update(_boot(experiment, group, cells, lifeline, progress))
        except (VmError, GuestError, OSError) as error:
            text = str(error).splitlines()[0]
            results.update({cell: CellResult(cell, trouble=text) for cell in cells if cell not in results})
    # In the order of the experiment.
    yield from (results[cell] for cell in experiment.cells)


def _boot(
    experiment: Experiment, group: _Group, cells: Sequence[Cell], lifeline: Lifeline, progress: Progress
) -> Iterator[tuple[Cell, CellResult]]:
    cache = cache_root()
    device = _DEVICES[group.vmm]
    qemu = _qemu_with(device, cache, progress)
    image = build_image(ImageSpec(group.kernel, driver=group.is_ours), cache, progress)
    number = next(_numbers)
    servers = [
        LabServer(lifeline, cell.server_options, f"guest{number}-{at}", tag=f"lab{at}")
        for at, cell in enumerate(cells)
    ]
    shares = tuple(Share(server.tag, server.socket_path, "", device=device) for server in servers)
    progress(f"starting Linux {image.kernel_release} with QEMU {qemu.version_text}, {group.vmm}")
    with Guest(_machine(qemu, image, shares, cache), lifeline=lifeline) as guest:
        for cell, server in zip(cells, servers, strict=True):
            started_s = time.monotonic()
            result = CellResult(cell)
            try:
                _run_cell(experiment, guest, server, result)
            except (GuestError, ControlError, VmError, CellTimeoutError) as error:
                result.trouble = str(error).splitlines()[0]
            result.took_s = time.monotonic() - started_s
            yield cell, result
    for server in servers:
        server.stop()


def _qemu_with(device: ShareDevice, cache: Path, progress: Progress) -> Qemu:
    """The machine's own where that has the device. Raises VmError."""
    if device is ShareDevice.QUEUE:
        qemu = find_qemu(PATCHED, cache, progress)
    else:
        qemu = find_qemu(None, cache, progress, notifications=device is ShareDevice.PASS_THROUGH)
        if not device.is_of(qemu):
            qemu = find_qemu(KIT, cache, progress)
    if not device.is_of(qemu):
        raise VmError(f"QEMU {qemu.version_text} has no {device.value}")
    return qemu


def _machine(qemu: Qemu, image: Image, shares: tuple[Share, ...], cache: Path) -> Machine:
    memory_bytes = smallest_memory_bytes(image) + _FREE_MEMORY_BYTES
    plain = Machine(qemu, image, Accelerator.TCG, memory_bytes=memory_bytes)
    accelerator = choose_accelerator("auto", plain, cache)
    return Machine(qemu, image, accelerator, shares, memory_bytes)


def driver_parameters(cell: Cell) -> list[str]:
    """Of the module, for insmod."""
    driver = cell.driver_choice
    words = {
        "without": driver.flags_off,
        "major": driver.major,
        "minor": driver.minor,
        "queue_buffers": cell.buffers,
    }
    if driver.buf_size != 320:
        words["buf_size"] = driver.buf_size
    return [f"{name}={value}" for name, value in words.items()]


def _run_cell(experiment: Experiment, guest: Guest, server: LabServer, result: CellResult) -> None:
    cell = result.cell
    place = server.directory
    prepare(place)
    server.begin()
    if cell.driver_choice.is_ours:
        module = f"/lib/modules/$(uname -r)/{MODULE_NAME}.ko"
        again = f"rmmod {MODULE_NAME} && insmod {module} {shlex.join(driver_parameters(cell))}"
        guest.run(again, _COMMAND_TIMEOUT_S).check()
    mount = f"mkdir -p {_MOUNT_POINT} && mount -t virtiofs {server.tag} {_MOUNT_POINT}"
    guest.run(mount, _COMMAND_TIMEOUT_S).check()
    try:
        _agreed(server, result)
        watcher = _Watcher(guest, server, result)
        try:
            count = experiment.count if experiment.workload in MEASURED else 0
            deadline = Deadline(_CELL_TIMEOUT_S, count, _CHANGE_TIMEOUT_S)
            acts = deadline.each(WORKLOADS[experiment.workload](experiment.count, experiment.names))
            if experiment.workload in MEASURED:
                _measure(experiment, watcher, acts, place, result, server)
            else:
                result.steps = list(_steps(watcher, acts, place))
        finally:
            watcher.close()
    finally:
        guest.run(f"cd / && umount {_MOUNT_POINT}", _COMMAND_TIMEOUT_S).check()


def _agreed(server: LabServer, result: CellResult) -> None:
    """What was agreed on, once the driver has asked; one that never asks is waited for a little."""
    deadline = time.monotonic() + _QUIET_S
    while True:
        told = server.stats()["guest"]
        agreed = told and told["fsnotify"]
        result.said = server.said()
        if agreed or time.monotonic() > deadline or any("refused" in line for line in result.said):
            break
        time.sleep(0.02)
    if not agreed:
        result.refused = next((line for line in result.said if "refused" in line), "")
        return
    result.flags = [flag.lower() for flag in agreed["flags"]]
    result.notify_buf_size = agreed["notify_buf_size_bytes"]
    result.way = next((way for way in ("virtqueue", "parked") if way in result.flags), "none")


class _Watcher:
    """inotifywait in the guest, on the workload's directories."""

    def __init__(self, guest: Guest, server: LabServer, result: CellResult) -> None:
        self._guest = guest
        self._server = server
        self._place = server.directory
        self._losses = 0
        self._is_told = result.way != "none"
        self._fences = itertools.count()
        self._seen = 0
        directories = " ".join(f"{_MOUNT_POINT}/{name}" for name in (*WATCHED, "fence"))
        guest.run(f"cat {_MOUNT_POINT}/{KNOWN}", _COMMAND_TIMEOUT_S).check()
        command = f"exec inotifywait -m -e {_EVENTS} --format '%c %e %w %f' {directories}"
        self._running: RunningCommand = guest.start(command)
        self._running.wait_for_output("Watches established", _WATCHER_TIMEOUT_S, "stderr")

    def take(self) -> tuple[str, ...]:
        """What was told since the last time, in the words of the host's watcher."""
        mark = str(next(self._fences))
        if self._is_told:
            os.mknod(self._place / "fence" / mark)
            wait_s = _STEP_TIMEOUT_S
        else:
            wait_s = 0.0
        deadline = time.monotonic() + wait_s
        lines = self._lines()
        while not any(line.endswith(f"/fence/ {mark}") for line in lines) and time.monotonic() < deadline:
            time.sleep(0.01)
            lines = self._lines()
        new, self._seen = lines[self._seen :], len(lines)
        told = [parsed for parsed in map(_parse, new) if parsed is not None]
        return paired([*told, *[(LOSS, 0)] * self._new_losses()])

    def _new_losses(self) -> int:
        """inotifywait keeps IN_Q_OVERFLOW to itself, so the driver is asked, if the server has told any."""
        if not self._is_told or not self._server.stats()["events"]["counters"]["overflows"]:
            return 0
        counted = self._guest.run(f"cat {_COUNTERS}/overflows", _COMMAND_TIMEOUT_S).check().text
        before, self._losses = self._losses, sum(map(int, counted.split()))
        return self._losses - before

    def _lines(self) -> list[str]:
        text = self._running.stdout.decode(errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()

    def close(self) -> None:
        self._running.send_signal(15)
        self._running.wait(_COMMAND_TIMEOUT_S)


def _parse(line: str) -> tuple[str, int] | None:
    """`COOKIE EVENTS DIRECTORY NAME` as a word and its cookie; nothing for the mark's directory."""
    cookie, _, rest = line.partition(" ")
    events, _, rest = rest.partition(" ")
    directory, _, name = rest.partition(" ")
    directory = directory.rstrip("/").rpartition("/")[2]
    if directory not in WATCHED:
        return None
    words = [word for word in events.split(",") if word != "CLOSE"]
    return f"{'|'.join(words)} {directory}{'/' if name else ''}{name}", int(cookie or "0", 16)


def _steps(watcher: _Watcher, acts: Iterator[Act], place: Path) -> Iterator[Step]:
    native = HostWatcher(place)
    try:
        for act in acts:
            act.do(place)
            yield Step(act.label, native.take(), watcher.take())
    finally:
        native.close()


def _measure(
    experiment: Experiment,
    watcher: _Watcher,
    acts: Iterator[Act],
    place: Path,
    result: CellResult,
    server: LabServer,
) -> None:
    before = server.stats()["events"]["counters"]
    server.begin()
    started_s = time.perf_counter()
    told: list[str] = []
    for act in acts:
        act.do(place)
        if experiment.workload == "single":
            told += watcher.take()
    if experiment.workload == "burst":
        told += watcher.take()
    seconds = time.perf_counter() - started_s
    cpu_s = server.cpu_s()
    after = server.stats()["events"]["counters"]
    losses = told.count(LOSS)
    came = len(told) - losses
    result.figures |= {
        "told": came,
        "losses told": losses,
        "lost": after["lost"] - before["lost"],
        "events/s": round(came / seconds),
        "waited at most": after["max_depth"],
        "server us/event": round(1e6 * cpu_s / max(1, came), 1),
    }
