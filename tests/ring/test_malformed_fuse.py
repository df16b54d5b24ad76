# SPDX-License-Identifier: Apache-2.0
"""FUSE messages that lie: lengths, missing arguments, names without end, impossible sizes.

Must not test rings. Specification: fuse.h; every request is answered, or the ring is stopped cleanly.
"""

from __future__ import annotations

import errno
import struct

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from tests.server import awaited
from vhostfs.frontend import (
    ROOT,
    BackendGoneError,
    FuseClient,
    FuseError,
    InitFlag,
    Opcode,
    ProtocolError,
    RingBrokenError,
)
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.session import Pending, describe

pytestmark = pytest.mark.usefixtures("ours")

NO_REPLY = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}
ANSWERING = [opcode for opcode in Opcode if opcode not in NO_REPLY and opcode != Opcode.DESTROY]


def send(
    fs: FuseClient, opcode: int, nodeid: int, body: bytes, *, length: int | None = None, room: int = 4096
) -> Pending[bytes]:
    """A request whose header.len may be anything."""
    unique = fs.session.unique()
    size = abi.IN_HEADER.size + len(body) if length is None else length
    header = abi.IN_HEADER.pack(size, opcode, unique, nodeid, 0, 0, 1, 0, 0)
    call = op.raw(opcode, nodeid, body, room)
    queue = fs.vmm.request_queue()
    return fs.session.submit_raw(call, unique, [header, body], [abi.OUT_HEADER.size, room], queue)


def outcome(pending: Pending[bytes]) -> str:
    """What came of a request; anything but an answer that makes sense raises."""
    try:
        pending.payload()
    except FuseError as error:
        return errno.errorcode[error.errno or 0]
    except BackendGoneError:
        return "hung up"
    except RingBrokenError:
        return "broken"
    return "ok"


@pytest.mark.parametrize("opcode", ANSWERING, ids=describe)
def test_arguments_cut_short_are_an_error(share: Share, fs: FuseClient, opcode: Opcode) -> None:
    """Every length from nothing to a few bytes, for every operation."""
    entry, opened = fs.create(fs.root, "a")
    plausible = struct.pack("<QQ", opened.fh, 0) + bytes(128)
    for size in (0, 1, 2, 3, 4, 7, 8, 12, 15):
        what = outcome(send(fs, opcode, entry.nodeid, plausible[:size]))
        if opcode in (Opcode.STATFS, Opcode.READLINK):
            continue
        if opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.SYNCFS, Opcode.UNLINK, Opcode.RMDIR):
            assert what != "hung up"
            continue
        if size < 4:
            assert what not in ("ok", "hung up", "broken"), size
    assert fs.getattr(fs.root).nlink >= 2


@pytest.mark.parametrize("opcode", ANSWERING, ids=describe)
def test_arguments_of_all_ones_are_an_error(share: Share, fs: FuseClient, opcode: Opcode) -> None:
    entry = fs.write_file(fs.root, "a", b"content")
    for body in (b"\xff" * 64, b"\xff" * 128, b"\xff" * 4000):
        what = outcome(send(fs, opcode, entry.nodeid, body))
        # A newer major version is answered with ours; unknown open flags are left away.
        if opcode not in (Opcode.STATFS, Opcode.SYNCFS, Opcode.INIT, Opcode.OPEN):
            assert what != "ok"
        assert what not in ("hung up", "broken")
    if opcode == Opcode.INIT:
        fs.init()
    elif opcode != Opcode.OPEN:
        assert fs.read_file(entry.nodeid) == b"content"


@pytest.mark.parametrize("opcode", ANSWERING, ids=describe)
def test_arguments_of_zeros_are_harmless(share: Share, fs: FuseClient, opcode: Opcode) -> None:
    entry = fs.write_file(fs.root, "a", b"content")
    for size in (64, 128, 4000):
        assert outcome(send(fs, opcode, entry.nodeid, bytes(size))) not in ("hung up", "broken")
    if opcode == Opcode.INIT:
        fs.init()
    assert (share.path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("length", [0, 1, 39, 41, 55, 57, 1 << 16, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_header_whose_length_is_a_lie_is_an_error_or_ignored(
    share: Share, fs: FuseClient, length: int
) -> None:
    """The length and the chain disagree."""
    body = struct.pack("<IIQ", 0, 0, 0)
    what = outcome(send(fs, Opcode.GETATTR, fs.root, body, length=length))
    assert what in ("EINVAL", "EIO", "ok", "broken", "hung up")
    assert share.serves()


def test_a_request_shorter_than_its_header_is_survived(share: Share) -> None:
    for size in (1, 8, 39):
        fs = share.mount()
        unique = fs.session.unique()
        header = abi.IN_HEADER.pack(size, Opcode.GETATTR, unique, ROOT, 0, 0, 1, 0, 0)
        call = op.raw(Opcode.GETATTR)
        pending = fs.session.submit_raw(call, unique, [header[:size]], [200], fs.vmm.request_queue())

        def over(fs: FuseClient = fs, pending: Pending[bytes] = pending) -> bool:
            return (
                pending.done
                or fs.vmm.request_queue().error_signalled(0)
                or fs.vmm.connection.closed_by_backend(0)
            )

        assert awaited(over)
        assert share.serves()


@pytest.mark.parametrize(
    ("opcode", "head"),
    [
        (Opcode.LOOKUP, b""),
        (Opcode.UNLINK, b""),
        (Opcode.RMDIR, b""),
        (Opcode.REMOVEXATTR, b""),
        (Opcode.SYMLINK, b""),
        (Opcode.SYMLINK, b"name\0"),
        (Opcode.MKDIR, struct.pack("<II", 0o755, 0)),
        (Opcode.MKNOD, struct.pack("<IIII", 0o100600, 0, 0, 0)),
        (Opcode.CREATE, struct.pack("<IIII", 2, 0o600, 0, 0)),
        (Opcode.RENAME, struct.pack("<Q", ROOT)),
        (Opcode.RENAME, struct.pack("<Q", ROOT) + b"a\0"),
        (Opcode.RENAME2, struct.pack("<QII", ROOT, 0, 0) + b"a\0"),
        (Opcode.LINK, struct.pack("<Q", ROOT)),
        (Opcode.GETXATTR, struct.pack("<II", 100, 0)),
        (Opcode.SETXATTR, struct.pack("<IIII", 0, 0, 0, 0)),
    ],
    ids=lambda value: describe(value) if isinstance(value, int) else str(len(value)),
)
def test_a_name_without_its_end_is_refused(share: Share, fs: FuseClient, opcode: Opcode, head: bytes) -> None:
    for tail in (b"", b"x", b"x" * 255, b"x" * 5000):
        assert outcome(send(fs, opcode, fs.root, head + tail)) not in ("ok", "hung up", "broken")
    assert list(share.path.iterdir()) == []


def test_a_read_of_more_than_fits_fills_only_what_there_is(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", bytes(range(256)) * 64)
    fh = fs.open(entry.nodeid).fh
    for size in (8193, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF):
        body = struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0)
        pending = send(fs, Opcode.READ, entry.nodeid, body, room=8192)
        try:
            data = pending.payload()
        except FuseError as error:
            assert error.errno in (errno.EINVAL, errno.EIO, errno.E2BIG)
        else:
            assert data == (bytes(range(256)) * 64)[: len(data)]


def test_listings_of_more_than_fits_fill_only_what_there_is(share: Share, fs: FuseClient) -> None:
    for i in range(500):
        (share.path / f"name{i}").touch()
    fh = fs.opendir(fs.root).fh
    for opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
        for size in (5000, 1 << 20, 0xFFFFFFFF):
            body = struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0)
            pending = send(fs, opcode, fs.root, body, room=1000)
            try:
                assert len(pending.payload()) <= 1000
            except FuseError as error:
                assert error.errno in (errno.EINVAL, errno.EIO, errno.E2BIG)


def test_xattrs_of_more_than_fits_are_an_error(make_share: MakeShare) -> None:
    share = make_share("--xattr")
    fs = share.mount()
    entry = fs.write_file(fs.root, "a", b"")
    fs.setxattr(entry.nodeid, "user.x", bytes(1000))
    for size in (65536, 0x7FFFFFFF, 0xFFFFFFFF):
        body = struct.pack("<II", size, 0) + b"user.x\0"
        pending = send(fs, Opcode.GETXATTR, entry.nodeid, body, room=100)
        with pytest.raises(FuseError):
            pending.payload()


def test_a_write_whose_size_and_data_disagree_is_an_error(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    for claimed, sent in ((100, 10), (1 << 20, 10), (0xFFFFFFFF, 10), (1, 0)):
        body = struct.pack("<QQIIQII", opened.fh, 0, claimed, 0, 0, 0, 0) + b"x" * sent
        assert outcome(send(fs, Opcode.WRITE, entry.nodeid, body)) in ("EINVAL", "EIO")
    assert fs.getattr(entry.nodeid).size == 0
    body = struct.pack("<QQIIQII", opened.fh, 0, 5, 0, 0, 0, 0) + b"x" * 100
    outcome(send(fs, Opcode.WRITE, entry.nodeid, body))
    assert fs.getattr(entry.nodeid).size in (0, 5)


def test_a_write_beyond_max_write_is_an_error_or_served(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    try:
        assert fs.write(entry.nodeid, opened.fh, bytes((1 << 20) + 4096)) <= (1 << 20) + 4096
    except FuseError as error:
        assert error.errno in (errno.EINVAL, errno.E2BIG, errno.EIO)
    assert fs.getattr(fs.root).nlink >= 2


def test_a_setxattr_whose_value_is_missing_is_an_error(make_share: MakeShare) -> None:
    share = make_share("--xattr")
    fs = share.mount()
    entry = fs.write_file(fs.root, "a", b"")
    for size in (10, 65536, 0xFFFFFFFF):
        body = struct.pack("<IIII", size, 0, 0, 0) + b"user.x\0" + b"v"
        assert outcome(send(fs, Opcode.SETXATTR, entry.nodeid, body)) in (
            "EINVAL",
            "EIO",
            "E2BIG",
            "ERANGE",
            "ENOSPC",
        )
    assert fs.listxattr(entry.nodeid) == b""


def test_batch_forget_with_more_items_claimed_than_sent_is_harmless(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"x")
    for count in (2, 1000, 0xFFFFFFFF):
        args = struct.pack("<II", count, 0) + struct.pack("<QQ", 0xDEAD, 1)
        fs.call(op.raw(Opcode.BATCH_FORGET, 0, args, 0, has_reply=False))
    fs.call(op.raw(Opcode.BATCH_FORGET, 0, b"\1", 0, has_reply=False))
    fs.call(op.raw(Opcode.FORGET, entry.nodeid, b"\1\0", 0, has_reply=False))
    fs.call(op.raw(Opcode.INTERRUPT, 0, b"", 0, has_reply=False))
    assert fs.getattr(entry.nodeid).size == 1


def test_a_forget_with_room_for_a_reply_gets_none_or_only_a_header(share: Share, fs: FuseClient) -> None:
    nodeid = fs.write_file(fs.root, "a", b"x").nodeid
    unique = fs.session.unique()
    header = abi.IN_HEADER.pack(48, Opcode.FORGET, unique, nodeid, 0, 0, 1, 0, 0)
    call = op.forget(nodeid)
    pending = fs.session.submit_raw(call, unique, [header, call.args], [100], fs.vmm.hiprio)
    assert awaited(lambda: pending.done)
    assert pending.used is not None
    assert pending.used.length_bytes in (0, 16)
    with refused(errno.ESTALE):
        fs.getattr(nodeid)


def test_ordinary_requests_on_the_hiprio_queue_are_answered_or_refused(share: Share, fs: FuseClient) -> None:
    pending = fs.session.submit(op.getattr_(fs.root), queue=fs.vmm.hiprio)
    try:
        assert pending.wait().attr.nlink >= 2
    except FuseError as error:
        assert error.errno in (errno.EINVAL, errno.EIO, errno.ENOSYS, errno.EPERM)
    fs.forget(0xDEAD)


def test_a_forget_on_a_request_queue_is_obeyed(share: Share, fs: FuseClient) -> None:
    nodeid = fs.write_file(fs.root, "a", b"x").nodeid
    fs.session.submit(op.forget(nodeid), queue=fs.vmm.request_queue()).wait()
    with refused(errno.ESTALE):
        fs.getattr(nodeid)


def test_extensions_that_lie_are_refused_or_ignored(share: Share, fs: FuseClient) -> None:
    assert fs.session.flags & InitFlag.CREATE_SUPP_GROUP
    body = struct.pack("<II", 0o755, 0) + b"made\0"
    extensions = [
        struct.pack("<II", 0xFFFFFFFF, abi.EXT_GROUPS) + bytes(8),
        struct.pack("<II", 0, abi.EXT_GROUPS) + bytes(8),
        struct.pack("<III", 16, abi.EXT_GROUPS, 0xFFFFFFFF) + bytes(4),
        struct.pack("<III", 16, abi.EXT_GROUPS, 2) + struct.pack("<I", 7),
        struct.pack("<II", 16, 0xFFFF) + bytes(8),
        struct.pack("<II", 16, 5) + struct.pack("<II", 0xFFFFFFF0, 0),
        bytes(16),
    ]
    for extension in extensions:
        for units in (len(extension) // 8, 0xFFFF, 1):
            unique = fs.session.unique()
            size = abi.IN_HEADER.size + len(body) + len(extension)
            header = abi.IN_HEADER.pack(size, Opcode.MKDIR, unique, fs.root, 0, 0, 1, units, 0)
            call = op.raw(Opcode.MKDIR, fs.root)
            pending = fs.session.submit_raw(
                call, unique, [header, body + extension], [16, 256], fs.vmm.request_queue()
            )
            what = outcome(pending)
            assert what in ("ok", "EINVAL", "EIO", "EEXIST", "EPERM", "EOPNOTSUPP"), (extension, units)
            if what == "ok":
                (share.path / "made").rmdir()
    assert fs.getattr(fs.root).nlink >= 2


def test_an_id_of_minus_one_is_not_taken_for_leave_it(share: Share, fs: FuseClient, needs_root: None) -> None:
    """(uid_t)-1 means "do not change" to the host's system calls."""
    entry = fs.write_file(fs.root, "a", b"")
    body = bytearray(abi.SETATTR_IN.size)
    struct.pack_into("<I", body, 0, abi.SetattrValid.UID)
    struct.pack_into("<I", body, 76, 0xFFFFFFFF)
    what = outcome(send(fs, Opcode.SETATTR, entry.nodeid, bytes(body)))
    assert what in ("EINVAL", "EPERM", "ok")
    assert fs.getattr(entry.nodeid).uid in (0, 0xFFFFFFFF)
    unique = fs.session.unique()
    body_mkdir = struct.pack("<II", 0o755, 0) + b"made\0"
    header = abi.IN_HEADER.pack(
        40 + len(body_mkdir), Opcode.MKDIR, unique, fs.root, 0xFFFFFFFF, 0xFFFFFFFF, 1, 0, 0
    )
    pending = fs.session.submit_raw(
        op.raw(Opcode.MKDIR), unique, [header, body_mkdir], [16, 256], fs.vmm.request_queue()
    )
    assert outcome(pending) != "ok", "made by the server's own user instead"


def test_a_flood_of_refused_requests_is_not_a_flood_of_log_lines(share: Share, fs: FuseClient) -> None:
    before = len(share.log())
    for _ in range(2000):
        with pytest.raises((FuseError, ProtocolError)):
            fs.call(op.raw(60_000, args=bytes(10)))
    assert len(share.log()) - before < 10_000
