# SPDX-License-Identifier: Apache-2.0
"""Builds the guest driver for a Debian kernel: fetches headers and stock sources, patches, compiles, keeps.

Must not know how the driver works, nor how a guest loads it.
Specification: qemu/guest/README.md; Linux Documentation/kbuild/modules.rst.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO

from vhostfs.vm.build_root import BuildRoot, provide_build_root
from vhostfs.vm.cache import Progress, locked, published_directory, quiet
from vhostfs.vm.debian import AptRoot, open_root, package_files
from vhostfs.vm.errors import VmError
from vhostfs.vm.kernel import SERIES, Kernel

MODULE_NAME = "vhostfs_virtiofs"
REPLACED_MODULE = "virtiofs"
"""The stock driver, as a module's name; must not be loaded beside ours."""
REPLACED_INITCALL = "virtio_fs_init"
"""Its init function, for kernels that have it built in."""


class BrokenDriverError(VmError):
    """Our sources and this kernel's do not go together; nothing that the machine lacks."""


_FORMAT = 1  # raise it when the way of building changes
_KEPT_DRIVERS = 12
_SHOWN_LINES = 12


def build_driver(kernel: Kernel, cache: Path, progress: Progress = quiet) -> Path:
    """The driver's module file for `kernel`: from the cache, else built, in seconds once there are the
    kernel's headers and source (150 MB to download).

    Raises VmError: no patch for this kernel, packages gone from the archive, no way to compile;
    BrokenDriverError: it does not compile.
    """
    own = driver_sources()
    patch = own.get(f"patches/{kernel.series}.patch")
    if kernel.series is None or kernel.package_version is None or patch is None:
        known = sorted(Path(name).stem for name in own if name.endswith(".patch"))
        raise VmError(
            f"there is no guest driver for the kernel {kernel.release}, "
            f"only for Debian's of --kernel {', '.join(known)}"
        )
    target = cache / "drivers" / driver_key(kernel, own)
    module = target / f"{MODULE_NAME}.ko"
    if not module.exists():
        with locked(cache / "build" / "lock", progress):
            if not module.exists():
                _build(kernel, own, patch, target, cache, progress)
                _forget_old_drivers(target.parent)
    os.utime(target)
    return module


def driver_sources() -> dict[str, bytes]:
    """Our part of the driver, by path below qemu/guest: from the checkout or the installed package."""
    folder = resources.files("vhostfs.vm") / "guest_driver"
    if not folder.is_dir():
        raise VmError("this installation of vhostfs came without the guest driver's sources")
    found = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name == "Kbuild"}
    found |= {e.name: e.read_bytes() for e in folder.iterdir() if e.name.endswith((".c", ".h"))}
    patches = folder / "patches"
    found |= {f"patches/{e.name}": e.read_bytes() for e in patches.iterdir() if e.name.endswith(".patch")}
    return found


def driver_key(kernel: Kernel, own: Mapping[str, bytes]) -> str:
    """A file name that differs whenever the module's content would."""
    used = {n: hashlib.sha256(c).hexdigest() for n, c in own.items() if not n.startswith("patches/")}
    patch = own[f"patches/{kernel.series}.patch"]
    parts = {
        "format": _FORMAT,
        "kernel": [kernel.release, kernel.package_version],
        "sources": used,
        "patch": hashlib.sha256(patch).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{kernel.release}-{digest[:16]}"


def _build(
    kernel: Kernel, own: Mapping[str, bytes], patch: bytes, target: Path, cache: Path, progress: Progress
) -> None:
    assert kernel.series is not None
    release = SERIES[kernel.series].release
    archive = open_root(release, cache, progress)
    stock = _stock_sources(kernel, archive, cache, progress)
    root = provide_build_root(release, cache, progress)
    headers = _headers(kernel, archive, root, progress)
    progress(f"building the guest driver for Linux {kernel.release}")
    with _build_folder(root) as folder:
        for source in stock.iterdir():
            shutil.copyfile(source, folder / source.name)
        for name, content in own.items():
            if "/" not in name:
                (folder / name).write_bytes(content)
        (folder / "series.patch").write_bytes(patch)
        # The patch names fs/fuse/virtio_fs.c; whatever else it may touch lies in the same folder.
        inside = f"/build/{folder.name}"
        _run(
            root,
            f"patches/{kernel.series}.patch does not apply to Debian's {kernel.package_version}",
            ["patch", "-d", inside, "-p3", "--forward", "--batch", "-i", f"{inside}/series.patch"],
        )
        _run(
            root,
            f"the guest driver does not compile for Linux {kernel.release}",
            [
                "make",
                "-s",
                "-C",
                headers,
                f"M={inside}",
                "CONFIG_DEBUG_INFO_BTF_MODULES=",
                f"-j{os.cpu_count() or 1}",
                "modules",
            ],
        )
        with published_directory(target) as fresh:
            # With debugging information for people who look at a crash; a guest need not hold it in memory.
            shutil.copyfile(folder / f"{MODULE_NAME}.ko", fresh / f"{MODULE_NAME}.ko.debug")
            _run(root, "strip failed", ["strip", "--strip-debug", f"{inside}/{MODULE_NAME}.ko"])
            shutil.copyfile(folder / f"{MODULE_NAME}.ko", fresh / f"{MODULE_NAME}.ko")


def _run(root: BuildRoot, complaint: str, command: list[str]) -> None:
    done = root.run(command)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if re.search("error|failed|undefined", line, re.IGNORECASE)]
        raise BrokenDriverError("\n    ".join([f"{complaint}:", *(errors or lines)[:_SHOWN_LINES]]))


@contextmanager
def _build_folder(root: BuildRoot) -> Iterator[Path]:
    folder = root.path / "build" / MODULE_NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    # Kept when the build failed, for whoever looks into it.
    shutil.rmtree(folder)


def _headers(kernel: Kernel, archive: AptRoot, root: BuildRoot, progress: Progress) -> str:
    """Unpacks the kernel's headers in the root, if they are not there; their folder's path in it."""
    package = f"linux-headers-{kernel.release}"
    inside = f"/usr/src/{package}"
    mark = root.path / "build" / f"{package}={kernel.package_version}"
    if mark.exists():
        return inside
    # Its common part and the build scripts; not the kernel image and the compiler that it also names.
    needed = [
        name for name in archive.dependencies(package) if name.startswith(("linux-headers-", "linux-kbuild-"))
    ]
    for name in (package, *needed):
        deb = _download_exactly(archive, name, kernel)
        progress(f"unpacking {name}")
        root.unpack(deb)
        deb.unlink()
    mark.touch()
    return inside


def _stock_sources(kernel: Kernel, archive: AptRoot, cache: Path, progress: Progress) -> Path:
    """The folder with virtio_fs.c and the headers beside it, as this very kernel was built from."""
    target = cache / "sources" / f"linux-{kernel.package_version}"
    if not target.is_dir():
        package = f"linux-source-{kernel.series}"
        deb = _download_exactly(archive, package, kernel)
        progress(f"taking the virtio-fs driver out of {package} (some 15 s)")
        with published_directory(target) as fresh:
            _take_sources(deb, fresh)
        deb.unlink()
    return target


def _download_exactly(archive: AptRoot, package: str, kernel: Kernel) -> Path:
    try:
        return archive.download(package, version=kernel.package_version)
    except VmError as error:
        raise VmError(
            f"{package} {kernel.package_version} cannot be had ({error}). If Debian has moved on, delete "
            f"kernels/{kernel.series} in the cache: the newer kernel is then fetched"
        ) from error


def _take_sources(deb: Path, folder: Path) -> None:
    """Unpacks fs/fuse/virtio_fs.c and fs/fuse/*.h of a linux-source package."""
    with package_files(deb) as stream:
        for member in stream:
            if not member.name.endswith(".tar.xz"):
                continue
            content = stream.extractfile(member)
            assert content is not None
            take_from_tree(content, folder)
            break
    if not (folder / "virtio_fs.c").exists() or not (folder / "fuse_i.h").exists():
        raise VmError(f"{deb.name} came without fs/fuse/virtio_fs.c and fuse_i.h")


def take_from_tree(content: IO[bytes], folder: Path) -> None:
    """Unpacks the same from the .tar.xz of a kernel source tree; reads it once, in order."""
    with tarfile.open(fileobj=content, mode="r|xz") as tree:
        seen = False
        for member in tree:
            below = member.name.partition("/fs/fuse/")[2]
            if not below:
                # The tree is sorted: nothing that is wanted comes after the folder. Saves half the time.
                if seen:
                    return
                continue
            seen = True
            wanted = below == "virtio_fs.c" or (below.endswith(".h") and "/" not in below)
            if wanted and member.isreg():
                file = tree.extractfile(member)
                assert file is not None
                (folder / below).write_bytes(file.read())


def _forget_old_drivers(folder: Path) -> None:
    drivers = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime)
    for path in drivers[:-_KEPT_DRIVERS]:
        shutil.rmtree(path, ignore_errors=True)
