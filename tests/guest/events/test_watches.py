# SPDX-License-Identifier: Apache-2.0
"""Watches that come and go, that the host has no room for, and directories in use when their event comes.

Must not know how events travel. Specification: docs/protocol.md, 4.3 and 8; qemu/guest/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.guest.conftest import image_or_lacking
from tests.guest.events.conftest import Parts, WatchedPlace, as_share, complaints_of, start_share
from tests.guest.events.watching import CHANGES, PROGRAM, Control, In, Watch
from tests.guest.place import Place, awaited
from tests.limits import HANG_S
from tests.server import held_up
from vhostfs.vm.agent import RunningCommand
from vhostfs.vm.guest import Guest
from vhostfs.vm.kernel import DEFAULT_SERIES
from vhostfs.vm.lifeline import Lifeline

ATTRIBUTES = "/sys/bus/virtio/devices/virtio*/notifications"


AGAIN = """
import ctypes, os, select, sys
libc = ctypes.CDLL(None, use_errno=True)
group = libc.inotify_init1(0)
here, there = sys.argv[1:]
watch = libc.inotify_add_watch(group, here.encode(), 0x100)
lost = []
for number in range(200):
    libc.inotify_rm_watch(group, watch)
    watch = libc.inotify_add_watch(group, here.encode(), 0x100)
    os.mkdir(f"{there}/d{number}")
    seen = b""
    while select.select([group], [], [], 2)[0]:
        seen += os.read(group, 65536)
        if f"d{number}\\0".encode() in seen:
            break
    else:
        lost.append(number)
print(lost)
"""


def test_a_watch_that_is_set_again_at_once_misses_nothing(two_mounts: TwoMounts) -> None:
    """The change comes by another mount of the same directory, which is as good as the host."""
    (two_mounts.directory / "again").mkdir()
    assert two_mounts.place.python(AGAIN, "/share/again", "/other/again") == []


QUEUE_LIMIT = "/proc/sys/fs/inotify/max_queued_events"


def is_seen(watch: Watch, last: str) -> bool:
    return awaited(lambda: [event.text for event in watch.events()[-1:]] == [last], HANG_S, 0.002)


@pytest.fixture
def room(watched: WatchedPlace) -> Iterator[None]:
    """The guest's own queues take what many files make at once, however slowly it reads them."""
    limit = watched.place.sh(f"cat {QUEUE_LIMIT}").strip()
    watched.place.sh(f"echo 1000000 >{QUEUE_LIMIT}")
    yield
    watched.place.sh(f"echo {limit} >{QUEUE_LIMIT}")


@pytest.mark.usefixtures("room")
def test_a_directory_that_is_mounted_on_before_its_event_came_stays_mounted(watched: WatchedPlace) -> None:
    place = watched.place
    watch = watched.watch(mask=CHANGES, with_twin=False)
    for attempt in range(5):
        name = f"used{attempt}"
        line = (
            f"echo; until [ -d {name} ]; do :; done; mount -t tmpfs none {name}; touch {name}/mine; echo; cat"
        )
        user = place.start(line)
        user.wait_for_lines(1, HANG_S)
        with held_up(place.guest.pid):  # what happens on the host waits for the guest
            # The driver is behind by these, for a moment.
            for number in range(2000 << attempt):
                (watched.host / f"{attempt}-{number}").write_text("text")
            (watched.host / name).mkdir()
        user.wait_for_lines(2, HANG_S)
        was_behind = not any(event.name == name for event in watch.events())
        assert is_seen(watch, f"CREATE|ISDIR {name}")
        assert place.sh(f"ls {name}") == "mine\n"
        place.sh(f"umount {name}")
        assert place.sh(f"ls {name}") == ""
        user.close_stdin()
        user.wait(HANG_S).check()
        if was_behind:
            return
    pytest.fail("the event was always faster than the mount")


@dataclass(frozen=True, slots=True)
class TwoMounts:
    """A directory that a guest has twice: as /share, where it may watch four objects, and as /other."""

    directory: Path
    place: Place
    control: Control


@pytest.fixture(scope="module")
def two_mounts(parts: Parts, real_directory: Path) -> Iterator[TwoMounts]:
    image = image_or_lacking(parts.launchpad, parts.image_spec(DEFAULT_SERIES, ("python3",)))
    directory = real_directory / "two-mounts"
    directory.mkdir()
    with Lifeline() as lifeline:
        few = start_share(lifeline, directory, "share", ["--max-watches=4"], name="few")
        other = start_share(lifeline, directory, "other", name="another")
        places = (as_share(few, parts.qemu), as_share(other, parts.qemu))
        guest = Guest(parts.launchpad.machine(image, places, qemu=parts.qemu), lifeline=lifeline)
        with guest:
            yield TwoMounts(directory, Place(guest, directory, "/share"), few.control)
        complaints = complaints_of(guest, [few, other])
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def test_watches_that_the_host_has_no_room_for_are_set_when_there_is(two_mounts: TwoMounts) -> None:
    place, directory = two_mounts.place, two_mounts.directory
    names = [f"d{number}" for number in range(6)]
    for name in names:
        (directory / name).mkdir()

    def counter(name: str) -> int:
        # The first of the two devices is that of the first mount.
        return int(place.sh(f"cat {ATTRIBUTES}/{name}").split()[0])

    first = Watch(place, two_mounts.control, None, In.CREATE, names[:4])
    late = place.start(f"exec {PROGRAM} {int(In.CREATE):x} d4 d5")
    late.wait_for_output(b"ready\n", HANG_S)
    assert counter("watches_refused") == 2
    walks = counter("resyncs")
    (directory / "d4/unseen").mkdir()
    for number in (0, 1):
        first.command_line(f"remove {number}", f"removed {number}")
    for number in (0, 1):
        told = partial(is_told, late, directory / f"d{4 + number}", number)
        assert awaited(told, HANG_S, 0.2)
    assert b"unseen" not in late.stdout
    assert counter("resyncs") == walks
    for watcher in (late, first.command):
        watcher.close_stdin()
        watcher.wait(HANG_S).check()
    assert two_mounts.control.awaited_watches(0) == 0


def is_told(watcher: RunningCommand, directory: Path, index: int) -> bool:
    """Makes something more in a directory: was anything of that seen?"""
    (directory / f"try{len(list(directory.iterdir()))}").mkdir()
    return f"{index} 40000100 0 try".encode() in watcher.stdout
