# SPDX-License-Identifier: Apache-2.0
"""A thread that changes files below a directory in every way there is, as people and tools do, without end.

Must not know what watches the directory. Specification: scripts/debug-kernel-check, which uses it.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

BOTH_WRITE = "both-write"
"""A file in the directory's root to which it appends, and others may as well."""
_HELD_OPEN = 16
PACE_S = 1 / 300
"""Between two changes, to begin with: what an emulated guest can follow."""


class Load(threading.Thread):
    """Changes files of every kind below a directory, at random, until stopped; the seed repeats the order."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(name="host-load", daemon=True)
        self.done: Counter[str] = Counter()
        self.pause_s = PACE_S
        """Between two changes; 0 is as fast as it goes."""
        self._root = root
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._one_change = threading.Lock()
        self._folders = [root]
        self._files: list[Path] = []
        self._held_open: list[FileIO] = []
        self._serial = 0
        self._changes: list[Callable[[], None]] = [
            *(self._create, self._create, self._create, self._append, self._rewrite, self._truncate),
            *(self._chmod, self._touch, self._unlink, self._unlink, self._mkdir, self._rmdir),
            *(self._rename, self._rename, self._rename_over, self._rename_folder, self._symlink, self._link),
            *(self._save_as_editors_do, self._replace_folder, self._append_with_others),
            *(self._hold_open, self._use_what_is_open),
        ]

    def run(self) -> None:
        while not self._ended.is_set():
            change = self._random.choice(self._changes)
            # Such as a parent that has just been renamed: what an unlucky choice meets is no concern.
            with suppress(OSError), self._one_change:
                change()
                self.done[change.__name__.strip("_")] += 1
            if self.pause_s:
                self._ended.wait(self.pause_s)

    def stop(self) -> None:
        """Returns when the last change is done."""
        self._ended.set()
        if self.is_alive():
            self.join()
        while self._held_open:
            self._held_open.pop().close()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing changes meanwhile."""
        with self._one_change:
            yield

    def await_changes(self, count: int) -> None:
        """Until that many more have been made."""
        target = self.done.total() + count
        while self.done.total() < target and self.is_alive():
            time.sleep(0.05)

    def _fresh(self) -> Path:
        self._serial += 1
        return self._random.choice(self._folders) / f"f{self._serial % 400}"

    def _some(self) -> Path:
        return self._random.choice(self._files) if self._files else self._root / "none"

    def _create(self) -> None:
        path = self._fresh()
        path.write_bytes(self._random.randbytes(self._random.randrange(6000)))
        self._remember(path)

    def _remember(self, path: Path) -> None:
        self._files.append(path)
        if len(self._files) > 300:
            self._files.pop(0).unlink(missing_ok=True)

    def _append(self) -> None:
        with self._some().open("ab") as stream:
            stream.write(b"more\n" * 20)

    def _append_with_others(self) -> None:
        with (self._root / BOTH_WRITE).open("ab") as stream:
            if stream.tell() > 100_000:
                stream.truncate(0)
            stream.write(b"the host\n")

    def _hold_open(self) -> None:
        # Most of them lose their names before they are closed.
        self._held_open.append(FileIO(self._some(), "r+"))
        if len(self._held_open) > _HELD_OPEN:
            self._held_open.pop(0).close()

    def _use_what_is_open(self) -> None:
        if self._held_open:
            stream = self._random.choice(self._held_open)
            stream.seek(0)
            stream.write(b"by whatever name")
            stream.read(10)

    def _rewrite(self) -> None:
        with self._some().open("r+b") as stream:
            stream.write(b"other")

    def _truncate(self) -> None:
        path = self._some()
        with path.open("r+b") as stream:
            stream.truncate(self._random.randrange(8000))

    def _chmod(self) -> None:
        self._some().chmod(self._random.choice((0o600, 0o644, 0o755)))

    def _touch(self) -> None:
        self._some().touch()

    def _unlink(self) -> None:
        if self._files:
            self._files.pop(self._random.randrange(len(self._files))).unlink()

    def _mkdir(self) -> None:
        if len(self._folders) < 25:
            path = self._fresh().with_suffix(".d")
            path.mkdir()
            self._folders.append(path)

    def _rmdir(self) -> None:
        if len(self._folders) > 8:
            shutil.rmtree(self._folders.pop(self._random.randrange(1, len(self._folders))))

    def _rename(self) -> None:
        old, new = self._some(), self._fresh()
        old.rename(new)
        self._files = [new if path == old else path for path in self._files]

    def _rename_over(self) -> None:
        old, new = self._some(), self._some()
        old.rename(new)

    def _rename_folder(self) -> None:
        if len(self._folders) > 1:
            old = self._random.choice(self._folders[1:])
            new = self._fresh().with_suffix(".d")
            old.rename(new)
            self._folders = [new if path == old else path for path in self._folders]

    def _symlink(self) -> None:
        path = self._fresh()
        path.symlink_to("nowhere")
        self._remember(path)

    def _link(self) -> None:
        path = self._fresh()
        path.hardlink_to(self._some())
        self._remember(path)

    def _save_as_editors_do(self) -> None:
        path = self._some()
        temporary = path.with_name(f".{path.name}.swp")
        temporary.write_bytes(b"saved\n" * 50)
        temporary.replace(path)

    def _replace_folder(self) -> None:
        # The same name, another inode: the guest's dentry must not survive it.
        path = self._random.choice(self._folders) / "again.d"
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
        path.mkdir()
        (path / "child").write_bytes(b"x")
