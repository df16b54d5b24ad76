# SPDX-License-Identifier: Apache-2.0
"""vhost-user messages on the wire: every one declared once, with its layout, descriptors and validity check.

Must not know the device's state, sockets or the C core.
Specification: https://qemu-project.gitlab.io/qemu/interop/vhost-user.html
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence

from ..record import Record


class ProtocolError(Exception):
    """The front end broke the protocol: one line for the log; the connection ends."""


class FrontEndRequest(enum.IntEnum):
    """Requests that a front end sends (specification, "Front-end message types")."""

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
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

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


NO_FEATURE = ProtocolFeature(0)


class HeaderFlag(enum.IntFlag):
    """The flags word of a header; its two low bits are the version, always 1."""

    VERSION_1 = 0x1
    REPLY = 0x4
    NEED_REPLY = 0x8


VERSION_MASK = 0x3

HEADER = struct.Struct("<III")
"""request, flags, size of the payload in bytes; little-endian on every host that we run on."""

MAX_PAYLOAD_BYTES = 4096
"""More than any message that is specified needs; a larger size ends the connection."""

MAX_TABLE_REGIONS = 8
"""Regions in one SET_MEM_TABLE, by the specification."""

MAX_MESSAGE_FDS = MAX_TABLE_REGIONS
MAX_CONFIG_BYTES = 256
"""Largest configuration space access, by the specification."""

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 0x100
"""SET_VRING_KICK, CALL and ERR: the bit that says that no descriptor comes along."""

_U64_LIMIT = 1 << 64


class Header(Record):
    """One message's first 12 bytes."""

    request: int
    flags: int
    size_bytes: int


class Empty(Record):
    """No payload."""


class U64(Record):
    """A single 64-bit value."""

    value: int


class VringState(Record):
    """A vring's index and one number: its size, base, or whether it is enabled."""

    index: int
    num: int


class VringAddress(Record):
    """Where a vring lies, in the front end's own addresses."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int


class VringFile(Record):
    """A vring whose eventfd comes along, unless has_fd is False."""

    index: int
    has_fd: bool


class MemoryRegion(Record):
    """One region of guest memory: guest physical address, front end's address, offset in its descriptor."""

    guest_addr: int
    size_bytes: int
    user_addr: int
    mmap_offset: int

    def contains_user(self, addr: int, size_bytes: int) -> bool:
        """Whether [addr, addr + size_bytes) of the front end's addresses lies inside."""
        return self.user_addr <= addr and addr + size_bytes <= self.user_addr + self.size_bytes

    def overlaps(self, other: MemoryRegion) -> bool:
        """Whether both share a guest address or a front-end address."""
        return (
            self.guest_addr < other.guest_addr + other.size_bytes
            and other.guest_addr < self.guest_addr + self.size_bytes
        ) or (
            self.user_addr < other.user_addr + other.size_bytes
            and other.user_addr < self.user_addr + self.size_bytes
        )


class MemoryTable(Record):
    """All regions of guest memory at once."""

    regions: tuple[MemoryRegion, ...]


class SingleRegion(Record):
    """One region to add or to remove."""

    region: MemoryRegion


class ConfigAccess(Record):
    """A part of the configuration space; data has the length that was asked for."""

    offset: int
    flags: int
    data: bytes


class Unparsed(Record):
    """The payload of a message that this back end does not serve."""

    data: bytes


Payload = (
    Empty | U64 | VringState | VringAddress | VringFile | MemoryTable | SingleRegion | ConfigAccess | Unparsed
)


class Message(Record):
    """A whole message: its request number, header flags, payload, and the descriptors that came along."""

    request: int
    flags: int
    payload: Payload
    fds: tuple[int, ...] = ()

    @property
    def needs_reply(self) -> bool:
        """Whether the front end asked for an acknowledgement (which holds only with REPLY_ACK)."""
        return bool(self.flags & HeaderFlag.NEED_REPLY)

    @property
    def name(self) -> str:
        """The request's name in the specification, or its number."""
        return request_name(self.request)


# ---- layouts --------------------------------------------------------------------------------------------

_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESS = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_TABLE_HEAD = struct.Struct("<II")
_SINGLE_HEAD = struct.Struct("<Q")
_CONFIG_HEAD = struct.Struct("<III")


def _exact(data: bytes, size_bytes: int) -> bytes:
    if len(data) != size_bytes:
        raise ProtocolError(f"payload of {len(data)} bytes, expected {size_bytes}")
    return data


def _check_region(region: MemoryRegion) -> MemoryRegion:
    if region.size_bytes == 0:
        raise ProtocolError(f"memory region at guest address {region.guest_addr:#x} is empty")
    for what, start in (
        ("guest address", region.guest_addr),
        ("user address", region.user_addr),
        ("mmap offset", region.mmap_offset),
    ):
        if start + region.size_bytes > _U64_LIMIT:
            raise ProtocolError(
                f"memory region: {what} {start:#x} and size {region.size_bytes:#x} exceed 64 bits"
            )
    return region


def check_disjoint(regions: Sequence[MemoryRegion]) -> None:
    """Raises ProtocolError when two regions share an address."""
    for at, region in enumerate(regions):
        for other in regions[at + 1 :]:
            if region.overlaps(other):
                raise ProtocolError(
                    f"memory regions at {region.guest_addr:#x} and {other.guest_addr:#x} overlap"
                )


def _parse_empty(data: bytes) -> Empty:
    _exact(data, 0)
    return Empty()


def _parse_u64(data: bytes) -> U64:
    return U64(*_U64.unpack(_exact(data, _U64.size)))


def _parse_vring_state(data: bytes) -> VringState:
    return VringState(*_STATE.unpack(_exact(data, _STATE.size)))


def _parse_vring_address(data: bytes) -> VringAddress:
    return VringAddress(*_ADDRESS.unpack(_exact(data, _ADDRESS.size)))


def _parse_vring_file(data: bytes) -> VringFile:
    (value,) = _U64.unpack(_exact(data, _U64.size))
    if value & ~(VRING_INDEX_MASK | VRING_NO_FD):
        raise ProtocolError(f"payload {value:#x} has unknown bits set")
    return VringFile(value & VRING_INDEX_MASK, not value & VRING_NO_FD)


def _parse_memory_table(data: bytes) -> MemoryTable:
    if len(data) < _TABLE_HEAD.size:
        raise ProtocolError(f"payload of {len(data)} bytes, expected at least {_TABLE_HEAD.size}")
    count, _padding = _TABLE_HEAD.unpack_from(data)
    if count > MAX_TABLE_REGIONS:
        raise ProtocolError(f"{count} memory regions, at most {MAX_TABLE_REGIONS} are possible")
    _exact(data, _TABLE_HEAD.size + count * _REGION.size)
    regions = tuple(
        _check_region(MemoryRegion(*_REGION.unpack_from(data, _TABLE_HEAD.size + at * _REGION.size)))
        for at in range(count)
    )
    check_disjoint(regions)
    return MemoryTable(regions)


def _parse_single_region(data: bytes) -> SingleRegion:
    _exact(data, _SINGLE_HEAD.size + _REGION.size)
    return SingleRegion(_check_region(MemoryRegion(*_REGION.unpack_from(data, _SINGLE_HEAD.size))))


def _parse_config(data: bytes) -> ConfigAccess:
    if len(data) < _CONFIG_HEAD.size:
        raise ProtocolError(f"payload of {len(data)} bytes, expected at least {_CONFIG_HEAD.size}")
    offset, size_bytes, flags = _CONFIG_HEAD.unpack_from(data)
    if size_bytes > MAX_CONFIG_BYTES:
        raise ProtocolError(f"configuration access of {size_bytes} bytes, at most {MAX_CONFIG_BYTES}")
    _exact(data, _CONFIG_HEAD.size + size_bytes)
    return ConfigAccess(offset, flags, data[_CONFIG_HEAD.size :])


def _no_fds(_payload: Payload) -> range:
    return range(1)


def _one_fd(_payload: Payload) -> range:
    return range(1, 2)


def _optional_fd(_payload: Payload) -> range:
    return range(2)


def _vring_fd(payload: Payload) -> range:
    assert isinstance(payload, VringFile)
    return range(1, 2) if payload.has_fd else range(1)


def _region_fds(payload: Payload) -> range:
    assert isinstance(payload, MemoryTable)
    return range(len(payload.regions), len(payload.regions) + 1)


class MessageSpec(Record):
    """How one front-end request looks.

    parse validates the payload; fd_counts are the possible numbers of descriptors; needs is the protocol
    feature without which the request must not come.
    """

    request: FrontEndRequest
    parse: Callable[[bytes], Payload]
    fd_counts: Callable[[Payload], range] = _no_fds
    has_reply: bool = False
    needs: ProtocolFeature = NO_FEATURE


_R = FrontEndRequest
_F = ProtocolFeature

MESSAGES: dict[int, MessageSpec] = {
    spec.request: spec
    for spec in (
        MessageSpec(_R.GET_FEATURES, _parse_empty, has_reply=True),
        MessageSpec(_R.SET_FEATURES, _parse_u64),
        MessageSpec(_R.SET_OWNER, _parse_empty),
        MessageSpec(_R.RESET_OWNER, _parse_empty),
        MessageSpec(_R.SET_MEM_TABLE, _parse_memory_table, _region_fds),
        MessageSpec(_R.SET_VRING_NUM, _parse_vring_state),
        MessageSpec(_R.SET_VRING_ADDR, _parse_vring_address),
        MessageSpec(_R.SET_VRING_BASE, _parse_vring_state),
        MessageSpec(_R.GET_VRING_BASE, _parse_vring_state, has_reply=True),
        MessageSpec(_R.SET_VRING_KICK, _parse_vring_file, _vring_fd),
        MessageSpec(_R.SET_VRING_CALL, _parse_vring_file, _vring_fd),
        MessageSpec(_R.SET_VRING_ERR, _parse_vring_file, _vring_fd),
        MessageSpec(_R.GET_PROTOCOL_FEATURES, _parse_empty, has_reply=True),
        MessageSpec(_R.SET_PROTOCOL_FEATURES, _parse_u64),
        MessageSpec(_R.GET_QUEUE_NUM, _parse_empty, has_reply=True, needs=_F.MQ),
        MessageSpec(_R.SET_VRING_ENABLE, _parse_vring_state),
        MessageSpec(_R.SET_BACKEND_REQ_FD, _parse_empty, _one_fd, needs=_F.BACKEND_REQ),
        MessageSpec(_R.GET_CONFIG, _parse_config, has_reply=True, needs=_F.CONFIG),
        MessageSpec(_R.SET_CONFIG, _parse_config, needs=_F.CONFIG),
        MessageSpec(_R.RESET_DEVICE, _parse_empty, needs=_F.RESET_DEVICE),
        MessageSpec(_R.GET_MAX_MEM_SLOTS, _parse_empty, has_reply=True, needs=_F.CONFIGURE_MEM_SLOTS),
        MessageSpec(_R.ADD_MEM_REG, _parse_single_region, _one_fd, needs=_F.CONFIGURE_MEM_SLOTS),
        # Some front ends pass a descriptor here against the specification, which has it closed unused.
        MessageSpec(_R.REM_MEM_REG, _parse_single_region, _optional_fd, needs=_F.CONFIGURE_MEM_SLOTS),
        MessageSpec(_R.SET_STATUS, _parse_u64, needs=_F.STATUS),
        MessageSpec(_R.GET_STATUS, _parse_empty, has_reply=True, needs=_F.STATUS),
    )
}
"""Every message that this back end serves, by request number."""


def request_name(request: int) -> str:
    """The name of a front-end request, for people."""
    try:
        return FrontEndRequest(request).name
    except ValueError:
        return f"request {request}"


def parse_header(data: bytes) -> Header:
    """Parses the 12 bytes of a header; raises ProtocolError for what no front end may send."""
    request, flags, size_bytes = HEADER.unpack(data)
    if flags & VERSION_MASK != HeaderFlag.VERSION_1:
        raise ProtocolError(f"{request_name(request)}: version {flags & VERSION_MASK}, expected 1")
    if flags & HeaderFlag.REPLY:
        raise ProtocolError(f"{request_name(request)}: a reply, but nothing was asked")
    if size_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"{request_name(request)}: payload of {size_bytes} bytes, at most {MAX_PAYLOAD_BYTES}"
        )
    return Header(request, flags, size_bytes)


def parse_message(header: Header, data: bytes, fds: Sequence[int]) -> Message:
    """Parses a payload by its header.

    A request outside MESSAGES comes back with an Unparsed payload. Raises ProtocolError, naming the
    request, when size, values or the number of descriptors are wrong. The descriptors stay the caller's then.
    """
    spec = MESSAGES.get(header.request)
    if spec is None:
        return Message(header.request, header.flags, Unparsed(data), tuple(fds))
    try:
        payload = spec.parse(data)
        allowed = spec.fd_counts(payload)
        if len(fds) not in allowed:
            raise ProtocolError(f"{len(fds)} descriptors, expected {allowed.stop - 1}")
    except ProtocolError as error:
        raise ProtocolError(f"{request_name(header.request)}: {error}") from None
    return Message(header.request, header.flags, payload, tuple(fds))


def serialize_payload(payload: Payload) -> bytes:
    """The bytes of a payload, as they follow a header."""
    match payload:
        case Empty():
            return b""
        case U64(value):
            return _U64.pack(value)
        case VringState(index, num):
            return _STATE.pack(index, num)
        case VringAddress():
            return _ADDRESS.pack(
                payload.index,
                payload.flags,
                payload.descriptor,
                payload.used,
                payload.available,
                payload.log,
            )
        case VringFile(index, has_fd):
            return _U64.pack(index | (0 if has_fd else VRING_NO_FD))
        case MemoryTable(regions):
            return _TABLE_HEAD.pack(len(regions), 0) + b"".join(map(_pack_region, regions))
        case SingleRegion(region):
            return _SINGLE_HEAD.pack(0) + _pack_region(region)
        case ConfigAccess(offset, flags, data):
            return _CONFIG_HEAD.pack(offset, len(data), flags) + data
        case Unparsed(data):
            return data


def _pack_region(region: MemoryRegion) -> bytes:
    return _REGION.pack(region.guest_addr, region.size_bytes, region.user_addr, region.mmap_offset)


def serialize(request: int, flags: int, payload: Payload) -> bytes:
    """A whole message; flags without the version, which is added."""
    body = serialize_payload(payload)
    return HEADER.pack(request, flags | HeaderFlag.VERSION_1, len(body)) + body


def serialize_reply(request: int, payload: Payload) -> bytes:
    """A reply to a front-end request."""
    return serialize(request, HeaderFlag.REPLY, payload)


class MessageReader:
    """Puts messages together from a byte stream.

    A descriptor belongs to the message whose bytes it came with. The kernel may join the bytes of
    neighbouring messages but never reads past bytes that carry descriptors, so the split is exact
    as long as no read asks for more than `wanted_bytes`.
    """

    def __init__(self) -> None:
        self._header: Header | None = None
        self._data = bytearray()
        self._fds: list[int] = []

    @property
    def wanted_bytes(self) -> int:
        """How many bytes the next read may take; never 0."""
        if self._header is None:
            return HEADER.size - len(self._data)
        return self._header.size_bytes - len(self._data)

    @property
    def is_between_messages(self) -> bool:
        """Whether the stream may end here without cutting a message."""
        return self._header is None and not self._data and not self._fds

    def feed(self, data: bytes, fds: Sequence[int]) -> Message | None:
        """Takes over data and fds; returns a message when one is complete.

        Raises ProtocolError; take_fds() then has what was not handed out.
        """
        self._fds.extend(fds)
        if len(data) > self.wanted_bytes:
            raise ValueError(f"{len(data)} bytes fed, {self.wanted_bytes} wanted")
        self._data += data
        if len(self._fds) > MAX_MESSAGE_FDS:
            raise ProtocolError(f"{len(self._fds)} descriptors with one message, at most {MAX_MESSAGE_FDS}")
        if self._header is None:
            if len(self._data) < HEADER.size:
                return None
            self._header = parse_header(bytes(self._data))
            self._data.clear()
        if len(self._data) < self._header.size_bytes:
            return None
        message = parse_message(self._header, bytes(self._data), self._fds)
        self._header = None
        self._data.clear()
        self._fds.clear()
        return message

    def take_fds(self) -> list[int]:
        """Hands out the descriptors of an unfinished message, to be closed."""
        fds, self._fds = self._fds, []
        return fds
