# SPDX-License-Identifier: Apache-2.0
"""Ways to watch and events of the object itself: in the guest as natively on a directory that nobody shares.

Each step is done to both directories, and both watchers must see what is expected of Linux.
Must not know how events travel. Specification: inotify(7); docs/events.md.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.events.conftest import SOURCES, EventSession, MakeWatchedPlace, WatchedPlace
from tests.guest.events.watching import (
    ALL,
    CHANGES,
    FANOTIFY_PROGRAM,
    PROGRAM,
    HostWatcher,
    In,
    Seen,
    read_lines,
    texts,
)
from tests.guest.place import awaited
from tests.limits import HANG_S, SETTLED_S

ONLYDIR, DONT_FOLLOW, EXCL_UNLINK = 0x0100_0000, 0x0200_0000, 0x0400_0000
MASK_CREATE, MASK_ADD, ONESHOT = 0x1000_0000, 0x2000_0000, 0x8000_0000
Action = Callable[[Path], object]


class Twins:
    """A directory of a share and one beside it, with a watcher each; watches have equal numbers in both."""

    def __init__(self, watched: WatchedPlace, twin: Path, program: Path, fence: str = "fence") -> None:
        """`fence`: a name of its own for each pair of watchers of the same directories."""
        self.watched = watched
        self.twin = twin
        self._program = program
        self._fence = fence
        self._before = watched.control.watches
        self._guest = watched.place.guest.start(f"exec {PROGRAM} 0", stdin=True)
        self._guest.wait_for_output(b"ready\n", HANG_S)
        self._native = HostWatcher(program, In(0), [])
        self._said = 0
        self._fences = 0
        self._used = [0, 0]
        self.both(lambda directory: (directory / fence).mkdir())
        assert self.watch(fence, In.CREATE) == "watching 0"

    def beside(self) -> Twins:
        """Two more watchers, of the same directories."""
        return Twins(self.watched, self.twin, self._program, f"{self._fence}-beside")

    def both(self, action: Action) -> None:
        """Done natively first."""
        for directory in (self.twin, self.watched.host):
            action(directory)

    def command(self, words: str, name: str = "") -> str:
        """What both watchers answer to this."""
        self._said += 1
        path = f"/{name}" if name else ""
        self._native.write_stdin(f"{words}{self.twin if name else ''}{path}\n".encode())
        self._guest.write_stdin(f"{words}{self.watched.place.inside if name else ''}{path}\n".encode())

        def answers() -> list[list[str]]:
            both = [read_lines(output.stdout)[1] for output in (self._native, self._guest)]
            return [[line for line in lines if line != "ready"] for lines in both]

        assert awaited(lambda: all(len(said) >= self._said for said in answers()), HANG_S, 0.005)
        native, guest = (said[self._said - 1] for said in answers())
        assert native == guest
        return native

    def watch(self, name: str, mask: int) -> str:
        """ "watching N", or "refused: WHY"."""
        return self.command(f"watch {int(mask):x} ", name)

    def step(self, action: Action, *expected: str) -> None:
        """Does something to both; both watchers then see exactly this since the last step."""
        self.both(action)
        self.see(*expected)

    def see(self, *expected: str) -> None:
        self._fences += 1
        fence = f"{self._fence}-{self._fences}"
        self.both(lambda directory: (directory / self._fence / fence).mkdir())
        outputs = (self._native, self._guest)

        def seen(which: int) -> list[Seen]:
            return read_lines(outputs[which].stdout)[0]

        def lines(which: int) -> list[str]:
            new = [event for event in seen(which)[self._used[which] :] if event.name != fence]
            return texts([Seen(event.watch - 1, event.mask, event.cookie, event.name) for event in new])

        for which, who in enumerate(("natively", "in the guest")):
            arrived = awaited(lambda: any(e.name == fence for e in seen(which)), HANG_S, 0.005)  # noqa: B023
            # Half a rename may wait a second for the other.
            awaited(lambda: lines(which) == list(expected), SETTLED_S, 0.01)  # noqa: B023
            assert lines(which) == list(expected), f"{who}: {lines(which)}, expected {list(expected)}"
            assert arrived
            self._used[which] = len(seen(which))

    def close(self) -> None:
        self._native.close()
        self._guest.close_stdin()
        self._guest.wait(HANG_S).check()
        assert self.watched.control.awaited_watches(self._before) == self._before


@pytest.fixture(params=["auto", *SOURCES])
def twins(
    session: EventSession, watched_on: MakeWatchedPlace, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Twins]:
    found = Twins(watched_on(request.param), tmp_path, session.parts.programs[PROGRAM])
    for directory in (found.twin, found.watched.host):
        (directory / "d").mkdir()
        for name in ("f", "d/f", "d/g"):
            (directory / name).write_text("text\n")
    # What was done until here has been read by the server, and is not of the watches that come.
    found.step(lambda _: None)
    yield found
    found.close()


def append(path: Path) -> None:
    with path.open("a") as stream:
        stream.write("more\n")


# ---- which events ------------------------------------------------------------------------------------------


def test_a_file_tells_of_its_attributes_links_and_xattrs(twins: Twins) -> None:
    twins.watch("f", ALL)
    twins.step(lambda d: (d / "f").chmod(0o600), "ATTRIB")
    twins.step(lambda d: (d / "another").hardlink_to(d / "f"), "ATTRIB")
    twins.step(lambda d: (d / "another").unlink(), "ATTRIB")
    twins.step(lambda d: os.setxattr(d / "f", "user.a", b"1"), "ATTRIB")
    twins.step(lambda d: os.removexattr(d / "f", "user.a"), "ATTRIB")
    twins.step(lambda d: os.chown(d / "f", 1, 2), "ATTRIB")
    twins.step(lambda d: os.truncate(d / "f", 1), "MODIFY")
    twins.step(lambda d: append(d / "f"), "OPEN", "MODIFY", "CLOSE_WRITE")
    twins.step(lambda d: (d / "f").read_bytes(), "OPEN", "ACCESS", "CLOSE_NOWRITE")
    twins.step(lambda d: os.rename(d / "f", d / "d/renamed"), "MOVE_SELF")
    twins.step(lambda d: append(d / "d/renamed"), "OPEN", "MODIFY", "CLOSE_WRITE")
    twins.step(lambda d: (d / "d/renamed").unlink(), "ATTRIB", "DELETE_SELF", "IGNORED")


def test_a_directory_tells_of_itself(twins: Twins) -> None:
    twins.watch("d", ALL)
    twins.step(lambda d: (d / "d").chmod(0o700), "ATTRIB|ISDIR")
    twins.step(lambda d: os.setxattr(d / "d", "user.a", b"1"), "ATTRIB|ISDIR")
    twins.step(lambda d: os.listdir(d / "d"), "OPEN|ISDIR", "ACCESS|ISDIR", "CLOSE_NOWRITE|ISDIR")
    twins.step(lambda d: os.rename(d / "d", d / "renamed"), "MOVE_SELF")
    twins.step(lambda d: (d / "renamed/new").mkdir(), "CREATE|ISDIR new")
    twins.step(lambda d: (d / "renamed/new").chmod(0o700), "ATTRIB|ISDIR new")
    twins.step(lambda d: (d / "renamed/new").rmdir(), "DELETE|ISDIR new")


def test_a_removed_directory_ends_its_watch(twins: Twins) -> None:
    twins.both(lambda d: (d / "d/below").mkdir())
    twins.watch("d", CHANGES)
    twins.watch("d/below", CHANGES)
    twins.step(lambda d: (d / "d/below").rmdir(), "1 DELETE_SELF", "1 IGNORED", "DELETE|ISDIR below")
    twins.step(lambda d: shutil.rmtree(d / "d"), "DELETE f", "DELETE g", "DELETE_SELF", "IGNORED")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (In.ACCESS, ["ACCESS f", "ACCESS|ISDIR"]),
        (In.OPEN, ["OPEN f", "OPEN|ISDIR", "OPEN g"]),
        (In.CLOSE_NOWRITE, ["CLOSE_NOWRITE f", "CLOSE_NOWRITE|ISDIR"]),
        (In.CLOSE_WRITE, ["CLOSE_WRITE g"]),
        (In.MODIFY, ["MODIFY g"]),
        (In.ATTRIB, ["ATTRIB f", "ATTRIB|ISDIR"]),
        (In.CREATE | In.MOVED_FROM, ["CREATE new", "MOVED_FROM new #1"]),
        (In.DELETE | In.MOVED_TO, ["MOVED_TO newer #1", "DELETE newer"]),
    ],
    ids=lambda value: str(value.name) if isinstance(value, In) else "",
)
def test_only_what_was_asked_for_is_told(twins: Twins, mask: In, expected: list[str]) -> None:
    twins.watch("d", mask)

    def everything(d: Path) -> None:
        (d / "d/f").read_bytes()
        os.listdir(d / "d")
        append(d / "d/g")
        (d / "d/f").chmod(0o600)
        (d / "d").chmod(0o700)
        os.mknod(d / "d/new")
        os.rename(d / "d/new", d / "d/newer")
        (d / "d/newer").unlink()

    twins.step(everything, *expected)


def test_running_a_program_is_opening_and_reading_it(twins: Twins) -> None:
    shutil.copy2("/bin/true", twins.twin / "d/run")
    shutil.copy2("/bin/true", twins.watched.host / "d/run")
    twins.watch("d", ALL)
    twins.step(
        lambda d: subprocess.run([d / "d/run"], check=True), "OPEN run", "ACCESS run", "CLOSE_NOWRITE run"
    )


def test_writing_through_a_mapping_is_told_by_the_close_alone(twins: Twins) -> None:
    twins.watch("d", ALL)

    def write(d: Path) -> None:
        fd = os.open(d / "d/f", os.O_RDWR)
        with mmap.mmap(fd, 5) as mapping:
            mapping[:5] = b"TEXT\n"
            mapping.flush()
        os.close(fd)

    twins.step(write, "OPEN f", "CLOSE_WRITE f")
    assert twins.watched.place.sh("cat d/f") == "TEXT\n"


# ---- how it is watched -------------------------------------------------------------------------------------


def test_oneshot_tells_one_event(twins: Twins) -> None:
    before = twins.watched.control.watches
    twins.watch("d", CHANGES | ONESHOT)
    twins.step(lambda d: (d / "d/new").mkdir(), "CREATE|ISDIR new", "IGNORED")
    assert twins.watched.control.awaited_watches(before) == before
    twins.step(lambda d: (d / "d/more").mkdir())
    assert twins.watch("d", CHANGES | ONESHOT) == "watching 2"
    twins.step(lambda d: (d / "d/more").rmdir(), "1 DELETE|ISDIR more", "1 IGNORED")
    assert twins.watch("f", CHANGES | ONESHOT) == "watching 3"
    twins.step(lambda d: append(d / "f"), "2 MODIFY", "2 IGNORED")


def test_a_mask_is_replaced_or_added_to(twins: Twins) -> None:
    assert twins.watch("d", In.CREATE) == "watching 1"
    twins.step(lambda d: os.mknod(d / "d/1"), "CREATE 1")
    twins.step(lambda d: (d / "d/1").unlink())
    assert twins.watch("d", In.DELETE | MASK_ADD) == "watching 1"
    twins.step(lambda d: os.mknod(d / "d/2"), "CREATE 2")
    twins.step(lambda d: (d / "d/2").unlink(), "DELETE 2")
    assert twins.watch("d", In.ATTRIB) == "watching 1"
    twins.step(lambda d: os.mknod(d / "d/3"))
    twins.step(lambda d: (d / "d/3").chmod(0o600), "ATTRIB 3")
    assert twins.watch("d", In.CREATE | MASK_CREATE) == "refused: File exists"
    assert twins.watch("d", In.CREATE | MASK_CREATE | MASK_ADD) == "refused: Invalid argument"
    twins.step(lambda d: (d / "d/3").chmod(0o644), "ATTRIB 3")
    assert twins.command("remove 1") == "removed 1"
    twins.step(lambda d: os.mknod(d / "d/4"), "IGNORED")
    assert twins.watch("d", In.CREATE | MASK_CREATE) == "watching 2"
    twins.step(lambda d: os.mknod(d / "d/5"), "1 CREATE 5")


def test_onlydir_and_dont_follow(twins: Twins) -> None:
    twins.both(lambda d: (d / "to-d").symlink_to("d"))
    assert twins.watch("f", CHANGES | ONLYDIR) == "refused: Not a directory"
    assert twins.watch("to-d", CHANGES | ONLYDIR | DONT_FOLLOW) == "refused: Not a directory"
    assert twins.watch("nowhere", CHANGES) == "refused: No such file or directory"
    assert twins.watch("to-d", CHANGES | DONT_FOLLOW) == "watching 1"
    assert twins.watch("to-d", CHANGES | ONLYDIR) == "watching 2"
    twins.step(lambda d: os.mknod(d / "d/new"), "1 CREATE new")
    twins.step(lambda d: os.utime(d / "to-d", (1, 1), follow_symlinks=False), "ATTRIB")
    twins.step(lambda d: os.rename(d / "to-d", d / "moved"), "MOVE_SELF")
    twins.step(lambda d: (d / "moved").unlink(), "ATTRIB", "DELETE_SELF", "IGNORED")


def unlink_open(held: list[int], directory: Path) -> None:
    held.append(os.open(directory / "d/f", os.O_RDWR))
    (directory / "d/f").unlink()


def write_and_close(held: list[int]) -> None:
    fd = held.pop(0)
    os.write(fd, b"unseen")
    os.close(fd)


def test_a_file_that_lost_its_name_while_open_is_told_of_by_it(twins: Twins) -> None:
    held: list[int] = []
    twins.watch("d", CHANGES)
    twins.step(lambda d: unlink_open(held, d), "DELETE f")
    twins.step(lambda _: write_and_close(held), "MODIFY f", "CLOSE_WRITE f")


# ---- names that are gone -----------------------------------------------------------------------------------


EXCLUDING = CHANGES | EXCL_UNLINK


def open_both(twins: Twins, name: str) -> list[int]:
    held: list[int] = []
    twins.both(lambda d: held.append(os.open(d / name, os.O_RDWR)))
    return held


def write(held: list[int]) -> Action:
    """To what was opened of each, in turn."""
    following = itertools.cycle(held)
    return lambda _: os.write(next(following), b"x")


def close(held: list[int]) -> Action:
    return lambda _: os.close(held.pop(0))


def test_excl_unlink_leaves_out_what_has_no_name(twins: Twins) -> None:
    held = open_both(twins, "d/f")
    twins.watch("d", EXCLUDING)
    twins.step(write(held), "MODIFY f")
    twins.step(lambda d: (d / "d/f").unlink(), "DELETE f")
    twins.step(write(held))
    modes = iter(held)
    twins.step(lambda _: os.fchmod(next(modes), 0o600), "ATTRIB f")
    twins.step(close(held))


def test_excl_unlink_is_for_who_asks_for_it(twins: Twins) -> None:
    held = open_both(twins, "d/f")
    twins.watch("d", EXCLUDING)
    beside = twins.beside()
    beside.watch("d", CHANGES)
    twins.both(lambda d: (d / "d/f").unlink())
    twins.see("DELETE f")
    beside.see("DELETE f")
    twins.both(write(held))
    twins.see()
    beside.see("MODIFY f")
    twins.watch("d", CHANGES)
    beside.watch("d", EXCLUDING)
    twins.both(write(held))
    twins.see("MODIFY f")
    beside.see()
    twins.step(close(held), "CLOSE_WRITE f")
    beside.close()


def test_excl_unlink_looks_at_the_name_that_was_opened(twins: Twins) -> None:
    twins.both(lambda d: (d / "d/link").hardlink_to(d / "d/f"))
    gone, there = open_both(twins, "d/f"), open_both(twins, "d/link")
    twins.watch("d", EXCLUDING)
    twins.step(lambda d: (d / "d/f").unlink(), "DELETE f")
    twins.step(write(gone))
    twins.step(write(there), "MODIFY link")
    twins.step(lambda d: os.rename(d / "d/link", d / "d/moved"), "MOVED_FROM link #1", "MOVED_TO moved #1")
    twins.step(write(there), "MODIFY moved")
    twins.step(close(gone))
    twins.step(close(there), "CLOSE_WRITE moved")


@pytest.mark.parametrize("twins", ["auto", "inodes"], indirect=True)
def test_excl_unlink_holds_for_the_file_itself_too(twins: Twins) -> None:
    twins.both(lambda d: (d / "d/link").hardlink_to(d / "d/f"))
    gone, there = open_both(twins, "d/f"), open_both(twins, "d/link")
    twins.watch("d", EXCLUDING)
    twins.watch("d/link", EXCLUDING)
    twins.step(lambda d: (d / "d/f").unlink(), "1 ATTRIB", "DELETE f")
    twins.step(write(gone))
    twins.step(write(there), "MODIFY link", "1 MODIFY")
    twins.watch("d/link", CHANGES)
    twins.step(write(gone), "1 MODIFY")
    twins.step(close(gone), "1 CLOSE_WRITE")
    twins.step(close(there), "CLOSE_WRITE link", "1 CLOSE_WRITE")


@pytest.mark.parametrize("twins", ["auto", "inodes"], indirect=True)
def test_excl_unlink_leaves_out_what_was_replaced(twins: Twins) -> None:
    held = open_both(twins, "d/f")
    twins.watch("d", EXCLUDING)
    twins.step(lambda d: os.rename(d / "d/g", d / "d/f"), "MOVED_FROM g #1", "MOVED_TO f #1")
    twins.step(write(held))
    twins.step(lambda d: append(d / "d/f"), "MODIFY f", "CLOSE_WRITE f")
    twins.step(lambda d: (d / "d/f").unlink(), "DELETE f")
    twins.step(lambda d: append(d / "d/f"), "CREATE f", "MODIFY f", "CLOSE_WRITE f")
    twins.step(write(held))
    twins.step(close(held))


# This share keeps its one mark on the file system, however busy that is.
@pytest.mark.parametrize("twins", ["coherent"], indirect=True)
def test_excl_unlink_holds_for_a_file_that_is_watched_alone(twins: Twins) -> None:
    twins.both(lambda d: (d / "d/link").hardlink_to(d / "d/f"))
    gone, there = open_both(twins, "d/f"), open_both(twins, "d/link")
    twins.watch("d/f", EXCLUDING)
    twins.step(write(gone), "MODIFY")
    twins.step(lambda d: (d / "d/f").unlink(), "ATTRIB")
    twins.step(write(gone))
    twins.step(write(there), "MODIFY")
    twins.step(close(gone))
    twins.step(close(there), "CLOSE_WRITE")


@pytest.mark.parametrize("twins", ["auto"], indirect=True)
def test_what_is_excluded_is_told_by_file_id_and_opened_by_nobody(twins: Twins) -> None:
    place, mask = twins.watched.place, In.MODIFY | 0x0800_0000  # FAN_EVENT_ON_CHILD
    held = open_both(twins, "d/f")
    twins.watch("d", EXCLUDING)
    told = {
        report: place.guest.start(
            f"exec {FANOTIFY_PROGRAM} --report={report} --mark=inode {mask:x} {place.inside}/d",
            stdin=True,
        )
        for report in ("dfid_name", "fd")
    }
    for command in told.values():
        command.wait_for_output(b"ready\n", HANG_S)
    twins.step(lambda d: (d / "d/f").unlink(), "DELETE f")
    twins.step(write(held))
    told["dfid_name"].wait_for_output(b"2 dir . f\n", HANG_S)
    # The guest's own doing has a path.
    place.sh("echo more >>d/g")
    told["fd"].wait_for_output(b"2 fd\n", HANG_S)
    for command in told.values():
        command.close_stdin()
        command.wait(HANG_S).check()
    assert told["fd"].stdout == b"ready\n2 fd\n"
    twins.both(close(held))
