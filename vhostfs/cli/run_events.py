# SPDX-License-Identifier: Apache-2.0
"""The one line of `vhostfs run` about events: where they come from, how they travel, what a better way lacks.
Must not choose anything: QEMU and device are equipment's, the rest is what the server has agreed on.
Specification: docs/caps.md, "The one line"."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vhostfs.control.client import ControlClient
from vhostfs.errors import UserError
from vhostfs.share.options import CONTROL_SUFFIX
from vhostfs.vm.equipment import Equipment

_DRIVER_TIMEOUT_S = 15.0


def events_line(wanted: str, equipment: Equipment, socket_path: Path) -> str:
    """wanted: the value of --events. socket_path: of the main share's server, whose guest has mounted it."""
    if wanted == "off":
        return "events: off"
    missing = equipment.events_missing
    if missing is None:
        try:
            told = _told_once_agreed(socket_path)
        except UserError as error:
            return f"events: the server does not say which ({error})"
        line, missing = delivered(told, equipment.queue_missing)
        if line is not None:
            return line
    return f"events: none, watchers in the guest see only its own changes ({missing})"


def delivered(told: Mapping[str, Any], queue_missing: str | None) -> tuple[str | None, str]:
    """The line for a message `negotiated`, or None and why there are no events.

    queue_missing: why the notification queue was not even tried; it says more than the server can know.
    """
    delivery, reason = told["delivery"], told["source"]["reason"]
    match delivery["chosen"]:
        case "virtqueue":
            return f"events: {reason}; delivered by the notification queue", ""
        case "parked":
            why = queue_missing or delivery["missing"]
            return f"events: {reason}; delivered by parked requests: {why}", ""
    return None, str(delivery["missing"])


def _told_once_agreed(socket_path: Path) -> Mapping[str, Any]:
    """What the server says once the guest's driver has asked for events; the mount does not wait."""
    deadline_s = time.monotonic() + _DRIVER_TIMEOUT_S
    with ControlClient(f"{socket_path}{CONTROL_SUFFIX}") as control:
        while not (told := control.negotiated())["fsnotify"] and time.monotonic() < deadline_s:
            time.sleep(0.02)
    return told
