# SPDX-License-Identifier: Apache-2.0
"""The running kernel as the choice of an event source sees it: one method for each system call.
Must not know what they are tried for.
Specification: events/source.py, Kernel; native/api.h."""

from __future__ import annotations

import errno
import os

from .._native import lib
from ..share.limits import encode_handle

FAN_REPORT_TARGET_FID = 0x1000


class RunningKernel:
    """fanotify_init(2), fanotify_mark(2), inotify_init1(2): a descriptor or 0, or a negative errno."""

    def fanotify_init(self, flags: int) -> int:
        return lib.vf_fanotify_init(flags, os.O_RDONLY)

    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int:
        # By "." and not by the descriptor itself, which may be O_PATH.
        return lib.vf_fanotify_mark(group_fd, flags, mask, directory_fd, b".")

    def start_marker(self, group_fd: int, directory_fd: int, mask: int) -> int:
        return lib.vf_marker_start(group_fd, directory_fd, mask)

    def inotify_init(self, flags: int) -> int:
        return lib.vf_inotify_init(flags)

    def encode_handle(self, directory_fd: int) -> int:
        """name_to_handle_at(2), with AT_HANDLE_FID where there is no usual handle, as the C core does it."""
        error = encode_handle(directory_fd)
        if error == errno.EOPNOTSUPP:
            error = encode_handle(directory_fd, for_events=True)
        return -error

    def close(self, fd: int) -> None:
        os.close(fd)


class LesserKernel(RunningKernel):
    """For experiments: without what it is told to be without.

    target_fid: records name the child of an event, since Linux 5.17. inotify: instances may be had.
    """

    def __init__(self, *, target_fid: bool, inotify: bool) -> None:
        self._target_fid = target_fid
        self._inotify = inotify

    def fanotify_init(self, flags: int) -> int:
        is_lacking = flags & FAN_REPORT_TARGET_FID and not self._target_fid
        return -errno.EINVAL if is_lacking else super().fanotify_init(flags)

    def inotify_init(self, flags: int) -> int:
        return super().inotify_init(flags) if self._inotify else -errno.EMFILE
