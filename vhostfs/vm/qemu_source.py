# SPDX-License-Identifier: Apache-2.0
"""Debian's QEMU source and our patches to it: which there are, fetched, unpacked, patched.

Must not know how QEMU is built, nor what the patches do.
Specification: qemu/README.md; Debian's "3.0 (quilt)" source format, dpkg-source(1).
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vhostfs.vm.build_root import BuildRoot, provide_build_root
from vhostfs.vm.cache import Progress, locked, published_directory, quiet
from vhostfs.vm.debian import Release, open_root
from vhostfs.vm.errors import VmError


class BrokenPatchError(VmError):
    """Our patches and this QEMU do not go together; nothing that the machine lacks."""


@dataclass(frozen=True, slots=True)
class QemuSeries:
    """A QEMU of Debian that our patches are for."""

    release: Release
    suite: str
    last_patch: str | None = None
    """Of ours, by its number; the later ones are about what this QEMU does not have. None: all apply."""


SERIES = {
    "10.0": QemuSeries(Release.TRIXIE, "trixie"),
    "7.2": QemuSeries(Release.BOOKWORM, "bookworm", "0003"),
}
DEFAULT_SERIES = "10.0"


@dataclass(frozen=True, slots=True)
class SourcePackage:
    """The files of one version of Debian's source package, downloaded and verified."""

    version: str
    original: Path
    """Upstream's, a tar.xz."""
    debian: Path
    """Debian's part, a tar.xz with debian/patches/series."""


def fetch_source(series: str, cache: Path, progress: Progress = quiet) -> SourcePackage:
    """Downloads the newest source package of `series` (40 MB). Raises VmError."""
    chosen = SERIES[series]
    archive = open_root(chosen.release, cache, progress, sources=True)
    files = archive.download_source("qemu", chosen.suite)
    version = files[0].name.removeprefix("qemu_").removesuffix(".dsc")
    return SourcePackage(version, _the_one(files, ".orig.tar.xz"), _the_one(files, ".debian.tar.xz"))


def _the_one(files: Collection[Path], ending: str) -> Path:
    found = [path for path in files if path.name.endswith(ending)]
    if len(found) != 1:
        raise VmError(f"{files} were expected to have one *{ending}: Debian's source has another format now")
    return found[0]


def device_patches(series: str) -> dict[str, bytes]:
    """Ours that apply to `series`, by name, in order."""
    folder = resources.files("vhostfs.vm") / "qemu_device"
    if not folder.is_dir():
        raise VmError("this installation of vhostfs came without the patches for QEMU")
    last = SERIES[series].last_patch
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".patch"))
    return {name: (folder / name).read_bytes() for name in names if last is None or name[: len(last)] <= last}


def debian_patches(package: SourcePackage) -> dict[str, bytes]:
    """Debian's, by name, in order."""
    with tarfile.open(package.debian, "r:xz") as archive:

        def content(path: str) -> bytes:
            file = archive.extractfile(f"debian/patches/{path}")
            assert file is not None
            return file.read()

        lines = content("series").decode().splitlines()
        names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
        return {name: content(name) for name in names}


def sections(patch: bytes) -> Iterator[tuple[str, bytes]]:
    """The parts of a patch, one a file that it changes: path without its first folder, and text."""
    starts = list(re.finditer(rb"^--- \S+.*\n\+\+\+ (\S+).*\n(?=@@ )", patch, re.MULTILINE))
    ends = [match.start() for match in starts[1:]] + [len(patch)]
    for match, end in zip(starts, ends, strict=True):
        text = patch[match.start() : end]
        # Without git's lines about the next file.
        yield match[1].decode().partition("/")[2], re.split(rb"^diff --git ", text, flags=re.MULTILINE)[0]


def touched_files(patches: Mapping[str, bytes]) -> frozenset[str]:
    """The paths that the patches change."""
    return frozenset(path for patch in patches.values() for path, _ in sections(patch))


def unpack(package: SourcePackage, folder: Path) -> None:
    """Upstream's whole tree into `folder`; Debian's patches are not applied."""
    command = ["tar", "-x", "--strip-components=1", "--no-same-owner", "-C", str(folder)]
    with (
        lzma.open(package.original) as content,
        subprocess.Popen(command, stdin=subprocess.PIPE) as tar,
    ):
        assert tar.stdin is not None
        shutil.copyfileobj(content, tar.stdin, 1 << 20)
        tar.stdin.close()
    if tar.returncode != 0:
        raise VmError(f"{package.original.name} could not be unpacked")


def apply_patches(root: BuildRoot, inside: str, patches: Mapping[str, bytes], whose: str) -> None:
    """Applies `patches` to the tree at `inside`, a path in `root`. Raises BrokenPatchError."""
    folder = root.path / inside.lstrip("/")
    for name, content in patches.items():
        (folder / "vhostfs.patch").write_bytes(content)
        command = ["patch", "-d", inside, "-p1", "--forward", "--batch", "--no-backup-if-mismatch"]
        done = root.run([*command, "-i", f"{inside}/vhostfs.patch"])
        if done.returncode != 0:
            said = [line for line in done.stdout.splitlines() if re.search("FAILED|can't|malformed", line)]
            raise BrokenPatchError(
                "\n    ".join([f"{whose} {name} does not apply:", *(said or done.stdout.splitlines())[:8]])
            )
    (folder / "vhostfs.patch").unlink(missing_ok=True)


def check_series(series: str, cache: Path, progress: Progress = quiet) -> str:
    """Applies our patches to the few files of `series` that they change; returns Debian's version.

    Raises BrokenPatchError when they do not apply, VmError when the source cannot be had.
    """
    package = fetch_source(series, cache, progress)
    ours = device_patches(series)
    stock = _few_files(package, touched_files(ours), cache, progress)
    with locked(cache / "build" / "lock", progress):
        root = provide_build_root(Release.BOOKWORM, cache, progress)
        folder = root.path / "build" / "qemu-check"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stock, folder)
        apply_patches(root, f"/build/{folder.name}", ours, f"for QEMU {package.version}:")
        shutil.rmtree(folder)
    return package.version


def _few_files(package: SourcePackage, wanted: frozenset[str], cache: Path, progress: Progress) -> Path:
    """The folder with the files `wanted`, as Debian builds them."""
    target = cache / "sources" / f"qemu-{package.version}"
    if target.is_dir() and all((target / path).exists() for path in wanted):
        return target
    progress(f"taking the patched files out of QEMU {package.version} (some seconds)")
    with locked(cache / "build" / "lock", progress):
        root = provide_build_root(Release.BOOKWORM, cache, progress)
        folder = root.path / "build" / "qemu-files"
        shutil.rmtree(folder, ignore_errors=True)
        _take(package.original, wanted, folder)
        theirs = {}
        for name, patch in debian_patches(package).items():
            parts = [text for path, text in sections(patch) if path in wanted]
            if parts:
                theirs[name] = b"".join(parts)
        apply_patches(root, f"/build/{folder.name}", theirs, "Debian's")
        with published_directory(target) as fresh:
            shutil.copytree(folder, fresh, dirs_exist_ok=True)
        shutil.rmtree(folder)
    return target


def _take(original: Path, wanted: frozenset[str], folder: Path) -> None:
    missing = set(wanted)
    with tarfile.open(original, "r|xz") as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if path in missing and member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(file.read())
                missing.remove(path)
                if not missing:
                    return
    raise BrokenPatchError(f"{original.name} has no {', '.join(sorted(missing))}, which our patches change")
