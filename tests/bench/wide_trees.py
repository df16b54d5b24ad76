# SPDX-License-Identifier: Apache-2.0
"""What a wide tree costs: many watched directories, many inodes held, a file system busy with other things.

A real server, and our own front end in place of a VMM: what is measured is the server's and the host's part.
Must not judge: it prints figures. Specification: docs/events.md, "Wide trees".
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event as Signal
from pathlib import Path
from typing import Any

from tests.ring.control import stats
from tests.ring.share import Share
from tests.server import ServerProcess
from vhostfs.frontend import FuseClient, Machine, NotificationQueue
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend.fsnotify import CHANGES, Event
from vhostfs.frontend.session import Pending

SOURCES = ("fanotify:filesystem", "fanotify:inodes", "inotify")
WIDTH = 1000
"""Files in a directory; and directories, unless --width says otherwise."""
IN_FLIGHT = 32
WATCHED = CHANGES | Event.EVENT_ON_CHILD
_FORK = multiprocessing.get_context("fork")


# ---- what is looked at -----------------------------------------------------------------------------------


def cpu_s(server: ServerProcess) -> float:
    """User and system, of all its processes."""
    ticks = 0
    for pid in server.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def slab_bytes() -> int:
    """Of the host's kernel, everybody's: marks, watches, inodes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Slab":
            return int(rest.split()[0]) * 1024
    return 0


class Costs:
    """Of what happens between two looks."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._resident = server.resident_bytes()
        self._slab = slab_bytes()
        self._cpu_s = cpu_s(server)
        self._began_s = time.perf_counter()

    def line(self, count: int) -> str:
        elapsed_s = time.perf_counter() - self._began_s
        cpu = cpu_s(self._server) - self._cpu_s
        resident = self._server.resident_bytes() - self._resident
        slab = slab_bytes() - self._slab
        return (
            f"{elapsed_s:.1f} s in all, {elapsed_s / count * 1e6:.1f} us each,"
            f" {cpu / count * 1e6:.1f} us of the server's processor time each;"
            f" {resident / count:.0f} bytes each in the server, {slab / count:.0f} in the host's kernel"
        )


def say(source: str, text: str) -> None:
    print(f"{source:20} {text}", flush=True)


# ---- the tree, and the world around it -------------------------------------------------------------------


def make_tree(root: Path, directories: int, inodes: int, width: int) -> None:
    """`directories` below groups of `width`, and files in groups of WIDTH up to `inodes` of both."""
    for number in range(directories):
        if number % width == 0:
            group = os.open(_made(root / f"d{number // width}"), os.O_RDONLY)
        os.mkdir(str(number % width), dir_fd=group)
        if number % width == width - 1:
            os.close(group)
    for number in range(max(0, inodes - directories)):
        if number % WIDTH == 0:
            group = os.open(_made(root / f"f{number // WIDTH}"), os.O_RDONLY)
        os.mknod(str(number % WIDTH), dir_fd=group)
        if number % WIDTH == WIDTH - 1:
            os.close(group)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def flood(directory: Path, stop: Signal, done: Any) -> None:
    """Names that come and go, until told to stop; `done` counts changes."""
    directory.mkdir(exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    while not stop.is_set():
        for i in range(500):
            os.mknod(str(i), dir_fd=fd)
        for i in range(500):
            os.unlink(str(i), dir_fd=fd)
        done.value += 1000
    os.close(fd)


@contextmanager
def flooding(directory: Path) -> Iterator[Any]:
    """From a process of its own; gives the number of changes so far."""
    stop, done = _FORK.Event(), _FORK.Value("q", 0)
    child = _FORK.Process(target=flood, args=(directory, stop, done))
    child.start()
    try:
        yield done
    finally:
        stop.set()
        child.join()


# ---- a guest ---------------------------------------------------------------------------------------------


class WideGuest:
    """Holds and watches the tree."""

    def __init__(self, share: Share) -> None:
        self.fs: FuseClient = share.mount(Machine(region_bytes=64 << 20).with_notifications())
        self.notifications = NotificationQueue(self.fs.vmm, buffers=64, poison=False)
        self.fs.fsnotify_init()
        self.directories: dict[str, tuple[int, int]] = {}
        self.held = 0

    def hold_all(self) -> None:
        for group in self._entries(self.fs.root):
            for path, entry in self._listed(group[1].nodeid):
                self.held += 1
                if group[0].startswith("d"):
                    self.directories[f"{group[0]}/{path}"] = (entry.nodeid, entry.generation)

    def _entries(self, nodeid: int) -> list[tuple[str, Any]]:
        return list(self._listed(nodeid))

    def _listed(self, nodeid: int) -> Iterator[tuple[str, Any]]:
        fh = self.fs.opendir(nodeid).fh
        offset = 0
        while batch := self.fs.readdirplus(nodeid, fh, offset, 1 << 20):
            for item in batch:
                if item.entry.nodeid and item.dirent.name not in (b".", b".."):
                    yield item.dirent.name.decode(), item.entry
            offset = batch[-1].dirent.offset
        self.fs.releasedir(nodeid, fh)

    def watch_all(self, mask: int = WATCHED) -> None:
        under_way: deque[Pending[None]] = deque()
        for nodeid, generation in self.directories.values():
            if len(under_way) == IN_FLIGHT:
                under_way.popleft().wait()
            under_way.append(self.fs.submit(wire.watch(nodeid, mask, generation)))
        while under_way:
            under_way.popleft().wait()

    def await_event(self, nodeid: int) -> None:
        self.notifications.until(lambda element: element.nodeid == nodeid)


def median_us(work: Callable[[str], float], names: list[str]) -> str:
    times_us = sorted(work(name) * 1e6 for name in names)
    return f"median {statistics.median(times_us):.0f} us, 99% {times_us[len(times_us) * 99 // 100]:.0f} us"


# ---- the measurements ------------------------------------------------------------------------------------


def start(tree: Path, source: str) -> Share:
    return Share(ServerProcess(tree, ("--tag=wide", f"--events={source}")), tree)


def end(share: Share) -> None:
    share.server.terminate()
    share.server.discard()


def measure_watches(tree: Path, source: str, beside: Path) -> None:
    share = start(tree, source)
    costs = Costs(share.server)
    guest = WideGuest(share)
    guest.hold_all()
    say(source, f"{guest.held} inodes held: {costs.line(guest.held)}")
    count = len(guest.directories)
    if count:
        costs = Costs(share.server)
        guest.watch_all()
        say(source, f"{count} directories watched: {costs.line(count)}")
        names = random.sample(sorted(guest.directories), min(500, count))

        def change(name: str) -> float:
            began_s = time.perf_counter()
            os.mknod(tree / name / "new")
            guest.await_event(guest.directories[name][0])
            return time.perf_counter() - began_s

        def watch_and_change(name: str) -> float:
            nodeid, generation = guest.directories[name]
            guest.fs.watch(nodeid, 0, generation)
            began_s = time.perf_counter()
            guest.fs.watch(nodeid, WATCHED, generation)
            os.unlink(tree / name / "new")
            guest.await_event(nodeid)
            return time.perf_counter() - began_s

        say(source, f"a change in one of them until its element is there: {median_us(change, names)}")
        say(source, f"watch, change, element: {median_us(watch_and_change, names)}")
    measure_elsewhere(source, share, beside)
    began_s = time.perf_counter()
    share.unmount()
    while counter(share, "watches") or stats(share)["share"]["inodes"] > 1:
        time.sleep(0.001)
    say(source, f"the end of the session takes {time.perf_counter() - began_s:.1f} s")
    end(share)


def counter(share: Share, name: str) -> int:
    return int(stats(share)["events"]["counters"][name])


def measure_elsewhere(source: str, share: Share, beside: Path, duration_s: float = 5) -> None:
    with flooding(beside) as done:
        began_s, began, began_cpu_s = time.perf_counter(), done.value, cpu_s(share.server)
        time.sleep(duration_s)
        spent_s = cpu_s(share.server) - began_cpu_s
        changes, elapsed_s = done.value - began, time.perf_counter() - began_s
    say(
        source,
        f"{changes / elapsed_s:.0f} changes a second elsewhere on the file system:"
        f" {spent_s / elapsed_s * 100:.1f}% of a processor,"
        f" {spent_s / max(1, changes) * 1e6:.2f} us each",
    )


def measure_move(tree: Path, beside: Path) -> None:
    """Under a flood, until the server has moved to marks on inodes; and what it costs then."""
    source = "auto"
    share = start(tree, source)
    guest = WideGuest(share)
    guest.hold_all()
    guest.watch_all()
    if stats(share)["events"]["source"] != "fanotify:filesystem":
        say(source, "the file system is busy without our doing: the server has moved already")
    probe = next(iter(guest.directories))
    slowest_s = 0.0
    with flooding(beside):
        began_s, began_cpu_s = time.perf_counter(), cpu_s(share.server)
        before_s = began_cpu_s
        number = 0
        while stats(share)["events"]["source"] == "fanotify:filesystem":
            before_s = cpu_s(share.server)
            sent_s = time.perf_counter()
            os.mknod(tree / probe / f"probe{number}")
            number += 1
            guest.await_event(guest.directories[probe][0])
            slowest_s = max(slowest_s, time.perf_counter() - sent_s)
            if time.perf_counter() > began_s + 120:
                say(source, "the server has not moved in 120 s")
                break
        moved_s = time.perf_counter() - began_s
    say(
        source,
        f"moved after {moved_s:.1f} s, in which it used {(before_s - began_cpu_s) / moved_s * 100:.1f}% of a"
        f" processor; the slowest of {number} events meanwhile took {slowest_s * 1e3:.0f} ms",
    )
    say(source, stats(share)["events"]["reason"])
    measure_elsewhere(source, share, beside)
    share.unmount()
    end(share)


def main() -> int:
    parser = argparse.ArgumentParser(prog="wide-trees", description=__doc__.partition("\n")[0])
    parser.add_argument("--directories", type=int, default=100_000, help="to watch (default: %(default)s)")
    parser.add_argument("--inodes", type=int, default=1_000_000, help="to hold (default: %(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="of them in one (default: %(default)s)")
    parser.add_argument("--source", action="append", choices=[*SOURCES, "auto"], help="default: all")
    parser.add_argument("--in", dest="where", type=Path, help="a directory to work in (default: /tmp)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="vhostfs-wide-", dir=args.where))
    try:
        tree = _made(work / "tree")
        began_s = time.perf_counter()
        make_tree(tree, args.directories, args.inodes, args.width)
        print(f"a tree of {args.inodes} in {work}: {time.perf_counter() - began_s:.0f} s", flush=True)
        for source in args.source or [*SOURCES, "auto"]:
            if source == "auto":
                measure_move(tree, work / "beside")
            else:
                measure_watches(tree, source, work / "beside")
            for leftover in tree.glob("d*/*/*"):
                leftover.unlink()
    finally:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
