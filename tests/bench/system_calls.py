# SPDX-License-Identifier: Apache-2.0
"""scripts/system-calls: how many system calls each server makes for an operation of scripts/bench.

Must not know how requests are laid out (ring_load.py). What else the machine does hardly changes counts.
Specification: docs/performance.md, "System calls"; perf-stat(1), --control.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import figures
from tests.bench.peers import ROOT, Peer, Running, c_virtiofsd, running, rust_virtiofsd, vhostfs_peer
from tests.bench.ring_load import Load, build_library
from tests.bench.workloads import WORKLOADS, prepare
from vhostfs.vm.cache import cache_root

TABLE = ROOT / "tests/bench/system-calls.md"
TRACING = Path("/sys/kernel/tracing/events/syscalls")
DEPTHS = (1, 16)
WAKES = ("poll", "ppoll", "epoll_wait", "epoll_pwait", "read", "write", "futex", "getrusage")
"""Only eventfds are read and written so; the data of files goes by preadv and pwritev and the like."""
WORK = (
    *(
        "openat",
        "openat2",
        "close",
        "statx",
        "newfstatat",
        "newfstat",
        "name_to_handle_at",
        "open_by_handle_at",
    ),
    *(
        "fstatfs",
        "getdents64",
        "lseek",
        "fcntl",
        "preadv",
        "preadv2",
        "pread64",
        "pwritev",
        "pwritev2",
        "unlinkat",
    ),
    *("setresuid", "setresgid", "geteuid", "getegid", "setfsuid", "setfsgid", "fchdir", "umask"),
)
TOTAL = "raw_syscalls:sys_enter"


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one operation."""

    calls: Mapping[str, float]
    total: float

    def work(self) -> float:
        return self.total - sum(self.calls.get(name, 0) for name in WAKES)

    def wakes(self) -> float:
        return sum(self.calls.get(name, 0) for name in WAKES)

    def shown(self) -> str:
        """What is done with files, by name; in brackets, how often."""
        named = {name: n for name, n in self.calls.items() if name not in WAKES and n >= 0.05}
        rest = self.work() - sum(named.values())
        parts = [
            name if abs(n - 1) < 0.05 else f"{name} ({n:.1f})".replace(".0)", ")")
            for name, n in named.items()
        ]
        parts += [f"others ({rest:.1f})"] if rest >= 0.1 else []
        return f"{self.work():.1f}: ".replace(".0:", ":") + ", ".join(parts)


@contextlib.contextmanager
def _counting(server: Running, into: Counter[str]) -> Iterator[None]:
    """perf counts in the server's threads while the block lasts."""
    events = [
        f"syscalls:sys_enter_{name}" for name in (*WAKES, *WORK) if (TRACING / f"sys_enter_{name}").exists()
    ]
    pids = ",".join(map(str, server.processes()))
    control, told = os.pipe(), os.pipe()
    with tempfile.NamedTemporaryFile(prefix="vhostfs-calls-") as output:
        command = ["perf", "stat", "-x;", "-D-1", f"--control=fd:{control[0]},{told[1]}", "-o", output.name]
        perf = subprocess.Popen(
            [*command, "-p", pids, "-e", ",".join([TOTAL, *events])],
            pass_fds=(control[0], told[1]),
            stderr=subprocess.DEVNULL,
        )
        try:
            for word in (b"enable\n", b"disable\n"):
                os.write(control[1], word)
                os.read(told[0], 16)
                if word == b"enable\n":
                    yield
        finally:
            perf.send_signal(signal.SIGINT)
            perf.wait(10)
            for fd in (*control, *told):
                os.close(fd)
        for line in Path(output.name).read_text().splitlines():
            fields = line.split(";")
            if len(fields) > 2 and fields[0].isdigit():
                into[fields[2].removeprefix("syscalls:sys_enter_")] += int(fields[0])


def _count(
    peers: Sequence[Peer], names: Sequence[str], duration_s: float
) -> dict[tuple[str, int, str], Counted]:
    library = build_library(cache_root() / "bench")
    found = {}
    chosen = [one for one in WORKLOADS if one.name in names]
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhostfs-calls-files-")))
        prepare(place)
        servers = [stack.enter_context(running(peer, place)) for peer in peers]
        clients = [figures.mount(server) for server in servers]
        for workload, depth in itertools.product(chosen, DEPTHS):
            for peer, server, client in zip(peers, servers, clients, strict=True):
                prepared = workload.prepare(client)
                load = Load(library, client, depth, prepared.row, prepared.fields)
                load.run(0.05)
                calls: Counter[str] = Counter()
                with _counting(server, calls):
                    rows = load.run(duration_s).rows
                total = calls.pop(TOTAL) / rows
                one = Counted({name: n / rows for name, n in calls.items()}, total)
                found[workload.name, depth, peer.name] = one
        for client in clients:
            client.close()
    return found


def _table(peers: Sequence[Peer], found: Mapping[tuple[str, int, str], Counted]) -> list[str]:
    names = [peer.name for peer in peers]
    heads = ["workload", *names, *(f"waking, depth {depth}" for depth in DEPTHS)]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for workload in dict.fromkeys(key[0] for key in found):
        cells = [found[workload, DEPTHS[-1], name].shown() for name in names]
        for depth in DEPTHS:
            cells.append(" / ".join(f"{found[workload, depth, name].wakes():.2f}" for name in names))
        rows.append(f"| {workload} | {' | '.join(cells)} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/system-calls", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default=",".join(one.name for one in WORKLOADS), help="(default: all)")
    parser.add_argument("--duration", type=float, default=0.2, help="seconds for each (default: 0.2)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    if os.geteuid() != 0 or shutil.which("perf") is None or not TRACING.exists():
        raise SystemExit(
            "needs root, perf (on Debian: apt install linux-perf) and tracefs at /sys/kernel/tracing"
        )
    peers = [vhostfs_peer(), c_virtiofsd(cache_root()), rust_virtiofsd(cache_root())]
    rows = _table(peers, _count(peers, given.workloads.split(","), given.duration))
    print(*rows, sep="\n")
    if given.write:
        TABLE.write_text("\n".join(rows) + "\n")
        print(f"written: {TABLE.relative_to(ROOT)}", file=sys.stderr)
    return 0
