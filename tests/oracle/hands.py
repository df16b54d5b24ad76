# SPDX-License-Identifier: Apache-2.0
"""Hands that do to a directory what a script says; two pairs do the same to two directories.

Must not know who watches. Specification: script.OPERATIONS; docs/oracle.md, "Scripts".
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.oracle.script import Op

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_AT_SYMLINK_NOFOLLOW = 0x100
_O_TMPFILE = 0o20200000
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


Place = tuple[int, str]
"""A directory's inode number, and a name in it."""
Rename = tuple[int, Place, Place]
"""Of which inode, from where, to where."""


class Hands:
    """One directory, and the files that are kept open in it by slot."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._slots: dict[str, int] = {}
        self._done = 0

    def do(self, op: Op) -> int:
        """The errno, 0 when it was done."""
        self._done += 1
        action: Callable[..., None] = getattr(self, f"_{op.kind}")
        try:
            action(*op.arguments)
        except OSError as error:
            assert error.errno is not None
            return error.errno
        return 0

    def close_all(self) -> None:
        """Ends what is still open."""
        while self._slots:
            os.close(self._slots.popitem()[1])

    def ended_by(self, op: Op) -> tuple[int, int] | None:
        """(device, inode) of what loses its last name by `op`, once it is done and succeeds."""
        at = {"unlink": 0, "rmdir": 0, "rename": 1}.get(op.kind)
        if at is None:
            return None
        try:
            states = [os.lstat(self._at(path)) for path in op.arguments]
        except OSError:
            return None
        identities = [(state.st_dev, state.st_ino) for state in states]
        is_last = stat.S_ISDIR(states[at].st_mode) or states[at].st_nlink == 1
        return identities[at] if is_last and identities.count(identities[at]) == 1 else None

    def renames_by(self, op: Op) -> list[Rename]:
        """What `op` renames, once it is done and succeeds."""
        if op.kind not in ("rename", "noreplace", "exchange"):
            return []
        try:
            places = [self._place(path) for path in op.arguments]
            renames = [(os.lstat(self._at(op.arguments[0])).st_ino, places[0], places[1])]
            if op.kind == "exchange":
                renames.append((os.lstat(self._at(op.arguments[1])).st_ino, places[1], places[0]))
        except OSError:
            return []
        return renames

    def _place(self, path: str) -> Place:
        parent, name = os.path.split(self._at(path))
        return os.lstat(parent).st_ino, name

    def _at(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _open_at(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags | _FLAGS, 0o644)

    def _regular(self, path: str) -> None:
        # truncate(2) and others follow symlinks, and a FIFO's data is nobody's.
        if not stat.S_ISREG(os.lstat(self._at(path)).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")

    def _not_a_link(self, path: str) -> None:
        if stat.S_ISLNK(os.lstat(self._at(path)).st_mode):
            raise OSError(errno.ELOOP, "a symlink")

    # ---- names -----------------------------------------------------------------------------------------

    def _mkdir(self, path: str) -> None:
        os.mkdir(self._at(path))

    def _file(self, path: str) -> None:
        os.close(self._open_at(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    def _mknod(self, path: str) -> None:
        os.mknod(self._at(path))

    def _fifo(self, path: str) -> None:
        os.mkfifo(self._at(path))

    def _bind(self, path: str) -> None:
        directory, name = os.path.split(self._at(path))
        fd = os.open(directory, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.close(fd)

    def _symlink(self, path: str) -> None:
        os.symlink("nowhere", self._at(path))

    def _link(self, old: str, new: str) -> None:
        os.link(self._at(old), self._at(new), follow_symlinks=False)

    def _tmplink(self, path: str) -> None:
        directory = os.path.dirname(self._at(path))
        fd = os.open(directory, _O_TMPFILE | os.O_WRONLY, 0o644)
        try:
            # With a descriptor, which an absolute path has no need of, this is linkat(2), which can follow.
            os.link(f"/proc/self/fd/{fd}", self._at(path), src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)

    def _unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def _rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def _rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))

    def _renameat2(self, old: str, new: str, flags: int) -> None:
        paths = os.fsencode(self._at(old)), os.fsencode(self._at(new))
        _checked(_LIBC.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags))

    def _noreplace(self, old: str, new: str) -> None:
        self._renameat2(old, new, _RENAME_NOREPLACE)

    def _exchange(self, old: str, new: str) -> None:
        self._renameat2(old, new, _RENAME_EXCHANGE)

    # ---- content ---------------------------------------------------------------------------------------

    def _write_with(self, path: str, flags: int) -> None:
        self._regular(path)
        fd = self._open_at(path, os.O_WRONLY | flags)
        try:
            os.write(fd, b"content")
        finally:
            os.close(fd)

    def _write(self, path: str) -> None:
        self._write_with(path, 0)

    def _rewrite(self, path: str) -> None:
        self._write_with(path, os.O_TRUNC)

    def _truncate(self, path: str) -> None:
        self._regular(path)
        os.truncate(self._at(path), self._done % 7)

    def _allocate(self, path: str) -> None:
        self._regular(path)
        fd = self._open_at(path, os.O_WRONLY)
        try:
            os.posix_fallocate(fd, 0, 4096)
        finally:
            os.close(fd)

    def _copy(self, source: str, target: str) -> None:
        self._regular(source)
        self._regular(target)
        reader = self._open_at(source, os.O_RDONLY)
        writer = -1
        try:
            writer = self._open_at(target, os.O_WRONLY)
            os.copy_file_range(reader, writer, 4)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)

    def _mapwrite(self, path: str) -> None:
        self._regular(path)
        fd = self._open_at(path, os.O_RDWR)
        try:
            size = os.fstat(fd).st_size
            if size:
                with mmap.mmap(fd, size) as mapping:
                    mapping[0:1] = b"X"
                    mapping.flush()
        finally:
            os.close(fd)

    def _read(self, path: str) -> None:
        self._regular(path)
        fd = self._open_at(path, os.O_RDONLY)
        try:
            os.read(fd, 100)
        finally:
            os.close(fd)

    def _list(self, path: str) -> None:
        fd = self._open_at(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.listdir(fd)
        finally:
            os.close(fd)

    def _program(self, path: str) -> None:
        fd = os.open(self._at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY | _FLAGS, 0o755)
        try:
            os.write(fd, b"#!/bin/true\n")
        finally:
            os.close(fd)

    def _execute(self, path: str) -> None:
        self._regular(path)
        subprocess.run([self._at(path)], check=False)

    # ---- attributes ------------------------------------------------------------------------------------

    def _chmod(self, path: str) -> None:
        self._not_a_link(path)
        os.chmod(self._at(path), 0o700 | self._done % 8)

    def _chown(self, path: str) -> None:
        os.chown(self._at(path), os.geteuid(), os.getegid(), follow_symlinks=False)

    def _utime(self, path: str) -> None:
        os.utime(self._at(path), follow_symlinks=False)

    def _one_time(self, path: str, first: int, second: int) -> None:
        times = (_Timespec * 2)(_Timespec(0, first), _Timespec(0, second))
        _checked(_LIBC.utimensat(_AT_FDCWD, os.fsencode(self._at(path)), times, _AT_SYMLINK_NOFOLLOW))

    def _atime(self, path: str) -> None:
        self._one_time(path, _UTIME_NOW, _UTIME_OMIT)

    def _mtime(self, path: str) -> None:
        self._one_time(path, _UTIME_OMIT, _UTIME_NOW)

    def _setxattr(self, path: str) -> None:
        os.setxattr(self._at(path), "user.oracle", b"%d" % self._done, follow_symlinks=False)

    def _rmxattr(self, path: str) -> None:
        os.removexattr(self._at(path), "user.oracle", follow_symlinks=False)

    # ---- kept open -------------------------------------------------------------------------------------

    def _keep(self, slot: str, path: str, flags: int) -> None:
        if slot in self._slots:
            raise OSError(errno.EBUSY, "the slot is in use")
        self._regular(path)
        self._slots[slot] = self._open_at(path, flags)

    def _open(self, slot: str, path: str) -> None:
        self._keep(slot, path, os.O_RDWR)

    def _openr(self, slot: str, path: str) -> None:
        self._keep(slot, path, os.O_RDONLY)

    def _slot(self, slot: str) -> int:
        if slot not in self._slots:
            raise OSError(errno.EBADF, "the slot is empty")
        return self._slots[slot]

    def _put(self, slot: str) -> None:
        os.pwrite(self._slot(slot), b"more", 0)

    def _get(self, slot: str) -> None:
        os.pread(self._slot(slot), 4, 0)

    def _close(self, slot: str) -> None:
        os.close(self._slot(slot))
        del self._slots[slot]
