# SPDX-License-Identifier: Apache-2.0
"""Owns one native device: guest memory and the rings that serve it, as the C core runs them.

Must not know vhost-user messages or FUSE; what to do comes as actions.
Specification: native/api.h, "the device".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from .._native import ffi, lib
from ..record import Record
from ..share.native_share import Share
from ..vhost_user.actions import QueueConfig
from ..vhost_user.messages import MemoryRegion


class Fault(Record):
    """Why a queue stopped serving (queue -1: not tied to one); one line."""

    queue: int
    text: str


class NativeDevice:
    """Owns one vf_device. Results are as the C core gives them: 0 or more, or a negative errno.

    Calls may block; one at a time, from any thread.
    """

    def __init__(self, share: Share, max_queues: int) -> None:
        error = ffi.new("int *")
        self._native = lib.vf_device_new(share.native, max_queues, error)
        if self._native == ffi.NULL:
            raise OSError(-error[0], os.strerror(-error[0]))

    def close(self) -> None:
        """Stops every queue, waits for requests under way, unmaps guest memory."""
        native, self._native = self._native, ffi.NULL
        if native != ffi.NULL:
            lib.vf_device_free(native)

    def set_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> int:
        """Replaces the memory map; no queue may run."""
        native = ffi.new("struct vf_region[]", [_region_fields(region) for region in regions])
        native_fds = ffi.new("int[]", list(fds))
        return lib.vf_device_set_memory(self._native, native, native_fds, len(regions))

    def add_region(self, region: MemoryRegion, fd: int) -> int:
        """Maps one more region."""
        native = ffi.new("struct vf_region *", _region_fields(region))
        return lib.vf_device_add_region(self._native, native, fd)

    def remove_region(self, region: MemoryRegion) -> int:
        """Unmaps a region."""
        native = ffi.new("struct vf_region *", _region_fields(region))
        return lib.vf_device_remove_region(self._native, native)

    def start_queue(self, config: QueueConfig) -> int:
        """Starts serving a queue in a thread of its own."""
        native = ffi.new("struct vf_queue_config *")
        native.index = config.index
        native.role = int(config.role)
        native.size = config.size
        native.base = config.base
        native.desc_addr = config.descriptor_addr
        native.avail_addr = config.available_addr
        native.used_addr = config.used_addr
        native.kick_fd = config.kick_fd
        native.call_fd = config.call_fd
        native.err_fd = config.err_fd
        native.event_idx = config.event_idx
        native.indirect = config.indirect
        return lib.vf_queue_start(self._native, native)

    def stop_queue(self, index: int) -> int:
        """Finishes what is under way; the next available index."""
        return lib.vf_queue_stop(self._native, index)

    def set_call(self, index: int, fd: int) -> int:
        """Exchanges a running queue's interrupt eventfd; -1 for none."""
        return lib.vf_queue_set_call(self._native, index, fd)

    def set_err(self, index: int, fd: int) -> int:
        """Exchanges a running queue's error eventfd; -1 for none."""
        return lib.vf_queue_set_err(self._native, index, fd)

    @property
    def fault_fd(self) -> int:
        """Readable when a fault waits; the device's own."""
        return lib.vf_device_fault_fd(self._native)

    def take_faults(self) -> Iterator[Fault]:
        """The faults that wait, oldest first."""
        native = ffi.new("struct vf_fault *")
        while lib.vf_device_next_fault(self._native, native) == 1:
            yield Fault(native.queue, ffi.string(native.text).decode(errors="replace"))


def _region_fields(region: MemoryRegion) -> tuple[int, int, int, int]:
    return (region.guest_addr, region.size_bytes, region.user_addr, region.mmap_offset)
