# SPDX-License-Identifier: Apache-2.0
"""Upcalls: each is answered exactly once, whatever its operation does, and a flood leaves the loop alive."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import pytest

from vhostfs.frontend import Opcode
from vhostfs.fuse.operations import Operation, Request
from vhostfs.fuse.upcalls import TURN, Upcalls
from vhostfs.share.native_share import Share, Upcall


class FakeShare:
    """Upcalls from a list; what was answered, by unique number."""

    def __init__(self) -> None:
        self.upcall_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.waiting: deque[Upcall] = deque()
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.is_flooded = False

    def submit(self, opcode: int, unique: int) -> None:
        self.waiting.append(Upcall(None, opcode, 0, 0, 1, unique, 1, b"", 4096))
        os.eventfd_write(self.upcall_fd, 1)

    def next_upcall(self) -> Upcall | None:
        if self.is_flooded:
            return Upcall(None, 9999, 0, 0, 1, len(self.answers), 1, b"", 4096)
        if self.waiting:
            return self.waiting.popleft()
        os.eventfd_read(self.upcall_fd)
        return None

    def reply(self, upcall: Upcall, error: int = 0, payload: bytes = b"") -> None:
        assert upcall.unique not in self.answers, "answered twice"
        self.answers[upcall.unique] = (error, payload)

    async def answer(self, unique: int) -> tuple[int, bytes]:
        async with asyncio.timeout(10):
            while unique not in self.answers:
                await asyncio.sleep(0)
        return self.answers[unique]


def succeed(_request: Request) -> bytes:
    return b"done"


def fail(_request: Request) -> bytes:
    raise OSError(errno.ESTALE, "gone")


def break_down(_request: Request) -> bytes:
    raise KeyError("a mistake of ours")


TABLE: dict[int, Operation] = {
    Opcode.INIT: succeed,
    Opcode.STATFS: succeed,
    Opcode.IOCTL: fail,
    Opcode.POLL: break_down,
}


@pytest.fixture
async def share() -> AsyncIterator[FakeShare]:
    share = FakeShare()
    upcalls = Upcalls(cast(Share, share), TABLE)
    yield share
    upcalls.close()
    os.close(share.upcall_fd)


async def test_an_operation_answers_with_its_payload_or_its_errno(share: FakeShare) -> None:
    share.submit(Opcode.STATFS, 1)
    share.submit(Opcode.IOCTL, 2)
    share.submit(Opcode.INIT, 3)
    assert await share.answer(1) == (0, b"done")
    assert await share.answer(2) == (errno.ESTALE, b"")
    assert await share.answer(3) == (0, b"done")


async def test_an_opcode_that_nobody_knows_is_enosys(share: FakeShare) -> None:
    share.submit(0x5800, 1)
    assert await share.answer(1) == (errno.ENOSYS, b"")


async def test_a_mistake_in_an_operation_is_eio_and_in_the_log(
    share: FakeShare, caplog: pytest.LogCaptureFixture
) -> None:
    share.submit(Opcode.POLL, 1)
    assert await share.answer(1) == (errno.EIO, b"")
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


async def test_a_flood_does_not_keep_the_loop_from_other_work(share: FakeShare) -> None:
    share.is_flooded = True
    os.eventfd_write(share.upcall_fd, 1)
    for _ in range(10):
        await asyncio.sleep(0)
    share.is_flooded = False
    assert 0 < len(share.answers) <= 10 * TURN
    assert len(share.answers) % TURN == 0
