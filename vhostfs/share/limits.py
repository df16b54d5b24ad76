# SPDX-License-Identifier: Apache-2.0
"""Owns descriptors: the process's limit, how it is shared out, and whether inodes can live as file handles.
Must not know what inodes or files are kept (native/inode.c, native/file.c).
Specification: getrlimit(2), open_by_handle_at(2), --rlimit-nofile and --inode-file-handles of virtiofsd."""

from __future__ import annotations

import errno
import os
import resource

from .._native import lib
from ..errors import UserError
from ..record import Record
from .options import HandleMode

DEFAULT_NOFILE = 1_000_000
# Below this nothing sensible can be served.
MIN_NOFILE = 256
# Sockets, rings' event descriptors, guest memory, handles opened for the length of a request.
RESERVE_MIN = 96
RESERVE_MAX = 2048
# With --inode-file-handles=mandatory: for the objects that are being worked on, no more.
WORKING_INODE_FDS = 32

# How proc_pid_mountinfo(5) writes the characters that separate its fields; the backslash comes last.
_MOUNTINFO_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


class LimitError(UserError):
    """A limit or handle mode that this host does not give; the text says what to try."""


def _nr_open() -> int:
    try:
        with open("/proc/sys/fs/nr_open", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024 * 1024


def raise_nofile_limit(wanted: int | None) -> tuple[int, str | None]:
    """
    Sets RLIMIT_NOFILE and returns (soft limit now in force, a warning or None).

    None: min(nr_open, 1,000,000) where permitted, else the hard limit; 0: unchanged; a number: exactly
    that, or LimitError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted == 0 or (wanted is None and soft >= DEFAULT_NOFILE):
        return soft, None
    ceiling = _nr_open()
    target = min(DEFAULT_NOFILE, ceiling) if wanted is None else wanted
    if target > ceiling:
        raise LimitError(
            f"--rlimit-nofile={target}: this kernel allows at most {ceiling} (/proc/sys/fs/nr_open)"
        )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, target))
        return target, None
    except (OSError, ValueError):
        pass
    if wanted is not None:
        raise LimitError(
            f"--rlimit-nofile={wanted}: not permitted; the hard limit is {hard} and raising it needs "
            f"CAP_SYS_RESOURCE (ulimit -Hn, or LimitNOFILE= in a systemd unit)"
        )
    target = min(hard, target)
    if target > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    limit = max(soft, target)
    return limit, f"open files are limited to {limit} (the hard limit); raising it needs CAP_SYS_RESOURCE"


class DescriptorBudget(Record):
    """How the limit is shared out; the parts add up to the limit."""

    limit: int
    reserve: int
    inode_fds: int
    open_files: int


def split_descriptors(limit: int, handle_mode: HandleMode, threads: int) -> DescriptorBudget:
    """
    Shares out `limit` descriptors; threads: how many may hold one for a moment. LimitError below MIN_NOFILE.

    Inodes that have no file handle need a descriptor each, so without handles they get the larger part.
    """
    if limit < MIN_NOFILE:
        raise LimitError(
            f"only {limit} descriptors may be open; at least {MIN_NOFILE} are needed (ulimit -n)"
        )
    reserve = min(max(limit // 8, RESERVE_MIN), RESERVE_MAX) + min(2 * threads, limit // 8)
    rest = limit - reserve
    match handle_mode:
        case HandleMode.NEVER:
            open_files = rest // 4
        case HandleMode.PREFER:
            open_files = rest // 2
        case HandleMode.MANDATORY:
            open_files = rest - min(rest // 8, WORKING_INODE_FDS)
    return DescriptorBudget(limit, reserve, rest - open_files, open_files)


class HandleProbe(Record):
    """Whether the share's root can be named, and opened again, by file handle."""

    file_system: str
    encode_errno: int  # of name_to_handle_at, 0: it works
    open_errno: int  # of open_by_handle_at

    @property
    def usable(self) -> bool:
        return not self.encode_errno and not self.open_errno

    def without_permission(self) -> HandleProbe:
        """What it would be without CAP_DAC_READ_SEARCH."""
        return HandleProbe(self.file_system, self.encode_errno, self.open_errno or errno.EPERM)

    @property
    def reason(self) -> str:
        if self.usable:
            return f"{self.file_system}, open_by_handle_at permitted"
        if self.encode_errno:
            return f"{self.file_system} gives no file handles ({os.strerror(self.encode_errno)})"
        if self.open_errno == errno.EPERM:
            return f"{self.file_system}, but open_by_handle_at is not permitted: it needs CAP_DAC_READ_SEARCH"
        return f"{self.file_system}, but open_by_handle_at fails: {os.strerror(self.open_errno)}"


def encode_handle(fd: int, *, for_events: bool = False) -> int:
    """
    0 if the object behind any descriptor has a file handle, else the errno of name_to_handle_at(2).

    for_events: one that need not lead back to the object (AT_HANDLE_FID, Linux 6.5), as fanotify reports it.
    """
    return -lib.vf_encode_handle(fd, for_events)


def probe_file_handles(root_fd: int, file_system: str) -> HandleProbe:
    """Tries both calls once on the share's root (any directory descriptor), with this thread's rights."""
    refusal = encode_handle(root_fd)
    if refusal:
        return HandleProbe(file_system, refusal, 0)
    # The mount is named by a descriptor that must not be O_PATH.
    try:
        mount_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    except OSError as error:
        return HandleProbe(file_system, 0, error.errno or errno.EIO)
    try:
        fd = lib.vf_open_by_own_handle(root_fd, mount_fd)
        if fd < 0:
            return HandleProbe(file_system, 0, -fd)
        os.close(fd)
        return HandleProbe(file_system, 0, 0)
    finally:
        os.close(mount_fd)


def decide_handle_mode(wanted: HandleMode, probe: HandleProbe) -> HandleMode:
    """The mode that will be used. LimitError when --inode-file-handles=mandatory cannot be had."""
    if wanted is HandleMode.NEVER or probe.usable:
        return wanted
    if wanted is HandleMode.MANDATORY:
        raise LimitError(
            f"--inode-file-handles=mandatory is not possible: {probe.reason}; use 'prefer' or 'never'"
        )
    return HandleMode.NEVER


def describe_inodes(
    wanted: HandleMode, mode: HandleMode, probe: HandleProbe, budget: DescriptorBudget
) -> str:
    """One line for the log: what inodes will be kept as, and why."""
    match mode:
        case HandleMode.MANDATORY:
            return f"inodes: file handles ({probe.reason})"
        case HandleMode.PREFER:
            return f"inodes: file handles beyond {budget.inode_fds} descriptors ({probe.reason})"
    why = "--inode-file-handles=never" if wanted is HandleMode.NEVER else probe.reason
    return f"inodes: at most {budget.inode_fds} descriptors, no file handles ({why})"


def file_system_name(path: str) -> str:
    """The type of the file system at path, as mount(8) prints it; "unknown file system" without /proc."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best, best_length = "unknown file system", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields, _, rest = line.partition(" - ")
                mount = fields.split()
                mount_point = mount[4]
                for escaped, character in _MOUNTINFO_ESCAPES:
                    mount_point = mount_point.replace(escaped, character)
                inside = path == mount_point or path.startswith(mount_point.rstrip("/") + "/")
                if inside and len(mount_point) >= best_length:
                    best, best_length = rest.split()[0], len(mount_point)
                elif best_length < 0 and mount[2] == wanted:
                    best = rest.split()[0]
    except (OSError, IndexError):
        pass
    return best
