# SPDX-License-Identifier: Apache-2.0
"""Owns what came of a cell, as values: what was negotiated, which events arrived, what it cost.
Must not know how it was found out, or how it is shown.
Specification: docs/lab.md, "What a report says"."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..frontend.fsnotify import Granted
from .experiment import Cell, Experiment


class Verdict(enum.Enum):
    """How what a watcher in the guest was told compares with one on the host."""

    ALL = "all"  # the same events in the same order
    ORDER = "other order"
    PARTS = "halves"  # the same events, but the halves of renames do not belong together
    MORE = "more"
    SOME = "some"
    DIRECTORY = "loss in a directory"  # what is missing was told as a loss there
    LOSS = "loss of everything"  # or as one of everything
    NONE = "none"


LESS = "less: "
"""In the server's log, before each thing that the guest has less than it could."""
PAIR = " <->"
"""Behind the halves of a rename that belong together."""
LOSS = "loss"
"""An overflow; of one directory: `loss in DIR`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done on the host, and what watchers were told: on the host, and in the guest."""

    label: str
    host: tuple[str, ...]
    guest: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        return compare(self.host, self.guest)


def compare(host: Sequence[str], guest: Sequence[str]) -> Verdict:
    """Identical neighbours count once, on both sides: how many merge is a race."""
    told_loss = any(line.startswith(LOSS) for line in guest)
    want, got = _once(host), _once([line for line in guest if not line.startswith(LOSS)])
    if want == got and not told_loss:
        return Verdict.ALL
    missing = Counter(want) - Counter(got)
    more = Counter(got) - Counter(want)
    if told_loss:
        return Verdict.LOSS if LOSS in guest else Verdict.DIRECTORY
    if not missing and not more:
        return Verdict.ORDER
    if [line.removesuffix(PAIR) for line in want] == [line.removesuffix(PAIR) for line in got]:
        return Verdict.PARTS
    if not got:
        return Verdict.NONE
    return Verdict.SOME if missing else Verdict.MORE


def _once(lines: Sequence[str]) -> list[str]:
    return [line for at, line in enumerate(lines) if not at or lines[at - 1] != line]


@dataclass(slots=True)
class CellResult:
    """way: virtqueue, parked or none. said: lines of the server's log about events. figures: by name, with
    the unit in it. trouble: why the cell could not be run."""

    cell: Cell
    way: str = "none"
    flags: list[str] = field(default_factory=list)
    notify_buf_size: int = 0
    refused: str = ""
    said: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    trouble: str = ""
    took_s: float = 0.0

    @property
    def outcome(self) -> str:
        """full, reduced, refused, none, or failed: could not be run."""
        if self.trouble:
            return "failed"
        if self.refused:
            return "refused"
        if self.way == "none":
            return "none"
        second_best = self.way == "parked" and self.cell.driver_choice.flags & Granted.VIRTQUEUE
        return "reduced" if self.less or second_best else "full"

    @property
    def less(self) -> list[str]:
        """What the server says that the guest has less."""
        return [line.partition(LESS)[2] for line in self.said if LESS in line]

    @property
    def arrived(self) -> int:
        """Steps of which the guest was told everything."""
        return sum(step.verdict in (Verdict.ALL, Verdict.ORDER) for step in self.steps)


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    experiment: Experiment
    level: str
    cells: tuple[CellResult, ...]
