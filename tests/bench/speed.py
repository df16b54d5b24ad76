# SPDX-License-Identifier: Apache-2.0
"""scripts/bench: measures this tree's server and the two virtiofsd in turns, and writes docs/performance.md.

Must not know how requests are laid out (ring_load.py) or what the document says (report.py).
Specification: docs/performance.md.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.bench import event_latency, figures, report
from tests.bench.peers import (
    ROOT,
    Peer,
    Running,
    ahead_of_others,
    c_virtiofsd,
    on_one_processor,
    running,
    rust_virtiofsd,
    vhostfs_peer,
)
from tests.bench.ring_load import Load, build_library
from tests.bench.workloads import WORKLOADS, Workload, prepare
from vhostfs.frontend.vhost_user import BackendGoneError
from vhostfs.vm.cache import cache_root
from vhostfs.vm.errors import VmError

TEMPLATE = ROOT / "tests/bench/performance.md.in"
TARGET = ROOT / "docs/performance.md"
WARM_UP_S = 0.03
Placing = Callable[[Iterable[Running]], contextlib.AbstractContextManager[None]]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="rounds, in each every server (default: 6)")
    parser.add_argument(
        "--duration", type=float, default=0.25, help="seconds for each workload (default: 0.25)"
    )
    parser.add_argument("--depths", default="1,16", help="operations in flight (default: 1,16)")
    parser.add_argument(
        "--workloads", default="", help=f"default: all of {','.join(w.name for w in WORKLOADS)}"
    )
    parser.add_argument(
        "--inodes", type=int, default=1_000_000, help="held for the figure of memory; 0: none"
    )
    parser.add_argument(
        "--burst", type=int, default=1_000_000, help="changes in the burst of events; 0: no events"
    )
    parser.add_argument(
        "--directory", type=Path, help="where files are made (default: the temporary directory)"
    )
    parser.add_argument("--no-peers", action="store_true", help="this tree's server alone")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ahead",
        action="store_const",
        const=ahead_of_others,
        dest="placing",
        help="driver and server on a processor each, ahead of other work, only: for ratios on a busy machine "
        "(default: rounds of that and rounds as the kernel places them)",
    )
    where.add_argument(
        "--together",
        action="store_const",
        const=on_one_processor,
        dest="placing",
        help="driver and server on one processor, only",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"write {TARGET.relative_to(ROOT)} and its plots"
    )
    return parser


def _one_round(
    peers: Sequence[Peer],
    place: Path,
    workloads: Sequence[Workload],
    depths: Sequence[int],
    duration_s: float,
    placing: Placing | None,
) -> list[report.Point]:
    """Each workload on all servers, one directly after the other: so they have the same machine."""
    library = build_library(cache_root() / "bench")
    points = []
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(peer, place)) for peer in peers]
        clients = [figures.mount(server) for server in servers]
        if placing:
            stack.enter_context(placing(servers))
        for workload, depth in itertools.product(workloads, depths):
            for peer, server, client in zip(peers, servers, clients, strict=True):
                prepared = workload.prepare(client)
                load = Load(library, client, depth, prepared.row, prepared.fields)
                load.run(WARM_UP_S)
                before_s = server.cpu_s()
                seen = load.run(duration_s)
                cpu_us = (server.cpu_s() - before_s) / seen.rows * 1e6
                points.append(
                    report.Point(
                        peer.name, workload.name, depth, seen.rows_a_second, seen.p50_us, seen.p99_us, cpu_us
                    )
                )
        for client in clients:
            client.close()
    return points


def _peers(arguments: argparse.Namespace) -> list[Peer]:
    peers = [vhostfs_peer()]
    if not arguments.no_peers:
        for fetch in (c_virtiofsd, rust_virtiofsd):
            try:
                peers.append(fetch(cache_root()))
            except VmError as error:
                raise SystemExit(f"a peer cannot be fetched: {error}; --no-peers does without") from None
    return peers


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = _parser().parse_args(words)
    if os.geteuid() != 0:
        raise SystemExit("scripts/bench needs root: the C virtiofsd serves nobody else")
    chosen = given.workloads.split(",") if given.workloads else [one.name for one in WORKLOADS]
    workloads = [one for one in WORKLOADS if one.name in chosen]
    depths = [int(word) for word in given.depths.split(",")]
    # As pip leaves what it installs; compiling is no part of a start.
    compileall.compile_dir(ROOT / "vhostfs", quiet=1)
    peers = _peers(given)
    library = build_library(cache_root() / "bench")
    points: list[report.Point] = []
    apart: list[report.Point] = []
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vhostfs-bench-files-", dir=given.directory) as files:
        place = Path(files)
        prepare(place)
        for turn in range(given.rounds):
            _say(f"round {turn + 1} of {given.rounds}")
            # Another one first in each round.
            first = turn % len(peers)
            order = [*peers[first:], *peers[:first]]
            points += _one_round(order, place, workloads, depths, given.duration, given.placing)
            if not given.placing:
                apart += _one_round(order, place, workloads, depths, given.duration, ahead_of_others)
        _say("start to first reply")
        start = {peer.name: figures.start_up(peer, place, 7) for peer in peers}
        _say("several request queues")
        queues = figures.queues(peers[0], place, library, (1, 2, 4))
    memory = quiet = loaded = burst = foreign = None
    if given.inodes:
        _say(f"memory with {given.inodes} inodes")
        with tempfile.TemporaryDirectory(prefix="vhostfs-bench-inodes-", dir=given.directory) as many:
            memory = figures.memory(peers[0], Path(many), given.inodes, library)
    if given.burst:
        watcher = vhostfs_peer("--tag=bench")
        try:
            _say("events: latency")
            plain = vhostfs_peer("--events=off")
            quiet = event_latency.latencies(watcher, plain, library, 6000, with_load=False)
            loaded = event_latency.latencies(watcher, plain, library, 6000, with_load=True)
            _say(f"events: a burst of {given.burst}")
            burst = figures.event_burst(watcher, library, given.burst)
            _say("events: foreign ones")
            foreign = figures.foreign_events(vhostfs_peer("--tag=bench", "--events=fanotify:filesystem"), 4.0)
        except (BackendGoneError, TimeoutError) as error:
            _say(f"events: {error}")
    results = report.Results(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        command=shlex.join(["scripts/bench", *words]),
        versions={peer.name: peer.version for peer in peers},
        commands={peer.name: peer.shown() for peer in peers},
        rounds=given.rounds,
        load=(load_before, os.getloadavg()[0]),
        points=points,
        apart=apart,
        start=start,
        queues=queues,
        memory=memory,
        quiet=quiet,
        loaded=loaded,
        burst=burst,
        foreign=foreign,
    )
    for line in report.text(results):
        print(line)
    if given.write:
        report.write(results, TEMPLATE, TARGET)
        _say(f"written: {TARGET.relative_to(ROOT)}")
    return 0
