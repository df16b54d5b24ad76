# SPDX-License-Identifier: Apache-2.0
"""Owns one running server: a share, its upcalls and the front ends that come to a listening socket.

Must not know command lines, sandboxes, or any protocol's details.
Specification: docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import uvloop

from .control.negotiated import NegotiatedState, negotiated_message
from .control.report import ServerState, stats_message
from .control.server import ControlServer
from .events.feed import EventFeed
from .events.paths import NodePaths
from .fuse.forced import Forced
from .fuse.fsnotify import (
    ELEMENT_MIN_BYTES,
    NO_NOTIFICATION_QUEUE,
    QUEUE_NOT_PASSED,
    EventAbilities,
    FsnotifyFlag,
)
from .fuse.init import SessionOptions
from .fuse.operations import AgreedSession, Operations
from .fuse.upcalls import Upcalls
from .record import Record
from .share.native_share import Share
from .share.options import EventsMode
from .vhost_user.device import DeviceOptions
from .vhost_user.messages import ProtocolFeature
from .vhost_user.transport import Listener
from .vhost_user.vring import MAX_VRING_SIZE
from .virtio.config import FsConfig
from .virtio.features import VirtioFeature
from .virtio.queues import NativeDevice

_log = logging.getLogger("vhostfs.server")

MIN_QUEUES = 66
"""hiprio, notification and 64 request queues: the VMM chooses how many of them it uses."""

DRIVER_WAIT_S = 2.0
"""After the mount, for the guest's driver to ask for events, before the log says that it does not."""

GRACE_S = 10.0
"""After a stop signal, for requests under way (a dead network file system may hold one for ever)."""

STUCK_EXIT_STATUS = 1


class EventOptions(Record, kw_only=True):
    """Events that the share has begun to read, as far as a guest and people are concerned.

    proc_fd_dir, root: /proc/self/fd (the caller's) and the share's root in this process's view, by which
    nodes get the paths that people are shown.
    """

    mask: int
    """FS_* bits that elements can carry."""
    joins_renames: bool
    transports: FsnotifyFlag
    """Those of VIRTQUEUE and PARKED that are offered."""
    max_watches: int
    source: str
    """At the start, as reason is; the share says when it moves."""
    reason: str
    proc_fd_dir: int
    root: str
    forced: Forced
    coherent: bool = False
    """Every change is seen, so that the guest may keep what it knows until it is told."""
    no_coherence: str = ""
    """Why not, where --cache=coherent was asked for."""


class ServerOptions(Record, kw_only=True):
    """What one server offers.

    shared_dir, sandbox: for people. tag: for a VMM that fetches the configuration space; None: the VMM has
    its own, and VHOST_USER_PROTOCOL_F_CONFIG is not offered. num_request_queues is what that space says.
    """

    session: SessionOptions
    shared_dir: str = ""
    sandbox: str = ""
    tag: str | None = None
    num_request_queues: int = 1
    readonly: bool = False
    once: bool = False
    events: EventOptions | None = None


class ControlOptions(Record, kw_only=True):
    """Where people and programs ask a running server: a socket that listens already, the caller's.

    allowed_uids: of whoever may ask, as this process sees them.
    """

    listen_socket: socket.socket
    allowed_uids: frozenset[int]


def device_options(options: ServerOptions) -> DeviceOptions:
    """What a front end is offered."""
    config = config_space(options)
    return DeviceOptions(
        max_queues=max(MIN_QUEUES, 2 + options.num_request_queues),
        config=b"" if config is None else config.pack(),
        notification=offers_queue(options),
    )


def config_space(options: ServerOptions) -> FsConfig | None:
    """What a front end may fetch; None: it has its own."""
    if options.tag is None:
        return None
    notify_buf_size_bytes = 0
    if options.events is not None and offers_queue(options):
        notify_buf_size_bytes = options.events.forced.notify_buf_size
    return FsConfig(options.tag, options.num_request_queues, notify_buf_size_bytes)


def offers_queue(options: ServerOptions) -> bool:
    """Whether VIRTIO_FS_F_NOTIFICATION is offered, which takes a configuration space and so a tag."""
    events = options.events
    if events is None or options.tag is None or not events.forced.feature_bit:
        return False
    return bool(events.transports & FsnotifyFlag.VIRTQUEUE)


NOTIFICATION_QUEUE = 1


def event_abilities(
    options: ServerOptions,
    features_acked: int,
    *,
    fetches_config: bool = True,
    has_queue: bool = True,
    request_ring_size: int = MAX_VRING_SIZE,
    source_failed: bool = False,
) -> EventAbilities:
    """What can be done for a driver that has acked these virtio features; there are events.

    fetches_config: the VMM's device has no configuration space of its own. has_queue: the front end has set
    queue 1 up. request_ring_size: of the smallest request queue, in descriptors. source_failed: no more
    events come from the host.
    """
    events = options.events
    assert events is not None
    force = events.forced
    flags = FsnotifyFlag.CHILD | FsnotifyFlag.WATCH_FILESYSTEM | FsnotifyFlag.PARENT
    flags |= FsnotifyFlag.DIRECTORY_LOSS
    withheld = dict.fromkeys(FsnotifyFlag, _SWITCHED_OFF)
    if events.joins_renames:
        flags |= FsnotifyFlag.RENAME
    else:
        withheld[FsnotifyFlag.RENAME] = "the host does not tell which halves belong together"
    withheld[FsnotifyFlag.WATCH_ALL] = "this server does not do it"
    if events.coherent:
        flags |= FsnotifyFlag.INVALIDATE | FsnotifyFlag.DEFERRED_OPEN
    else:
        withheld[FsnotifyFlag.INVALIDATE] = events.no_coherence
    no_queue = _no_queue(options, features_acked, fetches_config, has_queue)
    no_parking = None
    max_parked = min(force.max_parked, parking_places(request_ring_size, features_acked))
    if not events.transports & FsnotifyFlag.PARKED:
        no_parking = "parked requests are switched off by --delivery"
    elif not force.max_parked:
        no_parking = "no request may be parked (max_parked is 0)"
    elif not max_parked:
        no_parking = f"a request queue of {request_ring_size} has no place for parked requests"
    elif force.flags_off & FsnotifyFlag.PARKED:
        no_parking = f"parked requests are {_SWITCHED_OFF}"
    if source_failed:
        no_queue = no_parking = "the host's source of events has failed"
    elif force.notify_buf_size < ELEMENT_MIN_BYTES:
        no_queue = no_parking = f"notify_buf_size is {force.notify_buf_size}, which holds no element"
    if no_queue is None:
        flags |= FsnotifyFlag.VIRTQUEUE
    if no_parking is None:
        flags |= FsnotifyFlag.PARKED
    return EventAbilities(
        flags=int(flags & ~force.flags_off),
        mask=events.mask & force.mask,
        max_watches=events.max_watches,
        notify_buf_size_bytes=force.notify_buf_size,
        max_parked=0 if no_parking else max_parked,
        no_queue=no_queue or "",
        no_parking=no_parking or "",
        withheld=withheld,
        major=force.major,
        minor=force.minor,
        reply_bytes=force.reply_bytes,
    )


def parking_places(request_ring_size: int, features_acked: int) -> int:
    """Requests that may be parked in a ring with so many descriptors: half of it is for the others."""
    descriptors = 1 if features_acked & VirtioFeature.RING_INDIRECT_DESC else 2
    return request_ring_size // 2 // descriptors


_SWITCHED_OFF = "switched off by --negotiate"


def _no_queue(
    options: ServerOptions, features_acked: int, fetches_config: bool, has_queue: bool
) -> str | None:
    """Why the notification queue cannot be used; None: it can."""
    events = options.events
    assert events is not None
    if not events.transports & FsnotifyFlag.VIRTQUEUE:
        return "the notification queue is switched off by --delivery"
    if events.forced.flags_off & FsnotifyFlag.VIRTQUEUE or not events.forced.feature_bit:
        return f"the notification queue is {_SWITCHED_OFF}"
    if options.tag is None:
        return "no --tag is given, without which there is no notification queue"
    if not features_acked & VirtioFeature.FS_NOTIFICATION:
        # The space says how large buffers must be: no device has the queue without passing that on.
        return NO_NOTIFICATION_QUEUE if fetches_config else QUEUE_NOT_PASSED
    if not has_queue:
        return "VIRTIO_FS_F_NOTIFICATION is accepted, but the VMM has not set queue 1 up"
    return None


async def serve(
    listen_socket: socket.socket,
    share: Share,
    options: ServerOptions,
    stop: asyncio.Event,
    control: ControlOptions | None = None,
) -> None:
    """Serves until stop is set or, with once, until the first front end has left.

    listen_socket listens already; it and share stay the caller's. Raises TagError.
    """
    offer = device_options(options)
    events = options.events

    loop = asyncio.get_running_loop()

    def abilities() -> EventAbilities:
        return event_abilities(
            options,
            listener.features_acked,
            fetches_config=bool(listener.protocol_features_acked & ProtocolFeature.CONFIG),
            has_queue=listener.has_vring(NOTIFICATION_QUEUE),
            # While the queues are stopped nothing is known of them, and nobody asks.
            request_ring_size=listener.smallest_request_queue or MAX_VRING_SIZE,
            source_failed=share.events_failed,
        )

    def when_mounted(session: AgreedSession) -> None:
        # On another thread; a driver that knows events asks as soon as it is mounted.
        loop.call_soon_threadsafe(loop.call_later, DRIVER_WAIT_S, operations.say_if_silent, session)

    operations = Operations(
        share,
        options.session,
        readonly=options.readonly,
        event_abilities=None if events is None else abilities,
        when_mounted=when_mounted,
    )
    listener = Listener(
        listen_socket,
        offer,
        new_back_end=lambda: NativeDevice(share, offer.max_queues),
        end_session=operations.end_session,
        once=options.once,
    )
    upcalls = Upcalls(share, operations.table)
    feed = console = None
    if events is not None:
        feed = EventFeed(share, NodePaths(share, events.proc_fd_dir, events.root, time.monotonic))
    if control is not None:
        console = ControlServer(
            control.listen_socket,
            control.allowed_uids,
            feed,
            stats=_state_of(share, options, listener, operations),
            negotiated=_agreements_of(share, options, listener, operations),
        )
    relay = asyncio.ensure_future(stop.wait())
    relay.add_done_callback(lambda _task: listener.stop())
    try:
        await listener.run()
    finally:
        relay.cancel()
        # Only now: a queue that stops waits for its requests, these among them.
        upcalls.close()
        if console is not None:
            console.close()
        if feed is not None:
            await feed.close()


def _state_of(
    share: Share, options: ServerOptions, listener: Listener, operations: Operations
) -> Callable[[], Mapping[str, Any]]:
    """What `vhostfs stats` is answered with, at the moment of the call."""
    started_s = time.monotonic()

    def state() -> Mapping[str, Any]:
        connection = listener.connection
        source, reason = _source_now(share, options)
        delivery, missing = operations.delivery
        return stats_message(
            ServerState(
                uptime_s=time.monotonic() - started_s,
                tag=options.tag,
                share=share.stats(),
                source=source,
                reason=reason,
                events=share.events_stats(),
                front_end=None if connection is None else connection.device.negotiated,
                agreed=operations.event_answer,
                delivery=delivery,
                missing=missing,
            )
        )

    return state


def _agreements_of(
    share: Share, options: ServerOptions, listener: Listener, operations: Operations
) -> Callable[[], Mapping[str, Any]]:
    """What `vhostfs caps` is answered with, at the moment of the call."""
    events = options.events
    config = config_space(options)
    max_queues = device_options(options).max_queues

    def agreements() -> Mapping[str, Any]:
        connection = listener.connection
        source, reason = _source_now(share, options)
        delivery, missing = operations.delivery
        transports = FsnotifyFlag(0)
        if events is not None:
            transports = events.transports & ~events.forced.flags_off
        if not offers_queue(options):
            transports &= ~FsnotifyFlag.VIRTQUEUE
        return negotiated_message(
            NegotiatedState(
                shared_dir=options.shared_dir,
                sandbox=options.sandbox,
                tag=options.tag,
                source=source,
                reason=reason,
                host_mask=0 if events is None else events.mask,
                transports=int(transports),
                config=config,
                max_queues=max_queues,
                delivery=delivery,
                missing=missing,
                front_end=None if connection is None else connection.device.negotiated,
                session=operations.session,
                events=operations.event_answer or operations.event_refusal,
            )
        )

    return agreements


def _source_now(share: Share, options: ServerOptions) -> tuple[str, str]:
    """Where events come from, and why from there."""
    moved = share.events_moved()
    if moved is not None:
        return EventsMode.FANOTIFY_INODES.value, moved
    events = options.events
    return ("off", "off") if events is None else (events.source, events.reason)


def run_server(
    listen_socket: socket.socket,
    share: Share,
    options: ServerOptions,
    control: ControlOptions | None = None,
) -> int:
    """serve() with uvloop until SIGTERM, SIGINT or SIGHUP. Returns the exit status.

    Requests that do not end within GRACE_S end with the process: their threads cannot be joined.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signal(listen_socket, share, options, control))
    return 0


async def _until_signal(
    listen_socket: socket.socket, share: Share, options: ServerOptions, control: ControlOptions | None
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def end() -> None:
        if not stop.is_set():
            stop.set()
            loop.call_later(GRACE_S, _leave_stuck_requests)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, end)
    await serve(listen_socket, share, options, stop, control)


def _leave_stuck_requests() -> None:
    _log.error("requests are still under way %g s after the signal; leaving them", GRACE_S)
    logging.shutdown()
    os._exit(STUCK_EXIT_STATUS)
