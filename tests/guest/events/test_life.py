# SPDX-License-Identifier: Apache-2.0
"""Events through the lives of watchers, mounts, guests and servers; two guests on one directory; all kernels.

Must not know how events travel. Specification: docs/guest.md, docs/events.md.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.guest.conftest import image_or_lacking
from tests.guest.events.conftest import (
    EventSession,
    EventShare,
    MakeWatchedPlace,
    Parts,
    WatchedPlace,
    as_share,
    complaints_of,
    start_share,
)
from tests.guest.events.scenario import a_day
from tests.guest.events.watching import ALL, CHANGES, PROGRAM, Watch
from tests.guest.place import Place
from tests.limits import HANG_S
from vhostfs.vm.guest import Guest
from vhostfs.vm.kernel import DEFAULT_SERIES, SERIES
from vhostfs.vm.lifeline import Lifeline

# -- watchers


def test_the_guest_s_own_changes_are_seen_once_and_then_the_host_s(watched: WatchedPlace) -> None:
    watch = watched.watch(with_twin=False)
    own_before = watched.control.counters()["own"]

    def in_guest(command: str, *expected: str) -> None:
        watch.step(lambda: watched.place.sh(command), *expected)

    in_guest("echo text >file", "CREATE file", "MODIFY file", "CLOSE_WRITE file")
    in_guest("mkdir dir", "CREATE|ISDIR dir")
    in_guest("mv file other", "MOVED_FROM file #1", "MOVED_TO other #1")
    in_guest("chmod 600 other", "ATTRIB other")
    in_guest("rm other", "DELETE other")
    in_guest("rmdir dir", "DELETE|ISDIR dir")
    watch.step((watched.host / "of-the-host").mkdir, "CREATE|ISDIR of-the-host")
    in_guest("rmdir of-the-host", "DELETE|ISDIR of-the-host")
    watch.ends()
    assert watched.control.counters()["own"] > own_before


def test_a_removed_watch_is_removed_on_the_server(watched: WatchedPlace) -> None:
    for name in ("a", "b"):
        (watched.host / name).mkdir()
    before = watched.control.watches
    watch = watched.watch("a", "b", with_twin=False)
    assert watched.control.watches == before + 2
    watch.command_line("remove 0", "removed 0")
    assert watched.control.awaited_watches(before + 1) == before + 1
    watch.step(lambda: None, "IGNORED")
    (watched.host / "a/unseen").mkdir()
    watch.step((watched.host / "b/seen").mkdir, "1 CREATE|ISDIR seen")
    watch.command_line(f"add {watched.place.inside}/a", "added 2")
    assert watched.control.awaited_watches(before + 2) == before + 2
    watch.step((watched.host / "a/again").mkdir, "2 CREATE|ISDIR again")


def test_a_watch_is_kept_while_another_watcher_wants_it(watched: WatchedPlace) -> None:
    before = watched.control.watches
    staying = watched.watch(with_twin=False)
    leaving = watched.place.start("exec inotifywait -m .")
    leaving.wait_for_output(b"Watches established", HANG_S, "stderr")
    leaving.send_signal(signal.SIGTERM)
    leaving.wait(HANG_S)
    staying.step((watched.host / "dir").mkdir, "CREATE|ISDIR dir")
    assert watched.control.watches == before + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_stops_watching_when_the_watcher_dies(
    watched: WatchedPlace, number: signal.Signals
) -> None:
    before = watched.control.watches
    for name in ("a", "b", "c"):
        (watched.host / name).mkdir()
    watch = watched.watch("a", "b", "c", mask=ALL, with_twin=False)
    assert watched.control.watches == before + 3
    watch.command.send_signal(number)
    assert watched.control.awaited_watches(before) == before
    delivered = watched.control.counters()["delivered"]
    (watched.host / "a/unseen").mkdir()
    later = watched.watch("b", with_twin=False)
    later.step((watched.host / "b/seen").mkdir, "CREATE|ISDIR seen")
    assert watched.control.counters()["delivered"] == delivered + 1


def test_two_shares_in_one_guest_have_their_own_events(watched_on: MakeWatchedPlace) -> None:
    one, two = watched_on("auto"), watched_on("never")
    on_one, on_two = one.watch(), two.watch()
    for number in range(5):
        on_one.step((one.host / f"one{number}").mkdir, f"CREATE|ISDIR one{number}")
        on_two.step((two.host / f"two{number}").mkdir, f"CREATE|ISDIR two{number}")
    on_one.ends()
    on_two.ends()


# -- mounts, guests, servers


@dataclass(slots=True)
class Second:
    """A second guest on the directory that the first has as /auto, there /second; it may reboot."""

    guest: Guest
    share: EventShare
    lifeline: Lifeline
    numbers: Iterator[int]

    def place(self) -> Place:
        """A new directory."""
        directory = self.share.directory / f"second-{next(self.numbers)}"
        directory.mkdir()
        return Place(self.guest, directory, f"/second/{directory.name}")

    def is_told(self) -> None:
        """A watcher that begins now sees what the host does now."""
        place = self.place()
        watch = Watch(place, self.share.control, None)
        watch.step((place.host / "dir").mkdir, "CREATE|ISDIR dir")
        watch.step(lambda: (place.host / "f").write_text("x"), "CREATE f", "MODIFY f", "CLOSE_WRITE f")
        watch.ends()
        watch.close()


@pytest.fixture(scope="module")
def second(session: EventSession) -> Iterator[Second]:
    parts = session.parts
    image = image_or_lacking(parts.launchpad, parts.image_spec(DEFAULT_SERIES))
    with Lifeline() as lifeline:
        share = start_share(lifeline, session.shares["auto"].directory, "second")
        machine = parts.launchpad.machine(image, (as_share(share, parts.qemu),), qemu=parts.qemu)
        machine = replace(machine, allow_reboot=True)
        guest = Guest(machine, lifeline=lifeline)
        with guest:
            state = Second(guest, share, lifeline, itertools.count(1))
            yield state
        complaints = complaints_of(guest, [state.share])
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def test_two_guests_on_one_directory_see_each_other_s_changes(second: Second, watched: WatchedPlace) -> None:
    theirs = Place(second.guest, watched.host, f"/second/{watched.host.name}")
    mine = watched.place
    in_first = watched.watch()
    in_second = Watch(theirs, second.share.control, None)

    def both(place: Place, command: str, *expected: str) -> None:
        in_first.step(lambda: place.sh(command), *expected)
        in_second.step(lambda: None, *expected)

    for place, name in ((mine, "mine"), (theirs, "theirs")):
        both(place, f"mkdir {name}", f"CREATE|ISDIR {name}")
        both(place, f"mv {name} moved", f"MOVED_FROM|ISDIR {name} #1", "MOVED_TO|ISDIR moved #1")
        both(place, "rmdir moved", "DELETE|ISDIR moved")
        both(place, f"echo {name} >file", "CREATE file", "MODIFY file", "CLOSE_WRITE file")
        assert mine.sh("cat file") == theirs.sh("cat file") == f"{name}\n"
        both(place, "rm file", "DELETE file")
    in_second.close()


def test_a_watcher_after_a_new_mount_is_told(second: Second) -> None:
    second.is_told()
    second.guest.run("cd /; umount /second", HANG_S).check()
    assert second.share.control.awaited_watches(0) == 0
    second.guest.run("mount -t virtiofs second /second", HANG_S).check()
    second.is_told()


def test_an_unmount_under_a_watcher_ends_its_watches(second: Second) -> None:
    place = second.place()
    watch = Watch(place, second.share.control, None)
    watch.step((place.host / "dir").mkdir, "CREATE|ISDIR dir")
    watch.step(lambda: second.guest.run("umount /second", HANG_S).check(), "UNMOUNT|ISDIR", "IGNORED")
    assert second.share.control.awaited_watches(0) == 0
    watch.command.close_stdin()
    watch.command.wait(HANG_S)
    second.guest.run("mount -t virtiofs second /second", HANG_S).check()
    second.is_told()


def test_the_guest_is_told_again_after_it_has_rebooted(second: Second) -> None:
    second.is_told()
    place = second.place()
    Watch(place, second.share.control, None)
    second.guest.reboot()
    assert second.share.control.awaited_watches(0) == 0
    second.is_told()


def test_the_guest_survives_the_end_of_its_server(second: Second) -> None:
    """The last of the second guest. How it gets a share back: test_restart.py."""
    place = second.place()
    watch = Watch(place, second.share.control, None)
    assert second.share.server.stop() == 0
    (place.host / "unseen").mkdir()
    second.guest.run("echo alive; sleep 0.2", HANG_S).check()
    assert watch.command.status is None
    watch.command.send_signal(signal.SIGKILL)
    watch.command.wait(HANG_S)
    second.guest.close(graceful=False)


# -- the other kernels


@pytest.mark.parametrize("kernel", [name for name in SERIES if name != DEFAULT_SERIES])
def test_a_day_s_work_is_seen_by_guests_of_the_other_kernels(
    parts: Parts, real_directory: Path, kernel: str
) -> None:
    image = image_or_lacking(parts.launchpad, parts.image_spec(kernel))
    directory = real_directory / f"linux-{kernel}"
    for name in ("sub", "outside"):
        (directory / name).mkdir(parents=True)
    with Lifeline() as lifeline:
        share = start_share(lifeline, directory, "share")
        machine = parts.launchpad.machine(image, (as_share(share, parts.qemu),), qemu=parts.qemu)
        guest = Guest(machine, lifeline=lifeline)
        with guest:
            release = guest.run("uname -r", HANG_S).check().text
            assert release.startswith(kernel)
            place = Place(guest, directory, "/share")
            watch = Watch(place, share.control, parts.programs[PROGRAM], CHANGES, (".", "sub"))
            a_day(watch)
            watch.close()
            recursive = place.start("exec inotifywait -m -r -e create --format %w%f .")
            recursive.wait_for_output(b"Watches established", HANG_S, "stderr")
            assert share.control.awaited_watches(5) == 5
            os.mkdir(directory / "outside/new")
            assert recursive.wait_for_lines(1, HANG_S)[0] == "./outside/new"
            recursive.send_signal(signal.SIGTERM)
            recursive.wait(HANG_S)
        complaints = complaints_of(guest, [share])
    assert not complaints
