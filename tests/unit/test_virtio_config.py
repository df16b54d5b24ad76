# SPDX-License-Identifier: Apache-2.0
"""The virtio-fs configuration space."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.virtio.config import CONFIG_BYTES, FsConfig, TagError


def test_the_layout_is_that_of_the_specification() -> None:
    data = FsConfig("myfs", 3, 320).pack()
    assert len(data) == CONFIG_BYTES == 44
    assert data[:36] == b"myfs" + bytes(32)
    assert data[36:40] == b"\x03\0\0\0"
    assert data[40:44] == b"\x40\x01\0\0"


@given(
    tag=st.text(max_size=36).filter(lambda tag: "\0" not in tag and len(tag.encode(errors="replace")) <= 36),
    queues=st.integers(0, 0xFFFFFFFF),
    notify=st.integers(0, 0xFFFFFFFF),
)
def test_what_is_packed_unpacks_to_the_same(tag: str, queues: int, notify: int) -> None:
    config = FsConfig(tag, queues, notify)
    assert FsConfig.unpack(config.pack()) == config


@pytest.mark.parametrize(("tag", "text"), [("x" * 37, "37 bytes"), ("ü" * 19, "38 bytes"), ("a\0b", "NUL")])
def test_a_tag_that_does_not_fit_is_explained(tag: str, text: str) -> None:
    with pytest.raises(TagError, match=text):
        FsConfig(tag, 1).pack()


def test_a_tag_of_36_bytes_fills_its_field() -> None:
    assert FsConfig("x" * 36, 1).pack()[:37] == b"x" * 36 + b"\x01"


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="43 bytes"):
        FsConfig.unpack(bytes(43))
