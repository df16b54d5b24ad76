# SPDX-License-Identifier: Apache-2.0
"""--cache=coherent in a real guest: what it has looked at costs nothing more, and it is right all the same.

Must not test what watchers are told. `scripts/coherent-torture` does the last of these for longer.
Specification: docs/protocol.md, "Coherent caches".
"""

from __future__ import annotations

import os
import time

import pytest

from tests.conftest import lacking
from tests.guest.events.conftest import (
    CHANGER_PROGRAM,
    HOLDER_PROGRAM,
    EventSession,
    MakeWatchedPlace,
    WatchedPlace,
)
from tests.guest.events.torture import Conversation, Tree, torture
from tests.guest.place import awaited
from tests.limits import HANG_S

TORTURE_S = 8.0
LOOKS_AGAIN_FOR_S = 0.6
"""Longer than the driver does that for an object that it does not know."""
PATIENCE_S = 20.0
"""Of a machine on which the tests of others run, too; `scripts/coherent-torture` says how late it was."""


@pytest.fixture
def coherent(session: EventSession, watched_on: MakeWatchedPlace) -> WatchedPlace:
    share = session.shares["coherent"]
    if ", invalidate" not in share.server.log_path.read_text():
        lacking("CAP_SYS_ADMIN and a local file system, for coherent caches")
    return watched_on("coherent")


def requests(coherent: WatchedPlace) -> int:
    """That the server has answered."""
    return int(coherent.control.stats()["share"]["requests"])


def test_what_was_looked_at_costs_no_request(coherent: WatchedPlace) -> None:
    for number in range(30):
        (coherent.host / f"f{number}").write_text("text")
    look = "ls -l . && ls -l absent; for i in 1 2 3; do ls -l . absent; done; true"
    coherent.place.sh(look)
    before = requests(coherent)
    coherent.place.sh("for i in 1 2 3 4 5; do stat -t f1 f2 f3 f4 absent; done; true")
    assert requests(coherent) - before < 5, "names and attributes were asked for again"


def test_a_rename_costs_nothing_of_what_it_is_not_about(coherent: WatchedPlace) -> None:
    for number in range(30):
        (coherent.host / f"f{number}").write_text("text")
    look = "stat -t f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 f11 f12 f13 f14 f15 f16 f17 f18 f19"
    coherent.place.sh(f"{look}; {look}; {look}")
    before = requests(coherent)
    coherent.place.sh("mv f0 renamed")
    time.sleep(LOOKS_AGAIN_FOR_S)
    coherent.place.sh(look)
    assert requests(coherent) - before < 15, "everything was asked for again"


@pytest.mark.parametrize("change", ["write", "remove", "make", "mode"])
def test_what_the_host_changes_is_seen_although_it_was_kept(coherent: WatchedPlace, change: str) -> None:
    file = coherent.host / "file"
    if change != "make":
        file.write_text("before")
    look = "cat file 2>/dev/null; stat -c %a file 2>/dev/null; ls"
    for _ in range(3):
        before = coherent.place.sh(look)
    if change in ("write", "make"):
        file.write_text("behind")  # of the same size
    elif change == "remove":
        file.unlink()
    else:
        os.chmod(file, 0o600)
    expected = {
        "write": "behind644\nfile\n",
        "make": "behind644\nfile\n",
        "remove": "",
        "mode": "before600\nfile\n",
    }
    assert before != expected[change]
    assert awaited(lambda: coherent.place.sh(look) == expected[change])


def test_what_came_is_right_while_somebody_is_long_in_the_directory(coherent: WatchedPlace) -> None:
    directory = coherent.host / "dir"
    directory.mkdir()
    os.utime(directory, (1, 1))
    coherent.place.sh("ls dir; stat -c %Y dir")
    assert coherent.place.sh("stat -c %Y dir") == "1\n"
    holder = coherent.place.start(f"exec {HOLDER_PROGRAM} dir")
    try:
        holder.wait_for_output("held", HANG_S)
        (directory / "new").mkdir()  # to drop its name takes the directory's lock
        assert awaited(lambda: coherent.place.sh("stat -c %Y dir") != "1\n")
        os.utime(directory, (1, 1))  # it waits for that already
        assert awaited(lambda: coherent.place.sh("stat -c %Y dir") == "1\n")
    finally:
        holder.close_stdin()
        holder.wait(HANG_S)
    assert awaited(lambda: coherent.place.sh("ls dir") == "new\n")


def test_an_answer_is_in_somebodys_hands_for_long_while_the_host_changes_what_it_says(
    coherent: WatchedPlace,
) -> None:
    directory, other = coherent.host / "dir", coherent.host / "other"
    directory.mkdir()
    other.mkdir()
    (directory / "file").write_text("")
    (other / "link").hardlink_to(directory / "file")
    (other / "known").write_text("")
    look = "stat -c %a other/known"
    assert coherent.place.sh(f"{look}; {look}") == "644\n644\n"
    # It has been told of "file", and makes its inode of that only when it goes on.
    holder = coherent.place.start(f"exec {HOLDER_PROGRAM} dir")
    try:
        holder.wait_for_output("held", HANG_S)
        (other / "link").chmod(0o600)  # by a name in a directory whose lock is free
        (other / "known").chmod(0o600)
        assert awaited(lambda: coherent.place.sh(look) == "600\n")
        time.sleep(LOOKS_AGAIN_FOR_S)
    finally:
        holder.close_stdin()
        holder.wait(HANG_S).check()
    assert coherent.place.sh("stat -c %a dir/file") == "600\n"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (f"{CHANGER_PROGRAM} map other/link", "%Y other/link"),
        (f"{CHANGER_PROGRAM} reserve other/link", "%Z other/link"),
        (f"{CHANGER_PROGRAM} label other/link", "%Z other/link"),
        (f"{CHANGER_PROGRAM} unlabel other/link", "%Z other/link"),
        ("mv other/link other/renamed", "%Z other/renamed"),
        (f"{CHANGER_PROGRAM} exchange other/link other/known", "%Z other/known"),
        (f"{CHANGER_PROGRAM} exchange other/known other/link", "%Z other/known"),
        ("touch dir/entry/made", "%Y dir/entry"),
        ("ln -s target dir/entry/made", "%Y dir/entry"),
        ("mknod dir/entry/made p", "%Y dir/entry"),
        ("mkdir dir/entry/made", "%Y dir/entry"),
        ("rmdir dir/entry/old", "%Y dir/entry"),
        ("rm dir/entry/file", "%Y dir/entry"),
        ("mv dir/entry/old other/moved", "%Y dir/entry"),
        ("mv other/known dir/entry/moved", "%Y dir/entry"),
        ("ln other/known dir/entry/linked", "%Y dir/entry"),
    ],
)
def test_an_answer_is_in_somebodys_hands_for_long_while_the_guest_changes_what_it_says(
    coherent: WatchedPlace, change: str, what: str
) -> None:
    directory, other = coherent.host / "dir", coherent.host / "other"
    (directory / "entry" / "old").mkdir(parents=True)
    (directory / "entry" / "file").write_text("")
    (directory / "file").write_text("text")
    other.mkdir()
    (other / "link").hardlink_to(directory / "file")
    os.setxattr(other / "link", "user.old", b"")
    (other / "known").write_text("")
    look = "stat dir/entry dir/entry/old dir/entry/file other other/link other/known >/dev/null"
    coherent.place.sh(f"{look}; {look}; {look}")
    time.sleep(1.1)  # the times shown have no fractions
    holder = coherent.place.start(f"exec {HOLDER_PROGRAM} dir")
    try:
        holder.wait_for_output("held", HANG_S)
        coherent.place.sh(change)
    finally:
        holder.close_stdin()
        holder.wait(HANG_S).check()
    form, name = what.split()
    status = (coherent.host / name).stat()
    expected = int(status.st_ctime if form == "%Z" else status.st_mtime)
    assert coherent.place.sh(f"stat -c {what}") == f"{expected}\n"


def test_a_tree_that_is_changed_at_random_is_right(coherent: WatchedPlace) -> None:
    guest = Conversation(coherent.place.guest, coherent.place.inside)
    tree = Tree(coherent.host, seed=7)
    try:
        outcome = torture(tree, guest, TORTURE_S, patience_s=PATIENCE_S)
    finally:
        guest.close()
    assert outcome.answers > 100
