# SPDX-License-Identifier: Apache-2.0
"""FUSE_INIT: what is granted, by what was asked of the server and what a guest offers."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.fuse.abi import InitFlag, InitIn
from vhostfs.fuse.init import MAX_WRITE_BYTES, SessionOptions, negotiate, wanted_flags
from vhostfs.record import field_names

EVERYTHING = (1 << 64) - 1
NAMES = field_names(SessionOptions)
options = st.builds(SessionOptions, **{name: st.booleans() for name in NAMES})

NEVER = (
    InitFlag.NO_OPEN_SUPPORT
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.HAS_INODE_DAX
    | InitFlag.MAP_ALIGNMENT
    | InitFlag.PASSTHROUGH
    | InitFlag.NO_EXPORT_SUPPORT
    | InitFlag.ALLOW_IDMAP
    | InitFlag.OVER_IO_URING
    | InitFlag.REQUEST_TIMEOUT
    | InitFlag.EXPLICIT_INVAL_DATA
)

# option: flags that it alone decides, and whether it must be on or off for them
DECIDED_BY = {
    "posix_lock": (InitFlag.POSIX_LOCKS, True),
    "flock": (InitFlag.FLOCK_LOCKS, True),
    "readdirplus": (InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO, True),
    "writeback": (InitFlag.WRITEBACK_CACHE, True),
    "posix_acl": (InitFlag.POSIX_ACL | InitFlag.DONT_MASK, True),
    "killpriv_v2": (InitFlag.HANDLE_KILLPRIV_V2, True),
    "announce_submounts": (InitFlag.SUBMOUNTS, True),
    "security_label": (InitFlag.SECURITY_CTX, True),
    "allow_mmap": (InitFlag.DIRECT_IO_ALLOW_MMAP, True),
    "cache_always": (InitFlag.CACHE_SYMLINKS, True),
    "cache_symlinks": (InitFlag.CACHE_SYMLINKS, True),
}


def guest(flags: int = EVERYTHING, *, major: int = 7, minor: int = 45) -> InitIn:
    return InitIn(major, minor, 131072, flags)


def granted(asked: SessionOptions, offered: int = EVERYTHING) -> InitFlag:
    return InitFlag(negotiate(guest(offered), asked).reply.flags)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_on", [False, True])
def test_each_option_decides_its_own_flags(name: str, is_on: bool) -> None:
    flags, on_for = DECIDED_BY[name]
    asked = SessionOptions(**{name: is_on})
    assert granted(asked) & flags == (flags if is_on == on_for else 0)
    assert granted(asked, EVERYTHING & ~flags) & flags == 0


def test_cached_data_is_checked_against_the_host_unless_it_may_be_kept() -> None:
    assert granted(SessionOptions()) & InitFlag.AUTO_INVAL_DATA
    assert not granted(SessionOptions(cache_always=True)) & InitFlag.AUTO_INVAL_DATA


@given(asked=options, offered=st.integers(0, EVERYTHING), minor=st.integers(27, 60))
def test_nothing_is_granted_that_was_not_both_offered_and_wanted(
    asked: SessionOptions, offered: int, minor: int
) -> None:
    answer = negotiate(guest(offered, minor=minor), asked)
    flags = answer.reply.flags
    assert answer.error == 0
    assert flags & ~offered == 0
    assert flags & ~wanted_flags(asked) == 0
    assert flags & NEVER == 0
    assert answer.reply.minor == min(minor, 45)
    assert answer.reply.max_readahead_bytes == 131072
    assert len(answer.reply.pack()) == 64
    assert all("\n" not in note for note in answer.notes)


@given(asked=options, offered=st.integers(0, EVERYTHING))
def test_acls_are_granted_with_all_that_they_need_or_not_at_all(asked: SessionOptions, offered: int) -> None:
    flags = granted(asked, offered)
    if flags & (InitFlag.POSIX_ACL | InitFlag.DONT_MASK):
        assert asked.posix_acl
        assert flags & InitFlag.POSIX_ACL
        assert flags & InitFlag.DONT_MASK
        assert flags & InitFlag.SETXATTR_EXT


def test_what_was_asked_for_but_not_offered_is_said() -> None:
    answer = negotiate(guest(0), SessionOptions(writeback=True, posix_acl=True))
    assert any("write-back" in note for note in answer.notes)
    assert any("ACL" in note for note in answer.notes)
    assert negotiate(guest(), SessionOptions(writeback=True, posix_acl=True)).notes == ()


def test_large_requests_need_max_pages() -> None:
    assert negotiate(guest(), SessionOptions()).reply.max_write_bytes == MAX_WRITE_BYTES == 256 * 4096
    without = negotiate(guest(EVERYTHING & ~InitFlag.MAX_PAGES), SessionOptions())
    assert without.reply.max_write_bytes == 32 * 4096


@pytest.mark.parametrize(("major", "minor"), [(6, 99), (0, 0), (7, 26), (7, 0)])
def test_a_guest_that_is_too_old_is_refused(major: int, minor: int) -> None:
    answer = negotiate(guest(major=major, minor=minor), SessionOptions())
    assert answer.error == errno.EPROTO
    assert answer.max_write_bytes == 0


def test_a_newer_major_is_asked_to_come_again_with_ours() -> None:
    answer = negotiate(guest(major=8, minor=0), SessionOptions())
    assert answer.error == 0
    assert answer.max_write_bytes == 0
    assert answer.reply.pack()[:4] == b"\x07\0\0\0"
    assert answer.reply.flags == 0
