# SPDX-License-Identifier: Apache-2.0
"""The notification queue from the driver's side: keeps buffers with the device, takes elements out.

Knows nothing of what the events mean. Every buffer is full of a known byte before the device gets it, so
that a write beyond the element shows.
Specification: docs/protocol.md, and virtio 1.2, section 5.11.6.
"""

from __future__ import annotations

from collections.abc import Sequence

from vhostfs.frontend.elements import ElementSource
from vhostfs.frontend.fsnotify import NOTIFY_BUF_BYTES, Element, unpack_element
from vhostfs.frontend.memory import GuestBuffer
from vhostfs.frontend.ring import Segment, Used, Virtqueue
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S, ProtocolError
from vhostfs.frontend.vmm import Vmm

UNTOUCHED = 0xEE


class NotificationQueue(ElementSource):
    """Driver of queue 1.

    `pieces`: sizes that every buffer is cut into, its last piece taking the rest; one piece without it.
    `direct`: chains in the descriptor table itself also where indirect tables are possible.
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
        super().__init__()
        self.vmm = vmm
        self.queue: Virtqueue = vmm.notification_queue
        self.size_bytes = size_bytes
        self.pieces = tuple(pieces)
        self.direct = direct
        self.poison = poison
        self._offered: dict[int, list[GuestBuffer]] = {}
        self._back: list[list[GuestBuffer]] = []
        self.offer(buffers)

    @property
    def with_device(self) -> int:
        return len(self._offered)

    def offer(self, count: int = 1) -> None:
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
        back, self._back = self._back, []
        self._publish(back)

    def forget_buffers(self) -> None:
        """After the queue was reset: no buffer is with the device any more."""
        self._offered.clear()
        self._back.clear()

    # ---- taking ----------------------------------------------------------------------------------------

    def poll(self) -> Element | None:
        used = self.queue.pop_used()
        return None if used is None else self._take(used)

    def take(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> Element:
        return self._take(self.queue.wait_used(self.vmm.connection.fileno(), timeout_s))

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
