# SPDX-License-Identifier: Apache-2.0
"""Rings and chains that break the rules: the server survives, says so once, and serves the next front end.

Must not test FUSE contents. Specification: virtio 1.2, sections 2.6 and 2.7; the driver may be hostile.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import (
    ROOT,
    BackendGoneError,
    Feature,
    Framing,
    FuseClient,
    FuseError,
    Machine,
    ProtocolError,
    RingBrokenError,
    Virtqueue,
)
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.memory import GuestBuffer
from vhostfs.frontend.ring import DESCRIPTOR, F_INDIRECT, F_NEXT, F_WRITE
from vhostfs.frontend.session import Pending

DIRECT = Machine(features=Feature.VERSION_1 | Feature.EVENT_IDX)
MAX_LOG_BYTES = 4096


class Bench:
    """A mounted guest, and the means to write chains by hand."""

    def __init__(self, fs: FuseClient) -> None:
        self.fs = fs
        self.queue: Virtqueue = fs.vmm.request_queue()
        self.request: GuestBuffer = fs.vmm.memory.allocate(4096)
        self.reply: GuestBuffer = fs.vmm.memory.allocate(4096)
        header = abi.IN_HEADER.pack(56, abi.Opcode.GETATTR, 77, ROOT, 0, 0, 1, 0, 0)
        self.request.view[:56] = header + bytes(16)
        self.reply.view[:] = b"\xee" * 4096

    def descriptor(self, index: int, addr: int, size: int, flags: int = 0, nxt: int = 0) -> None:
        self.queue.put_descriptor(index, addr, size, flags, nxt)

    def read_part(self, index: int, nxt: int | None = None, size: int = 56) -> None:
        self.descriptor(index, self.request.guest_addr, size, 0 if nxt is None else F_NEXT, nxt or 0)

    def write_part(self, index: int, nxt: int | None = None, size: int = 4096) -> None:
        flags = F_WRITE | (0 if nxt is None else F_NEXT)
        self.descriptor(index, self.reply.guest_addr, size, flags, nxt or 0)

    def offer(self, head: int) -> None:
        self.queue.put_available(self.queue.avail_index, head)
        self.queue.set_available_index(self.queue.avail_index + 1)
        self.queue.kick()

    def table(self, *entries: tuple[int, int, int, int]) -> GuestBuffer:
        """An indirect table."""
        table = self.fs.vmm.memory.allocate(16 * max(1, len(entries)))
        for i, entry in enumerate(entries):
            DESCRIPTOR.pack_into(table.view, 16 * i, *entry)
        return table

    def settled(self) -> bool:
        """The device has used the chain, or reported the ring broken, or hung up."""

        def over() -> bool:
            try:
                self.fs.vmm.connection.closed_by_backend(0)
            except OSError:
                return True
            return (
                self.queue.device_used_index() != 0
                or self.queue.error_signalled(0)
                or self.fs.vmm.connection.closed_by_backend(0)
            )

        return awaited(over)


@pytest.fixture
def bench(share: Share) -> Bench:
    return Bench(share.mount(DIRECT))


@pytest.fixture
def indirect_bench(share: Share) -> Bench:
    return Bench(share.mount())


Fault = Callable[[Bench], None]


def _loop_of_one(b: Bench) -> None:
    b.read_part(0, nxt=0)
    b.offer(0)


def _loop_of_two(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.write_part(1, nxt=0)
    b.offer(0)


def _next_outside_the_table(b: Bench) -> None:
    b.read_part(0, nxt=b.queue.size)
    b.offer(0)


def _next_far_outside(b: Bench) -> None:
    b.read_part(0, nxt=65535)
    b.offer(0)


def _head_outside_the_table(b: Bench) -> None:
    b.offer(b.queue.size)


def _head_far_outside(b: Bench) -> None:
    b.offer(65535)


def _address_in_no_region(b: Bench) -> None:
    b.descriptor(0, 0xDEAD_0000_0000, 56, F_NEXT, 1)
    b.write_part(1)
    b.offer(0)


def _reply_in_no_region(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.descriptor(1, 0xDEAD_0000_0000, 4096, F_WRITE)
    b.offer(0)


def _buffer_beyond_the_region(b: Bench) -> None:
    end = b.fs.vmm.memory.regions[0]
    b.descriptor(0, end.guest_addr + end.size_bytes - 20, 56, F_NEXT, 1)
    b.write_part(1)
    b.offer(0)


def _address_that_wraps(b: Bench) -> None:
    b.descriptor(0, (1 << 64) - 16, 56, F_NEXT, 1)
    b.write_part(1)
    b.offer(0)


def _length_of_4_gib(b: Bench) -> None:
    b.descriptor(0, b.request.guest_addr, 0xFFFFFFFF, F_NEXT, 1)
    b.write_part(1)
    b.offer(0)


def _reply_of_4_gib(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.descriptor(1, b.reply.guest_addr, 0xFFFFFFFF, F_WRITE)
    b.offer(0)


def _empty_descriptors(b: Bench) -> None:
    b.read_part(0, nxt=1, size=0)
    b.write_part(1, size=0)
    b.offer(0)


def _readable_after_writable(b: Bench) -> None:
    b.write_part(0, nxt=1)
    b.read_part(1)
    b.offer(0)


def _readable_between_writable(b: Bench) -> None:
    b.read_part(0, nxt=1, size=40)
    b.write_part(1, nxt=2, size=16)
    b.descriptor(2, b.request.guest_addr + 40, 16, F_NEXT, 3)
    b.write_part(3)
    b.offer(0)


def _indirect_although_not_negotiated(b: Bench) -> None:
    table = b.table(
        (b.request.guest_addr, 56, F_NEXT, 1),
        (b.reply.guest_addr, 4096, F_WRITE, 0),
    )
    b.descriptor(0, table.guest_addr, 32, F_INDIRECT)
    b.offer(0)


def _unknown_flags(b: Bench) -> None:
    b.descriptor(0, b.request.guest_addr, 56, 0xFFF8 | F_NEXT, 1)
    b.write_part(1)
    b.offer(0)


def _available_index_jumps_too_far(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.write_part(1)
    b.queue.set_available_index(b.queue.avail_index + b.queue.size + 1)
    b.queue.kick()


def _available_index_jumps_by_half_the_range(b: Bench) -> None:
    b.queue.set_available_index(b.queue.avail_index + 32768)
    b.queue.kick()


def _available_index_goes_back(b: Bench) -> None:
    b.queue.set_available_index(b.queue.avail_index - 1)
    b.queue.kick()


def _the_same_head_many_times(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.write_part(1)
    for _ in range(b.queue.size):
        b.queue.put_available(b.queue.avail_index, 0)
        b.queue.set_available_index(b.queue.avail_index + 1)
    b.queue.kick()


def _a_chain_as_long_as_the_table_and_longer(b: Bench) -> None:
    """Every descriptor of the table, and the last one points back into the middle."""
    for i in range(b.queue.size):
        b.read_part(i, nxt=i + 1 if i + 1 < b.queue.size else b.queue.size // 2, size=1)
    b.offer(0)


def _the_ring_itself_as_reply(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.descriptor(1, b.queue.used.guest_addr, len(b.queue.used), F_WRITE)
    b.offer(0)


def _the_table_itself_as_reply(b: Bench) -> None:
    b.read_part(0, nxt=1)
    b.descriptor(1, b.queue.table.guest_addr, len(b.queue.table), F_WRITE)
    b.offer(0)


DIRECT_FAULTS: list[Fault] = [
    _loop_of_one,
    _loop_of_two,
    _next_outside_the_table,
    _next_far_outside,
    _head_outside_the_table,
    _head_far_outside,
    _address_in_no_region,
    _reply_in_no_region,
    _buffer_beyond_the_region,
    _address_that_wraps,
    _length_of_4_gib,
    _reply_of_4_gib,
    _empty_descriptors,
    _readable_after_writable,
    _readable_between_writable,
    _indirect_although_not_negotiated,
    _unknown_flags,
    _available_index_jumps_too_far,
    _available_index_jumps_by_half_the_range,
    _available_index_goes_back,
    _the_same_head_many_times,
    _a_chain_as_long_as_the_table_and_longer,
    _the_ring_itself_as_reply,
    _the_table_itself_as_reply,
]


def _name(fault: Fault) -> str:
    return fault.__name__.strip("_")


@pytest.mark.parametrize("fault", DIRECT_FAULTS, ids=_name)
def test_a_broken_ring_is_survived(share: Share, bench: Bench, fault: Fault, ours: None) -> None:
    fault(bench)
    assert bench.settled(), "neither used, nor reported, nor hung up"
    assert share.serves()
    assert len(share.log()) < MAX_LOG_BYTES


@pytest.mark.parametrize("fault", DIRECT_FAULTS, ids=_name)
def test_a_broken_hiprio_ring_is_survived(share: Share, bench: Bench, fault: Fault, ours: None) -> None:
    bench.queue = bench.fs.vmm.hiprio
    fault(bench)
    assert bench.settled()
    assert share.serves()


def _indirect_table_in_no_region(b: Bench) -> None:
    b.descriptor(0, 0xDEAD_0000_0000, 32, F_INDIRECT)
    b.offer(0)


def _indirect_table_of_size_zero(b: Bench) -> None:
    b.descriptor(0, b.table().guest_addr, 0, F_INDIRECT)
    b.offer(0)


def _indirect_table_of_odd_size(b: Bench) -> None:
    table = b.table((b.request.guest_addr, 56, F_NEXT, 1), (b.reply.guest_addr, 4096, F_WRITE, 0))
    b.descriptor(0, table.guest_addr, 31, F_INDIRECT)
    b.offer(0)


def _indirect_table_of_4_gib(b: Bench) -> None:
    table = b.table((b.request.guest_addr, 56, 0, 0))
    b.descriptor(0, table.guest_addr, 0xFFFFFFF0, F_INDIRECT)
    b.offer(0)


def _indirect_within_indirect(b: Bench) -> None:
    inner = b.table((b.request.guest_addr, 56, F_NEXT, 1), (b.reply.guest_addr, 4096, F_WRITE, 0))
    outer = b.table((inner.guest_addr, 32, F_INDIRECT, 0))
    b.descriptor(0, outer.guest_addr, 16, F_INDIRECT)
    b.offer(0)


def _indirect_with_next(b: Bench) -> None:
    table = b.table((b.request.guest_addr, 56, 0, 0))
    b.descriptor(0, table.guest_addr, 16, F_INDIRECT | F_NEXT, 1)
    b.write_part(1)
    b.offer(0)


def _indirect_with_write(b: Bench) -> None:
    table = b.table((b.request.guest_addr, 56, F_NEXT, 1), (b.reply.guest_addr, 4096, F_WRITE, 0))
    b.descriptor(0, table.guest_addr, 32, F_INDIRECT | F_WRITE)
    b.offer(0)


def _indirect_loop(b: Bench) -> None:
    table = b.table((b.request.guest_addr, 1, F_NEXT, 1), (b.request.guest_addr, 1, F_NEXT, 0))
    b.descriptor(0, table.guest_addr, 32, F_INDIRECT)
    b.offer(0)


def _indirect_next_outside(b: Bench) -> None:
    table = b.table((b.request.guest_addr, 56, F_NEXT, 9), (b.reply.guest_addr, 4096, F_WRITE, 0))
    b.descriptor(0, table.guest_addr, 32, F_INDIRECT)
    b.offer(0)


def _indirect_of_a_million_entries(b: Bench) -> None:
    """A table larger than any queue, each entry one byte."""
    count = 1 << 20
    table = b.fs.vmm.memory.allocate(16 * count)
    for i in range(0, count, 4096):
        chunk = b"".join(
            DESCRIPTOR.pack(b.request.guest_addr, 1, F_NEXT, (i + j + 1) & 0xFFFF) for j in range(4096)
        )
        table.view[16 * i : 16 * i + len(chunk)] = chunk
    b.descriptor(0, table.guest_addr, len(table), F_INDIRECT)
    b.offer(0)


@pytest.mark.parametrize(
    "fault",
    [
        _indirect_table_in_no_region,
        _indirect_table_of_size_zero,
        _indirect_table_of_odd_size,
        _indirect_table_of_4_gib,
        _indirect_within_indirect,
        _indirect_with_next,
        _indirect_with_write,
        _indirect_loop,
        _indirect_next_outside,
        _indirect_of_a_million_entries,
    ],
    ids=_name,
)
def test_a_broken_indirect_table_is_survived(
    share: Share, indirect_bench: Bench, fault: Fault, ours: None
) -> None:
    fault(indirect_bench)
    assert indirect_bench.settled()
    assert share.serves()
    assert len(share.log()) < MAX_LOG_BYTES


def test_another_queue_works_on_while_one_is_broken(make_share: MakeShare, ours: None) -> None:
    share = make_share()
    fs = share.mount(replace(DIRECT, request_queues=2))
    broken = Bench(fs)
    _loop_of_two(broken)
    assert broken.settled()
    try:
        assert fs.through(1).getattr(fs.root).nlink >= 2
    except (BackendGoneError, RingBrokenError):
        assert share.serves()


def test_a_fault_is_reported_on_the_error_descriptor_or_by_hanging_up(
    share: Share, bench: Bench, ours: None
) -> None:
    _next_far_outside(bench)
    assert awaited(lambda: bench.queue.error_signalled(0) or bench.fs.vmm.connection.closed_by_backend(0))
    assert awaited(lambda: "queue" in share.log())


def test_kicks_without_anything_new_are_harmless(share: Share, fs: FuseClient) -> None:
    for _ in range(2000):
        fs.vmm.request_queue().kick()
        fs.vmm.hiprio.kick()
    assert fs.getattr(fs.root).nlink >= 2
    for _ in range(200):
        fs.vmm.request_queue().kick()
        fs.getattr(fs.root)


def test_descriptors_that_change_while_they_are_used_do_no_harm(share: Share, ours: None) -> None:
    """What the server has checked it must not read again from memory that the guest can write."""
    fs = share.mount(DIRECT)
    bench = Bench(fs)
    stop = threading.Event()
    bad = struct.pack("<QIHH", 0xDEAD_0000_0000, 0xFFFFFFFF, F_NEXT | F_WRITE, 0xFFFF)

    def scribble() -> None:
        tables = bench.queue.table.view
        while not stop.is_set():
            for index in (2, 3):
                good = bytes(tables[16 * index : 16 * index + 16])
                tables[16 * index : 16 * index + 16] = bad
                tables[16 * index : 16 * index + 16] = good
            bench.request.view[0:4] = b"\xff\xff\xff\x7f"
            bench.request.view[0:4] = struct.pack("<I", 56)

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for i in range(300):
            bench.read_part(2, nxt=3)
            bench.write_part(3)
            used = bench.queue.device_used_index()
            bench.offer(2)
            gone = awaited(
                lambda used=used: (
                    bench.queue.device_used_index() != used  # type: ignore[misc]
                    or bench.queue.error_signalled(0)
                ),
                2,
            )
            if not gone or bench.queue.error_signalled(0):
                break
            assert i < 300
    finally:
        stop.set()
        thread.join()
    assert share.serves()


def test_a_reply_without_room_for_its_header_is_survived(share: Share, fs: FuseClient, ours: None) -> None:
    session = fs.session
    for room in (0, 1, 8, 15):
        call = op.getattr_(fs.root)
        unique = session.unique()
        header = abi.IN_HEADER.pack(56, call.opcode, unique, call.nodeid, 0, 0, 1, 0, 0)
        pending = session.submit_raw(call, unique, [header, call.args], [room], fs.vmm.request_queue())
        try:
            pending.payload()
        except (ProtocolError, BackendGoneError, RingBrokenError, FuseError):
            pass
        else:
            pytest.fail("a reply came through a buffer that cannot hold one")
        if pending.used is None or fs.vmm.request_queue().error_signalled(0):
            break
    assert share.serves()


@pytest.mark.parametrize(
    "call",
    [
        op.getattr_(ROOT),
        op.lookup(ROOT, "x"),
        op.statfs(ROOT),
        op.opendir(ROOT),
        op.statx(ROOT),
        op.create(ROOT, "x"),
        op.mkdir(ROOT, "y"),
    ],
    ids=["getattr", "lookup", "statfs", "opendir", "statx", "create", "mkdir"],
)
def test_a_reply_that_does_not_fit_is_an_error(
    share: Share, fs: FuseClient, call: op.Call[object], ours: None
) -> None:
    """The answer is longer than the guest's buffer: an errno that fits, and nothing beyond the buffer."""
    nodeid = fs.mkdir(fs.root, "x").nodeid if call.opcode == abi.Opcode.LOOKUP else 0
    small = replace(call, nodeid=fs.root, reply_room=8)
    pending: Pending[object] = fs.submit(small)
    with pytest.raises((FuseError, ProtocolError)):
        pending.wait()
    assert pending.used is not None
    assert pending.used.length_bytes <= 24
    if nodeid:
        fs.forget(nodeid)
    assert fs.getattr(fs.root).nlink >= 2


@pytest.mark.parametrize("cut", [1, 3, 7, 16, 40, 41])
def test_any_framing_of_a_good_request_is_served(share: Share, cut: int, ours: None) -> None:
    """virtio lets a driver cut a request anywhere, also within the headers."""
    fs = share.mount(replace(Machine(), queue_size=1024))
    fs.session.use(Framing(every_bytes=cut))
    entry, opened = fs.create(fs.root, "a")
    assert fs.write(entry.nodeid, opened.fh, b"0123456789" * 10) == 100
    assert fs.read(entry.nodeid, opened.fh, 100, 5) == (b"0123456789" * 10)[5:]
    assert fs.getattr(entry.nodeid).size == 100
    assert b"a" in fs.list(fs.root, 512)
    fs.forget(entry.nodeid, 0)


def test_a_buffer_across_two_adjoining_regions_is_served(share: Share, ours: None) -> None:
    """Guest memory that is contiguous to the guest may come in two regions."""
    size = 4 << 20
    fs = share.mount(Machine(guest_addrs=(0x1000_0000, 0x1000_0000 + size), region_bytes=size))
    entry = fs.write_file(fs.root, "a", bytes(range(256)) * 16)
    fh = fs.open(entry.nodeid).fh
    bench = Bench(fs)
    header = abi.IN_HEADER.pack(80, abi.Opcode.READ, 99, entry.nodeid, 0, 0, 1, 0, 0)
    bench.request.view[:80] = header + struct.pack("<QQIIQII", fh, 0, 4096, 0, 0, 0, 0)
    border = 0x1000_0000 + size
    queue = bench.queue
    bench.read_part(0, nxt=1, size=80)
    bench.descriptor(1, border - 1016, 16 + 4096, F_WRITE)
    queue.adopt(0, [0, 1])
    queue.publish(0)
    used = queue.wait_used(fs.vmm.connection.fileno())
    assert used.length_bytes == 16 + 4096
    memory = fs.vmm.memory
    data = bytes(memory.at(border - 1000, 1000)) + bytes(memory.at(border, 3096))
    assert data == bytes(range(256)) * 16
