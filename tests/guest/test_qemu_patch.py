# SPDX-License-Identifier: Apache-2.0
"""Our patches for QEMU apply to the sources that Debian has; building and running it is scripts/qemu-patched.

Must not know what they do. Specification: qemu/README.md.
"""

from __future__ import annotations

import pytest

from tests.conftest import lacking
from vhostfs.vm.cache import cache_root
from vhostfs.vm.errors import VmError
from vhostfs.vm.qemu_source import SERIES, BrokenPatchError, check_series


@pytest.mark.timeout(1600, func_only=True)  # 64 MB to download, once
def test_the_patches_apply_to_debians_qemus() -> None:
    applied, missing = [], []
    for series in SERIES:
        try:
            applied.append(check_series(series, cache_root()))
        except BrokenPatchError:
            raise
        except VmError as error:
            # Not every mirror has every source package.
            missing.append(str(error))
    if not applied:
        lacking(f"QEMU's source: {'; '.join(missing)}")
