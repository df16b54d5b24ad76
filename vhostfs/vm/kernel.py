# SPDX-License-Identifier: Apache-2.0
"""Guest kernels: which Debian package holds the wanted one, its vmlinuz, and the modules that a boot needs.

Must not know how an image is laid out.
Specification: Linux Documentation/arch/x86/boot.rst for the version text; .modinfo sections for dependencies.
"""

from __future__ import annotations

import lzma
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vhostfs.vm.cache import Progress, locked, published_directory, quiet
from vhostfs.vm.debian import Release, open_root, run_tool
from vhostfs.vm.errors import VmError


@dataclass(frozen=True, slots=True)
class KernelSeries:
    """A kernel series that Debian carries: the meta package that follows it and where that is."""

    release: Release
    meta_package: str
    suite: str | None
    image_pattern: str


SERIES = {
    "6.1": KernelSeries(Release.BOOKWORM, "linux-image-amd64", None, r"linux-image-6\.1\.0-.*-amd64"),
    "6.12": KernelSeries(Release.BOOKWORM, "linux-image-6.12-amd64", None, r"linux-image-6\.12\..*-amd64"),
    "7.2": KernelSeries(
        Release.TRIXIE, "linux-image-amd64", "trixie-backports", r"linux-image-7\.2\..*-amd64"
    ),
}
DEFAULT_SERIES = "6.12"

BOOT_MODULES = ("virtio_pci", "virtio_console", "virtiofs", "fuse", "overlay")
"""Needed to boot and mount, by name; those that a kernel has built in are left out for it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted."""

    release: str
    """As `uname -r` says it in the guest."""
    vmlinuz: Path
    modules: Path | None
    """The folder /lib/modules/RELEASE of this kernel, or None: everything needed must then be built in."""


def find_kernel(choice: str, cache: Path, progress: Progress = quiet) -> Kernel:
    """The kernel for `--kernel choice`: one of SERIES, fetched if not there yet, or the path of a vmlinuz.

    Raises VmError when there is no such thing.
    """
    if choice not in SERIES:
        return _local_kernel(choice)
    series = SERIES[choice]
    folder = cache / "kernels" / choice
    with locked(cache / "kernels" / "lock", progress):
        if not (folder / "files").is_dir():
            _fetch(series, folder, cache, progress)
    return _unpacked_kernel(folder / "files", choice)


def _fetch(series: KernelSeries, folder: Path, cache: Path, progress: Progress) -> None:
    root = open_root(series.release, cache, progress)
    dependencies = root.dependencies(series.meta_package, series.suite)
    image = next((name for name in dependencies if re.fullmatch(series.image_pattern, name)), None)
    if image is None:
        raise VmError(
            f"Debian {series.release.value}'s {series.meta_package} is {' '.join(dependencies) or 'gone'}, "
            f"not /{series.image_pattern}/: choose another --kernel ({', '.join(SERIES)} or a vmlinuz)"
        )
    # Since 7.x the files are in packages of their own beside the image package.
    release = image.removeprefix("linux-image-")
    parts = [name for name in root.dependencies(image, series.suite) if name.endswith(f"-{release}")]
    with published_directory(folder) as fresh:
        for name in (image, *parts):
            deb = root.download(name, series.suite)
            progress(f"unpacking {name}")
            run_tool(["dpkg-deb", "-x", str(deb), str(fresh / "files")], cwd=fresh, environment={})
            deb.unlink()
        shutil.rmtree(fresh / "files/usr/share", ignore_errors=True)


def _unpacked_kernel(files: Path, choice: str) -> Kernel:
    images = [*files.glob("boot/vmlinuz-*"), *files.glob("usr/lib/modules/*/vmlinuz")]
    if not images:
        raise VmError(f"Debian's kernel {choice} has no vmlinuz where one was expected, under {files}")
    release = vmlinuz_release(images[0].read_bytes())
    for modules in (files / "lib/modules" / release, files / "usr/lib/modules" / release):
        if modules.is_dir():
            return Kernel(release, images[0], modules)
    raise VmError(f"Debian's kernel {choice} came without the modules of {release} under {files}")


def _local_kernel(choice: str) -> Kernel:
    path = Path(choice).expanduser()
    try:
        with path.open("rb") as stream:
            release = vmlinuz_release(stream.read(1 << 20))
    except OSError as error:
        raise VmError(
            f"--kernel {choice}: {error.strerror}; give {', '.join(SERIES)} or the path of a vmlinuz"
        ) from error
    path = path.resolve()
    places = (path.parent.parent / "lib/modules", path.parent / "lib/modules", Path("/lib/modules"))
    for place in places:
        if (place / release / "kernel").is_dir():
            return Kernel(release, path, place / release)
    return Kernel(release, path, None)


def vmlinuz_release(image: bytes) -> str:
    """The release in the header of an x86 boot image; raises VmError when it is not one."""
    if len(image) < 0x210 or image[0x202:0x206] != b"HdrS":
        raise VmError("that file is not an x86 Linux boot image (vmlinuz, bzImage)")
    offset = 0x200 + int.from_bytes(image[0x20E:0x210], "little")
    text = image[offset : offset + 256].partition(b"\0")[0].decode("ascii", "replace")
    if not text:
        raise VmError("that boot image does not say which kernel release it is")
    return text.split()[0]


@dataclass(frozen=True, slots=True)
class Module:
    """A kernel module, ready to be loaded."""

    name: str
    """With underscores, as lsmod shows it."""
    content: bytes
    dependencies: tuple[str, ...]


def read_module(path: Path) -> Module:
    """Reads a module file, decompressed if need be (.ko, .ko.xz). Raises VmError for other compressions."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        content = lzma.decompress(content)
    elif path.suffix != ".ko":
        raise VmError(f"{path} is compressed in a way that is not understood (expected .ko or .ko.xz)")
    return Module(_module_name(path), content, module_dependencies(content))


def module_dependencies(content: bytes) -> tuple[str, ...]:
    """Names of the modules that this one needs, from its .modinfo section."""
    match = re.search(rb"\0depends=([^\0]*)\0", content)
    names = match[1].decode("ascii", "replace") if match else ""
    return tuple(name.replace("-", "_") for name in names.split(",") if name)


def modules_in_load_order(folder: Path, wanted: Iterable[str]) -> list[Module]:
    """`wanted` modules and those they need, each after what it needs; built-in ones are left out.

    Raises VmError for a name that the kernel has neither as a module nor built in.
    """
    files = {_module_name(path): path for path in folder.glob("kernel/**/*.ko*")}
    builtin = {_module_name(Path(line)) for line in (folder / "modules.builtin").read_text().splitlines()}
    ordered: dict[str, Module] = {}
    under_way: set[str] = set()

    def add(name: str) -> None:
        if name in ordered or name in builtin or name in under_way:
            return
        if name not in files:
            raise VmError(f"kernel {folder.name} has no module {name}")
        under_way.add(name)
        module = read_module(files[name])
        for dependency in module.dependencies:
            add(dependency)
        ordered[name] = module

    for name in wanted:
        add(name.replace("-", "_"))
    return list(ordered.values())


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")
