# SPDX-License-Identifier: Apache-2.0
"""What `vhostfs caps` prints: the table, the JSON with its documented keys, and the advice for each lack."""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vhostfs.caps.advice import Advice
from vhostfs.caps.directory import DirectoryProbe
from vhostfs.caps.fanotify import EVENTS, FanotifyProbe
from vhostfs.caps.limits import Limit, Limits
from vhostfs.caps.outcome import Outcome
from vhostfs.caps.qemu import KvmProbe, QemuProbe
from vhostfs.caps.report import HostReport
from vhostfs.caps.rights import Rights
from vhostfs.caps.servers import ServerProbe
from vhostfs.cli import main
from vhostfs.cli.caps_table import WIDTH, report_lines
from vhostfs.share.capabilities import Capability
from vhostfs.vm.qemu import FS_DEVICE, TEST_DEVICE

YES = Outcome(0)
NO = Outcome.of(-errno.EPERM)
UNKNOWN = Outcome.of(-errno.EINVAL)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/caps.md"

INIT = [
    "FAN_REPORT_FID",
    "FAN_REPORT_DIR_FID",
    "FAN_REPORT_NAME",
    "FAN_REPORT_TARGET_FID",
    "FAN_UNLIMITED_QUEUE",
    "FAN_UNLIMITED_MARKS",
    "FAN_REPORT_PIDFD",
]
MARKS = ["FAN_MARK_INODE", "FAN_MARK_FILESYSTEM", "FAN_MARK_ONLYDIR", "FAN_MARK_MOUNT"]
ALL_RIGHTS = Rights(0, 0, (1 << 41) - 1, (1 << 41) - 1, True, "off", False)
NO_RIGHTS = replace(ALL_RIGHTS, uid=1000, gid=1000, effective=0)
FANOTIFY = FanotifyProbe(
    dict.fromkeys(INIT, YES),
    dict.fromkeys(MARKS, YES),
    dict.fromkeys(EVENTS, YES),
    dict.fromkeys(EVENTS, YES),
)
DIRECTORY = DirectoryProbe(
    "/srv/data",
    "ext4",
    YES,
    YES,
    YES,
    YES,
    FANOTIFY,
    {"fanotify:filesystem": YES, "fanotify:inodes": YES, "inotify": YES},
    "fanotify:filesystem",
    "fanotify, one mark on the file system of the share",
)
LIMITS = Limits(
    {
        "inotify.max_user_watches": Limit(1 << 20, 10),
        "inotify.max_user_instances": Limit(128, 3),
        "inotify.max_queued_events": Limit(16384),
        "fanotify.max_user_groups": Limit(128, 1),
        "fanotify.max_user_marks": Limit(1 << 20, 1),
        "fanotify.max_queued_events": Limit(None),
    },
    True,
    1 << 20,
    1 << 20,
    1 << 20,
)
NEW_QEMU = QemuProbe(
    "/q/new", True, "11.1.3", None, {FS_DEVICE: frozenset({"tag"}), TEST_DEVICE: frozenset({"virtio-id"})}
)
OLD_QEMU = QemuProbe("/q/old", False, "7.2.22", "Debian", {FS_DEVICE: frozenset({"tag"})})
KVM = KvmProbe(YES, 12, "")
TOLD: Mapping[str, Any] = {
    "type": "negotiated",
    "server": {
        "version": "0.1.0",
        "shared_dir": "/srv/data",
        "tag": "data",
        "sandbox": "namespace",
        "max_queues": 66,
        "config": {"tag": "data", "num_request_queues": 1, "notify_buf_size_bytes": 320},
    },
    "source": {"chosen": "inotify", "reason": "inotify (asked for)", "reports": ["CREATE"]},
    "delivery": {"chosen": "parked", "missing": "this VMM does not pass it", "offered": ["parked"]},
    "vmm": {
        "state": "negotiated",
        "features_offered": ["VIRTIO_FS_F_NOTIFICATION", "VIRTIO_F_VERSION_1"],
        "features_acked": ["VIRTIO_F_VERSION_1"],
        "protocol_features_offered": ["VHOST_USER_PROTOCOL_F_MQ"],
        "protocol_features_acked": ["VHOST_USER_PROTOCOL_F_MQ"],
        "device_status": ["DRIVER_OK"],
        "memory_regions": 2,
        "memory_bytes": 512 << 20,
        "queues": [
            {"index": 0, "role": "hiprio", "size": 1024},
            {"index": 1, "role": "request", "size": 1024},
        ],
    },
    "fuse": {
        "guest_version": "7.41",
        "version": "7.41",
        "flags_offered": ["FUSE_ASYNC_READ", "FUSE_ALLOW_IDMAP"],
        "flags_granted": ["FUSE_ASYNC_READ"],
        "max_write_bytes": 1 << 20,
        "max_readahead_bytes": 131072,
        "max_background": 65535,
        "max_pages": 256,
    },
    "fsnotify": {
        "refused": None,
        "driver_version": "1.0",
        "flags_wanted": ["FUSE_FSNOTIFY_PARKED", "FUSE_FSNOTIFY_RENAME"],
        "flags_granted": ["FUSE_FSNOTIFY_PARKED"],
        "driver_can_raise": ["CREATE"],
        "driver_buf_size_bytes": 320,
        "host_can_report": ["CREATE"],
        "events": ["CREATE"],
        "notify_buf_size_bytes": 320,
        "max_watches": 9,
        "max_parked": 64,
        "reductions": ["renames come as plain halves"],
    },
}
SERVER = ServerProbe("/run/s.sock.ctl", TOLD)
REPORT = HostReport("6.12.1", "x86_64", DIRECTORY, ALL_RIGHTS, LIMITS, [NEW_QEMU, OLD_QEMU], KVM, [SERVER])
BEST = replace(REPORT, servers=[])


def table(report: HostReport, *, only_advice: bool = False) -> list[str]:
    return list(report_lines(report, is_coloured=False, only_advice=only_advice))


def topics(report: HostReport) -> list[str]:
    return [each.topic for each in report.advice]


def only(report: HostReport) -> Advice:
    (advice,) = report.advice
    return advice


# ---- the table


def test_the_table_has_a_line_for_each_thing_that_was_tried() -> None:
    lines = table(REPORT)
    assert lines[0] == "vhostfs 0.1.0 on Linux 6.12.1 (x86_64), uid 0"
    assert "directory  /srv/data (ext4)" in lines
    assert "  yes  fanotify:filesystem           taken by --events=auto" in lines
    assert "  yes  FAN_REPORT_TARGET_FID         and the entry's own object (5.17)" in lines
    assert "  flags not used        FAN_REPORT_PIDFD FAN_MARK_MOUNT" in lines
    assert "  /q/old: 7.2.22 (Debian)" in lines
    assert "  no   vhost-user-test-device-pci" in lines
    assert "  yes  vhost-user-test-device-pci    passes the notification queue" in lines
    assert "  yes  /dev/kvm                      API version 12; a guest ran" in lines


def test_the_table_tells_of_a_server_by_name() -> None:
    lines = table(REPORT)
    lines = lines[lines.index("server  /run/s.sock.ctl") :]
    assert "  delivery              parked: this VMM does not pass it" in lines
    assert "  virtio features       VIRTIO_F_VERSION_1" in lines
    assert "    not acked           VIRTIO_FS_F_NOTIFICATION" in lines
    assert "  queues running        0 hiprio 1024, 1 request 1024" in lines
    assert "  INIT flags            FUSE_ASYNC_READ" in lines
    assert "    not granted         FUSE_ALLOW_IDMAP" in lines
    assert "  flags                 FUSE_FSNOTIFY_PARKED" in lines
    assert "    less                renames come as plain halves" in lines


def test_no_line_is_too_wide_for_a_terminal_or_ragged() -> None:
    refused = {**TOLD, "fsnotify": {"refused": "version 2.0 " * 20}, "vmm": None, "fuse": None}
    lines = table(
        replace(REPORT, servers=[SERVER, ServerProbe("/x", refused), ServerProbe("/y", None, "no")])
    )
    assert [line for line in lines if len(line) > WIDTH or line != line.rstrip()] == []


def test_colours_change_nothing_but_colours() -> None:
    coloured = list(report_lines(REPORT, is_coloured=True))
    assert coloured != table(REPORT)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == table(REPORT)


def test_what_a_server_says_does_nothing_to_the_terminal() -> None:
    told = json.loads(json.dumps(TOLD))
    told["server"]["tag"] = told["delivery"]["missing"] = told["fsnotify"]["reductions"][0] = "\x1b[2J\n"
    lines = table(replace(REPORT, servers=[ServerProbe("/run/s", told)]))
    assert all(line.isprintable() for line in lines)


# ---- advice


def test_where_nothing_is_missing_nothing_is_advised() -> None:
    assert BEST.advice == []
    assert table(BEST, only_advice=True) == ["advice  nothing is missing"]


def test_advice_says_what_was_seen_what_it_costs_and_what_to_do() -> None:
    advice = only(REPORT)
    assert advice.seen.startswith("the guest of /run/s.sock gets its events by parked requests: this VMM")
    lines = table(REPORT, only_advice=True)
    assert lines[0] == "advice"
    assert lines[1].startswith("  1. seen   the guest of /run/s.sock")
    assert [line[5:10].strip() for line in lines[1:] if line[5:10].strip()] == ["seen", "costs", "do"]


def without_rights() -> HostReport:
    events = dict.fromkeys(EVENTS, NO)
    sources = {
        "fanotify:filesystem": Outcome(0, "marking the file system: EPERM; it needs CAP_SYS_ADMIN"),
        "fanotify:inodes": YES,
        "inotify": YES,
    }
    init = {**FANOTIFY.init, "FAN_UNLIMITED_MARKS": NO}
    return replace(
        BEST,
        rights=NO_RIGHTS,
        directory=replace(
            DIRECTORY,
            reopen=NO,
            sources=sources,
            chosen="fanotify:inodes",
            fanotify=replace(FANOTIFY, init=init, filesystem_events=events),
        ),
    )


def test_missing_rights_are_named_with_what_they_buy() -> None:
    report = without_rights()
    assert topics(report) == ["events", "handles", "identity"]
    texts = " ".join(each.remedy for each in report.advice)
    assert "CAP_SYS_ADMIN" in texts
    assert "CAP_DAC_READ_SEARCH" in texts
    few = replace(LIMITS, nofile_hard=4096, nofile_soft=1024)
    assert topics(replace(report, limits=few))[-1] == "limits"


def test_rights_in_a_user_namespace_are_not_taken_for_rights() -> None:
    report = replace(without_rights(), rights=replace(ALL_RIGHTS, is_initial=False))
    assert topics(report) == ["events", "handles"]
    assert all("outside of this user namespace" in each.remedy for each in report.advice)


def test_an_old_kernel_is_told_what_a_newer_one_has() -> None:
    init = {**FANOTIFY.init, "FAN_REPORT_TARGET_FID": UNKNOWN}
    events = {**FANOTIFY.filesystem_events, "FAN_RENAME": UNKNOWN}
    old = replace(DIRECTORY, fanotify=replace(FANOTIFY, init=init, filesystem_events=events))
    advice = replace(BEST, directory=old, kernel="5.10.0").advice
    assert [each.seen.split(":")[0] for each in advice] == ["no FAN_RENAME", "no FAN_REPORT_TARGET_FID"]
    assert all(each.remedy == "Linux 5.17 or later; this is 5.10.0" for each in advice)


def test_a_file_system_without_handles_means_inotify_and_descriptors() -> None:
    none = Outcome.of(-errno.EOPNOTSUPP)
    gone = Outcome(0, "the file system gives no file handles")
    sources = {"fanotify:filesystem": gone, "fanotify:inodes": gone, "inotify": YES}
    directory = replace(
        DIRECTORY,
        file_system="9p",
        encode=none,
        reopen=none,
        event_handles=none,
        sources=sources,
        chosen="inotify",
    )
    advice = replace(BEST, directory=directory).advice
    assert [each.topic for each in advice] == ["events", "handles"]
    assert "9p has none" in advice[0].remedy


def test_no_source_at_all_is_one_advice() -> None:
    gone = Outcome(0, "no")
    sources = dict.fromkeys(DIRECTORY.sources, gone)
    directory = replace(DIRECTORY, sources=sources, chosen=None, reason="--events=auto is not possible: x")
    assert only(replace(BEST, directory=directory)).seen.startswith("no source of events works here")


def test_a_directory_that_may_not_be_read_is_the_one_thing_to_say() -> None:
    report = without_rights()
    closed = replace(report.directory, readable=Outcome.of(-errno.EACCES))
    assert topics(replace(report, directory=closed, rights=ALL_RIGHTS)) == ["directory"]


@pytest.mark.parametrize(
    ("name", "limit", "text"),
    [
        ("inotify.max_user_watches", Limit(8192, 1), "sysctl fs.inotify.max_user_watches=1048576"),
        ("inotify.max_user_instances", Limit(128, 120), "sysctl fs.inotify.max_user_instances=256"),
    ],
)
def test_small_and_exhausted_limits_come_with_the_command(name: str, limit: Limit, text: str) -> None:
    limits = replace(LIMITS, limits={**LIMITS.limits, name: limit})
    assert only(replace(BEST, limits=limits)).remedy == text


def test_what_qemu_and_kvm_lack_is_said() -> None:
    assert "7.2.22" in only(replace(BEST, qemus=[OLD_QEMU])).seen
    assert "has to fetch" in only(replace(BEST, qemus=[])).cost
    broken = QemuProbe("/q/x", False, problem="no answer within 5 s")
    assert "no answer within 5 s" in only(replace(BEST, qemus=[broken])).seen
    assert "group kvm" in only(replace(BEST, kvm=KvmProbe(Outcome.of(-errno.EACCES), None, None))).remedy
    assert "firmware" in only(replace(BEST, kvm=KvmProbe(Outcome.of(-errno.ENOENT), None, None))).remedy
    assert "Suberror" in only(replace(BEST, kvm=KvmProbe(YES, 12, "KVM error Suberror 1"))).seen


@pytest.mark.parametrize(
    ("server", "text"),
    [
        (ServerProbe("/run/s.sock.ctl", None, "does not answer"), "does not tell: does not answer"),
        (
            ServerProbe("/s.ctl", {**TOLD, "delivery": {"chosen": "none", "missing": "off", "offered": []}}),
            "gets no events: off",
        ),
    ],
)
def test_a_server_whose_guest_hears_nothing_is_said(server: ServerProbe, text: str) -> None:
    assert text in only(replace(BEST, servers=[server])).seen


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("this VMM does not pass it", "a device that passes"),
        ("the notification queue is switched off by --delivery", "serve with --delivery=auto"),
        ("no --tag is given, without which there is no notification queue", "serve with --tag=TAG"),
    ],
)
def test_parked_requests_come_with_what_would_bring_the_queue(missing: str, remedy: str) -> None:
    told = {**TOLD, "delivery": {"chosen": "parked", "missing": missing, "offered": ["parked"]}}
    assert only(replace(BEST, servers=[ServerProbe("/s", told)])).remedy.startswith(remedy)


def test_a_server_that_waits_for_its_vmm_needs_no_advice() -> None:
    waiting = {**TOLD, "vmm": None, "delivery": {"chosen": "none", "missing": "x", "offered": []}}
    assert replace(BEST, servers=[ServerProbe("/s", waiting)]).advice == []


# ---- JSON and the command


def shape(value: Any) -> Any:
    """Keys, all the way down."""
    if isinstance(value, Mapping):
        return {key: shape(each) for key, each in value.items()}
    return None


def documented_keys() -> set[str]:
    text = DOCUMENT.read_text()
    return set(".".join(re.findall(r"`([a-z_][a-z_0-9.]*)`", text)).split("."))


def test_json_is_stable_and_its_keys_are_documented() -> None:
    told = json.loads(json.dumps(REPORT.as_json()))
    assert list(told) == [
        "vhostfs",
        "format",
        "kernel",
        "directory",
        "rights",
        "limits",
        "qemu",
        "kvm",
        "servers",
        "advice",
    ]
    assert told["format"] == 1
    assert shape(told["directory"]["file_handles"]["open"]) == dict.fromkeys(("works", "error", "reason"))
    assert told["directory"]["fanotify"]["events"]["filesystem"]["FAN_RENAME"]["works"] is True
    assert told["servers"][0]["delivery"]["chosen"] == "parked"
    assert told["advice"][0].keys() == {"topic", "seen", "costs", "do"}
    known = documented_keys()
    names = set(INIT) | set(MARKS) | set(EVENTS) | set(LIMITS.limits) | set(DIRECTORY.sources)
    names |= {FS_DEVICE, TEST_DEVICE} | {f"CAP_{each.name}" for each in Capability}

    def undocumented(value: Any) -> set[str]:
        if isinstance(value, Mapping):
            found = {key for key in value if key not in names and key not in known}
            return found.union(*map(undocumented, value.values()))
        return set().union(*map(undocumented, value)) if isinstance(value, list) else set()

    assert undocumented(told) == set()


def test_the_command_is_quick_and_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VHOSTFS_CACHE", str(tmp_path / "none"))
    began_s = time.process_time()
    assert main(["caps", "--json", str(tmp_path)]) == 0
    assert time.process_time() - began_s < 2
    told = json.loads(capsys.readouterr().out)
    assert told["directory"]["path"] == str(tmp_path)
    assert told["kernel"]["release"]


@pytest.mark.parametrize(
    ("arguments", "text", "status"),
    [
        (["/nonexistent"], "there is no such directory", 1),
        (["--control", "/nonexistent"], "there is no such socket", 1),
        (["--json", "--advice"], "not allowed with", 2),
        (["--jsno"], "did you mean '--json'?", 2),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], text: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caps", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
