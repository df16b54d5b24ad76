# SPDX-License-Identifier: Apache-2.0
"""Servers without rights, and a host without room for more watches: what the guest sees and people are told.

Must not know how events travel. Specification: docs/events.md, "Where the server learns of changes".
"""

from __future__ import annotations

import signal

from tests.guest.events.conftest import MAX_WATCHES_OF_FEW, EventSession, MakeWatchedPlace
from tests.guest.events.scenario import a_day
from tests.guest.events.watching import ALL, CHANGES
from tests.guest.place import awaited
from tests.limits import HANG_S


def test_a_server_of_an_ordinary_user_tells_of_a_day_s_work(
    session: EventSession, watched_on: MakeWatchedPlace
) -> None:
    watched = watched_on("user")
    events = watched.control.stats()["events"]
    assert events["source"] == "fanotify:inodes"
    assert "no CAP_SYS_ADMIN" in events["reason"]
    (watched.host / "sub").mkdir()
    (watched.host / "outside").mkdir()
    a_day(watched.watch(".", "sub"))


def test_the_guest_s_own_changes_are_not_told_twice_by_an_ordinary_user_s_server(
    watched_on: MakeWatchedPlace,
) -> None:
    watched = watched_on("user")
    watch = watched.watch(mask=ALL, with_twin=False)
    watch.step(
        lambda: watched.place.sh("echo text >own"), "CREATE own", "OPEN own", "MODIFY own", "CLOSE_WRITE own"
    )
    watch.step(lambda: (watched.host / "fence").mkdir(), "CREATE|ISDIR fence")
    watch.ends()


def test_what_the_host_has_no_room_to_watch_is_said_on_both_sides(
    session: EventSession, watched_on: MakeWatchedPlace
) -> None:
    watched = watched_on("few")
    names = [f"d{number}" for number in range(2 * MAX_WATCHES_OF_FEW)]
    for name in names:
        (watched.host / name).mkdir()
    said = session.guest.console_path
    paths = " ".join(f"'{watched.place.inside}/{name}'" for name in names)
    watcher = watched.place.guest.start(f"exec inotifywait -m -e create {paths}")
    watcher.wait_for_output(b"Watches established", HANG_S, "stderr")
    # The server's log names the limit, the guest's kernel says what it means there.
    log = session.shares["few"].server.log_path
    assert awaited(lambda: "/proc/sys/fs/inotify/max_user_watches" in log.read_text(), HANG_S)
    line = "the host does not watch all that is watched here"
    assert awaited(lambda: line in said.read_text(errors="replace"), HANG_S)
    # Those that fit are watched, and of the others the guest's own changes are told.
    count = watched.control.watches
    assert 0 < count <= MAX_WATCHES_OF_FEW
    for name in names:
        (watched.host / name / "by-the-host").mkdir()
    assert awaited(lambda: watcher.stdout.count(b"by-the-host") == count, HANG_S)
    watched.place.sh(f"for name in {' '.join(names)}; do mkdir $name/by-the-guest; done")
    assert awaited(lambda: watcher.stdout.count(b"by-the-guest") == len(names), HANG_S)
    assert watcher.stdout.count(b"by-the-host") == count
    watcher.send_signal(signal.SIGKILL)
    watcher.wait(HANG_S)
    # There is room again.
    assert watched.control.awaited_watches(0) == 0
    watch = watched.watch("d11", mask=CHANGES)
    watch.step((watched.host / "d11/new").mkdir, "CREATE|ISDIR new")
    watch.ends()
