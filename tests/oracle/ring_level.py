# SPDX-License-Identifier: Apache-2.0
"""Runs scripts against a real server, with a guest of our own at its ring.

Owns the server and the two directories. Must not know scripts' meaning. Specification: docs/oracle.md.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests.oracle.native import NativeWatcher
from tests.oracle.ring_guest import RingGuest
from tests.oracle.runner import Guest, Hold, Outcome, Source, run
from tests.oracle.script import Script
from tests.ring.share import Share
from tests.server import BAD_LOG, ServerProcess, held_up


class RingLevel:
    """One server for many runs; a run has a directory of it, and one beside the share, of its own."""

    def __init__(
        self,
        source: Source,
        options: Sequence[str] = (),
        *,
        buffers: int = 64,
        held: bool = False,
    ) -> None:
        """`held`: the server stands still while operations are done, and finds all of them at once."""
        self._held = held
        self._options = ("--tag=oracle", *source.options, *options)
        self._compare = source.compare
        self._buffers = buffers
        self._folder = Path(tempfile.mkdtemp(prefix="vhostfs-oracle-"))
        self._numbers = itertools.count()
        (self._folder / "share").mkdir()
        self._server: ServerProcess | None = None

    def __enter__(self) -> RingLevel:
        self._started()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.discard()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self) -> ServerProcess:
        if self._server is not None and not self._server.running:
            self._server.discard()
            self._server = None
        if self._server is None:
            self._server = ServerProcess(self._folder / "share", self._options)
        return self._server

    def run(self, script: Script, guest: Callable[[Share, int], Guest] = RingGuest) -> Outcome:
        """From an empty directory."""
        server = self._started()
        number = next(self._numbers)
        shared, twin = self._folder / f"share/{number}", self._folder / f"twin{number}"
        shared.mkdir()
        twin.mkdir()
        share = Share(server, shared)
        log_mark = server.log_size()
        hold: Hold = contextlib.nullcontext
        if self._held:
            hold = functools.partial(held_up, server.process.pid)
        try:
            outcome = run(
                script,
                shared,
                twin,
                guest(share, self._buffers),
                NativeWatcher(twin),
                self._compare,
                hold=hold,
            )
        except (OSError, EOFError) as error:
            outcome = Outcome([f"the guest could not go on: {type(error).__name__}: {error}"])
        finally:
            share.unmount()
            shutil.rmtree(shared, ignore_errors=True)
            shutil.rmtree(twin, ignore_errors=True)
        if trouble := BAD_LOG.search(server.log_since(log_mark)):
            outcome.lines.append(f"the server's log has {trouble.group()!r}:\n{server.log_since(log_mark)}")
            server.kill()
        if not server.running:
            outcome.lines.append(f"the server ended:\n{server.log_since(log_mark)[-3000:]}")
        return outcome
