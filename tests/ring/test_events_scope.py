# SPDX-License-Identifier: Apache-2.0
"""Whose changes a guest is told of: neither its own nor those outside the share, but all others'.

Must not test the forms of elements. Specification: docs/protocol.md, "What is told" and "Security".
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FANOTIFY, FILESYSTEM_MARK, SOURCES, Source, start_share
from tests.ring.events import WATCHED, EventGuest, merged, write
from tests.ring.share import Share
from tests.ring.test_submounts import mount_bind, mount_tmpfs, unmount
from vhostfs.frontend.fsnotify import Event

pytestmark = pytest.mark.usefixtures("ours")

SECRET = "SECRET-of-the-host"


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


@pytest.fixture(params=FANOTIFY, ids=lambda source: source.name)
def fanotify(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


def exported(make_share: MakeShare, source: Source, tmp_path: Path, *options: str) -> Share:
    """A share with a server of its own; beside the exported directory lies `outside`."""
    for name in ("export/d", "outside/other"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    return start_share(make_share, source, *options, directory=tmp_path / "export")


def assert_no_secret(guest: EventGuest) -> None:
    for region in guest.fs.vmm.memory.regions:
        memory = guest.fs.vmm.memory.at(region.guest_addr, region.size_bytes)
        assert SECRET.encode() not in bytes(memory), "a name from outside the share is in the guest's memory"


# ---- outside ---------------------------------------------------------------------------------------------


def test_nothing_outside_the_share_is_told(make_share: MakeShare, source: Source, tmp_path: Path) -> None:
    share = exported(make_share, source, tmp_path)
    guest = EventGuest(share)
    guest.watch("")
    guest.watch("d")
    outside = tmp_path / "outside"
    for place in (tmp_path, outside, outside / "other"):
        path = place / SECRET
        path.write_text(SECRET)
        write(path)
        path.chmod(0o600)
        path.rename(place / (SECRET + "-renamed"))
        (place / (SECRET + "-dir")).mkdir()
        (place / (SECRET + "-renamed")).unlink()
        (place / (SECRET + "-dir")).rmdir()
    os.mknod(share.path / "d/new")
    assert guest.told() == ["CREATE d[new]"]
    assert_no_secret(guest)


def test_names_outside_do_not_leak_by_renames(make_share: MakeShare, source: Source, tmp_path: Path) -> None:
    share = exported(make_share, source, tmp_path)
    (tmp_path / "outside" / SECRET).touch()
    guest = EventGuest(share)
    guest.watch("d")
    os.rename(tmp_path / "outside" / SECRET, share.path / "d/new")
    guest.hold("d/new")
    os.rename(share.path / "d/new", tmp_path / "outside/other" / SECRET)
    write(tmp_path / "outside/other" / SECRET)
    os.rename(tmp_path / "outside/other" / SECRET, tmp_path / SECRET)
    assert [line.partition("=")[0].removesuffix(" half") for line in guest.told()] == [
        "MOVED_TO d[new]",
        "MOVED_FROM d[new]",
    ]
    assert_no_secret(guest)


def test_names_outside_do_not_leak_by_hard_links(
    make_share: MakeShare, source: Source, tmp_path: Path
) -> None:
    """The guest watches the object and is told of the change, but not by what name it was made."""
    share = exported(make_share, source, tmp_path)
    (share.path / "d/f").touch()
    guest = EventGuest(share)
    guest.watch("d")
    guest.watch("d/f", WATCHED & ~Event.EVENT_ON_CHILD)
    os.link(share.path / "d/f", tmp_path / "outside" / SECRET)
    assert guest.told() == ["ATTRIB d/f"]
    write(tmp_path / "outside" / SECRET)
    assert guest.told() == ["MODIFY d/f", "CLOSE_WRITE d/f"]
    os.unlink(tmp_path / "outside" / SECRET)
    assert guest.told() == ["ATTRIB d/f"]
    assert_no_secret(guest)


def test_the_shares_own_name_does_not_leak_when_it_moves(
    make_share: MakeShare, source: Source, tmp_path: Path
) -> None:
    share = exported(make_share, source, tmp_path)
    guest = EventGuest(share)
    guest.watch("")
    os.rename(tmp_path / "export", tmp_path / SECRET)
    os.mknod(tmp_path / SECRET / "new")
    os.rename(tmp_path / SECRET, tmp_path / "export")
    told = guest.told()
    assert [line for line in told if "MOVE_SELF" not in line] == ["CREATE .[new]"]
    assert {line for line in told if "MOVE_SELF" in line} <= {"ISDIR|MOVE_SELF ."}
    assert_no_secret(guest)


# ---- the guest's own -------------------------------------------------------------------------------------


def change_everything(guest: EventGuest) -> None:
    """As a program in the guest does, by requests."""
    fs = guest.fs
    d = guest.node("d").nodeid
    entry, opened = fs.create(d, "own")
    fs.write(entry.nodeid, opened.fh, b"content")
    fs.setattr(entry.nodeid, size=3)
    fs.setattr(entry.nodeid, mode=0o600)
    fs.setattr(entry.nodeid, mtime_ns=10**9)
    fs.fallocate(entry.nodeid, opened.fh, 0, 0, 8192)
    fs.release(entry.nodeid, opened.fh)
    fs.link(entry.nodeid, d, "hard")
    fs.symlink(d, "link", "nowhere")
    fs.mkdir(d, "dir")
    fs.mknod(d, "fifo", 0o010644)
    fs.rename(d, "own", d, "renamed")
    fs.rename(d, "renamed", guest.node("e").nodeid, "renamed")
    fs.list(d)
    fs.read_file(entry.nodeid)
    fs.rmdir(d, "dir")
    for name in ("hard", "link", "fifo"):
        fs.unlink(d, name)
    fs.unlink(guest.node("e").nodeid, "renamed")


def test_the_guests_own_changes_are_not_told(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source)
    for name in ("d", "e"):
        (share.path / name).mkdir()
    guest = EventGuest(share)
    everything = WATCHED | Event.OPEN | Event.ACCESS | Event.CLOSE_NOWRITE
    guest.watch("d", everything)
    guest.watch("e", everything)
    change_everything(guest)
    os.mknod(share.path / "d/new")
    assert guest.told() == ["CREATE d[new]"]


@pytest.mark.usefixtures("needs_root")
def test_the_guests_own_changes_are_known_in_a_sandbox_too(
    make_share: MakeShare, source: Source, tmp_path: Path
) -> None:
    """Where the server has a process id that the host's other processes do not know it by."""
    share = exported(make_share, source, tmp_path, "--sandbox=namespace")
    (share.path / "e").mkdir()
    guest = EventGuest(share)
    guest.watch("d")
    guest.watch("e")
    change_everything(guest)
    os.mknod(share.path / "d/new")
    assert guest.told() == ["CREATE d[new]"]


def test_two_servers_tell_their_guests_of_each_other(
    make_share: MakeShare, source: Source, tmp_path: Path
) -> None:
    guests = []
    for _ in range(2):
        guest = EventGuest(exported(make_share, source, tmp_path))
        guest.watch("d")
        guests.append(guest)
    one, other = guests
    d = one.node("d").nodeid
    one.fs.write_file(d, "by one", b"content")
    one.fs.mkdir(d, "dir")
    one.fs.rename(d, "dir", d, "renamed")
    told = [line.partition("=")[0] for line in merged(other.told())]
    assert [line.removesuffix(" pair 1") for line in told] == [
        "CREATE d[by one]",
        "MODIFY d[by one]",
        "CLOSE_WRITE d[by one]",
        "ISDIR|CREATE d[dir]",
        "ISDIR|MOVED_FROM d[dir]",
        "ISDIR|MOVED_TO d[renamed]",
    ]
    assert one.told() == []


def test_what_the_host_changes_meanwhile_is_told_all_the_same(make_share: MakeShare, source: Source) -> None:
    """Guest and host work in one directory at the same time: only the guest's part is left out."""
    share = start_share(make_share, source)
    (share.path / "d").mkdir()
    guest = EventGuest(share, buffers=64)
    guest.watch("d", Event.CREATE | Event.DELETE)
    d = guest.node("d").nodeid
    done = threading.Event()

    def host() -> None:
        for i in range(500):
            os.mknod(share.path / f"d/host{i}")
        done.set()

    thread = threading.Thread(target=host)
    thread.start()
    turn = 0
    while not done.is_set() or turn < 50:
        guest.fs.mkdir(d, f"guest{turn}")
        guest.fs.rmdir(d, f"guest{turn}")
        turn += 1
    thread.join()
    assert guest.told() == [f"CREATE d[host{i}]" for i in range(500)]


# ---- other file systems and other ways to hold an inode --------------------------------------------------


@contextlib.contextmanager
def inner_mount(at: Path) -> Iterator[None]:
    at.mkdir()
    mount_tmpfs(at)
    try:
        yield
    finally:
        unmount(at)


@pytest.mark.usefixtures("needs_root")
def test_a_file_system_mounted_in_the_share_is_told_of_too(make_share: MakeShare, source: Source) -> None:
    share = start_share(make_share, source, "--announce-submounts")
    with inner_mount(share.path / "inner"):
        (share.path / "inner/f").touch()
        guest = EventGuest(share)
        guest.hold("inner/f")
        guest.watch("inner")
        os.mknod(share.path / "inner/new")
        write(share.path / "inner/f")
        os.rename(share.path / "inner/new", share.path / "inner/newer")
        assert [line.partition("=")[0].removesuffix(" pair 1") for line in guest.told()] == [
            "CREATE inner[new]",
            "MODIFY inner[f]",
            "CLOSE_WRITE inner[f]",
            "MOVED_FROM inner[new]",
            "MOVED_TO inner[newer]",
        ]
        share.unmount()


@pytest.mark.usefixtures("needs_root")
def test_a_directory_in_two_places_is_told_of_in_both(make_share: MakeShare, fanotify: Source) -> None:
    """A bind mount within the share: two inodes for the guest, one on the host."""
    share = start_share(make_share, fanotify, "--announce-submounts")
    for name in ("source", "bound"):
        (share.path / name).mkdir()
    mount_bind(share.path / "source", share.path / "bound")
    try:
        guest = EventGuest(share)
        guest.watch("source")
        guest.watch("bound")
        os.mknod(share.path / "bound/new")
        assert sorted(guest.told()) == ["CREATE bound[new]", "CREATE source[new]"]
        guest.unwatch("bound")
        os.unlink(share.path / "source/new")
        assert guest.told() == ["DELETE source[new]"]
    finally:
        share.unmount()
        unmount(share.path / "bound")


@pytest.mark.parametrize("handles", ["mandatory", "prefer"])
def test_inodes_without_a_descriptor_are_told_of_too(
    make_share: MakeShare, source: Source, handles: str
) -> None:
    """`prefer` with few descriptors: most inodes are held by file handle only."""
    limit = 300 if handles == "prefer" else None
    share = start_share(
        make_share,
        source,
        f"--inode-file-handles={handles}",
        private=True,
        descriptor_limit=limit,
    )
    for i in range(300):
        (share.path / f"d{i}").mkdir()
        (share.path / f"d{i}/f").touch()
    guest = EventGuest(share)
    for i in range(300):
        guest.hold(f"d{i}/f")
    for i in (0, 150, 299):
        guest.watch(f"d{i}")
    for i in (299, 0, 150):
        os.mknod(share.path / f"d{i}/new")
        write(share.path / f"d{i}/f")
        assert guest.told() == [
            f"CREATE d{i}[new]",
            f"MODIFY d{i}[f]=d{i}/f",
            f"CLOSE_WRITE d{i}[f]=d{i}/f",
        ]
        os.unlink(share.path / f"d{i}/f")
        assert guest.told() == source.sees([f"DELETE d{i}[f]=d{i}/f"])


def test_reused_inode_numbers_are_not_mistaken(make_share: MakeShare, fanotify: Source) -> None:
    """The guest still holds a file that is gone; its number belongs to another one by now."""
    share = start_share(make_share, fanotify)
    (share.path / "d").mkdir()
    guest = EventGuest(share)
    guest.watch("d")
    for i in range(50):
        (share.path / "d/f").touch()
        number = (share.path / "d/f").stat().st_ino
        guest.hold("d/f")
        guest.told()
        os.unlink(share.path / "d/f")
        (share.path / "d/f").touch()
        reused = (share.path / "d/f").stat().st_ino == number
        write(share.path / "d/f")
        told = guest.told()
        assert told[0] == "DELETE d[f]=d/f"
        assert "MODIFY d[f]" in told, "a change of the new file was told as one of the old"
        os.unlink(share.path / "d/f")
        guest.told()
        guest.forget("d/f")
        if reused and i > 10:
            break


def test_a_filesystem_mark_needs_no_marks_on_inodes(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK)
    for i in range(100):
        (share.path / str(i)).mkdir()
    guest = EventGuest(share)
    for i in range(100):
        guest.fs.watch(guest.node(str(i)).nodeid, WATCHED, guest.node(str(i)).generation)
    assert host_marks(share, ("fanotify",)) == 1


def test_marks_follow_the_watches(make_share: MakeShare, source: Source) -> None:
    """What nobody in the guest watches any more costs the host nothing."""
    share = start_share(make_share, source)
    for name in ("d", "e"):
        (share.path / name).mkdir()
    guest = EventGuest(share)
    idle = host_marks(share)
    guest.watch("d", WATCHED | Event.OPEN)
    guest.watch("e", WATCHED | Event.OPEN)
    both = host_marks(share)
    guest.unwatch("d")
    one = host_marks(share)
    guest.forget("e")
    guest.told()
    assert both > one > host_marks(share) == idle


def host_marks(share: Share, kinds: tuple[str, ...] = ("fanotify", "inotify")) -> int:
    """Marks and inotify watches of the server, as the kernel lists them."""
    marks = 0
    for pid in share.server.pids():
        # The process that sets the mark on the file system has the same group.
        if Path(f"/proc/{pid}/comm").read_text() == "vhostfs-mark\n":
            continue
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                for line in entry.read_text().splitlines():
                    words = line.split()
                    marks += words[0] in kinds and (
                        words[0] == "inotify" or words[1].startswith(("ino:", "mnt_id:", "sdev:"))
                    )
    return marks
