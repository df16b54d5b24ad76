# SPDX-License-Identifier: Apache-2.0
"""Owns `vhostfs stats`: what a running server has counted and what was agreed with its guest.
Must not know where the numbers come from; the server tells on its control socket (vhostfs/control).
Specification: docs/events.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..control.client import ControlClient, find_control_socket
from .display import duration_text, microseconds_text, printable
from .parser import Parser

_DESCRIPTION = "Shows what a running server has counted, and what was agreed with its guest."
_EXAMPLES = """\
examples:
  vhostfs stats                       the only server that runs
  vhostfs stats /run/vm1.sock         by its vhost-user socket, or its control socket
  vhostfs stats --json /run/vm1.sock | jq .events.counters
  watch -n1 vhostfs stats
"""

_SHARE = {
    "requests": "FUSE requests answered",
    "inodes": "files and directories that the guest holds now",
    "inode_fds": "descriptors kept for them now",
    "open_files": "files and directories open for the guest now",
    "lock_waiters": "lock requests that wait now",
    "entries_ahead": "directory entries looked up before they were asked for",
}
_EVENTS = {
    "received": "events read from the host",
    "own": "dropped: made by this server for its guest",
    "unknown": "dropped: on objects that the guest does not hold",
    "unwatched": "dropped: on objects that nobody in the guest watches",
    "merged": "merged: the same as one that waited",
    "queued": "put in the queue for the guest",
    "delivered": "given to the guest",
    "lost": "lost: no room in the queue",
    "overflows": "times that the guest was told of a loss",
    "host_overflows": "times that the host's kernel lost events",
    "depth": "in the queue now",
    "max_depth": "the most that ever were in the queue",
    "watches": "files and directories that the guest watches now",
    "share_watches": "1: it watches the share as a whole, too",
    "host_marks": "marks or watches held for them on the host now",
    "buffers": "notification buffers of the guest that are free now",
}


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.usage = f"{parser.prog} [--json] [SOCKET]"
    parser.add_argument(
        "socket",
        metavar="SOCKET",
        nargs="?",
        help="the server's vhost-user socket or control socket (default: the only server's)",
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object (docs/events.md)")


def run(args: argparse.Namespace) -> int:
    """Prints once."""
    with ControlClient(find_control_socket(args.socket)) as client:
        stats = client.stats()
    if args.json:
        print(json.dumps(stats, indent=2))
    else:
        for line in stats_lines(stats):
            print(line)
    return 0


def stats_lines(stats: Mapping[str, Any]) -> Iterator[str]:
    """A table for people."""
    server, events = stats["server"], stats["events"]
    tag = "" if server["tag"] is None else f", tag {printable(server['tag'])}"
    yield f"server  vhostfs {printable(server['version'])}, up {duration_text(server['uptime_s'])}{tag}"
    yield f"events  {printable(events['reason'])}"
    yield f"guest   {guest_text(stats['guest'])}"
    yield ""
    counters = events["counters"]
    width = max(9, *(len(str(value)) for value in [*stats["share"].values(), *counters.values()]))
    yield from _table(stats["share"], _SHARE, width)
    if events["source"] == "off":
        return
    yield ""
    yield from _table(counters, _EVENTS, width)
    latency = events["latency"]
    if latency["p50_us"] is not None:
        half, most = microseconds_text(latency["p50_us"]), microseconds_text(latency["p99_us"])
        yield ""
        yield f"from the host's record to the guest: half within {half}, 99 % within {most}"


def guest_text(guest: Mapping[str, Any] | None) -> str:
    """One line: connected or not, and how events reach it."""
    if guest is None:
        return "no VMM is connected"
    agreed = guest["fsnotify"] or {"flags": []}
    flags = [flag.lower() for flag in agreed["flags"]]
    ways = {"virtqueue": "the notification queue", "parked": "parked requests"}
    chosen, missing = guest["delivery"]["chosen"], printable(guest["delivery"]["missing"])
    if chosen not in ways:
        return f"connected; no events: {missing}"
    extras = ", ".join(flag for flag in flags if flag not in ways)
    return f"connected; events by {ways[chosen]}{f' ({extras})' if extras else ''}"


def _table(values: Mapping[str, int], texts: Mapping[str, str], width: int) -> Iterator[str]:
    for name, text in texts.items():
        yield f"{values.get(name, 0):>{width}}  {text}"
