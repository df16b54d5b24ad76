# SPDX-License-Identifier: Apache-2.0
"""Guest images: a kernel and one uncompressed initramfs with a small Debian root, built once and cached.

Must not know how a guest is launched. Uncompressed because emulated processors unpack slowly (docs/guest.md).
Specification: rootfs/init is what runs first in the image, rootfs/agent.c what runs then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from vhostfs.vm.cache import Progress, locked, published_directory, quiet
from vhostfs.vm.cpio import Tree, write_archive
from vhostfs.vm.debian import Release, open_root, package_files
from vhostfs.vm.driver import MODULE_NAME, REPLACED_INITCALL, REPLACED_MODULE, build_driver
from vhostfs.vm.errors import VmError
from vhostfs.vm.kernel import BOOT_MODULES, DEFAULT_SERIES, Kernel, find_kernel, modules_in_load_order

BASE_PACKAGES = ("bash", "busybox-static", "dash", "inotify-tools")
# Come in as dependencies of nearly everything and are of no use where nothing is ever installed.
_NEEDLESS = frozenset({"adduser", "debconf", "debianutils", "dpkg", "gcc-12-base", "mawk", "ucf"})
_UNWANTED = (
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/info/",
    "usr/share/locale/",
    "usr/share/lintian/",
    "usr/share/bug/",
    "usr/lib/x86_64-linux-gnu/gconv/",
)
_KEPT_IMAGES = 12
_FORMAT = 1  # raise it when the layout of an image changes

_PASSWD = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
user:x:1000:1000:user:/tmp:/bin/bash
user2:x:1001:1001:user2:/tmp:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = """\
root:x:0:
daemon:x:1:
tty:x:5:
user:x:1000:
user2:x:1001:
nogroup:x:65534:
"""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a guest image is made of; equal specs give the same cached image."""

    kernel: str = DEFAULT_SERIES
    """A series of kernel.SERIES or the path of a vmlinuz."""
    packages: tuple[str, ...] = ()
    """Debian packages (bookworm) beside BASE_PACKAGES; what they depend on comes with them, their maintainer
    scripts do not run."""
    modules: tuple[str, ...] = ()
    """Kernel modules, by name, loaded at boot beside BOOT_MODULES, with those that they need."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Host files copied in, by absolute path in the guest; executable if they are on the host."""
    driver: bool = False
    """Our guest driver in place of the kernel's own for virtio-fs."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that can be booted."""

    kernel_release: str
    vmlinuz: Path
    initrd: Path
    size_bytes: int
    """Of the initramfs, unpacked: the guest's memory must hold it twice while it boots."""
    kernel_arguments: tuple[str, ...] = ()
    """What the image needs on the kernel's command line."""


def build_image(spec: ImageSpec, cache: Path, progress: Progress = quiet) -> Image:
    """The image for `spec`: from the cache, else fetched and built, which takes from seconds to a minute.

    Raises VmError when packages, kernel, modules or a compiler are missing.
    """
    kernel = find_kernel(spec.kernel, cache, progress)
    driver = build_driver(kernel, cache, progress) if spec.driver else None
    target = cache / "images" / image_key(spec, kernel, driver)
    if not (target / "initrd").exists():
        with locked(cache / "images" / "lock", progress):
            if not (target / "initrd").exists():
                with published_directory(target) as fresh:
                    _build(spec, kernel, driver, fresh, cache, progress)
                _forget_old_images(target.parent)
    os.utime(target)
    initrd = target / "initrd"
    arguments: tuple[str, ...] = ()
    if driver is not None and REPLACED_MODULE in kernel.builtin_modules:
        arguments = (f"initcall_blacklist={REPLACED_INITCALL}",)
    return Image(kernel.release, target / "vmlinuz", initrd, initrd.stat().st_size, arguments)


def image_key(spec: ImageSpec, kernel: Kernel, driver: Path | None = None) -> str:
    """A file name that differs whenever the image's content would."""
    state = kernel.vmlinuz.stat()
    parts = {
        "format": _FORMAT,
        "kernel": [kernel.release, str(kernel.modules), state.st_size, state.st_mtime_ns],
        "packages": sorted({*BASE_PACKAGES, *spec.packages}),
        "modules": [*BOOT_MODULES, *spec.modules],
        "files": {name: [_digest(path.read_bytes()), path.stat().st_mode] for name, path in _files(spec)},
        "driver": _digest(driver.read_bytes()) if driver else None,
        "rootfs": {name: _digest(_own_file(name)) for name in ("init", "agent.c")},
    }
    digest = _digest(json.dumps(parts, sort_keys=True).encode())
    return f"{kernel.release}-{digest[:16]}"


def _files(spec: ImageSpec) -> list[tuple[str, Path]]:
    for name, path in spec.files.items():
        if not name.startswith("/") or not path.is_file():
            raise VmError(f"cannot put {path} into the guest at {name}: give a file and an absolute path")
    return sorted(spec.files.items())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _own_file(name: str) -> bytes:
    return (resources.files("vhostfs.vm") / "rootfs" / name).read_bytes()


def _build(
    spec: ImageSpec, kernel: Kernel, driver: Path | None, folder: Path, cache: Path, progress: Progress
) -> None:
    tree = Tree.with_merged_usr()
    _add_packages(tree, spec.packages, cache, progress)
    progress(f"building the guest image for Linux {kernel.release}")
    _add_skeleton(tree, folder)
    tree.add_file("vhostfs/agent", compile_agent(folder), 0o755)
    tree.add_file("init", _own_file("init"), 0o755)
    _add_modules(tree, spec, kernel, driver)
    for name, path in _files(spec):
        tree.add_file(name, path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
    shutil.copyfile(kernel.vmlinuz, folder / "vmlinuz")
    with (folder / "initrd").open("wb") as output:
        write_archive(tree, output)


def _add_packages(tree: Tree, extra: tuple[str, ...], cache: Path, progress: Progress) -> None:
    wanted = {*BASE_PACKAGES, *extra}
    debs = open_root(Release.BOOKWORM, cache, progress).resolve(wanted)
    progress(f"unpacking {len(debs)} Debian packages")
    for deb in debs:
        name = deb.name.partition("_")[0]
        if name in _NEEDLESS and name not in wanted:
            continue
        with package_files(deb) as stream:
            tree.add_tar(stream, _UNWANTED)


def _add_skeleton(tree: Tree, folder: Path) -> None:
    for path in (
        "dev",
        "proc",
        "sys",
        "run",
        "root",
        "mnt",
        "share",
        "usr/local/bin",
        "usr/local/sbin",
        "var/log",
    ):
        tree.add_directory(path)
    tree.add_directory("tmp", 0o1777)
    tree.add_device("dev/console", stat.S_IFCHR | 0o600, 5, 1)
    tree.add_device("dev/null", stat.S_IFCHR | 0o666, 1, 3)
    tree.add_file("etc/passwd", _PASSWD.encode())
    tree.add_file("etc/group", _GROUP.encode())
    tree.add_file("etc/hostname", b"guest\n")
    tree.add_file("etc/hosts", b"127.0.0.1 localhost guest\n")
    tree.add_file("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n")
    tree.add_symlink("etc/mtab", "/proc/self/mounts")
    # Not bash's, which greets with a question about job control, nor Debian's, which wants more of Debian.
    tree.add_file("root/.profile", b"PS1='guest:\\w# '\n")
    tree.add_file("root/.bashrc", b"PS1='guest:\\w# '\n")
    # Last in PATH, so that a real program is preferred to busybox's.
    for name in _busybox_applets(tree.nodes["usr/bin/busybox"].data, folder):
        tree.add_symlink(f"vhostfs/busybox/{name}", "/bin/busybox")
    if "usr/bin/sh" not in tree:
        tree.add_symlink("bin/sh", "dash")


def _busybox_applets(content: bytes, folder: Path) -> list[str]:
    program = folder / "busybox"
    program.write_bytes(content)
    program.chmod(0o755)
    try:
        done = subprocess.run([str(program), "--list"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise VmError(f"Debian's busybox for x86-64 does not run on this machine: {error}") from error
    program.unlink()
    return [name for name in done.stdout.split() if "/" not in name and name != "busybox"]


def compile_agent(folder: Path) -> bytes:
    """The guest's agent as a static x86-64 program, compiled by the host's C compiler in `folder`."""
    source, program = folder / "agent.c", folder / "agent"
    source.write_bytes(_own_file("agent.c"))
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-std=gnu11", "-O2", "-static", "-s", "-o", str(program), str(source)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise VmError(f"{compiler} is not installed, it is needed to build the guest: install gcc") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[0]
        raise VmError(
            f"{compiler} could not build the guest's agent (is libc6-dev installed?): {said}"
        ) from error
    content = program.read_bytes()
    source.unlink()
    program.unlink()
    return content


def _add_modules(tree: Tree, spec: ImageSpec, kernel: Kernel, driver: Path | None) -> None:
    if kernel.modules is None:
        if spec.modules:
            raise VmError(f"no modules of kernel {kernel.release} were found for {', '.join(spec.modules)}")
        tree.add_file("vhostfs/modules", b"")
        return
    wanted = [*BOOT_MODULES, *spec.modules]
    if driver is not None:
        wanted = [MODULE_NAME if name == REPLACED_MODULE else name for name in wanted]
    lines = []
    for module in modules_in_load_order(kernel, wanted, [driver] if driver else []):
        path = f"/lib/modules/{kernel.release}/{module.name}.ko"
        tree.add_file(path, module.content)
        lines.append(f"{path}\n")
    tree.add_file("vhostfs/modules", "".join(lines).encode())


def _forget_old_images(folder: Path) -> None:
    # A running QEMU has read its image already, so that none is pulled from under a guest.
    images = sorted(
        (path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime
    )
    for path in images[:-_KEPT_IMAGES]:
        shutil.rmtree(path, ignore_errors=True)
