# SPDX-License-Identifier: Apache-2.0
"""Drivers that break the rules of the notification queue or of WATCH: only their own events suffer.

Must not test request queues; test_malformed_ring.py does.
Specification: docs/protocol.md, "Security considerations"; virtio 1.2, sections 2.6 and 2.7.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from tests.limits import HANG_S
from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import NOTIFYING, WATCHED, EventGuest
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import Feature, FuseClient, Machine, Session, Virtqueue
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import Event
from vhostfs.frontend.memory import GuestBuffer
from vhostfs.frontend.ring import DESCRIPTOR, F_INDIRECT, F_NEXT, F_WRITE
from vhostfs.frontend.session import FuseError

pytestmark = pytest.mark.usefixtures("ours")

GROWTH_LIMIT_BYTES = 64 << 20
MAX_LOG_BYTES = 4096
DIRECT = replace(
    NOTIFYING,
    features=Feature.VERSION_1 | Feature.EVENT_IDX | Feature.FS_NOTIFICATION,
    notification_queue_size=16,
)
INDIRECT = replace(NOTIFYING, notification_queue_size=16)


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    share = start_share(make_share, FILESYSTEM_MARK)
    (share.path / "d").mkdir()
    return share


class Bench:
    """A guest that watches `d`, and the means to write chains of the notification queue by hand."""

    def __init__(self, share: Share, machine: Machine) -> None:
        self.share = share
        self.guest = EventGuest(share, machine=machine, buffers=1)
        self.guest.watch("d")
        # The one sound buffer is taken back by the element of a change that nobody waits for.
        self.guest.notification_queue.give_back = False
        os.mknod(share.path / "d/first")
        self.guest.notification_queue.take()
        self.queue: Virtqueue = self.guest.notification_queue.queue
        self.buffer: GuestBuffer = self.guest.fs.vmm.memory.allocate(4096)

    def descriptor(self, index: int, addr: int, size: int, flags: int = F_WRITE, nxt: int = 0) -> None:
        self.queue.put_descriptor(index, addr, size, flags, nxt)

    def sound(self, index: int) -> None:
        self.descriptor(index, self.buffer.guest_addr, 320)

    def table(self, *entries: tuple[int, int, int, int]) -> GuestBuffer:
        table = self.guest.fs.vmm.memory.allocate(16 * max(1, len(entries)))
        for i, entry in enumerate(entries):
            DESCRIPTOR.pack_into(table.view, 16 * i, *entry)
        return table

    def offer(self, head: int) -> None:
        self.queue.put_available(self.queue.avail_index, head)
        self.queue.set_available_index(self.queue.avail_index + 1)
        self.queue.kick()

    def restart(self) -> list[str]:
        """The driver resets the queue and does it right from now on; what it is told then."""
        guest, vmm = self.guest, self.guest.fs.vmm
        vmm.stop_queue(1)
        self.queue.reset()
        guest.notification_queue.forget_buffers()
        vmm.set_queue(1, self.queue)
        vmm.enable_queue(1)
        guest.notification_queue.give_back = True
        guest.notification_queue.offer(8)
        return guest.told()


@pytest.fixture
def direct(share: Share) -> Bench:
    return Bench(share, DIRECT)


@pytest.fixture
def indirect(share: Share) -> Bench:
    return Bench(share, INDIRECT)


Fault = Callable[[Bench], None]


def _too_small(size: int) -> Fault:
    def fault(b: Bench) -> None:
        b.descriptor(0, b.buffer.guest_addr, size)
        b.offer(0)

    fault.__name__ = f"_a_buffer_of_{size}_bytes"
    return fault


def _too_small_in_pieces(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 16, F_WRITE | F_NEXT, 1)
    b.descriptor(1, b.buffer.guest_addr + 16, 303)
    b.offer(0)


def _readable(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 320, 0)
    b.offer(0)


def _partly_readable(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 16, F_NEXT, 1)
    b.descriptor(1, b.buffer.guest_addr + 64, 320)
    b.offer(0)


def _readable_behind_writable(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 320, F_WRITE | F_NEXT, 1)
    b.descriptor(1, b.buffer.guest_addr + 512, 16, 0)
    b.offer(0)


def _address_in_no_region(b: Bench) -> None:
    b.descriptor(0, 0xDEAD_0000_0000, 320)
    b.offer(0)


def _address_that_wraps(b: Bench) -> None:
    b.descriptor(0, (1 << 64) - 16, 320)
    b.offer(0)


def _beyond_the_region(b: Bench) -> None:
    region = b.guest.fs.vmm.memory.regions[0]
    b.descriptor(0, region.guest_addr + region.size_bytes - 100, 320)
    b.offer(0)


def _length_of_4_gib(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 0xFFFFFFFF)
    b.offer(0)


def _loop(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 8, F_WRITE | F_NEXT, 1)
    b.descriptor(1, b.buffer.guest_addr, 8, F_WRITE | F_NEXT, 0)
    b.offer(0)


def _next_outside(b: Bench) -> None:
    b.descriptor(0, b.buffer.guest_addr, 320, F_WRITE | F_NEXT, 16)
    b.offer(0)


def _head_outside(b: Bench) -> None:
    b.offer(16)


def _head_far_outside(b: Bench) -> None:
    b.offer(65535)


def _index_jumps_too_far(b: Bench) -> None:
    b.sound(0)
    b.queue.set_available_index(b.queue.avail_index + 17)
    b.queue.kick()


def _index_goes_back(b: Bench) -> None:
    b.queue.set_available_index(b.queue.avail_index - 1)
    b.queue.kick()


def _indirect_although_not_negotiated(b: Bench) -> None:
    table = b.table((b.buffer.guest_addr, 320, F_WRITE, 0))
    b.descriptor(0, table.guest_addr, 16, F_INDIRECT)
    b.offer(0)


FAULTS = [
    *map(_too_small, (0, 1, 16, 63, 64, 65, 319)),
    _too_small_in_pieces,
    _readable,
    _partly_readable,
    _readable_behind_writable,
    _address_in_no_region,
    _address_that_wraps,
    _beyond_the_region,
    _length_of_4_gib,
    _loop,
    _next_outside,
    _head_outside,
    _head_far_outside,
    _index_jumps_too_far,
    _index_goes_back,
    _indirect_although_not_negotiated,
]


def _indirect_table_in_no_region(b: Bench) -> None:
    b.descriptor(0, 0xDEAD_0000_0000, 32, F_INDIRECT)
    b.offer(0)


def _indirect_of_odd_size(b: Bench) -> None:
    table = b.table((b.buffer.guest_addr, 320, F_WRITE, 0))
    b.descriptor(0, table.guest_addr, 17, F_INDIRECT)
    b.offer(0)


def _indirect_loop(b: Bench) -> None:
    table = b.table(
        (b.buffer.guest_addr, 1, F_WRITE | F_NEXT, 1), (b.buffer.guest_addr, 1, F_WRITE | F_NEXT, 0)
    )
    b.descriptor(0, table.guest_addr, 32, F_INDIRECT)
    b.offer(0)


def _indirect_within_indirect(b: Bench) -> None:
    inner = b.table((b.buffer.guest_addr, 320, F_WRITE, 0))
    table = b.table((inner.guest_addr, 16, F_INDIRECT, 0))
    b.descriptor(0, table.guest_addr, 16, F_INDIRECT)
    b.offer(0)


def _indirect_too_small(b: Bench) -> None:
    table = b.table((b.buffer.guest_addr, 319, F_WRITE, 0))
    b.descriptor(0, table.guest_addr, 16, F_INDIRECT)
    b.offer(0)


INDIRECT_FAULTS = [
    _indirect_table_in_no_region,
    _indirect_of_odd_size,
    _indirect_loop,
    _indirect_within_indirect,
    _indirect_too_small,
]


def fault_name(fault: Fault) -> str:
    return fault.__name__.removeprefix("_").replace("_", " ")


def check_fault(bench: Bench, fault: Fault) -> None:
    """The queue stops, is said to be broken once, and does not take the others along."""
    share, fs = bench.share, bench.guest.fs
    fault(bench)
    expected = []
    for i in range(20):
        os.mknod(share.path / f"d/{i}")
        expected.append(f"CREATE d[{i}]")
    assert bench.queue.error_signalled(HANG_S), "the driver was not told that its queue is broken"
    assert fs.getattr(fs.root).nlink >= 2
    assert awaited(lambda: "queue 1 stopped" in share.log())
    assert len(share.log()) < MAX_LOG_BYTES
    assert bench.restart() == expected, "what waited is told once the queue is in order"


@pytest.mark.parametrize("fault", FAULTS, ids=fault_name)
def test_a_broken_notification_queue_stops_alone_and_can_start_again(direct: Bench, fault: Fault) -> None:
    check_fault(direct, fault)


@pytest.mark.parametrize("fault", INDIRECT_FAULTS, ids=fault_name)
def test_a_broken_indirect_buffer_stops_the_queue_alone(indirect: Bench, fault: Fault) -> None:
    check_fault(indirect, fault)


def test_a_buffer_over_the_ring_itself_hurts_only_the_guest(direct: Bench) -> None:
    for part in (direct.queue.used, direct.queue.table, direct.queue.available):
        direct.descriptor(0, part.guest_addr, 320)
        direct.offer(0)
        for i in range(20):
            os.mknod(direct.share.path / f"d/{part.guest_addr}-{i}")
    assert direct.guest.fs.getattr(direct.guest.fs.root).nlink >= 2
    assert direct.share.serves()


def test_a_buffer_given_many_times_at_once_is_the_guests_own_trouble(direct: Bench) -> None:
    direct.sound(0)
    for _ in range(16):
        direct.queue.put_available(direct.queue.avail_index, 0)
        direct.queue.set_available_index(direct.queue.avail_index + 1)
    direct.queue.kick()
    for i in range(40):
        os.mknod(direct.share.path / f"d/{i}")
    assert direct.guest.fs.getattr(direct.guest.fs.root).nlink >= 2
    assert direct.share.serves()


def test_buffers_in_memory_that_was_taken_away_stop_the_queue(share: Share) -> None:
    guest = EventGuest(share, buffers=1)
    guest.watch("d")
    vmm = guest.fs.vmm
    region = vmm.plug_memory(8 << 30, 1 << 20)
    queue = guest.notification_queue.queue
    guest.notification_queue.give_back = False
    os.mknod(share.path / "d/first")
    guest.notification_queue.take()
    queue.put_descriptor(0, region.guest_addr + 4096, 320, F_WRITE)
    queue.put_available(queue.avail_index, 0)
    queue.set_available_index(queue.avail_index + 1)
    vmm.remove_region(region)
    queue.kick()
    os.mknod(share.path / "d/second")
    assert queue.error_signalled(HANG_S)
    share.unmount()
    assert share.serves()


def test_descriptors_that_change_while_they_are_used_do_no_harm(share: Share) -> None:
    guest = EventGuest(share, machine=DIRECT, buffers=1)
    guest.watch("d")
    guest.notification_queue.give_back = False
    queue = guest.notification_queue.queue
    buffer = guest.fs.vmm.memory.allocate(4096)
    good = DESCRIPTOR.pack(buffer.guest_addr, 320, F_WRITE, 0)
    bad = DESCRIPTOR.pack(0xDEAD_0000_0000, 0xFFFFFFFF, F_NEXT, 0xFFFF)
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            queue.table.view[:16] = bad
            queue.table.view[:16] = good

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for i in range(300):
            queue.put_available(queue.avail_index, 0)
            queue.set_available_index(queue.avail_index + 1)
            queue.kick()
            os.mknod(share.path / f"d/{i}")
            if queue.error_signalled(0):
                break
    finally:
        stop.set()
        thread.join()
    assert guest.fs.getattr(guest.fs.root).nlink >= 2
    share.unmount()
    assert share.serves()


def test_requests_on_the_notification_queue_are_not_served(share: Share) -> None:
    """A driver that acks the bit but numbers its queues as if it had not."""
    session = share.boot(NOTIFYING)
    lost = session.submit(op.init(), queue=session.vmm.notification_queue)
    fs = FuseClient(session)
    fs.init()
    answer = fs.fsnotify_init()
    fs.root = fs.walk(share.relative).nodeid
    entry = fs.lookup(fs.root, "d")
    fs.watch(entry.nodeid, WATCHED, entry.generation)
    os.mknod(share.path / "d/new")
    assert answer.flags
    assert session.vmm.notification_queue.error_signalled(HANG_S)
    assert not lost.done
    assert fs.getattr(fs.root).nlink >= 2


# ---- WATCH -----------------------------------------------------------------------------------------------


def test_a_flood_of_watches_ends_at_the_quota(make_share: MakeShare) -> None:
    quota, objects = 500, 800
    share = start_share(make_share, FILESYSTEM_MARK, f"--max-watches={quota}", private=True)
    for i in range(objects):
        (share.path / str(i)).mkdir()
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init()
    entries = [fs.lookup(fs.root, str(i)) for i in range(objects)]
    resident = share.server.resident_bytes()
    for turn in range(5):
        refusals = 0
        for entry in entries:
            try:
                # Also bits that need a mark of their own on each.
                fs.watch(entry.nodeid, WATCHED | Event.OPEN * (turn % 2), entry.generation)
            except FuseError as error:
                assert error.errno == errno.ENOSPC
                refusals += 1
        assert refusals == objects - quota
        for entry in entries:
            fs.watch(entry.nodeid, 0, entry.generation)
    assert share.server.resident_bytes() - resident < GROWTH_LIMIT_BYTES
    for entry in entries[:quota]:
        fs.watch(entry.nodeid, Event.CREATE, entry.generation)
    fs.batch_forget([(entry.nodeid, 1) for entry in entries])
    assert fs.getattr(fs.root).nlink >= 2


def test_watches_of_any_mask_are_survived(share: Share) -> None:
    rng = random.Random(3)
    for i in range(8):
        (share.path / f"d/{i}").mkdir()
        (share.path / f"f{i}").touch()
    guest = EventGuest(share)
    guest.hold("d", *(f"d/{i}" for i in range(8)), *(f"f{i}" for i in range(8)))
    for turn in range(150):
        path = rng.choice(["d", f"d/{rng.randrange(8)}", f"f{rng.randrange(8)}"])
        node = guest.node(path)
        mask = rng.choice((rng.getrandbits(64), 1 << rng.randrange(64), (1 << 64) - 1, 0))
        guest.fs.watch(node.nodeid, mask, node.generation)
        os.mknod(share.path / f"d/{rng.randrange(8)}/{turn}")
        os.utime(share.path / f"f{rng.randrange(8)}")
        os.listdir(share.path / "d")
    guest.told()  # every element has been looked at for rules that it breaks
    guest.watch("d", Event.CREATE)
    os.mknod(share.path / "d/new")
    assert "CREATE d[new]" in guest.told()


@pytest.fixture
def busy_host(share: Share) -> Iterator[None]:
    """Somebody changes things on the host all the time."""
    stop = threading.Event()

    def disturb() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            path = share.path / f"d/{i % 50}"
            with suppress(OSError):
                path.mkdir()
                path.rename(share.path / f"d/{i % 50}-renamed")
                (share.path / f"d/{i % 50}-renamed").rmdir()

    thread = threading.Thread(target=disturb)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("busy_host")
def test_watches_and_forgets_race_with_events(share: Share) -> None:
    """Objects come and go on the host while the guest looks them up, watches and forgets them."""
    guest = EventGuest(share, buffers=4, poison=False)
    guest.watch("d")
    fs, d = guest.fs, guest.node("d").nodeid
    for i in range(1500):
        with suppress(FuseError):
            entry = fs.lookup(d, str(i % 50))
            with suppress(FuseError):
                fs.watch(entry.nodeid, WATCHED, entry.generation)
            fs.forget(entry.nodeid)
        while guest.notification_queue.poll() is not None:
            pass
    assert fs.getattr(fs.root).nlink >= 2


@pytest.mark.usefixtures("busy_host")
def test_sessions_begin_and_end_under_events(share: Share) -> None:
    session: Session = share.boot(NOTIFYING)
    fs = FuseClient(session)
    for _ in range(60):
        fs.init()
        fs.fsnotify_init()
        fs.root = abi.ROOT
        root = fs.walk(f"{share.relative}/d")
        fs.call(wire.watch(root.nodeid, WATCHED, root.generation))
    assert fs.getattr(root.nodeid).nlink >= 2
