# SPDX-License-Identifier: Apache-2.0
"""Owns the list of system calls that a serving process may make.
Must not know when the filter is loaded (sandbox.py) or how (native/process.c).
Specification: syscalls(2); what native/*.c, CPython and uvloop call while they serve must be here."""

from __future__ import annotations

# The share: operations on files and directories, all by descriptor. Nothing here takes more rights
# than the capabilities that are left.
_FILES = (
    "access chdir chmod chown copy_file_range creat faccessat faccessat2 fadvise64 fallocate fchdir fchmod "
    "fchmodat fchmodat2 fchown fchownat fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat "
    "fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr lgetxattr linkat listxattr "
    "llistxattr lremovexattr lseek lsetxattr lstat mkdirat mknodat name_to_handle_at newfstatat open "
    "open_by_handle_at openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead "
    "readlink readlinkat readv removexattr renameat renameat2 sendfile setxattr splice stat statfs statx "
    "symlinkat sync_file_range syncfs truncate umask unlink unlinkat utimensat write writev"
)
# Host events. The groups themselves are made while the server still has its rights; an inotify instance of
# its own is what native/fanotify_move.c waits by.
_EVENTS = "fanotify_mark inotify_add_watch inotify_init1 inotify_rm_watch"
# Acting as the guest's callers: per-thread credentials.
_CREDENTIALS = (
    "capget capset getegid geteuid getgid getgroups getresgid getresuid getuid prctl setfsgid setfsuid "
    "setgroups setresgid setresuid unshare"
)
# The vhost-user connection (already listening: no socket, bind or connect) and event loops.
# Of ioctl a few requests are allowed: allowed_ioctls in native/process.c.
_CONNECTION = (
    "accept accept4 close close_range dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 "
    "epoll_wait eventfd2 fcntl getpeername getsockname getsockopt ioctl pipe pipe2 poll ppoll pselect6 "
    "recvfrom recvmsg select sendmsg sendto setsockopt shutdown socketpair timerfd_create "
    "timerfd_gettime timerfd_settime"
)
# Memory, threads, time and signals of the process itself.
_PROCESS = (
    "brk clock_getres clock_gettime clock_nanosleep clone clone3 exit exit_group futex futex_waitv "
    "get_robust_list getcpu getpid getppid getpriority getrandom getrlimit getrusage gettid gettimeofday "
    "madvise membarrier mmap mprotect mremap munmap nanosleep prlimit64 restart_syscall rseq rt_sigaction "
    "rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait "
    "rt_tgsigqueueinfo sched_getaffinity sched_getparam sched_getscheduler sched_setattr sched_yield "
    "set_robust_list sigaltstack sysinfo tgkill time times tkill uname"
)

ALLOWED_SYSTEM_CALLS: tuple[str, ...] = tuple(
    sorted(" ".join((_FILES, _EVENTS, _CREDENTIALS, _CONNECTION, _PROCESS)).split())
)
