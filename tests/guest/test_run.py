# SPDX-License-Identifier: Apache-2.0
"""`vhostfs run` from a person's side: output, exit status, nothing left behind; and the other guest kernels.

Must not know how it starts guests. Specification: `vhostfs run --help`, docs/guest.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.conftest import Launchpad, image_or_lacking
from tests.guest.place import awaited, sha256
from tests.limits import HANG_S, LONG_HANG_S
from vhostfs.vm.image import ImageSpec

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where a person types `vhostfs run`: all that a run starts or makes can be told from what others do."""

    directory: Path
    """To be shared."""
    scratch: Path
    """$TMPDIR of the run."""
    mark: str

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts `vhostfs run ARGUMENTS`, in a session of its own as a terminal would."""
        environment = {**os.environ, "TMPDIR": str(self.scratch), "VHOSTFS_TEST_MARK": self.mark}
        return subprocess.Popen(
            [sys.executable, "-m", "vhostfs", "run", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def commands(self) -> list[tuple[int, list[str]]]:
        """Pids and command lines of all processes that come from runs here, oldest first."""
        found = []
        for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
            with contextlib.suppress(OSError):
                if self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append((pid, Path(f"/proc/{pid}/cmdline").read_text().split("\0")))
        return found

    def processes(self) -> list[str]:
        """The command lines alone."""
        return [" ".join(words) for _, words in self.commands()]

    def left_behind(self) -> list[str]:
        """Processes and files of a run, and sockets in its scratch directory."""
        sockets = [
            line.split()[-1]
            for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()
            if str(self.scratch) in line
        ]
        return [*self.processes(), *map(str, self.scratch.iterdir()), *sockets]

    def awaited_end(self) -> list[str]:
        """What is still left once everything has had time to go."""
        awaited(lambda: not self.left_behind())
        return self.left_behind()


@pytest.fixture
def terminal(launchpad: Launchpad, tmp_path: Path) -> Iterator[Terminal]:
    image_or_lacking(launchpad, ImageSpec(driver=True))
    for name in ("shared", "scratch"):
        (tmp_path / name).mkdir()
    place = Terminal(tmp_path / "shared", tmp_path / "scratch", f"run-{uuid.uuid4()}")
    yield place
    assert place.awaited_end() == []


pytestmark = pytest.mark.timeout(700, func_only=True)


def test_run_gives_the_command_s_output_and_status_and_leaves_nothing(terminal: Terminal) -> None:
    (terminal.directory / "in").write_text("from the host")
    run = terminal.start(
        str(terminal.directory),
        "--",
        "cat in; cat; echo problem >&2; pwd >out; exit 7",
    )
    out, err = run.communicate(b" and stdin", timeout=LONG_HANG_S)
    assert (run.returncode, out) == (7, b"from the host and stdin"), err
    assert b"problem\n" in err
    assert re.search(rb"^vhostfs: events: .*; delivered by the notification queue$", err, re.MULTILINE), err
    assert b"problem" not in out
    assert (terminal.directory / "out").read_text() == "/share\n"


def test_a_server_that_fails_when_its_socket_is_there_is_what_is_told(terminal: Terminal) -> None:
    """It listens first and finds out then; QEMU, which it leaves alone, has its own words for that."""
    run = terminal.start("--server-option=--rlimit-nofile=99999999", str(terminal.directory), "--", "true")
    out, err = run.communicate(timeout=LONG_HANG_S)
    assert (run.returncode, out) == (125, b"")
    assert b"ended with status 1:\n    vhostfs: error: --rlimit-nofile=99999999: " in err, err
    assert b"QEMU said" not in err


def test_a_server_that_is_killed_while_the_guest_boots_ends_the_run_at_once(terminal: Terminal) -> None:
    run = terminal.start("--events=off", str(terminal.directory), "--", "true")
    assert run.stderr is not None
    for line in run.stderr:
        if b"starting Linux" in line:
            break

    def machines() -> list[int]:
        return [pid for pid, words in terminal.commands() if "qemu-system" in words[0]]

    assert awaited(lambda: machines() != [])
    for pid in machines():
        os.kill(pid, signal.SIGSTOP)  # so that it neither comes up nor notices
    # The oldest: the process in the sandbox is its child.
    server = next(pid for pid, words in terminal.commands() if "serve" in words and "--shared-dir" in words)
    os.kill(server, signal.SIGKILL)
    assert run.wait(HANG_S / 2) == 125
    assert b"ended with status -9" in run.stderr.read()
    run.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_by_a_signal_leaves_nothing(terminal: Terminal, number: signal.Signals) -> None:
    run = terminal.start(str(terminal.directory), "--", "echo up; exec sleep 1000")
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.readline() == b"up\n", run.stderr.read()
    assert len(terminal.processes()) >= 3, "run, server and QEMU"
    run.send_signal(number)
    status = run.wait(HANG_S)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert terminal.awaited_end() == []
    run.communicate()


def test_a_run_that_is_interrupted_while_it_boots_leaves_nothing(terminal: Terminal) -> None:
    run = terminal.start(str(terminal.directory), "--", "true")
    assert run.stderr is not None
    for line in run.stderr:
        if b"starting Linux" in line:
            break
    run.send_signal(signal.SIGINT)
    assert run.wait(HANG_S) == 128 + signal.SIGINT
    assert terminal.awaited_end() == []
    run.communicate()


# What needs nothing but busybox, for kernels that have no tests of their own.
WORK = r"""
set -e
cp -r in out
mkdir -p out/deep/er
ln -s ../deep out/deep/link
ln out/file out/second
mv out/file out/deep/moved
dd if=/dev/zero of=out/sparse bs=1k count=1 seek=1000 2>/dev/null
truncate -s 5000 out/second
echo appended >>out/deep/moved
chmod 640 out/deep/moved
for n in $(seq 300); do echo $n >out/n$n; done
ls out | grep -c '^n'
rm out/n*5
rm in/file
sha256sum out/deep/moved out/sparse out/deep/link/moved | cut -d ' ' -f 1
uname -r
"""


# Once with the kernel's own driver and the usual device, once with ours.
@pytest.mark.parametrize(("kernel", "events"), [("6.1", "off"), ("7.2", "fanotify")])
def test_a_day_s_work_on_the_other_guest_kernels(
    terminal: Terminal, launchpad: Launchpad, kernel: str, events: str
) -> None:
    image_or_lacking(launchpad, ImageSpec(kernel, driver=events != "off"))
    (terminal.directory / "in").mkdir()
    (terminal.directory / "in/file").write_bytes(b"content " * 1000)
    options = ("--kernel", kernel, "--events", events, "--delivery=parked")
    run = terminal.start(*options, str(terminal.directory), "--", WORK)
    out, err = run.communicate(timeout=LONG_HANG_S)
    assert run.returncode == 0, (out, err)
    said = "off" if events == "off" else "fanotify, one mark on the file system of the share; delivered by "
    said += "" if events == "off" else "parked requests: asked for by --delivery"
    assert f"vhostfs: events: {said}\n".encode() in err
    moved = (b"content " * 1000)[:5000] + b"appended\n"
    expected = [sha256(content) for content in (moved, bytes(1001 << 10), moved)]
    lines = out.decode().splitlines()
    assert lines[:4] == ["300", *expected]
    assert lines[4].startswith(kernel)
    made = terminal.directory / "out"
    assert (made / "deep/moved").read_bytes() == (made / "second").read_bytes() == moved
    assert (made / "second").stat().st_nlink == 2
    assert (made / "second").stat().st_mode & 0o777 == 0o640
    assert (made / "sparse").stat().st_blocks * 512 < 1000 << 10
    assert len(list(made.glob("n*"))) == 270
    assert not (terminal.directory / "in/file").exists()
