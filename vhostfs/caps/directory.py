# SPDX-License-Identifier: Apache-2.0
"""What a directory's file system gives a server that shares it: file handles, and sources of events.
Must not serve or watch anything: what is opened to see whether it can be is closed at once.
Specification: open_by_handle_at(2); docs/events.md, "Where the server learns of changes"."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..events.kernel import RunningKernel
from ..events.source import EventSource, EventSourceError, choose_source
from ..share.limits import HandleProbe, encode_handle, file_system_name, probe_file_handles
from ..share.options import EventsMode
from .fanotify import FanotifyProbe, probe_fanotify
from .names import HOST_SOURCES
from .outcome import Outcome


class DirectoryError(UserError):
    """A directory that cannot be looked at."""


class _TrialKernel(RunningKernel):
    """Without the process that sets a server's mark when it is wanted: nothing will want this one."""

    def start_marker(self, group_fd: int, directory_fd: int, mask: int) -> int:
        return -errno.ENOSYS


@dataclass(frozen=True, slots=True)
class DirectoryProbe:
    """path: without symbolic links. chosen, reason: what `--events=auto` would take and say; None: nothing,
    and why. event_handles: as fanotify's records have them (AT_HANDLE_FID where needed)."""

    path: str
    file_system: str
    readable: Outcome
    encode: Outcome
    reopen: Outcome
    event_handles: Outcome
    fanotify: FanotifyProbe
    sources: Mapping[str, Outcome]
    chosen: str | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "file_system": self.file_system,
            "readable": self.readable.as_json(),
            "file_handles": {
                "encode": self.encode.as_json(),
                "open": self.reopen.as_json(),
                "for_events": self.event_handles.as_json(),
            },
            "events": {
                "chosen": self.chosen,
                "reason": self.reason,
                "sources": {name: outcome.as_json() for name, outcome in self.sources.items()},
            },
            "fanotify": self.fanotify.as_json(),
        }


def probe_directory(path: str) -> DirectoryProbe:
    """Raises DirectoryError when it is no directory or cannot be entered."""
    real = os.path.realpath(path)
    try:
        fd = os.open(real, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DirectoryError(f"{path}: {_refusal(error)}; give a directory that exists") from None
    try:
        return _probe(real, fd)
    finally:
        os.close(fd)


def _refusal(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "there is no such directory"
    return os.strerror(error.errno or errno.EIO)


def _probe(path: str, fd: int) -> DirectoryProbe:
    kernel = _TrialKernel()
    file_system = file_system_name(path)
    handles = _probe_handles(fd, file_system)
    event_error = encode_handle(fd)
    if event_error == errno.EOPNOTSUPP:
        event_error = encode_handle(fd, for_events=True)
    sources = {mode.value: _try_source(mode, fd, kernel) for mode in HOST_SOURCES}
    try:
        best = choose_source(EventsMode.AUTO, fd, kernel)
    except EventSourceError as error:
        chosen, reason = None, str(error)
    else:
        _close(best, kernel)
        chosen, reason = best.mode.value, best.reason
    return DirectoryProbe(
        path,
        file_system,
        Outcome.of(0 if os.access(path, os.R_OK | os.X_OK, effective_ids=True) else -errno.EACCES),
        Outcome.of(-handles.encode_errno),
        Outcome.of(-(handles.encode_errno or handles.open_errno)),
        Outcome.of(-event_error),
        probe_fanotify(kernel, fd),
        sources,
        chosen,
        reason,
    )


def _probe_handles(fd: int, file_system: str) -> HandleProbe:
    try:
        return probe_file_handles(fd, file_system)
    except AttributeError:  # a C library without these calls
        return HandleProbe(file_system, errno.ENOSYS, 0)


def _try_source(mode: EventsMode, fd: int, kernel: RunningKernel) -> Outcome:
    try:
        source = choose_source(mode, fd, kernel)
    except EventSourceError as error:
        return Outcome(0, str(error).removeprefix(f"--events={mode.value} is not possible: "))
    _close(source, kernel)
    return Outcome(0)


def _close(source: EventSource, kernel: RunningKernel) -> None:
    for fd in {source.fd, source.order_fd, source.next_fd, source.marker_fd} - {-1}:
        kernel.close(fd)
