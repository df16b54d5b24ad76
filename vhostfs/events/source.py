# SPDX-License-Identifier: Apache-2.0
"""Owns the choice of the host's event source: tries what the kernel allows, best first, and says why.
Must not know the C core's configuration, sandboxes or guests; runs once, while the server has its rights.
Specification: fanotify_init(2), fanotify_mark(2), inotify(7); docs/events.md."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Protocol

from ..errors import UserError
from ..record import Record, replace
from ..share.options import EventsMode
from .masks import DELIVERABLE, INOTIFY_EVENTS, FsEvent

# linux/fanotify.h, linux/inotify.h
FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_UNLIMITED_QUEUE = 0x10
FAN_UNLIMITED_MARKS = 0x20
FAN_REPORT_DFID_NAME = 0x400 | 0x800
FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_DFID_NAME | 0x200 | 0x1000
FAN_MARK_ADD = 0x1
FAN_MARK_REMOVE = 0x2
FAN_MARK_ONLYDIR = 0x8
FAN_MARK_INODE = 0x0
FAN_MARK_FILESYSTEM = 0x100
IN_CLOEXEC = os.O_CLOEXEC
IN_NONBLOCK = os.O_NONBLOCK

_GROUP = FAN_CLOEXEC | FAN_NONBLOCK
_UNLIMITED = FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS

FILESYSTEM_EVENTS = (
    FsEvent.CREATE
    | FsEvent.DELETE
    | FsEvent.MODIFY
    | FsEvent.ATTRIB
    | FsEvent.CLOSE_WRITE
    | FsEvent.DELETE_SELF
    | FsEvent.MOVE_SELF
    | FsEvent.ISDIR
)
"""Of the mark on a whole file system, besides renames. OPEN, ACCESS and CLOSE_NOWRITE come with every read of
every file there; the few inodes whose watchers want them are marked one by one."""
_MOVES = FsEvent.MOVED_FROM | FsEvent.MOVED_TO


class EventSourceError(UserError):
    """A source that was asked for and cannot be had; the text says why and what can."""


class Kernel(Protocol):
    """The system calls that the choice is made by. A descriptor or 0, or a negative errno."""

    def fanotify_init(self, flags: int) -> int: ...
    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int: ...
    def start_marker(self, group_fd: int, directory_fd: int, mask: int) -> int: ...
    def inotify_init(self, flags: int) -> int: ...
    def encode_handle(self, directory_fd: int) -> int: ...
    def close(self, fd: int) -> None: ...


class EventSource(Record):
    """An open group and what it can do; the descriptor is the owner's to close or hand on."""

    mode: EventsMode  # FANOTIFY_FILESYSTEM, FANOTIFY_INODES or INOTIFY
    fd: int
    filesystem_mask: int  # FS_* bits that a mark on the root's file system reports already; 0: no such mark
    host_mask: int  # FS_* bits that the host can be asked for; RENAME where both sides come in one record
    knows_child: bool  # records name the child itself, not only its directory and name
    reason: str
    order_fd: int = -1  # fanotify: an inotify instance that keeps the order of events; -1: none
    # A group without marks, for marks on inodes when the file system turns out busy; -1: none
    next_fd: int = -1
    # Sets and removes the mark on the file system when it is told to; -1: it is there, or there is none
    marker_fd: int = -1
    # Every change to the share's file system is seen, with its object; coherence.py decides
    is_complete: bool = False

    @property
    def joins_renames(self) -> bool:
        """Whether the halves of a rename are known to belong together: FAN_RENAME, or inotify's cookie."""
        by_cookie = self.mode is EventsMode.INOTIFY or self.order_fd >= 0
        return by_cookie or bool(self.host_mask & FsEvent.RENAME)

    def __str__(self) -> str:
        return f"events: {self.reason}"


def choose_source(
    wanted: EventsMode,
    root_fd: int,
    kernel: Kernel,
    *,
    use_rename: bool = True,
) -> EventSource:
    """
    Opens the best source there is, or the one that was asked for. Raises EventSourceError.

    root_fd: the share's root, an O_PATH directory. use_rename: False: as if the kernel had no FAN_RENAME.
    """
    why_not = ""
    if wanted is not EventsMode.INOTIFY:
        try:
            return _with_order(_fanotify(wanted, root_fd, kernel, use_rename), kernel)
        except _NotPossibleError as error:
            if wanted is not EventsMode.AUTO:
                raise EventSourceError(f"--events={wanted.value} is not possible: {error}") from None
            why_not = f" (fanotify: {error})"
    fd = kernel.inotify_init(IN_CLOEXEC | IN_NONBLOCK)
    if fd < 0:
        text = f"{_text(fd)}{_limit_hint(fd, 'inotify/max_user_instances')}"
        raise EventSourceError(
            f"--events={wanted.value} is not possible: inotify: {text}{why_not}; use --events=off"
        )
    forced = " (asked for)" if wanted is EventsMode.INOTIFY else ""
    return EventSource(EventsMode.INOTIFY, fd, 0, int(INOTIFY_EVENTS), False, f"inotify{why_not or forced}")


def _with_order(source: EventSource, kernel: Kernel) -> EventSource:
    """fanotify sums up what nobody has read yet, so under load only inotify can tell what came first."""
    fd = kernel.inotify_init(IN_CLOEXEC | IN_NONBLOCK)
    if fd >= 0:
        return replace(source, order_fd=fd)
    without = [f"no inotify beside it: {_text(fd)}{_limit_hint(fd, 'inotify/max_user_instances')}"]
    without.append("under load the order within a directory may suffer")
    if not source.joins_renames:
        without.append("no FAN_RENAME: the halves of a rename come apart")
    return replace(source, reason="; ".join([source.reason, *without]))


class _NotPossibleError(Exception):
    """fanotify in the way that was tried; the text says what was refused."""


def _fanotify(wanted: EventsMode, root_fd: int, kernel: Kernel, use_rename: bool) -> EventSource:
    # A record names its objects by handle; without our own of the same objects it says nothing.
    result = kernel.encode_handle(root_fd)
    if result:
        raise _NotPossibleError(f"the file system gives no file handles: {_text(result)}")
    fd, knows_child = _open_group(kernel)

    def mark(flags: int, mask: int) -> int:
        return kernel.fanotify_mark(fd, flags | FAN_MARK_ONLYDIR, mask, root_fd)

    try:
        refusal = 0
        if wanted is not EventsMode.FANOTIFY_INODES:
            mask, refusal = _mark_file_system(mark, use_rename)
            if not refusal:
                reason = "fanotify, one mark on the file system of the share"
                source = _fanotify_source(EventsMode.FANOTIFY_FILESYSTEM, fd, mask, mask, knows_child, reason)
                marker_fd = kernel.start_marker(fd, root_fd, mask)
                if marker_fd >= 0:
                    # While nobody wants to hear, nobody shall pay for it.
                    mark(FAN_MARK_REMOVE | FAN_MARK_FILESYSTEM, mask)
                    source = replace(source, marker_fd=marker_fd)
                if wanted is EventsMode.FANOTIFY_FILESYSTEM:
                    return source
                return replace(source, next_fd=_next_group(source, root_fd, kernel, use_rename))
            if wanted is EventsMode.FANOTIFY_FILESYSTEM:
                hint = "; it needs CAP_SYS_ADMIN" if refusal == -errno.EPERM else ""
                raise _NotPossibleError(f"marking the file system: {_text(refusal)}{hint}")
        mask, result = _try_inode_marks(mark, use_rename)
        if result:
            # What the wider mark met says more than what the narrower one met after it.
            raise _NotPossibleError(f"marking the root: {_text(result)}{_limit_hint(result, _MARKS)}")
    except BaseException:
        kernel.close(fd)
        raise
    if wanted is EventsMode.FANOTIFY_INODES:
        why = "asked for"
    elif refusal == -errno.EPERM:
        why = "no CAP_SYS_ADMIN"
    else:
        why = f"the file system cannot be marked as a whole: {_text(refusal)}"
    reason = f"fanotify, marks on watched inodes ({why})"
    return _fanotify_source(EventsMode.FANOTIFY_INODES, fd, 0, mask, knows_child, reason)


def _next_group(source: EventSource, root_fd: int, kernel: Kernel, use_rename: bool) -> int:
    """A group that can take over from the source by marks on inodes; -1: there is none."""
    try:
        fd, knows_child = _open_group(kernel)
    except _NotPossibleError:
        return -1

    def mark(flags: int, mask: int) -> int:
        return kernel.fanotify_mark(fd, flags | FAN_MARK_ONLYDIR, mask, root_fd)

    mask, refusal = _try_inode_marks(mark, use_rename)
    if refusal or mask != source.filesystem_mask or knows_child != source.knows_child:
        kernel.close(fd)
        return -1
    return fd


_MARKS = "fanotify/max_user_marks"


def _fanotify_source(
    mode: EventsMode, fd: int, filesystem_mask: int, seen_mask: int, knows_child: bool, reason: str
) -> EventSource:
    host_mask = DELIVERABLE | (seen_mask & FsEvent.RENAME)
    missing = []
    if not knows_child:
        missing.append("no FAN_REPORT_TARGET_FID")
    return EventSource(mode, fd, filesystem_mask, int(host_mask), knows_child, "; ".join([reason, *missing]))


def _open_group(kernel: Kernel) -> tuple[int, bool]:
    """The group, and whether its records name the child. With rights its queue and marks are not limited."""
    fd = 0
    for reports in (FAN_REPORT_DFID_NAME_TARGET, FAN_REPORT_DFID_NAME):
        for extra in (_UNLIMITED, 0):
            fd = kernel.fanotify_init(_GROUP | reports | extra)
            if fd >= 0:
                return fd, reports == FAN_REPORT_DFID_NAME_TARGET
            if fd not in (-errno.EPERM, -errno.EINVAL):
                raise _NotPossibleError(f"{_text(fd)}{_limit_hint(fd, 'fanotify/max_user_groups')}")
    if fd == -errno.EPERM:
        raise _NotPossibleError("not permitted without CAP_SYS_ADMIN (from Linux 5.13 on it is)")
    raise _NotPossibleError("this kernel cannot report file handles and names (Linux 5.9 can)")


def _mark_file_system(mark: Callable[[int, int], int], use_rename: bool) -> tuple[int, int]:
    """Sets the mark; its mask, and 0 or the errno of the last refusal."""
    result = -errno.EINVAL
    for moves in (FsEvent.RENAME, _MOVES) if use_rename else (_MOVES,):
        mask = int(FILESYSTEM_EVENTS | moves)
        result = mark(FAN_MARK_ADD | FAN_MARK_FILESYSTEM, mask)
        if result != -errno.EINVAL:
            return mask, result
    return 0, result


def _try_inode_marks(mark: Callable[[int, int], int], use_rename: bool) -> tuple[int, int]:
    """Marks the root and takes the mark away again; what can be marked so, and 0 or an errno."""
    result = -errno.EINVAL
    for moves in (FsEvent.RENAME, _MOVES) if use_rename else (_MOVES,):
        mask = int(FILESYSTEM_EVENTS | moves)
        result = mark(FAN_MARK_ADD | FAN_MARK_INODE, mask)
        if not result:
            mark(FAN_MARK_REMOVE | FAN_MARK_INODE, mask)
        if result != -errno.EINVAL:
            return mask, result
    return 0, result


def _text(result: int) -> str:
    return f"{os.strerror(-result)} ({errno.errorcode.get(-result, -result)})"


def _limit_hint(result: int, limit: str) -> str:
    return f" (limit: /proc/sys/fs/{limit})" if result in (-errno.EMFILE, -errno.ENOSPC) else ""
