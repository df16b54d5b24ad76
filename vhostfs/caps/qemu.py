# SPDX-License-Identifier: Apache-2.0
"""The QEMUs of this machine, asked by their own monitor as libvirt asks them, and whether KVM can be used.
Must not run a guest, fetch a QEMU or load its devices: -machine none, and properties are listed.
Specification: QEMU qapi (query-version, device-list-properties); Linux Documentation/virt/kvm/api.rst."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vm.accel import kvm_record
from ..vm.qemu import FS_DEVICE, PROGRAM, QUEUE_PROPERTY, TEST_DEVICE, installed_qemus, kept_commands
from .outcome import Outcome

QEMU_TIMEOUT_S = 20.0
DEVICES = (FS_DEVICE, TEST_DEVICE)
_ARGUMENTS = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")
_KVM_GET_API_VERSION = 0xAE00
_KVM = "/dev/kvm"


@dataclass(frozen=True, slots=True)
class QemuProbe:
    """is_kept: in the cache of `vhostfs run`. properties: of each of DEVICES that this QEMU has. problem: why
    it could not be asked."""

    path: str
    is_kept: bool
    version: str | None = None
    package: str | None = None
    properties: Mapping[str, frozenset[str]] | None = None
    problem: str | None = None

    def has(self, device: str) -> bool:
        return self.properties is not None and device in self.properties

    @property
    def has_patch(self) -> bool:
        """Whether its usual device has the property of the patch in qemu/."""
        return self.properties is not None and QUEUE_PROPERTY in self.properties.get(FS_DEVICE, ())

    @property
    def passes_by(self) -> str | None:
        """The device that passes VIRTIO_FS_F_NOTIFICATION, the usual one first."""
        if self.has_patch:
            return FS_DEVICE
        return TEST_DEVICE if self.has(TEST_DEVICE) else None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "is_kept": self.is_kept,
            "version": self.version,
            "package": self.package,
            "devices": {device: self.has(device) for device in DEVICES},
            "notification_property": self.has_patch,
            "passes_notifications_by": self.passes_by,
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """opened: /dev/kvm by this user. guest_problem: of a guest that was tried since this boot; "" none, None:
    not tried."""

    opened: Outcome
    api_version: int | None
    guest_problem: str | None

    def as_json(self) -> dict[str, Any]:
        return {
            "device": _KVM,
            "open": self.opened.as_json(),
            "api_version": self.api_version,
            "guest_tried": self.guest_problem is not None,
            "guest_problem": self.guest_problem or None,
        }


def start_probes(cache: Path | None) -> list[tuple[QemuProbe, subprocess.Popen[str] | None]]:
    """Starts all QEMUs there are, side by side; ended by finish_probes()."""
    found: list[tuple[str, bool, Sequence[str]]] = [
        (str(path), False, (str(path),)) for path in installed_qemus()
    ]
    for command in [] if cache is None else kept_commands(cache):
        found.append((next(word for word in command if word.endswith(PROGRAM)), True, command))
    return [(QemuProbe(path, is_kept), _start(command)) for path, is_kept, command in found]


def finish_probes(started: list[tuple[QemuProbe, subprocess.Popen[str] | None]]) -> list[QemuProbe]:
    """What each of them said."""
    return [_finish(probe, process) for probe, process in started]


def _start(command: Sequence[str]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(
            [*command, *_ARGUMENTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError:
        return None


def _finish(probe: QemuProbe, process: subprocess.Popen[str] | None) -> QemuProbe:
    if process is None:
        return QemuProbe(probe.path, probe.is_kept, problem="it cannot be started")
    commands: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}]
    commands += [
        {"execute": "device-list-properties", "id": device, "arguments": {"typename": device}}
        for device in DEVICES
    ]
    commands.append({"execute": "quit"})
    try:
        out, err = process.communicate("".join(json.dumps(each) + "\n" for each in commands), QEMU_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return QemuProbe(probe.path, probe.is_kept, problem=f"no answer within {QEMU_TIMEOUT_S:g} s")
    return parse_answers(probe.path, probe.is_kept, out, err)


def parse_answers(path: str, is_kept: bool, out: str, err: str = "") -> QemuProbe:
    """From what QEMU's monitor said: a greeting, then answers by the name of the device."""
    version = package = None
    properties: dict[str, frozenset[str]] = {}
    for message in _messages(out):
        match message:
            case {"QMP": {"version": {"qemu": {"major": major, "minor": minor, "micro": micro}, **rest}}}:
                version, package = f"{major}.{minor}.{micro}", str(rest.get("package") or "") or None
            case {"id": str(device), "return": list(entries)}:
                properties[device] = frozenset(
                    str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry
                )
    if version is None:
        said = err.strip().splitlines() or ["nothing was said"]
        return QemuProbe(path, is_kept, problem=f"its monitor does not greet: {said[-1][:200]}")
    return QemuProbe(path, is_kept, version, package, properties)


def _messages(out: str) -> list[Any]:
    messages = []
    for line in out.splitlines():
        try:
            messages.append(json.loads(line))
        except ValueError:
            continue
    return messages


def probe_kvm(cache: Path | None) -> KvmProbe:
    """Opens /dev/kvm; makes no machine."""
    known = None if cache is None else kvm_record(cache)
    try:
        fd = os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return KvmProbe(Outcome.of(-(error.errno or errno.EIO)), None, known)
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return KvmProbe(Outcome.of(-(error.errno or errno.EIO)), None, known)
    finally:
        os.close(fd)
    return KvmProbe(Outcome(0), version, known)
