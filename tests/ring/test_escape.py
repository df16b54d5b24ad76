# SPDX-License-Identifier: Apache-2.0
"""Nothing outside the share can be reached: bad names, links, races of renames and symlinks.

Must not test ordinary use. Specification: issue of CVE-2018-15869's kind; path_resolution(7).
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import ROOT, FuseClient
from vhostfs.frontend import operations as op

BAD_NAMES = [b"..", b".", b"", b"a/b", b"/", b"/etc/passwd", b"../secret", b"dir/../../secret", b"dir/"]

WITH_A_NAME: dict[str, Callable[[FuseClient, int, bytes], object]] = {
    "create": lambda fs, parent, name: fs.create(parent, name),
    "mkdir": lambda fs, parent, name: fs.mkdir(parent, name),
    "mknod": lambda fs, parent, name: fs.mknod(parent, name, stat.S_IFREG | 0o600),
    "symlink": lambda fs, parent, name: fs.symlink(parent, name, "x"),
    "link": lambda fs, parent, name: fs.link(fs.lookup(fs.root, "file").nodeid, parent, name),
    "unlink": lambda fs, parent, name: fs.unlink(parent, name),
    "rmdir": lambda fs, parent, name: fs.rmdir(parent, name),
    "rename from": lambda fs, parent, name: fs.rename(parent, name, fs.root, "new"),
    "rename to": lambda fs, parent, name: fs.rename(fs.root, "file", parent, name),
    "rename2 to": lambda fs, parent, name: fs.rename2(fs.root, "file", parent, name, 1),
    "exchange": lambda fs, parent, name: fs.rename2(fs.root, "file", parent, name, 2),
}


@pytest.fixture
def walled(make_share: MakeShare, tmp_path: Path) -> Share:
    """A share beside a secret."""
    (tmp_path / "export").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "inner").write_text("secret")
    share = make_share(directory=tmp_path / "export")
    (share.path / "dir").mkdir()
    (share.path / "file").write_text("public")
    return share


def _tree(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


@pytest.mark.parametrize("operation", list(WITH_A_NAME.values()), ids=list(WITH_A_NAME))
def test_a_name_that_is_no_name_is_refused(
    walled: Share, operation: Callable[[FuseClient, int, bytes], object]
) -> None:
    before = _tree(walled.path.parent)
    fs = walled.mount()
    directory = fs.lookup(ROOT, "dir").nodeid
    for parent in (ROOT, directory):
        for name in BAD_NAMES:
            with refused(
                errno.EINVAL,
                errno.EEXIST,
                errno.ENOENT,
                errno.EPERM,
                errno.EBUSY,
                errno.ENOTEMPTY,
                errno.EISDIR,
                errno.ENOTDIR,
                errno.EACCES,
            ):
                operation(fs, parent, name)
    assert _tree(walled.path.parent) == before
    assert (walled.path / "file").read_text() == "public"


def test_lookup_never_leaves_by_dots_or_slashes(walled: Share, ours: None) -> None:
    fs = walled.mount()
    for name in BAD_NAMES:
        try:
            entry = fs.lookup(ROOT, name)
        except OSError as error:
            number = error.errno
        else:
            number = 0
            # "." and ".." of the root are the root, as an exported file system may say.
            assert name in (b".", b"..")
            assert entry.nodeid == ROOT
        assert number in (0, errno.EINVAL, errno.ENOENT, errno.EPERM)


def test_a_name_with_a_nul_inside_is_cut_or_refused(walled: Share) -> None:
    fs = walled.mount()
    try:
        entry = fs.lookup(ROOT, b"file\0/../../secret")
    except OSError as error:
        number = error.errno
        assert number == errno.EINVAL
    else:
        assert entry.attr.size == len("public")


def test_dot_dot_in_a_listing_of_the_root_has_no_node(walled: Share) -> None:
    fs = walled.mount()
    fh = fs.opendir(ROOT).fh
    for item in fs.readdirplus(ROOT, fh, 0, 65536):
        if item.dirent.name == b"..":
            assert item.entry.nodeid in (0, ROOT)


def test_a_symlink_out_of_the_share_is_only_ever_its_text(walled: Share) -> None:
    fs = walled.mount()
    (walled.path / "link").symlink_to("../secret")
    (walled.path / "dirlink").symlink_to("../secrets")
    link, dirlink = fs.lookup(ROOT, "link"), fs.lookup(ROOT, "dirlink")
    assert stat.S_ISLNK(link.attr.mode)
    assert fs.readlink(link.nodeid) == b"../secret"
    for nodeid in (link.nodeid, dirlink.nodeid):
        with refused(errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EBADF):
            fs.open(nodeid)
        with refused(errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL):
            fs.opendir(nodeid)
        with refused(errno.ENOTDIR):
            fs.lookup(nodeid, "inner")
        with refused(errno.ENOTDIR):
            fs.create(nodeid, "new")
    secret_mode = (walled.path.parent / "secret").stat().st_mode
    with refused(errno.EOPNOTSUPP, errno.EINVAL, errno.ELOOP, errno.EBADF, errno.ENXIO, errno.EPERM):
        fs.setattr(link.nodeid, mode=0o777)
    with refused(
        errno.EOPNOTSUPP, errno.EINVAL, errno.ELOOP, errno.EBADF, errno.ENXIO, errno.EPERM, errno.EISDIR
    ):
        fs.setattr(link.nodeid, size=0)
    assert (walled.path.parent / "secret").stat().st_mode == secret_mode
    assert (walled.path.parent / "secret").read_text() == "secret"


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[list[int]]:
    """Exchanges two names over and over; yields the count of swaps."""
    stop = threading.Event()
    swaps = [0]
    spare = one.with_name("spare")

    def run() -> None:
        while not stop.is_set():
            os.rename(one, spare)
            os.rename(other, one)
            os.rename(spare, other)
            swaps[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield swaps
    finally:
        stop.set()
        thread.join()


def test_no_symlink_race_reaches_outside(walled: Share) -> None:
    """The host swaps a directory with a symlink to a secret one while the guest works below the name."""
    fs = walled.mount()
    (walled.path / "victim").mkdir()
    (walled.path / "victim" / "inner").write_text("public")
    (walled.path / "bait").symlink_to("../secrets")
    outcomes = set()
    with swapping(walled.path / "victim", walled.path / "bait") as swaps:
        rounds = 0
        while rounds < 400 or (swaps[0] < 50 and rounds < 5000):
            rounds += 1
            try:
                node = fs.lookup(ROOT, "victim").nodeid
                if rounds % 3 == 0:
                    fs.mkdir(node, f"made{rounds}")
                if rounds % 5 == 0:
                    fs.create(node, "inner", os.O_RDWR | os.O_TRUNC)
                    continue
                inner = fs.lookup(node, "inner").nodeid
                content = fs.read_file(inner)
                assert content != b"secret"
                outcomes.add("read")
            except OSError as error:
                outcomes.add(errno.errorcode[error.errno or 0])
    assert swaps[0] > 10
    assert _tree(walled.path.parent / "secrets") == ["inner"]
    assert (walled.path.parent / "secrets" / "inner").read_text() == "secret"
    assert outcomes <= {"read", "ENOENT", "ENOTDIR", "ESTALE", "ELOOP", "EEXIST", "EINVAL", "EXDEV", "EAGAIN"}


def test_no_race_between_a_file_and_a_symlink_reaches_outside(walled: Share) -> None:
    fs = walled.mount()
    (walled.path / "victim").write_text("public")
    (walled.path / "bait").symlink_to("../secret")
    with swapping(walled.path / "victim", walled.path / "bait") as swaps:
        rounds = 0
        while rounds < 300 or (swaps[0] < 50 and rounds < 5000):
            rounds += 1
            try:
                if rounds % 2:
                    entry, opened = fs.create(ROOT, "victim", os.O_RDWR)
                    assert fs.read(entry.nodeid, opened.fh, 100) != b"secret"
                else:
                    entry = fs.lookup(ROOT, "victim")
                    assert fs.read_file(entry.nodeid) != b"secret"
                    fs.setattr(entry.nodeid, mode=0o640)
            except OSError:
                pass
    assert (walled.path.parent / "secret").read_text() == "secret"
    assert stat.S_IMODE((walled.path.parent / "secret").stat().st_mode) == 0o644


def test_a_directory_moved_out_of_the_share_opens_no_way_up(walled: Share) -> None:
    """The host moves a directory that the guest holds outside; its ".." then is outside, too."""
    fs = walled.mount()
    node = fs.lookup(ROOT, "dir").nodeid
    fh = fs.opendir(node).fh
    os.rename(walled.path / "dir", walled.path.parent / "moved")
    try:
        entry = fs.lookup(node, "..")
    except OSError:
        pass
    else:
        secret_parent = walled.path.parent.stat().st_ino
        assert entry.attr.ino != secret_parent
    for item in fs.readdirplus(node, fh, 0, 65536):
        assert item.entry.nodeid == 0 or item.dirent.name not in (b".", b"..")


def test_an_ordinary_nodeid_is_not_a_number_of_the_host(walled: Share, ours: None) -> None:
    """Guessing inode numbers, descriptors or small integers as nodeids must find nothing."""
    fs = walled.mount()
    secret = (walled.path.parent / "secret").stat().st_ino
    for nodeid in [secret, *range(2, 300)]:
        with refused(errno.ESTALE):
            fs.getattr(nodeid)
        with refused(errno.ESTALE):
            fs.call(op.open_(nodeid))
