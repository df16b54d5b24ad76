# SPDX-License-Identifier: Apache-2.0
"""A file system whose READ, FSYNC and LOOKUP of "stuck" last as long as a test likes: a FUSE server.

Must not know the server under test, for which it is a slow disk.
Specification: include/uapi/linux/fuse.h of Linux, mount.fuse(8).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from pathlib import Path

from tests.conftest import lacking
from tests.limits import HANG_S
from vhostfs.frontend import Opcode
from vhostfs.frontend import fuse_abi as abi

CONTENT = bytes(range(256)) * 256
_FILE = 2
_MNT_DETACH = 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_REQUEST_BYTES = (1 << 20) + 4096
_HELD = (Opcode.READ, Opcode.FSYNC)


class SlowStorage:
    """Mounted while the block lasts; `slow` and `stuck` are its file. What is held goes on with release()."""

    def __init__(self, at: Path) -> None:
        self._at = at
        self._arrived = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._held: list[tuple[int, bytes]] | None = []

    def __enter__(self) -> SlowStorage:
        try:
            self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            lacking(f"/dev/fuse: {error.strerror}")
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _LIBC.mount(b"slow", os.fsencode(self._at), b"fuse", 0, options):
            os.close(self._fd)
            lacking(f"the right to mount a FUSE file system: {os.strerror(ctypes.get_errno())}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        _LIBC.umount2(os.fsencode(self._at), _MNT_DETACH)
        self._thread.join()
        os.close(self._fd)

    def await_held(self, count: int, timeout_s: float = HANG_S) -> None:
        """Until so many more requests have come and wait."""
        for _ in range(count):
            assert self._arrived.acquire(timeout=timeout_s), "nothing came to the slow file system"

    def release(self) -> None:
        """Everything goes on, and nothing is held any more."""
        with self._lock:
            held, self._held = self._held, None
        for unique, payload in held or []:
            self._reply(unique, payload)

    def _reply(self, unique: int, payload: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(OSError):  # the request was interrupted, or the mount is gone
            os.write(self._fd, abi.OUT_HEADER.pack(16 + len(payload), -error, unique) + payload)

    def _hold(self, unique: int, payload: bytes) -> None:
        with self._lock:
            if self._held is not None:
                self._held.append((unique, payload))
                self._arrived.release()
                return
        self._reply(unique, payload)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, _REQUEST_BYTES)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, nodeid, *_ = abi.IN_HEADER.unpack_from(request)
            self._answer(opcode, unique, nodeid, request[abi.IN_HEADER.size :])

    def _answer(self, opcode: int, unique: int, nodeid: int, args: bytes) -> None:
        match opcode:
            case Opcode.INIT:
                self._reply(unique, abi.INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4096, 1, 1, 0, *[0] * 8))
            case Opcode.LOOKUP if args == b"slow\0":
                self._reply(unique, abi.ENTRY_HEAD.pack(_FILE, 1, 60, 60, 0, 0) + _attr(_FILE))
            case Opcode.LOOKUP if args == b"stuck\0":
                self._hold(unique, abi.ENTRY_HEAD.pack(_FILE, 1, 60, 60, 0, 0) + _attr(_FILE))
            case Opcode.LOOKUP:
                self._reply(unique, error=errno.ENOENT)
            case Opcode.GETATTR:
                self._reply(unique, abi.ATTR_HEAD.pack(60, 0, 0) + _attr(nodeid))
            case Opcode.OPEN | Opcode.OPENDIR:
                self._reply(unique, abi.OPEN_OUT.pack(1, abi.OpenReply.DIRECT_IO, 0))
            case Opcode.READ:
                _, offset, size = struct.unpack_from("<QQI", args)
                self._hold(unique, CONTENT[offset : offset + size])
            case Opcode.FSYNC:
                self._hold(unique, b"")
            case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.FLUSH:
                self._reply(unique)
            case Opcode.FORGET | Opcode.BATCH_FORGET | Opcode.INTERRUPT:
                pass
            case _:
                self._reply(unique, error=errno.ENOSYS)


def _attr(nodeid: int) -> bytes:
    mode = 0o100644 if nodeid == _FILE else 0o40755
    size = len(CONTENT) if nodeid == _FILE else 0
    return abi.ATTR.pack(nodeid, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
