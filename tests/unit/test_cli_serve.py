# SPDX-License-Identifier: Apache-2.0
"""`vhostfs serve` as a process: it comes up, answers a front end, and ends leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhostfs
from tests.limits import AT_ONCE_S, HANG_S
from vhostfs.control.client import ControlClient

GET_FEATURES = struct.pack("<III", 1, 1, 0)
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
COMMAND = [sys.executable, "-m", "vhostfs", "serve"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(vhostfs.__file__).parents[1])}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {HANG_S:.0f} s: {what}"
        time.sleep(0.01)


class Server:
    """A running server; its stderr goes to `log`."""

    def __init__(self, place: Path, *options: str, pass_fds: tuple[int, ...] = ()) -> None:
        self.path = place / "s"
        self.log = place / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, f"--shared-dir={place / 'share'}", *options],
                stderr=log,
                pass_fds=pass_fds,
                env=ENVIRONMENT,
            )

    def connected(self) -> socket.socket:
        deadline = time.monotonic() + HANG_S
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            front_end = socket.socket(socket.AF_UNIX)
            front_end.settimeout(HANG_S)
            try:
                front_end.connect(str(self.path))
                return front_end
            except OSError:
                front_end.close()
                time.sleep(0.01)

    def answers(self) -> None:
        with self.connected() as front_end:
            front_end.sendall(GET_FEATURES)
            reply = front_end.recv(20, socket.MSG_WAITALL)
        assert struct.unpack("<IIIQ", reply)[3] & VHOST_USER_F_PROTOCOL_FEATURES, self.log.read_text()

    def ended(self) -> int:
        return self.process.wait(HANG_S)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vhostfs-test-") as name:
        (Path(name) / "share").mkdir()
        yield Path(name)


@contextlib.contextmanager
def running(place: Path, *options: str, pass_fds: tuple[int, ...] = ()) -> Iterator[Server]:
    server = Server(place, *options, pass_fds=pass_fds)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()


def at(place: Path) -> str:
    return f"--socket-path={place / 's'}"


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("sandbox", ["namespace", "chroot", "none"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_ends_at_a_signal_with_status_0(
    place: Path, sandbox: str, number: signal.Signals
) -> None:
    with running(place, at(place), f"--sandbox={sandbox}", "--thread-pool-size=2") as server:
        server.answers()
        started_s = time.monotonic()
        server.process.send_signal(number)
        assert server.ended() == 0, server.log.read_text()
        assert time.monotonic() - started_s < AT_ONCE_S
        assert sorted(path.name for path in place.iterdir()) == ["log", "share"]
        assert list((place / "share").iterdir()) == []
    assert "Traceback" not in server.log.read_text()


def test_a_front_end_may_go_and_come_back(place: Path) -> None:
    with running(place, at(place), "--sandbox=none") as server:
        for _ in range(3):
            server.answers()


def test_with_once_it_ends_when_the_front_end_goes(place: Path) -> None:
    with running(place, at(place), "--sandbox=none", "--once") as server:
        server.answers()
        assert server.ended() == 0
        assert not server.path.exists()


@pytest.mark.usefixtures("needs_root")
def test_a_socket_of_the_parent_is_served_and_left_to_it(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "s"))
        listener.listen()
        fd = listener.fileno()
        with running(place, f"--fd={fd}", pass_fds=(fd,)) as server:
            server.answers()
            server.process.terminate()
            assert server.ended() == 0
    assert (place / "s").exists()


def test_a_second_server_on_the_same_path_is_refused_and_harms_nothing(place: Path) -> None:
    with running(place, at(place), "--sandbox=none") as server:
        server.answers()
        second = subprocess.run(
            [*COMMAND, f"--shared-dir={place}", at(place)], capture_output=True, text=True, env=ENVIRONMENT
        )
        assert second.returncode == 1
        assert second.stderr.endswith(
            f"another server (pid {server.process.pid}) uses this path; choose another, or end that one\n"
        )
        server.answers()


@pytest.mark.usefixtures("needs_root")
def test_a_server_that_was_killed_leaves_nothing_that_stops_the_next(place: Path) -> None:
    with running(place, at(place)) as server:
        server.answers()
        server.process.kill()
        server.ended()
    assert server.path.exists()
    with running(place, at(place)) as successor:
        # Until then a connection may still reach the inner process of the one before.
        until(lambda: " serving " in successor.log.read_text(), "the successor's start")
        successor.answers()


@pytest.mark.usefixtures("needs_root")
def test_a_crash_inside_is_the_exit_status_outside(place: Path) -> None:
    with running(place, at(place)) as server:
        server.answers()
        pid = server.process.pid
        inner = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        os.kill(inner, signal.SIGKILL)
        assert server.ended() == 128 + signal.SIGKILL
        assert "the server was ended by SIGKILL" in server.log.read_text()
        assert not server.path.exists()


def test_an_open_file_limit_of_1024_is_enough(place: Path) -> None:
    with running(place, at(place), "--sandbox=none", "--rlimit-nofile=1024") as server:
        server.answers()
        assert "inodes: " in server.log.read_text()


@pytest.mark.usefixtures("needs_root")
def test_mandatory_file_handles_that_cannot_be_had_are_an_error(place: Path) -> None:
    with running(place, at(place), "--inode-file-handles=mandatory", "--modcaps=-dac_read_search") as server:
        assert server.ended() == 1
        last = server.log.read_text().splitlines()[-1]
        assert "error: --inode-file-handles=mandatory is not possible" in last
        assert "CAP_DAC_READ_SEARCH" in last
        assert not server.path.exists()


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (["--shared-dir=/nonexistent"], 2, "--shared-dir=/nonexistent: there is no such directory"),
        (["--socket-path=/nonexistent/s"], 1, "the directory /nonexistent does not exist"),
        (["--cache=sometimes"], 2, "--cache: 'sometimes' is not possible"),
        (["--events=kqueue"], 2, "--events: 'kqueue' is not possible"),
        (["--delivery=virtqueue"], 2, "--delivery=virtqueue needs --tag=TAG"),
        (["--control-socket=/nonexistent/c"], 1, "--control-socket=/nonexistent/c: the directory"),
    ],
)
def test_what_is_wrong_is_one_line(place: Path, options: list[str], status: int, line: str) -> None:
    run = subprocess.run(
        [*COMMAND, at(place), f"--shared-dir={place / 'share'}", "--sandbox=none", *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=HANG_S,
    )
    assert run.returncode == status
    assert run.stdout == ""
    assert run.stderr.startswith("vhostfs serve: error: ") or "vhostfs: error: " in run.stderr
    assert line in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("sandbox", ["namespace", "chroot", "none"])
@pytest.mark.parametrize("source", ["auto", "fanotify:inodes", "inotify"])
def test_behind_every_wall_it_answers_on_its_control_socket(place: Path, sandbox: str, source: str) -> None:
    with running(place, at(place), f"--sandbox={sandbox}", "--tag=share", f"--events={source}") as server:
        server.answers()
        control = Path(f"{server.path}.ctl")
        assert control.stat().st_mode & 0o777 == 0o600
        with ControlClient(str(control)) as client:
            stats = client.stats()
        assert stats["server"]["tag"] == "share"
        assert stats["events"]["source"] == {"auto": "fanotify:filesystem"}.get(source, source)
        with ControlClient(str(control)) as client:
            messages = client.watch()
            watching = threading.Thread(target=list, args=(messages,))
            watching.start()
            server.answers()
            server.process.terminate()
            assert server.ended() == 0, server.log.read_text()
            watching.join(HANG_S)
            assert not watching.is_alive()
        assert sorted(path.name for path in place.iterdir()) == ["log", "share"]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.usefixtures("needs_root")
def test_as_another_user_in_a_namespace_inodes_are_marked_and_root_may_ask(place: Path) -> None:
    place.chmod(0o755)
    maps = ("--uid-map=:0:100000:65536:", "--gid-map=:0:100000:65536:")
    with running(place, at(place), "--tag=share", *maps) as server:
        server.answers()
        with ControlClient(f"{server.path}.ctl") as client:
            assert client.stats()["events"]["source"] == "fanotify:inodes"
        assert "events: fanotify, marks on watched inodes (no CAP_SYS_ADMIN)" in server.log.read_text()


def test_who_sees_the_socket_listen_may_use_the_control_socket_too(place: Path) -> None:
    with running(place, at(place), "--sandbox=none") as server:
        with server.connected(), ControlClient(f"{server.path}.ctl") as client:
            assert client.stats()["server"]["tag"] is None
        server.process.kill()
        server.process.wait(HANG_S)
    assert (place / "s").exists()
    assert (place / "s.ctl").exists()
    with running(place, at(place), "--sandbox=none") as server:
        with server.connected(), ControlClient(f"{server.path}.ctl") as client:
            assert client.stats()["server"]["tag"] is None
        server.process.terminate()
        assert server.ended() == 0
    assert sorted(path.name for path in place.iterdir()) == ["log", "share"]


def test_the_control_socket_may_lie_elsewhere_or_nowhere(place: Path) -> None:
    elsewhere = place / "c"
    with running(
        place, at(place), "--sandbox=none", "--events=off", f"--control-socket={elsewhere}"
    ) as server:
        server.answers()
        with ControlClient(str(elsewhere)) as client:
            assert client.stats()["events"]["source"] == "off"
        assert not Path(f"{server.path}.ctl").exists()
    with running(place, at(place), "--sandbox=none", "--no-control-socket") as server:
        server.answers()
        assert not Path(f"{server.path}.ctl").exists()


def test_a_default_control_socket_that_is_in_the_way_of_a_file_leaves_both_alone(place: Path) -> None:
    (place / "s.ctl").write_text("mine")
    with running(place, at(place), "--sandbox=none") as server:
        server.answers()
        server.process.terminate()
        assert server.ended() == 0
    assert (place / "s.ctl").read_text() == "mine"
    assert "cannot reach this server: --control-socket=" in server.log.read_text()


def test_events_need_no_tag(place: Path) -> None:
    with running(place, at(place), "--sandbox=none", "--events=inotify") as server:
        server.answers()
    assert server.log.read_text().count("events: inotify") == 1


@pytest.mark.usefixtures("needs_root")
def test_the_right_to_mark_the_file_system_stays_with_a_process_that_does_nothing_else(place: Path) -> None:
    with running(place, at(place), "--tag=share") as server:
        server.answers()
        pid = server.process.pid
        inner = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        marker = int(Path(f"/proc/{inner}/task/{inner}/children").read_text())
        assert Path(f"/proc/{marker}/comm").read_text() == "vhostfs-mark\n"
        sys_admin = 1 << 21
        assert not _status(inner, "CapEff") & sys_admin
        dac_read_search = 1 << 2
        assert _status(marker, "CapEff") == _status(marker, "CapPrm") == sys_admin | dac_read_search
        assert _status(marker, "Seccomp") == 2  # filtered
        assert len(list(Path(f"/proc/{marker}/fd").iterdir())) == 3
        # Nobody has asked for events, so nobody pays for them.
        lines = []
        for entry in Path(f"/proc/{inner}/fdinfo").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                lines.append(entry.read_text())
        assert lines
        assert not any("fanotify sdev:" in line for line in lines)
    # The server was killed; what it had started ends by itself.
    deadline_s = time.monotonic() + HANG_S
    while Path(f"/proc/{marker}").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1], 16)
