# SPDX-License-Identifier: Apache-2.0
"""Owns the walls around a serving process: namespaces, root directory, capabilities, system call filter.
Must not know sockets, vhost-user or logging; runs before any thread or event loop exists.
Specification: virtiofsd(1) "SANDBOXING"; namespaces(7), pivot_root(2), capabilities(7), seccomp(2)."""

from __future__ import annotations

import contextlib
import errno
import linecache
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from importlib.machinery import BuiltinImporter, FrozenImporter
from types import TracebackType
from typing import Any, NoReturn

from .._native import ffi, lib
from ..errors import UserError
from ..record import Record
from .capabilities import SERVER_CAPABILITIES, Capability, capability_mask
from .idmap import NamespaceRange
from .options import SandboxMode, SeccompAction, ServeOptions
from .seccomp import ALLOWED_SYSTEM_CALLS

_log = logging.getLogger("vhostfs.sandbox")

# linux/sched.h, linux/mount.h
_CLONE_NEWNS = 0x0002_0000
_CLONE_NEWUSER = 0x1000_0000
_CLONE_NEWPID = 0x2000_0000
_CLONE_NEWNET = 0x4000_0000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SLAVE = 0x8_0000

# How long a serving process may take to end after SIGTERM before it is killed: longer than it gives
# itself (GRACE_S in vhostfs/server.py).
STOP_TIMEOUT_S = 12.0
STOP_REPEAT_S = 0.5

_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class SandboxError(UserError):
    """A wall that could not be put up; the text says what was refused and what to try."""


class SandboxedShare(Record):
    """What the serving process holds inside; both descriptors are O_PATH directories and its own."""

    root_fd: int
    proc_fd_dir: int  # /proc/self/fd and nothing above it
    supervised: bool  # a parent waits outside and calls when_ended; else the caller must


def enter_sandbox(
    options: ServeOptions,
    shared_dir: str,
    *,
    keep_fds: Collection[int],
    listener_fds: Collection[int],
    when_ended: Callable[[], None],
    while_privileged: Callable[[int], frozenset[Capability]],
) -> SandboxedShare:
    """
    Puts the calling process, which must have one thread, behind the walls that options ask for.

    With --sandbox=namespace or chroot the call returns in a child only; the calling process stays
    outside, passes signals on, calls when_ended when the child is gone and exits with its status.
    shared_dir: the real path. keep_fds: besides 0, 1 and 2, what stays open in the serving process
    (listener_fds are kept too). Raises SandboxError.

    The steps, in this order and no other:
     1. the caller: log, socket, lock file, RLIMIT_NOFILE, every import (step 8 ends them)
     2. supplementary groups are dropped, so that no caller of the guest has them
     3. namespaces; the child is process 1 of its own, and dies with its parent
     4. descriptors that were inherited and not asked for are closed
     5. mounts, and the root directory becomes the share
     6. root_fd and proc_fd_dir are opened
     7. while_privileged(root_fd): what takes rights that step 9 ends (open_by_handle_at is probed here;
        fanotify_init belongs here). It returns capabilities to keep besides the server's own.
     8. nothing is imported from here on: Python's path would lead into the share
     9. capabilities are dropped, no_new_privs is set
    10. the system call filter is loaded
    11. the caller: threads, event loop
    """
    _drop_supplementary_groups()
    match options.sandbox:
        case SandboxMode.NAMESPACE:
            _unshare_for_child(options.uid_map, options.gid_map)
        case SandboxMode.CHROOT if not _effective(Capability.SYS_CHROOT):
            raise SandboxError(
                "--sandbox=chroot needs root (CAP_SYS_CHROOT); use --sandbox=namespace or none"
            )
    supervised = options.sandbox is not SandboxMode.NONE
    if supervised:
        alive_fd = _fork_supervised(listener_fds, when_ended)
        if options.sandbox is SandboxMode.NAMESPACE:
            _unshare_in_child(options.uid_map, options.gid_map)
        _die_with_parent(alive_fd)
        _close_all_but({0, 1, 2, *listener_fds, *keep_fds})
    match options.sandbox:
        case SandboxMode.NAMESPACE:
            proc_fd_dir = _pivot_into(shared_dir)
            root = "/"
        case SandboxMode.CHROOT:
            proc_fd_dir = _open_directory("/proc/self/fd")
            os.chroot(shared_dir)
            os.chdir("/")
            root = "/"
        case SandboxMode.NONE:
            proc_fd_dir = _open_directory("/proc/self/fd")
            root = shared_dir
    root_fd = _open_directory(root)
    extra = while_privileged(root_fd)
    _seal_interpreter()
    _drop_capabilities((SERVER_CAPABILITIES | extra | options.modcaps.added) - options.modcaps.removed)
    _load_filter(options.seccomp)
    return SandboxedShare(root_fd, proc_fd_dir, supervised)


def _check(result: int, what: str, hint: str = "") -> None:
    if result < 0:
        raise SandboxError(f"{what}: {os.strerror(-result)}{hint}")


def _effective(capability: Capability) -> bool:
    return bool(lib.vf_effective_capabilities() & 1 << capability)


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        hint = "; the server needs /proc to be mounted" if path.startswith("/proc") else ""
        raise SandboxError(f"cannot open {path}: {error.strerror}{hint}") from None


def _drop_supplementary_groups() -> None:
    if not os.getgroups():
        return
    if not _effective(Capability.SETGID):
        return  # then no other ids can be taken on either
    # A user namespace with one id in it denies it (user_namespaces(7)).
    with contextlib.suppress(PermissionError):
        os.setgroups([])


# ---- namespaces


def needs_user_namespace(uid_map: tuple[NamespaceRange, ...], gid_map: tuple[NamespaceRange, ...]) -> bool:
    """Whether --sandbox=namespace puts the server into a user namespace of its own."""
    return os.geteuid() != 0 or bool(uid_map or gid_map)


def _unshare_for_child(uid_map: tuple[NamespaceRange, ...], gid_map: tuple[NamespaceRange, ...]) -> None:
    """A new pid namespace for the child to be; a new user namespace around it where needed."""
    flags = _CLONE_NEWPID
    if not needs_user_namespace(uid_map, gid_map):
        hint = "; in a container use --sandbox=chroot" if not _effective(Capability.SYS_ADMIN) else ""
        _check(lib.vf_unshare(flags), "--sandbox=namespace: cannot make namespaces", hint)
        return
    uid_ranges = uid_map or (NamespaceRange(os.geteuid(), os.geteuid(), 1),)
    gid_ranges = gid_map or (NamespaceRange(os.getegid(), os.getegid(), 1),)
    # The map is written from outside: only a process there may map ids other than its own.
    go_read, go_write = os.pipe()
    done_read, done_write = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(go_write)
        os.close(done_read)
        _map_ids_of_parent(go_read, done_write, uid_ranges, gid_ranges)
    os.close(go_read)
    os.close(done_write)
    hint = "; user namespaces may be switched off here: use --sandbox=none, or run as root"
    result = lib.vf_unshare(flags | _CLONE_NEWUSER)
    if result == 0:
        os.write(go_write, b"g")
    os.close(go_write)
    answer = b""
    while part := os.read(done_read, 4096):
        answer += part
    os.close(done_read)
    os.waitpid(mapper, 0)
    _check(result, "--sandbox=namespace: cannot make namespaces", hint)
    if answer != b"ok":
        raise SandboxError(f"--sandbox=namespace: cannot map ids: {answer.decode(errors='replace')}")


def _unshare_in_child(uid_map: tuple[NamespaceRange, ...], gid_map: tuple[NamespaceRange, ...]) -> None:
    """
    New mount and network namespaces, and id 0 where a map has it.

    Not in the parent: pivot_root(2) moves every process of the mount namespace into the share, and the
    parent must still reach the socket's path.
    """
    _check(lib.vf_unshare(_CLONE_NEWNS | _CLONE_NEWNET), "--sandbox=namespace: cannot make namespaces")
    if any(r.inside == 0 for r in gid_map):
        os.setresgid(0, 0, 0)
    if any(r.inside == 0 for r in uid_map):
        os.setresuid(0, 0, 0)
    if uid_map or gid_map:
        _drop_supplementary_groups()


def _map_ids_of_parent(
    go_read: int,
    done_write: int,
    uid_ranges: tuple[NamespaceRange, ...],
    gid_ranges: tuple[NamespaceRange, ...],
) -> NoReturn:
    """In a child that stayed in the old user namespace: waits for a byte, writes both maps, reports."""
    answer = "stopped on the way"
    try:
        if os.read(go_read, 1):
            pid = os.getppid()
            _write_id_map(pid, "uid", uid_ranges, os.geteuid())
            _write_id_map(pid, "gid", gid_ranges, os.getegid())
            answer = "ok"
    except Exception as error:
        answer = str(error)
    finally:
        os.write(done_write, answer.encode(errors="replace"))
        os._exit(0)


def _write_id_map(pid: int, kind: str, ranges: tuple[NamespaceRange, ...], own_id: int) -> None:
    privileged = _effective(Capability.SETUID if kind == "uid" else Capability.SETGID)
    only_own = len(ranges) == 1 and ranges[0].outside == own_id and ranges[0].size == 1
    if privileged or only_own:
        if kind == "gid" and not privileged:
            # The kernel's condition for mapping one's own group without rights (user_namespaces(7)).
            _write_proc(f"/proc/{pid}/setgroups", "deny")
        _write_proc(f"/proc/{pid}/{kind}_map", "".join(f"{r.inside} {r.outside} {r.size}\n" for r in ranges))
        return
    import subprocess  # only here, and before step 8: it is slow to import

    command = [f"new{kind}map", str(pid)]
    for r in ranges:
        command += [str(r.inside), str(r.outside), str(r.size)]
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except (FileNotFoundError, PermissionError):
        raise SandboxError(
            f"{command[0]} is not installed (Debian: uidmap); without it only your own id can be mapped, "
            f"as --{kind}-map=:0:{own_id}:1:"
        ) from None
    if run.returncode:
        raise SandboxError(
            f"{command[0]}: {run.stderr.decode(errors='replace').strip()} (see /etc/sub{kind})"
        )


def _write_proc(path: str, text: str) -> None:
    # One write(2): the kernel takes the whole map at once.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


# ---- the parent outside


def _fork_supervised(listener_fds: Collection[int], when_ended: Callable[[], None]) -> int:
    """Returns in the child, with a descriptor that turns readable when the parent is gone."""
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS | {signal.SIGCHLD})
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child:
        os.close(alive_read)
        for listener_fd in listener_fds:
            os.close(listener_fd)  # else the socket would look alive when the server is not
        _supervise(child, when_ended)
    os.close(alive_write)
    # Process 1 of a pid namespace gets no signal that it has no handler for.
    for number in _STOP_SIGNALS:
        signal.signal(number, _quit)
    signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    return alive_read


def _die_with_parent(alive_fd: int) -> None:
    """Must come after the last change of ids, which undoes it (PR_SET_PDEATHSIG(2const))."""
    lib.vf_die_with_parent(signal.SIGKILL)
    if select.select([alive_fd], [], [], 0)[0]:
        os._exit(1)  # the parent was gone before it could be followed
    os.close(alive_fd)


def _quit(number: int, _frame: object) -> None:
    os._exit(0)


def _supervise(child: int, when_ended: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        # What removing the socket and the lock file, and a signal to another user, may take.
        lib.vf_keep_capabilities(capability_mask(frozenset({Capability.DAC_OVERRIDE, Capability.KILL})))
        status = _await_child(child)
        when_ended()
    except BaseException:
        _log.exception("the supervising process failed")
    finally:
        logging.shutdown()
        os._exit(status)


def _await_child(child: int) -> int:
    """Passes stop signals on to the child; its exit status when it has ended."""
    deadline: float | None = None
    while True:
        timeout_s = 3600.0
        if deadline is not None:
            timeout_s = min(STOP_REPEAT_S, max(0.0, deadline - time.monotonic()))
        info = signal.sigtimedwait(_STOP_SIGNALS | {signal.SIGCHLD}, timeout_s)
        stop = info is not None and info.si_signo in _STOP_SIGNALS
        # Repeated: CPython may take a signal just before it enters a system call that waits, and then waits.
        if stop or (info is None and deadline is not None):
            os.kill(child, signal.SIGTERM)
        if stop:
            deadline = time.monotonic() + STOP_TIMEOUT_S if deadline is None else deadline
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if deadline is not None and time.monotonic() >= deadline:
            _log.warning("the server did not end within %.0f s of SIGTERM and was killed", STOP_TIMEOUT_S)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number == signal.SIGSYS:
        _log.error(
            "the server made a system call that its filter forbids and was killed; "
            "--seccomp=trap says which, --seccomp=log lets it pass and logs it (kernel log, type=1326)"
        )
    elif deadline is None:
        _log.error("the server was ended by %s", signal.Signals(number).name)
    return 128 + number


def _close_all_but(keep: set[int]) -> None:
    first = 0
    for fd in sorted(keep):
        if first < fd:  # CPython 3.11 takes an empty range for all descriptors
            os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 0x7FFF_FFFF)


# ---- mounts


def _pivot_into(shared_dir: str) -> int:
    """Makes shared_dir, with what is mounted below it, the root directory; returns proc_fd_dir."""
    null = ffi.NULL
    directory = os.fsencode(shared_dir)
    # What the host mounts later still shows up here; nothing done here shows up there.
    result = lib.vf_mount(null, b"/", null, _MS_SLAVE | _MS_REC, null)
    if result == -errno.EINVAL:
        raise SandboxError(
            "--sandbox=namespace: the root directory is no mount point, as in a chroot, and cannot be "
            "exchanged for the share; use --sandbox=chroot"
        )
    _check(result, "cannot make mounts private")
    # A mount of its own, so that '..' from the descriptor leads nowhere; it is taken away again at once,
    # which leaves it to the descriptor alone.
    _check(lib.vf_mount(b"/proc/self/fd", b"/proc", null, _MS_BIND, null), "cannot bind /proc/self/fd")
    proc_fd_dir = _open_directory("/proc")
    _check(lib.vf_umount_detach(b"/proc"), "cannot unmount /proc/self/fd")
    if shared_dir == "/":
        os.chdir("/")
        return proc_fd_dir
    _check(
        lib.vf_mount(directory, directory, null, _MS_BIND | _MS_REC, null),
        f"cannot bind-mount {shared_dir}",
    )
    os.chdir(shared_dir)
    # pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one.
    _check(lib.vf_pivot_root(b".", b"."), f"cannot make {shared_dir} the root directory")
    _check(lib.vf_umount_detach(b"."), "cannot leave the old root directory")
    os.chdir("/")
    return proc_fd_dir


# ---- the process itself


def _seal_interpreter() -> None:
    """
    From here on Python reads no file by path.

    The root directory is the share, so a module found by path would be one that the guest wrote, and a
    source line shown in a traceback may come from a FIFO that never answers.
    """
    time.tzset()  # the C library reads /etc/localtime now and not again
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter]
    sources: Any = linecache
    sources.updatecache = lambda filename, module_globals=None: []
    sources.checkcache = lambda filename=None: None
    sys.excepthook = _log_exception
    threading.excepthook = lambda args: _log_exception(args.exc_type, args.exc_value, args.exc_traceback)


def _log_exception(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    _log.error("%s", "".join(traceback.format_exception(kind, error, trace)).rstrip())


def give_up_sys_admin() -> None:
    """For experiments: as a server that never had CAP_SYS_ADMIN. Of what comes later nothing needs it."""
    _check(
        lib.vf_keep_capabilities(capability_mask(frozenset(Capability) - {Capability.SYS_ADMIN})),
        "cannot drop CAP_SYS_ADMIN",
    )


def _drop_capabilities(keep: frozenset[Capability]) -> None:
    _check(lib.vf_keep_capabilities(capability_mask(keep)), "cannot drop capabilities")


_SECCOMP_ACTIONS = {SeccompAction.KILL: 0, SeccompAction.TRAP: 1, SeccompAction.LOG: 2}
"""enum vf_seccomp_action of the C core."""


def _load_filter(action: SeccompAction) -> None:
    if action is SeccompAction.NONE:
        return
    names = [ffi.new("char[]", name.encode()) for name in ALLOWED_SYSTEM_CALLS]
    result = lib.vf_seccomp_allow(ffi.new("char *[]", names), len(names), _SECCOMP_ACTIONS[action])
    hint = "; this kernel may lack seccomp: use --seccomp=none" if result == -errno.EINVAL else ""
    _check(result, "cannot load the system call filter", hint)
