# SPDX-License-Identifier: Apache-2.0
"""Every FUSE request as a value: opcode, node, arguments, room for the reply, and how to read it.

Knows nothing of queues or memory; `session` sends these, `client` is the same with one method each.
Specification: include/uapi/linux/fuse.h and fs/fuse of Linux for who sends what.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend.fuse_abi import Opcode, SetattrValid

T = TypeVar("T")
Name = str | bytes
NOTHING_MORE = SetattrValid(0)


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """One label for a new object, as FUSE_SECURITY_CTX carries it."""

    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. `payload` and `data_room` are bulk data, which a guest has in pages of their own."""

    opcode: int
    nodeid: int
    decode: Callable[[bytes], T]
    args: bytes = b""
    payload: Sequence[bytes | memoryview] = field(default=())
    reply_room: int = 0
    data_room: int = 0
    has_reply: bool = True
    creates: bool = False
    security: SecurityContext | None = None


def nothing(data: bytes) -> None:
    if data:
        raise ValueError(f"{len(data)} bytes of payload where none are expected")


def the_bytes(data: bytes) -> bytes:
    return data


def _u32(data: bytes) -> int:
    value, _ = struct.unpack("<II", data)
    return int(value)


def _u64(data: bytes) -> int:
    return int(struct.unpack("<Q", data)[0])


def encode(name: Name) -> bytes:
    """A name as it is sent, with its NUL; nothing is checked, so that wrong names can be sent."""
    return os.fsencode(name) + b"\0"


ENTRY_ROOM = abi.ENTRY_SIZE
ATTR_ROOM = abi.ATTR_HEAD.size + abi.ATTR.size


# ---- session ------------------------------------------------------------------------------------------


def init(
    flags: int = abi.LINUX_7_FLAGS,
    *,
    major: int = abi.MAJOR,
    minor: int = abi.MINOR,
    readahead: int = 128 << 10,
) -> Call[abi.InitReply]:
    low = flags & 0xFFFFFFFF
    if minor >= 36 and flags & abi.InitFlag.INIT_EXT:
        args = abi.INIT_IN.pack(major, minor, readahead, low, flags >> 32, *[0] * 11)
    else:
        args = abi.INIT_IN_OLD.pack(major, minor, readahead, low)
    return Call(Opcode.INIT, 0, abi.unpack_init, args, reply_room=abi.INIT_OUT.size)


def destroy() -> Call[None]:
    return Call(Opcode.DESTROY, 0, nothing)


def statfs(nodeid: int) -> Call[abi.Statfs]:
    return Call(Opcode.STATFS, nodeid, abi.unpack_statfs, reply_room=abi.STATFS_OUT.size)


def syncfs(nodeid: int) -> Call[None]:
    return Call(Opcode.SYNCFS, nodeid, nothing, bytes(8))


def interrupt(unique: int) -> Call[None]:
    return Call(Opcode.INTERRUPT, 0, nothing, struct.pack("<Q", unique), has_reply=False)


# ---- names --------------------------------------------------------------------------------------------


def lookup(parent: int, name: Name) -> Call[abi.Entry]:
    return Call(Opcode.LOOKUP, parent, abi.unpack_entry, encode(name), reply_room=ENTRY_ROOM)


def forget(nodeid: int, count: int = 1) -> Call[None]:
    return Call(Opcode.FORGET, nodeid, nothing, struct.pack("<Q", count), has_reply=False)


def batch_forget(items: Sequence[tuple[int, int]]) -> Call[None]:
    args = struct.pack("<II", len(items), 0) + b"".join(struct.pack("<QQ", *item) for item in items)
    return Call(Opcode.BATCH_FORGET, 0, nothing, args, has_reply=False)


def readlink(nodeid: int) -> Call[bytes]:
    return Call(Opcode.READLINK, nodeid, the_bytes, data_room=4096)


def symlink(
    parent: int, name: Name, target: Name, security: SecurityContext | None = None
) -> Call[abi.Entry]:
    args = encode(name) + encode(target)
    return Call(
        Opcode.SYMLINK,
        parent,
        abi.unpack_entry,
        args,
        reply_room=ENTRY_ROOM,
        creates=True,
        security=security,
    )


def mknod(
    parent: int, name: Name, mode: int, rdev: int = 0, umask: int = 0, security: SecurityContext | None = None
) -> Call[abi.Entry]:
    args = struct.pack("<IIII", mode, rdev, umask, 0) + encode(name)
    return Call(
        Opcode.MKNOD,
        parent,
        abi.unpack_entry,
        args,
        reply_room=ENTRY_ROOM,
        creates=True,
        security=security,
    )


def mkdir(
    parent: int, name: Name, mode: int = 0o755, umask: int = 0, security: SecurityContext | None = None
) -> Call[abi.Entry]:
    args = struct.pack("<II", mode, umask) + encode(name)
    return Call(
        Opcode.MKDIR,
        parent,
        abi.unpack_entry,
        args,
        reply_room=ENTRY_ROOM,
        creates=True,
        security=security,
    )


def unlink(parent: int, name: Name) -> Call[None]:
    return Call(Opcode.UNLINK, parent, nothing, encode(name))


def rmdir(parent: int, name: Name) -> Call[None]:
    return Call(Opcode.RMDIR, parent, nothing, encode(name))


def rename(parent: int, name: Name, new_parent: int, new_name: Name) -> Call[None]:
    args = struct.pack("<Q", new_parent) + encode(name) + encode(new_name)
    return Call(Opcode.RENAME, parent, nothing, args)


def rename2(parent: int, name: Name, new_parent: int, new_name: Name, flags: int) -> Call[None]:
    args = struct.pack("<QII", new_parent, flags, 0) + encode(name) + encode(new_name)
    return Call(Opcode.RENAME2, parent, nothing, args)


def link(nodeid: int, new_parent: int, new_name: Name) -> Call[abi.Entry]:
    args = struct.pack("<Q", nodeid) + encode(new_name)
    return Call(Opcode.LINK, new_parent, abi.unpack_entry, args, reply_room=ENTRY_ROOM)


# ---- attributes ---------------------------------------------------------------------------------------


def getattr_(nodeid: int, fh: int | None = None) -> Call[abi.AttrReply]:
    args = struct.pack("<IIQ", 0 if fh is None else abi.GETATTR_FH, 0, fh or 0)
    return Call(Opcode.GETATTR, nodeid, abi.unpack_attr_reply, args, reply_room=ATTR_ROOM)


def setattr_(
    nodeid: int,
    *,
    fh: int | None = None,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    size: int | None = None,
    atime_ns: int | None = None,
    mtime_ns: int | None = None,
    valid: SetattrValid = NOTHING_MORE,
    lock_owner: int = 0,
) -> Call[abi.AttrReply]:
    """`valid` adds bits (ATIME_NOW, KILL_SUIDGID, ...) to those that the given values set."""
    for value, bit in (
        (fh, SetattrValid.FH),
        (mode, SetattrValid.MODE),
        (uid, SetattrValid.UID),
        (gid, SetattrValid.GID),
        (size, SetattrValid.SIZE),
        (atime_ns, SetattrValid.ATIME),
        (mtime_ns, SetattrValid.MTIME),
    ):
        if value is not None:
            valid |= bit
    atime_s, atime_rest = divmod(atime_ns or 0, 10**9)
    mtime_s, mtime_rest = divmod(mtime_ns or 0, 10**9)
    args = abi.SETATTR_IN.pack(
        valid,
        0,
        fh or 0,
        size or 0,
        lock_owner,
        atime_s & 0xFFFFFFFFFFFFFFFF,
        mtime_s & 0xFFFFFFFFFFFFFFFF,
        0,
        atime_rest,
        mtime_rest,
        0,
        mode or 0,
        0,
        uid or 0,
        gid or 0,
        0,
    )
    return Call(Opcode.SETATTR, nodeid, abi.unpack_attr_reply, args, reply_room=ATTR_ROOM)


def statx(nodeid: int, mask: int = 0xFFF, flags: int = 0, fh: int | None = None) -> Call[abi.Statx]:
    args = struct.pack("<IIQII", 0 if fh is None else abi.GETATTR_FH, 0, fh or 0, flags, mask)
    room = abi.STATX_HEAD.size + abi.STATX.size
    return Call(Opcode.STATX, nodeid, abi.unpack_statx, args, reply_room=room)


def access(nodeid: int, mask: int) -> Call[None]:
    return Call(Opcode.ACCESS, nodeid, nothing, struct.pack("<II", mask, 0))


# ---- files --------------------------------------------------------------------------------------------


def open_(nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> Call[abi.Opened]:
    args = struct.pack("<II", flags, open_flags)
    return Call(Opcode.OPEN, nodeid, abi.unpack_opened, args, reply_room=abi.OPEN_OUT.size)


def create(
    parent: int,
    name: Name,
    flags: int = os.O_RDWR,
    mode: int = 0o644,
    umask: int = 0,
    open_flags: int = 0,
    security: SecurityContext | None = None,
) -> Call[tuple[abi.Entry, abi.Opened]]:
    args = struct.pack("<IIII", flags | os.O_CREAT, mode, umask, open_flags) + encode(name)
    return Call(
        Opcode.CREATE,
        parent,
        abi.unpack_created,
        args,
        reply_room=ENTRY_ROOM + abi.OPEN_OUT.size,
        creates=True,
        security=security,
    )


def tmpfile(
    parent: int, flags: int = os.O_RDWR, mode: int = 0o600, umask: int = 0, name: Name = "#0"
) -> Call[tuple[abi.Entry, abi.Opened]]:
    args = struct.pack("<IIII", flags | os.O_TMPFILE, mode | 0o100000, umask, 0) + encode(name)
    return Call(
        Opcode.TMPFILE,
        parent,
        abi.unpack_created,
        args,
        reply_room=ENTRY_ROOM + abi.OPEN_OUT.size,
        creates=True,
    )


def read(
    nodeid: int, fh: int, size: int, offset: int = 0, *, flags: int = 0, lock_owner: int | None = None
) -> Call[bytes]:
    read_flags = 0 if lock_owner is None else abi.READ_LOCKOWNER
    args = struct.pack("<QQIIQII", fh, offset, size, read_flags, lock_owner or 0, flags, 0)
    return Call(Opcode.READ, nodeid, the_bytes, args, data_room=size)


def write(
    nodeid: int,
    fh: int,
    data: bytes | memoryview,
    offset: int = 0,
    *,
    write_flags: int = 0,
    flags: int = 0,
    lock_owner: int = 0,
) -> Call[int]:
    args = struct.pack("<QQIIQII", fh, offset, len(data), write_flags, lock_owner, flags, 0)
    return Call(Opcode.WRITE, nodeid, _u32, args, payload=(data,), reply_room=8)


def flush(nodeid: int, fh: int, lock_owner: int = 0) -> Call[None]:
    return Call(Opcode.FLUSH, nodeid, nothing, struct.pack("<QIIQ", fh, 0, 0, lock_owner))


def release(nodeid: int, fh: int, flags: int = 0, release_flags: int = 0, lock_owner: int = 0) -> Call[None]:
    args = struct.pack("<QIIQ", fh, flags, release_flags, lock_owner)
    return Call(Opcode.RELEASE, nodeid, nothing, args)


def fsync(nodeid: int, fh: int, *, data_only: bool = False) -> Call[None]:
    args = struct.pack("<QII", fh, abi.FSYNC_FDATASYNC if data_only else 0, 0)
    return Call(Opcode.FSYNC, nodeid, nothing, args)


def fallocate(nodeid: int, fh: int, mode: int, offset: int, length: int) -> Call[None]:
    return Call(Opcode.FALLOCATE, nodeid, nothing, struct.pack("<QQQII", fh, offset, length, mode, 0))


def lseek(nodeid: int, fh: int, offset: int, whence: int) -> Call[int]:
    args = struct.pack("<QQII", fh, offset, whence, 0)
    return Call(Opcode.LSEEK, nodeid, _u64, args, reply_room=8)


def _copy_args(
    fh_in: int, off_in: int, nodeid_out: int, fh_out: int, off_out: int, length: int, flags: int
) -> bytes:
    return struct.pack("<QQQQQQQ", fh_in, off_in, nodeid_out, fh_out, off_out, length, flags)


def copy_file_range(
    nodeid: int, fh: int, offset: int, to: tuple[int, int], to_offset: int, length: int, flags: int = 0
) -> Call[int]:
    """`to` is the target's (nodeid, fh)."""
    args = _copy_args(fh, offset, to[0], to[1], to_offset, length, flags)
    return Call(Opcode.COPY_FILE_RANGE, nodeid, _u32, args, reply_room=8)


def copy_file_range_64(
    nodeid: int, fh: int, offset: int, to: tuple[int, int], to_offset: int, length: int, flags: int = 0
) -> Call[int]:
    args = _copy_args(fh, offset, to[0], to[1], to_offset, length, flags)
    return Call(Opcode.COPY_FILE_RANGE_64, nodeid, _u64, args, reply_room=8)


def ioctl(
    nodeid: int, fh: int, command: int, data: bytes = b"", out_size: int = 0, flags: int = 0, arg: int = 0
) -> Call[abi.IoctlReply]:
    args = struct.pack("<QIIQII", fh, flags, command, arg, len(data), out_size)
    payload = (data,) if data else ()
    return Call(
        Opcode.IOCTL,
        nodeid,
        _ioctl_reply,
        args,
        payload=payload,
        reply_room=abi.IOCTL_OUT.size,
        data_room=out_size,
    )


def _ioctl_reply(data: bytes) -> abi.IoctlReply:
    result, flags, _, _ = abi.IOCTL_OUT.unpack_from(data)
    return abi.IoctlReply(result, flags, data[abi.IOCTL_OUT.size :])


def poll(nodeid: int, fh: int, events: int, kh: int = 0, flags: int = 0) -> Call[int]:
    args = struct.pack("<QQII", fh, kh, flags, events)
    return Call(Opcode.POLL, nodeid, _u32, args, reply_room=8)


# ---- directories --------------------------------------------------------------------------------------


def opendir(nodeid: int, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Call[abi.Opened]:
    args = struct.pack("<II", flags, 0)
    return Call(Opcode.OPENDIR, nodeid, abi.unpack_opened, args, reply_room=abi.OPEN_OUT.size)


def readdir(nodeid: int, fh: int, offset: int = 0, size: int = 4096) -> Call[list[abi.Dirent]]:
    args = struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0)
    return Call(Opcode.READDIR, nodeid, abi.unpack_dirents, args, data_room=size)


def readdirplus(nodeid: int, fh: int, offset: int = 0, size: int = 4096) -> Call[list[abi.DirentPlus]]:
    args = struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0)
    return Call(Opcode.READDIRPLUS, nodeid, abi.unpack_direntplus, args, data_room=size)


def releasedir(nodeid: int, fh: int) -> Call[None]:
    return Call(Opcode.RELEASEDIR, nodeid, nothing, struct.pack("<QIIQ", fh, 0, 0, 0))


def fsyncdir(nodeid: int, fh: int, *, data_only: bool = False) -> Call[None]:
    args = struct.pack("<QII", fh, abi.FSYNC_FDATASYNC if data_only else 0, 0)
    return Call(Opcode.FSYNCDIR, nodeid, nothing, args)


# ---- extended attributes ------------------------------------------------------------------------------


def setxattr(
    nodeid: int, name: Name, value: bytes, flags: int = 0, *, extended: bool = True, setxattr_flags: int = 0
) -> Call[None]:
    """`extended`: FUSE_SETXATTR_EXT was negotiated."""
    if extended:
        head = struct.pack("<IIII", len(value), flags, setxattr_flags, 0)
    else:
        head = struct.pack("<II", len(value), flags)
    return Call(Opcode.SETXATTR, nodeid, nothing, head + encode(name) + value)


def getxattr(nodeid: int, name: Name, size: int) -> Call[bytes]:
    args = struct.pack("<II", size, 0) + encode(name)
    return Call(Opcode.GETXATTR, nodeid, the_bytes, args, reply_room=size or 8)


def listxattr(nodeid: int, size: int) -> Call[bytes]:
    return Call(Opcode.LISTXATTR, nodeid, the_bytes, struct.pack("<II", size, 0), reply_room=size or 8)


def removexattr(nodeid: int, name: Name) -> Call[None]:
    return Call(Opcode.REMOVEXATTR, nodeid, nothing, encode(name))


# ---- locks --------------------------------------------------------------------------------------------


def _lock_args(fh: int, owner: int, lock: abi.FileLock, flags: int) -> bytes:
    return abi.LK_IN.pack(fh, owner, lock.start, lock.end, lock.kind, lock.pid, flags, 0)


def getlk(nodeid: int, fh: int, owner: int, lock: abi.FileLock) -> Call[abi.FileLock]:
    args = _lock_args(fh, owner, lock, 0)
    return Call(Opcode.GETLK, nodeid, abi.unpack_lock, args, reply_room=abi.LOCK.size)


def setlk(nodeid: int, fh: int, owner: int, lock: abi.FileLock, *, flock: bool = False) -> Call[None]:
    args = _lock_args(fh, owner, lock, abi.LK_FLOCK if flock else 0)
    return Call(Opcode.SETLK, nodeid, nothing, args)


def setlkw(nodeid: int, fh: int, owner: int, lock: abi.FileLock, *, flock: bool = False) -> Call[None]:
    args = _lock_args(fh, owner, lock, abi.LK_FLOCK if flock else 0)
    return Call(Opcode.SETLKW, nodeid, nothing, args)


def raw(
    opcode: int, nodeid: int = abi.ROOT, args: bytes = b"", room: int = 4096, *, has_reply: bool = True
) -> Call[bytes]:
    """Any opcode with any arguments; the reply's payload as it came."""
    return Call(opcode, nodeid, the_bytes, args, reply_room=room, has_reply=has_reply)
