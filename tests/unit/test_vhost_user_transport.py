# SPDX-License-Identifier: Apache-2.0
"""The vhost-user transport over a real socket: descriptors, order, front ends that come, go and misbehave."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import uvloop

from tests.limits import HANG_S
from vhostfs.vhost_user.actions import QueueConfig
from vhostfs.vhost_user.device import DeviceOptions
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
from vhostfs.vhost_user.transport import LINES_PER_CONNECTION, Listener
from vhostfs.virtio.queues import Fault

from .vhost_user_model import MODERN, REGION

R = FrontEndRequest


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = uvloop.EventLoopPolicy()
    return policy


class RecordingBackEnd:
    """Notes what is asked of it; stop_queue blocks while `gate` is closed."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.read_fd, self.write_fd = os.pipe()
        self.gate = threading.Event()
        self.gate.set()
        self.stopping = threading.Event()
        self.mapped_inodes: list[int] = []
        self.faults: list[Fault] = []
        self.map_result = 0

    def close(self) -> None:
        self.calls.append("close")
        os.close(self.read_fd)
        os.close(self.write_fd)

    def set_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> int:
        self.calls.append(f"set_memory {len(regions)}")
        self.mapped_inodes = [os.fstat(fd).st_ino for fd in fds]
        return self.map_result

    def add_region(self, region: MemoryRegion, fd: int) -> int:
        self.calls.append("add_region")
        return 0

    def remove_region(self, region: MemoryRegion) -> int:
        self.calls.append("remove_region")
        return 0

    def start_queue(self, config: QueueConfig) -> int:
        self.calls.append(f"start {config.index}")
        return 0

    def stop_queue(self, index: int) -> int:
        self.stopping.set()
        self.gate.wait(HANG_S)
        self.calls.append(f"stop {index}")
        return 33

    def set_call(self, index: int, fd: int) -> int:
        self.calls.append(f"set_call {index}")
        return 0

    def set_err(self, index: int, fd: int) -> int:
        self.calls.append(f"set_err {index}")
        return 0

    @property
    def fault_fd(self) -> int:
        return self.read_fd

    def take_faults(self) -> Iterable[Fault]:
        if self.faults:
            os.read(self.read_fd, 1)
        faults, self.faults = self.faults, []
        return faults

    def raise_fault(self, text: str) -> None:
        self.faults.append(Fault(1, text))
        os.write(self.write_fd, b"!")


class FrontEnd:
    """The other end of the socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)

    async def connect(self) -> FrontEnd:
        await asyncio.get_running_loop().sock_connect(self.socket, str(self.path))
        return self

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.socket.sendmsg([data], ancillary) == len(data)

    def send(
        self, request: R, payload: Payload | None = None, *, fds: Sequence[int] = (), ack: bool = False
    ) -> None:
        flags = HeaderFlag.NEED_REPLY if ack else 0
        self.send_bytes(serialize(request, flags, payload or Empty()), fds)

    async def reply(self) -> bytes:
        """One reply's payload."""
        _request, _flags, size_bytes = HEADER.unpack(await self._exactly(HEADER.size))
        return await self._exactly(size_bytes)

    async def _exactly(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            part = await asyncio.wait_for(
                asyncio.get_running_loop().sock_recv(self.socket, size_bytes - len(data)), HANG_S
            )
            assert part, "the server closed the connection"
            data += part
        return data

    async def get(self, request: R, payload: Payload | None = None) -> bytes:
        self.send(request, payload)
        return await self.reply()

    async def is_dropped(self) -> bool:
        """Waits until the server closes."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionResetError):
            while await asyncio.wait_for(loop.sock_recv(self.socket, 4096), HANG_S):
                pass
        return True

    async def start_queue(self) -> None:
        """Negotiates with REPLY_ACK and starts queue 1; descriptors are closed on this side."""
        self.send(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK | ProtocolFeature.STATUS))
        self.send(R.SET_OWNER)
        self.send(R.SET_FEATURES, U64(MODERN))
        with given_fds(3) as (memory, kick, call):
            self.send(R.SET_MEM_TABLE, MemoryTable((REGION,)), fds=[memory])
            self.send(R.SET_VRING_NUM, VringState(1, 8))
            at = REGION.user_addr
            self.send(R.SET_VRING_ADDR, VringAddress(1, 0, at, at + 0x200, at + 0x100, 0))
            self.send(R.SET_VRING_KICK, VringFile(1, True), fds=[kick])
            self.send(R.SET_VRING_CALL, VringFile(1, True), fds=[call])
        self.send(R.SET_VRING_ENABLE, VringState(1, 1), ack=True)
        assert await self.reply() == bytes(8)

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def given_fds(count: int) -> Iterator[list[int]]:
    fds = [os.memfd_create("test") for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class Server:
    """A listener on a socket of its own, with back ends that only take notes."""

    def __init__(self, folder: Path, *, once: bool = False) -> None:
        self.path = folder / "s"
        self.listen_socket = socket.socket(socket.AF_UNIX)
        self.listen_socket.bind(str(self.path))
        self.listen_socket.listen(8)
        self.back_ends: list[RecordingBackEnd] = []
        self.sessions_ended = 0
        self.configure: Callable[[RecordingBackEnd], None] = lambda _back_end: None
        self.listener = Listener(
            self.listen_socket,
            DeviceOptions(max_queues=4, config=bytes(44)),
            new_back_end=self.new_back_end,
            end_session=self.end_session,
            once=once,
        )
        self.task = asyncio.ensure_future(self.listener.run())

    def new_back_end(self) -> RecordingBackEnd:
        back_end = RecordingBackEnd()
        self.configure(back_end)
        self.back_ends.append(back_end)
        return back_end

    def end_session(self) -> None:
        self.sessions_ended += 1

    async def connect(self) -> FrontEnd:
        return await FrontEnd(self.path).connect()

    async def end(self) -> None:
        self.listener.stop()
        await asyncio.wait_for(self.task, HANG_S)
        self.listen_socket.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    yield server
    await server.end()


async def test_descriptors_reach_the_message_that_they_were_sent_with(server: Server) -> None:
    front_end = await server.connect()
    front_end.send(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    front_end.send(R.SET_OWNER)
    table = MemoryTable((REGION, MemoryRegion(1 << 40, 4096, 1 << 40, 0)))
    with given_fds(2) as fds:
        inodes = [os.fstat(fd).st_ino for fd in fds]
        front_end.send(R.SET_MEM_TABLE, table, fds=fds, ack=True)
    assert await front_end.reply() == bytes(8)
    assert server.back_ends[0].mapped_inodes == inodes
    front_end.close()


async def test_a_message_may_come_byte_by_byte(server: Server) -> None:
    front_end = await server.connect()
    data = serialize(R.GET_FEATURES, 0, Empty())
    for at in range(len(data)):
        front_end.send_bytes(data[at : at + 1])
        await asyncio.sleep(0)
    assert int.from_bytes(await front_end.reply(), "little") & MODERN == MODERN
    front_end.close()


async def test_a_failed_mapping_is_acknowledged_as_such(server: Server) -> None:
    server.configure = lambda back_end: setattr(back_end, "map_result", -errno.ENOMEM)
    front_end = await server.connect()
    front_end.send(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    front_end.send(R.SET_OWNER)
    with given_fds(1) as fds:
        front_end.send(R.SET_MEM_TABLE, MemoryTable((REGION,)), fds=fds, ack=True)
    assert await front_end.reply() != bytes(8)
    front_end.close()


async def test_messages_wait_for_a_queue_that_stops_while_the_loop_goes_on(server: Server) -> None:
    front_end = await server.connect()
    await front_end.start_queue()
    back_end = server.back_ends[0]
    back_end.gate.clear()
    front_end.send(R.GET_VRING_BASE, VringState(1, 0))
    front_end.send(R.GET_STATUS)
    while not back_end.stopping.is_set():
        await asyncio.sleep(0)
    with pytest.raises(BlockingIOError):
        front_end.socket.recv(1)
    back_end.gate.set()
    assert await front_end.reply() == bytes([1, 0, 0, 0, 33, 0, 0, 0])
    assert await front_end.reply() == bytes(8)
    front_end.close()


async def test_front_ends_come_and_go_and_leave_nothing_behind(server: Server) -> None:
    before = None
    for round_number in range(5):
        front_end = await server.connect()
        await front_end.start_queue()
        front_end.close()
        while server.sessions_ended <= round_number or server.listener.connection is not None:
            await asyncio.sleep(0)
        assert server.back_ends[round_number].calls == ["set_memory 1", "start 1", "close"]
        before = before or open_fds()
    assert open_fds() == before


async def test_a_second_front_end_waits_for_the_first_to_leave(server: Server) -> None:
    first = await server.connect()
    second = await server.connect()
    await first.get(R.GET_FEATURES)
    second.send(R.GET_FEATURES)
    await first.get(R.GET_FEATURES)
    assert len(server.back_ends) == 1
    first.close()
    assert await second.reply()
    second.close()


@pytest.mark.parametrize(
    ("data", "fd_count", "reason"),
    [
        (HEADER.pack(1, 2, 0), 0, "protocol error: GET_FEATURES: version 2"),
        (HEADER.pack(2, 1, 0xFFFFFFFF), 0, "payload of 4294967295 bytes"),
        (serialize(R.GET_FEATURES, 0, Empty()), 1, "1 descriptors, expected 0"),
        (serialize(R.GET_FEATURES, 0, Empty()), 30, "more than 8 descriptors"),
        (serialize(R.SET_VRING_KICK, 0, VringFile(0, True)), 1, "device is NEW"),
    ],
)
async def test_nonsense_ends_the_connection_with_one_line_and_no_descriptor_leaks(
    server: Server, caplog: pytest.LogCaptureFixture, data: bytes, fd_count: int, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    good = await server.connect()
    await good.get(R.GET_FEATURES)
    good.close()
    while not server.sessions_ended or server.listener.connection is not None:
        await asyncio.sleep(0)
    before = open_fds()
    caplog.clear()
    front_end = await server.connect()
    with given_fds(fd_count) as fds:
        front_end.send_bytes(data, fds)
    assert await front_end.is_dropped()
    front_end.close()
    while server.sessions_ended < 2 or server.listener.connection is not None:
        await asyncio.sleep(0)
    assert open_fds() == before
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[1].startswith("front end disconnected: ")
    assert reason in lines[1]
    again = await server.connect()
    assert await again.get(R.GET_FEATURES)
    again.close()


async def test_a_front_end_that_does_not_read_its_replies_only_stops_itself(server: Server) -> None:
    front_end = await server.connect()
    data = serialize(R.GET_FEATURES, 0, Empty())
    loop = asyncio.get_running_loop()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(loop.sock_sendall(front_end.socket, data * 200_000), 1)
    await asyncio.wait_for(server.end(), HANG_S)
    front_end.close()
    assert server.back_ends[0].calls == ["close"]


async def test_a_fault_is_one_line_and_shows_in_the_status(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    front_end = await server.connect()
    await front_end.start_queue()
    server.back_ends[0].raise_fault("queue 1 stopped: descriptor 7 is out of range")
    while (await front_end.get(R.GET_STATUS))[0] != 0x40:
        pass
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "queue 1 stopped: descriptor 7 is out of range"
    ]
    front_end.close()


async def test_a_front_end_cannot_fill_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    front_end = await server.connect()
    front_end.send(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    for _ in range(2 * LINES_PER_CONNECTION):
        front_end.send(R.SET_LOG_BASE, ack=True)
        assert await front_end.reply() != bytes(8)
    assert len(caplog.records) == LINES_PER_CONNECTION + 1
    assert "left out" in caplog.records[-1].getMessage()
    front_end.close()


async def test_stop_ends_a_connection_in_order(tmp_path: Path) -> None:
    server = Server(tmp_path)
    front_end = await server.connect()
    await front_end.start_queue()
    await server.end()
    assert server.back_ends[0].calls[-1] == "close"
    assert server.sessions_ended == 1
    assert await front_end.is_dropped()
    front_end.close()


async def test_once_ends_with_the_first_front_end(tmp_path: Path) -> None:
    server = Server(tmp_path, once=True)
    front_end = await server.connect()
    await front_end.get(R.GET_FEATURES)
    front_end.close()
    await asyncio.wait_for(server.task, HANG_S)
    server.listen_socket.close()


async def test_a_back_end_that_cannot_be_made_ends_only_that_connection(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def fail(_back_end: RecordingBackEnd) -> None:
        server.configure = lambda _later: None
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    server.configure = fail
    front_end = await server.connect()
    assert await front_end.is_dropped()
    front_end.close()
    again = await server.connect()
    assert await again.get(R.GET_FEATURES)
    again.close()
    assert "front end disconnected: Cannot allocate memory" in [r.getMessage() for r in caplog.records]
