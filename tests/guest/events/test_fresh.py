# SPDX-License-Identifier: Apache-2.0
"""An event in the guest is never older than what the guest then reads: its caches are right when it arrives.

Must not know how caches are kept. Specification: docs/protocol.md, docs/events.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.guest.events.conftest import CACHE_MODES, MakeWatchedPlace, WatchedPlace
from tests.guest.events.watching import In, Seen, Watch
from tests.guest.place import awaited
from tests.limits import HANG_S

CHANGES_MADE = 200


@pytest.fixture(params=list(CACHE_MODES))
def watched_any(watched_on: MakeWatchedPlace, request: pytest.FixtureRequest) -> WatchedPlace:
    """A new directory of a share of each cache mode."""
    tag: str = request.param
    return watched_on(tag)


def awaited_handled(watch: Watch, count: int, step_s: float = 0.02) -> list[tuple[Seen, str]]:
    """The same, once there are so many; fails when there are not in time."""
    awaited(lambda: len(list(handled(watch))) >= count, HANG_S, step_s)
    found = list(handled(watch))
    assert len(found) >= count, f"{len(found)} of {count} events came, the last was {found[-1:]}"
    return found


def handled(watch: Watch) -> Iterator[tuple[Seen, str]]:
    """Each event with what its handler saw."""
    event: Seen | None = None
    output = watch.command.stdout
    for line in output[: output.rfind(b"\n") + 1].decode("utf-8", "surrogateescape").splitlines():
        if line[0].isdecimal():
            number, mask, cookie, name = line.split(" ", 3)
            event = Seen(int(number), In(int(mask, 16)), int(cookie), name)
        elif event is not None:
            yield event, line
            event = None


def test_a_handler_that_reads_the_changed_file_reads_what_was_written(watched_any: WatchedPlace) -> None:
    file = watched_any.host / "file"
    file.write_text("before")
    watch = watched_any.watch(mask=In.CLOSE_WRITE, look="--read", with_twin=False)
    for number in range(CHANGES_MADE):
        # Of many sizes, growing and shrinking, with pages of its own.
        text = f"{number} " + "x" * (number * 37 % 3000)
        file.write_text(text)
        expected = f"saw {len(text)} {text}"
        assert awaited_handled(watch, number + 1, 0.002)[number][1] == expected


def test_many_files_written_at_once_are_read_as_written(watched_any: WatchedPlace) -> None:
    watch = watched_any.watch(mask=In.CLOSE_WRITE, look="--read", with_twin=False)
    for number in range(CHANGES_MADE):
        (watched_any.host / f"f{number}").write_text(f"content {number}")
    for event, line in awaited_handled(watch, CHANGES_MADE):
        text = f"content {event.name.removeprefix('f')}"
        assert line == f"saw {len(text)} {text}", event


def test_a_handler_that_lists_the_directory_sees_what_came_and_not_what_went(
    watched_any: WatchedPlace,
) -> None:
    watch = watched_any.watch(mask=In.CREATE | In.DELETE, look="--list", with_twin=False)
    names = [f"d{number}" for number in range(CHANGES_MADE // 2)]
    for name in names:
        (watched_any.host / name).mkdir()
    made = awaited_handled(watch, len(names))
    for number, (event, line) in enumerate(made):
        assert event.name == names[number]
        assert set(names[: number + 1]) <= listed(line), (event, line)
    for name in names:
        (watched_any.host / name).rmdir()
    removed = awaited_handled(watch, 2 * len(names))[len(names) :]
    for number, (event, line) in enumerate(removed):
        assert event.name == names[number]
        assert not set(names[: number + 1]) & listed(line), (event, line)


def listed(line: str) -> set[str]:
    return set(line.removeprefix("saw ").split("/"))


def test_what_was_looked_up_in_vain_is_found_when_its_event_comes(watched_any: WatchedPlace) -> None:
    place = watched_any.place
    watch = watched_any.watch(mask=In.CREATE | In.MOVED_TO | In.CLOSE_WRITE, look="--read", with_twin=False)
    for number in range(20):
        name = f"config{number}"
        # The guest remembers for a while that there is none.
        assert place.run(f"cat {name}").exit_status == 1
        with open(watched_any.host / f".{name}", "w") as stream:
            stream.write(f"version {number}")
        os.rename(watched_any.host / f".{name}", watched_any.host / name)

        def last(name: str = name) -> list[str]:
            return [line for event, line in handled(watch) if event.name == name]

        assert awaited(lambda: bool(last()), HANG_S, 0.002)
        assert last() == [f"saw {8 + len(str(number))} version {number}"]


def test_attributes_are_new_when_their_event_comes(watched_any: WatchedPlace) -> None:
    file = watched_any.host / "file"
    file.write_text("x")
    place = watched_any.place
    assert place.sh("stat -c %a:%s file") == "644:1\n"
    before = watched_any.control.watches
    # Prints mode and size for every event, in the handler.
    watcher = place.start(
        "inotifywait -m -q -e attrib -e modify --format %e . | while read -r event; do "
        "echo $event $(stat -c %a:%s file); done"
    )
    assert watched_any.control.awaited_watches(before + 1) == before + 1
    for number in range(10):
        mode = 0o600 + number
        file.chmod(mode)
        watcher.wait_for_output(f"ATTRIB {mode:o}:1\n", HANG_S)
    for size in range(2, 12):
        os.truncate(file, size)
        watcher.wait_for_output(f"MODIFY {mode:o}:{size}\n", HANG_S)
    watcher.send_signal(signal.SIGTERM)
    watcher.wait(HANG_S)
