# SPDX-License-Identifier: Apache-2.0
"""The guest driver's build, as far as it goes without Debian's packages: sources, keys, what cannot be built.

Must not run a compiler. Specification: vhostfs/vm/driver.py, qemu/guest/README.md.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from vhostfs.vm.driver import build_driver, driver_key, driver_sources, take_from_tree
from vhostfs.vm.errors import VmError
from vhostfs.vm.kernel import SERIES, Kernel

KERNEL = Kernel("6.12.1+deb12-amd64", Path("/vmlinuz"), None, "6.12.1-1", "6.12")


def test_the_sources_come_with_a_patch_for_every_kernel_series() -> None:
    own = driver_sources()
    assert {"Kbuild", "vhostfs_notify.c", "vhostfs_notify.h"} <= own.keys()
    assert {name for name in own if name.startswith("patches/")} == {
        f"patches/{name}.patch" for name in SERIES
    }


def test_a_driver_is_built_anew_when_anything_in_it_changes_and_only_then() -> None:
    own = driver_sources()
    key = driver_key(KERNEL, own)
    assert key.startswith("6.12.1+deb12-amd64-")
    assert driver_key(KERNEL, dict(reversed(own.items()))) == key
    assert driver_key(KERNEL, {**own, "patches/6.1.patch": b"another kernel's"}) == key
    for changed in ("Kbuild", "vhostfs_notify.c", "patches/6.12.patch"):
        assert driver_key(KERNEL, {**own, changed: own[changed] + b"\n"}) != key
    assert driver_key(replace(KERNEL, package_version="6.12.1-2"), own) != key


@pytest.mark.parametrize(
    "kernel",
    [
        replace(KERNEL, series=None),
        replace(KERNEL, package_version=None),
        replace(KERNEL, series="5.10"),
    ],
)
def test_a_kernel_without_a_driver_is_named_with_those_that_have_one(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(
        VmError, match=r"no guest driver for the kernel 6\.12\.1\+deb12-amd64.*6\.1, 6\.12, 7\.2"
    ):
        build_driver(kernel, tmp_path)


def test_only_the_driver_and_the_headers_beside_it_are_taken_from_a_source_tree(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tree:
        for name in (
            "linux/fs/file.c",
            "linux/fs/fuse/dir.c",
            "linux/fs/fuse/fuse_i.h",
            "linux/fs/fuse/sub/other.h",
            "linux/fs/fuse/virtio_fs.c",
            "linux/fs/other/x.h",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tree.addfile(member, io.BytesIO(name.encode()))
    archive.seek(0)
    take_from_tree(archive, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "fuse_i.h": "linux/fs/fuse/fuse_i.h",
        "virtio_fs.c": "linux/fs/fuse/virtio_fs.c",
    }
