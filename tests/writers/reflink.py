# SPDX-License-Identifier: Apache-2.0
"""A directory on a file system that can clone files: where one is already, else an XFS in a file, mounted.

Must not know who clones. Specification: ioctl_ficlone(2), mkfs.xfs(8).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import lacking
from tests.writers.acts import FICLONE

_IMAGE_BYTES = 320 << 20
"""A sparse file; mkfs.xfs makes nothing below 300 MB."""


def can_clone(directory: Path) -> bool:
    """Whether FICLONE works there."""
    paths = directory / ".clone-from", directory / ".clone-to"
    try:
        with open(paths[0], "wb") as source, open(paths[1], "wb") as target:
            source.write(b"x" * 4096)
            source.flush()
            fcntl.ioctl(target, FICLONE, source.fileno())
    except OSError:
        return False
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def reflink_directory(scratch: Path) -> Iterator[Path]:
    """An empty directory below `scratch` where files can be cloned, or a loud skip."""
    directory, image = scratch / "reflink", scratch / "reflink.xfs"
    directory.mkdir()
    if can_clone(directory):
        yield directory
        return
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        lacking("a file system with reflinks, nor root and mkfs.xfs to make one")
    with open(image, "wb") as stream:
        stream.truncate(_IMAGE_BYTES)
    paths = str(image), str(directory)
    for command in (["mkfs.xfs", "-q", paths[0]], ["mount", "-t", "xfs", "-o", "loop", *paths]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lacking(f"a file system with reflinks, nor can one be made: {command[0]}: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
        image.unlink()
