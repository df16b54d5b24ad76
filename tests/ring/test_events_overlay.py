# SPDX-License-Identifier: Apache-2.0
"""A share that is an overlay: its handles lead to no object, but fanotify names objects by them all the same.

Must not test what every file system shows. Specification: docs/events.md, the table of sources.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.ring.conftest import MakeShare
from tests.ring.control import stats
from tests.ring.event_sources import Source, start_share
from tests.ring.events import EventGuest, write
from vhostfs.frontend.fsnotify import Event

pytestmark = pytest.mark.usefixtures("ours", "needs_root")

LIBC = ctypes.CDLL(None, use_errno=True)
AUTOMATIC = Source("automatic", "--events=auto")


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    for name in ("lower/low", "lower/low/sub", "upper", "work", "share"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("lower/low/f", "lower/low/g", "lower/low/sub/h"):
        (tmp_path / name).write_text("below")
    layers = ",".join(
        f"{option}={tmp_path / name}"
        for option, name in (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work"))
    )
    place = tmp_path / "share"
    if LIBC.mount(b"overlay", bytes(place), b"overlay", 0, layers.encode()):
        lacking(f"overlay mounts: {os.strerror(ctypes.get_errno())}")
    try:
        (place / "high").mkdir()
        (place / "high/f").write_text("above")
        yield place
    finally:
        LIBC.umount2(bytes(place), 2)


@pytest.fixture
def guest(make_share: MakeShare, overlay: Path) -> EventGuest:
    share = start_share(make_share, AUTOMATIC, directory=overlay)
    events = stats(share)["events"]
    if events["source"] != "fanotify:inodes":
        lacking(f"handles of overlays for fanotify (Linux 6.6): {events['reason']}")
    guest = EventGuest(share)
    guest.hold("high/f", "low/f", "low/g", "low/sub")
    for name in ("high", "low", "low/sub"):
        guest.watch(name)
    return guest


def test_upper_objects_are_told_of_with_their_children(guest: EventGuest, overlay: Path) -> None:
    os.mknod(overlay / "high/new")
    write(overlay / "high/f")
    os.unlink(overlay / "high/f")
    assert guest.told() == [
        "CREATE high[new]",
        "MODIFY high[f]=high/f",
        "CLOSE_WRITE high[f]=high/f",
        "DELETE high[f]=high/f",
    ]


def test_an_object_keeps_its_handle_when_it_is_copied_up(guest: EventGuest, overlay: Path) -> None:
    guest.watch("low/g", Event.ATTRIB)
    for _ in range(2):
        write(overlay / "low/f")
        assert guest.told() == ["MODIFY low[f]=low/f", "CLOSE_WRITE low[f]=low/f"]
        os.chmod(overlay / "low/g", 0o600)
        assert guest.told() == ["ATTRIB low[g]=low/g"]
    os.mknod(overlay / "low/new")
    os.unlink(overlay / "low/f")
    assert guest.told() == ["CREATE low[new]", "DELETE low[f]=low/f"]


def test_a_lower_directory_keeps_its_watch_when_it_is_copied_up(guest: EventGuest, overlay: Path) -> None:
    os.mknod(overlay / "low/sub/new")
    os.rename(overlay / "low/sub/h", overlay / "low/h")
    assert guest.told() == [
        "CREATE low/sub[new]",
        "MOVED_FROM low/sub[h] pair 1",
        "MOVED_TO low[h] pair 1",
    ]
