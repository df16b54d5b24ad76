# SPDX-License-Identifier: Apache-2.0
"""Carries one front end at a time: socket and descriptors to the state machine, its actions to a back end.

Must not know what messages mean (device.py), the C core (virtio/queues.py) or FUSE.
Specification: unix(7) on SCM_RIGHTS; https://qemu-project.gitlab.io/qemu/interop/vhost-user.html
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from .actions import (
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
from .device import Device, DeviceOptions
from .messages import MAX_MESSAGE_FDS, MemoryRegion, ProtocolError

_log = logging.getLogger("vhostfs.vhost_user")

_FD_BYTES = array.array("i").itemsize
# One more than any message may bring, so that one too many is told from an overflow.
_ANCILLARY_BYTES = socket.CMSG_SPACE((MAX_MESSAGE_FDS + 1) * _FD_BYTES)

ACCEPT_PAUSE_S = 1.0
"""After accept() failed for want of descriptors or memory."""


LINES_PER_CONNECTION = 100
"""A front end that provokes lines without end fills no log; its disconnection is always said."""


class FaultLine(Protocol):
    """One line about a queue that stopped serving."""

    @property
    def text(self) -> str: ...


class BackEnd(Protocol):
    """What carries out the actions that are awaited. Results: 0 or more, or a negative errno; may block."""

    def close(self) -> None: ...
    def set_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> int: ...
    def add_region(self, region: MemoryRegion, fd: int) -> int: ...
    def remove_region(self, region: MemoryRegion) -> int: ...
    def start_queue(self, config: QueueConfig) -> int: ...
    def stop_queue(self, index: int) -> int: ...
    def set_call(self, index: int, fd: int) -> int: ...
    def set_err(self, index: int, fd: int) -> int: ...
    @property
    def fault_fd(self) -> int: ...
    def take_faults(self) -> Iterable[FaultLine]: ...


class Listener:
    """Accepts front ends, one after the other, until stop() or, with `once`, until the first has left."""

    def __init__(
        self,
        listen_socket: socket.socket,
        options: DeviceOptions,
        *,
        new_back_end: Callable[[], BackEnd],
        end_session: Callable[[], None],
        once: bool = False,
    ) -> None:
        """listen_socket listens already and stays the caller's; end_session may block, as a BackEnd may."""
        self._listen_socket = listen_socket
        self._options = options
        self._new_back_end = new_back_end
        self._end_session = end_session
        self._once = once
        self._stop = asyncio.Event()
        # One thread: what the back end does is in the order of the messages.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vhostfs-device")
        self.connection: Connection | None = None
        """The front end that is connected now."""

    @property
    def features_acked(self) -> int:
        """Virtio feature bits that the driver has acked by now; 0 while nobody is connected."""
        connection = self.connection
        return 0 if connection is None else connection.device.features_acked

    def has_vring(self, index: int) -> bool:
        """Whether the front end has placed this vring in guest memory."""
        connection = self.connection
        return connection is not None and connection.device.is_placed(index)

    @property
    def smallest_request_queue(self) -> int:
        """Size in descriptors of the smallest request queue that runs; 0: none does."""
        connection = self.connection
        return 0 if connection is None else connection.device.smallest_request_queue

    @property
    def protocol_features_acked(self) -> int:
        """vhost-user protocol features likewise."""
        connection = self.connection
        return 0 if connection is None else connection.device.protocol_features_acked

    def stop(self) -> None:
        """Ends the connection in order, then run() returns."""
        self._stop.set()

    async def run(self) -> None:
        """Serves until stopped."""
        self._listen_socket.setblocking(False)
        try:
            while not self._stop.is_set():
                front_end = await self._accept()
                if front_end is None:
                    break
                self.connection = Connection(
                    front_end,
                    Device(self._options),
                    self._thread,
                    new_back_end=self._new_back_end,
                    end_session=self._end_session,
                )
                await self.connection.run(self._stop)
                self.connection = None
                if self._once:
                    break
        finally:
            self._thread.shutdown(wait=False)

    async def _accept(self) -> socket.socket | None:
        while True:
            accepting = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(self._listen_socket))
            stopping = asyncio.ensure_future(self._stop.wait())
            try:
                await asyncio.wait({accepting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                if not accepting.done():
                    accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stopping
            try:
                return (await accepting)[0]
            except asyncio.CancelledError:
                return None
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                _log.error("cannot accept a front end: %s; trying again", os.strerror(error.errno))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), ACCEPT_PAUSE_S)
                return None


class Connection:
    """One front end, from accept to the freed device."""

    def __init__(
        self,
        front_end: socket.socket,
        device: Device,
        thread: ThreadPoolExecutor,
        *,
        new_back_end: Callable[[], BackEnd],
        end_session: Callable[[], None],
    ) -> None:
        self._socket = front_end
        self._socket.setblocking(False)
        self.device = device
        self._thread = thread
        self._new_back_end = new_back_end
        self._end_session = end_session
        self._loop = asyncio.get_running_loop()
        self._lines_left = LINES_PER_CONNECTION

    def _say(self, level: int, text: str) -> None:
        self._lines_left -= 1
        if self._lines_left >= 0:
            _log.log(level, "%s", text)
        if self._lines_left == 0:
            _log.warning("further lines about this front end are left out")

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until the front end leaves or breaks the protocol, or stop is set; logs which."""
        _log.info("front end connected%s", _peer_text(self._socket))
        back_end: BackEnd | None = None
        reason, level = "an error in the server", logging.WARNING
        try:
            back_end = self._new_back_end()
            self._loop.add_reader(back_end.fault_fd, self._log_faults, back_end)
            reason, level = await self._serve(back_end, stop), logging.INFO
        except ProtocolError as error:
            reason = f"protocol error: {error}"
        except (BrokenPipeError, ConnectionResetError):
            reason, level = "it closed the socket before it had its replies", logging.INFO
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
        except Exception:
            _log.exception("connection failed inside the server")
        finally:
            await self._end(back_end)
            _log.log(level, "front end disconnected: %s", reason)

    async def _end(self, back_end: BackEnd | None) -> None:
        if back_end is not None:
            self._loop.remove_reader(back_end.fault_fd)
            await self._in_thread(back_end.close)
        await self._in_thread(self._end_session)
        for fd in self.device.close():
            os.close(fd)
        self._socket.close()

    async def _in_thread(self, call: Callable[..., None], *args: object) -> None:
        await self._loop.run_in_executor(self._thread, call, *args)

    def _log_faults(self, back_end: BackEnd) -> None:
        for fault in back_end.take_faults():
            self._say(logging.WARNING, fault.text)
            self.device.device_failed()

    async def _serve(self, back_end: BackEnd, stop: asyncio.Event) -> str:
        """Returns why it ended."""
        while True:
            while (action := self.device.next_action()) is not None:
                result = await self._carry_out(action, back_end, stop)
                if action.is_awaited:
                    self.device.action_done(result)
            if stop.is_set() or not await self._until_ready(self._loop.add_reader, stop):
                return "the server ends"
            try:
                data, fds = receive(self._socket, self.device.wanted_bytes)
            except (BlockingIOError, InterruptedError):
                continue
            if not data:
                if fds:
                    _close_all(fds)
                if self.device.is_between_messages:
                    return "it closed the socket"
                return "it closed the socket in the middle of a message"
            self.device.receive(data, fds)

    async def _carry_out(self, action: Action, back_end: BackEnd, stop: asyncio.Event) -> int:
        match action:
            case SendReply(data):
                await self._send(data, stop)
            case CloseFd(fd):
                os.close(fd)
            case LogLine(text):
                self._say(logging.WARNING, text)
            case FeaturesAcked():
                self._say(logging.INFO, f"driver: {self.device.negotiated}")
            case ResetDevice():
                await self._in_thread(self._end_session)
            case _:
                return await self._loop.run_in_executor(self._thread, _call_back_end, action, back_end)
        return 0

    async def _send(self, data: bytes, stop: asyncio.Event) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view, socket.MSG_NOSIGNAL) :]
            except (BlockingIOError, InterruptedError):
                # Nothing more is read from a front end that does not read: nothing grows.
                if not await self._until_ready(self._loop.add_writer, stop):
                    raise ProtocolError("it does not read its replies") from None

    async def _until_ready(
        self, watch: Callable[[int, Callable[[], None]], object], stop: asyncio.Event
    ) -> bool:
        """Waits for the socket; False when stop came first."""
        ready: asyncio.Future[bool] = self._loop.create_future()

        def settle(is_ready: bool) -> None:
            if not ready.done():
                ready.set_result(is_ready)

        stopping = asyncio.ensure_future(stop.wait())
        stopping.add_done_callback(lambda _task: settle(False))
        fd = self._socket.fileno()
        watch(fd, lambda: settle(True))
        try:
            return await ready
        finally:
            stopping.cancel()
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)


def _call_back_end(action: Action, back_end: BackEnd) -> int:
    match action:
        case MapMemory(regions, fds):
            return back_end.set_memory(regions, fds)
        case AddRegion(region, fd):
            return back_end.add_region(region, fd)
        case RemoveRegion(region):
            return back_end.remove_region(region)
        case StartQueue(config):
            return back_end.start_queue(config)
        case StopQueue(index):
            return back_end.stop_queue(index)
        case SetCall(index, fd):
            return back_end.set_call(index, fd)
        case SetErr(index, fd):
            return back_end.set_err(index, fd)
        case _:
            raise AssertionError(f"nobody carries out {action}")


def receive(front_end: socket.socket, size_bytes: int) -> tuple[bytes, list[int]]:
    """At most size_bytes, and the descriptors that came with them, which are then the caller's.

    b"" when the peer has closed. Raises ProtocolError when descriptors were lost, OSError otherwise.
    """
    data, ancillary, flags, _address = front_end.recvmsg(
        size_bytes, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    if flags & socket.MSG_CTRUNC:
        _close_all(fds)
        raise ProtocolError(f"more than {MAX_MESSAGE_FDS} descriptors with one message")
    return data, list(fds)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _peer_text(front_end: socket.socket) -> str:
    """ " (pid 1234)" where the kernel knows it."""
    try:
        credentials = front_end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return ""
    pid = array.array("i", credentials)[0]
    return f" (pid {pid})" if pid > 0 else ""
