# SPDX-License-Identifier: Apache-2.0
"""Joins this process's terminal or streams to a command in the guest.

Must not know what the command is.
Specification: termios(3); tty_ioctl(4).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from types import FrameType as PythonFrame

from vhostfs.vm.agent import GuestError, RunningCommand

_CHUNK = 32 * 1024


def terminal_size(descriptor: int) -> tuple[int, int]:
    """Rows and columns of the terminal, 24 and 80 when it does not say."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return 24, 80
    return (rows or 24, columns or 80)


@contextlib.contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Hands every key to the program unprocessed while the body runs; the terminal is as before
    afterwards."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def size_followed(descriptor: int, running: RunningCommand) -> Iterator[None]:
    """Passes on every change of the terminal's size while the body runs; only on the main thread."""

    def changed(_number: int, _frame: PythonFrame | None) -> None:
        # Not from the handler itself: sending may wait for a lock that the interrupted code holds.
        threading.Thread(target=pass_on, daemon=True).start()

    def pass_on() -> None:
        with contextlib.suppress(GuestError):
            running.resize(*terminal_size(descriptor))

    before = signal.signal(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


class OutputWriter:
    """Writes a command's output to a descriptor as it comes, until nobody reads it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.closed = threading.Event()
        """Set when the other end of the descriptor has gone."""

    def write(self, data: bytes) -> None:
        """Writes all of `data`, waiting for a slow reader; does nothing once `closed` is set."""
        view = memoryview(data)
        while view and not self.closed.is_set():
            try:
                view = view[os.write(self.descriptor, view) :]
            except BlockingIOError:
                select.select([], [self.descriptor], [])
            except OSError:
                self.closed.set()


def may_read(descriptor: int) -> bool:
    """False when reading would stop this process: a background job must leave the terminal to others."""
    try:
        return not os.isatty(descriptor) or os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False


def forward_input(
    descriptor: int, running: RunningCommand, on_error: Callable[[], None] = lambda: None
) -> None:
    """Starts a thread that gives the command all that can be read from `descriptor`, then end of file."""

    def forward() -> None:
        try:
            while data := os.read(descriptor, _CHUNK):
                running.write_stdin(data)
                if running.status is not None:
                    return
            running.close_stdin()
        except (GuestError, OSError):
            on_error()

    threading.Thread(target=forward, name="guest-stdin", daemon=True).start()
