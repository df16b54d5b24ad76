# SPDX-License-Identifier: Apache-2.0
"""FUSE over virtqueues: lays requests out as a guest does, keeps several in flight, checks every reply.

Knows nothing of what the operations mean. One thread a queue; its requests may be waited for in any order.
Specification: virtio 1.2, section 5.11.6, and fs/fuse/virtio_fs.c of Linux for the usual framing.
"""

from __future__ import annotations

import errno as errno_names
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend.fuse_abi import InitFlag, InitReply, Opcode
from vhostfs.frontend.memory import GuestBuffer
from vhostfs.frontend.operations import Call, SecurityContext
from vhostfs.frontend.ring import Segment, Used, Virtqueue
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S, ProtocolError
from vhostfs.frontend.vmm import Vmm

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the guest's kernel says it in the header. `groups`: sent where the server wants them."""

    uid: int = 0
    gid: int = 0
    pid: int = 4242
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Framing:
    """How a request is cut into descriptors. virtio lets a driver cut anywhere; Linux cuts by argument.

    `data_bytes` is the size of bulk data segments; `every_bytes`, when set, cuts everything, headers
    too, into pieces of that size.
    """

    data_bytes: int = 65536
    every_bytes: int | None = None


ROOT_USER = Caller()
LINUX_FRAMING = Framing()


class FuseError(OSError):
    """An errno that the server answered with."""

    def __init__(self, number: int, call: str) -> None:
        super().__init__(number, f"{os.strerror(number)} ({call})")

    def __str__(self) -> str:
        return f"{errno_names.errorcode.get(self.errno or 0, self.errno)}: {self.strerror}"


def describe(opcode: int) -> str:
    return Opcode(opcode).name if opcode in Opcode.__members__.values() else f"opcode {opcode}"


@dataclass(slots=True)
class Pending(Generic[T]):
    """A request in flight."""

    session: Session
    call: Call[T]
    unique: int
    queue: Virtqueue
    readable: list[GuestBuffer]
    writable: list[GuestBuffer]
    head: int = -1
    used: Used | None = None
    _raw: bytes = field(default=b"")

    @property
    def done(self) -> bool:
        """True once the server has answered; never waits."""
        self.session.reap(self.queue)
        return self.used is not None

    def wait(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> T:
        """The reply; raises FuseError, TimeoutError, BackendGoneError, or ProtocolError for a bad reply."""
        data = self.payload(timeout_s)
        try:
            return self.call.decode(data)
        except (struct.error, ValueError, TypeError) as error:
            name = describe(self.call.opcode)
            raise ProtocolError(f"{name}: a reply of {len(data)} bytes cannot be read: {error}") from error

    def payload(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> bytes:
        """What followed the reply's header."""
        self.session.wait_for(self, timeout_s)
        assert self.used is not None
        return self._check(self.used.length_bytes)

    @property
    def request_bytes(self) -> bytes:
        """The request as it lies in guest memory; only while it is in flight."""
        return b"".join(buffer.bytes() for buffer in self.readable)

    @property
    def reply_bytes(self) -> bytes:
        """The reply as the device wrote it, header and all; empty while it is in flight."""
        return self._raw

    def take(self, used: Used) -> None:
        """The chain came back: copies the reply out and frees the guest memory."""
        self.used = used
        if used.length_bytes > sum(map(len, self.writable)):
            raise ProtocolError(
                f"{describe(self.call.opcode)}: used length {used.length_bytes} is beyond the room for it"
            )
        parts, left = [], used.length_bytes
        for buffer in self.writable:
            parts.append(buffer.bytes(min(left, len(buffer))))
            left -= len(parts[-1])
        self._raw = b"".join(parts)
        for buffer in (*self.readable, *self.writable):
            self.session.vmm.memory.release(buffer)

    def _check(self, length: int) -> bytes:
        name = describe(self.call.opcode)
        if not self.call.has_reply:
            if length:
                raise ProtocolError(f"{name}: {length} bytes were written where no reply is wanted")
            return b""
        if length < abi.OUT_HEADER.size:
            raise ProtocolError(f"{name}: reply of {length} bytes is shorter than its header")
        size, error, unique = abi.OUT_HEADER.unpack_from(self._raw)
        if size != length:
            raise ProtocolError(f"{name}: header says {size} bytes, used ring says {length}")
        if unique != self.unique:
            raise ProtocolError(f"{name}: reply to request {unique}, expected {self.unique}")
        if error > 0 or error <= -1000:
            raise ProtocolError(f"{name}: error field {error} is no errno")
        if error and size != abi.OUT_HEADER.size:
            raise ProtocolError(f"{name}: error {error} with {size - 16} bytes of payload")
        if error:
            raise FuseError(-error, f"{name} on node {self.call.nodeid}")
        return self._raw[abi.OUT_HEADER.size :]


class Session:
    """The guest's FUSE connection over a running device."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.framing = LINUX_FRAMING
        self.negotiated: InitReply | None = None
        self.asked = InitFlag(0)
        self._next_unique = 2
        self._in_flight: dict[tuple[int, int], Pending[Any]] = {}

    @property
    def flags(self) -> InitFlag:
        """INIT flags in force: offered and granted."""
        return self.negotiated.flags & self.asked if self.negotiated else InitFlag(0)

    def unique(self) -> int:
        self._next_unique += 2
        return self._next_unique

    # ---- sending ---------------------------------------------------------------------------------------

    def extensions(self, call: Call[Any], caller: Caller) -> tuple[bytes, int]:
        """What follows the arguments of a creation, and header.total_extlen in 8-byte units."""
        if not call.creates:
            return b"", 0
        data = b""
        if self.flags & InitFlag.SECURITY_CTX:
            data += pack_security(call.security)
        if caller.groups and self.flags & InitFlag.CREATE_SUPP_GROUP:
            data += pack_groups(caller.groups)
        # Before 7.38 the field was padding and only the security context could follow.
        minor = self.negotiated.minor if self.negotiated else 0
        return data, len(data) // 8 if minor >= 38 else 0

    def submit(
        self,
        call: Call[T],
        caller: Caller = ROOT_USER,
        *,
        queue: Virtqueue | None = None,
        publish: bool = True,
        direct: bool = False,
    ) -> Pending[T]:
        """Sends a request; forgets and interrupts go to the hiprio queue as in Linux."""
        if queue is None:
            queue = self.vmm.hiprio if not call.has_reply else self.vmm.request_queue()
        extension, units = self.extensions(call, caller)
        args = call.args + extension
        payload_bytes = sum(map(len, call.payload))
        unique = self.unique()
        header = abi.IN_HEADER.pack(
            abi.IN_HEADER.size + len(args) + payload_bytes,
            call.opcode,
            unique,
            call.nodeid,
            caller.uid,
            caller.gid,
            caller.pid,
            units,
            0,
        )
        if call.has_reply:
            readable = [header, args, *self._cut(call.payload)]
            writable = [abi.OUT_HEADER.size, call.reply_room]
            left = call.data_room
            while left > 0:
                writable.append(min(left, self.framing.data_bytes))
                left -= writable[-1]
        else:
            readable, writable = [header + args], []
        if self.framing.every_bytes:
            readable = cut_bytes(b"".join(readable), self.framing.every_bytes)
            writable = cut_size(sum(writable), self.framing.every_bytes)
        return self.submit_raw(call, unique, readable, writable, queue, publish=publish, direct=direct)

    def _cut(self, payload: Sequence[bytes | memoryview]) -> list[bytes]:
        return [part for data in payload for part in cut_bytes(bytes(data), self.framing.data_bytes)]

    def submit_raw(
        self,
        call: Call[T],
        unique: int,
        readable: Sequence[bytes],
        writable: Sequence[int],
        queue: Virtqueue,
        *,
        publish: bool = True,
        direct: bool = False,
    ) -> Pending[T]:
        """Sends these very bytes with these very rooms, one descriptor each (empty ones are left out)."""
        memory = self.vmm.memory
        inputs, outputs, segments = [], [], []
        for data in readable:
            if data:
                buffer = memory.allocate(len(data))
                buffer.view[:] = data
                inputs.append(buffer)
                segments.append(Segment(buffer.guest_addr, len(data)))
        for size in writable:
            if size:
                buffer = memory.allocate(size)
                outputs.append(buffer)
                segments.append(Segment(buffer.guest_addr, size, writable=True))
        pending = Pending(self, call, unique, queue, inputs, outputs)
        pending.head = queue.add(segments, direct=direct)
        self._in_flight[id(queue), pending.head] = pending
        if publish:
            queue.publish(pending.head)
        return pending

    # ---- completion ------------------------------------------------------------------------------------

    def _deliver(self, queue: Virtqueue, used: Used) -> None:
        self._in_flight.pop((id(queue), used.head)).take(used)

    def reap(self, queue: Virtqueue) -> None:
        while (used := queue.pop_used()) is not None:
            self._deliver(queue, used)

    def wait_for(self, pending: Pending[Any], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while pending.used is None:
            left_s = deadline - time.monotonic()
            try:
                used = pending.queue.wait_used(self.vmm.connection.fileno(), max(0.0, left_s))
            except TimeoutError:
                raise TimeoutError(
                    f"no reply to {describe(pending.call.opcode)} of {pending.call.nodeid} in {timeout_s} s"
                ) from None
            self._deliver(pending.queue, used)

    def call(self, call: Call[T], caller: Caller = ROOT_USER, *, queue: Virtqueue | None = None) -> T:
        return self.submit(call, caller, queue=queue).wait(self.vmm.machine.timeout_s)

    def use(self, framing: Framing) -> None:
        self.framing = framing

    def initialised(self, call: Call[InitReply], asked: int) -> InitReply:
        """Sends INIT and keeps what came of it."""
        self.negotiated = None
        reply = self.call(call)
        self.asked = InitFlag(asked)
        self.negotiated = replace(reply, minor=min(reply.minor, abi.MINOR))
        return reply


def cut_bytes(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def cut_size(total: int, size: int) -> list[int]:
    return [min(size, total - i) for i in range(0, total, size)]


def pad8(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def pack_groups(groups: Sequence[int]) -> bytes:
    """struct fuse_ext_header and struct fuse_supp_groups."""
    body = struct.pack(f"<I{len(groups)}I", len(groups), *groups)
    padded = pad8(bytes(8) + body)
    return struct.pack("<II", len(padded), abi.EXT_GROUPS) + padded[8:]


def pack_security(context: SecurityContext | None) -> bytes:
    """struct fuse_secctx_header and at most one struct fuse_secctx."""
    if context is None:
        return struct.pack("<II", 8, 0)
    body = struct.pack("<II", len(context.value), 0) + context.name + b"\0" + context.value
    padded = pad8(bytes(8) + body)
    return struct.pack("<II", len(padded), 1) + padded[8:]
