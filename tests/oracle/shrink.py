# SPDX-License-Identifier: Apache-2.0
"""Makes a failing script small: leaves lines out as long as it still fails.

Must not know what failing is. Specification: Zeller and Hildebrandt, "Simplifying and isolating
failure-inducing input", 2002.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.oracle.script import Op, Script


def shrunk(script: Script, fails: Callable[[Script], bool], limit_s: float) -> Script:
    """The smallest script that was found in that time; `script` itself fails."""
    deadline = time.monotonic() + limit_s
    size = max(1, len(script) // 2)
    while True:
        script, found = _without_pieces(script, size, fails, deadline)
        if time.monotonic() > deadline or (size == 1 and not found):
            return _with_simpler_lines(script, fails, deadline)
        if size > 1:
            size = max(1, size // 2)


def _without_pieces(
    script: Script, size: int, fails: Callable[[Script], bool], deadline: float
) -> tuple[Script, bool]:
    found = False
    # From the end: what comes last mostly needs what was made first.
    at = len(script) - size
    while at > -size:
        shorter = script[: max(at, 0)] + script[at + size :]
        if time.monotonic() > deadline:
            break
        if fails(shorter):
            script, found = shorter, True
        at -= size
    return script, found


def _with_simpler_lines(script: Script, fails: Callable[[Script], bool], deadline: float) -> Script:
    """Watches without events that do not matter."""
    for number, op in enumerate(script):
        if op.kind != "watch" or op.arguments[2] == "ALL":
            continue
        simpler = (*script[:number], Op("watch", (*op.arguments[:2], "ALL")), *script[number + 1 :])
        if time.monotonic() < deadline and fails(simpler):
            script = simpler
    return script
