# SPDX-License-Identifier: Apache-2.0
"""`vhostfs watch` and `vhostfs stats`: what people read."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostfs.cli import main
from vhostfs.cli.display import duration_text, microseconds_text, printable
from vhostfs.cli.stats import guest_text, stats_lines
from vhostfs.cli.watch import event_lines
from vhostfs.control.report import ServerState, stats_message
from vhostfs.events.records import EventsStats
from vhostfs.share.native_share import ShareStats

EVENT: dict[str, Any] = {
    "type": "event",
    "time": "2026-11-21T07:14:56.123456Z",
    "path": "/src/main.py",
    "name": "main.py",
    "nodeid": 2,
    "child_nodeid": 3,
    "events": ["MODIFY"],
    "is_dir": False,
    "cookie": 0,
    "fate": "delivered",
    "reason": "given to the guest",
    "pid": 0,
}
STATS = stats_message(
    ServerState(
        uptime_s=7300,
        tag="share",
        share=ShareStats(1, 2, 3, 4, 1_234_567_890, 5),
        source="fanotify:filesystem",
        reason="fanotify, one mark on the file system of the share",
        events=EventsStats(
            received=12, delivered=10, latency=(0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 1, *[0] * 10)
        ),
        front_end=None,
        agreed=None,
    )
)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def shown(*messages: dict[str, Any], is_coloured: bool = False) -> list[str]:
    return list(event_lines(iter(messages), is_coloured=is_coloured))


def test_an_event_is_one_aligned_line() -> None:
    assert shown(
        EVENT,
        EVENT | {"events": ["CREATE", "ISDIR"], "path": "/new", "is_dir": True},
        EVENT | {"fate": "merged", "reason": "the same as the one before"},
    ) == [
        "07:14:56.123  MODIFY         delivered  /src/main.py",
        "07:14:56.123  CREATE         delivered  /new/",
        "07:14:56.123  MODIFY         merged     /src/main.py  (the same as the one before)",
    ]


def test_the_end_of_a_rename_says_where_it_began() -> None:
    lines = shown(
        EVENT | {"events": ["MOVED_FROM"], "path": "/a", "cookie": 9},
        EVENT | {"events": ["MOVED_TO"], "path": "/b", "cookie": 9},
        EVENT | {"events": ["MOVED_TO"], "path": "/c", "cookie": 10},
    )
    assert lines[1].endswith("MOVED_TO       delivered  /b  (from /a)")
    assert lines[2].endswith("/c")


def test_what_could_not_be_shown_is_counted() -> None:
    assert shown({"type": "skipped", "count": 12}) == [
        "12 events not shown: they came faster than they could be read"
    ]


def test_a_node_without_a_path_is_shown_by_its_number() -> None:
    assert shown(EVENT | {"path": None})[0].endswith("node 2, main.py")
    overflow = EVENT | {"path": None, "nodeid": 0, "name": "", "events": ["Q_OVERFLOW"], "fate": "overflow"}
    assert "Q_OVERFLOW" in shown(overflow)[0]


def test_colours_only_where_asked_for() -> None:
    assert "\x1b" not in shown(EVENT)[0]
    assert re.search(r"\x1b\[32mdelivered\x1b\[0m", shown(EVENT, is_coloured=True)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ä 字.txt", "plain ä 字.txt"),
        ("a\nb\x1b[2J", r"a\x0ab\x1b[2J"),
        (b"\xff\x80".decode(errors="surrogateescape"), r"\xff\x80"),
        ("back\\slash", "back\\\\slash"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x7f", r"\x7f"),
    ],
)
def test_a_name_cannot_do_anything_to_the_terminal(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_statistics_are_a_table() -> None:
    lines = list(stats_lines(STATS))
    assert lines[:3] == [
        "server  vhostfs 0.1.0, up 2 h 1 min, tag share",
        "events  fanotify, one mark on the file system of the share",
        "guest   no VMM is connected",
    ]
    assert "1234567890  FUSE requests answered" in lines
    assert "        12  events read from the host" in lines
    assert lines[-1] == "from the host's record to the guest: half within 64 us, 99 % within 8.19 ms"
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("chosen", "missing", "agreed", "text"),
    [
        ("none", "its driver has not asked", None, "connected; no events: its driver has not asked"),
        ("none", "no queue", {"flags": ["RENAME"]}, "connected; no events: no queue"),
        ("virtqueue", "", {"flags": ["VIRTQUEUE", "RENAME"]}, "events by the notification queue (rename)"),
        ("parked", "no queue", {"flags": ["PARKED"]}, "connected; events by parked requests"),
    ],
)
def test_one_line_says_how_events_reach_the_guest(chosen: str, missing: str, agreed: Any, text: str) -> None:
    delivery = {"chosen": chosen, "missing": missing}
    assert text in guest_text({"delivery": delivery, "fsnotify": agreed})


def test_quantities_have_units() -> None:
    assert [duration_text(seconds) for seconds in (5, 119, 700, 7300, 200_000)] == [
        "5 s",
        "119 s",
        "11 min",
        "2 h 1 min",
        "2 d 7 h",
    ]
    assert [microseconds_text(value) for value in (64, 4096, 2_097_152)] == ["64 us", "4.1 ms", "2.1 s"]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bytes], str]]:
    """A server that reads a line and then says the rest; returns its socket's path."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)
    path = str(tmp_path_factory.mktemp("w") / "s.ctl")
    listener.bind(path)
    listener.listen()

    def start(answer: bytes) -> str:
        def talk() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b'{"type":"hello","vhostfs":"0.1.0","control":1}\n')
                if peer.recv(4096):
                    peer.sendall(answer)

        threads.append(threading.Thread(target=talk))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join(20)
    listener.close()


def line_of(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def test_watch_ends_in_order_with_the_server(
    server: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = server(line_of({"type": "watching"}) + line_of(EVENT))
    assert main(["watch", path]) == 0
    out, err = capsys.readouterr()
    assert out == "07:14:56.123  MODIFY         delivered  /src/main.py\n"
    assert err == f"vhostfs watch: the server at {path} has ended\n"


def test_watch_json_passes_messages_on(
    server: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = server(line_of({"type": "watching"}) + line_of(EVENT) + line_of({"type": "skipped", "count": 3}))
    assert main(["watch", "--json", path]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        EVENT,
        {"type": "skipped", "count": 3},
    ]


def test_stats_json_is_one_object(server: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--json", server(line_of(STATS))]) == 0
    assert json.loads(capsys.readouterr().out) == STATS


@pytest.mark.parametrize("command", ["watch", "stats"])
def test_an_error_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "none")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vhostfs: error: ")
    assert err.count("\n") == 1
    assert "there is no such socket" in err


@pytest.mark.parametrize("command", ["watch", "stats"])
def test_what_the_server_refuses_is_said(
    command: str, server: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = server(line_of({"type": "error", "error": "events are off in this server"}))
    assert main([command, path]) == 1
    assert "events are off in this server" in capsys.readouterr().err
