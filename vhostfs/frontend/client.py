# SPDX-License-Identifier: Apache-2.0
"""A guest's view of the file system: one method per FUSE operation, errors as OSError.

Knows nothing of rings; `operations` has the requests, `session` sends them.
Specification: include/uapi/linux/fuse.h of Linux.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

from vhostfs.frontend import fsnotify
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.fuse_abi import InitFlag, SetattrValid
from vhostfs.frontend.operations import NOTHING_MORE, Call, Name, SecurityContext
from vhostfs.frontend.ring import Virtqueue
from vhostfs.frontend.session import ROOT_USER, Caller, Pending, Session
from vhostfs.frontend.vmm import Machine, Vmm

T = TypeVar("T")


class FuseClient:
    """Operations by one caller through one request queue; `by` and `through` give other views."""

    def __init__(self, session: Session, caller: Caller = ROOT_USER, queue: Virtqueue | None = None) -> None:
        self.session = session
        self.caller = caller
        self.queue = queue
        self.root = abi.ROOT

    @classmethod
    def mount(
        cls, path: str | os.PathLike[str], machine: Machine | None = None, flags: int = abi.LINUX_7_FLAGS
    ) -> FuseClient:
        """Connects to a server's socket, boots the device and sends INIT."""
        vmm = Vmm.boot(path, machine)
        try:
            client = cls(Session(vmm))
            client.init(flags)
        except BaseException:
            vmm.close()
            raise
        return client

    def by(self, caller: Caller) -> FuseClient:
        """The same mount used by someone else."""
        other = FuseClient(self.session, caller, self.queue)
        other.root = self.root
        return other

    def through(self, number: int) -> FuseClient:
        """The same mount through another request queue."""
        other = FuseClient(self.session, self.caller, self.vmm.request_queue(number))
        other.root = self.root
        return other

    @property
    def vmm(self) -> Vmm:
        return self.session.vmm

    def close(self) -> None:
        self.vmm.close()

    def call(self, call: Call[T]) -> T:
        queue = self.queue if call.has_reply else None
        return self.session.call(call, self.caller, queue=queue)

    def submit(self, call: Call[T]) -> Pending[T]:
        """Sends without waiting; several may be in flight."""
        queue = self.queue if call.has_reply else None
        return self.session.submit(call, self.caller, queue=queue)

    # ---- session ---------------------------------------------------------------------------------------

    def init(
        self, flags: int = abi.LINUX_7_FLAGS, *, major: int = abi.MAJOR, minor: int = abi.MINOR
    ) -> abi.InitReply:
        return self.session.initialised(op.init(flags, major=major, minor=minor), flags)

    def destroy(self) -> None:
        self.call(op.destroy())

    def fsnotify_init(
        self,
        flags: int = fsnotify.Granted.VIRTQUEUE | fsnotify.Granted.RENAME | fsnotify.Granted.CHILD,
        mask: int = fsnotify.ALL_EVENTS,
    ) -> fsnotify.InitAnswer:
        return self.call(fsnotify.init(flags, mask))

    def watch(self, nodeid: int, mask: int, generation: int = 0) -> None:
        self.call(fsnotify.watch(nodeid, mask, generation))

    def watch_share(self, mask: int) -> None:
        """Everything that the guest holds."""
        self.call(fsnotify.watch(abi.ROOT, mask, 0, fsnotify.WatchFlag.FILESYSTEM))

    def statfs(self, nodeid: int) -> abi.Statfs:
        return self.call(op.statfs(nodeid))

    def syncfs(self, nodeid: int) -> None:
        self.call(op.syncfs(nodeid))

    def interrupt(self, pending: Pending[T]) -> None:
        self.call(op.interrupt(pending.unique))

    # ---- names -----------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: Name) -> abi.Entry:
        return self.call(op.lookup(parent, name))

    def forget(self, nodeid: int, count: int = 1) -> None:
        self.call(op.forget(nodeid, count))

    def batch_forget(self, items: Sequence[tuple[int, int]]) -> None:
        self.call(op.batch_forget(items))

    def readlink(self, nodeid: int) -> bytes:
        return self.call(op.readlink(nodeid))

    def symlink(
        self, parent: int, name: Name, target: Name, security: SecurityContext | None = None
    ) -> abi.Entry:
        return self.call(op.symlink(parent, name, target, security))

    def mknod(
        self,
        parent: int,
        name: Name,
        mode: int,
        rdev: int = 0,
        umask: int = 0,
        security: SecurityContext | None = None,
    ) -> abi.Entry:
        return self.call(op.mknod(parent, name, mode, rdev, umask, security))

    def mkdir(
        self,
        parent: int,
        name: Name,
        mode: int = 0o755,
        umask: int = 0,
        security: SecurityContext | None = None,
    ) -> abi.Entry:
        return self.call(op.mkdir(parent, name, mode, umask, security))

    def unlink(self, parent: int, name: Name) -> None:
        self.call(op.unlink(parent, name))

    def rmdir(self, parent: int, name: Name) -> None:
        self.call(op.rmdir(parent, name))

    def rename(self, parent: int, name: Name, new_parent: int, new_name: Name) -> None:
        self.call(op.rename(parent, name, new_parent, new_name))

    def rename2(self, parent: int, name: Name, new_parent: int, new_name: Name, flags: int) -> None:
        self.call(op.rename2(parent, name, new_parent, new_name, flags))

    def link(self, nodeid: int, new_parent: int, new_name: Name) -> abi.Entry:
        return self.call(op.link(nodeid, new_parent, new_name))

    # ---- attributes ------------------------------------------------------------------------------------

    def getattr(self, nodeid: int, fh: int | None = None) -> abi.Attr:
        return self.call(op.getattr_(nodeid, fh)).attr

    def setattr(
        self,
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
    ) -> abi.Attr:
        request = op.setattr_(
            nodeid,
            fh=fh,
            mode=mode,
            uid=uid,
            gid=gid,
            size=size,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
            valid=valid,
        )
        return self.call(request).attr

    def statx(self, nodeid: int, mask: int = 0xFFF, flags: int = 0, fh: int | None = None) -> abi.Statx:
        return self.call(op.statx(nodeid, mask, flags, fh))

    def access(self, nodeid: int, mask: int) -> None:
        self.call(op.access(nodeid, mask))

    # ---- files -----------------------------------------------------------------------------------------

    def open(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> abi.Opened:
        return self.call(op.open_(nodeid, flags, open_flags))

    def create(
        self,
        parent: int,
        name: Name,
        flags: int = os.O_RDWR,
        mode: int = 0o644,
        umask: int = 0,
        open_flags: int = 0,
        security: SecurityContext | None = None,
    ) -> tuple[abi.Entry, abi.Opened]:
        return self.call(op.create(parent, name, flags, mode, umask, open_flags, security))

    def tmpfile(
        self, parent: int, flags: int = os.O_RDWR, mode: int = 0o600, umask: int = 0
    ) -> tuple[abi.Entry, abi.Opened]:
        return self.call(op.tmpfile(parent, flags, mode, umask))

    def read(
        self, nodeid: int, fh: int, size: int, offset: int = 0, *, lock_owner: int | None = None
    ) -> bytes:
        return self.call(op.read(nodeid, fh, size, offset, lock_owner=lock_owner))

    def write(
        self,
        nodeid: int,
        fh: int,
        data: bytes | memoryview,
        offset: int = 0,
        *,
        write_flags: int = 0,
        flags: int = 0,
        lock_owner: int = 0,
    ) -> int:
        request = op.write(
            nodeid, fh, data, offset, write_flags=write_flags, flags=flags, lock_owner=lock_owner
        )
        return self.call(request)

    def flush(self, nodeid: int, fh: int, lock_owner: int = 0) -> None:
        self.call(op.flush(nodeid, fh, lock_owner))

    def release(
        self, nodeid: int, fh: int, flags: int = 0, release_flags: int = 0, lock_owner: int = 0
    ) -> None:
        self.call(op.release(nodeid, fh, flags, release_flags, lock_owner))

    def fsync(self, nodeid: int, fh: int, *, data_only: bool = False) -> None:
        self.call(op.fsync(nodeid, fh, data_only=data_only))

    def fallocate(self, nodeid: int, fh: int, mode: int, offset: int, length: int) -> None:
        self.call(op.fallocate(nodeid, fh, mode, offset, length))

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        return self.call(op.lseek(nodeid, fh, offset, whence))

    def copy_file_range(
        self,
        nodeid: int,
        fh: int,
        offset: int,
        to: tuple[int, int],
        to_offset: int,
        length: int,
        flags: int = 0,
    ) -> int:
        return self.call(op.copy_file_range(nodeid, fh, offset, to, to_offset, length, flags))

    def copy_file_range_64(
        self,
        nodeid: int,
        fh: int,
        offset: int,
        to: tuple[int, int],
        to_offset: int,
        length: int,
        flags: int = 0,
    ) -> int:
        return self.call(op.copy_file_range_64(nodeid, fh, offset, to, to_offset, length, flags))

    def ioctl(
        self, nodeid: int, fh: int, command: int, data: bytes = b"", out_size: int = 0, flags: int = 0
    ) -> abi.IoctlReply:
        return self.call(op.ioctl(nodeid, fh, command, data, out_size, flags))

    def poll(self, nodeid: int, fh: int, events: int) -> int:
        return self.call(op.poll(nodeid, fh, events))

    # ---- directories -----------------------------------------------------------------------------------

    def opendir(self, nodeid: int) -> abi.Opened:
        return self.call(op.opendir(nodeid))

    def readdir(self, nodeid: int, fh: int, offset: int = 0, size: int = 4096) -> list[abi.Dirent]:
        return self.call(op.readdir(nodeid, fh, offset, size))

    def readdirplus(self, nodeid: int, fh: int, offset: int = 0, size: int = 4096) -> list[abi.DirentPlus]:
        return self.call(op.readdirplus(nodeid, fh, offset, size))

    def releasedir(self, nodeid: int, fh: int) -> None:
        self.call(op.releasedir(nodeid, fh))

    def fsyncdir(self, nodeid: int, fh: int, *, data_only: bool = False) -> None:
        self.call(op.fsyncdir(nodeid, fh, data_only=data_only))

    # ---- extended attributes ---------------------------------------------------------------------------

    def setxattr(
        self, nodeid: int, name: Name, value: bytes, flags: int = 0, setxattr_flags: int = 0
    ) -> None:
        extended = bool(self.session.flags & InitFlag.SETXATTR_EXT)
        self.call(op.setxattr(nodeid, name, value, flags, extended=extended, setxattr_flags=setxattr_flags))

    def getxattr(self, nodeid: int, name: Name, size: int = 65536) -> bytes:
        return self.call(op.getxattr(nodeid, name, size))

    def listxattr(self, nodeid: int, size: int = 65536) -> bytes:
        return self.call(op.listxattr(nodeid, size))

    def removexattr(self, nodeid: int, name: Name) -> None:
        self.call(op.removexattr(nodeid, name))

    # ---- locks -----------------------------------------------------------------------------------------

    def getlk(self, nodeid: int, fh: int, owner: int, lock: abi.FileLock) -> abi.FileLock:
        return self.call(op.getlk(nodeid, fh, owner, lock))

    def setlk(self, nodeid: int, fh: int, owner: int, lock: abi.FileLock, *, flock: bool = False) -> None:
        self.call(op.setlk(nodeid, fh, owner, lock, flock=flock))

    def setlkw(self, nodeid: int, fh: int, owner: int, lock: abi.FileLock, *, flock: bool = False) -> None:
        self.call(op.setlkw(nodeid, fh, owner, lock, flock=flock))

    # ---- several operations at once --------------------------------------------------------------------

    def walk(self, path: str) -> abi.Entry:
        """Looks a path up from `root`, component by component."""
        nodeid, entry = self.root, None
        for part in path.split("/"):
            entry = self.lookup(nodeid, part)
            nodeid = entry.nodeid
        assert entry is not None
        return entry

    def list(self, nodeid: int, size: int = 32768) -> list[bytes]:
        """All names of a directory but "." and "..", in the server's order."""
        fh = self.opendir(nodeid).fh
        names = [entry.name for entry in self.entries(nodeid, fh, size)]
        self.releasedir(nodeid, fh)
        return [name for name in names if name not in (b".", b"..")]

    def entries(self, nodeid: int, fh: int, size: int = 32768) -> Iterator[abi.Dirent]:
        offset = 0
        while batch := self.readdir(nodeid, fh, offset, size):
            yield from batch
            offset = batch[-1].offset

    def write_file(self, parent: int, name: Name, data: bytes) -> abi.Entry:
        """Creates a file with this content and closes it."""
        entry, opened = self.create(parent, name)
        for start in range(0, len(data), 1 << 20):
            self.write(entry.nodeid, opened.fh, data[start : start + (1 << 20)], start)
        self.release(entry.nodeid, opened.fh)
        return entry

    def read_file(self, nodeid: int) -> bytes:
        """The whole content of a file."""
        fh = self.open(nodeid).fh
        data = b""
        while part := self.read(nodeid, fh, 1 << 17, len(data)):
            data += part
        self.release(nodeid, fh)
        return data
