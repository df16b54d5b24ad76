# SPDX-License-Identifier: Apache-2.0
"""POSIX record locks and flock: between owners in the guest, against the host, waiting, interrupted.

Must not test content. Specification: fcntl(2), flock(2), and FUSE_SETLKW with FUSE_INTERRUPT in fuse.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ring.share import Share, refused
from tests.server import ServerProcess, awaited
from vhostfs.frontend import FileLock, FuseClient, InitFlag, Pending
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op

TO_END = (1 << 63) - 1
READ = FileLock(0, TO_END, fcntl.F_RDLCK, 100)
WRITE = FileLock(0, TO_END, fcntl.F_WRLCK, 100)
UNLOCK = FileLock(0, TO_END, fcntl.F_UNLCK, 100)
ALICE, BOB = 0xA11CE, 0xB0B


@pytest.fixture
def opened(fs: FuseClient) -> tuple[int, int]:
    if not fs.session.flags & InitFlag.POSIX_LOCKS:
        if not ServerProcess.is_foreign():
            pytest.fail("FUSE_POSIX_LOCKS was offered and not taken")
        pytest.skip("the server under test keeps locks in the guest")
    entry, file = fs.create(fs.root, "a")
    return entry.nodeid, file.fh


@contextmanager
def lock_on_the_host(path: Path) -> Iterator[None]:
    """A process that holds fcntl's write lock on the whole file."""
    program = "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.lockf(f,fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.stdin.write(b"\n")
            process.stdin.close()


def stays_pending(pending: Pending[None], for_s: float = 0.15) -> bool:
    """Nothing to wait on shows that something does not happen."""
    return not awaited(lambda: pending.done, for_s)


def test_two_owners_exclude_each_other(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    with refused(errno.EAGAIN):
        fs.setlk(*opened, BOB, WRITE)
    with refused(errno.EAGAIN):
        fs.setlk(*opened, BOB, READ)
    fs.setlk(*opened, ALICE, UNLOCK)
    fs.setlk(*opened, BOB, WRITE)


def test_one_owner_never_conflicts_with_itself_over_two_handles(
    fs: FuseClient, opened: tuple[int, int]
) -> None:
    nodeid, fh = opened
    other = fs.open(nodeid, os.O_RDWR).fh
    fs.setlk(nodeid, fh, ALICE, WRITE)
    fs.setlk(nodeid, other, ALICE, WRITE)
    assert fs.getlk(nodeid, other, ALICE, WRITE).kind == fcntl.F_UNLCK


def test_readers_share(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, READ)
    fs.setlk(*opened, BOB, READ)
    with refused(errno.EAGAIN):
        fs.setlk(*opened, BOB, WRITE)


def test_ranges_are_respected(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, FileLock(0, 99, fcntl.F_WRLCK))
    fs.setlk(*opened, BOB, FileLock(100, 199, fcntl.F_WRLCK))
    with refused(errno.EAGAIN):
        fs.setlk(*opened, BOB, FileLock(99, 99, fcntl.F_WRLCK))
    with refused(errno.EAGAIN):
        fs.setlk(*opened, ALICE, FileLock(0, TO_END, fcntl.F_WRLCK))


def test_getlk_names_the_lock_in_the_way(fs: FuseClient, opened: tuple[int, int]) -> None:
    assert fs.getlk(*opened, BOB, WRITE).kind == fcntl.F_UNLCK
    fs.setlk(*opened, ALICE, FileLock(10, 19, fcntl.F_WRLCK, 777))
    found = fs.getlk(*opened, BOB, WRITE)
    assert (found.kind, found.start, found.end) == (fcntl.F_WRLCK, 10, 19)
    assert fs.getlk(*opened, BOB, FileLock(20, 30, fcntl.F_WRLCK)).kind == fcntl.F_UNLCK


def test_the_host_sees_the_guest_s_lock(share: Share, fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, FileLock(10, 19, fcntl.F_WRLCK))
    with open(share.path / "a", "r+b") as host:
        with pytest.raises(BlockingIOError):
            fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 20)
    fs.setlk(*opened, ALICE, UNLOCK)
    with open(share.path / "a", "r+b") as host:
        fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_guest_sees_the_host_s_lock(share: Share, fs: FuseClient, opened: tuple[int, int]) -> None:
    with lock_on_the_host(share.path / "a"):
        with refused(errno.EAGAIN):
            fs.setlk(*opened, ALICE, READ)
        found = fs.getlk(*opened, ALICE, WRITE)
        assert (found.kind, found.start) == (fcntl.F_WRLCK, 0)
    fs.setlk(*opened, ALICE, READ)


def test_a_waiting_lock_is_granted_when_the_other_owner_unlocks(
    fs: FuseClient, opened: tuple[int, int]
) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    waiting = fs.submit(op.setlkw(*opened, BOB, WRITE))
    assert stays_pending(waiting)
    fs.setlk(*opened, ALICE, UNLOCK)
    waiting.wait()
    with refused(errno.EAGAIN):
        fs.setlk(*opened, ALICE, WRITE)


def test_a_waiting_lock_is_granted_when_the_host_unlocks(
    share: Share, fs: FuseClient, opened: tuple[int, int]
) -> None:
    with lock_on_the_host(share.path / "a"):
        waiting = fs.submit(op.setlkw(*opened, BOB, WRITE))
        assert stays_pending(waiting)
    waiting.wait()


def test_a_waiting_lock_holds_nothing_else_up(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    waiting = [fs.submit(op.setlkw(*opened, BOB + i, WRITE)) for i in range(20)]
    for _ in range(100):
        fs.getattr(opened[0])
    assert not any(pending.done for pending in waiting)
    # Each owner that is granted unlocks again, and the next one is granted.
    fs.setlk(*opened, ALICE, UNLOCK)
    left = dict(enumerate(waiting))
    while left:
        assert awaited(lambda: any(pending.done for pending in left.values())), f"{len(left)} never granted"
        for i in [i for i, pending in left.items() if pending.done]:
            left.pop(i).wait()
            fs.setlk(*opened, BOB + i, UNLOCK)


def test_an_interrupted_wait_ends_with_eintr(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    waiting = fs.submit(op.setlkw(*opened, BOB, WRITE))
    other = fs.submit(op.setlkw(*opened, BOB + 1, WRITE))
    assert stays_pending(waiting)
    fs.interrupt(waiting)
    with refused(errno.EINTR):
        waiting.wait()
    assert stays_pending(other)
    fs.setlk(*opened, ALICE, UNLOCK)
    other.wait()


def test_an_interrupt_of_nothing_is_harmless(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.call(op.interrupt(0xDEAD))
    done = fs.submit(op.getattr_(opened[0]))
    done.wait()
    fs.interrupt(done)
    fs.setlk(*opened, ALICE, WRITE)


def test_an_interrupt_that_overtakes_its_request_does_not_hang_it(
    fs: FuseClient, opened: tuple[int, int]
) -> None:
    """The queues are not ordered against each other; the guest then sends the interrupt again."""
    fs.setlk(*opened, ALICE, WRITE)
    waiting = fs.submit(op.setlkw(*opened, BOB, WRITE))

    def interrupted() -> bool:
        fs.interrupt(waiting)
        return waiting.done

    assert awaited(interrupted)
    with refused(errno.EINTR):
        waiting.wait()


def test_flush_drops_the_owner_s_locks(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    fs.flush(*opened, BOB)
    with refused(errno.EAGAIN):
        fs.setlk(*opened, BOB, WRITE)
    fs.flush(*opened, ALICE)
    fs.setlk(*opened, BOB, WRITE)


def test_release_drops_the_locks_of_the_last_handle(fs: FuseClient, opened: tuple[int, int]) -> None:
    nodeid, fh = opened
    fs.setlk(nodeid, fh, ALICE, WRITE)
    fs.flush(nodeid, fh, ALICE)
    fs.release(nodeid, fh, lock_owner=ALICE)
    other = fs.open(nodeid, os.O_RDWR).fh
    fs.setlk(nodeid, other, BOB, WRITE)


def test_the_host_gets_its_file_back_when_the_guest_is_gone(
    share: Share, fs: FuseClient, opened: tuple[int, int]
) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    fs.submit(op.setlkw(*opened, BOB, WRITE))
    share.unmount()

    def lockable() -> bool:
        with open(share.path / "a", "r+b") as host:
            try:
                fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    assert awaited(lockable)


def test_nonsense_locks_are_refused(fs: FuseClient, opened: tuple[int, int]) -> None:
    for lock in (FileLock(0, TO_END, 77), FileLock(100, 50, fcntl.F_WRLCK), FileLock(1 << 63, 5, 1)):
        with refused(errno.EINVAL, errno.EOVERFLOW):
            fs.setlk(*opened, ALICE, lock)
    with refused(errno.EBADF):
        fs.setlk(opened[0], 0xFFFF_FFFF_FFFF, ALICE, WRITE)


def test_a_write_lock_on_a_read_only_handle_is_ebadf_or_served(
    fs: FuseClient, opened: tuple[int, int]
) -> None:
    """The guest's kernel checks the mode itself; the server must only not lie about success."""
    fh = fs.open(opened[0], os.O_RDONLY).fh
    try:
        fs.setlk(opened[0], fh, ALICE, WRITE)
    except OSError as error:
        refused_with = error.errno
    else:
        refused_with = None
    if refused_with is None:
        with refused(errno.EAGAIN):
            fs.setlk(*opened, BOB, WRITE)
    else:
        assert refused_with == errno.EBADF


# ---- flock ----


def test_flock_excludes_between_handles(fs: FuseClient, opened: tuple[int, int]) -> None:
    nodeid, fh = opened
    other = fs.open(nodeid, os.O_RDWR).fh
    fs.setlk(nodeid, fh, ALICE, WRITE, flock=True)
    with refused(errno.EAGAIN):
        fs.setlk(nodeid, other, BOB, READ, flock=True)
    fs.setlk(nodeid, fh, ALICE, UNLOCK, flock=True)
    fs.setlk(nodeid, other, BOB, READ, flock=True)


def test_flock_and_the_host_exclude_each_other(share: Share, fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, WRITE, flock=True)
    with open(share.path / "a") as host:
        with pytest.raises(BlockingIOError):
            fcntl.flock(host, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fs.setlk(*opened, ALICE, UNLOCK, flock=True)
        fcntl.flock(host, fcntl.LOCK_EX)
        with refused(errno.EAGAIN):
            fs.setlk(*opened, ALICE, READ, flock=True)


def test_flock_and_record_locks_do_not_meet(fs: FuseClient, opened: tuple[int, int]) -> None:
    fs.setlk(*opened, ALICE, WRITE, flock=True)
    fs.setlk(*opened, BOB, WRITE)


def test_a_waiting_flock_is_granted_and_interruptible(
    share: Share, fs: FuseClient, opened: tuple[int, int]
) -> None:
    nodeid, fh = opened
    other = fs.open(nodeid, os.O_RDWR).fh
    fs.setlk(nodeid, fh, ALICE, WRITE, flock=True)
    waiting = fs.submit(op.setlkw(nodeid, other, BOB, WRITE, flock=True))
    assert stays_pending(waiting)
    fs.interrupt(waiting)
    with refused(errno.EINTR):
        waiting.wait()
    waiting = fs.submit(op.setlkw(nodeid, other, BOB, WRITE, flock=True))
    assert stays_pending(waiting)
    fs.setlk(nodeid, fh, ALICE, UNLOCK, flock=True)
    waiting.wait()


def test_release_with_flock_unlock_frees_it(share: Share, fs: FuseClient, opened: tuple[int, int]) -> None:
    nodeid, fh = opened
    fs.setlk(nodeid, fh, ALICE, WRITE, flock=True)
    fs.release(nodeid, fh, release_flags=abi.RELEASE_FLOCK_UNLOCK, lock_owner=ALICE)
    with open(share.path / "a") as host:
        fcntl.flock(host, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_more_waiters_than_the_server_takes_are_refused_not_hung(
    fs: FuseClient, opened: tuple[int, int]
) -> None:
    fs.setlk(*opened, ALICE, WRITE)
    waiting = [fs.submit(op.setlkw(*opened, 1000 + i, WRITE)) for i in range(100)]
    fs.getattr(opened[0])  # answered while all of them wait
    fs.flush(*opened, ALICE)
    ends: set[int] = set()
    left = dict(enumerate(waiting))
    while left:
        assert awaited(lambda: any(pending.done for pending in left.values())), f"{len(left)} never ended"
        for i in [i for i, pending in left.items() if pending.done]:
            try:
                left.pop(i).wait()
            except OSError as error:
                ends.add(error.errno or 0)
            else:
                fs.flush(*opened, 1000 + i)
    assert ends <= {errno.ENOLCK, errno.EAGAIN}


def test_a_lock_wait_of_the_guest_leaves_a_lock_struct_layout_alone() -> None:
    """The layouts that this file relies on."""
    assert (abi.LK_IN.size, abi.LOCK.size, struct.calcsize("<QQII")) == (48, 24, 24)
