# SPDX-License-Identifier: Apache-2.0
"""Extended attributes: the four operations, maps, ACLs, labels.

Must not test other metadata. Specification: xattr(7), acl(5), and virtiofsd's documentation of --xattrmap.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import Caller, FuseClient, InitFlag, SecurityContext
from vhostfs.frontend import fuse_abi as abi

pytestmark = pytest.mark.usefixtures("needs_root")

CREATE, REPLACE = 1, 2


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    # Without the capability the host refuses trusted.*, the only kind that symlinks may have here.
    return make_share("--xattr", "--modcaps=+sys_admin")


@pytest.fixture
def node(fs: FuseClient) -> int:
    return fs.write_file(fs.root, "a", b"").nodeid


def test_what_is_set_is_read_listed_and_removed(share: Share, fs: FuseClient, node: int) -> None:
    fs.setxattr(node, "user.one", b"1")
    fs.setxattr(node, "user.two", b"\0\xff" * 100)
    assert fs.getxattr(node, "user.one") == b"1"
    assert set(fs.listxattr(node).split(b"\0")) == {b"user.one", b"user.two", b""}
    assert os.getxattr(share.path / "a", "user.two") == b"\0\xff" * 100
    fs.removexattr(node, "user.one")
    with refused(errno.ENODATA):
        fs.getxattr(node, "user.one")
    with refused(errno.ENODATA):
        fs.removexattr(node, "user.one")


def test_size_zero_asks_for_the_size(fs: FuseClient, node: int) -> None:
    fs.setxattr(node, "user.one", b"12345")
    assert struct.unpack("<II", fs.getxattr(node, "user.one", 0))[0] == 5
    assert struct.unpack("<II", fs.listxattr(node, 0))[0] >= len(b"user.one\0")


def test_a_size_too_small_is_erange(fs: FuseClient, node: int) -> None:
    fs.setxattr(node, "user.one", b"12345")
    with refused(errno.ERANGE):
        fs.getxattr(node, "user.one", 4)
    with refused(errno.ERANGE):
        fs.listxattr(node, 4)


def test_an_empty_value_is_kept(fs: FuseClient, node: int) -> None:
    fs.setxattr(node, "user.one", b"")
    assert fs.getxattr(node, "user.one") == b""


def test_create_and_replace_are_respected(fs: FuseClient, node: int) -> None:
    with refused(errno.ENODATA):
        fs.setxattr(node, "user.one", b"1", REPLACE)
    fs.setxattr(node, "user.one", b"1", CREATE)
    with refused(errno.EEXIST):
        fs.setxattr(node, "user.one", b"2", CREATE)
    fs.setxattr(node, "user.one", b"3", REPLACE)
    assert fs.getxattr(node, "user.one") == b"3"


def test_the_short_form_of_setxattr_works(share: Share) -> None:
    fs = share.mount(flags=abi.LINUX_7_FLAGS & ~InitFlag.SETXATTR_EXT)
    entry = fs.write_file(fs.root, "a", b"")
    fs.setxattr(entry.nodeid, "user.one", b"value")
    assert fs.getxattr(entry.nodeid, "user.one") == b"value"


def test_directories_symlinks_and_special_files_have_them(share: Share, fs: FuseClient) -> None:
    directory = fs.mkdir(fs.root, "dir").nodeid
    fs.setxattr(directory, "user.one", b"1")
    assert os.getxattr(share.path / "dir", "user.one") == b"1"
    link = fs.symlink(fs.root, "link", "a").nodeid
    fs.setxattr(link, "trusted.one", b"2")
    assert fs.getxattr(link, "trusted.one") == b"2"
    fifo = fs.mknod(fs.root, "fifo", stat.S_IFIFO | 0o600).nodeid
    fs.setxattr(fifo, "trusted.one", b"3")
    assert fs.getxattr(fifo, "trusted.one") == b"3"
    assert os.getxattr(share.path / "fifo", "trusted.one") == b"3"
    assert os.getxattr(share.path / "link", "trusted.one", follow_symlinks=False) == b"2"


def test_an_xattr_of_a_symlink_never_lands_on_its_target(share: Share, fs: FuseClient) -> None:
    (share.path / "target").touch()
    link = fs.symlink(fs.root, "link", "target").nodeid
    fs.setxattr(link, "trusted.one", b"1")
    assert os.listxattr(share.path / "target") == []


def test_errors_of_names_and_values_are_the_host_s(fs: FuseClient, node: int) -> None:
    with refused(errno.EOPNOTSUPP):
        fs.setxattr(node, "nonsense.x", b"1")
    with refused(errno.ERANGE, errno.EINVAL, errno.EOPNOTSUPP):
        fs.setxattr(node, "", b"1")
    with refused(errno.ERANGE):
        fs.setxattr(node, "user." + "n" * 255, b"1")
    with refused(errno.E2BIG, errno.ENOSPC):
        fs.setxattr(node, "user.big", bytes(65537))


def test_without_xattr_all_four_are_refused(make_share: MakeShare) -> None:
    fs = make_share().mount()
    node = fs.write_file(fs.root, "a", b"").nodeid
    with refused(errno.ENOSYS, errno.EOPNOTSUPP):
        fs.setxattr(node, "user.one", b"1")
    with refused(errno.ENOSYS, errno.EOPNOTSUPP):
        fs.getxattr(node, "user.one")
    with refused(errno.ENOSYS, errno.EOPNOTSUPP):
        fs.listxattr(node)
    with refused(errno.ENOSYS, errno.EOPNOTSUPP):
        fs.removexattr(node, "user.one")


# ---- maps ----


def test_a_map_puts_everything_below_a_prefix(make_share: MakeShare) -> None:
    share = make_share("--xattrmap=:map::user.virtiofs.:")
    fs = share.mount()
    node = fs.write_file(fs.root, "a", b"").nodeid
    fs.setxattr(node, "trusted.overlay.opaque", b"y")
    fs.setxattr(node, "security.capability.x", b"z")
    assert set(os.listxattr(share.path / "a")) == {
        "user.virtiofs.trusted.overlay.opaque",
        "user.virtiofs.security.capability.x",
    }
    os.setxattr(share.path / "a", "user.host", b"hidden")
    assert set(fs.listxattr(node).split(b"\0")) == {
        b"trusted.overlay.opaque",
        b"security.capability.x",
        b"",
    }
    assert fs.getxattr(node, "trusted.overlay.opaque") == b"y"
    fs.removexattr(node, "trusted.overlay.opaque")
    assert set(os.listxattr(share.path / "a")) == {"user.host", "user.virtiofs.security.capability.x"}


def test_a_map_of_one_prefix_leaves_the_others(make_share: MakeShare) -> None:
    share = make_share("--xattrmap=:map:trusted.:user.virtiofs.:")
    fs = share.mount()
    node = fs.write_file(fs.root, "a", b"").nodeid
    fs.setxattr(node, "trusted.x", b"1")
    fs.setxattr(node, "user.y", b"2")
    assert set(os.listxattr(share.path / "a")) == {"user.virtiofs.trusted.x", "user.y"}
    assert set(fs.listxattr(node).split(b"\0")) == {b"trusted.x", b"user.y", b""}
    with refused(errno.EPERM):
        fs.setxattr(node, "user.virtiofs.trusted.z", b"3")


def test_bad_and_unsupported_rules_refuse_and_hide(make_share: MakeShare) -> None:
    rules = "--xattrmap=:prefix:client:trusted.:user.trusted.:"
    share = make_share(
        rules + ":bad:all:user.secret:user.secret::unsupported:client:system.:::ok:all:::",
    )
    fs = share.mount()
    node = fs.write_file(fs.root, "a", b"").nodeid
    os.setxattr(share.path / "a", "user.secret", b"s")
    os.setxattr(share.path / "a", "user.open", b"o")
    with refused(errno.EPERM, errno.ENODATA):
        fs.getxattr(node, "user.secret")
    with refused(errno.EPERM):
        fs.setxattr(node, "user.secret", b"1")
    with refused(errno.EOPNOTSUPP):
        fs.getxattr(node, "system.posix_acl_access")
    assert b"user.secret" not in fs.listxattr(node).split(b"\0")
    assert fs.getxattr(node, "user.open") == b"o"
    fs.setxattr(node, "trusted.x", b"1")
    assert os.getxattr(share.path / "a", "user.trusted.trusted.x") == b"1"


# ---- ACLs and labels ----


def _acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NO_ID = 0xFFFFFFFF
DEFAULT_ACL = _acl((1, 7, NO_ID), (2, 7, 1234), (4, 5, NO_ID), (16, 7, NO_ID), (32, 0, NO_ID))


@pytest.fixture
def acl_share(make_share: MakeShare) -> Share:
    share = make_share("--posix-acl")
    try:
        os.setxattr(share.path, "system.posix_acl_default", DEFAULT_ACL)
        os.removexattr(share.path, "system.posix_acl_default")
    except OSError:
        pytest.skip("this machine lacks a file system with POSIX ACLs for temporary files")
    return share


def test_posix_acl_is_negotiated_only_when_asked(make_share: MakeShare, acl_share: Share) -> None:
    assert acl_share.mount().session.flags & InitFlag.POSIX_ACL
    acl_share.unmount()
    assert not make_share("--xattr").mount().session.flags & InitFlag.POSIX_ACL


def test_a_default_acl_is_inherited_and_beats_the_umask(acl_share: Share) -> None:
    fs = acl_share.mount()
    fs.setxattr(fs.root, "system.posix_acl_default", DEFAULT_ACL)
    fs.create(fs.root, "file", mode=0o666, umask=0o077)
    node = fs.lookup(fs.root, "file").nodeid
    assert b"system.posix_acl_access" in fs.listxattr(node).split(b"\0")
    assert stat.S_IMODE((acl_share.path / "file").stat().st_mode) == 0o660
    directory = fs.mkdir(fs.root, "dir", 0o777, umask=0o077)
    assert fs.getxattr(directory.nodeid, "system.posix_acl_default") == DEFAULT_ACL


def test_an_acl_change_marked_so_clears_set_gid(acl_share: Share) -> None:
    fs = acl_share.mount()
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, mode=0o2755, uid=1000, gid=3000)
    acl = _acl((1, 7, NO_ID), (4, 5, NO_ID), (32, 5, NO_ID))
    alice = fs.by(Caller(1000, 1000))
    alice.setxattr(entry.nodeid, "system.posix_acl_access", acl, setxattr_flags=abi.SETXATTR_ACL_KILL_SGID)
    assert not (acl_share.path / "a").stat().st_mode & stat.S_ISGID


def test_an_acl_change_not_marked_keeps_set_gid(acl_share: Share) -> None:
    fs = acl_share.mount()
    entry = fs.write_file(fs.root, "a", b"")
    fs.setattr(entry.nodeid, mode=0o2755, uid=1000, gid=3000)
    acl = _acl((1, 7, NO_ID), (4, 5, NO_ID), (32, 5, NO_ID))
    fs.setxattr(entry.nodeid, "system.posix_acl_access", acl)
    assert (acl_share.path / "a").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("minor", [36, 45], ids=["linux-6.1", "linux-7"])
def test_a_security_context_is_set_at_creation(make_share: MakeShare, minor: int) -> None:
    """Mapped to trusted.*, as the host may have no security module that takes the label."""
    share = make_share(
        "--security-label", "--modcaps=+sys_admin", "--xattrmap=:map:security.:trusted.guest.:"
    )
    fs = share.mount()
    fs.destroy()
    offered = abi.LINUX_7_FLAGS if minor == 45 else abi.LINUX_6_1_FLAGS
    assert fs.init(offered, minor=minor).flags & InitFlag.SECURITY_CTX
    fs.root = abi.ROOT
    fs.root = fs.walk(share.relative).nodeid
    label = SecurityContext(b"security.selinux", b"system_u:object_r:x_t:s0\0")
    fs.mkdir(fs.root, "dir", security=label)
    fs.create(fs.root, "file", security=label)
    fs.mknod(fs.root, "node", stat.S_IFREG | 0o600, security=label)
    fs.symlink(fs.root, "link", "x", security=label)
    for name in ("dir", "file", "node", "link"):
        found = os.getxattr(share.path / name, "trusted.guest.security.selinux", follow_symlinks=False)
        assert found == label.value
    fs.mkdir(fs.root, "plain")
    assert os.listxattr(share.path / "plain") == []
