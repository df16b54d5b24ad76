# SPDX-License-Identifier: Apache-2.0
"""Flags and masks are told by the names that their specifications give them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.caps import names
from vhostfs.caps.names import Delivery, delivery_of

Namer = Callable[[int], list[str]]
NAMERS: list[Namer] = [
    names.virtio_feature_names,
    names.protocol_feature_names,
    names.device_status_names,
    names.fuse_init_names,
    names.fsnotify_flag_names,
    names.event_bit_names,
    names.fan_init_names,
    names.fan_mark_names,
]


@pytest.mark.parametrize(
    ("namer", "bits", "expected"),
    [
        (
            names.virtio_feature_names,
            1 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 37,
            [
                "VIRTIO_FS_F_NOTIFICATION",
                "VIRTIO_F_INDIRECT_DESC",
                "VIRTIO_F_EVENT_IDX",
                "VHOST_USER_F_PROTOCOL_FEATURES",
                "VIRTIO_F_VERSION_1",
                "BIT37",
            ],
        ),
        (
            names.protocol_feature_names,
            1 | 1 << 9,
            ["VHOST_USER_PROTOCOL_F_MQ", "VHOST_USER_PROTOCOL_F_CONFIG"],
        ),
        (names.fuse_init_names, 1 | 1 << 36, ["FUSE_ASYNC_READ", "FUSE_DIRECT_IO_ALLOW_MMAP"]),
        (names.fsnotify_flag_names, 3, ["FUSE_FSNOTIFY_VIRTQUEUE", "FUSE_FSNOTIFY_PARKED"]),
        (names.event_bit_names, 0x4000_0100, ["CREATE", "ISDIR"]),
        (names.fan_init_names, 0xC00, ["FAN_REPORT_DIR_FID", "FAN_REPORT_NAME"]),
        (names.fan_mark_names, 0x101, ["FAN_MARK_ADD", "FAN_MARK_FILESYSTEM"]),
        (names.device_status_names, 0xF, ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"]),
    ],
)
def test_bits_have_the_names_of_their_specification(namer: Namer, bits: int, expected: list[str]) -> None:
    assert namer(bits) == expected


@given(bits=st.integers(0, (1 << 64) - 1), namer=st.sampled_from(NAMERS))
def test_every_bit_has_a_name_of_its_own(bits: int, namer: Namer) -> None:
    found = namer(bits)
    assert len(set(found)) == bits.bit_count()


def test_granted_flags_say_how_events_travel() -> None:
    assert [delivery_of(flags) for flags in (0x19, 0x1A, 0x18)] == [
        Delivery.VIRTQUEUE,
        Delivery.PARKED,
        Delivery.NONE,
    ]
