# SPDX-License-Identifier: Apache-2.0
"""Runs scripts with a watcher in a real guest: QEMU, Debian's kernel, our driver, a server for each source.

Owns guest and servers. Must not know scripts' meaning. Specification: docs/oracle.md; watcher.c.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tests.frontend.server import BAD_LOG
from tests.oracle.native import without_number
from tests.oracle.runner import Outcome, Source, run
from tests.oracle.script import Script
from tests.oracle.streams import In, Seen
from vhostfs.vm.agent import GuestError, RunningCommand
from vhostfs.vm.cache import cache_root
from vhostfs.vm.equipment import Events, equip
from vhostfs.vm.guest import Guest
from vhostfs.vm.image import ImageSpec
from vhostfs.vm.kernel import DEFAULT_SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Accelerator, Machine, Share, smallest_memory_bytes
from vhostfs.vm.server import ServerSpec, ShareServer

_PROGRAM = "/usr/local/bin/oracle-watcher"
_TIMEOUT_S = 20.0
_FREE_MEMORY_BYTES = 256 << 20
_FENCE = ".fence"
_BAD_CONSOLE = re.compile(r"BUG:|WARNING:|Oops|blocked for more than|Call Trace|refcount|Busy inodes")


class GuestSession:
    """One guest with a share for each source; started when it is first used, and again when it is lost."""

    def __init__(
        self,
        sources: Sequence[Source],
        kernel: str = DEFAULT_SERIES,
        options: Sequence[str] = ("--cache=never",),
    ) -> None:
        self._sources = sources
        self._kernel = kernel
        self._options = tuple(options)
        self._folder = Path(tempfile.mkdtemp(prefix="vhostfs-oracle-"))
        self._folder.chmod(0o755)
        self._numbers = itertools.count()
        self._parts: ExitStack | None = None
        self._guest: Guest | None = None
        self._servers: dict[str, ShareServer] = {}

    def __enter__(self) -> GuestSession:
        self._started()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def on(self, source: Source) -> GuestLevel:
        """The share with that source."""
        return GuestLevel(self, source)

    # ---- life ------------------------------------------------------------------------------------------

    def _started(self) -> Guest:
        if self._guest is not None and self._guest.alive:
            return self._guest
        self._end()
        program = self._folder / "watcher"
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-static", "-s"]
        source = Path(__file__).with_name("watcher.c")
        subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", str(program), str(source)], check=True)
        image = ImageSpec(self._kernel, files={_PROGRAM: program}, driver=True)
        equipment = equip(image, None, Events.REQUIRED, cache_root())
        with ExitStack() as parts:
            lifeline = parts.enter_context(Lifeline())
            shares = []
            for number, served in enumerate(self._sources):
                directory = self._folder / f"share{number}"
                directory.mkdir(exist_ok=True)
                socket_path = lifeline.directory / f"{number}.sock"
                options = (*served.options, *self._options)
                spec = ServerSpec(directory, socket_path, f"share{number}", options=options)
                self._servers[served.name] = ShareServer(spec, lifeline)
                shares.append(
                    Share(f"share{number}", socket_path, f"/share{number}", device=equipment.device)
                )
            memory_bytes = smallest_memory_bytes(equipment.image) + _FREE_MEMORY_BYTES
            machine = Machine(
                equipment.qemu, equipment.image, Accelerator.TCG, tuple(shares), memory_bytes=memory_bytes
            )
            self._guest = parts.enter_context(Guest(machine, lifeline=lifeline))
            self._parts = parts.pop_all()
        return self._guest

    def _end(self) -> None:
        if self._parts is not None:
            self._parts.close()
        self._parts = self._guest = None
        self._servers.clear()

    # ---- runs ------------------------------------------------------------------------------------------

    def run(self, script: Script, source: Source) -> Outcome:
        """From an empty directory."""
        guest = self._started()
        number = next(self._numbers)
        at = self._sources.index(source)
        shared, twin = self._folder / f"share{at}/{number}", self._folder / f"twin{number}"
        shared.mkdir()
        twin.mkdir()
        server = self._servers[source.name]
        console_mark, log_mark = _size(guest.console_path), _size(server.log_path)
        watcher: RealGuest | None = None
        try:
            watcher = RealGuest(guest, shared, f"/share{at}/{number}")
            outcome = run(script, shared, twin, watcher, with_ignored=True)
            watcher.close()
        except GuestError as error:
            outcome = Outcome([f"the guest could not go on: {error}"])
        finally:
            shutil.rmtree(shared, ignore_errors=True)
            shutil.rmtree(twin, ignore_errors=True)
        for name, pattern, path, mark in (
            ("guest's kernel", _BAD_CONSOLE, guest.console_path, console_mark),
            ("server", BAD_LOG, server.log_path, log_mark),
        ):
            with open(path, "rb") as log:
                log.seek(mark)
                said = log.read().decode(errors="replace")
            if pattern.search(said):
                outcome.lines.append(f"the {name} says:\n{said[-3000:]}")
                guest.close(graceful=False)
        return outcome


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class GuestLevel:
    """A session's share with one source."""

    def __init__(self, session: GuestSession, source: Source) -> None:
        self._session = session
        self._source = source

    def run(self, script: Script) -> Outcome:
        """From an empty directory."""
        return self._session.run(script, self._source)


class RealGuest:
    """The watcher in the guest, on one directory of a share."""

    def __init__(self, guest: Guest, host: Path, inside: str) -> None:
        self._host = host
        self._inside = inside
        self._fences = itertools.count()
        self._used_bytes = 0
        self._asked_bytes = 0
        (host / _FENCE).mkdir()
        self._command: RunningCommand = guest.start(f"exec {_PROGRAM}", stdin=True)
        self._command.wait_for_output(b"ready\n", _TIMEOUT_S)
        self._asked(f"watch fence {int(In.CREATE):x} {inside}/{_FENCE}", "watched fence 0")
        self._lines: list[str] = []

    def close(self) -> None:
        """Ends the watcher."""
        self._command.close_stdin()
        self._command.wait(_TIMEOUT_S).check()

    def _asked(self, line: str, answer: str) -> str:
        """Sends a line; the answer that begins so."""
        begin = self._asked_bytes
        self._command.write_stdin(f"{line}\n".encode())
        wanted = re.compile(rb"^" + re.escape(answer.encode()) + rb".*\n", re.MULTILINE)
        output = self._command.wait_for_output(lambda seen: bool(wanted.search(seen, begin)), _TIMEOUT_S)
        found = wanted.search(output, begin)
        assert found is not None
        self._asked_bytes = found.end()
        return found.group().decode().strip()

    def _at(self, path: str) -> str:
        return self._inside if path == "." else f"{self._inside}/{path}"

    def watch(self, name: str, path: str, mask: In) -> int:
        """The errno of inotify_add_watch(2)."""
        answer = self._asked(f"watch {name} {int(mask):x} {self._at(path)}", f"watched {name} ")
        return int(answer.split()[2])

    def unwatch(self, name: str) -> None:
        self._asked(f"unwatch {name}", f"unwatched {name}")

    def look(self, path: str) -> object:
        return self._asked(f"look {self._at(path)}", "looked ")

    def forget(self) -> None:
        self._asked("forget", "forgotten")

    def stall(self) -> None:
        """A guest's watcher that does not read stalls nothing: the queue is its kernel's."""

    def resume(self) -> None:
        """See `stall`."""

    def read(self) -> list[Seen]:
        """What the watcher got for all that happened on the host before now. TimeoutError: it is cut off."""
        name = str(next(self._fences))
        (self._host / _FENCE / name).mkdir()
        end = f"e fence {int(In.CREATE | In.ISDIR):x} 0 {name}\n".encode()
        begin = self._used_bytes
        try:
            output = self._command.wait_for_output(lambda seen: seen.find(end, begin) >= 0, _TIMEOUT_S)
        except GuestError as error:
            raise TimeoutError(
                f"the watcher in the guest was not told of the end: {str(error)[-500:]}"
            ) from error
        at = output.find(end, begin)
        self._used_bytes = at + len(end)
        self._lines = output[begin:at].decode("utf-8", "surrogateescape").splitlines()
        events = [line.split(" ", 4)[1:] for line in self._lines if line.startswith("e ")]
        return [
            Seen("" if watch == "-" else watch, In(int(mask, 16)), without_number(entry), int(cookie))
            for watch, mask, cookie, entry in events
            if watch != "fence"
        ]

    def explained(self) -> list[str]:
        """What the watcher printed since the last `read`."""
        return ["the watcher in the guest:", *(f"  {line}" for line in self._lines)]
