# SPDX-License-Identifier: Apache-2.0
"""Starts the servers of an experiment, one for each way of starting it that follows another, and asks them.
Must not know guests.
Specification: docs/lab.md; docs/events.md, "The control socket"."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..control.client import ControlClient
from ..share.options import CONTROL_SUFFIX
from ..vm.lifeline import Lifeline
from ..vm.server import ServerSpec, ShareServer

TAG = "lab"


class LabServer:
    """A running server; its shared directory has one directory for each cell. Raises VmError."""

    def __init__(self, lifeline: Lifeline, options: tuple[str, ...], name: str, tag: str = TAG) -> None:
        self.directory = lifeline.directory / name
        self.directory.mkdir()
        self.tag = tag
        socket_path = lifeline.directory / f"{name}.sock"
        self._server = ShareServer(
            ServerSpec(self.directory, socket_path, tag, options=("--sandbox=none", *options)), lifeline
        )
        self.socket_path = socket_path
        self._log_mark = 0
        self._seconds = 0.0

    def stop(self) -> None:
        self._server.stop()

    def begin(self) -> None:
        """A cell begins: what is said and spent from here on is its own."""
        self._log_mark = self._server.log_path.stat().st_size
        self._seconds = self._cpu_s()

    def said(self) -> list[str]:
        """What the log says of events since then."""
        with self._server.log_path.open("rb") as log:
            log.seek(self._log_mark)
            lines = log.read().decode(errors="replace").splitlines()
        marks = ("events for the guest: ", " stopped: ")
        texts = [line.partition(": ")[2] for line in lines if any(mark in line for mark in marks)]
        return list(dict.fromkeys(texts))

    def cpu_s(self) -> float:
        """Seconds of processor time since then."""
        return self._cpu_s() - self._seconds

    def stats(self) -> Mapping[str, Any]:
        """Raises ControlError."""
        with ControlClient(f"{self.socket_path}{CONTROL_SUFFIX}") as control:
            return control.stats()

    def _cpu_s(self) -> float:
        # The first number: time on a processor, in nanoseconds; utime and stime are too coarse here.
        spent_ns = 0
        for task in Path(f"/proc/{self._server.process.pid}/task").glob("*/schedstat"):
            # Threads of the queues of the cell before may be ending.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                spent_ns += int(task.read_text().split()[0])
        return spent_ns / 1e9
