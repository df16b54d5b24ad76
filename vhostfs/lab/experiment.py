# SPDX-License-Identifier: Apache-2.0
"""Owns experiments as data: the TOML of one, checked, and the cells of its matrix.
Must not know how a cell is run.
Specification: docs/lab.md, "An experiment"."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..cli.parser import nearest
from ..errors import UserError
from ..frontend.fsnotify import ALL_EVENTS, NOTIFY_BUF_BYTES, Event, Granted
from ..fuse.forced import ForcedError, parse_pair
from ..vm.kernel import DEFAULT_SERIES, SERIES
from .workloads import WORKLOADS

MAX_CELLS = 10_000


class ExperimentError(UserError):
    """An experiment that cannot be meant: one line with the file, what was seen, and what would be right."""

    exit_status = 2


SOURCES: Mapping[str, tuple[str, ...]] = {
    "auto": ("--events=auto",),
    "fanotify": ("--events=fanotify:filesystem",),
    "inode-marks": ("--events=fanotify:inodes",),
    "no-fan-rename": ("--events=fanotify:filesystem", "--no-fan-rename"),
    "no-target-fid": ("--events=fanotify:filesystem", "--negotiate=target_fid=off"),
    "before-5.17": ("--events=fanotify:filesystem", "--no-fan-rename", "--negotiate=target_fid=off"),
    "unprivileged": ("--events=auto", "--negotiate=sys_admin=off"),
    "inotify": ("--events=inotify",),
    "off": ("--events=off",),
}
"""Where the server learns of changes, as options."""

DELIVERIES = ("auto", "virtqueue", "parked")
VMMS = ("stock", "test-device", "patched")
LEVELS = ("ring", "guest")
_FLAGS = {str(flag.name).lower(): flag for flag in Granted}
_DRIVER_LIMITS = {"buf_size": 65536, "major": 0xFFFF_FFFF, "minor": 0xFFFF_FFFF}
_DEFAULT_FLAGS = (
    Granted.VIRTQUEUE
    | Granted.PARKED
    | Granted.RENAME
    | Granted.CHILD
    | Granted.WATCH_FILESYSTEM
    | Granted.PARENT
    | Granted.DIRECTORY_LOSS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverChoice:
    """The guest's driver: is_ours False is the kernel's own, which knows nothing of events."""

    is_ours: bool = True
    flags: int = int(_DEFAULT_FLAGS)
    mask: int = int(ALL_EVENTS)
    buf_size: int = NOTIFY_BUF_BYTES
    major: int = 1
    minor: int = 0

    @property
    def flags_off(self) -> int:
        """Those that it does not ask for, although it could."""
        return int(_DEFAULT_FLAGS) & ~self.flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination, in the words of the TOML."""

    source: str = "auto"
    server: str = "able"
    delivery: str = "auto"
    event_queue: int = 131072
    vmm: str = "test-device"
    driver: str = "current"
    buffers: int = 16
    kernel: str = DEFAULT_SERIES

    @property
    def server_options(self) -> tuple[str, ...]:
        """Of `vhostfs serve`."""
        pairs = () if self.server == "able" else self.server.split()
        options = [*SOURCES[self.source], f"--delivery={self.delivery}", f"--event-queue={self.event_queue}"]
        return (*options, *(f"--negotiate={pair}" for pair in pairs))

    @property
    def driver_choice(self) -> DriverChoice:
        return parse_driver(self.driver)

    def words(self) -> dict[str, str]:
        """Every axis and its value, for people."""
        return {name: str(getattr(self, name)) for name in AXES}


AXES = tuple(each.name for each in fields(Cell))


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One file: a question, what is done on the host, and the cells in which it is done."""

    name: str
    question: str
    workload: str
    cells: tuple[Cell, ...]
    level: str = "ring"
    count: int = 1000
    """Of the changes, in workloads that repeat one."""
    names: tuple[int, ...] = (8, 64, 65, 128, 255)
    """Lengths in bytes, in the workload `names`."""
    varied: tuple[str, ...] = field(default=())
    """Axes with more than one value."""


def parse_driver(text: str) -> DriverChoice:
    """current, none, or words as `rename=off buf_size=128 minor=1`. Raises ExperimentError."""
    if text == "none":
        return DriverChoice(is_ours=False)
    if text == "current":
        return DriverChoice()
    values: dict[str, int] = {}
    flags = int(_DEFAULT_FLAGS)
    for word in text.split():
        key, _, value = word.partition("=")
        if key in _FLAGS and value in ("on", "off"):
            flags = flags | _FLAGS[key] if value == "on" else flags & ~_FLAGS[key]
        elif key == "mask" and value:
            values["mask"] = _mask(value)
        elif key in _DRIVER_LIMITS and value.isdecimal():
            if int(value) > _DRIVER_LIMITS[key]:
                raise ExperimentError(f"driver '{word}': it is {_DRIVER_LIMITS[key]} at most")
            values[key] = int(value)
        else:
            known = [
                *(f"{flag}=off" for flag in _FLAGS),
                "buf_size=N",
                "major=N",
                "minor=N",
                "mask=CREATE+...",
            ]
            raise ExperimentError(f"driver '{text}': expected current, none, or words of {', '.join(known)}")
    return replace(DriverChoice(flags=flags), **values)  # type: ignore[arg-type]


def _mask(text: str) -> int:
    mask = 0
    for name in text.upper().split("+"):
        if name not in Event.__members__:
            raise ExperimentError(f"driver 'mask={text}': {name} is no event")
        mask |= Event[name]
    return mask


def _check_value(axis: str, value: object) -> str | int:
    """A value of an axis, checked. Raises ExperimentError without the file's name."""
    words: Mapping[str, Sequence[str]] = {
        "source": tuple(SOURCES),
        "delivery": DELIVERIES,
        "vmm": VMMS,
        "kernel": tuple(SERIES),
    }
    limits = {"event_queue": (1, 1 << 24), "buffers": (1, 256)}
    if axis in words:
        if not isinstance(value, str) or value not in words[axis]:
            raise ExperimentError(f"{axis} is one of {', '.join(words[axis])}; seen: {value!r}")
        return value
    if axis in limits:
        least, most = limits[axis]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ExperimentError(f"{axis} is a number from {least} to {most}; seen: {value!r}")
        return value
    if not isinstance(value, str):
        raise ExperimentError(f"{axis} is a text; seen: {value!r}")
    if axis == "driver":
        parse_driver(value)
    elif value != "able":
        for pair in value.split():
            try:
                parse_pair(pair)
            except ForcedError as error:
                raise ExperimentError(f"server '{value}': {error}") from None
    return value


def _matrix(table: object) -> Iterator[Cell]:
    """The product of what a [matrix] has."""
    if not isinstance(table, dict):
        raise ExperimentError("[matrix] is a table of lists")
    for axis in table:
        if axis not in AXES:
            raise ExperimentError(f"[matrix] has no '{axis}'{nearest(axis, AXES) or '; ' + ', '.join(AXES)}")
    lists: dict[str, list[str | int]] = {}
    for axis, values in table.items():
        given = values if isinstance(values, list) else [values]
        if not given:
            raise ExperimentError(f"[matrix] {axis} is an empty list, so there would be no cell")
        lists[axis] = [_check_value(axis, value) for value in given]
    for combination in itertools.product(*lists.values()):
        yield Cell(**dict(zip(lists, combination, strict=True)))  # type: ignore[arg-type]


_KEYS = ("name", "question", "workload", "level", "count", "names", "matrix")


def parse(text: str, where: str) -> Experiment:
    """An experiment from its TOML; where: for errors. Raises ExperimentError."""
    try:
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ExperimentError(f"this is no TOML: {error}") from None
        except RecursionError:
            raise ExperimentError("this is no TOML of an experiment: it is nested too deep") from None
        return _experiment(data, Path(where).stem)
    except ExperimentError as error:
        raise ExperimentError(f"{where}: {error}") from None


def _experiment(data: dict[str, Any], stem: str) -> Experiment:
    for key in data:
        if key not in _KEYS:
            raise ExperimentError(f"there is no '{key}'{nearest(key, _KEYS) or '; ' + ', '.join(_KEYS)}")
    for key in ("name", "question", "workload", "level"):
        if key in data and not isinstance(data[key], str):
            raise ExperimentError(f"{key} is a text; seen: {data[key]!r}")
    workload = data.get("workload", "changes")
    if workload not in WORKLOADS:
        raise ExperimentError(f"workload is one of {', '.join(WORKLOADS)}; seen: '{workload}'")
    level = data.get("level", "ring")
    if level not in LEVELS:
        raise ExperimentError(f"level is one of {', '.join(LEVELS)}; seen: '{level}'")
    count = data.get("count", 1000)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1_000_000:
        raise ExperimentError(f"count is a number from 1 to 1000000; seen: {count!r}")
    names = data.get("names", [8, 64, 65, 128, 255])
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(n, int) and 4 <= n <= 255 for n in names)
    ):
        raise ExperimentError(f"names are lengths from 4 to 255; seen: {names!r}")
    tables = data.get("matrix")
    if tables is None:
        raise ExperimentError("there is no [matrix]; an empty one has a single cell")
    cells: dict[Cell, None] = {}
    for table in tables if isinstance(tables, list) else [tables]:
        for cell in _matrix(table):
            cells[cell] = None
            if len(cells) > MAX_CELLS:
                raise ExperimentError(f"the matrix has more than {MAX_CELLS} cells")
    varied = tuple(axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1)
    return Experiment(
        name=data.get("name", stem),
        question=data.get("question", ""),
        workload=workload,
        cells=tuple(cells),
        level=level,
        count=count,
        names=tuple(names),
        varied=varied,
    )


SHIPPED = Path(__file__).parent / "experiments"


def load(name: str) -> Experiment:
    """From a file, or one of the shipped ones by name. Raises ExperimentError."""
    path = Path(name)
    shipped = SHIPPED / f"{name}.toml"
    if not path.suffix and shipped.is_file():
        path = shipped
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ExperimentError(
            f"{name}: {why}; give a TOML file, or one of {', '.join(shipped_names())}"
        ) from None
    return parse(text, str(name))


def shipped_names() -> list[str]:
    """Experiments that come with vhostfs."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))
