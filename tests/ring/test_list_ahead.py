# SPDX-License-Identifier: Apache-2.0
"""READDIRPLUS whose answer was begun before it was asked for: right all the same, counted once, never lost.

Must not test what a listing holds (test_directories.py). Specification: fuse.h (READDIRPLUS, FORGET).
"""

from __future__ import annotations

import errno
import itertools
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import stats
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import EventGuest
from tests.ring.share import Share, refused
from tests.server import awaited
from vhostfs.frontend import FuseClient, Machine
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op

pytestmark = pytest.mark.usefixtures("ours")

FILES = 200
ROOM = 4096
"""Bytes of a reply, as Linux asks for: some 25 names."""
USED_FOR_S = 0.01
"""How long an answer that was begun is of use; looking whether it was takes a tenth of that."""
SET_FLAGS = 0x40086602
NODUMP = 0x40


def ahead(share: Share) -> int:
    """Entries that were looked up before they were asked for."""
    return int(stats(share)["share"]["entries_ahead"])


def held(share: Share) -> int:
    """Objects that the server holds for the guest."""
    return int(stats(share)["share"]["inodes"])


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return filled(make_share("--cache=auto", private=True))


def filled(share: Share) -> Share:
    for i in range(FILES):
        (share.path / f"file-{i:04}").write_bytes(b"before")
    return share


@dataclass
class Listing:
    """An open directory of which two answers were given, so that the third may have been begun."""

    fs: FuseClient
    fh: int
    given: list[abi.DirentPlus]

    @classmethod
    def begin(cls, fs: FuseClient) -> Listing:
        listing = cls(fs, fs.opendir(fs.root).fh, [])
        listing.go_on()
        listing.go_on()
        return listing

    def go_on(self, size: int = ROOM) -> list[abi.DirentPlus]:
        """The next answer."""
        offset = self.given[-1].dirent.offset if self.given else 0
        items = self.fs.readdirplus(self.fs.root, self.fh, offset, size)
        self.given += items
        return items

    def nodeids(self) -> list[int]:
        return [item.entry.nodeid for item in self.given if item.entry.nodeid]

    def end(self) -> None:
        """Gives the handle back, and all that was counted for the guest."""
        self.fs.releasedir(self.fs.root, self.fh)
        self.fs.batch_forget([(nodeid, 1) for nodeid in self.nodeids()])


def begun(share: Share, fs: FuseClient) -> Listing:
    """One whose third answer has been begun just now: more is held than was given."""
    found: list[Listing] = []
    before = held(share)

    def is_begun() -> bool:
        listing = Listing.begin(fs)
        if held(share) > before + len(listing.nodeids()):
            found.append(listing)
        else:
            # On a busy machine it may be too old by now.
            listing.end()
        return bool(found)

    assert awaited(is_begun)
    return found[0]


def names_of_third_answer(fs: FuseClient) -> list[str]:
    """In the host's order, which no test here changes."""
    listing = Listing.begin(fs)
    names = [item.dirent.name.decode() for item in listing.go_on()]
    listing.end()
    return names


def test_the_next_answer_is_begun_and_used(share: Share) -> None:
    fs = share.mount()

    def used() -> bool:
        before = ahead(share)
        listing = Listing.begin(fs)
        while listing.go_on():
            time.sleep(USED_FOR_S / 10)
        names = [item.dirent.name for item in listing.given]
        assert len(names) == len(set(names)) == FILES + 2
        for item in listing.given:
            if item.entry.nodeid:
                there = (share.path / item.dirent.name.decode()).stat()
                assert (item.entry.attr.ino, item.entry.attr.size) == (there.st_ino, there.st_size)
        listing.end()
        return ahead(share) > before + FILES / 4

    # On a busy machine what was begun may be too old.
    assert awaited(used)


@pytest.mark.parametrize("option", ["--cache=never", "--cache=coherent"])
def test_not_where_the_guest_must_see_what_is_there_now(make_share: MakeShare, option: str) -> None:
    share = filled(make_share(option, private=True))
    fs = share.mount()
    for _ in range(5):
        listing = Listing.begin(fs)
        assert held(share) <= 1 + len(listing.nodeids())
        listing.go_on()
        listing.end()
    assert ahead(share) == 0


# ---- what the guest changes itself ----


@dataclass
class File:
    """One of those that the third answer is about, open for writing."""

    name: str
    root: int
    nodeid: int
    fh: int
    other_nodeid: int
    other_fh: int
    """Another file, open for reading."""


CHANGES: dict[str, Callable[[File], op.Call[Any]]] = {
    "write": lambda f: op.write(f.nodeid, f.fh, b"afterwards"),
    "setattr": lambda f: op.setattr_(f.nodeid, mode=0o600),
    "truncate": lambda f: op.setattr_(f.nodeid, size=3),
    "open with O_TRUNC": lambda f: op.open_(f.nodeid, os.O_WRONLY | os.O_TRUNC),
    "create with O_TRUNC": lambda f: op.create(f.root, f.name, os.O_WRONLY | os.O_TRUNC),
    "fallocate": lambda f: op.fallocate(f.nodeid, f.fh, 0, 0, 5000),
    "copy_file_range": lambda f: op.copy_file_range(f.other_nodeid, f.other_fh, 0, (f.nodeid, f.fh), 0, 4000),
    "setxattr": lambda f: op.setxattr(f.nodeid, "user.a", b"1"),
    "removexattr": lambda f: op.removexattr(f.nodeid, "user.there"),
    "link": lambda f: op.link(f.nodeid, f.root, "linked"),
    "unlink": lambda f: op.unlink(f.root, f.name),
    "rename away": lambda f: op.rename(f.root, f.name, f.root, "renamed"),
    "rename over it": lambda f: op.rename(f.root, "other", f.root, f.name),
    "ioctl": lambda f: op.ioctl(f.nodeid, f.fh, SET_FLAGS, struct.pack("<q", NODUMP)),
}


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("kind", CHANGES)
def test_what_the_guest_has_changed_is_seen(make_share: MakeShare, kind: str, queues: int) -> None:
    """The change goes over another queue than the listing, where there are two."""
    share = filled(make_share("--cache=auto", "--xattr", private=True))
    fs = share.mount(Machine(request_queues=queues))
    queue = fs.session.vmm.request_queue(queues - 1)
    names = names_of_third_answer(fs)
    name = names[len(names) // 2]
    (share.path / "other").write_bytes(bytes(4000))
    os.setxattr(share.path / name, "user.there", b"1")
    node, other = fs.lookup(fs.root, name).nodeid, fs.lookup(fs.root, "other").nodeid
    fh, other_fh = fs.open(node, os.O_RDWR).fh, fs.open(other, os.O_RDONLY).fh
    file = File(name, fs.root, node, fh, other, other_fh)
    before = look(share, name)
    # Times may be as coarse as 10 ms.
    time.sleep(0.02)
    listing = begun(share, fs)
    fs.session.call(CHANGES[kind](file), queue=queue)
    found = {item.dirent.name.decode(): item.entry.attr for item in listing.go_on()}
    if not (share.path / name).exists():
        assert name not in found
        return
    now, attr = look(share, name), found[name]
    assert now != before
    seen_ns = attr.ctime * 10**9 + attr.ctimensec
    assert (attr.ino, attr.size, attr.mode, attr.nlink, seen_ns) == now


def look(share: Share, name: str) -> tuple[int, int, int, int, int]:
    there = (share.path / name).stat()
    return there.st_ino, there.st_size, there.st_mode, there.st_nlink, there.st_ctime_ns


# ---- what the host changes ----


def change_on_host(share: Share, name: str) -> None:
    (share.path / name).write_bytes(b"longer than it was")


def size_in(items: list[abi.DirentPlus], name: str) -> int:
    return next(item.entry.attr.size for item in items if item.dirent.name.decode() == name)


def test_what_is_too_old_is_looked_up_again(share: Share) -> None:
    fs = share.mount()
    name = names_of_third_answer(fs)[0]
    listing = begun(share, fs)
    time.sleep(2 * USED_FOR_S)
    change_on_host(share, name)
    assert size_in(listing.go_on(), name) == len("longer than it was")


def test_what_the_guest_may_keep_for_less_is_used_for_less(make_share: MakeShare) -> None:
    """A hundredth of that time, which here is less than it takes to see that it was begun."""
    share = filled(make_share("-o", "timeout=0.02", private=True))
    fs = share.mount()
    name = names_of_third_answer(fs)[0]
    for size in range(100, 110):
        listing = begun(share, fs)
        (share.path / name).write_bytes(bytes(size))
        assert size_in(listing.go_on(), name) == size
        listing.end()


def test_what_the_guest_was_told_of_is_looked_up_again(make_share: MakeShare) -> None:
    share = filled(start_share(make_share, FILESYSTEM_MARK))
    guest = EventGuest(share)
    name = names_of_third_answer(guest.fs)[0]
    guest.watch("")
    listing = begun(share, guest.fs)
    change_on_host(share, name)
    assert guest.told()
    assert size_in(listing.go_on(), name) == len("longer than it was")


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("how", ["lookup", "getattr", "read", "readdirplus"])
def test_what_the_guest_has_seen_does_not_go_back(share: Share, how: str, queues: int) -> None:
    """The request that shows it goes over another queue than the listing, where there are two."""
    fs = share.mount(Machine(request_queues=queues))
    queue = fs.session.vmm.request_queue(queues - 1)
    names = names_of_third_answer(fs)
    node = fs.lookup(fs.root, names[0]).nodeid
    fh, directory = fs.open(node, os.O_RDONLY).fh, fs.opendir(fs.root).fh
    calls: dict[str, op.Call[Any]] = {
        "lookup": op.lookup(fs.root, names[0]),
        "getattr": op.getattr_(node),
        "read": op.read(node, fh, 0, 100),
        "readdirplus": op.readdirplus(fs.root, directory, 0, 65536),
    }
    listing = begun(share, fs)
    change_on_host(share, names[0])
    fs.session.call(calls[how], queue=queue)
    assert size_in(listing.go_on(), names[0]) == len("longer than it was")


# ---- what is begun in vain ----


def begin_again(listing: Listing) -> None:
    first = listing.fs.readdirplus(listing.fs.root, listing.fh, 0, ROOM)
    assert [item.dirent.name for item in first] == [item.dirent.name for item in listing.given[: len(first)]]
    listing.given += first


def ask_for_names_only(listing: Listing) -> None:
    names = listing.fs.readdir(listing.fs.root, listing.fh, listing.given[-1].dirent.offset, ROOM)
    assert not {item.dirent.name for item in listing.given} & {item.name for item in names}


def ask_for_less(listing: Listing) -> None:
    assert 0 < len(listing.go_on(ROOM // 4)) < 10


def open_another(listing: Listing) -> None:
    fh = listing.fs.opendir(listing.fs.root).fh
    listing.given += listing.fs.readdirplus(listing.fs.root, fh, 0, ROOM)
    listing.fs.releasedir(listing.fs.root, fh)
    listing.given += listing.fs.readdirplus(listing.fs.root, listing.fh, 0, ROOM)


@pytest.mark.parametrize(
    "what",
    [Listing.go_on, begin_again, ask_for_names_only, ask_for_less, open_another],
    ids=lambda f: f.__name__,
)
def test_nothing_stays_counted_or_is_left_out(share: Share, what: Callable[[Listing], object]) -> None:
    fs = share.mount()
    listing = begun(share, fs)
    what(listing)
    while listing.go_on():
        pass
    assert len({item.dirent.name for item in listing.given}) == FILES + 2
    assert held(share) > 1
    listing.end()
    # The root is held for ever.
    assert awaited(lambda: held(share) == 1)
    for nodeid in listing.nodeids():
        with refused(errno.ESTALE):
            fs.getattr(nodeid)


def test_a_listing_may_change_its_queue(share: Share) -> None:
    fs = share.mount(Machine(request_queues=2))
    for _ in range(20):
        listing = Listing(fs, fs.opendir(fs.root).fh, [])
        for turn in itertools.count():
            offset = listing.given[-1].dirent.offset if listing.given else 0
            call = op.readdirplus(fs.root, listing.fh, offset, ROOM)
            # Twice in a row each, so that something has been begun by the one that is not asked next.
            items = fs.session.call(call, queue=fs.session.vmm.request_queue(turn // 2 % 2))
            if not items:
                break
            listing.given += items
        names = [item.dirent.name for item in listing.given]
        assert len(names) == len(set(names)) == FILES + 2
        listing.end()
    assert awaited(lambda: held(share) == 1)


def test_a_request_without_room_gives_nothing_up(share: Share) -> None:
    """It is refused before it is known for whom it is; what was begun ends in time all the same."""
    fs = share.mount()
    listing = begun(share, fs)
    offset = listing.given[-1].dirent.offset
    with refused(errno.EINVAL):
        fs.readdirplus(fs.root, listing.fh, offset, 8)
    assert awaited(lambda: held(share) == 1 + len(listing.nodeids()))
    while listing.go_on():
        pass
    assert len({item.dirent.name for item in listing.given}) == FILES + 2


def test_what_nobody_asks_for_is_given_up_soon(share: Share) -> None:
    """Or it would keep files that the guest removes."""
    listing = begun(share, share.mount())
    assert awaited(lambda: held(share) == 1 + len(listing.nodeids()))


def test_a_released_directory_holds_nothing(share: Share) -> None:
    fs = share.mount()
    begun(share, fs).end()
    assert awaited(lambda: held(share) == 1)


def test_a_new_session_ends_what_was_begun(share: Share) -> None:
    fs = share.mount()
    listing = begun(share, fs)
    fs.close()
    again = share.mount()
    with refused(errno.ESTALE):
        again.getattr(listing.nodeids()[0])
    assert held(share) == 1
    begun(share, again)
