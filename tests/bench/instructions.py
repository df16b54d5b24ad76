# SPDX-License-Identifier: Apache-2.0
"""scripts/instructions: what operations cost in instructions of the C core, beside what they cost before.

Must not know the operations (native/tests/instructions.c does). The kernel's part is not counted.
Specification: docs/performance.md, "Instructions"; callgrind's --toggle-collect.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "native/tests/instructions.txt"
COUNTS = (200, 1200)
"""The difference between runs of so many operations leaves out what comes once."""


def _measured(program: Path, operation: str, count: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=served"]
    done = subprocess.run([*command, str(program), operation, str(count)], capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or collected is None:
        raise SystemExit(f"{operation}: {done.stderr.strip().splitlines()[-1]}")
    return int(collected[1])


def _known() -> dict[str, int]:
    if not TABLE.exists():
        return {}
    rows = [line.split() for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return {name: int(count) for name, count in rows}


def _compiler() -> str:
    said = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/instructions", description="Instructions of each operation."
    )
    parser.add_argument("--tolerance", type=float, default=3.0, help="percent (default: 3)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed; on Debian: apt install valgrind")
    with tempfile.TemporaryDirectory(prefix="vhostfs-instructions-") as build:
        program = Path(build) / "instructions"
        make = ["make", "-s", "-C", str(ROOT / "native/tests"), f"BUILD={build}", str(program)]
        subprocess.run(make, check=True)
        names = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
        seen = {}
        for name in names:
            few, many = (_measured(program, name, count) for count in COUNTS)
            seen[name] = round((many - few) / (COUNTS[1] - COUNTS[0]))
    known, worse = _known(), []
    for name, count in seen.items():
        before = known.get(name)
        change = "new" if before is None else f"{(count - before) / before * 100:+.1f} %"
        print(f"{name:36} {count:7} {change}")
        if before is not None and count > before * (1 + given.tolerance / 100):
            worse.append(name)
    if given.write:
        rows = [f"{name} {count}\n" for name, count in seen.items()]
        head = (
            f"# Instructions of the C core for one operation; scripts/instructions --write. {_compiler()}\n"
        )
        TABLE.write_text(head + "".join(rows))
        return 0
    if worse:
        print(
            f"more than {given.tolerance:g} % above {TABLE.relative_to(ROOT)}: {', '.join(worse)}",
            file=sys.stderr,
        )
    return 1 if worse else 0
