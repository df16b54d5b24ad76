# SPDX-License-Identifier: Apache-2.0
"""Parked requests from the driver's side: keeps some waiting at the server, takes elements out.

Knows nothing of what the events mean. Offers what NotificationQueue does, so that a guest can have either.
Specification: docs/protocol.md, "FUSE_FSNOTIFY_PARK".
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from vhostfs.frontend.fsnotify import NOTIFY_BUF_BYTES, NOTIFY_FSNOTIFY, Element, park, unpack_element
from vhostfs.frontend.fuse_abi import OUT_HEADER
from vhostfs.frontend.session import Pending, Session
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S


class ParkedRequests:
    """Elements are given out in the order of the requests that they answer; each is parked again at once.

    `give_back`: off for a driver that is stuck or slow.
    """

    def __init__(
        self, session: Session, *, count: int = 16, room_bytes: int = NOTIFY_BUF_BYTES - OUT_HEADER.size
    ) -> None:
        """room_bytes: of each for an element, behind fuse_out_header."""
        self.session = session
        self.room_bytes = room_bytes
        self.give_back = True
        self.received = 0
        self.last_bytes = b""
        """The last element as the notification queue would have carried it."""
        self.pending: deque[Pending[bytes]] = deque()
        self._back = 0
        self.offer(count)

    @property
    def with_device(self) -> int:
        """Requests that the server has and has not answered."""
        return sum(not pending.done for pending in self.pending)

    def offer(self, count: int = 1) -> None:
        """Parks this many more, with one kick at most."""
        queue = self.session.vmm.request_queue()
        new = [self.session.submit(park(self.room_bytes), publish=False, queue=queue) for _ in range(count)]
        if new:
            queue.publish(*(pending.head for pending in new))
        self.pending.extend(new)

    def give_back_all(self) -> None:
        """Requests not parked again while `give_back` was off."""
        back, self._back = self._back, 0
        self.offer(back)

    # ---- taking ----------------------------------------------------------------------------------------

    def poll(self) -> Element | None:
        """The next element when it is there already; never waits."""
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
