# SPDX-License-Identifier: Apache-2.0
"""What is done through a name that is gone says so, to a guest whose watchers exclude it (IN_EXCL_UNLINK).

Must not know what the guest makes of it. Specification: docs/protocol.md, "Names that are gone".
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FANOTIFY, FILESYSTEM_MARK, INOTIFY, SOURCES, Source, start_share
from tests.ring.events import WATCHED, EventGuest
from tests.ring.share import Share
from tests.ring.test_events import exchange
from vhostfs.frontend.fsnotify import Event

EXCLUDING = WATCHED | Event.EXCL_UNLINK
BY_SOURCE = [pytest.param(source, id=source.name.replace(" ", "-")) for source in SOURCES]
BY_FANOTIFY = [pytest.param(source, id=source.name.replace(" ", "-")) for source in FANOTIFY]


@pytest.fixture
def share(make_share: MakeShare, request: pytest.FixtureRequest) -> Share:
    source: Source = request.param
    return start_share(make_share, source)


def prepare(share: Share, mask: int = EXCLUDING) -> EventGuest:
    (share.path / "d").mkdir()
    (share.path / "d/f").write_bytes(b"text")
    (share.path / "d/new").write_bytes(b"text")
    guest = EventGuest(share)
    guest.watch("d", mask)
    return guest


def write(fd: int) -> None:
    os.write(fd, b"x")


def open_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY)


@pytest.mark.parametrize("share", BY_SOURCE, indirect=True)
def test_an_open_file_loses_its_name(share: Share) -> None:
    guest = prepare(share)
    fd = open_file(share.path / "d/f")
    write(fd)
    (share.path / "d/f").unlink()
    assert [line.partition("=")[0] for line in guest.told()] == ["MODIFY d[f]", "DELETE d[f]"]
    write(fd)
    os.fchmod(fd, 0o600)
    os.close(fd)
    assert guest.told() == ["MODIFY d[f] unlinked", "ATTRIB d[f]", "CLOSE_WRITE d[f] unlinked"]


@pytest.mark.parametrize("share", BY_SOURCE, indirect=True)
def test_a_guest_that_does_not_ask_is_not_told_the_difference(share: Share) -> None:
    guest = prepare(share, EXCLUDING & ~Event.EXCL_UNLINK)
    fd = open_file(share.path / "d/f")
    (share.path / "d/f").unlink()
    guest.told()
    write(fd)
    os.close(fd)
    assert guest.told() == ["MODIFY d[f]", "CLOSE_WRITE d[f]"]


@pytest.mark.parametrize("share", BY_FANOTIFY, indirect=True)
def test_the_name_is_used_again(share: Share) -> None:
    guest = prepare(share)
    fd = open_file(share.path / "d/f")
    (share.path / "d/f").unlink()
    (share.path / "d/f").write_bytes(b"another")
    told = [line.partition("=")[0] for line in guest.told()]
    assert told == ["DELETE d[f]", "CREATE d[f]", "MODIFY d[f]", "CLOSE_WRITE d[f]"]
    write(fd)
    os.close(fd)
    told = guest.told()
    assert told == ["MODIFY d[f] unlinked", "CLOSE_WRITE d[f] unlinked"]


@pytest.mark.parametrize("share", BY_FANOTIFY, indirect=True)
def test_another_object_is_renamed_over_it(share: Share) -> None:
    guest = prepare(share)
    fd = open_file(share.path / "d/f")
    other = open_file(share.path / "d/new")
    os.rename(share.path / "d/new", share.path / "d/f")
    guest.told()
    write(fd)
    os.close(fd)
    write(other)
    os.close(other)
    assert guest.told() == [
        "MODIFY d[f] unlinked",
        "CLOSE_WRITE d[f] unlinked",
        "MODIFY d[f]",
        "CLOSE_WRITE d[f]",
    ]


@pytest.mark.parametrize("share", BY_SOURCE, indirect=True)
def test_a_renamed_or_exchanged_file_has_its_name(share: Share) -> None:
    guest = prepare(share)
    fd = open_file(share.path / "d/f")
    os.rename(share.path / "d/f", share.path / "d/moved")
    guest.told()
    write(fd)
    assert guest.told() == ["MODIFY d[moved]"]
    os.rename(share.path / "d/moved", share.path / "d/f")
    os.rename(share.path / "d/f", share.path / "d/moved")
    guest.told()
    write(fd)
    assert guest.told() == ["MODIFY d[moved]"]
    exchange(share.path / "d/moved", share.path / "d/new")
    guest.told()
    write(fd)
    os.close(fd)
    assert guest.told() == ["MODIFY d[new]", "CLOSE_WRITE d[new]"]


@pytest.mark.parametrize("share", BY_SOURCE, indirect=True)
def test_of_two_links_the_one_counts_by_which_it_was_opened(share: Share) -> None:
    guest = prepare(share)
    (share.path / "d/link").hardlink_to(share.path / "d/f")
    gone, there = open_file(share.path / "d/f"), open_file(share.path / "d/link")
    (share.path / "d/f").unlink()
    guest.told()
    write(gone)
    assert guest.told() == ["MODIFY d[f] unlinked"]
    write(there)
    assert guest.told() == ["MODIFY d[link]"]
    os.close(there)
    os.close(gone)
    assert guest.told() == ["CLOSE_WRITE d[link]", "CLOSE_WRITE d[f] unlinked"]


@pytest.mark.parametrize("share", [pytest.param(FILESYSTEM_MARK, id="filesystem-mark")], indirect=True)
@pytest.mark.parametrize("directory", ["held", "forgotten"])
def test_a_file_alone_is_watched(share: Share, directory: str) -> None:
    (share.path / "d").mkdir()
    (share.path / "d/f").write_bytes(b"text")
    (share.path / "d/link").hardlink_to(share.path / "d/f")
    guest = EventGuest(share)
    guest.watch("d/f", EXCLUDING & ~Event.EVENT_ON_CHILD)
    if directory == "forgotten":
        guest.forget("d")
    gone, there = open_file(share.path / "d/f"), open_file(share.path / "d/link")
    write(gone)
    assert guest.told() == ["MODIFY d/f"]
    (share.path / "d/f").unlink()
    assert guest.told() == ["ATTRIB d/f"]
    write(gone)
    assert guest.told() == ["MODIFY d/f unlinked"]
    write(there)
    assert guest.told() == ["MODIFY d/f"]
    os.close(gone)
    os.close(there)


@pytest.mark.parametrize("share", BY_FANOTIFY, indirect=True)
def test_the_guest_removes_the_name(share: Share) -> None:
    guest = prepare(share)
    fd = open_file(share.path / "d/f")
    guest.fs.unlink(guest.node("d").nodeid, "f")
    guest.told()
    write(fd)
    os.close(fd)
    assert guest.told() == ["MODIFY d[f] unlinked", "CLOSE_WRITE d[f] unlinked"]


@pytest.mark.parametrize("share", [pytest.param(INOTIFY, id="inotify")], indirect=True)
def test_inotify_cannot_tell_whose_a_name_is_that_was_used_again(share: Share) -> None:
    guest = prepare(share)
    fd = open_file(share.path / "d/f")
    (share.path / "d/f").unlink()
    (share.path / "d/f").write_bytes(b"another")
    guest.told()
    write(fd)
    os.close(fd)
    assert guest.told() == ["MODIFY d[f]", "CLOSE_WRITE d[f]"]
