# SPDX-License-Identifier: Apache-2.0
"""The vhost-user wire as a front end (VMM) speaks it: numbers, layouts and one blocking connection.

Knows nothing of guest memory contents, rings or FUSE, and shares no code with the server on purpose.
Specification: https://qemu.readthedocs.io/en/latest/interop/vhost-user.html
"""

from __future__ import annotations

import array
import enum
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

HEADER = struct.Struct("=III")
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
VRING_ADDR = struct.Struct("=IIQQQQ")
REGION = struct.Struct("=QQQQ")
TABLE_HEAD = struct.Struct("=II")
CONFIG_HEAD = struct.Struct("=III")

VERSION = 0x1
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
NO_FD = 0x100
"""Bit of the u64 of SET_VRING_KICK/CALL/ERR: no descriptor comes with the message."""

DEFAULT_TIMEOUT_S = 60.0


class Message(enum.IntEnum):
    """Requests of the front end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class ProtocolFeature(enum.IntFlag):
    """Bits of GET/SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class Feature(enum.IntFlag):
    """Virtio feature bits that matter to a virtio-fs device behind vhost-user."""

    FS_NOTIFICATION = 1 << 0
    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


class Status(enum.IntFlag):
    """Device status bits as SET_STATUS carries them."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class BackendGoneError(ConnectionError):
    """The back end closed the vhost-user connection."""


class RingBrokenError(ConnectionError):
    """The back end reported on the error descriptor that it has stopped serving a ring."""


class ProtocolError(AssertionError):
    """The back end answered with something that the specifications do not allow."""


class MessageRefusedError(OSError):
    """The back end answered a message that asked for an acknowledgement with a non-zero value."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One message from the back end."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()


class Connection:
    """A connection to a back end's listening socket; every method blocks at most `timeout_s`."""

    def __init__(self, stream: socket.socket, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._stream = stream
        self.timeout_s = timeout_s

    @classmethod
    def open(cls, path: str | os.PathLike[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> Connection:
        """Connects; a socket that is not there, not listening, or has a full backlog is waited for."""
        deadline = time.monotonic() + timeout_s
        while True:
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            stream.settimeout(timeout_s)
            try:
                stream.connect(os.fspath(path))
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                stream.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)  # nothing to wait on: the socket's appearance is polled
            else:
                return cls(stream, timeout_s)

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends bytes as they are; BackendGoneError when the other side has closed."""
        try:
            if fds:
                sent = socket.send_fds(self._stream, [data], list(fds))
                data = data[sent:]
            if data:
                self._stream.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise BackendGoneError(str(error)) from error

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> None:
        flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0)
        self.send_raw(HEADER.pack(request, flags, len(payload)) + payload, fds)

    def _receive_exactly(self, size_bytes: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size_bytes:
            try:
                part, ancillary, _, _ = self._stream.recvmsg(size_bytes - len(data), socket.CMSG_SPACE(8 * 4))
            except ConnectionResetError as error:
                raise BackendGoneError(str(error)) from error
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
                    fds.extend(received)
            if not part:
                raise BackendGoneError(
                    f"connection closed with {len(data)} of {size_bytes} bytes of a message read"
                )
            data += part
        return data

    def receive(self) -> Reply:
        fds: list[int] = []
        request, flags, size = HEADER.unpack(self._receive_exactly(HEADER.size, fds))
        if size > 1 << 20:
            raise ProtocolError(f"reply to message {request} claims {size} bytes")
        return Reply(request, flags, self._receive_exactly(size, fds), tuple(fds))

    def query(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Sends a message that always has a reply and returns the reply's payload."""
        self.send(request, payload, fds)
        return self._expect(request).payload

    def _expect(self, request: int) -> Reply:
        reply = self.receive()
        if reply.request != request:
            raise ProtocolError(f"reply to message {reply.request} while {request} was asked")
        if reply.flags & 0x3 != VERSION or not reply.flags & FLAG_REPLY:
            raise ProtocolError(f"reply to message {request} has flags {reply.flags:#x}")
        return reply

    def query_u64(self, request: int, payload: bytes = b"") -> int:
        answer = self.query(request, payload)
        if len(answer) != 8:
            raise ProtocolError(f"reply to message {request} has {len(answer)} bytes, expected 8")
        return int(U64.unpack(answer)[0])

    def acknowledged(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends with NEED_REPLY and waits for the u64; MessageRefusedError when it is not 0."""
        self.send(request, payload, fds, need_reply=True)
        reply = self._expect(request)
        if len(reply.payload) != 8:
            raise ProtocolError(f"acknowledgement of {request} has {len(reply.payload)} bytes, expected 8")
        (value,) = U64.unpack(reply.payload)
        if value:
            raise MessageRefusedError(value & 0x7FFFFFFF, f"message {request} was refused with {value:#x}")

    def closed_by_backend(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
        """True when the back end hangs up within the time; replies that come before are thrown away."""
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._stream, select.POLLIN | select.POLLRDHUP)
        while (left_s := deadline - time.monotonic()) > 0:
            if not poller.poll(left_s * 1000):
                break
            try:
                if not self._stream.recv(4096):
                    return True
            except ConnectionResetError:
                return True
        return False
