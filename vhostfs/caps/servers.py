# SPDX-License-Identifier: Apache-2.0
"""The servers that run here and what each has agreed on with its guest, as they say themselves.
Must not know how a server works: its control socket is all.
Specification: docs/caps.md, "A running server"."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..control.client import ControlClient, ControlError, find_control_socket, running_servers
from ..share.options import CONTROL_SUFFIX

ANSWER_TIMEOUT_S = 8.0
"""For servers that nobody named. All are asked at once, so that one that hangs does not add to another."""
MAX_ASKED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ServerProbe:
    """told: the message `negotiated`; None: problem says why not."""

    control: str
    told: Mapping[str, Any] | None
    problem: str | None = None

    @property
    def shared_dir(self) -> str | None:
        return None if self.told is None else str(self.told["server"]["shared_dir"])

    def as_json(self) -> dict[str, Any]:
        told = {} if self.told is None else {k: v for k, v in self.told.items() if k != "type"}
        return {"control": self.control, "problem": self.problem, **told}


def ask_server(given: str) -> ServerProbe:
    """The server that was named, by its control socket or its vhost-user socket. Raises ControlError."""
    path = find_control_socket(given)
    with ControlClient(path) as client:
        return ServerProbe(path, client.negotiated())


def ask_running_servers(shared_dir: str | None) -> list[ServerProbe]:
    """All that let this user ask, at their default place. shared_dir: only those that share it, or a
    directory that it is in, and those that do not say what they share."""
    with ThreadPoolExecutor(MAX_ASKED_AT_ONCE) as threads:
        found = list(threads.map(_ask_briefly, running_servers()))
    if shared_dir is None:
        return found
    return [probe for probe in found if probe.shared_dir is None or _is_in(shared_dir, probe.shared_dir)]


def _ask_briefly(path: str) -> ServerProbe:
    try:
        with ControlClient(path, timeout_s=ANSWER_TIMEOUT_S) as client:
            return ServerProbe(path, client.negotiated())
    except ControlError as error:
        return ServerProbe(path, None, str(error))


def _is_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip(os.sep) + os.sep)


def socket_of(control: str) -> str:
    """The vhost-user socket beside a control socket at its default place, by which people know a server."""
    return control.removesuffix(CONTROL_SUFFIX)
