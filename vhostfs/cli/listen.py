# SPDX-License-Identifier: Apache-2.0
"""Owns the listening sockets: made at a path that no other server uses, or taken over from the parent.
Must not accept connections or know vhost-user.
Specification: --socket-path, --socket-group and --fd of virtiofsd; unix(7), flock(2)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time

from ..errors import UserError
from ..record import Record

# sockaddr_un.sun_path is 108 bytes with its NUL.
SOCKET_PATH_MAX_BYTES = 107
_BACKLOG = 8
# For a server that is just being killed: its second process ends a moment after the first.
_LOCK_WAIT_S = 1.0


class ListenError(UserError):
    """A socket that cannot be listened on; the text says what is in the way."""


class Listener(Record):
    """A stream socket, listening or about to, and, when it was made here, the files to remove at the end."""

    socket: socket.socket
    path: str | None = None
    lock_path: str | None = None
    lock_fd: int = -1
    identity: tuple[int, int] | None = None  # device and inode of the socket file

    @property
    def lock_fds(self) -> frozenset[int]:
        """What every process of the server keeps open: the path is free when the last has ended."""
        return frozenset({self.lock_fd} if self.lock_fd >= 0 else ())

    def listen(self) -> None:
        """Who knows the path can connect from now on; nothing new for a socket that the parent made."""
        if self.path is not None:
            self.socket.listen(_BACKLOG)

    def remove_files(self) -> None:
        """
        Removes socket and lock file, and nothing else that has taken their place. Never raises.

        Harmless inside a sandbox too, where the paths lead into the share: no other file is the same.
        """
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self.identity:
                os.unlink(self.path)
        if self.lock_path is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.lock_fd), os.lstat(self.lock_path)):
                os.unlink(self.lock_path)


def bind_at(path: str, group: str | None) -> Listener:
    """Makes a socket that only this user (and group) may connect to, once it listens. Raises ListenError."""
    path = _checked_path("--socket-path", path)
    group_id = _group_id(group) if group is not None else None
    lock_path = f"{path}.pid"
    lock_fd = _lock(lock_path, path)
    try:
        _remove_dead_socket("--socket-path", path)
        listener = _bound(path, 0o007 if group is not None else 0o077)
        if group_id is not None:
            os.chown(path, -1, group_id)
        found = os.lstat(path)
    except OSError as error:
        os.unlink(lock_path)
        os.close(lock_fd)
        raise ListenError(f"--socket-path={path}: {os.strerror(error.errno or errno.EIO)}") from None
    except ListenError:
        os.unlink(lock_path)
        os.close(lock_fd)
        raise
    return Listener(listener, path, lock_path, lock_fd, (found.st_dev, found.st_ino))


def listen_for_control(path: str) -> Listener:
    """
    Makes the control socket, that only this user may connect to. Raises ListenError.

    It has no lock file: the one beside the vhost-user socket keeps other servers away from both.
    """
    path = _checked_path("--control-socket", path)
    try:
        _remove_dead_socket("--control-socket", path)
        listener = _bound(path, 0o177)
        found = os.lstat(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise ListenError(f"--control-socket={path}: {os.strerror(error.errno or errno.EIO)}") from None
    return Listener(listener, path, identity=(found.st_dev, found.st_ino))


def _checked_path(option: str, path: str) -> str:
    """The absolute path, if a socket can be made there."""
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_MAX_BYTES:
        raise ListenError(
            f"{option} is {size} bytes long; a socket's path has at most {SOCKET_PATH_MAX_BYTES}"
        )
    path = os.path.abspath(path)
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise ListenError(f"{option}={path}: the directory {directory} does not exist")
    return path


def _bound(path: str, umask: int) -> socket.socket:
    """The mode must be right from the start: a chmod would come too late."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old_umask = os.umask(umask)
    try:
        listener.bind(path)
    finally:
        os.umask(old_umask)
    return listener


def take_listener(fd: int) -> Listener:
    """--fd: a socket that the parent made and that listens already. Raises ListenError."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        raise ListenError(f"--fd={fd}: no such descriptor is open; the parent must pass it on") from None
    if not is_socket:
        raise ListenError(f"--fd={fd} is not a socket; expected a listening UNIX socket")
    taken = socket.socket(fileno=fd)
    if taken.family != socket.AF_UNIX or taken.type != socket.SOCK_STREAM:
        taken.detach()
        raise ListenError(f"--fd={fd} is not a UNIX stream socket")
    if not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        taken.detach()
        raise ListenError(f"--fd={fd} does not listen; expected a listening socket, not a connection")
    taken.set_inheritable(False)
    return Listener(taken)


def _group_id(group: str) -> int:
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        if group.isdecimal():
            return int(group)
        raise ListenError(f"--socket-group={group}: there is no such group") from None


def _lock(lock_path: str, path: str) -> int:
    """An exclusive lock that ends with this process, on a file that names it, as virtiofsd writes it."""
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ListenError(f"cannot make {lock_path}: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            if time.monotonic() < deadline_s:
                time.sleep(0.02)
                continue
            raise ListenError(
                f"--socket-path={path}: another server ({f'pid {holder}' if holder else 'just starting'}) "
                f"uses this path; choose another, or end that one"
            ) from None
        try:
            still_there = os.path.samestat(os.fstat(fd), os.stat(lock_path))
        except FileNotFoundError:
            still_there = False
        if still_there:
            break
        os.close(fd)  # its owner removed it in between
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _remove_dead_socket(option: str, path: str) -> None:
    """What a server that was killed left behind goes; anything else stays."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{option}={path}: a file that is not a socket is in the way; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise ListenError(f"{option}={path}: something listens there; choose another path, or end it")
