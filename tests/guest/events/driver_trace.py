# SPDX-License-Identifier: Apache-2.0
"""What the guest driver did and when, by the guest kernel's own tracing.

Must not know what is tested. Needs a kernel with CONFIG_KPROBE_EVENTS, as Debian's are.
Kernel documentation: trace/kprobetrace.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.limits import HANG_S
from vhostfs.vm.guest import Guest

_TRACING = "/sys/kernel/tracing"
_BUFFER_KIB = 4096
# Of struct fuse_in_header and struct vhostfs_event (vhostfs_internal.h), arguments of these functions.
_REQUEST = "opcode=+4({0}):u32 unique=+8({0}):u64 nodeid=+16({0}):x64"
_EVENT = "mask=+24(%dx):x32 nodeid=+0(%dx):x64 child=+8(%dx):x64 name=+40(%dx):string"
_PROBES = (
    "p:vhostfs/interrupt vhostfs_notify_received",
    f"p:vhostfs/look vhostfs_expire_caches {_EVENT}",
    "r:vhostfs/looked vhostfs_expire_caches",
    f"p:vhostfs/act vhostfs_invalidate {_EVENT}",
    "p:vhostfs/sent vhostfs_notify_sent " + _REQUEST.format("%si"),
    "p:vhostfs/answered vhostfs_notify_reply " + _REQUEST.format("%dx"),
    "p:vhostfs/set fuse_change_attributes inode=%di mtime=+32(%si):u64 nsec=+52(%si):u32",
    "r:vhostfs/been_set fuse_change_attributes",
)
"""Calls (p) and returns (r) of the driver's functions and the FUSE core's, and what is recorded (x86-64)."""
_RECORD = re.compile(
    r"^\s*(?P<task>.+)-(?P<pid>\d+)\s+\[(?P<cpu>\d+)\]\s+\S+\s+(?P<s>\d+)\.(?P<us>\d{6}): (?P<name>\w+): "
    r"\([^)]*\)\s*(?P<text>.*)$"
)


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """A call of one of the driver's functions, by the guest's CLOCK_MONOTONIC."""

    at_ns: int
    cpu: int
    task: str
    name: str
    text: str


class DriverTrace:
    """Records from now on; what is old is overwritten."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        lines = [
            f"test -e {_TRACING}/trace || mount -t tracefs tracefs {_TRACING}",
            f"cd {_TRACING}",
            "echo mono > trace_clock",
            f"echo {_BUFFER_KIB} > buffer_size_kb",
            *(f"echo '{probe}' >> kprobe_events" for probe in _PROBES),
            "echo 1 > events/vhostfs/enable",
            "echo 1 > tracing_on",
        ]
        self._run("\n".join(["set -e", *lines]))

    def _run(self, command: str) -> str:
        done = self._guest.run(command, HANG_S)
        if done.exit_status:
            raise AssertionError(f"the guest's kernel does not trace: {done.stderr.decode(errors='replace')}")
        return done.text

    def records(self) -> Iterator[TraceRecord]:
        """All that is kept, the oldest first, which are cleared."""
        # What is written meanwhile would get in the way of the reader.
        read = "echo 0 > tracing_on && cat trace && echo > trace && echo 1 > tracing_on"
        text = self._run(f"cd {_TRACING} && {read}")
        for line in text.splitlines():
            if found := _RECORD.match(line):
                at_ns = int(found["s"]) * 1_000_000_000 + int(found["us"]) * 1000
                yield TraceRecord(at_ns, int(found["cpu"]), found["task"], found["name"], found["text"])
