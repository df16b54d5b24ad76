# SPDX-License-Identifier: Apache-2.0
"""Owns the decision whether --cache=coherent can be kept: is every change to the share seen?
Must not know guests, caches or the C core; runs once, while the server has its rights.
Specification: docs/events.md, "Coherent caches"."""

from __future__ import annotations

import logging
import os

from ..record import replace
from ..share.options import EventsMode
from .source import EventSource

_log = logging.getLogger("vhostfs.events")

LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "f2fs", "bcachefs", "zfs", "jfs", "nilfs2", "reiserfs"}
)
"""Changed by this kernel alone, and through it: another machine's changes make no event here."""


def obstacle(source: EventSource, file_system: str) -> str | None:
    """Why not every change to the share is seen; None: each is. file_system: its type, as mount(8) has it."""
    if source.mode is not EventsMode.FANOTIFY_FILESYSTEM:
        return f"it takes one mark on the whole file system, and here is {source.reason}"
    if not source.knows_child:
        return "this kernel's events do not name the object itself (Linux 5.17 does)"
    if file_system not in LOCAL_FILE_SYSTEMS:
        return f"{file_system} may change without an event: it is not known as a local file system"
    return None


def settle_coherence(source: EventSource, file_system: str) -> EventSource:
    """The source with is_complete as it is. A complete one never moves to marks on inodes."""
    why_not = obstacle(source, file_system)
    if why_not is not None:
        _log.warning("cache: coherent is not possible, so timeouts are those of --cache=auto: %s", why_not)
        return source
    _log.info(
        "cache: coherent, for a guest whose driver takes it; timeouts are those of --cache=auto until then"
    )
    if source.next_fd >= 0:
        os.close(source.next_fd)
    return replace(source, next_fd=-1, is_complete=True)
