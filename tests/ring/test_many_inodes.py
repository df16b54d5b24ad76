# SPDX-License-Identifier: Apache-2.0
"""More inodes held by the guest than the server may have descriptors.

Must not test single operations. Specification: --inode-file-handles; open_by_handle_at(2).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.ring.conftest import MakeShare
from tests.server import awaited
from vhostfs.frontend import FuseClient

LIMIT = 1024
PER_DIRECTORY = 10_000


def _fill(base: Path, count: int) -> None:
    for number in range(count // PER_DIRECTORY):
        directory = base / f"d{number}"
        directory.mkdir()
        here = os.open(directory, os.O_RDONLY)
        for i in range(PER_DIRECTORY):
            os.mknod(f"f{i}", 0o100644, dir_fd=here)
        os.close(here)


def _hold_all(fs: FuseClient, directories: int) -> dict[str, int]:
    """Looks everything up by readdirplus; nodeid by path."""
    held: dict[str, int] = {}
    for number in range(directories):
        node = fs.lookup(fs.root, f"d{number}").nodeid
        fh = fs.opendir(node).fh
        offset = 0
        while batch := fs.readdirplus(node, fh, offset, 1 << 20):
            for item in batch:
                if item.entry.nodeid:
                    held[f"d{number}/{item.dirent.name.decode()}"] = item.entry.nodeid
            offset = batch[-1].dirent.offset
        fs.releasedir(node, fh)
    return held


@pytest.mark.parametrize(
    ("count", "mode"),
    [(20_000, "prefer"), (20_000, "mandatory"), (200_000, "prefer")],
    ids=["20000-prefer", "20000-mandatory", "200000-prefer"],
)
def test_inodes_beyond_the_descriptor_limit_all_work(
    make_share: MakeShare, count: int, mode: str, ours: None, needs_root: None
) -> None:
    share = make_share(
        f"--inode-file-handles={mode}", "--rlimit-nofile=0", private=True, descriptor_limit=LIMIT
    )
    _fill(share.path, count)
    fs = share.mount()
    held = _hold_all(fs, count // PER_DIRECTORY)
    assert len(held) == len(set(held.values())) == count
    assert share.server.descriptors() <= LIMIT
    rng = random.Random(3)
    for path in rng.sample(sorted(held), 1000):
        attr = fs.getattr(held[path])
        assert attr.ino == (share.path / path).stat().st_ino
        assert fs.walk(path).nodeid == held[path]
    for path in rng.sample(sorted(held), 200):
        nodeid = held[path]
        fh = fs.open(nodeid, os.O_RDWR).fh
        fs.write(nodeid, fh, path.encode())
        fs.release(nodeid, fh)
        assert (share.path / path).read_text() == path
        fs.setattr(nodeid, mode=0o600)
        parent = fs.lookup(fs.root, path.split("/")[0]).nodeid
        fs.rename(parent, path.split("/")[1], fs.root, path.replace("/", "-"))
        assert fs.lookup(fs.root, path.replace("/", "-")).nodeid == nodeid
    nodes = list(held.values())
    for start in range(0, len(nodes), 3000):
        fs.batch_forget([(nodeid, 1 << 20) for nodeid in nodes[start : start + 3000]])
    assert fs.getattr(fs.root).nlink >= 2


def test_held_inodes_do_not_confuse_a_host_that_reuses_numbers(
    make_share: MakeShare, ours: None, needs_root: None
) -> None:
    """An inode held by file handle pins nothing: the host may delete it and give its number to another."""
    share = make_share("--inode-file-handles=mandatory")
    fs = share.mount()
    path = share.path / "a"
    # More than the server keeps descriptors for, so that nothing pins the object when these were looked at.
    others = [f"other {i}" for i in range(100)]
    for other in others:
        (share.path / other).touch()
    reused = False
    for round_ in range(30):
        path.write_text(f"old {round_}")
        old = fs.lookup(fs.root, "a")
        for other in others:
            fs.getattr(fs.lookup(fs.root, other).nodeid)
        path.unlink()
        path.write_text(f"new {round_}")
        new = fs.lookup(fs.root, "a")
        reused |= new.attr.ino == old.attr.ino
        assert (new.nodeid, new.generation) != (old.nodeid, old.generation)
        assert fs.read_file(new.nodeid) == f"new {round_}".encode()
        try:
            attr = fs.getattr(old.nodeid)
        except OSError as error:
            gone = error.errno
            assert gone is not None
        else:
            assert attr.nlink == 0
    if not reused:
        lacking("a file system that reuses inode numbers at once (ext4 does)")


def test_mandatory_handles_keep_no_descriptor_for_an_inode(
    make_share: MakeShare, ours: None, needs_root: None
) -> None:
    share = make_share("--inode-file-handles=mandatory", private=True)
    fs = share.mount()
    before = share.server.descriptors()
    for i in range(500):
        (share.path / str(i)).touch()
        fs.lookup(fs.root, str(i))
    assert share.server.descriptors() <= before + 50


def test_the_server_says_at_start_how_inodes_are_kept(make_share: MakeShare, ours: None) -> None:
    share = make_share("--inode-file-handles=prefer", private=True)
    assert awaited(lambda: "handle" in share.server.log())


def test_without_handles_the_limit_is_an_error_not_a_crash(
    make_share: MakeShare, ours: None, needs_root: None
) -> None:
    share = make_share(
        "--inode-file-handles=never", "--rlimit-nofile=0", private=True, descriptor_limit=LIMIT
    )
    fs = share.mount()
    nodes = []
    failure = None
    for i in range(2 * LIMIT):
        (share.path / str(i)).touch()
        try:
            nodes.append(fs.lookup(fs.root, str(i)).nodeid)
        except OSError as error:
            failure = error.errno
            break
    assert failure in (23, 24), "ENFILE or EMFILE"
    fs.batch_forget([(nodeid, 1) for nodeid in nodes])
    assert fs.lookup(fs.root, "0").attr.nlink == 1


def test_the_machine_has_file_handles(tmp_path: Path) -> None:
    """What the tests above rely on; without it they would show nothing."""
    if os.statvfs(tmp_path).f_namemax < 255:
        lacking("a file system with long names")
