# SPDX-License-Identifier: Apache-2.0
"""FUSE as Python needs it: opcodes, INIT flags, and the structs of the operations decided in Python.

Must not know sockets, rings or the C core. All integers are little-endian.
Source: include/uapi/linux/fuse.h, protocol 7.45; private numbers: docs of the project.
"""

from __future__ import annotations

import enum
import struct

from ..record import Record

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 45
# FUSE_MAX_PAGES, FUSE_INIT_EXT and what virtio-fs relies on; virtiofsd asks for the same.
MIN_MINOR_VERSION = 27


class Opcode(enum.IntEnum):
    """Requests that Python answers; what else reaches it is answered with ENOSYS."""

    INIT = 26
    DESTROY = 38
    IOCTL = 39
    # Our own, far from the upstream numbers: docs/protocol.md.
    FSNOTIFY_INIT = 0x5800


class InitFlag(enum.IntFlag):
    """FUSE_INIT flags: flags | flags2 << 32."""

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
    HAS_SYNCFS = 1 << 43


_INIT_IN = struct.Struct("<IIII")
_INIT_IN_EXT = struct.Struct("<I")
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_IOCTL_IN = struct.Struct("<QIIQII")
_IOCTL_OUT = struct.Struct("<iIII")


class InitIn(Record):
    """struct fuse_init_in; flags holds all 64 bits."""

    major: int
    minor: int
    max_readahead_bytes: int
    flags: int

    @classmethod
    def unpack(cls, data: bytes) -> InitIn:
        """Raises ValueError when it is too short. flags2 counts only where FUSE_INIT_EXT says so."""
        if len(data) < _INIT_IN.size:
            raise ValueError(f"FUSE_INIT of {len(data)} bytes, at least {_INIT_IN.size} are needed")
        major, minor, readahead, flags = _INIT_IN.unpack_from(data)
        if flags & InitFlag.INIT_EXT and len(data) >= _INIT_IN.size + _INIT_IN_EXT.size:
            flags |= _INIT_IN_EXT.unpack_from(data, _INIT_IN.size)[0] << 32
        return cls(major, minor, readahead, flags)


class InitOut(Record):
    """struct fuse_init_out, 64 bytes."""

    minor: int
    max_readahead_bytes: int = 0
    flags: int = 0
    max_background: int = 0
    congestion_threshold: int = 0
    max_write_bytes: int = 0
    time_granularity_ns: int = 0
    max_pages: int = 0

    def pack(self) -> bytes:
        return _INIT_OUT.pack(
            KERNEL_VERSION,
            self.minor,
            self.max_readahead_bytes,
            self.flags & 0xFFFFFFFF,
            self.max_background,
            self.congestion_threshold,
            self.max_write_bytes,
            self.time_granularity_ns,
            self.max_pages,
            0,
            self.flags >> 32,
            0,
        )


class IoctlIn(Record):
    """struct fuse_ioctl_in and the data behind it."""

    fh: int
    flags: int
    cmd: int
    out_size_bytes: int
    data: bytes

    @classmethod
    def unpack(cls, args: bytes) -> IoctlIn:
        """Raises ValueError when the sizes do not agree."""
        if len(args) < _IOCTL_IN.size:
            raise ValueError("FUSE_IOCTL is too short")
        fh, flags, cmd, _arg, in_size, out_size = _IOCTL_IN.unpack_from(args)
        data = args[_IOCTL_IN.size :]
        if len(data) != in_size:
            raise ValueError("FUSE_IOCTL carries other than in_size bytes")
        return cls(fh, flags, cmd, out_size, data)


def pack_ioctl(result: int, data: bytes) -> bytes:
    """struct fuse_ioctl_out and the data behind it."""
    return _IOCTL_OUT.pack(result, 0, 0, 0) + data
