# SPDX-License-Identifier: Apache-2.0
"""What all tests share: how a test says that the machine lacks something.

Must not start servers or guests; tests/ring and tests/guest have their own. Specification: scripts/test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

import hypothesis
import pytest

Lacking = Callable[[str], NoReturn]


# How long an example takes says more about what else the machine does.
hypothesis.settings.register_profile("vhostfs", deadline=None)
hypothesis.settings.load_profile("vhostfs")


def lacking(what: str) -> NoReturn:
    """Skips loudly, naming what the machine lacks; where CI=true that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"this machine lacks {what}")
    pytest.skip(f"this machine lacks {what}")


@pytest.fixture
def needs_root() -> None:
    """For tests that act as several users or mount something on the host."""
    if os.geteuid() != 0:
        lacking("root's rights for the test run")
