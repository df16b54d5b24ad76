# SPDX-License-Identifier: Apache-2.0
"""What `vhostfs serve` understands: our options, Rust virtiofsd's, and the C virtiofsd's `-o` words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from vhostfs.cli.parser import Parser
from vhostfs.cli.serve_options import add_arguments, ignored_options, options_from, split_compat
from vhostfs.errors import UserError
from vhostfs.share.capabilities import Capability, CapabilityChanges
from vhostfs.share.idmap import IdRule, IdRuleKind, NamespaceRange
from vhostfs.share.options import (
    CacheMode,
    DeliveryMode,
    EventsMode,
    HandleMode,
    LogLevel,
    OptionError,
    SandboxMode,
    SeccompAction,
    ServeOptions,
    check_shared_dir,
)

NEEDED = ["--shared-dir=/srv", "--socket-path=/run/s"]


def parse(*arguments: str) -> ServeOptions:
    parser = Parser(prog="vhostfs serve")
    add_arguments(parser)
    return options_from(parser.parse_args(arguments))


def complaint(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert caught.value.exit_status == 2
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_defaults_are_virtiofsds_where_documented_so() -> None:
    options = parse(*NEEDED)
    assert options.cache is CacheMode.AUTO
    assert options.cache_timeout_s == 1.0
    assert options.sandbox is SandboxMode.NAMESPACE
    assert options.seccomp is SeccompAction.KILL
    assert options.announce_submounts
    assert options.readdirplus_wanted
    assert not options.xattr_wanted
    assert not options.writeback
    assert not options.killpriv_v2
    assert options.log_level is LogLevel.INFO
    # Ours on purpose (docs/migrating-from-virtiofsd.md):
    assert options.inode_file_handles is HandleMode.PREFER
    assert options.posix_lock
    assert options.flock


def test_what_libvirt_passes_to_an_old_server_is_understood() -> None:
    options = parse(
        "--fd=24",
        "-o",
        "source=/srv/a,,b,cache=always,sandbox=chroot,xattr,no_flock,posix_lock",
        "--thread-pool-size=16",
        "-d",
    )
    assert options == ServeOptions(
        shared_dir="/srv/a,b",
        listen_fd=24,
        cache=CacheMode.ALWAYS,
        sandbox=SandboxMode.CHROOT,
        xattr=True,
        flock=False,
        posix_lock=True,
        thread_pool_size=16,
        log_level=LogLevel.DEBUG,
    )


def test_what_libvirt_passes_to_a_new_server_is_understood() -> None:
    options = parse(
        *["--fd=24", "--shared-dir", "/srv/a,b", "--cache", "never", "--sandbox", "namespace", "--xattr"],
        *["--thread-pool-size=4", "--rlimit-nofile=5000", "--log-level", "debug"],
        *["--uid-map=:0:1000:1:", "--uid-map=:1:100000:65536:", "--gid-map=:0:1000:1:"],
    )
    assert options == ServeOptions(
        shared_dir="/srv/a,b",
        listen_fd=24,
        cache=CacheMode.NEVER,
        xattr=True,
        thread_pool_size=4,
        rlimit_nofile=5000,
        log_level=LogLevel.DEBUG,
        uid_map=(NamespaceRange(0, 1000, 1), NamespaceRange(1, 100000, 65536)),
        gid_map=(NamespaceRange(0, 1000, 1),),
    )


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--tag=home"], "tag", "home"),
        (["--tag", "x" * 36], "tag", "x" * 36),
        (["--socket-group=kvm"], "socket_group", "kvm"),
        (["--once"], "once", True),
        (["--num-request-queues=4"], "num_request_queues", 4),
        (["--posix-acl"], "posix_acl", True),
        (["--xattrmap=:map::user.virtiofs.:"], "xattr_wanted", True),
        (["--posix-acl"], "xattr_wanted", True),
        (["--security-label"], "xattr_wanted", True),
        (["--readonly"], "readonly", True),
        (["--seccomp=log"], "seccomp", SeccompAction.LOG),
        (["--seccomp", "none"], "seccomp", SeccompAction.NONE),
        (["--no-announce-submounts"], "announce_submounts", False),
        (["--no-announce-submounts", "--announce-submounts"], "announce_submounts", True),
        (["--inode-file-handles=mandatory"], "inode_file_handles", HandleMode.MANDATORY),
        (["--inode-file-handles=fallback"], "inode_file_handles", HandleMode.PREFER),
        (["--cache=metadata"], "cache_timeout_s", 86400.0),
        (["--cache=never"], "cache_timeout_s", 0.0),
        (["--cache=none"], "cache", CacheMode.NEVER),
        (["--cache=never"], "readdirplus_wanted", False),
        (["--no-readdirplus"], "readdirplus_wanted", False),
        (["--allow-mmap"], "allow_mmap", True),
        (["--allow-direct-io"], "allow_direct_io", True),
        (["--writeback"], "writeback", True),
        (["--killpriv-v2"], "killpriv_v2", True),
        (["--killpriv-v2", "--no-killpriv-v2"], "killpriv_v2", False),
        (["--no-posix-lock"], "posix_lock", False),
        (["--no-flock"], "flock", False),
        (["--preserve-noatime"], "preserve_noatime", True),
        (["--sandbox=NONE"], "sandbox", SandboxMode.NONE),
        (["--rlimit-nofile=0"], "rlimit_nofile", 0),
        (["--syslog"], "syslog", True),
        (["--log-level=OFF"], "log_level", LogLevel.OFF),
        (["--cache=auto", "--cache=always"], "cache", CacheMode.ALWAYS),
        (
            ["--translate-uid=squash-guest:0:7:9"],
            "translate_uid",
            (IdRule(IdRuleKind.SQUASH_GUEST, 0, 7, 9),),
        ),
        (
            ["--modcaps=+sys_admin:-CHOWN:+chown:-cap_mknod"],
            "modcaps",
            CapabilityChanges(
                frozenset({Capability.SYS_ADMIN, Capability.CHOWN}), frozenset({Capability.MKNOD})
            ),
        ),
        (["-f", "-o", "allow_root", "-o", "max_idle_threads=3"], "cache", CacheMode.AUTO),
        (["-o", "cache=none", "--cache=always"], "cache", CacheMode.NEVER),
        (["-o", "timeout=2.5"], "cache_timeout_s", 2.5),
        (["-o", "log_level=err"], "log_level", LogLevel.ERROR),
        (["-o", "loglevel=warn"], "log_level", LogLevel.WARN),
        (["-o", "debug"], "log_level", LogLevel.DEBUG),
        (["-oxattrmap=:ok:all:::"], "xattr_wanted", True),
        (["-o", "modcaps=+kill"], "modcaps", CapabilityChanges(frozenset({Capability.KILL}))),
        (["--migration-mode=file-handles", "--migration-verify-handles"], "cache", CacheMode.AUTO),
    ],
)
def test_an_option_sets_its_field(arguments: list[str], field: str, value: object) -> None:
    assert getattr(parse(*NEEDED, *arguments), field) == value


@pytest.mark.parametrize("word", ["xattr", "readdirplus", "writeback", "allow_direct_io", "killpriv_v2"])
@pytest.mark.parametrize("state", [True, False])
def test_every_old_switch_has_its_no_form(word: str, state: bool) -> None:
    assert getattr(parse(*NEEDED, "-o", word if state else f"no_{word}"), word) is state


def test_a_comma_in_an_old_option_is_doubled_or_escaped() -> None:
    assert split_compat("source=/a,,b,xattr") == ["source=/a,b", "xattr"]
    assert split_compat(r"source=/a\,b\\c,xattr,") == ["source=/a,b\\c", "xattr"]
    assert split_compat("") == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--cache=atuo"],
            "--cache: 'atuo' is not possible: use auto, always, never, metadata or coherent; did you mean",
        ),
        (["--sandbox=jail"], "use namespace, chroot or none"),
        (["--seccomp=x"], "use none, kill, log or trap"),
        (["--log-level=verbose"], "use off, error, warn, info, debug or trace"),
        (["--inode-file-handles=yes"], "use never, prefer or mandatory"),
        (["--xatr"], "--xatr is no option of vhostfs serve; did you mean '--xattr'?"),
        (["--chache=auto"], "--chache is no option of vhostfs serve; did you mean '--cache'?"),
        (["--zzz"], "--zzz is no option of vhostfs serve; see --help"),
        (["--xattr=on"], "--xattr takes no value; seen: 'on'"),
        (["extra"], "'extra' is one argument too many"),
        (["--cache"], "--cache: expected one argument"),
        (["--rlimit-nofile=-1"], "'-1' is not a whole number"),
        (["--thread-pool-size=many"], "'many' is not a whole number"),
        (["--thread-pool-size=5000"], "0 to 1024 are possible"),
        (["--num-request-queues=0"], "1 to 64 are possible"),
        (["--tag="], "it may have 1 to 36"),
        (["--tag", "\u00e4" * 19], "has 38 bytes"),
        (["--fd=3"], "--socket-path and --fd exclude each other"),
        (["--modcaps=+sys_admn"], "'sys_admn' is no capability; did you mean 'sys_admin'?"),
        (["--modcaps=sys_admin"], "expected +NAME or -NAME"),
        (["--xattrmap=:ok:all"], "at character 5: no ':' ends the scope"),
        (["--uid-map=:0:1:2"], "same separator"),
        (["--uid-map=:0:1:2:", "--uid-map=:1:9:1:"], "--uid-map: namespace id 1 is mapped twice"),
        (
            ["--uid-map=:0:1:2:", "--sandbox=none"],
            "which --sandbox=none lacks; use --sandbox=namespace, or --translate-uid",
        ),
        (
            ["--translate-gid=map:0:1:2", "--translate-gid=guest:1:9:1"],
            "--translate-gid: guest id 1 is mapped twice",
        ),
        (["--translate-uid=map:0:1:2", "--posix-acl"], "--translate-uid and --posix-acl exclude each other"),
        (["-o", "cach=none"], "-o cach=none: 'cach' is no option; did you mean 'cache'?"),
        (["-o", "cache"], "-o cache: expected cache=VALUE"),
        (["-o", "cache=never2"], "-o cache: 'never2' is not possible"),
        (["-o", "xattr=1"], "-o xattr=1: xattr takes no value"),
        (["-o", "timeout=soon"], "'soon' is not a number of seconds"),
        (["-o", "timeout=nan"], "'nan' is not a number of seconds"),
        (["-o", "timeout=-1"], "-o timeout=-1: 0 to"),
        (["--daemonize"], "--daemonize is not supported"),
        (["--migration-mode=paths"], "use find-paths or file-handles"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_be_right(arguments: list[str], expected: str) -> None:
    assert expected in complaint(*NEEDED, *arguments)


def test_what_cannot_be_left_out_is_asked_for() -> None:
    assert "give --shared-dir=DIR" in complaint("--socket-path=/s")
    assert "give --socket-path=PATH, or --fd=N" in complaint("--shared-dir=/d")
    assert "--socket-group has no meaning with --fd" in complaint(
        "--shared-dir=/", "--fd=3", "--socket-group=kvm"
    )


def test_options_cannot_be_abbreviated() -> None:
    assert "did you mean '--readonly'?" in complaint(*NEEDED, "--readon")


def test_options_without_effect_are_named() -> None:
    parser = Parser(prog="vhostfs serve")
    add_arguments(parser)
    assert ignored_options(parser.parse_args(NEEDED)) == []
    (line,) = ignored_options(parser.parse_args([*NEEDED, "--migration-confirm-paths"]))
    assert "live migration" in line


def test_the_table_for_people_names_every_option() -> None:
    parser = Parser(prog="vhostfs serve")
    add_arguments(parser)
    text = (Path(__file__).parents[2] / "docs" / "migrating-from-virtiofsd.md").read_text()
    documented = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z0-9-]*", text))
    for action in parser._actions:
        for option in action.option_strings:
            assert option in documented, f"{option} is missing in docs/migrating-from-virtiofsd.md"


def test_a_shared_directory_is_checked_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    assert check_shared_dir(str(tmp_path / "link")) == os.path.realpath(tmp_path)
    for name, expected in (
        ("missing", "no such directory"),
        ("file", "not a directory"),
        ("file/x", "not a directory"),
    ):
        with pytest.raises(OptionError, match=expected):
            check_shared_dir(str(tmp_path / name))


def test_options_are_values_that_nobody_changes() -> None:
    with pytest.raises(AttributeError):
        parse(*NEEDED).cache = CacheMode.NEVER  # type: ignore[misc]


def test_events_are_wanted_unless_they_are_switched_off() -> None:
    assert parse(*NEEDED).events_wanted
    assert not parse(*NEEDED, "--events=off").events_wanted
    assert parse(*NEEDED, "--tag=x", "--events=fanotify:inodes").events is EventsMode.FANOTIFY_INODES
    assert not parse(*NEEDED, "--tag=x", "--no-fan-rename").fan_rename


def test_the_way_of_events_can_be_chosen() -> None:
    assert parse(*NEEDED).delivery is DeliveryMode.AUTO
    assert parse(*NEEDED, "--delivery=parked").delivery is DeliveryMode.PARKED
    assert parse(*NEEDED, "--tag=x", "--delivery=virtqueue").delivery is DeliveryMode.VIRTQUEUE
    assert "--delivery=virtqueue needs --tag" in complaint(*NEEDED, "--delivery=virtqueue")


@pytest.mark.parametrize("option", ["--event-queue", "--max-watches"])
@pytest.mark.parametrize("value", ["0", "16777217"])
def test_bounds_have_bounds(option: str, value: str) -> None:
    assert f"{option}={value}: 1 to 16777216" in complaint(*NEEDED, f"{option}={value}")


def test_the_control_socket_lies_beside_the_other_unless_told_otherwise() -> None:
    assert parse(*NEEDED).control_path == "/run/s.ctl"
    assert parse(*NEEDED, "--control-socket=/run/c").control_path == "/run/c"
    assert parse(*NEEDED, "--no-control-socket").control_path is None
    assert parse("--shared-dir=/srv", "--fd=3").control_path is None
    assert "same file" in complaint(*NEEDED, "--control-socket=/run/s")
    assert "--control-socket is empty" in complaint(*NEEDED, "--control-socket=")
