# SPDX-License-Identifier: Apache-2.0
"""FUSE_INIT: each flag alone, all, none; old and new protocol versions; sizes; what comes before and after.

Must not test what the flags do. Specification: the head comment and fuse_init_out of fuse.h.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import ROOT, FuseClient, InitFlag, Machine, Session
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op

F = InitFlag

ALWAYS_TAKEN = (
    F.ASYNC_READ
    | F.POSIX_LOCKS
    | F.ATOMIC_O_TRUNC
    | F.BIG_WRITES
    | F.FLOCK_LOCKS
    | F.PARALLEL_DIROPS
    | F.MAX_PAGES
    | F.SETXATTR_EXT
    | F.CREATE_SUPP_GROUP
)
"""What the server does by default and therefore grants when it is offered."""

NEVER_TAKEN = (
    F.SPLICE_WRITE
    | F.SPLICE_MOVE
    | F.SPLICE_READ
    | F.NO_OPEN_SUPPORT
    | F.NO_OPENDIR_SUPPORT
    | F.MAP_ALIGNMENT
    | F.INIT_RESERVED
    | F.HAS_INODE_DAX
    | F.PASSTHROUGH
    | F.OVER_IO_URING
    | F.WRITEBACK_CACHE
    | F.POSIX_ACL
    | F.SECURITY_CTX
    | F.HANDLE_KILLPRIV_V2
)
"""What is not done, or not without an option."""


@pytest.fixture
def session(share: Share) -> Session:
    """A running device before FUSE_INIT."""
    return share.boot()


def _init(session: Session, flags: int, minor: int = abi.MINOR, major: int = abi.MAJOR) -> abi.InitReply:
    return session.initialised(op.init(flags, minor=minor, major=major), flags)


@pytest.mark.parametrize("flag", list(F), ids=lambda flag: flag.name)
def test_a_flag_offered_alone_is_granted_alone(session: Session, flag: InitFlag, ours: None) -> None:
    offered = flag | (F.INIT_EXT if flag >= 1 << 32 else F(0))
    reply = _init(session, offered)
    assert reply.flags & ~offered == 0
    if flag & ALWAYS_TAKEN:
        assert reply.flags & flag
    if flag & NEVER_TAKEN:
        assert not reply.flags & flag
    assert session.call(op.getattr_(ROOT)).attr.nlink >= 1


def test_only_what_was_offered_is_granted(session: Session, ours: None) -> None:
    for offered in (abi.LINUX_6_1_FLAGS, abi.LINUX_7_FLAGS, F(0), ~F(0) & ~F.INIT_RESERVED):
        reply = _init(session, offered & ((1 << 64) - 1))
        assert reply.flags & ~offered == 0
        assert reply.flags & NEVER_TAKEN & ~(F.MAP_ALIGNMENT) == 0
        session.call(op.destroy())


def test_flags_above_31_need_init_ext(session: Session, ours: None) -> None:
    reply = _init(session, F.CREATE_SUPP_GROUP | F.ALLOW_IDMAP | F.BIG_WRITES)
    assert reply.flags & ~F.BIG_WRITES == 0


def test_the_version_is_7_and_the_lesser_minor(session: Session, ours: None) -> None:
    reply = _init(session, abi.LINUX_7_FLAGS)
    assert reply.major == 7
    assert 31 <= reply.minor <= abi.MINOR
    session.call(op.destroy())
    reply = _init(session, abi.LINUX_6_1_FLAGS, minor=36)
    assert 31 <= reply.minor <= 45


@pytest.mark.parametrize("minor", [27, 31, 33, 34, 36, 38, 40, 42, 45, 99])
def test_guests_of_every_age_can_work(session: Session, minor: int, ours: None) -> None:
    flags = abi.LINUX_6_1_FLAGS if minor >= 36 else abi.LINUX_6_1_FLAGS & 0x3FFFFFFF
    reply = _init(session, flags, minor=minor)
    assert reply.major == 7
    assert session.call(op.getattr_(ROOT)).attr.ino > 0


def test_a_guest_too_old_is_refused_clearly(session: Session, ours: None) -> None:
    """Anything before 7.27 is older than virtio-fs; its shorter structs are not spoken here."""
    for minor in (1, 8, 12):
        with refused(errno.EPROTO):
            session.call(op.init(0, minor=minor))
    _init(session, abi.LINUX_7_FLAGS)


def test_a_newer_major_is_answered_with_ours(session: Session) -> None:
    """The guest then sends INIT again with the older one."""
    reply = session.call(op.init(abi.LINUX_7_FLAGS, major=8, minor=0))
    assert reply.major == 7
    assert _init(session, abi.LINUX_7_FLAGS).major == 7


def test_an_older_major_is_refused(session: Session, ours: None) -> None:
    with refused(errno.EPROTO):
        session.call(op.init(0, major=6, minor=0))
    _init(session, abi.LINUX_7_FLAGS)


def test_requests_of_one_mebibyte_are_announced(session: Session) -> None:
    reply = _init(session, abi.LINUX_7_FLAGS)
    assert reply.max_write == 1 << 20
    assert reply.max_pages == 256
    assert reply.time_gran == 1
    assert reply.size_bytes == abi.INIT_OUT.size


def test_without_max_pages_writes_stay_at_32_pages(session: Session, ours: None) -> None:
    """Such a guest cannot send more."""
    reply = _init(session, abi.LINUX_7_FLAGS & ~F.MAX_PAGES)
    assert 4096 <= reply.max_write <= 32 * 4096


def test_readahead_is_no_more_than_was_asked(session: Session) -> None:
    reply = session.call(op.init(abi.LINUX_7_FLAGS, readahead=4096))
    assert reply.max_readahead <= 4096


def test_nothing_is_served_before_init(make_share: MakeShare, ours: None) -> None:
    share = make_share(private=True)
    session = share.boot()
    with refused(errno.EIO, errno.EPERM, errno.ENOTCONN, errno.EINVAL):
        session.call(op.getattr_(ROOT))
    _init(session, abi.LINUX_7_FLAGS)
    session.call(op.getattr_(ROOT))


def test_destroy_ends_the_session_and_forgets_everything(share: Share, ours: None) -> None:
    fs = share.mount()
    entry, opened = fs.create(fs.root, "a")
    fs.destroy()
    with refused(errno.EIO, errno.EPERM, errno.ENOTCONN, errno.EINVAL, errno.ESTALE):
        fs.getattr(entry.nodeid)
    fs.init()
    with refused(errno.ESTALE):
        fs.getattr(entry.nodeid)
    with refused(errno.EBADF, errno.ESTALE):
        fs.read(entry.nodeid, opened.fh, 10)
    fs.root = ROOT
    assert fs.walk(f"{share.relative}/a").attr.size == 0


def test_a_second_init_begins_a_new_session(share: Share, ours: None) -> None:
    """A guest that crashed and rebooted without a device reset sends INIT again."""
    fs = share.mount()
    nodeid = fs.write_file(fs.root, "a", b"x").nodeid
    try:
        fs.init()
    except OSError as error:
        refused_with = error.errno
    else:
        refused_with = None
    if refused_with is None:
        with refused(errno.ESTALE):
            fs.getattr(nodeid)
    else:
        assert refused_with in (errno.EINVAL, errno.EIO)
        assert fs.getattr(nodeid).size == 1


def test_a_reconnected_guest_finds_no_inodes_of_the_one_before(share: Share, ours: None) -> None:
    fs = share.mount()
    nodeid = fs.write_file(fs.root, "a", b"x").nodeid
    share.unmount()
    fs = share.mount()
    with refused(errno.ESTALE):
        fs.getattr(nodeid)


def test_the_share_is_tagged_in_the_device_s_configuration(make_share: MakeShare, ours: None) -> None:
    share = make_share("--tag=my share", "--num-request-queues=3", private=True)
    fs = share.mount(replace(Machine(), request_queues=3))
    config = fs.vmm.config()
    assert (config.tag, config.num_request_queues) == (b"my share", 3)
    for number in range(3):
        assert fs.through(number).getattr(ROOT).nlink >= 2


def test_killpriv_v2_acl_and_labels_come_with_their_options(make_share: MakeShare) -> None:
    for option, flag in (
        ("--killpriv-v2", F.HANDLE_KILLPRIV_V2),
        ("--posix-acl", F.POSIX_ACL),
        ("--security-label", F.SECURITY_CTX),
    ):
        fs: FuseClient = make_share(option).mount()
        assert fs.session.flags & flag, option


def test_locks_stay_in_the_guest_when_asked(make_share: MakeShare, ours: None) -> None:
    fs = make_share("--no-posix-lock", "--no-flock").mount()
    assert not fs.session.flags & (F.POSIX_LOCKS | F.FLOCK_LOCKS)
