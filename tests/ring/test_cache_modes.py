# SPDX-License-Identifier: Apache-2.0
"""--cache and what goes with it: how long the guest may keep names, attributes, data and listings.

Must not test the operations. Specification: the options' help; FOPEN_* in fuse.h.
"""

from __future__ import annotations

import os

import pytest

from tests.ring.conftest import MakeShare
from vhostfs.frontend import FuseClient, InitFlag, OpenReply
from vhostfs.frontend import operations as op

SECOND_NS = 10**9
DAY_NS = 86_400 * SECOND_NS


def _opened(fs: FuseClient, flags: int = os.O_RDWR) -> OpenReply:
    entry, _ = fs.create(fs.root, "a")
    return fs.open(entry.nodeid, flags).flags


@pytest.mark.parametrize(
    ("mode", "timeout_ns"),
    [("auto", SECOND_NS), ("always", DAY_NS), ("metadata", DAY_NS), ("never", 0)],
)
def test_a_mode_sets_the_timeouts_of_names_and_attributes(
    make_share: MakeShare, mode: str, timeout_ns: int
) -> None:
    fs = make_share(f"--cache={mode}").mount()
    entry, _ = fs.create(fs.root, "a")
    assert (entry.entry_timeout_ns, entry.attr_timeout_ns) == (timeout_ns, timeout_ns)
    found = fs.lookup(fs.root, "a")
    assert (found.entry_timeout_ns, found.attr_timeout_ns) == (timeout_ns, timeout_ns)
    assert fs.call(op.getattr_(entry.nodeid)).timeout_ns == timeout_ns
    fh = fs.opendir(fs.root).fh
    if fs.session.flags & InitFlag.DO_READDIRPLUS:
        plus = [item for item in fs.readdirplus(fs.root, fh) if item.dirent.name == b"a"]
        assert plus[0].entry.entry_timeout_ns == timeout_ns


def test_auto_lets_data_be_cached_until_the_next_open(make_share: MakeShare) -> None:
    flags = _opened(make_share("--cache=auto").mount())
    assert not flags & (OpenReply.DIRECT_IO | OpenReply.KEEP_CACHE)


def test_always_lets_data_and_listings_be_kept(make_share: MakeShare) -> None:
    fs = make_share("--cache=always").mount()
    flags = _opened(fs)
    assert flags & OpenReply.KEEP_CACHE
    assert not flags & OpenReply.DIRECT_IO
    assert fs.opendir(fs.root).flags & OpenReply.CACHE_DIR


@pytest.mark.parametrize("mode", ["never", "metadata"])
def test_never_and_metadata_keep_data_out_of_the_page_cache(make_share: MakeShare, mode: str) -> None:
    fs = make_share(f"--cache={mode}").mount()
    assert _opened(fs) & OpenReply.DIRECT_IO
    _, opened = fs.create(fs.root, "b")
    assert opened.flags & OpenReply.DIRECT_IO


def test_create_and_open_agree_about_caching(make_share: MakeShare) -> None:
    for mode in ("auto", "always", "metadata", "never"):
        fs = make_share(f"--cache={mode}").mount()
        entry, created = fs.create(fs.root, "a")
        opened = fs.open(entry.nodeid, os.O_RDWR)
        assert created.flags & OpenReply.DIRECT_IO == opened.flags & OpenReply.DIRECT_IO


def test_shared_mmap_without_caching_only_when_allowed(make_share: MakeShare, ours: None) -> None:
    plain = make_share("--cache=never").mount()
    assert not plain.session.flags & InitFlag.DIRECT_IO_ALLOW_MMAP
    allowed = make_share("--cache=never", "--allow-mmap").mount()
    assert allowed.session.flags & InitFlag.DIRECT_IO_ALLOW_MMAP
    assert _opened(allowed) & OpenReply.DIRECT_IO


def test_o_direct_reaches_the_host_only_when_allowed(make_share: MakeShare) -> None:
    """Unaligned direct I/O shows which it was: a host that got O_DIRECT refuses it."""
    fs = make_share("--cache=auto").mount()
    entry = fs.write_file(fs.root, "a", b"12345")
    fh = fs.open(entry.nodeid, os.O_RDONLY | os.O_DIRECT).fh
    assert fs.read(entry.nodeid, fh, 3, 1) == b"234"


def test_writeback_is_negotiated_only_when_asked(make_share: MakeShare) -> None:
    assert not make_share().mount().session.flags & InitFlag.WRITEBACK_CACHE
    assert make_share("--writeback").mount().session.flags & InitFlag.WRITEBACK_CACHE


def test_with_writeback_write_only_files_can_be_read_by_the_guest_s_cache(make_share: MakeShare) -> None:
    """The page cache must read a page before it can write a part of it."""
    share = make_share("--writeback")
    fs = share.mount()
    (share.path / "a").write_bytes(b"12345")
    entry = fs.lookup(fs.root, "a")
    fh = fs.open(entry.nodeid, os.O_WRONLY).fh
    assert fs.read(entry.nodeid, fh, 10) == b"12345"


def test_with_writeback_append_is_the_guest_s_business(make_share: MakeShare) -> None:
    """The guest writes whole cached pages at their own offsets, whatever the file was opened with."""
    share = make_share("--writeback")
    fs = share.mount()
    (share.path / "a").write_bytes(b"12345")
    entry = fs.lookup(fs.root, "a")
    fh = fs.open(entry.nodeid, os.O_WRONLY | os.O_APPEND).fh
    fs.write(entry.nodeid, fh, b"AB", 1)
    assert (share.path / "a").read_bytes() == b"1AB45"
