# SPDX-License-Identifier: Apache-2.0
"""Builds Debian's QEMU with our device patch, in a Debian root of its own, and keeps what runs.

Must not know what the patch does, nor who uses the result.
Specification: qemu/README.md; QEMU docs/devel/build-system.rst.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vhostfs.vm.build_root import COMPILERS, ENVIRONMENT, TOOLS, BuildRoot, make_build_root
from vhostfs.vm.cache import Progress, locked, published_directory, quiet
from vhostfs.vm.debian import Release, open_root
from vhostfs.vm.errors import VmError
from vhostfs.vm.qemu import PATCHED, PROGRAM, Qemu, inspect_command, provide_kit, self_contained_command
from vhostfs.vm.qemu_source import (
    SERIES,
    SourcePackage,
    apply_patches,
    debian_patches,
    device_patches,
    fetch_source,
    touched_files,
    unpack,
)

_FORMAT = 1  # raise it when the way of building, or a root's content, changes
_PACKAGES = (
    *("bzip2", "diffutils", "meson", "ninja-build", "perl-base", "pkgconf", "python3", "python3-venv"),
    *("libfdt-dev", "libglib2.0-dev", "libslirp-dev", "zlib1g-dev"),
)
_MORE_PACKAGES = {Release.BOOKWORM: ("libpixman-1-dev",), Release.TRIXIE: ()}
# Enough for a machine with virtio devices and a user's network, with or without KVM. Firmware is not part of
# Debian's source.
_CONFIGURATION = (
    *("--target-list=x86_64-softmmu", "--without-default-features", "--enable-system"),
    *("--enable-tcg", "--enable-kvm", "--enable-vhost-user", "--enable-fdt=system", "--enable-slirp"),
    *("--disable-docs", "--disable-install-blobs", "--disable-werror", "--disable-debug-info"),
)
_MORE_CONFIGURATION = {
    "10.0": ("--disable-download",),
    "7.2": ("--with-git-submodules=ignore", "--meson=meson"),
}
_STAMP = ".vhostfs-patched"
_LOADER = "ld-linux-x86-64.so.2"
_PROGRESS_S = 20.0
_SHOWN_LINES = 15


def provide_patched(series: str, cache: Path, progress: Progress = quiet, jobs: int | None = None) -> Qemu:
    """QEMU `series` with our patch: the one in the cache, else fetched and built (some ten minutes on two
    cores; what an interrupted build has done is kept).

    Raises VmError; BrokenPatchError when our patches do not apply.
    """
    target = cache / "qemu" / f"{PATCHED}-{series}"
    key = _key(series)
    if not _is_current(target, key):
        with locked(cache / "qemu-build" / "lock", progress):
            if not _is_current(target, key):
                build = _Build(series, cache, progress, jobs or os.cpu_count() or 1)
                build.run()
                build.publish(target, key)
    return inspect_command(self_contained_command(target))


def _key(series: str) -> str:
    """Differs whenever the result would, but for Debian's version: what was built stays until it is
    deleted."""
    parts = [_FORMAT, _CONFIGURATION, _MORE_CONFIGURATION[series], _digests(device_patches(series))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digests(patches: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in patches.items()}


def _is_current(target: Path, key: str) -> bool:
    try:
        return (target / "key").read_text() == key
    except OSError:
        return False


@dataclass(slots=True)
class _Build:
    """One build; the holder of the lock has it."""

    series: str
    cache: Path
    progress: Progress
    jobs: int
    root: BuildRoot = field(init=False)
    inside: str = field(init=False)
    """The build's folder, in the root: source/ and build/ are below it."""

    def run(self) -> None:
        package = fetch_source(self.series, self.cache, self.progress)
        self.root = self._provide_root()
        self.inside = f"/build/qemu-{package.version}"
        self._provide_source(package)
        self._configure()
        self._compile()

    @property
    def _folder(self) -> Path:
        return self.root.path / self.inside.lstrip("/")

    @property
    def _log_path(self) -> Path:
        return self._folder / "build.log"

    def _provide_root(self) -> BuildRoot:
        release = SERIES[self.series].release
        path = self.cache / "qemu-build" / f"{release.value}-{_FORMAT}"
        if path.is_dir():
            return BuildRoot(path)
        wanted = [*TOOLS, COMPILERS[release], *_PACKAGES, *_MORE_PACKAGES[release]]
        debs = open_root(release, self.cache, self.progress).resolve(wanted)
        self.progress(f"unpacking {len(debs)} packages to build with")
        root = make_build_root(path, debs)
        # As a maintainer script would; QEMU's configure runs pip, which wants it although it fetches nothing.
        bundle = path / "etc/ssl/certs/ca-certificates.crt"
        bundle.parent.mkdir(parents=True, exist_ok=True)
        bundle.write_bytes(
            b"".join(p.read_bytes() for p in sorted(path.glob("usr/share/ca-certificates/**/*.crt")))
        )
        return root

    def _provide_source(self, package: SourcePackage) -> None:
        """Unpacked and patched; where our patches have changed, anew, and what was built is kept."""
        source, build = self._folder / "source", self._folder / "build"
        ours = device_patches(self.series)
        state = json.dumps({"patches": _digests(ours), "files": sorted(touched_files(ours))})
        stamp = source / _STAMP
        was = stamp.read_text() if stamp.exists() else None
        if was == state:
            return
        if was is None or not set(json.loads(was)["files"]) <= touched_files(ours):
            # A file that is as it was gets its old time back, so that it would not be compiled again.
            shutil.rmtree(build, ignore_errors=True)
        self.progress(f"unpacking and patching QEMU {package.version}")
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        unpack(package, source)
        theirs = debian_patches(package)
        apply_patches(self.root, f"{self.inside}/source", theirs, "Debian's")
        # What they change, meson.build among it, is not newer than what was built from it before.
        released_s = package.original.stat().st_mtime
        for path in touched_files(theirs):
            if (source / path).exists():
                os.utime(source / path, (released_s, released_s))
        whose = f"for QEMU {package.version}:"
        apply_patches(self.root, f"{self.inside}/source", ours, whose)
        stamp.write_text(state)

    def _configure(self) -> None:
        build = self._folder / "build"
        compiler = COMPILERS[SERIES[self.series].release]
        words = [f"--cc={compiler}", f"--host-cc={compiler}", *_CONFIGURATION]
        words += _MORE_CONFIGURATION[self.series]
        stamp = build / ".vhostfs-configured"
        if stamp.exists() and stamp.read_text() == json.dumps(words):
            return
        self.progress("configuring QEMU (about half a minute)")
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir()
        script = 'cd "$1" && shift && exec ../source/configure "$@"'
        self._run(["sh", "-c", script, "sh", f"{self.inside}/build", *words], "QEMU cannot be configured")
        stamp.write_text(json.dumps(words))

    def _compile(self) -> None:
        self.progress("building QEMU (some ten minutes on two cores when nothing is there yet)")
        command = ["ninja", "-C", f"{self.inside}/build", f"-j{self.jobs}", PROGRAM]
        self._run(command, "QEMU does not build")

    def _run(self, command: list[str], complaint: str) -> None:
        """Runs it in the root, out of other programs' way, and says now and then how far it is."""
        entry = self.root.entry()
        with self._log_path.open("w+b") as log:
            process = subprocess.Popen(
                ["nice", "-n", "15", *entry, *command],
                cwd="/",
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                while process.returncode is None:
                    self._await(process)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode != 0:
            lines = [line for line in self._log().splitlines() if line.strip()]
            told = [line for line in lines if re.search(r"error|ERROR|FAILED|not found", line)] or lines
            raise VmError("\n    ".join([f"{complaint}; {self._log_path} says:", *told[-_SHOWN_LINES:]]))

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(_PROGRESS_S)
        except subprocess.TimeoutExpired:
            steps = re.findall(r"^\[(\d+)/(\d+)\]", self._log(), re.MULTILINE)
            if steps:
                done, total = map(int, steps[-1])
                self.progress(f"{done} of {total} steps")

    def _log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def publish(self, target: Path, key: str) -> None:
        """Puts what runs to `target`: the program, its libraries and loader, and the kit's firmware."""
        binary = f"{self.inside}/build/{PROGRAM}"
        libraries = self._ask([f"/lib64/{_LOADER}", "--list", binary])
        kit = provide_kit(self.cache, self.progress)
        with published_directory(target) as fresh:
            self._ask(["strip", "-o", f"{self.inside}/{PROGRAM}", binary])
            shutil.move(self._folder / PROGRAM, fresh / PROGRAM)
            (fresh / "lib").mkdir()
            for path in re.findall(r"=> (/\S+)", libraries):
                shutil.copyfile(self._in_root(path), fresh / "lib" / Path(path).name)
            shutil.copy(self._in_root(f"/lib64/{_LOADER}"), fresh / _LOADER)
            shutil.copytree(Path(kit.command[-1]), fresh / "share")
            launcher = fresh / "qemu"
            launcher.write_text(_LAUNCHER)
            launcher.chmod(0o755)
            (fresh / "key").write_text(key)
            inspect_command(self_contained_command(fresh))

    def _in_root(self, path: str) -> Path:
        """The host's path of a file of the root, whose symbolic links may be absolute."""
        place = self._ask(["readlink", "-f", path]).strip()
        return self.root.path / place.lstrip("/")

    def _ask(self, command: list[str]) -> str:
        done = self.root.run(command)
        if done.returncode != 0:
            raise VmError(f"{command[0]} failed in {self.root.path}: {done.stdout.strip()[-200:]}")
        return done.stdout


_LAUNCHER = f"""#!/bin/sh
# Runs the QEMU beside it, with the libraries and the firmware beside it.
here=$(dirname "$(readlink -f "$0")")
exec "$here/{_LOADER}" --library-path "$here/lib" "$here/{PROGRAM}" -L "$here/share" "$@"
"""
