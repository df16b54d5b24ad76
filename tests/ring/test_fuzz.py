# SPDX-License-Identifier: Apache-2.0
"""Random requests, rings and messages for a bounded number of rounds; the seed is part of the test's name.

Must not know what the right errno is, only what an answer may look like. VHOSTFS_FUZZ_SEED repeats a run,
VHOSTFS_FUZZ_ROUNDS lengthens it; without a seed there are fixed ones and a fresh one.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.events import NOTIFYING
from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import (
    ROOT,
    BackendGoneError,
    Connection,
    Feature,
    FuseClient,
    FuseError,
    Machine,
    MessageRefusedError,
    NotificationQueue,
    Opcode,
    ProtocolError,
    RingBrokenError,
    Vmm,
    fsnotify,
)
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.ring import F_INDIRECT, F_NEXT, F_WRITE
from vhostfs.frontend.session import Pending
from vhostfs.frontend.vhost_user import HEADER, VERSION

pytestmark = pytest.mark.usefixtures("ours")

GROWTH_LIMIT_BYTES = 96 << 20
FSNOTIFY_OPCODES = [fsnotify.OPCODE_INIT, fsnotify.OPCODE_WATCH, fsnotify.OPCODE_PARK]
ROUNDS = int(os.environ.get("VHOSTFS_FUZZ_ROUNDS", "1200"))


def seeds() -> list[int]:
    given = os.environ.get("VHOSTFS_FUZZ_SEED")
    return [int(given)] if given else [1, 2, int(time.time())]


@pytest.fixture(params=seeds(), ids=lambda seed: f"seed={seed}")
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


@pytest.fixture
def walled(make_share: MakeShare, tmp_path: Path) -> Share:
    (tmp_path / "export").mkdir()
    (tmp_path / "secret").write_text("secret")
    return make_share("--xattr", "--tag=fuzz", directory=tmp_path / "export")


class RequestMaker:
    """Requests that are sometimes nearly right."""

    def __init__(self, rng: random.Random, fs: FuseClient) -> None:
        self.rng = rng
        self.fs = fs
        self.nodes = [ROOT, ROOT, ROOT]
        self.handles = [0]
        self.names = [b"a", b"b", b"dir", b"..", b".", b"", b"a/b", b"../secret", b"x" * 255, b"x" * 300]
        for name in ("a", "b"):
            entry, opened = fs.create(ROOT, name)
            self.nodes.append(entry.nodeid)
            self.handles.append(opened.fh)
        directory = fs.mkdir(ROOT, "dir")
        self.nodes.append(directory.nodeid)
        self.handles.append(fs.opendir(directory.nodeid).fh)
        self.nodes.append(fs.symlink(ROOT, "link", "../secret").nodeid)

    def number(self, opcode: int) -> int:
        small = [0, 1, 2, 7, 8, 64, 255, 4095, 4096, 65536]
        large = [(1 << 63) - 1, 1 << 63, (1 << 64) - 1]
        # fallocate must not fill the host's disk: sizes are small or impossible.
        middle = [] if opcode == Opcode.FALLOCATE else [1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32]
        known = self.nodes + self.handles
        return self.rng.choice(
            (self.rng.choice(small), self.rng.choice(large + middle), self.rng.choice(known))
        )

    def arguments(self, opcode: int) -> bytes:
        parts: list[bytes] = []
        for _ in range(self.rng.randrange(9)):
            kind = self.rng.random()
            if kind < 0.5:
                parts.append(struct.pack("<Q", self.number(opcode)))
            elif kind < 0.85:
                parts.append(struct.pack("<I", self.number(opcode) & 0xFFFFFFFF))
            else:
                parts.append(self.rng.choice(self.names) + self.rng.choice((b"\0", b"\0", b"")))
        if opcode != Opcode.FALLOCATE and self.rng.random() < 0.2:
            parts.append(self.rng.randbytes(self.rng.choice((1, 8, 100, 5000))))
        if self.rng.random() < 0.5:
            parts.append(self.rng.choice(self.names) + b"\0")
        return b"".join(parts)

    def nearly_sound(self) -> tuple[int, int, bytes]:
        """A request as a guest could send it, with a few bytes changed now and then."""
        rng = self.rng
        name, other = (rng.choice(("a", "b", "dir", "c", "link", "dir2")) for _ in range(2))
        which = rng.randrange(1, len(self.nodes))
        node, fh = self.nodes[which], self.handles[min(max(0, which - 2), len(self.handles) - 1)]
        offset, size = rng.choice((0, 1, 4096, 1 << 20, 1 << 40)), rng.choice((0, 1, 100, 4096))
        lock = abi.FileLock(rng.randrange(100), rng.randrange(200), rng.randrange(3), 5)
        parent = rng.choice((ROOT, ROOT, node))
        sound: op.Call[Any] = rng.choice(
            (
                op.lookup(parent, name),
                op.create(parent, name, rng.choice((os.O_RDWR, os.O_RDWR | os.O_TRUNC))),
                op.mkdir(parent, name),
                op.mknod(parent, name, rng.choice((0o100644, 0o010600, 0o140600))),
                op.symlink(parent, name, "../secret"),
                op.link(node, parent, name),
                op.unlink(parent, name),
                op.rmdir(parent, name),
                op.rename(parent, name, ROOT, other),
                op.rename2(parent, name, ROOT, other, rng.randrange(8)),
                op.open_(node, rng.choice((os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND))),
                op.opendir(node),
                op.read(node, fh, size, offset),
                op.write(node, fh, b"", offset),
                op.readdir(node, fh, rng.choice((0, 1, 5, offset)), size),
                op.readdirplus(node, fh, 0, size),
                op.setattr_(node, fh=rng.choice((None, fh)), size=offset, mode=rng.randrange(0o10000)),
                op.getattr_(node, rng.choice((None, fh))),
                op.statx(node),
                op.setlk(node, fh, rng.randrange(3), lock, flock=rng.random() < 0.3),
                op.getlk(node, fh, rng.randrange(3), lock),
                op.setlkw(node, fh, rng.randrange(3), lock),
                op.flush(node, fh, rng.randrange(3)),
                op.setxattr(node, "user.x", b"value"),
                op.getxattr(node, "user.x", size),
                op.listxattr(node, size),
                op.removexattr(node, "user.x"),
                op.copy_file_range(node, fh, 0, (node, fh), offset, size),
                op.lseek(node, fh, offset, rng.randrange(6)),
                op.tmpfile(parent),
                op.forget(node, 1),
                fsnotify.init(rng.choice((1, 0b11001, rng.getrandbits(64)))),
                fsnotify.watch(node, rng.choice((0, 0xFFF, 0x08000FFF, rng.getrandbits(64))), node >> 32),
                op.release(node, fh) if rng.random() < 0.1 else op.fsync(node, fh),
            )
        )
        body = bytearray(sound.args)
        for _ in range(rng.choice((0, 0, 1, 2))):
            if body:
                body[rng.randrange(len(body))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        data = rng.randbytes(size) if sound.opcode == Opcode.WRITE else b""
        if data:
            struct.pack_into("<I", body, 16, rng.choice((size, size, size + 1)))
        return sound.opcode, sound.nodeid, bytes(body) + data

    def submit(self) -> Pending[bytes]:
        rng = self.rng
        if rng.random() < 0.6:
            opcode, nodeid, body = self.nearly_sound()
        else:
            known = [int(opcode) for opcode in Opcode if opcode != Opcode.DESTROY] + FSNOTIFY_OPCODES
            opcode = rng.choice(known) if rng.random() < 0.95 else rng.randrange(1 << 32)
            nodeid = rng.choice(self.nodes) if rng.random() < 0.9 else rng.getrandbits(64)
            body = self.arguments(opcode)
        size = abi.IN_HEADER.size + len(body)
        if rng.random() < 0.05:
            size = rng.choice((0, 39, size - 1, size + 1, 1 << 31, 0xFFFFFFFF)) & 0xFFFFFFFF
        units = rng.choice((0,) * 20 + (1, 2, 0xFFFF))
        ids = [rng.choice((0, 0, 1000, 0xFFFFFFFF)) for _ in range(3)]
        unique = self.fs.session.unique()
        header = abi.IN_HEADER.pack(size, opcode, unique, nodeid, *ids, units, rng.choice((0, 0xFFFF)))
        data = header + body
        cuts = sorted({rng.randrange(1, len(data)) for _ in range(rng.choice((0, 0, 1, 1, 3)))})
        readable = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        writable = [rng.choice((16, 16, 16, 8, 24, 100)), rng.choice((0, 8, 128, 4096, 70_000))]
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT) and rng.random() < 0.8:
            writable = []
        call = op.raw(opcode, nodeid, has_reply=bool(writable))
        queue = self.fs.vmm.hiprio if rng.random() < 0.1 else self.fs.vmm.request_queue()
        return self.fs.session.submit_raw(call, unique, readable, writable, queue)


def test_random_requests_are_answered_or_end_the_ring(walled: Share, rng: random.Random) -> None:
    walled.mount().close()
    resident = walled.server.resident_bytes()
    done = 0
    while done < ROUNDS:
        walled.unmount()
        fs = walled.mount(NOTIFYING)
        notifications = NotificationQueue(fs.vmm)
        fs.fsnotify_init()
        fs.watch(ROOT, 0x08000FFF)
        for path in walled.path.iterdir():
            if not path.is_symlink() and path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        maker = RequestMaker(rng, fs)
        for turn in range(200):
            done += 1
            pending = maker.submit()
            if turn % 20 == 0:
                (walled.path / f"host{turn}").touch()
            while notifications.poll() is not None:
                pass  # each is checked for rules that it breaks
            try:
                if pending.call.opcode == Opcode.SETLKW:
                    _end_of_lock(fs, pending)
                pending.payload()
            except (FuseError, ProtocolError) as error:
                _acceptable(error)
            except (RingBrokenError, BackendGoneError):
                break
        assert walled.server.running
    walled.unmount()
    assert (walled.path.parent / "secret").read_text() == "secret"
    assert {path.name for path in walled.path.parent.iterdir()} == {"export", "secret"}
    assert walled.server.resident_bytes() - resident < GROWTH_LIMIT_BYTES
    assert walled.server.running


def _end_of_lock(fs: FuseClient, pending: Pending[bytes]) -> None:
    """A lock may be waited for: interrupt it until it ends."""

    def over() -> bool:
        if pending.done or pending.queue.error_signalled(0):
            return True
        fs.interrupt(pending)
        return pending.done

    assert awaited(over)


def _acceptable(error: Exception) -> None:
    """An errno is; so is a chain given back empty because nothing could be said in its room."""
    if isinstance(error, ProtocolError) and "shorter than its header" not in str(error):
        raise error


def test_random_rings_are_survived(walled: Share, rng: random.Random) -> None:
    for _ in range(max(20, ROUNDS // 40)):
        features = Feature.VERSION_1
        features |= Feature.EVENT_IDX if rng.random() < 0.5 else Feature(0)
        features |= Feature.INDIRECT_DESC if rng.random() < 0.5 else Feature(0)
        walled.unmount()
        fs = walled.mount(Machine(features=features | Feature.FS_NOTIFICATION, queue_size=16))
        fs.fsnotify_init()
        fs.watch(ROOT, 0x08000FFF)
        queue = rng.choice((fs.vmm.request_queue(), fs.vmm.hiprio, fs.vmm.notification_queue))
        buffers = [fs.vmm.memory.allocate(4096) for _ in range(4)]
        for buffer in buffers:
            content = bytearray(4096)
            for i in range(256):
                flags = rng.choice((0, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, 0xFFFF))
                addr = rng.choice(buffers).guest_addr + rng.randrange(64)
                struct.pack_into("<QIHH", content, 16 * i, addr, rng.randrange(200), flags, rng.randrange(20))
            buffer.view[:] = bytes(content)
        for i in range(16):
            flags = rng.choice(
                (0, F_NEXT, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, rng.randrange(65536))
            )
            addr = rng.choice((rng.choice(buffers).guest_addr, rng.getrandbits(64), 0, queue.used.guest_addr))
            size = rng.choice((0, 1, 16, 40, 56, 4096, 0xFFFFFFFF, rng.randrange(1 << 16)))
            queue.put_descriptor(i, addr, size, flags, rng.choice((rng.randrange(16), rng.randrange(65536))))
        for i in range(16):
            queue.put_available(i, rng.choice((rng.randrange(16), rng.randrange(65536))))
        ahead = rng.choice((1, 2, 5, 16, 17, 0x8000))
        queue.set_available_index(queue.avail_index + ahead)
        queue.kick()
        for i in range(3):
            (walled.path / f"host{i}").touch()
            (walled.path / f"host{i}").unlink()
        awaited(
            lambda queue=queue, fs=fs: (
                queue.error_signalled(0)  # type: ignore[misc]
                or queue.device_used_index() == queue.avail_index
                or fs.vmm.connection.closed_by_backend(0)
            ),
            0.3,
        )
        assert walled.server.running
    assert walled.serves()
    assert (walled.path.parent / "secret").read_text() == "secret"


def test_random_vhost_user_messages_are_survived(walled: Share, rng: random.Random) -> None:
    for _ in range(max(20, ROUNDS // 40)):
        with Connection.open(walled.server.socket_path) as connection, suppress(BackendGoneError):
            for _ in range(15):
                size = rng.choice((0, 4, 8, 8, 8, 12, 16, 40, 48, 72, 300))
                payload = rng.randbytes(size) if rng.random() < 0.5 else bytes(size)
                fds = [os.memfd_create("fuzz", os.MFD_CLOEXEC) for _ in range(rng.choice((0, 0, 1, 3)))]
                try:
                    flags = VERSION | rng.choice((0, 0, 8))
                    connection.send_raw(HEADER.pack(rng.randrange(48), flags, size) + payload, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
    assert walled.serves()


def test_random_messages_to_a_running_device_are_survived(walled: Share, rng: random.Random) -> None:
    """The same in the middle of a session: queues run while their ground is pulled away."""
    for _ in range(max(15, ROUNDS // 60)):
        vmm = Vmm.boot(walled.server.socket_path)
        try:
            for _ in range(8):
                # Not SET_PROTOCOL_FEATURES: without REPLY_ACK nothing would be acknowledged any more.
                request = rng.choice((2, 5, 8, 9, 10, 12, 13, 14, 18, 34, 37, 38, 39))
                index = rng.choice((0, 1, 2))
                payload = rng.choice(
                    (
                        struct.pack("<II", index, rng.choice((0, 1, 64, 128, 32768))),
                        struct.pack("<Q", index | rng.choice((0, 0x100))),
                        struct.pack("<Q", rng.getrandbits(34)),
                        struct.pack("<IIQQQQ", index, 0, *(rng.getrandbits(47) & ~0xFFF for _ in range(4))),
                        struct.pack("<QQQQQ", 0, 0, 64 << 20, 0x7F10_0000_0000, 0),
                        struct.pack("<IIQQQQ", 1, 0, 0, 1 << 20, 0x7F10_0000_0000, 0),
                    )
                )
                vmm.request_queue().kick()
                fds = [vmm.memory.regions[0].fd] if rng.random() < 0.5 else []
                with suppress(MessageRefusedError):
                    vmm.connection.acknowledged(request, payload, fds)
                vmm.hiprio.kick()
        except (BackendGoneError, ProtocolError):
            pass
        finally:
            vmm.close()
        assert walled.server.running
    assert walled.serves()
