# SPDX-License-Identifier: Apache-2.0
"""Streams of inotify events, what makes two of them equal, and how a difference is told.

Must not know where events come from. Specification: docs/oracle.md, "What is compared"; inotify(7).
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

_MOST_SUMMED_UP = 5


class In(enum.IntFlag):
    """Bits of inotify, events and how to watch; OPEN_EXEC and RENAME are fanotify's alone."""

    ACCESS = 0x1
    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    CLOSE_NOWRITE = 0x10
    OPEN = 0x20
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    OPEN_EXEC = 0x1000
    UNMOUNT = 0x2000
    Q_OVERFLOW = 0x4000
    IGNORED = 0x8000
    ONLYDIR = 0x0100_0000
    DONT_FOLLOW = 0x0200_0000
    EXCL_UNLINK = 0x0400_0000
    RENAME = 0x1000_0000
    MASK_ADD = 0x2000_0000
    ISDIR = 0x4000_0000
    ONESHOT = 0x8000_0000

    ALL = 0xFFF
    CHANGES = 0xFCE


BY_PATH = In.ACCESS | In.MODIFY | In.OPEN | In.CLOSE_WRITE | In.CLOSE_NOWRITE
"""What Linux tells with a path, and with IN_EXCL_UNLINK of no path that is gone."""


def event_words(mask: int) -> str:
    """Names of the bits, joined by |."""
    return "|".join(str(bit.name) for bit in In if bit & mask and bit not in (In.ALL, In.CHANGES))


@dataclass(frozen=True, slots=True)
class Seen:
    """One event as a program in inotify's place gets it; `watch` is the script's name of the watch."""

    watch: str
    mask: In
    name: str = ""
    cookie: int = 0
    again: bool = field(default=False, compare=False)
    """Of a rename that was done before, of the same object from and to the same names."""

    def __str__(self) -> str:
        return " ".join(word for word in (self.watch, event_words(self.mask), self.name) if word)


@dataclass(frozen=True, slots=True)
class Told:
    """An event without what differs between two runs of the same: the cookie is its other half, in words."""

    event: str
    partner: str

    def __str__(self) -> str:
        return f"{self.event} ({self.partner})" if self.partner else self.event


def told(events: Sequence[Seen]) -> list[Told]:
    """Each event with the other half of its rename, "alone" for a half without one."""
    by_cookie: dict[int, list[tuple[int, str]]] = defaultdict(list)
    times: Counter[str] = Counter()
    halves = Counter(event.cookie for event in events if event.cookie)
    before: dict[str, str] = {}
    for at, event in enumerate(events):
        # A half that is alone has a cookie natively and none here, and counts as well: once with others like
        # it directly before, which may be merged.
        alone = str(event) if halves[event.cookie] <= 1 else ""
        repeats, before[event.watch] = before.get(event.watch) == alone != "", alone
        if event.mask & (In.MOVED_FROM | In.MOVED_TO):
            times[str(event)] += not repeats
            often = f" for the {times[str(event)]}. time" if times[str(event)] > 1 else ""
            if event.cookie:
                by_cookie[event.cookie].append((at, f"{event}{often}"))
    result = []
    for at, event in enumerate(events):
        partner = ""
        if event.mask & (In.MOVED_FROM | In.MOVED_TO):
            others = [words for place, words in by_cookie[event.cookie] if place != at]
            partner = f"with {', '.join(others)}" if others else "alone"
        elif event.cookie:
            partner = f"with the cookie {event.cookie}"
        result.append(Told(str(event), partner))
    return result


def merged(events: Iterable[Told]) -> list[Told]:
    """Identical neighbours as one."""
    kept: list[Told] = []
    for event in events:
        if not kept or kept[-1] != event:
            kept.append(event)
    return kept


def without_repeats(events: Iterable[Told]) -> list[Told]:
    """Of a run of events of one kind, each once: neighbours merge, and one event may have two watchers."""
    kept: list[Told] = []
    run: set[Told] = set()
    kind = ""
    for event in events:
        this = event.event.split(" ")[1]
        if this != kind:
            kind = this
            run.clear()
        if event not in run:
            run.add(event)
            kept.append(event)
    return kept


def with_summed_up_halves(events: Sequence[Seen], *, of_repeats: bool) -> Iterator[list[Seen]]:
    """What may be left of these: Linux takes neighbours that differ in the cookie alone for one, if unread.

    The cookie of the second is lost then, so its other half is alone. `of_repeats`: only where fanotify, too,
    may have taken the rename for one with the same before it.
    """
    halves = In.MOVED_FROM | In.MOVED_TO
    second = [
        at
        for at, (before, event) in enumerate(pairwise(events), 1)
        if event.mask & halves
        and replace(event, cookie=0) == replace(before, cookie=0)
        and (event.again or not of_repeats)
    ][:_MOST_SUMMED_UP]
    for n in range(1, len(second) + 1):
        for lost in combinations(second, n):
            yield [event for at, event in enumerate(events) if at not in lost]


def differences_from_inotify(
    native: Sequence[Seen], guest: Sequence[Seen], *, one_operation: bool
) -> list[str]:
    """The same where the server knows only what inotify keeps for it: halves of renames may be summed up."""
    return _differences_if_summed_up(native, guest, one_operation, of_repeats=False)


def differences_from_fanotify(
    native: Sequence[Seen], guest: Sequence[Seen], *, one_operation: bool
) -> list[str]:
    """The same where fanotify knows each rename, but for one that was done again before it was read."""
    return _differences_if_summed_up(native, guest, one_operation, of_repeats=True)


def _differences_if_summed_up(
    native: Sequence[Seen], guest: Sequence[Seen], one_operation: bool, *, of_repeats: bool
) -> list[str]:
    lines = differences(native, guest, one_operation=one_operation)
    if lines and not one_operation:
        for summed_up in with_summed_up_halves(native, of_repeats=of_repeats):
            if not differences(summed_up, guest, one_operation=False):
                return []
    return lines


def differences(native: Sequence[Seen], guest: Sequence[Seen], *, one_operation: bool) -> list[str]:
    """What differs, in words; nothing when the streams are equal.

    Each watch has a stream of its own, in which identical neighbours are one. Of the events of one operation
    the order between a directory's and those of an object without a name counts too.
    """
    lines: list[str] = []
    native_by_watch, guest_by_watch = _by_watch(native), _by_watch(guest)
    for watch in sorted(native_by_watch.keys() | guest_by_watch.keys()):
        expected, got = merged(native_by_watch[watch]), merged(guest_by_watch[watch])
        if expected != got:
            lines += [f"native: {'; '.join(map(str, expected))}", f"guest:  {'; '.join(map(str, got))}"]
    if lines or not one_operation:
        return lines
    directories = {event.watch for event in native if event.name}
    for directory in sorted(directories):
        for other in sorted(native_by_watch.keys() - directories):
            expected, got = (
                without_repeats(told([event for event in stream if event.watch in (directory, other)]))
                for stream in (native, guest)
            )
            if expected != got:
                lines += [
                    f"native, in order: {'; '.join(map(str, expected))}",
                    f"guest, in order:  {'; '.join(map(str, got))}",
                ]
    return lines


def differences_beside_a_loss(native: Sequence[Seen], guest: Sequence[Seen]) -> list[str]:
    """The same beside a loss: what comes before it is complete, and all that comes behind has happened."""
    last = max((at for at, event in enumerate(guest) if event.mask & In.Q_OVERFLOW), default=None)
    if last is None:
        return differences(native, guest, one_operation=False)
    lines: list[str] = []
    native_by_watch = _by_watch(native)
    before, behind = (
        _by_watch([e for e in guest[:last] if not e.mask & In.Q_OVERFLOW]),
        _by_watch(guest[last + 1 :]),
    )
    for watch in sorted(native_by_watch.keys() | before.keys() | behind.keys()):
        expected = merged(native_by_watch[watch])
        begun, gone_on = merged(before[watch]), merged(behind[watch])
        if expected[: len(begun)] != begun:
            lines += [
                f"native: {'; '.join(map(str, expected))}",
                f"guest before its loss: {'; '.join(map(str, begun))}",
            ]
        rest = iter(expected[max(0, len(begun) - 1) :])
        if not all(event in rest for event in gone_on):
            lines += [
                f"native: {'; '.join(map(str, expected))}",
                f"guest behind its loss: {'; '.join(map(str, gone_on))}",
            ]
    return lines


def different_sets(native: Sequence[Seen], guest: Sequence[Seen], *, one_operation: bool) -> list[str]:
    """The same for fanotify, which sums up: what happened counts, neither how often nor in which order."""
    expected, got = sorted(set(map(str, native))), sorted(set(map(str, guest)))
    if expected == got:
        return []
    return [f"native: {'; '.join(expected)}", f"guest:  {'; '.join(got)}"]


def _by_watch(events: Sequence[Seen]) -> dict[str, list[Told]]:
    streams: dict[str, list[Told]] = defaultdict(list)
    for event, words in zip(events, told(events), strict=True):
        streams[event.watch].append(words)
    return streams
