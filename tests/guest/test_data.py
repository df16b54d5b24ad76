# SPDX-License-Identifier: Apache-2.0
"""File data: fio's verification, shared mappings, sparse files, appending, files without a name.

Must not test attributes. Specification: fio(1), mmap(2), lseek(2), fallocate(2), open(2).
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tests.guest.conftest import MakePlace
from tests.guest.place import Place, sha256
from tests.limits import HANG_S, LONG_HANG_S

MIB = 1 << 20

FIO_GLOBAL = """
[global]
directory={directory}
size=4m
verify=crc32c
verify_fatal=1
verify_dump=0
do_verify=1
randseed=7
"""
FIO = (
    FIO_GLOBAL
    + """
[random-writes]
rw=randwrite
bsrange=1k-64k
ioengine=psync
[random-rewrites]
stonewall
rw=randrw
bs=4k
ioengine=psync
fsync=256
[large-blocks]
stonewall
rw=write
bs=1m
ioengine=psync
end_fsync=1
"""
)
FIO_MMAP = """
[mmap]
stonewall
rw=randwrite
bs=4k
ioengine=mmap
"""
FIO_DIRECT = """
[direct]
stonewall
rw=randwrite
bs=4k
direct=1
ioengine=libaio
iodepth=16
"""


@pytest.mark.parametrize(
    ("tag", "jobs"),
    [
        ("share", FIO + FIO_MMAP + FIO_DIRECT),
        ("always", FIO + FIO_MMAP),
        ("never", FIO),
        ("queues", FIO_GLOBAL + FIO_MMAP),
    ],
    ids=["share", "always", "never", "queues"],
)
def test_fio_reads_back_what_it_wrote(place_on: MakePlace, tag: str, jobs: str) -> None:
    place = place_on(tag)
    (place.host / "jobs").write_text(jobs.format(directory=place.inside))
    done = place.run("fio --minimal jobs", timeout_s=LONG_HANG_S)
    assert done.exit_status == 0, done.text + done.error_text
    assert "verify" not in done.error_text


def test_large_reads_of_several_processes_are_right(place_on: MakePlace) -> None:
    place = place_on("share")
    content = random.Random(3).randbytes(8 * MIB + 12345)
    (place.host / "file").write_bytes(content)
    read = "dd if=file bs=4M iflag=direct status=none | sha256sum"
    place.sh(f"for i in 1 2 3 4; do ({read}) > sum$i & done; wait")
    sums = [(place.host / f"sum{i}").read_text().split()[0] for i in range(1, 5)]
    assert sums == [sha256(content)] * 4


def test_two_guest_processes_and_the_host_share_a_mapping(place_on: MakePlace) -> None:
    place = place_on("share")
    (place.host / "file").write_bytes(bytes(MIB))
    watcher = place.start_python(
        """
import mmap, os, sys
with open("file", "r+b") as file, mmap.mmap(file.fileno(), 0) as area:
    print("mapped", flush=True)
    sys.stdin.readline()
    print(area[5000:5011].decode(), flush=True)
    area[:5] = b"reply"
    area.flush()
    print("flushed", flush=True)
    sys.stdin.readline()
"""
    )
    watcher.wait_for_output("mapped\n", HANG_S)
    place.python(
        """
import mmap
with open("file", "r+b") as file, mmap.mmap(file.fileno(), 0) as area:
    area[5000:5011] = b"from mmap 1"
    area.flush()
"""
    )
    assert (place.host / "file").read_bytes()[5000:5011] == b"from mmap 1"
    watcher.write_stdin(b"\n")
    watcher.wait_for_output("from mmap 1\nflushed\n", HANG_S)
    assert (place.host / "file").read_bytes()[:5] == b"reply"
    watcher.close_stdin()
    watcher.wait(HANG_S)


def test_what_write_changes_is_seen_in_a_mapping_and_the_reverse(place: Place) -> None:
    (place.host / "file").write_bytes(b"." * 8192)
    seen = place.python(
        """
import json, mmap, os
descriptor = os.open("file", os.O_RDWR)
with mmap.mmap(descriptor, 0) as area:
    os.pwrite(descriptor, b"written", 4090)
    first = area[4090:4097].decode()
    area[100:106] = b"mapped"
    print(json.dumps([first, os.pread(descriptor, 6, 100).decode()]))
"""
    )
    assert seen == ["written", "mapped"]
    content = (place.host / "file").read_bytes()
    assert (content[4090:4097], content[100:106]) == (b"written", b"mapped")


def test_without_a_cache_a_shared_mapping_is_refused_and_a_private_one_works(place_on: MakePlace) -> None:
    place = place_on("never")
    (place.host / "file").write_bytes(b"content")
    opened = "import mmap; file = open('file', 'r+b'); mmap.mmap(file.fileno(), 0"
    assert place.errno_of(f"{opened})") == errno.ENODEV
    assert place.errno_of(f"{opened}, flags=mmap.MAP_PRIVATE)") == 0


# Data at 0 and at 768 KiB, holes between and behind.
SPARSE = """
import os
with open("file", "wb") as file:
    file.write(b"a" * 4096)
    file.seek(768 << 10)
    file.write(b"b" * 4096)
    file.truncate(1 << 20)
"""
EXTENTS = """
import json, os
descriptor, extents, offset = os.open("file", os.O_RDONLY), [], 0
while True:
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        assert error.errno == 6, error
        break
    offset = os.lseek(descriptor, start, os.SEEK_HOLE)
    extents.append([start, offset])
print(json.dumps([extents, os.fstat(descriptor).st_size, os.fstat(descriptor).st_blocks * 512]))
"""


def host_extents(file: Path) -> list[list[int]]:
    descriptor, extents, offset = os.open(file, os.O_RDONLY), [], 0
    try:
        while True:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
            offset = os.lseek(descriptor, start, os.SEEK_HOLE)
            extents.append([start, offset])
    except OSError as error:
        assert error.errno == errno.ENXIO
    finally:
        os.close(descriptor)
    return extents


def test_a_sparse_file_of_the_guest_has_the_same_holes_on_both_sides(any_place: Place) -> None:
    any_place.python(SPARSE)
    any_place.sh("sync")
    extents, size_bytes, allocated_bytes = any_place.python(EXTENTS)
    assert extents == [[0, 4096], [768 << 10, (768 << 10) + 4096]]
    assert host_extents(any_place.host / "file") == extents
    assert (size_bytes, allocated_bytes) == (1 << 20, (any_place.host / "file").stat().st_blocks * 512)
    any_place.sh("cp --sparse=always file copy 2>/dev/null || cp file copy; cmp file copy")


FALLOCATE = """
import ctypes, os, sys
mode, offset, length = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
with open("file", "r+b") as file:
    done = libc.fallocate(file.fileno(), mode, offset, length)
print(ctypes.get_errno() if done else 0)
"""
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32


def fallocate(place: Place, mode: int, offset: int, length: int) -> int:
    number = place.python(FALLOCATE, str(mode), str(offset), str(length))
    assert isinstance(number, int)
    return number


def test_a_punched_hole_reads_as_zeros_and_frees_space(place: Place) -> None:
    file = place.host / "file"
    file.write_bytes(b"x" * MIB)
    # The guest has it cached, and must not go on reading what was there.
    assert place.sh("tr -d x <file | wc -c").strip() == "0"
    blocks = file.stat().st_blocks
    assert fallocate(place, PUNCH_HOLE | KEEP_SIZE, 256 << 10, 512 << 10) == 0
    assert place.sh("tr -d x <file | wc -c").strip() == str(512 << 10)
    assert host_extents(file) == [[0, 256 << 10], [768 << 10, MIB]]
    assert file.stat().st_blocks < blocks
    assert file.stat().st_size == MIB


def test_fallocate_extends_reserves_and_zeroes(place: Place) -> None:
    file = place.host / "file"
    file.write_bytes(b"x" * 8192)
    assert fallocate(place, KEEP_SIZE, 0, MIB) == 0
    assert (file.stat().st_size, file.stat().st_blocks * 512 >= MIB) == (8192, True)
    assert fallocate(place, 0, 0, 2 * MIB) == 0
    assert place.sh("stat -c %s file").strip() == str(2 * MIB)
    assert fallocate(place, ZERO, 4096, 4096) == 0
    assert file.read_bytes()[:8192] == b"x" * 4096 + bytes(4096)


def test_a_file_without_a_name_gets_one_by_linkat(any_place: Place) -> None:
    seen = any_place.python(
        """
import json, os
descriptor = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(descriptor, b"appears whole")
before = os.listdir(".")
links = os.fstat(descriptor).st_nlink
os.link(f"/proc/self/fd/{descriptor}", "name", src_dir_fd=0)
print(json.dumps([before, links, os.fstat(descriptor).st_nlink, os.listdir(".")]))
os.close(descriptor)
"""
    )
    assert seen == [[], 0, 1, ["name"]]
    assert (any_place.host / "name").read_bytes() == b"appears whole"
    assert (any_place.host / "name").stat().st_mode & 0o777 == 0o640


def test_a_deleted_file_lives_on_for_who_has_it_open(any_place: Place) -> None:
    seen = any_place.python(
        """
import json, os
descriptor = os.open("file", os.O_CREAT | os.O_RDWR)
os.write(descriptor, b"before")
os.unlink("file")
os.pwrite(descriptor, b"after!", 6)
os.fchmod(descriptor, 0o600)
os.fsync(descriptor)
with open("/proc/sys/vm/drop_caches", "w") as drop:
    drop.write("3")
os.ftruncate(descriptor, 11)
state = os.fstat(descriptor)
print(json.dumps([os.pread(descriptor, 99, 0).decode(), state.st_nlink, state.st_size, os.listdir(".")]))
"""
    )
    assert seen == ["beforeafter", 0, 11, []]
    assert list(any_place.host.iterdir()) == []


def test_a_file_replaced_on_the_host_stays_itself_for_who_has_it_open(place: Place) -> None:
    (place.host / "file").write_bytes(b"old")
    reader = place.start_python(
        """
import os, sys
descriptor = os.open("file", os.O_RDONLY)
print("opened", flush=True)
sys.stdin.readline()
print(os.pread(descriptor, 99, 0).decode(), flush=True)
"""
    )
    reader.wait_for_output("opened\n", HANG_S)
    (place.host / "new").write_bytes(b"new")
    (place.host / "new").rename(place.host / "file")
    reader.write_stdin(b"\n")
    reader.wait_for_output("opened\nold\n", HANG_S)
    reader.wait(HANG_S)


@pytest.mark.parametrize("tag", ["share", "never"])
def test_guest_and_host_append_in_turn_and_no_line_is_lost(place_on: MakePlace, tag: str) -> None:
    place = place_on(tag)
    file = place.host / "log"
    file.touch()
    writer = place.start_python(
        """
import sys
log = open("log", "ab", buffering=0)
for number, line in enumerate(sys.stdin):
    log.write(b"guest %d\\n" % number)
    print(number, flush=True)
"""
    )
    expected = b""
    with file.open("ab", buffering=0) as log:
        for number in range(20):
            writer.write_stdin(b"\n")
            writer.wait_for_lines(number + 1, HANG_S)
            log.write(b"host %d\n" % number)
            expected += b"guest %d\nhost %d\n" % (number, number)
    writer.close_stdin()
    writer.wait(HANG_S).check()
    assert file.read_bytes() == expected


def test_guest_processes_append_at_once_and_no_line_is_lost(any_place: Place) -> None:
    any_place.sh(
        "for who in a b c; do (for n in $(seq 100); do echo $who $n; done >>log) & done; wait; sync", 60
    )
    lines = (any_place.host / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{who} {n}" for who in "abc" for n in range(1, 101))


def test_copy_file_range_and_large_reads_give_the_same_bytes(place: Place) -> None:
    content = random.Random(5).randbytes(5 * MIB + 77)
    (place.host / "file").write_bytes(content)
    place.python(
        """
import os
source, target = os.open("file", os.O_RDONLY), os.open("copy", os.O_CREAT | os.O_WRONLY)
while os.copy_file_range(source, target, 2 << 20):
    pass
"""
    )
    assert sha256((place.host / "copy").read_bytes()) == sha256(content)
    assert place.sh("sha256sum <file").split()[0] == sha256(content)


def test_data_held_back_by_the_guest_is_on_the_host_after_sync(place_on: MakePlace) -> None:
    place = place_on("always")
    writer = place.start_python(
        """
import os, sys
descriptor = os.open("file", os.O_CREAT | os.O_RDWR)
for number in range(5000):
    os.write(descriptor, b"%07d\\n" % number)
print(os.fstat(descriptor).st_size, flush=True)
sys.stdin.readline()
os.fsync(descriptor)
print("synced", flush=True)
sys.stdin.readline()
"""
    )
    expected = b"".join(b"%07d\n" % number for number in range(5000))
    writer.wait_for_output("40000\n", HANG_S)
    writer.write_stdin(b"\n")
    writer.wait_for_output("synced\n", HANG_S)
    assert (place.host / "file").read_bytes() == expected
    writer.close_stdin()
    writer.wait(HANG_S)


def test_times_set_by_the_guest_survive_data_that_it_held_back(place_on: MakePlace) -> None:
    place = place_on("always")
    place.sh("echo data >file && touch -d @1580608922 file && sync && echo 3 >/proc/sys/vm/drop_caches")
    assert place.sh("stat -c %Y file").strip() == "1580608922"
    assert int((place.host / "file").stat().st_mtime) == 1580608922
