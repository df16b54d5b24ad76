# SPDX-License-Identifier: Apache-2.0
"""Lays rows of FUSE requests out in guest memory and has the C loop of ring_load.c send them.

Must not know which operations are worth measuring (workloads.py) or how servers are started (peers.py).
Specification: virtio 1.2, section 2.7; the layout of requests is that of Linux' fs/fuse/virtio_fs.c.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostfs.frontend import FuseClient
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend.memory import PAGE_BYTES, GuestMemory
from vhostfs.frontend.operations import Call
from vhostfs.frontend.ring import DESCRIPTOR, F_NEXT, F_WRITE, Virtqueue

_SOURCES = [Path(__file__).with_name(name) for name in ("ring_load.c", "event_latency.c")]
_LATENCIES = 1 << 20

IN_HEADER_BYTES = abi.IN_HEADER.size
OUT_HEADER_BYTES = abi.OUT_HEADER.size


class LoadError(Exception):
    """A reply that is not what the workload expects, or none."""


class FieldKind(enum.IntEnum):
    """enum of ring_load.c: what is written into a request before a row begins."""

    SEQUENTIAL = 0
    RANDOM = 1
    TABLE = 2


@dataclass(frozen=True, slots=True)
class Field:
    """A value that changes from row to row; offset in bytes from the start of the request's arguments."""

    kind: FieldKind
    step: int
    offset: int
    count: int
    stride: int = 1
    table: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """From one step's reply to a later one's request; offsets in bytes from the start, headers included."""

    from_step: int
    from_offset: int
    to_step: int
    to_offset: int
    size: int = 8


@dataclass(frozen=True, slots=True)
class Step:
    """A request of a row; error: the errno that the reply must have."""

    call: Call[Any]
    error: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """What is measured as one operation: requests one after the other."""

    steps: Sequence[Step]
    copies: Sequence[Copy] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """One run."""

    rows: int
    elapsed_s: float
    p50_us: float
    p99_us: float
    kicks: int

    @property
    def rows_a_second(self) -> float:
        return self.rows / self.elapsed_s


class _Queue(ctypes.Structure):
    _fields_ = (
        ("desc", ctypes.c_void_p),
        ("avail", ctypes.c_void_p),
        ("used", ctypes.c_void_p),
        ("size", ctypes.c_uint32),
        ("kick_fd", ctypes.c_int),
        ("call_fd", ctypes.c_int),
        ("next_avail", ctypes.c_uint16),
        ("next_used", ctypes.c_uint16),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("request", ctypes.c_void_p),
        ("reply", ctypes.c_void_p),
        ("table", ctypes.c_uint64),
        ("table_size", ctypes.c_uint32),
        ("min_reply", ctypes.c_uint32),
        ("error", ctypes.c_int32),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
        ("table", ctypes.c_char_p),
    )


class _Copy(ctypes.Structure):
    _fields_ = (
        ("from_step", ctypes.c_uint32),
        ("from_offset", ctypes.c_uint32),
        ("to_step", ctypes.c_uint32),
        ("to_offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


class _Load(ctypes.Structure):
    _fields_ = (
        ("queue", _Queue),
        ("steps", ctypes.POINTER(_Step)),
        ("depth", ctypes.c_uint32),
        ("n_steps", ctypes.c_uint32),
        ("fields", ctypes.POINTER(_Field)),
        ("n_fields", ctypes.c_uint32),
        ("copies", ctypes.POINTER(_Copy)),
        ("n_copies", ctypes.c_uint32),
        ("row", ctypes.c_uint64),
        ("random", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("elapsed_ns", ctypes.c_uint64),
        ("kicks", ctypes.c_uint64),
        ("sleeps", ctypes.c_uint64),
        ("latency_ns", ctypes.POINTER(ctypes.c_uint32)),
        ("room", ctypes.c_uint64),
        ("n_latency", ctypes.c_uint64),
        ("bad_step", ctypes.c_int32),
        ("bad_error", ctypes.c_int32),
        ("bad_size", ctypes.c_uint32),
    )


def build_library(directory: Path) -> ctypes.CDLL:
    """Compiles the C files of this place into the directory, unless that was done before."""
    source = b"".join(path.read_bytes() for path in _SOURCES)
    library = directory / f"ring_load-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".new")
        command = [
            "cc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-D_GNU_SOURCE",
            "-shared",
            "-fPIC",
            "-o",
            str(unfinished),
        ]
        subprocess.run([*command, *map(str, _SOURCES)], check=True)
        unfinished.rename(library)
    loaded = ctypes.CDLL(str(library))
    loaded.ring_load_run.argtypes = [ctypes.POINTER(_Load), ctypes.c_uint64]
    loaded.ring_load_sort.argtypes = [ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64]
    loaded.ring_load_take.argtypes = [
        ctypes.POINTER(_Queue),
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
    ]
    loaded.ring_load_take.restype = ctypes.c_uint64
    loaded.event_latency_run.argtypes = [
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint32),
    ]
    loaded.event_latency_run.restype = ctypes.c_uint64
    loaded.event_latency_read.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return loaded


def native_address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _native_queue(queue: Virtqueue) -> _Queue:
    return _Queue(
        desc=native_address(queue.table.view),
        avail=native_address(queue.available.view),
        used=native_address(queue.used.view),
        size=queue.size,
        kick_fd=queue.kick_fd,
        call_fd=queue.call_fd,
        next_avail=queue.avail_index,
        next_used=queue.used_index,
    )


class _Pages:
    """Single pages of guest memory in no order, as a page cache has them."""

    def __init__(self, memory: GuestMemory, count: int) -> None:
        size = 1 << max(0, count - 1).bit_length() if count else 1
        block = memory.allocate(size * PAGE_BYTES, align=PAGE_BYTES, region=0)
        order = list(range(size))
        random.Random(count).shuffle(order)
        self._free = [block.guest_addr + page * PAGE_BYTES for page in order]

    def take(self, size_bytes: int) -> list[tuple[int, int]]:
        parts = []
        while size_bytes > 0:
            part = min(size_bytes, PAGE_BYTES)
            parts.append((self._free.pop(), part))
            size_bytes -= part
        return parts


def _pages_of(call: Call[Any]) -> int:
    data = [sum(map(len, call.payload)), call.data_room]
    return sum(-(-size // PAGE_BYTES) for size in data)


class Load:
    """`depth` rows in flight on a request queue of a mounted guest, which does nothing else there."""

    def __init__(
        self,
        library: ctypes.CDLL,
        client: FuseClient,
        depth: int,
        row: Callable[[int], Row],
        fields: Sequence[Field] = (),
        queue: int = 0,
    ) -> None:
        """row: of a slot, 0 to depth - 1. queue: which of the request queues."""
        self._library = library
        self._client = client
        self._queue = client.vmm.request_queue(queue)
        rows = [row(slot) for slot in range(depth)]
        n_steps = len(rows[0].steps)
        memory = client.vmm.memory
        pages = _Pages(memory, sum(_pages_of(step.call) for one in rows for step in one.steps))
        self._steps = (_Step * (depth * n_steps))()
        for slot, one in enumerate(rows):
            for i, step in enumerate(one.steps):
                self._steps[slot * n_steps + i] = self._lay_out(memory, pages, step)
        self._fields = (_Field * max(1, len(fields)))()
        self._tables = [b"".join(field.table) for field in fields]
        for i, field in enumerate(fields):
            size = len(field.table[0]) if field.table else 0
            self._fields[i] = _Field(
                kind=field.kind,
                step=field.step,
                offset=IN_HEADER_BYTES + field.offset,
                size=size,
                count=field.count,
                stride=field.stride,
                table=self._tables[i],
            )
        copies = rows[0].copies
        self._copies = (_Copy * max(1, len(copies)))()
        for i, one_copy in enumerate(copies):
            self._copies[i] = _Copy(
                one_copy.from_step, one_copy.from_offset, one_copy.to_step, one_copy.to_offset, one_copy.size
            )
        self._latency = (ctypes.c_uint32 * _LATENCIES)()
        self._native = _Load(
            steps=self._steps,
            depth=depth,
            n_steps=n_steps,
            fields=self._fields,
            n_fields=len(fields),
            copies=self._copies,
            n_copies=len(copies),
            random=0x9E3779B97F4A7C15,
            latency_ns=self._latency,
            room=_LATENCIES,
            bad_step=-1,
        )

    def _lay_out(self, memory: GuestMemory, pages: _Pages, step: Step) -> _Step:
        """The request and its indirect table: header and arguments, pages, header and reply, pages."""
        call = step.call
        payload = b"".join(bytes(part) for part in call.payload)
        size = IN_HEADER_BYTES + len(call.args) + len(payload)
        header = abi.IN_HEADER.pack(
            size, call.opcode, self._client.session.unique(), call.nodeid, 0, 0, 1, 0, 0
        )
        request = memory.allocate(len(header) + len(call.args))
        request.view[:] = header + call.args
        parts: list[tuple[int, int, bool]] = [(request.guest_addr, len(request), False)]
        for addr, part in pages.take(len(payload)):
            memory.at(addr, part)[:] = payload[:part]
            payload = payload[part:]
            parts.append((addr, part, False))
        reply = memory.allocate(OUT_HEADER_BYTES + call.reply_room)
        if call.has_reply:
            parts.append((reply.guest_addr, len(reply), True))
            parts += [(addr, part, True) for addr, part in pages.take(call.data_room)]
        table = memory.allocate(DESCRIPTOR.size * len(parts))
        for i, (addr, part, writable) in enumerate(parts):
            more = i + 1 < len(parts)
            flags = (F_WRITE if writable else 0) | (F_NEXT if more else 0)
            DESCRIPTOR.pack_into(table.view, DESCRIPTOR.size * i, addr, part, flags, i + 1 if more else 0)
        return _Step(
            request=native_address(request.view),
            reply=native_address(reply.view),
            table=table.guest_addr,
            table_size=len(table),
            min_reply=OUT_HEADER_BYTES if call.has_reply else 0,
            error=-step.error,
        )

    def run(self, duration_s: float) -> Measured:
        """Until the time is over and every row has ended; raises LoadError."""
        native = self._native
        native.queue = _native_queue(self._queue)
        result = self._library.ring_load_run(ctypes.byref(native), round(duration_s * 1e9))
        self._queue.avail_index = native.queue.next_avail
        self._queue.used_index = native.queue.next_used
        if result:
            raise LoadError(
                f"step {native.bad_step}: error {native.bad_error}, {native.bad_size} bytes"
                if native.bad_step >= 0
                else f"the rows came to a stop ({result})"
            )
        self._library.ring_load_sort(self._latency, native.n_latency)
        count = native.n_latency

        def percentile(share: float) -> float:
            return self._latency[min(count - 1, int(count * share))] / 1000 if count else float("nan")

        return Measured(native.rows, native.elapsed_ns / 1e9, percentile(0.5), percentile(0.99), native.kicks)


class Taker:
    """The driver's side of the notification queue in C: takes elements and gives their buffers back."""

    def __init__(self, library: ctypes.CDLL, client: FuseClient, buffers: int, size_bytes: int) -> None:
        self._library = library
        self._queue = client.vmm.notification_queue
        memory = client.vmm.memory
        self._views = [memory.allocate(size_bytes) for _ in range(buffers)]
        self._addresses = (ctypes.c_void_p * buffers)(*(native_address(one.view) for one in self._views))
        for i, one in enumerate(self._views):
            self._queue.put_descriptor(i, one.guest_addr, size_bytes, F_WRITE)
            self._queue.put_available(i, i)
        self._queue.set_available_index(buffers)
        self._queue.kick()
        self._native = _native_queue(self._queue)

    def take(self, count: int, lost_bit: int) -> tuple[int, float, int]:
        """How many came (fewer: then none for ten seconds), in how many seconds; how many told of a loss."""
        elapsed_ns, lost = ctypes.c_uint64(), ctypes.c_uint64()
        taken = self._library.ring_load_take(
            ctypes.byref(self._native),
            self._addresses,
            count,
            lost_bit,
            ctypes.byref(elapsed_ns),
            ctypes.byref(lost),
        )
        return int(taken), elapsed_ns.value / 1e9, int(lost.value)
