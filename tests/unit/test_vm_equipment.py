# SPDX-License-Identifier: Apache-2.0
"""QEMU, image and device fit each other, with events where they can be had and with a reason where not.

Must not fetch or build anything. Specification: vhostfs/vm/equipment.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vhostfs.share.options import DeliveryMode
from vhostfs.vm import equipment
from vhostfs.vm.equipment import Events, equip
from vhostfs.vm.errors import VmError
from vhostfs.vm.image import Image, ImageSpec
from vhostfs.vm.kernel import Kernel
from vhostfs.vm.machine import ShareDevice
from vhostfs.vm.qemu import Qemu

OLD = Qemu(("/bin/old",), (7, 2, 0), has_fs_device=True, has_test_device=False, is_kit=False)
NEW = Qemu(("/bin/new",), (11, 0, 0), has_fs_device=True, has_test_device=True, is_kit=True)
STOCK_IMAGE = Image("6.12", Path("/i/vmlinuz"), Path("/i/stock"), 1)
DRIVER_IMAGE = Image("6.12", Path("/i/vmlinuz"), Path("/i/driver"), 1)
SPEC = ImageSpec()
NOWHERE = Path("/nonexistent")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has an old QEMU of its own; the kit can be fetched and the driver built."""

    def find_qemu(choice: str | None, *_: object, notifications: bool = False) -> Qemu:
        return NEW if choice == "kit" or (choice is None and notifications) else OLD

    def build_image(spec: ImageSpec, *_: object) -> Image:
        return DRIVER_IMAGE if spec.driver else STOCK_IMAGE

    monkeypatch.setattr(equipment, "find_qemu", find_qemu)
    monkeypatch.setattr(equipment, "build_image", build_image)
    monkeypatch.setattr(equipment, "build_driver", lambda *_: Path("/driver.ko"))
    monkeypatch.setattr(equipment, "find_kernel", lambda *_: Kernel("6.12", Path("/vmlinuz"), None))


def test_with_events_come_a_qemu_that_passes_them_the_driver_and_the_device() -> None:
    found = equip(SPEC, None, Events.WHERE_POSSIBLE, NOWHERE)
    assert (found.qemu, found.image, found.device) == (NEW, DRIVER_IMAGE, ShareDevice.PASS_THROUGH)
    assert found.events_missing is None
    assert found.delivery is DeliveryMode.VIRTQUEUE


def test_a_qemu_with_our_patch_has_the_queue_at_its_usual_device(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = replace(OLD, has_queue_property=True)
    monkeypatch.setattr(equipment, "find_qemu", lambda *_, **__: patched)
    found = equip(SPEC, "patched", Events.REQUIRED, NOWHERE, delivery=DeliveryMode.VIRTQUEUE)
    assert (found.qemu, found.device, found.queue_missing) == (patched, ShareDevice.QUEUE, None)


def test_without_events_nothing_unusual_is_taken() -> None:
    found = equip(SPEC, None, Events.OFF, NOWHERE)
    assert (found.qemu, found.image, found.device) == (OLD, STOCK_IMAGE, ShareDevice.STOCK)
    assert found.events_missing == "switched off"


def test_a_chosen_qemu_that_passes_no_queue_is_taken_with_parked_requests_and_the_reason_said() -> None:
    found = equip(SPEC, "system", Events.WHERE_POSSIBLE, NOWHERE)
    assert (found.qemu, found.image, found.device) == (OLD, DRIVER_IMAGE, ShareDevice.STOCK)
    assert found.events_missing is None
    assert found.delivery is DeliveryMode.PARKED
    assert found.queue_missing is not None
    assert "QEMU 7.2.0" in found.queue_missing
    assert "--qemu kit" in found.queue_missing


def test_parked_requests_that_were_asked_for_take_any_qemu_and_its_usual_device() -> None:
    for choice, qemu in ((None, OLD), ("kit", NEW)):
        found = equip(SPEC, choice, Events.REQUIRED, NOWHERE, delivery=DeliveryMode.PARKED)
        assert (found.qemu, found.image, found.device) == (qemu, DRIVER_IMAGE, ShareDevice.STOCK)
        assert found.delivery is DeliveryMode.PARKED


def test_what_was_asked_for_by_name_is_not_left_out_silently() -> None:
    with pytest.raises(VmError, match=r"cannot reach this guest: QEMU 7\.2\.0"):
        equip(SPEC, "system", Events.REQUIRED, NOWHERE, delivery=DeliveryMode.VIRTQUEUE)
    with pytest.raises(VmError, match="another server"):
        equip(SPEC, None, Events.REQUIRED, NOWHERE, obstacle="another server")


def test_without_a_driver_for_the_kernel_the_guest_boots_with_the_stock_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build_driver(*_: object) -> Path:
        raise VmError("there is no guest driver\nand more lines")

    monkeypatch.setattr(equipment, "build_driver", build_driver)
    found = equip(SPEC, None, Events.WHERE_POSSIBLE, NOWHERE)
    assert (found.qemu, found.image, found.device) == (OLD, STOCK_IMAGE, ShareDevice.STOCK)
    assert found.events_missing == "there is no guest driver"
