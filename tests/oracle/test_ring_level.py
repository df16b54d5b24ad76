# SPDX-License-Identifier: Apache-2.0
"""A short dose of the oracle at the ring, on every source; scripts/oracle has the long one.

Must not know what is right: Linux says it. Specification: docs/oracle.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import lacking
from tests.oracle.ring_level import RingLevel
from tests.oracle.runner import SOURCES, Source
from tests.oracle.scenarios import SCENARIOS
from tests.oracle.script import parse, step_by_step

pytestmark = pytest.mark.usefixtures("ours")

MANY = 400


def opened(source: Source, *options: str, buffers: int = 64) -> RingLevel:
    """A level, or a loud skip where the host does not permit the source."""
    try:
        return RingLevel(source, options, buffers=buffers).__enter__()
    except AssertionError as error:
        refusal = next((line for line in str(error).splitlines() if "is not possible" in line), None)
        if refusal is None:
            raise
        lacking(f"{source.name}: {refusal}")


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    return SOURCES[request.param]


@pytest.fixture(scope="module")
def level(source: Source) -> Iterator[RingLevel]:
    with opened(source) as level:
        yield level


def test_what_comes_before_a_loss_is_complete_and_behind_it_all_is_right(source: Source) -> None:
    many = "\n".join(f"mknod d/{i}" for i in range(MANY))
    text = f"mkdir d\nmkdir e\nwatch d d CHANGES\nwatch e e CHANGES\nstall\n{many}\nresume\nsync"
    behind = "file d/behind\nrename d/behind e/behind\nunlink e/behind"
    with opened(source, "--event-queue=64", buffers=8) as level:
        outcome = level.run((*parse(text), *step_by_step(parse(behind))))
    assert outcome.is_equal, "\n".join(outcome.lines)
    assert outcome.losses == 1


ENDS_WITHOUT_A_WORD = "inotify says nothing of a directory that the server holds: docs/protocol.md, 6.3"
KNOWN: dict[tuple[str, str], str] = {
    ("inotify", name): ENDS_WITHOUT_A_WORD
    for name in (
        "directory rename through what is not watched",
        "the end of an empty directory",
        "the end of a directory that is watched alone",
        "the end of a tree",
    )
}
"""What differs by source and scenario, and why."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_told_as_natively_step_by_step(
    level: RingLevel, source: Source, name: str, request: pytest.FixtureRequest
) -> None:
    if reason := KNOWN.get((source.name, name)):
        request.applymarker(pytest.mark.xfail(reason=reason))
    outcome = level.run(step_by_step(SCENARIOS[name]))
    assert outcome.is_equal, "\n".join(outcome.lines)
    assert outcome.compared
