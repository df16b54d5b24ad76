# SPDX-License-Identifier: Apache-2.0
"""The cache directory: where it is, how runs share it, how an entry appears whole or not at all.

Must not know what is stored in it.
Specification: XDG Base Directory; flock(2); rename(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from vhostfs.vm.errors import VmError

Progress = Callable[[str], None]
"""Told one short line at the start of each step that can take longer than about a second."""


def quiet(_text: str) -> None:
    """A Progress that says nothing."""


def cache_place() -> Path:
    """Where everything is kept that can be built or fetched again, whether it is there or not.

    $VHOSTFS_CACHE, else $XDG_CACHE_HOME/vhostfs, else ~/.cache/vhostfs. Raises RuntimeError without a home.
    """
    override = os.environ.get("VHOSTFS_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()) / "vhostfs"


def cache_root() -> Path:
    """The same directory, created if missing. Raises VmError if it cannot be made."""
    root = cache_place()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VmError(
            f"cannot create the cache directory {root}: {error.strerror}; "
            "set VHOSTFS_CACHE to one that you own"
        ) from error
    return root


@contextlib.contextmanager
def locked(path: Path, progress: Progress = quiet) -> Iterator[None]:
    """Holds the exclusive lock named by `path` (a file, created and kept), waiting for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another vhostfs that is using {path.parent}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def published_directory(target: Path) -> Iterator[Path]:
    """Yields a fresh directory beside `target` that becomes `target` when the body succeeds.

    An older `target` is replaced. When the body raises, or the process dies, `target` is as it was; what a
    dead process left beside it is removed by the next call. The caller holds a lock that covers `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".new-{target.name}-"
    for stale in target.parent.glob(f".*-{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".old-{target.name}-", dir=target.parent))
            target.rename(old / "was")
            fresh.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def write_atomically(path: Path, content: str) -> None:
    """Replaces `path` by a file with `content` so that a reader sees the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise
