# SPDX-License-Identifier: Apache-2.0
"""Starts the vhost-user server of a share as a process of its own, and knows when it is ready.

Must not know how the server works: its command line and the socket on which it listens are all.
Specification: `vhostfs serve --help`; $VHOSTFS_SERVER is described in docs/guest.md.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vhostfs.vm.agent import GuestError
from vhostfs.vm.errors import VmError
from vhostfs.vm.guest import Guest, read_tail
from vhostfs.vm.lifeline import Lifeline

TEMPLATE_VARIABLE = "VHOSTFS_SERVER"
"""Environment variable that replaces our server by another for comparison: a command with {socket} and
{dir}."""
READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
_POLL_S = 0.01
_LOOK_S = 0.5
_WATCH_INTERVAL_S = 0.25
_LOG_TAIL_LINES = 15
_ACCEPTS_CONNECTIONS = 0x10000  # __SO_ACCEPTCON in the Flags column of /proc/net/unix


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What a share's server is told."""

    directory: Path
    socket_path: Path
    tag: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    """Further options of `vhostfs serve`."""
    under: tuple[str, ...] = ()
    """A command that runs the server: its words follow."""


def server_command(spec: ServerSpec, template: str | None) -> list[str]:
    """The command that serves `spec`: ours, or `template` with {socket} and {dir} filled in.

    Raises VmError for a template that lacks them or that cannot do what is asked.
    """
    if not template:
        command = [sys.executable, "-m", "vhostfs", "serve", "--socket-path", str(spec.socket_path)]
        command += ["--shared-dir", str(spec.directory), "--tag", spec.tag]
        if spec.read_only:
            command.append("--readonly")
        return [*command, *spec.options]
    if "{socket}" not in template or "{dir}" not in template:
        raise VmError(f"{TEMPLATE_VARIABLE} must contain {{socket}} and {{dir}}, it is: {template}")
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise VmError(f"{TEMPLATE_VARIABLE} cannot be split into words ({error}): {template}") from error
    filled = [
        word.replace("{socket}", str(spec.socket_path)).replace("{dir}", str(spec.directory))
        for word in words
    ]
    return [*filled, *spec.options]


def template_from_environment() -> str | None:
    """The user's replacement for our server, None when there is none."""
    return os.environ.get(TEMPLATE_VARIABLE) or None


def is_listening(socket_path: Path) -> bool:
    """True when some process accepts connections on that path; does not connect."""
    wanted = str(socket_path)
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & _ACCEPTS_CONNECTIONS:
            return True
    return False


class ShareServer:
    """A running server; ended by its lifeline."""

    def __init__(self, spec: ServerSpec, lifeline: Lifeline, *, log_path: Path | None = None) -> None:
        """Starts the server and waits until it listens.

        Its messages go to `log_path`, by default a file beside the socket. Raises VmError with their end
        when it does not come up.
        """
        self.spec = spec
        self.log_path = log_path or spec.socket_path.with_suffix(".log")
        self._lifeline = lifeline
        command = [*spec.under, *server_command(spec, template_from_environment())]
        self.process = lifeline.start(command, log=self.log_path)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not is_listening(spec.socket_path):
            if self.process.poll() is not None:
                raise VmError(self.describe_end())
            if time.monotonic() > deadline:
                lifeline.stop(self.process)
                raise VmError(
                    f"{command[0]} does not listen on {spec.socket_path} after {READY_TIMEOUT_S:g} s"
                )
            time.sleep(_POLL_S)

    def describe_end(self) -> str:
        """Why the server ended, for people."""
        lines = read_tail(self.log_path, _LOG_TAIL_LINES) if self.log_path.is_file() else []
        said = "".join(f"\n    {line}" for line in lines)
        what = f"the server of {self.spec.directory} ended with status {self.process.returncode}"
        return f"{what}:{said}" if said else what

    def stop(self) -> int:
        """Ends the server and returns its exit status."""
        return self._lifeline.stop(self.process)


def ended_server(servers: Sequence[ShareServer]) -> ShareServer | None:
    """A server that has ended, or is about to: QEMU may notice first.

    One that listens no more is about to, however long that takes on a busy machine.
    """
    began_s = time.monotonic()
    while (passed_s := time.monotonic() - began_s) < END_TIMEOUT_S:
        for server in servers:
            if server.process.poll() is not None:
                return server
        if passed_s > _LOOK_S and all(is_listening(server.spec.socket_path) for server in servers):
            return None
        time.sleep(0.02)
    return None


@contextmanager
def ended_with(servers: Sequence[ShareServer], guest: Guest) -> Iterator[None]:
    """While the guest starts and its command runs: it goes at once when a server has gone, for what it asks
    of the share then would wait for ever.

    Raises VmError with a server's end when that is the cause, whatever QEMU or the guest then said."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_INTERVAL_S):
            if any(server.process.poll() is not None for server in servers):
                guest.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (VmError, GuestError) as error:
        failed = ended_server(servers)
        raise VmError(failed.describe_end()) if failed else error from error
    finally:
        done.set()
        watcher.join()
