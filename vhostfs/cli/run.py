# SPDX-License-Identifier: Apache-2.0
"""`vhostfs run`: a directory of this machine in a throw-away guest, with a command or a shell running on it.

Owns the options, the progress lines and the exit status; everything else is vhostfs/vm.
Specification: `vhostfs run --help`; docs/guest.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType as PythonFrame
from typing import NoReturn

from vhostfs.cli.run_events import events_line
from vhostfs.share.options import DeliveryMode
from vhostfs.vm.accel import choose_accelerator
from vhostfs.vm.agent import GuestError, RunningCommand
from vhostfs.vm.cache import cache_root
from vhostfs.vm.equipment import Equipment, Events, equip
from vhostfs.vm.errors import VmError
from vhostfs.vm.guest import Guest
from vhostfs.vm.image import ImageSpec
from vhostfs.vm.kernel import DEFAULT_SERIES, SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Accelerator, Machine, Share, smallest_memory_bytes
from vhostfs.vm.qemu import KIT, PATCHED, SYSTEM
from vhostfs.vm.server import (
    TEMPLATE_VARIABLE,
    ServerSpec,
    ShareServer,
    ended_with,
    template_from_environment,
)
from vhostfs.vm.terminal import (
    OutputWriter,
    forward_input,
    may_read,
    raw_terminal,
    size_followed,
    terminal_size,
)

EXIT_FAILED = 125
"""Of `vhostfs run` when it could not run the command; the command's own status otherwise."""
DEFAULT_MEMORY_BYTES = 1 << 30
MAIN_MOUNT_POINT = "/share"
_MAIN_TAG = "share"
_WATCH_INTERVAL_S = 0.25
_STDERR = 2
_SHELL = "if [ -x /bin/bash ]; then exec /bin/bash -l; else exec /bin/sh -il; fi"
_TAG = re.compile(r"[A-Za-z0-9_.-]{1,36}")


@dataclass(frozen=True, slots=True)
class ShareOption:
    """One directory to share."""

    directory: Path
    tag: str
    mount_point: str
    read_only: bool


def parse_size(text: str) -> int:
    """Bytes in a size such as 512M, 2G or 1024 (MiB); argparse.ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:iB|B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 512M or 2G")
    return int(match[1]) << {"K": 10, "M": 20, "G": 30, "": 20}[match[2].upper()]


def parse_share(text: str) -> ShareOption:
    """DIR[:TAG][:MOUNTPOINT][:ro], the parts after DIR told apart by their form."""
    first, *rest = text.split(":")
    tag = mount_point = None
    read_only = False
    for part in rest:
        if part in ("ro", "rw"):
            read_only = part == "ro"
        elif part.startswith("/") and mount_point is None:
            mount_point = part
        elif _TAG.fullmatch(part) and tag is None and mount_point is None:
            tag = part
        else:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {part!r} does not fit; expected DIR[:TAG][:/MOUNTPOINT][:ro]"
            )
    if not first:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no directory; expected DIR[:TAG][:/MOUNTPOINT][:ro]"
        )
    if tag is None:
        tag = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(first).resolve().name).strip("-")[:36] or "root"
    return ShareOption(Path(first), tag, mount_point or f"{MAIN_MOUNT_POINT}-{tag}", read_only)


def parse_count(text: str) -> int:
    """A number from 1 to 64."""
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vhostfs run`.

    Everything after the first "--" becomes `args.command`; it is cut off before argparse looks, which would
    give it to DIR or refuse it when options stand between.
    """
    parser.usage = "%(prog)s [options] DIR [-- COMMAND ...]"
    parser.description = (
        "Boot a small Debian guest, mount DIR there at /share and run COMMAND on it, or a shell. "
        "One COMMAND word is shell text; several are a program and its arguments. "
        f"The exit status is COMMAND's, {EXIT_FAILED} when it could not be run."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory to share")
    guest = parser.add_argument_group("guest")
    guest.add_argument(
        "--kernel",
        default=DEFAULT_SERIES,
        metavar="KERNEL",
        help=f"{', '.join(SERIES)} (Debian's) or the path of a vmlinuz (default: {DEFAULT_SERIES})",
    )
    guest.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME",
        help="Debian package to have in the guest, with all that it depends on; may be repeated",
    )
    guest.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="kernel module to load in the guest; may be repeated",
    )
    guest.add_argument(
        "--memory", type=parse_size, metavar="SIZE", help="memory of the guest, as 512M or 2G (default: 1G)"
    )
    guest.add_argument(
        "--cpus", type=parse_count, metavar="N", help="processors (default: 2 with KVM, 1 emulated)"
    )
    guest.add_argument("-t", "--tty", action="store_true", help="run COMMAND on a terminal")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--accel",
        choices=("auto", "kvm", "tcg"),
        default="auto",
        help="kvm: the processor's own virtualisation; tcg: emulation; "
        "auto (default): kvm if it starts a guest",
    )
    machine.add_argument(
        "--qemu",
        metavar="PATH",
        help=f"QEMU to use; '{KIT}': a recent one from Debian, fetched and kept in the cache; "
        f"'{SYSTEM}': the machine's own; '{PATCHED}': what scripts/qemu-patched has built (default: the "
        "machine's own newest that passes events, else the kit)",
    )
    machine.add_argument(
        "--qemu-arg",
        action="append",
        default=[],
        metavar="ARGS",
        help="arguments added to QEMU's command line, split as a shell does; may be repeated",
    )
    shares = parser.add_argument_group("shares")
    shares.add_argument("--readonly", action="store_true", help="share DIR read-only")
    shares.add_argument(
        "--share",
        action="append",
        default=[],
        type=parse_share,
        metavar="DIR[:TAG][:/MOUNTPOINT][:ro]",
        help="one more directory, mounted at /share-TAG; may be repeated",
    )
    shares.add_argument(
        "--events",
        choices=("auto", "fanotify", "inotify", "off"),
        default="auto",
        help="where changes made on the host are learnt from, to wake watchers in the guest; "
        "auto (default): the best that this machine has, and none where the guest could not be told",
    )
    shares.add_argument(
        "--delivery",
        choices=[mode.value for mode in DeliveryMode],
        default=DeliveryMode.AUTO.value,
        help="how they reach the guest: virtqueue, the notification queue, which takes QEMU 10.1 or the kit; "
        "parked, requests that wait at the server, with any QEMU; auto (default): the first that can be had",
    )
    shares.add_argument(
        "--server-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="option for `vhostfs serve`, as --server-option=--xattr; may be repeated. "
        f"${TEMPLATE_VARIABLE} replaces the server: a command with {{socket}} and {{dir}}",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the server's messages and QEMU's command"
    )
    _split_command_off(parser)


def _split_command_off(parser: argparse.ArgumentParser) -> None:
    parse = parser.parse_known_args

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        command: list[str] = []
        if "--" in words:
            at = words.index("--")
            words, command = words[:at], words[at + 1 :]
        found, extra = parse(words, namespace)
        found.command = command
        return found, extra

    # argparse calls this method of the parser itself, also for a subcommand.
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


class Steps:
    """Progress on stderr: a line a step; on a terminal the running step shows its seconds."""

    def __init__(self) -> None:
        self._terminal = os.isatty(_STDERR)
        self._lock = threading.Lock()
        self._text: str | None = None
        self._started_s = 0.0
        self._wake = threading.Event()
        if self._terminal:
            threading.Thread(target=self._tick, daemon=True).start()

    def __call__(self, text: str) -> None:
        """A step begins; the one before is done."""
        with self._lock:
            self._finish()
            self._text, self._started_s = text, time.monotonic()
            if not self._terminal:
                print(f"vhostfs: {text}", file=sys.stderr, flush=True)
        self._wake.set()

    def note(self, text: str) -> None:
        """Something that people want to know and that takes no time."""
        with self._lock:
            self._finish()
            print(f"vhostfs: {text}", file=sys.stderr, flush=True)

    def done(self) -> None:
        """No step is running any more."""
        with self._lock:
            self._finish()

    def _finish(self) -> None:
        if self._text is not None and self._terminal:
            taken_s = time.monotonic() - self._started_s
            suffix = f" ({taken_s:.1f} s)" if taken_s >= 0.5 else ""
            sys.stderr.write(f"\r\x1b[Kvhostfs: {self._text}{suffix}\n")
            sys.stderr.flush()
        self._text = None

    def _tick(self) -> None:
        while True:
            self._wake.wait()
            with self._lock:
                if self._text is None:
                    self._wake.clear()
                    continue
                sys.stderr.write(
                    f"\r\x1b[Kvhostfs: {self._text} ... {time.monotonic() - self._started_s:.0f} s"
                )
                sys.stderr.flush()
            time.sleep(0.2)


class Interrupted(BaseException):
    """A signal asked us to end; its number is the argument."""


def run(args: argparse.Namespace) -> int:
    """Runs `vhostfs run` and returns its exit status. Only on the main thread."""
    steps = Steps()
    try:
        with _ending_signals_raised():
            return _run(args, steps)
    except Interrupted as interrupted:
        steps.done()
        return 128 + int(interrupted.args[0])
    except (VmError, GuestError) as error:
        steps.done()
        print(f"vhostfs run: {error}", file=sys.stderr)
        return EXIT_FAILED


@contextlib.contextmanager
def _ending_signals_raised() -> Iterator[None]:
    def raise_it(number: int, _frame: PythonFrame | None) -> NoReturn:
        # Once is enough: what follows is the clean-up, which must not be cut short.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, raise_it) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace, steps: Steps) -> int:
    shares = _share_options(args)
    interactive = not args.command
    if interactive and not (os.isatty(0) and os.isatty(1)):
        raise VmError(
            "no COMMAND and no terminal for a shell: give a command after --, as in: vhostfs run DIR -- ls -l"
        )
    cache = cache_root()
    equipment = _equipment(args, cache, steps)
    image, qemu = equipment.image, equipment.qemu
    accelerator = choose_accelerator(args.accel, _machine(args, equipment), cache, steps)
    with Lifeline() as lifeline:
        servers = []
        guest_shares = []
        for number, share in enumerate(shares):
            socket_path = lifeline.directory / f"share{number}.sock"
            options = (*_event_options(args, equipment), *args.server_option)
            spec = ServerSpec(share.directory, socket_path, share.tag, share.read_only, options)
            servers.append(
                ShareServer(spec, lifeline, log_path=Path("/dev/stderr") if args.verbose else None)
            )
            guest_shares.append(
                Share(share.tag, socket_path, share.mount_point, share.read_only, equipment.device)
            )
        steps(f"starting Linux {image.kernel_release} with QEMU {qemu.version_text} ({accelerator.value})")
        guest = Guest(_machine(args, equipment, accelerator, tuple(guest_shares)), lifeline=lifeline)
        with ended_with(servers, guest), guest:
            steps.note(events_line(args.events, equipment, guest_shares[0].socket_path))
            if args.verbose:
                print(f"vhostfs: ran {shlex.join(guest.command)}", file=sys.stderr)
            return _run_command(args, guest, interactive)


def _share_options(args: argparse.Namespace) -> list[ShareOption]:
    shares = [ShareOption(args.directory, _MAIN_TAG, MAIN_MOUNT_POINT, args.readonly), *args.share]
    for index, share in enumerate(shares):
        if not share.directory.is_dir():
            raise VmError(f"{share.directory} is not a directory; give one that the guest shall see")
        for other in shares[:index]:
            if share.tag == other.tag or share.mount_point == other.mount_point:
                raise VmError(
                    f"two shares have the tag {share.tag!r} or the mount point {share.mount_point}: "
                    "give one another, as in --share DIR:TAG:/MOUNTPOINT"
                )
    return [ShareOption(s.directory.resolve(), s.tag, s.mount_point, s.read_only) for s in shares]


def _equipment(args: argparse.Namespace, cache: Path, steps: Steps) -> Equipment:
    wish = {"off": Events.OFF, "auto": Events.WHERE_POSSIBLE}.get(args.events, Events.REQUIRED)
    obstacle = f"${TEMPLATE_VARIABLE} is another server" if template_from_environment() else None
    spec = ImageSpec(args.kernel, tuple(args.package), tuple(args.module))
    delivery = DeliveryMode(args.delivery)
    return equip(spec, args.qemu, wish, cache, steps, delivery=delivery, obstacle=obstacle)


def _event_options(args: argparse.Namespace, equipment: Equipment) -> list[str]:
    """Of the server."""
    if template_from_environment():
        return []
    if equipment.events_missing:
        return ["--events=off"]
    # As it was asked for: so the server names what is missing, and it is not our choice of an option.
    return [f"--events={args.events}", f"--delivery={args.delivery}"]


def _machine(
    args: argparse.Namespace,
    equipment: Equipment,
    accelerator: Accelerator = Accelerator.TCG,
    shares: tuple[Share, ...] = (),
) -> Machine:
    extra = tuple(word for text in args.qemu_arg for word in shlex.split(text))
    image = equipment.image
    memory_bytes = args.memory or max(DEFAULT_MEMORY_BYTES, smallest_memory_bytes(image) + (512 << 20))
    cpus = args.cpus or (2 if accelerator is Accelerator.KVM else 1)
    return Machine(equipment.qemu, image, accelerator, shares, memory_bytes, cpus, (), extra)


def _run_command(args: argparse.Namespace, guest: Guest, interactive: bool) -> int:
    on_terminal = interactive or args.tty
    command = _SHELL if interactive else command_text(args.command)
    stdout, stderr = OutputWriter(1), OutputWriter(2)
    reads = may_read(0)
    running = guest.start(
        command,
        cwd=MAIN_MOUNT_POINT,
        environment={"TERM": os.environ.get("TERM", "linux")} if on_terminal else {},
        stdin=reads,
        terminal_size=terminal_size(1) if on_terminal else None,
        stdout_sink=stdout.write,
        stderr_sink=stderr.write,
    )
    with contextlib.ExitStack() as stack:
        if on_terminal:
            if os.isatty(0) and reads:
                stack.enter_context(raw_terminal(0))
            stack.enter_context(size_followed(1, running))
        if reads:
            forward_input(0, running)
        return _wait(running, guest, stdout)


def command_text(words: Sequence[str]) -> str:
    """Shell text for COMMAND: a single word is taken as written, several are quoted and joined."""
    return words[0] if len(words) == 1 else shlex.join(words)


def _wait(running: RunningCommand, guest: Guest, stdout: OutputWriter) -> int:
    ended = threading.Event()
    running.on_done(ended.set)
    while not ended.wait(_WATCH_INTERVAL_S):
        if stdout.closed.is_set():
            # As the shell's own pipelines end when nobody reads any more.
            return 128 + signal.SIGPIPE
    try:
        return running.wait(0).exit_status
    except GuestError as error:
        raise VmError(f"{error}{guest.last_words()}") from error


def main() -> int:
    """For development: `python -m vhostfs.cli.run`."""
    parser = argparse.ArgumentParser(prog="vhostfs run")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
