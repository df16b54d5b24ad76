# SPDX-License-Identifier: Apache-2.0
"""A front end and a back end in memory, for tests of the vhost-user device state machine.

Owns a ledger of descriptors (plain numbers) that fails a test when one leaks or is closed twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from vhostfs.vhost_user.actions import (
    Action,
    AddRegion,
    CloseFd,
    FeaturesAcked,
    LogLine,
    MapMemory,
    QueueConfig,
    RemoveRegion,
    ResetDevice,
    SendReply,
    SetCall,
    SetErr,
    StartQueue,
    StopQueue,
)
from vhostfs.vhost_user.device import Device, DeviceOptions
from vhostfs.vhost_user.messages import (
    HEADER,
    U64,
    Empty,
    FrontEndRequest,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    VringAddress,
    VringFile,
    VringState,
    serialize,
)
from vhostfs.virtio.features import VirtioFeature

R = FrontEndRequest
F = ProtocolFeature

REGION = MemoryRegion(guest_addr=0, size_bytes=0x100000, user_addr=0x7F0000000000, mmap_offset=0)
HIGH_REGION = MemoryRegion(0x100000000, 0x100000, 0x7F1000000000, 0x100000)
MODERN = VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES


class Ledger:
    """Descriptors in the machine's hands."""

    def __init__(self) -> None:
        self._numbers = itertools.count(100)
        self.open: set[int] = set()

    def new(self, count: int) -> list[int]:
        fds = list(itertools.islice(self._numbers, count))
        self.open.update(fds)
        return fds

    def close(self, fd: int) -> None:
        assert fd in self.open, f"descriptor {fd} is closed twice, or was never given"
        self.open.remove(fd)


class ModelBackEnd:
    """Carries actions out in memory, and checks that each is one that the C core would take."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.regions: tuple[MemoryRegion, ...] = ()
        self.running: dict[int, QueueConfig] = {}
        self.log: list[Action] = []
        self.fail: Callable[[Action], int] = lambda _action: 0
        """Gives a negative errno for actions that are to fail."""
        self.next_base = 0

    def carry_out(self, action: Action) -> int:
        self.log.append(action)
        error = self.fail(action)
        match action:
            case MapMemory(regions, fds):
                assert not self.running, "memory is exchanged under a running queue"
                assert len(regions) == len(fds)
                self._lent(fds)
                self.regions = () if error else regions
            case AddRegion(region, fd):
                self._lent([fd])
                if not error:
                    self.regions += (region,)
            case RemoveRegion(region):
                assert region in self.regions
                if not error:
                    self.regions = tuple(r for r in self.regions if r != region)
                for config in self.running.values():
                    self._check_mapped(config)
            case StartQueue(config):
                assert config.index not in self.running, "started twice"
                self._lent([config.kick_fd, config.call_fd, config.err_fd])
                assert config.kick_fd >= 0
                self._check_mapped(config)
                if not error:
                    self.running[config.index] = config
            case StopQueue(index):
                assert index in self.running, "stopped, but it does not run"
                del self.running[index]
                if not error:
                    return self.next_base
            case SetCall(index, fd) | SetErr(index, fd):
                assert index in self.running
                self._lent([fd])
            case ResetDevice():
                assert not self.running
            case _:
                raise AssertionError(f"{action} is not awaited")
        return error

    def _lent(self, fds: Sequence[int]) -> None:
        assert {fd for fd in fds if fd != -1} <= self.ledger.open, "a closed descriptor is used"

    def _check_mapped(self, config: QueueConfig) -> None:
        for addr, size_bytes in (
            (config.descriptor_addr, 16 * config.size),
            (config.available_addr, 6 + 2 * config.size),
            (config.used_addr, 6 + 8 * config.size),
        ):
            assert any(r.contains_user(addr, size_bytes) for r in self.regions), "a ring is not mapped"


class Machine:
    """A device wired to the model; `send` is the front end's side."""

    def __init__(self, options: DeviceOptions | None = None) -> None:
        self.ledger = Ledger()
        self.back_end = ModelBackEnd(self.ledger)
        self.device = Device(options or DeviceOptions(max_queues=6, config=bytes(range(44))))
        self.notices: list[str] = []
        self.features_acked: list[int] = []

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> bytes:
        """Raw bytes, descriptors with the first; what is replied. Raises ProtocolError."""
        replies = b""
        while data:
            size_bytes = self.device.wanted_bytes
            self.device.receive(data[:size_bytes], fds)
            data, fds = data[size_bytes:], ()
            replies += self.run()
        return replies

    def run(self) -> bytes:
        """Carries out what the device wants; its replies."""
        replies = b""
        while (action := self.device.next_action()) is not None:
            match action:
                case SendReply(reply):
                    replies += reply
                case CloseFd(fd):
                    self.ledger.close(fd)
                case LogLine(text):
                    assert "\n" not in text
                    self.notices.append(text)
                case FeaturesAcked(features):
                    self.features_acked.append(features)
                case _:
                    self.device.action_done(self.back_end.carry_out(action))
        return replies

    def send(self, request: int, payload: Payload | None = None, *, fds: int = 0, ack: bool = False) -> bytes:
        """One message with so many new descriptors; the reply's payload."""
        flags = HeaderFlag.NEED_REPLY if ack else 0
        reply = self.feed(serialize(request, flags, payload or Empty()), self.ledger.new(fds))
        if not reply:
            return b""
        got, reply_flags, size_bytes = HEADER.unpack_from(reply)
        assert got == request
        assert reply_flags == HeaderFlag.VERSION_1 | HeaderFlag.REPLY
        assert len(reply) == HEADER.size + size_bytes
        return reply[HEADER.size :]

    def get(self, request: int) -> int:
        """A request that is answered by a 64-bit value."""
        return int.from_bytes(self.send(request), "little")

    def acknowledged(self, request: int, payload: Payload | None = None, *, fds: int = 0) -> bool:
        """Sends with NEED_REPLY; whether the acknowledgement says success."""
        reply = self.send(request, payload, fds=fds, ack=True)
        assert len(reply) == 8
        return reply == bytes(8)

    def negotiate(self, features: int = MODERN, protocol: int | None = None, *, memory: bool = True) -> None:
        """As QEMU does it, up to the memory table."""
        self.send(R.GET_FEATURES)
        offered = self.get(R.GET_PROTOCOL_FEATURES)
        self.send(R.SET_PROTOCOL_FEATURES, U64(offered if protocol is None else protocol))
        self.send(R.SET_OWNER)
        self.send(R.SET_FEATURES, U64(features))
        if memory:
            self.send(R.SET_MEM_TABLE, MemoryTable((REGION,)), fds=1)

    def set_up_ring(self, index: int, *, size: int = 8, base: int = 0, kick: bool = True) -> None:
        """NUM, BASE, ADDR, KICK and CALL, as QEMU sends them; not ENABLE."""
        at = REGION.user_addr + 0x4000 * index
        self.send(R.SET_VRING_NUM, VringState(index, size))
        self.send(R.SET_VRING_BASE, VringState(index, base))
        self.send(R.SET_VRING_ADDR, VringAddress(index, 0, at, at + 0x2000, at + 0x1000, 0))
        if kick:
            self.send(R.SET_VRING_KICK, VringFile(index, True), fds=1)
        self.send(R.SET_VRING_CALL, VringFile(index, True), fds=1)

    def enable(self, index: int, value: int = 1) -> None:
        self.send(R.SET_VRING_ENABLE, VringState(index, value))

    def get_base(self, index: int) -> int:
        got, base = (int.from_bytes(part, "little") for part in self._halves(index))
        assert got == index
        return base

    def _halves(self, index: int) -> tuple[bytes, bytes]:
        reply = self.send(R.GET_VRING_BASE, VringState(index, 0))
        return reply[:4], reply[4:]

    @property
    def running(self) -> set[int]:
        return set(self.back_end.running)

    def close(self) -> None:
        """The connection ends; every descriptor must be accounted for."""
        for fd in self.device.close():
            self.ledger.close(fd)
        assert not self.ledger.open, f"descriptors {self.ledger.open} leaked"
