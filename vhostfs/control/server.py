# SPDX-License-Identifier: Apache-2.0
"""Serves the control socket on the running loop: accepts clients of the same user, moves their bytes.
Must not know the conversation (protocol.py) or what is told (report.py).
Specification: docs/events.md, "The control socket"; SO_PEERCRED in unix(7)."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from ..events.feed import SeenEvent, Watcher
from .protocol import Command, ControlSession, NegotiatedCommand, StatsCommand, WatchCommand, encode_line
from .report import event_message

_log = logging.getLogger("vhostfs.control")

MAX_CLIENTS = 16
_UCRED = struct.Struct("iII")
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Feed(Protocol):
    """Where events come from."""

    def add_watcher(self, watcher: Watcher) -> None: ...
    def remove_watcher(self, watcher: Watcher) -> None: ...


class ControlServer:
    """Serves until close(). listen_socket listens already and stays the caller's."""

    def __init__(
        self,
        listen_socket: socket.socket,
        allowed_uids: Collection[int],
        feed: Feed | None,
        stats: Callable[[], Mapping[str, Any]],
        negotiated: Callable[[], Mapping[str, Any]],
    ) -> None:
        """allowed_uids: of clients, as this process sees them. feed: None when events are off."""
        self._allowed_uids = allowed_uids
        self._listen_socket = listen_socket
        self._listen_socket.setblocking(False)
        self._feed = feed
        self._stats = stats
        self._negotiated = negotiated
        self._loop = asyncio.get_running_loop()
        self._clients: set[_Client] = set()
        self._loop.add_reader(listen_socket, self._accept)

    def close(self) -> None:
        """Clients see the connection end."""
        self._loop.remove_reader(self._listen_socket)
        for client in tuple(self._clients):
            client.close()

    def _accept(self) -> None:
        try:
            peer, _address = self._listen_socket.accept()
        except OSError as error:
            if error.errno in _SHORTAGE:
                # Readable all the time from now on: stop looking for a while.
                self._loop.remove_reader(self._listen_socket)
                self._loop.call_later(1.0, self._look_again)
            return
        peer.setblocking(False)
        client = _Client(peer, self._loop, self._serve, self._forget)
        if peer_uid(peer) not in self._allowed_uids:
            client.session.refuse("only the server's own user and root may control it")
        elif len(self._clients) >= MAX_CLIENTS:
            client.session.refuse(f"{MAX_CLIENTS} clients are connected already")
        else:
            self._clients.add(client)
        client.move()

    def _look_again(self) -> None:
        if self._listen_socket.fileno() >= 0:
            self._loop.add_reader(self._listen_socket, self._accept)

    def _forget(self, client: _Client) -> None:
        self._clients.discard(client)
        if self._feed is not None and client.watcher is not None:
            self._feed.remove_watcher(client.watcher)

    def _serve(self, client: _Client, command: Command) -> None:
        match command:
            case StatsCommand():
                client.session.send(self._stats())
            case NegotiatedCommand():
                client.session.send(self._negotiated())
            case WatchCommand() if self._feed is None:
                client.session.send({"type": "error", "error": "events are off in this server"})
            case WatchCommand() if client.watcher is None:
                client.watcher = client.show
                self._feed.add_watcher(client.watcher)
                client.session.send({"type": "watching"})


def peer_uid(peer: socket.socket) -> int:
    """Who has connected, as this process's user namespace numbers users."""
    _pid, uid, _gid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


class _Client:
    """Moves bytes between one socket and its session."""

    def __init__(
        self,
        peer: socket.socket,
        loop: asyncio.AbstractEventLoop,
        serve: Callable[[_Client, Command], None],
        forget: Callable[[_Client], None],
    ) -> None:
        self.session = ControlSession()
        self.watcher: Watcher | None = None
        self._peer = peer
        self._loop = loop
        self._serve = serve
        self._forget = forget
        self._is_read = False
        self._is_written = False

    def show(self, events: Sequence[SeenEvent]) -> None:
        """A batch from the feed."""
        for event in events:
            self.session.send_skipped(event.trace.skipped)
            if self.session.wants(event.trace.fate):
                self.session.send_event(encode_line(event_message(event)))
        self.move()

    def move(self) -> None:
        """Sends what can be sent now, and waits for what is to come."""
        if self._peer.fileno() < 0:
            return
        try:
            while data := self.session.waiting_bytes():
                self.session.sent(self._peer.send(data, socket.MSG_NOSIGNAL))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        is_waiting = bool(self.session.waiting_bytes(1))
        if self.session.is_over and not is_waiting:
            self.close()
            return
        self._watch(reads=self.session.wants_input, writes=is_waiting)

    def _watch(self, *, reads: bool, writes: bool) -> None:
        if reads != self._is_read:
            self._is_read = reads
            if reads:
                self._loop.add_reader(self._peer, self._read)
            else:
                self._loop.remove_reader(self._peer)
        if writes != self._is_written:
            self._is_written = writes
            if writes:
                self._loop.add_writer(self._peer, self.move)
            else:
                self._loop.remove_writer(self._peer)

    def _read(self) -> None:
        try:
            data = self._peer.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self.session.receive(data)
        while (command := self.session.next_command()) is not None:
            self._serve(self, command)
        self.move()

    def close(self) -> None:
        """At once; what waits is lost."""
        if self._peer.fileno() < 0:
            return
        self._watch(reads=False, writes=False)
        self._peer.close()
        self._forget(self)
