# SPDX-License-Identifier: Apache-2.0
"""Takes requests from the C core and answers each exactly once, by a table of operations.

Must not know what an operation does. Operations may block, so they run in threads of their own.
Specification: native/api.h, "upcalls".
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from ..share.native_share import Share, Upcall
from .abi import Opcode
from .operations import Operation

_log = logging.getLogger("vhostfs.fuse")

THREADS = 4
TURN = 64
"""Requests taken in one turn of the loop: a guest that floods must not keep it from signals and messages."""
# A session begins and ends alone: two at once would each wait for the other's requests.
_SESSION = frozenset({Opcode.INIT, Opcode.DESTROY, Opcode.FSNOTIFY_INIT})


class Upcalls:
    """Serves a share's upcalls on the running loop until close().

    What waits is bounded by the guest's rings: an unanswered request keeps its descriptors.
    """

    def __init__(self, share: Share, table: Mapping[int, Operation]) -> None:
        self._share = share
        self._table = table
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="vhostfs-upcall")
        self._session_thread = ThreadPoolExecutor(1, thread_name_prefix="vhostfs-session")
        self._loop.add_reader(share.upcall_fd, self._take)

    def _take(self) -> None:
        # The descriptor stays readable until next_upcall() has found nothing.
        for _ in range(TURN):
            upcall = self._share.next_upcall()
            if upcall is None:
                return
            operation = self._table.get(upcall.opcode)
            if operation is None:
                self._share.reply(upcall, errno.ENOSYS)
                continue
            threads = self._session_thread if upcall.opcode in _SESSION else self._threads
            threads.submit(self._answer, operation, upcall)

    def _answer(self, operation: Operation, upcall: Upcall) -> None:
        error, payload = errno.EIO, b""
        try:
            payload = operation(upcall)
            error = 0
        except OSError as problem:
            error = problem.errno or errno.EIO
        except Exception:
            _log.exception("opcode %d failed inside the server", upcall.opcode)
        self._share.reply(upcall, error, payload)

    def close(self) -> None:
        """After the last device is gone, so nothing waits any more."""
        self._loop.remove_reader(self._share.upcall_fd)
        self._threads.shutdown()
        self._session_thread.shutdown()
