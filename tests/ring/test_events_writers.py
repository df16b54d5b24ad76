# SPDX-License-Identifier: Apache-2.0
"""Programs write on the host while a recursive watcher follows the tree: there, and as a guest at the ring.

Both see the same, with every source. Must not know what a writer does. Specification: docs/events.md.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.events.watching import CHANGES, HostWatcher
from tests.oracle.ring_guest import RingGuest
from tests.oracle.runner import SOURCES, Source
from tests.oracle.streams import In, Seen
from tests.ring import event_sources
from tests.ring.conftest import MakeShare
from tests.ring.share import Share
from tests.writers import following
from tests.writers.following import Pacer, ProgramFollower, compared, compile_pace
from tests.writers.programs import CLONES, WRITERS, Workshop, Writer
from tests.writers.reflink import reflink_directory

pytestmark = pytest.mark.usefixtures("ours")
TOO_LONG = ("pip",)
"""At the ring with every source; the guest tests have them."""
RENAMING = ("editors", "npm-like", "vim")
"""What differs where renames do not come in one piece."""


class RingFollower:
    """A recursive watcher that is a guest at the ring: it watches each directory that an element names."""

    def __init__(self, guest: RingGuest, tree: Path) -> None:
        self._guest = guest
        self._tree = tree
        self._lock = threading.Lock()
        self._watched: Counter[str] = Counter()
        self._events: list[Seen] = []
        self._gone: set[str] = set()
        self._paths: dict[str, str] = {}
        """Of each watch: where its directory is now, "" the tree."""
        self._moving: dict[int, str] = {}
        for path, _, _ in os.walk(tree):
            self._add(os.path.relpath(path, tree))

    def watched(self) -> Counter[str]:
        self._read()
        return self._watched

    def events(self) -> list[Seen]:
        self._read()
        return self._events

    def gone(self) -> set[str]:
        return self._gone

    def _add(self, path: str) -> None:
        times = self._watched[path] + 1
        name = f"{path} {times}" if times > 1 else path
        if path in self._paths.values() or self._guest.watch(name, f"{self._tree.name}/{path}", In.CHANGES):
            return
        self._paths[name] = path
        self._watched[path] += 1

    def _read(self) -> None:
        with self._lock:
            for event in self._guest.read():
                self._events.append(event)
                if event.mask & In.ISDIR and event.name:
                    self._follow(event)

    def _follow(self, event: Seen) -> None:
        path = os.path.normpath(os.path.join(self._paths[event.watch], event.name))
        if event.mask & (In.DELETE | In.MOVED_TO):
            self._paths = {name: at for name, at in self._paths.items() if at != path}
        if event.mask & In.MOVED_FROM:
            self._moving[event.cookie] = path
        elif event.mask & In.MOVED_TO and (before := self._moving.get(event.cookie)):
            for name, at in self._paths.items():
                if at == before or at.startswith(f"{before}/"):
                    self._paths[name] = path + at[len(before) :]
        elif event.mask & (In.CREATE | In.MOVED_TO):
            for found, _, _ in os.walk(self._tree / path):
                self._add(os.path.relpath(found, self._tree))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the host's watcher and what paces writers."""
    folder = tmp_path_factory.mktemp("writers")
    following.compile_static(Path(following.__file__).with_name("follow-events.c"), folder / "follow-events")
    compile_pace(folder / "pace.so")
    return folder


def watch_it_write(share: Share, source: Source, writer: Writer, programs: Path, scratch: Path) -> None:
    tree = share.path / "tree"
    tree.mkdir()
    scratch = scratch / "scratch"
    scratch.mkdir()
    writer.prepare(Workshop(tree, scratch))
    followers = {"the guest": RingFollower(RingGuest(share, 64), tree)}
    native_watcher = HostWatcher(programs / "follow-events", CHANGES, [tree])
    native = ProgramFollower(native_watcher)
    pacer = Pacer(tree, scratch, programs / "pace.so", {"the host": native, **followers})
    try:
        writer.work(Workshop(tree, scratch, pacer.environment))
        assert not pacer.complaints
        lines = compared(native, followers, tree)
        assert not lines, "\n".join(lines)
        assert len(native.events()) > 10
    finally:
        pacer.close()
        native_watcher.close()


def cases() -> Iterator[object]:
    for source in SOURCES.values():
        for writer in WRITERS:
            if writer.name in RENAMING or ("no-rename" not in source.name and writer.name not in TOO_LONG):
                yield pytest.param(source, writer, id=f"{source.name}-{writer}")


@pytest.mark.parametrize(("source", "writer"), list(cases()))
def test_a_recursive_watcher_is_told_what_one_on_the_host_sees(
    make_share: MakeShare, programs: Path, tmp_path: Path, source: Source, writer: Writer
) -> None:
    share = start(make_share, source)
    watch_it_write(share, source, writer, programs, tmp_path)


@pytest.fixture
def cloning(tmp_path: Path) -> Iterator[Path]:
    """Set up before the server and taken away after it."""
    with reflink_directory(tmp_path) as directory:
        yield directory


@pytest.mark.parametrize("source", SOURCES.values(), ids=lambda source: source.name)
def test_clones_are_told_as_writes(
    cloning: Path, make_share: MakeShare, programs: Path, tmp_path: Path, source: Source
) -> None:
    share = start(make_share, source, cloning)
    share.path = share.path / "below"
    share.path.mkdir()
    watch_it_write(share, source, CLONES, programs, tmp_path)


def start(make_share: MakeShare, source: Source, directory: Path | None = None) -> Share:
    """The share, or a loud skip that says what the host does not permit."""
    forced, *others = source.options
    return event_sources.start_share(
        make_share, event_sources.Source(source.name, forced), *others, directory=directory
    )
