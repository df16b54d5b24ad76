# SPDX-License-Identifier: Apache-2.0
"""Elements as a driver takes them, whichever way they come: notification queue or parked requests.

Knows nothing of what the events mean, nor of rings and requests.
Specification: docs/protocol.md.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from vhostfs.frontend.fsnotify import Element
from vhostfs.frontend.vhost_user import DEFAULT_TIMEOUT_S


class ElementSource(ABC):
    """Elements come in the order in which the device used what was offered; that goes back at once."""

    def __init__(self) -> None:
        self.give_back = True
        """Off for a driver that is stuck or slow."""
        self.received = 0
        self.last_bytes = b""
        """The last element as the notification queue carries it."""

    @property
    @abstractmethod
    def with_device(self) -> int:
        """How many the device has and has not used."""

    @abstractmethod
    def offer(self, count: int = 1) -> None:
        """Gives the device this many more, and one kick at most."""

    @abstractmethod
    def give_back_all(self) -> None:
        """What was kept while `give_back` was off."""

    # ---- taking ----------------------------------------------------------------------------------------

    @abstractmethod
    def poll(self) -> Element | None:
        """The next element when it is there already; never waits."""

    @abstractmethod
    def take(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> Element:
        """The next element; TimeoutError, BackendGoneError or RingBrokenError when none comes."""

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
