# SPDX-License-Identifier: Apache-2.0
"""The process that sets and removes the mark on the file system: what it may look into, and its end.

A server that may choose its source goes on without it. Must not test when the mark is there
(test_events_scope.py). Specification: docs/events.md; native/marker.c.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import stats
from tests.ring.event_sources import FILESYSTEM_MARK, Source, file_system_marks, start_share
from tests.ring.events import NOTIFYING, WATCHED, EventGuest
from tests.ring.share import Share, refused
from tests.server import awaited
from vhostfs.frontend.fsnotify import ALL_EVENTS, Granted

pytestmark = pytest.mark.usefixtures("ours")

SOMEBODY = 1000
AUTOMATIC = Source("automatic", "--events=fanotify")
GOES_ON = "events: now by fanotify, marks on watched inodes (the process vhostfs-mark has ended)"


def marker_of(share: Share) -> int:
    """Its process id."""
    return next(
        pid for pid in share.server.pids() if Path(f"/proc/{pid}/comm").read_text() == "vhostfs-mark\n"
    )


def kill_marker(share: Share) -> None:
    marker = marker_of(share)
    os.kill(marker, signal.SIGKILL)
    assert awaited(lambda: not Path(f"/proc/{marker}").exists())


def start_automatic(make_share: MakeShare, *options: str) -> Share:
    """A server with that process that may go over to marks on inodes; or a loud skip."""
    share = start_share(make_share, AUTOMATIC, *options, private=True)
    if stats(share)["events"]["source"] != "fanotify:filesystem":
        start_share(make_share, FILESYSTEM_MARK, private=True)  # says why not
    return share


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("sandbox", ["none", "namespace"])
def test_a_directory_that_only_its_owner_may_look_into_is_told_of(
    make_share: MakeShare, tmp_path: Path, sandbox: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, SOMEBODY, SOMEBODY)
    home.chmod(0o700)
    share = start_share(make_share, FILESYSTEM_MARK, f"--sandbox={sandbox}", directory=home)
    guest = EventGuest(share)
    guest.watch("")
    (home / "new").mkdir()
    assert guest.told() == ["ISDIR|CREATE .[new]"]


def test_killed_where_the_mark_was_asked_for_by_name_people_are_told_once(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, private=True)
    kill_marker(share)
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init(Granted.VIRTQUEUE, ALL_EVENTS)
    for _ in range(30):
        with refused(errno.EIO):
            fs.watch(fs.root, WATCHED, 0)
    assert awaited(lambda: "marking the file system" in share.log())
    assert share.serves()
    assert share.log().count("marking the file system: the process vhostfs-mark has ended") == 1


@pytest.mark.parametrize("sandbox", ["none", "namespace"])
def test_killed_before_anybody_watches_what_is_watched_is_marked(make_share: MakeShare, sandbox: str) -> None:
    share = start_automatic(make_share, f"--sandbox={sandbox}", "--seccomp=kill")
    (share.path / "d").mkdir()
    (share.path / "f").touch()
    kill_marker(share)
    for _ in range(2):
        guest = EventGuest(share)
        guest.watch("d")
        guest.watch("f")
        (share.path / "d/new").mkdir()
        (share.path / "f").chmod(0o600)
        assert guest.told() == ["ISDIR|CREATE d[new]", "ATTRIB f"]
        (share.path / "d/new").rmdir()
        guest.told()
        share.unmount()
    assert share.log().count(GOES_ON) == 1
    assert not file_system_marks(share)
    events = stats(share)["events"]
    assert events["source"] == "fanotify:inodes"
    assert f"events: now by {events['reason']}" == GOES_ON


def test_killed_while_somebody_watches_the_guest_misses_nothing(make_share: MakeShare) -> None:
    """The mark stays until the end of the session, and goes when nobody is there to remove it."""
    share = start_automatic(make_share)
    (share.path / "f").touch()
    guest = EventGuest(share)
    guest.watch("f")
    kill_marker(share)
    (share.path / "f").chmod(0o600)
    assert guest.told() == ["ATTRIB f"]
    assert file_system_marks(share)
    share.unmount()

    def is_gone() -> bool:
        (share.path / "f").chmod(0o644)
        return not file_system_marks(share)

    assert awaited(is_gone)
    guest = EventGuest(share)
    guest.watch("f")
    (share.path / "f").chmod(0o600)
    assert guest.told() == ["ATTRIB f"]
    assert share.log().count(GOES_ON) == 1
