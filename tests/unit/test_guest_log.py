# SPDX-License-Identifier: Apache-2.0
"""The budget of log lines that a guest has. Must not know what the lines say."""

from __future__ import annotations

import logging

import pytest

from vhostfs.fuse.guest_log import BURST_LINES, LINES_PER_SECOND, GuestLog


def test_a_guest_that_never_stops_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 100.0
    with caplog.at_level(logging.INFO, "guest"):
        log = GuestLog(logging.getLogger("guest"), lambda: now_s)
        for _ in range(BURST_LINES + 500):
            log.say(logging.INFO, "100% nonsense")
        assert len(caplog.messages) == BURST_LINES + 1
        assert "left out from here on" in caplog.messages[-1]
        now_s += 2 / LINES_PER_SECOND
        caplog.clear()
        for _ in range(500):
            log.say(logging.WARNING, "100% nonsense")
    assert caplog.messages[0] == "500 lines that the guest caused were left out"
    assert caplog.messages[1:3] == ["100% nonsense"] * 2
    assert len(caplog.messages) == 4


def test_the_budget_never_grows_beyond_the_burst(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    with caplog.at_level(logging.INFO, "guest"):
        log = GuestLog(logging.getLogger("guest"), lambda: now_s)
        now_s = 1e6
        for _ in range(BURST_LINES + 10):
            log.say(logging.INFO, "x")
    assert caplog.messages.count("x") == BURST_LINES
