# SPDX-License-Identifier: Apache-2.0
"""Processes and a scratch directory that never outlive this process, however it dies.

A tiny shell waits on a pipe from us; when the pipe closes without a farewell it kills what we had started
and removes the directory. Must not know what the processes are.
Specification: pipe(7), kill(2). Not PR_SET_PDEATHSIG: that follows the starting thread, not the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from vhostfs.vm.errors import VmError

_WATCH = """
trap '' INT HUP TERM QUIT
groups=
while read -r verb number; do
    case $verb in
    add) groups="$groups $number" ;;
    del)
        kept=
        for group in $groups; do [ "$group" = "$number" ] || kept="$kept $group"; done
        groups=$kept
        ;;
    bye) exit 0 ;;
    esac
done
for number in $groups; do kill -s KILL -- "-$number" 2>/dev/null; done
rm -rf -- "$1"
"""
_TERMINATE_GRACE_S = 10.0


class Lifeline:
    """Starts processes, each in a session of its own (a terminal's Ctrl-C reaches only us), and ends them
    all."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vhostfs-"))
        """Scratch directory (mode 0700), removed at the end; its path is short enough for sockets."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "vhostfs-lifeline", str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def start(
        self,
        command: Sequence[str],
        *,
        log: Path,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts `command` with its stdout and stderr appended to `log`. Raises VmError when it cannot be
        started."""
        with log.open("ab") as output:
            try:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=tuple(pass_fds),
                    env=None if environment is None else dict(environment),
                    start_new_session=True,
                )
            except OSError as error:
                raise VmError(f"cannot start {command[0]}: {error.strerror}") from error
        with self._lock:
            self._processes.append(process)
            self._tell(f"add {process.pid}")
        return process

    def stop(self, process: subprocess.Popen[bytes], grace_s: float = _TERMINATE_GRACE_S) -> int:
        """Ends `process` and its group: SIGTERM, then SIGKILL after `grace_s`. Returns its exit status."""
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        # The group may hold children that outlived it, or the process itself, stuck.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        with self._lock:
            if process in self._processes:
                self._processes.remove(process)
                self._tell(f"del {process.pid}")
        return status

    def close(self) -> None:
        """Ends every process that was started, the last first, and removes the scratch directory."""
        if self._closed:
            return
        self._closed = True
        for process in reversed(self._processes.copy()):
            self.stop(process)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._tell("bye")
        stream = self._stream()
        with contextlib.suppress(OSError):
            stream.close()
        self._watcher.wait()

    def _stream(self) -> IO[bytes]:
        assert self._watcher.stdin is not None
        return self._watcher.stdin

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream().write(line.encode() + b"\n")
            self._stream().flush()

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
