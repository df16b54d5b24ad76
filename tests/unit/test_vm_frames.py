# SPDX-License-Identifier: Apache-2.0
"""Frames of the guest agent: cut correctly however the stream is split, and refused when they are impossible.

Must not need a guest.
Specification: vhostfs/vm/frames.py.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.vm.frames import (
    MAX_PAYLOAD,
    ExitStatus,
    Frame,
    FrameDecoder,
    FrameType,
    ProtocolError,
    StartFlag,
    decode_exit,
    decode_number,
    encode_frame,
    encode_resize,
    encode_signal,
    encode_start,
)

frames = st.builds(Frame, st.sampled_from(FrameType), st.integers(0, 2**32 - 1), st.binary(max_size=300))


@given(st.lists(frames, max_size=8), st.data())
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    sent: list[Frame], data: st.DataObject
) -> None:
    stream = b"".join(map(encode_frame, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, received = FrameDecoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += decoder.feed(stream[start:end])
    assert received == sent


def test_a_frame_longer_than_allowed_is_refused_before_its_payload_comes() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        FrameDecoder().feed(struct.pack("<IIB3x", MAX_PAYLOAD + 1, 1, FrameType.STDOUT))


def test_a_frame_of_unknown_type_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0x77"):
        FrameDecoder().feed(struct.pack("<IIB3x", 0, 1, 0x77))


def test_a_payload_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too long"):
        encode_frame(Frame(FrameType.STDIN, 1, bytes(MAX_PAYLOAD + 1)))


def test_a_start_carries_folder_command_and_environment_as_the_agent_reads_them() -> None:
    start = encode_start(
        7, "echo ü", cwd="/share", environment={"A": "b"}, flags=StartFlag.TTY, rows=25, columns=90
    )
    (frame,) = FrameDecoder().feed(start)
    assert (frame.type, frame.command) == (FrameType.START, 7)
    assert frame.payload == struct.pack("<IHH", 1, 25, 90) + "/share\0echo ü\0A=b\0\0".encode()


def test_a_start_with_a_nul_in_it_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        encode_start(1, "echo\0", cwd="/", environment={}, flags=StartFlag(0))


def test_an_exit_tells_status_and_signal_apart() -> None:
    exited = decode_exit(Frame(FrameType.EXIT, 1, struct.pack("<II", 0, 3)))
    killed = decode_exit(Frame(FrameType.EXIT, 1, struct.pack("<II", 1, 9)))
    assert (exited, exited.shell_status) == (ExitStatus(3, None), 3)
    assert (killed, killed.shell_status) == (ExitStatus(None, 9), 137)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_numbers_of_a_wrong_size_are_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        decode_number(Frame(FrameType.HELLO, 0, bytes(size)))
    with pytest.raises(ProtocolError):
        decode_exit(Frame(FrameType.EXIT, 0, bytes(size)))


def test_signal_and_size_are_laid_out_as_the_agent_reads_them() -> None:
    assert encode_signal(2, 15)[12:] == b"\x0f\0\0\0"
    assert encode_resize(2, 0x0102, 0x0304)[12:] == b"\x02\x01\x04\x03"
