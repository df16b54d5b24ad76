# SPDX-License-Identifier: Apache-2.0
"""A server that ends under a running guest and is started again: the share is plugged in anew, events go on.

Must not know how events travel. Specification: docs/guest.md, "When a server ends".
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest.conftest import image_or_lacking
from tests.guest.events.conftest import PARKED, EventShare, Parts, complaints_of, device_of, start_share
from tests.guest.events.qmp import QUEUE_SIZE, Monitor, arguments
from tests.guest.events.watching import Watch
from tests.guest.place import Place, awaited
from tests.limits import AT_ONCE_S, HANG_S
from vhostfs.vm.agent import RunningCommand
from vhostfs.vm.guest import Guest
from vhostfs.vm.kernel import DEFAULT_SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import ShareDevice

pytestmark = pytest.mark.timeout(700, func_only=True)
CALLS = QUEUE_SIZE + 20


class Plugged:
    """A guest that was started without a share, and one that comes and goes with its server."""

    def __init__(self, parts: Parts, directory: Path, lifeline: Lifeline) -> None:
        self._directory = directory
        self._lifeline = lifeline
        self.qemu = parts.qemu
        self.share = self._start()
        kernel = os.environ.get("VHOSTFS_TEST_KERNEL", DEFAULT_SERIES)
        image = image_or_lacking(parts.launchpad, parts.image_spec(kernel))
        monitor_path = lifeline.directory / "qmp.sock"
        machine = parts.launchpad.machine(image, qemu=parts.qemu)
        machine = replace(machine, qemu_arguments=arguments(monitor_path))
        self.guest = Guest(machine, lifeline=lifeline)
        self.guest.launch()
        self._monitor = Monitor(monitor_path)
        self._plug()
        self.mount()

    def _start(self, *options: str) -> EventShare:
        return start_share(self._lifeline, self._directory, "share", options)

    def _plug(self) -> None:
        device = device_of(self.share, self.qemu)
        self._monitor.plug(self.share.server.spec.socket_path, device)

    def mount(self) -> None:
        """Waits for the guest's kernel to find the device."""
        mount = "mkdir -p /share; until mount -t virtiofs share /share 2>/dev/null; do sleep 0.1; done"
        self.guest.run(mount, HANG_S).check()

    def end_server(self, number: signal.Signals) -> None:
        """All that is left of it is what it had no time to remove."""
        self.share.control.close()
        server = self.share.server
        server.process.send_signal(number)
        server.process.wait(HANG_S)
        assert server.spec.socket_path.exists() == (number == signal.SIGKILL)

    def start_server_again(self, *options: str, refused: ShareDevice | None = None) -> None:
        """On the same sockets; the guest gets the share as a new device.

        refused: a kind that is tried first, and that QEMU cannot make of this server.
        """
        self._monitor.unplug()
        self.share = self._start(*options)
        if refused is None:
            self._plug()
        else:
            self._monitor.connect(self.share.server.spec.socket_path)
            self._monitor.add(refused, refusal="VIRTIO_FS_F_NOTIFICATION")
            self._monitor.add(device_of(self.share, self.qemu))

    def plug_again(self) -> None:
        """A new device on the connection of the one before, whose server goes on."""
        self._monitor.delete()
        self._monitor.add(device_of(self.share, self.qemu))

    def awaits_an_answer(self, command: RunningCommand) -> bool:
        """Waits until somebody in the guest's kernel waits for an answer of the server."""
        look = "grep -lqs request_wait_answer /proc/[0-9]*/stack"
        found = awaited(lambda: self.guest.run(look, HANG_S).exit_status == 0, step_s=0.1)
        return found and command.status is None

    def close(self) -> list[str]:
        """Ends all; what there is to complain about."""
        self._monitor.close()
        self.guest.close()
        return complaints_of(self.guest, [self.share])


@pytest.fixture(scope="module")
def plugged(parts: Parts, real_directory: Path) -> Iterator[Plugged]:
    directory = real_directory / "restart"
    directory.mkdir()
    with Lifeline() as lifeline:
        state = Plugged(parts, directory, lifeline)
        yield state
        complaints = state.close()
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_is_told_again_after_its_server_was_started_again(
    plugged: Plugged, number: signal.Signals
) -> None:
    place = Place(plugged.guest, plugged.share.directory, "/share").child(number.name)
    before = Watch(place, plugged.share.control, None)
    before.step((place.host / "seen").mkdir, "CREATE|ISDIR seen")
    plugged.end_server(number)
    (place.host / "unseen").write_text("of the time without a server\n")
    # Not from there: entering the directory would wait too, in the guest's agent.
    # More than have room in the queue.
    all_wait = f"for i in $(seq {CALLS}); do stat {place.inside}/$i & done; wait"
    waits = plugged.guest.start(all_wait)
    assert plugged.awaits_an_answer(waits)
    plugged.start_server_again()
    waits.wait(HANG_S).check()
    assert waits.stderr.count(b"Transport endpoint is not connected") == CALLS
    before.step(plugged.guest.run("umount /share", HANG_S).check, "UNMOUNT|ISDIR", "IGNORED")
    before.command.close_stdin()
    before.command.wait(HANG_S).check()
    plugged.mount()
    assert place.sh("cat unseen") == "of the time without a server\n"
    after = Watch(place, plugged.share.control, None)
    after.step((place.host / "new").mkdir, "CREATE|ISDIR new")
    after.step(lambda: place.sh("rmdir new"), "DELETE|ISDIR new")
    after.ends()
    after.close()


def test_an_unmount_that_waits_for_a_server_that_ended_is_done_when_the_share_is_taken_away(
    plugged: Plugged,
) -> None:
    plugged.end_server(signal.SIGKILL)
    waits = plugged.guest.start("exec umount /share")
    assert plugged.awaits_an_answer(waits)
    plugged.start_server_again()
    waits.wait(HANG_S).check()
    plugged.mount()
    place = Place(plugged.guest, plugged.share.directory, "/share").child("after")
    watch = Watch(place, plugged.share.control, None)
    watch.step((place.host / "new").mkdir, "CREATE|ISDIR new")
    watch.ends()
    watch.close()


def test_a_server_that_goes_on_serves_the_next_device_on_its_connection(plugged: Plugged) -> None:
    for name in ("one", "two"):
        place = Place(plugged.guest, plugged.share.directory, "/share").child(name)
        watch = Watch(place, plugged.share.control, None)
        watch.step((place.host / "new").mkdir, "CREATE|ISDIR new")
        watch.ends()
        watch.close()
        plugged.guest.run("umount /share", HANG_S).check()
        plugged.plug_again()
        plugged.mount()
    assert "begins anew on its connection" in plugged.share.server.log_path.read_text()


def test_a_device_that_could_not_be_made_leaves_its_connection_fit_for_another(plugged: Plugged) -> None:
    if not plugged.qemu.has_queue_property:
        pytest.skip("only a QEMU with our patch refuses a server")
    plugged.guest.run("umount /share", HANG_S).check()
    plugged.end_server(signal.SIGTERM)
    plugged.start_server_again(PARKED, refused=ShareDevice.QUEUE)
    plugged.mount()
    plugged.guest.run("umount /share", HANG_S).check()
    plugged.end_server(signal.SIGTERM)
    plugged.start_server_again()
    plugged.mount()


def test_parked_requests_keep_neither_a_server_nor_a_device_from_ending(plugged: Plugged) -> None:
    plugged.end_server(signal.SIGTERM)
    plugged.start_server_again(PARKED)
    plugged.guest.run("umount /share", HANG_S).check()
    plugged.mount()
    place = Place(plugged.guest, plugged.share.directory, "/share").child("parked")
    watch = Watch(place, plugged.share.control, None)
    watch.step((place.host / "new").mkdir, "CREATE|ISDIR new")
    assert plugged.share.control.counters()["buffers"] > 0
    started_s = time.monotonic()
    plugged.end_server(signal.SIGTERM)
    plugged.start_server_again()
    assert time.monotonic() - started_s < AT_ONCE_S
    watch.step(plugged.guest.run("umount /share", HANG_S).check, "UNMOUNT|ISDIR", "IGNORED")
    watch.command.close_stdin()
    watch.command.wait(HANG_S).check()
    plugged.mount()
