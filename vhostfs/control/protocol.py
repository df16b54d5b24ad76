# SPDX-License-Identifier: Apache-2.0
"""The control socket's conversation as the server holds it: bytes in, commands and bytes out; no I/O.

Must not know sockets, asyncio or what a command is answered with.
Specification: docs/events.md, "The control socket".
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..events.records import EventFate
from ..record import Record

PROTOCOL_VERSION = 1
MAX_LINE_BYTES = 4096
MAX_WAITING_BYTES = 1 << 20
"""What waits for a client that reads slowly; events beyond it are counted, not kept."""

FATES: Mapping[str, EventFate] = {fate.name.lower(): fate for fate in EventFate}


class StatsCommand(Record):
    """{"command": "stats"}: one object with everything that is counted."""


class WatchCommand(Record):
    """{"command": "watch"}: an object for each event, until the client leaves; fates: only these."""

    fates: frozenset[EventFate]


class NegotiatedCommand(Record):
    """{"command": "negotiated"}: one object with what server, VMM and guest have agreed on."""


Command = StatsCommand | WatchCommand | NegotiatedCommand


class CommandError(ValueError):
    """A line that is no command; the text says why."""


def encode_line(message: Mapping[str, Any]) -> bytes:
    """One line of JSON. Bytes of names that are not UTF-8 become \\udc80 to \\udcff, as Python reads them."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parse_command(line: bytes) -> Command:
    """Raises CommandError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise CommandError("not a line of JSON") from None
    if not isinstance(message, dict):
        raise CommandError('not a JSON object, expected {"command": ...}')
    match message.get("command"):
        case "stats":
            return StatsCommand()
        case "negotiated":
            return NegotiatedCommand()
        case "watch":
            return WatchCommand(_fates(message.get("fates")))
        case _:
            raise CommandError("unknown command; use stats, negotiated or watch")


def _fates(names: object) -> frozenset[EventFate]:
    if names is None:
        return frozenset(EventFate)
    if not isinstance(names, list) or not names or any(name not in FATES for name in map(str, names)):
        raise CommandError(f"fates is not a list of some of {', '.join(FATES)}")
    return frozenset(FATES[str(name)] for name in names)


class ControlSession:
    """
    One client.

    receive() takes bytes while wants_input; next_command() gives what they ask. What is to be sent lies in
    waiting_bytes() until sent(). A client that breaks the rules is told so and is_over is set: what waits is
    still to be sent, then the connection is closed.
    """

    def __init__(self) -> None:
        self._input = bytearray()
        self._output: deque[bytes] = deque()
        self._output_bytes = 0
        self._skipped = 0
        self._watches: frozenset[EventFate] = frozenset()
        self.is_over = False
        self.send({"type": "hello", "vhostfs": __version__, "control": PROTOCOL_VERSION})

    @property
    def wants_input(self) -> bool:
        """False while answers wait, so that they do not pile up, and when the session is over."""
        return not self.is_over and self._output_bytes < MAX_WAITING_BYTES

    def receive(self, data: bytes) -> None:
        """Takes bytes from the client."""
        self._input += data

    def next_command(self) -> Command | None:
        """The next whole command; None when there is none. A wrong one is answered here."""
        while not self.is_over:
            end = self._input.find(b"\n")
            if end < 0 and len(self._input) <= MAX_LINE_BYTES:
                return None
            if end < 0 or end > MAX_LINE_BYTES:
                self.refuse(f"a line has at most {MAX_LINE_BYTES} bytes")
                return None
            line = bytes(self._input[:end])
            del self._input[: end + 1]
            if not line.strip():
                continue
            try:
                command = parse_command(line)
            except CommandError as error:
                self.send({"type": "error", "error": str(error)})
                continue
            if isinstance(command, WatchCommand):
                self._watches = command.fates
            return command
        return None

    def refuse(self, text: str) -> None:
        """Says why, and ends the session."""
        self.send({"type": "error", "error": text})
        self.is_over = True

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues one message."""
        self._queue(encode_line(message))

    def wants(self, fate: EventFate) -> bool:
        """Whether this client watches for events that end so."""
        return fate in self._watches

    def send_event(self, line: bytes) -> None:
        """Queues an event's line, or counts it when too much waits already."""
        if self._output_bytes >= MAX_WAITING_BYTES:
            self._skipped += 1
            return
        self.send_skipped(0)
        self._queue(line)

    def send_skipped(self, count: int) -> None:
        """Says that count events, and those that were counted here, are missing at this place."""
        if not self._watches:
            return
        self._skipped += count
        if self._skipped and self._output_bytes < MAX_WAITING_BYTES:
            skipped, self._skipped = self._skipped, 0
            self.send({"type": "skipped", "count": skipped})

    def _queue(self, line: bytes) -> None:
        self._output.append(line)
        self._output_bytes += len(line)

    def waiting_bytes(self, size: int = 65536) -> bytes:
        """What is to be sent next, about size bytes at most."""
        parts: list[bytes] = []
        length = 0
        for part in self._output:
            parts.append(part)
            length += len(part)
            if length >= size:
                break
        return b"".join(parts)[:size]

    def sent(self, size: int) -> None:
        """So many of the waiting bytes have been taken by the client's socket."""
        self._output_bytes -= size
        while size:
            first = self._output.popleft()
            if len(first) > size:
                self._output.appendleft(first[size:])
                break
            size -= len(first)
