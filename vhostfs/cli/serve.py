# SPDX-License-Identifier: Apache-2.0
"""Owns `vhostfs serve`: the order in which a server comes up, and how it ends.
Must not know the protocols (vhostfs/server.py) or what the walls are made of (share/sandbox.py).
Specification: docs/migrating-from-virtiofsd.md; the steps of share.sandbox.enter_sandbox."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
from typing import TYPE_CHECKING

from ..errors import UserError
from ..share.options import LASTING_TIMEOUT_S, CacheMode, check_shared_dir
from .logs import start_logging
from .parser import Parser
from .serve_options import add_arguments as add_serve_arguments
from .serve_options import ignored_options, options_from

if TYPE_CHECKING:
    from ..events.records import EventsConfig
    from ..events.source import EventSource
    from ..fuse.forced import Forced
    from ..fuse.init import SessionOptions
    from ..server import EventOptions
    from ..share.limits import DescriptorBudget
    from ..share.native_share import ShareConfig
    from ..share.options import HandleMode, ServeOptions
    from ..share.sandbox import SandboxedShare
    from .listen import Listener

_log = logging.getLogger("vhostfs.serve")


# What an id without a place in the user namespace is shown as (/proc/sys/kernel/overflowuid).
_UNMAPPED_ID = 65534


class _StopRequested(BaseException):
    """A stop signal before (or after) the event loop takes them."""


def add_arguments(parser: Parser) -> None:
    add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop; 0 then, else an exception says why not."""
    options = options_from(args)
    log_fds = start_logging(options.log_level, to_syslog=options.syslog, program="vhostfsd")
    for line in ignored_options(args):
        _log.warning("%s", line)
    shared_dir = check_shared_dir(options.shared_dir)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        listener = _listener(options)
        control = None
        try:
            control = _control_listener(options)
            # Last: who sees this socket listen may use the other too.
            listener.listen()
            return _serve(options, shared_dir, listener, control, log_fds)
        finally:
            _remove_files(listener, control)
    except _StopRequested:
        return 0


def _stop(number: int, _frame: object) -> None:
    raise _StopRequested


def _listener(options: ServeOptions) -> Listener:
    from .listen import bind_at, take_listener

    if options.listen_fd is not None:
        return take_listener(options.listen_fd)
    assert options.socket_path is not None  # ServeOptions has one of the two
    return bind_at(options.socket_path, options.socket_group)


def _control_listener(options: ServeOptions) -> Listener | None:
    """Where it was not asked for, a server without it is better than none."""
    from .listen import ListenError, listen_for_control

    if options.control_path is None:
        return None
    try:
        return listen_for_control(options.control_path)
    except ListenError as error:
        if options.control_socket is not None:
            raise
        _log.warning("`vhostfs watch`, `stats` and `caps` cannot reach this server: %s", error)
        return None


def _remove_files(listener: Listener, control: Listener | None) -> None:
    # The lock, which keeps others away from both paths, is the listener's and goes last.
    if control is not None:
        control.remove_files()
    listener.remove_files()


def _serve(
    options: ServeOptions,
    shared_dir: str,
    listener: Listener,
    control: Listener | None,
    log_fds: frozenset[int],
) -> int:
    # libuv would try io_uring, which the system call filter answers with ENOSYS.
    os.environ["UV_USE_IO_URING"] = "0"
    # Everything that serving will ever need is imported here: enter_sandbox ends imports. All of it stays, so
    # to look for garbage meanwhile, and later among it, would be in vain.
    gc.disable()
    import concurrent.futures.thread  # noqa: F401 (asyncio looks it up when the first thread is wanted)

    from ..events.coherence import settle_coherence
    from ..events.kernel import LesserKernel
    from ..events.source import choose_source
    from ..fuse.forced import forced
    from ..server import ControlOptions, ServerOptions, run_server
    from ..share.capabilities import Capability
    from ..share.limits import (
        decide_handle_mode,
        describe_inodes,
        file_system_name,
        probe_file_handles,
        raise_nofile_limit,
        split_descriptors,
    )
    from ..share.native_share import Share
    from ..share.options import HandleMode, SandboxMode
    from ..share.sandbox import enter_sandbox, give_up_sys_admin, needs_user_namespace

    gc.freeze()
    gc.enable()
    force = forced(options.negotiate)
    limit, warning = raise_nofile_limit(options.rlimit_nofile)
    if warning is not None:
        _log.info("%s", warning)
    file_system = file_system_name(shared_dir)
    settled: list[tuple[HandleMode, DescriptorBudget, EventSource | None]] = []

    def while_privileged(root_fd: int) -> frozenset[Capability]:
        probe = probe_file_handles(root_fd, file_system)
        if Capability.DAC_READ_SEARCH in options.modcaps.removed:
            probe = probe.without_permission()
        mode = decide_handle_mode(options.inode_file_handles, probe)
        budget = split_descriptors(limit, mode, options.thread_pool_size)
        _log.info("%s", describe_inodes(options.inode_file_handles, mode, probe, budget))
        source = None
        if options.events_wanted:
            if not force.sys_admin:
                give_up_sys_admin()
            # Of the process that sets the mark, which may end earlier, nothing shall stay behind.
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            source = choose_source(
                options.events,
                root_fd,
                LesserKernel(target_fid=force.target_fid, inotify=force.inotify),
                use_rename=options.fan_rename,
            )
            _log.info("%s", source)
            if options.cache is CacheMode.COHERENT:
                source = settle_coherence(source, file_system)
        settled.append((mode, budget, source))
        return frozenset() if mode is HandleMode.NEVER else frozenset({Capability.DAC_READ_SEARCH})

    is_namespaced = options.sandbox is SandboxMode.NAMESPACE
    has_own_users = is_namespaced and needs_user_namespace(options.uid_map, options.gid_map)
    walls = enter_sandbox(
        options,
        shared_dir,
        keep_fds=log_fds | listener.lock_fds,
        listener_fds=[one.socket.fileno() for one in (listener, control) if one is not None],
        when_ended=lambda: _remove_files(listener, control),
        while_privileged=while_privileged,
    )
    ((mode, budget, source),) = settled
    share = Share(_share_config(options, walls, mode, budget))
    # The share has its own duplicates.
    os.close(walls.root_fd)
    root = shared_dir if options.sandbox is SandboxMode.NONE else "/"
    server_options = ServerOptions(
        session=_session_options(options),
        shared_dir=shared_dir,
        sandbox=options.sandbox.value,
        tag=options.tag,
        num_request_queues=options.num_request_queues,
        readonly=options.readonly,
        once=options.once,
        events=None if source is None else _event_options(options, source, walls.proc_fd_dir, root, force),
    )
    control_options = None
    if control is not None:
        control_options = ControlOptions(
            listen_socket=control.socket, allowed_uids=_allowed_uids(control, has_own_users=has_own_users)
        )
    if source is not None:
        try:
            share.start_events(_events_config(options, source, force))
        except OSError as error:
            raise UserError(f"events cannot be read: {error.strerror}; --events=off does without") from None
    place = options.socket_path or f"descriptor {options.listen_fd}"
    _log.info("serving %s at %s (sandbox: %s)", options.shared_dir, place, options.sandbox.value)
    try:
        return run_server(listener.socket, share, server_options, control_options)
    finally:
        share.close()


def _events_config(options: ServeOptions, source: EventSource, force: Forced) -> EventsConfig:
    from ..events.records import EventsConfig, NativeSource
    from ..share.options import EventsMode

    is_inotify = source.mode is EventsMode.INOTIFY
    return EventsConfig(
        source=NativeSource.INOTIFY if is_inotify else NativeSource.FANOTIFY,
        source_fd=source.fd if force.source_works else _failing(source.fd),
        order_fd=source.order_fd,
        next_fd=source.next_fd,
        marker_fd=source.marker_fd,
        filesystem_mask=source.filesystem_mask,
        host_mask=source.host_mask,
        max_queued=options.event_queue,
        max_watches=_max_watches(options, force),
        notify_buf_size_bytes=force.notify_buf_size,
        max_parked=force.max_parked,
    )


def _max_watches(options: ServeOptions, force: Forced) -> int:
    return options.max_watches if force.max_watches is None else force.max_watches


def _failing(fd: int) -> int:
    """In the place of a source, which is closed: the first look at it finds the end."""
    os.close(fd)
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(write_end)
    return read_end


def _event_options(
    options: ServeOptions, source: EventSource, proc_fd_dir: int, root: str, force: Forced
) -> EventOptions:
    from ..events.masks import DELIVERABLE
    from ..fuse.fsnotify import TRANSPORTS, FsnotifyFlag
    from ..server import EventOptions
    from ..share.options import DeliveryMode

    transports = {
        DeliveryMode.AUTO: TRANSPORTS,
        DeliveryMode.VIRTQUEUE: FsnotifyFlag.VIRTQUEUE,
        DeliveryMode.PARKED: FsnotifyFlag.PARKED,
    }
    return EventOptions(
        mask=source.host_mask & DELIVERABLE,
        joins_renames=source.joins_renames,
        transports=transports[options.delivery],
        max_watches=_max_watches(options, force),
        reason=source.reason,
        source=source.mode.value,
        proc_fd_dir=proc_fd_dir,
        root=root,
        forced=force,
        coherent=options.cache is CacheMode.COHERENT and source.is_complete,
        no_coherence="" if options.cache is not CacheMode.COHERENT else "not every change here is seen",
    )


def _allowed_uids(control: Listener, *, has_own_users: bool) -> frozenset[int]:
    """
    Who may use the control socket: who made it, and root. Its mode, 0600, says the same already.

    In a user namespace everybody outside of its map has one and the same id, root among them, and 0 may be
    anybody; there the mode keeps the others away.
    """
    owner = os.fstat(control.socket.fileno()).st_uid
    return frozenset({owner, _UNMAPPED_ID if has_own_users else 0})


def _session_options(options: ServeOptions) -> SessionOptions:
    from ..fuse.init import SessionOptions

    return SessionOptions(
        posix_lock=options.posix_lock,
        flock=options.flock,
        readdirplus=options.readdirplus_wanted,
        writeback=options.writeback,
        posix_acl=options.posix_acl,
        killpriv_v2=options.killpriv_v2,
        announce_submounts=options.announce_submounts,
        security_label=options.security_label,
        allow_mmap=options.allow_mmap,
        cache_always=options.cache is CacheMode.ALWAYS,
        cache_symlinks=options.cache is CacheMode.COHERENT,
    )


def _share_config(
    options: ServeOptions, walls: SandboxedShare, mode: HandleMode, budget: DescriptorBudget
) -> ShareConfig:
    from ..share.native_share import ShareConfig

    return ShareConfig(
        root_fd=walls.root_fd,
        proc_fd_dir=walls.proc_fd_dir,
        handle_mode=mode,
        inode_fd_budget=budget.inode_fds,
        open_budget=budget.open_files,
        pool_threads=options.thread_pool_size,
        cache=options.cache,
        timeout_s=options.cache_timeout_s,
        lasting_timeout_s=LASTING_TIMEOUT_S,
        readonly=options.readonly,
        xattr=options.xattr_wanted,
        allow_direct_io=options.allow_direct_io,
        allow_mmap=options.allow_mmap,
        preserve_noatime=options.preserve_noatime,
        uid_rules=options.translate_uid,
        gid_rules=options.translate_gid,
        xattr_rules=options.xattr_rules,
    )
