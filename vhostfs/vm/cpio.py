# SPDX-License-Identifier: Apache-2.0
"""Writes initramfs archives: a tree of files in memory becomes a cpio archive in "newc" format.

Must not know where the files come from. Needs no privilege: owners and device nodes are only numbers here.
Specification: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import posixpath
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from vhostfs.vm.errors import VmError

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGNMENT = 4
# Debian's merged /usr: packages may still ship files under the old top-level folders.
_MERGED = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "lib32": "usr/lib32"}


@dataclass(frozen=True, slots=True)
class Node:
    """One file of the tree. `data` is the content of a regular file or the target of a symbolic link."""

    mode: int
    data: bytes = b""
    uid: int = 0
    gid: int = 0
    mtime_s: int = 0
    device: tuple[int, int] = (0, 0)


def merged_path(path: str) -> str:
    """`path` without leading "./" or "/", below /usr where Debian's merged /usr puts it; "" is the root.

    Raises ValueError for a path that leaves the tree.
    """
    clean = posixpath.normpath("/" + path).lstrip("/")
    if ".." in path.split("/"):
        raise ValueError(f"path {path!r} has a '..'")
    first, slash, rest = clean.partition("/")
    return f"{_MERGED[first]}{slash}{rest}" if first in _MERGED else clean


@dataclass(slots=True)
class Tree:
    """Files by path (no leading slash), and hard links by path to the path that they share their file
    with."""

    nodes: dict[str, Node] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    @classmethod
    def with_merged_usr(cls) -> Tree:
        """A tree that has the top-level folders' links into /usr and nothing else."""
        tree = cls()
        for name, target in _MERGED.items():
            tree.add_directory(target)
            tree.nodes[name] = Node(stat.S_IFLNK | 0o777, target.encode())
        return tree

    def __contains__(self, path: str) -> bool:
        return path in self.nodes or path in self.links

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        """Adds a directory and those above it; one that is there keeps its mode."""
        self._add_parents(path)
        self.nodes.setdefault(path, Node(stat.S_IFDIR | mode))

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a regular file owned by root, in place of what was there."""
        self._put(merged_path(path), Node(stat.S_IFREG | mode, data))

    def add_symlink(self, path: str, target: str) -> None:
        """Adds a symbolic link, in place of what was there."""
        self._put(merged_path(path), Node(stat.S_IFLNK | 0o777, target.encode()))

    def add_device(self, path: str, mode: int, major: int, minor: int) -> None:
        """Adds a device node; `mode` carries its type."""
        self._put(merged_path(path), Node(mode, device=(major, minor)))

    def add_tar(self, stream: tarfile.TarFile, unwanted: tuple[str, ...] = ()) -> None:
        """Adds every member of an open tar stream but those below an `unwanted` path prefix
        ("usr/share/doc/")."""
        for member in stream:
            path = merged_path(member.name)
            if not path or path.startswith(unwanted):
                continue
            if member.islnk():
                target = merged_path(member.linkname)
                if target in self and target != path:
                    target = self.links.get(target, target)
                    self._put(path, self.nodes[target])
                    del self.nodes[path]
                    self.links[path] = target
                continue
            self._add_tar_member(path, member, stream)

    def _add_tar_member(self, path: str, member: tarfile.TarInfo, stream: tarfile.TarFile) -> None:
        data = b""
        if member.isdir():
            kind = stat.S_IFDIR
            if path in self.nodes:
                return
        elif member.isreg():
            kind = stat.S_IFREG
            content = stream.extractfile(member)
            data = content.read() if content else b""
        elif member.issym():
            kind, data = stat.S_IFLNK, member.linkname.encode()
        elif member.isfifo():
            kind = stat.S_IFIFO
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        else:
            raise VmError(f"{member.name} in a package is of a kind that an initramfs cannot hold")
        self._put(
            path,
            Node(
                kind | (member.mode & 0o7777),
                data,
                member.uid,
                member.gid,
                int(member.mtime),
                (member.devmajor, member.devminor) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
            ),
        )

    def _put(self, path: str, node: Node) -> None:
        self._add_parents(path)
        self.links.pop(path, None)
        heirs = [link for link, target in self.links.items() if target == path]
        if heirs:
            # The file lives on under its other names.
            first = heirs[0]
            del self.links[first]
            self.nodes[first] = self.nodes[path]
            self.links.update(dict.fromkeys(heirs[1:], first))
        self.nodes[path] = node

    def _add_parents(self, path: str) -> None:
        parent = posixpath.dirname(path)
        while parent and parent not in self.nodes:
            self.nodes[parent] = Node(stat.S_IFDIR | 0o755)
            parent = posixpath.dirname(parent)


def encode_entry(path: str, node: Node, inode: int, link_count: int, data: bytes) -> bytes:
    """One archive member: 110 bytes of header in hexadecimal, the name, the data, each padded to four
    bytes."""
    name = path.encode("utf-8", "surrogateescape") + b"\0"
    fields = (
        inode,
        node.mode,
        node.uid,
        node.gid,
        link_count,
        node.mtime_s,
        len(data),
        0,  # device of the archive's own file system
        0,
        *node.device,
        len(name),
        0,  # checksum, unused in this format
    )
    if any(not 0 <= value <= 0xFFFFFFFF for value in fields):
        raise VmError(f"{path} does not fit into an initramfs archive (a file of more than 4 GiB?)")
    header = _MAGIC + b"".join(b"%08x" % value for value in fields)
    return _padded(header + name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def write_archive(tree: Tree, output: BinaryIO) -> None:
    """Writes the whole tree: parents before what is in them, the name that carries the data before its hard
    links."""
    for chunk in _archive(tree):
        output.write(chunk)


def _archive(tree: Tree) -> Iterator[bytes]:
    link_counts = Counter(tree.links.values())
    numbers = {path: number for number, path in enumerate(sorted(tree.nodes), start=1)}
    # Sorted order has every directory before its content.
    for path, number in numbers.items():
        node = tree.nodes[path]
        count = 2 if stat.S_ISDIR(node.mode) else 1 + link_counts[path]
        yield encode_entry(path, node, number, count, node.data)
    for link, target in sorted(tree.links.items()):
        yield encode_entry(link, tree.nodes[target], numbers[target], 1 + link_counts[target], b"")
    yield encode_entry(_TRAILER, Node(0), 0, 1, b"")
