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

from tests.oracle.native import NativeWatcher
from tests.oracle.program import HostCommand, HostProgram, RealGuest
from tests.oracle.runner import Outcome, Source, run
from tests.oracle.script import Script
from tests.oracle.streams import In, differences_from_inotify, different_sets
from tests.server import BAD_LOG
from vhostfs.share.options import DeliveryMode
from vhostfs.vm.agent import GuestError
from vhostfs.vm.cache import cache_root
from vhostfs.vm.equipment import Events, equip
from vhostfs.vm.guest import Guest
from vhostfs.vm.image import ImageSpec
from vhostfs.vm.kernel import DEFAULT_SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Accelerator, Machine, Share, smallest_memory_bytes
from vhostfs.vm.server import ServerSpec, ShareServer

_PROGRAM = "/usr/local/bin/oracle-watcher"
_FREE_MEMORY_BYTES = 256 << 20
_BAD_CONSOLE = re.compile(r"BUG:|WARNING:|Oops|blocked for more than|Call Trace|refcount|Busy inodes")


class GuestSession:
    """One guest with a share for each source; started when it is first used, and again when it is lost."""

    def __init__(
        self,
        sources: Sequence[Source],
        kernel: str = DEFAULT_SERIES,
        options: Sequence[str] = ("--cache=never",),
        delivery: DeliveryMode = DeliveryMode.AUTO,
    ) -> None:
        self._sources = sources
        self._kernel = kernel
        self._options = tuple(options)
        self._delivery = delivery
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

    def on(self, source: Source, *, by_fanotify: bool = False) -> GuestLevel:
        """The share with that source, and inotify's or fanotify's watchers."""
        return GuestLevel(self, source, by_fanotify=by_fanotify)

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
        equipment = equip(image, None, Events.REQUIRED, cache_root(), delivery=self._delivery)
        with ExitStack() as parts:
            lifeline = parts.enter_context(Lifeline())
            shares = []
            for number, served in enumerate(self._sources):
                directory = self._folder / f"share{number}"
                directory.mkdir(exist_ok=True)
                socket_path = lifeline.directory / f"{number}.sock"
                options = (*served.options, *self._options, f"--delivery={equipment.delivery.value}")
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

    def run(self, script: Script, source: Source, *, by_fanotify: bool = False) -> Outcome:
        """From an empty directory. `by_fanotify`: with fanotify's watchers, on the host as in the guest."""
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
            option = " --fanotify" if by_fanotify else ""
            more = In.OPEN_EXEC | In.RENAME if by_fanotify else In(0)
            command = guest.start(f"exec {_PROGRAM}{option}", stdin=True)
            watcher = RealGuest(command, shared, f"/share{at}/{number}", more)
            if by_fanotify:
                host = HostCommand([str(self._folder / "watcher"), "--fanotify"])
                native = HostProgram(host, twin, more)
                outcome = run(script, shared, twin, watcher, native, different_sets, with_ignored=True)
            else:
                own = NativeWatcher(twin)
                # Whatever the source is, the guest's own inotify sums up what its watcher has not read.
                outcome = run(script, shared, twin, watcher, own, differences_from_inotify, with_ignored=True)
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

    def __init__(self, session: GuestSession, source: Source, *, by_fanotify: bool = False) -> None:
        self._session = session
        self._source = source
        self._by_fanotify = by_fanotify

    def run(self, script: Script) -> Outcome:
        """From an empty directory."""
        return self._session.run(script, self._source, by_fanotify=self._by_fanotify)
