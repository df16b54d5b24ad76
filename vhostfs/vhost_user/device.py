# SPDX-License-Identifier: Apache-2.0
"""The vhost-user device state machine: bytes and descriptors in, actions out; no I/O, no clock.

Must not know sockets, asyncio, the C core or FUSE.
Specification: https://qemu-project.gitlab.io/qemu/interop/vhost-user.html

Theory. The front end's messages are served strictly one after the other. Serving one yields actions
(actions.py); some of them can fail or take time, and the machine then stands still until it is told
the result, so an acknowledgement is never sent before its action took effect:

    device.receive(data, fds)              at most device.wanted_bytes at a time
    while (action := device.next_action()) is not None:
        ... carry it out ...
        if action.is_awaited: device.action_done(result)
    ... device.close() at the end: what is left to be closed

The device itself has three states. Each message may come from the state of the table _ALLOWED on:

    NEW         --SET_OWNER-->      OWNED
    OWNED       --SET_FEATURES-->   NEGOTIATED
    NEGOTIATED  --RESET_DEVICE, SET_STATUS 0-->  OWNED

SET_OWNER begins a session, as the specification has it, so another one on the same connection begins
another: nothing of the device before it is left but the protocol features and the back end's channel,
which QEMU has renewed by then. That is how QEMU uses a connection again by device_add, after
device_del or after a device that could not be made.

Vrings run by the rule in vring.py, which is looked at again after every message: so a vring starts
at whichever message makes the last of its facts true, and a memory table that replaces the one under
running vrings pauses them for the exchange (QEMU does that whenever guest memory changes).

A message that is understood but cannot be done (mapping failed, request not offered) is refused: a
non-zero acknowledgement when one was asked for. A front end that did not ask could never know, so
then, and for everything malformed, the connection ends with a ProtocolError.

Descriptors: the machine owns each one that comes in until it hands it out by CloseFd or close();
actions only lend them.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Generator, Sequence

from ..record import Record
from ..virtio.features import DeviceStatus, VirtioFeature, flag_names
from .actions import (
    Action,
    AddRegion,
    CloseFd,
    FeaturesAcked,
    LogLine,
    MapMemory,
    QueueConfig,
    QueueRole,
    RemoveRegion,
    ResetDevice,
    SendReply,
    SetCall,
    SetErr,
    StartQueue,
    StopQueue,
)
from .messages import (
    MESSAGES,
    U64,
    ConfigAccess,
    Empty,
    FrontEndRequest,
    MemoryRegion,
    MemoryTable,
    Message,
    MessageReader,
    Payload,
    ProtocolError,
    ProtocolFeature,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
    serialize_reply,
)
from .vring import ALL_FACTS, NO_FD, Vring, VringFact

OFFERED_FEATURES = (
    VirtioFeature.VERSION_1
    | VirtioFeature.RING_INDIRECT_DESC
    | VirtioFeature.RING_EVENT_IDX
    | VirtioFeature.PROTOCOL_FEATURES
)

OFFERED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.STATUS
)
"""CONFIG is added for a device that has a configuration space."""

MAX_MEMORY_SLOTS = 509
"""Regions that may be mapped at once; KVM's own limit on x86, which other back ends give as well."""

MAX_QUEUES = 256
"""An index in SET_VRING_KICK has 8 bits."""


class DeviceState(enum.IntEnum):
    """How far the front end has come; see the module's theory."""

    NEW = 0
    OWNED = 1
    NEGOTIATED = 2


_R = FrontEndRequest

_ALLOWED: dict[DeviceState, frozenset[FrontEndRequest]] = {
    DeviceState.NEW: frozenset(
        {
            _R.GET_FEATURES,
            _R.GET_PROTOCOL_FEATURES,
            _R.SET_PROTOCOL_FEATURES,
            _R.GET_QUEUE_NUM,
            _R.GET_MAX_MEM_SLOTS,
            _R.GET_CONFIG,
            _R.GET_STATUS,
            _R.SET_BACKEND_REQ_FD,
            _R.SET_OWNER,
        }
    ),
    DeviceState.OWNED: frozenset(map(_R, MESSAGES)),
    DeviceState.NEGOTIATED: frozenset(map(_R, MESSAGES)),
}


class DeviceOptions(Record):
    """What the device offers.

    max_queues counts all of them, hiprio included; config is the configuration space ("" : CONFIG is
    not offered); notification offers VIRTIO_FS_F_NOTIFICATION. The masks take bits away from what
    would be offered.
    """

    max_queues: int
    config: bytes = b""
    notification: bool = False
    feature_mask: int = (1 << 64) - 1
    protocol_feature_mask: int = (1 << 64) - 1

    @property
    def features(self) -> int:
        """The virtio feature bits offered."""
        features = int(OFFERED_FEATURES)
        if self.notification:
            features |= VirtioFeature.FS_NOTIFICATION
        return features & self.feature_mask

    @property
    def protocol_features(self) -> int:
        """The protocol feature bits offered."""
        features = int(OFFERED_PROTOCOL_FEATURES)
        if self.config:
            features |= ProtocolFeature.CONFIG
        return features & self.protocol_feature_mask


class Negotiated(Record):
    """What both sides have agreed on so far, for people and tests."""

    state: DeviceState
    features_offered: int
    features_acked: int
    protocol_features_offered: int
    protocol_features_acked: int
    status: DeviceStatus
    queue_sizes: dict[int, int]
    """Size by index, of the queues that run."""
    regions: tuple[MemoryRegion, ...]

    def __str__(self) -> str:
        return (
            f"features {flag_names(self.features_acked, VirtioFeature)}; "
            f"protocol {flag_names(self.protocol_features_acked, ProtocolFeature)}"
        )


class RefusedError(Exception):
    """A message that is understood but cannot be done: one line for the log."""


Steps = Generator[Action, int, None]
"""Actions out; the results of awaited ones in."""


def queue_role(index: int, features_acked: int) -> QueueRole:
    """What a queue is for. Queue 1 is the notification queue only where the driver acked its feature bit."""
    if index == 0:
        return QueueRole.HIPRIO
    if index == 1 and features_acked & VirtioFeature.FS_NOTIFICATION:
        return QueueRole.NOTIFICATION
    return QueueRole.REQUEST


class Device:
    """One front end's device; see the module's theory for how it is driven."""

    def __init__(self, options: DeviceOptions) -> None:
        if not 1 <= options.max_queues <= MAX_QUEUES:
            raise ValueError(f"max_queues {options.max_queues}, expected 1 to {MAX_QUEUES}")
        self._options = options
        self._reader = MessageReader()
        self._state = DeviceState.NEW
        self._features = 0
        self._protocol_features = 0
        self._status = DeviceStatus(0)
        self._regions: tuple[MemoryRegion, ...] = ()
        self._vrings = [Vring(index) for index in range(options.max_queues)]
        self._backend_channel_fd = NO_FD
        self._message_fds: list[int] = []
        self._steps: Steps | None = None
        self._awaits_result = False
        self._result: int | None = None

    # ---- driving ------------------------------------------------------------------------------------

    @property
    def wanted_bytes(self) -> int:
        """How many bytes the next receive() takes at most."""
        return self._reader.wanted_bytes

    @property
    def is_between_messages(self) -> bool:
        """Whether the front end may leave now without cutting a message."""
        return self._reader.is_between_messages and self._steps is None

    @property
    def features_acked(self) -> int:
        """Virtio feature bits that the driver has acked; 0 before SET_FEATURES and after a reset."""
        return self._features

    @property
    def smallest_request_queue(self) -> int:
        """Size in descriptors of the smallest request queue that runs; 0: none does."""
        sizes = (
            vring.size
            for vring in self._vrings
            if vring.is_running and queue_role(vring.index, self._features) is QueueRole.REQUEST
        )
        return min(sizes, default=0)

    def is_placed(self, index: int) -> bool:
        """Whether the front end has said where in guest memory this vring lies."""
        return self._vrings[index].address is not None

    @property
    def protocol_features_acked(self) -> int:
        """vhost-user protocol features that the front end has set."""
        return self._protocol_features

    @property
    def negotiated(self) -> Negotiated:
        """A snapshot of what was agreed."""
        return Negotiated(
            self._state,
            self._options.features,
            self._features,
            self._options.protocol_features,
            self._protocol_features,
            self._status,
            {vring.index: vring.size for vring in self._vrings if vring.is_running},
            self._regions,
        )

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Takes over bytes and the descriptors that came with them.

        Only while next_action() gives None. Raises ProtocolError; close() has the descriptors then.
        """
        if self._steps is not None:
            raise RuntimeError("bytes received while a message is being served")
        message = self._reader.feed(data, fds)
        if message is not None:
            self._message_fds = list(message.fds)
            self._steps = self._serve(message)

    def next_action(self) -> Action | None:
        """The next thing to do; None when more bytes are needed. Raises ProtocolError."""
        if self._awaits_result:
            raise RuntimeError("next_action() before action_done()")
        if self._steps is None:
            return None
        try:
            result, self._result = self._result, None
            action = next(self._steps) if result is None else self._steps.send(result)
        except StopIteration:
            self._steps = None
            return None
        self._awaits_result = action.is_awaited
        return action

    def action_done(self, result: int) -> None:
        """The result of the action that was awaited: 0 or more, or a negative errno."""
        if not self._awaits_result:
            raise RuntimeError("action_done() without an action that is awaited")
        self._awaits_result = False
        self._result = result

    def device_failed(self) -> None:
        """A queue has a fault that only a reset can cure: the driver sees it in the device status."""
        self._status |= DeviceStatus.NEEDS_RESET

    def close(self) -> list[int]:
        """The connection is over: every descriptor that the machine still owns, for the caller to close."""
        self._steps = None
        self._awaits_result = False
        fds = [*self._reader.take_fds(), *self._message_fds]
        for vring in self._vrings:
            fds += vring.fds()
        if self._backend_channel_fd != NO_FD:
            fds.append(self._backend_channel_fd)
        self._message_fds = []
        self._vrings = [Vring(vring.index) for vring in self._vrings]
        self._backend_channel_fd = NO_FD
        return fds

    # ---- one message --------------------------------------------------------------------------------

    def _serve(self, message: Message) -> Steps:
        refusal: str | None = None
        try:
            spec = MESSAGES.get(message.request)
            if spec is None:
                raise RefusedError("not offered by this back end")
            if spec.needs & ~self._protocol_features:
                raise ProtocolError(f"protocol feature {spec.needs.name} was not negotiated")
            if spec.request not in _ALLOWED[self._state]:
                raise ProtocolError(f"not possible while the device is {self._state.name}")
            yield from self._dispatch(spec.request, message.payload)
            yield from self._run_vrings()
        except RefusedError as error:
            if not (message.needs_reply and self._protocol_features & ProtocolFeature.REPLY_ACK):
                raise ProtocolError(f"{message.name}: {error}") from None
            refusal = str(error)
        except ProtocolError as error:
            raise ProtocolError(f"{message.name}: {error}") from None
        while self._message_fds:
            yield CloseFd(self._message_fds.pop())
        if refusal is not None:
            yield LogLine(f"{message.name} refused: {refusal}")
        if (
            message.needs_reply
            and self._protocol_features & ProtocolFeature.REPLY_ACK
            and not (spec is not None and spec.has_reply)
        ):
            yield self._reply(message.request, U64(0 if refusal is None else 1))

    def _reply(self, request: int, payload: Payload) -> SendReply:
        return SendReply(serialize_reply(request, payload))

    def _dispatch(self, request: FrontEndRequest, payload: Payload) -> Steps:
        match request, payload:
            case _R.GET_FEATURES, _:
                yield self._reply(request, U64(self._options.features))
            case _R.SET_FEATURES, U64(value):
                yield from self._set_features(value)
            case _R.GET_PROTOCOL_FEATURES, _:
                yield self._reply(request, U64(self._options.protocol_features))
            case _R.SET_PROTOCOL_FEATURES, U64(value):
                self._set_protocol_features(value)
            case _R.SET_OWNER, _:
                if self._state is not DeviceState.NEW:
                    yield from self._begin_anew()
                self._state = DeviceState.OWNED
            case _R.RESET_OWNER, _:
                pass  # deprecated; the specification lets a back end ignore it
            case _R.GET_QUEUE_NUM, _:
                yield self._reply(request, U64(self._options.max_queues))
            case _R.GET_MAX_MEM_SLOTS, _:
                yield self._reply(request, U64(MAX_MEMORY_SLOTS))
            case _R.SET_MEM_TABLE, MemoryTable(regions):
                yield from self._set_memory(regions)
            case _R.ADD_MEM_REG, SingleRegion(region):
                yield from self._add_region(region)
            case _R.REM_MEM_REG, SingleRegion(region):
                yield from self._remove_region(region)
            case _R.SET_VRING_NUM, VringState(index, num):
                self._vring(index).set_size(num)
            case _R.SET_VRING_BASE, VringState(index, num):
                yield from self._set_vring_base(self._vring(index), num)
            case _R.GET_VRING_BASE, VringState(index, _):
                yield from self._get_vring_base(self._vring(index))
            case _R.SET_VRING_ADDR, VringAddress(index):
                self._vring(index).set_address(payload, self._regions)
            case _R.SET_VRING_ENABLE, VringState(index, num):
                if num > 1:
                    raise ProtocolError(f"value {num} for queue {index}, expected 0 or 1")
                self._vring(index).is_enabled = bool(num)
            case _R.SET_VRING_KICK, VringFile(index, has_fd):
                yield from self._set_kick(self._vring(index), has_fd)
            case _R.SET_VRING_CALL, VringFile(index, has_fd):
                yield from self._set_call(self._vring(index), has_fd)
            case _R.SET_VRING_ERR, VringFile(index, has_fd):
                yield from self._set_err(self._vring(index), has_fd)
            case _R.SET_BACKEND_REQ_FD, _:
                if self._backend_channel_fd != NO_FD:
                    yield CloseFd(self._backend_channel_fd)
                self._backend_channel_fd = self._message_fds.pop()
            case _R.GET_CONFIG, ConfigAccess():
                yield self._reply(request, self._read_config(payload))
            case _R.SET_CONFIG, _:
                raise RefusedError("the configuration space of virtio-fs cannot be written")
            case _R.GET_STATUS, _:
                yield self._reply(request, U64(self._status))
            case _R.SET_STATUS, U64(value):
                yield from self._set_status(value)
            case _R.RESET_DEVICE, _:
                yield from self._reset_vrings(keeps_base=False)
                self._status = DeviceStatus(0)
                yield ResetDevice()
            case _:
                raise AssertionError(f"{request!r} is in MESSAGES but not served")

    # ---- negotiation --------------------------------------------------------------------------------

    def _set_features(self, value: int) -> Steps:
        if extra := value & ~self._options.features:
            raise ProtocolError(f"features {flag_names(extra, VirtioFeature)} were not offered")
        if not value & VirtioFeature.VERSION_1:
            raise RefusedError("the driver did not accept version_1; legacy virtio has no file system device")
        running = [vring.index for vring in self._vrings if vring.is_running]
        if running and value != self._features:
            raise ProtocolError(f"features cannot change while queue {running[0]} runs")
        self._features = value
        self._state = DeviceState.NEGOTIATED
        if not value & VirtioFeature.PROTOCOL_FEATURES:
            for vring in self._vrings:
                vring.is_enabled = True
        yield FeaturesAcked(value)

    def _set_protocol_features(self, value: int) -> None:
        if extra := value & ~self._options.protocol_features:
            raise ProtocolError(f"protocol features {flag_names(extra, ProtocolFeature)} were not offered")
        self._protocol_features = value

    def _set_status(self, value: int) -> Steps:
        if value > 0xFF:
            raise ProtocolError(f"status {value:#x} exceeds 8 bits")
        if value == 0:
            # QEMU sends this also when a guest is merely paused and goes on afterwards, so the FUSE
            # session and the bases outlive it. A real reset is RESET_DEVICE, or a new FUSE_INIT.
            self._status = DeviceStatus(0)
            yield from self._reset_vrings(keeps_base=True)
            return
        status = DeviceStatus(value) | (self._status & DeviceStatus.NEEDS_RESET)
        if self._state < DeviceState.NEGOTIATED:
            status &= ~DeviceStatus.FEATURES_OK
        self._status = status

    def _reset_vrings(self, *, keeps_base: bool) -> Steps:
        """All stopped, disabled, nothing negotiated. Memory, call and err descriptors stay."""
        for vring in self._vrings:
            yield from self._stop(vring)
            yield from self._drop_kick(vring)
            vring.is_enabled = False
            vring.waits_for_memory = False
            if not keeps_base:
                vring.base = 0
                vring.size = 0
                vring.address = None
        self._features = 0
        self._state = DeviceState.OWNED

    def _begin_anew(self) -> Steps:
        """The front end has made another device, and has this connection go on with it."""
        yield from self._reset_vrings(keeps_base=False)
        for vring in self._vrings:
            for fd in vring.fds():
                yield CloseFd(fd)
            vring.call_fd = vring.err_fd = NO_FD
        while self._regions:
            region, self._regions = self._regions[-1], self._regions[:-1]
            result = yield RemoveRegion(region)
            if result < 0:
                raise RefusedError(f"unmapping a region failed: {_error_text(result)}")
        self._status = DeviceStatus(0)
        yield ResetDevice()
        yield LogLine("the front end begins anew on its connection, as for another device")

    def _set_vring_base(self, vring: Vring, base: int) -> Steps:
        # A ring that begins anew, not where it stopped, belongs to a driver that has begun anew: the
        # device was reset, of which a front end without RESET_DEVICE says nothing else.
        if base == 0 and vring.base and not any(other.is_running for other in self._vrings):
            yield ResetDevice()
        vring.set_base(base)

    def _read_config(self, access: ConfigAccess) -> Payload:
        end = access.offset + len(access.data)
        if end > len(self._options.config):
            return Empty()  # the specification's sign of an error
        return ConfigAccess(access.offset, access.flags, self._options.config[access.offset : end])

    # ---- memory -------------------------------------------------------------------------------------

    def _set_memory(self, regions: tuple[MemoryRegion, ...]) -> Steps:
        for vring in self._vrings:
            if vring.is_running:
                yield from self._stop(vring)
                vring.waits_for_memory = True
        self._regions = ()
        result = yield MapMemory(regions, tuple(self._message_fds))
        if result < 0:
            raise RefusedError(f"mapping {len(regions)} regions failed: {_error_text(result)}")
        self._regions = regions
        yield from self._log_waiting()

    def _add_region(self, region: MemoryRegion) -> Steps:
        if len(self._regions) >= MAX_MEMORY_SLOTS:
            raise ProtocolError(f"more than {MAX_MEMORY_SLOTS} memory regions")
        for other in self._regions:
            if region.overlaps(other):
                raise ProtocolError(
                    f"memory region at guest address {region.guest_addr:#x} overlaps {other.guest_addr:#x}"
                )
        result = yield AddRegion(region, self._message_fds[0])
        if result < 0:
            raise RefusedError(f"mapping a region failed: {_error_text(result)}")
        self._regions += (region,)

    def _remove_region(self, region: MemoryRegion) -> Steps:
        # Identified by guest address, size and user address; the mmap offset is ignored.
        key = (region.guest_addr, region.size_bytes, region.user_addr)
        mapped = next(
            (r for r in self._regions if (r.guest_addr, r.size_bytes, r.user_addr) == key),
            None,
        )
        if mapped is None:
            raise RefusedError(f"no region is mapped at guest address {region.guest_addr:#x}")
        remaining = tuple(r for r in self._regions if r is not mapped)
        for vring in self._vrings:
            if vring.is_running and not vring.is_mapped(remaining):
                yield from self._stop(vring)
                vring.waits_for_memory = True
        self._regions = remaining
        result = yield RemoveRegion(mapped)
        if result < 0:
            raise RefusedError(f"unmapping a region failed: {_error_text(result)}")
        yield from self._log_waiting()

    def _log_waiting(self) -> Steps:
        for vring in self._vrings:
            if vring.waits_for_memory and not vring.is_mapped(self._regions):
                yield LogLine(f"queue {vring.index} waits: its rings are in no memory region now")

    # ---- vrings -------------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"queue {index}, but there are {len(self._vrings)}")
        return self._vrings[index]

    def _facts(self, vring: Vring) -> VringFact:
        return vring.facts(self._regions, is_negotiated=self._state == DeviceState.NEGOTIATED)

    def _run_vrings(self) -> Steps:
        """Starts and stops vrings until what runs is what the rule of vring.py says."""
        for vring in self._vrings:
            if vring.is_running:
                if self._facts(vring) != ALL_FACTS:
                    yield from self._stop(vring)
                continue
            facts = self._facts(vring)
            if facts == ALL_FACTS:
                yield from self._start(vring)
            elif facts == ALL_FACTS & ~VringFact.MAPPED and not vring.waits_for_memory:
                yield from self._drop_kick(vring)
                raise RefusedError(f"queue {vring.index} cannot start: it is in no memory region")

    def _start(self, vring: Vring) -> Steps:
        assert vring.address is not None
        result = yield StartQueue(
            QueueConfig(
                index=vring.index,
                role=queue_role(vring.index, self._features),
                size=vring.size,
                base=vring.base,
                descriptor_addr=vring.address.descriptor,
                available_addr=vring.address.available,
                used_addr=vring.address.used,
                kick_fd=vring.kick_fd,
                call_fd=vring.call_fd,
                err_fd=vring.err_fd,
                event_idx=bool(self._features & VirtioFeature.RING_EVENT_IDX),
                indirect=bool(self._features & VirtioFeature.RING_INDIRECT_DESC),
            )
        )
        if result < 0:
            yield from self._drop_kick(vring)  # or every later message would try again
            raise RefusedError(f"queue {vring.index} cannot start: {_error_text(result)}")
        vring.is_running = True
        vring.waits_for_memory = False

    def _stop(self, vring: Vring) -> Steps:
        if not vring.is_running:
            return
        vring.is_running = False
        result = yield StopQueue(vring.index)
        if result < 0:
            yield LogLine(f"queue {vring.index} did not stop in order: {_error_text(result)}")
        else:
            vring.base = result & 0xFFFF

    def _get_vring_base(self, vring: Vring) -> Steps:
        yield from self._stop(vring)
        vring.waits_for_memory = False
        yield from self._drop_kick(vring)
        yield self._reply(_R.GET_VRING_BASE, VringState(vring.index, vring.base))

    def _drop_kick(self, vring: Vring) -> Steps:
        fd, vring.kick_fd = vring.kick_fd, NO_FD
        if fd != NO_FD:
            yield CloseFd(fd)

    def _take_fd(self, has_fd: bool) -> int:
        return self._message_fds.pop() if has_fd else NO_FD

    def _set_kick(self, vring: Vring, has_fd: bool) -> Steps:
        if not has_fd:
            raise RefusedError(f"queue {vring.index} has no kick descriptor; polled rings are not served")
        yield from self._stop(vring)
        yield from self._drop_kick(vring)
        vring.kick_fd = self._take_fd(has_fd)

    def _set_call(self, vring: Vring, has_fd: bool) -> Steps:
        old, vring.call_fd = vring.call_fd, self._take_fd(has_fd)
        result = (yield SetCall(vring.index, vring.call_fd)) if vring.is_running else 0
        if old != NO_FD:
            yield CloseFd(old)
        if result < 0:
            raise RefusedError(f"call descriptor of queue {vring.index}: {_error_text(result)}")

    def _set_err(self, vring: Vring, has_fd: bool) -> Steps:
        old, vring.err_fd = vring.err_fd, self._take_fd(has_fd)
        result = (yield SetErr(vring.index, vring.err_fd)) if vring.is_running else 0
        if old != NO_FD:
            yield CloseFd(old)
        if result < 0:
            raise RefusedError(f"err descriptor of queue {vring.index}: {_error_text(result)}")


def _error_text(result: int) -> str:
    return f"{os.strerror(-result)} ({errno.errorcode.get(-result, -result)})"
