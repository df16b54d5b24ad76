# SPDX-License-Identifier: Apache-2.0
"""Owners, groups, modes, umask, ACLs and extended attributes, as programs of the guest set and see them.

Must not test file data. Specification: credentials(7), inode(7), acl(5), xattr(7).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.guest.conftest import MakePlace
from tests.guest.place import Place

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


@pytest.fixture
def host_xattrs(place: Place) -> None:
    """For tests of user.* attributes: the host's file system must have them."""
    try:
        os.setxattr(place.host, "user.probe", b"")
        os.removexattr(place.host, "user.probe")
    except OSError:
        lacking(f"a file system with user.* attributes under {place.host}")


# -- credentials


@pytest.mark.usefixtures("needs_root")
def test_what_a_user_of_the_guest_makes_is_his(any_place: Place) -> None:
    any_place.python(
        """
import os, socket
os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666))
os.mkdir("dir")
os.symlink("x", "link")
os.mkfifo("fifo")
os.link("file", "second")
socket.socket(socket.AF_UNIX).bind("socket")
os.open(".", os.O_TMPFILE | os.O_RDWR)
""",
        user=1000,
    )
    made = {path.name: path.lstat() for path in any_place.host.iterdir()}
    assert {name: (state.st_uid, state.st_gid) for name, state in made.items()} == dict.fromkeys(
        ("file", "dir", "link", "fifo", "second", "socket"), (1000, 1000)
    )
    assert made["file"].st_ino == made["second"].st_ino


@pytest.mark.usefixtures("needs_root")
def test_a_user_is_refused_what_is_not_his(place: Place) -> None:
    secret = place.host / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    place.host.chmod(0o755)
    expected = {
        "open('secret')": errno.EACCES,
        "open('new', 'w')": errno.EACCES,
        "os.unlink('secret')": errno.EACCES,
        "os.chmod('secret', 0o666)": errno.EPERM,
        "os.chown('secret', 1000, 1000)": errno.EPERM,
    }
    assert place.errnos_of(expected, user=1000) == expected
    assert place.errno_of("open('secret')") == 0


@pytest.mark.usefixtures("needs_root")
def test_a_sticky_directory_keeps_users_from_removing_each_others_files(place: Place) -> None:
    place.host.chmod(0o1777)
    place.sh(": >file; chown 1001 file")
    assert place.errno_of("os.unlink('file')", user=1000) == errno.EPERM
    assert place.errno_of("os.unlink('file')", user=1001) == 0


SUPPLEMENTARY = """
import os
os.setgroups([3000])
os.setgid(1000)
os.setuid(1000)
"""


@pytest.mark.usefixtures("needs_root")
def test_a_set_gid_directory_of_a_supplementary_group_gives_its_group(any_place: Place) -> None:
    folder = any_place.child("dir").host
    os.chown(folder, 0, 3000)
    folder.chmod(0o2770)
    any_place.python(
        SUPPLEMENTARY
        + """
os.chdir("dir")
os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o2775))
os.mkdir("sub")
os.open(".", os.O_TMPFILE | os.O_RDWR)
"""
    )
    file, sub = (folder / "file").stat(), (folder / "sub").stat()
    assert (file.st_uid, file.st_gid) == (sub.st_uid, sub.st_gid) == (1000, 3000)
    assert sub.st_mode & stat.S_ISGID
    # The maker is of that group, so that he may keep the bit; POSIX leaves it to the umask only.
    assert file.st_mode & 0o7777 == 0o2755


@pytest.mark.usefixtures("needs_root")
def test_who_is_not_of_the_group_loses_the_set_gid_bit_of_a_new_file(place: Place) -> None:
    folder = place.child("dir").host
    os.chown(folder, 1000, 3000)
    folder.chmod(0o2777)
    place.python("import os; os.close(os.open('dir/file', os.O_CREAT | os.O_WRONLY, 0o2775))", user=1000)
    file = (folder / "file").stat()
    assert (file.st_gid, file.st_mode & 0o7777) == (3000, 0o755)


@pytest.mark.usefixtures("needs_root")
def test_writing_and_changing_the_owner_drop_set_id_bits(any_place: Place) -> None:
    any_place.python(
        """
import os
for name in ("written", "truncated", "given"):
    with open(name, "w") as file:
        file.write("content")
    os.chown(name, 1000, 1000)
    os.chmod(name, 0o6777)
"""
    )
    any_place.python(
        """
import os
with open("written", "r+") as file:
    file.write("x")
os.truncate("truncated", 1)
""",
        user=1001,
    )
    any_place.sh("chown 1001 given; sync")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in any_place.host.iterdir()}
    assert modes == dict.fromkeys(("written", "truncated", "given"), 0o777)
    assert any_place.sh("stat -c %a written truncated given").split() == ["777"] * 3


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_umask_is_honoured_once(any_place: Place, umask: int) -> None:
    any_place.python(
        f"""
import os
os.umask({umask})
os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666))
os.mkdir("dir", 0o777)
os.mkfifo("fifo", 0o666)
"""
    )
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in any_place.host.iterdir()}
    assert modes == {"file": 0o666 & ~umask, "dir": 0o777 & ~umask, "fifo": 0o666 & ~umask}


# -- ACLs


@pytest.fixture
def acl_place(place_on: MakePlace) -> Place:
    """A directory of the share served with --posix-acl, on a host that has ACLs."""
    place = place_on("acl")
    try:
        os.getxattr(place.host, ACCESS)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            lacking(f"a file system with POSIX ACLs under {place.host}")
    return place


def acl_of(path: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name)
    except OSError as error:
        assert error.errno == errno.ENODATA
        return None


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("umask", ["022", "077"])
def test_a_default_acl_gives_new_objects_what_it_gives_them_on_the_host(acl_place: Place, umask: str) -> None:
    acl_place.sh("mkdir guest host && setfacl -d -m u:1001:rwx,g:3000:rx guest")
    default = acl_of(acl_place.host / "guest", DEFAULT)
    assert default is not None
    os.setxattr(acl_place.host / "host", DEFAULT, default)
    make = f"umask {umask}; echo >{{0}}/file; mkdir {{0}}/sub; mkfifo {{0}}/fifo"
    acl_place.sh(make.format("guest"))
    assert os.system(f"cd {acl_place.host}; {make.format('host')}") == 0
    for name in ("file", "sub", "fifo"):
        ours, theirs = acl_place.host / "guest" / name, acl_place.host / "host" / name
        assert ours.stat().st_mode == theirs.stat().st_mode, name
        assert acl_of(ours, ACCESS) == acl_of(theirs, ACCESS) is not None, name
    assert acl_of(acl_place.host / "guest/sub", DEFAULT) == default
    assert "user:user2:rwx" in acl_place.sh("getfacl -c guest/file")


@pytest.mark.usefixtures("needs_root")
def test_an_acl_lets_a_user_in_and_keeps_others_out(acl_place: Place) -> None:
    acl_place.sh("echo secret >file; chmod 600 file; setfacl -m u:1001:r file")
    assert acl_place.errno_of("open('file')", user=1001) == 0
    assert acl_place.errno_of("open('file')", user=1000) == errno.EACCES
    assert acl_place.errno_of("open('file', 'a')", user=1001) == errno.EACCES
    acl_place.sh("chmod g= file")  # the mask
    assert acl_place.errno_of("open('file')", user=1001) == errno.EACCES
    acl_place.sh("setfacl -b file; chmod 644 file")
    assert acl_of(acl_place.host / "file", ACCESS) is None
    assert acl_place.errno_of("open('file')", user=1000) == 0


@pytest.mark.usefixtures("needs_root")
def test_the_umask_is_honoured_with_acls_where_no_default_acl_is(acl_place: Place) -> None:
    acl_place.sh("umask 027; echo >file; mkdir dir")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in acl_place.host.iterdir()}
    assert modes == {"file": 0o640, "dir": 0o750}


# -- extended attributes


@pytest.mark.usefixtures("host_xattrs")
def test_extended_attributes_go_both_ways(place: Place) -> None:
    (place.host / "file").write_text("content")
    os.setxattr(place.host / "file", "user.from-host", b"\x00binary\xff")
    place.sh("setfattr -n user.from-guest -v value file; setfattr -n user.empty file")
    assert os.getxattr(place.host / "file", "user.from-guest") == b"value"
    assert os.getxattr(place.host / "file", "user.empty") == b""
    shown = place.sh("getfattr --absolute-names -e hex -n user.from-host file")
    assert "user.from-host=0x0062696e617279ff" in shown
    names = place.python("import json, os; print(json.dumps(sorted(os.listxattr('file'))))")
    assert names == ["user.empty", "user.from-guest", "user.from-host"]
    place.sh("setfattr -x user.from-host file")
    assert sorted(os.listxattr(place.host / "file")) == ["user.empty", "user.from-guest"]


@pytest.mark.usefixtures("host_xattrs")
def test_an_extended_attribute_is_made_or_replaced_as_asked(place: Place) -> None:
    (place.host / "file").touch()
    set_it = "os.setxattr('file', 'user.a', b'x', os.XATTR_{})"
    assert place.errno_of(set_it.format("REPLACE")) == errno.ENODATA
    assert place.errno_of(set_it.format("CREATE")) == 0
    assert place.errno_of(set_it.format("CREATE")) == errno.EEXIST
    assert place.errno_of("os.getxattr('file', 'user.b')") == errno.ENODATA
    assert place.errno_of("os.removexattr('file', 'user.b')") == errno.ENODATA


@pytest.mark.usefixtures("host_xattrs")
def test_an_extended_attribute_may_be_large(place: Place) -> None:
    (place.host / "file").touch()
    try:
        os.setxattr(place.host / "file", "user.large", b"x" * 3000)
    except OSError:
        lacking("a file system with extended attributes of 3000 bytes")
    place.python("import os; os.setxattr('file', 'user.large', bytes(range(250)) * 12)")
    assert os.getxattr(place.host / "file", "user.large") == bytes(range(250)) * 12
    assert place.python("import os; print(len(os.getxattr('file', 'user.large')))") == 3000


@pytest.mark.usefixtures("host_xattrs", "needs_root")
def test_trusted_attributes_are_for_root_alone(place: Place) -> None:
    place.sh("echo >file; chmod 666 file")
    guest = place.errno_of("os.setxattr('file', 'trusted.a', b'x')")
    # The server's rights decide: without CAP_SYS_ADMIN on the host it cannot, and says so.
    assert guest in (0, errno.EPERM)
    assert place.errno_of("os.setxattr('file', 'trusted.b', b'x')", user=1000) == errno.EPERM


def test_without_xattr_the_share_has_none(place_on: MakePlace) -> None:
    place = place_on("never")
    (place.host / "file").touch()
    assert place.errno_of("os.setxattr('file', 'user.a', b'x')") == errno.ENOTSUP
    assert place.errno_of("os.getxattr('file', 'user.a')") == errno.ENOTSUP
