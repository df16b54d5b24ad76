# SPDX-License-Identifier: Apache-2.0
"""The host's end of the guest agent: commands in the guest as objects with output, input and an exit status.

Owns the socket and one reading thread. Must not know how the guest was started.
Specification: frames.py.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vhostfs.vm.frames import (
    PROTOCOL_VERSION,
    STDIN_WINDOW,
    ExitStatus,
    Frame,
    FrameDecoder,
    FrameType,
    ProtocolError,
    StartFlag,
    decode_exit,
    decode_number,
    encode_frame,
    encode_resize,
    encode_signal,
    encode_start,
    encode_stdin,
)

_STDIN_CHUNK = 32 * 1024
OutputSink = Callable[[bytes], None]
"""Takes output as it comes, on the reading thread: as long as it takes, every command of the guest waits."""


class GuestError(Exception):
    """A command could not be run or watched to its end; the text says why."""


class GuestGoneError(GuestError):
    """The guest ended, or its agent did."""


class GuestTimeoutError(GuestError):
    """Something in the guest did not happen in time; the text has what was seen until then."""


@dataclass(frozen=True, slots=True)
class CompletedCommand:
    """A command that ended, and everything that it wrote."""

    command: str
    status: ExitStatus
    stdout: bytes
    stderr: bytes

    @property
    def exit_status(self) -> int:
        """As a shell says it: 128 + N for signal N."""
        return self.status.shell_status

    @property
    def text(self) -> str:
        """stdout as text, bytes that are not UTF-8 kept as surrogates."""
        return self.stdout.decode("utf-8", "surrogateescape")

    @property
    def error_text(self) -> str:
        """stderr as text."""
        return self.stderr.decode("utf-8", "surrogateescape")

    def check(self) -> CompletedCommand:
        """Returns itself; GuestError with the end of both outputs when the exit status is not 0."""
        if self.exit_status != 0:
            raise GuestError(
                f"in the guest: {self.command!r} ended with {self.exit_status}\n"
                f"stdout: {self.text[-2000:]}\nstderr: {self.error_text[-2000:]}"
            )
        return self


class RunningCommand:
    """A command in the guest; made by AgentConnection.start. Every method may be called from any thread."""

    def __init__(self, connection: AgentConnection, number: int, command: str) -> None:
        self.command = command
        self._connection = connection
        self._number = number
        self._changed = threading.Condition()
        self._outputs: dict[FrameType, bytearray] = {
            FrameType.STDOUT: bytearray(),
            FrameType.STDERR: bytearray(),
        }
        self._sinks: dict[FrameType, OutputSink | None] = {FrameType.STDOUT: None, FrameType.STDERR: None}
        self._status: ExitStatus | None = None
        self._failure: GuestError | None = None
        self._stdin_credit = STDIN_WINDOW
        self._stdin_open = True
        self._stdin_order = threading.Lock()
        self._done_callbacks: list[Callable[[], None]] = []

    # -- what it wrote

    @property
    def stdout(self) -> bytes:
        """What came on stdout until now and went to no sink."""
        with self._changed:
            return bytes(self._outputs[FrameType.STDOUT])

    @property
    def stderr(self) -> bytes:
        """What came on stderr until now and went to no sink."""
        with self._changed:
            return bytes(self._outputs[FrameType.STDERR])

    def wait_for_output(
        self,
        condition: Callable[[bytes], bool] | bytes | str,
        timeout_s: float,
        stream: Literal["stdout", "stderr"] = "stdout",
    ) -> bytes:
        """Waits until `condition` holds for all that the stream had until now, or is contained in it.

        Returns the whole stream. Raises GuestTimeoutError, or GuestError when the command ended without it.
        """
        wanted = condition.encode("utf-8", "surrogateescape") if isinstance(condition, str) else condition

        def holds(output: bytes) -> bool:
            return wanted in output if isinstance(wanted, bytes) else wanted(output)

        kind = FrameType.STDOUT if stream == "stdout" else FrameType.STDERR
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                output = bytes(self._outputs[kind])
                if holds(output):
                    return output
                if self._failure is not None:
                    raise self._failure
                if self._status is not None:
                    errors = bytes(self._outputs[FrameType.STDERR])
                    raise GuestError(
                        f"{self.command!r} ended with {self._status.shell_status} before its {stream} was as "
                        f"expected; it was {output!r}, stderr {errors[-2000:]!r}"
                    )
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise GuestTimeoutError(
                        f"{stream} of {self.command!r} not as expected after {timeout_s:g} s; "
                        f"it was {output!r}"
                    )

    def wait_for_lines(self, count: int, timeout_s: float) -> list[str]:
        """Waits for at least `count` whole lines on stdout and returns all whole lines until now."""
        output = self.wait_for_output(lambda seen: seen.count(b"\n") >= count, timeout_s)
        return output[: output.rfind(b"\n") + 1].decode("utf-8", "surrogateescape").splitlines()

    # -- how it ended

    @property
    def status(self) -> ExitStatus | None:
        """How it ended, None while it runs."""
        return self._status

    def wait(self, timeout_s: float | None = None) -> CompletedCommand:
        """Waits for the end. Raises GuestTimeoutError (the command goes on), GuestGoneError, GuestError (was
        not started)."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._status is not None or self._failure is not None, timeout_s
            ):
                raise GuestTimeoutError(
                    f"{self.command!r} still runs in the guest after {timeout_s:g} s; stdout ends "
                    f"{bytes(self._outputs[FrameType.STDOUT])[-1000:]!r}, stderr ends "
                    f"{bytes(self._outputs[FrameType.STDERR])[-1000:]!r}"
                )
            if self._status is None:
                assert self._failure is not None
                raise self._failure
            return CompletedCommand(
                self.command,
                self._status,
                bytes(self._outputs[FrameType.STDOUT]),
                bytes(self._outputs[FrameType.STDERR]),
            )

    def on_done(self, callback: Callable[[], None]) -> None:
        """Has `callback` called once, on the reading thread, when the command has ended; now if it has."""
        with self._changed:
            if self._status is None and self._failure is None:
                self._done_callbacks.append(callback)
                return
        callback()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the command and its children in the guest; nothing happens when it has ended."""
        self._connection.send(encode_signal(self._number, number))

    def resize(self, rows: int, columns: int) -> None:
        """Says the size of the terminal on which the command runs."""
        self._connection.send(encode_resize(self._number, rows, columns))

    # -- what it reads

    def write_stdin(self, data: bytes) -> None:
        """Gives the command bytes to read; waits while it has not read what it got before.

        What a command leaves unread when it ends is dropped without error. Raises GuestGoneError.
        """
        with self._stdin_order:
            view = memoryview(data)
            while view:
                with self._changed:
                    self._changed.wait_for(
                        lambda: (
                            self._stdin_credit > 0 or self._status is not None or self._failure is not None
                        )
                    )
                    if self._status is not None or not self._stdin_open:
                        return
                    if self._failure is not None:
                        raise self._failure
                    size = min(len(view), self._stdin_credit, _STDIN_CHUNK)
                    self._stdin_credit -= size
                self._connection.send(encode_stdin(self._number, bytes(view[:size])))
                view = view[size:]

    def close_stdin(self) -> None:
        """Lets the command read end of file after what was written."""
        with self._changed:
            if not self._stdin_open:
                return
            self._stdin_open = False
        self._connection.send(encode_frame(Frame(FrameType.STDIN_END, self._number)))

    # -- for the connection

    def set_sinks(self, stdout: OutputSink | None, stderr: OutputSink | None) -> None:
        """Has output go to sinks instead of being kept; only before the command is started."""
        self._sinks = {FrameType.STDOUT: stdout, FrameType.STDERR: stderr}

    def receive(self, frame: Frame) -> None:
        """Takes a frame about this command; on the reading thread."""
        callbacks: list[Callable[[], None]] = []
        if frame.type in (FrameType.STDOUT, FrameType.STDERR):
            sink = self._sinks[frame.type]
            if sink is not None:
                sink(frame.payload)
                return
        with self._changed:
            if frame.type in (FrameType.STDOUT, FrameType.STDERR):
                self._outputs[frame.type] += frame.payload
            elif frame.type is FrameType.CREDIT:
                self._stdin_credit += decode_number(frame)
            elif frame.type is FrameType.EXIT:
                self._status = decode_exit(frame)
            elif frame.type is FrameType.FAILED:
                reason = frame.payload.decode("utf-8", "replace")
                self._failure = GuestError(f"{self.command!r} was not started in the guest: {reason}")
            else:
                raise ProtocolError(f"{frame.type.name} is not for a command")
            if self._status is not None or self._failure is not None:
                callbacks, self._done_callbacks = self._done_callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback()

    def abandon(self, failure: GuestError) -> None:
        """Ends the wait for a command whose guest has gone."""
        with self._changed:
            self._failure = self._failure or failure
            callbacks, self._done_callbacks = self._done_callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback()


class AgentConnection:
    """The stream to one guest's agent; `stream` is a connected socket, taken over."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._send_order = threading.Lock()
        self._commands: dict[int, RunningCommand] = {}
        self._last_number = 0
        self._gone: GuestGoneError | None = None
        self._ready = threading.Event()
        self._boots = 0
        self._booted = threading.Condition()
        self._thread = threading.Thread(target=self._read_all, name="guest-agent", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """True once the agent has spoken; False if it has not within `timeout_s`. Raises GuestGoneError."""
        self._ready.wait(timeout_s)
        if self._gone is not None:
            raise self._gone
        return self._ready.is_set()

    @property
    def boots(self) -> int:
        """How often the agent has begun to speak: once, and again after each reboot of the guest."""
        return self._boots

    def wait_rebooted(self, boots: int, timeout_s: float) -> bool:
        """True once `boots` has become more than that, and the commands of the boot before are abandoned."""
        with self._booted:
            return self._booted.wait_for(lambda: self._boots > boots or self._gone is not None, timeout_s)

    @property
    def gone(self) -> bool:
        """True when the guest has closed the stream."""
        return self._gone is not None

    def start(
        self,
        command: str,
        *,
        cwd: str,
        environment: Mapping[str, str],
        stdin: bool,
        terminal_size: tuple[int, int] | None = None,
        stdout_sink: OutputSink | None = None,
        stderr_sink: OutputSink | None = None,
    ) -> RunningCommand:
        """Starts a shell command. `terminal_size` (rows, columns) puts it on a terminal, with stdin.

        Raises GuestGoneError, or ValueError for texts that cannot be sent.
        """
        flags = StartFlag(0)
        if stdin:
            flags |= StartFlag.STDIN
        if terminal_size is not None:
            flags |= StartFlag.TTY
        rows, columns = terminal_size or (24, 80)
        with self._lock:
            self._last_number += 1
            number = self._last_number
        start = encode_start(
            number, command, cwd=cwd, environment=environment, flags=flags, rows=rows, columns=columns
        )
        running = RunningCommand(self, number, command)
        running.set_sinks(stdout_sink, stderr_sink)
        with self._lock:
            if self._gone is not None:
                raise self._gone
            self._commands[number] = running
        self.send(start)
        return running

    def power_off(self) -> None:
        """Has the guest write back and stop; returns at once."""
        self.send(encode_frame(Frame(FrameType.POWEROFF, 0)))

    def send(self, data: bytes) -> None:
        """Sends whole frames. Raises GuestGoneError."""
        try:
            with self._send_order:
                self._stream.sendall(data)
        except OSError as error:
            raise self._gone or GuestGoneError(f"the guest has ended ({error.strerror})") from error

    def close(self) -> None:
        """Ends the stream; commands that still run are abandoned."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stream.close()

    def _read_all(self) -> None:
        reason = "the guest has ended"
        try:
            for frame in self._frames():
                if frame.type is FrameType.HELLO:
                    self._check_version(frame)
                    self._begin_boot()
                    continue
                with self._lock:
                    running = self._commands.get(frame.command)
                if running is None:
                    if self._boots > 1:
                        # Of a command that a reboot cut short on our side only.
                        continue
                    raise ProtocolError(
                        f"{frame.type.name} about command {frame.command}, which does not run"
                    )
                running.receive(frame)
                if frame.type in (FrameType.EXIT, FrameType.FAILED):
                    with self._lock:
                        del self._commands[frame.command]
        except ProtocolError as error:
            reason = f"the guest's agent does not keep to its protocol: {error}"
        except OSError as error:
            reason = f"the guest has ended ({error.strerror})"
        gone = GuestGoneError(reason)
        with self._lock:
            self._gone = gone
        self._abandon_commands(gone)
        self._ready.set()
        with self._booted:
            self._booted.notify_all()

    def _begin_boot(self) -> None:
        if self._boots:
            self._abandon_commands(GuestGoneError("the guest has rebooted"))
        with self._booted:
            self._boots += 1
            self._booted.notify_all()
        self._ready.set()

    def _abandon_commands(self, failure: GuestError) -> None:
        with self._lock:
            left = list(self._commands.values())
            self._commands.clear()
        for running in left:
            running.abandon(failure)

    def _frames(self) -> Iterator[Frame]:
        decoder = FrameDecoder()
        while data := self._stream.recv(1 << 18):
            yield from decoder.feed(data)

    def _check_version(self, frame: Frame) -> None:
        version = decode_number(frame)
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"it speaks version {version}, expected {PROTOCOL_VERSION}")
