# SPDX-License-Identifier: Apache-2.0
"""The table of `vhostfs caps`: sections of aligned lines, and the advice under them.
Must not probe anything, nor know what is good or bad beyond what the report says.
Specification: docs/caps.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .. import __version__
from ..caps.advice import Advice
from ..caps.directory import DirectoryProbe
from ..caps.limits import Limits
from ..caps.outcome import Outcome
from ..caps.qemu import DEVICES, KvmProbe, QemuProbe
from ..caps.report import HostReport
from ..caps.rights import BUYS, Rights
from ..caps.servers import ServerProbe
from .display import Style, printable, styled

WIDTH = 100
_NAME_WIDTH = 28
# What a server uses.
_MEANING = {
    "FAN_REPORT_FID": "records name objects by file handle",
    "FAN_REPORT_DIR_FID": "and the directory of an entry",
    "FAN_REPORT_NAME": "and the entry's name (Linux 5.9)",
    "FAN_REPORT_TARGET_FID": "and the entry's own object (5.17)",
    "FAN_UNLIMITED_QUEUE": "the host's queue does not overflow",
    "FAN_UNLIMITED_MARKS": "any number of things can be watched",
    "FAN_MARK_INODE": "one file or directory (--events=fanotify:inodes)",
    "FAN_MARK_FILESYSTEM": "the whole file system (--events=fanotify:filesystem)",
    "FAN_MARK_ONLYDIR": "a mark is on a directory or not at all",
}
_LIMIT_MEANING = {
    "inotify.max_user_watches": "one or two for each thing watched",
    "inotify.max_user_instances": "one for each server",
    "inotify.max_queued_events": "what waits until the server reads it",
    "fanotify.max_user_groups": "one or two for each server",
    "fanotify.max_user_marks": "one for each, with fanotify:inodes",
    "fanotify.max_queued_events": "without FAN_UNLIMITED_QUEUE",
}


def report_lines(report: HostReport, *, is_coloured: bool, only_advice: bool = False) -> Iterator[str]:
    """Everything, section by section."""
    painter = _Painter(is_coloured)
    if not only_advice:
        who = f"uid {report.rights.uid}"
        yield f"vhostfs {__version__} on Linux {printable(report.kernel)} ({report.machine}), {who}"
        sections = [
            _directory(report.directory, painter),
            _fanotify(report.directory, painter),
            _rights(report.rights, painter),
            _limits(report.limits, painter),
            _qemu(report.qemus, report.kvm, painter),
            *(_server(server, painter) for server in report.servers),
        ]
        for section in sections:
            yield ""
            yield from section
        yield ""
    yield from _advice(report.advice, painter)


class _Painter:
    """Lines in one form: yes or no, a name, and what it is for or why not."""

    def __init__(self, is_coloured: bool) -> None:
        self._is_coloured = is_coloured

    def heading(self, title: str, text: str = "") -> str:
        return f"{styled(title, Style.STRONG, is_coloured=self._is_coloured)}{f'  {text}' if text else ''}"

    def line(self, works: bool | None, name: str, text: str = "") -> str:
        mark = {True: ("yes", Style.GOOD), False: ("no ", Style.BAD), None: ("-  ", Style.FAINT)}[works]
        shown = styled(mark[0], mark[1], is_coloured=self._is_coloured)
        return f"  {shown}  {name:<{_NAME_WIDTH}}  {text}".rstrip()

    def value(self, name: str, text: str) -> Iterator[str]:
        """Wrapped under itself."""
        lines = textwrap.wrap(text, WIDTH - 24, break_long_words=False, break_on_hyphens=False) or ["-"]
        yield f"  {name:<20}  {lines[0]}"
        for line in lines[1:]:
            yield f"{'':24}{line}"

    def outcome(self, outcome: Outcome, name: str, meaning: str = "") -> str:
        return self.line(outcome.works, name, meaning if outcome.works else why_not(outcome))


def why_not(outcome: Outcome) -> str:
    """As `Operation not permitted (EPERM)`."""
    name = outcome.error_name
    text = {
        "EINVAL": "this kernel does not know it, or not here",
        "ENOSYS": "this kernel has no such system call",
    }.get(name or "", outcome.reason)
    return f"{text} ({name})" if name else text


def _directory(probe: DirectoryProbe, painter: _Painter) -> Iterator[str]:
    yield painter.heading("directory", f"{printable(probe.path)} ({probe.file_system})")
    if not probe.readable.works:
        yield painter.outcome(probe.readable, "readable")
    yield painter.outcome(probe.encode, "name_to_handle_at", "objects have file handles")
    yield painter.outcome(probe.reopen, "open_by_handle_at", "inodes can be kept without a descriptor each")
    yield painter.outcome(probe.event_handles, "handles for events", "fanotify's records can be understood")
    for name, outcome in probe.sources.items():
        text = "taken by --events=auto" if name == probe.chosen else ""
        yield painter.outcome(outcome, name, text)
    yield from painter.value("events", probe.reason)


def _fanotify(probe: DirectoryProbe, painter: _Painter) -> Iterator[str]:
    yield painter.heading("fanotify", "each flag tried on the directory")
    found = probe.fanotify
    flags = {**found.init, **found.marks}
    for name, meaning in _MEANING.items():
        yield painter.outcome(flags[name], name, meaning)
    unused = {name: outcome for name, outcome in flags.items() if name not in _MEANING}
    yield from _names("flags not used", unused, painter)
    yield from _names("events by an inode", found.inode_events, painter)
    yield from _names("by file system", found.filesystem_events, painter)


def _names(title: str, outcomes: Mapping[str, Outcome], painter: _Painter) -> Iterator[str]:
    """Names by outcome: what works, then what not and why."""
    works = [name for name, outcome in outcomes.items() if outcome.works]
    yield from painter.value(title, " ".join(works) or "none")
    for why in dict.fromkeys(why_not(outcome) for outcome in outcomes.values() if not outcome.works):
        lacking = [
            name for name, outcome in outcomes.items() if not outcome.works and why_not(outcome) == why
        ]
        yield from painter.value("  not", f"{' '.join(lacking)}: {why}")


def _rights(rights: Rights, painter: _Painter) -> Iterator[str]:
    notes = ["in a user namespace: they hold there only"] if rights.is_initial is False else []
    if rights.seccomp == "filter":
        notes.append("system calls are filtered (seccomp)")
    if rights.no_new_privs:
        notes.append("no_new_privs")
    yield painter.heading("rights", "; ".join(notes) or "what each buys a server that is started like this")
    for capability, text in BUYS.items():
        yield painter.line(rights.has(capability), f"CAP_{capability.name}", text)


def _limits(limits: Limits, painter: _Painter) -> Iterator[str]:
    note = "of this user; in use now" if limits.is_complete else "of this user; in use now, counted in part"
    if all(limit.used is None for limit in limits.limits.values()):
        note = "of this user; without /proc nobody can tell what is in use"
    yield painter.heading("limits", note)
    for name, limit in limits.limits.items():
        value = "-" if limit.value is None else str(limit.value)
        used = "" if limit.used is None else f"{limit.used} used"
        yield f"  {name:<27}  {value:>10}  {used:<12}  {_LIMIT_MEANING.get(name, '')}".rstrip()
    most = f"{limits.nofile_soft} soft, {limits.nofile_hard} hard"
    kernel = "" if limits.nr_open is None else f", the kernel's {limits.nr_open}"
    yield f"  {'open files':<27}  {most}{kernel}"


def _qemu(probes: Sequence[QemuProbe], kvm: KvmProbe, painter: _Painter) -> Iterator[str]:
    yield painter.heading("QEMU", "" if probes else "none found for x86-64 guests")
    for probe in probes:
        if probe.problem is not None:
            yield painter.line(False, printable(probe.path), printable(probe.problem))
            continue
        kit = "kept for vhostfs run, " if probe.is_kept else ""
        package = f" ({printable(probe.package)})" if probe.package else ""
        yield f"  {printable(probe.path)}: {kit}{probe.version}{package}"
        for device in DEVICES:
            passes = "passes the notification queue" if probe.passes_by == device else ""
            yield painter.line(probe.has(device), device, passes)
        yield painter.line(probe.has_patch, f"{DEVICES[0]},notification=")
    problem = why_not(kvm.opened)
    if kvm.opened.works:
        trial = {None: "no guest tried yet", "": "a guest ran"}
        problem = trial.get(kvm.guest_problem, "but a guest that was tried did not run")
        problem = f"API version {kvm.api_version}; {problem}"
    yield painter.line(kvm.opened.works and not kvm.guest_problem, "/dev/kvm", printable(problem))


def _server(probe: ServerProbe, painter: _Painter) -> Iterator[str]:
    yield painter.heading("server", printable(probe.control))
    told = probe.told
    if told is None:
        yield painter.line(False, "asked", printable(probe.problem or ""))
        return
    server, source, delivery = told["server"], told["source"], told["delivery"]
    tag = "no tag" if server["tag"] is None else f"tag {server['tag']}"
    shares = f"{server['shared_dir']} ({tag}, sandbox {server['sandbox']}, vhostfs {server['version']})"
    yield from painter.value("shares", printable(shares))
    yield from painter.value("source", printable(f"{source['chosen']}: {source['reason']}"))
    way = delivery["chosen"] + (f": {delivery['missing']}" if delivery["missing"] else "")
    yield from painter.value("delivery", printable(way))
    yield from painter.value("  offered", " ".join(delivery["offered"]) or "none")
    config = server["config"]
    if config is not None:
        text = f"num_request_queues {config['num_request_queues']}, notify_buf_size "
        yield from painter.value("config space", f"{text}{config['notify_buf_size_bytes']}")
    yield from _vmm(told["vmm"], server["max_queues"], painter)
    yield from _fuse(told["fuse"], painter)
    yield from _fsnotify(told["fsnotify"], painter)


def _vmm(vmm: Mapping[str, Any] | None, max_queues: int, painter: _Painter) -> Iterator[str]:
    if vmm is None:
        yield from painter.value("VMM", "none is connected")
        return
    count = vmm["memory_regions"]
    memory = f"{vmm['memory_bytes'] >> 20} MiB in {count} region{'' if count == 1 else 's'}"
    yield from painter.value("VMM", f"{vmm['state']}, {memory}, up to {max_queues} queues")
    yield from _pairs("virtio features", vmm["features_offered"], vmm["features_acked"], "acked", painter)
    offered, acked = vmm["protocol_features_offered"], vmm["protocol_features_acked"]
    yield from _pairs("vhost-user features", offered, acked, "acked", painter)
    yield from painter.value("device status", " ".join(vmm["device_status"]))
    queues = (f"{queue['index']} {queue['role']} {queue['size']}" for queue in vmm["queues"])
    yield from painter.value("queues running", ", ".join(queues))


def _fuse(fuse: Mapping[str, Any] | None, painter: _Painter) -> Iterator[str]:
    if fuse is None:
        yield from painter.value("FUSE", "not mounted")
        return
    sizes = (
        f"max_write {fuse['max_write_bytes'] >> 10} KiB, readahead {fuse['max_readahead_bytes'] >> 10} KiB"
    )
    yield from painter.value("FUSE", f"{fuse['version']} (guest {fuse['guest_version']}), {sizes}")
    yield from _pairs("INIT flags", fuse["flags_offered"], fuse["flags_granted"], "granted", painter)


def _fsnotify(fsnotify: Mapping[str, Any] | None, painter: _Painter) -> Iterator[str]:
    if fsnotify is None:
        yield from painter.value("FSNOTIFY", "its driver has not asked for events")
        return
    driver = f"driver {fsnotify.get('driver_version', '?')}"
    if fsnotify["refused"] is not None:
        yield from painter.value("FSNOTIFY", printable(f"{driver}, refused: {fsnotify['refused']}"))
        return
    sizes = (
        f"notify_buf_size {fsnotify['notify_buf_size_bytes']} (driver {fsnotify['driver_buf_size_bytes']})"
    )
    counts = f"max_watches {fsnotify['max_watches']}, max_parked {fsnotify['max_parked']}"
    yield from painter.value("FSNOTIFY", f"{driver}, {sizes}, {counts}")
    yield from _pairs("flags", fsnotify["flags_wanted"], fsnotify["flags_granted"], "granted", painter)
    yield from painter.value("events", " ".join(fsnotify["events"]))
    for text in fsnotify["reductions"]:
        yield from painter.value("  less", printable(text))


def _pairs(
    title: str, offered: Sequence[str], taken: Iterable[str], verb: str, painter: _Painter
) -> Iterator[str]:
    """What was taken, and what of the offer was not."""
    got = set(taken)
    yield from painter.value(title, " ".join(name for name in offered if name in got) or "none")
    left = [name for name in offered if name not in got]
    if left:
        yield from painter.value(f"  not {verb}", " ".join(left))


def _advice(advice: Sequence[Advice], painter: _Painter) -> Iterator[str]:
    if not advice:
        yield painter.heading("advice", "nothing is missing")
        return
    yield painter.heading("advice")
    for number, each in enumerate(advice, 1):
        for index, (name, text) in enumerate(
            (("seen", each.seen), ("costs", each.cost), ("do", each.remedy))
        ):
            lead = f"{number:>3}. " if not index else "     "
            yield textwrap.fill(
                printable(text),
                WIDTH,
                initial_indent=f"{lead}{name:<6} ",
                subsequent_indent=" " * 12,
                break_long_words=False,
                break_on_hyphens=False,
            )
