# SPDX-License-Identifier: Apache-2.0
"""The FUSE operations that Python decides: INIT, DESTROY, IOCTL, FSNOTIFY_INIT.

Must not know rings or how requests arrive (upcalls.py); everything else is done in native/.
Source: include/uapi/linux/fuse.h; ioctl numbers: include/uapi/linux/fs.h.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from ..record import Record
from .abi import InitIn, InitOut, IoctlIn, Opcode, pack_ioctl
from .fsnotify import (
    TRANSPORTS,
    Delivery,
    EventAbilities,
    FsnotifyAnswer,
    FsnotifyInitIn,
    log_line,
    negotiate_events,
    refused,
)
from .guest_log import GuestLog
from .init import SessionOptions, negotiate

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC32_GETFLAGS = 0x80046601
FS_IOC32_SETFLAGS = 0x40046602
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
# Bytes that the host's kernel reads or writes, whatever the number's size field says of a long.
_IOCTL_READS = {FS_IOC_GETFLAGS: 4, FS_IOC32_GETFLAGS: 4, FS_IOC_FSGETXATTR: 28}
_IOCTL_WRITES = {FS_IOC_SETFLAGS: 4, FS_IOC32_SETFLAGS: 4, FS_IOC_FSSETXATTR: 28}
# The host's kernel is 64-bit and knows the long forms; a 32-bit guest process asks by the others.
_HOST_NUMBER = {FS_IOC32_GETFLAGS: FS_IOC_GETFLAGS, FS_IOC32_SETFLAGS: FS_IOC_SETFLAGS}


class Tree(Protocol):
    """What operations need of the share."""

    def start_session(self, init_flags: int, max_write_bytes: int) -> None: ...
    def end_session(self) -> None: ...
    def open_file(self, nodeid: int, fh: int) -> int: ...
    def grant_events(self, flags: int, mask: int, element_bytes: int, max_parked: int) -> None: ...


class Request(Protocol):
    """What an operation sees of its request."""

    @property
    def opcode(self) -> int: ...
    @property
    def nodeid(self) -> int: ...
    @property
    def args(self) -> bytes: ...
    @property
    def reply_room_bytes(self) -> int: ...


Operation = Callable[[Request], bytes]
"""Returns the reply's payload or raises OSError with the errno to answer. May block."""


EVENTS_OFF = "events are off in this server (--events=off)"
NOT_MOUNTED = "the guest has not mounted the share"
NOT_ASKED = "its driver has not asked for them; the kernel's own does not, vhostfs_virtiofs (qemu/guest) does"


class AgreedSession(Record):
    """What FUSE_INIT has settled."""

    offer: InitIn
    reply: InitOut


class Operations:
    """The table of operations for one share."""

    def __init__(
        self,
        tree: Tree,
        options: SessionOptions,
        *,
        readonly: bool,
        event_abilities: Callable[[], EventAbilities] | None = None,
        when_mounted: Callable[[AgreedSession], None] | None = None,
    ) -> None:
        """event_abilities: what can be offered to the driver that asks now; None: events are off.

        when_mounted: told of each session, on its thread, before the guest is.
        """
        self._log = GuestLog(logging.getLogger("vhostfs.fuse"))
        self._tree = tree
        self._options = options
        self._readonly = readonly
        self._event_abilities = event_abilities
        self._when_mounted = when_mounted
        self.session: AgreedSession | None = None
        """None: the guest has not mounted the share."""
        self.event_answer: FsnotifyAnswer | None = None
        """What was agreed about events in this session; None: nothing."""
        self.event_refusal: FsnotifyAnswer | None = None
        """The first offer that was refused in this session."""
        self._event_refusal_said = False
        self._events_are_missed = False
        self.table: Mapping[int, Operation] = {
            Opcode.INIT: self.init,
            Opcode.DESTROY: self.destroy,
            Opcode.IOCTL: self.ioctl,
            Opcode.FSNOTIFY_INIT: self.fsnotify_init,
        }

    def init(self, request: Request) -> bytes:
        """Begins a session; the one before ends."""
        try:
            offer = InitIn.unpack(request.args)
        except ValueError as error:
            self._log.say(logging.WARNING, str(error))
            raise OSError(errno.EINVAL, "FUSE_INIT") from None
        answer = negotiate(offer, self._options)
        for note in answer.notes:
            self._log.say(logging.INFO, note)
        if answer.error:
            raise OSError(answer.error, "FUSE_INIT")
        if answer.max_write_bytes:
            self._forget_session()
            self._events_are_missed = self._event_abilities is not None
            self._tree.start_session(answer.reply.flags, answer.max_write_bytes)
            self.session = AgreedSession(offer, answer.reply)
            self._log.say(logging.INFO, f"guest mounted the share (FUSE 7.{offer.minor})")
            if self._when_mounted is not None:
                self._when_mounted(self.session)
        return answer.reply.pack()

    def destroy(self, request: Request) -> bytes:
        """The guest unmounted: what it held is forgotten."""
        self.end_session()
        self._log.say(logging.INFO, "guest unmounted the share")
        return b""

    def end_session(self) -> None:
        """The guest is gone or has unmounted: what it held and what was agreed with it is forgotten."""
        self._forget_session()
        self._tree.end_session()

    def _forget_session(self) -> None:
        self._say_unasked()
        self.session = self.event_answer = self.event_refusal = None
        self._event_refusal_said = False
        self._events_are_missed = False

    def fsnotify_init(self, request: Request) -> bytes:
        """What driver and server agree on about events, once in a session."""
        if self._event_abilities is None:
            raise OSError(errno.ENOSYS, "FUSE_FSNOTIFY_INIT")
        self._events_are_missed = False
        if self.event_answer is not None:
            self._say_refused("its driver asks for the second time in this session (EALREADY)")
            raise OSError(errno.EALREADY, "FUSE_FSNOTIFY_INIT")
        abilities = self._event_abilities()
        try:
            offer = FsnotifyInitIn.unpack(request.args, abilities.major)
        except ValueError as error:
            raise self._refusal(refused(None, errno.EINVAL, str(error))) from None
        answer = negotiate_events(offer, abilities)
        if answer.error:
            raise self._refusal(answer)
        reply = answer.reply.pack()[: abilities.reply_bytes].ljust(abilities.reply_bytes, b"\0")
        if request.reply_room_bytes < len(reply):
            room = f"it has room for {request.reply_room_bytes} bytes of the answer, which has {len(reply)}"
            raise self._refusal(refused(offer, errno.EINVAL, room))
        for line in (answer.note, *answer.reductions):
            self._log.say(logging.INFO, line)
        # Without a way for events to travel none are made.
        if answer.reply.flags & TRANSPORTS:
            self._tree.grant_events(
                answer.reply.flags,
                answer.driver_mask,
                answer.reply.notify_buf_size_bytes,
                answer.reply.max_parked,
            )
        self.event_answer = answer
        return reply

    @property
    def delivery(self) -> tuple[Delivery, str]:
        """How events travel to the guest now, and why in no better way ("": there is none)."""
        answer = self.event_answer or self.event_refusal
        if answer is not None:
            return answer.delivery, answer.missing
        if self._event_abilities is None:
            return Delivery.NONE, EVENTS_OFF
        if self.session is None:
            return Delivery.NONE, NOT_MOUNTED
        abilities = self._event_abilities()
        if abilities.can_deliver:
            return Delivery.NONE, NOT_ASKED
        return Delivery.NONE, f"{abilities.no_queue}; {abilities.no_parking}; {NOT_ASKED}"

    def say_if_silent(self, session: AgreedSession) -> None:
        """One line when the session goes on and nothing was said about its events: its driver knows none."""
        if self.session is session and self.event_answer is None and not self._event_refusal_said:
            self._events_are_missed = False
            self._log.say(logging.INFO, log_line(*self.delivery))

    def _refusal(self, answer: FsnotifyAnswer) -> OSError:
        self.event_refusal = self.event_refusal or answer
        self._say_refused(answer.note)
        return OSError(answer.error, "FUSE_FSNOTIFY_INIT")

    def _say_refused(self, note: str) -> None:
        """Once in a session: a guest may go on offering nonsense for ever."""
        if not self._event_refusal_said:
            self._log.say(logging.WARNING, f"events for the guest: {note}")
            self._event_refusal_said = True

    def _say_unasked(self) -> None:
        """Of a session that was too short for say_if_silent()."""
        if self._events_are_missed:
            text = "events for the guest: there were none: its driver never asked for them"
            self._log.say(logging.INFO, text)

    def ioctl(self, request: Request) -> bytes:
        """Attribute flags and project ids of files; anything else is for devices, which the guest has."""
        try:
            call = IoctlIn.unpack(request.args)
        except ValueError:
            raise OSError(errno.EINVAL, "FUSE_IOCTL") from None
        number = _HOST_NUMBER.get(call.cmd, call.cmd)
        reads, writes = _IOCTL_READS.get(call.cmd), _IOCTL_WRITES.get(call.cmd)
        if reads is None and writes is None:
            raise OSError(errno.ENOTTY, "FUSE_IOCTL")
        if writes is not None and self._readonly:
            raise OSError(errno.EROFS, "FUSE_IOCTL")
        if (writes is not None and len(call.data) < writes) or (
            reads is not None and call.out_size_bytes < reads
        ):
            raise OSError(errno.EINVAL, "FUSE_IOCTL")
        # The kernel would write a whole int, also where a long was declared.
        buffer = bytearray(call.data[:writes] if writes is not None else bytes(reads or 0))
        with _closing(self._tree.open_file(request.nodeid, call.fh)) as fd:
            result = fcntl.ioctl(fd, number, buffer)
        if reads is None:
            return pack_ioctl(result, b"")
        # A declared long is copied out whole; what the kernel left untouched is zero.
        return pack_ioctl(result, bytes(buffer).ljust(min(call.out_size_bytes, 32), b"\0"))


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
