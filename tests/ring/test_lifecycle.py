# SPDX-License-Identifier: Apache-2.0
"""A device's life: start, stop, resume, reset, hot plug of memory, reconnection, and the server's end.

Must not test operations. Specification: vhost-user ("Starting and stopping rings", "Reset"), design of serve.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share
from tests.server import REPOSITORY, ServerProcess, awaited
from vhostfs.frontend import (
    ROOT,
    BackendGoneError,
    Feature,
    FuseClient,
    Machine,
    Message,
    ProtocolFeature,
    Session,
    Status,
    Vmm,
)
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op
from vhostfs.frontend.session import Pending

MIB = 1 << 20


def test_a_front_end_may_come_and_go(share: Share, ours: None) -> None:
    for i in range(20):
        fs = share.mount()
        fs.write_file(fs.root, str(i), b"x")
        share.unmount()
    assert len(list(share.path.iterdir())) == 20


def test_queues_that_nobody_asks_take_no_processor_time(share: Share, ours: None) -> None:
    fs = share.mount()
    for _ in range(500):  # fast enough to be waited for awake
        fs.session.call(op.getattr_(fs.root))
    before_ns = _queues_cpu_ns(share)
    time.sleep(0.2)
    assert _queues_cpu_ns(share) - before_ns < 5_000_000


def _queues_cpu_ns(share: Share) -> int:
    queues = share.server.tasks("vhostfs-vq")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in queues)


def test_once_ends_the_server_with_the_connection(make_share: MakeShare, ours: None) -> None:
    share = make_share("--once", private=True)
    share.may_end = True
    fs = share.mount()
    fs.write_file(ROOT, "a", b"x")
    share.unmount()
    assert share.server.wait() == 0


def test_sigterm_ends_the_server_at_once(make_share: MakeShare, ours: None) -> None:
    share = make_share(private=True)
    share.may_end = True
    fs = share.mount()
    entry, opened = fs.create(ROOT, "a")
    fs.write(entry.nodeid, opened.fh, b"x")
    assert share.server.terminate() in (0, -signal.SIGTERM)
    assert "Traceback" not in share.log()
    assert not share.server.socket_path.exists()


def test_sigterm_with_no_front_end_ends_the_server(make_share: MakeShare, ours: None) -> None:
    share = make_share(private=True)
    share.may_end = True
    assert share.server.terminate() in (0, -signal.SIGTERM)
    assert not share.server.socket_path.exists()


def test_sigterm_with_a_lock_wait_in_flight_ends_the_server(make_share: MakeShare, ours: None) -> None:
    share = make_share(private=True)
    share.may_end = True
    fs = share.mount()
    entry, opened = fs.create(ROOT, "a")
    lock = abi.FileLock(0, (1 << 63) - 1, 1)
    fs.setlk(entry.nodeid, opened.fh, 1, lock)
    fs.submit(op.setlkw(entry.nodeid, opened.fh, 2, lock))
    assert share.server.terminate() in (0, -signal.SIGTERM)


def test_a_listening_socket_can_be_handed_over(make_share: MakeShare, ours: None) -> None:
    """As libvirt does it: --fd instead of a path."""
    share = make_share()
    path = f"{share.server.socket_path}.fd"
    program = (
        "import os,socket,sys; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1);"
        "s.set_inheritable(True); os.execv(sys.executable, [sys.executable, '-m', 'vhostfs', 'serve',"
        "f'--fd={s.fileno()}', '--shared-dir', sys.argv[2], '--sandbox=none'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path, str(share.path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    ) as process:
        try:
            fs = FuseClient.mount(path)
            fs.write_file(ROOT, "a", b"x")
            fs.close()
        finally:
            process.terminate()
    assert (share.path / "a").read_bytes() == b"x"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@pytest.mark.parametrize("mode", ["namespace", "chroot", "none"])
def test_every_sandbox_serves(make_share: MakeShare, mode: str, needs_root: None, ours: None) -> None:
    share = make_share(f"--sandbox={mode}", private=True)
    (share.path / "secret-link").symlink_to("/etc/passwd")
    fs = share.mount()
    entry = fs.write_file(ROOT, "a", os.urandom(100_000))
    assert fs.read_file(entry.nodeid) == (share.path / "a").read_bytes()
    fs.rename(ROOT, "a", ROOT, "b")
    assert fs.statx(entry.nodeid).size == 100_000
    assert set(fs.list(ROOT)) == {b"b", b"secret-link"}
    share.unmount()
    fs = share.mount()
    assert fs.lookup(ROOT, "b").attr.size == 100_000


# ---- stop, resume, reset ----


def test_a_paused_guest_goes_on_where_it_was(share: Share) -> None:
    fs = share.mount()
    entry, opened = fs.create(fs.root, "a")
    for _ in range(30):
        fs.getattr(fs.root)
    bases = fs.vmm.stop()
    assert bases[1] == fs.vmm.request_queue().avail_index
    fs.vmm.start(bases)
    assert fs.write(entry.nodeid, opened.fh, b"after") == 5
    assert fs.read(entry.nodeid, opened.fh, 10) == b"after"


def test_what_was_made_available_while_stopped_is_served_after(share: Share, ours: None) -> None:
    fs = share.mount()
    fs.getattr(fs.root)
    bases = fs.vmm.stop()
    pending = [fs.submit(op.getattr_(fs.root)) for _ in range(5)]
    fs.vmm.start(bases)
    for one in pending:
        one.wait()


def test_indices_wrap_around(share: Share) -> None:
    """16-bit indices: a guest that goes on shortly before they begin again."""
    fs = share.mount(Machine(queue_size=4))
    fs.vmm.stop()
    queue = fs.vmm.request_queue()
    near_the_end = 65_500
    queue.reset()
    queue.resume_at(near_the_end)
    fs.vmm.hiprio.reset()
    fs.vmm.start({0: 0, fs.vmm.first_request_queue: near_the_end})
    for _ in range(200):
        assert fs.getattr(fs.root).nlink >= 2


def test_a_disabled_queue_is_not_served_until_enabled(share: Share, ours: None) -> None:
    fs = share.mount()
    index = fs.vmm.first_request_queue
    fs.vmm.enable_queue(index, on=False)
    pending = fs.submit(op.getattr_(fs.root))
    assert not awaited(lambda: pending.done, 0.2)
    fs.vmm.enable_queue(index)
    pending.wait()


def test_a_kick_before_enable_is_not_lost(share: Share, ours: None) -> None:
    """QEMU's guest may kick before SET_VRING_ENABLE arrives."""
    with Vmm.connect(share.server.socket_path) as vmm:
        vmm.set_features(vmm.offered & (vmm.machine.features | Feature.PROTOCOL_FEATURES))
        vmm.set_memory()
        for index in (0, 1):
            vmm.queues[index] = vmm.make_queue(index)
            vmm.set_queue(index, vmm.queues[index])
        session = Session(vmm)
        pending = session.submit(op.init())
        for index in (0, 1):
            vmm.enable_queue(index)
        assert pending.wait().major == 7


def test_without_protocol_features_queues_start_by_the_kick(share: Share, ours: None) -> None:
    """The oldest way: no SET_VRING_ENABLE at all."""
    machine = Machine(protocol_features=ProtocolFeature(0))
    with Vmm.connect(share.server.socket_path, machine) as vmm:
        vmm.set_features(vmm.offered & machine.features & ~Feature.PROTOCOL_FEATURES)
        vmm.set_memory()
        for index in (0, 1):
            vmm.queues[index] = vmm.make_queue(index)
            vmm.set_queue(index, vmm.queues[index])
        session = Session(vmm)
        pending = session.submit(op.init())
        assert pending.wait().major == 7


def test_a_reboot_by_reset_device_starts_afresh(share: Share, ours: None) -> None:
    fs = share.mount()
    fs.write_file(fs.root, "a", b"x")
    for _ in range(3):
        fs.vmm.reset()
        fs.vmm.start()
        fs.init()
        fs.root = ROOT
        assert fs.walk(f"{share.relative}/a").attr.size == 1


def test_another_device_on_the_same_connection_starts_afresh(share: Share, ours: None) -> None:
    """As QEMU has it after device_del and device_add with the chardev that is there."""
    fs = share.mount()
    fs.write_file(fs.root, "a", b"x")
    for _ in range(3):
        fs.vmm.negotiate_again()
        fs.vmm.start()
        fs.init()
        fs.root = ROOT
        assert fs.walk(f"{share.relative}/a").attr.size == 1
    assert share.log().count("the front end begins anew on its connection") == 3


def test_the_status_is_kept_and_cleared(share: Share, ours: None) -> None:
    fs = share.mount()
    if not fs.vmm.protocol & ProtocolFeature.STATUS:
        pytest.fail("STATUS is not offered")
    assert fs.vmm.status() & Status.DRIVER_OK
    fs.vmm.reset()
    assert fs.vmm.status() == Status(0)


def test_reset_with_requests_in_flight_neither_hangs_nor_writes_later(share: Share, ours: None) -> None:
    fs = share.mount()
    entry, opened = fs.create(fs.root, "a")
    lock = abi.FileLock(0, (1 << 63) - 1, 1)
    fs.setlk(entry.nodeid, opened.fh, 1, lock)
    waiting = fs.submit(op.setlkw(entry.nodeid, opened.fh, 2, lock))
    fs.getattr(entry.nodeid)  # by now the one before it is under way
    busy = [fs.submit(op.write(entry.nodeid, opened.fh, bytes(MIB), i * MIB)) for i in range(4)]
    queue = fs.vmm.request_queue()
    base = fs.vmm.stop()[fs.vmm.first_request_queue]
    used = queue.device_used_index()
    in_flight: list[Pending[Any]] = [waiting, *busy]
    taken = len(in_flight) - ((queue.avail_index - base) & 0xFFFF)
    assert taken >= 1
    assert [one.done for one in in_flight] == [i < taken for i in range(len(in_flight))]
    # The memory is the guest's again: nothing may be written behind its back.
    assert not awaited(lambda: fs.vmm.request_queue().device_used_index() != used, 0.2)


def test_hanging_up_with_requests_in_flight_is_clean(share: Share, ours: None) -> None:
    for _ in range(5):
        fs = share.mount()
        entry, opened = fs.create(fs.root, "a")
        pending: list[Pending[int]] = []
        for i in range(20):
            pending.append(fs.submit(op.write(entry.nodeid, opened.fh, bytes(MIB), i * MIB)))
        share.unmount()
    assert share.serves()


# ---- memory ----


def test_memory_plugged_while_running_is_used(share: Share, ours: None) -> None:
    fs = share.mount()
    entry = fs.write_file(fs.root, "a", os.urandom(MIB))
    fs.vmm.plug_memory(1 << 40, 8 * MIB)
    for _ in range(6):
        assert fs.read_file(entry.nodeid) == (share.path / "a").read_bytes()


def test_memory_unplugged_while_running_is_no_longer_reached(share: Share, ours: None) -> None:
    fs = share.mount()
    region = fs.vmm.plug_memory(1 << 40, 8 * MIB)
    buffer = fs.vmm.memory.allocate(4096, region=1)
    fs.vmm.remove_region(region)
    queue = fs.vmm.request_queue()
    before = buffer.bytes()
    queue.put_descriptor(5, buffer.guest_addr, 56, 1, 6)
    queue.put_descriptor(6, buffer.guest_addr, 4096, 2)
    queue.put_available(queue.avail_index, 5)
    queue.set_available_index(queue.avail_index + 1)
    queue.kick()
    awaited(lambda: queue.error_signalled(0) or fs.vmm.connection.closed_by_backend(0), 2)
    assert buffer.bytes() == before
    assert share.serves()


def test_sixteen_regions_added_one_by_one_are_all_used(share: Share, ours: None) -> None:
    fs = share.mount(Machine().with_regions(16))
    content = os.urandom(2 * MIB)
    entry = fs.write_file(fs.root, "a", content)
    assert fs.read_file(entry.nodeid) == content


# ---- several at once ----


def test_two_queues_serve_at_the_same_time(share: Share, ours: None) -> None:
    fs = share.mount(replace(Machine(), request_queues=2))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        mine = fs.through(number)
        try:
            directory = mine.mkdir(mine.root, f"d{number}").nodeid
            for i in range(150):
                entry = mine.write_file(directory, str(i), str(i).encode() * 100)
                assert mine.read_file(entry.nodeid) == str(i).encode() * 100
                mine.rename(directory, str(i), directory, f"r{i}")
                if i % 2:
                    mine.unlink(directory, f"r{i}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [len(list((share.path / f"d{n}").iterdir())) for n in (0, 1)] == [75, 75]


def test_sixteen_request_queues_work(share: Share, ours: None) -> None:
    fs = share.mount(replace(Machine(), request_queues=16))
    pending = [fs.through(n).submit(op.getattr_(fs.root)) for n in range(16)]
    for one in pending:
        assert one.wait().attr.nlink >= 2


def test_queues_that_were_never_set_up_may_be_enabled(share: Share, ours: None) -> None:
    """QEMU enables all queues, also those that the guest has not set up."""
    fs = share.mount()
    for index in range(2, min(fs.vmm.queue_limit, 8)):
        fs.vmm.enable_queue(index)
    assert fs.getattr(fs.root).nlink >= 2


def test_more_queues_than_offered_are_refused(share: Share, ours: None) -> None:
    fs = share.mount()
    limit = fs.vmm.queue_limit
    assert 2 <= limit <= 32768
    with pytest.raises((OSError, BackendGoneError)):
        fs.vmm.tell(Message.SET_VRING_NUM, limit.to_bytes(4, "little") + (128).to_bytes(4, "little"))


def test_many_requests_in_flight_are_all_answered_once(share: Share) -> None:
    fs = share.mount(Machine(queue_size=1024))
    content = os.urandom(64 * 4096)
    entry = fs.write_file(fs.root, "a", content)
    fh = fs.open(entry.nodeid).fh
    for _ in range(5):
        pending = [fs.submit(op.read(entry.nodeid, fh, 4096, 4096 * (i % 64))) for i in range(500)]
        for i, one in enumerate(pending):
            assert one.wait() == content[4096 * (i % 64) :][:4096]


def test_the_server_under_test_is_this_checkout(ours: None) -> None:
    assert ServerProcess.is_foreign() is False
