# SPDX-License-Identifier: Apache-2.0
"""Everything that can be done to a file on the host, and the exact elements that the guest gets for it.

Must not test queues or negotiation. The tree: `d` and `e` are watched directories, `u` is not watched;
`f`, `sub` and `sub/g` in `d` are held by the guest, `x` in `d` exists but the guest has not looked it up.
Specification: docs/protocol.md, "Elements".
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import INOTIFY, SOURCES, Source, start_share
from tests.ring.events import WATCHED, Delivery, EventGuest, merged, write
from tests.ring.share import Share
from vhostfs.frontend.fsnotify import ALL_EVENTS, Event, Granted

pytestmark = pytest.mark.usefixtures("ours")

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


@pytest.fixture
def share(make_share: MakeShare, source: Source) -> Share:
    return start_share(make_share, source)


@pytest.fixture(params=Delivery, ids=lambda delivery: delivery.name.lower())
def delivery(request: pytest.FixtureRequest) -> Delivery:
    found: Delivery = request.param
    return found


@pytest.fixture
def guest(share: Share, delivery: Delivery) -> EventGuest:
    for name in ("d", "d/sub", "e", "u"):
        (share.path / name).mkdir()
    for name in ("d/f", "d/x", "d/sub/g", "e/k", "u/v"):
        (share.path / name).write_text("before")
    guest = EventGuest(share, delivery=delivery)
    guest.hold("d/f", "d/sub", "d/sub/g", "u")
    guest.watch("d")
    guest.watch("e")
    return guest


@dataclass(frozen=True)
class Case:
    """`act` gets the test's directory on the host."""

    name: str
    act: Callable[[Path], object]
    expected: list[str]


def exchange(one: Path, other: Path) -> None:
    if LIBC.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        fd = os.open(path.parent, os.O_PATH)
        bound.bind(f"/proc/self/fd/{fd}/{path.name}")
        os.close(fd)


def copy_range(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "r+b") as writer:
        os.copy_file_range(reader.fileno(), writer.fileno(), 6)


def send_file(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "r+b") as writer:
        os.sendfile(writer.fileno(), reader.fileno(), 0, 6)


def allocate(path: Path) -> None:
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 8192)


def replace_as_editors_do(path: Path) -> None:
    temporary = path.with_name(".f.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, b"after")
    os.fsync(fd)
    os.close(fd)
    os.rename(temporary, path)


CASES = [
    # names
    Case("mknod", lambda t: os.mknod(t / "d/new"), ["CREATE d[new]"]),
    Case("mkfifo", lambda t: os.mkfifo(t / "d/new"), ["CREATE d[new]"]),
    Case("mkdir", lambda t: os.mkdir(t / "d/new"), ["ISDIR|CREATE d[new]"]),
    Case("symlink", lambda t: os.symlink("nowhere", t / "d/new"), ["CREATE d[new]"]),
    Case("bind", lambda t: bind_socket(t / "d/new"), ["CREATE d[new]"]),
    Case("link", lambda t: os.link(t / "d/f", t / "e/new"), ["CREATE e[new]=d/f"]),
    Case("link of what the guest does not know", lambda t: os.link(t / "u/v", t / "d/n"), ["CREATE d[n]"]),
    Case("unlink", lambda t: os.unlink(t / "d/f"), ["DELETE d[f]=d/f"]),
    Case("unlink of what the guest does not know", lambda t: os.unlink(t / "d/x"), ["DELETE d[x]"]),
    Case(
        "rmdir",
        lambda t: shutil.rmtree(t / "d/sub"),
        ["ISDIR|DELETE d[sub]=d/sub"],
    ),
    Case(
        "name of 255 bytes",
        lambda t: os.mkdir(t / "d" / ("n" * 255)),
        [f"ISDIR|CREATE d[{'n' * 255}]"],
    ),
    Case("name that is no UTF-8", lambda t: os.mkdir(bytes(t) + b"/d/\xff\n"), ["ISDIR|CREATE d[\udcff\n]"]),
    # content
    Case("write", lambda t: write(t / "d/f"), ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]),
    Case(
        "append",
        lambda t: write(t / "d/f", b"more", os.O_APPEND),
        ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"],
    ),
    Case("write to an unknown one", lambda t: write(t / "d/x"), ["MODIFY d[x]", "CLOSE_WRITE d[x]"]),
    Case("truncate", lambda t: os.truncate(t / "d/f", 1), ["MODIFY d[f]=d/f"]),
    Case("grow", lambda t: os.truncate(t / "d/f", 10_000), ["MODIFY d[f]=d/f"]),
    Case("fallocate", lambda t: allocate(t / "d/f"), ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]),
    Case(
        "copy_file_range",
        lambda t: copy_range(t / "u/v", t / "d/f"),
        ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"],
    ),
    Case("sendfile", lambda t: send_file(t / "u/v", t / "d/f"), ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]),
    Case(
        "write of a new file",
        lambda t: (t / "d/new").write_bytes(b"content"),
        ["CREATE d[new]", "MODIFY d[new]", "CLOSE_WRITE d[new]"],
    ),
    # attributes
    Case("chmod", lambda t: os.chmod(t / "d/f", 0o600), ["ATTRIB d[f]=d/f"]),
    Case("chown", lambda t: os.chown(t / "d/f", os.geteuid(), os.getegid()), ["ATTRIB d[f]=d/f"]),
    Case("utime", lambda t: os.utime(t / "d/f", ns=(1, 2)), ["ATTRIB d[f]=d/f"]),
    Case("chmod of an unknown one", lambda t: os.chmod(t / "d/x", 0o600), ["ATTRIB d[x]"]),
    Case("setxattr", lambda t: os.setxattr(t / "d/f", "user.test", b"1"), ["ATTRIB d[f]=d/f"]),
    Case("chmod of the directory", lambda t: os.chmod(t / "d", 0o700), ["ISDIR|ATTRIB d"]),
    # renames
    Case(
        "rename",
        lambda t: os.rename(t / "d/f", t / "d/new"),
        ["MOVED_FROM d[f]=d/f pair 1", "MOVED_TO d[new]=d/f pair 1"],
    ),
    Case(
        "rename into another directory",
        lambda t: os.rename(t / "d/f", t / "e/f"),
        ["MOVED_FROM d[f]=d/f pair 1", "MOVED_TO e[f]=d/f pair 1"],
    ),
    Case(
        "rename of an unknown one",
        lambda t: os.rename(t / "d/x", t / "e/x"),
        ["MOVED_FROM d[x] pair 1", "MOVED_TO e[x] pair 1"],
    ),
    Case(
        "rename over another",
        lambda t: os.rename(t / "d/x", t / "d/f"),
        ["MOVED_FROM d[x] pair 1", "MOVED_TO d[f] pair 1"],
    ),
    Case(
        "rename of a directory",
        lambda t: os.rename(t / "d/sub", t / "e/sub"),
        ["ISDIR|MOVED_FROM d[sub]=d/sub pair 1", "ISDIR|MOVED_TO e[sub]=d/sub pair 1"],
    ),
    Case(
        "exchange",
        lambda t: exchange(t / "d/f", t / "e/k"),
        [
            "MOVED_FROM d[f]=d/f pair 1",
            "MOVED_TO e[k]=d/f pair 1",
            "MOVED_FROM e[k] pair 2",
            "MOVED_TO d[f] pair 2",
        ],
    ),
    Case(
        "rename out of what is watched",
        lambda t: os.rename(t / "d/f", t / "u/f"),
        ["MOVED_FROM d[f]=d/f half"],
    ),
    Case(
        "rename into what is watched",
        lambda t: os.rename(t / "u/v", t / "e/v"),
        ["MOVED_TO e[v] half"],
    ),
    Case(
        "the way editors save",
        lambda t: replace_as_editors_do(t / "d/f"),
        [
            "CREATE d[.f.tmp]",
            "MODIFY d[.f.tmp]",
            "CLOSE_WRITE d[.f.tmp]",
            "MOVED_FROM d[.f.tmp] pair 1",
            "MOVED_TO d[f] pair 1",
        ],
    ),
    # none of the guest's business
    Case("a directory that it only holds", lambda t: os.mkdir(t / "u/new"), []),
    Case("a file in a directory that it only holds", lambda t: write(t / "u/v"), []),
    Case("below a directory that it only holds", lambda t: write(t / "d/sub/g"), []),
    Case("opening and reading", lambda t: (t / "d/f").read_bytes(), []),
    Case("listing", lambda t: os.listdir(t / "d"), []),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_change_on_the_host_gives_exactly_these_elements(
    guest: EventGuest, share: Share, source: Source, case: Case
) -> None:
    case.act(share.path)
    assert guest.told() == source.sees(case.expected)


def test_rename_out_of_the_share_is_half_a_rename(
    make_share: MakeShare, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "export" / "d").mkdir(parents=True)
    share = start_share(make_share, source, directory=tmp_path / "export")
    (share.path / "d/f").touch()
    guest = EventGuest(share)
    guest.hold("d/f")
    guest.watch("d")
    os.rename(share.path / "d/f", tmp_path / "secret")
    os.rename(tmp_path / "secret", share.path / "d/back")
    assert guest.told() == source.sees(["MOVED_FROM d[f]=d/f half", "MOVED_TO d[back]=d/f half"])


def test_opening_reading_and_closing_are_told_when_asked_for(guest: EventGuest, share: Share) -> None:
    guest.watch("d", ALL_EVENTS | Event.EVENT_ON_CHILD)
    (share.path / "d/f").read_bytes()
    assert merged(guest.told()) == ["OPEN d[f]=d/f", "ACCESS d[f]=d/f", "CLOSE_NOWRITE d[f]=d/f"]
    write(share.path / "d/f")
    assert guest.told() == ["OPEN d[f]=d/f", "MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]
    os.listdir(share.path / "d")
    assert merged(guest.told()) == ["ISDIR|OPEN d", "ISDIR|ACCESS d", "ISDIR|CLOSE_NOWRITE d"]


def test_running_a_program_is_told(guest: EventGuest, share: Share, source: Source) -> None:
    """inotify does not know OPEN_EXEC, and calls it OPEN."""
    shutil.copy2("/bin/true", share.path / "d/run")
    guest.watch("d", (ALL_EVENTS & ~Event.ACCESS) | Event.EVENT_ON_CHILD)
    subprocess.run([share.path / "d/run"], check=True)
    told = merged(guest.told())
    assert [line for line in told if "OPEN_EXEC" not in line] == ["OPEN d[run]", "CLOSE_NOWRITE d[run]"]
    assert told.count("OPEN_EXEC d[run]") == (0 if source is INOTIFY else 1)


def test_each_of_many_changes_is_told(guest: EventGuest, share: Share) -> None:
    for i in range(100):
        os.mknod(share.path / f"d/{i}")
    assert guest.told() == [f"CREATE d[{i}]" for i in range(100)]


def test_the_truncation_of_a_rewrite_may_merge_with_its_write(guest: EventGuest, share: Share) -> None:
    (share.path / "d/f").write_bytes(b"after")
    assert merged(guest.told()) == ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]


def test_writes_through_a_mapping_are_told_by_no_source(guest: EventGuest, share: Share) -> None:
    with open(share.path / "d/f", "r+b") as file, mmap.mmap(file.fileno(), 6) as mapping:
        mapping[0:1] = b"X"
        mapping.flush()
    assert guest.told() == ["CLOSE_WRITE d[f]=d/f"]


# ---- objects watched for themselves ----------------------------------------------------------------------


def test_a_file_watched_alone_tells_of_itself(share: Share) -> None:
    (share.path / "f").touch()
    (share.path / "other").touch()
    guest = EventGuest(share)
    guest.watch("f", WATCHED & ~Event.EVENT_ON_CHILD)
    write(share.path / "other")
    os.mkdir(share.path / "new")
    write(share.path / "f")
    assert [without_name(line) for line in guest.told()] == ["MODIFY f", "CLOSE_WRITE f"]
    os.chmod(share.path / "f", 0o600)
    assert [without_name(line) for line in guest.told()] == ["ATTRIB f"]


def without_name(line: str) -> str:
    """A child event told as what it is for the object alone: whether the name is known is the source's."""
    words, _, place = line.partition(" ")
    return f"{words} {place.partition('=')[2] or place}"


def test_an_object_that_two_watches_ask_for_is_told_of_once(guest: EventGuest, share: Share) -> None:
    guest.watch("d/f", WATCHED & ~Event.EVENT_ON_CHILD)
    guest.watch("d/sub")
    write(share.path / "d/f")
    os.chmod(share.path / "d/sub", 0o700)
    told = guest.told()
    assert told[:2] == ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]
    assert [without_name(line) for line in told[2:]] == ["ISDIR|ATTRIB d/sub"]


def test_a_renamed_object_moves_itself(share: Share) -> None:
    (share.path / "f").touch()
    guest = EventGuest(share)
    guest.watch("f", WATCHED & ~Event.EVENT_ON_CHILD)
    os.rename(share.path / "f", share.path / "g")
    assert guest.told() == ["MOVE_SELF f"]


def test_a_renamed_directory_moves_itself(share: Share) -> None:
    (share.path / "one").mkdir()
    guest = EventGuest(share)
    guest.watch("one")
    os.rename(share.path / "one", share.path / "two")
    os.mknod(share.path / "two/new")
    assert guest.told() == ["ISDIR|MOVE_SELF one", "CREATE one[new]"]


def test_the_rename_of_a_watched_object_in_a_watched_directory(guest: EventGuest, share: Share) -> None:
    guest.watch("d/f", WATCHED & ~Event.EVENT_ON_CHILD)
    os.rename(share.path / "d/f", share.path / "e/f")
    assert guest.told() == ["MOVED_FROM d[f]=d/f pair 1", "MOVED_TO e[f]=d/f pair 1", "MOVE_SELF d/f"]


def test_the_last_link_takes_the_object_along(share: Share) -> None:
    (share.path / "f").touch()
    os.link(share.path / "f", share.path / "other")
    guest = EventGuest(share)
    guest.watch("f", WATCHED & ~Event.EVENT_ON_CHILD)
    os.unlink(share.path / "other")
    assert guest.told() == ["ATTRIB f"]
    os.unlink(share.path / "f")
    assert guest.told() == ["ATTRIB f", "DELETE_SELF f"]


def test_the_end_of_a_watched_file_in_a_watched_directory(
    guest: EventGuest, share: Share, source: Source
) -> None:
    guest.watch("d/f", WATCHED & ~Event.EVENT_ON_CHILD)
    os.unlink(share.path / "d/f")
    assert guest.told() == source.sees(["ATTRIB d/f", "DELETE_SELF d/f", "DELETE d[f]=d/f"])


def test_the_end_of_an_object_is_told_in_order_every_time(
    guest: EventGuest, share: Share, source: Source
) -> None:
    for i in range(60):
        path = f"d/end{i}"
        (share.path / path).touch()
        guest.watch(path, WATCHED & ~Event.EVENT_ON_CHILD)
        os.unlink(share.path / path)
        expected = [f"ATTRIB {path}", f"DELETE_SELF {path}", f"DELETE d[end{i}]={path}"]
        assert guest.told() == source.sees(expected)
        guest.forget(path)


def test_an_object_and_its_names_are_told_of_in_order_every_time(
    guest: EventGuest, share: Share, source: Source
) -> None:
    guest.watch("d/f", WATCHED & ~Event.EVENT_ON_CHILD)
    for i in range(60):
        os.rename(share.path / "d/f", share.path / "e/g")
        pair = f"pair {2 * i + 1}"
        assert guest.told() == [f"MOVED_FROM d[f]=d/f {pair}", f"MOVED_TO e[g]=d/f {pair}", "MOVE_SELF d/f"]
        os.link(share.path / "e/g", share.path / "d/h")
        assert guest.told() == ["ATTRIB d/f", "CREATE d[h]=d/f"]
        os.unlink(share.path / "d/h")
        assert guest.told() == source.sees(["ATTRIB d/f", "DELETE d[h]=d/f"])
        os.rename(share.path / "e/g", share.path / "d/f")
        pair = f"pair {2 * i + 2}"
        assert guest.told() == [f"MOVED_FROM e[g]=d/f {pair}", f"MOVED_TO d[f]=d/f {pair}", "MOVE_SELF d/f"]


def test_a_removed_directory_deletes_itself(share: Share) -> None:
    (share.path / "gone").mkdir()
    guest = EventGuest(share)
    guest.watch("gone")
    os.rmdir(share.path / "gone")
    assert guest.told() == ["ISDIR|DELETE_SELF gone"]


def test_a_file_that_a_rename_replaces_deletes_itself(guest: EventGuest, share: Share) -> None:
    guest.watch("d/f", WATCHED & ~Event.EVENT_ON_CHILD)
    os.rename(share.path / "d/x", share.path / "d/f")
    told = guest.told()
    assert [line for line in told if line.endswith(" d/f")] == ["ATTRIB d/f", "DELETE_SELF d/f"]
    assert [line for line in told if not line.endswith(" d/f")] == [
        "MOVED_FROM d[x] pair 1",
        "MOVED_TO d[f] pair 1",
    ]


def test_a_file_kept_open_on_the_host_is_deleted_when_its_last_link_goes(share: Share) -> None:
    (share.path / "f").touch()
    guest = EventGuest(share)
    guest.watch("f", WATCHED & ~Event.EVENT_ON_CHILD)
    with open(share.path / "f", "rb"):
        os.unlink(share.path / "f")
        assert guest.told()[:1] == ["ATTRIB f"]


def test_a_subdirectory_tells_of_itself_for_the_watchers_of_its_parent(
    guest: EventGuest, share: Share
) -> None:
    """By its name: the guest need not know it."""
    os.chmod(share.path / "d/sub", 0o700)
    assert guest.told() == ["ISDIR|ATTRIB d[sub]=d/sub"]


def test_a_subdirectory_that_the_guest_does_not_hold_is_told_of_by_its_parent(
    guest: EventGuest, share: Share
) -> None:
    os.mkdir(share.path / "d/new")
    guest.told()
    os.chmod(share.path / "d/new", 0o700)
    assert guest.told() == ["ISDIR|ATTRIB d[new]"]


def test_hard_links_are_told_by_the_name_that_was_used(
    guest: EventGuest, share: Share, source: Source
) -> None:
    os.link(share.path / "d/f", share.path / "e/hard")
    assert guest.told() == ["CREATE e[hard]=d/f"]
    guest.hold("e/hard")
    assert guest.node("e/hard") == guest.node("d/f")
    write(share.path / "e/hard")
    assert guest.told() == ["MODIFY e[hard]=d/f", "CLOSE_WRITE e[hard]=d/f"]
    write(share.path / "d/f")
    assert guest.told() == ["MODIFY d[f]=d/f", "CLOSE_WRITE d[f]=d/f"]
    os.unlink(share.path / "e/hard")
    assert guest.told() == source.sees(["DELETE e[hard]=d/f"])


# ---- what was agreed -------------------------------------------------------------------------------------


def watching_with(share: Share, flags: int, mask: int = ALL_EVENTS) -> EventGuest:
    (share.path / "d").mkdir()
    (share.path / "d/f").touch()
    guest = EventGuest(share, flags=flags, mask=mask)
    guest.hold("d/f")
    guest.watch("d")
    return guest


def test_without_the_rename_flag_halves_are_plain(share: Share) -> None:
    guest = watching_with(share, Granted.VIRTQUEUE | Granted.CHILD)
    os.rename(share.path / "d/f", share.path / "d/new")
    away, here = guest.elements()
    assert [guest.describe(half) for half in (away, here)] == [
        "MOVED_FROM d[f]=d/f half",
        "MOVED_TO d[new]=d/f half",
    ]
    assert away.cookie == here.cookie != 0


def test_without_the_child_flag_no_child_is_named(share: Share) -> None:
    guest = watching_with(share, Granted.VIRTQUEUE | Granted.RENAME)
    write(share.path / "d/f")
    os.rename(share.path / "d/f", share.path / "d/new")
    assert guest.told() == [
        "MODIFY d[f]",
        "CLOSE_WRITE d[f]",
        "MOVED_FROM d[f] pair 1",
        "MOVED_TO d[new] pair 1",
    ]


def test_what_the_driver_cannot_raise_is_not_told(share: Share) -> None:
    guest = watching_with(share, Granted.VIRTQUEUE, Event.CREATE | Event.MODIFY)
    write(share.path / "d/f")
    os.mknod(share.path / "d/new")
    os.unlink(share.path / "d/f")
    assert guest.told() == ["MODIFY d[f]", "CREATE d[new]"]


def test_a_host_that_does_not_join_renames_tells_both_halves(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, "--no-fan-rename")
    guest = watching_with(share, Granted.VIRTQUEUE | Granted.RENAME)
    os.rename(share.path / "d/f", share.path / "d/new")
    told = [
        line.rsplit(" ", 2)[0] if " pair " in line else line.removesuffix(" half") for line in guest.told()
    ]
    assert told == ["MOVED_FROM d[f]", "MOVED_TO d[new]"]


# ---- what the watch says ---------------------------------------------------------------------------------


def test_the_newest_watch_counts(guest: EventGuest, share: Share) -> None:
    guest.watch("d", Event.CREATE)
    os.mknod(share.path / "d/new")
    os.unlink(share.path / "d/new")
    write(share.path / "d/f")
    assert guest.told() == ["CREATE d[new]"]
    guest.watch("d", Event.DELETE | Event.MODIFY | Event.EVENT_ON_CHILD)
    os.mknod(share.path / "d/newer")
    write(share.path / "d/f")
    os.unlink(share.path / "d/x")
    assert guest.told() == ["MODIFY d[f]=d/f", "DELETE d[x]"]


def test_without_event_on_child_a_directory_tells_nothing_of_its_files(
    guest: EventGuest, share: Share
) -> None:
    guest.watch("d", ALL_EVENTS)
    write(share.path / "d/f")
    os.chmod(share.path / "d", 0o700)
    assert guest.told() == ["ISDIR|ATTRIB d"]


def test_an_ended_watch_tells_nothing_and_the_others_go_on(guest: EventGuest, share: Share) -> None:
    guest.unwatch("d")
    os.mknod(share.path / "d/new")
    os.mknod(share.path / "e/new")
    assert guest.told() == ["CREATE e[new]"]
    guest.watch("d")
    os.unlink(share.path / "d/new")
    assert guest.told() == ["DELETE d[new]"]


def test_a_forgotten_object_is_no_longer_watched(share: Share) -> None:
    (share.path / "d").mkdir()
    guest = EventGuest(share)
    guest.watch("d")
    before = guest.node("d")
    guest.forget("d")
    os.mknod(share.path / "d/unseen")
    assert guest.told() == []
    assert guest.node("d") != before, "a forgotten inode came back under its old nodeid and generation"
    os.mknod(share.path / "d/still unseen")
    assert guest.told() == [], "the watch came back without being asked for"
    guest.watch("d")
    os.mknod(share.path / "d/seen")
    assert guest.told() == ["CREATE d[seen]"]


def test_an_object_moved_away_from_the_watched_directory_takes_its_events_along(
    guest: EventGuest, share: Share
) -> None:
    os.rename(share.path / "d/f", share.path / "u/f")
    guest.told()
    write(share.path / "u/f")
    assert guest.told() == []


def test_a_directory_made_later_can_be_watched(guest: EventGuest, share: Share) -> None:
    os.mkdir(share.path / "d/later")
    assert guest.told() == ["ISDIR|CREATE d[later]"]
    guest.watch("d/later")
    os.mknod(share.path / "d/later/new")
    assert guest.told() == ["CREATE d/later[new]"]


def test_names_reused_at_once_are_told_for_the_right_objects(
    guest: EventGuest, share: Share, source: Source
) -> None:
    os.unlink(share.path / "d/f")
    os.mkdir(share.path / "d/f")
    assert guest.told() == source.sees(["DELETE d[f]=d/f", "ISDIR|CREATE d[f]"])
