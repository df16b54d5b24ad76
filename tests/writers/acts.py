# SPDX-License-Identifier: Apache-2.0
"""Writers that are a few system calls: `python -m tests.writers.acts NAME [ARGUMENT...]`.

Must not import what is not Python's own. Specification: the manual pages of the calls.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import sqlite3
import stat
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
FICLONE = 0x40049409
FICLONERANGE = 0x4020940D
_FALLOC_PUNCH_HOLE, _FALLOC_KEEP_SIZE, _FALLOC_ZERO_RANGE = 2, 1, 0x10
_O_TMPFILE = 0o20200000


@dataclass(frozen=True, slots=True)
class Act:
    """What it does in the current directory, and the files that are there before."""

    do: Callable[..., None]
    before: dict[str, str] = field(default_factory=dict)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# ---- saving a file ---------------------------------------------------------------------------------------


def _write_synced(path: str, text: str, flags: int = os.O_CREAT | os.O_EXCL) -> None:
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    os.write(fd, text.encode())
    os.fsync(fd)
    os.close(fd)


def edit() -> None:
    """As editors save: by a new file renamed over the old, in place, with a backup, by exchange."""
    for number in range(3):
        _write_synced(f".goutputstream-{number}", f"gedit {number}\n")
        os.chmod(f".goutputstream-{number}", 0o664)
        os.rename(f".goutputstream-{number}", "main.c")
        _write_synced("util.c", f"in place {number}\n", os.O_TRUNC)
        # emacs: a lock that is a dangling symlink; the old file is renamed to the backup.
        os.symlink("user@host.1:2", ".#notes.txt")
        _write_synced("#notes.txt#", "auto-saved\n", os.O_CREAT | os.O_TRUNC)
        os.rename("notes.txt", "notes.txt~")
        _write_synced("notes.txt", f"emacs {number}\n")
        os.unlink("#notes.txt#")
        os.unlink(".#notes.txt")
        # nano: a lock file and writing in place without a truncation at open.
        _write_synced(".sub.nano.swp", "nano\n")
        fd = os.open("sub/nano.txt", os.O_WRONLY)
        os.write(fd, b"shorter\n"[: 8 - number])
        os.ftruncate(fd, 8 - number)
        os.close(fd)
        os.unlink(".sub.nano.swp")
        # The new one and the old one change places, and the old is removed.
        _write_synced("sub/.new", f"exchanged {number}\n")
        paths = b"sub/.new", b"sub/exchanged.txt"
        _checked(_LIBC.renameat2(-100, paths[0], -100, paths[1], 2))
        os.unlink("sub/.new")


# ---- packages --------------------------------------------------------------------------------------------


def install_as_npm() -> None:
    """Each package unpacked under a hidden name beside its place and renamed to it; an update moves aside."""
    os.mkdir("node_modules")
    os.mkdir("node_modules/.bin")
    for version in (1, 2):
        for package in ("left", "right", "@scope/inner"):
            final = f"node_modules/{package}"
            parent, name = os.path.split(final)
            if not os.path.isdir(parent):
                os.mkdir(parent)
            hidden = f"{parent}/.{name}-k3Jd{version}"
            os.mkdir(hidden)
            for path in ("package.json", "lib/index.js", "lib/deep/er.js"):
                place = Path(hidden, path)
                for above in reversed(place.relative_to(hidden).parents[:-1]):
                    if not Path(hidden, above).exists():
                        os.mkdir(Path(hidden, above))
                place.write_text(f"{path} {version}\n" * 50)
                os.utime(place, (499_162_500, 499_162_500))
            old = f"{parent}/.{name}-old"
            if os.path.exists(final):
                os.rename(final, old)
            os.rename(hidden, final)
            if os.path.exists(old):
                shutil.rmtree(old)
            link = f"node_modules/.bin/{name}"
            if os.path.lexists(link):
                os.unlink(link)
            os.symlink(f"../{package}/lib/index.js", link)
            os.chmod(f"{final}/lib/index.js", 0o755)
        _write_synced("node_modules/.package-lock.json", f"{version}\n", os.O_CREAT | os.O_TRUNC)
        _write_synced(f"package-lock.json.{version}", f"{version}\n")
        os.rename(f"package-lock.json.{version}", "package-lock.json")


def extract_layer(archive: str) -> None:
    """As container engines apply a layer.

    In order, each object with its own owner, mode, xattrs and times; whiteouts remove, opaque directories
    lose what lower layers gave them; the times of directories come last.
    """
    directories: list[tuple[str, float]] = []
    unpacked: set[str] = set()
    with tarfile.open(archive) as layer:
        for member in layer:
            parent, name = os.path.split(member.name)
            if name == ".wh..wh..opq":
                for entry in list(os.scandir(parent or ".")):
                    if entry.path not in unpacked:
                        _remove(entry.path)
                continue
            if name.startswith(".wh."):
                _remove(os.path.join(parent, name[4:]))
                continue
            path = member.name
            unpacked.add(path)
            if os.path.lexists(path) and not (member.isdir() and os.path.isdir(path)):
                _remove(path)
            if member.isdir():
                if not os.path.isdir(path):
                    os.mkdir(path, member.mode)
                directories.append((path, member.mtime))
            elif member.isreg():
                source = layer.extractfile(member)
                assert source is not None
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, member.mode)
                while data := source.read(8192):
                    os.write(fd, data)
                os.close(fd)
            elif member.issym():
                os.symlink(member.linkname, path)
            elif member.islnk():
                os.link(member.linkname, path)
            elif member.isfifo():
                os.mkfifo(path, member.mode)
            os.lchown(path, os.geteuid(), os.getegid())
            if not member.issym():
                os.chmod(path, member.mode)
                if member.isreg():
                    os.setxattr(path, "user.layer", b"1")
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)
    for path, mtime in reversed(directories):
        if os.path.isdir(path):
            os.utime(path, (mtime, mtime))


def _remove(path: str) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


# ---- ways to write ---------------------------------------------------------------------------------------


def write_by_mappings() -> None:
    """Through mappings of files that exist and of new ones; their close is told, a mapping is not."""
    for name, size in (("old", 6000), ("new", 20_000), ("sub/new", 1)):
        fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as mapping:
            for at in range(0, size, 4096):
                mapping[at : at + 1] = b"M"
            mapping.flush()
            mapping[size - 1 : size] = b"E"
        os.close(fd)
    # Growing under a mapping, as databases do.
    fd = os.open("growing", os.O_RDWR | os.O_CREAT, 0o644)
    for pages in range(1, 5):
        os.posix_fallocate(fd, 0, pages * 4096)
        with mmap.mmap(fd, pages * 4096) as mapping:
            mapping[-4:] = b"%04d" % pages
    os.close(fd)


def copy_in_the_kernel() -> None:
    """sendfile, copy_file_range, splice; and clones where the file system has them."""
    source = os.open("source", os.O_RDONLY)
    size = os.fstat(source).st_size
    for name in ("sendfile", "sub/range", "splice", "range-over"):
        target = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        if name == "sendfile":
            offset = 0
            while offset < size:
                offset += os.sendfile(target, source, offset, size - offset)
        elif name == "splice":
            reading, writing = os.pipe()
            moved = 0
            while moved < size:
                here = os.splice(source, writing, 4096, offset_src=moved)
                while here:
                    done = os.splice(reading, target, here)
                    here, moved = here - done, moved + done
            os.close(reading)
            os.close(writing)
        else:
            offset = 0
            while offset < size:
                offset += os.copy_file_range(source, target, size - offset, offset, offset)
        os.close(target)
    os.close(source)
    shutil.copy2("source", "copied")
    shutil.copyfile("source", "sub/copied")


def clone() -> None:
    """Reflinks: a whole file, over an old one, and a range. Fails with EOPNOTSUPP where there are none."""
    source = os.open("source", os.O_RDONLY)
    for name in ("cloned", "old", "sub/cloned"):
        target = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.ioctl(target, FICLONE, source)
        os.close(target)
    target = os.open("part", os.O_RDWR | os.O_CREAT, 0o644)
    request = source.to_bytes(8, "little") + (0).to_bytes(8, "little")
    request += (4096).to_bytes(8, "little") + (4096).to_bytes(8, "little")
    fcntl.ioctl(target, FICLONERANGE, request)
    os.close(target)
    os.close(source)


def write_oddly() -> None:
    """O_TMPFILE and its name, holes, O_DIRECT, O_APPEND, vectors, files without a name, hard links, times."""
    fd = os.open(".", _O_TMPFILE | os.O_RDWR, 0o644)
    os.write(fd, b"nameless at first\n")
    # With a directory Python calls linkat(2), which alone follows the link.
    os.link(f"/proc/self/fd/{fd}", "named", src_dir_fd=fd, follow_symlinks=True)
    os.write(fd, b"and later\n")
    os.close(fd)
    fd = os.open("holes", os.O_RDWR | os.O_CREAT, 0o644)
    os.pwritev(fd, [b"a" * 5000, b"b" * 5000], 0)
    for mode in (_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, _FALLOC_ZERO_RANGE):
        _checked(_LIBC.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)))
    os.lseek(fd, 1 << 20, os.SEEK_SET)
    os.write(fd, b"far")
    os.close(fd)
    try:
        fd = os.open("direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        with mmap.mmap(-1, 8192) as aligned:
            aligned[:6] = b"direct"
            os.write(fd, aligned)
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    for text in ("one\n", "two\n"):
        fd = os.open("appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, text.encode())
        os.close(fd)
    # Written after its name is gone, and after it got another.
    fd = os.open("short-lived", os.O_RDWR | os.O_CREAT, 0o644)
    os.unlink("short-lived")
    os.write(fd, b"nobody can see this")
    os.close(fd)
    os.link("appended", "sub/hard")
    fd = os.open("sub/hard", os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"by the other name\n")
    os.unlink("sub/hard")
    os.write(fd, b"by no name\n")
    os.close(fd)
    fd = os.open("before", os.O_WRONLY | os.O_CREAT, 0o644)
    os.rename("before", "sub/after")
    os.write(fd, b"moved\n")
    os.fchmod(fd, 0o600)
    os.setxattr(fd, "user.a", b"b")
    os.removexattr(fd, "user.a")
    os.utime(fd, ns=(1, 2))
    os.close(fd)
    os.mkfifo("fifo")
    os.rename("fifo", "sub/fifo")
    for number in range(20):
        # One name, a new object of another kind each time.
        if number % 2:
            os.mkdir("flip")
            os.rmdir("flip")
        else:
            _write_synced("flip", "flop\n")
            os.unlink("flip")


def use_sqlite() -> None:
    """A database in its three ways of keeping a journal."""
    for journal in ("DELETE", "PERSIST", "WAL"):
        base = sqlite3.connect("sub/base.db", isolation_level=None)
        base.execute(f"PRAGMA journal_mode={journal}")
        base.execute("PRAGMA synchronous=OFF")
        base.execute("CREATE TABLE IF NOT EXISTS t (x)")
        for number in range(3):
            base.execute("BEGIN")
            base.executemany("INSERT INTO t VALUES (?)", [(f"{number} " * 100,)] * 50)
            base.execute("COMMIT")
        base.execute("DELETE FROM t")
        base.close()


_TEXT = "".join(f"line {number}\n" for number in range(3000))
ACTS = {
    "editors": Act(
        edit,
        {
            "main.c": "int main;\n",
            "util.c": "old\n",
            "notes.txt": "old\n",
            "sub/nano.txt": "old and longer than what comes\n",
            "sub/exchanged.txt": "old\n",
        },
    ),
    "npm-like": Act(install_as_npm, {"package.json": "{}\n"}),
    "layer": Act(extract_layer),
    "mmap": Act(write_by_mappings, {"old": _TEXT, "sub/other": ""}),
    "kernel-copies": Act(copy_in_the_kernel, {"source": _TEXT, "range-over": "old\n", "sub/other": ""}),
    "clones": Act(clone, {"source": _TEXT, "old": "old\n", "sub/other": ""}),
    "odd-writes": Act(write_oddly, {"sub/other": ""}),
    "sqlite": Act(use_sqlite, {"sub/other": ""}),
}


def main() -> None:
    """The act that the command line names."""
    os.umask(0o022)
    ACTS[sys.argv[1]].do(*sys.argv[2:])


if __name__ == "__main__":
    main()
