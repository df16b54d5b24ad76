# SPDX-License-Identifier: Apache-2.0
"""How long a change on the host takes to the guest's used ring, and to a bare reader of the same events.

Must not know how figures are shown (report.py).
Specification: docs/performance.md, "What is measured"; docs/protocol.md for events; fanotify(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

from tests.bench.figures import mount
from tests.bench.peers import Peer, running
from tests.bench.ring_load import Load, Row, Step, native_address
from vhostfs.events import source
from vhostfs.events.kernel import RunningKernel
from vhostfs.events.masks import FsEvent
from vhostfs.frontend import FuseClient, NotificationQueue
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import Event, Granted

_FORK = get_context("fork")
_INTERVAL_NS = 1_000_000
_BUFFERS = 256
"""So many changes are made before the driver gives their buffers back."""


@dataclass(frozen=True, slots=True)
class Latency:
    """From the end of the host's system call on, microseconds."""

    changes: int
    p50_us: float
    p99_us: float

    @classmethod
    def of(cls, latency_ns: Sequence[int]) -> Latency:
        ordered = sorted(latency_ns)
        count = len(ordered)
        return cls(count, ordered[count // 2] / 1000, ordered[int(count * 0.99)] / 1000)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Both by turns, on the same file system: to the used element, and to a process that only reads."""

    element: Latency
    bare: Latency


def latencies(
    watcher: Peer, plain: Peer, library: ctypes.CDLL, changes: int, *, with_load: bool, rounds: int = 3
) -> Latencies:
    """mknod(2) on the host 1,000 times a second in a directory that the guest, or the bare reader, watches.

    plain: the server whose guest does I/O while the bare reader is measured; it must have no events.
    """
    element: list[int] = []
    bare: list[int] = []
    for _ in range(rounds):
        element += _to_element(watcher, library, changes // rounds, with_load)
        bare += _to_bare_reader(plain, library, changes // rounds, with_load)
    return Latencies(Latency.of(element), Latency.of(bare))


@contextlib.contextmanager
def _guest_io(library: ctypes.CDLL, client: FuseClient, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    ended = threading.Event()
    load = Load(library, client, 4, lambda slot: Row((Step(op.getattr_(1)),)))

    def go_on() -> None:
        while not ended.is_set():
            load.run(0.05)
            time.sleep(0.01)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _change(
    library: ctypes.CDLL, directory_fd: int, first: int, count: int, seen: ctypes.c_void_p
) -> Sequence[int]:
    latency_ns = (ctypes.c_uint32 * count)()
    made = library.event_latency_run(directory_fd, first, count, _INTERVAL_NS, seen, latency_ns)
    if made != count:
        raise TimeoutError(f"change {first + made} was not seen within 5 s")
    return list(latency_ns)


def _to_element(peer: Peer, library: ctypes.CDLL, changes: int, with_load: bool) -> list[int]:
    found: list[int] = []
    with (
        tempfile.TemporaryDirectory(prefix="vhostfs-bench-share-") as place,
        running(peer, Path(place)) as server,
        contextlib.closing(mount(server, notifications=_BUFFERS)) as client,
    ):
        elements = NotificationQueue(client.vmm, buffers=_BUFFERS, poison=False)
        client.fsnotify_init(Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD, Event.CREATE)
        client.watch(1, Event.CREATE, 0)
        # Flags, then the index: virtio 1.2, 2.7.8.
        seen = ctypes.c_void_p(native_address(client.vmm.notification_queue.used.view) + 2)
        fd = os.open(place, os.O_RDONLY)
        try:
            with _guest_io(library, client, with_load):
                while len(found) < changes:
                    count = min(_BUFFERS, changes - len(found))
                    found += _change(library, fd, len(found), count, seen)
                    elements.receive(count)
        finally:
            os.close(fd)
    return found


def _bare_group(directory_fd: int) -> int:
    """One mark on the file system, as the server has."""
    kernel = RunningKernel()
    group_fd = kernel.fanotify_init(source.FAN_CLOEXEC | source.FAN_NONBLOCK | source.FAN_REPORT_DFID_NAME)
    if group_fd < 0:
        raise OSError(-group_fd, "fanotify_init")
    flags = source.FAN_MARK_ADD | source.FAN_MARK_FILESYSTEM
    error = kernel.fanotify_mark(group_fd, flags, FsEvent.CREATE | FsEvent.ISDIR, directory_fd)
    if error:
        raise OSError(-error, "fanotify_mark")
    return group_fd


def _to_bare_reader(peer: Peer, library: ctypes.CDLL, changes: int, with_load: bool) -> list[int]:
    with (
        tempfile.TemporaryDirectory(prefix="vhostfs-bench-share-") as share,
        tempfile.TemporaryDirectory(prefix="vhostfs-bench-bare-") as place,
        running(peer, Path(share)) as server,
        contextlib.closing(mount(server)) as client,
    ):
        fd = os.open(place, os.O_RDONLY)
        group_fd = _bare_group(fd)
        seen = RawValue(ctypes.c_uint16, 0)
        address = ctypes.c_void_p(ctypes.addressof(seen))
        reader = _FORK.Process(target=library.event_latency_read, args=(group_fd, fd, address), daemon=True)
        reader.start()
        try:
            while not seen.value:
                time.sleep(0.01)
            with _guest_io(library, client, with_load):
                return list(_change(library, fd, 0, changes, address))
        finally:
            reader.kill()
            reader.join()
            os.close(group_fd)
            os.close(fd)
