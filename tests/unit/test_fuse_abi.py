# SPDX-License-Identifier: Apache-2.0
"""FUSE structs that Python reads and writes, byte for byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.fuse.abi import InitFlag, InitIn, InitOut, IoctlIn, pack_ioctl


def test_a_short_init_of_an_old_kernel_has_32_flags() -> None:
    request = InitIn.unpack(struct.pack("<IIII", 7, 31, 131072, InitFlag.ASYNC_READ))
    assert request == InitIn(7, 31, 131072, 1)


@pytest.mark.parametrize("has_ext", [False, True])
def test_the_upper_flags_count_only_with_init_ext(has_ext: bool) -> None:
    low = InitFlag.INIT_EXT if has_ext else 0
    request = InitIn.unpack(struct.pack("<IIIII44x", 7, 36, 0, low, 1))
    assert bool(request.flags & InitFlag.SECURITY_CTX) == has_ext


@given(data=st.binary(max_size=15))
def test_an_init_that_is_too_short_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        InitIn.unpack(data)


def test_the_init_reply_is_that_of_the_kernel_header() -> None:
    flags = InitFlag.ASYNC_READ | InitFlag.SECURITY_CTX
    data = InitOut(38, 0x20000, int(flags), 12, 9, 1 << 20, 1, 256).pack()
    assert len(data) == 64
    assert struct.unpack_from("<IIIIHHIIHHI", data) == (7, 38, 0x20000, 1, 12, 9, 1 << 20, 1, 256, 0, 1)


def test_the_last_flag_is_that_of_the_protocol() -> None:
    assert max(InitFlag).value == 1 << 43


@given(data=st.binary(max_size=100))
def test_an_ioctl_has_the_size_that_it_says_or_is_refused(data: bytes) -> None:
    try:
        call = IoctlIn.unpack(data)
    except ValueError:
        return
    assert len(call.data) == len(data) - 32


def test_an_ioctl_reply_is_a_result_and_data() -> None:
    assert pack_ioctl(-1, b"ab") == b"\xff\xff\xff\xff" + bytes(12) + b"ab"
