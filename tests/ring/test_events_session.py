# SPDX-License-Identifier: Apache-2.0
"""What was agreed and watched ends with its session: unmount, remount, reboot, the next front end.

Must not test the queue itself. Specification: docs/protocol.md, "Sessions".
"""

from __future__ import annotations

import os
import threading
import time

import pytest

from tests.limits import AT_ONCE_S
from tests.ring.conftest import MakeShare
from tests.ring.event_sources import SOURCES, Source, start_share
from tests.ring.events import EventGuest, write
from tests.ring.share import Share
from tests.ring.test_events_scope import host_marks
from vhostfs.frontend import ROOT, NotificationQueue, Vmm

pytestmark = pytest.mark.usefixtures("ours")


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


@pytest.fixture
def share(make_share: MakeShare, source: Source) -> Share:
    share = start_share(make_share, source)
    (share.path / "d").mkdir()
    return share


def watching(share: Share) -> EventGuest:
    guest = EventGuest(share)
    guest.watch("d")
    return guest


def changes(share: Share) -> None:
    for i in range(20):
        (share.path / f"d/{i}").touch()
        os.unlink(share.path / f"d/{i}")


def again(guest: EventGuest, *, rebooted: bool = False) -> EventGuest:
    """The same connection after a new FUSE_INIT: agrees anew, with the buffers that are still there."""
    guest.fs.root = ROOT
    guest.fs.root = guest.fs.walk(guest.share.relative).nodeid
    notifications = None if rebooted else guest.notifications
    return EventGuest(guest.share, mounted=guest.fs, notifications=notifications)


def test_a_new_fuse_init_ends_all_watches(share: Share) -> None:
    guest = watching(share)
    guest.fs.init()
    changes(share)
    guest = again(guest)
    assert guest.told() == []
    guest.watch("d")
    os.mknod(share.path / "d/new")
    assert guest.told() == ["CREATE d[new]"]


def test_destroy_ends_all_watches(share: Share) -> None:
    guest = watching(share)
    guest.fs.destroy()
    changes(share)
    guest.fs.init()
    guest = again(guest)
    changes(share)
    assert guest.told() == []


def test_what_waited_for_buffers_is_not_for_the_next_session(share: Share) -> None:
    guest = watching(share)
    guest.notifications.give_back = False
    for i in range(200):
        os.mknod(share.path / f"d/{i}")
    guest.notifications.receive(16)
    guest.fs.init()
    guest.notifications.give_back = True
    guest.notifications.give_back_all()
    guest = again(guest)
    assert guest.told() == []


def test_a_reboot_ends_all_watches(share: Share) -> None:
    guest = watching(share)
    vmm = guest.fs.vmm
    vmm.reset()
    changes(share)
    vmm.start()
    guest.fs.init()
    after = again(guest, rebooted=True)
    changes(share)
    assert after.told() == []
    after.watch("d")
    write_new(share)
    assert after.told() == ["CREATE d[after]"]


def test_a_reset_that_nobody_tells_of_ends_the_session_when_the_queues_begin_anew(share: Share) -> None:
    """As by QEMU, which only stops the queues: nothing old is put into buffers of the next driver."""
    guest = watching(share)
    vmm = guest.fs.vmm
    vmm.stop()
    changes(share)
    for queue in vmm.queues.values():
        queue.reset()
    notifications = NotificationQueue(vmm)
    vmm.start()
    guest.fs.init()
    guest.fs.root = ROOT
    guest.fs.root = guest.fs.walk(share.relative).nodeid
    after = EventGuest(share, mounted=guest.fs, notifications=notifications)
    assert after.told() == []


def test_a_session_survives_a_pause(share: Share) -> None:
    guest = watching(share)
    vmm = guest.fs.vmm
    bases = vmm.stop()
    os.mknod(share.path / "d/meanwhile")
    vmm.start(bases)
    assert guest.told() == ["CREATE d[meanwhile]"]


def write_new(share: Share) -> None:
    os.mknod(share.path / "d/after")


def test_the_next_front_end_starts_without_watches(share: Share) -> None:
    watching(share)
    share.unmount()
    changes(share)
    guest = EventGuest(share)
    changes(share)
    assert guest.told() == []


def test_nothing_stays_marked_on_the_host_after_the_session(share: Share) -> None:
    with Vmm.connect(share.server.socket_path):
        pass
    idle = host_marks(share)
    guest = watching(share)
    for i in range(20):
        (share.path / f"d/{i}").mkdir()
        guest.watch(f"d/{i}")
    share.unmount()
    share.mount().close()
    assert host_marks(share) == idle


def test_changes_during_every_part_of_a_session_are_survived(share: Share) -> None:
    """Somebody on the host never stops while guests come, watch, and go without a word."""
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            changes(share)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for turn in range(12):
            guest = watching(share)
            seen = [guest.notifications.take() for _ in range(20 * (turn % 3))]
            assert all(element.nodeid for element in seen)
            if turn % 4 == 1:
                guest.fs.destroy()
            if turn % 4 == 2:
                guest.fs.vmm.stop()
            share.unmount()
    finally:
        stop.set()
        thread.join()
    assert share.serves()


def test_a_guest_that_dies_with_events_waiting_leaves_nothing(share: Share) -> None:
    for _ in range(5):
        guest = EventGuest(share, buffers=2)
        guest.watch("d")
        guest.notifications.give_back = False
        changes(share)
        share.unmount()
    assert share.serves()


def test_the_server_ends_at_once_with_events_waiting(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, private=True)
    share.may_end = True
    (share.path / "d").mkdir()
    guest = EventGuest(share, buffers=2)
    guest.watch("d")
    guest.notifications.give_back = False
    changes(share)
    started = time.monotonic()
    assert share.server.terminate() in (0, -15)
    assert time.monotonic() - started < AT_ONCE_S


def test_a_server_that_was_restarted_knows_no_watches(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, private=True)
    (share.path / "d").mkdir()
    watching(share)
    share.unmount()
    share.server.terminate()
    share.server.start()
    guest = EventGuest(share)
    changes(share)
    assert guest.told() == []
    guest.watch("d")
    write_new(share)
    assert guest.told() == ["CREATE d[after]"]


def test_once_ends_with_the_connection_also_with_events(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, "--once", private=True)
    share.may_end = True
    (share.path / "d").mkdir()
    watching(share)
    changes(share)
    share.unmount()
    assert share.server.wait() == 0


def test_agreeing_while_the_host_is_busy_loses_nothing_afterwards(share: Share) -> None:
    """From the answer to WATCH on, everything is told."""
    guest = EventGuest(share)
    guest.hold("d")
    node = guest.node("d")
    (share.path / "d/f").touch()
    for i in range(100):
        guest.fs.watch(node.nodeid, 0x100 if i % 2 else 0, node.generation)
        os.mknod(share.path / f"d/{i}")
        write(share.path / "d/f")
        told = guest.told()
        assert told == ([f"CREATE d[{i}]"] if i % 2 else [])


def test_servers_of_all_sources_say_in_the_log_what_they_use(share: Share, source: Source) -> None:
    log = share.server.log()
    assert "events" in log
    assert ("inotify" if source.name == "inotify" else "fanotify") in log
