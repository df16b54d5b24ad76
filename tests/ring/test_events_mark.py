# SPDX-License-Identifier: Apache-2.0
"""The process that sets and removes the mark on the file system: what it may look into, and its end.

Must not test when the mark is there (test_events_scope.py). Specification: docs/events.md; native/marker.c.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import NOTIFYING, WATCHED, EventGuest
from tests.ring.share import Share, refused
from tests.server import awaited
from vhostfs.frontend.fsnotify import ALL_EVENTS, Granted

pytestmark = pytest.mark.usefixtures("ours")

SOMEBODY = 1000


def marker_of(share: Share) -> int:
    """Its process id."""
    return next(
        pid for pid in share.server.pids() if Path(f"/proc/{pid}/comm").read_text() == "vhostfs-mark\n"
    )


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


def test_when_it_was_killed_nothing_stays_behind_and_people_are_told_once(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, private=True)
    marker = marker_of(share)
    os.kill(marker, signal.SIGKILL)
    assert awaited(lambda: not Path(f"/proc/{marker}").exists())
    fs = share.mount(NOTIFYING)
    fs.fsnotify_init(Granted.VIRTQUEUE, ALL_EVENTS)
    for _ in range(30):
        with refused(errno.EIO):
            fs.watch(fs.root, WATCHED, 0)
    assert awaited(lambda: "marking the file system" in share.log())
    assert share.serves()
    assert share.log().count("marking the file system") == 1
