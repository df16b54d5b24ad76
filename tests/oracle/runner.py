# SPDX-License-Identifier: Apache-2.0
"""Does what a script says to a share and to a directory beside it, and compares what is told of each.

Must not know how the guest is reached. Specification: docs/oracle.md, "What is compared".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from tests.oracle.hands import Hands, Rename
from tests.oracle.script import COMPARED_BEFORE, Op, Script, mask_of
from tests.oracle.streams import (
    In,
    Seen,
    differences_beside_a_loss,
    differences_from_fanotify,
    differences_from_inotify,
)


@dataclass(frozen=True, slots=True)
class Source:
    """How the server learns of changes; `options` force it."""

    name: str
    options: tuple[str, ...]
    halves_by_inotify: bool = False
    """Of the halves of renames it knows what Linux keeps in inotify's queue, and nothing else."""

    @property
    def compare(self) -> Compare:
        return differences_from_inotify if self.halves_by_inotify else differences_from_fanotify


SOURCES = {
    source.name: source
    for source in (
        Source("fanotify:filesystem", ("--events=fanotify:filesystem",)),
        Source("fanotify:inodes", ("--events=fanotify:inodes",)),
        Source("inotify", ("--events=inotify",), halves_by_inotify=True),
        Source("filesystem-no-rename", ("--events=fanotify:filesystem", "--no-fan-rename"), True),
        Source("inodes-no-rename", ("--events=fanotify:inodes", "--no-fan-rename"), True),
    )
}
"""By what the command line calls them."""


class Native(Protocol):
    """A watcher on the host, beside the share."""

    def watch(self, name: str, path: str, mask: In) -> int: ...
    def unwatch(self, name: str) -> None: ...
    def end_of(self, identity: tuple[int, int]) -> list[Seen]: ...
    def read(self) -> list[Seen]: ...
    def close(self) -> None: ...


class Compare(Protocol):
    """What differs between two streams, in words."""

    def __call__(
        self, native: Sequence[Seen], guest: Sequence[Seen], *, one_operation: bool
    ) -> list[str]: ...


Hold = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes something that holds the server up."""


class Guest(Protocol):
    """A guest with one inotify group, at whatever level."""

    def watch(self, name: str, path: str, mask: In) -> int: ...
    def unwatch(self, name: str) -> None: ...
    def look(self, path: str) -> object: ...
    def forget(self) -> None: ...
    def busy(self) -> None: ...
    def stall(self) -> None: ...
    def resume(self) -> None: ...
    def read(self) -> list[Seen]: ...
    def explained(self) -> list[str]: ...


@dataclass(slots=True)
class Outcome:
    """What differed; nothing when all was equal."""

    lines: list[str] = field(default_factory=list)
    compared: int = 0
    """Events of the native watcher that were compared."""
    operations: int = 0
    """Operations that were done."""
    losses: int = 0
    """How often the guest was told of a loss, which it may be after `stall` only."""
    native: list[Seen] = field(default_factory=list)
    guest: list[Seen] = field(default_factory=list)
    """What was told of the last operations that made any events."""

    @property
    def is_equal(self) -> bool:
        return not self.lines


def run(
    script: Script,
    shared: Path,
    twin: Path,
    guest: Guest,
    native: Native,
    compare: Compare,
    *,
    with_ignored: bool = False,
    hold: Hold = contextlib.nullcontext,
) -> Outcome:
    """Runs until the script ends or something differs. Both directories are empty.

    `with_ignored`: the guest is a real one, whose kernel itself says when a watch has ended. `hold`: entered
    while operations are done, as they are between two comparisons.
    """
    dropped = In(0) if with_ignored else In.IGNORED
    return _Run(Hands(shared), Hands(twin), guest, native, compare, dropped, hold).run(script)


class _Run:
    def __init__(
        self,
        shared: Hands,
        twin: Hands,
        guest: Guest,
        native: Native,
        compare: Compare,
        dropped: In,
        hold: Hold,
    ) -> None:
        self._shared, self._twin = shared, twin
        self._guest = guest
        self._native = native
        self._differences = compare
        self._dropped = dropped
        self._hold = hold
        self._held = contextlib.ExitStack()
        self._is_held = False
        self._batch: list[tuple[Op, int]] = []
        """Done to the share since the last comparison, with the results."""
        self._renamed: set[Rename] = set()
        """In this batch, beside the share."""
        self._stalled = self._may_lose = False
        self._outcome = Outcome()

    def run(self, script: Script) -> Outcome:
        try:
            for number, op in enumerate((*script, Op("resume"), Op("sync")), 1):
                if op.is_control:
                    self._let_go()
                if op.kind in COMPARED_BEFORE and not self._stalled:
                    self._compare(number)
                if self._outcome.lines:
                    break
                if op.is_control:
                    self._control(number, op)
                else:
                    if not self._is_held:
                        self._held.enter_context(self._hold())
                        self._is_held = True
                    self._batch.append((op, self._shared.do(op)))
        finally:
            self._let_go()
            self._native.close()
            self._shared.close_all()
            self._twin.close_all()
        return self._outcome

    def _let_go(self) -> None:
        self._held.close()
        self._is_held = False

    def _control(self, number: int, op: Op) -> None:
        if op.kind == "watch":
            name, path, mask = op.arguments
            wanted = self._native.watch(name, path, mask_of(mask))
            got = self._guest.watch(name, path, mask_of(mask))
            if wanted != got:
                self._outcome.lines.append(
                    f"line {number}: {op}: errno {wanted} natively, {got} in the guest"
                )
        elif op.kind == "unwatch":
            self._native.unwatch(op.arguments[0])
            self._guest.unwatch(op.arguments[0])
        elif op.kind == "look":
            with contextlib.suppress(OSError):
                self._guest.look(op.arguments[0])
        elif op.kind == "forget":
            self._guest.forget()
        elif op.kind == "busy":
            self._guest.busy()
        elif op.kind == "stall":
            self._guest.stall()
            self._stalled = self._may_lose = True
        elif op.kind == "resume" and self._stalled:
            self._guest.resume()
            self._stalled = False

    def _compare(self, number: int) -> None:
        batch, self._batch = self._batch, []
        self._renamed.clear()
        native: list[Seen] = []
        explained = []
        for op, result in batch:
            seen = self._replayed(op, result)
            native += seen
            explained.append(f"  {op}: {'; '.join(map(str, seen)) or '-'}")
        try:
            guest = self._guest.read()
        except TimeoutError as error:
            self._outcome.lines += [f"before line {number}: {error}", "natively:", *explained]
            return
        native = [event for event in native if not event.mask & self._dropped]
        guest = [event for event in guest if not event.mask & self._dropped]
        self._outcome.compared += len(native)
        self._outcome.operations += len(batch)
        if native or guest:
            self._outcome.native, self._outcome.guest = native, guest
        if self._may_lose:
            self._outcome.losses += sum(bool(event.mask & In.Q_OVERFLOW) for event in guest)
            found = differences_beside_a_loss(native, guest)
            self._may_lose = False
        else:
            found = self._differences(native, guest, one_operation=len(batch) == 1)
        if found:
            self._outcome.lines += [f"before line {number}:", *found, "natively:", *explained]
            self._outcome.lines += self._guest.explained()

    def _replayed(self, op: Op, result: int) -> list[Seen]:
        """Does to the twin what was done to the share; what its watcher gets."""
        ending, renames = self._twin.ended_by(op), self._twin.renames_by(op)
        again = self._twin.do(op)
        if again != result:
            raise AssertionError(f"{op}: errno {result} on the share, {again} beside it")
        seen = self._native.read()
        if again != 0:
            return seen
        if renames and self._renamed.issuperset(renames):
            seen = [replace(event, again=True) for event in seen]
        self._renamed.update(renames)
        if ending is None:
            return seen
        # An object ends with its last name in the guest, not with its last close: docs/protocol.md, 5.5. (A
        # directory that is removed also lives as long as what was in it and is open.)
        ended = self._native.end_of(ending)
        if not ended:
            return seen
        own = (i for i, event in enumerate(seen, 1) if event.watch == ended[0].watch)
        # A link count is told ahead of the name that goes, and behind both halves of a rename.
        at = max(own, default=0 if op.kind in ("rmdir", "unlink") else len(seen))
        return [*seen[:at], *ended, *seen[at:]]
