# SPDX-License-Identifier: Apache-2.0
"""Scripts: what is done to a directory, what is watched, and when both sides are compared; one line each.

Must not do any of it. Specification: docs/oracle.md, "Scripts".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.oracle.streams import In, event_words

OPERATIONS: dict[str, str] = {
    "mkdir": "path",
    "file": "path",
    "mknod": "path",
    "fifo": "path",
    "bind": "path",
    "symlink": "path",
    "link": "path path",
    "tmplink": "path",
    "unlink": "path",
    "rmdir": "path",
    "rename": "path path",
    "noreplace": "path path",
    "exchange": "path path",
    "write": "path",
    "rewrite": "path",
    "truncate": "path",
    "allocate": "path",
    "copy": "path path",
    "mapwrite": "path",
    "read": "path",
    "list": "path",
    "program": "path",
    "execute": "path",
    "chmod": "path",
    "chown": "path",
    "utime": "path",
    "atime": "path",
    "mtime": "path",
    "setxattr": "path",
    "rmxattr": "path",
    "open": "slot path",
    "openr": "slot path",
    "put": "slot",
    "get": "slot",
    "close": "slot",
}
"""What is done to the directory, and its arguments."""
CONTROLS: dict[str, str] = {
    "watch": "watch path mask",
    "unwatch": "watch",
    "look": "path",
    "forget": "",
    "busy": "",
    "stall": "",
    "resume": "",
    "sync": "",
}
"""What concerns the watchers. Each is preceded by a comparison but `look`, `forget` and `busy` by none."""
COMPARED_BEFORE = frozenset(("watch", "unwatch", "sync"))
MASK_NAMES = {"ALL": In.ALL, "CHANGES": In.CHANGES}


class ScriptError(ValueError):
    """A line that is no operation; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Op:
    """One line of a script."""

    kind: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.kind, *self.arguments))

    @property
    def is_control(self) -> bool:
        """Concerns the watchers and changes nothing in the directory."""
        return self.kind in CONTROLS


Script = tuple[Op, ...]


def parse(text: str) -> Script:
    """Empty lines and those that begin with # are skipped. Raises ScriptError."""
    ops = []
    for number, line in enumerate(text.splitlines(), 1):
        kind, *arguments = line.split() or ["#"]
        if kind.startswith("#"):
            continue
        form = OPERATIONS.get(kind, CONTROLS.get(kind))
        if form is None:
            raise ScriptError(f"line {number}: {kind!r} is no operation; there are {known_operations()}")
        if len(arguments) != len(form.split()):
            raise ScriptError(f"line {number}: {line.strip()!r}: expected {kind} {form.upper()}")
        if kind == "watch":
            mask_of(arguments[2])
        ops.append(Op(kind, tuple(arguments)))
    return tuple(ops)


def known_operations() -> str:
    """For messages."""
    return ", ".join((*OPERATIONS, *CONTROLS))


def written(script: Iterable[Op]) -> str:
    """As `parse` takes it."""
    return "".join(f"{op}\n" for op in script)


def mask_of(text: str) -> In:
    """ALL, CHANGES, or bits of inotify joined by |. Raises ScriptError."""
    mask = In(0)
    for word in text.split("|"):
        try:
            mask |= MASK_NAMES.get(word) or In[word]
        except KeyError:
            raise ScriptError(f"{word!r} is no event of inotify") from None
    return mask


def mask_text(mask: In) -> str:
    """As `mask_of` takes it."""
    for name, value in MASK_NAMES.items():
        if mask == value:
            return name
    return event_words(mask)


def _behind_each(script: Iterable[Op], control: str) -> Script:
    ops: list[Op] = []
    for op in script:
        ops.append(op)
        if op.kind in OPERATIONS:
            ops.append(Op(control))
    return tuple(ops)


def beside_work(script: Iterable[Op]) -> Script:
    """The same while the guest works on files of its own, which nobody watches."""
    return _behind_each(script, "busy")


def excluding_unlinked(script: Iterable[Op]) -> Script:
    """The same with IN_EXCL_UNLINK in each watch."""
    return tuple(
        Op("watch", (*op.arguments[:2], f"{op.arguments[2]}|EXCL_UNLINK")) if op.kind == "watch" else op
        for op in script
    )


def step_by_step(script: Iterable[Op]) -> Script:
    """The same with a comparison after each operation."""
    return _behind_each(script, "sync")
