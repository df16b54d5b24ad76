# SPDX-License-Identifier: Apache-2.0
"""`vhostfs caps` tries things: with the kernel that runs here, with rights and without, and with others."""

from __future__ import annotations

import errno
import multiprocessing
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.conftest import lacking
from tests.limits import HANG_S
from vhostfs.caps import limits as limits_module
from vhostfs.caps.directory import DirectoryError, probe_directory
from vhostfs.caps.fanotify import EVENTS, probe_fanotify
from vhostfs.caps.limits import probe_limits
from vhostfs.caps.outcome import Outcome
from vhostfs.caps.qemu import parse_answers
from vhostfs.caps.report import gather
from vhostfs.caps.rights import probe_rights
from vhostfs.events.kernel import RunningKernel
from vhostfs.share.capabilities import Capability
from vhostfs.vm.qemu import FS_DEVICE, TEST_DEVICE

T = TypeVar("T")
NOBODY = 65534


def as_nobody(body: Callable[[], Any]) -> Any:
    """What `body` returns in a process without any right."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            sender.send(body())
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    assert receiver.poll(HANG_S), "the child says nothing"
    told = receiver.recv()
    child.join()
    return told


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That everybody may enter."""
    path = tmp_path_factory.mktemp("caps")
    for each in (path, path.parent, path.parent.parent):
        each.chmod(0o755)
    return path


class Recorder:
    """The running kernel, with what is open counted."""

    def __init__(self) -> None:
        self._kernel = RunningKernel()
        self.open_fds: set[int] = set()
        self.marked: list[tuple[int, int]] = []

    def fanotify_init(self, flags: int) -> int:
        fd = self._kernel.fanotify_init(flags)
        if fd >= 0:
            self.open_fds.add(fd)
        return fd

    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int:
        result = self._kernel.fanotify_mark(group_fd, flags, mask, directory_fd)
        if result >= 0:
            self.marked.append((flags, mask))
        return result

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)
        self._kernel.close(fd)


class OldKernel:
    """Knows only the flags that are given; marks and events likewise."""

    def __init__(self, init: int = 0, marks: int = 0, events: int = 0, refusal: int = errno.EINVAL) -> None:
        self._init, self._marks, self._events, self._refusal = init, marks, events, refusal

    def fanotify_init(self, flags: int) -> int:
        return -self._refusal if flags & ~(self._init | 3) else 7

    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int:
        known = not flags & ~(self._marks | 3) and not mask & ~(self._events | 0x4000_0000)
        return 0 if known else -self._refusal

    def close(self, fd: int) -> None:
        assert fd == 7


@pytest.fixture
def directory_fd(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def works(outcomes: Any) -> set[str]:
    return {name for name, outcome in outcomes.items() if outcome.works}


# ---- fanotify


def test_every_flag_and_event_is_tried_and_nothing_is_left_behind(directory_fd: int) -> None:
    kernel = Recorder()
    probe = probe_fanotify(kernel, directory_fd)
    assert kernel.open_fds == set()
    added = sorted(mask for flags, mask in kernel.marked if flags & 1)
    assert added == sorted(mask for flags, mask in kernel.marked if flags & 2)
    assert set(probe.inode_events) == set(probe.filesystem_events) == set(EVENTS)
    for outcomes in (probe.init, probe.marks, probe.inode_events, probe.filesystem_events):
        for outcome in outcomes.values():
            assert outcome.works == (outcome.error == 0 and outcome.reason == "")


def test_marks_that_are_tried_do_not_disturb_who_watches(directory: Path, directory_fd: int) -> None:
    """A watcher of the same directory hears nothing of the trial."""
    kernel = RunningKernel()
    watcher = kernel.fanotify_init(0x3 | 0xE00)
    if watcher < 0:
        lacking(f"fanotify: {os.strerror(-watcher)}")
    try:
        assert kernel.fanotify_mark(watcher, 1, 0x4000_0FCE, directory_fd) == 0
        probe_fanotify(kernel, directory_fd)
        assert select.select([watcher], [], [], 0)[0] == []
        (directory / "new").touch()
        assert select.select([watcher], [], [], HANG_S)[0] == [watcher]
    finally:
        kernel.close(watcher)


def test_an_ordinary_user_is_told_what_takes_rights(directory: Path) -> None:
    probe = as_nobody(lambda: probe_directory(str(directory)))
    if probe.fanotify.init["FAN_REPORT_FID"].error == errno.EPERM:
        lacking("fanotify without rights (Linux 5.13, and no filter against it)")
    init = works(probe.fanotify.init)
    assert {"FAN_REPORT_FID", "FAN_REPORT_NAME"} <= init
    assert init.isdisjoint({"FAN_UNLIMITED_QUEUE", "FAN_UNLIMITED_MARKS"})
    assert probe.fanotify.marks["FAN_MARK_FILESYSTEM"].error_name == "EPERM"
    assert works(probe.fanotify.filesystem_events) == set()
    assert {"FAN_CREATE", "FAN_MODIFY"} <= works(probe.fanotify.inode_events)
    assert not probe.sources["fanotify:filesystem"].works
    assert "CAP_SYS_ADMIN" in probe.sources["fanotify:filesystem"].reason
    assert probe.sources["inotify"].works
    assert probe.chosen == "fanotify:inodes"
    assert probe.reopen.error_name == "EPERM"


def test_a_kernel_of_linux_5_9_has_names_but_no_targets_and_no_rename(directory_fd: int) -> None:
    known = 0x10 | 0x20 | 0x100 | 0x200 | 0x400 | 0x800
    events = 0x1FFF
    probe = probe_fanotify(OldKernel(init=known, marks=0x100 | 0x10, events=events), directory_fd)
    assert works(probe.init) == {
        "FAN_UNLIMITED_QUEUE",
        "FAN_UNLIMITED_MARKS",
        "FAN_REPORT_TID",
        "FAN_REPORT_FID",
        "FAN_REPORT_DIR_FID",
        "FAN_REPORT_NAME",
    }
    assert works(probe.marks) == {"FAN_MARK_INODE", "FAN_MARK_MOUNT", "FAN_MARK_FILESYSTEM"}
    assert probe.inode_events["FAN_RENAME"].error_name == "EINVAL"
    assert probe.filesystem_events["FAN_CREATE"].works


def test_a_kernel_without_fanotify_is_no_error(directory_fd: int) -> None:
    class NoFanotify(OldKernel):
        def fanotify_init(self, flags: int) -> int:
            return -errno.ENOSYS

    probe = probe_fanotify(NoFanotify(), directory_fd)
    assert works(probe.init) == works(probe.marks) == works(probe.filesystem_events) == set()
    assert {outcome.error_name for outcome in probe.marks.values()} == {"ENOSYS"}


# ---- the directory


def test_a_directory_says_which_source_a_server_would_take(directory: Path) -> None:
    probe = probe_directory(f"{directory}/.")
    assert probe.path == str(directory)
    assert probe.chosen in probe.sources
    assert probe.sources[str(probe.chosen)].works
    assert probe.reason
    best = next(name for name, outcome in probe.sources.items() if outcome.works)
    assert best == probe.chosen


def test_no_descriptor_is_left_open(directory: Path) -> None:
    probe_directory(str(directory))
    before = sorted(os.listdir("/proc/self/fd"))
    probe_directory(str(directory))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_file_system_without_handles_says_so() -> None:
    probe = probe_directory("/proc/self")
    assert not probe.encode.works
    assert not probe.reopen.works
    assert probe.file_system == "proc"


@pytest.mark.parametrize(("name", "text"), [("none", "no such directory"), ("file", "Not a directory")])
def test_what_is_no_directory_is_one_line(directory: Path, name: str, text: str) -> None:
    (directory / "file").touch()
    with pytest.raises(DirectoryError, match=text):
        probe_directory(str(directory / name))


def test_a_directory_that_may_not_be_read_is_known_as_that(directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    if os.geteuid() != 0:
        closed.chmod(0)
    probe = as_nobody(lambda: probe_directory(str(closed)))
    assert probe.readable.error_name == "EACCES"


# ---- rights and limits


def test_rights_are_those_of_the_process() -> None:
    here, nobody = probe_rights(), as_nobody(probe_rights)
    assert here.uid == os.geteuid()
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert here.effective == int(status["CapEff"], 16)
    assert here.bounding == int(status["CapBnd"], 16) & sum(1 << each for each in Capability)
    assert nobody.effective == 0 if os.geteuid() == 0 else True
    assert not nobody.has(Capability.SYS_ADMIN)
    assert here.seccomp in ("off", "filter")
    assert set(here.as_json()["capabilities"]) >= {
        "CAP_SYS_ADMIN",
        "CAP_DAC_READ_SEARCH",
        "CAP_SYS_RESOURCE",
    }


def test_limits_are_the_kernel_s_and_what_is_in_use_is_counted() -> None:
    kernel = RunningKernel()
    fds = [kernel.inotify_init(0) for _ in range(5)]
    try:
        after = probe_limits()
    finally:
        for fd in fds:
            kernel.close(fd)
    value = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    assert after.limits["inotify.max_user_watches"].value == value
    assert (after.limits["inotify.max_user_instances"].used or 0) >= 5 or not after.is_complete
    assert after.nofile_soft <= after.nofile_hard


def fake_proc(root: Path, pids: int) -> Path:
    """Processes with one inotify instance of two watches and one fanotify group of three marks each."""
    for pid in range(1, pids + 1):
        for name in ("fd", "fdinfo"):
            (root / str(pid) / name).mkdir(parents=True)
        for fd, target in (("3", "anon_inode:inotify"), ("4", "anon_inode:[fanotify]"), ("5", "/dev/null")):
            (root / str(pid) / "fd" / fd).symlink_to(target)
        (root / str(pid) / "fdinfo/3").write_text("pos:\t0\n" + "inotify wd:1 ino:1\n" * 2)
        marks = "fanotify ino:1 sdev:1\nfanotify mnt_id:7\nfanotify sdev:1\n"
        (root / str(pid) / "fdinfo/4").write_text(f"fanotify flags:13 event-flags:0\n{marks}")
    (root / "sys/fs/inotify").mkdir(parents=True)
    (root / "sys/fs/inotify/max_user_watches").write_text("8192\n")
    return root


def test_use_is_the_sum_over_the_user_s_processes(tmp_path: Path) -> None:
    limits = probe_limits(fake_proc(tmp_path, 3))
    assert limits.is_complete
    assert limits.limits["inotify.max_user_watches"].as_json() == {"value": 8192, "used": 6}
    assert limits.limits["inotify.max_user_instances"].as_json() == {"value": None, "used": 3}
    assert limits.limits["fanotify.max_user_groups"].used == 3
    assert limits.limits["fanotify.max_user_marks"].used == 9


def test_counting_ends_in_time_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "COUNTING_TIME_S", -1)
    assert not probe_limits(fake_proc(tmp_path, 3)).is_complete


def test_without_proc_nothing_is_said_to_be_in_use(tmp_path: Path) -> None:
    for proc in (tmp_path, tmp_path / "none"):
        limits = probe_limits(proc)
        assert not limits.is_complete
        assert {limit.used for limit in limits.limits.values()} == {None}


# ---- QEMU

GREETING = '{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "Debian 1"}}}\n'


def answer(device: str, *properties: str) -> str:
    listed = ", ".join(f'{{"name": "{name}", "type": "str"}}' for name in properties)
    return f'{{"return": [{listed}], "id": "{device}"}}\n'


def missing(device: str) -> str:
    return f'{{"id": "{device}", "error": {{"class": "DeviceNotFound", "desc": "no"}}}}\n'


@pytest.mark.parametrize(
    ("out", "passes_by"),
    [
        (answer(FS_DEVICE, "tag", "chardev") + missing(TEST_DEVICE), None),
        (answer(FS_DEVICE, "tag") + answer(TEST_DEVICE, "virtio-id"), TEST_DEVICE),
        (answer(FS_DEVICE, "tag", "notification") + missing(TEST_DEVICE), FS_DEVICE),
        (missing(FS_DEVICE) + missing(TEST_DEVICE), None),
    ],
)
def test_a_qemu_is_known_by_its_devices_and_their_properties(out: str, passes_by: str | None) -> None:
    probe = parse_answers("/bin/q", False, GREETING + out)
    assert (probe.version, probe.package, probe.problem) == ("11.1.3", "Debian 1", None)
    assert probe.passes_by == passes_by
    assert probe.has_patch == (passes_by == FS_DEVICE)


@pytest.mark.parametrize("out", ["", "hello\n", "[]\n{}\n", '{"QMP": 1}\n', '{"id": 1, "return": 2}\n'])
def test_what_is_no_qemu_is_a_problem_and_no_error(out: str) -> None:
    probe = parse_answers("/bin/q", False, out, "usage: q\nbad option\n")
    assert probe.version is None
    assert probe.problem == "its monitor does not greet: bad option"


def fake_qemu(folder: Path, body: str) -> None:
    path = folder / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_a_qemu_that_does_not_work_is_said_and_the_rest_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu(directory, "echo cannot load libX >&2; exit 127")
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    monkeypatch.setenv("VHOSTFS_CACHE", str(directory / "none"))
    report = gather(str(directory), None)
    broken = next(probe for probe in report.qemus if probe.path == str(directory / "qemu-system-x86_64"))
    assert broken.problem == "its monitor does not greet: cannot load libX"
    assert not (directory / "none").exists(), "asking makes no cache"


def test_outcomes_say_what_was_seen() -> None:
    assert Outcome.of(3).as_json() == {"works": True, "error": None, "reason": None}
    assert Outcome.of(-errno.EPERM).as_json() == {
        "works": False,
        "error": "EPERM",
        "reason": "Operation not permitted",
    }
    assert not Outcome(0, "no rights").works
