# SPDX-License-Identifier: Apache-2.0
"""Handles that the guest's driver chose itself, for opens that it has not asked about.

Must not test what may be opened so (that is the driver's part). Specification: docs/protocol.md, 8.2.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import stats
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import NOTIFYING, EventGuest
from tests.ring.share import Share, refused
from tests.ring.test_locks import ALICE, BOB, UNLOCK, WRITE
from vhostfs.frontend import FuseClient
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import Granted

pytestmark = pytest.mark.usefixtures("ours")

EXTRA = (Granted.CHILD, Granted.INVALIDATE, Granted.DEFERRED_OPEN)
FLAGS = Granted.VIRTQUEUE | Granted.CHILD | Granted.INVALIDATE | Granted.DEFERRED_OPEN
OURS = 1 << 63
FILES_AT_A_TIME = 65536
RELEASE_FLOCK_UNLOCK = 2
_numbers = itertools.count(1)


def new_handle() -> int:
    return OURS | next(_numbers)


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return start_share(make_share, FILESYSTEM_MARK, "--cache=coherent")


@pytest.fixture
def guest(share: Share) -> EventGuest:
    (share.path / "d").mkdir()
    for name in ("f", "g", "d/inside"):
        (share.path / name).write_text(f"content of {name}")
    guest = EventGuest(share, flags=FLAGS)
    guest.hold("f", "g", "d")
    return guest


@pytest.fixture
def fs(guest: EventGuest) -> FuseClient:
    return guest.fs


def n_open(guest: EventGuest) -> int:
    return int(stats(guest.share)["share"]["open_files"])


# ---- agreement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [Granted(0), *EXTRA])
def test_it_is_granted_with_invalidate_alone(share: Share, missing: Granted) -> None:
    granted = share.mount(NOTIFYING).fsnotify_init(FLAGS & ~missing).flags
    assert bool(granted & Granted.DEFERRED_OPEN) == (not missing)


def test_it_is_not_granted_where_caches_are_not_coherent(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK)
    assert not share.mount(NOTIFYING).fsnotify_init(FLAGS).flags & Granted.DEFERRED_OPEN


def test_without_it_such_a_handle_is_none(share: Share) -> None:
    (share.path / "f").write_text("text")
    guest = EventGuest(share, flags=FLAGS & ~Granted.DEFERRED_OPEN)
    node = guest.fs.lookup(guest.fs.root, "f").nodeid
    fh = new_handle()
    calls: tuple[op.Call[Any], ...] = (op.read(node, fh, 4), op.flush(node, fh), op.release(node, fh))
    for call in (*calls, op.getattr_(node, fh)):
        with refused(errno.EBADF):
            guest.fs.call(call)
    with refused(errno.EBADF):
        guest.fs.readdir(guest.fs.root, fh)
    with refused(errno.EBADF):
        guest.fs.releasedir(guest.fs.root, fh)


def test_the_server_s_own_handles_are_not_of_this_kind(guest: EventGuest) -> None:
    assert not guest.fs.open(guest.node("f").nodeid).fh & OURS
    assert not guest.fs.opendir(guest.node("d").nodeid).fh & OURS


# ---- what the first use does -----------------------------------------------------------------------------


def test_a_read_opens_and_release_closes(guest: EventGuest, fs: FuseClient) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    assert n_open(guest) == 0
    assert fs.read(node, fh, 100) == b"content of f"
    assert fs.read(node, fh, 100, 8) == b"of f"
    assert n_open(guest) == 1
    fs.release(node, fh)
    assert n_open(guest) == 0


def test_a_listing_goes_on_where_it_was(guest: EventGuest, fs: FuseClient) -> None:
    for number in range(50):
        (guest.share.path / "d" / f"entry{number}").touch()
    node, fh = guest.node("d").nodeid, new_handle()
    names = {entry.name for entry in fs.entries(node, fh, 512)}
    assert {b"inside", b"entry0", b"entry49"} < names
    assert len(names) == 53
    assert n_open(guest) == 1
    fs.releasedir(node, fh)
    assert n_open(guest) == 0
    assert {entry.entry.nodeid != 0 for entry in fs.readdirplus(node, new_handle())} == {True, False}


def test_other_requests_that_need_an_open_file_open_it_too(guest: EventGuest, fs: FuseClient) -> None:
    node = guest.node("f").nodeid
    assert fs.lseek(node, new_handle(), 0, os.SEEK_END) == 12
    fs.fsync(node, new_handle())
    fs.fsyncdir(guest.node("d").nodeid, new_handle())
    target = guest.node("g").nodeid
    to = fs.open(target, os.O_WRONLY).fh
    assert fs.copy_file_range(node, new_handle(), 0, (target, to), 0, 12) == 12
    assert (guest.share.path / "g").read_text() == "content of fg"[:12]


def test_what_does_not_need_it_opens_nothing(guest: EventGuest, fs: FuseClient) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    assert fs.getattr(node, fh).size == 12
    assert fs.statx(node, fh=fh).size == 12
    fs.flush(node, fh)
    fs.release(node, fh)
    fs.releasedir(guest.node("d").nodeid, new_handle())
    assert n_open(guest) == 0


def test_attributes_by_a_handle_in_use_are_the_file_s(guest: EventGuest, fs: FuseClient) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    fs.read(node, fh, 1)
    (guest.share.path / "f").unlink()
    assert fs.getattr(node, fh).nlink == 0


def test_two_first_uses_at_once_open_one_file(share: Share) -> None:
    (share.path / "f").write_text("content of f")
    machine = dataclasses.replace(NOTIFYING, request_queues=2)
    guest = EventGuest(share, flags=FLAGS, machine=machine)
    queues = [guest.fs.through(number) for number in range(2)]
    node = guest.fs.lookup(guest.fs.root, "f").nodeid
    handles = [new_handle() for _ in range(200)]
    for fh in handles:
        both = [queue.submit(op.read(node, fh, 100)) for queue in queues]
        assert [one.wait() for one in both] == [b"content of f"] * 2
    assert n_open(guest) == len(handles)
    for fh in handles:
        guest.fs.release(node, fh)
    assert n_open(guest) == 0


# ---- locks -----------------------------------------------------------------------------------------------


def test_locks_by_such_a_handle_hold(guest: EventGuest, fs: FuseClient) -> None:
    node = guest.node("f").nodeid
    alice, bob = new_handle(), new_handle()
    read_lock = abi.FileLock(0, (1 << 63) - 1, 0, 100)
    fs.setlk(node, alice, ALICE, read_lock)
    with refused(errno.EAGAIN):
        fs.setlk(node, bob, BOB, WRITE)
    assert fs.getlk(node, bob, BOB, WRITE).pid == 100
    fs.flush(node, new_handle(), ALICE)
    fs.setlk(node, bob, BOB, WRITE)
    fs.setlk(node, bob, BOB, UNLOCK)


def test_flock_by_such_a_handle_ends_with_it(guest: EventGuest, fs: FuseClient) -> None:
    node, fh, other = guest.node("f").nodeid, new_handle(), new_handle()
    fs.setlk(node, fh, ALICE, WRITE, flock=True)
    with refused(errno.EAGAIN):
        fs.setlk(node, other, BOB, WRITE, flock=True)
    fs.release(node, fh, release_flags=RELEASE_FLOCK_UNLOCK, lock_owner=ALICE)
    fs.setlk(node, other, BOB, WRITE, flock=True)


# ---- what the host does in between -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
def test_what_the_host_took_away_is_still_read(guest: EventGuest, fs: FuseClient, how: str) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    if how == "unlinked":
        (guest.share.path / "f").unlink()
    else:
        (guest.share.path / "new").write_text("another")
        os.rename(guest.share.path / "new", guest.share.path / "f")
    assert fs.read(node, fh, 100) == b"content of f"


def test_of_what_is_kept_by_handle_nothing_else_is_read(make_share: MakeShare) -> None:
    """Nothing pins it before the first use, so the host may have nothing left of it."""
    options = ("--cache=coherent", "--inode-file-handles=mandatory")
    share = start_share(make_share, FILESYSTEM_MARK, *options)
    for name in ("used", "unused"):
        (share.path / name).write_text("content")
    guest = EventGuest(share, flags=FLAGS)
    guest.hold("used", "unused")
    fs, fh = guest.fs, new_handle()
    assert fs.read(guest.node("used").nodeid, fh, 3) == b"con"
    for name in ("used", "unused"):
        (share.path / name).unlink()
        (share.path / name).write_text("another")
    assert fs.read(guest.node("used").nodeid, fh, 100, 3) == b"tent"
    try:
        assert fs.read(guest.node("unused").nodeid, new_handle(), 100) == b"content"
    except OSError as error:
        assert error.errno == errno.ESTALE


# ---- a guest that breaks the rules -----------------------------------------------------------------------


def test_it_is_for_reading_only(guest: EventGuest, fs: FuseClient) -> None:
    node = guest.node("f").nodeid
    with refused(errno.EBADF):
        fs.write(node, new_handle(), b"x")
    with refused(errno.EBADF):
        fs.fallocate(node, new_handle(), 0, 0, 100)
    assert (guest.share.path / "f").read_text() == "content of f"


def test_a_handle_has_one_object(guest: EventGuest, fs: FuseClient) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    fs.read(node, fh, 1)
    with refused(errno.EBADF):
        fs.read(guest.node("g").nodeid, fh, 1)
    with refused(errno.EBADF):
        fs.release(guest.node("g").nodeid, fh)
    with refused(errno.EBADF):
        fs.readdir(guest.node("d").nodeid, fh)
    assert fs.read(node, fh, 7) == b"content"


def test_the_object_must_be_held_and_of_the_right_kind(guest: EventGuest, fs: FuseClient) -> None:
    os.symlink("f", guest.share.path / "link")
    os.mkfifo(guest.share.path / "fifo")
    with refused(errno.ESTALE):
        fs.read(77777, new_handle(), 1)
    with refused(errno.EBADF):
        fs.read(guest.node("d").nodeid, new_handle(), 1)
    with refused(errno.EBADF):
        fs.readdir(guest.node("f").nodeid, new_handle())
    for name in ("link", "fifo"):
        with refused(errno.EBADF):
            fs.read(fs.lookup(fs.root, name).nodeid, new_handle(), 1)
    assert n_open(guest) == 0


def test_a_place_that_is_taken_is_refused_until_it_is_free(guest: EventGuest, fs: FuseClient) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    fs.read(node, fh, 1)
    with refused(errno.EBADF):
        fs.read(node, fh + FILES_AT_A_TIME, 1)
    fs.release(node, fh)
    assert fs.read(node, fh + FILES_AT_A_TIME, 1) == b"c"
    fs.release(node, fh)  # of nothing that is open
    assert fs.read(node, fh + FILES_AT_A_TIME, 1) == b"c"


def test_they_count_as_open_files(make_share: MakeShare) -> None:
    options = ("--cache=coherent", "--rlimit-nofile=0")
    share = start_share(make_share, FILESYSTEM_MARK, *options, private=True, descriptor_limit=256)
    (share.path / "f").write_text("text")
    fs = EventGuest(share, flags=FLAGS).fs
    node = fs.lookup(fs.root, "f").nodeid
    used = []
    with refused(errno.ENFILE, errno.EMFILE):
        for _ in range(400):
            fh = new_handle()
            fs.read(node, fh, 1)
            used.append(fh)
    assert len(used) > 50
    for fh in used:
        fs.release(node, fh)
    assert fs.read(node, new_handle(), 4) == b"text"


def test_a_new_session_knows_none_of_them(guest: EventGuest, fs: FuseClient) -> None:
    node, fh = guest.node("f").nodeid, new_handle()
    fs.read(node, fh, 1)
    fs.init()
    assert n_open(guest) == 0
    fs.root = abi.ROOT
    entry = fs.walk(f"{guest.share.relative}/f" if guest.share.relative else "f")
    with refused(errno.EBADF):
        fs.read(entry.nodeid, fh, 1)
    fs.fsnotify_init(FLAGS)
    assert fs.read(entry.nodeid, fh, 1) == b"c"


def test_a_loss_ends_nothing_that_is_open(guest: EventGuest, fs: FuseClient) -> None:
    """The guest asks for every open then, and what it has open it may use."""
    node, fh = guest.node("f").nodeid, new_handle()
    fs.read(node, fh, 1)
    queue = guest.notification_queue.queue
    for slot in range(queue.avail_index - 16, queue.avail_index + 1):
        queue.put_available(slot, 60000)
    queue.set_available_index(queue.avail_index + 1)
    queue.kick()
    (guest.share.path / "g").write_text("x")
    assert fs.read(node, fh, 100) == b"content of f"
    assert fs.read(node, new_handle(), 100) == b"content of f"
