# SPDX-License-Identifier: Apache-2.0
"""The virtual machine as data, and the QEMU command line that stands for it.

Must not start anything.
Specification: qemu-system-x86_64(1); QEMU docs/system/devices/vhost-user.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vhostfs.vm.errors import VmError
from vhostfs.vm.frames import PORT_NAME
from vhostfs.vm.image import Image
from vhostfs.vm.qemu import FS_DEVICE, QUEUE_PROPERTY, TEST_DEVICE, Qemu

_QUEUE_SIZE = 1024
_VIRTIO_ID_FS = 26
_FS_CONFIG_SIZE_WITH_NOTIFICATION = 44
# Of the test device: hiprio and notification beside the request queues.
_QUEUES_BESIDE_REQUESTS = 2


class Accelerator(Enum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class ShareDevice(Enum):
    """The device that QEMU puts before a share's server."""

    STOCK = FS_DEVICE
    """Of every QEMU; no notification queue."""
    QUEUE = f"{FS_DEVICE},{QUEUE_PROPERTY}=on"
    """The same with our patch: with the notification queue."""
    PASS_THROUGH = TEST_DEVICE
    """QEMU 10.1 and later: features and config space are the server's, the notification queue included."""

    def is_of(self, qemu: Qemu) -> bool:
        """`qemu` has it."""
        if self is ShareDevice.STOCK:
            return qemu.has_fs_device
        return qemu.has_queue_property if self is ShareDevice.QUEUE else qemu.has_test_device


def queue_device(qemu: Qemu) -> ShareDevice | None:
    """What passes the notification queue best with `qemu`, None when nothing does.

    The file system's own device before the one for tests: it has an interrupt for each queue.
    """
    return next((d for d in (ShareDevice.QUEUE, ShareDevice.PASS_THROUGH) if d.is_of(qemu)), None)


@dataclass(frozen=True, slots=True)
class Share:
    """A virtio-fs share of the guest."""

    tag: str
    """At most 36 bytes; what the guest mounts. With the notification queue the server must announce it."""
    socket_path: Path
    """Where the share's vhost-user server listens."""
    mount_point: str = "/share"
    """Absolute path in the guest, made and mounted before the first command; "" leaves it unmounted."""
    read_only: bool = False
    device: ShareDevice = ShareDevice.STOCK
    request_queues: int = 1
    queue_size: int = _QUEUE_SIZE
    properties: tuple[str, ...] = ()
    """More of the device's, as QEMU has them: indirect_desc=off."""


@dataclass(frozen=True, slots=True)
class Machine:
    """All that a launch needs to know."""

    qemu: Qemu
    image: Image
    accelerator: Accelerator
    shares: tuple[Share, ...] = ()
    memory_bytes: int = 1 << 30
    cpus: int = 1
    kernel_arguments: tuple[str, ...] = ()
    qemu_arguments: tuple[str, ...] = ()
    allow_reboot: bool = False
    """Else a guest that reboots ends."""


def kernel_command_line(machine: Machine) -> str:
    """The guest kernel's arguments; later ones win, the caller's come last."""
    words = ["console=ttyS0", "loglevel=5", "panic=-1", "no5lvl", "cryptomgr.notests"]
    if machine.accelerator is Accelerator.TCG:
        # What makes an emulated boot slow and protects nothing there.
        words += ["mitigations=off", "tsc=reliable", "no_timer_check"]
    return " ".join([*words, *machine.image.kernel_arguments, *machine.kernel_arguments])


def smallest_memory_bytes(image: Image) -> int:
    """What the image needs to boot: the kernel holds the initramfs twice for a moment."""
    return (256 << 20) + 2 * image.size_bytes


def qemu_command(machine: Machine, *, agent_fd: int, console_path: Path) -> list[str]:
    """The command that runs `machine`, its agent's port on the inherited socket `agent_fd`. Raises
    VmError."""
    least = smallest_memory_bytes(machine.image)
    if machine.memory_bytes < least:
        raise VmError(
            f"{machine.memory_bytes >> 20} MiB of memory are too little for this guest image, "
            f"it needs {(least + (1 << 20) - 1) >> 20} MiB"
        )
    size = f"{machine.memory_bytes >> 20}M"
    kvm = machine.accelerator is Accelerator.KVM
    # One thread for all emulated processors: with one each, a processor now and then runs a breakpoint that
    # another has already patched away, and the kernel dies of it (int3 in sched_clock_cpu, QEMU 7.2).
    command = [
        *machine.qemu.command,
        *("-name", "vhostfs"),
        *("-nodefaults", "-no-user-config"),
        *([] if machine.allow_reboot else ["-no-reboot"]),
        *("-display", "none"),
        *("-machine", "q35,memory-backend=mem"),
        *("-accel", "kvm" if kvm else "tcg,thread=single"),
        *("-cpu", "host" if kvm else "max"),
        *("-smp", str(machine.cpus)),
        *("-m", size),
        # The servers map the guest's memory, so it must be shared.
        *("-object", f"memory-backend-memfd,id=mem,size={size},share=on"),
        *("-kernel", str(machine.image.vmlinuz)),
        *("-initrd", str(machine.image.initrd)),
        *("-append", kernel_command_line(machine)),
        *("-chardev", f"file,id=console,path={_escaped(str(console_path))}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=agent,fd={agent_fd}"),
        *("-device", "virtio-serial-pci"),
        *("-device", f"virtserialport,chardev=agent,name={PORT_NAME}"),
    ]
    for number, share in enumerate(machine.shares):
        command += _share_arguments(machine.qemu, number, share)
    return [*command, *machine.qemu_arguments]


def _share_arguments(qemu: Qemu, number: int, share: Share) -> list[str]:
    if not 0 < len(share.tag.encode()) <= 36:
        raise VmError(f"the tag {share.tag!r} must have 1 to 36 bytes")
    if not share.device.is_of(qemu):
        raise VmError(
            f"QEMU {qemu.version_text} ({qemu.command[-1]}) has no {share.device.value}; try --qemu kit"
        )
    chardev = f"share{number}"
    if share.device is not ShareDevice.PASS_THROUGH:
        device = (
            f"{share.device.value},chardev={chardev},tag={_escaped(share.tag)},queue-size={share.queue_size},"
            f"num-request-queues={share.request_queues}"
        )
    else:
        device = (
            f"{TEST_DEVICE},chardev={chardev},virtio-id={_VIRTIO_ID_FS},vq_size={share.queue_size},"
            f"num_vqs={_QUEUES_BESIDE_REQUESTS + share.request_queues},"
            f"config_size={_FS_CONFIG_SIZE_WITH_NOTIFICATION}"
        )
    device = ",".join((device, *share.properties))
    path = _escaped(str(share.socket_path))
    return ["-chardev", f"socket,id={chardev},path={path}", "-device", device]


def _escaped(value: str) -> str:
    """`value` for use within a QEMU option, where a comma separates."""
    return value.replace(",", ",,")
