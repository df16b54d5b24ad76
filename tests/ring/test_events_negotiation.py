# SPDX-License-Identifier: Apache-2.0
"""What server, VMM and driver agree on about events: feature bit, configuration, queue roles, FSNOTIFY_INIT,
and what WATCH accepts.

Must not test which events come. Specification: docs/protocol.md, "Negotiation" and "Watches".
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import NOTIFYING, WATCHED, EventGuest
from tests.ring.share import Share, refused
from vhostfs.frontend import (
    Feature,
    FuseClient,
    FuseError,
    InitFlag,
    Machine,
    NotificationQueue,
    Session,
    Vmm,
)
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import ALL_EVENTS, CHANGES, Event, Granted
from vhostfs.frontend.vmm import NOTIFY_CONFIG

pytestmark = pytest.mark.usefixtures("ours")


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return start_share(make_share, FILESYSTEM_MARK)


@pytest.fixture
def silent(make_share: MakeShare) -> Share:
    return make_share("--tag=events", "--events=off")


# ---- the device ------------------------------------------------------------------------------------------


def test_the_feature_bit_and_the_buffer_size_are_offered_with_events_on(share: Share) -> None:
    with Vmm.connect(share.server.socket_path) as vmm:
        assert vmm.offered & Feature.FS_NOTIFICATION
        tag, queues, buffer_size = NOTIFY_CONFIG.unpack(vmm.config_bytes(0, 44))
        assert (tag.rstrip(b"\0"), buffer_size) == (b"events", 320)
        assert queues >= 1


def test_neither_is_offered_with_events_off(silent: Share) -> None:
    with Vmm.connect(silent.server.socket_path) as vmm:
        assert not vmm.offered & Feature.FS_NOTIFICATION
        assert vmm.config_bytes(40, 4) == bytes(4)


def test_neither_is_offered_without_a_tag(make_share: MakeShare) -> None:
    """Without a tag there is no configuration space, and so nowhere to say how large buffers must be."""
    share = make_share()
    with Vmm.connect(share.server.socket_path) as vmm:
        assert not vmm.offered & Feature.FS_NOTIFICATION


def test_a_vmm_without_the_bit_has_its_first_request_queue_at_1(share: Share) -> None:
    fs = share.mount(Machine())
    assert fs.vmm.first_request_queue == 1
    fs.write_file(fs.root, "file", b"by queue 1")
    assert (share.path / "file").read_bytes() == b"by queue 1"


def test_with_the_bit_request_queues_start_at_2(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    assert fs.vmm.first_request_queue == 2
    fs.write_file(fs.root, "file", b"by queue 2")
    assert (share.path / "file").read_bytes() == b"by queue 2"


def test_there_is_room_for_the_notification_queue_beside_all_request_queues(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, "--num-request-queues=4")
    fs = share.mount(replace(NOTIFYING, request_queues=4))
    assert fs.vmm.queue_limit >= 6
    for number in range(4):
        fs.through(number).mkdir(fs.root, str(number))
    assert len(os.listdir(share.path)) == 4


def test_a_guest_may_change_its_mind_at_a_reboot(share: Share) -> None:
    """Queue 1 has the role that the features of this boot give it, whatever it had before."""
    with Vmm.connect(share.server.socket_path, NOTIFYING) as vmm:
        for features in (NOTIFYING.features, Machine().features, NOTIFYING.features):
            vmm.machine = replace(vmm.machine, features=features)
            vmm.start()
            fs = FuseClient(Session(vmm))
            fs.init()
            fs.root = fs.walk(share.relative).nodeid
            assert fs.getattr(fs.root).nlink >= 2
            vmm.reset()
            while vmm.queues:
                vmm.queues.popitem()[1].close()


# ---- FSNOTIFY_INIT ---------------------------------------------------------------------------------------


def test_the_answer_says_what_is_granted(share: Share) -> None:
    answer = share.mount(NOTIFYING).fsnotify_init()
    assert (answer.major, answer.minor) == (1, 0)
    assert answer.flags == Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD
    assert answer.notify_buf_size == 320
    assert answer.mask & ALL_EVENTS & ~Event.OPEN_EXEC == ALL_EVENTS & ~Event.OPEN_EXEC
    assert answer.max_watches > 0
    assert (answer.max_parked, answer.reserved) == (0, 0)


def test_only_what_was_wanted_is_granted(share: Share) -> None:
    assert share.mount(NOTIFYING).fsnotify_init(Granted.VIRTQUEUE).flags == Granted.VIRTQUEUE


def test_unknown_flags_and_mask_bits_are_left_out(share: Share) -> None:
    answer = share.mount(NOTIFYING).fsnotify_init((1 << 64) - 1, (1 << 64) - 1)
    known = Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD | Granted.WATCH_FILESYSTEM | Granted.PARENT
    known |= Granted.DIRECTORY_LOSS
    assert not answer.flags & ~known
    assert not answer.mask & ~int(ALL_EVENTS | Event.RENAME)


def test_the_virtqueue_is_not_granted_without_the_feature_bit(share: Share) -> None:
    fs = share.mount(Machine())
    assert not fs.fsnotify_init().flags & Granted.VIRTQUEUE
    assert fs.getattr(fs.root).nlink >= 2


def test_a_server_without_events_knows_none_of_the_operations(silent: Share) -> None:
    fs = silent.mount(NOTIFYING)
    calls: list[op.Call[Any]] = [wire.init(), wire.watch(fs.root, CHANGES), op.raw(wire.OPCODE_PARK, 0)]
    for call in calls:
        with refused(errno.ENOSYS):
            fs.call(call)
    assert fs.getattr(fs.root).nlink >= 2


def test_parked_requests_are_not_served_yet(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    assert fs.fsnotify_init(Granted.VIRTQUEUE | Granted.PARKED).flags == Granted.VIRTQUEUE
    with refused(errno.ENOSYS):
        fs.call(op.raw(wire.OPCODE_PARK, 0))


@pytest.mark.parametrize("major", [0, 2, 0xFFFF_FFFF])
def test_another_major_version_is_refused(share: Share, major: int) -> None:
    fs = share.mount(NOTIFYING)
    with refused(errno.EPROTO):
        fs.call(wire.init(major=major))
    assert fs.fsnotify_init().major == 1


def test_another_major_version_is_refused_by_its_first_bytes(share: Share) -> None:
    with refused(errno.EPROTO):
        share.mount(NOTIFYING).call(op.raw(wire.OPCODE_INIT, 0, struct.pack("<II", 2, 0)))


def test_a_newer_minor_version_is_met_by_ours(share: Share) -> None:
    call = wire.init(minor=7)
    longer = replace(call, args=call.args + b"\xff" * 24, reply_room=call.reply_room + 64)
    answer = share.mount(NOTIFYING).call(longer)
    assert (answer.major, answer.minor) == (1, 0)
    assert answer.flags & Granted.VIRTQUEUE


@pytest.mark.parametrize("size", [0, 4, 7, 8, 16, 31])
def test_a_request_that_is_too_short_is_refused(share: Share, size: int) -> None:
    fs = share.mount(NOTIFYING)
    with refused(errno.EINVAL):
        fs.call(op.raw(wire.OPCODE_INIT, 0, wire.init().args[:size]))
    assert fs.fsnotify_init().flags & Granted.VIRTQUEUE


def test_buffers_that_hold_no_element_are_refused(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    with refused(errno.EINVAL):
        fs.call(wire.init(buf_size=63))
    assert fs.call(wire.init(buf_size=4096)).notify_buf_size == 320


def test_a_driver_that_can_raise_nothing_is_refused(share: Share) -> None:
    with refused(errno.EINVAL):
        share.mount(NOTIFYING).call(wire.init(mask=0))


def test_it_is_agreed_on_once_in_a_session(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init()
    with refused(errno.EALREADY):
        fs.fsnotify_init()


def test_it_follows_fuse_init(share: Share) -> None:
    session = share.boot(NOTIFYING)
    with pytest.raises(FuseError):
        session.call(wire.init())
    fs = FuseClient(session)
    fs.init()
    assert fs.fsnotify_init().flags & Granted.VIRTQUEUE


def test_a_new_session_agrees_anew(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init()
    fs.init()
    assert fs.fsnotify_init().flags & Granted.VIRTQUEUE
    fs.destroy()
    fs.init()
    assert fs.fsnotify_init().flags & Granted.VIRTQUEUE


def test_a_stock_driver_behind_a_vmm_with_the_bit_gets_nothing_and_misses_nothing(share: Share) -> None:
    """It acks the bit, gives buffers, but never sends FSNOTIFY_INIT."""
    fs = share.mount(NOTIFYING)
    queue = NotificationQueue(fs.vmm)
    for i in range(50):
        os.mknod(share.path / str(i))
        assert fs.lookup(fs.root, str(i)).nodeid
    assert queue.poll() is None


# ---- WATCH -----------------------------------------------------------------------------------------------


@pytest.fixture
def fs(share: Share) -> FuseClient:
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init()
    return fs


def test_watching_needs_an_agreement(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    with refused(errno.ENOSYS):
        fs.watch(fs.root, CHANGES, fs.lookup(1, share.relative).generation)


def test_watching_needs_a_way_for_events_to_travel(share: Share) -> None:
    fs = share.mount(Machine())
    fs.fsnotify_init()
    with refused(errno.ENOSYS):
        fs.watch(fs.root, CHANGES, fs.lookup(1, share.relative).generation)


def test_an_unknown_node_is_stale(fs: FuseClient) -> None:
    for nodeid in (0, 2, 77777, 1 << 32, (1 << 64) - 1):
        with refused(errno.ESTALE):
            fs.watch(nodeid, CHANGES)


def test_another_generation_is_stale(fs: FuseClient) -> None:
    entry = fs.mkdir(fs.root, "d")
    for generation in (entry.generation + 1, entry.generation ^ 0x8000_0000):
        with refused(errno.ESTALE):
            fs.watch(entry.nodeid, CHANGES, generation & 0xFFFF_FFFF)
    fs.watch(entry.nodeid, CHANGES, entry.generation)


def test_a_forgotten_node_is_stale(fs: FuseClient) -> None:
    entry = fs.mkdir(fs.root, "d")
    fs.watch(entry.nodeid, CHANGES, entry.generation)
    fs.forget(entry.nodeid)
    fs.getattr(fs.root)
    with refused(errno.ESTALE):
        fs.watch(entry.nodeid, CHANGES, entry.generation)


@pytest.mark.parametrize("size", [0, 8, 15])
def test_a_watch_that_is_too_short_is_refused(fs: FuseClient, size: int) -> None:
    with refused(errno.EINVAL):
        fs.call(op.raw(wire.OPCODE_WATCH, fs.root, bytes(size)))


def test_unknown_flags_of_a_watch_are_refused(fs: FuseClient) -> None:
    entry = fs.mkdir(fs.root, "d")
    with refused(errno.EINVAL):
        fs.call(wire.watch(entry.nodeid, CHANGES, entry.generation, flags=1))


def test_ending_a_watch_that_never_was_is_no_error(fs: FuseClient) -> None:
    entry = fs.mkdir(fs.root, "d")
    fs.watch(entry.nodeid, 0, entry.generation)
    fs.watch(entry.nodeid, CHANGES, entry.generation)
    fs.watch(entry.nodeid, 0, entry.generation)
    fs.watch(entry.nodeid, 0, entry.generation)


def test_every_kind_of_object_can_be_watched(share: Share, fs: FuseClient) -> None:
    os.mknod(share.path / "file")
    os.mkfifo(share.path / "fifo")
    os.symlink("nowhere", share.path / "link")
    os.mkdir(share.path / "dir")
    for name in ("file", "fifo", "link", "dir"):
        entry = fs.lookup(fs.root, name)
        fs.watch(entry.nodeid, WATCHED, entry.generation)


def test_bits_that_are_no_events_are_ignored(share: Share) -> None:
    guest = EventGuest(share)
    root = guest.node("")
    for mask in (1 << 63, 0x8000_0000, Event.ISDIR, Event.EVENT_ON_CHILD, Event.Q_OVERFLOW):
        guest.fs.watch(root.nodeid, int(mask), root.generation)
    guest.told()
    os.mknod(share.path / "unseen")
    assert guest.told() == []
    guest.watch("", (1 << 64) - 1)
    os.mkdir(share.path / "new")
    assert guest.told() == ["ISDIR|CREATE .[new]"]


def test_the_quota_counts_objects_and_not_requests(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, "--max-watches=3")
    fs = share.mount(NOTIFYING)
    assert fs.fsnotify_init().max_watches == 3
    entries = [fs.mkdir(fs.root, str(i)) for i in range(4)]
    for entry in entries[:3]:
        fs.watch(entry.nodeid, Event.CREATE, entry.generation)
    last = entries[3]
    with refused(errno.ENOSPC):
        fs.watch(last.nodeid, CHANGES, last.generation)
    fs.watch(entries[0].nodeid, CHANGES, entries[0].generation)  # a new mask for an old one
    fs.watch(entries[1].nodeid, 0, entries[1].generation)
    fs.watch(last.nodeid, CHANGES, last.generation)
    with refused(errno.ENOSPC):
        fs.watch(entries[1].nodeid, CHANGES, entries[1].generation)
    fs.forget(last.nodeid)
    fs.getattr(fs.root)
    fs.watch(entries[1].nodeid, CHANGES, entries[1].generation)


def test_what_cannot_be_watched_any_more_says_so(make_share: MakeShare) -> None:
    """A watch over the quota is an error for the driver and leaves the others in force."""
    share = start_share(make_share, FILESYSTEM_MARK, "--max-watches=2")
    (share.path / "d").mkdir()
    guest = EventGuest(share)  # its fence takes one
    guest.watch("d")
    with refused(errno.ENOSPC):
        guest.watch("")
    os.mknod(share.path / "d/new")
    assert guest.told() == ["CREATE d[new]"]


def test_fuse_init_grants_nothing_more_than_before(share: Share) -> None:
    """Events have requests of their own: FUSE_INIT has no flag for them."""
    with_events = share.mount(NOTIFYING).session.flags
    share.unmount()
    assert with_events == share.mount(Machine()).session.flags
    assert not with_events >> (InitFlag.REQUEST_TIMEOUT.bit_length() + 1)
