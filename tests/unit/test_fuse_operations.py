# SPDX-License-Identifier: Apache-2.0
"""The FUSE operations that Python decides, on a tree in memory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from vhostfs.fuse import operations
from vhostfs.fuse.abi import Opcode
from vhostfs.fuse.fsnotify import NO_NOTIFICATION_QUEUE, Delivery, EventAbilities, FsnotifyFlag
from vhostfs.fuse.init import SessionOptions
from vhostfs.fuse.operations import EVENTS_OFF, NOT_ASKED, NOT_MOUNTED, AgreedSession, Operations
from vhostfs.record import replace


@dataclass(frozen=True)
class FakeRequest:
    opcode: int
    args: bytes = b""
    nodeid: int = 1
    reply_room_bytes: int = 4096


class FakeTree:
    """Sessions as a list; one open file, fh 5."""

    def __init__(self, file: Path | None = None) -> None:
        self.sessions: list[tuple[int, int] | None] = []
        self.grants: list[tuple[int, int, int, int]] = []
        self._file = file

    def start_session(self, init_flags: int, max_write_bytes: int) -> None:
        self.sessions.append((init_flags, max_write_bytes))

    def end_session(self) -> None:
        self.sessions.append(None)

    def grant_events(self, flags: int, mask: int, element_bytes: int, max_parked: int) -> None:
        self.grants.append((flags, mask, element_bytes, max_parked))

    def open_file(self, nodeid: int, fh: int) -> int:
        if fh != 5 or self._file is None:
            raise OSError(errno.EBADF, "no such file")
        return os.open(self._file, os.O_RDONLY)


def run(tree: FakeTree, opcode: int, args: bytes = b"", *, readonly: bool = False) -> bytes:
    table = Operations(tree, SessionOptions(), readonly=readonly).table
    return table[opcode](FakeRequest(opcode, args))


def init_args(major: int = 7, minor: int = 38, flags: int = 0) -> bytes:
    return struct.pack("<IIIIII40x", major, minor, 131072, flags, 0, 0)


VIRTQUEUE = int(FsnotifyFlag.VIRTQUEUE | FsnotifyFlag.RENAME)
FSNOTIFY_ARGS = struct.pack("<IIQQII", 1, 0, VIRTQUEUE, 0xFFF, 320, 0)


class EventServer:
    """Operations with events, for a driver that acked `flags` of what there is."""

    def __init__(self, flags: int = VIRTQUEUE) -> None:
        self.tree = FakeTree()
        self.mounted: list[AgreedSession] = []
        self.flags = flags
        abilities = EventAbilities(flags=0, mask=0x1FFF, max_watches=10)
        self.operations = Operations(
            self.tree,
            SessionOptions(),
            readonly=False,
            event_abilities=lambda: replace(abilities, flags=self.flags),
            when_mounted=lambda session: self.mounted.append(session),
        )

    def call(self, opcode: int, args: bytes = b"") -> bytes:
        return self.operations.table[opcode](FakeRequest(opcode, args))


def ioctl_args(cmd: int, *, data: bytes = b"", out_size: int = 0, fh: int = 5) -> bytes:
    return struct.pack("<QIIQII", fh, 0, cmd, 0, len(data), out_size) + data


def failure(tree: FakeTree, opcode: int, args: bytes, *, readonly: bool = False) -> int | None:
    with pytest.raises(OSError) as caught:
        run(tree, opcode, args, readonly=readonly)
    return caught.value.errno


def test_init_begins_a_session_with_the_flags_granted() -> None:
    tree = FakeTree()
    reply = run(tree, Opcode.INIT, init_args(flags=1 | 1 << 22))
    assert len(reply) == 64
    assert tree.sessions == [(1 | 1 << 22, 1 << 20)]


def test_init_with_a_newer_major_begins_nothing() -> None:
    tree = FakeTree()
    assert run(tree, Opcode.INIT, init_args(major=8))[:4] == b"\x07\0\0\0"
    assert tree.sessions == []


@pytest.mark.parametrize(
    ("args", "number"), [(b"", errno.EINVAL), (bytes(15), errno.EINVAL), (init_args(minor=26), errno.EPROTO)]
)
def test_an_init_that_cannot_be_served_begins_nothing(args: bytes, number: int) -> None:
    tree = FakeTree()
    assert failure(tree, Opcode.INIT, args) == number
    assert tree.sessions == []


def test_destroy_ends_the_session() -> None:
    tree = FakeTree()
    assert run(tree, Opcode.DESTROY) == b""
    assert tree.sessions == [None]


@pytest.mark.parametrize("cmd", [0x5401, 0x40049409, 0x80087601, 0, 0xFFFFFFFF])
def test_other_ioctls_are_for_other_devices(cmd: int, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert failure(FakeTree(tmp_path / "f"), Opcode.IOCTL, ioctl_args(cmd, out_size=64)) == errno.ENOTTY


@pytest.mark.parametrize(
    "args",
    [
        b"",
        bytes(31),
        ioctl_args(operations.FS_IOC_GETFLAGS, out_size=3),
        ioctl_args(operations.FS_IOC_FSGETXATTR, out_size=27),
        ioctl_args(operations.FS_IOC_SETFLAGS, data=b"abc"),
        ioctl_args(operations.FS_IOC_SETFLAGS, data=b"abcd")[:-1],
    ],
)
def test_an_ioctl_with_wrong_sizes_is_refused(args: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert failure(FakeTree(tmp_path / "f"), Opcode.IOCTL, args) == errno.EINVAL


@pytest.mark.parametrize("cmd", [operations.FS_IOC_SETFLAGS, operations.FS_IOC_FSSETXATTR])
def test_a_read_only_share_keeps_its_attributes(cmd: int, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    args = ioctl_args(cmd, data=bytes(28))
    assert failure(FakeTree(tmp_path / "f"), Opcode.IOCTL, args, readonly=True) == errno.EROFS


def test_an_ioctl_on_a_file_that_is_not_open_is_refused() -> None:
    args = ioctl_args(operations.FS_IOC_GETFLAGS, out_size=4, fh=6)
    assert failure(FakeTree(), Opcode.IOCTL, args) == errno.EBADF


def test_attribute_flags_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    seen = []

    def ioctl(fd: int, number: int, buffer: bytearray) -> int:
        seen.append((number, bytes(buffer)))
        buffer[:4] = b"\x10\0\x08\0"
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    tree = FakeTree(tmp_path / "f")
    # The number declares a long, of which the kernel fills an int.
    assert run(tree, Opcode.IOCTL, ioctl_args(operations.FS_IOC_GETFLAGS, out_size=8))[
        16:
    ] == b"\x10\0\x08\0" + bytes(4)
    assert (
        run(tree, Opcode.IOCTL, ioctl_args(operations.FS_IOC32_GETFLAGS, out_size=4))[16:] == b"\x10\0\x08\0"
    )
    assert run(
        tree, Opcode.IOCTL, ioctl_args(operations.FS_IOC_SETFLAGS, data=b"\x20\0\0\0" + bytes(4))
    ) == bytes(16)
    assert seen == [
        (operations.FS_IOC_GETFLAGS, bytes(4)),
        (operations.FS_IOC_GETFLAGS, bytes(4)),
        (operations.FS_IOC_SETFLAGS, b"\x20\0\0\0"),
    ]


def test_a_driver_that_asks_for_events_is_granted_them_once_in_a_session() -> None:
    server = EventServer()
    server.call(Opcode.INIT, init_args())
    reply = server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    assert struct.unpack_from("<IIQQII", reply) == (1, 0, VIRTQUEUE, 0x1FFF, 320, 10)
    assert server.tree.grants == [(VIRTQUEUE, 0xFFF, 320, 0)]
    with pytest.raises(OSError) as again:
        server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    assert again.value.errno == errno.EALREADY
    assert len(server.tree.grants) == 1


@pytest.mark.parametrize("ending", ["a new INIT", "DESTROY", "its connection"])
def test_what_was_agreed_about_events_ends_with_the_session(ending: str) -> None:
    server = EventServer()
    server.call(Opcode.INIT, init_args())
    server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    match ending:
        case "a new INIT":
            server.call(Opcode.INIT, init_args())
        case "DESTROY":
            server.call(Opcode.DESTROY)
        case _:
            server.operations.end_session()
    assert server.operations.event_answer is None
    server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    assert len(server.tree.grants) == 2


def test_without_a_way_for_events_to_travel_the_driver_is_answered_and_none_are_made() -> None:
    server = EventServer(flags=int(FsnotifyFlag.RENAME))
    server.call(Opcode.INIT, init_args())
    reply = server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    assert struct.unpack_from("<IIQ", reply) == (1, 0, int(FsnotifyFlag.RENAME))
    assert server.tree.grants == []


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (b"", errno.EINVAL),
        (FSNOTIFY_ARGS[:31], errno.EINVAL),
        (struct.pack("<II", 2, 0), errno.EPROTO),
        (struct.pack("<IIQQII", 1, 0, VIRTQUEUE, 0xFFF, 63, 0), errno.EINVAL),
    ],
)
def test_an_offer_about_events_that_is_refused_leaves_the_next_one_possible(args: bytes, error: int) -> None:
    server = EventServer()
    server.call(Opcode.INIT, init_args())
    with pytest.raises(OSError) as caught:
        server.call(Opcode.FSNOTIFY_INIT, args)
    assert caught.value.errno == error
    assert server.tree.grants == []
    assert server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)


def test_an_answer_for_which_there_is_no_room_grants_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = EventServer()
    server.call(Opcode.INIT, init_args())
    with pytest.raises(OSError) as caught:
        server.operations.table[Opcode.FSNOTIFY_INIT](
            FakeRequest(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS, reply_room_bytes=39)
        )
    assert caught.value.errno == errno.EINVAL
    assert server.tree.grants == []
    assert "room for 39 bytes of the answer, which has 40" in caplog.text


def test_a_driver_that_never_asked_for_events_is_named_when_it_leaves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = EventServer()
    with caplog.at_level("INFO"):
        server.call(Opcode.INIT, init_args())
        server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
        server.call(Opcode.DESTROY)
        assert "never asked" not in caplog.text
        server.call(Opcode.INIT, init_args())
        server.call(Opcode.DESTROY)
        assert caplog.text.count("its driver never asked for them") == 1


def test_a_guest_that_goes_on_offering_nonsense_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING")
    server = EventServer()
    server.call(Opcode.INIT, init_args())
    for args in (b"", struct.pack("<II", 2, 0), b"") * 10:
        with pytest.raises(OSError):
            server.call(Opcode.FSNOTIFY_INIT, args)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_with_events_off_the_driver_carries_on_without() -> None:
    assert failure(FakeTree(), Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS) == errno.ENOSYS


def test_a_driver_that_says_nothing_of_events_is_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    for flags, text in (
        (VIRTQUEUE, NOT_ASKED),
        (0, f"{NO_NOTIFICATION_QUEUE}; this server parks no requests; {NOT_ASKED}"),
    ):
        caplog.clear()
        server = EventServer(flags=flags)
        server.call(Opcode.INIT, init_args())
        assert "events for the guest" not in caplog.text
        (session,) = server.mounted
        server.operations.say_if_silent(session)
        assert f"events for the guest: none: {text}" in caplog.text


def test_one_line_is_enough_for_a_session(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = EventServer()
    server.call(Opcode.INIT, init_args())
    server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    server.operations.say_if_silent(server.mounted[0])
    server.call(Opcode.INIT, init_args())
    server.operations.say_if_silent(server.mounted[0])
    assert caplog.text.count("events for the guest: by") == 1
    assert caplog.text.count("events for the guest: none") == 0


def test_what_is_delivered_and_what_a_better_way_lacks_can_be_asked_for_at_any_time() -> None:
    off = Operations(FakeTree(), SessionOptions(), readonly=False)
    assert off.delivery == (Delivery.NONE, EVENTS_OFF)
    server = EventServer()
    operations = server.operations
    assert operations.delivery == (Delivery.NONE, NOT_MOUNTED)
    server.call(Opcode.INIT, init_args())
    assert operations.delivery == (Delivery.NONE, NOT_ASKED)
    with pytest.raises(OSError):
        server.call(Opcode.FSNOTIFY_INIT, struct.pack("<II", 2, 0))
    assert operations.delivery == (
        Delivery.NONE,
        "its driver's offer is refused: version 2.0, expected 1.x (EPROTO)",
    )
    server.call(Opcode.FSNOTIFY_INIT, FSNOTIFY_ARGS)
    assert operations.delivery == (Delivery.VIRTQUEUE, "")
    server.call(Opcode.DESTROY)
    assert operations.delivery == (Delivery.NONE, NOT_MOUNTED)
