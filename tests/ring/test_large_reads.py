# SPDX-License-Identifier: Apache-2.0
"""READs of much data, several in flight or one alone, which several threads may copy at once.

Must not test what READ does with less. Specification: fuse.h (READ: a short answer is the file's end).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence

import pytest

from tests.conftest import lacking
from tests.limits import HANG_S
from tests.ring.conftest import MakeShare
from tests.ring.share import Share
from vhostfs.frontend import FuseClient, Pending
from vhostfs.frontend import operations as op
from vhostfs.frontend.session import Framing

MIB = 1 << 20
KIB = 1 << 10
PAGE = 4096
# Not the end of a page, nor of a READ of any size that is used here.
FILE_BYTES = 12 * MIB + 7 * PAGE + 777
SCATTERED = Framing(data_bytes=PAGE)


@pytest.fixture(params=["threads", "no threads"])
def share(request: pytest.FixtureRequest, make_share: MakeShare) -> Share:
    return make_share(f"--thread-pool-size={4 if request.param == 'threads' else 0}")


class LargeFile:
    """A file of random bytes, open in the guest."""

    def __init__(self, share: Share, fs: FuseClient) -> None:
        self.content = random.Random(1).randbytes(FILE_BYTES)
        self.fs = fs
        self.fs.session.use(SCATTERED)
        (share.path / "large").write_bytes(self.content)
        self.nodeid = fs.lookup(fs.root, "large").nodeid
        self.fh = fs.session.call(op.open_(self.nodeid)).fh

    def read(self, offset: int, size: int) -> bytes:
        return self.fs.session.call(op.read(self.nodeid, self.fh, size, offset))

    def submit(self, ranges: Sequence[tuple[int, int]]) -> list[Pending[bytes]]:
        """Makes READs of all (offset, size) available to the device at once."""
        session = self.fs.session
        pending = [
            session.submit(op.read(self.nodeid, self.fh, size, offset), publish=False)
            for offset, size in ranges
        ]
        pending[0].queue.publish(*[each.head for each in pending])
        return pending

    def assert_right(self, ranges: Sequence[tuple[int, int]]) -> None:
        for (offset, size), pending in zip(ranges, self.submit(ranges), strict=True):
            assert pending.wait(HANG_S) == self.content[offset : offset + size], (offset, size)


@pytest.fixture
def file(share: Share) -> LargeFile:
    return LargeFile(share, share.mount())


def test_all_of_many_in_flight_are_right(file: LargeFile) -> None:
    chosen = random.Random(2)
    for size in (64 * KIB, 128 * KIB, 500_000, MIB):
        for _ in range(10):
            file.assert_right([(chosen.randrange(FILE_BYTES), size) for _ in range(12)])
    for _ in range(20):
        file.assert_right([(chosen.randrange(FILE_BYTES), chosen.randrange(1, MIB)) for _ in range(16)])


@pytest.mark.parametrize("size", [512 * KIB, 700_001, MIB])
def test_one_alone_is_right_wherever_the_file_ends(file: LargeFile, size: int) -> None:
    # The end before, in, and behind each eighth of what is asked for, at a page's end or not.
    for before_end in [*range(0, size + 1, size // 8), PAGE, PAGE - 1, 1, size - 1, size + 1]:
        for shift in (0, 1, FILE_BYTES % PAGE):
            offset = FILE_BYTES - before_end + shift
            assert file.read(offset, size) == file.content[offset : offset + size], (offset, size)


def test_what_ends_at_a_page_and_holes_are_right(share: Share, file: LargeFile) -> None:
    whole = (FILE_BYTES // PAGE - 3) * PAGE
    with (share.path / "large").open("r+b") as opened:
        opened.truncate(whole)
        opened.truncate(whole + MIB)
    for offset in (whole - MIB, whole - MIB // 2, whole - PAGE, whole, whole + MIB // 2, whole + MIB):
        expected = (file.content[:whole] + bytes(MIB))[offset : offset + MIB]
        assert file.read(offset, MIB) == expected, offset


def test_other_requests_between_them_are_answered(file: LargeFile) -> None:
    session = file.fs.session
    for _ in range(20):
        reads = [
            session.submit(op.read(file.nodeid, file.fh, MIB, at * MIB), publish=False) for at in range(6)
        ]
        other = [session.submit(op.getattr_(file.nodeid), publish=False) for _ in range(6)]
        heads = [each.head for pair in zip(reads, other, strict=True) for each in pair]
        reads[0].queue.publish(*heads)
        for at, read in enumerate(reads):
            assert read.wait(HANG_S) == file.content[at * MIB : (at + 1) * MIB]
        assert all(each.wait(HANG_S).attr.size == FILE_BYTES for each in other)


def test_a_guest_that_goes_away_amid_them_leaves_nothing(share: Share, file: LargeFile) -> None:
    for round_ in range(20):
        file.submit([(at * MIB // 2, MIB) for at in range(16)])
        time.sleep(round_ * 0.0001)
        share.unmount()
        file = LargeFile(share, share.mount())
    assert share.serves()


def bytes_read(share: Share, thread: str) -> int:
    """What the server's threads of that name have read, from /proc/PID/task/TID/io."""
    tasks = share.server.tasks(f"{thread}\n")
    return sum(int((task / "io").read_text().split()[1]) for task in tasks)


@pytest.fixture
def watched(make_share: MakeShare) -> Share:
    """A share of which it can be seen which thread reads, and where a second one has something to gain."""
    if len(os.sched_getaffinity(0)) < 2:
        lacking("a second processor: with one nothing is gained by a second thread")
    share = make_share("--thread-pool-size=4", private=True)
    file = LargeFile(share, share.mount())
    for _ in range(10):
        file.read(0, 4 * PAGE)
    if bytes_read(share, "vhostfs-pool") > PAGE:
        lacking("RWF_NOWAIT where temporary files are: without it all READs go to the pool")
    share.unmount()
    return share


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize(
    ("depth", "size", "least"),
    # Of one alone a part; of several more than the part of the one that is the last.
    [(1, MIB, MIB // 8), (8, 128 * KIB, 256 * KIB), (8, MIB, 2 * MIB)],
    ids=["one", "many", "many large"],
)
def test_threads_of_the_pool_copy_too(watched: Share, depth: int, size: int, least: int) -> None:
    file = LargeFile(watched, watched.mount())
    ends, in_pool = time.monotonic() + HANG_S, 0
    # Beside other work that may be seldom.
    while in_pool < least:
        assert time.monotonic() < ends, f"of {depth * size} bytes the pool's threads read {in_pool}"
        before = bytes_read(watched, "vhostfs-pool"), bytes_read(watched, "vhostfs-vq1")
        file.assert_right([(at * size, size) for at in range(depth)])
        in_pool = bytes_read(watched, "vhostfs-pool") - before[0]
        in_queue = bytes_read(watched, "vhostfs-vq1") - before[1]
        # More where the page cache had to be filled first, and a part was read twice.
        assert in_pool + in_queue >= depth * size
        assert in_queue
