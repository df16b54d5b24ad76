# SPDX-License-Identifier: Apache-2.0
"""`vhostfs lab` in a real guest: a server and a driver that are less able, and what a watcher there is told.

Must not test what servers and drivers do otherwise. Specification: docs/lab.md.
"""

from __future__ import annotations

import pytest

from tests.guest.events.conftest import Parts
from vhostfs.lab.experiment import parse
from vhostfs.lab.guests import run_guests
from vhostfs.lab.results import Verdict
from vhostfs.vm.lifeline import Lifeline

TWO_CELLS = """
[[matrix]]
driver = ["rename=off buf_size=200"]
[[matrix]]
server = ["notify_buf_size=68"]
"""


@pytest.mark.timeout(900)
def test_less_able_sides_in_a_real_guest(parts: Parts) -> None:
    experiment = parse(TWO_CELLS, "two")
    with Lifeline() as lifeline:
        driver, server = run_guests(experiment, lifeline, print)
    for cell in (driver, server):
        assert not cell.trouble
        assert cell.way == "virtqueue"
    # inotify has cookies of the driver's own also where the halves come plain.
    assert {step.verdict for step in driver.steps} == {Verdict.ALL}
    assert (driver.notify_buf_size, "rename" in driver.flags) == (200, False)
    assert any("does not ask for RENAME" in line for line in driver.less)
    # Names of up to 4 bytes fit: what has a longer one is told as a loss of everything.
    verdicts = {step.label: step.verdict for step in server.steps}
    assert verdicts["create"] is Verdict.ALL
    assert verdicts["symlink"] is Verdict.LOSS
    assert verdicts["mkdir"] is Verdict.ALL
