# SPDX-License-Identifier: Apache-2.0
"""Changes a tree on the host at random and asks the guest what it sees of it, through its caches.

Must not know how guest and server were started. The guest's side, with the tree's form: compare-tree.c.
Specification: docs/protocol.md, "Coherent caches".
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vhostfs.vm.agent import RunningCommand
from vhostfs.vm.guest import Guest

PROGRAM = "/usr/bin/compare-tree"
DIRS, NAMES, INNER, OWN = 4, 12, 3, 4
READERS = 2
ANSWER_TIMEOUT_S = 60.0
HIDDEN = "hidden"
"""A directory that the guest never looks into, with further names of files that it knows."""
_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Conversation:
    """The program in the guest, by its stdin and stdout."""

    def __init__(self, guest: Guest, inside: str) -> None:
        self._changed = threading.Condition()
        self._text = bytearray()
        command = f"exec {PROGRAM} {inside} {DIRS} {NAMES} {READERS}"
        self._command: RunningCommand = guest.start(command, stdin=True, stdout_sink=self._take)
        self._until("ready\n")

    def _take(self, data: bytes) -> None:
        with self._changed:
            self._text += data
            self._changed.notify_all()

    def _until(self, end: str) -> str:
        mark = end.encode()
        with self._changed:
            if not self._changed.wait_for(lambda: self._text.endswith(mark), ANSWER_TIMEOUT_S):
                raise AssertionError(
                    f"the guest does not answer; so far: {self._text!r} {self._command.stderr!r}"
                )
            text = self._text.decode("utf-8", "surrogateescape")
            self._text.clear()
        return text.removesuffix(end)

    def pause(self) -> None:
        """The guest's own changes stop."""
        self._command.write_stdin(b"pause\n")
        self._until("paused\n")

    def go(self) -> None:
        self._command.write_stdin(b"go\n")

    def check(self) -> list[str]:
        """What the guest sees now."""
        self._command.write_stdin(b"check\n")
        return self._until("end\n").splitlines()

    def close(self) -> None:
        self._command.close_stdin()
        self._command.wait(10)


class Tree:
    """The tree on the host. Its own random changes, and what is true of it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self._count = 0
        (root / HIDDEN).mkdir()
        for d in range(DIRS):
            (root / f"d{d}").mkdir()

    # ---- changes ---------------------------------------------------------------------------------------

    def change(self) -> None:
        """One change, or none where it makes no sense on what is there."""
        with suppress(OSError):
            self.random.choice(self._CHANGES)(self)

    def _name(self) -> Path:
        pick = self.random
        path = self.root / f"d{pick.randrange(DIRS)}" / f"n{pick.randrange(NAMES)}"
        if path.is_dir() and not path.is_symlink() and pick.random() < 0.7:
            path /= f"m{pick.randrange(INNER)}"
        return path

    def _text(self) -> bytes:
        self._count += 1
        return f"{self._count}-{'x' * self.random.randrange(40)}".encode()

    def _write(self) -> None:
        flags = self.random.choice((0, os.O_APPEND, os.O_TRUNC, os.O_CREAT, os.O_CREAT | os.O_EXCL))
        fd = os.open(self._name(), os.O_WRONLY | os.O_NOFOLLOW | flags, 0o644)
        try:
            for _ in range(self.random.randrange(1, 3)):
                os.write(fd, self._text())
        finally:
            os.close(fd)

    def _write_in_place(self) -> None:
        """The same size, so that only the content and the times tell."""
        fd = os.open(self._name(), os.O_RDWR | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            os.pwrite(fd, bytes(self.random.choices(b"abcdefgh", k=size)), 0)
        finally:
            os.close(fd)

    def _write_by_mapping(self) -> None:
        fd = os.open(self._name(), os.O_RDWR | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            with mmap.mmap(fd, size) as memory:
                memory[:] = bytes(self.random.choices(b"ABCDEFGH", k=size))
        finally:
            os.close(fd)

    def _truncate(self) -> None:
        path = self._name()
        if not path.is_symlink():
            os.truncate(path, self.random.randrange(30))

    def _remove(self) -> None:
        path = self._name()
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()

    def _remove_tree(self) -> None:
        shutil.rmtree(self._name())

    def _rename(self) -> None:
        os.rename(self._name(), self._name())

    def _exchange(self) -> None:
        old, new = (os.fsencode(path) for path in (self._name(), self._name()))
        _libc.renameat2(-100, old, -100, new, _EXCHANGE)

    def _replace(self) -> None:
        """As editors and compilers do."""
        path = self._name()
        fresh = path.with_name("new.tmp")
        fresh.write_bytes(self._text())
        os.rename(fresh, path)

    def _make_directory(self) -> None:
        path = self._name()
        path.mkdir()
        if self.random.random() < 0.5:
            (path / "m0").write_bytes(self._text())

    def _symlink(self) -> None:
        path = self._name()
        path.unlink(missing_ok=True)
        path.symlink_to(self._text().decode())

    def _link(self) -> None:
        os.link(self._name(), self._name(), follow_symlinks=False)

    def _mode(self) -> None:
        path = self._name()
        if not path.is_symlink():
            path.chmod(self.random.choice((0o644, 0o600, 0o755)))

    def _times(self) -> None:
        when = self.random.randrange(1 << 30)
        os.utime(self._name(), ns=(when, when), follow_symlinks=False)

    def _by_hidden_name(self) -> None:
        path = self._name()
        other = self.root / HIDDEN / str(self._count)
        os.link(path, other, follow_symlinks=False)
        if not path.is_symlink():
            other.write_bytes(self._text())
            other.chmod(0o640)
        if self.random.random() < 0.8:
            other.unlink()

    def _own(self) -> None:
        """Changes to what the guest makes itself."""
        pick = self.random
        path = self.root / f"d{pick.randrange(DIRS)}" / f"g{pick.randrange(OWN)}"
        act: Callable[[], object] = pick.choice(
            (path.unlink, lambda: path.write_bytes(self._text()), lambda: os.rename(path, self._name()))
        )
        act()

    _CHANGES = (
        *(_write,) * 6,
        *(_write_in_place,) * 3,
        _write_by_mapping,
        _truncate,
        *(_remove,) * 3,
        _remove_tree,
        *(_rename,) * 4,
        _exchange,
        *(_replace,) * 3,
        *(_make_directory,) * 2,
        _symlink,
        *(_link,) * 2,
        _mode,
        _times,
        *(_by_hidden_name,) * 2,
        _own,
    )

    # ---- what is true ----------------------------------------------------------------------------------

    def truth(self) -> list[str]:
        """What compare-tree says when it sees what is there."""
        lines: list[str] = []
        for d in range(DIRS):
            self._describe(lines, f"./d{d}")
            for name in [f"n{i}" for i in range(NAMES)] + [f"g{i}" for i in range(OWN)]:
                path = f"d{d}/{name}"
                mode = self._describe(lines, path)
                for i in range(INNER if name[0] == "n" and stat.S_ISDIR(mode) else 0):
                    self._describe(lines, f"{path}/m{i}")
        return lines

    def _describe(self, lines: list[str], path: str) -> int:
        place = self.root / path
        try:
            found = place.lstat()
        except OSError:
            return 0
        is_dir = stat.S_ISDIR(found.st_mode)
        words = [path, f"{found.st_mode:o}", "0" if is_dir else str(found.st_nlink)]
        words += [
            f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09}" for ns in (found.st_mtime_ns, found.st_ctime_ns)
        ]
        if stat.S_ISREG(found.st_mode):
            content = place.read_bytes()[:511].split(b"\0")[0].decode("ascii", "surrogateescape")
            words += [str(found.st_size), content]
        elif stat.S_ISLNK(found.st_mode):
            words.append(os.readlink(place))
        lines.append(" ".join(words))
        return found.st_mode


@dataclass(slots=True)
class Outcome:
    """rounds: comparisons. late_ms: of each that was not right at first, after how long it was, in
    milliseconds from the end of the last change to the request for the comparison that was right."""

    rounds: int = 0
    changes: int = 0
    late_ms: list[float] = field(default_factory=list)


def torture(
    tree: Tree,
    guest: Conversation,
    duration_s: float,
    *,
    patience_s: float,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Changes and compares. AssertionError when the guest is not right within patience_s of a change."""
    outcome = Outcome()
    until = time.monotonic() + duration_s
    while time.monotonic() < until:
        for _ in range(tree.random.randrange(20)):
            tree.change()
            outcome.changes += 1
        guest.pause()
        for _ in range(tree.random.randrange(1, 5)):
            tree.change()
            outcome.changes += 1
        _compare(tree, guest, outcome, patience_s)
        guest.go()
        progress(outcome)
    return outcome


def _compare(tree: Tree, guest: Conversation, outcome: Outcome, patience_s: float) -> None:
    changed_s = time.monotonic()
    truth = tree.truth()
    outcome.rounds += 1
    while True:
        asked_s = time.monotonic()
        seen = guest.check()
        if seen == truth:
            break
        if asked_s - changed_s > patience_s:
            wrong = [f"  guest: {line}" for line in seen if line not in truth]
            wrong += [f"  host:  {line}" for line in truth if line not in seen]
            raise AssertionError(
                f"the guest is wrong {1e3 * (asked_s - changed_s):.0f} ms after the last change, "
                f"round {outcome.rounds}:\n" + "\n".join(wrong)
            )
    if asked_s - changed_s > 0.01:
        outcome.late_ms.append(1e3 * (asked_s - changed_s))
