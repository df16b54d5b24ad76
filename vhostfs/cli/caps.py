# SPDX-License-Identifier: Apache-2.0
"""Owns `vhostfs caps`: what this host can do for a share, as a table for people or JSON for programs.
Must not probe anything itself (vhostfs/caps).
Specification: docs/caps.md."""

from __future__ import annotations

import argparse
import json
import sys

from ..caps.report import gather
from .caps_table import report_lines
from .display import wants_colour
from .parser import Parser

_DESCRIPTION = """\
Shows what this host can do for a share of DIR: sources of events, file handles,
rights, limits, QEMU, KVM; and what servers that run have agreed on with their
guests. Everything is tried, nothing is guessed from versions, and nothing is
changed. What is missing is said with what it costs and what to do about it."""
_EXAMPLES = """\
examples:
  vhostfs caps                           the current directory, and all servers that run
  vhostfs caps /srv/vm1                  a directory, and the servers that share it
  vhostfs caps --control /run/vm1.sock   a server, by its vhost-user socket or control socket
  vhostfs caps --advice                  only what could be better
  vhostfs caps --json | jq .directory.events.chosen
"""


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.usage = f"{parser.prog} [--json | --advice] [--control=PATH] [DIR]"
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", help="the directory to share (default: the server's, or .)"
    )
    parser.add_argument(
        "--control", metavar="PATH", help="ask this server (default: those that share DIR, or all)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything as one JSON object (docs/caps.md)")
    form.add_argument("--advice", action="store_true", help="only what could be better, and how")


def run(args: argparse.Namespace) -> int:
    """Prints once. 0, whatever is missing."""
    report = gather(args.directory, args.control)
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
        return 0
    for line in report_lines(report, is_coloured=wants_colour(sys.stdout), only_advice=args.advice):
        print(line)
    return 0
