# SPDX-License-Identifier: Apache-2.0
"""A split virtqueue from the driver's side: descriptors, available and used ring, suppression, eventfds.

Knows nothing of vhost-user messages or FUSE; carries chains of guest memory and gives back their heads.
Specification: virtio 1.2, section 2.7 (split virtqueues), and 2.7.10 (used buffer notification suppression).
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vhostfs.frontend.memory import GuestBuffer, GuestMemory
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S, BackendGoneError, ProtocolError, RingBrokenError

DESCRIPTOR = struct.Struct("<QIHH")
F_NEXT = 1
F_WRITE = 2
F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a chain; the device may write it or read it."""

    guest_addr: int
    size_bytes: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Used:
    """What the device returned."""

    head: int
    length_bytes: int


class RingFullError(Exception):
    """There are not enough free descriptors for a chain."""


class Virtqueue:
    """One queue; used by one thread at a time. `size` is any power of two up to 32768."""

    def __init__(
        self, memory: GuestMemory, size: int, *, event_idx: bool = True, indirect: bool = True
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.table = memory.allocate(16 * size, align=4096)
        self.available = memory.allocate(6 + 2 * size, align=4096)
        self.used = memory.allocate(6 + 8 * size, align=4096)
        for part in (self.table, self.available, self.used):
            part.view[:] = bytes(len(part))
        # Native two-byte items are stored and loaded in one piece; struct's "<H" goes byte by byte, and the
        # device could see half of an index.
        self._avail16 = self.available.view.cast("H")
        self._used16 = self.used.view.cast("H")
        self._used32 = self.used.view[4 : 4 + 8 * size].cast("I")
        self._free = list(range(size - 1, -1, -1))
        self._chains: dict[int, tuple[list[int], GuestBuffer | None]] = {}
        self._fence = threading.Lock()
        self.avail_index = 0
        self.used_index = 0
        self.kicks = 0
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # ---- the raw ring, for those who break the rules ---------------------------------------------------

    def put_descriptor(
        self, index: int, guest_addr: int, size_bytes: int, flags: int = 0, nxt: int = 0
    ) -> None:
        DESCRIPTOR.pack_into(self.table.view, 16 * index, guest_addr, size_bytes, flags, nxt)

    def put_available(self, slot: int, head: int) -> None:
        self._avail16[2 + slot % self.size] = head

    def set_available_index(self, index: int) -> None:
        self.avail_index = index & 0xFFFF
        self._avail16[1] = self.avail_index

    def set_available_flags(self, flags: int) -> None:
        self._avail16[0] = flags

    def set_used_event(self, index: int) -> None:
        self._avail16[2 + self.size] = index & 0xFFFF

    def device_used_index(self) -> int:
        return self._used16[1]

    def avail_event(self) -> int:
        return self._used16[2 + 4 * self.size]

    def kick(self) -> None:
        """Wakes the device whether or not it asked for it."""
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)

    def reset(self) -> None:
        """As a driver finds the queue after a device reset: empty, all indices 0."""
        for part in (self.table, self.available, self.used):
            part.view[:] = bytes(len(part))
        self._free = list(range(self.size - 1, -1, -1))
        self._chains.clear()
        self.avail_index = self.used_index = 0
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)

    def resume_at(self, index: int) -> None:
        """Both rings as they are after this many requests, with none in flight."""
        self.set_available_index(index)
        self._used16[1] = self.used_index = self.avail_index

    # ---- the driver ------------------------------------------------------------------------------------

    @property
    def free_descriptors(self) -> int:
        return len(self._free)

    @property
    def in_flight(self) -> int:
        return len(self._chains)

    def add(self, segments: Sequence[Segment], *, direct: bool = False) -> int:
        """Puts a chain into the table and returns its head; it is not yet visible to the device."""
        if self.indirect and not direct and len(segments) > 1:
            if not self._free:
                raise RingFullError
            table = self.memory.allocate(16 * len(segments))
            last = len(segments) - 1
            for i, part in enumerate(segments):
                flags = (F_WRITE if part.writable else 0) | (F_NEXT if i < last else 0)
                DESCRIPTOR.pack_into(
                    table.view, 16 * i, part.guest_addr, part.size_bytes, flags, i + 1 if i < last else 0
                )
            head = self._free.pop()
            self.put_descriptor(head, table.guest_addr, len(table), F_INDIRECT)
            self._chains[head] = ([head], table)
            return head
        if len(self._free) < len(segments):
            raise RingFullError
        indices = [self._free.pop() for _ in segments]
        for i, part in enumerate(segments):
            more = i + 1 < len(segments)
            flags = (F_WRITE if part.writable else 0) | (F_NEXT if more else 0)
            self.put_descriptor(
                indices[i], part.guest_addr, part.size_bytes, flags, indices[i + 1] if more else 0
            )
        self._chains[indices[0]] = (indices, None)
        return indices[0]

    def adopt(self, head: int, indices: Sequence[int]) -> None:
        """Takes note of a chain written by hand with put_descriptor."""
        for index in indices:
            self._free.remove(index)
        self._chains[head] = (list(indices), None)

    def publish(self, *heads: int) -> None:
        """Makes chains available and kicks when the device wants to know."""
        before = self.avail_index
        for i, head in enumerate(heads):
            self.put_available(before + i, head)
        self.set_available_index(before + len(heads))
        with self._fence:
            pass  # a locked instruction: the index is stored before the device's wish is read
        if self.event_idx:
            wanted = (self.avail_index - self.avail_event() - 1) & 0xFFFF < (
                self.avail_index - before
            ) & 0xFFFF
        else:
            wanted = not self._used16[0] & USED_F_NO_NOTIFY
        if wanted:
            self.kick()

    def pop_used(self) -> Used | None:
        """The next chain that the device has returned; ProtocolError when it was never given."""
        ahead = (self._used16[1] - self.used_index) & 0xFFFF
        if not ahead:
            return None
        if ahead > self.size or ahead > len(self._chains):
            raise ProtocolError(f"used index is {ahead} ahead with {len(self._chains)} chains in flight")
        slot = self.used_index % self.size
        head, length = self._used32[2 * slot], self._used32[2 * slot + 1]
        if head not in self._chains:
            raise ProtocolError(f"used ring names head {head}, which is not in flight")
        indices, table = self._chains.pop(head)
        self._free.extend(reversed(indices))
        if table is not None:
            self.memory.release(table)
        self.used_index = (self.used_index + 1) & 0xFFFF
        return Used(head, length)

    def wait_used(self, socket_fd: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> Used:
        """Sleeps on the call eventfd; TimeoutError, or BackendGoneError when the connection ends."""
        found = self.pop_used()
        if found is not None:
            return found
        poller = select.poll()
        poller.register(self.call_fd, select.POLLIN)
        poller.register(socket_fd, select.POLLRDHUP)
        poller.register(self.err_fd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while True:
            if self.event_idx:
                self.set_used_event(self.used_index)
            with self._fence:
                pass
            found = self.pop_used()
            if found is not None:
                return found
            left_s = deadline - time.monotonic()
            events = poller.poll(max(0.0, left_s) * 1000)
            ready = {fd for fd, _ in events}
            if self.call_fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.call_fd)
            elif socket_fd in ready:
                raise BackendGoneError("the back end hung up while a chain was in flight")
            elif self.err_fd in ready:
                raise RingBrokenError("the back end says that the ring is broken")
            elif left_s <= 0:
                if self.pop_used() is not None:
                    raise ProtocolError("a chain was returned without the interrupt that was asked for")
                raise TimeoutError(f"no chain came back within {timeout_s} s ({self.in_flight} in flight)")

    def error_signalled(self, timeout_s: float) -> bool:
        """True when the back end reports a broken ring on the error eventfd within the time."""
        poller = select.poll()
        poller.register(self.err_fd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
