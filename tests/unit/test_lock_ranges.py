# SPDX-License-Identifier: Apache-2.0
"""What lock owners are said to hold is what the host's kernel has granted them.

Must not know how the list is kept; native/tests/lock_ranges.c compares it with a model.
Specification: fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    binary = tmp_path_factory.mktemp("lock_ranges") / "lock_ranges"
    sources = [NATIVE / "tests" / "lock_ranges.c", NATIVE / "lock_owner.c"]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run([compiler, *flags, "-o", binary, *sources, "-lpthread"], check=True)
    return binary


@pytest.mark.parametrize("seed", range(3))
def test_any_row_of_locks_and_unlocks_is_written_down_right(program: Path, tmp_path: Path, seed: int) -> None:
    locked = tmp_path / "locked"
    locked.touch()
    result = subprocess.run([program, locked, str(seed)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
