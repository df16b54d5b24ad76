# SPDX-License-Identifier: Apache-2.0
"""The FUSE operations that Python decides, on a tree in memory."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from vhostfs.fuse import operations
from vhostfs.fuse.abi import Opcode
from vhostfs.fuse.init import SessionOptions
from vhostfs.fuse.operations import Operations


@dataclass(frozen=True)
class FakeRequest:
    opcode: int
    args: bytes = b""
    nodeid: int = 1


class FakeTree:
    """Sessions as a list; one open file, fh 5."""

    def __init__(self, file: Path | None = None) -> None:
        self.sessions: list[tuple[int, int] | None] = []
        self._file = file

    def start_session(self, init_flags: int, max_write_bytes: int) -> None:
        self.sessions.append((init_flags, max_write_bytes))

    def end_session(self) -> None:
        self.sessions.append(None)

    def open_inode(self, nodeid: int) -> int:
        raise OSError(errno.ESTALE, "no such inode")

    def open_file(self, nodeid: int, fh: int) -> int:
        if fh != 5 or self._file is None:
            raise OSError(errno.EBADF, "no such file")
        return os.open(self._file, os.O_RDONLY)


def run(tree: FakeTree, opcode: int, args: bytes = b"", *, readonly: bool = False) -> bytes:
    table = Operations(tree, SessionOptions(), readonly=readonly).table
    return table[opcode](FakeRequest(opcode, args))


def init_args(major: int = 7, minor: int = 38, flags: int = 0) -> bytes:
    return struct.pack("<IIIIII40x", major, minor, 131072, flags, 0, 0)


def ioctl_args(cmd: int, *, data: bytes = b"", out_size: int = 0, fh: int = 5) -> bytes:
    return struct.pack("<QIIQII", fh, 0, cmd, 0, len(data), out_size) + data


def failure(tree: FakeTree, opcode: int, args: bytes, *, readonly: bool = False) -> int | None:
    with pytest.raises(OSError) as caught:
        run(tree, opcode, args, readonly=readonly)
    return caught.value.errno


def test_init_begins_a_session_with_the_flags_granted() -> None:
    tree = FakeTree()
    reply = run(tree, Opcode.INIT, init_args(flags=1 | 1 << 22))
    assert len(reply) == 64
    assert tree.sessions == [(1 | 1 << 22, 1 << 20)]


def test_init_with_a_newer_major_begins_nothing() -> None:
    tree = FakeTree()
    assert run(tree, Opcode.INIT, init_args(major=8))[:4] == b"\x07\0\0\0"
    assert tree.sessions == []


@pytest.mark.parametrize(
    ("args", "number"), [(b"", errno.EINVAL), (bytes(15), errno.EINVAL), (init_args(minor=26), errno.EPROTO)]
)
def test_an_init_that_cannot_be_served_begins_nothing(args: bytes, number: int) -> None:
    tree = FakeTree()
    assert failure(tree, Opcode.INIT, args) == number
    assert tree.sessions == []


def test_destroy_ends_the_session() -> None:
    tree = FakeTree()
    assert run(tree, Opcode.DESTROY) == b""
    assert tree.sessions == [None]


@pytest.mark.parametrize("cmd", [0x5401, 0x40049409, 0x80087601, 0, 0xFFFFFFFF])
def test_other_ioctls_are_for_other_devices(cmd: int, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert failure(FakeTree(tmp_path / "f"), Opcode.IOCTL, ioctl_args(cmd, out_size=64)) == errno.ENOTTY


@pytest.mark.parametrize(
    "args",
    [
        b"",
        bytes(31),
        ioctl_args(operations.FS_IOC_GETFLAGS, out_size=3),
        ioctl_args(operations.FS_IOC_FSGETXATTR, out_size=27),
        ioctl_args(operations.FS_IOC_SETFLAGS, data=b"abc"),
        ioctl_args(operations.FS_IOC_SETFLAGS, data=b"abcd")[:-1],
    ],
)
def test_an_ioctl_with_wrong_sizes_is_refused(args: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert failure(FakeTree(tmp_path / "f"), Opcode.IOCTL, args) == errno.EINVAL


@pytest.mark.parametrize("cmd", [operations.FS_IOC_SETFLAGS, operations.FS_IOC_FSSETXATTR])
def test_a_read_only_share_keeps_its_attributes(cmd: int, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    args = ioctl_args(cmd, data=bytes(28))
    assert failure(FakeTree(tmp_path / "f"), Opcode.IOCTL, args, readonly=True) == errno.EROFS


def test_an_ioctl_on_a_file_that_is_not_open_is_refused() -> None:
    args = ioctl_args(operations.FS_IOC_GETFLAGS, out_size=4, fh=6)
    assert failure(FakeTree(), Opcode.IOCTL, args) == errno.EBADF


def test_attribute_flags_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    seen = []

    def ioctl(fd: int, number: int, buffer: bytearray) -> int:
        seen.append((number, bytes(buffer)))
        buffer[:4] = b"\x10\0\x08\0"
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    tree = FakeTree(tmp_path / "f")
    # The number declares a long, of which the kernel fills an int.
    assert run(tree, Opcode.IOCTL, ioctl_args(operations.FS_IOC_GETFLAGS, out_size=8))[
        16:
    ] == b"\x10\0\x08\0" + bytes(4)
    assert (
        run(tree, Opcode.IOCTL, ioctl_args(operations.FS_IOC32_GETFLAGS, out_size=4))[16:] == b"\x10\0\x08\0"
    )
    assert run(
        tree, Opcode.IOCTL, ioctl_args(operations.FS_IOC_SETFLAGS, data=b"\x20\0\0\0" + bytes(4))
    ) == bytes(16)
    assert seen == [
        (operations.FS_IOC_GETFLAGS, bytes(4)),
        (operations.FS_IOC_GETFLAGS, bytes(4)),
        (operations.FS_IOC_SETFLAGS, b"\x20\0\0\0"),
    ]
