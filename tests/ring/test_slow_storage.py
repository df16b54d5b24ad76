# SPDX-License-Identifier: Apache-2.0
"""Storage that takes its time with a read or an fsync holds up neither other requests nor events.

Must not test what the requests do. Specification: --thread-pool-size in docs/migrating-from-virtiofsd.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.events import EventGuest
from tests.ring.share import Share
from tests.ring.slow_storage import CONTENT, SlowStorage
from tests.server import awaited
from vhostfs.frontend import Feature, FuseClient, Machine, Pending
from vhostfs.frontend import operations as op

pytestmark = pytest.mark.usefixtures("needs_root")
POOL_THREADS = 4


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    share = make_share("--tag=events", f"--thread-pool-size={POOL_THREADS}")
    (share.path / "disk").mkdir()
    (share.path / "file").write_bytes(b"quick")
    return share


@pytest.fixture
def storage(share: Share) -> Iterator[SlowStorage]:
    with SlowStorage(share.path / "disk") as storage:
        yield storage
        # The server lets go of the mount before it is taken away.
        storage.release()
        share.unmount()


class Slow:
    """The slow file, open in the guest."""

    def __init__(self, fs: FuseClient) -> None:
        self.fs = fs
        self.nodeid = fs.walk("disk/slow").nodeid
        self.fh = fs.session.call(op.open_(self.nodeid)).fh

    def read(self) -> Pending[bytes]:
        return self.fs.session.submit(op.read(self.nodeid, self.fh, len(CONTENT)))

    def fsync(self) -> Pending[None]:
        return self.fs.session.submit(op.fsync(self.nodeid, self.fh))

    def close(self) -> None:
        self.fs.session.call(op.release(self.nodeid, self.fh))


def assert_all_else_goes_on(fs: FuseClient) -> None:
    for _ in range(100):
        node = fs.lookup(fs.root, "file").nodeid
        fs.session.call(op.getattr_(node))
    assert fs.read_file(node) == b"quick"
    # On the hiprio queue.
    fs.session.submit(op.forget(node, 100)).wait()


@pytest.mark.parametrize("request_of", [Slow.read, Slow.fsync], ids=["read", "fsync"])
def test_a_slow_request_holds_up_nothing_else(share: Share, storage: SlowStorage, request_of: Any) -> None:
    fs = share.mount()
    slow = Slow(fs)
    pending = request_of(slow)
    storage.await_held(1)
    assert_all_else_goes_on(fs)
    assert not pending.done
    storage.release()
    assert pending.wait() in (CONTENT, None)
    slow.close()


def test_more_slow_reads_than_threads_hold_up_nothing_else(share: Share, storage: SlowStorage) -> None:
    fs = share.mount()
    slow = Slow(fs)
    pending = [slow.read() for _ in range(2 * POOL_THREADS)]
    storage.await_held(POOL_THREADS)
    assert_all_else_goes_on(fs)
    storage.release()
    assert [one.wait() for one in pending] == [CONTENT] * len(pending)
    slow.close()


@pytest.mark.usefixtures("ours")
def test_a_slow_fsync_holds_up_no_events(share: Share, storage: SlowStorage) -> None:
    guest = EventGuest(share)
    guest.watch("")
    slow = Slow(guest.fs)
    pending = slow.fsync()
    storage.await_held(1)
    (share.path / "made").mkdir()
    assert any("made" in text for text in guest.told())
    assert not pending.done
    storage.release()
    pending.wait()
    slow.close()


def test_an_answer_does_not_wait_for_a_slow_request_behind_it(share: Share, storage: SlowStorage) -> None:
    fs = share.mount()
    disk = fs.walk("disk").nodeid
    queue = fs.vmm.request_queue()
    queue.set_used_event(queue.used_index)
    with suppress(BlockingIOError):
        os.eventfd_read(queue.call_fd)
    quick = fs.session.submit(op.getattr_(fs.root), publish=False)
    slow = fs.session.submit(op.lookup(disk, "stuck"), publish=False)
    queue.publish(quick.head, slow.head)
    storage.await_held(1)
    assert os.eventfd_read(queue.call_fd) == 1
    quick.wait()
    assert not slow.done
    storage.release()
    fs.session.submit(op.forget(slow.wait().nodeid, 1)).wait()


@pytest.mark.parametrize(
    ("busy", "one_more"),
    [(0, False), (POOL_THREADS, False), (POOL_THREADS - 1, True)],
    ids=["idle threads", "busy threads", "the last thread is woken"],
)
def test_large_reads_do_not_wait_for_a_slow_request_behind_them(
    share: Share, storage: SlowStorage, busy: int, one_more: bool
) -> None:
    """one_more: a thread is on its way, but what it finds first is another slow request."""
    size = 128 << 10
    (share.path / "large").write_bytes(os.urandom(8 * size))
    fs = share.mount()
    slow = Slow(fs)
    held = [slow.read() for _ in range(busy)]
    storage.await_held(busy)
    large, disk = fs.lookup(fs.root, "large").nodeid, fs.walk("disk").nodeid
    fh = fs.session.call(op.open_(large)).fh
    if one_more:
        held.append(fs.session.submit(op.read(slow.nodeid, slow.fh, len(CONTENT)), publish=False))
    reads = [fs.session.submit(op.read(large, fh, size, i * size), publish=False) for i in range(8)]
    stuck = fs.session.submit(op.lookup(disk, "stuck"), publish=False)
    stuck.queue.publish(*(one.head for one in [*held[busy:], *reads]), stuck.head)
    storage.await_held(1 + one_more)
    assert b"".join(one.wait() for one in reads) == (share.path / "large").read_bytes()
    assert not stuck.done
    assert not any(one.done for one in held)
    storage.release()
    fs.session.submit(op.forget(stuck.wait().nodeid, 1)).wait()
    assert [one.wait() for one in held] == [CONTENT] * len(held)
    slow.close()


WANTS_EVERY_INTERRUPT = Machine(features=Feature.VERSION_1 | Feature.INDIRECT_DESC)
LOOKUPS = 64


def interrupts_of_lookups(fs: FuseClient) -> int:
    """For a row of them, in one batch."""
    queue = fs.vmm.request_queue()
    with suppress(BlockingIOError):
        os.eventfd_read(queue.call_fd)
    pending = [fs.session.submit(op.lookup(fs.root, "missing"), publish=False) for _ in range(LOOKUPS)]
    queue.publish(*(one.head for one in pending))
    assert awaited(lambda: all(one.done for one in pending))
    return os.eventfd_read(queue.call_fd)


@pytest.mark.usefixtures("ours")
def test_lookups_share_interrupts_while_the_storage_is_prompt(share: Share, storage: SlowStorage) -> None:
    """Each answer is told of before the next lookup, which might take long, until these prove not to."""
    fs = share.mount(WANTS_EVERY_INTERRUPT)
    disk = fs.walk("disk").nodeid
    assert interrupts_of_lookups(fs) > LOOKUPS // 2 - 2
    # On a busy machine some take long for want of a processor.
    assert awaited(lambda: interrupts_of_lookups(fs) < LOOKUPS // 2 - 2)
    quick = fs.session.submit(op.getattr_(fs.root), publish=False)
    slow = fs.session.submit(op.lookup(disk, "stuck"), publish=False)
    fs.vmm.request_queue().publish(quick.head, slow.head)
    storage.await_held(1)
    storage.release()
    fs.session.submit(op.forget(slow.wait().nodeid, 1)).wait()
    assert interrupts_of_lookups(fs) > LOOKUPS // 2 - 2
