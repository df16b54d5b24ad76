# SPDX-License-Identifier: Apache-2.0
"""What happens when server, VMM and driver differ in what they can do about events, as a table.

Must not know the server's code: it is written from docs/protocol.md, which has it as section 14, and the
tests hold the server to it. `scripts/mismatches --write` puts it there. Specification: docs/protocol.md.
"""

from __future__ import annotations

import enum
import errno
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path as FilePath

from vhostfs.frontend.fsnotify import ALL_EVENTS, HEAD_BYTES, INIT_IN, INIT_OUT, NAME_MAX, Granted

WAYS = Granted.VIRTQUEUE | Granted.PARKED
EXTRAS = Granted.RENAME | Granted.CHILD | Granted.WATCH_FILESYSTEM | Granted.PARENT | Granted.DIRECTORY_LOSS
"""What this project's server grants beside a way for elements to travel."""
NOT_YET = Granted.WATCH_ALL | Granted.INVALIDATE | Granted.DEFERRED_OPEN
KNOWN = reduce(or_, Granted)
UNKNOWN_FLAG = 1 << 40


class Outcome(enum.Enum):
    FULL = "full"
    REDUCED = "reduced"
    REFUSED = "refused"


class Path(enum.Enum):
    """What the VMM and the driver's virtio part make of the feature bit."""

    NO_CONFIG = "not passed: the VMM has a configuration space of its own"
    NO_BIT = "not accepted"
    QUEUE = "accepted"
    NO_QUEUE = "accepted, but queue 1 is not set up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One way of starting the server, and what it is then able to do."""

    name: str
    options: tuple[str, ...] = ()
    source: str = "fanotify:filesystem"
    has_events: bool = True
    source_works: bool = True
    offers_bit: bool = True
    flags: int = WAYS | EXTRAS
    mask: int = ALL_EVENTS
    size: int = 320
    major: int = 1
    minor: int = 0
    reply_bytes: int = INIT_OUT.size
    max_parked: int = 64
    max_watches: int = 524288
    names_children: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """What a driver sends in FUSE_FSNOTIFY_INIT; args_bytes: how much of it, or with zeros behind."""

    path: Path = Path.QUEUE
    flags: int = WAYS | EXTRAS
    mask: int = ALL_EVENTS
    buf_size: int = 320
    major: int = 1
    minor: int = 0
    args_bytes: int = INIT_IN.size
    reply_room: int = INIT_OUT.size + 24


# ---- the ways ------------------------------------------------------------------------------------------


def can_use_queue(server: Server, driver: Driver) -> bool:
    return (
        driver.path is Path.QUEUE
        and server.offers_bit
        and bool(server.flags & Granted.VIRTQUEUE)
        and server.size >= HEAD_BYTES
        and server.source_works
    )


def can_park(server: Server) -> bool:
    return (
        bool(server.flags & Granted.PARKED)
        and server.max_parked > 0
        and server.size >= HEAD_BYTES
        and server.source_works
    )


def way(server: Server, driver: Driver) -> Granted:
    """VIRTQUEUE, PARKED or nothing."""
    if driver.flags & Granted.VIRTQUEUE and can_use_queue(server, driver):
        return Granted.VIRTQUEUE
    if driver.flags & Granted.PARKED and can_park(server):
        return Granted.PARKED
    return Granted(0)


def _longest(server: Server, driver: Driver) -> int:
    return min(server.size, driver.buf_size) - HEAD_BYTES


def _lacks(flag: Granted) -> Callable[[Server, Driver], bool]:
    return lambda server, driver: bool(driver.flags & flag & ~server.flags)


def _unasked(flag: Granted) -> Callable[[Server, Driver], bool]:
    return lambda server, driver: bool(server.flags & flag & ~driver.flags)


# ---- the table -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A row: of server (or VMM) and driver, what they are able to do; then what comes of it.

    says: part of what the server logs, {} filled in by `value`. error: of FUSE_FSNOTIFY_INIT.
    """

    server: str
    driver: str
    then: str
    says: str
    when: Callable[[Server, Driver], bool]
    error: int = 0
    value: Callable[[Server, Driver], object] = lambda server, driver: ""

    @property
    def outcome(self) -> Outcome:
        return Outcome.REFUSED if self.error else Outcome.REDUCED

    def said(self, server: Server, driver: Driver) -> str:
        return self.says.format(self.value(server, driver))


REFUSALS = (
    Rule(
        server="`--events=off`",
        driver="asks",
        then="INIT, WATCH and PARK are unknown to it",
        says="",
        error=errno.ENOSYS,
        when=lambda server, driver: not server.has_events,
    ),
    Rule(
        server="any",
        driver="arguments of less than 8 bytes",
        then="nothing is agreed; it may ask again",
        says="at least 8 hold a version",
        error=errno.EINVAL,
        when=lambda server, driver: driver.args_bytes < 8,
    ),
    Rule(
        server="of one `major`",
        driver="of another, whatever follows the version",
        then="nothing is agreed; it may ask again",
        says="expected {}.x",
        error=errno.EPROTO,
        when=lambda server, driver: server.major != driver.major,
        value=lambda server, driver: server.major,
    ),
    Rule(
        server="any",
        driver="arguments of 8 to 31 bytes",
        then="nothing is agreed; it may ask again",
        says="at least 32 are needed",
        error=errno.EINVAL,
        when=lambda server, driver: driver.args_bytes < INIT_IN.size,
    ),
    Rule(
        server="any",
        driver="`buf_size` below 64",
        then="nothing is agreed: its buffers hold no element",
        says="the smallest element takes 64",
        error=errno.EINVAL,
        when=lambda server, driver: driver.buf_size < HEAD_BYTES,
    ),
    Rule(
        server="can report some events",
        driver="can raise none of them",
        then="nothing is agreed",
        says="it can raise no event that the host can report",
        error=errno.EINVAL,
        when=lambda server, driver: not server.mask & driver.mask,
    ),
    Rule(
        server="its answer has n bytes",
        driver="room for less than n",
        then="nothing is agreed, nor taken for agreed by the server",
        says="bytes of the answer, which has {}",
        error=errno.EINVAL,
        when=lambda server, driver: driver.reply_room < server.reply_bytes,
        value=lambda server, driver: server.reply_bytes,
    ),
)


def _has_no_way(server: Server) -> bool:
    return not server.source_works or server.size < HEAD_BYTES


def _could_have_queue(server: Server) -> bool:
    return server.offers_bit and bool(server.flags & Granted.VIRTQUEUE)


NEITHER = (
    Rule(
        server="its source of events has failed",
        driver="any",
        then="no elements; WATCH and PARK are ENOSYS",
        says="the host's source of events has failed",
        when=lambda server, driver: not server.source_works,
    ),
    Rule(
        server="`notify_buf_size` below 64",
        driver="any",
        then="the same",
        says="notify_buf_size is {}, which holds no element",
        when=lambda server, driver: server.source_works and server.size < HEAD_BYTES,
        value=lambda server, driver: server.size,
    ),
)
"""The server has no way at all."""

NO_QUEUE = (
    Rule(
        server="the VMM has a configuration space of its own, and does not pass the bit",
        driver="any",
        then="`PARKED` if both have that, else no elements",
        says="this VMM does not pass VIRTIO_FS_F_NOTIFICATION",
        when=lambda server, driver: driver.path is Path.NO_CONFIG and _could_have_queue(server),
    ),
    Rule(
        server="the VMM passes the bit",
        driver="does not accept it",
        then="the same",
        says="VIRTIO_FS_F_NOTIFICATION is not accepted",
        when=lambda server, driver: driver.path is Path.NO_BIT and _could_have_queue(server),
    ),
    Rule(
        server="the bit is accepted, but the VMM has not set queue 1 up",
        driver="any",
        then="the same",
        says="the VMM has not set queue 1 up",
        when=lambda server, driver: driver.path is Path.NO_QUEUE and _could_have_queue(server),
    ),
    Rule(
        server="does not offer the bit, or does not grant `VIRTQUEUE`",
        driver="any",
        then="the same",
        says="the notification queue is switched off",
        when=lambda server, driver: not _could_have_queue(server),
    ),
    Rule(
        server="the queue is possible",
        driver="does not want `VIRTQUEUE`",
        then="the same; what it prefers is no reduction",
        says="its driver did not ask for the notification queue",
        when=lambda server, driver: (
            can_use_queue(server, driver) and (way(server, driver) is Granted.PARKED or not can_park(server))
        ),
    ),
)
"""Why the queue is not used; one of these."""

NO_PARKING = (
    Rule(
        server="`max_parked` is 0",
        driver="any, and the queue is not used",
        then="no elements",
        says="no request may be parked (max_parked is 0)",
        when=lambda server, driver: server.max_parked == 0,
    ),
    Rule(
        server="does not grant `PARKED`",
        driver="any, and the queue is not used",
        then="the same",
        says="parked requests are switched off",
        when=lambda server, driver: server.max_parked > 0 and not server.flags & Granted.PARKED,
    ),
    Rule(
        server="has both ways",
        driver="wants neither",
        then="the same",
        says="its driver asked for neither way that there is",
        when=lambda server, driver: can_park(server) and can_use_queue(server, driver),
    ),
    Rule(
        server="the queue is not possible, requests may be parked",
        driver="does not want `PARKED`",
        then="the same",
        says="its driver did not ask for parked requests",
        when=lambda server, driver: can_park(server) and not can_use_queue(server, driver),
    ),
)
"""Why no requests are parked either, where nothing is told; one of these."""

_FLAGS = (
    (
        Granted.RENAME,
        "the halves of a rename come plain, without `SPLIT_RENAME`",
        "renames come as plain halves",
    ),
    (Granted.CHILD, "`child_nodeid` is 0", "names come without their objects"),
    (
        Granted.WATCH_FILESYSTEM,
        "a WATCH with `FILESYSTEM` is EINVAL",
        "the share cannot be watched as a whole",
    ),
    (
        Granted.PARENT,
        "`FOR_PARENT` is never set",
        "whether an event of a directory is for its parent's watchers is not told",
    ),
)


def _of_flags() -> Iterator[Rule]:
    for flag, then, says in _FLAGS:
        yield Rule(
            server=f"does not grant `{flag.name}`",
            driver="wants it",
            then=then,
            says=f"{says}: {flag.name} is not granted",
            when=_lacks(flag),
        )
        yield Rule(
            server=f"could grant `{flag.name}`",
            driver="does not want it",
            then=then,
            says=f"{says}: its driver does not ask for {flag.name}",
            when=_unasked(flag),
        )
    yield Rule(
        server="does not grant `WATCH_ALL`",
        driver="wants it",
        then="only what is watched is told",
        says="watches are needed: WATCH_ALL is not granted",
        when=_lacks(Granted.WATCH_ALL),
    )


REDUCTIONS = (
    *_of_flags(),
    Rule(
        server="an older one, or another project's",
        driver="wants flags that the server does not know",
        then="they are not granted",
        says="not known here: flags",
        when=lambda server, driver: bool(driver.flags & ~int(KNOWN)),
    ),
    Rule(
        server="can report more events",
        driver="can raise fewer",
        then="the others are not told",
        says="its driver cannot raise",
        when=lambda server, driver: bool(server.mask & ~driver.mask),
    ),
    Rule(
        server="can report fewer events",
        driver="can raise more",
        then="the others are not told",
        says="the host does not report",
        when=lambda server, driver: bool(driver.mask & ALL_EVENTS & ~server.mask),
    ),
    Rule(
        server="`notify_buf_size` n, 64 to 318",
        driver="`buf_size` of n or more",
        then="longer names are told as a loss (5.6): with `DIRECTORY_LOSS` of the directory, else of all",
        says="names of more than {} bytes are told as a loss",
        when=lambda server, driver: server.size <= driver.buf_size and _longest(server, driver) < NAME_MAX,
        value=_longest,
    ),
    Rule(
        server="`notify_buf_size` of more than n",
        driver="`buf_size` n, 64 to 318",
        then="the same; the answer says n",
        says="its driver's buffers hold {} bytes",
        when=lambda server, driver: driver.buf_size < server.size and _longest(server, driver) < NAME_MAX,
        value=lambda server, driver: driver.buf_size,
    ),
    Rule(
        server="`max_watches` is 0",
        driver="any",
        then="every WATCH is ENOSPC; losses are told",
        says="nothing can be watched: max_watches is 0",
        when=lambda server, driver: not server.max_watches,
    ),
)

HARMLESS = (
    ("`minor` n", "another `minor`", "the smaller of both counts"),
    ("any", "arguments of more than 32 bytes", "what follows is not looked at"),
    ("its answer has 40 bytes", "room for more", "40 bytes are written"),
    ("`notify_buf_size` n of 319 or more", "`buf_size` of 319 or more", "every element fits"),
    ("any", "does not want `WATCH_ALL`, `INVALIDATE` or `DIRECTORY_LOSS`", "it is told what it watches"),
    ("does not grant `INVALIDATE`", "wants it", "what it keeps is asked for again when its time is over"),
    ("does not grant or know `DEFERRED_OPEN`", "wants it", "it asks for every open"),
    ("could grant `DEFERRED_OPEN`", "does not want or know it", "it asks for every open"),
    ("could grant `DEFERRED_OPEN`", "wants it without `INVALIDATE`", "neither is granted"),
    ("can do neither", "does not want it either", "both do without"),
    ("any", "`mask` has bits that are no events", "they are ignored"),
    ("both ways possible", "wants both", "`VIRTQUEUE`"),
    ("both ways possible", "wants `PARKED` only", "`PARKED`"),
)
"""Differences that cost nothing: server, driver, what comes of it."""


@dataclass(frozen=True, slots=True)
class Expected:
    """way_says: parts of the line that says by which way; less: one part for each further line."""

    outcome: Outcome
    error: int = 0
    flags: int = 0
    size: int = 0
    minor: int = 0
    way_says: tuple[str, ...] = ()
    less: tuple[str, ...] = ()


def expected(server: Server, driver: Driver) -> Expected:
    """What the table says of this pair."""
    for rule in REFUSALS:
        if rule.when(server, driver):
            return Expected(Outcome.REFUSED, rule.error, way_says=(rule.said(server, driver),))
    chosen = way(server, driver)
    less: list[str] = []
    reasons: list[Rule] = []
    if _has_no_way(server):
        reasons += NEITHER
    elif chosen is not Granted.VIRTQUEUE:
        reasons += NO_QUEUE
        if not chosen:
            reasons += NO_PARKING
    says = [rule.said(server, driver) for rule in reasons if rule.when(server, driver)]
    if chosen:
        less = [rule.said(server, driver) for rule in REDUCTIONS if rule.when(server, driver)]
    prefer_parked = chosen is Granted.PARKED and not driver.flags & Granted.VIRTQUEUE
    is_full = bool(chosen) and not less and (not says or prefer_parked)
    return Expected(
        Outcome.FULL if is_full else Outcome.REDUCED,
        flags=int(chosen | driver.flags & server.flags & ~WAYS & KNOWN),
        size=min(server.size, driver.buf_size),
        minor=min(server.minor, driver.minor),
        way_says=(f"events for the guest: {_WAY_TEXTS[chosen]}", *says),
        less=tuple(less),
    )


_WAY_TEXTS = {
    Granted.VIRTQUEUE: "by the notification queue",
    Granted.PARKED: "by parked requests",
    Granted(0): "none",
}


# ---- the order of requests -------------------------------------------------------------------------------


class State(enum.Enum):
    """Of a session, by what was sent before."""

    NEW = "before FUSE_INIT"
    MOUNTED = "after FUSE_INIT"
    REFUSED = "after a refused INIT"
    NO_WAY = "after INIT, no way granted"
    QUEUE = "after INIT, `VIRTQUEUE`"
    PARKED = "after INIT, `PARKED`"
    DESTROYED = "after FUSE_DESTROY"
    AGAIN = "after the next FUSE_INIT"


class Request(enum.Enum):
    INIT = "INIT"
    WATCH = "WATCH"
    LONGER_WATCH = "WATCH of more than 16 bytes"
    SHORT_WATCH = "WATCH of less than 16 bytes"
    FLAGGED_WATCH = "WATCH with unknown `flags`"
    SHARE_WATCH = "WATCH with `FILESYSTEM`"
    STALE_WATCH = "WATCH of an unknown nodeid"
    PARK = "PARK"
    SMALL_PARK = "PARK without room"


_EVERY = tuple(Request)
_GRANTED = {
    Request.INIT: errno.EALREADY,
    Request.SHORT_WATCH: errno.EINVAL,
    Request.FLAGGED_WATCH: errno.EINVAL,
    Request.STALE_WATCH: errno.ESTALE,
    Request.WATCH: 0,
    Request.LONGER_WATCH: 0,
    Request.SHARE_WATCH: 0,
}
_UNASKED = {**dict.fromkeys(_EVERY, errno.ENOSYS), Request.INIT: 0}
ANSWERS: dict[State, dict[Request, int]] = {
    State.NEW: dict.fromkeys(_EVERY, errno.EIO),
    State.MOUNTED: _UNASKED,
    State.REFUSED: _UNASKED,
    State.NO_WAY: {**_UNASKED, Request.INIT: errno.EALREADY},
    State.QUEUE: {**_GRANTED, Request.PARK: errno.ENOSYS, Request.SMALL_PARK: errno.ENOSYS},
    State.PARKED: {**_GRANTED, Request.PARK: 0, Request.SMALL_PARK: errno.EINVAL},
    State.DESTROYED: dict.fromkeys(_EVERY, errno.EIO),
    State.AGAIN: _UNASKED,
}
"""Error numbers; 0: it is done, or the request waits."""


# ---- the document ----------------------------------------------------------------------------------------


def document() -> str:
    """Section 14 of docs/protocol.md, between its marks."""
    lines = [
        "| server, or VMM | driver | outcome | then | the server's log says |",
        "|---|---|---|---|---|",
    ]
    for rules in (REFUSALS, NEITHER, NO_QUEUE, NO_PARKING, REDUCTIONS):
        for rule in rules:
            outcome = rule.outcome.value
            if rule.error:
                outcome += f", {errno.errorcode[rule.error]}"
            said = f'"{rule.says.format("n")}"' if rule.says else "-"
            lines.append(f"| {rule.server} | {rule.driver} | {outcome} | {rule.then} | {said} |")
    lines += [f"| {server} | {driver} | full | {then} | - |" for server, driver, then in HARMLESS]
    names = [state.value for state in State]
    lines += ["", "What is sent when:", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for request in Request:
        answers = [ANSWERS[state][request] for state in State]
        words = [errno.errorcode[answer] if answer else "done" for answer in answers]
        lines.append(f"| {request.value} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


DOCUMENT = FilePath(__file__).resolve().parents[2] / "docs" / "protocol.md"
_BEGIN, _END = "<!-- table of mismatches -->\n\n", "\n<!-- end of the table of mismatches -->"


def main(arguments: list[str]) -> int:
    """scripts/mismatches."""
    if arguments not in ([], ["--write"]):
        print("usage: scripts/mismatches [--write]", file=sys.stderr)
        return 2
    if not arguments:
        print(document(), end="")
        return 0
    before, _, rest = DOCUMENT.read_text().partition(_BEGIN)
    _, mark, after = rest.partition(_END)
    if not mark:
        print(f"scripts/mismatches: {DOCUMENT} has no place for the table: {_BEGIN.strip()}", file=sys.stderr)
        return 1
    DOCUMENT.write_text(before + _BEGIN + document() + _END + after)
    return 0
