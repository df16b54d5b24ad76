# SPDX-License-Identifier: Apache-2.0
"""How watched objects end, and which object and name an event is about: as it is seen on the host.

Must not know how events travel. Specification: inotify(7); docs/protocol.md, 5.5.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.guest.events.conftest import SOURCES, MakeWatchedPlace, WatchedPlace
from tests.guest.events.watching import In, Watch
from tests.guest.place import awaited
from tests.limits import HANG_S

ALL_SOURCES = ["auto", *SOURCES]
GONE = ("ATTRIB", "DELETE_SELF", "IGNORED")


def of(index: int, *lines: str) -> list[str]:
    """The lines as those of another of the watched paths."""
    return [f"{index} {line}" for line in lines]


@pytest.fixture(params=ALL_SOURCES)
def watched_by(watched_on: MakeWatchedPlace, request: pytest.FixtureRequest) -> WatchedPlace:
    """A new directory of a share of each host source."""
    tag: str = request.param
    return watched_on(tag)


# -- the last link


def test_a_watch_ends_with_its_file(watched_by: WatchedPlace) -> None:
    file = watched_by.host / "file"
    file.write_text("text")
    watch = watched_by.watch("file")
    watch.step(file.unlink, *GONE)


@pytest.mark.parametrize("tag", ["auto", "inodes"])
def test_a_watch_ends_with_its_directory(watched_on: MakeWatchedPlace, tag: str) -> None:
    """Not by inotify on the host alone, which tells it by the name in the parent only."""
    watched = watched_on(tag)
    directory = watched.host / "directory"
    directory.mkdir()
    watch = watched.watch("directory")
    watch.step(directory.rmdir, "DELETE_SELF", "IGNORED")


def test_an_end_is_seen_by_who_watches_the_object_and_by_who_watches_its_directory(
    watched_by: WatchedPlace,
) -> None:
    host = watched_by.host
    (host / "file").touch()
    (host / "directory").mkdir()
    watch = watched_by.watch(".", "file", "directory")
    # The server holds the object for a moment longer, so the order differs on the host.
    watch.step((host / "file").unlink, "DELETE file", *of(1, *GONE), ordered=False)
    watch.step(
        (host / "directory").rmdir,
        "DELETE|ISDIR directory",
        *of(2, "DELETE_SELF", "IGNORED"),
        ordered=False,
    )
    watch.ends()


def test_an_object_s_own_end_comes_before_its_name_s(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    (host / "file").touch()
    (host / "directory").mkdir()
    watch = watched_by.watch(".", "file", "directory", with_twin=False)
    watch.step((host / "file").unlink, *of(1, *GONE), "DELETE file")
    watch.step((host / "directory").rmdir, *of(2, "DELETE_SELF", "IGNORED"), "DELETE|ISDIR directory")


def test_a_file_that_is_replaced_ends(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    for name in ("new", "old"):
        (host / name).write_text(name)
    watch = watched_by.watch(".", "old", "new")
    watch.step(
        lambda: os.rename(host / "new", host / "old"),
        "MOVED_FROM new #1",
        "MOVED_TO old #1",
        *of(1, *GONE),
        *of(2, "MOVE_SELF"),
        ordered=False,
    )
    wrote = ("MODIFY", "CLOSE_WRITE")
    watch.step(
        lambda: append(host / "old"), *(f"{word} old" for word in wrote), *of(2, *wrote), ordered=False
    )
    watch.ends()


def test_a_file_that_is_open_here_ends_when_it_is_closed(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    (host / "file").write_text("text")
    watch = watched_by.watch("file", mask=In.ATTRIB | In.DELETE_SELF | In.MODIFY)
    reader = watched_by.place.start("exec 3<file; echo open; read go; cat <&3; exec 3<&-; echo closed; cat")
    reader.wait_for_lines(1, HANG_S)
    beside = os.open(host / "file", os.O_RDWR)
    watch.step((host / "file").unlink, "ATTRIB")
    watch.step(lambda: os.write(beside, b"more"), "MODIFY")

    def close() -> None:
        os.close(beside)
        reader.write_stdin(b"\n")
        reader.wait_for_lines(2, HANG_S)

    watch.step(close, "DELETE_SELF", "IGNORED")
    reader.close_stdin()
    assert reader.wait(HANG_S).check().text == "open\nmoreclosed\n"


# -- several links


def test_a_file_ends_with_the_last_of_its_links(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    (host / "a").touch()
    for name in ("b", "c"):
        (host / name).hardlink_to(host / "a")
    watched_by.place.sh("ls -l")
    watch = watched_by.watch("a")
    for name in ("b", "a"):
        watch.step((host / name).unlink, "ATTRIB")
    assert watched_by.place.sh("stat -c %h c") == "1\n"
    watch.step(lambda: append(host / "c"), "MODIFY", "CLOSE_WRITE")
    watch.step((host / "c").unlink, *GONE)


def test_links_are_told_by_the_name_that_was_used(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    for name in ("one", "two"):
        (host / name).mkdir()
    (host / "one/a").touch()
    (host / "one/b").hardlink_to(host / "one/a")
    (host / "two/c").hardlink_to(host / "one/a")
    watched_by.place.sh("ls -lR")
    watch = watched_by.watch("one", "two", "one/a")
    wrote = ("MODIFY", "CLOSE_WRITE")
    for name, lines in (
        ("one/a", [f"{word} a" for word in wrote]),
        ("one/b", [f"{word} b" for word in wrote]),
        ("two/c", of(1, *(f"{word} c" for word in wrote))),
    ):
        watch.step(partial(append, host / name), *lines, *of(2, *wrote), ordered=False)
    watch.step((host / "one/b").unlink, "DELETE b", *of(2, "ATTRIB"), ordered=False)
    watch.step(
        lambda: os.rename(host / "one/a", host / "two/d"),
        "MOVED_FROM a #1",
        "1 MOVED_TO d #1",
        *of(2, "MOVE_SELF"),
        ordered=False,
    )
    watch.step((host / "two/c").unlink, "1 DELETE c", *of(2, "ATTRIB"), ordered=False)
    watch.step((host / "two/d").unlink, "1 DELETE d", *of(2, *GONE), ordered=False)


# -- the guest itself removes what the host knows otherwise


def test_the_guest_removes_the_last_link_after_the_host_has_removed_another(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    (host / "a").touch()
    (host / "b").hardlink_to(host / "a")
    assert watched_by.place.sh("stat -c %h a") == "2\n"
    watch = watched_by.watch("a")
    watch.step((host / "b").unlink, "ATTRIB")
    watch.step(lambda: watched_by.place.sh("rm a"), *GONE)


def test_the_guest_removes_a_link_after_the_host_has_made_another(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    (host / "a").touch()
    assert watched_by.place.sh("stat -c %h a") == "1\n"
    watch = watched_by.watch("a")
    watch.step(lambda: (host / "b").hardlink_to(host / "a"), "ATTRIB")
    watch.step(lambda: watched_by.place.sh("rm a"), "ATTRIB")
    watch.step(lambda: append(host / "b"), "MODIFY", "CLOSE_WRITE")
    watch.step((host / "b").unlink, *GONE)


def test_no_watch_stays_when_guest_and_host_remove_the_links_of_a_file_at_once(
    watched_by: WatchedPlace,
) -> None:
    host, place = watched_by.host, watched_by.place
    count = 60
    names = [f"f{number}" for number in range(count)]
    for name in names:
        (host / name).touch()
        (host / f"{name}-too").hardlink_to(host / name)
    place.sh("ls -l")
    watch = watched_by.watch(*names, mask=In.DELETE_SELF, with_twin=False)
    removal = place.start(f"for n in $(seq 0 {count - 1}); do rm f$n; done")
    for name in names:
        (host / f"{name}-too").unlink()
    removal.close_stdin()
    removal.wait(HANG_S).check()
    all_end(watch)


def test_no_watch_stays_when_guest_and_host_remove_the_same_files_at_once(watched_by: WatchedPlace) -> None:
    host, place = watched_by.host, watched_by.place
    count = 60
    names = [f"f{number}" for number in range(count)]
    for name in names:
        (host / name).touch()
    watch = watched_by.watch(*names, mask=In.DELETE_SELF, with_twin=False)
    removal = place.start(f"for n in $(seq 0 {count - 1}); do rm -f f$n; done")
    for name in reversed(names):
        (host / name).unlink(missing_ok=True)
    removal.close_stdin()
    removal.wait(HANG_S)
    all_end(watch)


def all_end(watch: Watch) -> None:
    """Each of the watches says that its object is gone, once, and ends."""
    ends = [(n, bit) for n in range(len(watch.names)) for bit in (In.DELETE_SELF, In.IGNORED)]
    awaited(lambda: len(watch.events()) >= len(ends), HANG_S)
    assert sorted((event.watch, event.mask) for event in watch.events()) == ends


# -- names


def test_a_name_that_is_used_again_is_another_object(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    file = host / "name"
    file.write_text("first")
    watch = watched_by.watch(".", "name")
    watch.step(file.unlink, "DELETE name", *of(1, *GONE), ordered=False)
    watch.step(lambda: file.write_text("second"), "CREATE name", "MODIFY name", "CLOSE_WRITE name")
    assert watched_by.place.sh("cat name") == "second"
    watch.step(lambda: append(file), "MODIFY name", "CLOSE_WRITE name")
    watch.command_line(f"add {watched_by.place.inside}/name", "added 2")
    watch.ends()


OBJECTS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "file": (lambda path: path.touch(), os.unlink, ""),
    "directory": (os.mkdir, os.rmdir, "|ISDIR"),
    "symlink": (lambda path: path.symlink_to("elsewhere"), os.unlink, ""),
    "fifo": (os.mkfifo, os.unlink, ""),
}


def test_a_name_passes_from_one_type_to_another(watched_by: WatchedPlace) -> None:
    host, place = watched_by.host, watched_by.place
    watch = watched_by.watch()
    kinds = {
        "file": "regular empty file",
        "directory": "directory",
        "symlink": "symbolic link",
        "fifo": "fifo",
    }
    for before in OBJECTS:
        for after in OBJECTS:
            make, remove, flag = OBJECTS[before]
            make_next, remove_next, next_flag = OBJECTS[after]
            closed = ["CLOSE_WRITE name"]
            watch.step(
                partial(make, host / "name"),
                f"CREATE{flag} name",
                *(closed if before == "file" else []),
            )
            assert place.sh("stat -c %F name") == kinds[before] + "\n"

            watch.step(
                partial(replace, host / "name", remove, make_next),
                f"DELETE{flag} name",
                f"CREATE{next_flag} name",
                *(closed if after == "file" else []),
            )
            assert place.sh("stat -c %F name") == kinds[after] + "\n"
            watch.step(partial(remove_next, host / "name"), f"DELETE{next_flag} name")
            assert place.run("stat name").exit_status == 1


def replace(path: Path, remove: Callable[[Path], object], make: Callable[[Path], object]) -> None:
    remove(path)
    make(path)


def test_a_watched_object_keeps_its_watch_through_renames(watched_by: WatchedPlace) -> None:
    host = watched_by.host
    for name in ("one", "two"):
        (host / name).mkdir()
    (host / "one/d").mkdir()
    (host / "one/d/f").touch()
    watch = watched_by.watch("one/d", "one/d/f")
    watch.step(lambda: os.rename(host / "one/d", host / "two/e"), "MOVE_SELF")
    wrote = ("MODIFY", "CLOSE_WRITE")
    watch.step(
        lambda: append(host / "two/e/f"), *(f"{word} f" for word in wrote), *of(1, *wrote), ordered=False
    )
    watch.step((host / "two/e/new").mkdir, "CREATE|ISDIR new")
    # Another one of that name is not watched.
    (host / "one/d").mkdir()
    (host / "one/d/f").touch()
    watch.step(lambda: os.rename(host / "two", host / "three"))
    watch.step((host / "three/e/f").unlink, "DELETE f", *of(1, *GONE), ordered=False)
    watch.step((host / "three/e/new").rmdir, "DELETE|ISDIR new")


def test_a_directory_s_events_are_told_by_the_name_that_it_has_now(watched_by: WatchedPlace) -> None:
    host, place = watched_by.host, watched_by.place
    for name in ("sub", "d/below"):
        (host / name).mkdir(parents=True)
    place.sh("ls -lR; mount -t tmpfs none d/below; touch d/below/mine")
    user = place.start("cd d; echo in; read go; pwd -P; ls below; cat")
    user.wait_for_lines(1, HANG_S)
    watch = watched_by.watch(".", "sub")
    watch.step(
        lambda: os.rename(host / "d", host / "sub/e"), "MOVED_FROM|ISDIR d #1", "1 MOVED_TO|ISDIR e #1"
    )
    watch.step(lambda: os.chmod(host / "sub/e", 0o700), "1 ATTRIB|ISDIR e")
    watch.step(
        lambda: os.rename(host / "sub/e", host / "f"), "1 MOVED_FROM|ISDIR e #1", "MOVED_TO|ISDIR f #1"
    )
    watch.step(lambda: os.chmod(host / "f", 0o755), "ATTRIB|ISDIR f")
    watch.step(lambda: os.rename(host / "f", host / "g"), "MOVED_FROM|ISDIR f #1", "MOVED_TO|ISDIR g #1")
    watch.step(lambda: os.chmod(host / "g", 0o700), "ATTRIB|ISDIR g")
    watch.ends()
    # Who is in it goes with it, and what is mounted there stays.
    user.write_stdin(b"\n")
    assert user.wait_for_lines(3, HANG_S)[1:] == [f"{place.inside}/g", "mine"]
    user.close_stdin()
    user.wait(HANG_S).check()
    place.sh("umount g/below")


def append(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("more\n")
