# SPDX-License-Identifier: Apache-2.0
"""What a person does on the host, and what a watcher in the guest then sees: what one on the host sees.

Must not know how events travel. Specification: inotify(7); docs/events.md.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.guest.events.conftest import SOURCES, MakeWatchedPlace, WatchedPlace
from tests.guest.events.scenario import a_day
from tests.guest.events.watching import ALL, CHANGES, In
from tests.guest.place import awaited


@pytest.mark.parametrize("tag", ["auto", *SOURCES, "parked"])
def test_a_day_s_work_on_the_host_is_seen_in_the_guest_as_on_the_host(
    watched_on: MakeWatchedPlace, tag: str
) -> None:
    watched = watched_on(tag)
    (watched.host / "sub").mkdir()
    (watched.host / "outside").mkdir()
    a_day(watched.watch(".", "sub"))


def test_files_are_created_written_and_removed(watched: WatchedPlace) -> None:
    file = watched.host / "file"
    watch = watched.watch()
    watch.step(lambda: file.write_text("one\n"), "CREATE file", "MODIFY file", "CLOSE_WRITE file")
    watch.step(lambda: append(file, "two\n"), "MODIFY file", "CLOSE_WRITE file")
    watch.step(lambda: file.write_text("anew\n"), "MODIFY file", "CLOSE_WRITE file")
    watch.step(lambda: os.truncate(file, 2), "MODIFY file")
    watch.step(file.unlink, "DELETE file")
    watch.step((watched.host / "empty").touch, "CREATE empty", "CLOSE_WRITE empty")
    watch.ends()


def test_attributes_are_changed(watched: WatchedPlace) -> None:
    file = watched.host / "file"
    file.touch()
    watch = watched.watch()
    watch.step(lambda: file.chmod(0o600), "ATTRIB file")
    watch.step(lambda: os.utime(file, (1, 2)), "ATTRIB file")
    watch.step(lambda: os.setxattr(file, "user.colour", b"red"), "ATTRIB file")
    watch.step(lambda: os.chown(file, 12, 34), "ATTRIB file")
    watch.step(lambda: subprocess.run(["touch", file], check=True), "ATTRIB file", "CLOSE_WRITE file")
    watch.ends()


def test_a_directory_s_own_events_are_seen_by_who_watches_its_parent(watched: WatchedPlace) -> None:
    directory = watched.host / "directory"
    directory.mkdir()
    watch = watched.watch(mask=ALL)
    watch.step(lambda: directory.chmod(0o700), "ATTRIB|ISDIR directory")
    watch.step(lambda: os.utime(directory, (1, 2)), "ATTRIB|ISDIR directory")
    watch.step(
        lambda: os.listdir(directory),
        "OPEN|ISDIR directory",
        "ACCESS|ISDIR directory",
        "CLOSE_NOWRITE|ISDIR directory",
    )


def test_directories_links_and_special_files_are_made_and_removed(watched: WatchedPlace) -> None:
    host = watched.host
    (host / "file").touch()
    watch = watched.watch()
    watch.step((host / "directory").mkdir, "CREATE|ISDIR directory")
    watch.step((host / "directory").rmdir, "DELETE|ISDIR directory")
    watch.step(lambda: (host / "symlink").symlink_to("nowhere"), "CREATE symlink")
    watch.step(lambda: (host / "hardlink").hardlink_to(host / "file"), "CREATE hardlink")
    watch.step(lambda: os.mkfifo(host / "fifo"), "CREATE fifo")
    watch.step((host / "symlink").unlink, "DELETE symlink")
    watch.step((host / "hardlink").unlink, "DELETE hardlink")
    watch.step((host / "fifo").unlink, "DELETE fifo")
    watch.ends()


def test_renames_are_paired_within_and_across_directories(watched: WatchedPlace) -> None:
    host = watched.host
    for name in ("one", "two", "outside"):
        (host / name).mkdir()
    (host / "one/a").write_text("a")
    (host / "one/other").write_text("other")
    watch = watched.watch("one", "two")

    def rename(before: str, after: str, *expected: str) -> None:
        watch.step(lambda: os.rename(host / before, host / after), *expected)

    rename("one/a", "one/b", "MOVED_FROM a #1", "MOVED_TO b #1")
    rename("one/b", "two/b", "MOVED_FROM b #1", "1 MOVED_TO b #1")
    rename("two/b", "one/other", "1 MOVED_FROM b #1", "MOVED_TO other #1")
    rename("one/other", "outside/c", "MOVED_FROM other #1")
    rename("outside/c", "two/d", "1 MOVED_TO d #1")
    (host / "outside/directory").mkdir()
    rename("outside/directory", "one/directory", "MOVED_TO|ISDIR directory #1")
    rename("one/directory", "one/renamed", "MOVED_FROM|ISDIR directory #1", "MOVED_TO|ISDIR renamed #1")
    rename("one/renamed", "two/renamed", "MOVED_FROM|ISDIR renamed #1", "1 MOVED_TO|ISDIR renamed #1")
    watch.ends()


def test_an_editor_saves_by_renaming_over_the_file(watched: WatchedPlace) -> None:
    host = watched.host
    (host / "main.py").write_text("before")
    watch = watched.watch(look="--read")

    def save() -> None:
        with open(host / ".main.py.tmp", "w") as stream:
            stream.write("after")
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(host / ".main.py.tmp", host / "main.py")

    watch.step(
        save,
        "CREATE .main.py.tmp",
        "MODIFY .main.py.tmp",
        "CLOSE_WRITE .main.py.tmp",
        "MOVED_FROM .main.py.tmp #1",
        "MOVED_TO main.py #1",
    )
    assert watch.said()[-1] == "saw 5 after"
    watch.step(lambda: append(host / "main.py", "wards"), "MODIFY main.py", "CLOSE_WRITE main.py")
    assert watch.said()[-1] == "saw 10 afterwards"
    watch.ends()


def test_a_single_file_is_watched(watched: WatchedPlace) -> None:
    host = watched.host
    file = host / "file"
    file.write_text("one\n")
    watch = watched.watch("file")
    watch.step(lambda: append(file, "two\n"), "MODIFY", "CLOSE_WRITE")
    watch.step(lambda: os.truncate(file, 1), "MODIFY")
    watch.step(lambda: file.chmod(0o600), "ATTRIB")
    watch.step(lambda: os.utime(file, (1, 2)), "ATTRIB")
    # A neighbour's events are not its own.
    (host / "neighbour").write_text("not watched")
    watch.step(lambda: os.rename(file, host / "renamed"), "MOVE_SELF")
    watch.step(lambda: append(host / "renamed", "three\n"), "MODIFY", "CLOSE_WRITE")


def test_who_looks_at_files_is_seen_by_those_who_ask_for_it(watched: WatchedPlace) -> None:
    host = watched.host
    (host / "file").write_text("text")
    watch = watched.watch(mask=ALL)
    watch.step((host / "file").read_text, "OPEN file", "ACCESS file", "CLOSE_NOWRITE file")
    watch.step(lambda: append(host / "file", "more"), "OPEN file", "MODIFY file", "CLOSE_WRITE file")
    watch.step(
        lambda: (host / "new").write_text("x"), "CREATE new", "OPEN new", "MODIFY new", "CLOSE_WRITE new"
    )


def test_names_of_every_kind_arrive_as_they_are(watched: WatchedPlace) -> None:
    watch = watched.watch()
    for name in ("with space", "ümläut-日本", "x" * 255, "-", "#1", "back\\slash"):
        file = watched.host / name
        watch.step(file.mkdir, f"CREATE|ISDIR {name}")
        watch.step(file.rmdir, f"DELETE|ISDIR {name}")
    watch.ends()


def test_one_watcher_sees_many_directories_and_many_watchers_one(watched_on: MakeWatchedPlace) -> None:
    place = watched_on("auto")
    names = [f"d{number}" for number in range(20)]
    for name in names:
        (place.host / name).mkdir()
    wide = place.watch(*names)
    narrow = place.watch("d0", "d7", with_twin=False, known=2)
    for number, name in enumerate(names):
        step = (place.host / name / "f").mkdir
        wide.step(step, " ".join([*([str(number)] if number else []), "CREATE|ISDIR", "f"]))
    narrow.step(lambda: None, "CREATE|ISDIR f", "1 CREATE|ISDIR f")


def test_fanotify_watchers_see_it_too(watched: WatchedPlace) -> None:
    file = watched.host / "file"
    watch = watched.watch(look="--fanotify", mask=CHANGES & ~(In.DELETE_SELF | In.MOVE_SELF), with_twin=False)
    # What happens to one name may come as one event with several bits: so it is natively.
    file.write_text("text")
    file.chmod(0o600)
    file.unlink()
    (watched.host / "dir").mkdir()
    wanted = {
        "file": In.CREATE | In.MODIFY | In.CLOSE_WRITE | In.ATTRIB | In.DELETE,
        "dir": In.CREATE | In.ISDIR,
    }

    def seen() -> dict[str, In]:
        masks: dict[str, In] = {}
        for event in watch.events():
            masks[event.name] = masks.get(event.name, In(0)) | event.mask
        return masks

    awaited(lambda: seen() == wanted)
    assert seen() == wanted


def append(file: Path, text: str) -> None:
    with file.open("a") as stream:
        stream.write(text)
