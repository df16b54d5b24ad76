# SPDX-License-Identifier: Apache-2.0
"""Owns the paths of nodes as the guest sees them: asked of the kernel, remembered for a moment.
Must not know events or who asks; may block on storage, so it belongs in a thread.
Specification: proc(5), /proc/pid/fd."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

KEPT_S = 0.5
MAX_KEPT = 4096
_DELETED = " (deleted)"


class OpenNodes(Protocol):
    """What of the share is needed."""

    def open_inode(self, nodeid: int) -> int: ...


class NodePaths:
    """Paths relative to the share's root, which is "/". One thread at a time."""

    def __init__(self, nodes: OpenNodes, proc_fd_dir: int, root: str, clock: Callable[[], float]) -> None:
        """
        proc_fd_dir: a directory descriptor of /proc/self/fd, which stays the caller's. root: the share's root
        in this process's view. clock: seconds that only grow.
        """
        self._nodes = nodes
        self._proc_fd_dir = proc_fd_dir
        self._prefix = root.rstrip("/")
        self._clock = clock
        self._kept: dict[int, tuple[float, str | None]] = {}

    def path(self, nodeid: int) -> str | None:
        """None: the guest does not hold it any more, or it has no path inside the share."""
        now_s = self._clock()
        kept = self._kept.get(nodeid)
        if kept is not None and kept[0] > now_s:
            return kept[1]
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        path = self._ask(nodeid)
        self._kept[nodeid] = (now_s + KEPT_S, path)
        return path

    def forget(self) -> None:
        """A directory has moved: what is remembered may be wrong."""
        self._kept.clear()

    def _ask(self, nodeid: int) -> str | None:
        try:
            fd = self._nodes.open_inode(nodeid)
        except OSError:
            return None
        try:
            seen = os.readlink(str(fd), dir_fd=self._proc_fd_dir)
            if seen.endswith(_DELETED) and not _is_named(fd, seen):
                seen = seen.removesuffix(_DELETED)
        except OSError:
            return None
        finally:
            os.close(fd)
        if seen == self._prefix or (seen == "/" and not self._prefix):
            return "/"
        if not seen.startswith(self._prefix + "/"):
            return None
        return seen[len(self._prefix) :]


def _is_named(fd: int, path: str) -> bool:
    """Whether the name itself ends in what the kernel appends to the path of a file that is gone."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False
