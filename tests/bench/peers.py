# SPDX-License-Identifier: Apache-2.0
"""The servers that are compared: where they come from, how they are started, what they use.

Must not know what is asked of them.
Specification: virtiofsd(1) of QEMU 7.2; virtiofsd --help of the Rust one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vhostfs.vm.debian import Release, open_root

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0
_LIBRARIES = Path("usr/lib/x86_64-linux-gnu")


@dataclass(frozen=True, slots=True)
class Peer:
    """command: with {socket} and {dir} where they belong."""

    name: str
    version: str
    command: tuple[str, ...]

    def shown(self) -> str:
        return " ".join(Path(word).name if word.startswith("/") else word for word in self.command)


def vhostfs_peer(*options: str, name: str = "vhostfs") -> Peer:
    command = (
        sys.executable,
        "-m",
        "vhostfs",
        "serve",
        "--once",
        "--socket-path={socket}",
        "--shared-dir={dir}",
        "--sandbox=none",
        "--cache=auto",
        "--no-control-socket",
        "--log-level=error",
        *options,
    )
    return Peer(name, "this tree", command)


def _unpack(debs: Sequence[Path], target: Path) -> None:
    if target.exists():
        return
    unfinished = target.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", str(deb), str(unfinished)], check=True)
    unfinished.rename(target)


def c_virtiofsd(cache: Path) -> Peer:
    """QEMU 7.2's, of Debian 12: the installed one, or its package unpacked."""
    installed = Path("/usr/lib/qemu/virtiofsd")
    binary = installed
    if not installed.exists():
        target = cache / "bench/qemu-system-common"
        if not target.exists():
            _unpack([open_root(Release.BOOKWORM, cache).download("qemu-system-common")], target)
        binary = target / "usr/lib/qemu/virtiofsd"
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
    version = next(iter(said.splitlines()), "").replace("virtiofsd version ", "")
    options = ("-o", "source={dir}", "-o", "sandbox=chroot", "-o", "cache=auto")
    return Peer("C virtiofsd", version, (str(binary), "--socket-path={socket}", *options))


def rust_virtiofsd(cache: Path) -> Peer:
    """Debian 13's, with the libraries that it was built for."""
    target = cache / "bench/virtiofsd"
    if not target.exists():
        archive = open_root(Release.TRIXIE, cache)
        packages = ("virtiofsd", "libc6", "libseccomp2", "libcap-ng0", "libgcc-s1")
        _unpack([archive.download(package) for package in packages], target)
    libraries = str(target / _LIBRARIES)
    loader = (f"{libraries}/ld-linux-x86-64.so.2", "--library-path", libraries)
    binary = str(target / "usr/libexec/virtiofsd")
    said = subprocess.run([*loader, binary, "--version"], capture_output=True, text=True, check=False).stdout
    options = ("--socket-path={socket}", "--shared-dir={dir}", "--sandbox=none", "--cache=auto")
    return Peer("Rust virtiofsd", said.replace("virtiofsd", "").strip(), (*loader, binary, *options))


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens."""

    pid: int
    socket: Path

    def processes(self) -> list[int]:
        """It and what it has started."""
        found, left = [], [self.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    left += map(int, (task / "children").read_text().split())
        return found

    def cpu_s(self) -> float:
        """Processor time of all threads by now."""
        total_ns = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total_ns += int((task / "schedstat").read_text().split()[0])
        return total_ns / 1e9

    def go_first(self, processor: int) -> None:
        """All threads on this processor, ahead of everything that is not real-time; for good."""
        for pid in self.processes():
            for task in Path(f"/proc/{pid}/task").iterdir():
                go_first(int(task.name), processor)

    def stay_on(self, processor: int) -> None:
        """All threads on this processor, for good."""
        for pid in self.processes():
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {processor})

    def private_bytes(self) -> int:
        """Memory that is its own; what processes share counts for none of them."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Private_Dirty:"):
                        total += int(line.split()[1]) * 1024
        return total


def go_first(task: int, processor: int) -> None:
    """A thread, 0: the calling one."""
    os.sched_setaffinity(task, {processor})
    os.sched_setscheduler(task, os.SCHED_FIFO, os.sched_param(1))


@contextlib.contextmanager
def ahead_of_others(servers: Iterable[Running]) -> Iterator[None]:
    """The calling thread and the servers each have a processor to themselves, whatever else runs."""
    allowed = sorted(os.sched_getaffinity(0))
    for server in servers:
        server.go_first(allowed[-1])
    go_first(0, allowed[0])
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def on_one_processor(servers: Iterable[Running]) -> Iterator[None]:
    """The calling thread and the servers share a processor, with what else runs there."""
    allowed = sorted(os.sched_getaffinity(0))
    for server in servers:
        server.stay_on(allowed[0])
    os.sched_setaffinity(0, allowed[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def running(
    peer: Peer, directory: Path, await_socket: Callable[[float], None] = time.sleep
) -> Iterator[Running]:
    """Starts it and waits until its socket is there; ends it, unless it ends with its connection."""
    with tempfile.TemporaryDirectory(prefix="vhostfs-bench-") as place:
        socket = Path(place) / "s"
        command = [word.format(socket=socket, dir=directory) for word in peer.command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (Path(place) / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"{peer.name} does not start: {(Path(place) / 'log').read_text()}")
                await_socket(0.005)
            yield Running(process.pid, socket)
        finally:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
