# SPDX-License-Identifier: Apache-2.0
"""One vring as the front end has described it, and the rule by which it runs.

Must not know messages' bytes, other vrings, or the C core.
Specification: https://qemu-project.gitlab.io/qemu/interop/vhost-user.html, "Ring states"; virtio 1.3, 2.7.

Theory. What the front end says about a vring comes in any order, again and again, also for vrings
that no driver ever set up. So there is no sequence to follow but a set of facts, and one rule:

    fact         made true by                                made false by
    SIZED        SET_VRING_NUM                               RESET_DEVICE
    PLACED       SET_VRING_ADDR                              RESET_DEVICE
    KICKABLE     SET_VRING_KICK                              GET_VRING_BASE, resets, a start that failed
    ENABLED      SET_VRING_ENABLE 1, or SET_FEATURES         SET_VRING_ENABLE 0, resets
                 without VHOST_USER_F_PROTOCOL_FEATURES
    MAPPED       all three parts lie in guest memory         memory messages that unmap them
    NEGOTIATED   SET_FEATURES                                resets

A vring runs exactly while all six hold. After every message the device compares the rule with what
is and starts or stops vrings (device.py). The base survives a stop, so that a vring which is
disabled, or whose memory is exchanged under it, carries on where it was. A vring that lacks nothing
but MAPPED and never ran there is refused: its front end is wrong about its own memory.

The specification starts a ring at the first kick. Ours starts when a kick descriptor is there: the
C core looks at the ring once and then waits on it, which also serves kicks that came early.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from .messages import MemoryRegion, ProtocolError, VringAddress

MAX_VRING_SIZE = 32768
"""Descriptors in one split ring, by virtio's rules."""

NO_FD = -1


class VringFact(enum.Flag):
    """What has to hold for a vring to run."""

    SIZED = enum.auto()
    PLACED = enum.auto()
    KICKABLE = enum.auto()
    ENABLED = enum.auto()
    MAPPED = enum.auto()
    NEGOTIATED = enum.auto()


ALL_FACTS = (
    VringFact.SIZED
    | VringFact.PLACED
    | VringFact.KICKABLE
    | VringFact.ENABLED
    | VringFact.MAPPED
    | VringFact.NEGOTIATED
)


class Vring:
    """The facts of one vring. Descriptors here are owned by it; NO_FD stands for none."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.base = 0
        self.address: VringAddress | None = None
        self.kick_fd = NO_FD
        self.call_fd = NO_FD
        self.err_fd = NO_FD
        self.is_enabled = False
        self.is_running = False
        # It ran until a memory message took its place away, and goes on when it is back.
        self.waits_for_memory = False

    def facts(self, regions: Iterable[MemoryRegion], *, is_negotiated: bool) -> VringFact:
        """What holds, with this guest memory."""
        facts = VringFact(0)
        if self.size:
            facts |= VringFact.SIZED
        if self.address is not None:
            facts |= VringFact.PLACED
        if self.kick_fd != NO_FD:
            facts |= VringFact.KICKABLE
        if self.is_enabled:
            facts |= VringFact.ENABLED
        if is_negotiated:
            facts |= VringFact.NEGOTIATED
        if self.is_mapped(tuple(regions)):
            facts |= VringFact.MAPPED
        return facts

    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """Name, front-end address and size in bytes of each part; the event index words are included."""
        if self.address is None or not self.size:
            return ()
        return (
            ("descriptor table", self.address.descriptor, 16 * self.size),
            ("available ring", self.address.available, 6 + 2 * self.size),
            ("used ring", self.address.used, 6 + 8 * self.size),
        )

    def is_mapped(self, regions: tuple[MemoryRegion, ...]) -> bool:
        """Whether every part lies within one region."""
        parts = self.parts()
        return bool(parts) and all(
            any(region.contains_user(addr, size_bytes) for region in regions)
            for _name, addr, size_bytes in parts
        )

    def set_size(self, size: int) -> None:
        """SET_VRING_NUM; raises ProtocolError."""
        if not 0 < size <= MAX_VRING_SIZE or size & (size - 1):
            raise ProtocolError(
                f"size {size} of queue {self.index} is not a power of two up to {MAX_VRING_SIZE}"
            )
        if self.is_running and size != self.size:
            raise ProtocolError(f"queue {self.index} runs, its size cannot change")
        self.size = size

    def set_base(self, base: int) -> None:
        """SET_VRING_BASE; raises ProtocolError."""
        if base > 0xFFFF:
            raise ProtocolError(f"base {base} of queue {self.index} exceeds 65535")
        if self.is_running:
            raise ProtocolError(f"queue {self.index} runs, its base cannot change")
        self.base = base

    def set_address(self, address: VringAddress, regions: tuple[MemoryRegion, ...]) -> None:
        """SET_VRING_ADDR; raises ProtocolError. The log address is ignored: logging is not offered."""
        for name, addr, alignment in (
            ("descriptor table", address.descriptor, 16),
            ("available ring", address.available, 2),
            ("used ring", address.used, 4),
        ):
            if addr % alignment:
                raise ProtocolError(
                    f"{name} of queue {self.index} at {addr:#x} is not aligned to {alignment} bytes"
                )
            if not any(region.contains_user(addr, alignment) for region in regions):
                raise ProtocolError(f"{name} of queue {self.index} at {addr:#x} is in no memory region")
        old = self.address
        if (
            self.is_running
            and old is not None
            and (
                (old.descriptor, old.available, old.used)
                != (address.descriptor, address.available, address.used)
            )
        ):
            raise ProtocolError(f"queue {self.index} runs, its address cannot change")
        self.address = address

    def fds(self) -> list[int]:
        """Every descriptor that it owns."""
        return [fd for fd in (self.kick_fd, self.call_fd, self.err_fd) if fd != NO_FD]
