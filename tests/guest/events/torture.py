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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.limits import HANG_S, LONG_HANG_S
from vhostfs.vm.agent import RunningCommand
from vhostfs.vm.guest import Guest

PROGRAM = "/usr/bin/compare-tree"
DIRS, NAMES, INNER, OWN = 4, 12, 3, 4
READERS = 2
LEAST_ROUNDS = 2
ANSWER_TIMEOUT_S = LONG_HANG_S
HIDDEN = "hidden"
"""A directory that the guest never looks into, with further names of files that it knows."""
CLOCK_READINGS = 4
_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the guest sees of something, and when that was asked there, by the guest's clock."""

    text: str
    asked_ns: int


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What the guest's CLOCK_MONOTONIC was at a moment of this host's, at most error_ns off."""

    guest_ns: int
    host_ns: int
    error_ns: int


@dataclass(frozen=True, slots=True)
class Clock:
    """
    The guest's clock between two readings.

    Both, as that of an emulated guest may be far from true: it is calibrated while the guest starts.
    """

    first: ClockReading
    last: ClockReading

    def host_ns(self, guest_ns: int) -> float:
        """The same moment by this host's CLOCK_MONOTONIC."""
        rate = (self.last.host_ns - self.first.host_ns) / (self.last.guest_ns - self.first.guest_ns)
        return self.first.host_ns + (guest_ns - self.first.guest_ns) * rate

    @property
    def error_ns(self) -> int:
        return max(self.first.error_ns, self.last.error_ns)


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

    def ask(self) -> None:
        """The guest begins to look at everything; seen() waits for what it saw."""
        self._command.write_stdin(b"check\n")

    def seen(self) -> dict[str, Answer]:
        """What it saw, by path and kind."""
        answers: dict[str, Answer] = {}
        for line in self._until("end\n").splitlines():
            time_ns, path, what, text = line.split(" ", 3)
            if what == "names":
                text = _sorted_names(text.split("/"))
            answers[f"{path} {what}"] = Answer(text, int(time_ns))
        return answers

    def clock(self) -> ClockReading:
        """The best of a few."""
        return min((self._read_clock() for _ in range(CLOCK_READINGS)), key=lambda reading: reading.error_ns)

    def _read_clock(self) -> ClockReading:
        before_ns = time.monotonic_ns()
        self._command.write_stdin(b"clock\n")
        guest_ns = int(self._until(" clock\n"))
        after_ns = time.monotonic_ns()
        return ClockReading(guest_ns, (before_ns + after_ns) // 2, (after_ns - before_ns) // 2)

    def close(self) -> None:
        self._command.close_stdin()
        self._command.wait(HANG_S)


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
            if size:
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

    def truth(self) -> dict[str, str]:
        """The texts of compare-tree's answers when it sees what is there, by path and kind."""
        told: dict[str, str] = {}
        self._tell_names(told, ".")
        for d in range(DIRS):
            self._tell(told, f"d{d}")
            self._tell_names(told, f"d{d}")
            for name in [f"n{i}" for i in range(NAMES)] + [f"g{i}" for i in range(OWN)]:
                path = f"d{d}/{name}"
                if self._tell(told, path) and name[0] == "n":
                    self._tell_names(told, path)
                    for i in range(INNER):
                        self._tell(told, f"{path}/m{i}")
        return told

    def _tell_names(self, told: dict[str, str], path: str) -> None:
        told[f"{path} names"] = _sorted_names(os.listdir(self.root / path))

    def _tell(self, told: dict[str, str], path: str) -> bool:
        """True: it is a directory."""
        place = self.root / path
        try:
            found = place.lstat()
        except OSError:
            told[f"{path} is"] = "absent"
            return False
        is_dir, is_file = stat.S_ISDIR(found.st_mode), stat.S_ISREG(found.st_mode)
        words = [f"{found.st_mode:o}", "0" if is_dir else str(found.st_nlink)]
        words += [str(found.st_size) if is_file else "0"]
        words += [
            f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09}" for ns in (found.st_mtime_ns, found.st_ctime_ns)
        ]
        told[f"{path} is"] = " ".join(words)
        if is_file:
            content = place.read_bytes()[:511].split(b"\0")[0]
            told[f"{path} has"] = content.decode("utf-8", "surrogateescape")
        elif stat.S_ISLNK(found.st_mode):
            told[f"{path} has"] = os.readlink(place)
        return is_dir


def _sorted_names(names: Iterable[str]) -> str:
    return "/".join(sorted(filter(None, names)))


@dataclass(frozen=True, slots=True)
class Wrong:
    """
    An answer that was not right. asked_ms: how long after the end of the last change it was asked for;
    asked_ns: when, by the guest's CLOCK_MONOTONIC.
    """

    what: str
    seen: str
    expected: str
    asked_ms: float
    asked_ns: int

    def __str__(self) -> str:
        return (
            f"  {self.what}, asked for {self.asked_ms:.1f} ms after the last change\n"
            f"    guest: {self.seen}\n"
            f"    host:  {self.expected}"
        )


@dataclass(slots=True)
class Outcome:
    """
    rounds: comparisons; answers: what they compared. wrong_ms: of each comparison with a wrong answer the
    time from the end of the last change to the moment at which the guest asked for the last wrong one.
    clock_error_ms: what these may be off.
    """

    rounds: int = 0
    changes: int = 0
    answers: int = 0
    wrong_ms: list[float] = field(default_factory=list)
    clock_error_ms: float = 0.0


Report = Callable[[Outcome, list[Wrong]], None]
"""Called after each comparison."""


def torture(
    tree: Tree,
    guest: Conversation,
    duration_s: float,
    *,
    patience_s: float,
    report: Report = lambda outcome, wrong: None,
) -> Outcome:
    """Changes and compares, a few times at least. AssertionError when an answer is wrong that was asked for
    patience_s later."""
    outcome = Outcome()
    until = time.monotonic() + duration_s
    reading = guest.clock()
    while outcome.rounds < LEAST_ROUNDS or time.monotonic() < until:
        for _ in range(tree.random.randrange(20)):
            tree.change()
            outcome.changes += 1
        guest.pause()
        for _ in range(tree.random.randrange(1, 5)):
            tree.change()
            outcome.changes += 1
        reading, wrong = _compare(tree, guest, outcome, reading, patience_s)
        report(outcome, wrong)
        guest.go()
    return outcome


def _expected(what: str, seen: dict[str, Answer], truth: dict[str, str]) -> str | None:
    """The right answer; None: what the guest took the path for is wrong, and so that it asked for this."""
    path, kind = what.split(" ")
    if kind == "is":
        return truth.get(what, "absent")
    its = f"{path} is"
    if its in seen and seen[its].text != truth.get(its, "absent"):
        return None
    return truth.get(what, "")


def _compare(
    tree: Tree, guest: Conversation, outcome: Outcome, before: ClockReading, patience_s: float
) -> tuple[ClockReading, list[Wrong]]:
    """All that was wrong until everything was right, and the guest's clock then."""
    changed_ns = time.monotonic_ns()
    guest.ask()
    truth = tree.truth()
    outcome.rounds += 1
    every: list[Wrong] = []
    while True:
        seen = guest.seen()
        clock = Clock(before, guest.clock())
        outcome.answers += len(seen)
        outcome.clock_error_ms = max(outcome.clock_error_ms, clock.error_ns / 1e6)
        wrong = [
            Wrong(
                what,
                answer.text,
                expected,
                (clock.host_ns(answer.asked_ns) - changed_ns) / 1e6,
                answer.asked_ns,
            )
            for what, answer in seen.items()
            if (expected := _expected(what, seen, truth)) is not None and answer.text != expected
        ]
        every += wrong
        if not wrong:
            break
        if max(one.asked_ms for one in wrong) > 1e3 * patience_s:
            told = "\n".join(map(str, wrong))
            raise AssertionError(f"the guest is wrong, round {outcome.rounds}:\n{told}")
        guest.ask()
    if every:
        outcome.wrong_ms.append(max(one.asked_ms for one in every))
    return clock.last, every
