# SPDX-License-Identifier: Apache-2.0
"""Owns where log lines go and what they look like: one line each, to stderr or syslog.
Must not know what is logged.
Specification: --log-level and --syslog of virtiofsd; RFC 3164 for the datagrams that /dev/log takes."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time

from ..share.options import LogLevel

TRACE = 5

_LEVELS = {
    LogLevel.OFF: logging.CRITICAL + 1,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.WARN: logging.WARNING,
    LogLevel.INFO: logging.INFO,
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.TRACE: TRACE,
}
_SYSLOG_PATHS = ("/dev/log", "/run/systemd/journal/dev-log")
_FACILITY_USER = 1 << 3


class _OneLine(logging.Formatter):
    """UTC, level, source, text; line breaks inside a text are shown as \\n, tracebacks excepted."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        # Names that a guest or a front end chose may hold anything.
        record.message = record.message.replace("\n", "\\n").replace("\r", "\\r").replace("\x1b", "\\e")
        return super().formatMessage(record)


class SyslogHandler(logging.Handler):
    """
    Connected once: inside the sandbox there is no /dev/log to connect to again, and no socket(2).

    Lines are dropped, not waited for, when the logger is slow or gone.
    """

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        for path in _SYSLOG_PATHS:
            try:
                self._socket.connect(path)
                break
            except OSError:
                continue
        else:
            self._socket.close()
            raise OSError(f"nothing listens at {' or '.join(_SYSLOG_PATHS)}")
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        severity = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        if record.levelno < logging.INFO:
            severity = 7
        for line in self.format(record).splitlines():
            text = f"<{_FACILITY_USER | severity}>{self._program}[{os.getpid()}]: {line}"
            try:
                self._socket.send(text.encode(errors="backslashreplace")[:8192])
            except OSError:
                return


def start_logging(level: LogLevel, *, to_syslog: bool, program: str) -> frozenset[int]:
    """Sends everything at or above level to stderr or syslog; returns the descriptors that this needs."""
    logging.addLevelName(TRACE, "TRACE")
    logging.addLevelName(logging.WARNING, "WARN")
    logging.raiseExceptions = False  # a stderr that is gone must not take the server down
    root = logging.getLogger()
    root.setLevel(_LEVELS[level])
    root.handlers.clear()
    handler: logging.Handler
    if to_syslog:
        try:
            handler = SyslogHandler(program)
            handler.setFormatter(_OneLine("%(levelname)s %(name)s: %(message)s"))
            root.addHandler(handler)
            return frozenset({handler.fileno()})
        except OSError as error:
            reason = error
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)-5s %(name)s: %(message)s"))
    root.addHandler(handler)
    if to_syslog:
        logging.getLogger("vhostfs").warning("--syslog: %s; logging to stderr", reason)
    return frozenset()
