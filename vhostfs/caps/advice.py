# SPDX-License-Identifier: Apache-2.0
"""What would be better here: what was seen, what it costs, what to do. A pure function of what was probed.
Must not probe anything, or advise what would change nothing for a share.
Specification: docs/caps.md, "Advice"; docs/events.md for the costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..share.capabilities import Capability
from ..share.limits import DEFAULT_NOFILE
from ..share.options import EventsMode
from .directory import DirectoryProbe
from .limits import Limits
from .qemu import KvmProbe, QemuProbe
from .rights import Rights
from .servers import ServerProbe, socket_of

WANTED_WATCHES = 524_288
"""--max-watches by default: what a guest may watch."""
_NEARLY_FULL = 0.8
_IDENTITY = (Capability.SETUID, Capability.SETGID, Capability.CHOWN, Capability.DAC_OVERRIDE)


@dataclass(frozen=True, slots=True)
class Advice:
    """topic: directory, events, handles, identity, limits, qemu, kvm or delivery."""

    topic: str
    seen: str
    cost: str
    remedy: str

    def as_json(self) -> dict[str, Any]:
        return {"topic": self.topic, "seen": self.seen, "costs": self.cost, "do": self.remedy}


def advise(
    directory: DirectoryProbe,
    rights: Rights,
    limits: Limits,
    qemus: Sequence[QemuProbe],
    kvm: KvmProbe,
    servers: Sequence[ServerProbe],
    kernel: str,
) -> list[Advice]:
    """Most important first."""
    return [
        *_delivery(servers),
        *(
            _unreadable(directory, rights)
            or [*_events(directory, rights, kernel), *_handles(directory, rights)]
        ),
        *_identity(rights),
        *_limits(directory, limits, rights),
        *_qemu(qemus),
        *_kvm(kvm),
    ]


def _delivery(servers: Sequence[ServerProbe]) -> Iterator[Advice]:
    for server in servers:
        if server.told is None:
            yield Advice(
                "delivery",
                f"the server at {socket_of(server.control)} does not tell: {server.problem}",
                "what it has agreed on is not shown",
                "restart it with this version of vhostfs, or ask again when it is less busy",
            )
            continue
        delivery = server.told["delivery"]
        if server.told["vmm"] is None or delivery["chosen"] == "virtqueue":
            continue
        where = f"the guest of {socket_of(server.control)}"
        remedy = "a device that passes VIRTIO_FS_F_NOTIFICATION (docs/guest.md), where that matters"
        if "--delivery" in delivery["missing"]:
            remedy = "serve with --delivery=auto, where that matters"
        elif "--tag" in delivery["missing"]:
            remedy = "serve with --tag=TAG, and take a device that passes the queue (docs/guest.md)"
        if delivery["chosen"] == "parked":
            yield Advice(
                "delivery",
                f"{where} gets its events by parked requests: {delivery['missing']}",
                "nothing is missing, but up to an eighth of its request queue is taken by them",
                remedy,
            )
        else:
            yield Advice(
                "delivery",
                f"{where} gets no events: {delivery['missing']}",
                "watchers in the guest see only what the guest itself changes",
                "load the driver of qemu/guest in it, and serve with --events=auto --delivery=auto",
            )


def _unreadable(directory: DirectoryProbe, rights: Rights) -> list[Advice]:
    """What else was seen of such a directory means nothing."""
    if directory.readable.works:
        return []
    return [
        Advice(
            "directory",
            f"uid {rights.uid} may not read {directory.path}",
            "it cannot be shared",
            "start the server as a user who may, or share another directory",
        )
    ]


def _events(directory: DirectoryProbe, rights: Rights, kernel: str) -> Iterator[Advice]:
    filesystem = directory.sources[EventsMode.FANOTIFY_FILESYSTEM.value]
    if directory.chosen is None:
        yield Advice(
            "events",
            f"no source of events works here: {directory.reason}",
            "guests are not told of changes made on the host",
            "raise the limit that is named, or let the container's seccomp profile pass fanotify and inotify",
        )
        return
    if directory.chosen == EventsMode.FANOTIFY_INODES.value:
        if "CAP_SYS_ADMIN" not in filesystem.reason:
            remedy = "nothing, if few things are watched; else share a directory of another file system"
        elif rights.has(Capability.SYS_ADMIN) and rights.is_initial is False:
            remedy = "start the server outside of this user namespace, where CAP_SYS_ADMIN counts"
        else:
            remedy = "start the server as root or with CAP_SYS_ADMIN; it gives it up before a guest comes"
        yield Advice(
            "events",
            f"the file system cannot be marked as a whole: {filesystem.reason}",
            "a mark for each watched file or directory, about 1 kB of the host's memory each, within "
            "fanotify.max_user_marks",
            remedy,
        )
    elif directory.chosen == EventsMode.INOTIFY.value:
        why = directory.sources[EventsMode.FANOTIFY_INODES.value].reason
        handles = not directory.event_handles.works
        yield Advice(
            "events",
            f"fanotify cannot be used here: {why}",
            "inotify does not say who made a change: now and then one of the guest's own comes back",
            f"share a directory of a file system with file handles; {directory.file_system} has none"
            if handles
            else f"Linux 5.13 or later, or rights as root outside of containers; this is {kernel}",
        )
    marked = directory.fanotify.filesystem_events if filesystem.works else directory.fanotify.inode_events
    if directory.chosen != EventsMode.INOTIFY.value and not marked["FAN_RENAME"].works:
        yield Advice(
            "events",
            f"no FAN_RENAME: {marked['FAN_RENAME'].reason}",
            "the halves of a rename are joined by inotify's cookie, where both directories are watched",
            f"Linux 5.17 or later; this is {kernel}",
        )
    target = directory.fanotify.init["FAN_REPORT_TARGET_FID"]
    if directory.chosen != EventsMode.INOTIFY.value and not target.works:
        yield Advice(
            "events",
            f"no FAN_REPORT_TARGET_FID: {target.reason}",
            "events of entries come without the object that is meant",
            f"Linux 5.17 or later; this is {kernel}",
        )


def _handles(directory: DirectoryProbe, rights: Rights) -> Iterator[Advice]:
    if directory.reopen.works:
        return
    if not directory.encode.works:
        seen = f"{directory.file_system} gives no file handles: {directory.encode.reason}"
        remedy = "raise --rlimit-nofile where guests hold many files, or share another file system"
    else:
        seen = f"file handles cannot be opened: {directory.reopen.reason}"
        remedy = "start the server as root or with CAP_DAC_READ_SEARCH"
        if rights.has(Capability.DAC_READ_SEARCH) and rights.is_initial is False:
            remedy = "start the server outside of this user namespace, where CAP_DAC_READ_SEARCH counts"
    yield Advice("handles", seen, "a descriptor for each file or directory that the guest holds", remedy)


def _identity(rights: Rights) -> Iterator[Advice]:
    lacking = [f"CAP_{each.name}" for each in _IDENTITY if not rights.has(each)]
    if lacking:
        yield Advice(
            "identity",
            f"no {', '.join(lacking)}",
            f"what the guest makes belongs to uid {rights.uid}, and only what that user may reach is served",
            "start the server as root, or map ids with --uid-map and --gid-map",
        )


def _limits(directory: DirectoryProbe, limits: Limits, rights: Rights) -> Iterator[Advice]:
    watches = limits.limits["inotify.max_user_watches"]
    if watches.value is not None and watches.value < WANTED_WATCHES:
        yield Advice(
            "limits",
            f"inotify.max_user_watches is {watches.value}",
            f"a guest may watch {WANTED_WATCHES} files and directories, and each takes one, or two; beyond "
            "the limit the order of events may suffer, and with inotify as the source they are not told",
            f"sysctl fs.inotify.max_user_watches={2 * WANTED_WATCHES}",
        )
    marks = limits.limits["fanotify.max_user_marks"]
    is_marked = directory.chosen == EventsMode.FANOTIFY_INODES.value
    if (
        is_marked
        and not directory.fanotify.init["FAN_UNLIMITED_MARKS"].works
        and marks.value is not None
        and marks.value < WANTED_WATCHES
    ):
        yield Advice(
            "limits",
            f"fanotify.max_user_marks is {marks.value}",
            f"a guest may watch {WANTED_WATCHES} files and directories, and each takes one",
            f"sysctl fs.fanotify.max_user_marks={WANTED_WATCHES}",
        )
    for name, limit in limits.limits.items():
        if limit.value and limit.used is not None and limit.used >= _NEARLY_FULL * limit.value:
            yield Advice(
                "limits",
                f"{name}: {limit.used} of {limit.value} are in use by uid {rights.uid}",
                "servers that are started now may find none left",
                f"sysctl fs.{name}={2 * limit.value}",
            )
    most = max(limits.nofile_hard, limits.nofile_soft)
    if (
        most < DEFAULT_NOFILE
        and not rights.has(Capability.SYS_RESOURCE)
        and not directory.reopen.works  # with handles descriptors do not run out
    ):
        yield Advice(
            "limits",
            f"at most {most} files may be open, and there is no CAP_SYS_RESOURCE to raise that",
            f"a guest can hold no more than about {most * 2 // 3} files and directories",
            "ulimit -Hn, or LimitNOFILE= in the unit that starts the server",
        )


def _qemu(qemus: Sequence[QemuProbe]) -> Iterator[Advice]:
    usable = [probe for probe in qemus if probe.problem is None]
    if not usable:
        yield Advice(
            "qemu",
            "; ".join(f"{probe.path}: {probe.problem}" for probe in qemus) or "no QEMU for x86-64 guests",
            "`vhostfs run` has to fetch one",
            "apt install qemu-system-x86, or let `vhostfs run --qemu kit` fetch a recent one",
        )
    elif not any(probe.passes_by for probe in usable):
        newest = max(usable, key=lambda probe: [int(part) for part in (probe.version or "0").split(".")])
        yield Advice(
            "qemu",
            f"no QEMU here passes VIRTIO_FS_F_NOTIFICATION; the newest is {newest.version}",
            "events travel by parked requests, which takes up to an eighth of a request queue",
            "QEMU 10.1 or later (vhost-user-test-device-pci), or vhost-user-fs-pci with the patch "
            "(scripts/qemu-patched); `vhostfs run --qemu kit` fetches one",
        )


def _kvm(kvm: KvmProbe) -> Iterator[Advice]:
    cost = "guests are emulated, several times slower"
    if not kvm.opened.works:
        missing = kvm.opened.error_name in ("ENOENT", "ENXIO", "ENODEV")
        yield Advice(
            "kvm",
            f"/dev/kvm: {kvm.opened.reason}",
            cost,
            "switch virtualisation on in the firmware, or in the VM that this is"
            if missing
            else "join the group kvm, or pass /dev/kvm to the container",
        )
    elif kvm.guest_problem:
        yield Advice(
            "kvm",
            f"/dev/kvm is there, but a guest did not run: {kvm.guest_problem}",
            cost,
            "look at nested virtualisation; `vhostfs run --accel kvm` tries again",
        )
