# SPDX-License-Identifier: Apache-2.0
"""Patches for QEMU: which belong to which series, and what they change.

Must not fetch or patch anything. Specification: vhostfs/vm/qemu_source.py.
"""

from __future__ import annotations

import re

import pytest

from vhostfs.vm.qemu_source import SERIES, device_patches, sections, touched_files

TWO_FILES = b"""From: somebody
Subject: words
---
 docs/a.rst | 2 +-

diff --git a/docs/a.rst b/docs/a.rst
index 1..2 100644
--- a/docs/a.rst
+++ b/docs/a.rst
@@ -1,2 +1,2 @@
--- a line that only looks like a header
+++ another
 same
diff --git a/new.c b/new.c
new file mode 100644
--- /dev/null
+++ b/new.c
@@ -0,0 +1 @@
+int x;
"""


def test_a_patch_is_taken_apart_by_file() -> None:
    parts = dict(sections(TWO_FILES))
    assert list(parts) == ["docs/a.rst", "new.c"]
    assert parts["docs/a.rst"].endswith(b" same\n")
    assert parts["new.c"].startswith(b"--- /dev/null\n")
    assert touched_files({"x": TWO_FILES}) == {"docs/a.rst", "new.c"}


@pytest.mark.parametrize("series", SERIES)
def test_every_series_has_the_device(series: str) -> None:
    patches = device_patches(series)
    assert list(patches) == sorted(patches)
    assert {"hw/virtio/vhost-user-fs.c", "hw/virtio/vhost-user-fs-pci.c"} <= touched_files(patches)


def test_what_an_old_qemu_does_not_have_is_not_patched_there() -> None:
    assert "hw/virtio/virtio-qmp.c" in touched_files(device_patches("10.0"))
    assert "hw/virtio/virtio-qmp.c" not in touched_files(device_patches("7.2"))


def test_the_patches_are_a_series() -> None:
    patches = device_patches("10.0")
    assert [name[:5] for name in patches] == [f"{number:04}-" for number in range(1, len(patches) + 1)]
    for patch in patches.values():
        assert re.search(rb"^Subject: \[PATCH \d/%d\] " % len(patches), patch, re.MULTILINE)
