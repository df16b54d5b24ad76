# SPDX-License-Identifier: Apache-2.0
"""Watchers that people use, in the guest: inotifywait, Python's watchdog; and `vhostfs run` as typed.

Must not know how events travel. Specification: inotifywait(1); https://python-watchdog.readthedocs.io.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.guest.events.conftest import WatchedPlace
from tests.guest.place import awaited, python_command
from tests.limits import HANG_S
from vhostfs.vm.agent import RunningCommand

REPOSITORY = Path(__file__).resolve().parents[3]


class Inotifywait:
    """It, in monitor mode, in a place."""

    def __init__(self, watched: WatchedPlace, options: str, watches: int) -> None:
        self.watched = watched
        before = watched.control.watches
        self.command = watched.place.start(f"exec inotifywait -m {options} --format '%w|%e|%f' .")
        self.command.wait_for_output(b"Watches established", HANG_S, "stderr")
        assert watched.control.awaited_watches(before + watches) == before + watches

    def awaited(self, *expected: str) -> None:
        """The next lines are these."""
        lines = self.command.wait_for_lines(len(expected), HANG_S)
        assert lines[: len(expected)] == list(expected)

    def close(self) -> None:
        self.command.send_signal(signal.SIGTERM)
        self.command.wait(HANG_S)


def test_inotifywait_prints_what_happens_in_a_directory(watched: WatchedPlace) -> None:
    changes = "-e create -e modify -e close_write -e delete -e move -e attrib"
    inotifywait = Inotifywait(watched, changes, 1)
    file = watched.host / "file"
    file.write_text("text")
    inotifywait.awaited("./|CREATE|file", "./|MODIFY|file", "./|CLOSE_WRITE,CLOSE|file")
    file.chmod(0o600)
    file.rename(watched.host / "renamed")
    (watched.host / "renamed").unlink()
    inotifywait.awaited(
        "./|CREATE|file",
        "./|MODIFY|file",
        "./|CLOSE_WRITE,CLOSE|file",
        "./|ATTRIB|file",
        "./|MOVED_FROM|file",
        "./|MOVED_TO|renamed",
        "./|DELETE|renamed",
    )
    inotifywait.close()


def test_a_recursive_inotifywait_follows_directories_made_on_the_host(watched: WatchedPlace) -> None:
    (watched.host / "src/deep").mkdir(parents=True)
    before = watched.control.watches
    inotifywait = Inotifywait(watched, "-r -e create -e close_write -e delete", 3)
    (watched.host / "src/deep/main.c").write_text("int main;")
    (watched.host / "src/new").mkdir()
    inotifywait.awaited(
        "./src/deep/|CREATE|main.c",
        "./src/deep/|CLOSE_WRITE,CLOSE|main.c",
        "./src/|CREATE,ISDIR|new",
    )
    assert watched.control.awaited_watches(before + 4) == before + 4
    (watched.host / "src/new/file").touch()
    (watched.host / "src/new/file").unlink()
    lines = inotifywait.command.wait_for_lines(6, HANG_S)
    assert lines[3:] == [
        "./src/new/|CREATE|file",
        "./src/new/|CLOSE_WRITE,CLOSE|file",
        "./src/new/|DELETE|file",
    ]
    inotifywait.close()


OBSERVE = """
import json, sys, threading
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from watchdog.events import FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver

class Printer(FileSystemEventHandler):
    def on_any_event(self, event):
        words = [event.event_type, event.is_directory, event.src_path, event.dest_path]
        print(json.dumps([str(w) if isinstance(w, str) else w for w in words]), flush=True)

observer = InotifyObserver()
observer.schedule(Printer(), ".", recursive=True)
observer.start()
print("ready", flush=True)
sys.stdin.read()
observer.stop()
observer.join()
"""


def test_watchdog_s_observer_tells_a_program_of_the_host_s_changes(watched: WatchedPlace) -> None:
    host = watched.host
    (host / "src").mkdir()
    before = watched.control.watches
    observer = watched.place.start(f"exec {python_command(OBSERVE)}")
    observer.wait_for_output(b"ready\n", HANG_S)
    assert watched.control.awaited_watches(before + 2) == before + 2

    def awaited_event(kind: str, is_directory: bool, source: str, target: str = "") -> None:
        wanted = [kind, is_directory, source, target]
        assert awaited(lambda: wanted in seen(observer), HANG_S), (wanted, seen(observer))

    (host / "src/app.py").write_text("print()")
    awaited_event("created", False, "./src/app.py")
    awaited_event("modified", False, "./src/app.py")
    awaited_event("closed", False, "./src/app.py")
    os.rename(host / "src/app.py", host / "main.py")
    awaited_event("moved", False, "./src/app.py", "./main.py")
    (host / "lib").mkdir()
    awaited_event("created", True, "./lib")
    assert watched.control.awaited_watches(before + 3) == before + 3
    (host / "lib/util.py").touch()
    awaited_event("created", False, "./lib/util.py")
    (host / "lib/util.py").unlink()
    awaited_event("deleted", False, "./lib/util.py")
    shutil.rmtree(host / "lib")
    awaited_event("deleted", True, "./lib")
    observer.close_stdin()
    observer.wait(HANG_S).check()


def seen(observer: RunningCommand) -> list[Any]:
    lines = observer.stdout.decode().splitlines()
    return [json.loads(line) for line in lines if line.startswith("[") and line.endswith("]")]


@pytest.mark.timeout(700, func_only=True)
def test_run_prints_the_host_s_changes_as_they_happen(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "vhostfs", "run", str(tmp_path), "--", "inotifywait", "-m", "-r", "/share"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        assert run.stdout is not None
        assert run.stderr is not None
        stdout = run.stdout
        told = []
        for line in run.stderr:
            told.append(line.decode())
            if b"Watches established" in line:
                break
        assert any(line.startswith("vhostfs: events: fanotify") for line in told), told
        number = 0
        # Its watches may be on their way to the server still: the first change may be made before it knows.
        deadline = time.monotonic() + HANG_S
        os.set_blocking(stdout.fileno(), False)
        printed = b""
        while not printed and time.monotonic() < deadline:
            number += 1
            (tmp_path / f"file{number}").mkdir()
            awaited(lambda: select.select([stdout], [], [], 0)[0] != [], 1)
            printed = stdout.read() or b""
        assert f"/share/ CREATE,ISDIR file{number}\n" in printed.decode()
        run.send_signal(signal.SIGINT)
        assert run.wait(HANG_S) == 128 + signal.SIGINT
    finally:
        if run.poll() is None:
            run.kill()
        run.communicate()
