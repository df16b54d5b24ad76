# SPDX-License-Identifier: Apache-2.0
"""Which event source is chosen, by what a kernel allows and what was asked for, and what is said about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vhostfs.events.kernel import RunningKernel
from vhostfs.events.masks import DELIVERABLE, FsEvent, event_names
from vhostfs.events.source import (
    FAN_MARK_FILESYSTEM,
    FAN_MARK_REMOVE,
    FAN_REPORT_DFID_NAME_TARGET,
    FAN_UNLIMITED_QUEUE,
    EventSourceError,
    choose_source,
)
from vhostfs.share.options import EventsMode

ROOT_FD = 7


@dataclass
class FakeKernel:
    """Allows everything but what it was told to refuse; each value an errno, 0 for allowed."""

    fanotify: int = 0
    unlimited: int = 0
    target_fid: int = 0
    rename: int = 0
    file_system_mark: int = 0
    inode_mark: int = 0
    inotify: int = 0
    handles: int = 0
    marker: int = 0
    open_fds: set[int] = field(default_factory=set)
    marks: dict[tuple[str, int], int] = field(default_factory=dict)
    group_flags: dict[int, int] = field(default_factory=dict)

    def _opened(self) -> int:
        fd = 100 + len(self.group_flags) + len(self.open_fds)
        self.open_fds.add(fd)
        return fd

    def fanotify_init(self, flags: int) -> int:
        if self.fanotify:
            return -self.fanotify
        if self.unlimited and flags & FAN_UNLIMITED_QUEUE:
            return -self.unlimited
        if self.target_fid and flags & FAN_REPORT_DFID_NAME_TARGET == FAN_REPORT_DFID_NAME_TARGET:
            return -self.target_fid
        fd = self._opened()
        self.group_flags[fd] = flags
        return fd

    def fanotify_mark(self, group_fd: int, flags: int, mask: int, directory_fd: int) -> int:
        assert group_fd in self.open_fds
        assert directory_fd == ROOT_FD
        kind = "filesystem" if flags & FAN_MARK_FILESYSTEM else "inode"
        refusal = self.file_system_mark if kind == "filesystem" else self.inode_mark
        if refusal:
            return -refusal
        if self.rename and mask & FsEvent.RENAME:
            return -self.rename
        if flags & FAN_MARK_REMOVE:
            del self.marks[kind, group_fd]
        else:
            self.marks[kind, group_fd] = mask
        return 0

    def start_marker(self, group_fd: int, directory_fd: int, mask: int) -> int:
        assert self.marks["filesystem", group_fd] == mask
        assert directory_fd == ROOT_FD
        return -self.marker if self.marker else self._opened()

    def inotify_init(self, flags: int) -> int:
        return -self.inotify if self.inotify else self._opened()

    def encode_handle(self, directory_fd: int) -> int:
        return -self.handles

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)


def test_with_all_rights_one_mark_covers_the_file_system() -> None:
    kernel = FakeKernel()
    source = choose_source(EventsMode.AUTO, ROOT_FD, kernel)
    assert source.mode is EventsMode.FANOTIFY_FILESYSTEM
    assert kernel.open_fds == {source.fd, source.order_fd, source.next_fd, source.marker_fd}
    assert kernel.group_flags[source.fd] & FAN_UNLIMITED_QUEUE
    assert kernel.group_flags[source.next_fd] == kernel.group_flags[source.fd]
    assert kernel.marks == {}
    assert source.filesystem_mask & FsEvent.RENAME
    assert not source.filesystem_mask & (FsEvent.MOVED_FROM | FsEvent.OPEN | FsEvent.ACCESS)
    assert source.host_mask == DELIVERABLE | FsEvent.RENAME
    assert source.joins_renames
    assert str(source) == "events: fanotify, one mark on the file system of the share"


def test_what_was_asked_for_by_name_has_no_group_to_move_to() -> None:
    for mode in (EventsMode.FANOTIFY_FILESYSTEM, EventsMode.FANOTIFY_INODES, EventsMode.INOTIFY):
        assert choose_source(mode, ROOT_FD, FakeKernel()).next_fd == -1
    assert choose_source(EventsMode.FANOTIFY, ROOT_FD, FakeKernel()).next_fd >= 0


def test_where_inodes_cannot_be_marked_the_mark_on_the_file_system_is_final() -> None:
    kernel = FakeKernel(inode_mark=errno.ENOSPC)
    source = choose_source(EventsMode.AUTO, ROOT_FD, kernel)
    assert source.mode is EventsMode.FANOTIFY_FILESYSTEM
    assert source.next_fd == -1
    assert kernel.open_fds == {source.fd, source.order_fd, source.marker_fd}


def test_where_no_process_can_be_made_for_it_the_mark_on_the_file_system_is_there_all_the_time() -> None:
    kernel = FakeKernel(marker=errno.EAGAIN)
    source = choose_source(EventsMode.AUTO, ROOT_FD, kernel)
    assert source.mode is EventsMode.FANOTIFY_FILESYSTEM
    assert source.marker_fd == -1
    assert kernel.marks == {("filesystem", source.fd): source.filesystem_mask}


def test_without_rights_inodes_are_marked_one_by_one_and_the_probe_leaves_no_mark() -> None:
    kernel = FakeKernel(unlimited=errno.EPERM, file_system_mark=errno.EPERM)
    source = choose_source(EventsMode.AUTO, ROOT_FD, kernel)
    assert source.mode is EventsMode.FANOTIFY_INODES
    assert source.filesystem_mask == 0
    assert source.joins_renames
    assert kernel.marks == {}
    assert kernel.open_fds == {source.fd, source.order_fd}
    assert str(source) == "events: fanotify, marks on watched inodes (no CAP_SYS_ADMIN)"


def test_a_file_system_that_cannot_be_marked_as_a_whole_is_marked_by_inode() -> None:
    source = choose_source(EventsMode.AUTO, ROOT_FD, FakeKernel(file_system_mark=errno.EXDEV))
    assert source.mode is EventsMode.FANOTIFY_INODES
    assert "EXDEV" in source.reason


def test_inodes_are_marked_when_that_was_asked_for() -> None:
    source = choose_source(EventsMode.FANOTIFY_INODES, ROOT_FD, FakeKernel())
    assert source.filesystem_mask == 0
    assert str(source) == "events: fanotify, marks on watched inodes (asked for)"


@pytest.mark.parametrize("mode", [EventsMode.FANOTIFY_FILESYSTEM, EventsMode.FANOTIFY_INODES])
def test_before_fan_rename_moves_are_marked_and_inotify_joins_the_halves(mode: EventsMode) -> None:
    kernel = FakeKernel(rename=errno.EINVAL)
    source = choose_source(mode, ROOT_FD, kernel)
    assert source.joins_renames
    assert not source.host_mask & FsEvent.RENAME
    assert source.host_mask & FsEvent.MOVED_FROM
    if mode is EventsMode.FANOTIFY_FILESYSTEM:
        assert source.filesystem_mask & FsEvent.MOVED_FROM
        assert source.filesystem_mask & FsEvent.MOVED_TO
        assert not source.filesystem_mask & FsEvent.RENAME


def test_fan_rename_is_left_alone_when_an_experiment_asks_for_that() -> None:
    source = choose_source(EventsMode.AUTO, ROOT_FD, FakeKernel(), use_rename=False)
    assert not source.host_mask & FsEvent.RENAME
    assert source.filesystem_mask & FsEvent.MOVED_TO


@pytest.mark.parametrize("rename", [0, errno.EINVAL])
def test_without_inotify_beside_it_fanotify_goes_on_and_says_what_is_missing(rename: int) -> None:
    source = choose_source(EventsMode.AUTO, ROOT_FD, FakeKernel(inotify=errno.EMFILE, rename=rename))
    assert source.mode is EventsMode.FANOTIFY_FILESYSTEM
    assert source.order_fd == -1
    assert source.joins_renames == (not rename)
    assert "max_user_instances" in source.reason
    assert "the order within a directory may suffer" in source.reason
    assert ("no FAN_RENAME" in source.reason) == bool(rename)


def test_before_target_fid_the_group_names_directories_only() -> None:
    source = choose_source(EventsMode.AUTO, ROOT_FD, FakeKernel(target_fid=errno.EINVAL))
    assert not source.knows_child
    assert source.mode is EventsMode.FANOTIFY_FILESYSTEM
    assert "no FAN_REPORT_TARGET_FID" in source.reason


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (FakeKernel(handles=errno.EOPNOTSUPP), "no file handles"),
        (FakeKernel(fanotify=errno.EPERM), "Linux 5.13"),
        (FakeKernel(fanotify=errno.EINVAL), "Linux 5.9"),
        (FakeKernel(fanotify=errno.ENOSYS), "ENOSYS"),
        (FakeKernel(fanotify=errno.EMFILE), "max_user_groups"),
        (FakeKernel(file_system_mark=errno.ENODEV, inode_mark=errno.ENODEV), "ENODEV"),
        (FakeKernel(file_system_mark=errno.EPERM, inode_mark=errno.ENOSPC), "max_user_marks"),
    ],
)
def test_where_fanotify_does_not_work_inotify_takes_over_and_says_why(kernel: FakeKernel, text: str) -> None:
    source = choose_source(EventsMode.AUTO, ROOT_FD, kernel)
    assert source.mode is EventsMode.INOTIFY
    assert source.reason.startswith("inotify (fanotify: ")
    assert text in source.reason
    assert "\n" not in source.reason
    assert source.joins_renames
    assert source.host_mask == 0xFFF
    assert kernel.open_fds == {source.fd}
    with pytest.raises(EventSourceError, match=text):
        choose_source(EventsMode.FANOTIFY, ROOT_FD, kernel)
    assert kernel.open_fds == {source.fd}


def test_a_mark_on_the_file_system_that_was_asked_for_and_is_refused_is_an_error() -> None:
    kernel = FakeKernel(file_system_mark=errno.EPERM)
    with pytest.raises(EventSourceError) as caught:
        choose_source(EventsMode.FANOTIFY_FILESYSTEM, ROOT_FD, kernel)
    assert str(caught.value) == (
        "--events=fanotify:filesystem is not possible: marking the file system: "
        "Operation not permitted (EPERM); it needs CAP_SYS_ADMIN"
    )
    assert kernel.open_fds == set()


def test_when_nothing_works_the_error_says_why_for_each() -> None:
    kernel = FakeKernel(handles=errno.EOPNOTSUPP, inotify=errno.EMFILE)
    with pytest.raises(EventSourceError) as caught:
        choose_source(EventsMode.AUTO, ROOT_FD, kernel)
    assert "max_user_instances" in str(caught.value)
    assert "no file handles" in str(caught.value)
    assert "--events=off" in str(caught.value)


def test_inotify_that_was_asked_for_asks_fanotify_nothing() -> None:
    kernel = FakeKernel()
    source = choose_source(EventsMode.INOTIFY, ROOT_FD, kernel)
    assert kernel.group_flags == {}
    assert source.reason == "inotify (asked for)"


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_the_running_kernel_gives_what_it_reports(root_fd: int, tmp_path: Path) -> None:
    source = choose_source(EventsMode.AUTO, root_fd, RunningKernel())
    try:
        assert not os.get_inheritable(source.fd)
        assert not os.get_blocking(source.fd)
        if source.mode is not EventsMode.FANOTIFY_FILESYSTEM:
            pytest.skip(f"this machine only allows: {source.reason}")
        (tmp_path / "before-anybody-asked").touch()
        os.write(source.marker_fd, b"+")
        assert os.read(source.marker_fd, 4) == bytes(4)
        (tmp_path / "seen-by-the-mark").touch()
        records = os.read(source.fd, 65536)
        assert b"seen-by-the-mark" in records
        assert b"before-anybody-asked" not in records
    finally:
        os.close(source.fd)
        os.close(source.marker_fd)


def test_the_running_kernel_gives_inotify(root_fd: int) -> None:
    source = choose_source(EventsMode.INOTIFY, root_fd, RunningKernel())
    assert not os.get_blocking(source.fd)
    os.close(source.fd)


def test_event_names_are_those_of_the_kernel() -> None:
    assert event_names(0x4000_0100) == ["CREATE", "ISDIR"]
    assert event_names(0x2) == ["MODIFY"]
    assert event_names(1 << 40) == ["BIT40"]
    assert event_names(0) == []
