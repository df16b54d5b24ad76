# SPDX-License-Identifier: Apache-2.0
"""`vhostfs lab --ring`: a small matrix against real servers, from the TOML to the report.

Must not test what servers tell; the other files of this folder do. Specification: docs/lab.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vhostfs.cli import main

pytestmark = pytest.mark.usefixtures("ours")

STEPS = """
workload = "renames"
[[matrix]]
source = ["inotify"]
driver = ["current", "rename=off", "none", "major=2"]
[[matrix]]
source = ["inotify"]
vmm = ["stock"]
[[matrix]]
source = ["inotify"]
server = ["notify_buf_size=64"]
"""
FIGURES = """
workload = "burst"
count = 200
[matrix]
source = ["inotify"]
buffers = [1, 16]
event_queue = [50, 1000]
"""


def run_lab(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    assert main(["lab", "--ring", str(path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.html").read_text().count("<svg") == 1
    data: dict[str, Any] = json.loads((tmp_path / "out/report.json").read_text())
    return data


def test_steps_are_compared_with_what_the_hosts_own_watcher_is_told(tmp_path: Path) -> None:
    (experiment,) = run_lab(tmp_path, STEPS)["experiments"]
    current, apart, none, refused, stock, nameless = experiment["cells"]
    assert {step["verdict"] for step in current["steps"]} == {"all"}
    assert any(step["host"] for step in current["steps"])
    assert "halves" in {step["verdict"] for step in apart["steps"]}
    assert any("its driver does not ask for RENAME" in line for line in apart["less"])
    assert none["way"] == "none"
    assert {step["verdict"] for step in none["steps"]} == {"none"}
    assert (refused["outcome"], refused["refused"]) == ("refused", "EPROTO")
    assert (stock["outcome"], stock["way"]) == ("reduced", "parked")
    assert {step["verdict"] for step in stock["steps"]} == {"all"}
    assert {step["verdict"] for step in nameless["steps"]} == {"loss in a directory"}


def test_bursts_are_measured_and_what_does_not_fit_is_told_as_a_loss(tmp_path: Path) -> None:
    (experiment,) = run_lab(tmp_path, FIGURES)["experiments"]
    for cell in experiment["cells"]:
        figures = cell["figures"]
        if cell["cell"]["event_queue"] == "50":
            assert figures["losses told"] >= 1
            assert figures["told"] + figures["lost"] >= 200
        else:
            assert (figures["told"], figures["lost"], figures["losses told"]) == (200, 0, 0)


def test_a_cell_that_does_not_come_to_its_end_says_so_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhostfs.lab.ring._CELL_TIMEOUT_S", 0.0)
    path = tmp_path / "experiment.toml"
    path.write_text('[matrix]\nsource = ["inotify"]\nbuffers = [1, 16]\n')
    assert main(["lab", "--ring", str(path), "--output", str(tmp_path)]) == 1
    (experiment,) = json.loads((tmp_path / "report.json").read_text())["experiments"]
    assert [cell["trouble"] for cell in experiment["cells"]] == ["the cell was not done after 0 s"] * 2
