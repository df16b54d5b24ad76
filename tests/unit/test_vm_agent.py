# SPDX-License-Identifier: Apache-2.0
"""The host's end of the guest agent, with the test as the guest at the other end of a socket pair.

Must not need a guest.
Specification: vhostfs/vm/frames.py.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.limits import HANG_S
from vhostfs.vm.agent import AgentConnection, GuestError, GuestGoneError, GuestTimeoutError, RunningCommand
from vhostfs.vm.frames import STDIN_WINDOW, Frame, FrameDecoder, FrameType, encode_frame


class FakeGuest:
    def __init__(self) -> None:
        ours, self.stream = socket.socketpair()
        self.stream.settimeout(HANG_S)
        self.connection = AgentConnection(ours)
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    def hello(self, version: int = 1) -> None:
        self.say(FrameType.HELLO, 0, struct.pack("<I", version))

    def say(self, kind: FrameType, command: int, payload: bytes = b"") -> None:
        self.stream.sendall(encode_frame(Frame(kind, command, payload)))

    def exit(self, command: int, status: int = 0) -> None:
        self.say(FrameType.EXIT, command, struct.pack("<II", 0, status))

    def hear(self) -> Frame:
        while not self._frames:
            self._frames = self._decoder.feed(self.stream.recv(1 << 16))
        return self._frames.pop(0)

    def start(self, *, stdin: bool = False) -> tuple[RunningCommand, int]:
        running = self.connection.start("command", cwd="/", environment={}, stdin=stdin)
        frame = self.hear()
        assert frame.type is FrameType.START
        return running, frame.command


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    fake = FakeGuest()
    yield fake
    fake.stream.close()
    fake.connection.close()


def test_the_guest_is_ready_when_its_agent_has_spoken(guest: FakeGuest) -> None:
    assert not guest.connection.wait_ready(0)
    guest.hello()
    assert guest.connection.wait_ready(HANG_S)


def test_an_agent_of_another_version_is_refused(guest: FakeGuest) -> None:
    guest.hello(version=9)
    with pytest.raises(GuestGoneError, match="version 9"):
        guest.connection.wait_ready(HANG_S)


def test_outputs_and_status_of_two_commands_are_kept_apart(guest: FakeGuest) -> None:
    (first, a), (second, b) = guest.start(), guest.start()
    guest.say(FrameType.STDOUT, a, b"A")
    guest.say(FrameType.STDERR, b, b"error")
    guest.say(FrameType.STDOUT, b, b"B")
    guest.exit(b, 4)
    guest.say(FrameType.STDOUT, a, b"A")
    guest.exit(a)
    done, other = first.wait(HANG_S), second.wait(HANG_S)
    assert (done.stdout, done.stderr, done.exit_status) == (b"AA", b"", 0)
    assert (other.stdout, other.stderr, other.exit_status) == (b"B", b"error", 4)
    with pytest.raises(GuestError, match="ended with 4"):
        other.check()


def test_waiting_for_output_ends_with_the_output_or_with_the_command(guest: FakeGuest) -> None:
    running, number = guest.start()
    guest.say(FrameType.STDOUT, number, b"one\ntw")
    assert running.wait_for_lines(1, HANG_S) == ["one"]
    with pytest.raises(GuestTimeoutError):
        running.wait_for_output("two", 0.01)
    guest.say(FrameType.STDOUT, number, b"o\n")
    assert running.wait_for_output("two", HANG_S) == b"one\ntwo\n"
    guest.exit(number, 3)
    with pytest.raises(GuestError, match="ended with 3"):
        running.wait_for_output("three", HANG_S)


def test_stdin_waits_for_credit_and_the_rest_is_dropped_when_the_command_ends(guest: FakeGuest) -> None:
    running, number = guest.start(stdin=True)
    writer = threading.Thread(target=running.write_stdin, args=(bytes(STDIN_WINDOW * 3),))
    writer.start()
    received = 0
    while received < STDIN_WINDOW:
        received += len(guest.hear().payload)
    guest.stream.settimeout(0.05)
    with pytest.raises(TimeoutError):
        guest.hear()
    guest.stream.settimeout(HANG_S)
    guest.say(FrameType.CREDIT, number, struct.pack("<I", 100))
    assert len(guest.hear().payload) == 100
    guest.exit(number)
    writer.join(HANG_S)
    assert not writer.is_alive()


def test_commands_of_a_guest_that_ends_fail_at_once(guest: FakeGuest) -> None:
    running, _ = guest.start()
    guest.stream.close()
    with pytest.raises(GuestGoneError):
        running.wait(HANG_S)
    with pytest.raises(GuestGoneError):
        guest.connection.start("x", cwd="/", environment={}, stdin=False)


def test_a_command_that_was_not_started_says_why(guest: FakeGuest) -> None:
    running, number = guest.start()
    guest.say(FrameType.FAILED, number, b"no memory")
    with pytest.raises(GuestError, match="no memory"):
        running.wait(HANG_S)


def test_output_for_a_command_that_does_not_run_ends_the_connection(guest: FakeGuest) -> None:
    running, _ = guest.start()
    guest.say(FrameType.STDOUT, 77, b"x")
    with pytest.raises(GuestGoneError, match="does not run"):
        running.wait(HANG_S)


def test_a_reboot_ends_what_ran_and_later_commands_go_on(guest: FakeGuest) -> None:
    guest.hello()
    assert guest.connection.wait_ready(HANG_S)
    before, old = guest.start()
    assert guest.connection.boots == 1
    guest.hello()
    assert guest.connection.wait_rebooted(1, HANG_S)
    with pytest.raises(GuestGoneError, match="rebooted"):
        before.wait(HANG_S)
    after, new = guest.start()
    guest.say(FrameType.STDOUT, old, b"of the boot before")
    guest.say(FrameType.STDOUT, new, b"after")
    guest.exit(new)
    assert after.wait(HANG_S).stdout == b"after"
    assert not guest.connection.gone


def test_a_guest_that_goes_while_it_reboots_is_not_waited_for(guest: FakeGuest) -> None:
    guest.hello()
    assert guest.connection.wait_ready(HANG_S)
    guest.stream.shutdown(socket.SHUT_RDWR)
    assert guest.connection.wait_rebooted(1, HANG_S)
    assert guest.connection.gone
