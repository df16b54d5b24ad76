# SPDX-License-Identifier: Apache-2.0
"""Renames by every way in which the host can tell of them, through queues that are too small for them.

Must not test the forms of other elements. Specification: docs/protocol.md, "Renames".
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import FILESYSTEM_MARK, INODE_MARKS, INOTIFY, Source, start_share
from tests.ring.events import WATCHED, EventGuest
from tests.ring.share import Share
from tests.server import held_up
from vhostfs.frontend.fsnotify import Event

UNSAID_S = 0.1
"""After this what inotify has not said is told without it."""

pytestmark = pytest.mark.usefixtures("ours")


@dataclass(frozen=True, slots=True)
class Way:
    """A source, and whether it has a rename in one piece."""

    source: Source
    options: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source.name} {' '.join(self.options)}".strip()


WAYS = [
    Way(FILESYSTEM_MARK, ()),
    Way(INODE_MARKS, ()),
    Way(FILESYSTEM_MARK, ("--no-fan-rename",)),
    Way(INODE_MARKS, ("--no-fan-rename",)),
    Way(INOTIFY, ()),
]


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture
def share(make_share: MakeShare, way: Way) -> Share:
    share = start_share(make_share, way.source, *way.options)
    for name in ("d", "e", "u"):
        (share.path / name).mkdir()
    return share


def halves(told: list[str]) -> list[str]:
    """Without the object, which not every source knows of names that are gone, and the pair's number."""
    return [line.removesuffix(" half").partition("=")[0].partition(" pair")[0] for line in told]


def cookies(guest: EventGuest) -> list[tuple[str, int]]:
    """Of each half, in order: its name and cookie."""
    halves = Event.MOVED_FROM | Event.MOVED_TO
    return [(e.name.decode(), e.cookie) for e in guest.elements() if e.mask & halves]


def test_a_chain_is_told_in_pairs_to_a_guest_with_one_buffer(share: Share) -> None:
    (share.path / "d/0").touch()
    guest = EventGuest(share, buffers=1)
    guest.watch("d")
    guest.watch("e")
    for i in range(200):
        os.rename(share.path / "de"[i % 2] / str(i), share.path / "ed"[i % 2] / str(i + 1))
    told = cookies(guest)
    assert [name for name, _ in told] == [str(i) for n in range(200) for i in (n, n + 1)]
    pairs = [cookie for _, cookie in told]
    assert pairs[::2] == pairs[1::2], "two halves have different cookies"
    assert len(set(pairs)) == 200
    assert 0 not in pairs


def test_other_events_between_do_not_part_the_halves(share: Share) -> None:
    (share.path / "d/a").touch()
    guest = EventGuest(share, buffers=1)
    guest.watch("d")
    guest.watch("e")
    for i in range(50):
        os.mknod(share.path / f"d/before{i}")
        os.rename(share.path / "d/a", share.path / "e/a")
        os.mknod(share.path / f"e/between{i}")
        os.rename(share.path / "e/a", share.path / "d/a")
    told = cookies(guest)
    assert len(told) == 200
    assert all(one[1] == other[1] != 0 for one, other in zip(told[::2], told[1::2], strict=True))


def test_what_has_no_other_half_is_told_as_a_plain_one(share: Share) -> None:
    """Many at once: each is told, and they do not wait in turn."""
    count = 1000
    for i in range(count):
        (share.path / f"d/{i}").touch()
    guest = EventGuest(share)
    guest.watch("d")
    for i in range(count):
        os.rename(share.path / f"d/{i}", share.path / f"u/{i}")
    for i in range(count):
        os.rename(share.path / f"u/{i}", share.path / f"d/{i}")
    expected = [f"MOVED_FROM d[{i}]" for i in range(count)] + [f"MOVED_TO d[{i}]" for i in range(count)]
    told = guest.told(10)  # if each waited 10 ms for its other half, it would take 20 s
    assert halves(told) == expected
    assert all(line.endswith(" half") for line in told)


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ("u/a>d/a d/a>u/a u/a>d/a d/b>d/a", "+a -a +a -b +a"),
        ("u/a>d/a d/a>u/a u/a>d/a d/a>u/a u/a>d/a d/a>d/c d/c>d/a", "+a -a +a -a +a -a +c -c +a"),
        ("d/b>d/a d/a>d/b d/b>d/a d/a>u/b u/a>d/a d/a>d/b", "-b +a -a +b -b +a -a +a -a +b"),
    ],
)
def test_a_rename_that_comes_again_is_not_taken_for_another(share: Share, moves: str, expected: str) -> None:
    """fanotify counts it as one with the first, when nobody has looked since."""
    (share.path / "u/a").touch()
    (share.path / "d/b").touch()
    guest = EventGuest(share)
    guest.watch("d", Event.MOVED_FROM | Event.MOVED_TO)
    with held_up(share.server.process.pid):
        for move in moves.split():
            old, new = move.split(">")
            os.rename(share.path / old, share.path / new)
    words = {"+": "MOVED_TO", "-": "MOVED_FROM"}
    assert halves(guest.told()) == [f"{words[word[0]]} d[{word[1]}]" for word in expected.split()]


def test_only_one_of_the_halves_is_asked_for(share: Share) -> None:
    (share.path / "d/a").touch()
    guest = EventGuest(share)
    guest.watch("d", Event.MOVED_FROM)
    guest.watch("e", Event.MOVED_FROM)
    os.rename(share.path / "d/a", share.path / "e/a")
    told = guest.told()
    assert halves(told) == ["MOVED_FROM d[a]"]
    assert told[0].endswith(" half")


def test_a_queue_for_one_element_never_locks_up(make_share: MakeShare, way: Way) -> None:
    share = start_share(make_share, way.source, *way.options, "--event-queue=1", private=True)
    for name in ("d", "e"):
        (share.path / name).mkdir()
    (share.path / "d/a").touch()
    guest = EventGuest(share, buffers=1)
    guest.fs.watch(guest.node("d").nodeid, WATCHED, guest.node("d").generation)
    guest.fs.watch(guest.node("e").nodeid, WATCHED, guest.node("e").generation)
    for i in range(100):
        os.rename(share.path / f"{'de'[i % 2]}/a", share.path / f"{'ed'[i % 2]}/a")
    # What did not fit is lost, and that is told; then all goes on.
    (share.path / "d/end").mkdir()
    for turn in range(1000):
        element = guest.notifications.take()
        if element.name.startswith(b"end"):
            break
        if element.mask & Event.Q_OVERFLOW:
            (share.path / f"d/end{turn}").mkdir()
    else:
        raise AssertionError("the last event never came")


def test_a_queue_for_one_element_takes_a_rename(make_share: MakeShare, way: Way) -> None:
    share = start_share(make_share, way.source, *way.options, "--event-queue=1", private=True)
    for name in ("d", "e"):
        (share.path / name).mkdir()
    (share.path / "d/a").touch()
    guest = EventGuest(share)
    guest.watch("d", Event.MOVED_FROM)
    guest.watch("e", Event.MOVED_TO)
    os.rename(share.path / "d/a", share.path / "e/a")
    assert halves(guest.told()) == ["MOVED_FROM d[a]", "MOVED_TO e[a]"]


def test_a_moved_directory_takes_its_watches_along(share: Share) -> None:
    (share.path / "d/tree/below").mkdir(parents=True)
    guest = EventGuest(share)
    for path in ("d", "d/tree", "d/tree/below"):
        guest.watch(path)
    os.rename(share.path / "d/tree", share.path / "u/tree")
    os.mknod(share.path / "u/tree/below/new")
    os.unlink(share.path / "u/tree/below/new")
    os.rmdir(share.path / "u/tree/below")
    os.rmdir(share.path / "u/tree")
    assert halves(guest.told_until("ISDIR|DELETE_SELF d/tree")) == [
        "ISDIR|MOVED_FROM d[tree]",
        "ISDIR|MOVE_SELF d/tree",
        "CREATE d/tree/below[new]",
        "DELETE d/tree/below[new]",
        "ISDIR|DELETE_SELF d/tree/below",
        "ISDIR|DELETE d/tree[below]",
        "ISDIR|DELETE_SELF d/tree",
    ]


def test_the_removal_of_who_had_the_name_before_is_not_a_directory_s_end(share: Share) -> None:
    """Its name is learnt when it has gone, too, so of which removal of that name it was must be found out."""
    (share.path / "d/moved").mkdir()
    (share.path / "d/name").mkdir()
    guest = EventGuest(share)
    guest.watch("d/moved")
    with held_up(share.server.process.pid):
        os.rename(share.path / "d/moved", share.path / "d/other")
        os.mknod(share.path / "d/other/first")
        os.rmdir(share.path / "d/name")
        os.mknod(share.path / "d/other/second")
        os.rename(share.path / "d/other", share.path / "d/name")
        os.unlink(share.path / "d/name/first")
        os.unlink(share.path / "d/name/second")
        os.rmdir(share.path / "d/name")
    assert halves(guest.told_until("ISDIR|DELETE_SELF d/moved")) == [
        "ISDIR|MOVE_SELF d/moved",
        "CREATE d/moved[first]",
        "CREATE d/moved[second]",
        "ISDIR|MOVE_SELF d/moved",
        "DELETE d/moved[first]",
        "DELETE d/moved[second]",
        "ISDIR|DELETE_SELF d/moved",
    ]


def test_a_half_that_only_the_server_asks_for_is_none_of_a_pair(share: Share) -> None:
    """The host still tells the server of what comes there, but the guest watches less now."""
    (share.path / "e/kept").mkdir()
    (share.path / "d/a").mkdir()
    guest = EventGuest(share)
    guest.watch("d")
    guest.watch("u")
    guest.watch("e")
    guest.watch("e/kept")
    guest.watch("e", Event(0))
    guest.watch("e", Event.ATTRIB | Event.DELETE_SELF)
    with held_up(share.server.process.pid):
        os.rename(share.path / "d/a", share.path / "e/b")
        (share.path / "d/a").mkdir()
        os.rename(share.path / "d/a", share.path / "u/c")
        (share.path / "d/end").mkdir()
    first = halves(guest.told())
    time.sleep(UNSAID_S)
    assert [*first, *halves(guest.told())] == [
        "ISDIR|MOVED_FROM d[a]",
        "ISDIR|CREATE d[a]",
        "ISDIR|MOVED_FROM d[a]",
        "ISDIR|MOVED_TO u[c]",
        "ISDIR|CREATE d[end]",
    ]
