# SPDX-License-Identifier: Apache-2.0
"""Renames with and without flags, and names and links that move while they are in use.

Must not test directories' content in depth (test_tree.py). Specification: rename(2).
"""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.guest.place import Place
from tests.limits import HANG_S

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
RENAME = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
done = libc.renameat2(-100, os.fsencode(sys.argv[1]), -100, os.fsencode(sys.argv[2]), int(sys.argv[3]))
print(ctypes.get_errno() if done else 0)
"""


def rename(place: Place, source: str, target: str, flags: int) -> int:
    """The errno of renameat2 in the guest, 0 when it succeeded."""
    number = place.python(RENAME, source, target, str(flags))
    assert isinstance(number, int)
    return number


def test_noreplace_spares_what_is_there(any_place: Place) -> None:
    (any_place.host / "a").write_text("a")
    (any_place.host / "b").write_text("b")
    assert rename(any_place, "a", "b", NOREPLACE) == errno.EEXIST
    assert (any_place.host / "b").read_text() == "b"
    assert rename(any_place, "a", "c", NOREPLACE) == 0
    assert (any_place.host / "c").read_text() == "a"
    assert any_place.sh("cat c") == "a"


def test_exchange_swaps_a_file_and_a_directory(any_place: Place) -> None:
    (any_place.host / "file").write_text("content")
    any_place.child("dir").child("sub")
    assert any_place.sh("cat file; ls dir") == "contentsub\n"
    assert rename(any_place, "file", "dir", EXCHANGE) == 0
    assert (any_place.host / "dir").read_text() == "content"
    assert os.listdir(any_place.host / "file") == ["sub"]
    assert any_place.sh("cat dir; ls file") == "contentsub\n"
    assert rename(any_place, "file", "nothing", EXCHANGE) == errno.ENOENT


@pytest.mark.usefixtures("needs_root")
def test_whiteout_leaves_a_character_device_behind(place: Place) -> None:
    (place.host / "file").write_text("content")
    assert rename(place, "file", "moved", WHITEOUT) == 0
    assert (place.host / "moved").read_text() == "content"
    left = (place.host / "file").lstat()
    assert (stat.S_ISCHR(left.st_mode), left.st_rdev) == (True, 0)
    assert place.sh("stat -c '%F %t %T' file").strip() == "character special file 0 0"


def test_flags_that_exclude_each_other_are_refused(place: Place) -> None:
    (place.host / "a").touch()
    (place.host / "b").touch()
    assert rename(place, "a", "b", NOREPLACE | EXCHANGE) == errno.EINVAL


def test_a_rename_replaces_the_target_and_keeps_who_has_it_open(any_place: Place) -> None:
    seen = any_place.python(
        """
import json, os
for name in ("old", "new"):
    with open(name, "w") as file:
        file.write(name)
with open("old") as kept:
    os.rename("new", "old")
    print(json.dumps([kept.read(), open("old").read(), os.listdir(".")]))
"""
    )
    assert seen == ["old", "new", ["old"]]


def test_a_file_renamed_again_and_again_by_the_guest_is_never_missing(place: Place) -> None:
    (place.host / "file").write_text("0")
    writer = place.start(
        "n=0; while [ $n -lt 100 ]; do n=$((n+1)); echo $n >new; mv new file; done; echo done"
    )
    while not writer.stdout:
        assert (place.host / "file").read_text()
    writer.close_stdin()
    assert writer.wait(HANG_S).check().text == "done\n"
    assert (place.host / "file").read_text() == "100\n"


def test_a_directory_moved_under_a_working_guest_process_is_still_its_own(place: Place) -> None:
    place.child("a").child("b")
    seen = place.sh(
        "mkdir other; cd a/b; echo 1 >one; mv ../../a ../../other/; echo 2 >two; ls; pwd -P;"
        "cat ../../../other/a/b/one"
    )
    assert seen.split() == ["one", "two", f"{place.inside}/other/a/b", "1"]
    assert sorted(os.listdir(place.host / "other/a/b")) == ["one", "two"]


def test_a_directory_is_not_moved_into_itself(place: Place) -> None:
    place.child("a").child("b")
    assert place.errno_of("os.rename('a', 'a/b/c')") == errno.EINVAL
    assert place.errno_of("os.rename('a/b', 'a')") == errno.ENOTEMPTY
