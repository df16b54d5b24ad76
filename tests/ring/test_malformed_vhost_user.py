# SPDX-License-Identifier: Apache-2.0
"""vhost-user messages that break the rules: refused, or the connection ends, and the next one is served.

Must not test rings or FUSE. Specification: https://qemu.readthedocs.io/en/latest/interop/vhost-user.html
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import (
    BackendGoneError,
    Connection,
    Feature,
    Machine,
    Message,
    MessageRefusedError,
    ProtocolError,
    ProtocolFeature,
    Vmm,
)
from vhostfs.frontend.vhost_user import (
    CONFIG_HEAD,
    FLAG_REPLY,
    HEADER,
    NO_FD,
    REGION,
    TABLE_HEAD,
    U64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
)

pytestmark = pytest.mark.usefixtures("ours")

WITHOUT_ACK = Machine(
    protocol_features=ProtocolFeature.MQ | ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
)


def region(guest: int = 0, size: int = 1 << 20, user: int = 0x7000_0000_0000, offset: int = 0) -> bytes:
    return REGION.pack(guest, size, user, offset)


def table(*regions: bytes) -> bytes:
    return TABLE_HEAD.pack(len(regions), 0) + b"".join(regions)


BAD_PAYLOADS: dict[str, tuple[Message, bytes]] = {
    "SET_FEATURES never offered": (Message.SET_FEATURES, U64.pack(Feature.RING_PACKED)),
    "SET_FEATURES of all bits": (Message.SET_FEATURES, U64.pack((1 << 64) - 1)),
    "SET_FEATURES too short": (Message.SET_FEATURES, b"\0\0\0\0"),
    "SET_FEATURES empty": (Message.SET_FEATURES, b""),
    "SET_FEATURES too long": (Message.SET_FEATURES, bytes(16)),
    "SET_PROTOCOL_FEATURES never offered": (Message.SET_PROTOCOL_FEATURES, U64.pack(1 << 40)),
    "SET_VRING_NUM of zero": (Message.SET_VRING_NUM, VRING_STATE.pack(0, 0)),
    "SET_VRING_NUM not a power of two": (Message.SET_VRING_NUM, VRING_STATE.pack(0, 100)),
    "SET_VRING_NUM too large": (Message.SET_VRING_NUM, VRING_STATE.pack(0, 65536)),
    "SET_VRING_NUM of 4 billion": (Message.SET_VRING_NUM, VRING_STATE.pack(0, 0xFFFFFFFF)),
    "SET_VRING_NUM of queue 32768": (Message.SET_VRING_NUM, VRING_STATE.pack(32768, 128)),
    "SET_VRING_NUM of queue 4 billion": (Message.SET_VRING_NUM, VRING_STATE.pack(0xFFFFFFFF, 128)),
    "SET_VRING_BASE beyond 65535": (Message.SET_VRING_BASE, VRING_STATE.pack(0, 0x10000)),
    "SET_VRING_ADDR of queue 999": (Message.SET_VRING_ADDR, VRING_ADDR.pack(999, 0, 0, 0, 0, 0)),
    "SET_VRING_ADDR misaligned": (
        Message.SET_VRING_ADDR,
        VRING_ADDR.pack(0, 0, 0x7000_0000_0001, 0x7000_0000_1001, 0x7000_0000_2001, 0),
    ),
    "SET_VRING_ADDR too short": (Message.SET_VRING_ADDR, bytes(16)),
    "SET_VRING_ENABLE of 2": (Message.SET_VRING_ENABLE, VRING_STATE.pack(0, 2)),
    "SET_VRING_ENABLE of queue 500": (Message.SET_VRING_ENABLE, VRING_STATE.pack(500, 1)),
    "SET_VRING_KICK of queue 255": (Message.SET_VRING_KICK, U64.pack(255 | NO_FD)),
    "SET_VRING_KICK without its descriptor": (Message.SET_VRING_KICK, U64.pack(0)),
    "SET_VRING_KICK with unknown bits": (Message.SET_VRING_KICK, U64.pack(0xFFFF_0000 | NO_FD)),
    "SET_MEM_TABLE too short": (Message.SET_MEM_TABLE, b"\1\0\0\0"),
    "SET_MEM_TABLE cut": (Message.SET_MEM_TABLE, table(region())[:-8]),
    "SET_MEM_TABLE without descriptors": (Message.SET_MEM_TABLE, table(region())),
    "SET_MEM_TABLE of 4 billion regions": (Message.SET_MEM_TABLE, TABLE_HEAD.pack(0xFFFFFFFF, 0)),
    "ADD_MEM_REG without a descriptor": (Message.ADD_MEM_REG, U64.pack(0) + region()),
    "REM_MEM_REG of nothing": (Message.REM_MEM_REG, U64.pack(0) + region(guest=0x123000)),
    "SET_BACKEND_REQ_FD without a descriptor": (Message.SET_BACKEND_REQ_FD, b""),
    "SET_CONFIG": (Message.SET_CONFIG, CONFIG_HEAD.pack(0, 36, 0) + b"x" * 36),
    "SET_LOG_BASE": (Message.SET_LOG_BASE, struct.pack("=QQ", 4096, 0)),
    "SET_INFLIGHT_FD": (Message.SET_INFLIGHT_FD, bytes(24)),
    "IOTLB_MSG": (Message.IOTLB_MSG, bytes(32)),
    "POSTCOPY_ADVISE": (Message.POSTCOPY_ADVISE, b""),
    "VRING_KICK in band": (Message.VRING_KICK, VRING_STATE.pack(0, 0)),
    "SEND_RARP": (Message.SEND_RARP, U64.pack(0)),
}


@pytest.mark.parametrize("case", list(BAD_PAYLOADS.values()), ids=list(BAD_PAYLOADS))
def test_a_bad_message_is_refused_or_ends_the_connection(share: Share, case: tuple[Message, bytes]) -> None:
    request, payload = case
    with Vmm.connect(share.server.socket_path) as vmm, pytest.raises((MessageRefusedError, BackendGoneError)):
        vmm.connection.acknowledged(request, payload)
    assert share.serves()
    assert len(share.log().splitlines()) < 30


@pytest.mark.parametrize("case", list(BAD_PAYLOADS.values()), ids=list(BAD_PAYLOADS))
def test_a_bad_message_without_acknowledgement_does_no_harm(
    share: Share, case: tuple[Message, bytes]
) -> None:
    request, payload = case
    with Vmm.connect(share.server.socket_path, WITHOUT_ACK) as vmm:
        vmm.connection.send(request, payload)
        with suppress(BackendGoneError, ProtocolError):
            vmm.connection.query_u64(Message.GET_FEATURES)
    assert share.serves()


def _memfd(size: int) -> int:
    fd = os.memfd_create("bad", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


BAD_REGIONS: dict[str, bytes] = {
    "larger than its file": table(region(size=1 << 30)),
    "of size zero": table(region(size=0)),
    "whose address wraps": table(region(guest=(1 << 64) - 4096)),
    "whose user address wraps": table(region(user=(1 << 64) - 4096)),
    "whose offset wraps": table(region(offset=(1 << 64) - 4096)),
    "with an odd offset": table(region(offset=123)),
    "of almost everything": table(region(size=(1 << 63) - 4096)),
}


@pytest.mark.parametrize("payload", list(BAD_REGIONS.values()), ids=list(BAD_REGIONS))
def test_a_bad_memory_region_is_refused(share: Share, payload: bytes) -> None:
    """Memory beyond the end of its file would kill the server with SIGBUS at the first touch."""
    fd = _memfd(1 << 20)
    with Vmm.connect(share.server.socket_path) as vmm, pytest.raises((MessageRefusedError, BackendGoneError)):
        vmm.connection.acknowledged(Message.SET_MEM_TABLE, payload, [fd])
    os.close(fd)
    assert share.serves()


def test_regions_that_overlap_are_refused(share: Share) -> None:
    fd = _memfd(1 << 20)
    overlapping = table(region(), region(guest=0x8000, user=0x7100_0000_0000))
    with Vmm.connect(share.server.socket_path) as vmm, pytest.raises((MessageRefusedError, BackendGoneError)):
        vmm.connection.acknowledged(Message.SET_MEM_TABLE, overlapping, [fd, fd])
    os.close(fd)
    assert share.serves()


def test_more_regions_than_slots_are_refused(share: Share) -> None:
    fd = _memfd(1 << 20)
    with Vmm.connect(share.server.socket_path) as vmm:
        slots = vmm.connection.query_u64(Message.GET_MAX_MEM_SLOTS)
        assert 8 <= slots <= 4096
        ones = [region(guest=i << 20, user=(7 << 44) + (i << 20), size=4096) for i in range(slots + 1)]
        for one in ones[:-1]:
            vmm.connection.acknowledged(Message.ADD_MEM_REG, U64.pack(0) + one, [fd])
        with pytest.raises((MessageRefusedError, BackendGoneError)):
            vmm.connection.acknowledged(Message.ADD_MEM_REG, U64.pack(0) + ones[-1], [fd])
    os.close(fd)
    assert share.serves()


def test_memory_that_is_cut_off_while_in_use_does_not_kill_the_server(share: Share) -> None:
    """A front end may shrink the file behind the guest's memory: touching it raises SIGBUS."""
    vmm = Vmm.boot(share.server.socket_path)
    queue = vmm.request_queue()
    os.ftruncate(vmm.memory.regions[0].fd, 0)
    queue.kick()
    vmm.hiprio.kick()
    awaited(lambda: not share.server.running or vmm.connection.closed_by_backend(0), 1)
    vmm.close()
    assert share.server.running
    assert share.serves()


RAW: dict[str, bytes] = {
    "a wrong version": HEADER.pack(Message.GET_FEATURES, 0x2, 0),
    "no version": HEADER.pack(Message.GET_FEATURES, 0, 0),
    "the reply flag": HEADER.pack(Message.GET_FEATURES, VERSION | FLAG_REPLY, 0),
    "reserved flags": HEADER.pack(Message.GET_FEATURES, VERSION | 0xFFFFFFF0, 0),
    "an unknown request": HEADER.pack(9999, VERSION, 0),
    "request 0": HEADER.pack(0, VERSION, 0),
    "a size of 4 gigabytes": HEADER.pack(Message.SET_FEATURES, VERSION, 0xFFFFFFFF),
    "a size of 1 megabyte": HEADER.pack(Message.SET_FEATURES, VERSION, 1 << 20),
    "text": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "ones": b"\xff" * 64,
}


@pytest.mark.parametrize("data", list(RAW.values()), ids=list(RAW))
def test_bytes_that_are_no_message_end_the_connection_at_most(share: Share, data: bytes) -> None:
    with Connection.open(share.server.socket_path) as connection:
        connection.send_raw(data)
        awaited(lambda: connection.closed_by_backend(0.2), 1)
    assert share.serves()
    assert len(share.log()) < 8192


def test_a_message_in_pieces_is_put_together(share: Share) -> None:
    message = HEADER.pack(Message.GET_FEATURES, VERSION, 0)
    with Connection.open(share.server.socket_path) as connection:
        for i in range(len(message)):
            connection.send_raw(message[i : i + 1])
        assert connection.receive().request == Message.GET_FEATURES


def test_messages_in_one_piece_are_taken_apart(share: Share) -> None:
    message = HEADER.pack(Message.GET_FEATURES, VERSION, 0)
    with Connection.open(share.server.socket_path) as connection:
        connection.send_raw(message * 20)
        assert {connection.receive().request for _ in range(20)} == {Message.GET_FEATURES}


def test_hanging_up_within_a_message_is_harmless(share: Share) -> None:
    message = HEADER.pack(Message.SET_FEATURES, VERSION, 8) + U64.pack(0)
    for size in (0, 1, 11, 12, 15, 19):
        with Connection.open(share.server.socket_path) as connection:
            if size:
                connection.send_raw(message[:size])
    assert share.serves()


def test_descriptors_nobody_asked_for_are_closed(share: Share) -> None:
    """Up to 8 are taken with one message by the rules; none may stay open."""
    fds = [_memfd(4096) for _ in range(8)]
    for _ in range(20):
        with Connection.open(share.server.socket_path) as connection:
            connection.send(Message.GET_FEATURES, fds=fds)
            connection.closed_by_backend(0.02)
    for fd in fds:
        os.close(fd)
    assert share.serves()


def test_too_many_descriptors_with_one_message_are_survived(share: Share) -> None:
    fd = _memfd(4096)
    with Connection.open(share.server.socket_path) as connection:
        connection.send(Message.GET_FEATURES, fds=[fd] * 200)
        connection.closed_by_backend(0.2)
    os.close(fd)
    assert share.serves()


@pytest.mark.parametrize("what", ["/dev/null", "/dev/zero", "/proc/self/stat", "pipe", "directory"])
def test_memory_that_is_no_memory_is_refused_or_harmless(share: Share, what: str) -> None:
    if what == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.open("/" if what == "directory" else what, os.O_RDONLY)
    with (
        Vmm.connect(share.server.socket_path) as vmm,
        suppress(MessageRefusedError, BackendGoneError),
    ):
        vmm.connection.acknowledged(Message.SET_MEM_TABLE, table(region(size=4096)), [fd])
        assert what == "/dev/zero", "only that can be mapped at all"
    os.close(fd)
    assert share.serves()


@pytest.mark.parametrize("what", ["/dev/null", "/etc/passwd", "closed pipe", "/dev/zero"])
def test_a_kick_descriptor_that_is_no_eventfd_does_not_spin_the_server(share: Share, what: str) -> None:
    vmm = Vmm.boot(share.server.socket_path)
    if what == "closed pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.open(what, os.O_RDONLY)
    try:
        vmm.stop_queue(1)
        vmm.set_queue(1, vmm.request_queue())
        vmm.set_eventfd(Message.SET_VRING_KICK, 1, fd)
        vmm.enable_queue(1)
    except (MessageRefusedError, BackendGoneError):
        pass
    os.close(fd)
    before = _cpu_ticks(share)
    awaited(lambda: vmm.connection.closed_by_backend(0), 0.5)
    assert _cpu_ticks(share) - before < 30, "half a second of waiting took 0.3 s of processor time"
    vmm.close()
    assert share.serves()


def _cpu_ticks(share: Share) -> int:
    """Clock ticks of 10 ms that the server has used."""
    with open(f"/proc/{share.server.process.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_get_config_in_pieces_and_beyond_the_end(make_share: MakeShare) -> None:
    share = make_share("--tag=share")
    with Vmm.connect(share.server.socket_path) as vmm:
        assert vmm.protocol & ProtocolFeature.CONFIG
        whole = vmm.config_bytes(0, 40)
        for offset in range(0, 40, 4):
            assert vmm.config_bytes(offset, 4) == whole[offset : offset + 4]
        for offset, size in ((0, 256), (40, 256), (4096, 4), (0xFFFFFFFC, 8)):
            try:
                vmm.config_bytes(offset, size)
            except (BackendGoneError, ProtocolError):
                break
    assert share.serves()


Disorder = Callable[[Vmm], None]


def _enable_before_anything(vmm: Vmm) -> None:
    vmm.enable_queue(1)


def _kick_before_memory(vmm: Vmm) -> None:
    vmm.set_features(vmm.offered & vmm.machine.features)
    queue = vmm.make_queue(1)
    vmm.queues[1] = queue
    vmm.set_eventfd(Message.SET_VRING_KICK, 1, queue.kick_fd)
    queue.kick()


def _addresses_before_memory(vmm: Vmm) -> None:
    vmm.set_features(vmm.offered & vmm.machine.features)
    queue = vmm.make_queue(1)
    vmm.queues[1] = queue
    vmm.tell(Message.SET_VRING_NUM, VRING_STATE.pack(1, 128))
    vmm.tell(Message.SET_VRING_ADDR, vmm.ring_addresses(1, queue))


def _stop_what_never_ran(vmm: Vmm) -> None:
    vmm.stop_queue(0)
    vmm.stop_queue(1)


def _memory_replaced_while_running(vmm: Vmm) -> None:
    vmm.start()
    fd = _memfd(1 << 20)
    try:
        vmm.tell(Message.SET_MEM_TABLE, table(region(guest=1 << 40)), [fd])
    finally:
        os.close(fd)


def _memory_removed_while_running(vmm: Vmm) -> None:
    vmm.start()
    for one in vmm.memory.regions:
        vmm.remove_region(one)
    vmm.request_queue().kick()


def _features_changed_while_running(vmm: Vmm) -> None:
    vmm.start()
    vmm.set_features(Feature.VERSION_1 & vmm.offered)
    vmm.request_queue().kick()


def _size_changed_while_running(vmm: Vmm) -> None:
    vmm.start()
    vmm.tell(Message.SET_VRING_NUM, VRING_STATE.pack(1, 32768))
    vmm.request_queue().kick()


def _owner_twice_and_reset(vmm: Vmm) -> None:
    vmm.tell(Message.SET_OWNER)
    vmm.tell(Message.RESET_OWNER)


@pytest.mark.parametrize(
    "disorder",
    [
        _enable_before_anything,
        _kick_before_memory,
        _addresses_before_memory,
        _stop_what_never_ran,
        _memory_replaced_while_running,
        _memory_removed_while_running,
        _features_changed_while_running,
        _size_changed_while_running,
        _owner_twice_and_reset,
    ],
    ids=lambda disorder: disorder.__name__.strip("_"),
)
def test_messages_in_a_wrong_order_are_survived(share: Share, disorder: Disorder) -> None:
    with Vmm.connect(share.server.socket_path) as vmm:
        try:
            disorder(vmm)
            vmm.connection.query_u64(Message.GET_FEATURES)
        except (MessageRefusedError, BackendGoneError):
            pass
    assert share.serves()


def test_random_messages_are_survived(share: Share) -> None:
    """A fixed seed: the same bytes in every run."""
    rng = random.Random(20260101)
    for _ in range(60):
        with Connection.open(share.server.socket_path) as connection:
            try:
                for _ in range(12):
                    size = rng.choice((0, 4, 8, 12, 16, 40, 48, 72, 300))
                    payload = rng.randbytes(size) if rng.random() < 0.6 else bytes(size)
                    flags = VERSION | rng.choice((0, 0, 8))
                    fds = [_memfd(4096)] if rng.random() < 0.3 else []
                    message = HEADER.pack(rng.randrange(48), flags, size) + payload
                    connection.send_raw(message, fds)
                    for fd in fds:
                        os.close(fd)
            except BackendGoneError:
                pass
    assert share.serves()


def test_a_second_front_end_waits_or_is_turned_away(share: Share) -> None:
    fs = share.mount()
    with Connection.open(share.server.socket_path) as second:
        second.closed_by_backend(0.1)
        assert fs.getattr(fs.root).nlink >= 2
    assert fs.getattr(fs.root).nlink >= 2
