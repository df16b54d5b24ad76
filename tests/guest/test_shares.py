# SPDX-License-Identifier: Apache-2.0
"""Shares of one guest beside each other: read-only, several queues, cache modes, the host's own changes.

Must not test single operations. Specification: `vhostfs serve --help`.
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tests.guest.conftest import SERVINGS, MakePlace, Session
from tests.guest.place import Place, awaited, sha256
from tests.limits import HANG_S, LONG_HANG_S

# --cache=auto promises one second, --cache=always keeps what it knows for a day.
VISIBLE_TIMEOUT_S = HANG_S


def test_every_share_is_a_file_system_of_its_own(session: Session) -> None:
    text = session.guest.run(
        "grep virtiofs /proc/mounts; stat -c %d " + " ".join(f"/{t}" for t in SERVINGS), 10
    )
    lines = text.check().text.splitlines()
    mounts, devices = lines[: len(SERVINGS)], lines[len(SERVINGS) :]
    assert {line.split()[0]: line.split()[1] for line in mounts} == {tag: f"/{tag}" for tag in SERVINGS}
    assert len(set(devices)) == len(SERVINGS)


def test_statfs_tells_of_the_hosts_file_system(any_place: Place) -> None:
    fields = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax")
    seen = any_place.python(
        f"""
import json, os
state = os.statvfs(".")
print(json.dumps([getattr(state, name) for name in {fields}] + [state.f_bavail]))
"""
    )
    host = os.statvfs(any_place.host)
    assert seen[:-1] == [getattr(host, name) for name in fields]
    assert abs(seen[-1] - host.f_bavail) * host.f_frsize < 1 << 30
    assert any_place.sh("df . >/dev/null; df -i . | wc -l").strip() == "2"


# -- read-only


def test_a_read_only_share_is_read_and_never_changed(place_on: MakePlace) -> None:
    place = place_on("readonly")
    file = place.host / "file"
    file.write_bytes(b"content")
    file.chmod(0o666)
    (place.host / "dir").mkdir()
    before = sorted((path.name, path.stat().st_ctime_ns) for path in place.host.iterdir())
    assert place.sh("cat file; ls") == "contentdir\nfile\n"
    statements = (
        "open('file', 'r+')",
        "open('file', 'w')",
        "open('new', 'w')",
        "os.truncate('file', 1)",
        "os.unlink('file')",
        "os.mkdir('new')",
        "os.rmdir('dir')",
        "os.rename('file', 'new')",
        "os.symlink('x', 'new')",
        "os.link('file', 'new')",
        "os.mkfifo('new')",
        "os.chmod('file', 0o600)",
        "os.chown('file', 1, 1)",
        "os.utime('file')",
        "os.open('.', os.O_TMPFILE | os.O_RDWR)",
    )
    assert place.errnos_of(statements) == dict.fromkeys(statements, errno.EROFS)
    assert sorted((path.name, path.stat().st_ctime_ns) for path in place.host.iterdir()) == before
    assert file.read_bytes() == b"content"


# -- several queues


def test_both_request_queues_carry_requests(place_on: MakePlace) -> None:
    place = place_on("queues")

    def counts() -> list[int]:
        lines = place.sh("grep -E 'virtio[0-9]+-requests\\.[01]$' /proc/interrupts").splitlines()
        # The share with two queues is the only one that has a requests.1; its first queue comes just before.
        at = next(i for i, line in enumerate(lines) if line.endswith("requests.1"))
        return [sum(int(word) for word in line.split()[1:3]) for line in lines[at - 1 : at + 1]]

    before = counts()
    text = place.sh(
        """
for cpu in 0 1; do
    taskset -c $cpu sh -c '
        dd if=/dev/urandom of=file-$0 bs=64k count=32 2>/dev/null
        for n in $(seq 30); do : >made-$0-$n; done
        sha256sum file-$0' $cpu &
done
wait
"""
    )
    assert all(after - was > 30 for was, after in zip(before, counts(), strict=True))
    hashes = {name: digest for digest, name in (line.split() for line in text.splitlines())}
    assert hashes == {f"file-{cpu}": sha256((place.host / f"file-{cpu}").read_bytes()) for cpu in (0, 1)}
    assert len(list(place.host.glob("made-*"))) == 60


# -- what the host changes


def changes_on_the_host(place: Place) -> None:
    """Everything is other than it was: a file new, gone, larger, a mode."""
    (place.host / "new").write_text("new")
    (place.host / "gone").unlink()
    with (place.host / "grown").open("a") as file:
        file.write(" and more")
    (place.host / "mode").chmod(0o640)


LOOK = "ls; cat grown; stat -c %a mode; test ! -e gone && cat new"
CHANGED = "grown\nmode\nnew\nfirst and more640\nnew"


def look_before(place: Place) -> None:
    for name in ("gone", "grown", "mode"):
        (place.host / name).write_text("first")
        (place.host / name).chmod(0o644)
    assert (
        place.sh("ls; cat gone grown; stat -c %a mode; test ! -e new") == "gone\ngrown\nmode\nfirstfirst644\n"
    )


def test_without_a_cache_the_host_s_changes_are_seen_at_once(place_on: MakePlace) -> None:
    place = place_on("never")
    look_before(place)
    changes_on_the_host(place)
    assert place.sh(LOOK) == CHANGED


def test_with_cache_auto_the_host_s_changes_are_seen_within_the_timeout(place: Place) -> None:
    look_before(place)
    changes_on_the_host(place)
    assert awaited(lambda: place.run(LOOK).text == CHANGED, VISIBLE_TIMEOUT_S), place.run(LOOK).text


def test_with_cache_always_the_guest_trusts_its_memory_until_it_is_dropped(place_on: MakePlace) -> None:
    place = place_on("always")
    (place.host / "file").write_text("first")
    assert place.sh("cat file; stat -c %a file") == "first644\n"
    (place.host / "file").write_text("other")
    (place.host / "file").chmod(0o600)
    # Attributes may be asked for again after a read, which makes the time of access unknown.
    assert place.sh("cat file") == "first"
    assert place.sh("echo 3 >/proc/sys/vm/drop_caches; cat file; stat -c %a file") == "other600\n"


@pytest.mark.parametrize("tag", ["share", "never"])
def test_what_the_guest_wrote_is_on_the_host_when_write_returns(place_on: MakePlace, tag: str) -> None:
    place = place_on(tag)
    writer = place.start_python(
        """
import os, sys
descriptor = os.open("file", os.O_CREAT | os.O_WRONLY)
for line in sys.stdin:
    os.write(descriptor, line.encode())
    print("written", flush=True)
"""
    )
    expected = ""
    for number in range(10):
        expected += f"line {number}\n"
        writer.write_stdin(f"line {number}\n".encode())
        writer.wait_for_lines(number + 1, HANG_S)
        assert (place.host / "file").read_text() == expected
    writer.close_stdin()
    writer.wait(HANG_S).check()


def test_a_tree_that_both_sides_work_on_ends_the_same_on_both(place_on: MakePlace) -> None:
    place = place_on("never")
    guest = place.start(
        "for n in $(seq 80); do"
        " mkdir -p d$((n % 7)); echo guest $n >d$((n % 7))/g$n; rm -f d$((n % 5))/h*3; done"
    )
    dice = random.Random(1)
    number = 0
    while guest.status is None and number < 3000:
        number += 1
        folder = place.host / f"d{dice.randrange(7)}"
        folder.mkdir(exist_ok=True)
        (folder / f"h{number}").write_text(f"host {number}")
        (folder / f"h{max(1, number - 20)}").unlink(missing_ok=True)
    guest.close_stdin()
    guest.wait(LONG_HANG_S).check()
    host = sorted(str(path.relative_to(place.host)) for path in place.host.rglob("*"))
    assert sorted(place.sh("find . -mindepth 1").replace("./", "").splitlines()) == host
    assert len([name for name in host if "/g" in name]) == 80


def test_a_program_on_the_share_is_run_by_the_guest(place: Place) -> None:
    place.sh("cp /bin/bash program; echo '#!/bin/sh\necho script $0' >script; chmod +x script")
    assert place.sh("./program -c 'echo program'; ./script") == "program\nscript ./script\n"
    # A program that runs is not written to.
    busy = place.sh("cp /vhostfs/agent busy; ./program -c 'echo x >>./program' 2>&1 || true")
    assert "busy" in busy.lower()


def test_the_server_holds_nothing_of_what_the_guest_has_closed(session: Session, place_on: MakePlace) -> None:
    place = place_on("share")
    process = session.servers["share"].process.pid

    def descriptors() -> int:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        pids = [process, *map(int, children)]
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

    place.sh("sync; echo 3 >/proc/sys/vm/drop_caches")
    before = descriptors()
    place.sh("for n in $(seq 500); do echo $n >file-$n; done; cat file-* | wc -l; ls -l >/dev/null")
    place.sh("rm file-*; sync; echo 3 >/proc/sys/vm/drop_caches")
    assert awaited(lambda: descriptors() <= before + 5), (before, descriptors())
