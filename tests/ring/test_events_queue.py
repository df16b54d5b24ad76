# SPDX-License-Identifier: Apache-2.0
"""The notification queue as a driver may run it: any number and shape of buffers, late, slow, stopped.

Must not test which events come. Specification: docs/protocol.md, "The notification queue"; virtio 1.2, 2.7.
"""

from __future__ import annotations

import os
import select
from dataclasses import replace

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import event_counters
from tests.ring.event_sources import FILESYSTEM_MARK, SOURCES, Source, start_share
from tests.ring.events import NOTIFYING, EventGuest
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import Feature, Machine, NotificationQueue
from vhostfs.frontend.fsnotify import HEAD_BYTES, Event
from vhostfs.frontend.ring import AVAIL_F_NO_INTERRUPT

pytestmark = pytest.mark.usefixtures("ours")

PLAIN = Feature.VERSION_1 | Feature.FS_NOTIFICATION


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    share = start_share(make_share, FILESYSTEM_MARK)
    (share.path / "d").mkdir()
    return share


def make(share: Share, first: int, count: int) -> list[str]:
    """Numbered changes, and what the guest must be told of them."""
    for i in range(first, first + count):
        os.mknod(share.path / f"d/{i}")
    return [f"CREATE d[{i}]" for i in range(first, first + count)]


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event index"])
@pytest.mark.parametrize(
    "pieces",
    [(), (16, 48), (1, 14, 2, 46), (16, 48, 1, 1, 1), (7,) * 45],
    ids=["one piece", "as structs", "within fields", "within the name", "of 7 bytes"],
)
def test_a_buffer_may_be_cut_anywhere(
    share: Share, pieces: tuple[int, ...], event_idx: bool, indirect: bool
) -> None:
    features = PLAIN
    features |= Feature.EVENT_IDX if event_idx else Feature(0)
    features |= Feature.INDIRECT_DESC if indirect else Feature(0)
    machine = replace(NOTIFYING, features=features, notification_queue_size=256)
    guest = EventGuest(share, machine=machine, buffers=4, pieces=pieces)
    guest.watch("d")
    name = "".join(chr(ord("a") + i % 26) for i in range(255))
    os.mkdir(share.path / "d" / name)
    expected = make(share, 0, 12)
    assert guest.told() == [f"ISDIR|CREATE d[{name}]", *expected]


@pytest.mark.parametrize("buffers", [1, 2, 16, 256])
def test_any_number_of_buffers_carries_all_events(share: Share, buffers: int) -> None:
    machine = replace(NOTIFYING, notification_queue_size=buffers)
    guest = EventGuest(share, machine=machine, buffers=buffers)
    guest.watch("d")
    expected = make(share, 0, 300)
    assert guest.told() == expected


def test_a_larger_buffer_is_only_written_as_far_as_the_element_goes(share: Share) -> None:
    guest = EventGuest(share, buffers=0)
    for size in (320, 321, 4096, 65536):
        guest.notification_queue.size_bytes = size
        guest.notification_queue.offer(4)
    guest.watch("d")
    expected = make(share, 0, 64)
    assert guest.told() == expected


def test_an_element_takes_no_more_than_its_name_needs(share: Share) -> None:
    guest = EventGuest(share)
    guest.watch("d")
    guest.notification_queue.give_back = False
    os.mknod(share.path / "d/12345")
    used = guest.notification_queue.queue.wait_used(guest.fs.vmm.connection.fileno())
    assert used.length_bytes == HEAD_BYTES + 5


def test_memory_in_several_places_is_written_where_it_belongs(share: Share) -> None:
    guest = EventGuest(share, machine=NOTIFYING.with_regions(4), buffers=32, pieces=(16, 48, 4))
    guest.watch("d")
    expected = make(share, 0, 200)
    assert guest.told() == expected


def test_memory_plugged_later_can_take_events(share: Share) -> None:
    guest = EventGuest(share, buffers=4)
    guest.watch("d")
    memory = guest.fs.vmm.memory
    guest.fs.vmm.plug_memory(8 << 30, 1 << 20)
    guest.notification_queue.offer(64)
    assert len(memory.regions) == 2
    expected = make(share, 0, 200)
    assert guest.told() == expected


# ---- an empty queue --------------------------------------------------------------------------------------


def test_events_wait_for_buffers_in_order(share: Share) -> None:
    guest = EventGuest(share, buffers=2)
    guest.watch("d")
    guest.notification_queue.give_back = False
    expected = make(share, 0, 150)
    got = [guest.describe(element) for element in guest.notification_queue.receive(2)]
    assert guest.notification_queue.with_device == 0
    expected += make(share, 150, 150)
    guest.notification_queue.give_back = True
    guest.notification_queue.give_back_all()
    got += guest.told()
    assert got == expected


def test_buffers_given_one_by_one_come_back_one_by_one(share: Share) -> None:
    guest = EventGuest(share, buffers=1)
    guest.watch("d")
    guest.notification_queue.give_back = False
    expected = make(share, 0, 30)
    got = []
    for _ in range(30):
        got.append(guest.describe(guest.notification_queue.take()))
        assert guest.notification_queue.poll() is None
        guest.notification_queue.give_back_all()
    assert got == expected


def test_requests_are_served_while_events_wait_for_buffers(share: Share) -> None:
    guest = EventGuest(share, buffers=1)
    guest.watch("d")
    guest.notification_queue.give_back = False
    expected = make(share, 0, 500)
    for _ in range(500):
        assert guest.fs.getattr(guest.node("d").nodeid).nlink >= 2
    assert guest.describe(guest.notification_queue.take()) == expected[0]


# ---- suppression -----------------------------------------------------------------------------------------


def interrupted(queue: NotificationQueue) -> bool:
    poller = select.poll()
    poller.register(queue.queue.call_fd, select.POLLIN)
    return bool(poller.poll(0))


def clear_interrupts(queue: NotificationQueue) -> None:
    if interrupted(queue):
        os.eventfd_read(queue.queue.call_fd)


def test_a_driver_that_polls_is_not_interrupted(share: Share) -> None:
    machine = replace(NOTIFYING, features=PLAIN | Feature.INDIRECT_DESC)
    guest = EventGuest(share, machine=machine)
    guest.watch("d")
    queue = guest.notification_queue.queue
    queue.set_available_flags(AVAIL_F_NO_INTERRUPT)
    before = queue.device_used_index()
    clear_interrupts(guest.notification_queue)
    make(share, 0, 10)
    assert awaited(lambda: queue.device_used_index() == (before + 10) & 0xFFFF)
    assert not interrupted(guest.notification_queue)
    queue.set_available_flags(0)
    make(share, 10, 1)
    assert awaited(lambda: interrupted(guest.notification_queue))


def test_the_event_index_says_when_to_interrupt(share: Share) -> None:
    guest = EventGuest(share)
    guest.watch("d")
    queue = guest.notification_queue.queue
    before = queue.device_used_index()
    queue.set_used_event(before + 7)
    clear_interrupts(guest.notification_queue)
    make(share, 0, 7)
    assert awaited(lambda: queue.device_used_index() == (before + 7) & 0xFFFF)
    assert not interrupted(guest.notification_queue)
    make(share, 7, 1)
    assert awaited(lambda: interrupted(guest.notification_queue))


def test_the_driver_is_asked_to_kick_only_when_buffers_are_short(share: Share) -> None:
    guest = EventGuest(share, buffers=64)
    guest.watch("d")
    kicks = guest.notification_queue.queue.kicks
    for i in range(100):
        make(share, i, 1)
        guest.notification_queue.take()
    assert guest.notification_queue.queue.kicks - kicks < 10


# ---- indices, stop and start -----------------------------------------------------------------------------


def test_indices_wrap(share: Share) -> None:
    machine = replace(NOTIFYING, notification_queue_size=4)
    guest = EventGuest(share, machine=machine, buffers=0)
    vmm, queue = guest.fs.vmm, guest.notification_queue.queue
    vmm.stop_queue(1)
    queue.resume_at(65_500)
    vmm.set_queue(1, queue, 65_500)
    vmm.enable_queue(1)
    guest.notification_queue.offer(4)
    guest.watch("d")
    expected = make(share, 0, 200)
    assert guest.told() == expected
    assert queue.used_index < 1000


def test_a_pause_keeps_what_waits(share: Share) -> None:
    """Stop and continue of the VM: the rings go on where they were, and so do the events."""
    guest = EventGuest(share)
    guest.watch("d")
    expected = make(share, 0, 5)
    got = [guest.describe(element) for element in guest.notification_queue.receive(5)]
    for turn in range(3):
        bases = guest.fs.vmm.stop()
        used = guest.notification_queue.queue.device_used_index()
        more = make(share, 5 + 40 * turn, 40)
        assert guest.notification_queue.queue.device_used_index() == used
        guest.fs.vmm.start(bases)
        expected += more
        got += guest.told()
    assert got == expected


def test_the_queue_alone_may_stop_and_start_again(share: Share) -> None:
    guest = EventGuest(share, buffers=8)
    guest.watch("d")
    vmm = guest.fs.vmm
    base = vmm.stop_queue(1)
    assert (guest.notification_queue.queue.avail_index - base) & 0xFFFF == 8, "buffers that no event has used"
    expected = make(share, 0, 40)
    vmm.set_queue(1, guest.notification_queue.queue, base)
    vmm.enable_queue(1)
    assert guest.told() == expected


def test_a_queue_never_started_costs_only_its_events(share: Share) -> None:
    """Some front ends enable queues that the driver has not set up."""
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init()
    fs.vmm.stop_queue(1)
    entry = fs.lookup(fs.root, "d")
    fs.watch(entry.nodeid, Event.CREATE, entry.generation)
    make(share, 0, 100)
    assert len(fs.list(entry.nodeid)) == 100


def test_two_request_queues_and_the_notification_queue_work_alongside(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, "--num-request-queues=2")
    (share.path / "d").mkdir()
    guest = EventGuest(share, machine=replace(NOTIFYING, request_queues=2))
    guest.watch("d")
    expected = []
    for i in range(50):
        expected += make(share, i, 1)
        guest.fs.through(i % 2).write_file(guest.fs.root, f"own{i}", b"x")
    assert guest.told() == expected


def test_a_guest_without_the_bit_leaves_the_server_as_it_was(share: Share) -> None:
    share.mount(Machine())
    share.unmount()
    guest = EventGuest(share)
    guest.watch("d")
    expected = make(share, 0, 3)
    assert guest.told() == expected


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_guest_memory_that_vanishes_does_not_end_the_server(make_share: MakeShare, source: Source) -> None:
    """A front end may shrink the file behind the guest's memory; the next event is written into it."""
    share = start_share(make_share, source)
    (share.path / "d").mkdir()
    guest = EventGuest(share)
    guest.watch("d")
    before = event_counters(share)["received"]
    os.ftruncate(guest.fs.vmm.memory.regions[0].fd, 0)
    for i in range(100):
        os.mknod(share.path / f"d/{i}")
    # The ring says nothing any more: that the events were looked at shows elsewhere.
    assert awaited(lambda: event_counters(share)["received"] - before >= 100)
    assert share.serves()
