# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front end and virtio-fs guest in Python, to test and explore servers without a VM.

Layers: vhost_user (wire), memory, ring, vmm (QEMU's part), session (FUSE over queues), client; beside the
last two, notification (the driver of queue 1) with fsnotify (its wire).
`server` starts the server to talk to.
"""

from tests.frontend.client import FuseClient
from tests.frontend.fsnotify import Element, Event
from tests.frontend.fuse_abi import ROOT, FileLock, InitFlag, Opcode, OpenReply, SetattrValid
from tests.frontend.notification import NotificationQueue
from tests.frontend.operations import Call, SecurityContext
from tests.frontend.parked import ParkedRequests
from tests.frontend.ring import RingFullError, Segment, Virtqueue
from tests.frontend.server import ServerProcess, awaited
from tests.frontend.session import Caller, Framing, FuseError, Pending, Session
from tests.frontend.vhost_user import (
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
from tests.frontend.vmm import Machine, Vmm

__all__ = [
    "ROOT",
    "BackendGoneError",
    "Call",
    "Caller",
    "Connection",
    "Element",
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
    "ServerProcess",
    "Session",
    "SetattrValid",
    "Status",
    "Virtqueue",
    "Vmm",
    "awaited",
]
