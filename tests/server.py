# SPDX-License-Identifier: Apache-2.0
"""A virtio-fs server as a process under test: start, socket, log, descriptors, end.

Knows nothing of what is said over the socket. VHOSTFS_SERVER names another server than this checkout's, as a
command with {socket}, {dir} and, where the server takes the same options, {options}.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.limits import HANG_S
from vhostfs.frontend.vhost_user import Connection, Message

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = HANG_S
STOP_TIMEOUT_S = HANG_S
BAD_LOG = re.compile(
    r"Traceback \(most recent call last\)|AddressSanitizer|runtime error:|LeakSanitizer|ThreadSanitizer"
    r"|panicked at|Fatal Python error|free\(\): |malloc\(\): |stack smashing|internal:"
)


class UnsupportedByServerError(Exception):
    """VHOSTFS_SERVER's command takes no options, and the test needs some."""


def awaited(condition: Callable[[], bool], timeout_s: float = HANG_S, step_s: float = 0.005) -> bool:
    """Polls a condition that has nothing to sleep on; False when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return condition()
        time.sleep(step_s)
    return True


def family(pid: int) -> list[int]:
    """A process and those that it has started, parents first."""
    found, next_ = [], [pid]
    while next_:
        found += next_
        children: list[int] = []
        for each in next_:
            with contextlib.suppress(OSError):
                for task in os.listdir(f"/proc/{each}/task"):
                    text = Path(f"/proc/{each}/task/{task}/children").read_text()
                    children += map(int, text.split())
        next_ = children
    return found


@contextlib.contextmanager
def held_up(pid: int) -> Iterator[None]:
    """Stops a process and those that it has started."""
    pids = family(pid)
    for each in pids:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in pids:
            os.kill(each, signal.SIGCONT)


class ServerProcess:
    """One running server. `finish` ends it and returns its exit status."""

    def __init__(
        self,
        shared_dir: Path,
        options: Sequence[str] = (),
        *,
        descriptor_limit: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.shared_dir = shared_dir
        self.options = tuple(options)
        # A short path: sun_path has 108 bytes.
        self._scratch = tempfile.mkdtemp(prefix="vhostfs-ring-")
        self.socket_path = Path(self._scratch, "s")
        self.log_path = Path(self._scratch, "log")
        self._descriptor_limit = descriptor_limit
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._idle_descriptors: int | None = None
        self.start()

    # ---- life ------------------------------------------------------------------------------------------

    @staticmethod
    def is_foreign() -> bool:
        """True when another server than this checkout's is tested."""
        return "VHOSTFS_SERVER" in os.environ

    def command(self) -> list[str]:
        template = os.environ.get("VHOSTFS_SERVER")
        if template is None:
            fixed = [sys.executable, "-m", "vhostfs", "serve", "--sandbox=none"]
            fixed += [f"--socket-path={self.socket_path}", f"--shared-dir={self.shared_dir}"]
            return fixed + list(self.options)
        words = shlex.split(template)
        if self.options and "{options}" not in words:
            raise UnsupportedByServerError(f"VHOSTFS_SERVER takes no {' '.join(self.options)}")
        command: list[str] = []
        for word in words:
            if word == "{options}":
                command.extend(self.options)
            else:
                command.append(
                    word.replace("{socket}", str(self.socket_path)).replace("{dir}", str(self.shared_dir))
                )
        return command

    def start(self) -> None:
        """Starts the process; returns once its socket is there."""
        self.kill()
        self.socket_path.unlink(missing_ok=True)
        mark = self.log_size()
        command = self.command()
        if self._descriptor_limit is not None:
            limit = self._descriptor_limit
            command = ["prlimit", f"--nofile={limit}:{limit}", "--", *command]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={"PYTHONPATH": str(REPOSITORY), **os.environ, **self._environment},
            )
        self._idle_descriptors = None
        if not awaited(lambda: self.socket_path.exists() or not self.running, START_TIMEOUT_S):
            self.kill()
            raise AssertionError(f"no socket after {START_TIMEOUT_S} s; log:\n{self.log()}")
        if not self.running:
            status = self._process.returncode
            raise AssertionError(f"the server ended at once with status {status}; log:\n{self.log()}")
        if not self.is_foreign() and not awaited(
            lambda: b"serving" in self.log_path.read_bytes()[mark:], START_TIMEOUT_S
        ):
            self.kill()
            raise AssertionError(f"the server does not say that it serves; log:\n{self.log()}")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> int:
        """SIGTERM, as libvirt ends it; the exit status (negative: the signal that killed it)."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end within {timeout_s} s; log:\n{self.log()}") from None

    def kill(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait()

    def discard(self) -> None:
        """Removes everything of it."""
        self.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # ---- what can be seen from outside -----------------------------------------------------------------

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_size(self) -> int:
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log_since(self, mark: int) -> str:
        with open(self.log_path, "rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")

    def pids(self) -> list[int]:
        """The server's processes: a sandboxed one runs below a parent that waits for it."""
        return family(self.process.pid)

    def descriptors(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def descriptor_targets(self) -> list[str]:
        targets = []
        for base in (f"/proc/{pid}/fd" for pid in self.pids()):
            for name in os.listdir(base):
                with contextlib.suppress(OSError):
                    targets.append(os.readlink(f"{base}/{name}"))
        return sorted(targets)

    def tasks(self, name: str) -> list[Path]:
        """/proc/PID/task/TID of the threads whose names begin so; there must be one."""
        tasks = [task for pid in self.pids() for task in Path(f"/proc/{pid}/task").iterdir()]
        named = [task for task in tasks if (task / "comm").read_text().startswith(name)]
        assert named, f"no thread of the server is called {name}"
        return named

    def threads(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids())

    def resident_bytes(self) -> int:
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in self.pids())

    def note_idle_descriptors(self) -> None:
        """Takes what is open with no front end connected as what a session must go back to.

        A short connection makes sure that the server has finished its start.
        """
        if self._idle_descriptors is not None:
            return
        with Connection.open(self.socket_path) as connection:
            connection.query_u64(Message.GET_FEATURES)
            connected = self.descriptors()
        if not awaited(lambda: self.descriptors() < connected):
            raise AssertionError(f"a closed connection stays open; log:\n{self.log()}")
        self._idle_descriptors = self.descriptors()

    def leaked_descriptors(self, timeout_s: float = HANG_S) -> list[str]:
        """Waits for the descriptors of a session to be closed; what is open when they are not."""
        expected = self._idle_descriptors
        if expected is None or awaited(lambda: self.descriptors() <= expected, timeout_s):
            return []
        return self.descriptor_targets()
