# SPDX-License-Identifier: Apache-2.0
"""FORGET of files that have no name any more: who closes a large one is busy for long, so the pool does it.

Must not test lookup counts (test_names.py). Specification: fuse.h (FORGET, BATCH_FORGET); unlink(2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import FuseClient
from vhostfs.frontend import operations as op

pytestmark = pytest.mark.usefixtures("ours")
LARGE = 1 << 20
# With room for what describes where its blocks are.
SMALL = LARGE - 65536


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return make_share("--thread-pool-size=4", private=True)


def turns(share: Share) -> int:
    """How often threads of the pool were given a processor, now that all sleep: /proc/PID/task/TID."""
    tasks = share.server.tasks("vhostfs-pool\n")

    def asleep() -> bool:
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in tasks)

    assert awaited(asleep)
    return sum(int((task / "schedstat").read_text().split()[2]) for task in tasks)


@dataclass
class File:
    """An empty file that the guest has made and has open."""

    fs: FuseClient
    name: str
    nodeid: int
    fh: int

    @classmethod
    def make(cls, fs: FuseClient, name: str = "file") -> File:
        entry, opened = fs.session.call(op.create(fs.root, name))
        return cls(fs, name, entry.nodeid, opened.fh)

    def close(self) -> None:
        self.fs.session.call(op.release(self.nodeid, self.fh))

    def remove(self) -> None:
        self.fs.session.call(op.unlink(self.fs.root, self.name))


def write(share: Share, file: File, size: int) -> None:
    for offset in range(0, size, SMALL // 15):
        data = b"x" * min(SMALL // 15, size - offset)
        file.fs.session.call(op.write(file.nodeid, file.fh, data, offset))


def allocate(share: Share, file: File, size: int) -> None:
    file.fs.session.call(op.fallocate(file.nodeid, file.fh, 0, 0, size))


def copy(share: Share, file: File, size: int) -> None:
    (share.path / "from").write_bytes(b"x" * size)
    node = file.fs.lookup(file.fs.root, "from").nodeid
    fh = file.fs.session.call(op.open_(node)).fh
    copied = file.fs.session.call(op.copy_file_range(node, fh, 0, (file.nodeid, file.fh), 0, size))
    assert copied == size
    file.fs.session.call(op.release(node, fh))


def grow_on_the_host_before_lookup(share: Share, file: File, size: int) -> None:
    (share.path / file.name).write_bytes(b"x" * size)
    assert file.fs.lookup(file.fs.root, file.name).nodeid == file.nodeid
    file.fs.session.submit(op.forget(file.nodeid, 1)).wait()


def grow_on_the_host_before_getattr(share: Share, file: File, size: int) -> None:
    (share.path / file.name).write_bytes(b"x" * size)
    assert file.fs.getattr(file.nodeid).size == size


Grow = Callable[[Share, File, int], None]
WAYS: list[Grow] = [write, allocate, copy, grow_on_the_host_before_lookup, grow_on_the_host_before_getattr]


def removed(share: Share, grow: Grow, size: int) -> File:
    """A file of that size without a name, which the guest still holds."""
    file = File.make(share.mount())
    grow(share, file, size)
    file.close()
    file.remove()
    return file


def closed_by_the_pool(share: Share, *files: File) -> bool:
    """Forgets them."""
    before = share.server.descriptors(), turns(share)
    session = files[0].fs.session
    if len(files) == 1:
        session.submit(op.forget(files[0].nodeid, 1)).wait()
    else:
        session.submit(op.batch_forget([(file.nodeid, 1) for file in files])).wait()
    for file in files:
        with pytest.raises(OSError, match="Stale"):
            file.fs.getattr(file.nodeid)
    assert awaited(lambda: share.server.descriptors() == before[0] - len(files))
    return turns(share) > before[1]


@pytest.mark.parametrize("grow", WAYS)
def test_a_large_file_without_a_name_is_closed_by_the_pool(share: Share, grow: Grow) -> None:
    assert closed_by_the_pool(share, removed(share, grow, LARGE))


@pytest.mark.parametrize("grow", WAYS)
def test_a_small_one_is_not(share: Share, grow: Grow) -> None:
    assert not closed_by_the_pool(share, removed(share, grow, SMALL))


def test_nor_a_large_one_that_still_has_a_name(share: Share) -> None:
    file = File.make(share.mount())
    write(share, file, LARGE)
    file.close()
    assert not closed_by_the_pool(share, file)


def test_more_than_are_kept_open_for_it(share: Share) -> None:
    fs = share.mount()
    files = [File.make(fs, f"file{i}") for i in range(100)]
    for file in files:
        allocate(share, file, LARGE)
        file.close()
        file.remove()
    assert closed_by_the_pool(share, *files)


def test_where_there_is_no_pool(make_share: MakeShare) -> None:
    share = make_share("--thread-pool-size=0", private=True)
    file = removed(share, write, LARGE)
    before = share.server.descriptors()
    file.fs.session.submit(op.forget(file.nodeid, 1)).wait()
    assert share.server.descriptors() == before - 1
