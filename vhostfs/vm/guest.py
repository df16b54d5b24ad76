# SPDX-License-Identifier: Apache-2.0
"""Guest: launches a virtual machine, mounts its shares and runs commands in it, until it is closed.

Must not know how servers are started; a share's socket must have a listener before the launch.
Specification: docs/guest.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from vhostfs.vm.agent import (
    AgentConnection,
    CompletedCommand,
    GuestError,
    GuestGoneError,
    GuestTimeoutError,
    OutputSink,
    RunningCommand,
)
from vhostfs.vm.errors import VmError
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Machine, Share, qemu_command

BOOT_TIMEOUT_S = 180.0
SILENCE_TIMEOUT_S = 60.0
_MOUNT_TIMEOUT_S = 120.0
_UNMOUNT_TIMEOUT_S = 30.0
_POWER_OFF_TIMEOUT_S = 15.0
_POLL_S = 0.1
_CONSOLE_TAIL_LINES = 25
_QEMU_LINES = 6
_CONSOLE_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """A piece of a command's output, cut anywhere."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class Guest:
    """A running guest. Use it as a context manager, or call `close`.

    Every method may be called from any thread; commands run side by side.
    """

    def __init__(self, machine: Machine, *, lifeline: Lifeline | None = None) -> None:
        """Describes the guest; `launch` starts it. `lifeline`: who ends QEMU, one of our own by default."""
        self.machine = machine
        self._own_lifeline = lifeline is None
        self._lifeline = lifeline or Lifeline()
        self._agent: AgentConnection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.command: list[str] = []
        """QEMU's command line, once launched."""
        self.boot_time_s: float | None = None
        """From the start of QEMU to the agent's first word."""
        self.console_path = self._lifeline.directory / f"console-{id(self):x}.log"
        """The guest kernel's console, readable while the guest lives."""
        self._qemu_log_path = self._lifeline.directory / f"qemu-{id(self):x}.log"

    # -- life

    def launch(
        self, boot_timeout_s: float = BOOT_TIMEOUT_S, silence_timeout_s: float = SILENCE_TIMEOUT_S
    ) -> None:
        """Starts QEMU, waits for the guest and mounts the shares.

        Raises VmError with the console's end when the guest does not come up, when its console says nothing
        new for `silence_timeout_s` while it boots, or when a share cannot be mounted.
        """
        ours, theirs = socket.socketpair()
        try:
            command = qemu_command(self.machine, agent_fd=theirs.fileno(), console_path=self.console_path)
            self.command = command
            started = time.monotonic()
            self._process = self._lifeline.start(command, log=self._qemu_log_path, pass_fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._agent = AgentConnection(ours)
        try:
            self._await_agent(self._agent, started + boot_timeout_s, silence_timeout_s)
        except GuestGoneError:
            raise VmError(f"the guest ended while it was starting{self.last_words()}") from None
        self.boot_time_s = time.monotonic() - started
        for share in self.machine.shares:
            if share.mount_point:
                self._mount(share)

    def _await_agent(self, agent: AgentConnection, deadline: float, silence_timeout_s: float) -> None:
        seen_bytes, seen_at = 0, time.monotonic()
        while not agent.wait_ready(_POLL_S):
            now = time.monotonic()
            with contextlib.suppress(OSError):
                size_bytes = self.console_path.stat().st_size
                if size_bytes > seen_bytes:
                    seen_bytes, seen_at = size_bytes, now
            # QEMU stops the processors at such an error and waits for someone to look.
            failure = next(
                (line for line in self._qemu_lines() if line.startswith("KVM internal error")), None
            )
            if failure is not None:
                raise VmError(f"KVM could not run the guest: {failure}{self.last_words()}")
            if now - seen_at > silence_timeout_s:
                raise VmError(
                    f"the guest showed no sign of life for {silence_timeout_s:g} s{self.last_words()}"
                )
            if now > deadline:
                raise VmError(f"the guest was still booting when its time was up{self.last_words()}")

    def _mount(self, share: Share) -> None:
        where, tag = shlex.quote(share.mount_point), shlex.quote(share.tag)
        options = "-o ro" if share.read_only else ""
        try:
            done = self.run(
                f"mkdir -p {where} && mount -t virtiofs {options} {tag} {where}", _MOUNT_TIMEOUT_S, cwd="/"
            )
        except GuestError as error:
            raise VmError(f"mounting {share.tag} in the guest failed: {error}{self.last_words()}") from error
        if done.exit_status != 0:
            said = done.error_text.strip() or f"exit status {done.exit_status}"
            raise VmError(f"mounting {share.tag} in the guest failed: {said}{self.last_words()}")

    def close(self, *, graceful: bool = True) -> None:
        """Ends the guest. `graceful` writes back and unmounts the shares first; nothing waits for long."""
        agent, self._agent = self._agent, None
        if agent is None:
            if self._own_lifeline:
                self._lifeline.close()
            return
        try:
            if graceful and not agent.gone:
                self._power_off(agent)
        finally:
            if self._process is not None:
                self._lifeline.stop(self._process, grace_s=0)
            agent.close()
            if self._own_lifeline:
                self._lifeline.close()

    def reboot(self, boot_timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Resets the machine as a power button does, waits for the guest and mounts the shares again.

        Only for a machine with `allow_reboot`. Raises VmError when the guest does not come back.
        """
        agent = self._agent
        if agent is None:
            raise GuestGoneError("the guest is closed")
        before = agent.boots
        # Does not come back, so it cannot be waited for; sysrq is quicker than what a shell would do.
        self.start("echo 1 >/proc/sys/kernel/sysrq; echo b >/proc/sysrq-trigger")
        if not agent.wait_rebooted(before, boot_timeout_s) or agent.gone:
            raise VmError(f"the guest did not come back after its reboot{self.last_words()}")
        for share in self.machine.shares:
            if share.mount_point:
                self._mount(share)

    def _power_off(self, agent: AgentConnection) -> None:
        points = [share.mount_point for share in reversed(self.machine.shares) if share.mount_point]
        # Lazily if need be: a process that was left behind may still use it.
        text = "".join(f"umount {point} || umount -l {point};" for point in map(shlex.quote, points))
        with contextlib.suppress(GuestError):
            agent.start(f"cd /; sync; {text}", cwd="/", environment={}, stdin=False).wait(_UNMOUNT_TIMEOUT_S)
            agent.power_off()
            deadline = time.monotonic() + _POWER_OFF_TIMEOUT_S
            while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)

    def kill(self) -> None:
        """Ends QEMU at once, from any thread: who waits for the guest gets VmError or GuestGoneError."""
        if self._process is not None:
            self._process.kill()

    @property
    def pid(self) -> int:
        """Of its QEMU, or of what QEMU runs under; only while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the guest can run commands."""
        return self._agent is not None and not self._agent.gone

    def last_words(self) -> str:
        """What QEMU said and the last lines of the guest's console, for people; "" when both are silent."""
        text = ""
        for title, lines in (
            ("QEMU said", self._qemu_lines()),
            ("the guest's console ends", read_tail(self.console_path, _CONSOLE_TAIL_LINES)),
        ):
            if lines:
                text += f"\n{title}:\n" + "\n".join(f"    {line}" for line in lines)
        return text

    def _qemu_lines(self) -> list[str]:
        # The first lines say what happened, a dump of registers may follow.
        return read_tail(self._qemu_log_path, 1 << 20)[:_QEMU_LINES]

    # -- commands

    def run(
        self,
        command: str,
        timeout_s: float,
        *,
        cwd: str = "/",
        environment: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> CompletedCommand:
        """Runs a shell command to its end and returns what it wrote and how it ended; does not judge its
        status.

        At `timeout_s` the command and its children in the guest are killed and GuestTimeoutError is raised.
        Raises GuestGoneError when the guest ends meanwhile.
        """
        running = self.start(command, cwd=cwd, environment=environment, stdin=stdin is not None)
        if stdin is not None:
            # On a thread of its own: a command that does not read must not keep us from the timeout.
            threading.Thread(target=_feed, args=(running, stdin), name="guest-stdin", daemon=True).start()
        try:
            return running.wait(timeout_s)
        except GuestTimeoutError:
            running.send_signal(signal.SIGKILL)
            raise

    def start(
        self,
        command: str,
        *,
        cwd: str = "/",
        environment: Mapping[str, str] | None = None,
        stdin: bool = False,
        terminal_size: tuple[int, int] | None = None,
        stdout_sink: OutputSink | None = None,
        stderr_sink: OutputSink | None = None,
    ) -> RunningCommand:
        """Starts a shell command and returns at once; for watchers and anything that goes on side by side.

        Output is kept in the returned object unless a sink takes it. `stdin=True` lets you write_stdin,
        else it reads end of file. Raises GuestGoneError.
        """
        if self._agent is None:
            raise GuestGoneError("the guest is closed")
        return self._agent.start(
            command,
            cwd=cwd,
            environment=environment or {},
            stdin=stdin,
            terminal_size=terminal_size,
            stdout_sink=stdout_sink,
            stderr_sink=stderr_sink,
        )

    async def stream(self, command: str, *, cwd: str = "/") -> AsyncIterator[OutputChunk]:
        """Runs a shell command and yields its output as it comes, until it ends with status 0.

        Leaving the loop early kills the command (close the iterator, see contextlib.aclosing). Raises
        GuestError when it ends otherwise.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[OutputChunk | None] = asyncio.Queue()

        def put(item: OutputChunk | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, item)

        running = self.start(
            command,
            cwd=cwd,
            stdout_sink=lambda data: put(OutputChunk("stdout", data)),
            stderr_sink=lambda data: put(OutputChunk("stderr", data)),
        )
        running.on_done(lambda: put(None))
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
            running.wait(0).check()
        finally:
            if running.status is None and self.alive:
                running.send_signal(signal.SIGKILL)

    def __enter__(self) -> Guest:
        try:
            self.launch()
        except BaseException:
            self.close(graceful=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(graceful=kind is None)


def _feed(running: RunningCommand, data: bytes) -> None:
    with contextlib.suppress(GuestError):  # the waiting side is told
        running.write_stdin(data)
        running.close_stdin()


def read_tail(path: Path, line_count: int) -> list[str]:
    """The last lines of a text file with terminal control left out; empty when it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _CONSOLE_TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = ("".join(c for c in line if c.isprintable() or c == "\t").rstrip() for line in text.splitlines())
    return [line for line in lines if line][-line_count:]
