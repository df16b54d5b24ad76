# SPDX-License-Identifier: Apache-2.0
"""Frames between launcher and guest agent over one virtio-serial port.

Must not do I/O. rootfs/agent.c is the other end; keep both in step.
Specification: this file. All integers little-endian; a frame is a 12-byte header and its payload:

    u32 length      of the payload, at most MAX_PAYLOAD
    u32 command     number of the command that the frame is about, chosen by the host, never used again; 0
    in HELLO
    u8  type        FrameType
    u8  reserved[3] 0

    START      u32 flags (StartFlag)  u16 rows  u16 columns  cwd NUL  shell text NUL  (NAME=VALUE NUL)*  NUL
    STDIN      bytes; the host may have STDIN_WINDOW bytes outstanding for which it got no CREDIT yet
    STDIN_END  nothing; end of file once what came before is read
    SIGNAL     u32 number, sent to the command's process group
    RESIZE     u16 rows  u16 columns
    POWEROFF   nothing
    HELLO      u32 version; the first frame of the guest
    STDOUT     bytes (both outputs of a command on a terminal)
    STDERR     bytes
    EXIT       u32 kind (0 exited, 1 killed by a signal)  u32 exit status or signal number; the command's
    last frame.
               Everything that the command itself wrote has been sent before; what its surviving children
               write later is not waited for.
    CREDIT     u32 bytes of STDIN that were taken
    FAILED     text; the command could not be started; its last frame
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag

PROTOCOL_VERSION = 1
PORT_NAME = "vhostfs.agent"
MAX_PAYLOAD = 192 * 1024
STDIN_WINDOW = 64 * 1024

_HEADER = struct.Struct("<IIB3x")
_START = struct.Struct("<IHH")
_RESIZE = struct.Struct("<HH")
_EXIT = struct.Struct("<II")
_U32 = struct.Struct("<I")


class FrameType(IntEnum):
    """What a frame is; below 0x40 from host to guest, above from guest to host."""

    START = 1
    STDIN = 2
    STDIN_END = 3
    SIGNAL = 4
    RESIZE = 5
    POWEROFF = 6
    HELLO = 0x41
    STDOUT = 0x42
    STDERR = 0x43
    EXIT = 0x44
    CREDIT = 0x45
    FAILED = 0x46


class StartFlag(IntFlag):
    """How a command is started."""

    TTY = 1
    STDIN = 2


class ProtocolError(Exception):
    """The other end sent something that is not a frame of this protocol."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame without its framing."""

    type: FrameType
    command: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a command ended: `code` is None when `signal` killed it, and the other way round."""

    code: int | None
    signal: int | None

    @property
    def shell_status(self) -> int:
        """As a shell says it: 128 + N for signal N."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


def encode_frame(frame: Frame) -> bytes:
    """The bytes of `frame`; ValueError when its payload is too long."""
    if len(frame.payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(frame.payload)} bytes are too long for one frame (at most {MAX_PAYLOAD})")
    return _HEADER.pack(len(frame.payload), frame.command, frame.type) + frame.payload


def encode_start(
    command: int,
    text: str,
    *,
    cwd: str,
    environment: Mapping[str, str],
    flags: StartFlag,
    rows: int = 24,
    columns: int = 80,
) -> bytes:
    """A START frame; ValueError when a string has a NUL or all together are too long."""
    strings = [cwd, text, *(f"{name}={value}" for name, value in environment.items())]
    encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
    if any(b"\0" in string for string in encoded) or not all(encoded[2:]):
        raise ValueError("a command, its folder and its environment must not contain NUL characters")
    body = b"".join(string + b"\0" for string in encoded) + b"\0"
    head = _START.pack(flags, min(rows, 0xFFFF), min(columns, 0xFFFF))
    return encode_frame(Frame(FrameType.START, command, head + body))


def encode_stdin(command: int, data: bytes) -> bytes:
    """A STDIN frame."""
    return encode_frame(Frame(FrameType.STDIN, command, data))


def encode_signal(command: int, number: int) -> bytes:
    """A SIGNAL frame."""
    return encode_frame(Frame(FrameType.SIGNAL, command, _U32.pack(number)))


def encode_resize(command: int, rows: int, columns: int) -> bytes:
    """A RESIZE frame."""
    return encode_frame(
        Frame(FrameType.RESIZE, command, _RESIZE.pack(min(rows, 0xFFFF), min(columns, 0xFFFF)))
    )


def decode_number(frame: Frame) -> int:
    """The one number of a HELLO or CREDIT frame."""
    if len(frame.payload) != _U32.size:
        raise ProtocolError(f"{frame.type.name} of {len(frame.payload)} bytes, expected {_U32.size}")
    return int(_U32.unpack(frame.payload)[0])


def decode_exit(frame: Frame) -> ExitStatus:
    """The content of an EXIT frame."""
    if len(frame.payload) != _EXIT.size:
        raise ProtocolError(f"EXIT of {len(frame.payload)} bytes, expected {_EXIT.size}")
    killed, number = _EXIT.unpack(frame.payload)
    return ExitStatus(None, number) if killed else ExitStatus(number, None)


class FrameDecoder:
    """Cuts a stream of bytes into frames; holds at most one unfinished frame."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Takes the next bytes of the stream and returns the frames that they complete.

        Raises ProtocolError at an impossible header; the stream is of no use after that.
        """
        self._buffer += data
        frames = []
        at = 0
        while len(self._buffer) - at >= _HEADER.size:
            length, command, kind = _HEADER.unpack_from(self._buffer, at)
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"frame of {length} bytes, expected at most {MAX_PAYLOAD}")
            try:
                frame_type = FrameType(kind)
            except ValueError:
                raise ProtocolError(f"frame of unknown type {kind:#x}") from None
            end = at + _HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(frame_type, command, bytes(self._buffer[at + _HEADER.size : end])))
            at = end
        del self._buffer[:at]
        return frames
