# SPDX-License-Identifier: Apache-2.0
"""Parked requests from the driver's side: keeps some waiting at the server, takes elements out.

Knows nothing of what the events mean.
Specification: docs/protocol.md, "FUSE_FSNOTIFY_PARK".
"""

from __future__ import annotations

from collections import deque

from vhostfs.frontend.elements import ElementSource
from vhostfs.frontend.fsnotify import NOTIFY_BUF_BYTES, NOTIFY_FSNOTIFY, Element, park, unpack_element
from vhostfs.frontend.fuse_abi import OUT_HEADER
from vhostfs.frontend.session import Pending, Session
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S


class ParkedRequests(ElementSource):
    """Requests that wait at the server for an element each."""

    def __init__(
        self, session: Session, *, count: int = 16, room_bytes: int = NOTIFY_BUF_BYTES - OUT_HEADER.size
    ) -> None:
        """room_bytes: of each for an element, behind fuse_out_header."""
        super().__init__()
        self.session = session
        self.room_bytes = room_bytes
        self.pending: deque[Pending[bytes]] = deque()
        self._back = 0
        self.offer(count)

    @property
    def with_device(self) -> int:
        return sum(not pending.done for pending in self.pending)

    def offer(self, count: int = 1) -> None:
        queue = self.session.vmm.request_queue()
        new = [self.session.submit(park(self.room_bytes), publish=False, queue=queue) for _ in range(count)]
        if new:
            queue.publish(*(pending.head for pending in new))
        self.pending.extend(new)

    def give_back_all(self) -> None:
        back, self._back = self._back, 0
        self.offer(back)

    # ---- taking ----------------------------------------------------------------------------------------

    def poll(self) -> Element | None:
        return self.take() if self.pending and self.pending[0].done else None

    def take(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> Element:
        """The next element; FuseError when the request was answered with an error."""
        payload = self.pending[0].wait(timeout_s)
        self.pending.popleft()
        header = OUT_HEADER.pack(OUT_HEADER.size + len(payload), NOTIFY_FSNOTIFY, 0)
        self.last_bytes = header + payload
        element = unpack_element(self.last_bytes)
        if self.give_back:
            self.offer()
        else:
            self._back += 1
        self.received += 1
        return element
