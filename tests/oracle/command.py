# SPDX-License-Identifier: Apache-2.0
"""scripts/oracle: many runs at a level on a source, with progress, and each difference as a small script.

Must not know what is compared. Specification: docs/oracle.md.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tests.oracle.generate import MIXES, random_script
from tests.oracle.guest_level import GuestSession
from tests.oracle.ring_level import RingLevel
from tests.oracle.runner import SOURCES, Outcome, Source
from tests.oracle.scenarios import SCENARIOS
from tests.oracle.script import (
    Script,
    ScriptError,
    beside_work,
    excluding_unlinked,
    parse,
    step_by_step,
    written,
)
from tests.oracle.shrink import shrunk
from tests.oracle.table import Table, write_document
from vhostfs.share.options import DeliveryMode
from vhostfs.vm.errors import VmError
from vhostfs.vm.kernel import DEFAULT_SERIES, SERIES

_PROGRESS_S = 5.0
_SHRINK_S = 60.0
_TRIES = 3


class Level(Protocol):
    """Something that runs scripts."""

    def run(self, script: Script) -> Outcome: ...


@contextlib.contextmanager
def _opened(options: argparse.Namespace, sources: Sequence[Source]) -> Iterator[Callable[[Source], Level]]:
    """What opens each source at the level: a server each, or one guest for all."""
    with contextlib.ExitStack() as stack:
        if options.level == "guest":
            server = (f"--cache={options.cache}",)
            session = GuestSession(sources, options.kernel, server, DeliveryMode(options.delivery))
            started = stack.enter_context(session)
            yield lambda source: started.on(source, by_fanotify=options.watcher == "fanotify")
        else:
            yield lambda source: stack.enter_context(RingLevel(source, held=options.held))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when all was equal, 1 when something differed, 2 when it could not be run."""
    options = _parser().parse_args(arguments)
    if options.what == "table":
        return _table(options)
    if options.held and options.level == "guest":
        print(
            "oracle: --held is for --level ring: a guest's driver would wait for the server", file=sys.stderr
        )
        return 2
    names = list(SOURCES) if options.source == "all" else [options.source]
    try:
        scripts = _scripts(options)
    except (ScriptError, OSError) as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 2
    if options.busy:
        scripts = {name: beside_work(script) for name, script in scripts.items()}
    if options.excl_unlink:
        scripts = {name: excluding_unlinked(script) for name, script in scripts.items()}
    differed = 0
    try:
        with _opened(options, [SOURCES[name] for name in names]) as level_of:
            for name in names:
                differed += _Campaign(level_of(SOURCES[name]), name, options).run(scripts)
    except KeyboardInterrupt:
        return 130
    except (AssertionError, VmError) as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 2
    return 1 if differed else 0


def _table(options: argparse.Namespace) -> int:
    try:
        lines = Table(options.kernel).lines()
    except (AssertionError, VmError) as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    if options.write:
        write_document(lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oracle",
        description="Does the same to a share and to a directory beside it, and compares what they tell.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("compare", "table"),
        default="compare",
        help="the table of docs/events.md",
    )
    parser.add_argument("--write", action="store_true", help="puts the table into docs/events.md")
    parser.add_argument(
        "--level",
        choices=("ring", "guest"),
        default="ring",
        help="our own front end, or QEMU (default: ring)",
    )
    parser.add_argument("--watcher", choices=("inotify", "fanotify"), default="inotify", help="with QEMU")
    parser.add_argument("--kernel", choices=SERIES, default=DEFAULT_SERIES, help="of the guest in QEMU")
    parser.add_argument("--cache", choices=("auto", "never", "always"), default="never", help="with QEMU")
    parser.add_argument(
        "--delivery",
        choices=[mode.value for mode in DeliveryMode],
        default=DeliveryMode.AUTO.value,
        help="with QEMU; parked: under the machine's own, with its usual device",
    )
    parser.add_argument("--source", choices=(*SOURCES, "all"), default="all", help="of events (default: all)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="random runs (default: 20)")
    parser.add_argument("--operations", type=int, default=200, metavar="N", help="of a run (default: 200)")
    parser.add_argument(
        "--mix",
        choices=MIXES,
        default="all",
        help="of a run's operations; dirs, files: few names that come, go and wander (default: all)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the first run; the next has N + 1")
    parser.add_argument("--scenarios", action="store_true", help="the scripted scenarios instead")
    parser.add_argument("--script", metavar="FILE", help="runs this script instead; - is stdin")
    parser.add_argument(
        "--busy", action="store_true", help="the guest works meanwhile, on files that nobody watches"
    )
    parser.add_argument(
        "--held",
        action="store_true",
        help="the server stands still while operations are done, and finds all at once (at the ring)",
    )
    parser.add_argument("--excl-unlink", action="store_true", help="each watch excludes names that are gone")
    parser.add_argument("--show", action="store_true", help="prints the scripts and runs nothing")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="how often each script is run")
    parser.add_argument("--no-shrink", action="store_true", help="leaves failing scripts as they are")
    parser.add_argument("--keep-going", type=int, default=5, metavar="N", help="ends after N differences")
    return parser


def _scripts(options: argparse.Namespace) -> dict[str, Script]:
    if options.script:
        text = sys.stdin.read() if options.script == "-" else Path(options.script).read_text()
        return {options.script: parse(text)}
    if options.scenarios:
        found = {}
        for name, script in SCENARIOS.items():
            found[name] = script
            found[f"{name}, step by step"] = step_by_step(script)
        return found
    first = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    seeds = range(first, first + options.runs)
    return {f"seed {seed}": random_script(seed, options.operations, options.mix) for seed in seeds}


class _Campaign:
    """All scripts on one source."""

    def __init__(self, level: Level, source: str, options: argparse.Namespace) -> None:
        self._level = level
        self._source = source
        self._options = options
        self._started_s = time.monotonic()

    def run(self, scripts: dict[str, Script]) -> int:
        """How many differed."""
        if self._options.show:
            for name, script in scripts.items():
                print(f"# {name}\n{written(script)}")
            return 0
        differed: list[str] = []
        counted: Counter[str] = Counter()
        shown_s = self._started_s
        for name, script in scripts.items():
            for _ in range(self._options.repeat):
                outcome = self._level.run(script)
                counted["runs"] += 1
                counted["operations"] += outcome.operations
                counted["events"] += outcome.compared
                if not outcome.is_equal:
                    differed.append(name)
                    self._show(name, script, outcome)
                    break
            if len(differed) >= self._options.keep_going:
                break
            if time.monotonic() - shown_s > _PROGRESS_S:
                shown_s = time.monotonic()
                self._say(f"{counted['runs']} runs, {len(differed)} differed, now {name}")
        names = list(scripts)
        print(
            f"{self._source}: {counted['runs']} runs, {counted['operations']} operations,"
            f" {counted['events']} events compared"
            f" in {time.monotonic() - self._started_s:.0f} s; {names[0]} to {names[-1]};"
            f" differed: {', '.join(differed) or 'none'}",
            flush=True,
        )
        return len(differed)

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._started_s
        print(f"oracle: {self._source}: {seconds:4.0f} s  {text}", file=sys.stderr, flush=True)

    def _show(self, name: str, script: Script, outcome: Outcome) -> None:
        print(f"{self._source}: {name} differs:", *outcome.lines, sep="\n  ", flush=True)
        if self._options.no_shrink:
            return
        self._say(f"shrinking {name}")
        last = [outcome]

        def fails(shorter: Script) -> bool:
            for _ in range(_TRIES):
                tried = self._level.run(shorter)
                if not tried.is_equal:
                    last[0] = tried
                    return True
            return False

        if not fails(script):
            print(f"  it does not differ again: {name} depends on the moment", flush=True)
            return
        small = shrunk(script, fails, _SHRINK_S)
        command = f"scripts/oracle --level {self._options.level} --source {self._source} --script -"
        print(f"{self._source}: {name}, the same in {len(small)} lines; {command}")
        print(*(f"    {line}" for line in written(small).splitlines()), sep="\n")
        print("  with that:", *last[0].lines, sep="\n    ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
