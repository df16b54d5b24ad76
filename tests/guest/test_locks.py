# SPDX-License-Identifier: Apache-2.0
"""Locks of two guest processes, and of a guest and the host: excluded, waited for, released at death.

Must not test lock ranges in depth (tests/ring does). Specification: fcntl(2), flock(2).
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest

from tests.guest.place import Place, awaited
from tests.limits import HANG_S
from vhostfs.vm.agent import RunningCommand

# Says what it does as it does it; a line on stdin makes it let go.
LOCKER = """
import fcntl, os, sys
kind, mode = sys.argv[1:]
lock = {"posix": fcntl.lockf, "flock": fcntl.flock}[kind]
with open("file", "r+b") as file:
    print(os.getpid(), flush=True)
    try:
        lock(file, (fcntl.LOCK_SH if mode == "shared" else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        print("busy", error.errno, flush=True)
        if mode == "try":
            sys.exit(3)
        lock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.readline()
    lock(file, fcntl.LOCK_UN)
    print("released", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["posix", "flock"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def shared_file(place: Place) -> Path:
    file = place.host / "file"
    file.write_bytes(b"content")
    return file


def locker(place: Place, kind: str, mode: str = "exclusive") -> RunningCommand:
    return place.start_python(LOCKER, kind, mode)


def holder(place: Place, kind: str, mode: str = "exclusive") -> RunningCommand:
    running = locker(place, kind, mode)
    running.wait_for_output("held\n", HANG_S)
    return running


def waiter(place: Place, kind: str) -> RunningCommand:
    """A locker that was refused and now waits within fcntl or flock."""
    running = locker(place, kind)
    running.wait_for_output("busy 11\n", HANG_S)
    place.sh(f"until grep -qE '^(72|73) ' /proc/{guest_pid(running)}/syscall; do usleep 20000; done")
    assert b"held" not in running.stdout
    return running


def guest_pid(running: RunningCommand) -> int:
    return int(running.stdout.split()[0])


def host_try(file: Path, kind: str) -> bool:
    """Whether another program on the host would get the lock now."""
    # A process of its own: POSIX locks of one process do not exclude each other.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(file, os.O_RDWR)
            lock = fcntl.lockf if kind == "posix" else fcntl.flock
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("shared_file")
def test_a_guest_process_waits_until_another_lets_go(place: Place, kind: str) -> None:
    first = holder(place, kind)
    second = waiter(place, kind)
    first.write_stdin(b"\n")
    second.wait_for_output("held\n", HANG_S)
    first.write_stdin(b"\n")
    second.close_stdin()
    assert first.wait(HANG_S).exit_status == second.wait(HANG_S).exit_status == 0


@pytest.mark.usefixtures("shared_file")
def test_the_lock_of_a_killed_guest_process_goes_to_who_waits(place: Place, kind: str) -> None:
    first = holder(place, kind)
    second = waiter(place, kind)
    place.sh(f"kill -9 {guest_pid(first)}")
    second.wait_for_output("held\n", HANG_S)
    second.close_stdin()
    second.wait(HANG_S)


def test_who_is_killed_while_waiting_leaves_no_lock(place: Place, kind: str, shared_file: Path) -> None:
    first = holder(place, kind)
    second = waiter(place, kind)
    # virtio-fs sends no interrupt (virtio_fs_send_interrupt in fs/fuse/virtio_fs.c does nothing), so that the
    # process can only go once its request is answered.
    place.sh(f"kill -9 {guest_pid(second)}")
    first.write_stdin(b"\n")
    assert second.wait(HANG_S).exit_status == 128 + signal.SIGKILL
    assert b"held" not in second.stdout
    assert awaited(lambda: host_try(shared_file, kind))
    first.close_stdin()
    first.wait(HANG_S)


@pytest.mark.usefixtures("shared_file")
def test_readers_share_and_a_writer_is_refused(place: Place, kind: str) -> None:
    readers = [holder(place, kind, "shared") for _ in range(2)]
    refused = locker(place, kind, "try")
    assert refused.wait(HANG_S).exit_status == 3
    for reader in readers:
        reader.close_stdin()
        reader.wait(HANG_S)


def test_the_host_is_kept_out_by_a_lock_of_the_guest(place: Place, kind: str, shared_file: Path) -> None:
    assert host_try(shared_file, kind)
    guest = holder(place, kind)
    assert not host_try(shared_file, kind)
    guest.write_stdin(b"\n")
    guest.wait_for_output("released\n", HANG_S)
    assert host_try(shared_file, kind)
    guest.close_stdin()
    guest.wait(HANG_S)


def test_the_lock_of_a_killed_guest_process_is_free_on_the_host(
    place: Place, kind: str, shared_file: Path
) -> None:
    guest = holder(place, kind)
    assert not host_try(shared_file, kind)
    place.sh(f"kill -9 {guest_pid(guest)}")
    assert awaited(lambda: host_try(shared_file, kind))


def test_the_guest_waits_for_a_lock_of_the_host(place: Place, kind: str, shared_file: Path) -> None:
    with shared_file.open("r+b") as file:
        lock = fcntl.lockf if kind == "posix" else fcntl.flock
        lock(file, fcntl.LOCK_EX)
        guest = waiter(place, kind)
        lock(file, fcntl.LOCK_UN)
        guest.wait_for_output("held\n", HANG_S)
    guest.close_stdin()
    guest.wait(HANG_S)


def test_the_host_waits_for_a_lock_of_the_guest(place: Place, kind: str, shared_file: Path) -> None:
    guest = holder(place, kind)
    got = threading.Event()

    def wait_for_it() -> None:
        with shared_file.open("r+b") as file:
            (fcntl.lockf if kind == "posix" else fcntl.flock)(file, fcntl.LOCK_EX)
            got.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert not got.wait(0.2)
    guest.write_stdin(b"\n")
    thread.join(HANG_S)
    assert got.is_set()
    guest.close_stdin()
    guest.wait(HANG_S)
