# SPDX-License-Identifier: Apache-2.0
"""Experiments are understood or refused in one line, expanded into cells, compared, and reported."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from vhostfs.cli import main
from vhostfs.fuse.forced import Forced, ForcedError, forced, parse_pair
from vhostfs.fuse.fsnotify import FsnotifyFlag
from vhostfs.lab.experiment import AXES, Cell, ExperimentError, load, parse, parse_driver, shipped_names
from vhostfs.lab.picture import picture
from vhostfs.lab.report import Circumstances, html_text, json_text, text_table
from vhostfs.lab.results import LOSS, PAIR, CellResult, ExperimentResult, Step, Verdict, compare

MATRIX = """
name = "one"
question = "What?"
workload = "renames"
[[matrix]]
source = ["fanotify", "inotify"]
vmm = ["stock", "test-device"]
[[matrix]]
driver = ["current", "none", "rename=off buf_size=128"]
"""


# ---- reading ---------------------------------------------------------------------------------------------


def test_a_matrix_is_the_product_of_its_lists_and_several_are_put_together() -> None:
    experiment = parse(MATRIX, "one.toml")
    assert len(experiment.cells) == 7
    assert [cell.source for cell in experiment.cells[:4]] == ["fanotify", "fanotify", "inotify", "inotify"]
    assert experiment.varied == ("source", "vmm", "driver")
    assert experiment.level == "ring"


def test_a_cell_that_stands_in_two_matrices_is_run_once() -> None:
    assert len(parse("[[matrix]]\n[[matrix]]\nbuffers = [16, 1]\n", "x").cells) == 2


def test_an_empty_matrix_is_one_cell_and_the_name_is_the_files() -> None:
    experiment = parse("[matrix]\n", "some/thing.toml")
    assert experiment.cells == (Cell(),)
    assert experiment.name == "thing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[matrix", "this is no TOML"),
        ("name = 'x'", "there is no [matrix]"),
        ("nmae = 'x'\n[matrix]", "there is no 'nmae'; did you mean 'name'?"),
        ("name = 5\n[matrix]", "name is a text; seen: 5"),
        ("x = " + "[" * 5000, "it is nested too deep"),
        ("count = true\n[matrix]", "count is a number from 1 to 1000000; seen: True"),
        ("[matrix]\ndriver = 'major=4294967296'", "driver 'major=4294967296': it is 4294967295 at most"),
        ("[matrix]\ndriver = 'buf_size=70000'", "driver 'buf_size=70000': it is 65536 at most"),
        ("workload = 'dance'\n[matrix]", "workload is one of changes, renames"),
        ("level = 'moon'\n[matrix]", "level is one of ring, guest; seen: 'moon'"),
        ("count = 0\n[matrix]", "count is a number from 1 to 1000000; seen: 0"),
        ("names = [300]\n[matrix]", "names are lengths from 4 to 255"),
        ("matrix = 5", "[matrix] is a table of lists"),
        ("[matrix]\nsuorce = ['auto']", "did you mean 'source'?"),
        ("[matrix]\nsource = []", "source is an empty list"),
        ("[matrix]\nsource = ['kqueue']", "source is one of auto, fanotify"),
        ("[matrix]\nbuffers = [0]", "buffers is a number from 1 to 256; seen: 0"),
        ("[matrix]\nbuffers = [true]", "buffers is a number from 1 to 256; seen: True"),
        ("[matrix]\nkernel = ['2.4']", "kernel is one of 6.1"),
        ("[matrix]\nserver = ['warp=off']", "server 'warp=off': expected KEY=VALUE"),
        ("[matrix]\nserver = ['rename=maybe']", "rename: it is on or off"),
        ("[matrix]\ndriver = ['warp=off']", "driver 'warp=off': expected current, none"),
        ("[matrix]\ndriver = ['mask=WARP']", "WARP is no event"),
        ("[matrix]\ndriver = [5]", "driver is a text; seen: 5"),
        (
            "[matrix]\nbuffers = [1,2,3,4]\nevent_queue = " + str(list(range(1, 3000))),
            "more than 10000 cells",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_the_file(text: str, expected: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        parse(text, "exp.toml")
    line = str(caught.value)
    assert line.startswith("exp.toml: ")
    assert expected in line
    assert "\n" not in line


def test_the_command_says_it_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "no-such-thing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vhostfs: error: no-such-thing: No such file or directory; give a TOML file")
    assert said.count("\n") == 1
    assert main(["lab"]) == 2


def test_every_shipped_experiment_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    names = shipped_names()
    assert {"fan-rename", "long-names", "buffers", "cost"} <= set(names)
    for name in names:
        experiment = load(name)
        assert experiment.question
        assert experiment.cells
    assert main(["lab", "--list"]) == 0
    assert all(name in capsys.readouterr().out or name for name in names)


def test_a_cells_words_become_options() -> None:
    cell = Cell(source="before-5.17", server="rename=off minor=3", delivery="parked", event_queue=7)
    assert cell.server_options == (
        "--events=fanotify:filesystem",
        "--no-fan-rename",
        "--negotiate=target_fid=off",
        "--delivery=parked",
        "--event-queue=7",
        "--negotiate=rename=off",
        "--negotiate=minor=3",
    )
    assert set(cell.words()) == set(AXES)


def test_a_driver_is_what_its_words_take_away() -> None:
    driver = parse_driver("rename=off parked=off buf_size=100 major=2 mask=CREATE+DELETE")
    assert driver.flags_off == FsnotifyFlag.RENAME | FsnotifyFlag.PARKED
    assert (driver.buf_size, driver.major, driver.mask) == (100, 2, 0x300)
    assert not parse_driver("none").is_ours


# ---- what can be forced ----------------------------------------------------------------------------------


def test_without_pairs_a_server_is_itself() -> None:
    assert forced(()) == Forced()


def test_pairs_are_put_together_and_the_last_counts() -> None:
    pairs = [
        *parse_pair("rename=off"),
        *parse_pair("minor=3"),
        *parse_pair("minor=4"),
        *parse_pair("mask=CREATE+0x200"),
        *parse_pair("feature-bit=off"),
        *parse_pair("child=off"),
        *parse_pair("child=on"),
    ]
    assert forced(pairs) == Forced(flags_off=FsnotifyFlag.RENAME, minor=4, mask=0x300, feature_bit=False)


@pytest.mark.parametrize(
    "text", ["", "rename", "rename=", "rename=1", "minor=-1", "minor=x", "mask=WARP", "x=1"]
)
def test_a_pair_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ForcedError):
        parse_pair(text)


# ---- comparing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "guest", "expected"),
    [
        ((), (), Verdict.ALL),
        (("a", "b"), ("a", "b"), Verdict.ALL),
        (("a", "a", "b"), ("a", "b", "b"), Verdict.ALL),
        (("a", "b"), ("b", "a"), Verdict.ORDER),
        (("a", "b"), ("a",), Verdict.SOME),
        (("a",), ("a", "b"), Verdict.MORE),
        (("a",), (), Verdict.NONE),
        (("a" + PAIR, "b" + PAIR), ("a", "b"), Verdict.PARTS),
        (("a", "b"), ("a", LOSS), Verdict.LOSS),
        (("a", "b"), ("a", f"{LOSS} in d"), Verdict.DIRECTORY),
        (("a",), ("a", LOSS), Verdict.LOSS),
    ],
)
def test_what_was_told_is_compared(host: tuple[str, ...], guest: tuple[str, ...], expected: Verdict) -> None:
    assert compare(host, guest) is expected


# ---- reporting -------------------------------------------------------------------------------------------


def result() -> ExperimentResult:
    experiment = parse(MATRIX, "one.toml")
    steps = [Step("create <b>", ("CREATE d/<x>",), ("CREATE d/<x>",)), Step("gone", ("a",), ())]
    cells = []
    for number, cell in enumerate(experiment.cells):
        said = [f"events for the guest: less: <thing {number}>"] if number % 2 else []
        cells.append(CellResult(cell, "virtqueue", ["rename"], 320, said=said, steps=steps))
    cells[0].trouble = "it & broke"
    cells[1].refused, cells[1].way = "EPROTO", "none"
    return ExperimentResult(experiment, "ring", tuple(cells))


HERE = Circumstances("2026-01-01", "0.1", "6.1", 2, 0.5, "vhostfs lab one.toml")


def test_the_table_for_people_has_a_line_for_each_cell() -> None:
    lines = list(text_table(result()))
    assert len(lines) == 7
    assert "failed" in lines[0]
    assert "it & broke" in lines[0]
    assert "EPROTO" in lines[1]
    assert "1/2; gone: none" in lines[2]


def test_the_json_has_everything() -> None:
    data = json.loads(json_text([result()], HERE))
    assert data["circumstances"]["command"] == "vhostfs lab one.toml"
    (experiment,) = data["experiments"]
    assert len(experiment["cells"]) == 7
    assert experiment["cells"][3]["less"] == ["<thing 3>"]
    assert experiment["cells"][2]["steps"][1] == {
        "step": "gone",
        "verdict": "none",
        "host": ["a"],
        "guest": [],
    }


def test_the_picture_is_well_formed_and_has_a_square_for_each_step() -> None:
    svg = ElementTree.fromstring(picture(result()))
    titles = [title.text or "" for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("on the host:" in title for title in titles) == 14


def test_figures_are_drawn_as_bars() -> None:
    experiment = parse("workload = 'burst'\n[matrix]\nbuffers = [1, 16]", "x")
    cells = [CellResult(cell, "virtqueue", figures={"events/s": 5.0}) for cell in experiment.cells]
    svg = picture(ExperimentResult(experiment, "ring", tuple(cells)))
    assert ElementTree.fromstring(svg) is not None
    assert "events/s" in svg


def test_the_page_stands_alone_and_shows_names_as_text() -> None:
    page = html_text([result()], HERE)
    assert page.startswith("<!DOCTYPE html>")
    assert "<b>" not in page
    assert "&lt;thing 3&gt;" in page
    for outside in ("src=", "href=", "@import", "url("):
        assert outside not in page
