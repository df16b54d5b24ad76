# SPDX-License-Identifier: Apache-2.0
"""Writers: real programs where the machine has them, and their system calls done again where it does not.

Must not know who watches. A writer prepares a tree before anybody watches, and then does its work in it by
commands. Specification: the programs' own manuals; for layers the OCI image specification.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import lacking
from tests.limits import LONG_HANG_S
from tests.writers.acts import ACTS
from vhostfs.vm.cache import cache_root
from vhostfs.vm.debian import Release, open_root
from vhostfs.vm.errors import VmError

REPOSITORY = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONDONTWRITEBYTECODE": "1",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}


class Workshop:
    """Where a writer works: `tree` is what is watched, `scratch` is elsewhere."""

    def __init__(self, tree: Path, scratch: Path, pacing: dict[str, str] | None = None) -> None:
        """`pacing`: what paces the commands, for their environment."""
        self.tree = tree
        self.scratch = scratch
        self._environment = {**os.environ, **_ENVIRONMENT, "HOME": str(scratch), "TMPDIR": str(scratch)}
        self._pacing = pacing or {}

    def run(self, *command: str | Path, paced: bool = True) -> None:
        """A command in the tree that must succeed."""
        environment = {**self._environment, **(self._pacing if paced else {})}
        done = subprocess.run(
            command,
            cwd=self.tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LONG_HANG_S,
        )
        said = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
        assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {said}"


@dataclass(frozen=True, slots=True)
class Writer:
    """One kind of writer."""

    name: str
    prepare: Callable[[Workshop], object]
    """Makes what is there before; may skip loudly."""
    work: Callable[[Workshop], object]

    def __str__(self) -> str:
        return self.name


@functools.cache
def tool(name: str, package: str) -> tuple[str, ...]:
    """How to start a program: this machine's own, else Debian's, unpacked privately; or a loud skip."""
    path = shutil.which(name)
    if path is not None:
        return (path,)
    folder = cache_root() / "tools" / package
    try:
        if not folder.exists():
            debs = open_root(Release.BOOKWORM, cache_root()).resolve([package])
            staging = folder.with_name(f".{package}.{os.getpid()}")
            staging.mkdir(parents=True)
            for deb in debs:
                if deb.name.startswith((f"{package}_", "lib")):
                    subprocess.run(["dpkg-deb", "-x", deb, staging], check=True)
            staging.rename(folder)
    except (VmError, OSError, subprocess.CalledProcessError) as error:
        lacking(f"the program {name}, nor can Debian's be fetched: {error}")
    libraries = ":".join(str(folder / top / "x86_64-linux-gnu") for top in ("lib", "usr/lib"))
    loader = folder / "lib64/ld-linux-x86-64.so.2"
    return (str(loader), "--library-path", libraries, str(folder / "usr/bin" / name))


def fill(directory: Path, files: dict[str, str]) -> None:
    """Files by path, with the directories that they need."""
    for path, text in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)


# ---- git -------------------------------------------------------------------------------------------------


def _git(shop: Workshop, *arguments: str, paced: bool = True) -> None:
    options = ("gc.auto=0", "maintenance.auto=false", "advice.detachedHead=false", "core.hooksPath=/dev/null")
    shop.run("git", *(word for option in options for word in ("-c", option)), *arguments, paced=paced)


def _prepare_git(shop: Workshop) -> None:
    tool("git", "git")

    def git(*arguments: str) -> None:
        _git(shop, *arguments, paced=False)

    def commit(message: str) -> None:
        git("add", "-A")
        git("commit", "-q", "-m", message)

    git("init", "-q", "-b", "main", "--template=")
    tree = shop.tree
    fill(tree, {f"src/m{i}/file{j}.c": f"int f{i}_{j};\n" * 20 for i in range(3) for j in range(2)})
    fill(tree, {"README": "first\n", "docs/a.md": "a\n", "docs/old/b.md": "b\n"})
    commit("base")
    git("checkout", "-q", "-b", "feature")
    shutil.rmtree(tree / "docs/old")
    (tree / "docs/a.md").unlink()
    fill(tree, {f"new/deep/er/n{i}": f"new {i}\n" for i in range(3)})
    fill(tree, {"src/m0/file0.c": "changed\n", "src/m1/file1.c": "changed too\n"})
    (tree / "README").chmod(0o755)
    (tree / "link").symlink_to("src/m0")
    commit("feature one")
    (tree / "src/m2/file1.c").rename(tree / "src/m2/renamed.c")
    fill(tree, {"new/more": "more\n"})
    commit("feature two")
    git("checkout", "-q", "main")
    fill(tree, {"src/m2/file0.c": "upstream\n", "up/stream": "upstream\n"})
    commit("upstream")


def _work_git(shop: Workshop) -> None:
    _git(shop, "checkout", "-q", "feature")
    _git(shop, "rebase", "-q", "main")
    _git(shop, "checkout", "-q", "main")
    (shop.tree / "README").write_text("not committed\n")
    _git(shop, "stash", "-q")
    _git(shop, "merge", "-q", "--squash", "feature")
    _git(shop, "reset", "-q", "--hard")
    _git(shop, "clean", "-q", "-fdx")


# ---- rsync -----------------------------------------------------------------------------------------------


def _prepare_rsync(shop: Workshop) -> None:
    tool("rsync", "rsync")
    source = shop.scratch / "source"
    fill(source, {f"d{i}/f{j}": f"{i}{j}\n" * 3000 for i in range(3) for j in range(3)})
    (source / "d0/hard").hardlink_to(source / "d0/f0")
    (source / "d0/soft").symlink_to("f1")
    fill(shop.tree, {"d0/f0": "older\n", "d0/gone": "x\n", "gone/with/all": "x\n", "d1/f1": "11\n" * 2900})


def _work_rsync(shop: Workshop) -> None:
    source = shop.scratch / "source"
    shop.run(*tool("rsync", "rsync"), "-aH", "--delete", f"{source}/", "./")
    with (source / "d1/f1").open("a") as stream:
        stream.write("appended\n")
    (source / "d2/f2").write_text("short\n")
    (source / "d1/f0").chmod(0o640)
    os.utime(source / "d2/f0", (1, 1))
    shop.run(*tool("rsync", "rsync"), "-aH", "--inplace", "--no-whole-file", f"{source}/", "./")
    (source / "d2/f1").write_text("other\n" * 10)
    fill(source, {"new/sub/file": "new\n"})
    shop.run(*tool("rsync", "rsync"), "-aH", "--delay-updates", "--backup", "--suffix=~", f"{source}/", "./")


# ---- editors ---------------------------------------------------------------------------------------------


def _prepare_vim(shop: Workshop) -> None:
    tool("vim", "vim-tiny")
    fill(shop.tree, {"one.txt": "one\n" * 50, "two.txt": "two\n", "sub/three.txt": "three\n"})
    (shop.tree / "hard.txt").hardlink_to(shop.tree / "two.txt")
    (shop.tree / "soft.txt").symlink_to("sub/three.txt")


def _vim(shop: Workshop, file: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    shop.run(*tool("vim", "vim-tiny"), "-N", "-u", "NONE", "-i", "NONE", "-es", *words, "-c", "wq", file)


def _work_vim(shop: Workshop) -> None:
    add = "normal ggOnew"
    for file in ("one.txt", "two.txt", "soft.txt"):
        for options in ("backupcopy=no", "backupcopy=yes", "backupcopy=auto"):
            _vim(shop, file, f"set swapfile updatecount=1 writebackup {options}", add, "preserve")
    _vim(shop, "one.txt", "set swapfile backup undofile undodir=.", add, "w", add)
    _vim(shop, "new.txt", "set swapfile", add, "saveas! sub/other.txt", add)


# ---- archives and packages -------------------------------------------------------------------------------


def _member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.mtime = kind, mode, link, 1_700_000_000
    return info


def _archive(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if data else None)


def _layers(directory: Path) -> None:
    """Two layers of an image: what the second takes away is named by whiteouts."""
    directory_type, hard, soft, fifo = tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE
    first = [
        (_member("bin", directory_type, 0o755), b""),
        (_member("bin/tool", mode=0o755), b"#!/bin/sh\n"),
        (_member("bin/alias", hard, link="bin/tool"), b""),
        (_member("bin/sh", soft, link="tool"), b""),
        (_member("etc", directory_type, 0o755), b""),
        (_member("etc/config"), b"one\n"),
        (_member("etc/d", directory_type, 0o700), b""),
        (_member("etc/d/part"), b"part\n"),
        (_member("var", directory_type, 0o1777), b""),
        (_member("var/cache", directory_type, 0o755), b""),
        *((_member(f"var/cache/{i}"), b"%d" % i * 5000) for i in range(4)),
        (_member("var/pipe", fifo, 0o600), b""),
    ]
    second = [
        (_member("bin/tool", mode=0o700), b"#!/bin/false\n"),
        (_member("etc/.wh.config"), b""),
        (_member("etc/d", directory_type, 0o755), b""),
        (_member("etc/d/.wh..wh..opq"), b""),
        (_member("etc/d/new"), b"new\n"),
        (_member(".wh.var"), b""),
        (_member("etc/link", soft, link="d/new"), b""),
        (_member("etc/hard", hard, link="etc/d/new"), b""),
    ]
    _archive(directory / "layer1.tar", first)
    _archive(directory / "layer2.tar", second)


def _work_layers(shop: Workshop) -> None:
    for number in (1, 2):
        _act(shop, "layer", str(shop.scratch / f"layer{number}.tar"))


def _work_tar(shop: Workshop) -> None:
    shop.run("tar", "-xpf", shop.scratch / "layer1.tar")
    shop.run("tar", "-xpf", shop.scratch / "layer1.tar", "--recursive-unlink")
    shop.run("tar", "-xpf", shop.scratch / "layer1.tar", "--overwrite", "bin", "etc")


@functools.cache
def _pip() -> list[str]:
    commands = [[python, "-m", "pip"] for python in (sys.executable, shutil.which("python3") or "python3")]
    for command in commands:
        if subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
            return command
    return lacking("pip")


def _prepare_pip(shop: Workshop) -> None:
    _pip()
    for version in ("1", "2"):
        info = f"pack-{version}.dist-info"
        files = {
            "pack/__init__.py": f"version = {version}\n",
            f"pack/only{version}.py": "",
            "pack/data/table": version * 3000,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: pack\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": "[console_scripts]\npack = pack:main\n",
            f"{info}/RECORD": "",
        }
        wheel = shop.scratch / f"w{version}"
        fill(wheel, files)
        target = shop.scratch / f"pack-{version}-py3-none-any"
        shutil.make_archive(str(target), "zip", wheel)
        os.rename(f"{target}.zip", f"{target}.whl")
    (shop.tree / "site").mkdir()


def _work_pip(shop: Workshop) -> None:
    # Into a folder: unpacked elsewhere and renamed. Into a prefix: each file in its place.
    options = ("--no-index", "--no-deps", "--no-compile", "-q", "--upgrade", "--ignore-installed")
    for where, version in (("--target", "1"), ("--prefix", "2")):
        wheel = shop.scratch / f"pack-{version}-py3-none-any.whl"
        shop.run(*_pip(), "install", *options, where, shop.tree / "site", wheel)


def _prepare_shell(shop: Workshop) -> None:
    fill(shop.tree, {f"a/b{i}/c/f{j}": f"{i}{j}\n" for i in range(2) for j in range(3)})
    fill(shop.tree, {"notes": "one\ntwo\n"})


def _work_shell(shop: Workshop) -> None:
    shop.run(
        "sh",
        "-ec",
        """
        cp -a a copy
        mv copy/b0 copy/moved
        sed -i s/one/1/ notes
        install -D -m 600 notes x/y/installed
        ln -s x/y first; ln -sfn x second; ln -sfn x/y second
        ln notes hard; echo more >>hard
        touch -d @1 notes; chmod -R g+w a; : >notes; truncate -s 9000 notes
        dd if=/dev/zero of=notes bs=512 count=3 seek=1 conv=notrunc status=none
        tee a/teed <notes >/dev/null
        (echo all in one; date +%s) >a/log 2>&1
        rm -rf a copy/b1; rmdir x/y 2>/dev/null || rm -r x
        mkdir -p a/b0/c; echo again >a/b0/c/f0
        """,
    )


# ---- system calls ----------------------------------------------------------------------------------------


def _act(shop: Workshop, name: str, *arguments: str) -> None:
    environment = ["env", f"PYTHONPATH={REPOSITORY}"]
    shop.run(*environment, sys.executable, "-S", "-m", "tests.writers.acts", name, *arguments)


def _acting(name: str) -> Writer:
    def prepare(shop: Workshop) -> None:
        fill(shop.tree, ACTS[name].before)

    return Writer(name, prepare, lambda shop: _act(shop, name))


WRITERS = (
    Writer("git", _prepare_git, _work_git),
    Writer("rsync", _prepare_rsync, _work_rsync),
    Writer("vim", _prepare_vim, _work_vim),
    Writer("layers", lambda shop: _layers(shop.scratch), _work_layers),
    Writer("tar", lambda shop: _layers(shop.scratch), _work_tar),
    Writer("pip", _prepare_pip, _work_pip),
    Writer("shell", _prepare_shell, _work_shell),
    *map(_acting, ("editors", "npm-like", "mmap", "kernel-copies", "odd-writes", "sqlite")),
)
CLONES = _acting("clones")
"""For a file system that has them: reflink.py."""
