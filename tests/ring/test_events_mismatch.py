# SPDX-License-Identifier: Apache-2.0
"""Every difference between server, VMM and driver ends as the table says: full, reduced and said, or refused.

Must not say what is right: mismatch_table.py does. One server for each way of starting it, and many sessions
on one connection to it; what was agreed is tried by events. Specification: docs/protocol.md, section 14.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path as FilePath
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.event_sources import Source, start_share
from tests.ring.events import NOTIFYING, STOCK
from tests.ring.mismatch_table import (
    ANSWERS,
    EXTRAS,
    KNOWN,
    NOT_YET,
    UNKNOWN_FLAG,
    WAYS,
    Driver,
    Outcome,
    Path,
    Request,
    Server,
    State,
    document,
    expected,
)
from tests.ring.share import Share
from tests.server import REPOSITORY, awaited
from vhostfs.frontend import (
    FuseClient,
    FuseError,
    NotificationQueue,
    ParkedRequests,
    ProtocolFeature,
    Session,
    Vmm,
)
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend import operations as op
from vhostfs.frontend.elements import ElementSource
from vhostfs.frontend.fsnotify import ALL_EVENTS, CHANGES, HEAD_BYTES, OVERFLOW, Element, Event, Granted

pytestmark = pytest.mark.usefixtures("ours")

WITHOUT_EXEC = ALL_EVENTS & ~Event.OPEN_EXEC
LESS = "events for the guest: less: "


def forced(name: str, *pairs: str, **abilities: object) -> Server:
    options = tuple(f"--negotiate={pair}" for pair in pairs)
    return Server(name=name, options=options, **abilities)  # type: ignore[arg-type]


def without(flag: Granted) -> Server:
    name = str(flag.name).lower()
    return forced(f"no {name}", f"{name}=off", flags=(WAYS | EXTRAS) & ~flag)


PLAIN = Server(name="able")
SERVERS = [
    PLAIN,
    *[without(flag) for flag in WAYS | EXTRAS],
    forced("no way", "virtqueue=off", "parked=off", flags=EXTRAS),
    forced("no feature bit", "feature_bit=off", offers_bit=False),
    *[
        forced(f"size {size}", f"notify_buf_size={size}", size=size)
        for size in (0, 63, 64, 67, 128, 319, 4096)
    ],
    forced("major 2", "major=2", major=2),
    forced("minor 3", "minor=3", "reply_bytes=48", minor=3, reply_bytes=48),
    forced("creations only", "mask=CREATE", mask=int(Event.CREATE)),
    forced("nothing may be kept", "max_parked=0", "max_watches=0", max_parked=0, max_watches=0),
    forced("one may be kept", "max_parked=1", "max_watches=1", max_parked=1, max_watches=1),
    forced("broken source", "source_works=off", source_works=False),
    forced("no target fids", "target_fid=off", names_children=False),
    forced("no rights", "sys_admin=off", source="auto"),
    Server(name="no FAN_RENAME", options=("--no-fan-rename",)),
    Server(name="inode marks", source="fanotify:inodes"),
    Server(name="inotify", source="inotify", mask=int(WITHOUT_EXEC)),
    Server(name="off", source="off", has_events=False, offers_bit=False),
]

DEVIATIONS: dict[str, tuple[int, ...]] = {
    "flags": (
        *[int((WAYS | EXTRAS) & ~flag) for flag in WAYS | EXTRAS],
        0,
        int(EXTRAS),
        int(WAYS),
        int(KNOWN),
        int(NOT_YET | WAYS),
        int(WAYS | EXTRAS) | UNKNOWN_FLAG,
        (1 << 64) - 1,
    ),
    "mask": (0, int(Event.CREATE), int(CHANGES), int(Event.UNMOUNT), int(WITHOUT_EXEC), (1 << 64) - 1),
    "buf_size": (0, 63, 64, 67, 100, 318, 319, 321, 4096, (1 << 32) - 1),
    "major": (0, 2, (1 << 32) - 1),
    "minor": (1, 7),
    "args_bytes": (0, 7, 8, 31, 33, 64),
    "reply_room": (0, 39, 40, 48),
}


def single_deviations(paths: tuple[Path, ...] = tuple(Path)) -> Iterator[Driver]:
    """One thing that differs, on these paths, and on the others what depends on them."""
    for path in Path:
        usual = Driver(path=path)
        yield usual
        for field, values in DEVIATIONS.items():
            for value in values if path in paths or field == "flags" else ():
                yield replace(usual, **{field: value})  # type: ignore[arg-type]


def pairs_of_deviations() -> Iterator[Driver]:
    for path in (Path.NO_BIT, Path.QUEUE):
        for (one, ones), (other, others) in itertools.combinations(DEVIATIONS.items(), 2):
            if path is Path.QUEUE or (one, other) == ("flags", "buf_size"):
                for first, second in itertools.product(ones, others):
                    yield replace(Driver(path=path), **{one: first, other: second})  # type: ignore[arg-type]


def all_flags() -> Iterator[Driver]:
    singles = list(WAYS | EXTRAS)
    for path in Path:
        for chosen in itertools.product((False, True), repeat=len(singles)):
            wanted = reduce(or_, (flag for flag, on in zip(singles, chosen, strict=True) if on), Granted(0))
            for more in (0, int(NOT_YET) | UNKNOWN_FLAG) if path is Path.QUEUE else (0,):
                yield Driver(path=path, flags=int(wanted) | more)


class WithoutQueue(Vmm):
    """Passes the feature bit and forgets the queue."""

    def set_queue(self, index: int, *args: object, **options: object) -> None:
        if index != 1 or not self.has_notification_queue:
            super().set_queue(index, *args, **options)  # type: ignore[arg-type]

    def enable_queue(self, index: int, *, on: bool = True) -> None:
        if index != 1 or not self.has_notification_queue:
            super().enable_queue(index, on=on)

    def stop_queue(self, index: int) -> int:
        return super().stop_queue(index) if index != 1 or not self.has_notification_queue else 0


class Guest:
    """One connection by one path, and as many sessions as are wanted."""

    def __init__(self, share: Share, path: Path) -> None:
        self.share = share
        machine = STOCK if path in (Path.NO_BIT, Path.NO_CONFIG) else NOTIFYING
        if path is Path.NO_CONFIG:
            features = machine.protocol_features & ~ProtocolFeature.CONFIG
            machine = replace(machine, protocol_features=features)
        kind = WithoutQueue if path is Path.NO_QUEUE else Vmm
        self.fs = FuseClient(Session(kind.boot(share.server.socket_path, machine)))
        self.queue: NotificationQueue | None = None
        if path is Path.QUEUE and self.fs.vmm.has_notification_queue:
            self.queue = NotificationQueue(self.fs.vmm, size_bytes=4096)
        self.generation = 0

    def mount(self) -> None:
        """Begins a session."""
        self.fs.root = 1
        self.fs.init()
        entry = self.fs.walk(self.share.relative)
        self.fs.root, self.generation = entry.nodeid, entry.generation

    def ask(self, driver: Driver) -> wire.InitAnswer:
        call = wire.init(
            driver.flags, driver.mask, major=driver.major, minor=driver.minor, buf_size=driver.buf_size
        )
        args = call.args[: driver.args_bytes].ljust(driver.args_bytes, b"\xff")
        return self.fs.call(replace(call, args=args, reply_room=driver.reply_room))

    def close(self) -> None:
        self.fs.close()


@dataclass(slots=True)
class Visit:
    """Goes through drivers at one server, and keeps what was not as the table says."""

    share: Share
    server: Server

    def run(self, drivers: Iterator[Driver]) -> list[str]:
        wrong: list[str] = []
        tried: set[tuple[object, ...]] = set()
        for path, group in itertools.groupby(drivers, key=lambda driver: driver.path):
            guest = Guest(self.share, path)
            try:
                for driver in group:
                    trouble = self._cell(guest, driver, tried)
                    if trouble:
                        wrong.append(f"{self.server.name}, {driver}:\n    {trouble}")
            finally:
                guest.close()
        return wrong

    def _cell(self, guest: Guest, driver: Driver, tried: set[tuple[object, ...]]) -> str | None:
        want = expected(self.server, driver)
        guest.mount()
        mark = self.share.server.log_size()
        try:
            answer = guest.ask(driver)
        except FuseError as error:
            if error.errno != want.error:
                return f"{error}, where the table has {want}"
            return self._check_log(mark, want.way_says, ())
        if want.error:
            return f"it is granted, where the table has {want}"
        seen = (answer.flags, answer.notify_buf_size, answer.max_watches, answer.reserved)
        if seen != (want.flags, want.size, self.server.max_watches, 0):
            return f"{answer}, where the table has {want}"
        seen_of_server = (answer.major, answer.minor, answer.mask)
        if seen_of_server != (self.server.major, want.minor, self.server.mask):
            return f"{answer}, where the table has {want}"
        parked = self.server.max_parked if want.flags & Granted.PARKED else 0
        if answer.max_parked != parked:
            return f"max_parked is {answer.max_parked}, expected {parked}"
        trouble = self._check_log(mark, want.way_says, want.less)
        agreed = (want.flags, want.size, driver.mask & self.server.mask & ALL_EVENTS)
        if trouble is None and agreed not in tried:
            tried.add(agreed)
            trouble = self._try_events(guest, driver, want.flags, want.size)
        return trouble

    def _check_log(self, mark: int, way_says: tuple[str, ...], less: tuple[str, ...]) -> str | None:
        def complete() -> bool:
            lines = self.share.server.log_since(mark).splitlines()
            said = " ".join(line for line in lines if LESS not in line)
            lesser = [line for line in lines if LESS in line]
            return (
                all(part in said for part in way_says)
                and len(lesser) == len(less)
                and all(any(part in line for line in lesser) for part in less)
            )

        if awaited(complete):
            return None
        return f"the log does not have {way_says} and {less}:\n{self.share.server.log_since(mark)}"

    # ---- events ----------------------------------------------------------------------------------------

    def _try_events(self, guest: Guest, driver: Driver, flags: int, size: int) -> str | None:
        fs = guest.fs
        mask = driver.mask & self.server.mask
        watch = wire.watch(fs.root, int(CHANGES | Event.EVENT_ON_CHILD), guest.generation)
        if not flags & WAYS:
            return _refusal(fs, watch, errno.ENOSYS)
        if self.server.max_watches < 2:
            return _limits(fs, watch, self.server.max_watches)
        share_watch = wire.watch(1, 0, 0, wire.WatchFlag.FILESYSTEM)
        trouble = _refusal(fs, share_watch, 0 if flags & Granted.WATCH_FILESYSTEM else errno.EINVAL)
        if trouble or not mask & Event.CREATE:
            return trouble
        longest = size - HEAD_BYTES
        if not (longest or mask & Event.ATTRIB):
            return None  # nothing that could mark the end could be told
        while guest.queue is not None and guest.queue.poll() is not None:
            pass  # of an earlier session
        place = Scene(self.share.path)
        known = fs.lookup(fs.root, place.known.name)
        fence = fs.lookup(fs.root, place.fence.name)
        end = fs.lookup(fence.nodeid, place.end.name)
        fs.watch(fence.nodeid, int(Event.CREATE), fence.generation)
        fs.watch(end.nodeid, int(Event.ATTRIB), end.generation)
        fs.call(watch)
        elements: ElementSource
        if flags & Granted.PARKED:
            elements = ParkedRequests(fs.session, count=min(8, self.server.max_parked), room_bytes=size - 16)
        else:
            assert guest.queue is not None
            elements = guest.queue
        place.play(by_attribute=not longest)
        before, _ = elements.until(lambda element: element.nodeid in (fence.nodeid, end.nodeid))
        got = in_words(before, fs.root, known.nodeid)
        names_child = bool(flags & Granted.CHILD) and self.server.names_children
        want = place.expected(mask, flags, longest, names_child=names_child)
        place.remove()
        if got != want:
            return f"with {Granted(flags)!r}, size {size}, it was told\n    {got}, expected\n    {want}"
        return None


class Scene:
    """What is done on the host, and how it should be told. Names: 1, 4 and 200 bytes."""

    numbers = itertools.count()

    def __init__(self, directory: FilePath) -> None:
        self.directory = directory
        tail = f"{next(self.numbers):05}"
        self.known = directory / f"known-{tail}"
        self.fence = directory / f"fence-{tail}"
        self.end = self.fence / "end"
        self.fence.mkdir()
        for path in (self.known, self.end):
            path.write_bytes(b"1")
        self.short, self.middle = directory / "s", directory / "s234"
        self.long = directory / ("l" * 200)

    def play(self, *, by_attribute: bool) -> None:
        """by_attribute: the end is an event without a name."""
        os.mknod(self.short)
        os.mknod(self.long)
        os.rename(self.short, self.middle)
        os.chmod(self.known, 0o600)
        os.unlink(self.middle)
        if by_attribute:
            os.chmod(self.end, 0o600)
        else:
            os.mknod(self.fence / "x")

    def remove(self) -> None:
        for path in (self.long, self.known):
            path.unlink()

    def expected(self, mask: int, flags: int, longest: int, *, names_child: bool) -> list[str]:
        """In the words of `told`."""
        lines: list[str] = []
        lost = "loss of the directory" if flags & Granted.DIRECTORY_LOSS else "loss"
        halves = Event.MOVED_FROM | Event.MOVED_TO
        # They are together only when both names fit.
        split = bool(flags & Granted.RENAME) and mask & halves == halves and len(self.middle.name) <= longest

        def tell(event: Event, path: FilePath, more: str = "") -> None:
            if not mask & event:
                return
            if len(path.name) <= longest:
                lines.append(f"{event.name} {path.name}{more}")
            else:
                lines.append(lost)

        tell(Event.CREATE, self.short)
        tell(Event.CREATE, self.long)
        tell(Event.MOVED_FROM, self.short, " pair" if split else "")
        tell(Event.MOVED_TO, self.middle, " pair" if split else "")
        tell(Event.ATTRIB, self.known, " =known" if names_child else "")
        tell(Event.DELETE, self.middle)
        return covered(lines)


def covered(lines: list[str]) -> list[str]:
    """How far a loss covers the next is a race: the share's first counts, and one of equal neighbours."""
    kept: list[str] = []
    for line in lines:
        if not (line == "loss" and line in kept) and not (line.startswith("loss of") and kept[-1:] == [line]):
            kept.append(line)
    return kept


def in_words(elements: list[Element], directory: int, known: int) -> list[str]:
    return covered([in_word(element, directory, known) for element in elements])


def in_word(element: Element, directory: int, known: int) -> str:
    if element == OVERFLOW:
        return "loss"
    if element.nodeid != directory:
        return f"? {element}"
    if element.mask == Event.Q_OVERFLOW:
        return "loss of the directory"
    more = " pair" if element.flags else ""
    if element.child_nodeid:
        more += " =known" if element.child_nodeid == known else " =?"
    return f"{element.mask.name} {os.fsdecode(element.name)}{more}"


def _refusal(fs: FuseClient, call: op.Call[None], number: int) -> str | None:
    try:
        fs.call(call)
    except FuseError as error:
        return None if error.errno == number else f"{error}, expected {errno.errorcode.get(number, 0)}"
    return None if not number else f"WATCH is done, expected {errno.errorcode[number]}"


def _limits(fs: FuseClient, watch: op.Call[None], most: int) -> str | None:
    return _refusal(fs, watch, 0 if most else errno.ENOSPC)


# ---- tests -----------------------------------------------------------------------------------------------


def share_of(make_share: MakeShare, server: Server) -> Share:
    return start_share(make_share, Source(server.name, f"--events={server.source}"), *server.options)


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: re.sub(r"\W+", "-", server.name))
def test_whatever_one_thing_the_driver_does_otherwise(make_share: MakeShare, server: Server) -> None:
    paths = tuple(Path) if server is PLAIN else (Path.QUEUE,)
    wrong = Visit(share_of(make_share, server), server).run(single_deviations(paths))
    assert not wrong, "\n".join([f"{len(wrong)} cells:", *wrong[:5]])


def test_whatever_two_things_the_driver_does_otherwise(make_share: MakeShare) -> None:
    wrong = Visit(share_of(make_share, PLAIN), PLAIN).run(pairs_of_deviations())
    assert not wrong, "\n".join([f"{len(wrong)} cells:", *wrong[:5]])


def test_whatever_flags_the_driver_wants(make_share: MakeShare) -> None:
    wrong = Visit(share_of(make_share, PLAIN), PLAIN).run(all_flags())
    assert not wrong, "\n".join([f"{len(wrong)} cells:", *wrong[:5]])


@dataclass(frozen=True, slots=True)
class EventNode:
    """An object as the guest holds it."""

    nodeid: int
    generation: int


MakeCall = Callable[[FuseClient, EventNode], op.Call[Any]]
REQUESTS: dict[Request, MakeCall] = {
    Request.INIT: lambda fs, node: wire.init(),
    Request.WATCH: lambda fs, node: wire.watch(node.nodeid, CHANGES, node.generation),
    Request.LONGER_WATCH: lambda fs, node: _resized(wire.watch(node.nodeid, CHANGES, node.generation), 40),
    Request.SHORT_WATCH: lambda fs, node: _resized(wire.watch(node.nodeid, CHANGES, node.generation), 15),
    Request.FLAGGED_WATCH: lambda fs, node: wire.watch(node.nodeid, CHANGES, node.generation, 2),
    Request.SHARE_WATCH: lambda fs, node: wire.watch(1, CHANGES, 0, wire.WatchFlag.FILESYSTEM),
    Request.STALE_WATCH: lambda fs, node: wire.watch(77777, CHANGES),
    Request.PARK: lambda fs, node: wire.park(),
    Request.SMALL_PARK: lambda fs, node: wire.park(302),
}


def _resized(call: op.Call[None], size: int) -> op.Call[None]:
    return replace(call, args=call.args[:size].ljust(size, b"\xff"))


def _bring(guest: Guest, state: State) -> None:
    """From a new connection to a state."""
    if state is State.NEW:
        return
    guest.mount()
    if state is State.REFUSED:
        with pytest.raises(FuseError):
            guest.fs.call(wire.init(major=9))
    elif state is State.NO_WAY:
        guest.fs.call(wire.init(EXTRAS))
    elif state is State.QUEUE:
        guest.fs.call(wire.init(Granted.VIRTQUEUE | EXTRAS))
    elif state is not State.MOUNTED:
        guest.fs.call(wire.init(Granted.PARKED | EXTRAS))
    if state is State.DESTROYED:
        guest.fs.destroy()
    elif state is State.AGAIN:
        guest.mount()


@pytest.mark.parametrize("state", State, ids=lambda state: state.name.lower())
def test_what_is_sent_when_has_one_answer(make_share: MakeShare, state: State) -> None:
    share = share_of(make_share, PLAIN)
    (share.path / "node").mkdir()
    got = {}
    for request, make in REQUESTS.items():
        guest = Guest(share, Path.QUEUE)
        try:
            _bring(guest, state)
            is_mounted = state not in (State.NEW, State.DESTROYED)
            node = EventNode(5, 0)
            if is_mounted:
                entry = guest.fs.lookup(guest.fs.root, "node")
                node = EventNode(entry.nodeid, entry.generation)
            pending = guest.fs.submit(make(guest.fs, node))
            if request is not Request.PARK or ANSWERS[state][request]:
                pending.payload()
            else:
                guest.fs.call(wire.watch(node.nodeid, 0, node.generation))
                assert not pending.done
            got[request] = 0
        except FuseError as error:
            got[request] = error.errno or 0
        finally:
            guest.close()
    assert got == ANSWERS[state]


@pytest.mark.parametrize("most", [1, 64])
def test_no_more_are_parked_than_the_server_said(make_share: MakeShare, most: int) -> None:
    share = share_of(make_share, next(server for server in SERVERS if server.max_parked == most))
    guest = Guest(share, Path.NO_BIT)
    try:
        guest.mount()
        assert guest.ask(Driver(path=Path.NO_BIT)).max_parked == most
        waiting = [guest.fs.submit(wire.park()) for _ in range(most)]
        with pytest.raises(FuseError) as refused:
            guest.fs.call(wire.park())
        assert refused.value.errno == errno.ENOSPC
        assert not any(pending.done for pending in waiting)
    finally:
        guest.close()


@pytest.mark.parametrize("most", [0, 1])
def test_no_more_is_watched_than_the_server_said(make_share: MakeShare, most: int) -> None:
    share = share_of(make_share, next(server for server in SERVERS if server.max_watches == most))
    guest = Guest(share, Path.QUEUE)
    try:
        guest.mount()
        assert guest.ask(Driver()).max_watches == most
        for number in range(most):
            node = guest.fs.mkdir(guest.fs.root, str(number))
            guest.fs.watch(node.nodeid, CHANGES, node.generation)
        with pytest.raises(FuseError) as refused:
            guest.fs.watch(guest.fs.root, CHANGES, guest.generation)
        assert refused.value.errno == errno.ENOSPC
    finally:
        guest.close()


@pytest.mark.parametrize("said", [128, 320])
@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_buffers_are_as_large_as_the_driver_said(make_share: MakeShare, said: int, difference: int) -> None:
    """Smaller ones stop the queue, loudly, and nothing else."""
    share = share_of(make_share, PLAIN)
    vmm = Vmm.boot(share.server.socket_path, NOTIFYING)
    fs = FuseClient(Session(vmm))
    mark = share.server.log_size()
    try:
        fs.init()
        entry = fs.walk(share.relative)
        queue = NotificationQueue(vmm, size_bytes=said + difference)
        fs.call(wire.init(WAYS | EXTRAS, buf_size=said))
        fs.watch(entry.nodeid, Event.CREATE, entry.generation)
        os.mknod(share.path / "new")
        if difference >= 0:
            assert queue.take().name == b"new"
            return
        text = f"{said - 1} writable bytes, where none and at least {said}"
        assert awaited(lambda: text in share.server.log_since(mark))
        assert queue.poll() is None
        assert fs.lookup(entry.nodeid, "new").nodeid
    finally:
        fs.close()


@pytest.mark.parametrize("asks", [True, False])
def test_a_driver_that_never_asks_is_named_when_it_leaves(make_share: MakeShare, asks: bool) -> None:
    share = share_of(make_share, PLAIN)
    mark = share.server.log_size()
    guest = Guest(share, Path.QUEUE)
    guest.mount()
    if asks:
        guest.ask(Driver())
    guest.close()
    # The next one is heard when that has left; what is said when it leaves itself is not of interest.
    share.mount()
    named = "its driver never asked for them"
    if asks:
        # What came before the next front end, which asks for nothing.
        assert named not in share.server.log_since(mark).split("front end connected")[1]
    else:
        assert awaited(lambda: named in share.server.log_since(mark))


def test_every_outcome_and_every_row_of_the_table_is_visited() -> None:
    """A table with rows that no cell meets would promise what nobody has tried."""
    from tests.ring import mismatch_table as table

    cells = [(server, driver) for server in SERVERS for driver in single_deviations()]
    assert {expected(*cell).outcome for cell in cells} == set(Outcome)
    for rules in (table.REFUSALS, table.NEITHER, table.NO_QUEUE, table.NO_PARKING, table.REDUCTIONS):
        for rule in rules:
            assert any(rule.when(*cell) for cell in cells), f"no cell is of {rule.server}, {rule.driver}"


def test_the_document_has_the_table() -> None:
    text = (REPOSITORY / "docs" / "protocol.md").read_text()
    assert document() in text, "docs/protocol.md is not current; run scripts/mismatches --write"
