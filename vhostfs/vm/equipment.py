# SPDX-License-Identifier: Apache-2.0
"""What a launch is equipped with: QEMU, image and device, chosen so that host events can reach the guest.

Must not start anything, nor know how the server learns of events.
Specification: docs/guest.md, section on events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from vhostfs.share.options import DeliveryMode
from vhostfs.vm.cache import Progress, quiet
from vhostfs.vm.driver import build_driver
from vhostfs.vm.errors import VmError
from vhostfs.vm.image import Image, ImageSpec, build_image
from vhostfs.vm.kernel import find_kernel
from vhostfs.vm.machine import ShareDevice, queue_device
from vhostfs.vm.qemu import KIT, Qemu, find_qemu


class Events(Enum):
    """Whether the host's events are to reach the guest."""

    OFF = "off"
    WHERE_POSSIBLE = "where possible"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Equipment:
    """The parts of a launch, which fit each other."""

    qemu: Qemu
    image: Image
    device: ShareDevice
    events_missing: str | None
    """Why the host's events cannot reach the guest, for people; None: they can, if the server has any."""
    delivery: DeliveryMode = DeliveryMode.VIRTQUEUE
    """How they travel then; never AUTO."""
    queue_missing: str | None = None
    """PARKED: why it is not the notification queue."""


def equip(
    spec: ImageSpec,
    qemu_choice: str | None,
    events: Events,
    cache: Path,
    progress: Progress = quiet,
    *,
    delivery: DeliveryMode = DeliveryMode.AUTO,
    obstacle: str | None = None,
) -> Equipment:
    """Finds or makes QEMU and image for `spec` (its `driver` is decided here) and `--qemu qemu_choice`.

    `obstacle`: what the caller knows to stand in the way of events. Raises VmError, for REQUIRED also when
    the events cannot reach the guest.
    """
    if events is Events.OFF:
        return _without_events(spec, qemu_choice, "switched off", cache, progress)
    missing = obstacle
    if missing is None:
        try:
            return _with_events(spec, qemu_choice, delivery, cache, progress)
        except VmError as error:
            missing = str(error)
    if events is Events.REQUIRED:
        raise VmError(f"host events cannot reach this guest: {missing}")
    return _without_events(spec, qemu_choice, missing.splitlines()[0], cache, progress)


def _with_events(
    spec: ImageSpec, qemu_choice: str | None, delivery: DeliveryMode, cache: Path, progress: Progress
) -> Equipment:
    """Raises VmError when a part is missing."""
    # First what is quickly known.
    kernel = find_kernel(spec.kernel, cache, progress)
    wants_queue = delivery is not DeliveryMode.PARKED
    qemu = find_qemu(qemu_choice, cache, progress, notifications=wants_queue)
    queue_missing = None if wants_queue else "asked for by --delivery"
    device = queue_device(qemu) if wants_queue else None
    if wants_queue and device is None:
        queue_missing = (
            f"QEMU {qemu.version_text} does not pass VIRTIO_FS_F_NOTIFICATION (needs "
            f"{ShareDevice.PASS_THROUGH.value} of 10.1 or later, as --qemu {KIT}, or the patch)"
        )
        if delivery is DeliveryMode.VIRTQUEUE:
            raise VmError(queue_missing)
    build_driver(kernel, cache, progress)
    image = build_image(replace(spec, driver=True), cache, progress)
    if device is not None:
        return Equipment(qemu, image, device, None)
    return Equipment(qemu, image, ShareDevice.STOCK, None, DeliveryMode.PARKED, queue_missing)


def _without_events(
    spec: ImageSpec, qemu_choice: str | None, why: str, cache: Path, progress: Progress
) -> Equipment:
    image = build_image(replace(spec, driver=False), cache, progress)
    return Equipment(find_qemu(qemu_choice, cache, progress), image, ShareDevice.STOCK, why)
