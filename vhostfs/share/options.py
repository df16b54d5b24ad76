# SPDX-License-Identifier: Apache-2.0
"""Owns what can be asked of `vhostfs serve`: the options as values, their defaults, and which go together.
Must not know argparse, touch the system (check_shared_dir apart) or act on any option.
Specification: docs/migrating-from-virtiofsd.md (the option table)."""

from __future__ import annotations

import enum
import errno
import os
import stat

from ..errors import UserError
from ..record import Record
from .capabilities import NO_CHANGES, CapabilityChanges
from .idmap import IdMapError, IdRule, NamespaceRange, check_namespace_ranges, check_translations
from .xattrmap import XattrRule

TAG_MAX_BYTES = 36  # struct virtio_fs_config.tag
MAX_REQUEST_QUEUES = 64
MAX_THREAD_POOL_SIZE = 1024
MAX_TIMEOUT_S = 366 * 86400.0
MAX_EVENT_QUEUE = 1 << 24  # elements; some 5 GB when all names are long
MAX_WATCHES = 1 << 24
CONTROL_SUFFIX = ".ctl"


class OptionError(UserError):
    """Options that cannot be meant; the text says what was seen and what would be right."""

    exit_status = 2


class CacheMode(enum.IntEnum):
    """--cache; the numbers of enum vf_cache_mode in native/api.h."""

    NEVER = 0
    METADATA = 1
    AUTO = 2
    ALWAYS = 3
    COHERENT = 4


class HandleMode(enum.IntEnum):
    """--inode-file-handles; the numbers of enum vf_handle_mode in native/api.h."""

    NEVER = 0
    PREFER = 1
    MANDATORY = 2


class SandboxMode(enum.Enum):
    NAMESPACE = "namespace"
    CHROOT = "chroot"
    NONE = "none"


class SeccompAction(enum.Enum):
    """What a system call that is not on the list does to the process."""

    NONE = "none"
    KILL = "kill"
    LOG = "log"
    TRAP = "trap"


class EventsMode(enum.Enum):
    """--events: where changes on the host are learnt from, to be told to the guest."""

    AUTO = "auto"
    FANOTIFY = "fanotify"  # either of the next two, the first where it is permitted
    FANOTIFY_FILESYSTEM = "fanotify:filesystem"
    FANOTIFY_INODES = "fanotify:inodes"
    INOTIFY = "inotify"
    OFF = "off"


class DeliveryMode(enum.Enum):
    """--delivery: how events travel to the guest (docs/protocol.md, sections 3 and 4.4)."""

    AUTO = "auto"  # the notification queue where it can be had, else parked requests
    VIRTQUEUE = "virtqueue"
    PARKED = "parked"


class LogLevel(enum.Enum):
    OFF = "off"
    ERROR = "error"
    WARN = "warn"
    INFO = "info"
    DEBUG = "debug"
    TRACE = "trace"


# How long the guest may keep names and attributes, in seconds: virtiofsd's figures.
CACHE_TIMEOUT_S = {
    CacheMode.NEVER: 0.0,
    CacheMode.METADATA: 86400.0,
    CacheMode.AUTO: 1.0,
    CacheMode.ALWAYS: 86400.0,
    CacheMode.COHERENT: 1.0,
}
LASTING_TIMEOUT_S = 3600.0
"""With CacheMode.COHERENT, of what the guest is told when it changes: as good as for ever."""


class ServeOptions(Record, kw_only=True):
    """Everything that one server was asked for. Raises OptionError when the parts do not go together."""

    shared_dir: str
    socket_path: str | None = None
    listen_fd: int | None = None
    socket_group: str | None = None
    tag: str | None = None
    once: bool = False
    num_request_queues: int = 1
    thread_pool_size: int = 4  # idle threads cost nothing, a queue that waits for a disk does

    cache: CacheMode = CacheMode.AUTO
    timeout_s: float | None = None  # None: by cache mode
    readdirplus: bool = True
    writeback: bool = False
    allow_direct_io: bool = False
    allow_mmap: bool = False
    posix_lock: bool = True
    flock: bool = True
    killpriv_v2: bool = False
    announce_submounts: bool = True
    preserve_noatime: bool = False
    readonly: bool = False

    xattr: bool = False
    posix_acl: bool = False
    security_label: bool = False
    xattr_rules: tuple[XattrRule, ...] = ()

    sandbox: SandboxMode = SandboxMode.NAMESPACE
    seccomp: SeccompAction = SeccompAction.KILL
    modcaps: CapabilityChanges = NO_CHANGES
    inode_file_handles: HandleMode = HandleMode.PREFER
    rlimit_nofile: int | None = None  # None: as many as sensible; 0: left as it is
    uid_map: tuple[NamespaceRange, ...] = ()
    gid_map: tuple[NamespaceRange, ...] = ()
    translate_uid: tuple[IdRule, ...] = ()
    translate_gid: tuple[IdRule, ...] = ()

    events: EventsMode = EventsMode.AUTO
    delivery: DeliveryMode = DeliveryMode.AUTO
    event_queue: int = 131072  # elements that wait for a slow guest
    max_watches: int = 524288  # what systems that watch large trees allow inotify
    fan_rename: bool = True  # False: as if the kernel had none
    negotiate: tuple[tuple[str, int], ...] = ()  # fuse.forced: for experiments
    control_socket: str | None = None  # None: CONTROL_SUFFIX behind socket_path
    control_socket_wanted: bool = True

    log_level: LogLevel = LogLevel.INFO
    syslog: bool = False

    def __post_init__(self) -> None:
        self._check_socket()
        self._check_numbers()
        self._check_ids()
        self._check_events()

    def _check_socket(self) -> None:
        if not self.shared_dir:
            raise OptionError("no directory to share; give --shared-dir=DIR")
        if self.socket_path is None and self.listen_fd is None:
            raise OptionError("no socket; give --socket-path=PATH, or --fd=N for one that already listens")
        if self.socket_path is not None and self.listen_fd is not None:
            raise OptionError("--socket-path and --fd exclude each other; give one of them")
        if self.socket_path == "":
            raise OptionError("--socket-path is empty; give the path that the VMM connects to")
        if self.listen_fd is not None and self.listen_fd < 0:
            raise OptionError(f"--fd={self.listen_fd}: a descriptor number is 0 or more")
        if self.socket_group is not None and self.listen_fd is not None:
            raise OptionError(
                "--socket-group has no meaning with --fd: whoever made the socket sets its group"
            )
        if self.tag is not None and not 1 <= len(os.fsencode(self.tag)) <= TAG_MAX_BYTES:
            raise OptionError(
                f"--tag='{self.tag}' has {len(os.fsencode(self.tag))} bytes; it may have 1 to {TAG_MAX_BYTES}"
            )

        if self.control_socket == "":
            raise OptionError("--control-socket is empty; give a path, or --no-control-socket")
        if self.control_socket is not None and self.control_socket == self.socket_path:
            raise OptionError("--control-socket and --socket-path name the same file; the VMM needs its own")

    def _check_events(self) -> None:
        if self.cache is CacheMode.COHERENT:
            self._check_coherent()
        if not 1 <= self.event_queue <= MAX_EVENT_QUEUE:
            raise OptionError(f"--event-queue={self.event_queue}: 1 to {MAX_EVENT_QUEUE} are possible")
        if not 1 <= self.max_watches <= MAX_WATCHES:
            raise OptionError(f"--max-watches={self.max_watches}: 1 to {MAX_WATCHES} are possible")
        if self.tag is None and self.delivery is DeliveryMode.VIRTQUEUE:
            raise OptionError(
                "--delivery=virtqueue needs --tag=TAG: the guest learns of the notification queue "
                "from the configuration space, which has the tag in it"
            )

    def _check_coherent(self) -> None:
        if self.events not in (EventsMode.AUTO, EventsMode.FANOTIFY, EventsMode.FANOTIFY_FILESYSTEM):
            raise OptionError(
                f"--cache=coherent and --events={self.events.value} exclude each other: every change must be "
                "seen, which only --events=fanotify:filesystem (or auto) does"
            )
        if self.writeback:
            raise OptionError(
                "--cache=coherent and --writeback exclude each other: with write-back the guest trusts sizes "
                "and times of its own"
            )

    def _check_numbers(self) -> None:
        if not 1 <= self.num_request_queues <= MAX_REQUEST_QUEUES:
            raise OptionError(
                f"--num-request-queues={self.num_request_queues}: 1 to {MAX_REQUEST_QUEUES} are possible"
            )
        if not 0 <= self.thread_pool_size <= MAX_THREAD_POOL_SIZE:
            raise OptionError(
                f"--thread-pool-size={self.thread_pool_size}: 0 to {MAX_THREAD_POOL_SIZE} are possible"
            )
        if self.rlimit_nofile is not None and self.rlimit_nofile < 0:
            raise OptionError(f"--rlimit-nofile={self.rlimit_nofile}: give a number of descriptors, or 0")
        if self.timeout_s is not None and not 0 <= self.timeout_s <= MAX_TIMEOUT_S:
            raise OptionError(f"-o timeout={self.timeout_s:g}: 0 to {MAX_TIMEOUT_S:.0f} seconds are possible")

    def _check_ids(self) -> None:
        for name, ranges in (("--uid-map", self.uid_map), ("--gid-map", self.gid_map)):
            if ranges and self.sandbox is not SandboxMode.NAMESPACE:
                raise OptionError(
                    f"{name} maps ids by a user namespace, which --sandbox={self.sandbox.value} lacks; "
                    f"use --sandbox=namespace, or {name.replace('--', '--translate-').removesuffix('-map')}"
                )
            try:
                check_namespace_ranges(ranges)
            except IdMapError as error:
                raise OptionError(f"{name}: {error}") from None
        for name, rules in (("--translate-uid", self.translate_uid), ("--translate-gid", self.translate_gid)):
            if rules and self.posix_acl:
                raise OptionError(
                    f"{name} and --posix-acl exclude each other: ids inside ACLs are not translated"
                )
            try:
                check_translations(rules)
            except IdMapError as error:
                raise OptionError(f"{name}: {error}") from None

    @property
    def xattr_wanted(self) -> bool:
        """Whether extended attributes are served: asked for, or needed by what was asked for."""
        return self.xattr or self.posix_acl or self.security_label or bool(self.xattr_rules)

    @property
    def readdirplus_wanted(self) -> bool:
        """READDIRPLUS fills caches, so it is off where there are none to keep."""
        return self.readdirplus and self.cache is not CacheMode.NEVER

    @property
    def events_wanted(self) -> bool:
        """Whether the host's events are offered."""
        return self.events is not EventsMode.OFF

    @property
    def control_path(self) -> str | None:
        """Where the control socket is made; None: nowhere."""
        if not self.control_socket_wanted:
            return None
        if self.control_socket is None and self.socket_path is not None:
            return self.socket_path + CONTROL_SUFFIX
        return self.control_socket

    @property
    def cache_timeout_s(self) -> float:
        """How long the guest may keep names and attributes, in seconds."""
        return CACHE_TIMEOUT_S[self.cache] if self.timeout_s is None else self.timeout_s


def check_shared_dir(path: str) -> str:
    """The real path of a directory that can be shared. Raises OptionError saying why not."""
    try:
        real = os.path.realpath(path, strict=True)
        mode = os.stat(real).st_mode
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise OptionError(f"--shared-dir={path}: there is no such directory") from None
        if error.errno == errno.ENOTDIR:
            raise OptionError(f"--shared-dir={path}: part of the path is not a directory") from None
        raise OptionError(f"--shared-dir={path}: {os.strerror(error.errno or errno.EIO)}") from None
    if not stat.S_ISDIR(mode):
        raise OptionError(f"--shared-dir={path} is not a directory; only directories can be shared")
    if not os.access(real, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OptionError(f"--shared-dir={path}: not readable by uid {os.geteuid()} (needs r and x)")
    return real
