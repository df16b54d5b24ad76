# SPDX-License-Identifier: Apache-2.0
"""Owns `vhostfs lab`: which experiments are run, how progress is shown, where reports are written.
Must not know how a cell is run (vhostfs/lab).
Specification: docs/lab.md."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UserError
from .parser import Parser

if TYPE_CHECKING:
    from ..lab.experiment import Experiment
    from ..lab.results import CellResult, ExperimentResult
    from ..vm.lifeline import Lifeline

_EXAMPLES = """\
examples:
  vhostfs lab --list
  vhostfs lab fan-rename
  vhostfs lab --ring all --output report
  vhostfs lab my-experiment.toml --guest

The exit status is 1 when a cell could not be run.
"""
ALL = "all"


class LabError(UserError):
    """What keeps all of it from running."""


def add_arguments(parser: Parser) -> None:
    parser.description = (
        "Runs experiments: what a guest is told of the host's changes, for every combination of host source, "
        "server, VMM, driver and kernel that a TOML file lists. docs/lab.md says what can stand there."
    )
    parser.epilog = _EXAMPLES
    names = "a TOML file, a shipped one, or all"
    parser.add_argument("experiments", metavar="EXPERIMENT", nargs="*", help=names)
    parser.add_argument("--list", action="store_true", help="show the shipped experiments")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--ring", action="store_true", help="without a VM: our own front end, in milliseconds")
    level.add_argument("--guest", action="store_true", help="in real guests, whatever the file says")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write report.html and report.json there")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """0, or 1 when a cell could not be run."""
    from ..lab.experiment import ExperimentError, load, shipped_names

    if args.list:
        for name in shipped_names():
            experiment = load(name)
            print(f"{name:14} {len(experiment.cells):4} cells, {experiment.level:5}  {experiment.question}")
        return 0
    if not args.experiments:
        names = ", ".join(shipped_names())
        raise ExperimentError(f"no experiment; give a TOML file, '{ALL}', or one of {names}")
    experiments = []
    for word in args.experiments:
        if word == ALL:
            experiments += [each for each in map(load, shipped_names()) if each.level in _levels(args)]
        else:
            experiments.append(load(word))
    if args.output is not None:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"--output={args.output}: {error.strerror}") from None
    started_s, busy = time.time(), os.getloadavg()[0]
    results = [_run(experiment, args) for experiment in experiments]
    _report(results, args, started_s, busy)
    return int(any(cell.trouble for result in results for cell in result.cells))


def _levels(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the shipped experiments that `all` means: those that are made for the level."""
    from ..lab.experiment import LEVELS

    return ("ring",) if args.ring else ("guest",) if args.guest else LEVELS


def _run(experiment: Experiment, args: argparse.Namespace) -> ExperimentResult:
    from ..lab.results import ExperimentResult

    level = "ring" if args.ring else "guest" if args.guest else experiment.level
    cells = list(_with_progress(experiment, level))
    result = ExperimentResult(experiment, level, tuple(cells))
    if not args.json:
        _print(result)
    return result


def _with_progress(experiment: Experiment, level: str) -> Iterator[CellResult]:
    from ..vm.lifeline import Lifeline

    terminal = os.isatty(2)
    started_s = time.monotonic()
    with Lifeline() as lifeline:
        for done, cell in enumerate(_cells(experiment, level, lifeline), 1):
            if terminal:
                passed_s = time.monotonic() - started_s
                count = len(experiment.cells)
                sys.stderr.write(f"\r\x1b[K{experiment.name}: {done} of {count} cells, {passed_s:.0f} s")
                sys.stderr.flush()
            yield cell
    if terminal:
        sys.stderr.write("\r\x1b[K")


def _cells(experiment: Experiment, level: str, lifeline: Lifeline) -> Iterator[CellResult]:
    if level == "ring":
        from ..lab.ring import run_ring

        return run_ring(experiment, lifeline)
    from ..lab.guests import run_guests

    return run_guests(experiment, lifeline, lambda text: print(f"vhostfs: {text}", file=sys.stderr))


def _print(result: ExperimentResult) -> None:
    from ..lab.report import text_table

    experiment = result.experiment
    print(f"{experiment.name}: {experiment.question}")
    if experiment.varied:
        print(f"  by {', '.join(experiment.varied)}")
    for line in text_table(result):
        print(line)
    print(flush=True)


def _report(results: list[ExperimentResult], args: argparse.Namespace, started_s: float, busy: float) -> None:
    from ..lab.report import Circumstances, html_text, json_text

    words = [
        *(option for option in ("--ring", "--guest") if getattr(args, option.strip("-"))),
        *args.experiments,
    ]
    circumstances = Circumstances(
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started_s)),
        vhostfs=__version__,
        kernel=platform.release(),
        processors=os.cpu_count() or 1,
        load=round(max(busy, os.getloadavg()[0]), 1),
        command=f"vhostfs lab {shlex.join(words)}",
    )
    if args.json:
        print(json_text(results, circumstances), end="")
    if args.output is None:
        return
    for name, text in (
        ("report.html", html_text(results, circumstances)),
        ("report.json", json_text(results, circumstances)),
    ):
        path = args.output / name
        try:
            path.write_text(text)
        except OSError as error:
            raise LabError(f"{path}: {error.strerror}") from None
        print(f"written: {path}", file=sys.stderr)
