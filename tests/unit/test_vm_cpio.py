# SPDX-License-Identifier: Apache-2.0
"""The initramfs writer: what it writes is read back field by field, and with cpio where it is installed.

Must not need root, network or QEMU.
Specification: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import io
import shutil
import stat
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.vm.cpio import Node, Tree, encode_entry, merged_path, write_archive
from vhostfs.vm.errors import VmError


@dataclass(frozen=True)
class Entry:
    name: str
    inode: int
    mode: int
    links: int
    data: bytes


def parse(archive: bytes) -> list[Entry]:
    entries: list[Entry] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        assert archive[at + 110 + fields[11] - 1] == 0
        at = (at + 110 + fields[11] + 3) & ~3
        data = archive[at : at + fields[6]]
        at = (at + fields[6] + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return entries
        entries.append(Entry(name, fields[0], fields[1], fields[4], data))


def written(tree: Tree) -> list[Entry]:
    output = io.BytesIO()
    write_archive(tree, output)
    return parse(output.getvalue())


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> tarfile.TarFile:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return tarfile.open(fileobj=buffer, mode="r|")


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info


def test_every_directory_comes_before_what_is_in_it() -> None:
    tree = Tree.with_merged_usr()
    tree.add_file("usr/share/deep/er/file", b"x")
    tree.add_file("a", b"")
    names = [entry.name for entry in written(tree)]
    for name in names:
        parent = name.rpartition("/")[0]
        assert not parent or names.index(parent) < names.index(name)


def test_files_of_the_old_top_level_folders_end_below_usr() -> None:
    tree = Tree.with_merged_usr()
    with tar_of(
        (member("./bin/tool", mode=0o4755), b"tool"), (member("./lib64", tarfile.SYMTYPE, "x"), b"")
    ) as tar:
        tree.add_tar(tar)
    entries = {entry.name: entry for entry in written(tree)}
    assert entries["usr/bin/tool"].data == b"tool"
    assert entries["usr/bin/tool"].mode == stat.S_IFREG | 0o4755
    assert entries["bin"].data == b"usr/bin"
    assert entries["lib64"].data == b"usr/lib64"


def test_hard_links_share_one_inode_and_the_data_comes_first() -> None:
    tree = Tree()
    with tar_of((member("./usr/z"), b"content"), (member("./usr/a", tarfile.LNKTYPE, "./usr/z"), b"")) as tar:
        tree.add_tar(tar)
    entries = [entry for entry in written(tree) if entry.name in ("usr/a", "usr/z")]
    assert [(entry.name, entry.data, entry.links) for entry in entries] == [
        ("usr/z", b"content", 2),
        ("usr/a", b"", 2),
    ]
    assert entries[0].inode == entries[1].inode


def test_a_replaced_file_lives_on_under_its_other_name() -> None:
    tree = Tree()
    with tar_of((member("one"), b"old"), (member("two", tarfile.LNKTYPE, "one"), b"")) as tar:
        tree.add_tar(tar)
    tree.add_file("one", b"new")
    content = {entry.name: (entry.data, entry.links) for entry in written(tree)}
    assert content == {"one": (b"new", 1), "two": (b"old", 1)}


def test_unwanted_folders_are_left_out() -> None:
    tree = Tree()
    with tar_of((member("./usr/share/doc/x/README"), b"text"), (member("./usr/share/docs"), b"kept")) as tar:
        tree.add_tar(tar, ("usr/share/doc/",))
    assert "usr/share/docs" in tree
    assert "usr/share/doc/x/README" not in tree


def test_a_file_too_large_for_the_format_is_refused() -> None:
    with pytest.raises(VmError, match="does not fit"):
        encode_entry("x", Node(stat.S_IFREG, mtime_s=1 << 33), 1, 1, b"")


@pytest.mark.parametrize("path", ["../etc/passwd", "usr/../../x", "/.."])
def test_a_path_that_leaves_the_tree_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="'\\.\\.'"):
        merged_path(path)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.binary(max_size=99), max_size=9))
def test_every_name_and_every_byte_is_kept(files: dict[str, bytes]) -> None:
    tree = Tree()
    for name, data in files.items():
        tree.add_file(f"d/{name}", data)
    found = {entry.name.removeprefix("d/"): entry.data for entry in written(tree) if stat.S_ISREG(entry.mode)}
    assert found == files


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the program cpio is not installed")
def test_the_systems_cpio_unpacks_it(tmp_path: Path) -> None:
    tree = Tree()
    tree.add_file("folder/file", b"odd length!", 0o640)
    tree.add_symlink("folder/link", "file")
    with (tmp_path / "archive").open("wb") as output:
        write_archive(tree, output)
    with (tmp_path / "archive").open("rb") as archive:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "folder/link").read_bytes() == b"odd length!"
    assert stat.S_IMODE((tmp_path / "folder/file").stat().st_mode) == 0o640
