# SPDX-License-Identifier: Apache-2.0
"""Asks a running server over its control socket; blocking, for commands and tests.
Must not know how anything is shown, or a server's insides.
Specification: docs/events.md, "The control socket"."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UserError
from ..share.options import CONTROL_SUFFIX
from .protocol import PROTOCOL_VERSION

HELLO_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 45.0
_MAX_ANSWER_BYTES = 1 << 22


class ControlError(UserError):
    """A server that cannot be asked; the text says what was found and what to try."""


def find_control_socket(given: str | None) -> str:
    """
    The control socket that is meant: given itself, or the one beside it when given is a vhost-user socket.

    Without given: that of the only server that runs and lets this user ask. Raises ControlError.
    """
    if given is not None:
        beside = given + CONTROL_SUFFIX
        return beside if not given.endswith(CONTROL_SUFFIX) and _is_socket(beside) else given
    found = running_servers()
    if len(found) == 1:
        return found[0]
    if not found:
        raise ControlError(
            "no running server of yours has a control socket at its default place; name the socket"
        )
    raise ControlError(f"several servers run; name one of: {', '.join(found)}")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def running_servers() -> list[str]:
    """Control sockets at their default place: PATH.ctl where something listens at PATH too."""
    try:
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return []
    # Num RefCount Protocol Flags Type St Inode Path; __SO_ACCEPTCON is 0x10000.
    columns = [line.split(maxsplit=7) for line in lines]
    listening = {words[7] for words in columns if len(words) == 8 and int(words[3], 16) & 0x10000}
    return sorted(
        path
        for path in listening
        if path.endswith(CONTROL_SUFFIX)
        and path.removesuffix(CONTROL_SUFFIX) in listening
        and _is_socket(path)
        and os.access(path, os.W_OK)
    )


class ControlClient:
    """One connection. Raises ControlError."""

    def __init__(self, path: str, *, timeout_s: float | None = None) -> None:
        """The server speaks first, so that nothing is said to a socket that is something else.

        timeout_s: for the greeting and for each answer, where the usual times are too long.
        """
        self.path = path
        self._hello_timeout_s = HELLO_TIMEOUT_S if timeout_s is None else timeout_s
        self._answer_timeout_s = ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
        self._socket = socket.socket(socket.AF_UNIX)
        self._input = bytearray()
        self._scanned_bytes = 0
        try:
            self._connect()
            hello = self._message(self._hello_timeout_s)
            if hello is None or hello.get("type") != "hello" or "control" not in hello:
                raise ControlError(f"{path} is not a control socket of vhostfs{self._hint()}")
            if hello["control"] != PROTOCOL_VERSION:
                raise ControlError(
                    f"{path}: the server speaks version {hello['control']} of the control protocol, "
                    f"this command {PROTOCOL_VERSION}; use the server's own version of vhostfs"
                )
        except BaseException:
            self._socket.close()
            raise
        self.server_version = str(hello.get("vhostfs", ""))

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def stats(self) -> dict[str, Any]:
        """Everything that is counted, as docs/events.md lays it out."""
        self._send({"command": "stats"})
        return self._answer("stats")

    def negotiated(self) -> dict[str, Any]:
        """What server, VMM and guest have agreed on, as docs/caps.md lays it out."""
        self._send({"command": "negotiated"})
        return self._answer("negotiated")

    def watch(self, fates: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Messages of type event and skipped, as they come, until the server ends."""
        self._send({"command": "watch"} | ({} if fates is None else {"fates": list(fates)}))
        self._answer("watching")
        while (message := self._message(None)) is not None:
            yield message

    def _connect(self) -> None:
        try:
            self._socket.settimeout(self._hello_timeout_s)
            self._socket.connect(self.path)
        except OSError as error:
            raise ControlError(_refusal(self.path, error)) from None

    def _hint(self) -> str:
        if _is_socket(self.path + CONTROL_SUFFIX):
            return f"; try {self.path}{CONTROL_SUFFIX}"
        return ""

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has closed; what it said before tells why
        except OSError as error:
            raise ControlError(f"{self.path}: {os.strerror(error.errno or errno.EIO)}") from None

    def _answer(self, kind: str) -> dict[str, Any]:
        message = self._message(self._answer_timeout_s)
        if message is None:
            raise ControlError(f"{self.path}: the server has ended")
        if message.get("type") == "error":
            raise ControlError(f"{self.path}: {message.get('error')}")
        if message.get("type") != kind:
            raise ControlError(f"{self.path}: expected an answer of type {kind}, got {message.get('type')}")
        return message

    def _message(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next line; None: the server has closed. timeout_s: for the whole line; None: for ever."""
        line = self._line(None if timeout_s is None else time.monotonic() + timeout_s)
        if line is None:
            return None
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise ControlError(f"{self.path} is not a control socket of vhostfs{self._hint()}")
        return message

    def _line(self, deadline_s: float | None) -> bytes | None:
        while (end := self._input.find(b"\n", self._scanned_bytes)) < 0:
            self._scanned_bytes = len(self._input)
            if len(self._input) > _MAX_ANSWER_BYTES:
                raise ControlError(f"{self.path} is not a control socket of vhostfs: endless line")
            try:
                left_s = None if deadline_s is None else max(0.001, deadline_s - time.monotonic())
                self._socket.settimeout(left_s)
                data = self._socket.recv(65536)
            except TimeoutError:
                raise ControlError(
                    f"{self.path} does not answer; it may be no control socket of vhostfs{self._hint()}"
                ) from None
            except ConnectionResetError:
                return None
            except OSError as error:
                raise ControlError(f"{self.path}: {os.strerror(error.errno or errno.EIO)}") from None
            if not data:
                return None
            self._input += data
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        self._scanned_bytes = 0
        return line


def _refusal(path: str, error: OSError) -> str:
    """Why a socket cannot be connected to, and what to try."""
    match error.errno:
        case errno.ENOENT:
            return f"{path}: there is no such socket; is the server running, and is this its control socket?"
        case errno.ECONNREFUSED if _is_socket(path):
            return f"{path}: nobody listens there any more; the server has ended"
        case errno.ECONNREFUSED | errno.ENOTSOCK:
            return f"{path} is not a socket"
        case errno.EACCES | errno.EPERM:
            return f"{path}: only the user that runs the server, and root, may connect to it"
    return f"{path}: {error.strerror or error}"
