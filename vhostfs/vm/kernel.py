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
    """A kernel series that Debian carries: in which release, and what its image packages are called.

    Not found by a meta package: those move on to the next series while the archive still has this one.
    """

    release: Release
    image_pattern: str
    """Of the plain flavour, so neither cloud, nor rt, nor unsigned."""


SERIES = {
    "6.1": KernelSeries(Release.BOOKWORM, r"linux-image-6\.1\.0-\d+-amd64"),
    "6.12": KernelSeries(Release.BOOKWORM, r"linux-image-6\.12\.\d+\+deb12[.\d]*-amd64"),
    "7.2": KernelSeries(Release.TRIXIE, r"linux-image-7\.2\.\d+\+deb13[.\d]*-amd64"),
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
    package_version: str | None = None
    """The version of the Debian source package that it was built from; None: not Debian's."""
    series: str | None = None
    """Its key in SERIES, None for a kernel given by path."""

    @property
    def builtin_modules(self) -> frozenset[str]:
        """Names of the modules that are part of vmlinuz, as far as is known."""
        if self.modules is None:
            return frozenset()
        lines = (self.modules / "modules.builtin").read_text().splitlines()
        return frozenset(_module_name(Path(line)) for line in lines)

    def module_files(self) -> list[Path]:
        """All that can be loaded."""
        return [] if self.modules is None else list(self.modules.glob("kernel/**/*.ko*"))


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
    image = newest_image(root.names("linux-image-"), series.image_pattern)
    if image is None:
        raise VmError(
            f"Debian {series.release.value} no longer has a kernel called /{series.image_pattern}/: "
            f"choose another --kernel ({', '.join(SERIES)} or a vmlinuz)"
        )
    # Since 7.x the files are in packages of their own beside the image package.
    release = image.removeprefix("linux-image-")
    parts = [name for name in root.dependencies(image) if name.endswith(f"-{release}")]
    with published_directory(folder) as fresh:
        for name in (image, *parts):
            deb = root.download(name)
            progress(f"unpacking {name}")
            run_tool(["dpkg-deb", "-x", str(deb), str(fresh / "files")], cwd=fresh, environment={})
            deb.unlink()
        shutil.rmtree(fresh / "files/usr/share", ignore_errors=True)


def newest_image(names: Iterable[str], pattern: str) -> str | None:
    """Of the packages whose names match, the one with the highest version in its name; None without any."""

    def version(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name.removesuffix("-amd64"))]

    return max((name for name in names if re.fullmatch(pattern, name)), key=version, default=None)


def _unpacked_kernel(files: Path, choice: str) -> Kernel:
    images = [*files.glob("boot/vmlinuz-*"), *files.glob("usr/lib/modules/*/vmlinuz")]
    if not images:
        raise VmError(f"Debian's kernel {choice} has no vmlinuz where one was expected, under {files}")
    banner = vmlinuz_banner(images[0].read_bytes())
    release = banner.split()[0]
    for modules in (files / "lib/modules" / release, files / "usr/lib/modules" / release):
        if modules.is_dir():
            return Kernel(release, images[0], modules, debian_version(banner), choice)
    raise VmError(f"Debian's kernel {choice} came without the modules of {release} under {files}")


def _local_kernel(choice: str) -> Kernel:
    path = Path(choice).expanduser()
    try:
        with path.open("rb") as stream:
            banner = vmlinuz_banner(stream.read(1 << 20))
    except OSError as error:
        raise VmError(
            f"--kernel {choice}: {error.strerror}; give {', '.join(SERIES)} or the path of a vmlinuz"
        ) from error
    path, release = path.resolve(), banner.split()[0]
    places = (path.parent.parent / "lib/modules", path.parent / "lib/modules", Path("/lib/modules"))
    for place in places:
        if (place / release / "kernel").is_dir():
            return Kernel(release, path, place / release, debian_version(banner))
    return Kernel(release, path, None, debian_version(banner))


def vmlinuz_banner(image: bytes) -> str:
    """The version text in the header of an x86 boot image, the release first; VmError when it is not one."""
    if len(image) < 0x210 or image[0x202:0x206] != b"HdrS":
        raise VmError("that file is not an x86 Linux boot image (vmlinuz, bzImage)")
    offset = 0x200 + int.from_bytes(image[0x20E:0x210], "little")
    text = image[offset : offset + 256].partition(b"\0")[0].decode("ascii", "replace").strip()
    if not text:
        raise VmError("that boot image does not say which kernel release it is")
    return text


def debian_version(banner: str) -> str | None:
    """The version of the Debian source package in a kernel's version text, None when it is not Debian's."""
    match = re.search(r" Debian (\d\S*)", banner)
    return match[1] if match else None


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


def modules_in_load_order(
    kernel: Kernel, wanted: Iterable[str], foreign: Iterable[Path] = ()
) -> list[Module]:
    """`wanted` modules and those they need, each after what it needs; built-in ones are left out.

    `foreign`: module files from elsewhere, which can be wanted like the kernel's own. Raises VmError for a
    name that is neither a module nor built in.
    """
    files = {_module_name(path): path for path in (*kernel.module_files(), *foreign)}
    builtin = kernel.builtin_modules
    ordered: dict[str, Module] = {}
    under_way: set[str] = set()

    def add(name: str) -> None:
        if name in ordered or name in builtin or name in under_way:
            return
        if name not in files:
            raise VmError(f"kernel {kernel.release} has no module {name}")
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
