# SPDX-License-Identifier: Apache-2.0
"""Puts all probes together, and owns the JSON form of the whole.
Must not know how people are shown it.
Specification: docs/caps.md, "For programs"."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..vm.cache import cache_place
from . import qemu, servers
from .advice import Advice, advise
from .directory import DirectoryProbe, probe_directory
from .limits import Limits, probe_limits
from .rights import Rights, probe_rights

FORMAT = 1
"""Grows when a key is taken away or means something else; keys may be added without."""


@dataclass(frozen=True, slots=True)
class HostReport:
    """Everything that was found out."""

    kernel: str
    machine: str
    directory: DirectoryProbe
    rights: Rights
    limits: Limits
    qemus: Sequence[qemu.QemuProbe]
    kvm: qemu.KvmProbe
    servers: Sequence[servers.ServerProbe]

    @property
    def advice(self) -> list[Advice]:
        return advise(
            self.directory, self.rights, self.limits, self.qemus, self.kvm, self.servers, self.kernel
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "vhostfs": __version__,
            "format": FORMAT,
            "kernel": {"release": self.kernel, "machine": self.machine},
            "directory": self.directory.as_json(),
            "rights": self.rights.as_json(),
            "limits": self.limits.as_json(),
            "qemu": [probe.as_json() for probe in self.qemus],
            "kvm": self.kvm.as_json(),
            "servers": [probe.as_json() for probe in self.servers],
            "advice": [advice.as_json() for advice in self.advice],
        }


def gather(directory: str | None, control: str | None) -> HostReport:
    """
    All probes, in well under a second on an idle machine.

    directory: None: that of the server at control, or the current one. control: ask this server; None: those
    found. Raises UserError for a directory or server that was named and cannot be asked.
    """
    named = None if control is None else servers.ask_server(control)
    cache = _cache()
    started = qemu.start_probes(cache)
    try:
        place = directory
        if place is None and named is not None and named.shared_dir and os.path.isdir(named.shared_dir):
            place = named.shared_dir
        probed = probe_directory(place or ".")
        rights, limits, kvm = probe_rights(), probe_limits(), qemu.probe_kvm(cache)
        asked = (
            servers.ask_running_servers(None if directory is None else probed.path)
            if named is None
            else [named]
        )
    except OSError as error:
        raise UserError(f"this host cannot be looked at: {error.strerror or error} (ulimit -n?)") from None
    finally:
        qemus = qemu.finish_probes(started)
    system = os.uname()
    return HostReport(system.release, system.machine, probed, rights, limits, qemus, kvm, asked)


def _cache() -> Path | None:
    try:
        return cache_place()
    except RuntimeError:  # a user without a home
        return None
