# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor, and a share that is plugged in and taken away through it while the guest runs.

Must not know what is on the share. Specification: QEMU docs/interop/qmp-spec.rst; docs/guest.md.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.limits import HANG_S
from vhostfs.vm.machine import ShareDevice
from vhostfs.vm.qemu import FS_DEVICE, QUEUE_PROPERTY, TEST_DEVICE

PORT = "port0"
QUEUE_SIZE = 64
"""Of each queue of the share: small, so that it can be filled."""


def arguments(socket_path: Path) -> tuple[str, ...]:
    """For QEMU's command line: a monitor, and a slot that a device can be plugged into."""
    slot = f"pcie-root-port,id={PORT},chassis=1"
    return ("-qmp", f"unix:{socket_path},server=on,wait=off", "-device", slot)


class Monitor:
    """A connection to a monitor."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(HANG_S)
        self._socket.connect(str(socket_path))
        self._stream = self._socket.makefile("rwb")
        assert "QMP" in self._message()
        self._deleted: set[str] = set()
        self.execute("qmp_capabilities")

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._stream.readline())
        if message.get("event") == "DEVICE_DELETED":
            self._deleted.add(message["data"].get("device", ""))
        return message

    def _answer(self, command: str, values: dict[str, object]) -> dict[str, Any]:
        line = json.dumps({"execute": command, "arguments": values})
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        while "event" in (answer := self._message()):
            pass
        return answer

    def execute(self, command: str, **values: object) -> None:
        """Runs a command; arguments as QEMU calls them, with underscores where it has them."""
        answer = self._answer(command, values)
        assert "return" in answer, f"{command} {values}: {answer}"

    def refusal(self, command: str, **values: object) -> str:
        """Why QEMU does not do it."""
        answer = self._answer(command, values)
        assert "error" in answer, f"{command} {values} was done"
        return str(answer["error"]["desc"])

    def plug(self, socket_path: Path, kind: ShareDevice) -> None:
        """A share whose server listens there, and says that it is called "share"."""
        self.connect(socket_path)
        self.add(kind)

    def connect(self, socket_path: Path) -> None:
        """The share's character device."""
        address = {"type": "unix", "data": {"path": str(socket_path)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        self.execute("chardev-add", id="share0", backend=backend)

    def add(self, kind: ShareDevice, refusal: str | None = None) -> None:
        """The device of a share whose character device is there; with `refusal`, QEMU says that and no."""
        device = {"driver": TEST_DEVICE, "id": "share0", "bus": PORT, "chardev": "share0"}
        options: dict[str, object] = {
            "virtio-id": 26,
            "num_vqs": 3,
            "vq_size": QUEUE_SIZE,
            "config_size": 44,
        }
        if kind is not ShareDevice.PASS_THROUGH:
            device["driver"] = FS_DEVICE
            options = {"tag": "share", "queue-size": QUEUE_SIZE}
        if kind is ShareDevice.QUEUE:
            options[QUEUE_PROPERTY] = "on"
        if refusal is None:
            self.execute("device_add", **device, **options)
        else:
            assert refusal in self.refusal("device_add", **device, **options)

    def unplug(self) -> None:
        """Takes the share away; returns when the guest has let it go."""
        self.delete()
        self.execute("chardev-remove", id="share0")

    def delete(self) -> None:
        """Takes the share's device alone away."""
        self._deleted.discard("share0")
        self.execute("device_del", id="share0")
        while "share0" not in self._deleted:
            self._message()

    def close(self) -> None:
        """Leaves QEMU alone."""
        self._stream.close()
        self._socket.close()
