# SPDX-License-Identifier: Apache-2.0
"""--readonly: every change is refused with EROFS, everything else works.

Must not test what the operations do on a writable share. Specification: the option's help.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import FuseClient
from vhostfs.frontend import operations as op


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    share = make_share("--readonly", "--xattr")
    (share.path / "file").write_text("content")
    (share.path / "dir").mkdir()
    (share.path / "link").symlink_to("file")
    return share


CHANGES: dict[str, Callable[[FuseClient, int, int], object]] = {
    "create": lambda fs, file, fh: fs.create(fs.root, "new"),
    "create over": lambda fs, file, fh: fs.create(fs.root, "file", os.O_RDWR | os.O_TRUNC),
    "mkdir": lambda fs, file, fh: fs.mkdir(fs.root, "new"),
    "mknod": lambda fs, file, fh: fs.mknod(fs.root, "new", stat.S_IFREG | 0o600),
    "symlink": lambda fs, file, fh: fs.symlink(fs.root, "new", "x"),
    "link": lambda fs, file, fh: fs.link(file, fs.root, "new"),
    "unlink": lambda fs, file, fh: fs.unlink(fs.root, "file"),
    "rmdir": lambda fs, file, fh: fs.rmdir(fs.root, "dir"),
    "rename": lambda fs, file, fh: fs.rename(fs.root, "file", fs.root, "new"),
    "rename2": lambda fs, file, fh: fs.rename2(fs.root, "file", fs.root, "new", 1),
    "chmod": lambda fs, file, fh: fs.setattr(file, mode=0o600),
    "chown": lambda fs, file, fh: fs.setattr(file, uid=5),
    "truncate": lambda fs, file, fh: fs.setattr(file, size=0),
    "truncate by handle": lambda fs, file, fh: fs.setattr(file, fh=fh, size=0),
    "times": lambda fs, file, fh: fs.setattr(file, mtime_ns=0),
    "open to write": lambda fs, file, fh: fs.open(file, os.O_WRONLY),
    "open to read and write": lambda fs, file, fh: fs.open(file, os.O_RDWR),
    "open and truncate": lambda fs, file, fh: fs.open(file, os.O_RDONLY | os.O_TRUNC),
    "write": lambda fs, file, fh: fs.write(file, fh, b"x"),
    "fallocate": lambda fs, file, fh: fs.fallocate(file, fh, 0, 0, 100),
    "setxattr": lambda fs, file, fh: fs.setxattr(file, "user.x", b"1"),
    "removexattr": lambda fs, file, fh: fs.removexattr(file, "user.x"),
    "copy": lambda fs, file, fh: fs.copy_file_range(file, fh, 0, (file, fh), 10, 5),
    "tmpfile": lambda fs, file, fh: fs.tmpfile(fs.root),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_every_change_is_erofs(
    share: Share, fs: FuseClient, change: Callable[[FuseClient, int, int], object], ours: None
) -> None:
    before = {path.name: path.lstat() for path in share.path.iterdir()}
    entry = fs.lookup(fs.root, "file")
    fh = fs.open(entry.nodeid).fh
    with refused(errno.EROFS):
        change(fs, entry.nodeid, fh)
    after = {path.name: path.lstat() for path in share.path.iterdir()}
    # Reading may move the access time, nothing else.
    assert {n: (s.st_mode, s.st_size, s.st_mtime_ns, s.st_uid, s.st_nlink) for n, s in before.items()} == {
        n: (s.st_mode, s.st_size, s.st_mtime_ns, s.st_uid, s.st_nlink) for n, s in after.items()
    }


def test_reading_works(share: Share, fs: FuseClient) -> None:
    entry = fs.lookup(fs.root, "file")
    assert fs.read_file(entry.nodeid) == b"content"
    assert set(fs.list(fs.root)) == {b"file", b"dir", b"link"}
    assert fs.readlink(fs.lookup(fs.root, "link").nodeid) == b"file"
    assert fs.listxattr(entry.nodeid) == b""
    assert fs.getattr(entry.nodeid).size == 7
    assert fs.statfs(fs.root).namelen == 255
    fs.access(entry.nodeid, os.R_OK)


def test_access_to_write_is_erofs(fs: FuseClient, ours: None) -> None:
    with refused(errno.EROFS):
        fs.access(fs.lookup(fs.root, "file").nodeid, os.W_OK)


def test_flush_release_and_sync_are_no_changes(fs: FuseClient) -> None:
    entry = fs.lookup(fs.root, "file")
    fh = fs.open(entry.nodeid).fh
    fs.flush(entry.nodeid, fh)
    fs.fsync(entry.nodeid, fh)
    fs.release(entry.nodeid, fh)
    fs.call(op.getattr_(entry.nodeid))
