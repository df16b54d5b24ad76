# SPDX-License-Identifier: Apache-2.0
"""Names and the objects behind them: lookup, creation, removal, renaming, links, and the life of a nodeid.

Must not test file content. Specification: fuse.h, lookup counts as in libfuse's documentation of forget.
"""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from tests.server import awaited
from vhostfs.frontend import FuseClient, FuseError
from vhostfs.frontend.fuse_abi import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT

ODD_NAMES = [
    b"a" * 255,
    b"\xff\xfe not utf-8 \x80",
    b"line\nbreak",
    b"\x01\x7f\x1b[31m",
    b" leading and trailing ",
    b"...",
    b"..a",
    b"-rf",
    b"%s%n",
    "\u65e5\u672c\u8a9e".encode(),
    b"back\\slash",
]


def test_a_file_of_the_host_is_found_with_its_attributes(share: Share, fs: FuseClient) -> None:
    path = share.path / "a"
    path.write_bytes(b"x" * 5000)
    os.chmod(path, 0o640)
    os.utime(path, ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    attr = fs.lookup(fs.root, "a").attr
    host = path.stat()
    assert (attr.ino, attr.size, attr.mode, attr.nlink) == (host.st_ino, 5000, 0o100640, 1)
    assert (attr.blocks, attr.uid, attr.gid) == (host.st_blocks, host.st_uid, host.st_gid)
    assert attr.mtime_ns == host.st_mtime_ns
    assert attr.atime_ns == host.st_atime_ns


def test_a_missing_name_is_enoent_or_a_negative_entry(fs: FuseClient) -> None:
    number, nodeid = 0, 0
    try:
        nodeid = fs.lookup(fs.root, "missing").nodeid
    except FuseError as error:
        number = error.errno or 0
    assert (number, nodeid) in ((errno.ENOENT, 0), (0, 0))


def test_lookup_below_a_file_is_enotdir(share: Share, fs: FuseClient) -> None:
    (share.path / "file").touch()
    with refused(errno.ENOTDIR):
        fs.lookup(fs.lookup(fs.root, "file").nodeid, "x")


def test_every_kind_of_object_is_found_with_its_type(share: Share, fs: FuseClient, needs_root: None) -> None:
    (share.path / "file").touch()
    (share.path / "dir").mkdir()
    (share.path / "link").symlink_to("nowhere")
    os.mkfifo(share.path / "fifo")
    os.mknod(share.path / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(share.path / "block", stat.S_IFBLK | 0o600, os.makedev(7, 9))
    os.mknod(share.path / "socket", stat.S_IFSOCK | 0o600)
    for path in share.path.iterdir():
        attr = fs.lookup(fs.root, path.name).attr
        assert stat.S_IFMT(attr.mode) == stat.S_IFMT(path.lstat().st_mode), path.name
    assert fs.lookup(fs.root, "char").attr.rdev == (1 << 8) | 3


def test_the_same_object_has_the_same_nodeid_each_time(share: Share, fs: FuseClient) -> None:
    (share.path / "a").touch()
    first, second = fs.lookup(fs.root, "a"), fs.lookup(fs.root, "a")
    assert (first.nodeid, first.generation) == (second.nodeid, second.generation)


def test_hard_links_are_one_inode(share: Share, fs: FuseClient) -> None:
    (share.path / "a").touch()
    (share.path / "dir").mkdir()
    os.link(share.path / "a", share.path / "dir" / "b")
    a, b = fs.walk("a"), fs.walk("dir/b")
    assert (a.nodeid, a.generation) == (b.nodeid, b.generation)
    assert a.attr.nlink == 2


def test_a_link_made_by_the_guest_is_the_same_inode(share: Share, fs: FuseClient) -> None:
    first = fs.write_file(fs.root, "a", b"content")
    second = fs.link(first.nodeid, fs.root, "b")
    assert second.nodeid == first.nodeid
    assert second.attr.nlink == 2
    assert os.path.samefile(share.path / "a", share.path / "b")


def test_linking_over_an_existing_name_is_eexist(share: Share, fs: FuseClient) -> None:
    (share.path / "b").touch()
    entry = fs.write_file(fs.root, "a", b"")
    with refused(errno.EEXIST):
        fs.link(entry.nodeid, fs.root, "b")


def test_linking_a_symlink_links_the_symlink_itself(share: Share, fs: FuseClient) -> None:
    (share.path / "target").touch()
    entry = fs.symlink(fs.root, "a", "target")
    fs.link(entry.nodeid, fs.root, "b")
    assert os.readlink(share.path / "b") == "target"


def test_linking_a_directory_is_eperm(share: Share, fs: FuseClient) -> None:
    entry = fs.mkdir(fs.root, "dir")
    with refused(errno.EPERM):
        fs.link(entry.nodeid, fs.root, "b")


def test_a_reused_inode_number_is_another_object(share: Share, fs: FuseClient) -> None:
    """ext4 gives the number of a deleted file to the next one; the guest must not take one for the other."""
    path = share.path / "a"
    seen: set[tuple[int, int]] = set()
    numbers: list[int] = []
    for round_ in range(8):
        path.write_text(str(round_))
        entry = fs.lookup(fs.root, "a")
        assert (entry.nodeid, entry.generation) not in seen
        seen.add((entry.nodeid, entry.generation))
        numbers.append(entry.attr.ino)
        assert fs.read_file(entry.nodeid) == str(round_).encode()
        fs.forget(entry.nodeid)
        # The server pins what the guest holds: only after the forget can the host reuse the number.
        path.unlink()
    if len(set(numbers)) == len(numbers):
        pytest.skip("this machine lacks a file system that reuses inode numbers")


def test_a_held_inode_deleted_on_the_host_never_becomes_its_successor(share: Share, fs: FuseClient) -> None:
    path = share.path / "a"
    path.write_text("old")
    old = fs.lookup(fs.root, "a")
    path.unlink()
    for i in range(64):
        (share.path / f"new{i}").write_text("new")
    for i in range(64):
        new = fs.lookup(fs.root, f"new{i}")
        assert (new.nodeid, new.generation) != (old.nodeid, old.generation)
    attr = fs.getattr(old.nodeid)
    assert (attr.nlink, attr.size) == (0, 3)


def test_a_nodeid_is_good_until_its_last_forget(share: Share, fs: FuseClient, ours: None) -> None:
    (share.path / "a").touch()
    nodeid = fs.lookup(fs.root, "a").nodeid
    fs.lookup(fs.root, "a")
    fs.lookup(fs.root, "a")
    fs.forget(nodeid, 2)
    assert fs.getattr(nodeid).size == 0
    fs.forget(nodeid, 1)
    with refused(errno.ESTALE):
        fs.getattr(nodeid)


def test_batch_forget_takes_each_count(share: Share, fs: FuseClient, ours: None) -> None:
    for name in "abc":
        (share.path / name).touch()
    a, b, c = (fs.lookup(fs.root, name).nodeid for name in "abc")
    fs.lookup(fs.root, "b")
    fs.batch_forget([(a, 1), (b, 1), (c, 1)])
    assert fs.getattr(b).nlink == 1
    for gone in (a, c):
        with refused(errno.ESTALE):
            fs.getattr(gone)


def test_a_forgotten_nodeid_is_never_given_again(share: Share, fs: FuseClient, ours: None) -> None:
    (share.path / "a").touch()
    seen = set()
    for _ in range(200):
        nodeid = fs.lookup(fs.root, "a").nodeid
        assert nodeid not in seen
        seen.add(nodeid)
        fs.forget(nodeid)


def test_forgetting_too_much_or_what_was_never_held_harms_nothing(
    share: Share, fs: FuseClient, ours: None
) -> None:
    (share.path / "a").touch()
    nodeid = fs.lookup(fs.root, "a").nodeid
    fs.forget(nodeid, (1 << 64) - 1)
    fs.forget(nodeid, 1)
    fs.forget(0xDEADBEEF, 5)
    fs.forget(1, 1 << 40)
    with refused(errno.ESTALE):
        fs.getattr(nodeid)
    assert fs.lookup(fs.root, "a").attr.nlink == 1


def test_a_forgotten_object_with_an_open_file_can_still_be_read(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"content")
    fh = fs.open(entry.nodeid).fh
    assert fs.read(entry.nodeid, fh, 100) == b"content"
    fs.release(entry.nodeid, fh)


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name)[:20])
def test_odd_names_are_kept_byte_by_byte(share: Share, fs: FuseClient, name: bytes) -> None:
    fs.write_file(fs.root, name, name)
    assert os.listdir(os.fsencode(share.path)) == [name]
    assert fs.list(fs.root) == [name]
    assert fs.read_file(fs.lookup(fs.root, name).nodeid) == name
    fs.rename(fs.root, name, fs.root, name[:254] + b"2")
    fs.unlink(fs.root, name[:254] + b"2")
    assert os.listdir(share.path) == []


def test_a_name_of_256_bytes_is_refused_by_every_operation(share: Share, fs: FuseClient) -> None:
    name = b"n" * 256
    entry = fs.write_file(fs.root, "a", b"")
    with refused(errno.ENAMETOOLONG):
        fs.lookup(fs.root, name)
    with refused(errno.ENAMETOOLONG):
        fs.create(fs.root, name)
    with refused(errno.ENAMETOOLONG):
        fs.mkdir(fs.root, name)
    with refused(errno.ENAMETOOLONG):
        fs.symlink(fs.root, name, "x")
    with refused(errno.ENAMETOOLONG):
        fs.mknod(fs.root, name, stat.S_IFREG | 0o600)
    with refused(errno.ENAMETOOLONG):
        fs.rename(fs.root, "a", fs.root, name)
    with refused(errno.ENAMETOOLONG):
        fs.link(entry.nodeid, fs.root, name)
    with refused(errno.ENAMETOOLONG):
        fs.unlink(fs.root, name)
    assert os.listdir(share.path) == ["a"]


# ---- making and removing ------------------------------------------------------------------------------


def test_mkdir_makes_a_directory_with_its_mode(share: Share, fs: FuseClient) -> None:
    entry = fs.mkdir(fs.root, "dir", 0o750)
    assert stat.S_ISDIR(entry.attr.mode)
    assert stat.S_IMODE((share.path / "dir").stat().st_mode) == 0o750
    assert entry.attr.nlink == 2


def test_mkdir_over_anything_is_eexist(share: Share, fs: FuseClient) -> None:
    (share.path / "file").touch()
    (share.path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with refused(errno.EEXIST):
            fs.mkdir(fs.root, name)


def test_mknod_makes_files_fifos_sockets_and_devices(share: Share, fs: FuseClient, needs_root: None) -> None:
    fs.mknod(fs.root, "file", stat.S_IFREG | 0o604)
    fs.mknod(fs.root, "fifo", stat.S_IFIFO | 0o600)
    fs.mknod(fs.root, "socket", stat.S_IFSOCK | 0o600)
    # The guest's encoding of a device number (new_encode_dev): minor in bits 0-7 and 20-31, major in 8-19.
    entry = fs.mknod(fs.root, "device", stat.S_IFCHR | 0o600, 0x12 | 0x345 << 8 | 0x6 << 20)
    assert stat.S_IMODE((share.path / "file").stat().st_mode) == 0o604
    assert stat.S_ISFIFO((share.path / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((share.path / "socket").stat().st_mode)
    device = (share.path / "device").stat().st_rdev
    assert (os.major(device), os.minor(device)) == (0x345, 0x612)
    assert entry.attr.rdev == 0x12 | 0x345 << 8 | 0x6 << 20


def test_a_symlink_keeps_its_target_as_it_is(share: Share, fs: FuseClient) -> None:
    for i, target in enumerate((b"/etc/passwd", b"../../..", b"\xff\n", b"t" * 4095)):
        entry = fs.symlink(fs.root, f"link{i}", target)
        assert stat.S_ISLNK(entry.attr.mode)
        assert fs.readlink(entry.nodeid) == target
        assert os.readlink(os.fsencode(share.path / f"link{i}")) == target
        assert entry.attr.size == len(target)


def test_readlink_of_what_is_no_symlink_is_refused(fs: FuseClient) -> None:
    with refused(errno.EINVAL, errno.ENOENT):
        fs.readlink(fs.write_file(fs.root, "a", b"").nodeid)


def test_unlink_removes_the_name(share: Share, fs: FuseClient) -> None:
    fs.write_file(fs.root, "a", b"x")
    fs.unlink(fs.root, "a")
    assert os.listdir(share.path) == []
    with refused(errno.ENOENT):
        fs.unlink(fs.root, "a")


def test_unlink_and_rmdir_each_refuse_the_other_kind(share: Share, fs: FuseClient) -> None:
    (share.path / "dir").mkdir()
    (share.path / "file").touch()
    with refused(errno.EISDIR):
        fs.unlink(fs.root, "dir")
    with refused(errno.ENOTDIR):
        fs.rmdir(fs.root, "file")


def test_rmdir_takes_only_empty_directories(share: Share, fs: FuseClient) -> None:
    (share.path / "dir").mkdir()
    (share.path / "dir" / "x").touch()
    with refused(errno.ENOTEMPTY):
        fs.rmdir(fs.root, "dir")
    (share.path / "dir" / "x").unlink()
    fs.rmdir(fs.root, "dir")
    assert os.listdir(share.path) == []


def test_creating_in_a_removed_directory_is_enoent(share: Share, fs: FuseClient) -> None:
    directory = fs.mkdir(fs.root, "dir")
    fs.rmdir(fs.root, "dir")
    with refused(errno.ENOENT, errno.ESTALE):
        fs.create(directory.nodeid, "x")


# ---- renaming -----------------------------------------------------------------------------------------


def test_rename_moves_and_replaces(share: Share, fs: FuseClient) -> None:
    moved = fs.write_file(fs.root, "a", b"new")
    fs.write_file(fs.root, "b", b"old")
    directory = fs.mkdir(fs.root, "dir")
    fs.rename(fs.root, "a", fs.root, "b")
    assert (share.path / "b").read_bytes() == b"new"
    fs.rename(fs.root, "b", directory.nodeid, "c")
    assert (share.path / "dir" / "c").read_bytes() == b"new"
    assert fs.walk("dir/c").nodeid == moved.nodeid


def test_a_nodeid_follows_its_object_through_renames(share: Share, fs: FuseClient) -> None:
    outer = fs.mkdir(fs.root, "outer")
    inner = fs.mkdir(outer.nodeid, "inner")
    os.rename(share.path / "outer", share.path / "elsewhere")
    fs.write_file(inner.nodeid, "x", b"1")
    assert (share.path / "elsewhere" / "inner" / "x").read_bytes() == b"1"


def test_rename_of_what_is_missing_is_enoent(fs: FuseClient) -> None:
    with refused(errno.ENOENT):
        fs.rename(fs.root, "a", fs.root, "b")


def test_a_directory_cannot_be_moved_into_itself(fs: FuseClient) -> None:
    directory = fs.mkdir(fs.root, "dir")
    with refused(errno.EINVAL):
        fs.rename(fs.root, "dir", directory.nodeid, "dir")


def test_noreplace_leaves_an_existing_target_alone(share: Share, fs: FuseClient) -> None:
    fs.write_file(fs.root, "a", b"a")
    fs.write_file(fs.root, "b", b"b")
    with refused(errno.EEXIST):
        fs.rename2(fs.root, "a", fs.root, "b", RENAME_NOREPLACE)
    fs.rename2(fs.root, "a", fs.root, "c", RENAME_NOREPLACE)
    assert sorted(os.listdir(share.path)) == ["b", "c"]
    assert (share.path / "b").read_bytes() == b"b"


def test_exchange_swaps_two_names(share: Share, fs: FuseClient) -> None:
    fs.write_file(fs.root, "a", b"a")
    directory = fs.mkdir(fs.root, "dir")
    fs.rename2(fs.root, "a", fs.root, "dir", RENAME_EXCHANGE)
    assert (share.path / "dir").read_bytes() == b"a"
    assert (share.path / "a").is_dir()
    assert fs.lookup(fs.root, "a").nodeid == directory.nodeid
    with refused(errno.ENOENT):
        fs.rename2(fs.root, "a", fs.root, "missing", RENAME_EXCHANGE)


def test_whiteout_leaves_a_character_device_behind(share: Share, fs: FuseClient, needs_root: None) -> None:
    fs.write_file(fs.root, "a", b"a")
    fs.rename2(fs.root, "a", fs.root, "b", RENAME_WHITEOUT)
    left = (share.path / "a").stat()
    assert stat.S_ISCHR(left.st_mode)
    assert left.st_rdev == 0
    assert (share.path / "b").read_bytes() == b"a"


def test_rename_flags_that_contradict_or_are_unknown_are_einval(share: Share, fs: FuseClient) -> None:
    fs.write_file(fs.root, "a", b"a")
    fs.write_file(fs.root, "b", b"b")
    for flags in (RENAME_NOREPLACE | RENAME_EXCHANGE, 8, 0x80000000):
        with refused(errno.EINVAL):
            fs.rename2(fs.root, "a", fs.root, "b", flags)
    assert (share.path / "b").read_bytes() == b"b"


# ---- what the host does meanwhile ---------------------------------------------------------------------


def test_what_the_host_changes_is_seen_by_the_next_lookup(share: Share, fs: FuseClient) -> None:
    path = share.path / "a"
    path.write_text("1")
    first = fs.lookup(fs.root, "a")
    os.replace(path, share.path / "b")
    path.mkdir()
    second = fs.lookup(fs.root, "a")
    assert second.nodeid != first.nodeid
    assert stat.S_ISDIR(second.attr.mode)
    assert fs.lookup(fs.root, "b").nodeid == first.nodeid


def test_nothing_is_left_open_for_forgotten_inodes(make_share: MakeShare, ours: None) -> None:
    share = make_share("--inode-file-handles=never", private=True)
    fs = share.mount()
    before = share.server.descriptors()
    nodes = []
    for i in range(300):
        (share.path / str(i)).touch()
        nodes.append(fs.lookup(fs.root, str(i)).nodeid)
    assert share.server.descriptors() >= before + 300
    fs.batch_forget([(nodeid, 1) for nodeid in nodes])
    assert awaited(lambda: share.server.descriptors() <= before)
