# SPDX-License-Identifier: Apache-2.0
"""What a running server tells of itself, asked for over its control socket.

Must not know what the numbers should be. Specification: docs/events.md, "The control socket"; docs/caps.md.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.limits import HANG_S
from tests.ring.share import Share


def asked(share: Share, command: str) -> dict[str, Any]:
    """One message: the server greets, is asked, and answers, each in a line of JSON."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(HANG_S)
        connection.connect(f"{share.server.socket_path}.ctl")
        with connection.makefile("rw") as lines:
            assert json.loads(lines.readline())["type"] == "hello"
            lines.write(json.dumps({"command": command}) + "\n")
            lines.flush()
            answer: dict[str, Any] = json.loads(lines.readline())
    assert answer["type"] == command, answer
    return answer


def stats(share: Share) -> dict[str, Any]:
    """What was counted."""
    return asked(share, "stats")


def negotiated(share: Share) -> dict[str, Any]:
    """What server, VMM and guest have agreed on."""
    return asked(share, "negotiated")


def event_counters(share: Share) -> dict[str, int]:
    """Counters of the event pipeline by name."""
    counters: dict[str, int] = stats(share)["events"]["counters"]
    return counters
