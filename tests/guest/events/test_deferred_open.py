# SPDX-License-Identifier: Apache-2.0
"""Opens that the guest's driver answers itself, while caches are coherent: they cost nothing, and are opens.

Must not test handles at the server (tests/ring/test_deferred_open.py). Specification: docs/protocol.md, 8.2.
"""

from __future__ import annotations

import itertools
import os

import pytest

from tests.conftest import lacking
from tests.guest.events.conftest import EventSession, MakeWatchedPlace, WatchedPlace
from tests.guest.place import awaited
from tests.guest.test_locks import host_try
from tests.limits import HANG_S
from tests.server import held_up

READ_LATER = """
import sys
file = open(sys.argv[1], "rb", buffering=0)
print("open", flush=True)
for line in sys.stdin:
    file.seek(0)
    print(file.read().decode(), flush=True)
"""
"""Opens, and reads each time it is told to."""
LOCK = """
import fcntl, os, sys
kind, how = sys.argv[1:3]
lock = fcntl.lockf if kind == "posix" else fcntl.flock
files = [os.open("file", os.O_RDONLY) for _ in range(2)]
lock(files[0], fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.readline()
os.close(files[1] if how == "another" else files[0])
print("closed", flush=True)
sys.stdin.readline()
"""
"""Holds a read lock on a file that is opened twice, and closes one of the two."""


WALK = "python3 -c \"import os; list(os.walk('.'))\""


def watched(session: EventSession, watched_on: MakeWatchedPlace, tag: str) -> WatchedPlace:
    log_path = session.shares[tag].server.log_path
    if not awaited(lambda: ", deferred_open" in log_path.read_text()):
        lacking("CAP_SYS_ADMIN and a local file system, for coherent caches")
    return watched_on(tag)


@pytest.fixture
def coherent(session: EventSession, watched_on: MakeWatchedPlace) -> WatchedPlace:
    return watched(session, watched_on, "coherent")


def requests(place: WatchedPlace) -> int:
    """That the server has answered."""
    return int(place.control.stats()["share"]["requests"])


def n_open(place: WatchedPlace) -> int:
    """Files and directories that the guest has open at the server."""
    return int(place.control.stats()["share"]["open_files"])


def cost(place: WatchedPlace, command: str) -> int:
    """Requests for a command that has run twice before."""
    for _ in range(2):
        place.place.sh(command)
    assert awaited(lambda: n_open(place) == 0), "something stays open"
    before = requests(place)
    place.place.sh(command)
    return requests(place) - before


def counter(place: WatchedPlace, name: str) -> int:
    """Of the driver's, for this share's device alone where only one moves."""
    text = place.place.sh(f"cat /sys/bus/virtio/devices/virtio*/notifications/{name}")
    return sum(int(line) for line in text.split())


def drop_pages(place: WatchedPlace) -> None:
    """Only file data: names and inodes stay."""
    place.place.sh("sync; echo 1 >/proc/sys/vm/drop_caches")


# ---- what it costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cat f*", "ls -R .", WALK, "grep -r nothing . || true"])
def test_what_was_opened_before_is_opened_without_a_request(coherent: WatchedPlace, command: str) -> None:
    for number in range(20):
        (coherent.host / f"f{number}").write_text(f"content {number}")
        (coherent.host / f"d{number}").mkdir()
    before = counter(coherent, "opened")
    assert cost(coherent, command) == 0
    assert counter(coherent, "opened") >= before + 20


def test_other_opens_are_asked_for(coherent: WatchedPlace) -> None:
    (coherent.host / "file").write_text("before")
    assert cost(coherent, "cat file") == 0
    assert cost(coherent, ": <>file") >= 2
    assert cost(coherent, """python3 -c 'import os; os.open("file", os.O_NOATIME)'""") >= 2
    coherent.place.sh("echo after >file")
    assert (coherent.host / "file").read_text() == "after\n"


def test_what_changes_is_asked_for_again(coherent: WatchedPlace) -> None:
    file = coherent.host / "file"
    file.write_text("before")
    assert cost(coherent, "cat file") == 0
    file.write_text("behind")
    assert awaited(lambda: coherent.place.sh("cat file") == "behind")
    assert cost(coherent, "cat file") == 0


def test_what_has_left_the_cache_is_read_and_closed_again(coherent: WatchedPlace) -> None:
    (coherent.host / "file").write_bytes(bytes(range(256)) * 4096)
    assert cost(coherent, "cat file") == 0
    drop_pages(coherent)
    assert coherent.place.run("cat file").stdout == bytes(range(256)) * 4096
    assert awaited(lambda: n_open(coherent) == 0), "it was not released"


# ---- it is an open file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
def test_an_open_file_that_the_host_takes_away_has_its_data(coherent: WatchedPlace, how: str) -> None:
    file = coherent.host / "file"
    file.write_text("before")
    assert cost(coherent, "cat file") == 0
    reader = coherent.place.start_python(READ_LATER, "file")
    reader.wait_for_output("open\n", HANG_S)
    assert n_open(coherent) == 0
    if how == "unlinked":
        file.unlink()
        assert awaited(lambda: coherent.place.run("cat file").exit_status != 0)
    else:
        (coherent.host / "new").write_text("behind")
        os.rename(coherent.host / "new", file)
        assert awaited(lambda: coherent.place.sh("cat file") == "behind")
    drop_pages(coherent)
    reader.write_stdin(b"\n")
    reader.wait_for_output("open\nbefore\n", HANG_S)
    reader.close_stdin()
    assert reader.wait(HANG_S).exit_status == 0
    assert awaited(lambda: n_open(coherent) == 0)


def test_what_the_host_writes_is_seen_by_who_has_it_open(coherent: WatchedPlace) -> None:
    file = coherent.host / "file"
    file.write_text("before")
    assert cost(coherent, "cat file") == 0
    reader = coherent.place.start_python(READ_LATER, "file")
    reader.wait_for_output("open\n", HANG_S)
    file.write_text("behind")
    count = itertools.count(2)

    def reads_it() -> bool:
        reader.write_stdin(b"\n")
        return reader.wait_for_lines(next(count), HANG_S)[-1] == "behind"

    assert awaited(reads_it)
    reader.close_stdin()
    assert reader.wait(HANG_S).exit_status == 0


@pytest.mark.parametrize("how", ["itself", "another"])
@pytest.mark.parametrize("kind", ["posix", "flock"])
def test_locks_hold_until_they_are_given_up(coherent: WatchedPlace, kind: str, how: str) -> None:
    """POSIX locks end when any handle of the process is closed, flock's with their own."""
    file = coherent.host / "file"
    file.write_text("text")
    assert cost(coherent, "cat file") == 0
    holder = coherent.place.start_python(LOCK, kind, how)
    holder.wait_for_output("held\n", HANG_S)
    assert not host_try(file, kind)
    holder.write_stdin(b"\n")
    holder.wait_for_output("held\nclosed\n", HANG_S)
    if kind == "flock" and how == "another":
        assert not host_try(file, kind)
    else:
        assert awaited(lambda: host_try(file, kind)), "the lock is still held"
    holder.close_stdin()
    assert holder.wait(HANG_S).exit_status == 0
    assert awaited(lambda: host_try(file, kind))
    assert awaited(lambda: n_open(coherent) == 0)


def test_who_may_not_read_it_does_not(coherent: WatchedPlace) -> None:
    file = coherent.host / "file"
    file.write_text("secret")
    os.chmod(file, 0o600)
    os.chown(file, 1234, 1234)
    assert cost(coherent, "cat file") == 0
    assert coherent.place.errno_of("open('file')", user=2345) != 0
    assert coherent.place.errno_of("open('file')", user=1234) == 0


# ---- when it is no longer known ---------------------------------------------------------------------------


def test_after_a_loss_opens_go_to_the_server(session: EventSession, watched_on: MakeWatchedPlace) -> None:
    """The queue of this share's server holds two elements, so what changes while the guest stands is lost."""
    place = watched(session, watched_on, "brief")
    for number in range(400):
        (place.host / f"f{number}").write_text("before")
    (place.host / "still").write_text("content")
    assert cost(place, "cat *") == 0
    losses = counter(place, "overflows")
    with held_up(session.guest.pid):
        for number in range(400):
            (place.host / f"f{number}").write_text("behind")
        assert awaited(lambda: place.control.counters()["lost"] > 0)
    assert awaited(lambda: counter(place, "overflows") > losses), "no loss was told"
    before = requests(place)
    assert place.place.sh("cat still") == "content"
    assert requests(place) > before, "it was opened without asking"
    assert place.place.sh("cat f*") == "behind" * 400
