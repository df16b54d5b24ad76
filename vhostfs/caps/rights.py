# SPDX-License-Identifier: Apache-2.0
"""The rights of this process, and what each of them would buy a server that is started like it.
Must not use or change any of them.
Specification: capabilities(7), capget(2), user_namespaces(7), proc_pid_status(5)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..share.capabilities import Capability

_INITIAL_USER_NAMESPACE = 0xEFFF_FFFD  # PROC_USER_INIT_INO in linux/proc_ns.h
_CAPABILITY_VERSION_3 = 0x20080522
_PR_CAPBSET_READ = 23
_SECCOMP = {"0": "off", "1": "strict", "2": "filter"}

BUYS: Mapping[Capability, str] = {
    Capability.SYS_ADMIN: "one fanotify mark for the whole file system, without limits",
    Capability.DAC_READ_SEARCH: "inodes kept as file handles instead of a descriptor each",
    Capability.SYS_RESOURCE: "more open files than the hard limit",
    Capability.SETUID: "files that belong to the guest's users",
    Capability.SETGID: "files that belong to the guest's groups",
    Capability.CHOWN: "chown in the guest",
    Capability.DAC_OVERRIDE: "the guest's root reaches every file",
    Capability.FOWNER: "chmod and utimes of files of other users in the guest",
    Capability.FSETID: "set-group-id bits as on a local file system",
    Capability.MKNOD: "device nodes made in the guest",
    Capability.SETFCAP: "file capabilities set in the guest",
    Capability.SYS_CHROOT: "--sandbox=chroot",
}
"""What a server does with each; most important first."""


@dataclass(frozen=True, slots=True)
class Rights:
    """effective, bounding: bit = capability number. is_initial: they hold for the whole machine; None:
    nobody can tell, for there is no /proc."""

    uid: int
    gid: int
    effective: int
    bounding: int
    is_initial: bool | None
    seccomp: str
    no_new_privs: bool

    def has(self, capability: Capability) -> bool:
        return bool(self.effective >> capability & 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "gid": self.gid,
            "initial_user_namespace": self.is_initial,
            "seccomp": self.seccomp,
            "no_new_privs": self.no_new_privs,
            "capabilities": {
                f"CAP_{capability.name}": {
                    "effective": self.has(capability),
                    "bounding": bool(self.bounding >> capability & 1),
                    "buys": text,
                }
                for capability, text in BUYS.items()
            },
        }


def probe_rights() -> Rights:
    """Of this process; what cannot be read counts as absent."""
    fields = _status_fields()
    is_initial = None
    with contextlib.suppress(OSError):
        is_initial = os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    return Rights(
        os.geteuid(),
        os.getegid(),
        _effective(),
        _bounding(),
        is_initial,
        _SECCOMP.get(fields.get("Seccomp", ""), "unknown"),
        fields.get("NoNewPrivs") == "1",
    )


def _effective() -> int:
    """By capget(2), which needs no /proc."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capget(header, data):
        return 0
    # Two times effective, permitted, inheritable: the low words, then the high ones.
    return int(data[0] | data[3] << 32)


def _bounding() -> int:
    prctl = ctypes.CDLL(None).prctl
    return sum(1 << each for each in Capability if prctl(_PR_CAPBSET_READ, int(each), 0, 0, 0) == 1)


def _status_fields() -> dict[str, str]:
    try:
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
