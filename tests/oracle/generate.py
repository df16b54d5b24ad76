# SPDX-License-Identifier: Apache-2.0
"""Random scripts: the same for the same seed, ever.

Keeps a small model of the tree so that most operations can be done. Must not know what is right.
Specification: docs/oracle.md, "Random runs".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.oracle.script import Op, Script, mask_text
from tests.oracle.streams import In

NAMES = ("a", "b", "c", "x", "y")
DIRECTORIES = ("d0", "d1", "d0/n", "u")
_MAX_DEPTH = 3
_SLOTS = ("1", "2", "3")
_WEIGHTS = {
    "file": 6,
    "mknod": 2,
    "fifo": 1,
    "bind": 1,
    "symlink": 1,
    "mkdir": 5,
    "link": 5,
    "tmplink": 1,
    "unlink": 10,
    "rmdir": 3,
    "rename": 16,
    "noreplace": 1,
    "exchange": 4,
    "write": 8,
    "rewrite": 2,
    "truncate": 3,
    "allocate": 1,
    "copy": 1,
    "mapwrite": 1,
    "read": 4,
    "list": 3,
    "chmod": 5,
    "chown": 1,
    "utime": 2,
    "atime": 1,
    "mtime": 1,
    "setxattr": 2,
    "rmxattr": 1,
    "open": 2,
    "openr": 1,
    "put": 3,
    "get": 1,
    "close": 3,
    "save": 2,
    "chain": 2,
    "again": 3,
}
"""How often each is chosen; save, chain and again stand for several operations each."""
_NAMES_ONLY = {"mkdir": 6, "rmdir": 3, "rename": 14, "noreplace": 1, "exchange": 5, "chain": 3}


@dataclass(frozen=True, slots=True)
class Mix:
    """What is drawn from; `few`: each run has only some of the names, from one to all."""

    weights: Mapping[str, int]
    compare: tuple[float, ...]
    """How likely is a comparison after an operation; of a run."""
    first: tuple[str, ...]
    """What is in the directories in the beginning."""
    few: bool = False


MIXES = {
    "all": Mix(_WEIGHTS, (1.0, 0.4, 0.15, 0.04), ("file", "file", "file", "mkdir", "symlink")),
    "dirs": Mix(_NAMES_ONLY, (0.04, 0.01, 0.0), ("mkdir",), few=True),
    "files": Mix(
        {"file": 6, "unlink": 4, "link": 2, "rename": 14, "exchange": 5, "chain": 3},
        (0.04, 0.01, 0.0),
        ("file",),
        few=True,
    ),
    "writes": Mix(
        {
            "file": 5,
            "unlink": 3,
            "link": 1,
            "rename": 12,
            "exchange": 4,
            "chain": 2,
            "write": 8,
            "chmod": 5,
            "list": 2,
            "read": 1,
        },
        (0.04, 0.01, 0.0),
        ("file", "file", "mkdir"),
        few=True,
    ),
}
"""By name: everything; or few names of directories, of files, or of both and what is done to them meanwhile,
that come, go and wander at full speed."""
_ON_FILES = frozenset(("write", "rewrite", "truncate", "allocate", "mapwrite", "read"))
_ANYTHING = frozenset(("chmod", "chown", "utime", "atime", "mtime", "setxattr", "rmxattr"))


class _Tree:
    """Paths and what is there: "d" for directories, "f" for regular files, "o" for others."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}

    def of(self, *kinds: str) -> list[str]:
        return [path for path, kind in self.kinds.items() if kind in kinds]

    def is_empty(self, path: str) -> bool:
        return not any(other.startswith(f"{path}/") for other in self.kinds)

    def remove(self, path: str) -> None:
        for other in [other for other in self.kinds if other == path or other.startswith(f"{path}/")]:
            del self.kinds[other]

    def rename(self, old: str, new: str) -> None:
        if old not in self.kinds or old == new or new.startswith(f"{old}/") or old.startswith(f"{new}/"):
            return
        if new in self.kinds:
            both = self.kinds[old] == "d", self.kinds[new] == "d"
            if both[0] != both[1] or not self.is_empty(new):
                return
            self.remove(new)
        self._move({path: path for path in self.kinds}, old, new)

    def exchange(self, one: str, other: str) -> None:
        if {one, other} <= self.kinds.keys() and not f"{one}/".startswith(f"{other}/"):
            if f"{other}/".startswith(f"{one}/"):
                return
            self._move({path: path for path in self.kinds}, one, other, both=True)

    def _move(self, paths: dict[str, str], old: str, new: str, *, both: bool = False) -> None:
        moved = {}
        for path in paths:
            to = path
            if path == old or path.startswith(f"{old}/"):
                to = new + path[len(old) :]
            elif both and (path == new or path.startswith(f"{new}/")):
                to = old + path[len(new) :]
            moved[to] = self.kinds[path]
        self.kinds = moved


class Generator:
    """Makes one script of about `operations` operations."""

    def __init__(self, seed: int, operations: int, mix: str = "all") -> None:
        self._random = random.Random(f"vhostfs oracle {seed}" + f" {mix}" * (mix != "all"))
        self._wanted = operations
        self._mix = MIXES[mix]
        self._tree = _Tree()
        self._ops: list[Op] = []
        self._done = 0
        self._watches: list[str] = []
        self._choices = list(self._mix.weights)
        self._weights = list(self._mix.weights.values())
        self._names: tuple[str, ...] = NAMES
        self._compare = self._random.choice(self._mix.compare)
        self._style = self._random.choice(("everything", "everything", "one", "files", "mixed", "changing"))

    def script(self) -> Script:
        """The tree, the watches, and then what happens to them."""
        if self._mix.few:
            self._names = tuple(self._random.sample(NAMES, self._random.randint(1, len(NAMES))))
        for path in DIRECTORIES:
            self._emit("mkdir", path)
        for directory in DIRECTORIES:
            for name in self._random.sample(self._names, min(len(self._names), 2)):
                self._emit(self._random.choice(self._mix.first), f"{directory}/{name}")
        files = self._tree.of("f")
        for source in self._random.sample(files, min(len(files), 1)):
            self._emit("link", source, self._new_path())
        self._first_watches()
        self._done = 0
        while self._done < self._wanted:
            self._step()
            if self._random.random() < self._compare:
                self._emit("sync")
        return tuple(self._ops)

    # ---- watches ---------------------------------------------------------------------------------------

    def _mask(self) -> str:
        kind = self._random.random()
        if kind < 0.45:
            return mask_text(In.ALL)
        if kind < 0.8:
            return mask_text(In.CHANGES)
        bits = [bit for bit in In if bit & In.ALL and bit not in (In.ALL, In.CHANGES)]
        chosen = In(0)
        for bit in self._random.sample(bits, self._random.randint(1, len(bits) - 1)):
            chosen |= bit
        return mask_text(chosen)

    def _watch(self, path: str, mask: str | None = None) -> None:
        name = f"w{len(self._watches)}"
        self._watches.append(name)
        self._emit("watch", name, path, mask or self._mask())

    def _first_watches(self) -> None:
        directories, files = [".", *self._tree.of("d")], self._tree.of("f", "o")
        if self._style == "everything":
            mask = self._mask()
            for path in directories:
                self._watch(path, mask)
            return
        if self._style == "one":
            self._watch(self._random.choice(DIRECTORIES))
            return
        if self._style in ("mixed", "changing"):
            for path in self._random.sample(directories, self._random.randint(1, len(directories))):
                self._watch(path)
        for path in self._random.sample(files, min(len(files), self._random.randint(1, 5))):
            self._watch(path)

    def _change_watches(self) -> None:
        if self._random.random() < 0.4 and self._watches:
            self._emit("unwatch", self._random.choice(self._watches))
        elif self._tree.kinds:
            self._watch(self._random.choice(list(self._tree.kinds)))

    # ---- operations ------------------------------------------------------------------------------------

    def _step(self) -> None:
        chance = self._random.random()
        if self._style == "changing" and chance < 0.1:
            self._change_watches()
        elif chance < 0.03 and self._tree.kinds:
            self._emit("look", self._random.choice(list(self._tree.kinds)))
        elif chance < 0.035:
            self._emit("forget")
        kind = self._random.choices(self._choices, self._weights)[0]
        making: Callable[[], None] | None = getattr(self, f"_{kind}", None)
        if making is not None:
            making()
        elif kind in ("file", "mknod", "fifo", "bind", "symlink", "mkdir", "tmplink"):
            self._emit(kind, self._new_path())
        elif kind in ("rename", "noreplace", "exchange"):
            self._emit(kind, self._any_path(), self._any_path() if kind == "exchange" else self._target())
        elif kind == "link":
            self._emit(kind, self._path("f", "o"), self._new_path())
        elif kind == "unlink":
            self._emit(kind, self._path("f", "o"))
        elif kind == "rmdir":
            empty = [path for path in self._tree.of("d") if self._tree.is_empty(path)]
            self._emit(kind, self._random.choice(empty) if empty else self._path("d"))
        elif kind in _ON_FILES:
            self._emit(kind, self._path("f"))
        elif kind == "copy":
            self._emit(kind, self._path("f"), self._path("f"))
        elif kind == "list":
            self._emit(kind, self._path("d"))
        elif kind in _ANYTHING:
            self._emit(kind, self._any_path())
        elif kind in ("open", "openr"):
            self._emit(kind, self._random.choice(_SLOTS), self._path("f"))
        else:
            self._emit(kind, self._random.choice(_SLOTS))

    def _save(self) -> None:
        """As editors do."""
        path = self._path("f")
        temporary = f"{path.rpartition('/')[0] or 'd0'}/.tmp"
        self._emit("file", temporary)
        self._emit("write", temporary)
        self._emit("rename", temporary, path)

    def _chain(self) -> None:
        """A name wanders."""
        at = self._any_path()
        for _ in range(self._random.randint(2, 4)):
            to = self._new_path()
            self._emit("rename", at, to)
            at = to

    def _again(self) -> None:
        """A name goes and comes again at once, perhaps as something else."""
        path = self._path("f", "o")
        self._emit("unlink", path)
        self._emit(self._random.choice(("file", "file", "mkdir", "symlink", "mknod")), path)
        if self._random.random() < 0.5:
            self._emit("chmod", path)

    def _path(self, *kinds: str) -> str:
        found = self._tree.of(*kinds)
        return self._random.choice(found) if found else self._new_path()

    def _any_path(self) -> str:
        return self._path("d", "f", "f", "o")

    def _new_path(self) -> str:
        parents = [path for path in self._tree.of("d") if path.count("/") < _MAX_DEPTH - 1]
        return f"{self._random.choice(parents) if parents else 'd0'}/{self._random.choice(self._names)}"

    def _target(self) -> str:
        return self._any_path() if self._random.random() < 0.3 else self._new_path()

    def _emit(self, kind: str, *arguments: str) -> None:
        op = Op(kind, arguments)
        self._ops.append(op)
        if not op.is_control:
            self._done += 1
            self._follow(kind, arguments)

    def _follow(self, kind: str, arguments: tuple[str, ...]) -> None:
        tree = self._tree
        path = arguments[-1]
        parent = path.rpartition("/")[0]
        if kind in ("file", "mknod", "fifo", "bind", "symlink", "mkdir", "tmplink"):
            if path not in tree.kinds and (not parent or tree.kinds.get(parent) == "d"):
                tree.kinds[path] = {"mkdir": "d", "file": "f", "mknod": "f", "tmplink": "f"}.get(kind, "o")
        elif kind == "link":
            source = tree.kinds.get(arguments[0])
            if source in ("f", "o") and path not in tree.kinds and tree.kinds.get(parent) == "d":
                tree.kinds[path] = source
        elif kind == "unlink":
            if tree.kinds.get(path) in ("f", "o"):
                tree.remove(path)
        elif kind == "rmdir":
            if tree.kinds.get(path) == "d" and tree.is_empty(path):
                tree.remove(path)
        elif kind == "rename" or (kind == "noreplace" and path not in tree.kinds):
            if not parent or tree.kinds.get(parent) == "d":
                tree.rename(*arguments)
        elif kind == "exchange":
            tree.exchange(*arguments)


def random_script(seed: int, operations: int, mix: str = "all") -> Script:
    """The script of this seed and mix (one of MIXES)."""
    return Generator(seed, operations, mix).script()
