# SPDX-License-Identifier: Apache-2.0
"""The notification queue from the driver's side: keeps buffers with the device, takes elements out.

Knows nothing of what the events mean. Every buffer is full of a known byte before the device gets it, so
that a write beyond the element shows.
Specification: docs/protocol.md, and virtio 1.2, section 5.11.6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vhostfs.frontend.fsnotify import NOTIFY_BUF_BYTES, Element, unpack_element
from vhostfs.frontend.memory import GuestBuffer
from vhostfs.frontend.ring import Segment, Used, Virtqueue
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S, ProtocolError
from vhostfs.frontend.vmm import Vmm

UNTOUCHED = 0xEE


class NotificationQueue:
    """Driver of queue 1. Elements are given out in the order of the used ring, each buffer goes back at once.

    `pieces`: sizes that every buffer is cut into, its last piece taking the rest; one piece without it.
    `direct`: chains in the descriptor table itself also where indirect tables are possible.
    `give_back`: off for a driver that is stuck or slow.
    """

    def __init__(
        self,
        vmm: Vmm,
        *,
        buffers: int = 16,
        size_bytes: int = NOTIFY_BUF_BYTES,
        pieces: Sequence[int] = (),
        direct: bool = False,
        poison: bool = True,
    ) -> None:
        self.vmm = vmm
        self.queue: Virtqueue = vmm.notification_queue
        self.size_bytes = size_bytes
        self.pieces = tuple(pieces)
        self.direct = direct
        self.poison = poison
        self.give_back = True
        self.received = 0
        self.last_bytes = b""
        """The last element as the device wrote it."""
        self._offered: dict[int, list[GuestBuffer]] = {}
        self._back: list[list[GuestBuffer]] = []
        self.offer(buffers)

    @property
    def with_device(self) -> int:
        """Buffers that the device has and has not used."""
        return len(self._offered)

    def offer(self, count: int = 1) -> None:
        """Gives the device this many more buffers, and one kick at most."""
        self._publish([self._new_buffer() for _ in range(count)])

    def _new_buffer(self) -> list[GuestBuffer]:
        sizes = [size for size in self.pieces if size]
        rest = self.size_bytes - sum(sizes)
        return [self.vmm.memory.allocate(size) for size in [*sizes, rest] if size > 0]

    def _publish(self, buffers: Sequence[list[GuestBuffer]]) -> None:
        heads = []
        for parts in buffers:
            if self.poison:
                for part in parts:
                    part.view[:] = bytes([UNTOUCHED]) * len(part)
            segments = [Segment(part.guest_addr, len(part), writable=True) for part in parts]
            head = self.queue.add(segments, direct=self.direct)
            self._offered[head] = parts
            heads.append(head)
        if heads:
            self.queue.publish(*heads)

    def give_back_all(self) -> None:
        """Buffers kept while `give_back` was off."""
        back, self._back = self._back, []
        self._publish(back)

    def forget_buffers(self) -> None:
        """After the queue was reset: no buffer is with the device any more."""
        self._offered.clear()
        self._back.clear()

    # ---- taking ----------------------------------------------------------------------------------------

    def poll(self) -> Element | None:
        """The next element when it is there already; never waits."""
        used = self.queue.pop_used()
        return None if used is None else self._take(used)

    def take(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> Element:
        """The next element; TimeoutError, BackendGoneError or RingBrokenError when none comes."""
        return self._take(self.queue.wait_used(self.vmm.connection.fileno(), timeout_s))

    def receive(self, count: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Element]:
        """Exactly this many, all within the time."""
        deadline = time.monotonic() + timeout_s
        return [self.take(max(0.0, deadline - time.monotonic())) for _ in range(count)]

    def until(
        self, last: Callable[[Element], bool], timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> tuple[list[Element], Element]:
        """What comes before the first element that `last` accepts, and that one."""
        deadline = time.monotonic() + timeout_s
        before: list[Element] = []
        while True:
            try:
                element = self.take(max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                raise TimeoutError(
                    f"the awaited element did not come in {timeout_s} s; {len(before)} others came,"
                    f" the last ones are {before[-5:]}"
                ) from error
            if last(element):
                return before, element
            before.append(element)

    def _take(self, used: Used) -> Element:
        parts = self._offered.pop(used.head)
        room = b"".join(map(GuestBuffer.bytes, parts))
        if used.length_bytes > len(room):
            raise ProtocolError(f"used length {used.length_bytes} of a buffer of {len(room)} bytes")
        self.last_bytes = room[: used.length_bytes]
        element = unpack_element(self.last_bytes)
        if self.poison and room[used.length_bytes :].strip(bytes([UNTOUCHED])):
            raise ProtocolError(f"bytes behind {element} were written too: {room[used.length_bytes :]!r}")
        if self.give_back:
            self._publish([parts])
        else:
            self._back.append(parts)
        self.received += 1
        return element
