# SPDX-License-Identifier: Apache-2.0
"""Owns `vhostfs watch`: what a running server does with each event, as lines for people or as JSON.
Must not know how events travel; the server tells on its control socket (vhostfs/control).
Specification: docs/events.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from ..control.client import ControlClient, find_control_socket
from .display import Style, printable, styled, wants_colour
from .parser import Parser

_DESCRIPTION = """\
Shows what a running server learns of changes on the host, as they happen, and
what becomes of each: given to the guest, merged with the one before, or lost."""
_EXAMPLES = """\
what became of an event:
  delivered  it was given to the guest
  merged     the same as the one before it, which still waits for the guest
  lost       too many waited already: the guest takes them too slowly
  overflow   the guest was told that events were lost; programs there look again
  own        the guest itself did it, so its kernel has told its programs (--all)
  unwatched  no program in the guest watches it (--all)

examples:
  vhostfs watch                            the only server that runs
  vhostfs watch /run/vm1.sock              by its vhost-user socket, or its control socket
  vhostfs watch --all /run/vm1.sock
  vhostfs watch --json | jq -r 'select(.fate == "lost") | .path'
"""
_SHOWN = ("delivered", "merged", "lost", "overflow")
_FATE_STYLES = {
    "delivered": Style.GOOD,
    "merged": Style.FAINT,
    "lost": Style.BAD,
    "overflow": Style.BAD,
    "own": Style.FAINT,
    "unwatched": Style.FAINT,
}
_COOKIES_KEPT = 64


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.usage = f"{parser.prog} [--all] [--json] [SOCKET]"
    parser.add_argument(
        "socket",
        metavar="SOCKET",
        nargs="?",
        help="the server's vhost-user socket or control socket (default: the only server's)",
    )
    parser.add_argument(
        "--all", action="store_true", help="also events that the guest itself caused or nobody there watches"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line (docs/events.md)")


def run(args: argparse.Namespace) -> int:
    """Shows events until the server ends (0) or Ctrl-C (130)."""
    path = find_control_socket(args.socket)
    with ControlClient(path) as client:
        messages = client.watch(None if args.all else _SHOWN)
        if args.json:
            for message in messages:
                _print(json.dumps(message))
        else:
            is_coloured = wants_colour(sys.stdout)
            if sys.stderr.isatty():
                print(f"watching {printable(path)}; Ctrl-C ends", file=sys.stderr)
            for line in event_lines(messages, is_coloured=is_coloured):
                _print(line)
    print(f"vhostfs watch: the server at {printable(path)} has ended", file=sys.stderr)
    return 0


def _print(line: str) -> None:
    # Whoever reads wants it now, also through a pipe.
    print(line, flush=True)


def event_lines(messages: Iterator[Mapping[str, Any]], *, is_coloured: bool) -> Iterator[str]:
    """Aligned lines: time here, what happened, what became of it, path and why."""
    origins: OrderedDict[int, str] = OrderedDict()
    for message in messages:
        if message.get("type") == "skipped":
            text = f"{message.get('count')} events not shown: they came faster than they could be read"
            yield styled(text, Style.BAD, is_coloured=is_coloured)
        elif message.get("type") == "event":
            yield _event_line(message, origins, is_coloured=is_coloured)


def _event_line(message: Mapping[str, Any], origins: OrderedDict[int, str], *, is_coloured: bool) -> str:
    names = [name for name in message["events"] if name != "ISDIR"]
    fate = str(message["fate"])
    path = message["path"]
    if path is None:
        path = f"node {message['nodeid']}" if message["nodeid"] else ""
        if path and message["name"]:
            path += f", {message['name']}"
    elif message["is_dir"] and path != "/":
        path += "/"
    shown = printable(path)
    details = []
    cookie = message["cookie"]
    if cookie and "MOVED_FROM" in names:
        origins[cookie] = shown
        if len(origins) > _COOKIES_KEPT:
            origins.popitem(last=False)
    elif cookie and "MOVED_TO" in names and (origin := origins.pop(cookie, None)) is not None:
        details.append(f"from {origin}")
    if fate != "delivered":
        details.append(message["reason"])
    time_text = datetime.fromisoformat(message["time"]).astimezone().strftime("%H:%M:%S.%f")[:-3]
    columns = [
        styled(time_text, Style.FAINT, is_coloured=is_coloured),
        f"{'|'.join(names):<13}",
        styled(f"{fate:<9}", _FATE_STYLES.get(fate, Style.PLAIN), is_coloured=is_coloured),
        shown,
    ]
    if details:
        columns.append(styled(f"({'; '.join(details)})", Style.FAINT, is_coloured=is_coloured))
    return "  ".join(column for column in columns if column)
