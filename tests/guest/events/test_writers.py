# SPDX-License-Identifier: Apache-2.0
"""Programs write on the host while recursive watchers follow the tree: there, and in a guest by three shares.

All see the same, and what the guest reads afterwards is what is there. Must not know what a writer does.
Specification: docs/events.md, inotify(7).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.events.conftest import WRITTEN, EventSession
from tests.guest.events.watching import CHANGES, HostWatcher
from tests.guest.place import python_command
from tests.limits import LONG_HANG_S
from tests.writers import trees
from tests.writers.following import (
    PROGRAM,
    Pacer,
    ProgramFollower,
    compared,
    compile_pace,
)
from tests.writers.programs import WRITERS, Workshop, Writer
from vhostfs.vm.agent import RunningCommand

pytestmark = pytest.mark.timeout(900, func_only=True)
_numbers = itertools.count(1)


class Reader:
    """A program in the guest that reads whole trees when it is asked to."""

    def __init__(self, session: EventSession) -> None:
        text = python_command(Path(trees.__file__).read_text())
        self._command: RunningCommand = session.guest.start(f"exec {text}", stdin=True)
        self._answers = 0

    def described(self, path: str) -> dict[str, str]:
        self._command.write_stdin(f"{path}\n".encode())
        self._answers += 1
        answer: dict[str, str] = json.loads(self._command.wait_for_lines(self._answers, LONG_HANG_S)[-1])
        return answer

    def close(self) -> None:
        self._command.close_stdin()
        self._command.wait(LONG_HANG_S).check()


@pytest.fixture(scope="module")
def reader(session: EventSession) -> Iterator[Reader]:
    found = Reader(session)
    yield found
    found.close()


@pytest.fixture(scope="module")
def pace_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_pace(tmp_path_factory.mktemp("pace") / "pace.so")


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_a_recursive_watcher_in_the_guest_sees_what_one_on_the_host_sees(
    session: EventSession, reader: Reader, pace_library: Path, tmp_path: Path, writer: Writer
) -> None:
    assert session.guest.alive, "the guest ended in an earlier test"
    tree = session.shares["written-auto"].directory / f"{next(_numbers)}-{writer}"
    tree.mkdir()
    writer.prepare(Workshop(tree, tmp_path))
    inside = {tag: f"/{tag}/{tree.name}" for tag in WRITTEN}
    before = trees.described(str(tree))
    # What is cached now must not be what is read in the end.
    assert all(not trees.differing(before, reader.described(path)) for path in inside.values())
    with contextlib.ExitStack() as cleanup:
        native_watcher = HostWatcher(session.parts.programs[PROGRAM], CHANGES, [tree])
        cleanup.callback(native_watcher.close)
        native = ProgramFollower(native_watcher)
        guests = {}
        for tag, path in inside.items():
            watches = session.shares[tag].control.watches
            command = session.guest.start(f"exec {PROGRAM} {int(CHANGES):x} '{path}'", stdin=True)
            cleanup.callback(command.wait, LONG_HANG_S)
            cleanup.callback(command.close_stdin)
            command.wait_for_output(b"ready\n", LONG_HANG_S)
            guests[tag] = ProgramFollower(command)
            count = watches + guests[tag].watched().total()
            assert session.shares[tag].control.awaited_watches(count) == count
        pacer = Pacer(tree, tmp_path, pace_library, {"the host": native, **guests})
        cleanup.callback(pacer.close)
        writer.work(Workshop(tree, tmp_path, pacer.environment))
        assert not pacer.complaints
        lines = compared(native, guests, tree)
        expected = trees.described(str(tree))
        for tag, path in inside.items():
            lines += [f"{tag}: {line}" for line in trees.differing(expected, reader.described(path))]
        assert not lines, "\n".join(lines)
        assert len(native.events()) > 10
    shutil.rmtree(tree)
