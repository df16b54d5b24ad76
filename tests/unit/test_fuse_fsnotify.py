# SPDX-License-Identifier: Apache-2.0
"""FUSE_FSNOTIFY_INIT: what is agreed on, for every pair of what a driver asks and a server can do."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.events.masks import DELIVERABLE, FsEvent
from vhostfs.fuse.fsnotify import (
    FSNOTIFY_INIT_IN_BYTES,
    FSNOTIFY_INIT_OUT_BYTES,
    QUEUE_NOT_PASSED,
    TRANSPORTS,
    Delivery,
    EventAbilities,
    FsnotifyFlag,
    FsnotifyInitIn,
    FsnotifyInitOut,
    negotiate_events,
)
from vhostfs.record import replace

ALL = int(DELIVERABLE)
U32 = st.integers(0, 0xFFFFFFFF)
U64 = st.integers(0, (1 << 64) - 1)
ABLE = EventAbilities(
    flags=int(FsnotifyFlag.VIRTQUEUE | FsnotifyFlag.RENAME | FsnotifyFlag.CHILD), mask=ALL, max_watches=1000
)
OFFER = FsnotifyInitIn(1, 0, 0x19, ALL, 320)


def test_the_request_is_laid_out_as_specified() -> None:
    data = bytes.fromhex("01000000 00000000 1900000000000000 ff1f000000000000 40010000 00000000")
    assert len(data) == FSNOTIFY_INIT_IN_BYTES == 32
    assert FsnotifyInitIn.unpack(data) == FsnotifyInitIn(1, 0, 0x19, 0x1FFF, 320)


def test_the_answer_is_laid_out_as_specified() -> None:
    data = FsnotifyInitOut(1, 0, 0x19, 0x1FFF, 320, 500, 8).pack()
    assert len(data) == FSNOTIFY_INIT_OUT_BYTES == 40
    assert data == bytes.fromhex(
        "01000000 00000000 1900000000000000 ff1f000000000000 40010000 f4010000 08000000 00000000"
    )


@given(data=st.binary(max_size=80))
def test_any_request_is_understood_or_refused(data: bytes) -> None:
    try:
        offer = FsnotifyInitIn.unpack(data)
    except ValueError:
        assert len(data) < FSNOTIFY_INIT_IN_BYTES
        return
    assert len(data) >= 8
    answer = negotiate_events(offer, ABLE)
    assert "\n" not in answer.note


def test_a_newer_minor_is_answered_with_ours_and_its_extra_fields_are_not_looked_at() -> None:
    data = struct.pack("<IIQQII", 1, 7, 0x19, ALL, 320, 0) + bytes(24)
    answer = negotiate_events(FsnotifyInitIn.unpack(data), ABLE)
    assert answer.error == 0
    assert answer.reply.minor == 0


@pytest.mark.parametrize("major", [0, 2, 0xFFFFFFFF])
def test_another_major_is_refused_whatever_follows(major: int) -> None:
    offer = FsnotifyInitIn.unpack(struct.pack("<II", major, 0))
    assert negotiate_events(offer, ABLE).error == errno.EPROTO


@pytest.mark.parametrize("size", [0, 16, 63])
def test_buffers_that_hold_no_element_at_all_are_refused(size: int) -> None:
    answer = negotiate_events(replace(OFFER, buf_size_bytes=size), ABLE)
    assert answer.error == errno.EINVAL
    assert "the smallest element takes 64" in answer.note


@pytest.mark.parametrize("size", [64, 128, 318])
def test_buffers_that_hold_some_elements_are_taken_and_it_is_said_which_are_too_long(size: int) -> None:
    answer = negotiate_events(replace(OFFER, buf_size_bytes=size), ABLE)
    assert answer.error == 0
    assert answer.reply.notify_buf_size_bytes == size
    text = f"names of more than {size - 64} bytes are told as a loss of everything: its driver's buffers hold"
    assert any(text in line for line in answer.reductions)


def test_buffers_for_the_longest_element_are_no_reduction() -> None:
    assert negotiate_events(replace(OFFER, buf_size_bytes=319), ABLE).reductions == ()


def test_a_loss_may_be_about_one_directory_where_the_driver_knows_that() -> None:
    flags = FsnotifyFlag(ABLE.flags) | FsnotifyFlag.DIRECTORY_LOSS
    offer = replace(OFFER, flags=int(flags), buf_size_bytes=100)
    (line,) = negotiate_events(offer, replace(ABLE, flags=int(flags))).reductions
    assert line.endswith("told as a loss of their directory: its driver's buffers hold 100 bytes")


def test_each_thing_that_is_missing_has_a_line_that_says_whose_it_is() -> None:
    able = replace(ABLE, withheld={FsnotifyFlag.RENAME: "because"}, flags=int(FsnotifyFlag.VIRTQUEUE | 0x10))
    offer = replace(OFFER, flags=int(FsnotifyFlag.VIRTQUEUE | FsnotifyFlag.RENAME) | 1 << 40, mask=0x17F)
    assert [
        line.removeprefix("events for the guest: less: ")
        for line in negotiate_events(offer, replace(able, mask=0xFFF)).reductions
    ] == [
        "renames come as plain halves: RENAME is not granted, because",
        "names come without their objects: its driver does not ask for CHILD",
        "not known here: flags 0x10000000000",
        "its driver cannot raise MOVED_TO, DELETE, DELETE_SELF, MOVE_SELF",
    ]


def test_larger_buffers_are_fine() -> None:
    answer = negotiate_events(replace(OFFER, buf_size_bytes=4096), ABLE)
    assert answer.error == 0
    assert answer.reply.notify_buf_size_bytes == 320


def test_a_driver_that_can_raise_nothing_is_refused() -> None:
    assert negotiate_events(replace(OFFER, mask=0), ABLE).error == errno.EINVAL
    assert negotiate_events(replace(OFFER, mask=int(FsEvent.UNMOUNT)), ABLE).error == errno.EINVAL


@given(offered=U64, able=U64, offered_mask=U64, able_mask=U64, minor=U32, size=st.integers(320, 1 << 32))
def test_only_what_both_want_and_can_is_granted(
    offered: int, able: int, offered_mask: int, able_mask: int, minor: int, size: int
) -> None:
    abilities = EventAbilities(flags=able, mask=able_mask, max_watches=5, max_parked=3)
    answer = negotiate_events(FsnotifyInitIn(1, minor, offered, offered_mask, size), abilities)
    if not offered_mask & able_mask:
        assert answer.error == errno.EINVAL
        return
    assert answer.error == 0
    granted = offered & able
    if granted & FsnotifyFlag.VIRTQUEUE:
        granted &= ~FsnotifyFlag.PARKED
    if not granted & TRANSPORTS or not granted & FsnotifyFlag.CHILD:
        granted &= ~FsnotifyFlag.INVALIDATE
    if not granted & FsnotifyFlag.INVALIDATE:
        granted &= ~FsnotifyFlag.DEFERRED_OPEN
    assert answer.reply.flags == granted
    assert answer.driver_mask == offered_mask & able_mask
    assert answer.reply.mask == able_mask
    assert answer.reply.minor == 0
    assert answer.reply.max_watches == 5
    assert answer.reply.max_parked == (3 if granted & FsnotifyFlag.PARKED else 0)
    assert answer.note.count("\n") == 0


def test_the_log_says_what_was_agreed() -> None:
    assert negotiate_events(OFFER, ABLE).note == (
        "events for the guest: by the notification queue (driver 1.0, rename, child)"
    )


def test_the_log_says_when_there_is_no_way_for_events_to_travel_and_why() -> None:
    without = replace(ABLE, flags=ABLE.flags & ~FsnotifyFlag.VIRTQUEUE, no_queue=QUEUE_NOT_PASSED)
    assert not without.can_deliver
    refused = negotiate_events(OFFER, without)
    assert refused.error == 0
    assert not refused.reply.flags & TRANSPORTS
    assert QUEUE_NOT_PASSED in refused.note
    assert "this server parks no requests" in refused.note
    unasked = negotiate_events(replace(OFFER, flags=int(FsnotifyFlag.CHILD)), ABLE)
    assert "did not ask for the notification queue" in unasked.note


def test_parked_requests_are_the_second_choice_and_the_log_says_what_the_first_lacks() -> None:
    both = FsnotifyFlag.VIRTQUEUE | FsnotifyFlag.PARKED
    able = replace(ABLE, flags=ABLE.flags | FsnotifyFlag.PARKED, max_parked=8)
    offer = replace(OFFER, flags=OFFER.flags | both)
    first = negotiate_events(offer, able)
    assert first.reply.flags & both == FsnotifyFlag.VIRTQUEUE
    assert first.reply.max_parked == 0
    no_queue = replace(able, flags=able.flags & ~FsnotifyFlag.VIRTQUEUE, no_queue=QUEUE_NOT_PASSED)
    second = negotiate_events(offer, no_queue)
    assert second.reply.flags & both == FsnotifyFlag.PARKED
    assert second.reply.max_parked == 8
    assert second.note == (
        "events for the guest: by parked requests (driver 1.0, rename, child): "
        "this VMM does not pass VIRTIO_FS_F_NOTIFICATION (QEMU: needs vhost-user-test-device-pci of 10.1 "
        "or later, or the patch and notification=on)"
    )
    assert (second.delivery, second.missing) == (Delivery.PARKED, QUEUE_NOT_PASSED)
    chosen = negotiate_events(replace(offer, flags=int(FsnotifyFlag.PARKED)), able)
    assert chosen.reply.flags == FsnotifyFlag.PARKED
    assert "did not ask for the notification queue" in chosen.note


def test_the_log_says_when_the_driver_knows_neither_way() -> None:
    able = replace(ABLE, flags=ABLE.flags | FsnotifyFlag.PARKED)
    neither = negotiate_events(replace(OFFER, flags=int(FsnotifyFlag.CHILD)), able)
    assert not neither.reply.flags & TRANSPORTS
    assert "neither way" in neither.note


def test_a_driver_that_wants_neither_way_is_told_of_both() -> None:
    able = replace(
        ABLE, flags=int(FsnotifyFlag.PARKED | FsnotifyFlag.CHILD), max_parked=8, no_queue=QUEUE_NOT_PASSED
    )
    answer = negotiate_events(replace(OFFER, flags=int(FsnotifyFlag.CHILD)), able)
    assert (
        answer.note == "events for the guest: none (driver 1.0, child): "
        f"{QUEUE_NOT_PASSED}, and its driver did not ask for parked requests"
    )


def test_an_offer_that_is_refused_delivers_nothing_and_says_why() -> None:
    answer = negotiate_events(replace(OFFER, buf_size_bytes=16), ABLE)
    assert answer.delivery is Delivery.NONE
    assert answer.offer is not None
    assert answer.offer.buf_size_bytes == 16
    assert answer.missing == answer.note
    assert answer.note == (
        "its driver's offer is refused: its buffers hold 16 bytes, the smallest element takes 64 (EINVAL)"
    )


def test_what_is_best_lacks_nothing() -> None:
    answer = negotiate_events(OFFER, ABLE)
    assert (answer.delivery, answer.missing) == (Delivery.VIRTQUEUE, "")
