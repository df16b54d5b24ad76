# SPDX-License-Identifier: Apache-2.0
"""Finds a QEMU on this machine, or provides one: a recent Debian build that runs beside any host's own
libraries.

Must not know how a guest is put together.
Specification: docs/guest.md; qemu/README.md; QEMU docs/system/devices/vhost-user.rst for the devices.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vhostfs.vm.cache import Progress, locked, published_directory, quiet
from vhostfs.vm.debian import Release, open_root, package_files
from vhostfs.vm.errors import VmError

KIT = "kit"
"""The value of --qemu that asks for the provided QEMU whatever the machine has."""
SYSTEM = "system"
"""The value of --qemu that asks for the machine's own."""
PATCHED = "patched"
"""The value of --qemu that asks for the one that scripts/qemu-patched has built."""
FS_DEVICE = "vhost-user-fs-pci"
TEST_DEVICE = "vhost-user-test-device-pci"
QUEUE_PROPERTY = "notification"
"""Of FS_DEVICE, where QEMU has our patch."""
PROGRAM = "qemu-system-x86_64"
"""Its name."""
_PLACES = ("/usr/local/bin", "/usr/bin", "/opt/qemu/bin", "/usr/libexec")
_FIRST_WITH_TEST_DEVICE = (10, 1, 0)
_FIRST_WITH_FS_DEVICE = (4, 2, 0)
_FIRMWARE = frozenset({"bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin"})
_KIT_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that can run a guest."""

    command: tuple[str, ...]
    """What to put before QEMU's own options."""
    version: tuple[int, int, int]
    has_fs_device: bool
    """vhost-user-fs-pci: a virtio-fs device without the notification queue."""
    has_test_device: bool
    """vhost-user-test-device-pci: passes any feature of the back end, the notification queue's too."""
    is_kit: bool
    has_queue_property: bool = False
    """vhost-user-fs-pci has the property `notification` of our patch: it passes the queue when asked to."""

    @property
    def passes_queue(self) -> bool:
        """Some device passes the notification queue."""
        return self.has_queue_property or self.has_test_device

    @property
    def version_text(self) -> str:
        """As people write it."""
        return ".".join(str(number) for number in self.version)


def find_qemu(
    choice: str | None, cache: Path, progress: Progress = quiet, *, notifications: bool = False
) -> Qemu:
    """The QEMU for `--qemu choice`.

    None: the newest of the machine that has a virtio-fs device, for `notifications` one that passes the
    notification queue, else the kit. "kit": the kit. "system": the machine's own or an error. "patched": the
    one with our patch, if it was built. Anything else is a path or name of a QEMU. A choice is followed even
    if that QEMU passes no notifications. Raises VmError.
    """
    if choice == KIT:
        return provide_kit(cache, progress)
    if choice == PATCHED:
        return find_patched(cache)
    if choice is not None and choice != SYSTEM:
        found = shutil.which(choice)
        if found is None:
            raise VmError(
                f"--qemu {choice}: no such program; give the path of a {PROGRAM}, '{SYSTEM}', '{KIT}' or "
                f"'{PATCHED}'"
            )
        return inspect_qemu(Path(found))
    candidates = []
    for path in installed_qemus():
        try:
            candidates.append(inspect_qemu(path))
        except VmError:
            continue
    usable = [qemu for qemu in candidates if qemu.has_fs_device]
    if notifications and choice is None:
        usable = [qemu for qemu in usable if qemu.passes_queue]
    if usable:
        return max(usable, key=lambda qemu: qemu.version)
    if choice == SYSTEM:
        raise VmError(
            f"no {PROGRAM} with vhost-user-fs-pci is installed; install qemu-system-x86 or use --qemu {KIT}"
        )
    return provide_kit(cache, progress)


def installed_qemus() -> list[Path]:
    """The QEMUs for x86-64 guests in PATH and the usual places, each once."""
    found = [shutil.which(PROGRAM), *(shutil.which(PROGRAM, path=place) for place in _PLACES)]
    return list(dict.fromkeys(Path(path).resolve() for path in found if path))


def inspect_qemu(path: Path) -> Qemu:
    """What the QEMU at `path` is. Raises VmError when it does not run or is not QEMU."""
    return inspect_command((str(path),))


def inspect_command(command: tuple[str, ...]) -> Qemu:
    """What the QEMU that is run by `command` is. Raises VmError when it does not run or is not QEMU."""
    said = _ask(command, "-version")
    try:
        version = parse_version(said)
    except VmError as error:
        raise VmError(f"{command[0]} is no QEMU: {error}") from None
    devices = parse_devices(_ask(command, "-device", "help"))
    has_fs_device = FS_DEVICE in devices
    return Qemu(
        command,
        version,
        has_fs_device,
        TEST_DEVICE in devices,
        is_kit=False,
        has_queue_property=has_fs_device and _has_queue_property(command),
    )


def _has_queue_property(command: tuple[str, ...]) -> bool:
    return QUEUE_PROPERTY in parse_properties(_ask(command, "-device", f"{FS_DEVICE},help"))


def parse_version(text: str) -> tuple[int, int, int]:
    """The version in the output of `-version`; VmError when there is none."""
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise VmError(f"expected 'QEMU emulator version', saw {text.strip()[:80]!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def parse_devices(text: str) -> frozenset[str]:
    """The device names in the output of `-device help`."""
    return frozenset(re.findall(r'^name "([^"]+)"', text, re.MULTILINE))


def parse_properties(text: str) -> frozenset[str]:
    """The property names in the output of `-device DEVICE,help`."""
    return frozenset(re.findall(r"^\s*([A-Za-z0-9_-]+)=<", text, re.MULTILINE))


def _ask(command: tuple[str, ...], *arguments: str) -> str:
    try:
        done = subprocess.run(
            [*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VmError(f"{command[0]} {arguments[0]} did not work: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise VmError(f"{command[0]} {arguments[0]} did not work: {said}")
    return done.stdout


def provide_kit(cache: Path, progress: Progress = quiet) -> Qemu:
    """A QEMU of Debian's trixie-backports, fetched once, run by its own loader with its own libraries.

    Nothing is installed and the host's libraries are not used. Raises VmError.
    """
    folder = cache / "qemu" / f"kit-{_KIT_FORMAT}"
    if not folder.is_dir():
        with locked(cache / "qemu" / "lock", progress):
            if not folder.is_dir():
                debs = open_root(Release.TRIXIE, cache, progress).resolve(
                    ["qemu-system-x86/trixie-backports"]
                )
                progress("unpacking QEMU")
                with published_directory(folder) as fresh:
                    for part in ("lib", "share"):
                        (fresh / part).mkdir()
                    for deb in debs:
                        _take_kit_files(deb, fresh)
                    for needed in (PROGRAM, "ld-linux-x86-64.so.2", *(f"share/{name}" for name in _FIRMWARE)):
                        if not (fresh / needed).exists():
                            raise VmError(f"Debian's QEMU packages came without {needed}; use --qemu PATH")
                    _ask(self_contained_command(fresh), "-version")
    command = self_contained_command(folder)
    # Not asked for its devices: that makes QEMU load every module of the host's /usr/lib, made for another
    # QEMU.
    version = parse_version(_ask(command, "-version"))
    return Qemu(
        command, version, version >= _FIRST_WITH_FS_DEVICE, version >= _FIRST_WITH_TEST_DEVICE, is_kit=True
    )


def find_patched(cache: Path) -> Qemu:
    """The newest QEMU with our patch among those that were built. Raises VmError when there is none."""
    built = [
        inspect_command(self_contained_command(folder))
        for folder in sorted((cache / "qemu").glob(f"{PATCHED}-*"))
        if (folder / PROGRAM).exists()
    ]
    if not built:
        raise VmError(
            f"--qemu {PATCHED}: none has been built; scripts/qemu-patched does it (ten minutes, once)"
        )
    return max(built, key=lambda qemu: qemu.version)


def kept_commands(cache: Path) -> list[tuple[str, ...]]:
    """What runs those that are in the cache already, the kit and those with our patch; fetches nothing."""
    try:
        patched = sorted((cache / "qemu").glob(f"{PATCHED}-*"))
    except OSError:
        patched = []  # somebody else's cache, as after `su`
    folders = [cache / "qemu" / f"kit-{_KIT_FORMAT}", *patched]
    return [self_contained_command(folder) for folder in folders if os.path.isfile(folder / PROGRAM)]


def self_contained_command(folder: Path) -> tuple[str, ...]:
    """What runs the QEMU in `folder` by the loader, with the libraries and the firmware beside it."""
    loader = (str(folder / "ld-linux-x86-64.so.2"), "--library-path", str(folder / "lib"))
    return (*loader, str(folder / PROGRAM), "-L", str(folder / "share"))


def kit_place(path: str) -> str | None:
    """Where in the kit a package's file goes, None when it is of no use there."""
    pure = PurePosixPath("/", path)
    if pure.name == PROGRAM:
        return PROGRAM
    if pure.name == "ld-linux-x86-64.so.2":
        return pure.name
    if pure.name in _FIRMWARE:
        return f"share/{pure.name}"
    if re.search(r"\.so(\.[0-9a-z.]+)?$", pure.name) and str(pure.parent).endswith("/lib/x86_64-linux-gnu"):
        return f"lib/{pure.name}"
    return None


def _take_kit_files(deb: Path, folder: Path) -> None:
    with package_files(deb) as stream:
        for member in stream:
            place = kit_place(member.name.removeprefix("."))
            if place is None:
                continue
            target = folder / place
            if member.issym():
                # Firmware and libraries alike are linked to by other names; all of them end in one folder
                # here.
                name = PurePosixPath(member.linkname).name
                if not target.exists() and name != target.name:
                    target.symlink_to(name)
            elif member.isreg() and not target.exists():
                content = stream.extractfile(member)
                assert content is not None
                with target.open("wb") as output:
                    shutil.copyfileobj(content, output)
                target.chmod(0o755)
