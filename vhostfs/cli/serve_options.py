# SPDX-License-Identifier: Apache-2.0
"""Owns the spelling of serve's options: ours, Rust virtiofsd's, and the old C virtiofsd's `-o` words.
Must not act on any of them; the result is share.options.ServeOptions.
Specification: docs/migrating-from-virtiofsd.md (the option table)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..fuse.forced import KEYS, parse_pair
from ..record import field_names
from ..share.capabilities import parse_modcaps
from ..share.idmap import parse_namespace_range, parse_translation
from ..share.options import (
    CacheMode,
    DeliveryMode,
    EventsMode,
    HandleMode,
    LogLevel,
    OptionError,
    SandboxMode,
    SeccompAction,
    ServeOptions,
)
from ..share.xattrmap import parse_xattrmap
from .parser import Collect, Parser, checked, choice, nearest, whole_number

_DESCRIPTION = "Serves a host directory to one VM: a vhost-user back end for virtio-fs."

_EXAMPLES = """\
examples:
  vhostfs serve --socket-path /run/vm1.sock --shared-dir /srv/vm1
  vhostfs serve --socket-path /run/vm1.sock --shared-dir /srv/vm1 --tag vm1 --events inotify
  vhostfs serve --socket-path /run/vm1.sock --shared-dir ~/project --sandbox none --once
  vhostfs serve --socket-path /run/vm1.sock --shared-dir /srv/vm1 --cache never --xattr --readonly

with QEMU (memory must be shared with the server):
  qemu-system-x86_64 ... -chardev socket,id=fs,path=/run/vm1.sock \\
      -device vhost-user-fs-pci,chardev=fs,tag=share \\
      -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem
and in the guest:
  mount -t virtiofs share /mnt

All options of virtiofsd are understood, the old -o ones too: docs/migrating-from-virtiofsd.md.
"""

_CACHE = choice(
    {
        "auto": CacheMode.AUTO,
        "always": CacheMode.ALWAYS,
        "never": CacheMode.NEVER,
        "metadata": CacheMode.METADATA,
        "coherent": CacheMode.COHERENT,
    },
    hidden={"none": CacheMode.NEVER},
)
_SANDBOX = choice({mode.value: mode for mode in SandboxMode})
_SECCOMP = choice({action.value: action for action in SeccompAction})
_HANDLES = choice({mode.name.lower(): mode for mode in HandleMode}, hidden={"fallback": HandleMode.PREFER})
_DELIVERY = choice({mode.value: mode for mode in DeliveryMode})
_EVENTS = choice({mode.value: mode for mode in EventsMode})
_LOG_LEVEL = choice(
    {level.value: level for level in LogLevel}, hidden={"err": LogLevel.ERROR, "warning": LogLevel.WARN}
)

_FIELDS = frozenset(field_names(ServeOptions))


class _DebugFlag(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.log_level = LogLevel.DEBUG


def _timeout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds") from None
    if value != value:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return value


def add_arguments(parser: Parser) -> None:
    """
    Only what is given ends up in the namespace (argparse.SUPPRESS): ServeOptions has the defaults.
    """
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.usage = f"{parser.prog} --socket-path PATH --shared-dir DIR [OPTIONS]"
    parser.set_defaults(compat=[])
    _add_general(parser)
    _add_connection(parser)
    _add_caching(parser)
    _add_features(parser)
    _add_events(parser)
    _add_ids(parser)
    _add_walls(parser)
    _add_logging(parser)
    _add_experiments(parser)
    _add_hidden(parser)


def _adder(parser: Parser, title: str | None) -> Callable[..., None]:
    group = parser.add_argument_group(title) if title else parser

    def add(*names: str, **settings: Any) -> None:
        settings.setdefault("default", argparse.SUPPRESS)
        group.add_argument(*names, **settings)

    return add


def _switch(add: Callable[..., None], name: str, help_on: str | None, help_off: str | None) -> None:
    """--name and --no-name; the last one given counts."""
    dest = name.replace("-", "_")
    add(f"--{name}", dest=dest, action="store_true", help=help_on or argparse.SUPPRESS)
    add(f"--no-{name}", dest=dest, action="store_false", help=help_off or argparse.SUPPRESS)


def _add_general(parser: Parser) -> None:
    add = _adder(parser, None)
    add("-V", "--version", action="version", version=f"vhostfs {__version__}", help="show the version")
    add(
        "--print-capabilities",
        action="store_true",
        help="print what this back end can do as JSON and exit (libvirt asks)",
    )


def _add_connection(parser: Parser) -> None:
    add = _adder(parser, "share and connection")
    add("--shared-dir", metavar="DIR", help="the directory that the guest gets")
    add(
        "--tag",
        metavar="TAG",
        help="name of the share for the guest's mount, where the VMM asks the back end for it",
    )
    add("--socket-path", "--socket", metavar="PATH", help="socket to make; the VMM connects to it")
    add("--socket-group", metavar="GROUP", help="group that may connect to the socket")
    add(
        "--fd",
        metavar="N",
        dest="listen_fd",
        type=whole_number,
        help="a socket that already listens, by descriptor",
    )
    add("--once", action="store_true", help="end when the VMM disconnects (default: wait for the next)")
    add(
        "--num-request-queues",
        metavar="N",
        type=whole_number,
        help="request queues shown in the device's configuration (default: 1)",
    )
    add(
        "--thread-pool-size",
        metavar="N",
        type=whole_number,
        help="threads for requests that may wait for storage, and that help with large READs and the end "
        "of large files; 0: the queue's own does all (default: 4)",
    )


def _add_caching(parser: Parser) -> None:
    add = _adder(parser, "what the guest may cache")
    add(
        "--cache",
        metavar="MODE",
        type=_CACHE,
        help="auto: names and attributes for 1 s; always: as long as it likes; coherent: until it is told of "
        "a change, where every change is seen and its driver takes that; metadata: all but file data; "
        "never: nothing (default: auto)",
    )
    _switch(add, "writeback", "the guest may hold written data back", None)
    add("--allow-mmap", action="store_true", help="shared mmap also with --cache=never and metadata")
    add("--allow-direct-io", action="store_true", help="pass O_DIRECT of guest programs on to the host")
    _switch(add, "readdirplus", None, "do not send attributes along with directory entries")


def _add_features(parser: Parser) -> None:
    add = _adder(parser, "what the guest may do")
    add("--readonly", action="store_true", help="the guest cannot change anything")
    _switch(add, "xattr", "extended attributes", None)
    add(
        "--xattrmap",
        metavar="RULES",
        dest="xattr_rules",
        type=checked(parse_xattrmap),
        help="rename or hide extended attributes, as :map::user.virtiofs.: (implies --xattr)",
    )
    _switch(add, "posix-acl", "POSIX ACLs (implies --xattr)", None)
    _switch(add, "security-label", "label new files as the guest asks (SELinux; implies --xattr)", None)
    _switch(add, "posix-lock", None, "keep fcntl locks inside the guest (default: they lock on the host)")
    _switch(add, "flock", None, "keep flock locks inside the guest (default: they lock on the host)")
    _switch(add, "announce-submounts", None, "hide from the guest which directories are mount points")
    _switch(add, "killpriv-v2", "the host clears set-id bits on writes (saves requests)", None)
    add("--preserve-noatime", action="store_true", help="pass O_NOATIME on, which fails for files of others")


def _add_events(parser: Parser) -> None:
    add = _adder(parser, "changes on the host, told to the guest (docs/events.md)")
    add(
        "--events",
        metavar="SOURCE",
        type=_EVENTS,
        help="auto; fanotify, also fanotify:filesystem and fanotify:inodes to choose what is marked; "
        "inotify; off (default: auto)",
    )
    add(
        "--delivery",
        metavar="WAY",
        type=_DELIVERY,
        help="how they reach the guest: virtqueue, the notification queue (needs --tag and a VMM with it); "
        "parked, requests that wait here (any VMM); auto, the first that can be had (default)",
    )
    add(
        "--event-queue",
        metavar="N",
        type=whole_number,
        help="events that wait for a slow guest; it is told when more were lost (default: 131072)",
    )
    add(
        "--max-watches",
        metavar="N",
        type=whole_number,
        help="files and directories that the guest may watch (default: 524288)",
    )
    add(
        "--control-socket",
        metavar="PATH",
        help="socket for `vhostfs watch`, `stats` and `caps` (default: that of --socket-path and .ctl)",
    )
    add(
        "--no-control-socket",
        dest="control_socket_wanted",
        action="store_false",
        help="do not make one",
    )
    _switch(add, "fan-rename", None, None)


def _add_ids(parser: Parser) -> None:
    add = _adder(parser, "user and group ids")
    for kind in ("uid", "gid"):
        add(
            f"--translate-{kind}",
            metavar="TYPE:FROM:TO:COUNT",
            action=Collect,
            type=checked(parse_translation),
            help="TYPE: map, guest, host, squash-guest, squash-host, forbid-guest; may be repeated"
            if kind == "uid"
            else "the same for groups",
        )
    for kind in ("uid", "gid"):
        add(
            f"--{kind}-map",
            metavar=":INSIDE:HOST:COUNT:",
            action=Collect,
            type=checked(lambda text: (parse_namespace_range(text),)),
            help="run in a user namespace with this map; may be repeated"
            if kind == "uid"
            else "the same for groups",
        )


def _add_walls(parser: Parser) -> None:
    add = _adder(parser, "limits and isolation")
    add(
        "--sandbox",
        metavar="MODE",
        type=_SANDBOX,
        help="namespace: own mounts, processes and network, and the share as root; chroot: the last; "
        "none (default: namespace)",
    )
    add(
        "--seccomp",
        metavar="ACTION",
        type=_SECCOMP,
        help="what a forbidden system call does: kill, trap, log or none (default: kill)",
    )
    add(
        "--modcaps",
        metavar="+CAP:-CAP",
        type=checked(parse_modcaps),
        help="capabilities to keep or drop besides the usual; write --modcaps=...",
    )
    add(
        "--inode-file-handles",
        metavar="MODE",
        type=_HANDLES,
        help="prefer: file handles when descriptors run short; mandatory: always; never (default: prefer)",
    )
    add(
        "--rlimit-nofile",
        metavar="N",
        type=whole_number,
        help="limit of open files; 0: as it is (default: 1000000, or what is permitted)",
    )


def _add_logging(parser: Parser) -> None:
    add = _adder(parser, "log")
    add(
        "--log-level",
        metavar="LEVEL",
        type=_LOG_LEVEL,
        help="off, error, warn, info, debug or trace (default: info)",
    )
    add("--syslog", action="store_true", help="log to syslog instead of stderr")


def _add_experiments(parser: Parser) -> None:
    add = _adder(parser, "experiments (docs/lab.md)")
    add(
        "--negotiate",
        metavar="KEY=VALUE",
        action=Collect,
        type=checked(parse_pair),
        help=f"behave as a server that is less able, or another version: {', '.join(KEYS)}; may be repeated",
    )


def _add_hidden(parser: Parser) -> None:
    """What older callers pass; understood, not offered."""
    add = _adder(parser, None)
    add("-o", action="append", dest="compat", default=[], metavar="OPTIONS", help=argparse.SUPPRESS)
    add("-d", nargs=0, action=_DebugFlag, help=argparse.SUPPRESS)
    add("-f", action="store_true", dest="compat_foreground", help=argparse.SUPPRESS)
    add("--daemonize", action="store_true", help=argparse.SUPPRESS)
    add("--migration-mode", help=argparse.SUPPRESS)
    add("--migration-on-error", help=argparse.SUPPRESS)
    add("--migration-verify-handles", action="store_true", help=argparse.SUPPRESS)
    add("--migration-confirm-paths", action="store_true", help=argparse.SUPPRESS)


# ---- -o, as the C virtiofsd of QEMU up to 7.2 took it


_COMPAT_SWITCHES = (
    "xattr",
    "readdirplus",
    "writeback",
    "allow_direct_io",
    "killpriv_v2",
    "posix_acl",
    "security_label",
    "posix_lock",
    "flock",
    "announce_submounts",
)
_COMPAT_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "source": ("shared_dir", str),
    "cache": ("cache", _CACHE),
    "sandbox": ("sandbox", _SANDBOX),
    "xattrmap": ("xattr_rules", checked(parse_xattrmap)),
    "modcaps": ("modcaps", checked(parse_modcaps)),
    "timeout": ("timeout_s", _timeout),
    "log_level": ("log_level", _LOG_LEVEL),
    "loglevel": ("log_level", _LOG_LEVEL),
}
# Had a meaning in the old server's inside only.
_COMPAT_IGNORED_FLAGS = frozenset({"allow_root"})
_COMPAT_IGNORED_VALUES = frozenset({"max_idle_threads"})


def split_compat(text: str) -> list[str]:
    """Words of one -o, separated by commas; a comma in a word is doubled (libvirt) or after a backslash."""
    words = [""]
    at = 0
    while at < len(text):
        pair = text[at : at + 2]
        if pair in (",,", "\\,", "\\\\"):
            words[-1] += pair[1]
            at += 2
        elif text[at] == ",":
            words.append("")
            at += 1
        else:
            words[-1] += text[at]
            at += 1
    return [word for word in words if word]


def _apply_compat(word: str, given: dict[str, Any]) -> None:
    name, equals, value = word.partition("=")
    if equals and name in _COMPAT_VALUES:
        field, parse = _COMPAT_VALUES[name]
        try:
            given[field] = parse(value)
        except argparse.ArgumentTypeError as error:
            raise OptionError(f"-o {name}: {error}") from None
        return
    if name in (_COMPAT_IGNORED_VALUES if equals else _COMPAT_IGNORED_FLAGS):
        return
    if not equals and name == "debug":
        given["log_level"] = LogLevel.DEBUG
        return
    positive = name.removeprefix("no_")
    if not equals and positive in _COMPAT_SWITCHES:
        given[positive] = positive == name
        return
    if name in _COMPAT_VALUES:
        raise OptionError(f"-o {word}: expected {name}=VALUE")
    if positive in _COMPAT_SWITCHES:
        raise OptionError(f"-o {word}: {name} takes no value")
    known = [*_COMPAT_VALUES, "debug", *_COMPAT_SWITCHES, *(f"no_{switch}" for switch in _COMPAT_SWITCHES)]
    raise OptionError(f"-o {word}: '{name}' is no option{nearest(name, known) or '; see --help'}")


def options_from(args: argparse.Namespace) -> ServeOptions:
    """What was given, checked as a whole; words of -o win, as in virtiofsd. Raises OptionError."""
    given = vars(args)
    for text in given["compat"]:
        for word in split_compat(text):
            _apply_compat(word, given)
    if given.get("daemonize"):
        raise OptionError("--daemonize is not supported; start it by systemd, or with & from a shell")
    if given.get("migration_mode", "find-paths") not in ("find-paths", "file-handles"):
        raise OptionError(f"--migration-mode={given['migration_mode']}: use find-paths or file-handles")
    if given.get("migration_on_error", "abort") not in ("abort", "guest-error"):
        raise OptionError(f"--migration-on-error={given['migration_on_error']}: use abort or guest-error")
    given.setdefault("shared_dir", "")
    return ServeOptions(**{name: value for name, value in given.items() if name in _FIELDS})


def ignored_options(args: argparse.Namespace) -> list[str]:
    """Options that were given and have no effect here: a line to log for each."""
    lines = []
    if any(name.startswith("migration_") for name in vars(args)):
        lines.append("live migration is not supported yet: --migration-* options have no effect")
    return lines
