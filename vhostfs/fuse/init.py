# SPDX-License-Identifier: Apache-2.0
"""FUSE_INIT: what is granted to a guest, from what it offers and what the server was asked to do.

Must not know sockets, rings or the C core: a pure function of its arguments.
Source: fs/fuse/inode.c (process_init_reply), include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import errno

from ..record import Record
from .abi import KERNEL_MINOR_VERSION, KERNEL_VERSION, MIN_MINOR_VERSION, InitFlag, InitIn, InitOut

MAX_WRITE_BYTES = 1 << 20
PAGE_BYTES = 4096
MAX_BACKGROUND = 0xFFFF


class SessionOptions(Record, kw_only=True):
    """What the server was asked for, as far as FUSE_INIT is concerned."""

    posix_lock: bool = True
    flock: bool = True
    readdirplus: bool = True
    writeback: bool = False
    posix_acl: bool = False
    killpriv_v2: bool = False
    announce_submounts: bool = True
    security_label: bool = False
    allow_mmap: bool = False
    cache_always: bool = False
    """The guest may keep data and symlinks without asking again."""
    cache_symlinks: bool = False
    """Symlinks alone: one never changes, what changes is which one a name means."""


class Negotiated(Record):
    """The answer: error (0 or a positive errno), the reply, and lines worth logging.

    A session begins only when max_write_bytes is not 0.
    """

    error: int
    reply: InitOut
    notes: tuple[str, ...] = ()

    @property
    def max_write_bytes(self) -> int:
        return self.reply.max_write_bytes


# Done always, for whoever offers it.
_ALWAYS = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.EXPORT_SUPPORT
    | InitFlag.BIG_WRITES
    | InitFlag.HAS_IOCTL_DIR
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.CREATE_SUPP_GROUP
)
# The host's ACLs decide with the umask, so the guest must send it; and chmod must be able to clear S_ISGID.
_ACL_NEEDS = InitFlag.POSIX_ACL | InitFlag.DONT_MASK | InitFlag.SETXATTR_EXT


def wanted_flags(options: SessionOptions) -> InitFlag:
    """Everything that a server with these options grants to a guest that offers all."""
    flags = _ALWAYS
    for asked, flag in (
        (options.posix_lock, InitFlag.POSIX_LOCKS),
        (options.flock, InitFlag.FLOCK_LOCKS),
        (options.readdirplus, InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO),
        (options.writeback, InitFlag.WRITEBACK_CACHE),
        (options.posix_acl, _ACL_NEEDS),
        (options.killpriv_v2, InitFlag.HANDLE_KILLPRIV_V2),
        (options.announce_submounts, InitFlag.SUBMOUNTS),
        (options.security_label, InitFlag.SECURITY_CTX),
        (options.allow_mmap, InitFlag.DIRECT_IO_ALLOW_MMAP),
        # A changed mtime or size on the host drops the guest's pages, unless it was told to keep them.
        (not options.cache_always, InitFlag.AUTO_INVAL_DATA),
        (options.cache_always or options.cache_symlinks, InitFlag.CACHE_SYMLINKS),
    ):
        if asked:
            flags |= flag
    return flags


def negotiate(request: InitIn, options: SessionOptions) -> Negotiated:
    """Answers FUSE_INIT."""
    if request.major > KERNEL_VERSION:
        # The guest is to ask again with our major version.
        return Negotiated(
            0, InitOut(KERNEL_MINOR_VERSION), (f"guest speaks FUSE {request.major}, asked for 7",)
        )
    if request.major < KERNEL_VERSION or request.minor < MIN_MINOR_VERSION:
        seen = f"FUSE {request.major}.{request.minor} refused; 7.{MIN_MINOR_VERSION} or later is needed"
        return Negotiated(errno.EPROTO, InitOut(KERNEL_MINOR_VERSION), (seen,))
    wanted = wanted_flags(options)
    granted = InitFlag(request.flags & wanted)
    notes = []
    if options.posix_acl and granted & _ACL_NEEDS != _ACL_NEEDS:
        granted &= ~(InitFlag.POSIX_ACL | InitFlag.DONT_MASK)
        notes.append("POSIX ACLs are off: the guest's kernel lacks POSIX_ACL, DONT_MASK or SETXATTR_EXT")
    for asked, flag, name in (
        (options.writeback, InitFlag.WRITEBACK_CACHE, "write-back caching"),
        (options.killpriv_v2, InitFlag.HANDLE_KILLPRIV_V2, "killpriv v2"),
        (options.security_label, InitFlag.SECURITY_CTX, "security labels at creation"),
        (options.allow_mmap, InitFlag.DIRECT_IO_ALLOW_MMAP, "shared mmap without caching"),
    ):
        if asked and not granted & flag:
            notes.append(f"{name}: not offered by the guest's kernel")
    # Without MAX_PAGES a request carries at most 32 pages.
    max_write = MAX_WRITE_BYTES if granted & InitFlag.MAX_PAGES else 32 * PAGE_BYTES
    reply = InitOut(
        minor=min(request.minor, KERNEL_MINOR_VERSION),
        max_readahead_bytes=request.max_readahead_bytes,
        flags=int(granted),
        max_background=MAX_BACKGROUND,
        congestion_threshold=MAX_BACKGROUND // 4 * 3,
        max_write_bytes=max_write,
        time_granularity_ns=1,
        max_pages=max_write // PAGE_BYTES,
    )
    return Negotiated(0, reply, tuple(notes))
