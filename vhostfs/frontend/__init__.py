# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front end and virtio-fs guest in Python, to test and explore servers without a VM.

Must not import anything else of vhostfs: it repeats the protocols' numbers on purpose, so that a mistake
of the server's is not made twice. Specification: docs/protocol.md, and what each module names.

Layers: vhost_user (wire), memory, ring, vmm (QEMU's part), session (FUSE over queues), client; beside the
last two, elements with fsnotify (their wire), which come by notification (the driver of queue 1) or parked.
"""

from vhostfs.frontend.client import FuseClient
from vhostfs.frontend.elements import ElementSource
from vhostfs.frontend.fsnotify import Element, Event
from vhostfs.frontend.fuse_abi import ROOT, FileLock, InitFlag, Opcode, OpenReply, SetattrValid
from vhostfs.frontend.notification import NotificationQueue
from vhostfs.frontend.operations import Call, SecurityContext
from vhostfs.frontend.parked import ParkedRequests
from vhostfs.frontend.ring import RingFullError, Segment, Virtqueue
from vhostfs.frontend.session import Caller, Framing, FuseError, Pending, Session
from vhostfs.frontend.vhost_user import (
    BackendGoneError,
    Connection,
    Feature,
    Message,
    MessageRefusedError,
    ProtocolError,
    ProtocolFeature,
    RingBrokenError,
    Status,
)
from vhostfs.frontend.vmm import Machine, Vmm

__all__ = [
    "ROOT",
    "BackendGoneError",
    "Call",
    "Caller",
    "Connection",
    "Element",
    "ElementSource",
    "Event",
    "Feature",
    "FileLock",
    "Framing",
    "FuseClient",
    "FuseError",
    "InitFlag",
    "Machine",
    "Message",
    "MessageRefusedError",
    "NotificationQueue",
    "Opcode",
    "OpenReply",
    "ParkedRequests",
    "Pending",
    "ProtocolError",
    "ProtocolFeature",
    "RingBrokenError",
    "RingFullError",
    "SecurityContext",
    "Segment",
    "Session",
    "SetattrValid",
    "Status",
    "Virtqueue",
    "Vmm",
]
