# SPDX-License-Identifier: Apache-2.0
"""A guest that watches a share, and says in words what the server told it.

Must not know what is right; tests compare the words. An element is written `EVENT dir[name]=child`, an event
on an object itself `EVENT object`; objects are named by the path under which the guest first held them.
`pair 1` stands behind both halves of the first rename that came as one, `half` behind a plain one,
`unlinked` behind what was done through a name that was gone.
Specification: docs/protocol.md.
"""

from __future__ import annotations

import enum
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.limits import HANG_S
from tests.ring.share import Share
from vhostfs.frontend import FuseClient, Machine, NotificationQueue, ParkedRequests
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend.elements import ElementSource
from vhostfs.frontend.fsnotify import (
    ALL_EVENTS,
    CHANGES,
    Element,
    ElementFlag,
    Event,
    Granted,
    InitAnswer,
)

WATCHED = CHANGES | Event.EVENT_ON_CHILD
"""What a program that follows changes asks for, as inotify puts it into the inode's mask."""
STOCK = Machine(region_bytes=16 << 20)
NOTIFYING = STOCK.with_notifications()


class Delivery(enum.Enum):
    """The ways for events to travel."""

    VIRTQUEUE = Granted.VIRTQUEUE
    PARKED = Granted.PARKED

    @property
    def machine(self) -> Machine:
        return NOTIFYING if self is Delivery.VIRTQUEUE else STOCK


@dataclass(frozen=True, slots=True)
class Held:
    """An object as the guest holds it."""

    nodeid: int
    generation: int


class EventGuest:
    """Mounts the share and negotiates events; `told` is what came since it was last asked."""

    def __init__(
        self,
        share: Share,
        *,
        delivery: Delivery = Delivery.VIRTQUEUE,
        machine: Machine | None = None,
        buffers: int = 16,
        flags: int | None = None,
        mask: int = ALL_EVENTS,
        pieces: Sequence[int] = (),
        direct: bool = False,
        poison: bool = True,
        mounted: FuseClient | None = None,
        notifications: ElementSource | None = None,
    ) -> None:
        """`mounted`, `notifications`: what is left of a guest before, on the same connection.

        machine and flags follow from the delivery where they are not given; with parked requests, buffers is
        their number.
        """
        self.share = share
        self.fs = mounted or share.mount(machine or delivery.machine)
        if notifications is None and delivery is Delivery.VIRTQUEUE:
            notifications = NotificationQueue(
                self.fs.vmm, buffers=buffers, pieces=pieces, direct=direct, poison=poison
            )
        if flags is None:
            flags = delivery.value | Granted.RENAME | Granted.CHILD
        self.granted: InitAnswer = self.fs.fsnotify_init(flags, mask)
        self.notifications = notifications or ParkedRequests(self.fs.session, count=buffers)
        self._names: dict[tuple[int, int], str] = {}
        self._held: dict[str, Held] = {"": Held(self.fs.root, self._generation_of_root())}
        self._names[self.fs.root, self._held[""].generation] = "."
        self._fences = itertools.count()
        self._fence = f".fence-{os.urandom(4).hex()}"
        self._pairs: dict[int, int] = {}
        (share.path / self._fence).mkdir()
        node = self.node(self._fence)
        self.fs.watch(node.nodeid, Event.CREATE, node.generation)

    @property
    def notification_queue(self) -> NotificationQueue:
        """Where events travel by it."""
        assert isinstance(self.notifications, NotificationQueue)
        return self.notifications

    def _generation_of_root(self) -> int:
        """The share's exported root has generation 0; below it, the entry says."""
        if not self.share.relative:
            return 0
        root = self.fs.root
        self.fs.root = abi.ROOT
        try:
            return self.fs.walk(self.share.relative).generation
        finally:
            self.fs.root = root

    # ---- what it holds and watches ---------------------------------------------------------------------

    def hold(self, *paths: str) -> None:
        """Looks paths up, each object once, and keeps them as a guest's dentry cache does."""
        for path in paths:
            if path not in self._held:
                above, _, name = path.rpartition("/")
                self.know(path, self.fs.lookup(self.node(above).nodeid, name))

    def know(self, path: str, entry: abi.Entry) -> None:
        """Gives an object that the guest has got otherwise its name."""
        self._held[path] = Held(entry.nodeid, entry.generation)
        self._names.setdefault((entry.nodeid, entry.generation), path)

    def node(self, path: str) -> Held:
        self.hold(path)
        return self._held[path]

    def watch(self, path: str, mask: int = WATCHED) -> None:
        """Watches from now on: what happened earlier is waited for and thrown away."""
        node = self.node(path)
        self.fs.watch(node.nodeid, mask, node.generation)
        self.told()

    def unwatch(self, path: str) -> None:
        self.watch(path, 0)

    def forget(self, path: str) -> None:
        """Gives up all that the guest holds of this object, and its name."""
        node = self._held.pop(path)
        self.fs.forget(node.nodeid, 1)

    # ---- what it is told -------------------------------------------------------------------------------

    def elements(self, timeout_s: float = HANG_S) -> list[Element]:
        """Everything that happened on the host before now: all that comes before an event made for this.

        There is one queue, in order, so nothing needs to be waited out.
        """
        name = str(next(self._fences))
        (self.share.path / self._fence / name).mkdir()
        fence = self._held[self._fence].nodeid
        wanted = name.encode()
        before, _ = self.notifications.until(
            lambda element: (
                element.nodeid == fence and element.name == wanted and not element.flags & ElementFlag.CACHES
            ),
            timeout_s,
        )
        return before

    def told(self, timeout_s: float = HANG_S) -> list[str]:
        """The same in words."""
        return [self.describe(element) for element in self.elements(timeout_s)]

    def told_until(self, last: str, timeout_s: float = HANG_S) -> list[str]:
        """The same until this has come, where the fence may overtake it: order holds within a directory."""
        deadline = time.monotonic() + timeout_s
        told = self.told()
        while last not in told and time.monotonic() < deadline:
            told += self.told()
        return told

    def describe(self, element: Element) -> str:
        words = "|".join(bit.name or hex(bit) for bit in reversed(Event) if bit & element.mask)
        if element.mask & Event.Q_OVERFLOW:
            return words
        place = self._name_of(element.nodeid, element.generation)
        if element.name:
            place += f"[{os.fsdecode(element.name)}]"
        if element.child_nodeid:
            place += f"={self._name_of(element.child_nodeid, element.child_generation)}"
        if element.flags & ElementFlag.CACHES:
            return f"caches: {words} {place}"
        if element.flags & ElementFlag.UNLINKED:
            place += " unlinked"
        elif element.flags:
            place += f" pair {self._pairs.setdefault(element.cookie, len(self._pairs) + 1)}"
        elif element.mask & (Event.MOVED_FROM | Event.MOVED_TO):
            place += " half"
        return f"{words} {place}"

    def _name_of(self, nodeid: int, generation: int) -> str:
        return self._names.get((nodeid, generation), f"<node {nodeid:#x} generation {generation}>")


def merged(told: Iterable[str]) -> list[str]:
    """Identical neighbours as one: whether the server had given the first away already is a race."""
    return [line for line, _ in itertools.groupby(told)]


def write(path: Path, data: bytes = b"x", flags: int = 0) -> None:
    """One write to a file that is there, with no truncation and no creation."""
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
