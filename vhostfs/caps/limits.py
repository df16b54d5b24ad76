# SPDX-License-Identifier: Apache-2.0
"""The host's limits of inotify, fanotify and descriptors, and how much of them this user's processes take.
Must not change a limit. Counting is bounded in time: a busy host is counted in part, and that is said.
Specification: inotify(7), fanotify(7), proc_sys_fs(5), proc_pid_fdinfo(5)."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COUNTING_TIME_S = 0.3
_FILES = {
    "inotify.max_user_watches": "inotify/max_user_watches",
    "inotify.max_user_instances": "inotify/max_user_instances",
    "inotify.max_queued_events": "inotify/max_queued_events",
    "fanotify.max_user_groups": "fanotify/max_user_groups",
    "fanotify.max_user_marks": "fanotify/max_user_marks",
    "fanotify.max_queued_events": "fanotify/max_queued_events",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """value: None where the kernel has no such limit, or does not show it. used: None: not counted."""

    value: int | None
    used: int | None = None

    @property
    def left(self) -> int | None:
        return None if self.value is None or self.used is None else max(0, self.value - self.used)

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "used": self.used}


@dataclass(frozen=True, slots=True)
class Limits:
    """By name, as inotify.max_user_watches. is_complete: False: there were too many processes to count."""

    limits: Mapping[str, Limit]
    is_complete: bool
    nofile_soft: int
    nofile_hard: int
    nr_open: int | None

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {name: limit.as_json() for name, limit in self.limits.items()}
        told["counted_all"] = self.is_complete
        told["nofile"] = {"soft": self.nofile_soft, "hard": self.nofile_hard, "nr_open": self.nr_open}
        return told


@dataclass(slots=True)
class _Use:
    """What descriptors of this user's processes hold."""

    inotify_instances: int = 0
    inotify_watches: int = 0
    fanotify_groups: int = 0
    fanotify_marks: int = 0
    is_complete: bool = True
    has_processes: bool = True
    """There is a /proc: at least this process is in it."""


def probe_limits(proc: Path = Path("/proc")) -> Limits:
    """Values as seen from here: in a user namespace some of them are the namespace's own."""
    use = _count(proc, time.monotonic() + COUNTING_TIME_S)
    used = {}
    if use.has_processes:
        used = {
            "inotify.max_user_watches": use.inotify_watches,
            "inotify.max_user_instances": use.inotify_instances,
            "fanotify.max_user_groups": use.fanotify_groups,
            "fanotify.max_user_marks": use.fanotify_marks,
        }
    limits = {name: Limit(_number(proc / "sys/fs" / place), used.get(name)) for name, place in _FILES.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(limits, use.is_complete, soft, hard, _number(proc / "sys/fs/nr_open"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _count(proc: Path, deadline_s: float) -> _Use:
    """Of the processes of this user, by which the kernel counts."""
    use = _Use()
    try:
        pids = [name for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        pids = []
    use.is_complete = use.has_processes = bool(pids)
    uid = os.geteuid()
    for pid in pids:
        # A process may end while it is looked at; those of others are not ours to look into.
        with contextlib.suppress(OSError):
            if os.stat(proc / pid).st_uid != uid:
                continue
            for fd in os.listdir(proc / pid / "fd"):
                if time.monotonic() > deadline_s:
                    use.is_complete = False
                    return use
                with contextlib.suppress(OSError):
                    _count_fd(proc / pid, fd, use, deadline_s)
    return use


def _count_fd(process: Path, fd: str, use: _Use, deadline_s: float) -> None:
    target = os.readlink(process / "fd" / fd)
    is_inotify, is_fanotify = target == "anon_inode:inotify", target == "anon_inode:[fanotify]"
    if not is_inotify and not is_fanotify:
        return
    watches = marks = 0
    with open(process / "fdinfo" / fd, errors="replace") as lines:
        for number, line in enumerate(lines):
            watches += line.startswith("inotify ")
            marks += line.startswith(("fanotify ino", "fanotify mnt_id", "fanotify sdev"))
            if not number % 1024 and time.monotonic() > deadline_s:
                use.is_complete = False
                break
    use.inotify_instances += is_inotify
    use.fanotify_groups += is_fanotify
    use.inotify_watches += watches
    use.fanotify_marks += marks
