# SPDX-License-Identifier: Apache-2.0
"""--cache=coherent: what the guest may keep for as long as it likes, and that it is told when that is over.

Must not test what watchers are told. Specification: docs/protocol.md, "Coherent caches".
"""

from __future__ import annotations

import mmap
import os

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FILESYSTEM_MARK, INODE_MARKS, start_share
from tests.ring.events import NOTIFYING, EventGuest, merged, write
from tests.ring.share import Share
from tests.ring.test_submounts import mount_tmpfs, unmount
from tests.server import awaited
from vhostfs.frontend import operations as op
from vhostfs.frontend.fsnotify import Granted

pytestmark = pytest.mark.usefixtures("ours")

FLAGS = Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD | Granted.INVALIDATE
SHORT_NS, LASTING_NS = 1_000_000_000, 3600_000_000_000
KEEP_CACHE, CACHE_DIR = 2, 8


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return start_share(make_share, FILESYSTEM_MARK, "--cache=coherent", private=True)


@pytest.fixture
def guest(share: Share) -> EventGuest:
    (share.path / "d/e").mkdir(parents=True)
    for name in ("top", "d/f", "d/e/deep"):
        (share.path / name).write_text("before")
    guest = EventGuest(share, flags=FLAGS)
    guest.hold("top", "d/f", "d/e/deep")
    guest.told()
    return guest


def told(guest: EventGuest) -> list[str]:
    return merged(line for line in guest.told() if ".fence" not in line)


# ---- agreement -------------------------------------------------------------------------------------------


def test_it_is_granted_where_it_was_asked_for(make_share: MakeShare, share: Share) -> None:
    assert share.mount(NOTIFYING).fsnotify_init(FLAGS).flags == FLAGS
    other = start_share(make_share, FILESYSTEM_MARK)
    assert other.mount(NOTIFYING).fsnotify_init(FLAGS).flags == FLAGS & ~Granted.INVALIDATE


def test_it_is_not_granted_without_the_numbers_of_children(share: Share) -> None:
    flags = FLAGS & ~Granted.CHILD
    assert share.mount(NOTIFYING).fsnotify_init(flags).flags == flags & ~Granted.INVALIDATE


def test_a_driver_that_does_not_take_it_has_short_times(share: Share) -> None:
    (share.path / "f").touch()
    guest = EventGuest(share)
    entry = guest.fs.lookup(guest.fs.root, "f")
    assert (entry.entry_timeout_ns, entry.attr_timeout_ns) == (SHORT_NS, SHORT_NS)
    assert guest.fs.open(entry.nodeid).flags & KEEP_CACHE == 0
    write(share.path / "f")
    assert told(guest) == []


def test_times_are_short_until_it_is_agreed(share: Share) -> None:
    (share.path / "f").touch()
    fs = share.mount(NOTIFYING)
    assert fs.lookup(fs.root, "f").attr_timeout_ns == SHORT_NS
    fs.fsnotify_init(FLAGS)
    assert fs.lookup(fs.root, "f").attr_timeout_ns == LASTING_NS


def test_a_share_whose_source_misses_changes_says_so_and_has_short_times(make_share: MakeShare) -> None:
    options = ("--cache=coherent", "--negotiate", "target_fid=off")
    share = start_share(make_share, FILESYSTEM_MARK, *options, private=True)
    fs = share.mount(NOTIFYING)
    assert not fs.fsnotify_init(FLAGS).flags & Granted.INVALIDATE
    assert fs.call(op.getattr_(fs.root)).timeout_ns == SHORT_NS
    assert "INVALIDATE is not granted, not every change here is seen" in share.log()


def test_sources_that_cannot_see_everything_are_refused(make_share: MakeShare) -> None:
    with pytest.raises(AssertionError, match="exclude each other"):
        start_share(make_share, INODE_MARKS, "--cache=coherent")


# ---- what may be kept ------------------------------------------------------------------------------------


def test_names_attributes_and_absence_last(guest: EventGuest) -> None:
    d = guest.node("d").nodeid
    entry = guest.fs.lookup(d, "f")
    assert (entry.entry_timeout_ns, entry.attr_timeout_ns) == (LASTING_NS, LASTING_NS)
    assert guest.fs.call(op.getattr_(entry.nodeid)).timeout_ns == LASTING_NS
    absent = guest.fs.call(op.lookup(d, "absent"))
    assert (absent.nodeid, absent.entry_timeout_ns) == (0, LASTING_NS)
    made = guest.fs.mkdir(d, "made")
    assert (made.entry_timeout_ns, made.attr_timeout_ns) == (LASTING_NS, LASTING_NS)


def test_listings_and_pages_may_be_kept(guest: EventGuest) -> None:
    assert guest.fs.open(guest.node("d/f").nodeid).flags & KEEP_CACHE
    opened = guest.fs.opendir(guest.node("d").nodeid)
    assert opened.flags & (KEEP_CACHE | CACHE_DIR) == KEEP_CACHE | CACHE_DIR
    entries = guest.fs.readdirplus(guest.node("d").nodeid, opened.fh)
    assert {entry.entry.attr_timeout_ns for entry in entries if entry.entry.nodeid} == {LASTING_NS}


def test_another_file_system_in_the_share_has_short_times(guest: EventGuest) -> None:
    host = guest.share.path / "d/mount"
    host.mkdir()
    mount_tmpfs(host)
    try:
        (host / "f").touch()
        mount = guest.fs.lookup(guest.node("d").nodeid, "mount")
        inside = guest.fs.lookup(mount.nodeid, "f")
        assert {mount.entry_timeout_ns, mount.attr_timeout_ns} == {SHORT_NS}
        assert {inside.entry_timeout_ns, inside.attr_timeout_ns} == {SHORT_NS}
        assert not guest.fs.open(inside.nodeid).flags & KEEP_CACHE
        guest.fs.forget(inside.nodeid, 1)
        guest.fs.forget(mount.nodeid, 1)
        guest.share.unmount()
    finally:
        unmount(host)


def test_when_the_queue_stops_times_are_short(guest: EventGuest) -> None:
    """A head that is in no table: the driver's fault, and it is told of nothing more."""
    node = guest.node("top").nodeid
    queue = guest.notification_queue.queue
    for slot in range(queue.avail_index - 16, queue.avail_index + 1):
        queue.put_available(slot, 60000)
    queue.set_available_index(queue.avail_index + 1)
    queue.kick()
    write(guest.share.path / "top")
    assert awaited(lambda: guest.fs.call(op.getattr_(node)).timeout_ns == SHORT_NS)
    assert not guest.fs.open(node).flags & KEEP_CACHE


# ---- what is told ----------------------------------------------------------------------------------------


def test_changes_are_told_although_nobody_watches(guest: EventGuest) -> None:
    host = guest.share.path
    write(host / "d/f")
    os.chmod(host / "d/e/deep", 0o600)
    os.truncate(host / "top", 1)
    (host / "d/new").touch()
    os.rename(host / "d/new", host / "d/e/new")
    (host / "d/e/new").unlink()
    assert told(guest) == [
        "caches: MODIFY d[f]=d/f",
        "caches: ATTRIB d/e[deep]=d/e/deep",
        "caches: MODIFY .[top]=top",
        "caches: CREATE d[new]",
        "caches: MOVED_TO d/e[new]",
        "caches: MOVED_FROM d[new]",
        "caches: DELETE d/e[new]",
    ]


def test_the_end_of_a_name_tells_of_the_object_too(guest: EventGuest) -> None:
    (guest.share.path / "d/f").unlink()
    assert told(guest) == ["caches: ATTRIB d/f", "caches: DELETE d[f]=d/f"]


def test_a_change_by_a_name_that_the_guest_does_not_know_is_told(guest: EventGuest) -> None:
    (guest.share.path / "hidden").mkdir()
    os.link(guest.share.path / "d/f", guest.share.path / "hidden/f")
    guest.told()
    write(guest.share.path / "hidden/f")
    assert told(guest) == ["caches: MODIFY d/f"]


def test_what_is_written_by_a_mapping_is_told_when_the_file_is_closed(guest: EventGuest) -> None:
    with open(guest.share.path / "d/f", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:1] = b"B"
    assert told(guest) == ["caches: MODIFY d[f]=d/f"]


def test_what_the_guest_does_itself_is_not_told(guest: EventGuest) -> None:
    d = guest.node("d").nodeid
    fh = guest.fs.open(guest.node("d/f").nodeid, os.O_WRONLY).fh
    guest.fs.write(guest.node("d/f").nodeid, fh, b"own", 0)
    guest.fs.mkdir(d, "own")
    guest.fs.rmdir(d, "own")
    assert told(guest) == []


def test_what_the_guest_does_not_hold_is_not_told(guest: EventGuest) -> None:
    (guest.share.path / "other").mkdir()
    (guest.share.path / "d/unknown").touch()
    guest.told()
    (guest.share.path / "other/f").write_text("text")
    write(guest.share.path / "d/unknown")
    assert told(guest) == []


def test_watchers_are_told_besides(guest: EventGuest) -> None:
    guest.watch("d")
    write(guest.share.path / "d/f")
    lines = told(guest)
    assert "caches: MODIFY d[f]=d/f" in lines
    assert [line for line in lines if "caches" not in line] == ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]
