# SPDX-License-Identifier: Apache-2.0
"""What the device state machine asks of the world around it: one record for each kind of action.

Must not know who carries them out.
Specification: device.py, whose output they are.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from ..record import Record
from .messages import MemoryRegion


class QueueRole(enum.IntEnum):
    """What a queue is for; values as enum vf_queue_role of the C core."""

    HIPRIO = 0
    NOTIFICATION = 1
    REQUEST = 2


class QueueConfig(Record):
    """Everything that starting a queue takes. Descriptors are borrowed; -1 stands for none."""

    index: int
    role: QueueRole
    size: int
    base: int
    descriptor_addr: int
    available_addr: int
    used_addr: int
    kick_fd: int
    call_fd: int
    err_fd: int
    event_idx: bool
    indirect: bool


class Action(Record):
    """Base of all. After one with is_awaited the machine waits for action_done(result)."""

    is_awaited: ClassVar[bool] = False


class SendReply(Action):
    """Bytes for the front end."""

    data: bytes


class CloseFd(Action):
    """This descriptor is no longer used by the machine or by any earlier action."""

    fd: int


class LogLine(Action):
    """Something that the person who runs the server should know."""

    text: str


class FeaturesAcked(Action):
    """SET_FEATURES was accepted: virtio feature bits, VHOST_USER_F_PROTOCOL_FEATURES included."""

    features: int


class ResetDevice(Action):
    """The device was reset: every queue has stopped, the driver starts anew: end its session.

    May come again while queues are set up. Result: ignored.
    """

    is_awaited: ClassVar[bool] = True


class MapMemory(Action):
    """Replace the whole memory map; fds[i], borrowed, belongs to regions[i]. Result: 0 or negative errno."""

    is_awaited: ClassVar[bool] = True
    regions: tuple[MemoryRegion, ...]
    fds: tuple[int, ...]


class AddRegion(Action):
    """Map one more region; fd is borrowed. Result: 0 or negative errno."""

    is_awaited: ClassVar[bool] = True
    region: MemoryRegion
    fd: int


class RemoveRegion(Action):
    """Unmap a region; no running queue has its rings there. Result: 0 or negative errno."""

    is_awaited: ClassVar[bool] = True
    region: MemoryRegion


class StartQueue(Action):
    """Serve a queue. Result: 0 or negative errno."""

    is_awaited: ClassVar[bool] = True
    config: QueueConfig


class StopQueue(Action):
    """Finish what is under way and stop. Result: next available index (0..65535) or negative errno."""

    is_awaited: ClassVar[bool] = True
    index: int


class SetCall(Action):
    """Exchange a running queue's interrupt eventfd (-1: none). Result: 0 or negative errno."""

    is_awaited: ClassVar[bool] = True
    index: int
    fd: int


class SetErr(Action):
    """Exchange a running queue's error eventfd (-1: none). Result: 0 or negative errno."""

    is_awaited: ClassVar[bool] = True
    index: int
    fd: int
