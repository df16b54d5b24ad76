# SPDX-License-Identifier: Apache-2.0
"""A short dose of the oracle at the ring, on every source; scripts/oracle has the long one.

Must not know what is right: Linux says it. Specification: docs/oracle.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import lacking
from tests.oracle.generate import MIXES, random_script
from tests.oracle.ring_level import RingLevel
from tests.oracle.runner import SOURCES, Source
from tests.oracle.scenarios import SCENARIOS
from tests.oracle.script import beside_work, parse, step_by_step

pytestmark = pytest.mark.usefixtures("ours")

MANY = 400


def opened(source: Source, *options: str, buffers: int = 64, held: bool = False) -> RingLevel:
    """A level, or a loud skip where the host does not permit the source."""
    try:
        return RingLevel(source, options, buffers=buffers, held=held).__enter__()
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


@pytest.fixture(scope="module")
def held_level(source: Source) -> Iterator[RingLevel]:
    with opened(source, held=True) as level:
        yield level


def test_what_comes_before_a_loss_is_complete_and_behind_it_all_is_right(source: Source) -> None:
    many = "\n".join(f"mknod d/{i}" for i in range(MANY))
    text = f"mkdir d\nmkdir e\nwatch d d CHANGES\nwatch e e CHANGES\nstall\n{many}\nresume\nsync"
    behind = "file d/behind\nrename d/behind e/behind\nunlink e/behind"
    with opened(source, "--event-queue=64", buffers=8) as level:
        outcome = level.run((*parse(text), *step_by_step(parse(behind))))
    assert outcome.is_equal, "\n".join(outcome.lines)
    assert outcome.losses == 1


def test_many_names_that_are_taken_twice_are_told_each_in_its_place(held_level: RingLevel) -> None:
    """More than are laid side by side at a time."""
    names = [f"{time}.{i}" for time in range(2) for i in range(40)]
    made = "\n".join(f"mknod u/{name}" for name in names)
    taken = "\n".join(f"rename u/{name} d/{name[2:]}" for name in names)
    outcome = held_level.run(parse(f"mkdir d\nmkdir u\nwatch d d ALL\n{made}\nsync\n{taken}"))
    assert outcome.is_equal, "\n".join(outcome.lines)
    assert outcome.compared >= len(names)


def test_many_directories_that_wander_out_of_sight_end_once_each(held_level: RingLevel) -> None:
    """Where they went nobody watches; all is over before anything of it is read."""
    places = range(200)
    made = "\n".join(f"mkdir d/{i}\nwatch w{i} d/{i} ALL" for i in places)
    moves = [f"rename d/{i} u/{i}" for i in places]
    used = [f"mkdir u/{i}/below\nrmdir u/{i}/below" for i in places]
    gone = [f"rmdir u/{i}" for i in places]
    outcome = held_level.run(parse("\n".join([f"mkdir d\nmkdir u\n{made}", *moves, *used, *gone])))
    assert outcome.is_equal, "\n".join(outcome.lines)
    assert outcome.compared >= 4 * len(places)


RANDOM_SEEDS = range(1, 7)
RANDOM_OPERATIONS = 60


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_told_as_natively(level: RingLevel, held_level: RingLevel, name: str) -> None:
    """Step by step, as fast as it goes, and by a server that finds all of it at once."""
    script = SCENARIOS[name]
    for tried, operations in ((level, step_by_step(script)), (level, script), (held_level, script)):
        outcome = tried.run(operations)
        assert outcome.is_equal, "\n".join(outcome.lines)
        assert outcome.compared


@pytest.mark.parametrize("seed", RANDOM_SEEDS)
def test_what_is_done_at_random_is_told_as_natively(level: RingLevel, seed: int) -> None:
    outcome = level.run(random_script(seed, RANDOM_OPERATIONS))
    assert outcome.is_equal, "\n".join([f"seed {seed}", *outcome.lines])


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "all"])
@pytest.mark.parametrize("seed", RANDOM_SEEDS)
def test_few_names_that_wander_are_told_as_natively(level: RingLevel, mix: str, seed: int) -> None:
    outcome = level.run(random_script(seed, RANDOM_OPERATIONS, mix))
    assert outcome.is_equal, "\n".join([f"seed {seed}", *outcome.lines])


@pytest.mark.parametrize("seed", RANDOM_SEEDS)
def test_that_the_guest_is_at_work_itself_hides_nothing(level: RingLevel, seed: int) -> None:
    outcome = level.run(beside_work(random_script(seed, RANDOM_OPERATIONS)))
    assert outcome.is_equal, "\n".join([f"seed {seed}", *outcome.lines])
