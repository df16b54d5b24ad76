# SPDX-License-Identifier: Apache-2.0
"""vhost-user messages: layouts as the specification has them, and what a hostile front end may not send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.vhost_user.messages import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    MESSAGES,
    U64,
    ConfigAccess,
    Empty,
    FrontEndRequest,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    Message,
    MessageReader,
    Payload,
    ProtocolError,
    SingleRegion,
    Unparsed,
    VringAddress,
    VringFile,
    VringState,
    parse_header,
    parse_message,
    serialize,
    serialize_payload,
)

R = FrontEndRequest

u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
regions = st.builds(
    MemoryRegion,
    guest_addr=st.integers(0, 1 << 40),
    size_bytes=st.integers(1, 1 << 40),
    user_addr=st.integers(0, 1 << 47),
    mmap_offset=st.integers(0, 1 << 40),
)


def disjoint(count: int) -> MemoryTable:
    return MemoryTable(tuple(MemoryRegion(at << 32, 0x1000, at << 40, 0) for at in range(count)))


PAYLOADS: dict[FrontEndRequest, st.SearchStrategy[Payload]] = {
    R.SET_FEATURES: st.builds(U64, u64),
    R.SET_VRING_NUM: st.builds(VringState, u32, u32),
    R.SET_VRING_ADDR: st.builds(VringAddress, u32, u32, u64, u64, u64, u64),
    R.SET_VRING_KICK: st.builds(VringFile, u8, st.booleans()),
    R.SET_MEM_TABLE: st.builds(disjoint, st.integers(0, 8)),
    R.ADD_MEM_REG: st.builds(SingleRegion, regions),
    R.GET_CONFIG: st.builds(ConfigAccess, u32, u32, st.binary(max_size=256)),
    R.SET_OWNER: st.just(Empty()),
}


def fds_for(request: int, payload: Payload) -> tuple[int, ...]:
    return tuple(range(MESSAGES[request].fd_counts(payload).start))


def read(data: bytes, fds: tuple[int, ...] = ()) -> Message:
    header = parse_header(data[: HEADER.size])
    return parse_message(header, data[HEADER.size :], fds)


@given(data=st.data(), request_number=st.sampled_from(sorted(PAYLOADS)), flags=st.sampled_from([0, 8]))
def test_what_is_serialized_parses_to_the_same(data: st.DataObject, request_number: R, flags: int) -> None:
    payload = data.draw(PAYLOADS[request_number])
    fds = fds_for(request_number, payload)
    message = read(serialize(request_number, flags, payload), fds)
    assert message == Message(request_number, flags | 1, payload, fds)
    assert message.needs_reply == bool(flags)


@given(
    data=st.binary(max_size=400),
    request_number=st.integers(0, 60),
    fds=st.lists(st.integers(3, 9), max_size=9),
)
def test_random_payloads_parse_or_are_a_protocol_error(
    data: bytes, request_number: int, fds: list[int]
) -> None:
    header = parse_header(HEADER.pack(request_number, 1, len(data)))
    try:
        message = parse_message(header, data, fds)
    except ProtocolError as error:
        line = str(error)
    else:
        line = ""
    if line:
        assert "\n" not in line
        assert line.startswith(FrontEndRequest(request_number).name)
        return
    if not isinstance(message.payload, SingleRegion | MemoryTable):  # these have padding
        assert serialize_payload(message.payload) == data


@pytest.mark.parametrize(
    ("request_number", "hexadecimal", "payload"),
    [
        (R.SET_FEATURES, "0000004001000000", U64(0x1_4000_0000)),
        (R.GET_VRING_BASE, "0200000000000000", VringState(2, 0)),
        (R.SET_VRING_KICK, "0301000000000000", VringFile(3, False)),
        (
            R.SET_VRING_ADDR,
            "01000000 00000000 0010000000000000 0030000000000000 0020000000000000 0000000000000000",
            VringAddress(1, 0, descriptor=0x1000, used=0x3000, available=0x2000, log=0),
        ),
        (
            R.ADD_MEM_REG,
            "0000000000000000 0000000001000000 0010000000000000 00000000007f0000 0020000000000000",
            SingleRegion(MemoryRegion(0x100000000, 0x1000, 0x7F0000000000, 0x2000)),
        ),
        (R.GET_CONFIG, "04000000 02000000 00000000 0000", ConfigAccess(4, 0, b"\0\0")),
    ],
)
def test_layouts_are_those_of_the_specification(
    request_number: R, hexadecimal: str, payload: Payload
) -> None:
    data = bytes.fromhex(hexadecimal)
    fds = fds_for(request_number, payload)
    assert read(HEADER.pack(request_number, 1, len(data)) + data, fds).payload == payload
    assert serialize_payload(payload) == data


def test_messages_of_others_are_known_by_name() -> None:
    message = read(serialize(R.SET_LOG_BASE, 0, Unparsed(bytes(16))), (5,))
    assert message.payload == Unparsed(bytes(16))
    assert message.name == "SET_LOG_BASE"
    assert read(serialize(77, 0, Empty())).name == "request 77"


@pytest.mark.parametrize("request_number", sorted(MESSAGES))
@pytest.mark.parametrize("size_bytes", [1, 7, 9, 41, 4096])
def test_a_payload_of_the_wrong_size_is_refused(request_number: int, size_bytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"^{FrontEndRequest(request_number).name}: "):
        read(HEADER.pack(request_number, 1, size_bytes) + bytes([0x11] * size_bytes))


@pytest.mark.parametrize("request_number", sorted(MESSAGES))
def test_a_message_with_one_descriptor_too_many_is_refused(request_number: int) -> None:
    sizes = {"_parse_empty": 0, "_parse_memory_table": 8, "_parse_vring_address": 40, "_parse_config": 12}
    parse = MESSAGES[request_number].parse
    if parse.__name__ == "_parse_single_region":
        data = serialize_payload(SingleRegion(MemoryRegion(0, 1, 0, 0)))
    else:
        data = bytes(sizes.get(parse.__name__, 8))
    header = parse_header(HEADER.pack(request_number, 1, len(data)))
    most = MESSAGES[request_number].fd_counts(MESSAGES[request_number].parse(data)).stop - 1
    parse_message(header, data, [3] * most)
    with pytest.raises(ProtocolError, match="descriptors, expected"):
        parse_message(header, data, [3] * (most + 1))


@pytest.mark.parametrize(
    ("region", "text"),
    [
        (MemoryRegion(0, 0, 0, 0), "empty"),
        (MemoryRegion((1 << 64) - 1, 2, 0, 0), "guest address"),
        (MemoryRegion(0, 2, (1 << 64) - 1, 0), "user address"),
        (MemoryRegion(0, 2, 0, (1 << 64) - 1), "mmap offset"),
    ],
)
def test_a_region_that_is_empty_or_wraps_is_refused(region: MemoryRegion, text: str) -> None:
    for request_number, payload in (
        (R.ADD_MEM_REG, SingleRegion(region)),
        (R.SET_MEM_TABLE, MemoryTable((region,))),
    ):
        with pytest.raises(ProtocolError, match=text):
            read(serialize(request_number, 0, payload), (3,))


@pytest.mark.parametrize(
    "second",
    [MemoryRegion(0xFFF, 1, 0x900000, 0), MemoryRegion(0x900000, 0x1000, 0x10FFF, 0)],
    ids=["guest addresses", "user addresses"],
)
def test_regions_that_overlap_are_refused(second: MemoryRegion) -> None:
    table = MemoryTable((MemoryRegion(0, 0x1000, 0x10000, 0), second))
    with pytest.raises(ProtocolError, match="overlap"):
        read(serialize(R.SET_MEM_TABLE, 0, table), (3, 4))


def test_nine_regions_are_refused() -> None:
    with pytest.raises(ProtocolError, match="9 memory regions"):
        read(serialize(R.SET_MEM_TABLE, 0, disjoint(9)), tuple(range(9)))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (HEADER.pack(1, 0, 0), "version 0"),
        (HEADER.pack(1, 2, 0), "version 2"),
        (HEADER.pack(1, HeaderFlag.REPLY | 1, 0), "a reply"),
        (HEADER.pack(1, 1, MAX_PAYLOAD_BYTES + 1), "at most 4096"),
        (HEADER.pack(1, 1, 0xFFFFFFFF), "at most 4096"),
    ],
)
def test_impossible_headers_are_refused(header: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        parse_header(header)


@given(cuts=st.lists(st.integers(1, 13), max_size=60))
def test_the_reader_does_not_mind_how_bytes_are_cut(cuts: list[int]) -> None:
    messages: list[tuple[FrontEndRequest, Payload, tuple[int, ...]]] = [
        (R.SET_MEM_TABLE, disjoint(2), (10, 11)),
        (R.SET_OWNER, Empty(), ()),
        (R.SET_VRING_KICK, VringFile(1, True), (12,)),
    ]
    reader = MessageReader()
    got = []
    sizes = iter(cuts)
    for request_number, payload, fds in messages:
        data = serialize(request_number, 0, payload)
        pending: tuple[int, ...] = fds
        while data:
            size_bytes = min(reader.wanted_bytes, next(sizes, 99))
            message = reader.feed(data[:size_bytes], pending)
            data, pending = data[size_bytes:], ()
            if message is not None:
                got.append((message.request, message.payload, message.fds))
    assert got == messages
    assert reader.is_between_messages


def test_the_reader_gives_back_the_descriptors_of_an_unfinished_message() -> None:
    reader = MessageReader()
    reader.feed(serialize(R.SET_VRING_KICK, 0, VringFile(0, True))[:12], (7,))
    assert not reader.is_between_messages
    assert reader.take_fds() == [7]
    assert reader.take_fds() == []


def test_descriptors_that_come_one_by_one_are_bounded() -> None:
    reader = MessageReader()
    for fd in range(8):
        reader.feed(b"\x01", (fd,))
    with pytest.raises(ProtocolError, match="9 descriptors"):
        reader.feed(b"\x01", (8,))
    assert len(reader.take_fds()) == 9
