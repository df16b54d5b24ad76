# SPDX-License-Identifier: Apache-2.0
"""Draws the matrix of an experiment as SVG: a row for each cell, a square for each step, or bars of a figure.
Must not know how results came about.
Specification: docs/lab.md, "What a report says"; SVG 1.1."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .results import CellResult, ExperimentResult, Verdict

COLOURS = {
    Verdict.ALL: "#2e9e5b",
    Verdict.ORDER: "#8cc152",
    Verdict.MORE: "#4a90d9",
    Verdict.PARTS: "#e6b800",
    Verdict.DIRECTORY: "#f5b878",
    Verdict.LOSS: "#f08c2e",
    Verdict.SOME: "#d9534f",
    Verdict.NONE: "#9e9e9e",
}
OUTCOMES = {
    "full": "#2e9e5b",
    "reduced": "#e6b800",
    "refused": "#d9534f",
    "none": "#9e9e9e",
    "failed": "#333333",
}
_ROW, _SQUARE, _LETTER = 20, 18, 6.8
_BAR = 220
_BOLD = ' font-weight="bold"'


def label_of(cell: CellResult, varied: Sequence[str]) -> str:
    """What tells a cell from the others."""
    words = cell.cell.words()
    return ", ".join(words[axis] for axis in varied) or "the only cell"


def picture(result: ExperimentResult) -> str:
    """Steps where there are any, else bars of what was measured."""
    labels = [label_of(cell, result.experiment.varied) for cell in result.cells]
    axes = ", ".join(result.experiment.varied)
    left = 12 + int(_LETTER * max(map(len, [*labels, axes])))
    if any(cell.steps for cell in result.cells):
        return _squares(result.cells, labels, left, axes)
    return _bars(result.cells, labels, left, axes)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_SQUARE - 2}" rx="2" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="monospace" font-size="11">{"".join(parts)}</svg>'
    )


def _squares(cells: Sequence[CellResult], labels: Sequence[str], left: int, axes: str) -> str:
    steps = max((cell.steps for cell in cells), key=len)
    top = 14 + int(_LETTER * 0.75 * max(len(step.label) for step in steps))
    parts = [_text(4, top - 7, axes, _BOLD)]
    for column, step in enumerate(steps):
        at = left + 88 + column * _SQUARE
        parts.append(_text(at, top - 6, step.label, f' transform="rotate(-45 {at:g} {top - 6:g})"'))
    for row, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        y = top + row * _ROW
        parts.append(_text(4, y + 13, label))
        parts.append(_box(left, y, 66, OUTCOMES[cell.outcome], cell.trouble or "\n".join(cell.said)))
        parts.append(_text(left + 33, y + 13, cell.outcome, ' text-anchor="middle" fill="white"'))
        for column, step in enumerate(cell.steps):
            host, guest = "\n".join(step.host), "\n".join(step.guest)
            title = f"{step.label}: {step.verdict.value}\non the host:\n{host}\nin the guest:\n{guest}"
            parts.append(_box(left + 76 + column * _SQUARE, y, _SQUARE - 2, COLOURS[step.verdict], title))
    y = top + len(cells) * _ROW + 8
    x = 4.0
    for verdict in Verdict:
        parts.append(_box(x, y, _SQUARE - 2, COLOURS[verdict], verdict.value))
        parts.append(_text(x + _SQUARE + 2, y + 13, verdict.value))
        x += _SQUARE + 16 + _LETTER * len(verdict.value)
    width = max(left + 96 + len(steps) * _SQUARE + 0.75 * _LETTER * len(steps[-1].label), x + 10)
    return _svg(width, y + _ROW + 4, parts)


BARS = ("events/s", "server us/event", "p50 us", "lost")


def _bars(cells: Sequence[CellResult], labels: Sequence[str], left: int, axes: str) -> str:
    shown = [name for name in BARS if any(cell.figures.get(name) for cell in cells)]
    parts = [_text(4, 14, axes, _BOLD)]
    for column, name in enumerate(shown):
        start = left + column * (_BAR + 90)
        parts.append(_text(start, 14, name, _BOLD))
        most = max(cell.figures.get(name, 0) for cell in cells) or 1
        for row, cell in enumerate(cells):
            value = cell.figures.get(name)
            if value is None:
                continue
            y = 22 + row * _ROW
            width = max(1.0, _BAR * value / most)
            parts.append(_box(start, y, width, "#4a90d9", f"{name}: {value:g}"))
            parts.append(_text(start + width + 4, y + 13, f"{value:g}"))
    for row, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        text = label if cell.figures else f"{label}: {cell.outcome}"
        parts.append(_text(4, 22 + row * _ROW + 13, text))
    return _svg(left + max(1, len(shown)) * (_BAR + 90), 30 + len(cells) * _ROW, parts)
