# SPDX-License-Identifier: Apache-2.0
"""Owns how many log lines a guest may cause: a hostile one begins sessions as fast as it can.
Must not know what the lines say.
Specification: none; a token bucket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

BURST_LINES = 10_000
"""As many as come at once: some thousand sessions, each with all that it lacks."""
LINES_PER_SECOND = 1.0


class GuestLog:
    """A logger for lines that the guest causes; those beyond its budget are left out, and that is said."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lines = float(BURST_LINES)
        self._since_s = clock()
        self._left_out = 0

    def say(self, level: int, text: str) -> None:
        """One line at this level, if the budget has one."""
        now_s = self._clock()
        self._lines = min(BURST_LINES, self._lines + (now_s - self._since_s) * LINES_PER_SECOND)
        self._since_s = now_s
        if self._lines < 1:
            if not self._left_out:
                self._log.warning("this guest causes too many lines: some are left out from here on")
            self._left_out += 1
            return
        if self._left_out:
            self._log.warning("%d lines that the guest caused were left out", self._left_out)
            self._left_out = 0
        self._lines -= 1
        self._log.log(level, "%s", text)
