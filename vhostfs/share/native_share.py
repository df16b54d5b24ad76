# SPDX-License-Identifier: Apache-2.0
"""The C core's share as a Python object: configuration in, sessions, upcalls, events and counters out.

Must not know vhost-user or what an upcall means.
Specification: native/api.h.
"""

from __future__ import annotations

import os
from typing import Any

from .._native import ffi, lib
from ..events.records import COUNTERS, EventFate, EventsConfig, EventsStats, EventTrace
from ..record import Record
from .idmap import IdRule
from .options import CacheMode, HandleMode
from .xattrmap import XattrRule

LOCK_WAITERS = 256
_NOTICE_BYTES = 256


class ShareConfig(Record, kw_only=True):
    """struct vf_share_config in Python's words; times in seconds."""

    root_fd: int
    proc_fd_dir: int
    handle_mode: HandleMode
    inode_fd_budget: int
    open_budget: int
    pool_threads: int
    cache: CacheMode
    timeout_s: float
    negative_timeout_s: float = 0.0
    lasting_timeout_s: float = 0.0  # of what the guest is told when it changes; CacheMode.COHERENT
    lock_waiters: int = LOCK_WAITERS
    readonly: bool = False
    xattr: bool = False
    allow_direct_io: bool = False
    allow_mmap: bool = False
    preserve_noatime: bool = False
    uid_rules: tuple[IdRule, ...] = ()
    gid_rules: tuple[IdRule, ...] = ()
    xattr_rules: tuple[XattrRule, ...] = ()


class ShareStats(Record):
    """struct vf_share_stats."""

    inodes: int
    inode_fds: int
    open_files: int
    lock_waiters: int
    requests: int
    entries_ahead: int


class Upcall(Record):
    """One request that Python decides; args is a copy. Answer it once, by Share.reply()."""

    handle: Any
    opcode: int
    uid: int
    gid: int
    pid: int
    unique: int
    nodeid: int
    args: bytes
    reply_room_bytes: int


class Share:
    """Owns one vf_share. Raises OSError where the C core says so."""

    def __init__(self, config: ShareConfig) -> None:
        keep: list[Any] = []
        native = ffi.new("struct vf_share_config *")
        native.root_fd = config.root_fd
        native.proc_fd_dir = config.proc_fd_dir
        native.handle_mode = int(config.handle_mode)
        native.inode_fd_budget = config.inode_fd_budget
        native.open_budget = config.open_budget
        native.lock_waiters = config.lock_waiters
        native.pool_threads = config.pool_threads
        native.cache_mode = int(config.cache)
        native.entry_timeout_ns = native.attr_timeout_ns = round(config.timeout_s * 1e9)
        native.negative_timeout_ns = round(config.negative_timeout_s * 1e9)
        native.lasting_timeout_ns = round(config.lasting_timeout_s * 1e9)
        native.readonly = config.readonly
        native.xattr = config.xattr
        native.allow_direct_io = config.allow_direct_io
        native.allow_mmap = config.allow_mmap
        native.preserve_noatime = config.preserve_noatime
        native.uid_rules, native.n_uid_rules = _id_rules(config.uid_rules, keep)
        native.gid_rules, native.n_gid_rules = _id_rules(config.gid_rules, keep)
        native.xattr_rules, native.n_xattr_rules = _xattr_rules(config.xattr_rules, keep)
        error = ffi.new("int *")
        self.native = lib.vf_share_new(native, error)
        if self.native == ffi.NULL:
            raise OSError(-error[0], os.strerror(-error[0]))

    def close(self) -> None:
        """Every device must have been closed."""
        if self.native != ffi.NULL:
            lib.vf_share_free(self.native)
            self.native = ffi.NULL

    def start_session(self, init_flags: int, max_write_bytes: int) -> None:
        """Blocks until operations of the session before have ended."""
        lib.vf_share_start_session(self.native, init_flags, max_write_bytes)

    def end_session(self) -> None:
        """Forgets what the guest holds. Blocks likewise."""
        lib.vf_share_start_session(self.native, 0, 0)

    @property
    def upcall_fd(self) -> int:
        return int(lib.vf_share_upcall_fd(self.native))

    def next_upcall(self) -> Upcall | None:
        info = ffi.new("struct vf_upcall_info *")
        handle = lib.vf_share_next_upcall(self.native, info)
        if handle == ffi.NULL:
            return None
        args = bytes(ffi.buffer(info.args, info.args_size)) if info.args_size else b""
        return Upcall(
            handle, info.opcode, info.uid, info.gid, info.pid, info.unique, info.nodeid, args, info.reply_room
        )

    @staticmethod
    def reply(upcall: Upcall, error: int = 0, payload: bytes = b"") -> None:
        """error: 0 or a positive errno."""
        lib.vf_upcall_reply(upcall.handle, -error, payload, len(payload))

    def open_inode(self, nodeid: int) -> int:
        """A new O_PATH descriptor; raises OSError."""
        return _checked(lib.vf_share_inode_fd(self.native, nodeid))

    def open_file(self, nodeid: int, fh: int) -> int:
        """A duplicate of an open file's descriptor; raises OSError."""
        return _checked(lib.vf_share_file_fd(self.native, nodeid, fh))

    def stats(self) -> ShareStats:
        native = ffi.new("struct vf_share_stats *")
        lib.vf_share_get_stats(self.native, native)
        return ShareStats(
            native.inodes,
            native.inode_fds,
            native.open_files,
            native.lock_waiters,
            native.requests,
            native.entries_ahead,
        )

    # ---- events

    def start_events(self, config: EventsConfig) -> None:
        """Begins to read the host's events, until close(). Once, before the first session.

        source_fd, order_fd, next_fd and marker_fd are handed over, also when this fails.
        """
        native = ffi.new("struct vf_events_config *")
        native.source = int(config.source)
        native.source_fd = config.source_fd
        native.order_fd = config.order_fd
        native.next_fd = config.next_fd
        native.marker_fd = config.marker_fd
        native.filesystem_mask = config.filesystem_mask
        native.host_mask = config.host_mask
        native.max_queued = config.max_queued
        native.max_watches = config.max_watches
        native.notify_buf_size = config.notify_buf_size_bytes
        native.max_parked = config.max_parked
        _checked(lib.vf_share_start_events(self.native, native))

    def grant_events(self, flags: int, mask: int, element_bytes: int, max_parked: int) -> None:
        """What FUSE_FSNOTIFY_INIT granted for this session: FsnotifyFlag and FS_* bits.

        element_bytes: the largest element that the guest takes, fuse_out_header included. max_parked:
        requests that may be parked at a time.
        """
        _checked(lib.vf_share_limit_elements(self.native, element_bytes))
        _checked(lib.vf_share_limit_parked(self.native, max_parked))
        _checked(lib.vf_share_grant_events(self.native, flags, mask))

    def events_stats(self) -> EventsStats:
        """All 0 when no events were started."""
        native = ffi.new("struct vf_events_stats *")
        lib.vf_share_get_events_stats(self.native, native)
        counters = {name: getattr(native, name) for name in COUNTERS}
        return EventsStats(**counters, latency=tuple(native.latency))

    @property
    def events_failed(self) -> bool:
        """Whether the host's source has failed, so that no more events come."""
        return bool(lib.vf_share_events_failed(self.native))

    def events_moved(self) -> str | None:
        """Why the source went over from one mark to marks on inodes; None: it has not."""
        text = ffi.new("char[]", _NOTICE_BYTES)
        if not lib.vf_share_events_moved(self.native, text, _NOTICE_BYTES):
            return None
        return ffi.string(text).decode()

    def trace_events(self, *, is_on: bool) -> None:
        """Whether what becomes of each event is recorded, for next_event_trace()."""
        lib.vf_share_trace_events(self.native, is_on)

    def next_event_trace(self) -> EventTrace | None:
        """The oldest that was recorded; None when none waits."""
        native = ffi.new("struct vf_event_trace *")
        if lib.vf_share_next_event_trace(self.native, native) != 1:
            return None
        return EventTrace(
            native.time_ns,
            native.nodeid,
            native.child_nodeid,
            native.mask,
            native.cookie,
            EventFate(native.fate),
            native.pid,
            native.skipped,
            bytes(ffi.buffer(native.name, native.namelen)),
        )

    def next_event_notice(self) -> str | None:
        """A line for the log; None when none waits."""
        text = ffi.new("char[]", _NOTICE_BYTES)
        if lib.vf_share_next_event_notice(self.native, text, _NOTICE_BYTES) != 1:
            return None
        return ffi.string(text).decode(errors="replace")

    @property
    def events_fd(self) -> int:
        """Readable when a trace or a notice waits; -1 when no events were started."""
        return lib.vf_share_events_fd(self.native)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _id_rules(rules: tuple[IdRule, ...], keep: list[Any]) -> tuple[Any, int]:
    if not rules:
        return ffi.NULL, 0
    array = ffi.new("struct vf_id_rule[]", [tuple(rule) for rule in rules])
    keep.append(array)
    return array, len(rules)


def _xattr_rules(rules: tuple[XattrRule, ...], keep: list[Any]) -> tuple[Any, int]:
    if not rules:
        return ffi.NULL, 0
    array = ffi.new("struct vf_xattr_rule[]", len(rules))
    for index, rule in enumerate(rules):
        native = array[index]
        key, prepend = ffi.new("char[]", rule.key), ffi.new("char[]", rule.prepend)
        keep += [key, prepend]
        native.kind, native.scope, native.key, native.prepend = int(rule.kind), int(rule.scope), key, prepend
    keep.append(array)
    return array, len(rules)
