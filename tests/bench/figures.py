# SPDX-License-Identifier: Apache-2.0
"""Figures beside throughput: the first reply, memory for inodes, and how events travel.

Must not know how figures are shown (report.py).
Specification: docs/performance.md, "What is measured"; docs/protocol.md for events.
"""

from __future__ import annotations

import ctypes
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.bench.peers import Peer, Running, running
from tests.bench.ring_load import Copy, Field, FieldKind, Load, Row, Step, Taker
from vhostfs.frontend import FuseClient, Machine, NotificationQueue
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import NOTIFY_BUF_BYTES, Event, Granted
from vhostfs.frontend.vhost_user import U64, Message

FLAGS = abi.LINUX_7_FLAGS & ~abi.InitFlag.SECURITY_CTX & ~abi.InitFlag.CREATE_SUPP_GROUP
"""Without what would add extensions to requests that create."""
_FORK = get_context("fork")
_PER_DIRECTORY = 1000
_LISTED = 100


def mount(server: Running, *, notifications: int = 0, request_queues: int = 1) -> FuseClient:
    machine = Machine(region_bytes=256 << 20, queue_size=1024, request_queues=request_queues)
    if notifications:
        machine = machine.with_notifications(notifications)
    return FuseClient.mount(server.socket, machine, FLAGS)


@dataclass(frozen=True, slots=True)
class StartUp:
    """From the start of the process to the answer to its first message."""

    cpu_ms: float
    wall_ms: float


def start_up(peer: Peer, directory: Path, rounds: int) -> StartUp:
    cpu, wall = [], []
    for _ in range(rounds):
        started_s = time.monotonic()
        with running(peer, directory) as server, socket.socket(socket.AF_UNIX) as connection:
            while True:
                try:
                    connection.connect(str(server.socket))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.002)
            connection.sendall(int(Message.GET_FEATURES).to_bytes(4, "little") + b"\1\0\0\0" + bytes(4))
            connection.recv(12 + U64.size)
            wall.append((time.monotonic() - started_s) * 1000)
            cpu.append(server.cpu_s() * 1000)
    return StartUp(statistics.median(cpu), statistics.median(wall))


@dataclass(frozen=True, slots=True)
class Memory:
    """Private bytes of the server."""

    inodes: int
    at_rest: int
    with_inodes: int
    after_flood: int
    flood: int  # lookups that were forgotten at once

    @property
    def bytes_an_inode(self) -> float:
        return (self.with_inodes - self.at_rest) / self.inodes


def _make_tree(directory: Path, inodes: int) -> None:
    for parent in range(inodes // _PER_DIRECTORY):
        place = directory / f"{parent:05}"
        if place.exists():
            continue
        unfinished = directory / "unfinished"
        unfinished.mkdir(exist_ok=True)
        for child in range(_PER_DIRECTORY):
            os.mknod(unfinished / f"{child:04}")
        unfinished.rename(place)


def memory(peer: Peer, directory: Path, inodes: int, library: ctypes.CDLL) -> Memory:
    """So many files are looked up and held; then those of one directory, and forgotten, over and over."""
    _make_tree(directory, inodes)
    with running(peer, directory) as server:
        client = mount(server)
        client.walk("00000/0000")
        at_rest = server.private_bytes()
        names = [f"{child:04}".encode() + b"\0" for child in range(_PER_DIRECTORY)]
        for parent in range(inodes // _PER_DIRECTORY):
            node = client.lookup(1, f"{parent:05}").nodeid
            steps = [client.session.submit(op.lookup(node, name[:-1])) for name in names[:100]]
            for pending in steps:
                pending.wait()
            for start in range(100, _PER_DIRECTORY, 100):
                batch = [
                    client.session.submit(op.lookup(node, name[:-1])) for name in names[start : start + 100]
                ]
                for pending in batch:
                    pending.wait()
        with_inodes = server.private_bytes()
        client.close()
    with running(peer, directory) as server:
        client = mount(server)
        node = client.lookup(1, "00000").nodeid
        copies = [Copy(0, 16, 1, 16)]
        row = Row((Step(op.lookup(node, "0000")), Step(op.forget(0))), copies)
        load = Load(
            library, client, 16, lambda slot: row, [Field(FieldKind.TABLE, 0, 0, len(names), table=names)]
        )
        load.run(0.2)
        before = server.private_bytes()
        flood = load.run(2.0).rows
        after = at_rest + server.private_bytes() - before
        client.close()
    return Memory(inodes, at_rest, with_inodes, after, flood)


@dataclass(frozen=True, slots=True)
class Queues:
    """READDIRPLUS of 100 entries, 16 in flight on each queue: how many a second, by the number of queues."""

    a_second: Mapping[int, float]


def queues(peer: Peer, directory: Path, library: ctypes.CDLL, counts: Sequence[int]) -> Queues:
    """Each queue has a driver's thread and a directory of its own: listings by one handle are in turn."""
    for i in range(max(counts)):
        for number in range(_LISTED):
            (directory / f"queue{i}").mkdir(exist_ok=True)
            (directory / f"queue{i}" / f"{number:04}").touch()
    found = {}
    for count in counts:
        with running(peer, directory) as server:
            client = mount(server, request_queues=count)
            rows = []
            for i in range(count):
                node = client.walk(f"queue{i}").nodeid
                rows.append(Row([Step(op.readdirplus(node, client.opendir(node).fh, 0, 32 << 10))]))
            found[count] = _rows_a_second(library, client, rows)
            client.close()
    return Queues(found)


def _always(row: Row) -> Callable[[int], Row]:
    return lambda slot: row


def _rows_a_second(library: ctypes.CDLL, client: FuseClient, rows: Sequence[Row]) -> float:
    """rows: one of each queue, over and over."""
    loads = [Load(library, client, 16, _always(row), queue=i) for i, row in enumerate(rows)]
    with ThreadPoolExecutor(len(rows)) as threads:
        seen = list(threads.map(lambda load: load.run(1.0), loads))
    return sum((one.rows_a_second for one in seen), 0.0)


@dataclass(frozen=True, slots=True)
class Burst:
    """Changes as fast as a process can make them, in a directory that the guest watches."""

    changes: int
    delivered: int
    losses: int
    a_second: float
    changes_a_second: float


def _in_child(work: Callable[[], None]) -> None:
    child = _FORK.Process(target=work)
    child.start()
    child.join()


def event_burst(peer: Peer, library: ctypes.CDLL, changes: int) -> Burst:
    with (
        tempfile.TemporaryDirectory(prefix="vhostfs-bench-share-") as place,
        running(peer, Path(place)) as server,
    ):
        for i in range(_PER_DIRECTORY):
            (Path(place) / f"{i:04}").touch()
        client = mount(server, notifications=1024)
        taker = Taker(library, client, 1024, NOTIFY_BUF_BYTES)
        client.fsnotify_init(Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD, Event.ATTRIB)
        client.watch(1, Event.ATTRIB | Event.EVENT_ON_CHILD, 0)
        spent = _FORK.Value(ctypes.c_double, 0.0)

        def change() -> None:
            fd = os.open(place, os.O_RDONLY)
            names = [f"{i:04}" for i in range(_PER_DIRECTORY)]
            started_s = time.monotonic()
            for turn in range(changes // _PER_DIRECTORY):
                for name in names:
                    os.chmod(name, 0o600 + turn % 2, dir_fd=fd)
            spent.value = time.monotonic() - started_s

        child = _FORK.Process(target=change)
        child.start()
        delivered, elapsed_s, losses = taker.take(changes, Event.Q_OVERFLOW)
        child.join()
        client.close()
    return Burst(changes, delivered, losses, delivered / elapsed_s, changes / spent.value)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Changes elsewhere on the file system while the guest watches its share."""

    a_second: float
    processors: float


def foreign_events(peer: Peer, duration_s: float) -> Foreign:
    with (
        tempfile.TemporaryDirectory(prefix="vhostfs-bench-share-") as place,
        tempfile.TemporaryDirectory(prefix="vhostfs-bench-elsewhere-") as elsewhere,
        running(peer, Path(place)) as server,
    ):
        client = mount(server, notifications=64)
        NotificationQueue(client.vmm, buffers=32, poison=False)
        client.fsnotify_init(Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD, Event.CREATE)
        client.watch(1, Event.CREATE, 0)
        made = _FORK.Value(ctypes.c_uint64, 0)

        def change() -> None:
            fd = os.open(elsewhere, os.O_RDONLY)
            names = [f"{i:04}" for i in range(_PER_DIRECTORY)]
            for name in names:
                os.mknod(name, dir_fd=fd)
            deadline_s = time.monotonic() + duration_s
            turn = 0
            while time.monotonic() < deadline_s:
                turn += 1
                for name in names:
                    os.chmod(name, 0o600 + turn % 2, dir_fd=fd)
            made.value = turn * _PER_DIRECTORY

        before_s, started_s = server.cpu_s(), time.monotonic()
        _in_child(change)
        elapsed_s = time.monotonic() - started_s
        time.sleep(0.3)
        spent_s = server.cpu_s() - before_s
        client.close()
    return Foreign(made.value / elapsed_s, spent_s / elapsed_s)
