# SPDX-License-Identifier: Apache-2.0
"""Tries each flag of fanotify_init(2) and fanotify_mark(2), and each event, on one directory.
Must not conclude anything from versions, leave a mark behind or read an event.
Specification: fanotify_init(2), fanotify_mark(2), linux/fanotify.h."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .names import FanInit, FanMark
from .outcome import Outcome

_GROUP = FanInit.CLOEXEC | FanInit.NONBLOCK
_FID = FanInit.REPORT_FID
_NAME = FanInit.REPORT_DIR_FID | FanInit.REPORT_NAME
# What a flag cannot be without, or what it takes for an ordinary user to be allowed a group at all.
_INIT_TRIALS = {
    FanInit.REPORT_FID: _FID,
    FanInit.REPORT_DIR_FID: FanInit.REPORT_DIR_FID,
    FanInit.REPORT_NAME: _NAME,
    FanInit.REPORT_TARGET_FID: _NAME | _FID | FanInit.REPORT_TARGET_FID,
    FanInit.UNLIMITED_QUEUE: _FID | FanInit.UNLIMITED_QUEUE,
    FanInit.UNLIMITED_MARKS: _FID | FanInit.UNLIMITED_MARKS,
    FanInit.REPORT_PIDFD: _FID | FanInit.REPORT_PIDFD,
    FanInit.REPORT_TID: _FID | FanInit.REPORT_TID,
    FanInit.REPORT_FD_ERROR: FanInit.REPORT_FD_ERROR,
    FanInit.REPORT_MNT: FanInit.REPORT_MNT,
    FanInit.ENABLE_AUDIT: _FID | FanInit.ENABLE_AUDIT,
}
_BEST_GROUPS = (_NAME | _FID | FanInit.REPORT_TARGET_FID, _NAME, _FID, FanInit(0))
_MODIFY = 0x2
_ISDIR = 0x4000_0000
_MARK_TRIALS = {
    "FAN_MARK_INODE": FanMark(0),
    "FAN_MARK_MOUNT": FanMark.MOUNT,
    "FAN_MARK_FILESYSTEM": FanMark.FILESYSTEM,
    "FAN_MARK_ONLYDIR": FanMark.ONLYDIR,
    "FAN_MARK_DONT_FOLLOW": FanMark.DONT_FOLLOW,
    "FAN_MARK_IGNORED_MASK": FanMark.IGNORED_MASK,
    "FAN_MARK_IGNORE": FanMark.IGNORE | FanMark.IGNORED_SURV_MODIFY,
    "FAN_MARK_EVICTABLE": FanMark.EVICTABLE,
}
EVENTS = {
    "FAN_ACCESS": 0x1,
    "FAN_MODIFY": 0x2,
    "FAN_ATTRIB": 0x4,
    "FAN_CLOSE_WRITE": 0x8,
    "FAN_CLOSE_NOWRITE": 0x10,
    "FAN_OPEN": 0x20,
    "FAN_MOVED_FROM": 0x40,
    "FAN_MOVED_TO": 0x80,
    "FAN_CREATE": 0x100,
    "FAN_DELETE": 0x200,
    "FAN_DELETE_SELF": 0x400,
    "FAN_MOVE_SELF": 0x800,
    "FAN_OPEN_EXEC": 0x1000,
    "FAN_FS_ERROR": 0x8000,
    "FAN_RENAME": 0x1000_0000,
}
"""Events that notify; those that ask for permission are of no use to a file server."""


class FanotifyCalls(Protocol):
    """The system calls that are tried: a descriptor or 0, or a negative errno."""

    def fanotify_init(self, flags: int) -> int: ...
    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int: ...
    def close(self, fd: int) -> None: ...


@dataclass(frozen=True, slots=True)
class FanotifyProbe:
    """By names of linux/fanotify.h. Marks and events are tried on the directory, and events by a mark on its
    inode and by one on its whole file system."""

    init: Mapping[str, Outcome]
    marks: Mapping[str, Outcome]
    inode_events: Mapping[str, Outcome]
    filesystem_events: Mapping[str, Outcome]

    def as_json(self) -> dict[str, Any]:
        def told(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
            return {name: outcome.as_json() for name, outcome in outcomes.items()}

        return {
            "init": told(self.init),
            "mark": told(self.marks),
            "events": {"inode": told(self.inode_events), "filesystem": told(self.filesystem_events)},
        }


def probe_fanotify(kernel: FanotifyCalls, directory_fd: int) -> FanotifyProbe:
    """directory_fd: any descriptor of a directory, O_PATH too."""
    init = {f"FAN_{flag.name}": _try_init(kernel, flags) for flag, flags in _INIT_TRIALS.items()}
    # One group for all: its end waits for the kernel to be done with its marks, some 10 ms each time.
    fd = _best_group(kernel)

    def try_mark(flags: int, mask: int) -> Outcome:
        if fd < 0:
            return Outcome.of(fd)
        result = kernel.fanotify_mark(fd, FanMark.ADD | flags, mask, directory_fd)
        if result >= 0:
            kernel.fanotify_mark(fd, FanMark.REMOVE | flags, mask, directory_fd)
        return Outcome.of(result)

    try:
        return FanotifyProbe(
            init,
            {name: try_mark(flags, _MODIFY) for name, flags in _MARK_TRIALS.items()},
            {name: try_mark(0, bit | _ISDIR) for name, bit in EVENTS.items()},
            {name: try_mark(FanMark.FILESYSTEM, _on_filesystem(bit)) for name, bit in EVENTS.items()},
        )
    finally:
        if fd >= 0:
            kernel.close(fd)


def _on_filesystem(bit: int) -> int:
    # An error of the file system is no directory's.
    return bit if bit == EVENTS["FAN_FS_ERROR"] else bit | _ISDIR


def _try_init(kernel: FanotifyCalls, flags: int) -> Outcome:
    fd = kernel.fanotify_init(_GROUP | flags)
    if fd >= 0:
        kernel.close(fd)
    return Outcome.of(fd)


def _best_group(kernel: FanotifyCalls) -> int:
    """The group with the most in its records; the first refusal when there is none at all."""
    first = 0
    for reports in _BEST_GROUPS:
        fd = kernel.fanotify_init(_GROUP | reports)
        if fd >= 0:
            return fd
        first = first or fd
    return first
