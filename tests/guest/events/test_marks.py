# SPDX-License-Identifier: Apache-2.0
"""fanotify in the guest: one mark on the file system sees the whole share, whatever was looked up before.

Must not know how events travel. Specification: fanotify(7), fanotify_mark(2); watch-fanotify.c;
docs/protocol.md, "Watching the whole share".
"""

from __future__ import annotations

import ctypes
import enum
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import image_or_lacking
from tests.guest.events.conftest import (
    SOURCES,
    EventSession,
    MakeWatchedPlace,
    Parts,
    WatchedPlace,
    as_share,
    complaints_of,
    start_share,
)
from tests.guest.events.watching import FANOTIFY_PROGRAM, Control, In
from tests.guest.place import Place, awaited
from tests.limits import HANG_S
from tests.server import held_up
from vhostfs.vm.agent import RunningCommand
from vhostfs.vm.guest import Guest
from vhostfs.vm.kernel import DEFAULT_SERIES, SERIES
from vhostfs.vm.lifeline import Lifeline

told_on_mounts = pytest.mark.skipif(
    os.environ.get("VHOSTFS_TEST_KERNEL") == "6.1",
    reason="before Linux 6.10 marks on mounts are not told of the host's changes",
)


class Fan(enum.IntFlag):
    """Event bits of fanotify."""

    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    OPEN = 0x20
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    Q_OVERFLOW = 0x4000
    RENAME = 0x1000_0000
    ONDIR = 0x4000_0000


CHANGES = (
    Fan.MODIFY
    | Fan.ATTRIB
    | Fan.CLOSE_WRITE
    | Fan.MOVED_FROM
    | Fan.MOVED_TO
    | Fan.CREATE
    | Fan.DELETE
    | Fan.ONDIR
)
_OTHERS = re.compile(r"(dir elsewhere .*)?fid #\d+$")
Seen = dict[str, Fan]
"""What happened, by what the record says of where."""


def read_events(output: bytes) -> Seen:
    """fanotify merges what happened to one name, so what counts is all that happened there."""
    seen: Seen = {}
    for line in output[: output.rfind(b"\n") + 1].decode("utf-8", "surrogateescape").splitlines():
        first, _, rest = line.partition(" ")
        if first not in ("ready", "removed", "left"):
            seen[rest] = seen.get(rest, Fan(0)) | Fan(int(first, 16))
    return seen


class Marked:
    """A watcher with one mark in the guest and, where the host lets us, its twin on the host."""

    def __init__(
        self,
        place: Place,
        control: Control,
        program: Path | None,
        mask: Fan,
        options: str = "",
    ) -> None:
        self.control = control
        # Where the walk of a large share may take some time.
        self.command: RunningCommand = place.guest.start(
            f"exec {FANOTIFY_PROGRAM} {options.replace('@', place.inside)} {int(mask):x} {place.inside}",
            stdin=True,
        )
        self.command.wait_for_output(b"ready\n", HANG_S)
        self._native: subprocess.Popen[bytes] | None = None
        if program is not None and os.geteuid() == 0:
            words = [*options.replace("@", str(place.host)).split(), f"{int(mask):x}", str(place.host)]
            self._native = subprocess.Popen(
                [str(program), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self._native.stdout is not None
            assert self._native.stdout.readline() == b"ready\n"
            os.set_blocking(self._native.stdout.fileno(), False)
        self._native_output = bytearray()
        self._used = self._native_used = 0

    def _new(self) -> Seen:
        return read_events(self.command.stdout[self._used :])

    def _native_new(self, expected: Seen) -> Seen:
        """Without objects by number that nobody expects: whose are they, on a file system that others use?"""
        assert self._native is not None
        assert self._native.stdout is not None
        self._native_output += self._native.stdout.read() or b""
        seen = read_events(bytes(self._native_output[self._native_used :]))
        return {where: what for where, what in seen.items() if where in expected or not _OTHERS.match(where)}

    def step(self, action: Callable[[], object], expected: Seen) -> None:
        """Does something on the host: both watchers then have seen exactly `expected` since the last step."""
        action()
        awaited(lambda: self._new() == expected, HANG_S)
        if self._native is not None:
            awaited(lambda: self._native_new(expected) == expected, HANG_S)
            assert self._native_new(expected) == expected, "natively on the host"
            self._native_used = len(self._native_output)
        assert self._new() == expected, "in the guest"
        self._used = len(self.command.stdout)

    def so_far(self) -> Seen:
        """What the guest's has seen since the last step."""
        return self._new()

    def forget(self) -> None:
        """The next step begins here."""
        self._used = len(self.command.stdout)

    def remove(self) -> None:
        """Takes the mark away."""
        self.command.write_stdin(b"remove\n")
        self.command.wait_for_output(b"removed\n", HANG_S)

    def leave(self) -> None:
        """Lets the file system be unmounted."""
        self.command.write_stdin(b"leave\n")
        self.command.wait_for_output(b"left\n", HANG_S)

    def close(self) -> None:
        if self._native is not None:
            assert self._native.stdin is not None
            self._native.stdin.close()
            assert self._native.wait(HANG_S) == 0
        if self.command.status is None:
            self.command.close_stdin()
            self.command.wait(HANG_S).check()


MakeMarked = Callable[..., Marked]


@pytest.fixture
def marked(session: EventSession) -> Iterator[MakeMarked]:
    """marked(watched, options, mask=CHANGES, with_twin=True): at the end the server watches no more."""
    made: list[Marked] = []

    def make(watched: WatchedPlace, options: str, mask: Fan = CHANGES, *, with_twin: bool = True) -> Marked:
        program = session.parts.programs[FANOTIFY_PROGRAM] if with_twin else None
        made.append(Marked(watched.place, watched.control, program, mask, options))
        return made[-1]

    yield make
    for watcher in made:
        watcher.close()
    for watcher in made:
        assert share_watches(watcher.control, 0) == 0
    assert awaited(lambda: held_directories(session.guest) == 0)


def share_watches(control: Control, wanted: int) -> int:
    """The server's counter once it is `wanted`, or when it does not come to be."""
    awaited(lambda: control.counters()["share_watches"] == wanted, HANG_S)
    return control.counters()["share_watches"]


def held_directories(guest: Guest) -> int:
    """By the driver, of all shares."""
    text = guest.run("cat /sys/bus/virtio/devices/virtio*/notifications/directories", HANG_S).check().text
    return sum(map(int, text.split()))


def number(path: Path) -> str:
    """As the watcher names what is no directory."""
    return f"#{path.lstat().st_ino}"


def exchange(one: Path, other: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE, of absolute paths."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-1, bytes(one), -1, bytes(other), 2) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


NAMES = "--report=dfid_name --mark=filesystem"


def deep_changes(host: Path, watcher: Marked) -> None:
    """Of everything, in a directory that the guest has never looked up."""
    deep = host / "one/two/three"
    watcher.step(
        lambda: (deep / "file").write_text("text"),
        {"dir one/two/three file": Fan.CREATE | Fan.MODIFY | Fan.CLOSE_WRITE},
    )
    watcher.step(lambda: os.chmod(deep / "file", 0o600), {"dir one/two/three file": Fan.ATTRIB})
    watcher.step(lambda: os.truncate(deep / "old", 1), {"dir one/two/three old": Fan.MODIFY})
    watcher.step((deep / "new").mkdir, {"dir one/two/three new": Fan.CREATE | Fan.ONDIR})
    watcher.step(lambda: os.chmod(deep, 0o700), {"dir one/two/three .": Fan.ATTRIB | Fan.ONDIR})
    watcher.step(
        lambda: os.rename(deep / "file", host / "four/renamed"),
        {"dir one/two/three file": Fan.MOVED_FROM, "dir four renamed": Fan.MOVED_TO},
    )
    watcher.step((host / "four/renamed").unlink, {"dir four renamed": Fan.DELETE})
    watcher.step((deep / "new").rmdir, {"dir one/two/three new": Fan.DELETE | Fan.ONDIR})


def make_tree(host: Path) -> None:
    """What there is before anybody watches."""
    (host / "one/two/three").mkdir(parents=True)
    (host / "one/two/three/old").write_text("before")
    (host / "four").mkdir()


def test_a_mark_on_the_file_system_sees_directories_that_were_never_looked_up(
    watched: WatchedPlace, marked: MakeMarked
) -> None:
    make_tree(watched.host)
    deep_changes(watched.host, marked(watched, NAMES))


@pytest.mark.parametrize("tag", SOURCES)
def test_it_does_so_whatever_the_host_s_source_is(
    watched_on: MakeWatchedPlace, marked: MakeMarked, tag: str
) -> None:
    watched = watched_on(tag)
    make_tree(watched.host)
    deep_changes(watched.host, marked(watched, NAMES))


def test_file_handles_in_events_lead_to_the_objects(watched: WatchedPlace, marked: MakeMarked) -> None:
    host = watched.host
    make_tree(host)
    deep = host / "one/two/three"
    watcher = marked(watched, "--report=target --mark=filesystem")
    old = number(deep / "old")
    watcher.step(lambda: os.truncate(deep / "old", 1), {f"dir one/two/three old fid {old}": Fan.MODIFY})
    watcher.step(
        (deep / "sub").mkdir, {"dir one/two/three sub fid one/two/three/sub": Fan.CREATE | Fan.ONDIR}
    )
    watcher.step(
        lambda: os.rename(deep / "old", host / "four/moved"),
        {
            f"dir one/two/three old fid {old}": Fan.MOVED_FROM,
            f"dir four moved fid {old}": Fan.MOVED_TO,
        },
    )
    watcher.step(lambda: os.chmod(host / "four", 0o700), {"dir four .": Fan.ATTRIB | Fan.ONDIR})


def test_an_object_is_named_of_which_the_guest_knows_no_more_than_the_name_it_loses(
    watched: WatchedPlace, marked: MakeMarked
) -> None:
    host = watched.host
    make_tree(host)
    (host / "four/other").write_text("other")
    watcher = marked(watched, "--report=target --mark=filesystem")
    watched.place.sh("stat one/two/three/old four/other")
    old, other = number(host / "one/two/three/old"), number(host / "four/other")
    watcher.step(
        lambda: exchange(host / "one/two/three/old", host / "four/other"),
        {
            f"dir one/two/three old fid {old}": Fan.MOVED_FROM,
            f"dir four other fid {old}": Fan.MOVED_TO,
            f"dir four other fid {other}": Fan.MOVED_FROM,
            f"dir one/two/three old fid {other}": Fan.MOVED_TO,
        },
    )


def test_a_group_that_wants_no_names_gets_the_objects(watched: WatchedPlace, marked: MakeMarked) -> None:
    host = watched.host
    make_tree(host)
    old = number(host / "one/two/three/old")
    watcher = marked(watched, "--report=fid --mark=filesystem")
    watcher.step(lambda: os.truncate(host / "one/two/three/old", 1), {f"fid {old}": Fan.MODIFY})
    watcher.step((host / "one/new").mkdir, {"fid one": Fan.CREATE | Fan.ONDIR})


def test_a_rename_has_both_names(watched: WatchedPlace, marked: MakeMarked) -> None:
    host = watched.host
    make_tree(host)
    watcher = marked(watched, NAMES, Fan.RENAME | Fan.ONDIR)
    deep = host / "one/two/three"
    watcher.step(
        lambda: os.rename(deep / "old", deep / "new"),
        {"old one/two/three old new one/two/three new": Fan.RENAME},
    )
    watcher.step(
        lambda: os.rename(deep / "new", host / "four/it"), {"old one/two/three new new four it": Fan.RENAME}
    )
    watcher.step(
        lambda: os.rename(deep, host / "four/dir"),
        {"old one/two three new four dir": Fan.RENAME | Fan.ONDIR},
    )
    # It is still watched, by the name that it has now.
    watcher.step(
        lambda: os.rename(host / "four/it", host / "four/dir/back"),
        {"old four it new four/dir back": Fan.RENAME},
    )


@pytest.mark.parametrize("tag", ["auto", *SOURCES])
def test_a_rename_of_which_one_side_is_marked_has_that_side(
    watched_on: MakeWatchedPlace, marked: MakeMarked, tag: str
) -> None:
    watched = watched_on(tag)
    host = watched.host
    make_tree(host)
    watched.place.sh("ls -R")
    watcher = marked(watched, "--report=dfid_name --mark=inode", Fan.RENAME | Fan.ONDIR)
    (host / "file").touch()
    watcher.step(lambda: os.rename(host / "file", host / "four/file"), {"old . file": Fan.RENAME})
    watcher.step(lambda: os.rename(host / "four/file", host / "back"), {"new . back": Fan.RENAME})
    watcher.step(lambda: os.rename(host / "back", host / "again"), {"old . back new . again": Fan.RENAME})
    watcher.step(lambda: os.rename(host / "one", host / "four/one"), {"old . one": Fan.RENAME | Fan.ONDIR})


def test_an_ignore_mask_is_respected(watched: WatchedPlace, marked: MakeMarked) -> None:
    host = watched.host
    make_tree(host)
    watcher = marked(watched, f"{NAMES} --ignore={int(Fan.CREATE):x}:@/four", Fan.CREATE | Fan.DELETE)
    (host / "four/ignored").touch()
    watcher.step((host / "four/ignored").unlink, {"dir four ignored": Fan.DELETE})
    watcher.step((host / "one/seen").touch, {"dir one seen": Fan.CREATE})


def test_a_tree_that_is_made_on_the_host_is_seen_from_its_first_entry_on(
    watched: WatchedPlace, marked: MakeMarked
) -> None:
    watcher = marked(watched, NAMES)

    def build() -> None:
        for directory in ("tree", "tree/a", "tree/a/b", "tree/c"):
            (watched.host / directory).mkdir()
            (watched.host / directory / "file").write_text("text")

    written = Fan.CREATE | Fan.MODIFY | Fan.CLOSE_WRITE
    watcher.step(
        build,
        {
            "dir . tree": Fan.CREATE | Fan.ONDIR,
            "dir tree file": written,
            "dir tree a": Fan.CREATE | Fan.ONDIR,
            "dir tree/a file": written,
            "dir tree/a b": Fan.CREATE | Fan.ONDIR,
            "dir tree/a/b file": written,
            "dir tree c": Fan.CREATE | Fan.ONDIR,
            "dir tree/c file": written,
        },
    )
    held = held_directories(watched.place.guest)
    shutil.rmtree(watched.host / "tree")
    assert awaited(lambda: held_directories(watched.place.guest) == held - 4)


def test_a_tree_that_is_moved_into_the_share_is_walked(
    watched: WatchedPlace, marked: MakeMarked, real_directory: Path
) -> None:
    outside = real_directory / "outside-of-all-shares"
    (outside / "x/y").mkdir(parents=True)
    watcher = marked(watched, NAMES)
    held = held_directories(watched.place.guest)
    watcher.step(
        lambda: os.rename(outside, watched.host / "inside"), {"dir . inside": Fan.MOVED_TO | Fan.ONDIR}
    )
    assert awaited(lambda: held_directories(watched.place.guest) == held + 3)
    watcher.step(
        (watched.host / "inside/x/y/new").touch, {"dir inside/x/y new": Fan.CREATE | Fan.CLOSE_WRITE}
    )


def test_the_guest_s_own_changes_are_seen_once_as_ever(watched: WatchedPlace, marked: MakeMarked) -> None:
    watcher = marked(watched, NAMES, with_twin=False)

    def in_guest(command: str, expected: Seen) -> None:
        watcher.step(lambda: watched.place.sh(command), expected)

    in_guest("mkdir own", {"dir . own": Fan.CREATE | Fan.ONDIR})
    # What the guest made itself, the host's changes are seen in.
    watcher.step((watched.host / "own/of-the-host").mkdir, {"dir own of-the-host": Fan.CREATE | Fan.ONDIR})
    in_guest("rmdir own/of-the-host", {"dir own of-the-host": Fan.DELETE | Fan.ONDIR})
    in_guest(
        "mv own renamed", {"dir . own": Fan.MOVED_FROM | Fan.ONDIR, "dir . renamed": Fan.MOVED_TO | Fan.ONDIR}
    )
    in_guest("rmdir renamed", {"dir . renamed": Fan.DELETE | Fan.ONDIR})


def test_the_server_watches_the_share_until_the_last_mark_goes(
    watched: WatchedPlace, marked: MakeMarked
) -> None:
    make_tree(watched.host)
    assert share_watches(watched.control, 0) == 0
    one = marked(watched, NAMES, with_twin=False)
    other = marked(watched, NAMES, Fan.DELETE, with_twin=False)
    assert share_watches(watched.control, 1) == 1
    one.remove()
    (watched.host / "four/x").touch()
    other.step((watched.host / "four/x").unlink, {"dir four x": Fan.DELETE})
    one.step(lambda: None, {})
    assert share_watches(watched.control, 1) == 1
    other.command.send_signal(signal.SIGKILL)
    other.command.wait(HANG_S)
    assert share_watches(watched.control, 0) == 0
    assert awaited(lambda: held_directories(watched.place.guest) == 0)
    delivered = watched.control.counters()["delivered"]
    (watched.host / "four/unseen").touch()
    watch = watched.watch("one", with_twin=False)
    watch.step((watched.host / "one/seen").mkdir, "CREATE|ISDIR seen")
    assert watched.control.counters()["delivered"] == delivered + 1


def test_inotify_beside_it_sees_what_it_sees_alone(watched: WatchedPlace, marked: MakeMarked) -> None:
    make_tree(watched.host)
    watcher = marked(watched, NAMES)
    watch = watched.watch("one/two/three")
    file = watched.host / "one/two/three/file"
    watch.step(lambda: file.write_text("text"), "CREATE file", "MODIFY file", "CLOSE_WRITE file")
    watch.step(lambda: file.rename(file.with_name("other")), "MOVED_FROM file #1", "MOVED_TO other #1")
    watch.step(file.with_name("other").unlink, "DELETE other")
    watcher.step(
        lambda: None,
        {
            "dir one/two/three file": Fan.CREATE | Fan.MODIFY | Fan.CLOSE_WRITE | Fan.MOVED_FROM,
            "dir one/two/three other": Fan.MOVED_TO | Fan.DELETE,
        },
    )


def test_fsnotifywait_prints_what_happens_anywhere(watched: WatchedPlace) -> None:
    make_tree(watched.host)
    inside = watched.place.inside
    share = f"/{inside.split('/')[1]}"
    deep = watched.host / "one/two/three"

    def waits(event: str, action: Callable[[], object], expected: str) -> None:
        """It ends with the first event: into a pipe, in monitor mode, Debian's prints nothing until then."""
        command = watched.place.start(f"exec fsnotifywait -S -e {event} --format '%w|%e|%f' {share}")
        command.wait_for_output(b"Watches established", HANG_S, "stderr")
        assert share_watches(watched.control, 1) == 1
        action()
        assert command.wait(HANG_S).text.splitlines()[-1] == f"{inside}/{expected}"

    waits("create", (deep / "file").touch, "one/two/three/|CREATE|file")
    waits("modify", lambda: (deep / "file").write_text("text"), "one/two/three/|MODIFY|file")
    waits("moved_to", lambda: (deep / "file").rename(watched.host / "four/new"), "four/|MOVED_TO|new")
    # It looks for the name itself, and finds what is true.
    waits("delete", (watched.host / "four/new").unlink, "four/|DELETE|new (deleted)")
    assert share_watches(watched.control, 0) == 0


@told_on_mounts
def test_a_mark_on_a_mount_sees_what_happens_to_files_below_it(
    watched: WatchedPlace, marked: MakeMarked
) -> None:
    """On the host nothing happens by a mount of the guest's; all of its mounts show it."""
    host = watched.host
    make_tree(host)
    old = host / "one/two/three/old"
    events = Fan.MODIFY | Fan.CLOSE_WRITE | Fan.OPEN
    names = marked(watched, "--report=dfid_name --mark=mount", events, with_twin=False)
    objects = marked(watched, "--report=dfid_name_fid --mark=mount", events)
    own = number(old)

    def write() -> None:
        with old.open("a") as stream:
            stream.write("more")

    names.step(write, {"dir one/two/three old": events})
    objects.step(lambda: None, {f"dir one/two/three old fid {own}": events})
    # What the guest does itself comes once, as ever.
    names.step(lambda: watched.place.sh("echo own >>four/mine"), {"dir four mine": events})


@told_on_mounts
def test_a_group_s_marks_on_mount_and_inodes_are_one(watched: WatchedPlace, marked: MakeMarked) -> None:
    """What an inode's mark ignores, the mount's does not tell."""
    host = watched.host
    make_tree(host)
    for name in ("one/old", "four/old"):
        (host / name).write_text("before")
    options = f"--report=dfid_name --mark=mount --ignore={int(Fan.MODIFY):x}:@/one/old"
    watcher = marked(watched, options, Fan.MODIFY, with_twin=False)
    os.truncate(host / "one/old", 1)
    watcher.step(lambda: os.truncate(host / "four/old", 1), {"dir four old": Fan.MODIFY})


@told_on_mounts
@pytest.mark.timeout(700, func_only=True)
def test_a_loss_is_told_to_every_group_whatever_it_marked(
    session: EventSession, watched_on: MakeWatchedPlace, marked: MakeMarked
) -> None:
    """The host's inotify queue overflows while the server is held up."""
    watched = watched_on("inotify")
    make_tree(watched.host)
    (watched.host / "four/file").write_text("before")
    on_file_system = marked(watched, NAMES, Fan.MOVED_TO | Fan.ONDIR, with_twin=False)
    on_mount = marked(watched, "--report=dfid_name --mark=mount", Fan.MODIFY, with_twin=False)
    by_inotify = watched.watch("four", mask=In.CREATE, with_twin=False)
    on_inode = marked(watched, "--report=dfid_name --mark=inode", Fan.CREATE, with_twin=False)
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    server = session.shares["inotify"].server
    assert watched.place.sh("ls four") == "file\n"
    with held_up(server.process.pid):
        for index in range(limit + 1000):
            (watched.host / "four" / str(index)).touch()
        (watched.host / "four/file").unlink()
    groups = (on_file_system, on_mount, on_inode)

    def told() -> list[bool]:
        return [Fan.Q_OVERFLOW in each.so_far().get("", Fan(0)) for each in groups]

    assert awaited(lambda: all(told())), (told(), watched.control.counters())
    assert awaited(lambda: any(event.mask == In.Q_OVERFLOW for event in by_inotify.events()))
    # What the guest knew is forgotten, and what comes then is right.
    assert "file" not in watched.place.sh("ls four").split()
    for each in groups:
        each.forget()
    on_file_system.step(
        lambda: os.rename(watched.host / "four", watched.host / "one/two/three/new"),
        {"dir one/two/three new": Fan.MOVED_TO | Fan.ONDIR},
    )
    on_mount.step(
        lambda: os.truncate(watched.host / "one/two/three/old", 1), {"dir one/two/three old": Fan.MODIFY}
    )


@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize("kernel", [name for name in SERIES if name != DEFAULT_SERIES])
def test_guests_of_the_other_kernels_see_it_too(parts: Parts, real_directory: Path, kernel: str) -> None:
    image = image_or_lacking(parts.launchpad, parts.image_spec(kernel))
    directory = real_directory / f"marks-{kernel}"
    directory.mkdir()
    make_tree(directory)
    with Lifeline() as lifeline:
        share = start_share(lifeline, directory, "share")
        machine = parts.launchpad.machine(image, (as_share(share, parts.qemu),), qemu=parts.qemu)
        with Guest(machine, lifeline=lifeline) as guest:
            place = Place(guest, directory, "/share")
            names = Marked(place, share.control, parts.programs[FANOTIFY_PROGRAM], CHANGES, NAMES)
            deep_changes(directory, names)
            names.close()
            assert share_watches(share.control, 0) == 0
            target = Marked(
                place,
                share.control,
                parts.programs[FANOTIFY_PROGRAM],
                Fan.RENAME | Fan.MODIFY,
                "--report=target --mark=filesystem",
            )
            old = number(directory / "one/two/three/old")
            target.step(
                lambda: os.truncate(directory / "one/two/three/old", 3),
                {f"dir one/two/three old fid {old}": Fan.MODIFY},
            )
            target.step(
                lambda: os.rename(directory / "one/two/three/old", directory / "four/new"),
                {f"old one/two/three old new four new fid {old}": Fan.RENAME},
            )
            # The share goes with the mark on it.
            target.leave()
            guest.run("cd /; umount /share", HANG_S).check()
            assert share_watches(share.control, 0) == 0
            target.close()
            guest.run("mount -t virtiofs share /share", HANG_S).check()
            again = Marked(place, share.control, None, CHANGES, NAMES)
            again.step((directory / "one/again").mkdir, {"dir one again": Fan.CREATE | Fan.ONDIR})
            again.close()
        complaints = complaints_of(guest, [share])
    assert not complaints
