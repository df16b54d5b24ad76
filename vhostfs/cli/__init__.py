# SPDX-License-Identifier: Apache-2.0
"""Owns the entry points, the list of commands, and how an error ends a command.
Must not know any command's options (they are in the command's own module, imported when it is named).
Specification: exit status 0 done, 1 failed, 2 wrong options; `vhostfs run` passes its command's on."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import UserError
from ..record import Record
from .parser import Parser, UsageError, nearest


class Command(Record):
    """A command; its module has add_arguments(parser) and run(args) -> exit status."""

    name: str
    module: str
    summary: str


SERVE = Command(
    "serve", "vhostfs.cli.serve", "serve a directory to a VM (a vhost-user back end, like virtiofsd)"
)
COMMANDS = (
    SERVE,
    Command("run", "vhostfs.cli.run", "run a command, or a shell, in a small VM that sees a directory"),
    Command("watch", "vhostfs.cli.watch", "show the events of a running server as they happen"),
    Command("stats", "vhostfs.cli.stats", "show what a running server has counted"),
    Command("caps", "vhostfs.cli.caps", "show what this host can do, what is negotiated, what is missing"),
    Command("lab", "vhostfs.cli.lab", "try what guests are told, for many servers, VMMs and drivers"),
)

# What libvirt reads (docs/interop/vhost-user.json of QEMU, "VHostUserBackendCapabilities"):
# separate-options: takes --shared-dir and the like, not only -o.
CAPABILITIES_JSON = """\
{
  "type": "fs",
  "features": [
    "separate-options"
  ]
}"""


def main(argv: Sequence[str] | None = None) -> int:
    """The vhostfs command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _ended("vhostfs", lambda: _main(arguments))


def main_vhostfsd(argv: Sequence[str] | None = None) -> int:
    """The vhostfsd command: `vhostfs serve` under the name that libvirt's <binary path> points at."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _ended("vhostfsd", lambda: _run_command(SERVE, "vhostfsd", arguments))


def _main(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        _print_help()
        return 0
    if first in ("-V", "--version"):
        print(f"vhostfs {__version__}")
        return 0
    if first == "--print-capabilities":
        print(CAPABILITIES_JSON)
        return 0
    for command in COMMANDS:
        if command.name == first:
            return _run_command(command, f"vhostfs {first}", arguments[1:])
    if first.startswith("-"):
        raise UsageError(f"{first}: options come after the command, as in: vhostfs serve {first}")
    hint = nearest(first, [command.name for command in COMMANDS])
    raise UsageError(f"'{first}' is no command{hint or '; see vhostfs --help'}")


def _print_help() -> None:
    width = max(len(command.name) for command in COMMANDS)
    print("usage: vhostfs COMMAND [OPTIONS]\n")
    print("Shares host directories with VMs by virtio-fs.\n")
    print("commands:")
    for command in COMMANDS:
        print(f"  {command.name:{width}}  {command.summary}")
    print("\noptions:\n  -h, --help     show this\n  -V, --version  show the version")
    print("\nvhostfs COMMAND --help shows a command's options.\n")
    print("examples:")
    print("  vhostfs run . -- ls -l /share")
    print("  vhostfs serve --socket-path /run/vm1.sock --shared-dir /srv/vm1 --tag share")
    print("  vhostfs watch /run/vm1.sock")
    print("  vhostfs caps --advice /srv/vm1")


def _run_command(command: Command, program: str, arguments: list[str]) -> int:
    if command is SERVE and "--print-capabilities" in arguments:
        print(CAPABILITIES_JSON)  # whatever else is given (vhost-user.rst, "Backend program conventions")
        return 0
    module = importlib.import_module(command.module)
    parser = Parser(prog=program)
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(arguments))
    return status


def _ended(program: str, body: Callable[[], int]) -> int:
    """Runs body; whatever it raises becomes one line on stderr and a status."""
    _open_missing_streams()
    try:
        status = body()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # A reader that went away, as `| head` does, is no error worth a line at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            # What could not be written would be tried once more at exit, and complained of.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            print(f"{program}: error: the output cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        logging.getLogger("vhostfs").debug("internal error", exc_info=True)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{program}: error: internal: {text} (--log-level=debug shows where)", file=sys.stderr)
        return 1


def _open_missing_streams() -> None:
    """Started with `>&-`, Python has None where output would go."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the rest of the process)
