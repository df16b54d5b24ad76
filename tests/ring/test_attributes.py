# SPDX-License-Identifier: Apache-2.0
"""Attributes: getattr, statx, setattr by node and by handle, access, and what clears set-id bits.

Must not test names or content. Specification: fuse.h; fs/fuse/dir.c of Linux for which bits come together.
"""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import Caller, FuseClient, InitFlag, SetattrValid
from vhostfs.frontend import fuse_abi as abi


def test_getattr_tells_the_host_s_state_each_time(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    assert fs.getattr(entry.nodeid).size == 5
    with open(share.path / "a", "ab") as host:
        host.write(b"678")
    assert fs.getattr(entry.nodeid).size == 8


def test_getattr_by_handle_works_on_a_deleted_file(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b"123")
    fs.unlink(fs.root, "a")
    attr = fs.getattr(entry.nodeid, opened.fh)
    assert (attr.size, attr.nlink) == (3, 0)
    assert fs.getattr(entry.nodeid).nlink == 0


def test_getattr_of_a_symlink_is_about_the_symlink(fs: FuseClient) -> None:
    entry = fs.symlink(fs.root, "a", "somewhere")
    attr = fs.getattr(entry.nodeid)
    assert stat.S_ISLNK(attr.mode)
    assert attr.size == 9


def test_getattr_of_an_unknown_node_is_estale(fs: FuseClient, ours: None) -> None:
    for nodeid in (0, 2, 0xFFFFFFFF, 1 << 32 | 1, (1 << 64) - 1):
        with refused(errno.ESTALE):
            fs.getattr(nodeid)


def test_statx_has_what_getattr_has_and_the_birth_time(share: Share, fs: FuseClient, ours: None) -> None:
    before_ns = time.time_ns() - 10**9
    entry = fs.write_file(fs.root, "a", b"12345")
    found = fs.statx(entry.nodeid)
    host = (share.path / "a").stat()
    assert (found.ino, found.size, found.mode, found.nlink) == (host.st_ino, 5, host.st_mode, 1)
    assert found.mtime_ns == host.st_mtime_ns
    assert found.mask & 0x7FF == 0x7FF
    if found.mask & 0x800:
        assert before_ns <= found.btime_ns <= time.time_ns()


def test_statx_by_handle_works_on_a_deleted_file(fs: FuseClient, ours: None) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.unlink(fs.root, "a")
    assert fs.statx(entry.nodeid, fh=opened.fh).nlink == 0


def test_chmod_sets_the_mode(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    attr = fs.setattr(entry.nodeid, mode=0o4751)
    assert stat.S_IMODE(attr.mode) == 0o4751
    assert stat.S_IMODE((share.path / "a").stat().st_mode) == 0o4751


def test_chmod_works_on_directories_fifos_and_devices(share: Share, fs: FuseClient, needs_root: None) -> None:
    nodes = [
        fs.mkdir(fs.root, "dir"),
        fs.mknod(fs.root, "fifo", stat.S_IFIFO | 0o600),
        fs.mknod(fs.root, "device", stat.S_IFCHR | 0o600, 1 << 8 | 3),
    ]
    for node in nodes:
        assert stat.S_IMODE(fs.setattr(node.nodeid, mode=0o711).mode) == 0o711
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o711 for path in share.path.iterdir())


def test_chmod_by_handle(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.setattr(entry.nodeid, fh=opened.fh, mode=0o600)
    assert stat.S_IMODE((share.path / "a").stat().st_mode) == 0o600


def test_chown_sets_one_or_both_ids(share: Share, fs: FuseClient, needs_root: None) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, uid=1234)
    fs.setattr(entry.nodeid, gid=4321)
    host = (share.path / "a").stat()
    assert (host.st_uid, host.st_gid) == (1234, 4321)
    attr = fs.setattr(entry.nodeid, uid=1, gid=2)
    assert (attr.uid, attr.gid) == (1, 2)


def test_chown_of_a_symlink_leaves_its_target_alone(share: Share, fs: FuseClient, needs_root: None) -> None:
    (share.path / "target").touch()
    entry = fs.symlink(fs.root, "link", "target")
    fs.setattr(entry.nodeid, uid=77)
    assert (share.path / "link").lstat().st_uid == 77
    assert (share.path / "target").stat().st_uid == 0


def test_truncate_by_node_and_by_handle(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"0123456789")
    assert fs.setattr(entry.nodeid, size=4).size == 4
    assert (share.path / "a").read_bytes() == b"0123"
    fh = fs.open(entry.nodeid, os.O_RDWR).fh
    fs.setattr(entry.nodeid, fh=fh, size=6)
    assert (share.path / "a").read_bytes() == b"0123\0\0"
    fs.unlink(fs.root, "a")
    assert fs.setattr(entry.nodeid, fh=fh, size=2).size == 2


def test_truncate_of_a_directory_fails(fs: FuseClient) -> None:
    with refused(errno.EISDIR, errno.EINVAL):
        fs.setattr(fs.mkdir(fs.root, "dir").nodeid, size=0)


def test_truncate_of_a_fifo_neither_blocks_nor_works(fs: FuseClient) -> None:
    with refused(errno.EINVAL, errno.ENXIO):
        fs.setattr(fs.mknod(fs.root, "fifo", stat.S_IFIFO | 0o600).nodeid, size=0)


def test_truncate_beyond_what_a_file_may_be_fails(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    with refused(errno.EFBIG, errno.EINVAL):
        fs.setattr(entry.nodeid, size=(1 << 63) - 1)
    with refused(errno.EFBIG, errno.EINVAL):
        fs.setattr(entry.nodeid, size=1 << 63)


def test_times_are_set_to_the_nanosecond_each_by_itself(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, mtime_ns=1_234_567_890_123_456_789)
    fs.setattr(entry.nodeid, atime_ns=987_654_321_000_000_001)
    host = (share.path / "a").stat()
    assert (host.st_mtime_ns, host.st_atime_ns) == (1_234_567_890_123_456_789, 987_654_321_000_000_001)


def test_times_before_1970_are_kept(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, mtime_ns=-86_400 * 10**9)
    assert (share.path / "a").stat().st_mtime == -86_400


def test_time_now_is_the_host_s_clock(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, atime_ns=0, mtime_ns=0)
    now = SetattrValid.MTIME | SetattrValid.MTIME_NOW | SetattrValid.ATIME | SetattrValid.ATIME_NOW
    before = time.time()
    fs.setattr(entry.nodeid, mtime_ns=0, valid=now)
    host = (share.path / "a").stat()
    assert abs(host.st_mtime - before) < 5
    assert abs(host.st_atime - before) < 5


def test_times_of_a_symlink_leave_its_target_alone(share: Share, fs: FuseClient) -> None:
    (share.path / "target").touch()
    target_ns = (share.path / "target").stat().st_mtime_ns
    entry = fs.symlink(fs.root, "link", "target")
    fs.setattr(entry.nodeid, mtime_ns=10**18)
    assert (share.path / "link").lstat().st_mtime_ns == 10**18
    assert (share.path / "target").stat().st_mtime_ns == target_ns


def test_several_attributes_are_set_at_once(share: Share, fs: FuseClient, needs_root: None) -> None:
    entry = fs.write_file(fs.root, "a", b"123456")
    attr = fs.setattr(entry.nodeid, mode=0o604, uid=5, gid=6, size=3, mtime_ns=10**18)
    assert (stat.S_IMODE(attr.mode), attr.uid, attr.gid) == (0o604, 5, 6)
    assert (attr.size, attr.mtime_ns) == (3, 10**18)


def test_setattr_with_nothing_to_set_answers_the_attributes(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"123")
    assert fs.setattr(entry.nodeid).size == 3


def test_setattr_with_the_handle_of_another_file_is_refused(fs: FuseClient, ours: None) -> None:
    fs.write_file(fs.root, "a", b"123")
    a = fs.lookup(fs.root, "a")
    b, opened = fs.create(fs.root, "b")
    with refused(errno.EBADF):
        fs.setattr(a.nodeid, fh=opened.fh, size=0)
    assert fs.getattr(a.nodeid).size == 3
    fs.release(b.nodeid, opened.fh)


def test_access_follows_the_caller(share: Share, fs: FuseClient, needs_root: None) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, mode=0o640, uid=1000, gid=2000)
    owner, group, other = (
        fs.by(Caller(uid=1000, gid=9)),
        fs.by(Caller(uid=9, gid=2000)),
        fs.by(Caller(9, 9)),
    )
    owner.access(entry.nodeid, os.R_OK | os.W_OK)
    group.access(entry.nodeid, os.R_OK)
    other.access(entry.nodeid, os.F_OK)
    for client, mask in ((owner, os.X_OK), (group, os.W_OK), (other, os.R_OK)):
        with refused(errno.EACCES):
            client.access(entry.nodeid, mask)
    fs.access(entry.nodeid, os.R_OK | os.W_OK)
    with refused(errno.EACCES):
        fs.access(entry.nodeid, os.X_OK)


# ---- set-id bits ----


@pytest.fixture
def killpriv(make_share: MakeShare, needs_root: None) -> FuseClient:
    fs = make_share("--killpriv-v2").mount()
    assert fs.session.flags & InitFlag.HANDLE_KILLPRIV_V2
    return fs


def _with_setid(fs: FuseClient) -> tuple[int, int]:
    entry, opened = fs.create(fs.root, "a")
    fs.setattr(entry.nodeid, mode=0o6777)
    return entry.nodeid, opened.fh


def _mode(fs: FuseClient, nodeid: int) -> int:
    return stat.S_IMODE(fs.getattr(nodeid).mode)


def test_a_write_marked_so_clears_set_id_bits(killpriv: FuseClient) -> None:
    nodeid, fh = _with_setid(killpriv)
    killpriv.write(nodeid, fh, b"x")
    assert _mode(killpriv, nodeid) == 0o6777
    killpriv.write(nodeid, fh, b"x", write_flags=abi.WRITE_KILL_SUIDGID)
    assert _mode(killpriv, nodeid) == 0o777


def test_a_truncation_marked_so_clears_set_id_bits(killpriv: FuseClient) -> None:
    nodeid, fh = _with_setid(killpriv)
    killpriv.setattr(nodeid, fh=fh, size=100)
    assert _mode(killpriv, nodeid) == 0o6777
    killpriv.setattr(nodeid, size=50, valid=SetattrValid.KILL_SUIDGID)
    assert _mode(killpriv, nodeid) == 0o777


def test_an_open_with_truncation_marked_so_clears_set_id_bits(killpriv: FuseClient) -> None:
    nodeid, _ = _with_setid(killpriv)
    killpriv.open(nodeid, os.O_WRONLY | os.O_TRUNC, abi.OPEN_KILL_SUIDGID)
    assert _mode(killpriv, nodeid) == 0o777


def test_a_change_of_owner_clears_set_id_bits(killpriv: FuseClient) -> None:
    nodeid, _ = _with_setid(killpriv)
    killpriv.setattr(nodeid, uid=5, valid=SetattrValid.KILL_SUIDGID)
    assert _mode(killpriv, nodeid) == 0o777


def test_writes_after_a_marked_one_keep_the_bits_again(killpriv: FuseClient) -> None:
    """Dropping CAP_FSETID for one request must not last."""
    nodeid, fh = _with_setid(killpriv)
    killpriv.write(nodeid, fh, b"x", write_flags=abi.WRITE_KILL_SUIDGID)
    killpriv.setattr(nodeid, mode=0o6777)
    killpriv.write(nodeid, fh, b"x")
    assert _mode(killpriv, nodeid) == 0o6777
