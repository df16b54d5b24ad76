# SPDX-License-Identifier: Apache-2.0
"""The line of `vhostfs run` about events, and how it finds out that a server is the cause."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from tests.limits import HANG_S
from vhostfs.cli.run_events import delivered
from vhostfs.vm.server import ServerSpec, ShareServer, ended_server


def told(chosen: str, missing: str = "") -> dict[str, Any]:
    return {"delivery": {"chosen": chosen, "missing": missing}, "source": {"reason": "inotify (asked for)"}}


@pytest.mark.parametrize(
    ("chosen", "missing", "queue_missing", "line"),
    [
        ("virtqueue", "", None, "delivered by the notification queue"),
        ("parked", "not accepted", None, "delivered by parked requests: not accepted"),
        ("parked", "not accepted", "QEMU 7.2", "delivered by parked requests: QEMU 7.2"),
    ],
)
def test_one_line_says_where_events_come_from_and_how_they_travel(
    chosen: str, missing: str, queue_missing: str | None, line: str
) -> None:
    assert delivered(told(chosen, missing), queue_missing) == (f"events: inotify (asked for); {line}", "")


def test_without_a_way_to_travel_there_is_a_reason_and_no_line() -> None:
    assert delivered(told("none", "its driver has not asked"), "QEMU 7.2") == (
        None,
        "its driver has not asked",
    )


@dataclass(frozen=True)
class FakeServer:
    """A process, and a socket that it may listen on."""

    process: subprocess.Popen[bytes]
    spec: ServerSpec


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, socket.socket]]:
    path = tmp_path_factory.mktemp("run") / "s.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    yield path, listener
    listener.close()


def fake(path: Path, program: str) -> FakeServer:
    process = subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE)
    return FakeServer(process, ServerSpec(path.parent, path, "share"))


def found(server: FakeServer) -> object:
    try:
        return ended_server([cast(ShareServer, server)])
    finally:
        server.process.kill()
        server.process.communicate()


def test_a_server_that_takes_its_time_to_end_is_waited_for(place: tuple[Path, socket.socket]) -> None:
    """It listens no more: QEMU has noticed before its process is gone."""
    path, _ = place
    server = fake(path, "import time; time.sleep(1.2); raise SystemExit(1)")
    assert found(server) is server


def test_a_server_that_serves_is_not_the_cause(
    place: tuple[Path, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not waited for."""
    path, listener = place
    monkeypatch.setattr("vhostfs.vm.server.END_TIMEOUT_S", HANG_S)
    listener.listen()
    began_s = time.monotonic()
    assert found(fake(path, "input()")) is None
    assert time.monotonic() - began_s < HANG_S / 2
