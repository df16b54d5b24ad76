# SPDX-License-Identifier: Apache-2.0
"""What a running server says that it has agreed on, and the one line of its log about delivery.

Must not test what the agreement should be. Specification: docs/caps.md, "A running server"; docs/events.md.
"""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import negotiated, stats
from tests.ring.event_sources import FILESYSTEM_MARK, INOTIFY, start_share
from tests.ring.events import NOTIFYING, STOCK, Delivery, EventGuest
from tests.ring.share import Share, refused
from tests.server import awaited
from vhostfs.cli import main
from vhostfs.frontend import Machine, ProtocolFeature
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend.fsnotify import Granted
from vhostfs.fuse.fsnotify import REDUCTION

pytestmark = pytest.mark.usefixtures("ours")

LIKE_VHOST_USER_FS = replace(STOCK, protocol_features=STOCK.protocol_features & ~ProtocolFeature.CONFIG)
"""QEMU's usual device has a configuration space of its own and fetches none."""


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return start_share(make_share, FILESYSTEM_MARK)


def delivery_lines(share: Share) -> list[str]:
    return [
        line.partition("events for the guest: ")[2]
        for line in share.log().splitlines()
        if "events for the guest: " in line and REDUCTION not in line
    ]


def test_before_a_guest_comes_only_the_server_is_told_of(share: Share) -> None:
    awaited(lambda: negotiated(share)["vmm"] is None)
    told = negotiated(share)
    assert (told["vmm"], told["fuse"], told["fsnotify"]) == (None, None, None)
    server = told["server"]
    assert server["shared_dir"] == str(share.server.shared_dir)
    assert (server["tag"], server["sandbox"]) == ("events", "none")
    assert server["config"] == {"tag": "events", "num_request_queues": 1, "notify_buf_size_bytes": 320}
    assert told["source"]["chosen"] == "fanotify:filesystem"
    assert {"CREATE", "MODIFY", "MOVED_TO"} <= set(told["source"]["reports"])
    assert told["delivery"] == {
        "chosen": "none",
        "missing": "the guest has not mounted the share",
        "offered": ["virtqueue", "parked"],
    }


def test_a_guest_with_the_notification_queue_is_told_of_by_name(share: Share) -> None:
    guest = EventGuest(share, machine=replace(NOTIFYING, queue_size=64, notification_queue_size=32))
    told = negotiated(share)
    assert told["delivery"]["chosen"] == "virtqueue"
    assert told["delivery"]["missing"] == ""
    vmm = told["vmm"]
    assert vmm["state"] == "negotiated"
    assert "VIRTIO_FS_F_NOTIFICATION" in vmm["features_acked"]
    assert "VIRTIO_F_VERSION_1" in vmm["features_acked"]
    assert set(vmm["features_acked"]) <= set(vmm["features_offered"])
    assert "VHOST_USER_PROTOCOL_F_CONFIG" in vmm["protocol_features_acked"]
    assert "DRIVER_OK" in vmm["device_status"]
    assert [(queue["role"], queue["size"]) for queue in vmm["queues"]] == [
        ("hiprio", 64),
        ("notification", 32),
        ("request", 64),
    ]
    assert vmm["memory_bytes"] == NOTIFYING.region_bytes
    assert told["fuse"]["guest_version"].startswith("7.")
    assert "FUSE_MAX_PAGES" in told["fuse"]["flags_granted"]
    assert "FUSE_WRITEBACK_CACHE" in told["fuse"]["flags_offered"]
    assert "FUSE_WRITEBACK_CACHE" not in told["fuse"]["flags_granted"]
    fsnotify = told["fsnotify"]
    assert fsnotify["refused"] is None
    assert fsnotify["driver_version"] == "1.0"
    assert "FUSE_FSNOTIFY_VIRTQUEUE" in fsnotify["flags_granted"]
    assert {"CREATE", "DELETE_SELF"} <= set(fsnotify["events"])
    assert (fsnotify["notify_buf_size_bytes"], fsnotify["max_parked"]) == (320, 0)
    assert guest.granted.max_watches == fsnotify["max_watches"]


def test_a_vmm_that_does_not_pass_the_queue_is_named_as_what_is_missing(share: Share) -> None:
    EventGuest(share, delivery=Delivery.PARKED, machine=LIKE_VHOST_USER_FS)
    told = negotiated(share)
    assert told["delivery"]["chosen"] == "parked"
    missing = told["delivery"]["missing"]
    assert missing.startswith("this VMM does not pass VIRTIO_FS_F_NOTIFICATION")
    assert "10.1" in missing
    assert told["fsnotify"]["max_parked"] == 64
    assert delivery_lines(share) == [f"by parked requests (driver 1.0, rename, child): {missing}"]
    assert stats(share)["guest"]["delivery"] == {"chosen": "parked", "missing": missing}


def test_a_driver_that_does_not_take_the_queue_is_named_where_the_vmm_passes_it(share: Share) -> None:
    EventGuest(share, delivery=Delivery.PARKED, machine=STOCK)
    (line,) = delivery_lines(share)
    assert line.endswith(f": {negotiated(share)['delivery']['missing']}")
    assert "VIRTIO_FS_F_NOTIFICATION is not accepted: the guest's driver does not know it" in line


def test_the_queue_is_one_line_without_a_complaint(share: Share) -> None:
    EventGuest(share)
    assert delivery_lines(share) == ["by the notification queue (driver 1.0, rename, child)"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tag=events", "--delivery=parked"), "the notification queue is switched off by --delivery"),
        ((), "no --tag is given, without which there is no notification queue"),
    ],
)
def test_options_that_leave_the_queue_out_are_named(
    make_share: MakeShare, options: tuple[str, ...], text: str
) -> None:
    share = make_share(INOTIFY.option, *options)
    EventGuest(share, delivery=Delivery.PARKED, machine=LIKE_VHOST_USER_FS)
    told = negotiated(share)
    assert told["delivery"] == {"chosen": "parked", "missing": text, "offered": ["parked"]}
    assert delivery_lines(share) == [f"by parked requests (driver 1.0, rename, child): {text}"]


def test_no_way_at_all_is_one_line_too(make_share: MakeShare) -> None:
    share = start_share(make_share, INOTIFY, "--delivery=virtqueue")
    fs = share.mount(LIKE_VHOST_USER_FS)
    fs.fsnotify_init(int(Granted.PARKED))
    told = negotiated(share)["delivery"]
    assert told["chosen"] == "none"
    assert "does not pass VIRTIO_FS_F_NOTIFICATION" in told["missing"]
    assert told["missing"].endswith("parked requests are switched off by --delivery")
    (line,) = delivery_lines(share)
    assert line.startswith("none (driver 1.0)")


def test_a_refused_driver_is_told_of_until_it_asks_better(share: Share) -> None:
    fs = share.mount(NOTIFYING)
    with refused(errno.EINVAL):
        fs.call(wire.init(buf_size=60))
    told = negotiated(share)
    assert told["delivery"]["chosen"] == "none"
    assert "its buffers hold 60 bytes" in told["fsnotify"]["refused"]
    assert told["fsnotify"]["driver_buf_size_bytes"] == 60
    fs.fsnotify_init()
    told = negotiated(share)
    assert (told["delivery"]["chosen"], told["fsnotify"]["refused"]) == ("virtqueue", None)


def test_a_driver_that_knows_no_events_is_said_to(make_share: MakeShare) -> None:
    """The kernel's own: nothing comes from it that could be answered, so the line comes after a while."""
    share = start_share(make_share, FILESYSTEM_MARK)
    share.mount(Machine())
    assert awaited(lambda: bool(delivery_lines(share)))
    (line,) = delivery_lines(share)
    assert line.startswith("none: ")
    assert "its driver has not asked for them" in line
    assert line == f"none: {negotiated(share)['delivery']['missing']}"


def test_a_server_without_events_says_that_they_are_off(make_share: MakeShare) -> None:
    share = make_share("--events=off")
    share.mount(Machine())
    told = negotiated(share)
    assert told["source"] == {"chosen": "off", "reason": "off", "reports": []}
    assert told["delivery"] == {
        "chosen": "none",
        "missing": "events are off in this server (--events=off)",
        "offered": [],
    }


def test_what_was_agreed_goes_with_the_guest(share: Share) -> None:
    EventGuest(share)
    assert negotiated(share)["fuse"] is not None
    share.unmount()
    assert awaited(lambda: negotiated(share)["vmm"] is None)
    told = negotiated(share)
    assert (told["vmm"], told["fuse"], told["fsnotify"]) == (None, None, None)


def test_the_command_shows_a_server_by_its_socket_and_by_its_share(
    share: Share, capsys: pytest.CaptureFixture[str]
) -> None:
    EventGuest(share, delivery=Delivery.PARKED, machine=LIKE_VHOST_USER_FS)
    assert main(["caps", f"--control={share.server.socket_path}"]) == 0
    out = capsys.readouterr().out
    assert f"directory  {share.server.shared_dir} (" in out
    assert "  delivery              parked: this VMM does not pass VIRTIO_FS_F_NOTIFICATION" in out
    assert "  INIT flags            FUSE_ASYNC_READ" in out
    assert "FUSE_FSNOTIFY_PARKED FUSE_FSNOTIFY_RENAME" in out
    assert main(["caps", "--json", str(share.path)]) == 0
    found = json.loads(capsys.readouterr().out)["servers"]
    # Others that run here and do not answer are told of, too.
    (server,) = (each for each in found if each["problem"] is None)
    assert server["control"] == f"{share.server.socket_path}.ctl"
    assert server["delivery"] == negotiated(share)["delivery"]
    assert "type" not in server
