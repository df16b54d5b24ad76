# SPDX-License-Identifier: Apache-2.0
"""What a tree is for who reads all of it: names, attributes, contents; in this process or as a program.

Must import nothing but Python's own: the guest runs this file's text. Specification: stat(2).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys


def described(root: str) -> dict[str, str]:
    """Each object below `root`, and itself as ".": all that a reader can know of it, but when it was read."""
    first_names: dict[int, str] = {}
    found: dict[str, str] = {}

    def look(path: str, name: str) -> None:
        state = os.lstat(path)
        kind = stat.S_IFMT(state.st_mode)
        words = [f"{state.st_mode:o} {state.st_uid}:{state.st_gid} links {state.st_nlink}"]
        words.append(f"mtime {state.st_mtime_ns} ctime {state.st_ctime_ns}")
        if kind == stat.S_IFDIR:
            names = sorted(os.listdir(path))
            words.append(f"{len(names)} entries")
        else:
            words.append(f"{state.st_size} bytes, as {first_names.setdefault(state.st_ino, name)}")
        if kind == stat.S_IFLNK:
            words.append(f"-> {os.readlink(path)}")
        elif kind == stat.S_IFREG:
            with open(path, "rb") as file:
                words.append(hashlib.md5(file.read(), usedforsecurity=False).hexdigest())
        found[name] = ", ".join(words)
        if kind == stat.S_IFDIR:
            for below in names:
                look(f"{path}/{below}", below if name == "." else f"{name}/{below}")

    look(root, ".")
    return found


def differing(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    """The objects that differ, in words."""
    return [
        f"{name}: on the host {expected.get(name)}; in the guest {got.get(name)}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]


def main() -> None:
    """Answers each path on stdin with a line of JSON, in ASCII."""
    for line in sys.stdin:
        try:
            print(json.dumps(described(line.rstrip("\n"))), flush=True)
        except OSError as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
