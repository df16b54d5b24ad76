# SPDX-License-Identifier: Apache-2.0
"""Parked requests: who may park what, how they are answered, and that all come back when anything ends.

Must not test which events come. Specification: docs/protocol.md, "FUSE_FSNOTIFY_PARK".
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.limits import AT_ONCE_S, HANG_S
from tests.ring.conftest import MakeShare
from tests.ring.control import event_counters
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import NOTIFYING, STOCK, Delivery, EventGuest
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import (
    Feature,
    FuseError,
    Message,
    NotificationQueue,
    ParkedRequests,
    ProtocolFeature,
    Status,
    Vmm,
)
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import HEAD_BYTES, NAME_MAX, OVERFLOW, Granted, park
from vhostfs.frontend.fuse_abi import OUT_HEADER
from vhostfs.frontend.session import Pending

pytestmark = pytest.mark.usefixtures("ours")

MAX_PARKED = 64
SMALLEST_ROOM = HEAD_BYTES + NAME_MAX - OUT_HEADER.size


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    share = start_share(make_share, FILESYSTEM_MARK)
    (share.path / "d").mkdir()
    return share


@pytest.fixture
def own_share(make_share: MakeShare) -> Share:
    """With a server of its own, whose exported directory it is: a root that survives sessions."""
    share = start_share(make_share, FILESYSTEM_MARK, private=True)
    (share.path / "d").mkdir()
    return share


def guest_of(share: Share, **options: object) -> EventGuest:
    """All of its requests have come to the server."""
    guest = EventGuest(share, delivery=Delivery.PARKED, **options)  # type: ignore[arg-type]
    guest.watch("d")
    assert awaited(lambda: event_counters(share)["buffers"] == guest.notifications.with_device)
    return guest


def parked(guest: EventGuest) -> ParkedRequests:
    assert isinstance(guest.notifications, ParkedRequests)
    return guest.notifications


def error_of(pending: Pending[bytes]) -> int:
    with pytest.raises(FuseError) as caught:
        pending.wait()
    assert caught.value.errno is not None
    return caught.value.errno


def outcome_of(pending: Pending[bytes]) -> int:
    """0: an event; else the error."""
    try:
        pending.wait()
    except FuseError as error:
        return error.errno or 0
    return 0


def make(share: Share, first: int, count: int) -> list[str]:
    """Numbered changes, and what the guest must be told of them."""
    for i in range(first, first + count):
        os.mknod(share.path / f"d/{i}")
    return [f"CREATE d[{i}]" for i in range(first, first + count)]


# ---- delivery --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 2, 16, MAX_PARKED])
def test_any_number_of_requests_carries_all_events_in_order(share: Share, requests: int) -> None:
    guest = guest_of(share, buffers=requests)
    assert guest.granted.max_parked == MAX_PARKED
    expected = make(share, 0, 300)
    assert guest.told() == expected


def test_events_wait_for_requests_in_order(share: Share) -> None:
    guest = guest_of(share, buffers=2)
    requests = parked(guest)
    requests.give_back = False
    expected = make(share, 0, 150)
    got = [guest.describe(element) for element in requests.receive(2)]
    assert requests.with_device == 0
    expected += make(share, 150, 150)
    requests.give_back = True
    requests.give_back_all()
    assert got + guest.told() == expected


def test_an_answer_is_the_element_and_no_longer_than_its_name(share: Share) -> None:
    guest = guest_of(share)
    os.mknod(share.path / "d/12345")
    parked(guest).take()
    assert len(parked(guest).last_bytes) == HEAD_BYTES + 5


def test_a_loss_is_told(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, "--event-queue=10")
    (share.path / "d").mkdir()
    guest = guest_of(share, buffers=1)
    requests = parked(guest)
    requests.give_back = False
    make(share, 0, 50)
    requests.take()
    assert awaited(lambda: event_counters(share)["lost"] > 0)
    requests.give_back = True
    requests.give_back_all()
    _, overflow = requests.until(lambda element: element == OVERFLOW)
    assert overflow == OVERFLOW


def test_requests_go_on_while_others_are_parked(share: Share) -> None:
    guest = guest_of(share, buffers=MAX_PARKED)
    for _ in range(300):
        guest.fs.getattr(guest.fs.root)
    guest.fs.syncfs(guest.fs.root)
    assert guest.notifications.with_device == MAX_PARKED


def test_several_request_queues_may_hold_them(share: Share) -> None:
    guest = guest_of(share, machine=replace(STOCK, request_queues=2), buffers=1)
    other = guest.fs.session.submit(park(), queue=guest.fs.vmm.request_queue(1))
    assert awaited(lambda: event_counters(share)["buffers"] == 2)
    expected = make(share, 0, 2)
    # In the order in which they came.
    first = guest.describe(parked(guest).take())
    assert [first] == expected[:1]
    assert struct.unpack_from("<Q", other.wait())[0] == guest.node("d").nodeid


# ---- who may park what -----------------------------------------------------------------------------------


def test_nothing_is_parked_before_it_was_granted(share: Share) -> None:
    fs = share.mount(STOCK)
    assert error_of(fs.submit(park())) == errno.ENOSYS
    fs.fsnotify_init(Granted.CHILD)
    assert error_of(fs.submit(park())) == errno.ENOSYS


def test_nothing_is_parked_where_the_queue_is_used(share: Share) -> None:
    guest = EventGuest(share, flags=Granted.VIRTQUEUE | Granted.PARKED | Granted.CHILD)
    assert guest.granted.flags & Granted.VIRTQUEUE
    assert not guest.granted.flags & Granted.PARKED
    assert guest.granted.max_parked == 0
    assert error_of(guest.fs.submit(park())) == errno.ENOSYS


def test_a_driver_with_a_queue_may_prefer_parked_requests(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    unused = NotificationQueue(fs.vmm, buffers=4)
    guest = EventGuest(share, delivery=Delivery.PARKED, mounted=fs)
    guest.watch("d")
    expected = make(share, 0, 100)
    assert guest.told() == expected
    assert unused.with_device == 4


def test_a_request_without_room_for_every_element_is_refused(share: Share) -> None:
    guest = guest_of(share, buffers=1)
    parked(guest).give_back = False
    os.mknod(share.path / "d/first")
    parked(guest).take()
    assert error_of(guest.fs.submit(park(SMALLEST_ROOM - 1))) == errno.EINVAL
    fits = guest.fs.submit(park(SMALLEST_ROOM))
    (share.path / "d" / ("n" * NAME_MAX)).touch()
    assert fits.wait().endswith(b"n" * NAME_MAX)


def test_more_than_the_most_are_refused_and_the_others_stay(share: Share) -> None:
    guest = guest_of(share, buffers=MAX_PARKED)
    assert error_of(guest.fs.submit(park())) == errno.ENOSPC
    assert guest.notifications.with_device == MAX_PARKED
    expected = make(share, 0, 100)
    assert guest.told() == expected


@pytest.mark.parametrize(
    ("size", "indirect", "places"),
    [(2, True, 1), (4, True, 2), (8, True, 4), (64, True, 32), (16, False, 4), (64, False, 16)],
)
def test_a_small_ring_keeps_half_of_its_places_for_others(
    share: Share, size: int, indirect: bool, places: int
) -> None:
    features = STOCK.features if indirect else STOCK.features & ~Feature.INDIRECT_DESC
    mounted = share.mount(replace(STOCK, queue_size=size, hiprio_queue_size=128, features=features))
    guest = EventGuest(share, delivery=Delivery.PARKED, mounted=mounted, buffers=places)
    assert guest.granted.max_parked == places
    guest.watch("d")
    assert guest.notifications.with_device == places
    assert error_of(guest.fs.submit(park())) == errno.ENOSPC
    for _ in range(3 * size):
        guest.fs.getattr(guest.fs.root)
    expected = make(share, 0, 5 * size)
    assert guest.told() == expected


# ---- the end ---------------------------------------------------------------------------------------------


def all_come_back(requests: ParkedRequests) -> bool:
    return {error_of(pending) for pending in requests.pending} == {errno.ENOTCONN}


def test_unmounting_answers_all(share: Share) -> None:
    guest = guest_of(share, buffers=8)
    guest.fs.destroy()
    assert all_come_back(parked(guest))
    assert error_of(guest.fs.submit(park())) == errno.EIO


def test_a_ring_with_a_single_place_has_none_for_parked_requests(share: Share) -> None:
    fs = share.mount(replace(STOCK, queue_size=1, hiprio_queue_size=128))
    assert not fs.fsnotify_init(Granted.PARKED | Granted.CHILD).flags & Granted.PARKED
    assert "a request queue of 1 has no place for parked requests" in share.log()


def stop_queue(vmm: Vmm) -> None:
    vmm.stop_queue(vmm.first_request_queue)


def disable_queue(vmm: Vmm) -> None:
    vmm.enable_queue(vmm.first_request_queue, on=False)


def pause(vmm: Vmm) -> None:
    vmm.set_status(Status(0))


def reset(vmm: Vmm) -> None:
    vmm.tell(Message.RESET_DEVICE)


@pytest.mark.parametrize(
    "end",
    [stop_queue, disable_queue, pause, reset, Vmm.stop, Vmm.set_memory, Vmm.negotiate_again],
    ids=lambda end: end.__name__,
)
def test_whatever_stops_the_queue_answers_all_at_once(share: Share, end: Callable[[Vmm], object]) -> None:
    """As QEMU has it before a migration, when the machine pauses, its memory changes, or the guest resets."""
    machine = replace(STOCK, protocol_features=STOCK.protocol_features & ~ProtocolFeature.CONFIGURE_MEM_SLOTS)
    guest = guest_of(share, machine=machine, buffers=MAX_PARKED)
    queue = guest.fs.vmm.request_queue()
    used = queue.device_used_index()
    started_s = time.monotonic()
    end(guest.fs.vmm)
    assert time.monotonic() - started_s < AT_ONCE_S
    # Whoever stops it finds them answered: nothing is written behind its back.
    assert (queue.device_used_index() - used) & 0xFFFF == MAX_PARKED


def test_a_new_session_answers_those_of_the_one_before(own_share: Share) -> None:
    guest = guest_of(own_share, buffers=8)
    guest.fs.init()
    assert all_come_back(parked(guest))
    again = EventGuest(own_share, delivery=Delivery.PARKED, mounted=guest.fs)
    again.watch("d")
    expected = make(own_share, 0, 3)
    assert again.told() == expected


def test_a_queue_that_stops_answers_its_own_and_the_session_goes_on(share: Share) -> None:
    guest = guest_of(share, buffers=8)
    vmm = guest.fs.vmm
    index = vmm.first_request_queue
    base = vmm.stop_queue(index)
    assert all_come_back(parked(guest))
    vmm.set_queue(index, vmm.queues[index], base)
    vmm.enable_queue(index)
    expected = make(share, 0, 3)
    parked(guest).pending.clear()
    parked(guest).offer(2)
    assert guest.told() == expected


def test_a_guest_that_dies_leaves_nothing_behind(share: Share) -> None:
    guest = guest_of(share, buffers=MAX_PARKED)
    guest.fs.close()
    again = guest_of(share)
    expected = make(share, 0, 3)
    assert again.told() == expected


def test_the_server_does_not_wait_for_them_when_it_is_to_end(own_share: Share) -> None:
    guest = guest_of(own_share, buffers=MAX_PARKED)
    own_share.may_end = True
    server = own_share.server.process
    server.send_signal(signal.SIGTERM)
    assert server.wait(HANG_S) == 0
    assert all_come_back(parked(guest))


def test_a_flood_of_parking_and_ending_leaves_the_server_well(own_share: Share) -> None:
    fs = own_share.mount(STOCK)
    for _ in range(30):
        guest = EventGuest(own_share, delivery=Delivery.PARKED, mounted=fs, buffers=32)
        guest.watch("d")
        for i in range(20):
            (own_share.path / f"d/f{i}").touch()
        fs.submit(op.destroy())
        assert set(map(outcome_of, parked(guest).pending)) <= {0, errno.ENOTCONN}
        for i in range(20):
            (own_share.path / f"d/f{i}").unlink()
        fs.init()
    again = EventGuest(own_share, delivery=Delivery.PARKED, mounted=fs)
    again.watch("d")
    expected = make(own_share, 0, 3)
    assert again.told() == expected
