# SPDX-License-Identifier: Apache-2.0
"""Debian roots with a C compiler in the cache, and commands run in them: neither the host's compiler nor its
libraries take part, so that any Linux host builds for any Debian release.

Must not know what is built. Specification: unshare(1), chroot(1); docs/guest.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vhostfs.vm.cache import Progress, published_directory, quiet
from vhostfs.vm.debian import Release, open_root, run_tool
from vhostfs.vm.errors import VmError

_FORMAT = 1  # raise it when the content of a root changes
TOOLS = ("bash", "binutils", "coreutils", "dash", "findutils", "gawk", "grep", "make", "patch", "sed")
COMPILERS = {Release.BOOKWORM: "gcc-12", Release.TRIXIE: "gcc-14"}
# What the programs of Debian's linux-kbuild packages are linked with.
_KBUILD_LIBRARIES = {
    Release.BOOKWORM: ("libelf1", "libssl3", "zlib1g"),
    Release.TRIXIE: ("libelf1t64", "libssl3t64", "zlib1g"),
}
# Come in as dependencies and have no part in compiling kernel code.
_NEEDLESS = (
    *("debianutils_", "dpkg_", "libgprofng", "libsystemd", "openssl-provider", "readline-common_", "tar_"),
    *(
        "libasan",
        "libatomic",
        "libgomp",
        "libhwasan",
        "libitm",
        "liblsan",
        "libquadmath",
        "libtsan",
        "libubsan",
    ),
)

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/"}
"""Of commands in a root."""

# The objtool of Linux 7 looks for its stack in /proc/self/maps.
_ENTER_NAMESPACE = 'mount --bind /dev/null "$1/dev/null" && mount --rbind /proc "$1/proc" && exec chroot "$@"'


@dataclass(frozen=True, slots=True)
class BuildRoot:
    """An unpacked Debian root; the holder of its lock may change it and run commands in it."""

    path: Path

    def unpack(self, deb: Path) -> None:
        """Adds a package's files."""
        run_tool(["dpkg-deb", "-x", str(deb), str(self.path)], cwd=self.path, environment={})

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Runs a command in the root and returns its output, stderr within stdout. Raises VmError when this
        user may not enter the root."""
        return _run([*self.entry(), *command])

    def entry(self) -> list[str]:
        """The words that run what follows them inside the root, in ENVIRONMENT. Raises VmError when this user
        may not enter it."""
        said = "no message"
        for entry in self._entries():
            tried = _run([*entry, "true"])
            if tried.returncode == 0:
                return entry
            said = tried.stdout.strip() or said
        raise VmError(
            f"cannot enter the build environment ({said.splitlines()[-1]}): run this once as root, or allow "
            "user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0)"
        )

    def _entries(self) -> Iterator[list[str]]:
        """Ways to enter, the best first."""
        root = str(self.path)
        in_root = ["--mount", "sh", "-c", _ENTER_NAMESPACE, "sh", root]
        if os.geteuid() == 0:
            yield ["unshare", *in_root]
        yield ["unshare", "--user", "--map-root-user", *in_root]
        if os.geteuid() == 0:
            # In a container that may not mount but may chroot; enough for the kernels of Debian 12.
            null = self.path / "dev/null"
            if not null.is_char_device():
                null.unlink(missing_ok=True)
                _run(["mknod", "-m", "666", str(null), "c", "1", "3"])
            yield ["chroot", root]


def provide_build_root(release: Release, cache: Path, progress: Progress = quiet) -> BuildRoot:
    """The root with the compiler of `release`'s kernels, fetched and unpacked if not there yet.

    The caller holds the lock that covers the cache's build roots. Raises VmError.
    """
    path = cache / "build" / f"{release.value}-{_FORMAT}"
    if not path.is_dir():
        wanted = [*TOOLS, COMPILERS[release], *_KBUILD_LIBRARIES[release]]
        debs = open_root(release, cache, progress).resolve(wanted)
        progress(f"unpacking the compiler for kernels of Debian {release.value}")
        make_build_root(path, (deb for deb in debs if not deb.name.startswith(_NEEDLESS)))
    return BuildRoot(path)


def make_build_root(path: Path, debs: Iterable[Path]) -> BuildRoot:
    """A root at `path` of the packages `debs`, TOOLS among them; their maintainer scripts are not run."""
    with published_directory(path) as fresh:
        root = BuildRoot(fresh)
        for deb in debs:
            root.unpack(deb)
        _finish(fresh)
    return BuildRoot(path)


def _finish(root: Path) -> None:
    for name in ("build", "dev", "proc", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "dev/null").touch()
    # As a maintainer script would.
    (root / "usr/bin/awk").symlink_to("gawk")
    for name in ("doc", "man", "info", "locale", "lintian"):
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(command),
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise VmError(f"{command[0]} is not installed") from error
