# SPDX-License-Identifier: Apache-2.0
"""Parked requests in guests of every kernel, under the machine's own QEMU and its usual device.

Must not test what each event looks like. Specification: docs/protocol.md, 4.4; docs/guest.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.guest.conftest import image_or_lacking
from tests.guest.events.conftest import (
    DELIVERY,
    PARKED,
    EventSession,
    EventShare,
    Parts,
    complaints_of,
    start_share,
)
from tests.guest.events.qmp import Monitor
from tests.guest.events.scenario import a_day
from tests.guest.events.watching import PROGRAM, Watch
from tests.guest.place import Place, awaited
from tests.limits import AT_ONCE_S, HANG_S
from vhostfs.cli.run_events import delivered
from vhostfs.vm.guest import Guest
from vhostfs.vm.kernel import SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Share, ShareDevice

STUCK_S = 30
STATE = "cat /sys/bus/virtio/devices/*/notifications/state"


@dataclass(frozen=True, slots=True)
class Stock:
    """A guest whose share has no notification queue, because its VMM does not pass it."""

    guest: Guest
    share: EventShare
    monitor: Monitor
    parts: Parts

    def sh(self, command: str) -> str:
        return self.guest.run(command, HANG_S).check().text.strip()

    def place(self, name: str) -> Place:
        return Place(self.guest, self.share.directory, "/share").child(name)

    def watch(self, place: Place, *names: str) -> Watch:
        return Watch(place, self.share.control, self.parts.programs[PROGRAM], names=names or (".",))

    @property
    def parked(self) -> int:
        return self.share.control.counters()["buffers"]


@pytest.fixture(scope="module", params=sorted(SERIES))
def stock(request: pytest.FixtureRequest, parts: Parts, real_directory: Path) -> Iterator[Stock]:
    directory = real_directory / f"parked-{request.param}"
    directory.mkdir()
    image = image_or_lacking(parts.launchpad, parts.image_spec(request.param))
    with Lifeline() as lifeline:
        share = start_share(lifeline, directory, "share", delivery=())
        monitor_path = lifeline.directory / "qmp.sock"
        place = Share("share", share.server.spec.socket_path, "/share", device=ShareDevice.STOCK)
        machine = parts.launchpad.machine(image, (place,))
        machine = replace(machine, qemu_arguments=("-qmp", f"unix:{monitor_path},server=on,wait=off"))
        guest = Guest(machine, lifeline=lifeline)
        with guest:
            # A request that waited for events would be found waiting: complaints_of() looks for it.
            settings = f"echo {STUCK_S} >hung_task_timeout_secs; echo 5 >hung_task_check_interval_secs"
            guest.run(f"cd /proc/sys/kernel; {settings}", HANG_S).check()
            monitor = Monitor(monitor_path)
            yield Stock(guest, share, monitor, parts)
            monitor.close()
        complaints = complaints_of(guest, [share])
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def test_a_day_s_work_is_seen_without_a_notification_queue(stock: Stock) -> None:
    assert stock.sh(STATE) == "parked"
    place = stock.place("day")
    (place.host / "sub").mkdir()
    (place.host / "outside").mkdir()
    watch = stock.watch(place, ".", "sub")
    a_day(watch)
    watch.close()


def driver_lines(guest: Guest) -> list[str]:
    """What the driver says of its devices, oldest first."""
    text = guest.run("dmesg | grep 'notifications from the host'", HANG_S).check().text
    return [line.partition("notifications from the host ")[2] for line in text.splitlines()]


def server_line(share: EventShare) -> str:
    """The newest line of the log about delivery."""
    prefix = "events for the guest: by "
    lines = [line for line in share.server.log_path.read_text().splitlines() if prefix in line]
    return lines[-1].partition(prefix)[2]


def test_server_driver_and_run_say_what_is_delivered_and_what_was_missing(stock: Stock) -> None:
    told = stock.share.control.negotiated()
    assert told["delivery"]["chosen"] == "parked"
    missing = told["delivery"]["missing"]
    assert missing.startswith("this VMM does not pass VIRTIO_FS_F_NOTIFICATION (QEMU: needs")
    assert server_line(stock.share).startswith("parked requests (driver 1.0, ")
    assert server_line(stock.share).endswith(f": {missing}")
    said = driver_lines(stock.guest)[0]
    assert said.startswith("by parked requests: the device has no VIRTIO_FS_F_NOTIFICATION")
    line, _ = delivered(told, None)
    assert line == f"events: {told['source']['reason']}; delivered by parked requests: {missing}"


with_the_queue = pytest.mark.skipif(PARKED in DELIVERY, reason="all shares are without the queue")


@with_the_queue
def test_with_the_queue_they_say_so_and_nothing_is_missing(session: EventSession) -> None:
    share = session.shares["auto"]
    told = share.control.negotiated()
    assert told["delivery"]["chosen"] == "virtqueue"
    assert told["delivery"]["missing"] == ""
    assert server_line(share).startswith("the notification queue (driver 1.0, ")
    assert "by the notification queue" in driver_lines(session.guest)
    line, _ = delivered(told, None)
    assert line == f"events: {told['source']['reason']}; delivered by the notification queue"


@with_the_queue
def test_a_server_names_what_the_real_driver_and_vmm_have_negotiated(session: EventSession) -> None:
    for tag, role in (("auto", "notification"), ("parked", "request")):
        told = session.shares[tag].control.negotiated()
        vmm, fuse, fsnotify = told["vmm"], told["fuse"], told["fsnotify"]
        assert told["server"]["shared_dir"] == str(session.shares[tag].directory)
        assert ("VIRTIO_FS_F_NOTIFICATION" in vmm["features_acked"]) == (tag == "auto")
        assert "VIRTIO_F_VERSION_1" in vmm["features_acked"]
        assert ("VHOST_USER_PROTOCOL_F_CONFIG" in vmm["protocol_features_acked"]) == (tag == "auto")
        assert vmm["queues"][1]["role"] == role
        assert "FUSE_INIT_EXT" in fuse["flags_granted"]
        assert fuse["guest_version"].startswith("7.")
        way = "FUSE_FSNOTIFY_VIRTQUEUE" if tag == "auto" else "FUSE_FSNOTIFY_PARKED"
        assert {way, "FUSE_FSNOTIFY_RENAME", "FUSE_FSNOTIFY_CHILD"} <= set(fsnotify["flags_granted"])
        assert {"CREATE", "MOVED_TO", "DELETE_SELF"} <= set(fsnotify["events"])
        assert fsnotify["driver_version"] == "1.0"
        assert fsnotify["refused"] is None


def test_a_burst_goes_through_few_requests_in_order(stock: Stock) -> None:
    place = stock.place("burst")
    watch = stock.watch(place)
    names = [f"{number:04}" for number in range(1500)]

    def burst() -> None:
        for name in names:
            (place.host / name).mkdir()

    watch.step(burst, *(f"CREATE|ISDIR {name}" for name in names))
    watch.close()


def test_unmounting_and_syncing_do_not_wait_for_parked_requests(stock: Stock) -> None:
    awaited(lambda: stock.parked > 0)
    assert 0 < stock.parked <= 64
    started_s = time.monotonic()
    stock.sh("sync -f /share && umount /share && mount -t virtiofs share /share")
    assert time.monotonic() - started_s < AT_ONCE_S
    place = stock.place("again")
    watch = stock.watch(place)
    watch.step((place.host / "new").mkdir, "CREATE|ISDIR new")
    watch.close()


def test_parked_requests_are_not_under_way_for_the_guest_s_kernel(stock: Stock) -> None:
    assert awaited(lambda: stock.parked > 0)
    stacks = stock.sh("cat /proc/[0-9]*/stack")
    assert "worker_thread" in stacks
    assert "request_wait_answer" not in stacks


def test_suspending_does_not_wait_for_parked_requests(stock: Stock) -> None:
    """As far as the kernel's own driver goes: tasks are frozen; the device itself refuses to sleep."""
    place = stock.place("suspend")
    watch = stock.watch(place)
    assert awaited(lambda: stock.parked > 0)
    frozen = "echo freezer >/sys/power/pm_test; echo 0 >/sys/module/suspend/parameters/pm_test_delay"
    started_s = time.monotonic()
    stock.sh(f"{frozen}; echo freeze >/sys/power/state")
    assert time.monotonic() - started_s < AT_ONCE_S
    watch.step((place.host / "thawed").mkdir, "CREATE|ISDIR thawed")
    refused = "echo none >/sys/power/pm_test; echo freeze >/sys/power/state"
    started_s = time.monotonic()
    assert stock.guest.run(refused, HANG_S).exit_status != 0
    assert time.monotonic() - started_s < AT_ONCE_S
    assert "virtio-fs: suspend/resume not yet supported" in stock.sh("dmesg")
    watch.step((place.host / "awake").mkdir, "CREATE|ISDIR awake")
    watch.close()


def test_a_migration_is_refused_at_once_and_events_go_on(stock: Stock) -> None:
    place = stock.place("migration")
    watch = stock.watch(place)
    assert "igrat" in stock.monitor.refusal("migrate", uri="exec:cat >/dev/null")
    watch.step((place.host / "stayed").mkdir, "CREATE|ISDIR stayed")
    watch.close()


def test_a_paused_machine_has_its_events_when_it_goes_on(stock: Stock) -> None:
    place = stock.place("pause")
    watch = stock.watch(place)
    stock.monitor.execute("stop")
    awaited(lambda: stock.parked == 0)
    (place.host / "meanwhile").mkdir()
    stock.monitor.execute("cont")
    watch.step((place.host / "new").mkdir, "CREATE|ISDIR meanwhile", "CREATE|ISDIR new")
    watch.close()


def test_the_smallest_ring_has_room_for_requests_of_every_size(session: EventSession) -> None:
    share = session.shares["tiny"]
    queues = share.control.negotiated()["vmm"]["queues"]
    size = next(queue["size"] for queue in queues if queue["role"] == "request")
    assert awaited(lambda: share.control.counters()["buffers"] == min(64, size // 8))
    top = Place(session.guest, share.directory, "/tiny")
    place, watched = top.child("data"), top.child("watched")
    watch = Watch(watched, share.control, session.parts.programs[PROGRAM])
    write = (
        "head -c 1000000 /dev/urandom >/tmp/data; for i in 1 2 3 4; do cat /tmp/data >$i & done; wait; sync"
    )
    compare = "for i in 1 2 3 4; do cmp $i /tmp/data || exit 1; done; rm /tmp/data"
    busy = place.start(f"{write}; echo 3 >/proc/sys/vm/drop_caches; {compare}")
    for number in range(20):
        watch.step((watched.host / str(number)).mkdir, f"CREATE|ISDIR {number}")
    busy.wait(HANG_S).check()
    watch.close()


def test_the_driver_is_unbound_and_bound_again(stock: Stock) -> None:
    driver = "/sys/bus/virtio/drivers/vhostfs_virtiofs"
    stock.sh("umount /share")
    name = stock.sh(f"cd {driver} && ls -d virtio*")
    stock.sh(f"echo {name} >{driver}/unbind && echo {name} >{driver}/bind && mount -t virtiofs share /share")
    place = stock.place("bound")
    watch = stock.watch(place)
    watch.step((place.host / "new").mkdir, "CREATE|ISDIR new")
    watch.close()
