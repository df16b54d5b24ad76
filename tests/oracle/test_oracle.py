# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: it complains when a guest is told something else, and makes what it complains of small.

Must not test the server. Specification: docs/oracle.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.conftest import lacking
from tests.oracle.generate import random_script
from tests.oracle.ring_guest import RingGuest
from tests.oracle.ring_level import RingLevel
from tests.oracle.runner import SOURCES
from tests.oracle.script import Op, ScriptError, parse, step_by_step, written
from tests.oracle.shrink import shrunk
from tests.oracle.streams import In, Seen, differences, differences_from_fanotify, differences_from_inotify
from tests.ring.share import Share
from vhostfs.frontend.fsnotify import Element, ElementFlag, Event

pytestmark = pytest.mark.usefixtures("ours")

SCRIPT = step_by_step(
    parse(
        """
        mkdir d
        mkdir e
        file d/a
        file d/b
        watch d d CHANGES
        watch e e CHANGES
        watch a d/a CHANGES
        watch b d/b CHANGES
        write d/a
        rename d/a e/c
        write d/b
        unlink d/b
        """
    )
)


class MistakenGuest(RingGuest):
    """Loses or changes what `mistake` says, of all elements of a run."""

    mistake: Callable[[Element], list[Element]]

    def take(self) -> list[Element]:
        return [kept for element in super().take() for kept in type(self).mistake(element)]


def changed(kind: Event, **changes: object) -> Callable[[Element], list[Element]]:
    def change(element: Element) -> list[Element]:
        return [replace(element, **changes) if element.mask & kind else element]  # type: ignore[arg-type]

    return change


def lost(kind: Event) -> Callable[[Element], list[Element]]:
    return lambda element: [] if element.mask & kind else [element]


def doubled(kind: Event) -> Callable[[Element], list[Element]]:
    # Identical neighbours would be merged, rightly.
    other = Element(1, 0, Event.Q_OVERFLOW)
    return lambda element: [element, other] if element.mask & kind else [element]


MISTAKES = {
    "nothing": (lambda element: [element], False),
    "a lost MODIFY": (lost(Event.MODIFY), True),
    "a lost MOVED_FROM": (lost(Event.MOVED_FROM), True),
    "a lost MOVED_TO": (lost(Event.MOVED_TO), True),
    "a lost MOVE_SELF": (lost(Event.MOVE_SELF), True),
    "a lost ATTRIB of a link count": (lost(Event.ATTRIB), True),
    "a lost DELETE_SELF": (lost(Event.DELETE_SELF), True),
    "a lost DELETE": (lost(Event.DELETE), True),
    "another name": (changed(Event.MOVED_TO, name=b"other"), True),
    "another cookie": (changed(Event.MOVED_TO, cookie=4711), True),
    "another event": (changed(Event.MODIFY, mask=Event.ATTRIB), True),
    "a directory that is none": (changed(Event.DELETE, mask=Event.DELETE | Event.ISDIR), True),
    "no child": (changed(Event.MODIFY, child_nodeid=0, child_generation=0), True),
    "an overflow without a loss": (doubled(Event.MODIFY), True),
    "no flag, which inotify does not see": (changed(Event.MOVED_TO, flags=ElementFlag(0)), False),
}


@pytest.fixture(scope="module")
def level() -> Iterator[RingLevel]:
    try:
        with RingLevel(SOURCES["inotify"]) as level:
            yield level
    except AssertionError as error:
        lacking(f"a server with the inotify source: {error}")


@pytest.mark.parametrize("what", MISTAKES)
def test_it_complains_of_a_guest_that_is_told_something_else(level: RingLevel, what: str) -> None:
    mistake, matters = MISTAKES[what]

    class Guest(MistakenGuest):
        pass

    Guest.mistake = staticmethod(mistake)
    outcome = level.run(SCRIPT, lambda share, buffers: Guest(share, buffers))
    assert outcome.is_equal == (not matters), outcome.lines
    assert matters or outcome.compared > 10


def test_it_makes_a_difference_small(level: RingLevel) -> None:
    class Guest(MistakenGuest):
        mistake = staticmethod(lost(Event.MOVED_TO))

    def guest(share: Share, buffers: int) -> RingGuest:
        return Guest(share, buffers)

    script = parse(
        "mkdir d\nfile d/a\nwatch w d ALL\n" + "chmod d/a\nwrite d/a\n" * 5 + "rename d/a d/b\nread d/b"
    )
    small = shrunk(script, lambda shorter: not level.run(shorter, guest).is_equal, 60)
    assert small == parse("mkdir d\nfile d/a\nwatch w d ALL\nrename d/a d/b")


def test_shrinking_finds_two_lines_that_belong_together() -> None:
    script = tuple(Op("mkdir", (str(i),)) for i in range(50))
    needed = {script[7], script[41]}
    assert set(shrunk(script, lambda shorter: needed <= set(shorter), 10)) == needed


def test_a_seed_gives_the_same_script_every_time() -> None:
    one, again, other = random_script(7, 200), random_script(7, 200), random_script(8, 200)
    assert one == again != other
    assert parse(written(one)) == one
    assert sum(not op.is_control for op in one) >= 200


def test_a_script_with_a_mistake_is_refused_with_the_line() -> None:
    for text, words in (
        ("mkdir a\nfrobnicate b", "line 2: 'frobnicate' is no operation"),
        ("rename a", "line 1: 'rename a': expected rename PATH PATH"),
        ("watch w a CREATE|NONSENSE", "'NONSENSE' is no event"),
    ):
        with pytest.raises(ScriptError, match=words.replace("|", r"\|")):
            parse(text)


def event(watch: str, mask: In, name: str = "", cookie: int = 0) -> Seen:
    return Seen(watch, mask, name, cookie)


def equal(native: list[Seen], guest: list[Seen]) -> bool:
    return not differences(native, guest, one_operation=True)


def test_identical_neighbours_are_one_and_others_are_not() -> None:
    one, other = event("d", In.MODIFY, "a"), event("d", In.MODIFY, "b")
    assert equal([one, one, other], [one, other])
    assert not equal([one, other, one], [one, other])


def test_lone_halves_that_may_be_merged_count_once() -> None:
    """What a rename is the other half of is told by how often that name came: merging must not show in it."""
    pair = [event("d", In.MOVED_FROM, "b", 3), event("d", In.MOVED_TO, "a", 3)]
    native = [event("d", In.MOVED_TO, "a", 1), event("d", In.MOVED_TO, "a", 2)]
    guest = [event("d", In.MOVED_TO, "a")]
    between = [event("d", In.DELETE, "c")]
    assert equal([*native, *between, *pair], [*guest, *between, *pair])
    assert not equal([native[0], *between, native[1], *pair], [*guest, *between, *pair])


def test_the_order_of_different_directories_is_free() -> None:
    one, other = event("d", In.CREATE, "a"), event("e", In.CREATE, "b")
    assert equal([one, other], [other, one])


def test_the_order_in_a_directory_and_with_what_is_in_it_counts() -> None:
    one, other = event("d", In.CREATE, "a"), event("d", In.CREATE, "b")
    assert not equal([one, other], [other, one])
    named, own = event("d", In.DELETE, "f"), event("f", In.DELETE_SELF)
    assert not equal([own, named], [named, own])


def test_halves_that_linux_sums_up_are_missed_from_inotify_alone() -> None:
    first = [event("d", In.MOVED_FROM, "a", 1)]
    second = [event("d", In.MOVED_FROM, "a", 2), event("e", In.MOVED_TO, "b", 2)]
    left = [event("d", In.MOVED_FROM, "a", 1), event("e", In.MOVED_TO, "b", 2)]

    def found(guest: list[Seen], native: list[Seen], *, one_operation: bool = False) -> list[str]:
        return differences_from_inotify(native, guest, one_operation=one_operation)

    assert not found([*first, *second], [*first, *second])
    assert not found(left, [*first, *second])
    assert found(left, [*first, *second], one_operation=True)
    assert found(left, [*first, event("d", In.CREATE, "c"), *second])
    assert found(left[:1], [*first, *second])
    assert differences([*first, *second], left, one_operation=False)


def test_cookies_may_be_others_but_join_the_same() -> None:
    def rename(cookie: int, to: int) -> list[Seen]:
        return [event("d", In.MOVED_FROM, "a", cookie), event("e", In.MOVED_TO, "b", to)]

    assert equal(rename(1, 1), rename(900, 900))
    assert not equal(rename(1, 1), rename(900, 901))
    assert not equal([*rename(1, 1), *rename(2, 2)], [*rename(1, 2), *rename(2, 1)])


def test_what_both_queues_sum_up_is_excused_only_of_a_rename_that_was_done_before() -> None:
    first = Seen("d", In.MOVED_TO, "a", 1), Seen("d", In.MOVED_FROM, "b", 1)
    lost = Seen("d", In.MOVED_TO, "a", 2)
    again = replace(lost, again=True)
    assert differences_from_fanotify([*first[::-1], lost], first[::-1], one_operation=False)
    assert not differences_from_fanotify([*first[::-1], again], first[::-1], one_operation=False)
    assert differences_from_fanotify([*first, again], first, one_operation=False), "they are no neighbours"
