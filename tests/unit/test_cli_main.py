# SPDX-License-Identifier: Apache-2.0
"""The vhostfs and vhostfsd commands: help, versions, and how errors end them."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import vhostfs
from tests.limits import HANG_S
from vhostfs import cli
from vhostfs.cli.logs import start_logging
from vhostfs.errors import UserError
from vhostfs.share.options import LogLevel


def test_help_lists_the_commands_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert re.search(rf"^  {command.name} +\w", text, re.M)
        assert "vhostfs serve --socket-path" in text


@pytest.mark.parametrize("arguments", [["--version"], ["-V"], ["serve", "--version"]])
def test_the_version_is_shown(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "vhostfs", *arguments], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"vhostfs {vhostfs.__version__}\n"


def test_help_of_serve_is_grouped_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main_vhostfsd(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: vhostfsd --socket-path PATH --shared-dir DIR [OPTIONS]\n")
    for title in ("share and connection:", "what the guest may cache:", "limits and isolation:", "examples:"):
        assert title in text
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    "arguments",
    [
        ["--print-capabilities"],
        ["--no-such-option", "--print-capabilities", "--cache=x"],
        ["-o", "x", "--print-capabilities"],
    ],
)
def test_capabilities_are_printed_whatever_else_is_given(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main_vhostfsd(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "fs", "features": ["separate-options"]}


def test_the_description_for_discovery_says_the_same_as_the_program() -> None:
    description = json.loads((Path(__file__).parents[2] / "docs/vhost-user/50-vhostfs.json").read_text())
    assert description["type"] == "fs"
    assert description["features"] == json.loads(cli.CAPABILITIES_JSON)["features"]
    assert Path(description["binary"]).name == "vhostfsd"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["srve"], "vhostfs: error: 'srve' is no command; did you mean 'serve'?\n"),
        (["frobnicate"], "vhostfs: error: 'frobnicate' is no command; see vhostfs --help\n"),
        (
            ["--shared-dir=/"],
            "vhostfs: error: --shared-dir=/: options come after the command, as in: "
            "vhostfs serve --shared-dir=/\n",
        ),
        (
            ["serve", "--cahce=auto"],
            "vhostfs: error: --cahce is no option of vhostfs serve; did you mean '--cache'?\n",
        ),
        (
            ["serve", "--shared-dir=/"],
            "vhostfs: error: no socket; give --socket-path=PATH, or --fd=N for one that already listens\n",
        ),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", line)


def failing(error: BaseException) -> int:
    def body() -> int:
        raise error

    return cli._ended("vhostfs", body)


def test_an_unexpected_exception_is_one_line_with_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(KeyError("a\nb")) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("vhostfs: error: internal: KeyError:")
    assert "--log-level=debug" in shown


def test_debug_logging_shows_where_it_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    try:
        start_logging(LogLevel.DEBUG, to_syslog=False, program="vhostfsd")
        failing(KeyError("x"))
        assert "Traceback" in capsys.readouterr().err
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def test_errors_for_people_carry_their_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(UserError("the disk is on fire")) == 1
    assert capsys.readouterr().err == "vhostfs: error: the disk is on fire\n"
    assert failing(KeyboardInterrupt()) == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m vhostfs serve --help | head -1"
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert run.stderr == ""


@pytest.mark.parametrize("where", [">/dev/full", ">&-", ">&- 2>&-"])
def test_where_nothing_can_be_written_that_is_said_if_it_can_be(where: str) -> None:
    command = f"{sys.executable} -m vhostfs --help {where}"
    ended = subprocess.run(command, shell=True, check=False, capture_output=True, text=True)
    full = where == ">/dev/full"
    assert ended.returncode == int(full)
    complaint = "vhostfs: error: the output cannot be written: No space left on device\n"
    assert ended.stderr == (complaint if full else "")


def test_a_log_line_is_one_line_whatever_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    try:
        start_logging(LogLevel.INFO, to_syslog=False, program="vhostfsd")
        logging.getLogger("vhostfs.x").info("name %s", "a\nb\x1b[31m")
        logging.getLogger("vhostfs.x").debug("not shown")
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\.\d{3}Z INFO  vhostfs\.x: name a\\nb\\e\[31m\n", shown)
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def test_syslog_gets_each_line_with_its_severity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        daemon.settimeout(HANG_S)
        monkeypatch.setattr(
            "vhostfs.cli.logs._SYSLOG_PATHS", (str(tmp_path / "absent"), str(tmp_path / "log"))
        )
        try:
            (fd,) = start_logging(LogLevel.INFO, to_syslog=True, program="vhostfsd")
            assert stat.S_ISSOCK(os.fstat(fd).st_mode)
            logging.getLogger("vhostfs.x").error("it %s", "broke")
            assert daemon.recv(1000) == f"<11>vhostfsd[{os.getpid()}]: ERROR vhostfs.x: it broke".encode()
            logging.getLogger("vhostfs.x").info("fine")
            assert daemon.recv(1000).startswith(b"<14>")
            daemon.close()
            logging.getLogger("vhostfs.x").info("nobody listens any more")
        finally:
            for handler in root.handlers:
                handler.close()
            root.setLevel(before[0])
            root.handlers[:] = before[1]
