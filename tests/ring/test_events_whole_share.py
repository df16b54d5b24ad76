# SPDX-License-Identifier: Apache-2.0
"""One watch on everything: FUSE_FSNOTIFY_WATCH with FILESYSTEM, as a driver asks for a mark on a file system.

Must not test single watches. Specification: docs/protocol.md, "Watching the whole share".
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tests.oracle.native import NativeWatcher
from tests.oracle.streams import In
from tests.ring.conftest import MakeShare
from tests.ring.control import event_counters
from tests.ring.event_sources import FILESYSTEM_MARK, INODE_MARKS, INOTIFY, SOURCES, Source, start_share
from tests.ring.events import NOTIFYING, WATCHED, EventGuest, merged, write
from tests.ring.share import Share, refused
from tests.server import awaited, held_up
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend.fsnotify import ALL_EVENTS, CHANGES, Event, Granted, WatchFlag

pytestmark = pytest.mark.usefixtures("ours")

FLAGS = Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD | Granted.WATCH_FILESYSTEM


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


@pytest.fixture
def share(make_share: MakeShare, source: Source) -> Share:
    return start_share(make_share, source, private=True)


@pytest.fixture
def guest(share: Share) -> EventGuest:
    (share.path / "a/b/c").mkdir(parents=True)
    for name in ("top", "a/f", "a/b/c/deep"):
        (share.path / name).write_text("before")
    guest = EventGuest(share, flags=FLAGS)
    guest.hold("a/b/c")
    return guest


def watch_share(guest: EventGuest, mask: int = CHANGES) -> None:
    guest.fs.watch_share(mask)
    guest.told()


def told(guest: EventGuest) -> list[str]:
    """In words; what the guest has not looked up, without its number."""
    lines = [re.sub(r"<node \S+ generation \S+>", "new", line) for line in guest.told()]
    return merged(line for line in lines if ".fence" not in line)


# ---- agreement -------------------------------------------------------------------------------------------


def test_it_is_granted_to_a_driver_that_wants_it(share: Share) -> None:
    assert share.mount(NOTIFYING).fsnotify_init(FLAGS).flags == FLAGS


def test_it_is_refused_where_it_was_not_agreed_on(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init()
    with refused(errno.EINVAL):
        fs.watch_share(CHANGES)


@pytest.mark.parametrize(
    ("nodeid", "generation", "flags"), [(2, 0, 1), (0, 0, 1), (1, 7, 1), (1, 0, 2), (1, 0, 3)]
)
def test_it_is_of_the_root_and_nothing_else(share: Share, nodeid: int, generation: int, flags: int) -> None:
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init(FLAGS)
    with refused(errno.EINVAL):
        fs.call(wire.watch(nodeid, CHANGES, generation, WatchFlag(flags)))


# ---- what is told ----------------------------------------------------------------------------------------


def test_everything_in_directories_that_the_guest_holds_is_told(guest: EventGuest, source: Source) -> None:
    host = guest.share.path
    watch_share(guest)
    (host / "a/b/c/new").mkdir()
    write(host / "a/b/c/deep")
    os.truncate(host / "a/f", 0)
    os.chmod(host / "top", 0o600)
    os.rename(host / "a/f", host / "a/b/g")
    (host / "a/b/g").unlink()
    assert told(guest) == source.sees(
        [
            "ISDIR|CREATE a/b/c[new]=new",
            "MODIFY a/b/c[deep]",
            "CLOSE_WRITE a/b/c[deep]",
            "MODIFY a[f]",
            "ATTRIB .[top]",
            "MOVED_FROM a[f] pair 1",
            "MOVED_TO a/b[g] pair 1",
            "DELETE a/b[g]",
        ]
    )


def ended(watcher: NativeWatcher, *watches: str) -> bool:
    """Is a watcher on the host told of the end of all of these?"""
    left = set(watches)

    def is_told() -> bool:
        left.difference_update(event.watch for event in watcher.read() if event.mask & In.DELETE_SELF)
        return not left

    return awaited(is_told)


def test_a_directory_that_came_and_was_removed_is_held_no_longer(guest: EventGuest) -> None:
    host = guest.share.path
    watch_share(guest)
    watcher = NativeWatcher(host)
    (host / "a/x/y").mkdir(parents=True)
    watcher.watch("x", "a/x", In.DELETE_SELF)
    watcher.watch("y", "a/x/y", In.DELETE_SELF)
    guest.told()
    (host / "a/x/y").rmdir()
    (host / "a/x").rmdir()
    assert ended(watcher, "x", "y")
    watcher.close()


def test_one_that_the_guest_removes_is_held_no_longer_either(guest: EventGuest) -> None:
    host = guest.share.path
    watch_share(guest)
    watcher = NativeWatcher(host)
    (host / "a/x").mkdir()
    watcher.watch("x", "a/x", In.DELETE_SELF)
    guest.told()
    guest.fs.rmdir(guest.fs.walk("a").nodeid, "x")
    assert ended(watcher, "x")
    watcher.close()


def test_what_a_directory_is_itself_is_told(guest: EventGuest) -> None:
    watch_share(guest)
    os.chmod(guest.share.path / "a/b", 0o700)
    assert told(guest) in (["ISDIR|ATTRIB a/b"], ["ISDIR|ATTRIB a[b]=a/b"])


def test_only_what_the_mask_has_is_told(guest: EventGuest) -> None:
    watch_share(guest, Event.CREATE | Event.DELETE)
    host = guest.share.path
    (host / "a/new").write_text("text")
    os.rename(host / "a/new", host / "a/old")
    (host / "a/old").unlink()
    assert told(guest) == ["CREATE a[new]", "DELETE a[old]"]


def test_who_looks_at_files_is_told_when_it_is_asked_for(guest: EventGuest) -> None:
    watch_share(guest, ALL_EVENTS)
    (guest.share.path / "a/b/c/deep").read_text()
    lines = told(guest)
    assert [line for line in lines if "deep" in line] == [
        "OPEN a/b/c[deep]",
        "ACCESS a/b/c[deep]",
        "CLOSE_NOWRITE a/b/c[deep]",
    ]


def test_directories_that_are_looked_up_later_are_told_of(guest: EventGuest) -> None:
    (guest.share.path / "late/later").mkdir(parents=True)
    watch_share(guest)
    guest.hold("late/later")
    (guest.share.path / "late/later/x").mkdir()
    assert told(guest) == ["ISDIR|CREATE late/later[x]=new"]


def test_what_the_server_lists_to_tell_of_it_is_not_told_as_the_host_s_doing(guest: EventGuest) -> None:
    watch_share(guest, ALL_EVENTS)
    made = guest.share.path / "a/made"
    (made / "x").mkdir(parents=True)
    (made / "x/file").touch()
    # The server lists when it reads of the directory: that comes behind.
    lines = told(guest) + told(guest)
    assert "ISDIR|CREATE a[made]=new" in lines
    assert [line for line in lines if line.startswith("ISDIR|") and "CREATE" not in line] == []
    os.listdir(made)
    assert "ISDIR|OPEN a[made]=new" in told(guest)


def test_directories_that_the_guest_does_not_hold_are_not(guest: EventGuest) -> None:
    (guest.share.path / "far/away").mkdir(parents=True)
    # New directories are held: these were there before, and what is read late would make them new.
    told(guest)
    watch_share(guest)
    (guest.share.path / "far/away/x").mkdir()
    assert told(guest) == []


def test_a_new_directory_s_content_is_told_before_the_guest_has_looked_it_up(guest: EventGuest) -> None:
    """The element of a directory has its nodeid, and what follows has it, too."""
    watch_share(guest)
    made = guest.share.path / "a/made"
    (made / "x/y").mkdir(parents=True)
    (made / "x/y/file").write_text("text")
    elements = guest.elements()
    named = [(element.nodeid, element.name, element.child_nodeid) for element in elements]
    created = {
        element.name: element
        for element in elements
        if element.mask & Event.CREATE and element.mask & Event.ISDIR
    }
    assert list(created) == [b"made", b"x", b"y"], named
    assert created[b"x"].nodeid == created[b"made"].child_nodeid != 0
    assert created[b"y"].nodeid == created[b"x"].child_nodeid != 0
    of_file = [element for element in elements if element.name == b"file"]
    assert {element.nodeid for element in of_file} == {created[b"y"].child_nodeid}
    kinds = {element.mask for element in of_file}
    assert {Event.CREATE, Event.MODIFY, Event.CLOSE_WRITE} <= kinds
    # It is the number that the guest's own lookup gets.
    guest.hold("a/made/x/y")
    assert guest.node("a/made/x/y").nodeid == created[b"y"].child_nodeid


def test_a_directory_moved_into_the_share_is_held_at_once(guest: EventGuest, tmp_path: Path) -> None:
    outside = guest.share.path.parent / f"outside-{os.urandom(4).hex()}"
    outside.mkdir()
    watch_share(guest)
    os.rename(outside, guest.share.path / "a/moved")
    moved = next(element for element in guest.elements() if element.name == b"moved")
    assert moved.mask == Event.MOVED_TO | Event.ISDIR
    assert moved.child_nodeid
    # The guest has not looked it up.
    (guest.share.path / "a/moved/x").mkdir()
    made = next(element for element in guest.elements() if element.name == b"x")
    assert (made.mask, made.nodeid) == (Event.CREATE | Event.ISDIR, moved.child_nodeid)


def test_the_end_of_an_object_is_told(guest: EventGuest, source: Source) -> None:
    guest.hold("a/f")
    watch_share(guest)
    (guest.share.path / "a/f").unlink()
    lines = told(guest)
    if source is INOTIFY:  # has the directory's watch alone, which names no object that is gone
        assert lines == ["DELETE a[f]"]
    else:
        assert lines[-2:] == ["DELETE_SELF a/f", "DELETE a[f]=a/f"]


def test_the_guest_s_own_changes_are_not_echoed(guest: EventGuest) -> None:
    watch_share(guest)
    entry = guest.fs.mkdir(guest.node("a").nodeid, "own")
    guest.fs.write_file(entry.nodeid, "file", b"text")
    assert told(guest) == []


# ---- together with single watches, and its end ----------------------------------------------------------


def test_it_is_merged_with_single_watches(guest: EventGuest) -> None:
    guest.watch("a", Event.DELETE)
    watch_share(guest, Event.CREATE)
    host = guest.share.path
    for directory in ("a", "a/b"):
        (host / directory / "x").touch()
        (host / directory / "x").unlink()
    assert told(guest) == ["CREATE a[x]", "DELETE a[x]", "CREATE a/b[x]"]
    guest.fs.watch_share(0)
    (host / "a/x").touch()
    (host / "a/x").unlink()
    assert told(guest) == ["DELETE a[x]"]
    watch_share(guest, Event.CREATE)
    guest.unwatch("a")
    (host / "a/x").touch()
    assert told(guest) == ["CREATE a[x]"]


def test_order_holds_where_a_directory_is_watched_by_itself_too(guest: EventGuest) -> None:
    """The host sums up what nobody has read yet, and not all of its sources in the same way."""
    guest.watch("a", Event.DELETE)
    watch_share(guest, Event.CREATE)
    with held_up(guest.share.server.process.pid):
        for _ in range(3):
            (guest.share.path / "a/x").touch()
            (guest.share.path / "a/x").unlink()
    assert told(guest) == ["CREATE a[x]", "DELETE a[x]"] * 3


def test_a_rename_does_not_overtake_what_came_before_it(guest: EventGuest) -> None:
    watch_share(guest)
    with held_up(guest.share.server.process.pid):
        write(guest.share.path / "a/f")
        os.rename(guest.share.path / "a/f", guest.share.path / "a/b/g")
        (guest.share.path / "a/b/g").unlink()
    lines = told(guest)
    assert [line for line in lines if "CLOSE" not in line] == [
        "MODIFY a[f]",
        "MOVED_FROM a[f] pair 1",
        "MOVED_TO a/b[g] pair 1",
        "DELETE a/b[g]",
    ]


def test_a_rename_is_one_where_one_of_its_directories_is_watched_by_itself_too(guest: EventGuest) -> None:
    host = guest.share.path
    guest.watch("a")
    watch_share(guest)
    os.rename(host / "a/f", host / "a/b/g")
    assert told(guest)[:2] == ["MOVED_FROM a[f] pair 1", "MOVED_TO a/b[g] pair 1"]
    os.rename(host / "a/b/g", host / "a/f")
    assert told(guest)[:2] == ["MOVED_FROM a/b[g] pair 2", "MOVED_TO a[f] pair 2"]


def test_its_end_gives_everything_back(guest: EventGuest) -> None:
    before = event_counters(guest.share)
    assert before["share_watches"] == 0
    watch_share(guest, ALL_EVENTS)
    counters = event_counters(guest.share)
    assert (counters["share_watches"], counters["watches"]) == (1, before["watches"])
    guest.fs.watch_share(0)
    (guest.share.path / "a/unseen").mkdir()
    assert told(guest) == []
    after = event_counters(guest.share)
    assert [after[name] for name in ("share_watches", "watches", "host_marks")] == [
        before[name] for name in ("share_watches", "watches", "host_marks")
    ]


def test_it_ends_with_the_session(guest: EventGuest) -> None:
    watch_share(guest)
    guest.fs.destroy()
    assert event_counters(guest.share)["share_watches"] == 0
    assert awaited(lambda: event_counters(guest.share)["host_marks"] == 0)


@pytest.mark.parametrize("source", [INODE_MARKS, INOTIFY], ids=lambda source: source.name)
def test_too_many_directories_are_said_in_the_log(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, "--max-watches=4", private=True)
    for number in range(8):
        (share.path / str(number)).mkdir()
    guest = EventGuest(share, flags=FLAGS)
    watch_share(guest)
    guest.hold(*map(str, range(8)))
    (share.path / "0/seen").mkdir()
    assert told(guest)
    assert awaited(lambda: "the guest watches the whole share" in share.log())


def test_a_mark_on_the_file_system_needs_no_marks_beside_it(make_share: MakeShare) -> None:
    guest = EventGuest(start_share(make_share, FILESYSTEM_MARK, private=True), flags=FLAGS)
    marks = event_counters(guest.share)["host_marks"]
    watch_share(guest, WATCHED)
    assert event_counters(guest.share)["host_marks"] == marks
    assert guest.fs.root == abi.ROOT
