# SPDX-License-Identifier: Apache-2.0
"""Names of feature bits for logs."""

from __future__ import annotations

import pytest

from vhostfs.vhost_user.messages import ProtocolFeature
from vhostfs.virtio.features import VirtioFeature, flag_names


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (0, "none"),
        (1, "fs_notification"),
        (1 << 32 | 1 << 29, "ring_event_idx version_1"),
        (1 << 63 | 1, "fs_notification bit63"),
    ],
)
def test_flags_have_names_lowest_first(flags: int, names: str) -> None:
    assert flag_names(flags, VirtioFeature) == names


def test_each_kind_has_its_own_names() -> None:
    assert flag_names(0b1001, ProtocolFeature) == "mq reply_ack"
