# SPDX-License-Identifier: Apache-2.0
"""Builds vhostfs._native from the C files here (cffi API mode).

Owns the compiler's flags; knows nothing of what the code does.
Source: cffi documentation, "Preparing and distributing modules"; api.h is the interface.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HOSTILE = os.environ.get("VHOSTFS_HOSTILE") == "1"
"""Builds a server that lies to its guest's driver, to test that one."""


def declarations() -> str:
    """api.h without its preprocessor lines, which cffi does not read."""
    lines = (HERE / "api.h").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def compile_flags() -> list[str]:
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # For developers and CI; a user's newer compiler must not fail on a new warning.
    if os.environ.get("VHOSTFS_WERROR") == "1":
        flags.append("-Werror")
    if sanitize := os.environ.get("VHOSTFS_SANITIZE"):
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
    return flags


def link_flags() -> list[str]:
    sanitize = os.environ.get("VHOSTFS_SANITIZE")
    flags = [f"-fsanitize={sanitize}"] if sanitize else []
    if HOSTILE:
        wrapped = re.findall(r"\b__wrap_(\w+)", (HERE / "tests/hostile.c").read_text())
        flags += [f"-Wl,--wrap={name}" for name in wrapped]
    return flags


def source_files() -> list[Path]:
    return sorted(HERE.glob("*.c")) + ([HERE / "tests/hostile.c"] if HOSTILE else [])


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "vhostfs._native",
    '#include <stdbool.h>\n#include <stdint.h>\n#include "api.h"\n',
    sources=[os.path.relpath(path) for path in source_files()],
    depends=[os.path.relpath(path) for path in sorted(HERE.glob("*.h"))],
    include_dirs=[os.path.relpath(HERE)],
    libraries=["seccomp", "pthread"],
    extra_compile_args=compile_flags(),
    extra_link_args=link_flags(),
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
