# SPDX-License-Identifier: Apache-2.0
"""Owns the names and numbers of Linux capabilities and the text form of --modcaps.
Must not change any process (sandbox.py does).
Specification: capabilities(7), linux/capability.h; --modcaps of virtiofsd(1)."""

from __future__ import annotations

import enum

from ..record import Record


class CapabilityError(ValueError):
    """A --modcaps that cannot be understood."""


class Capability(enum.IntEnum):
    """Capability numbers (linux/capability.h), without their CAP_."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    LINUX_IMMUTABLE = 9
    NET_BIND_SERVICE = 10
    NET_BROADCAST = 11
    NET_ADMIN = 12
    NET_RAW = 13
    IPC_LOCK = 14
    IPC_OWNER = 15
    SYS_MODULE = 16
    SYS_RAWIO = 17
    SYS_CHROOT = 18
    SYS_PTRACE = 19
    SYS_PACCT = 20
    SYS_ADMIN = 21
    SYS_BOOT = 22
    SYS_NICE = 23
    SYS_RESOURCE = 24
    SYS_TIME = 25
    SYS_TTY_CONFIG = 26
    MKNOD = 27
    LEASE = 28
    AUDIT_WRITE = 29
    AUDIT_CONTROL = 30
    SETFCAP = 31
    MAC_OVERRIDE = 32
    MAC_ADMIN = 33
    SYSLOG = 34
    WAKE_ALARM = 35
    BLOCK_SUSPEND = 36
    AUDIT_READ = 37
    PERFMON = 38
    BPF = 39
    CHECKPOINT_RESTORE = 40


# What acting for the guest's users takes; the set that virtiofsd keeps.
SERVER_CAPABILITIES = frozenset(
    {
        Capability.CHOWN,
        Capability.DAC_OVERRIDE,
        Capability.FOWNER,
        Capability.FSETID,
        Capability.SETGID,
        Capability.SETUID,
        Capability.MKNOD,
        Capability.SETFCAP,
    }
)


class CapabilityChanges(Record):
    """--modcaps: kept besides, or dropped from, the server's own set."""

    added: frozenset[Capability] = frozenset()
    removed: frozenset[Capability] = frozenset()


NO_CHANGES = CapabilityChanges()


def parse_modcaps(text: str) -> CapabilityChanges:
    """`+sys_admin:-chown`; a later word about the same capability wins. CapabilityError."""
    added: set[Capability] = set()
    removed: set[Capability] = set()
    for word in text.split(":"):
        sign, name = word[:1], word[1:].upper().removeprefix("CAP_")
        if sign not in ("+", "-"):
            raise CapabilityError(f"'{word}': expected +NAME or -NAME, joined by ':' (+sys_admin:-chown)")
        capability = Capability.__members__.get(name)
        if capability is None:
            import difflib  # for mistakes alone

            near = difflib.get_close_matches(name, Capability.__members__, n=1)
            hint = f"; did you mean '{near[0].lower()}'?" if near else "; see capabilities(7)"
            raise CapabilityError(f"'{word[1:]}' is no capability{hint}")
        (added if sign == "+" else removed).add(capability)
        (removed if sign == "+" else added).discard(capability)
    return CapabilityChanges(frozenset(added), frozenset(removed))


def capability_mask(capabilities: frozenset[Capability]) -> int:
    """Bit = capability number, as native/api.h takes it."""
    return sum(1 << capability for capability in capabilities)
