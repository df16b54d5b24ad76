# SPDX-License-Identifier: Apache-2.0
"""The FUSE wire as a guest kernel speaks it: opcodes, flags and layouts up to protocol 7.45.

Written down apart from the server's own tables on purpose, so that a mistake is not made twice.
Specification: include/uapi/linux/fuse.h of Linux.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

ROOT = 1
MAJOR = 7
MINOR = 45

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
INIT_IN = struct.Struct("<IIIII11I")
INIT_IN_OLD = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHII6I")
INIT_OUT_22 = struct.Struct("<IIIIHHI")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY_HEAD = struct.Struct("<QQQQII")
ENTRY_SIZE = ENTRY_HEAD.size + ATTR.size
ATTR_HEAD = struct.Struct("<QII")
STATFS_OUT = struct.Struct("<QQQQQIIII6I")
OPEN_OUT = struct.Struct("<QII")
LOCK = struct.Struct("<QQII")
LK_IN = struct.Struct("<QQQQIIII")
DIRENT = struct.Struct("<QQII")
STATX_HEAD = struct.Struct("<QIIQQ")
STATX = struct.Struct("<IIQIIIHHQQQQ" + "qIi" * 4 + "IIII14Q")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIIII")
IOCTL_OUT = struct.Struct("<iIII")

EXT_GROUPS = 32


class Opcode(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class InitFlag(enum.IntFlag):
    """flags | flags2 << 32 of FUSE_INIT."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    INIT_RESERVED = 1 << 31
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


LINUX_6_1_FLAGS = InitFlag(
    sum(
        1 << bit
        for bit in (0, 1, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 27)
    )
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | 1 << 32
)
"""What Debian 12's kernel offers on virtio-fs without DAX."""

LINUX_7_FLAGS = (
    LINUX_6_1_FLAGS
    | InitFlag.CREATE_SUPP_GROUP
    | InitFlag.HAS_EXPIRE_ONLY
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    | InitFlag.NO_EXPORT_SUPPORT
    | InitFlag.HAS_RESEND
    | InitFlag.ALLOW_IDMAP
    | InitFlag.REQUEST_TIMEOUT
)


class SetattrValid(enum.IntFlag):
    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class OpenReply(enum.IntFlag):
    """FOPEN_* in the reply of OPEN, CREATE, OPENDIR."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


GETATTR_FH = 1
LK_FLOCK = 1
OPEN_KILL_SUIDGID = 1
WRITE_CACHE = 1
WRITE_LOCKOWNER = 2
WRITE_KILL_SUIDGID = 4
READ_LOCKOWNER = 2
RELEASE_FLUSH = 1
RELEASE_FLOCK_UNLOCK = 2
FSYNC_FDATASYNC = 1
SETXATTR_ACL_KILL_SGID = 1
ATTR_SUBMOUNT = 1
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4


@dataclass(frozen=True, slots=True)
class Attr:
    """struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @property
    def mtime_ns(self) -> int:
        return self.mtime * 10**9 + self.mtimensec

    @property
    def atime_ns(self) -> int:
        return self.atime * 10**9 + self.atimensec


@dataclass(frozen=True, slots=True)
class Entry:
    """struct fuse_entry_out; timeouts in nanoseconds."""

    nodeid: int
    generation: int
    entry_timeout_ns: int
    attr_timeout_ns: int
    attr: Attr


@dataclass(frozen=True, slots=True)
class AttrReply:
    """struct fuse_attr_out."""

    timeout_ns: int
    attr: Attr


@dataclass(frozen=True, slots=True)
class Opened:
    """struct fuse_open_out."""

    fh: int
    flags: OpenReply


@dataclass(frozen=True, slots=True)
class Dirent:
    ino: int
    offset: int
    kind: int
    name: bytes


@dataclass(frozen=True, slots=True)
class DirentPlus:
    entry: Entry
    dirent: Dirent


@dataclass(frozen=True, slots=True)
class Statfs:
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


@dataclass(frozen=True, slots=True)
class FileLock:
    """struct fuse_file_lock; end is inclusive, OFFSET_MAX for "to the end"."""

    start: int
    end: int
    kind: int
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Statx:
    """The part of struct fuse_statx that tests look at."""

    timeout_ns: int
    mask: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    mtime_ns: int
    btime_ns: int


@dataclass(frozen=True, slots=True)
class InitReply:
    """struct fuse_init_out, or its shorter forms of old minors (missing fields are 0)."""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class IoctlReply:
    result: int
    flags: int
    data: bytes


def unpack_attr(data: bytes, offset: int = 0) -> Attr:
    return Attr(*ATTR.unpack_from(data, offset))


def unpack_entry(data: bytes, offset: int = 0) -> Entry:
    nodeid, generation, entry_s, attr_s, entry_ns, attr_ns = ENTRY_HEAD.unpack_from(data, offset)
    attr = unpack_attr(data, offset + ENTRY_HEAD.size)
    return Entry(nodeid, generation, entry_s * 10**9 + entry_ns, attr_s * 10**9 + attr_ns, attr)


def unpack_attr_reply(data: bytes) -> AttrReply:
    seconds, nanoseconds, _ = ATTR_HEAD.unpack_from(data)
    return AttrReply(seconds * 10**9 + nanoseconds, unpack_attr(data, ATTR_HEAD.size))


def unpack_opened(data: bytes, offset: int = 0) -> Opened:
    fh, flags, _ = OPEN_OUT.unpack_from(data, offset)
    return Opened(fh, OpenReply(flags))


def unpack_created(data: bytes) -> tuple[Entry, Opened]:
    return unpack_entry(data), unpack_opened(data, ENTRY_SIZE)


def _dirent(data: bytes, offset: int) -> tuple[Dirent, int]:
    ino, next_offset, namelen, kind = DIRENT.unpack_from(data, offset)
    start = offset + DIRENT.size
    if start + namelen > len(data):
        raise ValueError("a directory entry's name goes beyond the reply")
    return Dirent(ino, next_offset, kind, data[start : start + namelen]), -(-(start + namelen) // 8) * 8


def unpack_dirents(data: bytes) -> list[Dirent]:
    found, offset = [], 0
    while offset < len(data):
        entry, offset = _dirent(data, offset)
        found.append(entry)
    return found


def unpack_direntplus(data: bytes) -> list[DirentPlus]:
    found, offset = [], 0
    while offset < len(data):
        entry = unpack_entry(data, offset)
        dirent, offset = _dirent(data, offset + ENTRY_SIZE)
        found.append(DirentPlus(entry, dirent))
    return found


def unpack_statfs(data: bytes) -> Statfs:
    return Statfs(*STATFS_OUT.unpack(data)[:8])


def unpack_lock(data: bytes) -> FileLock:
    return FileLock(*LOCK.unpack(data))


def unpack_statx(data: bytes) -> Statx:
    seconds, nanoseconds, _, _, _ = STATX_HEAD.unpack_from(data)
    field = STATX.unpack_from(data, STATX_HEAD.size)
    mask, _, attributes, nlink, uid, gid, mode, _, ino, size, blocks, _ = field[:12]
    btime_ns = field[15] * 10**9 + field[16]
    mtime_ns = field[21] * 10**9 + field[22]
    timeout_ns = seconds * 10**9 + nanoseconds
    return Statx(timeout_ns, mask, attributes, nlink, uid, gid, mode, ino, size, blocks, mtime_ns, btime_ns)


def unpack_init(data: bytes) -> InitReply:
    size = len(data)
    if size < INIT_OUT_22.size:
        major, minor = struct.unpack_from("<II", data)
        return InitReply(major, minor, 0, InitFlag(0), 0, 0, 0, 0, 0, 0, size)
    if size < INIT_OUT.size:
        major, minor, readahead, flags, background, congestion, write = INIT_OUT_22.unpack_from(data)
        return InitReply(
            major, minor, readahead, InitFlag(flags), background, congestion, write, 0, 0, 0, size
        )
    (major, minor, readahead, flags, background, congestion, write, gran, pages, align, flags2) = (
        INIT_OUT.unpack_from(data)[:11]
    )
    both = InitFlag(flags | (flags2 << 32 if flags & InitFlag.INIT_EXT else 0))
    return InitReply(major, minor, readahead, both, background, congestion, write, gran, pages, align, size)
