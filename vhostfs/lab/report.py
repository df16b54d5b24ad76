# SPDX-License-Identifier: Apache-2.0
"""Owns what people and programs are given of results: a table for a terminal, JSON, and one HTML file.
Must not run anything.
Specification: docs/lab.md, "What a report says"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .picture import OUTCOMES, label_of, picture
from .results import CellResult, ExperimentResult, Verdict

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Where and when; what makes figures of two reports comparable, or not."""

    when: str
    vhostfs: str
    kernel: str
    processors: int
    load: float
    """The larger load average of its beginning and its end: figures of a busy machine are no measure."""
    command: str

    def __str__(self) -> str:
        return (
            f"vhostfs {self.vhostfs} on Linux {self.kernel}, {self.processors} processors "
            f"(load {self.load:.1f}), {self.when}: {self.command}"
        )


# ---- text -----------------------------------------------------------------------------------------------


def text_table(result: ExperimentResult) -> Iterator[str]:
    """Lines for a terminal."""
    labels = [label_of(cell, result.experiment.varied) for cell in result.cells]
    width = max(map(len, labels), default=0)
    for label, cell in zip(labels, result.cells, strict=True):
        yield f"  {label:{width}}  {cell.outcome:8} {cell.way:9}  {_told(cell)}".rstrip()


def _told(cell: CellResult) -> str:
    if cell.trouble:
        return cell.trouble
    if cell.refused:
        return cell.refused
    if cell.steps:
        lacking = [
            f"{step.label}: {step.verdict.value}" for step in cell.steps if step.verdict is not Verdict.ALL
        ]
        if len(lacking) == len(cell.steps) and not cell.arrived:
            values = {step.verdict.value for step in cell.steps}
            lacking = [f"each step: {values.pop()}"] if len(values) == 1 else lacking
        return f"{cell.arrived}/{len(cell.steps)}{'; ' if lacking else ''}{', '.join(lacking)}"
    return ", ".join(f"{name} {value:g}" for name, value in cell.figures.items())


# ---- JSON -----------------------------------------------------------------------------------------------


def json_text(results: Iterable[ExperimentResult], circumstances: Circumstances) -> str:
    """All of it, for programs."""
    data = {
        "format": FORMAT,
        "circumstances": {
            name: getattr(circumstances, name)
            for name in ("when", "vhostfs", "kernel", "processors", "load", "command")
        },
        "experiments": [_experiment(result) for result in results],
    }
    return json.dumps(data, indent=1) + "\n"


def _experiment(result: ExperimentResult) -> dict[str, Any]:
    return {
        "name": result.experiment.name,
        "question": result.experiment.question,
        "workload": result.experiment.workload,
        "level": result.level,
        "cells": [_cell(cell) for cell in result.cells],
    }


def _cell(cell: CellResult) -> dict[str, Any]:
    return {
        "cell": cell.cell.words(),
        "outcome": cell.outcome,
        "way": cell.way,
        "flags": cell.flags,
        "notify_buf_size": cell.notify_buf_size,
        "refused": cell.refused,
        "trouble": cell.trouble,
        "less": cell.less,
        "log": cell.said,
        "figures": cell.figures,
        "took_s": round(cell.took_s, 3),
        "steps": [
            {
                "step": step.label,
                "verdict": step.verdict.value,
                "host": list(step.host),
                "guest": list(step.guest),
            }
            for step in cell.steps
        ],
    }


# ---- HTML -----------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: .25em .5em; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
.picture { overflow-x: auto; }
.outcome { color: white; border-radius: 3px; padding: 0 .4em; }
.log { color: #555; font: 12px monospace; }
p.where { color: #555; }
"""


def html_text(results: Sequence[ExperimentResult], circumstances: Circumstances) -> str:
    """One file without anything beside it."""
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>vhostfs lab</title><style>{_STYLE}</style></head><body>",
        f'<h1>vhostfs lab</h1><p class="where">{escape(str(circumstances))}</p>',
    ]
    for result in results:
        parts += _section(result)
    return "\n".join([*parts, "</body></html>\n"])


def _section(result: ExperimentResult) -> Iterator[str]:
    experiment = result.experiment
    yield f"<h2>{escape(experiment.name)}</h2><p>{escape(experiment.question)}</p>"
    level = "our own front end" if result.level == "ring" else "real guests"
    yield f'<p class="where">{len(result.cells)} cells, workload {experiment.workload}, {level}.</p>'
    yield f'<div class="picture">{picture(result)}</div>'
    figures = list(dict.fromkeys(name for cell in result.cells for name in cell.figures))
    has_steps = any(cell.steps for cell in result.cells)
    heads = [*experiment.varied, "outcome", "way", "longest element", *figures]
    heads += ["told in full"] if has_steps else []
    yield f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in [*heads, 'less, and why'])}</tr>"
    for cell in result.cells:
        words = cell.cell.words()
        row = [escape(words[axis]) for axis in experiment.varied]
        colour = OUTCOMES[cell.outcome]
        row.append(f'<span class="outcome" style="background:{colour}">{cell.outcome}</span>')
        row += [cell.way, str(cell.notify_buf_size or "")]
        row += [f"{cell.figures[name]:g}" if name in cell.figures else "" for name in figures]
        if has_steps:
            row.append(f"{cell.arrived} of {len(cell.steps)}" if cell.steps else "")
        row.append(f'<span class="log">{"<br>".join(map(escape, _why(cell)))}</span>')
        yield f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>"
    yield "</table>"


def _why(cell: CellResult) -> list[str]:
    if cell.trouble:
        return [cell.trouble]
    if cell.outcome in ("refused", "none") or not cell.less:
        return [line for line in cell.said if cell.outcome != "full"]
    return cell.less
