# SPDX-License-Identifier: Apache-2.0
"""The table of docs/events.md: what is told natively, and in a guest by each source, to each kind of watcher.

Filled from real runs. Must not know what is expected. Specification: docs/oracle.md, "The table".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.oracle.guest_level import GuestSession
from tests.oracle.runner import SOURCES, Outcome
from tests.oracle.script import Op, parse
from tests.oracle.streams import In, Seen

COLUMNS = ("fanotify:filesystem", "fanotify:inodes", "inotify")
"""The sources, in the order of the table."""
WATCHERS = ("inotify", "fanotify")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/events.md"
_BEGIN, _END = "<!-- oracle table -->", "<!-- end of the oracle table -->"
_TREE = """
mkdir d
mkdir e
mkdir u
mkdir d/s
file d/f
write d/f
program d/p
file u/f
"""
_WATCHES = """
watch d d ALL
watch e e ALL
watch s d/s ALL
watch f d/f ALL
watch p d/p ALL
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One event by one cause."""

    event: In
    cause: str
    operation: str
    watch: str = "d"
    before: str = ""


ROWS = (
    Row(In.ACCESS, "a file is read", "read d/f"),
    Row(In.ACCESS, "a directory is listed", "list d/s", "s"),
    Row(In.MODIFY, "a file is written", "write d/f"),
    Row(In.MODIFY, "a file is truncated", "truncate d/f"),
    Row(In.MODIFY, "space is allocated", "allocate d/f"),
    Row(In.MODIFY, "a mapped file is written in memory", "mapwrite d/f"),
    Row(In.ATTRIB, "chmod of a file", "chmod d/f"),
    Row(In.ATTRIB, "chmod of a directory, to its parent's watcher", "chmod d/s"),
    Row(In.ATTRIB, "chmod of a directory, to its own watcher", "chmod d/s", "s"),
    Row(In.ATTRIB, "setxattr", "setxattr d/f"),
    Row(In.ATTRIB, "a link more", "link d/f u/g", "f"),
    Row(In.ATTRIB, "a link less", "unlink u/g", "f", "link d/f u/g"),
    Row(In.CLOSE_WRITE, "a file is closed that was open for writing", "write d/f"),
    Row(In.CLOSE_NOWRITE, "a file is closed that was open for reading", "read d/f"),
    Row(In.OPEN, "a file is opened", "read d/f"),
    Row(In.OPEN, "a directory is opened, to its parent's watcher", "list d/s"),
    Row(In.OPEN_EXEC, "a program is started", "execute d/p"),
    Row(In.CREATE, "a file is made", "file d/n"),
    Row(In.CREATE, "a directory is made", "mkdir d/n"),
    Row(In.CREATE, "a link is made", "link d/f d/n"),
    Row(In.CREATE, "a symlink is made", "symlink d/n"),
    Row(In.DELETE, "a file is removed", "unlink d/f"),
    Row(In.DELETE, "a directory is removed", "rmdir d/s"),
    Row(In.DELETE_SELF, "the last link of a file is removed", "unlink d/f", "f"),
    Row(In.DELETE_SELF, "a file is replaced by a rename", "rename u/f d/f", "f"),
    Row(In.DELETE_SELF, "a directory is removed", "rmdir d/s", "s"),
    Row(In.MOVED_FROM, "rename in a directory", "rename d/f d/n"),
    Row(In.MOVED_TO, "rename in a directory", "rename d/f d/n"),
    Row(In.MOVED_FROM, "rename into another watched directory", "rename d/f e/n"),
    Row(In.MOVED_TO, "rename into another watched directory", "rename d/f e/n", "e"),
    Row(In.MOVED_FROM, "rename out of what is watched", "rename d/f u/n"),
    Row(In.MOVED_TO, "rename into what is watched", "rename u/f d/n"),
    Row(In.MOVED_TO, "exchange", "exchange d/f e/k", "e", "file e/k"),
    Row(In.RENAME, "rename into another watched directory", "rename d/f e/n"),
    Row(In.MOVE_SELF, "a file is renamed", "rename d/f d/n", "f"),
    Row(In.MOVE_SELF, "a directory is renamed", "rename d/s e/s", "s"),
)


def _has(events: list[Seen], row: Row) -> bool:
    # In fanotify's records the object itself stands behind its name in a directory.
    return any(
        event.mask & row.event and (event.watch == row.watch or event.name.endswith(f"={row.watch}"))
        for event in events
    )


class Table:
    """Runs every row on every source with both watchers, in one guest."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._notes: list[str] = []

    def lines(self) -> list[str]:
        """The table in Markdown, and notes on what differs beside the event itself."""
        head = ["event", "what happens on the host"]
        for watcher in WATCHERS:
            head += [f"{watcher}: native", *(f"`{name}`" for name in COLUMNS)]
        rows = [head, ["---"] * len(head)]
        with GuestSession([SOURCES[name] for name in COLUMNS], self._kernel) as session:
            for row in ROWS:
                rows.append(self._row(session, row))
        text = ["| " + " | ".join(cells) + " |" for cells in rows]
        return [*text, *(["", *self._notes] if self._notes else [])]

    def _row(self, session: GuestSession, row: Row) -> list[str]:
        words = "RENAME (fanotify)" if row.event == In.RENAME else str(row.event.name)
        cells = [f"{words}", row.cause]
        script = (*parse(f"{_TREE}\n{row.before}\n{_WATCHES}"), Op("sync"), *parse(row.operation))
        for watcher in WATCHERS:
            told = []
            for name in COLUMNS:
                level = session.on(SOURCES[name], by_fanotify=watcher == "fanotify")
                told.append(level.run(script))
            cells.append("yes" if any(_has(outcome.native, row) for outcome in told) else "no")
            cells += [self._cell(row, outcome, watcher) for outcome in told]
        return cells

    def _cell(self, row: Row, outcome: Outcome, watcher: str) -> str:
        answer = "yes" if _has(outcome.guest, row) else "no"
        if outcome.is_equal or answer == "no":
            return answer
        native, guest = set(map(str, outcome.native)), set(map(str, outcome.guest))
        missing, more = sorted(native - guest), sorted(guest - native)
        what = [f"not told: {'; '.join(missing)}"] if missing else []
        what += [f"told in addition: {'; '.join(more)}"] if more else []
        if not what:
            what = ["told in another order"]
        note = f"{', '.join(what)} ({watcher}, {row.operation})"
        note = re.sub(r"([|<>])", r"\\\1", note)
        for number, known in enumerate(self._notes, 1):
            if known.endswith(note):
                return f"{answer} ({number})"
        self._notes.append(f"{len(self._notes) + 1}. {note}")
        return f"{answer} ({len(self._notes)})"


def write_document(lines: list[str]) -> None:
    """Replaces the table of docs/events.md."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    DOCUMENT.write_text("\n".join([before + _BEGIN, "", *lines, "", _END + after]))
