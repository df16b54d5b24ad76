# SPDX-License-Identifier: Apache-2.0
"""A short dose of the oracle in a real guest: one boot, every source. scripts/oracle has the long one.

Must not know what is right: Linux says it. Specification: docs/oracle.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import lacking
from tests.oracle.generate import random_script
from tests.oracle.guest_level import GuestSession
from tests.oracle.runner import SOURCES
from tests.oracle.scenarios import SCENARIOS
from tests.oracle.script import step_by_step
from vhostfs.vm.errors import VmError

pytestmark = pytest.mark.usefixtures("ours")

NAMES = (
    "rename across two watched directories",
    "rename over a watched file",
    "exchange of a file and a directory",
    "directory rename with watches below",
    "the end of a tree",
    "a name used again at once by another type",
    "attributes",
    "content",
    "once only",
)
RANDOM_SEEDS = range(1, 4)
RANDOM_OPERATIONS = 40


@pytest.fixture(scope="module")
def session() -> Iterator[GuestSession]:
    session = GuestSession(list(SOURCES.values()))
    try:
        session.__enter__()
    except VmError as error:
        lacking(f"a guest with events: {error}")
    with session:
        yield session


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_is_seen_in_the_guest_as_natively(session: GuestSession, source: str, name: str) -> None:
    outcome = session.on(SOURCES[source]).run(step_by_step(SCENARIOS[name]))
    assert outcome.is_equal, "\n".join(outcome.lines)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", RANDOM_SEEDS)
def test_what_is_done_at_random_is_seen_in_the_guest_as_natively(
    session: GuestSession, source: str, seed: int
) -> None:
    outcome = session.on(SOURCES[source]).run(random_script(seed, RANDOM_OPERATIONS))
    assert outcome.is_equal, "\n".join([f"seed {seed}", *outcome.lines])
