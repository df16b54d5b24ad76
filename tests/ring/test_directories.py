# SPDX-License-Identifier: Apache-2.0
"""Directories read: readdir, readdirplus, seeking, big directories, handles.

Must not test creation of names. Specification: fuse.h (fuse_dirent, fuse_direntplus).
"""

from __future__ import annotations

import errno
import os
import stat

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import FuseClient, FuseError, InitFlag


def _fill(share: Share, count: int) -> set[bytes]:
    for i in range(count):
        os.close(os.open(share.path / f"file-{i:05}", os.O_CREAT | os.O_WRONLY))
    return {f"file-{i:05}".encode() for i in range(count)}


def test_a_directory_lists_its_names_with_dots(share: Share, fs: FuseClient) -> None:
    names = _fill(share, 10)
    fh = fs.opendir(fs.root).fh
    assert {entry.name for entry in fs.entries(fs.root, fh)} == names | {b".", b".."}
    fs.releasedir(fs.root, fh)


def test_entries_carry_type_and_inode_number(share: Share, fs: FuseClient) -> None:
    (share.path / "dir").mkdir()
    (share.path / "file").touch()
    (share.path / "link").symlink_to("x")
    fh = fs.opendir(fs.root).fh
    found = {entry.name: entry for entry in fs.readdir(fs.root, fh)}
    for name, kind in ((b"dir", stat.S_IFDIR), (b"file", stat.S_IFREG), (b"link", stat.S_IFLNK)):
        assert found[name].kind == kind >> 12
        assert found[name].ino == (share.path / name.decode()).lstat().st_ino


def test_an_empty_directory_has_only_dots(fs: FuseClient) -> None:
    node = fs.mkdir(fs.root, "dir").nodeid
    fh = fs.opendir(node).fh
    assert {entry.name for entry in fs.entries(node, fh)} <= {b".", b".."}


def test_fifty_thousand_names_come_once_each(share: Share, fs: FuseClient) -> None:
    names = _fill(share, 50_000)
    listed = fs.list(fs.root)
    assert len(listed) == 50_000
    assert set(listed) == names


def test_a_read_can_go_on_from_every_offset(share: Share, fs: FuseClient) -> None:
    _fill(share, 500)
    fh = fs.opendir(fs.root).fh
    order = list(fs.entries(fs.root, fh, 1024))
    for i in range(0, len(order) - 1, 37):
        rest = fs.readdir(fs.root, fh, order[i].offset)
        assert rest[0].name == order[i + 1].name
    assert fs.readdir(fs.root, fh, order[-1].offset) == []
    assert next(iter(fs.entries(fs.root, fh))).name == order[0].name


def test_rewinding_shows_what_has_changed(share: Share, fs: FuseClient) -> None:
    fh = fs.opendir(fs.root).fh
    assert b"new" not in {entry.name for entry in fs.entries(fs.root, fh)}
    (share.path / "new").touch()
    assert b"new" in {entry.name for entry in fs.entries(fs.root, fh)}


def test_names_stay_complete_while_others_come_and_go(share: Share, fs: FuseClient) -> None:
    names = _fill(share, 2000)
    fh = fs.opendir(fs.root).fh
    seen: list[bytes] = []
    for i, entry in enumerate(fs.entries(fs.root, fh, 512)):
        seen.append(entry.name)
        if i % 100 == 0:
            (share.path / f"other{i}").touch()
            if i >= 100:
                (share.path / f"other{i - 100}").unlink()
    kept = [name for name in seen if name.startswith(b"file-")]
    assert len(kept) == len(set(kept))
    assert set(kept) == names


def test_a_buffer_too_small_for_one_entry_is_einval_or_empty(share: Share, fs: FuseClient) -> None:
    (share.path / ("n" * 255)).touch()
    fh = fs.opendir(fs.root).fh
    for size in (0, 8, 24):
        try:
            assert fs.readdir(fs.root, fh, 0, size) == []
        except OSError as error:
            number = error.errno
            assert number == errno.EINVAL


def test_replies_never_exceed_the_size_asked_for(share: Share, fs: FuseClient) -> None:
    """The reply's buffer may be larger than the size in the request; the session checks the room itself."""
    names = _fill(share, 100)
    fh = fs.opendir(fs.root).fh
    found: set[bytes] = set()
    offset = 0
    for size in (60, 100, 333, 1000, 4000, 100_000, 100_000):
        batch = fs.readdir(fs.root, fh, offset, size)
        if not batch:
            break
        assert sum(-(-(24 + len(entry.name)) // 8) * 8 for entry in batch) <= size
        found |= {entry.name for entry in batch}
        offset = batch[-1].offset
    assert found - {b".", b".."} == names


def test_readdirplus_is_readdir_and_lookup_in_one(share: Share, fs: FuseClient) -> None:
    assert fs.session.flags & InitFlag.DO_READDIRPLUS
    _fill(share, 20)
    (share.path / "dir").mkdir()
    fh = fs.opendir(fs.root).fh
    found = {item.dirent.name: item for item in fs.readdirplus(fs.root, fh, 0, 65536)}
    assert len(found) == 23
    for name, item in found.items():
        if name in (b".", b".."):
            assert item.entry.nodeid == 0
            continue
        again = fs.lookup(fs.root, name)
        assert (item.entry.nodeid, item.entry.generation) == (again.nodeid, again.generation)
        assert item.entry.attr.ino == item.dirent.ino == (share.path / name.decode()).stat().st_ino


def test_readdirplus_counts_a_lookup_for_every_entry(share: Share, fs: FuseClient, ours: None) -> None:
    _fill(share, 5)
    fh = fs.opendir(fs.root).fh
    nodes = [item.entry.nodeid for item in fs.readdirplus(fs.root, fh, 0, 65536) if item.entry.nodeid]
    fs.readdirplus(fs.root, fh, 0, 65536)
    for nodeid in nodes:
        fs.forget(nodeid)
        fs.getattr(nodeid)
        fs.forget(nodeid)
        with refused(errno.ESTALE):
            fs.getattr(nodeid)


def test_entries_that_do_not_fit_are_not_counted(share: Share, fs: FuseClient, ours: None) -> None:
    """A lookup count for an entry that was not sent would never be forgotten."""
    _fill(share, 200)
    fh = fs.opendir(fs.root).fh
    offset, nodes = 0, []
    while batch := fs.readdirplus(fs.root, fh, offset, 1000):
        nodes += [item.entry.nodeid for item in batch if item.entry.nodeid]
        offset = batch[-1].dirent.offset
    assert len(set(nodes)) == len(nodes) == 200
    fs.batch_forget([(nodeid, 1) for nodeid in nodes])
    for nodeid in nodes:
        with refused(errno.ESTALE):
            fs.getattr(nodeid)


def test_readdirplus_of_a_directory_whose_files_vanish_goes_on(share: Share, fs: FuseClient) -> None:
    names = _fill(share, 300)
    fh = fs.opendir(fs.root).fh
    first = fs.readdirplus(fs.root, fh, 0, 2000)
    for name in sorted(names)[::2]:
        (share.path / name.decode()).unlink()
    offset = first[-1].dirent.offset
    seen = {item.dirent.name for item in first}
    while batch := fs.readdirplus(fs.root, fh, offset, 8000):
        seen |= {item.dirent.name for item in batch}
        offset = batch[-1].dirent.offset
    assert {name.decode() for name in seen if name.startswith(b"file-")} >= set(os.listdir(share.path))


def test_no_readdirplus_is_respected(make_share: MakeShare) -> None:
    fs = make_share("--no-readdirplus").mount()
    assert not fs.session.flags & (InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO)


def test_opendir_of_a_file_is_enotdir(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"")
    with refused(errno.ENOTDIR):
        fs.opendir(entry.nodeid)


def test_fsyncdir_answers(fs: FuseClient) -> None:
    fh = fs.opendir(fs.root).fh
    fs.fsyncdir(fs.root, fh)
    fs.fsyncdir(fs.root, fh, data_only=True)
    fs.releasedir(fs.root, fh)


def test_directory_handles_are_checked(share: Share, fs: FuseClient, ours: None) -> None:
    entry, opened = fs.create(fs.root, "a")
    fh = fs.opendir(fs.root).fh
    with refused(errno.EBADF):
        fs.readdir(entry.nodeid, fh)
    with refused(errno.EBADF, errno.ENOTDIR):
        fs.readdir(entry.nodeid, opened.fh)
    fs.releasedir(fs.root, fh)
    with refused(errno.EBADF):
        fs.readdir(fs.root, fh)


def test_a_removed_directory_reads_as_empty(share: Share, fs: FuseClient) -> None:
    node = fs.mkdir(fs.root, "dir").nodeid
    fh = fs.opendir(node).fh
    (share.path / "dir").rmdir()
    # Natively getdents fails with ENOENT there; an empty answer is as good.
    try:
        names = {entry.name for entry in fs.entries(node, fh)}
    except FuseError as error:
        names = set() if error.errno == errno.ENOENT else {b"?"}
    assert names <= {b".", b".."}


def test_two_readers_of_one_directory_do_not_disturb_each_other(share: Share, fs: FuseClient) -> None:
    names = _fill(share, 300)
    one, two = fs.opendir(fs.root).fh, fs.opendir(fs.root).fh
    readers = [fs.entries(fs.root, one, 512), fs.entries(fs.root, two, 777)]
    seen: list[set[bytes]] = [set(), set()]
    while readers[0] is not None:
        items = [next(reader, None) for reader in readers]
        if items == [None, None]:
            break
        for found, item in zip(seen, items, strict=True):
            if item is not None:
                found.add(item.name)
    assert seen[0] - {b".", b".."} == seen[1] - {b".", b".."} == names
