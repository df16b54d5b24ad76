# SPDX-License-Identifier: Apache-2.0
"""Trees of files copied in and out, a Debian root unpacked, a huge directory, odd names.

Must not test single operations in depth (tests/ring does). Specification: path_resolution(7), tar(1).
"""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.guest.conftest import Launchpad, MakePlace, Session
from tests.guest.place import Place, described_tree, sha256, tree_hashes
from tests.limits import LONG_HANG_S
from vhostfs.control.client import ControlClient, find_control_socket
from vhostfs.vm.debian import Release, open_root, package_files
from vhostfs.vm.server import TEMPLATE_VARIABLE

HASH_ALL = "find . -type f -print0 | xargs -0 sha256sum"
_HEX_DIGITS = 64


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 files of all sizes, from nothing to some MiB, in nested directories."""
    root = tmp_path_factory.mktemp("source")
    dice = random.Random(2)
    for number in range(200):
        folder = root.joinpath(*(f"d{dice.randrange(4)}" for _ in range(dice.randrange(4))))
        folder.mkdir(parents=True, exist_ok=True)
        size = dice.choice((0, 1, 100, 4095, 4096, 4097, 65537))
        (folder / f"file {number}").write_bytes(dice.randbytes(size))
    (root / "large").write_bytes(dice.randbytes((3 << 20) + 123))
    return root


def guest_hashes(place: Place, folder: str) -> dict[str, str]:
    """What `sha256sum` says in the guest of the tree under `folder`."""
    text = place.sh(f"cd {folder} && {HASH_ALL}")
    return {line[_HEX_DIGITS + 4 :]: line[:_HEX_DIGITS] for line in text.splitlines()}  # "HASH  ./NAME"


def test_a_tree_is_copied_in_read_and_copied_out_unchanged(any_place: Place, source_tree: Path) -> None:
    subprocess.run(["cp", "-a", str(source_tree), str(any_place.host / "in")], check=True)
    expected = tree_hashes(source_tree)
    any_place.sh("mkdir /tmp/tree && cp -a in/. /tmp/tree && cp -a /tmp/tree out && rm -r /tmp/tree && sync")
    assert guest_hashes(any_place, "in") == expected
    assert guest_hashes(any_place, "out") == expected
    assert tree_hashes(any_place.host / "out") == expected


def test_a_tree_copied_on_the_share_by_the_guest_is_the_same_on_the_host(
    place: Place, source_tree: Path
) -> None:
    subprocess.run(["cp", "-a", str(source_tree), str(place.host / "in")], check=True)
    place.sh("cp -a in out")
    assert list(described_tree(place.host / "out")) == list(described_tree(place.host / "in"))


def debian_archive(launchpad: Launchpad, path: Path) -> None:
    """A root file system of a few Debian packages, with one of everything else that tar can hold."""
    debs = open_root(Release.BOOKWORM, launchpad.cache).resolve(["base-files", "bash", "passwd", "tar"])
    wanted = {"base-files", "bash", "debianutils", "passwd", "tar", "libacl1", "libpam-modules-bin"}
    kept = [deb for deb in debs if deb.name.partition("_")[0] in wanted]
    members = {member.name: (member, b"x" * member.size) for member in extra_members()}
    for deb in kept:
        with package_files(deb) as stream:
            for member in stream:
                if not member.name.startswith("./usr/share/locale/"):
                    content = stream.extractfile(member) if member.isreg() else None
                    members.setdefault(member.name, (member, content.read() if content else b""))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        # What is in a directory together, as a root is packed: else tar leaves its time as it happens to be.
        for name in sorted(members, key=lambda name: name.split("/")):
            member, data = members[name]
            archive.addfile(member, io.BytesIO(data))


def extra_members() -> list[tarfile.TarInfo]:
    """Owners, modes, links and devices that the packages lack."""

    def member(name: str, kind: bytes, mode: int, uid: int, gid: int, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(f"./extra/{name}".rstrip("/"))
        info.type, info.mode, info.uid, info.gid, info.linkname = kind, mode, uid, gid, link
        info.mtime = 1_600_000_000
        info.size = 4097 if kind == tarfile.REGTYPE else 0
        return info

    members = [
        member("sticky", tarfile.DIRTYPE, 0o1777, 0, 0),
        member("closed", tarfile.DIRTYPE, 0o000, 1000, 1000),
        member("closed/within", tarfile.REGTYPE, 0o000, 1000, 1001),
        member("group", tarfile.DIRTYPE, 0o2775, 33, 44),
        member("group/file", tarfile.REGTYPE, 0o664, 33, 55),
        member("setuid", tarfile.REGTYPE, 0o6755, 1000, 1001),
        member("setuid-again", tarfile.LNKTYPE, 0o6755, 1000, 1001, "./extra/setuid"),
        member("dangling", tarfile.SYMTYPE, 0o777, 1000, 1001, "/nowhere/" + "x" * 200),
        member("fifo", tarfile.FIFOTYPE, 0o620, 5, 6),
        member("null", tarfile.CHRTYPE, 0o666, 0, 0),
        member("disk", tarfile.BLKTYPE, 0o660, 0, 6),
        member("large-ids", tarfile.REGTYPE, 0o640, 65534, 1_000_000),
        member("", tarfile.DIRTYPE, 0o755, 0, 0),
    ]
    for device, major, minor in ((members[9], 1, 3), (members[10], 259, 300)):
        device.devmajor, device.devminor = major, minor
    return members


@pytest.mark.usefixtures("needs_root")
def test_a_debian_root_unpacked_by_the_guest_is_as_one_unpacked_by_the_host(
    place: Place, launchpad: Launchpad
) -> None:
    archive = place.host / "root.tar"
    debian_archive(launchpad, archive)
    unpack = "mkdir {name} && tar --numeric-owner -xpf root.tar -C {name}"
    host = subprocess.run(unpack.format(name="host"), shell=True, cwd=place.host, capture_output=True)
    if b"Cannot mknod" in host.stderr:
        lacking("the right to make device nodes")
    assert host.returncode == 0, host.stderr
    place.sh(unpack.format(name="guest"))
    expected = list(described_tree(place.host / "host"))
    assert len(expected) > 200
    assert list(described_tree(place.host / "guest")) == expected
    # And the guest sees what is there: its own tar finds no difference.
    assert place.sh("tar --numeric-owner -df root.tar -C guest 2>&1") == ""


def test_the_guest_lists_fifty_thousand_files_and_removes_half(place: Place) -> None:
    folder = place.child("many").host
    for number in range(50_000):
        os.close(os.open(folder / f"file-{number:05}", os.O_CREAT | os.O_WRONLY))
    listed = place.python(
        "import json, os; names = os.listdir('many'); print(json.dumps([len(names), len(set(names))]))"
    )
    assert listed == [50_000, 50_000]
    # Removed while it is being read, as rm -r does.
    left = place.python(
        """
import json, os
for entry in os.scandir("many"):
    if int(entry.name[5:]) % 2:
        os.unlink(entry.path)
print(json.dumps(sorted(os.listdir("many"))))
""",
        timeout_s=LONG_HANG_S,
    )
    assert left == [f"file-{number:05}" for number in range(0, 50_000, 2)]
    assert sorted(os.listdir(folder)) == left


def begun_ahead(session: Session, tag: str) -> int:
    """Entries that the server looked up before the guest asked for them."""
    with ControlClient(find_control_socket(str(session.servers[tag].spec.socket_path))) as control:
        return int(control.stats()["share"]["entries_ahead"])


def test_attributes_that_come_with_names_are_right_whoever_changes_them(
    place: Place, session: Session
) -> None:
    """The answers to a listing are begun before they are asked for, where the guest asks for nothing else."""
    foreign = TEMPLATE_VARIABLE in os.environ
    many = place.child("many")
    for number in range(2000):
        (many.host / f"file-{number:04}").write_bytes(bytes(number))
    before = 0 if foreign else begun_ahead(session, "share")
    assert int(many.sh("find . -type f -size +1999c | wc -l")) == 0
    assert int(many.sh("find . -type f -size -1000c | wc -l")) == 1000
    assert foreign or begun_ahead(session, "share") > before
    # An answer has some 24 of these names; while the guest looks at one it changes what the next tells.
    wrong = many.python(
        """
import json, os
order = os.listdir(".")
expected = {name: int(name[5:]) for name in order}
wrong = []
for size in range(5000, 5030):
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")
    with os.scandir(".") as entries:
        for i, entry in enumerate(entries):
            if i == 26:
                os.truncate(order[60], size)
                expected[order[60]] = size
            seen = entry.stat().st_size
            if seen != expected[entry.name]:
                wrong.append([entry.name, seen])
            if i == 100:
                break
print(json.dumps(wrong))
""",
        timeout_s=LONG_HANG_S,
    )
    assert wrong == []


ODD_NAMES = [
    b"new\nline",
    b"\xff\xfe not UTF-8 \x80",
    b"-rf",
    b"...",
    b" ",
    b"tab\tand \x7f and \x01",
    b"quote'\"`$\\",
    "ümläut".encode(),
    b"n" * 255,
    "é".encode() * 127 + b"x",
    bytes(byte for byte in range(1, 256) if byte != ord("/")),
]


def test_odd_names_made_on_the_host_are_listed_and_read_by_the_guest(place: Place) -> None:
    for number, name in enumerate(ODD_NAMES):
        with open(os.path.join(os.fsencode(place.host), name), "wb") as file:
            file.write(b"%d" % number)
    seen = place.python(
        """
import json, os
print(json.dumps({name.hex(): open(name, "rb").read().decode() for name in os.listdir(b".")}))
"""
    )
    assert seen == {name.hex(): str(number) for number, name in enumerate(ODD_NAMES)}


def test_odd_names_made_by_the_guest_are_the_same_on_the_host(place: Place) -> None:
    place.python(
        """
import os, sys
for number, name in enumerate(bytes.fromhex(word) for word in sys.argv[1:]):
    with open(b"first", "wb") as file:
        file.write(b"%d" % number)
    os.rename(b"first", name)
    os.symlink(name, b"link-%d" % number)
""",
        *(name.hex() for name in ODD_NAMES),
    )
    folder = os.fsencode(place.host)
    for number, name in enumerate(ODD_NAMES):
        assert Path(os.fsdecode(os.path.join(folder, name))).read_bytes() == b"%d" % number
        assert os.readlink(os.path.join(folder, b"link-%d" % number)) == name


def test_a_name_of_256_bytes_is_too_long(place: Place) -> None:
    assert place.errno_of("os.mkdir('x' * 256)") == errno.ENAMETOOLONG
    assert place.errno_of("os.mkdir('x' * 255)") == 0


def test_a_deep_tree_made_by_the_guest_is_removed_by_it(any_place: Place) -> None:
    any_place.python(
        """
import os
for level in range(40):
    os.mkdir(f"level-{level}")
    os.chdir(f"level-{level}")
    open("file", "w").close()
"""
    )
    assert sum(1 for path in any_place.host.rglob("file")) == 40
    any_place.sh("rm -r level-0")
    assert list(any_place.host.iterdir()) == []


def test_what_one_share_holds_is_copied_to_another(place_on: MakePlace) -> None:
    here, there = place_on("share"), place_on("never")
    content = random.Random(3).randbytes(3 << 20)
    (here.host / "file").write_bytes(content)
    here.sh(f"cp file {there.inside}/copy")
    assert sha256((there.host / "copy").read_bytes()) == sha256(content)
    # Not one file system: a rename between them is refused, and mv copies.
    assert here.errno_of(f"os.rename('file', '{there.inside}/file')") == errno.EXDEV
    here.sh(f"mv file {there.inside}/moved")
    assert not (here.host / "file").exists()
    assert (there.host / "moved").read_bytes() == content
