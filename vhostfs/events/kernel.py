# SPDX-License-Identifier: Apache-2.0
"""The running kernel as the choice of an event source sees it: system calls by the C core.
Must not know what they are tried for.
Specification: events/source.py, Kernel; native/api.h."""

from __future__ import annotations

import os

from .._native import lib


class RunningKernel:
    """fanotify_init(2), fanotify_mark(2), inotify_init1(2): a descriptor or 0, or a negative errno."""

    def fanotify_init(self, flags: int) -> int:
        return lib.vf_fanotify_init(flags, os.O_RDONLY)

    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int:
        # By "." and not by the descriptor itself, which may be O_PATH.
        return lib.vf_fanotify_mark(group_fd, flags, mask, directory_fd, b".")

    def inotify_init(self, flags: int) -> int:
        return lib.vf_inotify_init(flags)

    def close(self, fd: int) -> None:
        os.close(fd)
