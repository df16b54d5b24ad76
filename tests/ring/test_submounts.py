# SPDX-License-Identifier: Apache-2.0
"""Mounts of the host inside the share: told to the guest, crossed, and never mixed up.

Must not test anything else. Specification: FUSE_SUBMOUNTS and FUSE_ATTR_SUBMOUNT in fuse.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import InitFlag
from vhostfs.frontend import fuse_abi as abi

pytestmark = pytest.mark.usefixtures("needs_root")
MNT_DETACH = 2
LIBC = ctypes.CDLL(None, use_errno=True)


def mount_tmpfs(at: Path) -> None:
    if LIBC.mount(b"tmpfs", os.fsencode(at), b"tmpfs", 0, b"size=1m"):
        lacking(f"the right to mount a tmpfs: {os.strerror(ctypes.get_errno())}")


def mount_bind(source: Path, at: Path) -> None:
    if LIBC.mount(os.fsencode(source), os.fsencode(at), None, 4096, None):
        lacking(f"the right to make a bind mount: {os.strerror(ctypes.get_errno())}")


def unmount(at: Path) -> None:
    LIBC.umount2(os.fsencode(at), MNT_DETACH)


@pytest.fixture
def share(make_share: MakeShare) -> Iterator[Share]:
    share = make_share("--announce-submounts")
    inner = share.path / "inner"
    inner.mkdir()
    (share.path / "plain").mkdir()
    mount_tmpfs(inner)
    (inner / "file").write_text("inside")
    yield share
    share.unmount()
    unmount(inner)


def test_the_root_of_a_mount_is_marked(share: Share) -> None:
    fs = share.mount()
    assert fs.session.flags & InitFlag.SUBMOUNTS
    assert fs.lookup(fs.root, "inner").attr.flags & abi.ATTR_SUBMOUNT
    assert not fs.lookup(fs.root, "plain").attr.flags & abi.ATTR_SUBMOUNT
    assert not fs.walk("inner/file").attr.flags & abi.ATTR_SUBMOUNT


def test_files_of_a_mount_work(share: Share) -> None:
    fs = share.mount()
    inner = fs.lookup(fs.root, "inner").nodeid
    assert fs.read_file(fs.lookup(inner, "file").nodeid) == b"inside"
    fs.write_file(inner, "new", b"guest")
    assert (share.path / "inner" / "new").read_bytes() == b"guest"
    assert set(fs.list(inner)) == {b"file", b"new"}


def test_equal_inode_numbers_on_two_file_systems_are_two_inodes(make_share: MakeShare) -> None:
    share = make_share("--announce-submounts")
    nodes = set()
    mounts = [share.path / "one", share.path / "two"]
    try:
        for at in mounts:
            at.mkdir()
            mount_tmpfs(at)
            (at / "file").write_text(at.name)
        fs = share.mount()
        numbers = set()
        for at in mounts:
            entry = fs.walk(f"{at.name}/file")
            numbers.add(entry.attr.ino)
            nodes.add(entry.nodeid)
            assert fs.read_file(entry.nodeid) == at.name.encode()
        assert len(numbers) == 1, "this test needs equal inode numbers to say anything"
        assert len(nodes) == 2
    finally:
        share.unmount()
        for at in mounts:
            unmount(at)


def test_a_bind_mount_is_another_inode_than_its_source(make_share: MakeShare, ours: None) -> None:
    """One device and inode number, two mounts: each keeps its own way back and forth."""
    share = make_share("--announce-submounts")
    source, at = share.path / "source", share.path / "bound"
    source.mkdir()
    at.mkdir()
    (source / "file").write_text("x")
    mount_bind(source, at)
    try:
        fs = share.mount()
        assert fs.read_file(fs.walk("bound/file").nodeid) == b"x"
        assert fs.read_file(fs.walk("source/file").nodeid) == b"x"
        assert fs.lookup(fs.root, "bound").attr.flags & abi.ATTR_SUBMOUNT
        assert not fs.lookup(fs.root, "source").attr.flags & abi.ATTR_SUBMOUNT
    finally:
        share.unmount()
        unmount(at)


def test_links_and_renames_across_mounts_are_exdev(share: Share) -> None:
    fs = share.mount()
    entry = fs.write_file(fs.root, "a", b"")
    inner = fs.lookup(fs.root, "inner").nodeid
    with refused(errno.EXDEV):
        fs.link(entry.nodeid, inner, "a")
    with refused(errno.EXDEV):
        fs.rename(fs.root, "a", inner, "a")


def test_without_announcing_no_mark_is_sent(make_share: MakeShare) -> None:
    share = make_share("--no-announce-submounts")
    inner = share.path / "inner"
    inner.mkdir()
    mount_tmpfs(inner)
    try:
        fs = share.mount()
        assert not fs.session.flags & InitFlag.SUBMOUNTS
        entry = fs.lookup(fs.root, "inner")
        assert not entry.attr.flags & abi.ATTR_SUBMOUNT
        assert stat_is_own(entry.attr.ino, inner)
    finally:
        share.unmount()
        unmount(inner)


def stat_is_own(ino: int, path: Path) -> bool:
    return ino == path.stat().st_ino


def test_syncfs_and_statfs_reach_the_inner_file_system(share: Share) -> None:
    fs = share.mount()
    inner = fs.lookup(fs.root, "inner").nodeid
    assert fs.statfs(inner).blocks == os.statvfs(share.path / "inner").f_blocks
    assert fs.statfs(inner).blocks != fs.statfs(fs.root).blocks
    fs.syncfs(inner)
