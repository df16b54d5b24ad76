# SPDX-License-Identifier: Apache-2.0
"""On whose behalf operations run: owners of new objects, permissions, groups, umask, translations.

Must not test what the operations do besides. Specification: credentials(7), FUSE_CREATE_SUPP_GROUP in fuse.h.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import Caller, FuseClient, InitFlag
from vhostfs.frontend import fuse_abi as abi

pytestmark = pytest.mark.usefixtures("needs_root")

ALICE = Caller(uid=1001, gid=1001)
BOB = Caller(uid=1002, gid=1002)

Creation = Callable[[FuseClient, int, str], object]
CREATIONS: dict[str, Creation] = {
    "create": lambda fs, parent, name: fs.create(parent, name),
    "mkdir": lambda fs, parent, name: fs.mkdir(parent, name),
    "mknod": lambda fs, parent, name: fs.mknod(parent, name, stat.S_IFREG | 0o644),
    "symlink": lambda fs, parent, name: fs.symlink(parent, name, "target"),
}


@pytest.fixture(params=list(CREATIONS.values()), ids=list(CREATIONS))
def creation(request: pytest.FixtureRequest) -> Creation:
    made: Creation = request.param
    return made


def test_new_objects_belong_to_the_caller(share: Share, fs: FuseClient, creation: Creation) -> None:
    creation(fs.by(ALICE), fs.root, "a")
    host = (share.path / "a").lstat()
    assert (host.st_uid, host.st_gid) == (1001, 1001)


def test_requests_of_different_users_do_not_mix(share: Share, fs: FuseClient) -> None:
    for i in range(50):
        caller = (Caller(), ALICE, BOB)[i % 3]
        fs.by(caller).mkdir(fs.root, str(i))
    for i in range(50):
        host = (share.path / str(i)).stat()
        assert host.st_uid == host.st_gid == (0, 1001, 1002)[i % 3]


def test_a_set_gid_directory_gives_its_group(share: Share, fs: FuseClient, creation: Creation) -> None:
    directory = share.path / "dir"
    directory.mkdir()
    os.chown(directory, 0, 3000)
    directory.chmod(0o2777)
    creation(fs.by(ALICE), fs.lookup(fs.root, "dir").nodeid, "a")
    assert (directory / "a").lstat().st_gid == 3000


def test_a_directory_of_someone_else_refuses_new_names(
    share: Share, fs: FuseClient, creation: Creation
) -> None:
    directory = share.path / "dir"
    directory.mkdir(mode=0o755)
    node = fs.lookup(fs.root, "dir").nodeid
    with refused(errno.EACCES):
        creation(fs.by(ALICE), node, "a")
    assert os.listdir(directory) == []


def test_a_supplementary_group_sent_along_opens_its_directory(
    share: Share, fs: FuseClient, creation: Creation
) -> None:
    if not fs.session.flags & InitFlag.CREATE_SUPP_GROUP:
        pytest.fail("FUSE_CREATE_SUPP_GROUP was offered and not taken")
    directory = share.path / "dir"
    directory.mkdir()
    os.chown(directory, 0, 3000)
    directory.chmod(0o770)
    node = fs.lookup(fs.root, "dir").nodeid
    member = fs.by(Caller(uid=1001, gid=1001, groups=(3000,)))
    creation(member, node, "a")
    assert (directory / "a").lstat().st_gid == 1001
    with refused(errno.EACCES):
        creation(fs.by(ALICE), node, "b")
    with refused(errno.EACCES):
        creation(fs.by(Caller(1001, 1001, groups=(3001,))), node, "c")


def test_a_member_s_file_keeps_set_gid_in_its_group_s_directory(share: Share, fs: FuseClient) -> None:
    """Without the supplementary group the host would strip S_ISGID of a file that inherits the group."""
    directory = share.path / "dir"
    directory.mkdir()
    os.chown(directory, 0, 3000)
    directory.chmod(0o2777)
    node = fs.lookup(fs.root, "dir").nodeid
    fs.by(Caller(1001, 1001, groups=(3000,))).create(node, "kept", mode=0o2775)
    fs.by(ALICE).create(node, "stripped", mode=0o2775)
    assert (directory / "kept").stat().st_mode & stat.S_ISGID
    assert not (directory / "stripped").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize(
    "operation",
    [
        lambda fs, dir_, node: fs.unlink(dir_, "a"),
        lambda fs, dir_, node: fs.rename(dir_, "a", dir_, "b"),
        lambda fs, dir_, node: fs.link(node, dir_, "b"),
    ],
    ids=["unlink", "rename", "link"],
)
def test_the_sticky_bit_and_modes_are_the_guest_kernel_s_business(
    share: Share, fs: FuseClient, operation: Callable[[FuseClient, int, int], object]
) -> None:
    """A mount has default_permissions: the guest's kernel has checked already, and the server trusts it."""
    directory = share.path / "dir"
    directory.mkdir()
    (directory / "a").touch()
    node = fs.lookup(fs.root, "dir").nodeid
    operation(fs.by(ALICE), node, fs.lookup(node, "a").nodeid)
    assert os.listdir(directory) != ["a"]


def test_umask_is_applied_by_the_guest_unless_dont_mask(share: Share, fs: FuseClient) -> None:
    """Without FUSE_DONT_MASK the mode has been masked by the guest; the server's own umask must not count."""
    fs.create(fs.root, "file", mode=0o666)
    fs.mkdir(fs.root, "dir", 0o777)
    fs.mknod(fs.root, "node", stat.S_IFREG | 0o666)
    assert stat.S_IMODE((share.path / "file").stat().st_mode) == 0o666
    assert stat.S_IMODE((share.path / "dir").stat().st_mode) == 0o777
    assert stat.S_IMODE((share.path / "node").stat().st_mode) == 0o666


def test_umask_is_applied_by_the_server_with_dont_mask(make_share: MakeShare) -> None:
    share = make_share("--posix-acl")
    fs = share.mount()
    assert fs.session.flags & InitFlag.DONT_MASK
    fs.create(fs.root, "file", mode=0o666, umask=0o027)
    fs.mkdir(fs.root, "dir", 0o777, umask=0o027)
    fs.mknod(fs.root, "node", stat.S_IFREG | 0o666, umask=0o077)
    assert stat.S_IMODE((share.path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((share.path / "dir").stat().st_mode) == 0o750
    assert stat.S_IMODE((share.path / "node").stat().st_mode) == 0o600
    fs.create(fs.root, "unmasked", mode=0o666, umask=0)
    assert stat.S_IMODE((share.path / "unmasked").stat().st_mode) == 0o666


def test_groups_are_ignored_when_they_were_not_negotiated(make_share: MakeShare) -> None:
    share = make_share()
    fs = share.mount(flags=abi.LINUX_6_1_FLAGS)
    assert not fs.session.flags & InitFlag.CREATE_SUPP_GROUP
    fs.by(Caller(1001, 1001, groups=(3000,))).mkdir(fs.root, "a")
    assert (share.path / "a").stat().st_gid == 1001


def test_files_can_be_opened_and_read_by_whoever_the_guest_allowed(share: Share, fs: FuseClient) -> None:
    (share.path / "secret").write_text("x")
    (share.path / "secret").chmod(0o600)
    node = fs.lookup(fs.root, "secret").nodeid
    assert fs.by(ALICE).read_file(node) == b"x"


def test_ids_are_translated_both_ways(make_share: MakeShare) -> None:
    share = make_share("--translate-uid=map:1000:70000:100", "--translate-gid=map:1000:80000:100")
    fs = share.mount()
    share.path.chmod(0o777)
    entry, _ = fs.by(Caller(1005, 1006)).create(fs.root, "a")
    host = (share.path / "a").stat()
    assert (host.st_uid, host.st_gid) == (70005, 80006)
    assert (entry.attr.uid, entry.attr.gid) == (1005, 1006)
    fs.setattr(entry.nodeid, uid=1010, gid=1011)
    host = (share.path / "a").stat()
    assert (host.st_uid, host.st_gid) == (70010, 80011)
    attr = fs.getattr(entry.nodeid)
    assert (attr.uid, attr.gid) == (1010, 1011)


def test_a_forbidden_guest_id_is_eperm(make_share: MakeShare) -> None:
    share = make_share("--translate-uid=forbid-guest:5000:10")
    fs = share.mount()
    entry = fs.write_file(fs.root, "a", b"")
    with refused(errno.EPERM):
        fs.by(Caller(5003, 0)).mkdir(fs.root, "b")
    with refused(errno.EPERM):
        fs.setattr(entry.nodeid, uid=5003)
    assert os.listdir(share.path) == ["a"]


def test_squashed_ids_become_one(make_share: MakeShare) -> None:
    share = make_share("--translate-uid=squash-guest:0:65534:100000")
    fs = share.mount()
    fs.by(Caller(0, 0)).create(fs.root, "a")
    fs.by(Caller(1001, 0)).create(fs.root, "b")
    assert (share.path / "a").stat().st_uid == (share.path / "b").stat().st_uid == 65534
