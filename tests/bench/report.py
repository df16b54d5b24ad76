# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md: tables, goals that are missed with their reasons, and plots as SVG.

Must not measure anything.
Specification: docs/performance.md itself; SVG 1.1.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.event_latency import Latencies
from tests.bench.figures import Burst, Foreign, Memory, Queues, StartUp
from tests.bench.instructions import TABLE as INSTRUCTIONS
from tests.bench.system_calls import TABLE as SYSTEM_CALLS
from tests.bench.workloads import WORKLOADS

OURS, C, RUST = "vhostfs", "C virtiofsd", "Rust virtiofsd"
COLOURS = {OURS: "#1f6fb2", C: "#c8792b", RUST: "#8a8a8a"}
GOAL_C, GOAL_MEDIAN, GOAL_RUST = 1.0, 1.25, 1.5


@dataclass(frozen=True, slots=True)
class Point:
    """One workload of one server in one round."""

    server: str
    workload: str
    depth: int
    rows_a_second: float
    p50_us: float
    p99_us: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Results:
    """All that was measured; None: left out."""

    date: str
    command: str
    versions: Mapping[str, str]
    commands: Mapping[str, str]
    rounds: int
    load: tuple[float, float]  # of the machine, before and after
    points: Sequence[Point]
    apart: Sequence[Point]  # driver and server on a processor each
    start: Mapping[str, StartUp]
    queues: Queues | None = None
    memory: Memory | None = None
    quiet: Latencies | None = None
    loaded: Latencies | None = None
    burst: Burst | None = None
    foreign: Foreign | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A workload at a depth: medians over the rounds."""

    workload: str
    depth: int
    rate: Mapping[str, float]
    cpu_us: Mapping[str, float]
    p50_us: Mapping[str, float]

    def times(self, peer: str) -> float:
        return self.rate[OURS] / self.rate[peer] if peer in self.rate else float("nan")


def lines_of(points: Sequence[Point]) -> list[Line]:
    keys = sorted({(one.workload, one.depth) for one in points}, key=_in_order)
    lines = []
    for workload, depth in keys:
        here = [one for one in points if (one.workload, one.depth) == (workload, depth)]
        servers = {one.server for one in here}

        def median(field: str, server: str, here: Sequence[Point] = here) -> float:
            return float(statistics.median(getattr(one, field) for one in here if one.server == server))

        lines.append(
            Line(
                workload,
                depth,
                {server: median("rows_a_second", server) for server in servers},
                {server: median("cpu_us", server) for server in servers},
                {server: median("p50_us", server) for server in servers},
            )
        )
    return lines


def _in_order(key: tuple[str, int]) -> tuple[int, int]:
    return [one.name for one in WORKLOADS].index(key[0]), key[1]


def _verdict(value: float, goal: float) -> str:
    return f"{value:.2f}" if value >= goal else f"**{value:.2f}**"


def table(lines: Sequence[Line]) -> list[str]:
    rows = [
        "| workload | depth | ops/s | x C | x Rust | p50 µs | C | CPU µs/op | C | Rust |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        nan = float("nan")
        ours, other, rust = line.cpu_us[OURS], line.cpu_us.get(C, nan), line.cpu_us.get(RUST, nan)
        shown = f"**{ours:.2f}**" if ours > other else f"{ours:.2f}"
        rows.append(
            f"| {line.workload} | {line.depth} | {line.rate[OURS]:,.0f} "
            f"| {_verdict(line.times(C), GOAL_C)} | {_verdict(line.times(RUST), GOAL_RUST)} "
            f"| {line.p50_us[OURS]:.1f} | {line.p50_us.get(C, nan):.1f} "
            f"| {shown} | {other:.2f} | {rust:.2f} |"
        )
    return rows


def _machine() -> str:
    model = "a processor that does not say its name"
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            model = text.split(":", 1)[1].strip()
            break
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cores} cores of {model}, {memory_gib:.0f} GiB, Linux {os.uname().release}"


_BUSY = 1.5
"""A load average beyond what building and the start of this command leave behind."""


def _load(load: tuple[float, float]) -> str:
    before, after = load
    text = f"Load average before and after: {before:.1f} and {after:.1f}"
    if before > _BUSY:
        text += ": **the machine had other work**, so figures at depth 1, percentiles and rates are too low"
    return f"{text}."


def _summary(lines: Sequence[Line]) -> list[str]:
    text = []
    for peer, goal, all_goal in ((C, GOAL_MEDIAN, GOAL_C), (RUST, GOAL_RUST, GOAL_RUST)):
        ratios = [line.times(peer) for line in lines if peer in line.rate]
        if ratios:
            missed = sum(ratio < all_goal for ratio in ratios)
            text.append(
                f"- against the {peer}: median {_verdict(statistics.median(ratios), goal)}x (goal {goal}x), "
                f"{len(ratios) - missed} of {len(ratios)} at {all_goal}x or more, lowest {min(ratios):.2f}x"
            )
    both = [line for line in lines if C in line.cpu_us]
    if both:
        under = sum(line.cpu_us[OURS] <= line.cpu_us[C] for line in both)
        text.append(f"- processor time for an operation at or below the {C}'s: {under} of {len(both)}")
    return text


def _other_figures(results: Results) -> list[str]:
    rows = ["| figure | goal | seen |", "|---|---|---|"]
    for server, start in results.start.items():
        goal = "150 ms of CPU" if server == OURS else ""
        seen = f"{start.cpu_ms:.0f} ms of CPU, {start.wall_ms:.0f} ms"
        rows.append(f"| start to first reply, {server} | {goal} | {seen} |")
    if results.queues is not None:
        rates = results.queues.a_second
        one = rates[min(rates)]
        seen = "; ".join(f"{count}: {rate:,.0f} ({rate / one:.2f}x)" for count, rate in sorted(rates.items()))
        rows.append(f"| listings a second by the number of request queues | more with more | {seen} |")
    if results.memory is not None:
        memory = results.memory
        seen = f"{memory.bytes_an_inode:.0f} bytes"
        rows.append(f"| private memory an inode, {memory.inodes:,} held | 200 bytes | {seen} |")
        growth = (memory.after_flood - memory.at_rest) / 1024
        rows.append(f"| growth in {memory.flood:,} lookups, each forgotten | flat | {growth:.0f} KiB |")
    for what, both in (("quiet", results.quiet), ("while it also does I/O", results.loaded)):
        if both is not None:
            for to, goal, latency in (
                ("element", "p50 150 µs, p99 1 ms", both.element),
                ("a process that only reads fanotify", "", both.bare),
            ):
                rows.append(
                    f"| mknod to {to}, 1,000 a second, guest {what} | {goal} "
                    f"| p50 {latency.p50_us:.0f} µs, p99 {latency.p99_us:.0f} µs |"
                )
    if results.burst is not None:
        burst = results.burst
        rows.append(
            f"| burst of {burst.changes:,} changes | all, 200,000 a second "
            f"| {burst.delivered:,} elements, {burst.losses} losses, {burst.a_second:,.0f} a second "
            f"(made at {burst.changes_a_second:,.0f}) |"
        )
    if results.foreign is not None:
        foreign = results.foreign
        rows.append(
            f"| foreign changes on the file system | 300,000 a second for 0.25 processors "
            f"| {foreign.a_second:,.0f} a second for {foreign.processors:.2f} |"
        )
    return rows


def text(results: Results) -> list[str]:
    """What is shown when it has ended."""
    shown = []
    for points in (results.points, results.apart):
        lines = lines_of(points)
        shown += [*table(lines), "", *_summary(lines), ""] if lines else []
    return [*shown, *_other_figures(results)]


def _instructions() -> str:
    rows = [line.split() for line in INSTRUCTIONS.read_text().splitlines() if not line.startswith("#")]
    return "\n".join(
        ["| operation | instructions |", "|---|---|", *(f"| {name} | {n} |" for name, n in rows)]
    )


def write(results: Results, template: Path, target: Path) -> None:
    """The document, and its plots beside it. What people write is in the template."""
    lines, apart = lines_of(results.points), lines_of(results.apart)
    commands = [f"    {name}: {command}" for name, command in results.commands.items()]
    versions = "; ".join(f"{name} {version}" for name, version in results.versions.items())
    how = f"{results.rounds} rounds, medians. {_load(results.load)}"
    filled = {
        "when": f"{results.date}, {_machine()}. {versions}. {how}",
        "command": f"    {results.command}",
        "commands": "\n".join(commands),
        "summary": "\n".join(_summary(lines)),
        "table": "\n".join(table(lines)),
        "summary_apart": "\n".join(_summary(apart)),
        "table_apart": "\n".join(table(apart)),
        "figures": "\n".join(_other_figures(results)),
        "instructions": _instructions(),
        "system_calls": SYSTEM_CALLS.read_text().rstrip(),
        "workloads": "\n".join(f"- **{one.name}**: {one.what}" for one in WORKLOADS),
    }
    text = template.read_text()
    for key, value in filled.items():
        text = text.replace("{{" + key + "}}", value)
    target.write_text(text)
    plots = target.parent / "performance"
    plots.mkdir(exist_ok=True)
    for depth in sorted({line.depth for line in lines}):
        here = [line for line in lines if line.depth == depth]
        (plots / f"speed-{depth}.svg").write_text(speed_plot(here, f"Operations a second, depth {depth}"))
        (plots / f"cpu-{depth}.svg").write_text(cpu_plot(here, f"Server CPU an operation, depth {depth}"))


# ---- plots ------------------------------------------------------------------------------------------------

_LABEL, _WIDTH, _BAR, _GAP, _TOP = 110, 460, 9, 8, 46


def speed_plot(lines: Sequence[Line], title: str) -> str:
    """Bars relative to the C virtiofsd, which is the line at 1."""
    rows = [
        (line.workload, {s: line.rate[s] / line.rate[C] for s in COLOURS if s in line.rate}) for line in lines
    ]
    return _bars(rows, f"{title}, C virtiofsd = 1")


def cpu_plot(lines: Sequence[Line], title: str) -> str:
    rows = [
        (line.workload, {s: line.cpu_us[s] / line.cpu_us[C] for s in COLOURS if s in line.cpu_us})
        for line in lines
    ]
    return _bars(rows, f"{title}, C virtiofsd = 1 (less is better)")


def _bars(rows: Sequence[tuple[str, Mapping[str, float]]], title: str) -> str:
    widest = max(1.5, *(value for _, values in rows for value in values.values()))
    step = len(COLOURS) * _BAR + _GAP
    height = _TOP + len(rows) * step + 20
    scale = _WIDTH / widest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 60}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-size="13">{title}</text>',
    ]
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = _LABEL + i * 120
        parts.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="33">{name}</text>')
    for i, (workload, values) in enumerate(rows):
        top = _TOP + i * step
        parts.append(f'<text x="{_LABEL - 6}" y="{top + 18}" text-anchor="end">{workload}</text>')
        for j, (name, colour) in enumerate(COLOURS.items()):
            if name in values:
                y, width = top + j * _BAR, values[name] * scale
                parts.append(
                    f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 1}" fill="{colour}"/>'
                )
                parts.append(
                    f'<text x="{_LABEL + width + 3:.1f}" y="{y + 8}" font-size="8">{values[name]:.2f}</text>'
                )
    line = _LABEL + scale
    parts.append(f'<line x1="{line:.1f}" y1="{_TOP - 4}" x2="{line:.1f}" y2="{height - 16}" stroke="black"/>')
    parts.append("</svg>\n")
    return "\n".join(parts)
