# SPDX-License-Identifier: Apache-2.0
"""Guest memory: a memfd seen as one or more regions at chosen guest addresses, and an allocator in it.

Knows nothing of rings or messages; the addresses it hands out are guest-physical.
Specification: the memory regions of vhost-user; what lies between regions is unmapped, as in a real machine.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_BYTES = 4096
USER_BASE = 0x7F10_0000_0000
"""Where the front end claims to have its memory mapped; a lie, so that a server that used it would crash."""


@dataclass(frozen=True, slots=True)
class Region:
    """One region as it is told to the back end; all in bytes."""

    guest_addr: int
    size_bytes: int
    user_addr: int
    mmap_offset: int
    fd: int


@dataclass(frozen=True, slots=True)
class GuestBuffer:
    """Bytes of guest memory: `view` is the memory itself."""

    guest_addr: int
    view: memoryview
    size_class: int
    region: int

    def __len__(self) -> int:
        return len(self.view)

    def bytes(self, size_bytes: int | None = None) -> bytes:
        return bytes(self.view if size_bytes is None else self.view[:size_bytes])


def spread_addresses(count: int, size_bytes: int) -> tuple[int, ...]:
    """Region 0 at guest address 0, the others above 4 GiB with holes between them."""
    return tuple(0 if i == 0 else (4 << 30) + 2 * i * size_bytes for i in range(count))


def adjoining_addresses(count: int, size_bytes: int) -> tuple[int, ...]:
    """Regions that touch each other in guest memory, so that a buffer may lie across a border."""
    return tuple(0x1000_0000 + i * size_bytes for i in range(count))


class GuestMemory:
    """Memory of a guest: allocations go round the regions in turn, so that one request uses several."""

    def __init__(self, guest_addrs: Sequence[int] = (0,), region_bytes: int = 64 << 20) -> None:
        if region_bytes % PAGE_BYTES:
            raise ValueError("region_bytes must be whole pages")
        self._lock = threading.Lock()
        self._maps: list[memoryview] = []
        self.regions: list[Region] = []
        self._next_free: list[int] = []
        self._free: dict[tuple[int, int], list[GuestBuffer]] = {}
        self._turn = 0
        self._fds: list[int] = []
        fd = self._new_memfd(region_bytes * len(guest_addrs))
        for i, guest_addr in enumerate(guest_addrs):
            self._attach(guest_addr, region_bytes, i * region_bytes, fd)

    def _new_memfd(self, size_bytes: int) -> int:
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        self._fds.append(fd)
        return fd

    def _attach(self, guest_addr: int, size_bytes: int, offset: int, fd: int) -> Region:
        self._maps.append(memoryview(mmap.mmap(fd, size_bytes, offset=offset)))
        region = Region(guest_addr, size_bytes, USER_BASE + guest_addr, offset, fd)
        self.regions.append(region)
        # A guest has its own things at the start; not handing it out keeps address 0 a sure mistake.
        self._next_free.append(PAGE_BYTES)
        return region

    def plug(self, guest_addr: int, size_bytes: int) -> Region:
        """A further region with a descriptor of its own, as memory hot plug makes it."""
        return self._attach(guest_addr, size_bytes, 0, self._new_memfd(size_bytes))

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def allocate(self, size_bytes: int, *, align: int = 16, region: int | None = None) -> GuestBuffer:
        """Zeroed on first use only; MemoryError when the region is full."""
        size_class = max(64, 1 << (max(size_bytes, align) - 1).bit_length())
        with self._lock:
            if region is None:
                region = self._turn % len(self._maps)
                self._turn += 1
            free = self._free.get((region, size_class))
            if free:
                old = free.pop()
                addr, start = old.guest_addr, old.guest_addr - self.regions[region].guest_addr
            else:
                start = -(-self._next_free[region] // size_class) * size_class
                if start + size_class > self.regions[region].size_bytes:
                    raise MemoryError(f"guest memory region {region} is full")
                self._next_free[region] = start + size_class
                addr = self.regions[region].guest_addr + start
        return GuestBuffer(addr, self._maps[region][start : start + size_bytes], size_class, region)

    def release(self, buffer: GuestBuffer) -> None:
        with self._lock:
            self._free.setdefault((buffer.region, buffer.size_class), []).append(buffer)

    def at(self, guest_addr: int, size_bytes: int) -> memoryview:
        """The memory at a guest address; ValueError when it is not wholly in one region."""
        for region, view in zip(self.regions, self._maps, strict=True):
            start = guest_addr - region.guest_addr
            if start >= 0 and start + size_bytes <= region.size_bytes:
                return view[start : start + size_bytes]
        raise ValueError(f"{size_bytes} bytes at {guest_addr:#x} are in no region")

    def user_addr(self, guest_addr: int) -> int:
        """The front end's own address of a guest address, as SET_VRING_ADDR wants it."""
        for region in self.regions:
            if 0 <= guest_addr - region.guest_addr < region.size_bytes:
                return region.user_addr + guest_addr - region.guest_addr
        raise ValueError(f"{guest_addr:#x} is in no region")
