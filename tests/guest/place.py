# SPDX-License-Identifier: Apache-2.0
"""A directory of a share, seen from the host and from a guest; commands and Python programs run in it there.

Must not know how the guest or the servers were started. Specification: vhostfs/vm/guest.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.limits import HANG_S
from vhostfs.vm.agent import CompletedCommand, RunningCommand
from vhostfs.vm.guest import Guest

COMMAND_TIMEOUT_S = 120.0

ERRNOS = """
import json, os, sys
numbers = {}
for statement in sys.argv[1:]:
    numbers[statement] = 0
    try:
        exec(statement)
    except OSError as error:
        numbers[statement] = error.errno
print(json.dumps(numbers))
"""


def awaited(condition: Callable[[], bool], timeout_s: float = HANG_S, step_s: float = 0.02) -> bool:
    """Polls a condition that has nothing to sleep on; False when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return condition()
        time.sleep(step_s)
    return True


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that both sides see. Guest commands start in it."""

    guest: Guest
    host: Path
    inside: str
    """Its path in the guest."""

    def child(self, name: str) -> Place:
        """The directory `name` in this one, made on the host."""
        (self.host / name).mkdir()
        return Place(self.guest, self.host / name, f"{self.inside}/{name}")

    def run(
        self, command: str, timeout_s: float = COMMAND_TIMEOUT_S, stdin: bytes | None = None
    ) -> CompletedCommand:
        """Runs a shell command in the guest; its status is the caller's to judge."""
        return self.guest.run(command, timeout_s, cwd=self.inside, stdin=stdin)

    def sh(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a shell command in the guest that must succeed; its stdout."""
        return self.run(command, timeout_s).check().text

    def start(self, command: str) -> RunningCommand:
        """Starts a shell command in the guest that reads from us and goes on side by side."""
        return self.guest.start(command, cwd=self.inside, stdin=True)

    def python(
        self, program: str, *arguments: str, user: int = 0, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Any:
        """Runs a Python program in the guest that must succeed; what it printed, as JSON (None: nothing)."""
        text = self.sh(python_command(program, *arguments, user=user), timeout_s)
        return json.loads(text) if text.strip() else None

    def start_python(self, program: str, *arguments: str) -> RunningCommand:
        """Starts a Python program in the guest that reads from us and goes on side by side."""
        return self.start(f"exec {python_command(program, *arguments)}")

    def errno_of(self, statement: str, *, user: int = 0) -> int:
        """The errno with which a Python statement fails in the guest, 0 when it succeeds."""
        return self.errnos_of([statement], user=user)[statement]

    def errnos_of(self, statements: Iterable[str], *, user: int = 0) -> dict[str, int]:
        """The same for several statements, run one after the other in one program."""
        numbers: dict[str, int] = self.python(ERRNOS, *statements, user=user)
        return numbers


def python_command(program: str, *arguments: str, user: int = 0) -> str:
    """Shell text that runs a Python program as `user` (uid and gid, no other groups)."""
    if user:
        program = f"import os; os.setgroups([]); os.setgid({user}); os.setuid({user})\n{program}"
    return shlex.join(["python3", "-S", "-E", "-c", program, *arguments])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree_hashes(root: Path) -> dict[str, str]:
    """Relative path -> hash of each regular file, as `sha256sum` in the guest says it."""
    return {
        str(path.relative_to(root)): sha256(path.read_bytes())
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def described_tree(root: Path) -> Iterator[str]:
    """One line for each object under `root`: all that an unpacked archive decides about it, sorted by path.

    Hard links show as the first of their names.
    """
    first_names: dict[tuple[int, int], str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        state = path.lstat()
        first = name
        if not stat.S_ISDIR(state.st_mode):
            first = first_names.setdefault((state.st_dev, state.st_ino), name)
        words = [name, f"{state.st_mode:o}", f"{state.st_uid}:{state.st_gid}"]
        words.append(f"mtime={state.st_mtime_ns // 10**9}")
        if stat.S_ISLNK(state.st_mode):
            words.append(f"-> {os.readlink(path)}")
        elif stat.S_ISREG(state.st_mode):
            words.append(f"{state.st_size} {sha256(path.read_bytes())} links={state.st_nlink} as {first}")
        elif not stat.S_ISDIR(state.st_mode):
            words.append(f"rdev={state.st_rdev:#x}")
        yield " ".join(words)
