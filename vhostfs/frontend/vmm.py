# SPDX-License-Identifier: Apache-2.0
"""Plays QEMU: vhost-user handshake, guest memory and queues of one virtio-fs device, start, stop and reset.

Knows nothing of FUSE. The order of messages is that of QEMU 11.1, and of 7.2 where features are missing.
Specification: https://qemu.readthedocs.io/en/latest/interop/vhost-user.html and virtio 1.2, section 5.11.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from vhostfs.frontend.memory import GuestMemory, Region, spread_addresses
from vhostfs.frontend.ring import Virtqueue
from vhostfs.frontend.vhost_user import (
    CONFIG_HEAD,
    DEFAULT_TIMEOUT_S,
    NO_FD,
    REGION,
    TABLE_HEAD,
    U64,
    VRING_ADDR,
    VRING_STATE,
    Connection,
    Feature,
    Message,
    ProtocolError,
    ProtocolFeature,
    Status,
)

CONFIG = struct.Struct("<36sI")
NOTIFY_CONFIG = struct.Struct("<36sII")

ALL_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.STATUS
)
GUEST_FEATURES = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the played VMM and guest driver are able to do; what is negotiated is the common part."""

    features: Feature = GUEST_FEATURES
    protocol_features: ProtocolFeature = ALL_PROTOCOL_FEATURES
    queue_size: int = 128
    hiprio_queue_size: int | None = None
    notification_queue_size: int | None = None
    request_queues: int = 1
    guest_addrs: tuple[int, ...] = (0,)
    region_bytes: int = 64 << 20
    timeout_s: float = DEFAULT_TIMEOUT_S

    def with_notifications(self, queue_size: int | None = None) -> Machine:
        """The same machine whose driver and VMM know the notification queue."""
        size = queue_size or self.notification_queue_size
        return replace(self, features=self.features | Feature.FS_NOTIFICATION, notification_queue_size=size)

    def with_regions(self, count: int) -> Machine:
        """The same machine with its memory in several places."""
        size = (self.region_bytes // count) & ~0xFFFF
        return replace(self, guest_addrs=spread_addresses(count, size), region_bytes=size)


@dataclass(frozen=True, slots=True)
class FsConfig:
    """The configuration space of a virtio-fs device."""

    tag: bytes
    num_request_queues: int
    notify_buf_size: int | None


class Vmm:
    """One connection to a back end and the device behind it. Make with `Vmm.connect`."""

    def __init__(self, connection: Connection, machine: Machine) -> None:
        self.connection = connection
        self.machine = machine
        self.memory = GuestMemory(machine.guest_addrs, machine.region_bytes)
        self.offered = Feature(0)
        self.features = Feature(0)
        self.offered_protocol = ProtocolFeature(0)
        self.protocol = ProtocolFeature(0)
        self.queue_limit = 1
        self.queues: dict[int, Virtqueue] = {}
        self.running = False
        self._added: list[Region] = []
        self.backend_requests: socket.socket | None = None

    @classmethod
    def connect(cls, path: str | os.PathLike[str], machine: Machine | None = None) -> Vmm:
        """Connects and negotiates vhost-user features; no queue runs yet."""
        machine = machine or Machine()
        connection = Connection.open(path, machine.timeout_s)
        try:
            vmm = cls(connection, machine)
            vmm.negotiate()
        except BaseException:
            connection.close()
            raise
        return vmm

    @classmethod
    def boot(cls, path: str | os.PathLike[str], machine: Machine | None = None) -> Vmm:
        """Connects and goes on to DRIVER_OK: all queues run."""
        vmm = cls.connect(path, machine)
        try:
            vmm.start()
        except BaseException:
            vmm.close()
            raise
        return vmm

    def __enter__(self) -> Vmm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up, as a VMM that ends does, and frees the guest's memory."""
        self.connection.close()
        if self.backend_requests is not None:
            self.backend_requests.close()
        for queue in self.queues.values():
            queue.close()
        self.queues.clear()
        self.memory.close()

    # ---- negotiation -----------------------------------------------------------------------------------

    def negotiate(self) -> None:
        link = self.connection
        self.offered = Feature(link.query_u64(Message.GET_FEATURES))
        if self.offered & Feature.PROTOCOL_FEATURES:
            self.offered_protocol = ProtocolFeature(link.query_u64(Message.GET_PROTOCOL_FEATURES))
            self.protocol = self.offered_protocol & self.machine.protocol_features
            link.send(Message.SET_PROTOCOL_FEATURES, U64.pack(self.protocol))
        if self.protocol & ProtocolFeature.MQ:
            self.queue_limit = link.query_u64(Message.GET_QUEUE_NUM)
        if self.protocol & ProtocolFeature.BACKEND_REQ:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self.backend_requests = ours
            self.tell(Message.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            theirs.close()
        self.tell(Message.SET_OWNER)

    def negotiate_again(self) -> None:
        """As another device that is made on the same connection: nothing is known of the one before."""
        if self.backend_requests is not None:
            self.backend_requests.close()
            self.backend_requests = None
        self._added.clear()
        for queue in self.queues.values():
            queue.close()
        self.queues.clear()
        self.running = False
        self.protocol = ProtocolFeature(0)
        self.negotiate()

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends a message that has no reply of its own; waits for the acknowledgement where negotiated."""
        if self.protocol & ProtocolFeature.REPLY_ACK:
            self.connection.acknowledged(request, payload, fds)
        else:
            self.connection.send(request, payload, fds)

    def config_bytes(self, offset: int, size_bytes: int) -> bytes:
        """GET_CONFIG; empty when the back end has nothing there."""
        answer = self.connection.query(
            Message.GET_CONFIG, CONFIG_HEAD.pack(offset, size_bytes, 0) + bytes(size_bytes)
        )
        if not answer:
            return b""
        seen_offset, seen_size, _ = CONFIG_HEAD.unpack_from(answer)
        if (seen_offset, seen_size) != (offset, size_bytes) or len(answer) != CONFIG_HEAD.size + size_bytes:
            raise ProtocolError(
                f"GET_CONFIG({offset}, {size_bytes}) answered ({seen_offset}, {seen_size}),"
                f" {len(answer)} bytes"
            )
        return answer[CONFIG_HEAD.size :]

    def config(self) -> FsConfig:
        if self.offered & Feature.FS_NOTIFICATION:
            tag, queues, size = NOTIFY_CONFIG.unpack(self.config_bytes(0, NOTIFY_CONFIG.size))
            return FsConfig(tag.rstrip(b"\0"), queues, size)
        tag, queues = CONFIG.unpack(self.config_bytes(0, CONFIG.size))
        return FsConfig(tag.rstrip(b"\0"), queues, None)

    # ---- roles -----------------------------------------------------------------------------------------

    @property
    def has_notification_queue(self) -> bool:
        return bool(self.features & Feature.FS_NOTIFICATION)

    @property
    def first_request_queue(self) -> int:
        return 2 if self.has_notification_queue else 1

    @property
    def request_queue_indices(self) -> range:
        return range(self.first_request_queue, self.first_request_queue + self.machine.request_queues)

    @property
    def hiprio(self) -> Virtqueue:
        return self.queues[0]

    @property
    def notification_queue(self) -> Virtqueue:
        if not self.has_notification_queue:
            raise LookupError("VIRTIO_FS_F_NOTIFICATION was not negotiated")
        return self.queues[1]

    def request_queue(self, number: int = 0) -> Virtqueue:
        return self.queues[self.first_request_queue + number]

    # ---- start and stop --------------------------------------------------------------------------------

    def start(self, bases: dict[int, int] | None = None) -> None:
        """The messages of DRIVER_OK. `bases`: next available index by queue, from an earlier `stop`."""
        wanted = self.machine.features | Feature.PROTOCOL_FEATURES
        self.set_features(self.offered & wanted)
        self.set_memory()
        indices = range(self.first_request_queue + self.machine.request_queues)
        for index in indices:
            if index not in self.queues:
                self.queues[index] = self.make_queue(index)
            self.set_queue(index, self.queues[index], (bases or {}).get(index, 0))
        if self.features & Feature.PROTOCOL_FEATURES:
            for index in indices:
                self.enable_queue(index)
        if self.protocol & ProtocolFeature.STATUS:
            self.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
        self.running = True

    def set_features(self, features: Feature) -> None:
        self.features = features
        self.tell(Message.SET_FEATURES, U64.pack(features))

    def make_queue(self, index: int, size: int | None = None) -> Virtqueue:
        default = self.machine.queue_size
        if index == 0 and self.machine.hiprio_queue_size is not None:
            default = self.machine.hiprio_queue_size
        if index == 1 and self.has_notification_queue:
            default = self.machine.notification_queue_size or default
        return Virtqueue(
            self.memory,
            size or default,
            event_idx=bool(self.features & Feature.EVENT_IDX),
            indirect=bool(self.features & Feature.INDIRECT_DESC),
        )

    def set_memory(self) -> None:
        """All regions: those not told yet one by one where memory slots are negotiated, else a table."""
        if self.protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            slots = self.connection.query_u64(Message.GET_MAX_MEM_SLOTS)
            if slots < len(self.memory.regions):
                raise ProtocolError(f"the back end has {slots} memory slots")
            for region in self.memory.regions:
                if region not in self._added:
                    self.add_region(region)
            return
        table = TABLE_HEAD.pack(len(self.memory.regions), 0) + b"".join(map(pack_region, self.memory.regions))
        self.tell(Message.SET_MEM_TABLE, table, [region.fd for region in self.memory.regions])

    def add_region(self, region: Region) -> None:
        self.tell(Message.ADD_MEM_REG, U64.pack(0) + pack_region(region), [region.fd])
        self._added.append(region)

    def remove_region(self, region: Region) -> None:
        self.tell(Message.REM_MEM_REG, U64.pack(0) + pack_region(region))
        self._added.remove(region)

    def plug_memory(self, guest_addr: int, size_bytes: int) -> Region:
        """Memory hot plug by ADD_MEM_REG while the device runs."""
        region = self.memory.plug(guest_addr, size_bytes)
        self.add_region(region)
        return region

    def set_queue(self, index: int, queue: Virtqueue, base: int = 0) -> None:
        self.tell(Message.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
        self.tell(Message.SET_VRING_BASE, VRING_STATE.pack(index, base))
        self.tell(Message.SET_VRING_ADDR, self.ring_addresses(index, queue))
        self.set_eventfd(Message.SET_VRING_ERR, index, queue.err_fd)
        self.set_eventfd(Message.SET_VRING_KICK, index, queue.kick_fd)
        self.set_eventfd(Message.SET_VRING_CALL, index, queue.call_fd)

    def ring_addresses(self, index: int, queue: Virtqueue) -> bytes:
        user = self.memory.user_addr
        table, used, available = (
            user(part.guest_addr) for part in (queue.table, queue.used, queue.available)
        )
        return VRING_ADDR.pack(index, 0, table, used, available, 0)

    def set_eventfd(self, request: Message, index: int, fd: int | None) -> None:
        if fd is None:
            self.tell(request, U64.pack(index | NO_FD))
        else:
            self.tell(request, U64.pack(index), [fd])

    def enable_queue(self, index: int, *, on: bool = True) -> None:
        self.tell(Message.SET_VRING_ENABLE, VRING_STATE.pack(index, int(on)))

    def stop_queue(self, index: int) -> int:
        """GET_VRING_BASE: the back end finishes what it has begun and says where it stopped."""
        answer = self.connection.query(Message.GET_VRING_BASE, VRING_STATE.pack(index, 0))
        seen, base = VRING_STATE.unpack(answer)
        if seen != index:
            raise ProtocolError(f"GET_VRING_BASE of queue {index} answered for queue {seen}")
        return int(base)

    def stop(self) -> dict[int, int]:
        """As at guest shutdown or pause; returns the next available index of every queue."""
        if self.features & Feature.PROTOCOL_FEATURES:
            for index in self.queues:
                self.enable_queue(index, on=False)
        bases = {index: self.stop_queue(index) for index in self.queues}
        self.running = False
        return bases

    def set_status(self, status: Status) -> None:
        self.tell(Message.SET_STATUS, U64.pack(status))

    def status(self) -> Status:
        return Status(self.connection.query_u64(Message.GET_STATUS))

    def reset(self) -> None:
        """A guest's reboot: rings stop, the device is reset, the driver finds empty queues."""
        self.stop()
        if self.protocol & ProtocolFeature.RESET_DEVICE:
            self.tell(Message.RESET_DEVICE)
        if self.protocol & ProtocolFeature.STATUS:
            self.set_status(Status(0))
        for queue in self.queues.values():
            queue.reset()


def pack_region(region: Region) -> bytes:
    return REGION.pack(region.guest_addr, region.size_bytes, region.user_addr, region.mmap_offset)
