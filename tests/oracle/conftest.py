# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the oracle's tests.

Must not know what is compared. Specification: docs/oracle.md.
"""

from __future__ import annotations

import pytest

from tests.server import ServerProcess


@pytest.fixture
def ours() -> None:
    """For what only this project's server promises; skipped when VHOSTFS_SERVER names another."""
    if ServerProcess.is_foreign():
        pytest.skip("another server is under test")
