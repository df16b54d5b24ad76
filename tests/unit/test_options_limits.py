# SPDX-License-Identifier: Apache-2.0
"""Descriptors: the limit, how it is shared out, and what file handles are good for here."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.share.limits import (
    MIN_NOFILE,
    HandleProbe,
    LimitError,
    decide_handle_mode,
    describe_inodes,
    file_system_name,
    probe_file_handles,
    raise_nofile_limit,
    split_descriptors,
)
from vhostfs.share.options import HandleMode

USABLE = HandleProbe("ext4", 0, 0)
NOT_PERMITTED = HandleProbe("ext4", 0, errno.EPERM)
NO_HANDLES = HandleProbe("9p", errno.EOPNOTSUPP, 0)


def in_child(body: Callable[[], object]) -> object:
    """A limit that is lowered cannot always be raised again: each try has its own process."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe()

    def run() -> None:
        try:
            writer.send(body())
        except LimitError as error:
            writer.send(str(error))

    process = context.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    result: object = reader.recv()
    return result


def limited(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_rights_the_hard_limit_is_used_and_said() -> None:
    def body() -> object:
        limited(512, 2048)
        os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None
        return raise_nofile_limit(None), resource.getrlimit(resource.RLIMIT_NOFILE)

    result = in_child(body)
    assert isinstance(result, tuple)
    (limit, warning), now = result
    assert limit == 2048
    assert "limited to 2048" in warning
    assert now == (2048, 2048)


def test_a_limit_that_was_asked_for_is_set_or_is_an_error() -> None:
    def lower() -> object:
        return raise_nofile_limit(1024), resource.getrlimit(resource.RLIMIT_NOFILE)

    def higher() -> object:
        limited(512, 2048)
        os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None
        return raise_nofile_limit(4096)

    def absurd() -> object:
        return raise_nofile_limit(10**12)

    assert in_child(lower) == ((1024, None), (1024, 1024))
    assert "the hard limit is 2048" in str(in_child(higher))
    assert "this kernel allows at most" in str(in_child(absurd))


def test_zero_leaves_the_limit_as_it_is() -> None:
    def body() -> object:
        limited(512, 2048)
        return raise_nofile_limit(0), resource.getrlimit(resource.RLIMIT_NOFILE)

    assert in_child(body) == ((512, None), (512, 2048))


@given(st.integers(MIN_NOFILE, 1 << 30), st.sampled_from(HandleMode), st.integers(0, 1024))
def test_the_parts_of_the_budget_add_up_and_none_is_empty(limit: int, mode: HandleMode, threads: int) -> None:
    budget = split_descriptors(limit, mode, threads)
    assert budget.reserve + budget.inode_fds + budget.open_files == limit
    assert budget.reserve >= 96
    assert budget.inode_fds >= 8
    assert budget.open_files >= 8


def test_with_1024_descriptors_there_is_room_for_hundreds_of_open_files() -> None:
    budget = split_descriptors(1024, HandleMode.PREFER, 0)
    assert budget.open_files >= 400
    assert split_descriptors(1024, HandleMode.NEVER, 0).inode_fds >= 600


def test_too_few_descriptors_are_an_error() -> None:
    with pytest.raises(LimitError, match=f"{MIN_NOFILE} are needed"):
        split_descriptors(MIN_NOFILE - 1, HandleMode.PREFER, 0)


def test_handles_are_used_where_they_work_and_mandatory_means_it() -> None:
    assert decide_handle_mode(HandleMode.PREFER, USABLE) is HandleMode.PREFER
    assert decide_handle_mode(HandleMode.MANDATORY, USABLE) is HandleMode.MANDATORY
    for probe in (NOT_PERMITTED, NO_HANDLES):
        assert decide_handle_mode(HandleMode.PREFER, probe) is HandleMode.NEVER
        assert decide_handle_mode(HandleMode.NEVER, probe) is HandleMode.NEVER
    with pytest.raises(LimitError, match="it needs CAP_DAC_READ_SEARCH; use 'prefer'"):
        decide_handle_mode(HandleMode.MANDATORY, NOT_PERMITTED)
    with pytest.raises(LimitError, match="9p gives no file handles"):
        decide_handle_mode(HandleMode.MANDATORY, NO_HANDLES)


@pytest.mark.parametrize(
    ("wanted", "probe", "line"),
    [
        (
            HandleMode.PREFER,
            USABLE,
            "inodes: file handles beyond 447 descriptors (ext4, open_by_handle_at permitted)",
        ),
        (HandleMode.MANDATORY, USABLE, "inodes: file handles (ext4, open_by_handle_at permitted)"),
        (
            HandleMode.NEVER,
            USABLE,
            "inodes: at most 671 descriptors, no file handles (--inode-file-handles=never)",
        ),
        (
            HandleMode.PREFER,
            NOT_PERMITTED,
            "inodes: at most 671 descriptors, no file handles (ext4, but open_by_handle_at is not permitted: "
            "it needs CAP_DAC_READ_SEARCH)",
        ),
    ],
)
def test_one_line_says_what_inodes_are_kept_as_and_why(
    wanted: HandleMode, probe: HandleProbe, line: str
) -> None:
    mode = decide_handle_mode(wanted, probe)
    assert describe_inodes(wanted, mode, probe, split_descriptors(1024, mode, 1)) == line


def test_the_probe_tells_a_file_system_with_handles_from_one_without(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    try:
        if os.geteuid() == 0:
            probe = probe_file_handles(root, "x")
            assert probe.usable or probe.encode_errno or probe.open_errno == errno.EPERM
        assert probe_file_handles(proc, "proc").encode_errno == errno.EOPNOTSUPP
    finally:
        os.close(root)
        os.close(proc)


def test_file_systems_are_named_as_mount_names_them() -> None:
    assert file_system_name("/proc") == "proc"
    assert file_system_name("/proc/self") == "proc"
    assert file_system_name("/sys") == "sysfs"
