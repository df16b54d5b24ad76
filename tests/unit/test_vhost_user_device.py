# SPDX-License-Identifier: Apache-2.0
"""The vhost-user device state machine: what a front end says, and what the back end is then asked to do."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostfs.vhost_user.actions import (
    Action,
    AddRegion,
    MapMemory,
    QueueRole,
    RemoveRegion,
    ResetDevice,
    SetCall,
    SetErr,
    StartQueue,
    StopQueue,
)
from vhostfs.vhost_user.device import MAX_MEMORY_SLOTS, Device, DeviceOptions, DeviceState
from vhostfs.vhost_user.messages import (
    MESSAGES,
    U64,
    ConfigAccess,
    Empty,
    FrontEndRequest,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolError,
    ProtocolFeature,
    SingleRegion,
    Unparsed,
    VringAddress,
    VringFile,
    VringState,
    serialize,
)
from vhostfs.virtio.features import DeviceStatus, VirtioFeature

from .vhost_user_model import HIGH_REGION, MODERN, REGION, Machine

R = FrontEndRequest
F = ProtocolFeature


# ---- offers and negotiation -----------------------------------------------------------------------------


def test_what_is_offered() -> None:
    machine = Machine()
    assert machine.get(R.GET_FEATURES) == (1 << 28) | (1 << 29) | (1 << 30) | (1 << 32)
    assert F(machine.get(R.GET_PROTOCOL_FEATURES)) == (
        F.MQ | F.REPLY_ACK | F.BACKEND_REQ | F.CONFIG | F.CONFIGURE_MEM_SLOTS | F.RESET_DEVICE | F.STATUS
    )
    machine.negotiate()
    assert machine.get(R.GET_QUEUE_NUM) == 6
    assert machine.get(R.GET_MAX_MEM_SLOTS) == MAX_MEMORY_SLOTS


def test_config_is_offered_only_with_a_configuration_space() -> None:
    machine = Machine(DeviceOptions(max_queues=2))
    assert not machine.get(R.GET_PROTOCOL_FEATURES) & F.CONFIG


@pytest.mark.parametrize("notification_offered", [False, True])
@pytest.mark.parametrize(
    "acked",
    [
        sum(bits)
        for count in range(5)
        for bits in itertools.combinations(
            [
                VirtioFeature.FS_NOTIFICATION,
                VirtioFeature.RING_INDIRECT_DESC,
                VirtioFeature.RING_EVENT_IDX,
                VirtioFeature.PROTOCOL_FEATURES,
            ],
            count,
        )
    ],
)
def test_every_combination_of_features_decides_roles_ring_format_and_whether_rings_begin_enabled(
    notification_offered: bool, acked: int
) -> None:
    machine = Machine(DeviceOptions(max_queues=6, notification=notification_offered))
    features = acked | VirtioFeature.VERSION_1
    if acked & VirtioFeature.FS_NOTIFICATION and not notification_offered:
        with pytest.raises(ProtocolError, match="fs_notification were not offered"):
            machine.negotiate(features)
        machine.close()
        return
    machine.negotiate(features)
    assert machine.features_acked == [features]
    for index in range(3):
        machine.set_up_ring(index)
    starts_enabled = not acked & VirtioFeature.PROTOCOL_FEATURES
    assert machine.running == ({0, 1, 2} if starts_enabled else set())
    for index in range(3):
        machine.enable(index)
    configs = machine.back_end.running
    notification = bool(acked & VirtioFeature.FS_NOTIFICATION)
    assert [configs[index].role for index in range(3)] == [
        QueueRole.HIPRIO,
        QueueRole.NOTIFICATION if notification else QueueRole.REQUEST,
        QueueRole.REQUEST,
    ]
    for config in configs.values():
        assert config.event_idx == bool(acked & VirtioFeature.RING_EVENT_IDX)
        assert config.indirect == bool(acked & VirtioFeature.RING_INDIRECT_DESC)
    machine.close()


GATED = [(request, spec.needs) for request, spec in MESSAGES.items() if spec.needs]


@pytest.mark.parametrize(("request_number", "needs"), GATED)
def test_a_message_of_a_protocol_feature_that_was_not_negotiated_ends_the_connection(
    request_number: int, needs: ProtocolFeature
) -> None:
    payloads: dict[int, Payload] = {
        R.GET_CONFIG: ConfigAccess(0, 0, b"\0"),
        R.SET_CONFIG: ConfigAccess(0, 0, b"\0"),
        R.ADD_MEM_REG: SingleRegion(HIGH_REGION),
        R.REM_MEM_REG: SingleRegion(REGION),
        R.SET_STATUS: U64(1),
    }
    fds = int(request_number in (R.ADD_MEM_REG, R.SET_BACKEND_REQ_FD))
    payload = payloads.get(request_number, Empty())
    machine = Machine()
    machine.negotiate()
    machine.send(R.SET_PROTOCOL_FEATURES, U64(machine.get(R.GET_PROTOCOL_FEATURES) & ~needs))
    with pytest.raises(ProtocolError, match=f"protocol feature {needs.name} was not negotiated"):
        machine.send(request_number, payload, fds=fds)
    machine.close()


def test_features_that_were_not_offered_end_the_connection() -> None:
    machine = Machine()
    machine.send(R.SET_OWNER)
    with pytest.raises(ProtocolError, match="SET_FEATURES: features ring_packed were not offered"):
        machine.send(R.SET_FEATURES, U64(MODERN | VirtioFeature.RING_PACKED))


def test_protocol_features_that_were_not_offered_end_the_connection() -> None:
    with pytest.raises(ProtocolError, match="protocol features inflight_shmfd were not offered"):
        Machine().send(R.SET_PROTOCOL_FEATURES, U64(F.INFLIGHT_SHMFD))


def test_a_legacy_driver_is_refused() -> None:
    machine = Machine()
    machine.send(R.SET_PROTOCOL_FEATURES, U64(F.REPLY_ACK))
    machine.send(R.SET_OWNER)
    assert not machine.acknowledged(R.SET_FEATURES, U64(VirtioFeature.PROTOCOL_FEATURES))
    assert "version_1" in machine.notices[0]


def test_masks_take_features_away() -> None:
    options = DeviceOptions(
        max_queues=2,
        config=bytes(44),
        feature_mask=~VirtioFeature.RING_EVENT_IDX,
        protocol_feature_mask=~F.STATUS,
    )
    machine = Machine(options)
    assert not machine.get(R.GET_FEATURES) & VirtioFeature.RING_EVENT_IDX
    assert not machine.get(R.GET_PROTOCOL_FEATURES) & F.STATUS


@pytest.mark.parametrize(
    "request_number",
    sorted(
        set(MESSAGES)
        - {
            R.GET_FEATURES,
            R.GET_PROTOCOL_FEATURES,
            R.SET_PROTOCOL_FEATURES,
            R.GET_QUEUE_NUM,
            R.GET_MAX_MEM_SLOTS,
            R.GET_CONFIG,
            R.GET_STATUS,
            R.SET_BACKEND_REQ_FD,
            R.SET_OWNER,
        }
    ),
)
def test_before_set_owner_little_is_possible(request_number: int) -> None:
    payload, fds = EXAMPLES[FrontEndRequest(request_number)]
    machine = Machine()
    machine.send(R.SET_PROTOCOL_FEATURES, U64(machine.get(R.GET_PROTOCOL_FEATURES)))
    with pytest.raises(ProtocolError, match="not possible while the device is NEW"):
        machine.send(request_number, payload, fds=fds)
    machine.close()


def test_set_owner_again_begins_anew_as_for_another_device_on_the_connection() -> None:
    machine = Machine()
    machine.negotiate()
    for index in range(2):
        machine.set_up_ring(index)
        machine.send(R.SET_VRING_ERR, VringFile(index, True), fds=1)
        machine.enable(index)
    machine.send(R.SET_BACKEND_REQ_FD, fds=1)
    machine.send(R.SET_STATUS, U64(0x0F))
    machine.device.device_failed()
    machine.send(R.SET_OWNER)
    assert isinstance(machine.back_end.log[-1], ResetDevice)
    assert machine.running == set()
    assert machine.back_end.regions == ()
    assert len(machine.ledger.open) == 1, "the back end's channel alone is kept"
    seen = machine.device.negotiated
    assert (seen.state, seen.features_acked, seen.status) == (DeviceState.OWNED, 0, 0)
    assert seen.protocol_features_acked == seen.protocol_features_offered
    assert machine.get_base(1) == 0
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    assert machine.running == {1}
    machine.close()


def test_memory_regions_of_the_device_before_do_not_stand_in_the_way() -> None:
    machine = Machine()
    for _ in range(2):
        machine.negotiate(memory=False)
        assert machine.acknowledged(R.ADD_MEM_REG, SingleRegion(REGION), fds=1)
    machine.close()


# ---- acknowledgements -----------------------------------------------------------------------------------


def test_need_reply_is_ignored_until_reply_ack_is_negotiated() -> None:
    machine = Machine()
    assert machine.send(R.SET_OWNER, ack=True) == b""
    assert machine.send(R.SET_PROTOCOL_FEATURES, U64(F.REPLY_ACK), ack=True) == bytes(8)
    assert machine.acknowledged(R.SET_FEATURES, U64(MODERN))


def test_a_message_with_a_reply_of_its_own_is_answered_once() -> None:
    machine = Machine()
    machine.negotiate()
    for request in (R.GET_FEATURES, R.GET_QUEUE_NUM, R.GET_STATUS, R.GET_MAX_MEM_SLOTS):
        assert len(machine.send(request, ack=True)) == 8
    assert machine.send(R.GET_VRING_BASE, VringState(0, 0), ack=True) == bytes(8)


def test_the_acknowledgement_waits_for_the_action() -> None:
    machine = Machine()
    machine.negotiate(memory=False)
    data = serialize(R.SET_MEM_TABLE, HeaderFlag.NEED_REPLY, MemoryTable((REGION,)))
    machine.device.receive(data[:12], machine.ledger.new(1))
    assert machine.device.next_action() is None
    machine.device.receive(data[12:])
    action = machine.device.next_action()
    assert isinstance(action, MapMemory)
    with pytest.raises(RuntimeError):
        machine.device.next_action()
    with pytest.raises(RuntimeError):
        machine.device.receive(b"")
    machine.device.action_done(0)
    assert len(machine.run()) == 20


@pytest.mark.parametrize("request_number", [R.SET_LOG_BASE, R.GET_INFLIGHT_FD, R.IOTLB_MSG, 77])
def test_an_unknown_message_is_refused_if_asked_else_ends_the_connection(request_number: int) -> None:
    machine = Machine()
    machine.negotiate()
    assert not machine.acknowledged(request_number, Unparsed(bytes(16)), fds=1)
    assert "not offered" in machine.notices[-1]
    with pytest.raises(ProtocolError, match="not offered"):
        machine.send(request_number, Unparsed(bytes(16)), fds=2)
    machine.close()


def test_set_config_is_refused() -> None:
    machine = Machine()
    machine.negotiate()
    assert not machine.acknowledged(R.SET_CONFIG, ConfigAccess(0, 0, b"\1"))


# ---- memory ---------------------------------------------------------------------------------------------


def test_a_failed_mapping_is_told() -> None:
    machine = Machine()
    machine.negotiate(memory=False)
    machine.back_end.fail = lambda action: -errno.ENOMEM if isinstance(action, MapMemory | AddRegion) else 0
    assert not machine.acknowledged(R.SET_MEM_TABLE, MemoryTable((REGION,)), fds=1)
    assert "ENOMEM" in machine.notices[-1]
    assert not machine.acknowledged(R.ADD_MEM_REG, SingleRegion(REGION), fds=1)
    with pytest.raises(ProtocolError, match="ENOMEM"):
        machine.send(R.SET_MEM_TABLE, MemoryTable((REGION,)), fds=1)
    machine.close()


def test_memory_descriptors_are_closed_once_they_are_mapped() -> None:
    machine = Machine()
    machine.negotiate()
    machine.send(R.ADD_MEM_REG, SingleRegion(HIGH_REGION), fds=1)
    assert not machine.ledger.open


def test_replacing_memory_pauses_running_queues_and_keeps_their_place() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1, base=3)
    machine.enable(1)
    machine.back_end.next_base = 17
    machine.back_end.log.clear()
    assert machine.acknowledged(R.SET_MEM_TABLE, MemoryTable((REGION, HIGH_REGION)), fds=2)
    kinds = [type(action) for action in machine.back_end.log]
    assert kinds == [StopQueue, MapMemory, StartQueue]
    assert machine.back_end.running[1].base == 17
    machine.close()


def test_a_queue_whose_region_is_removed_waits_for_it_to_come_back() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(0)
    machine.enable(0)
    machine.back_end.next_base = 5
    assert machine.acknowledged(R.REM_MEM_REG, SingleRegion(REGION))
    assert machine.running == set()
    assert "queue 0 waits" in machine.notices[-1]
    assert machine.acknowledged(R.ADD_MEM_REG, SingleRegion(REGION), fds=1)
    assert machine.back_end.running[0].base == 5
    machine.close()


def test_a_queue_that_a_new_memory_table_leaves_out_waits_for_the_next() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(0)
    machine.enable(0)
    assert machine.acknowledged(R.SET_MEM_TABLE, MemoryTable((HIGH_REGION,)), fds=1)
    assert "queue 0 waits" in machine.notices[-1]
    assert machine.acknowledged(R.SET_MEM_TABLE, MemoryTable((REGION, HIGH_REGION)), fds=2)
    assert machine.running == {0}
    machine.close()


def test_removing_another_region_leaves_a_queue_alone() -> None:
    machine = Machine()
    machine.negotiate()
    machine.send(R.ADD_MEM_REG, SingleRegion(HIGH_REGION), fds=1)
    machine.set_up_ring(0)
    machine.enable(0)
    machine.back_end.log.clear()
    # The mmap offset is not part of a region's identity; a descriptor is accepted and closed unused.
    moved = MemoryRegion(HIGH_REGION.guest_addr, HIGH_REGION.size_bytes, HIGH_REGION.user_addr, 0)
    assert machine.acknowledged(R.REM_MEM_REG, SingleRegion(moved), fds=1)
    assert machine.back_end.log == [RemoveRegion(HIGH_REGION)]
    machine.close()


def test_removing_what_is_not_mapped_is_refused() -> None:
    machine = Machine()
    machine.negotiate()
    assert not machine.acknowledged(R.REM_MEM_REG, SingleRegion(HIGH_REGION))


def test_a_region_that_overlaps_ends_the_connection() -> None:
    machine = Machine()
    machine.negotiate()
    with pytest.raises(ProtocolError, match="overlaps"):
        machine.send(R.ADD_MEM_REG, SingleRegion(REGION), fds=1)
    machine.close()


def test_memory_slots_are_bounded() -> None:
    machine = Machine()
    machine.negotiate(memory=False)
    for at in range(MAX_MEMORY_SLOTS):
        machine.send(R.ADD_MEM_REG, SingleRegion(MemoryRegion(at << 20, 1 << 20, at << 20, 0)), fds=1)
    with pytest.raises(ProtocolError, match="more than 509"):
        machine.send(R.ADD_MEM_REG, SingleRegion(MemoryRegion(1 << 40, 1, 1 << 40, 0)), fds=1)
    machine.close()


# ---- vrings ---------------------------------------------------------------------------------------------


def test_qemu_kicks_before_it_enables_and_enables_queues_that_it_never_set_up() -> None:
    machine = Machine()
    machine.negotiate()
    for index in range(2):
        machine.set_up_ring(index)
    assert machine.running == set()
    for index in range(6):
        machine.enable(index)
    assert machine.running == {0, 1}
    for index in range(6):
        machine.enable(index, 0)
    assert machine.running == set()
    machine.back_end.next_base = 0
    assert [machine.get_base(index) for index in range(6)] == [0] * 6
    machine.close()


SETUP_STEPS = ["memory", "num", "addr", "kick", "enable", "features"]


@pytest.mark.parametrize(
    "order",
    [order for order in itertools.permutations(SETUP_STEPS) if order.index("memory") < order.index("addr")],
)
def test_a_queue_starts_with_the_last_thing_it_needs_whatever_the_order(order: tuple[str, ...]) -> None:
    machine = Machine()
    machine.send(R.SET_PROTOCOL_FEATURES, U64(F.REPLY_ACK))
    machine.send(R.SET_OWNER)
    at = REGION.user_addr
    for step in order:
        assert machine.running == set()
        match step:
            case "memory":
                machine.send(R.SET_MEM_TABLE, MemoryTable((REGION,)), fds=1)
            case "num":
                machine.send(R.SET_VRING_NUM, VringState(0, 8))
            case "addr":
                machine.send(R.SET_VRING_ADDR, VringAddress(0, 0, at, at + 0x200, at + 0x100, 0))
            case "kick":
                machine.send(R.SET_VRING_KICK, VringFile(0, True), fds=1)
            case "enable":
                machine.enable(0)
            case "features":
                machine.send(R.SET_FEATURES, U64(MODERN))
    assert machine.running == {0}
    machine.close()


def test_a_disabled_queue_goes_on_where_it_was() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    machine.back_end.next_base = 65535
    machine.enable(1, 0)
    machine.enable(1)
    assert machine.back_end.running[1].base == 65535


def test_get_vring_base_stops_a_queue_until_it_is_kicked_again() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    machine.back_end.next_base = 42
    assert machine.get_base(1) == 42
    assert machine.running == set()
    machine.enable(1)
    assert machine.running == set()
    machine.send(R.SET_VRING_KICK, VringFile(1, True), fds=1)
    assert machine.back_end.running[1].base == 42
    machine.close()


def test_get_vring_base_of_a_queue_that_never_ran_gives_what_was_set() -> None:
    machine = Machine()
    machine.negotiate()
    machine.send(R.SET_VRING_BASE, VringState(3, 9))
    assert machine.get_base(3) == 9


def test_a_queue_that_stops_badly_still_answers_get_vring_base() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1, base=7)
    machine.enable(1)
    machine.back_end.fail = lambda action: -errno.EIO if isinstance(action, StopQueue) else 0
    assert machine.get_base(1) == 7
    assert "EIO" in machine.notices[-1]


def test_a_queue_that_cannot_start_is_told_and_not_tried_again_until_it_is_kicked_anew() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.back_end.fail = lambda action: -errno.EFAULT if isinstance(action, StartQueue) else 0
    assert not machine.acknowledged(R.SET_VRING_ENABLE, VringState(1, 1))
    assert "queue 1 cannot start: Bad address (EFAULT)" in machine.notices[-1]
    machine.back_end.fail = lambda _action: 0
    assert machine.acknowledged(R.SET_VRING_ENABLE, VringState(1, 1))
    assert machine.running == set()
    machine.send(R.SET_VRING_KICK, VringFile(1, True), fds=1)
    assert machine.running == {1}
    machine.close()


def test_call_and_err_of_a_running_queue_are_exchanged_without_a_stop() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    machine.back_end.log.clear()
    machine.send(R.SET_VRING_CALL, VringFile(1, True), fds=1)
    machine.send(R.SET_VRING_ERR, VringFile(1, True), fds=1)
    machine.send(R.SET_VRING_CALL, VringFile(1, False))
    kinds: list[type[Action]] = [type(action) for action in machine.back_end.log]
    assert kinds == [SetCall, SetErr, SetCall]
    assert machine.back_end.log[-1] == SetCall(1, -1)
    machine.close()


def test_a_new_kick_restarts_a_running_queue() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    machine.back_end.next_base = 2
    machine.send(R.SET_VRING_KICK, VringFile(1, True), fds=1)
    assert machine.back_end.running[1].base == 2
    machine.close()


def test_a_polled_queue_is_refused() -> None:
    machine = Machine()
    machine.negotiate()
    assert not machine.acknowledged(R.SET_VRING_KICK, VringFile(0, False))


@pytest.mark.parametrize("size", [0, 3, 65536, 0xFFFFFFFF])
def test_impossible_sizes_end_the_connection(size: int) -> None:
    machine = Machine()
    machine.negotiate()
    with pytest.raises(ProtocolError, match="not a power of two"):
        machine.send(R.SET_VRING_NUM, VringState(0, size))


@pytest.mark.parametrize(
    ("request_number", "payload", "text"),
    [
        (R.SET_VRING_NUM, VringState(6, 8), "queue 6, but there are 6"),
        (R.SET_VRING_BASE, VringState(0xFFFFFFFF, 0), "queue 4294967295"),
        (R.GET_VRING_BASE, VringState(6, 0), "queue 6"),
        (R.SET_VRING_ENABLE, VringState(6, 1), "queue 6"),
        (R.SET_VRING_ENABLE, VringState(0, 2), "expected 0 or 1"),
        (R.SET_VRING_KICK, VringFile(255, True), "queue 255"),
        (R.SET_VRING_BASE, VringState(0, 65536), "exceeds 65535"),
        (R.SET_VRING_ADDR, VringAddress(0, 0, REGION.user_addr + 8, 0, 0, 0), "not aligned to 16"),
        (R.SET_VRING_ADDR, VringAddress(0, 0, 0x1000, 0x2000, 0x3000, 0), "in no memory region"),
        (R.SET_STATUS, U64(0x100), "exceeds 8 bits"),
    ],
)
def test_impossible_values_end_the_connection(request_number: R, payload: Payload, text: str) -> None:
    machine = Machine()
    machine.negotiate()
    with pytest.raises(ProtocolError, match=text):
        machine.send(request_number, payload, fds=int(request_number == R.SET_VRING_KICK), ack=True)
    machine.close()


@pytest.mark.parametrize(
    ("request_number", "payload"),
    [
        (R.SET_VRING_NUM, VringState(1, 16)),
        (R.SET_VRING_BASE, VringState(1, 0)),
        (R.SET_VRING_ADDR, VringAddress(1, 0, REGION.user_addr, REGION.user_addr, REGION.user_addr, 0)),
        (R.SET_FEATURES, U64(MODERN | VirtioFeature.RING_EVENT_IDX)),
    ],
)
def test_a_running_queue_cannot_be_changed(request_number: R, payload: Payload) -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    with pytest.raises(ProtocolError, match="run"):
        machine.send(request_number, payload)
    machine.close()


def test_a_ring_that_reaches_beyond_its_region_is_refused() -> None:
    machine = Machine()
    machine.negotiate()
    end = REGION.user_addr + REGION.size_bytes
    machine.send(R.SET_VRING_NUM, VringState(0, 32768))
    at = REGION.user_addr
    machine.send(R.SET_VRING_ADDR, VringAddress(0, 0, end - 16, at, at + 0x80000, 0))
    machine.send(R.SET_VRING_KICK, VringFile(0, True), fds=1)
    assert not machine.acknowledged(R.SET_VRING_ENABLE, VringState(0, 1))
    assert "in no memory region" in machine.notices[-1]
    assert machine.running == set()
    machine.close()


# ---- configuration space, status, reset -----------------------------------------------------------------


@pytest.mark.parametrize(("offset", "size_bytes"), [(0, 44), (0, 40), (36, 4), (43, 1), (44, 0)])
def test_get_config_gives_the_part_that_was_asked_for(offset: int, size_bytes: int) -> None:
    machine = Machine()
    machine.negotiate()
    reply = machine.send(R.GET_CONFIG, ConfigAccess(offset, 0, bytes(size_bytes)))
    assert len(reply) == 12 + size_bytes
    assert reply[12:] == bytes(range(offset, offset + size_bytes))


@pytest.mark.parametrize(("offset", "size_bytes"), [(0, 45), (44, 1), (0xFFFFFFFF, 1), (0, 256)])
def test_get_config_beyond_the_end_has_an_empty_reply(offset: int, size_bytes: int) -> None:
    machine = Machine()
    machine.negotiate()
    reply = machine.feed(serialize(R.GET_CONFIG, 0, ConfigAccess(offset, 0, bytes(size_bytes))))
    assert reply == serialize(R.GET_CONFIG, HeaderFlag.REPLY, Empty())


def test_status_is_kept_and_shows_that_a_reset_is_needed() -> None:
    machine = Machine()
    machine.negotiate()
    machine.send(R.SET_STATUS, U64(0x0F))
    assert machine.get(R.GET_STATUS) == 0x0F
    machine.device.device_failed()
    machine.send(R.SET_STATUS, U64(0x0F))
    assert machine.get(R.GET_STATUS) == 0x0F | DeviceStatus.NEEDS_RESET
    machine.send(R.SET_STATUS, U64(0))
    assert machine.get(R.GET_STATUS) == 0


def test_features_ok_does_not_stick_without_features() -> None:
    machine = Machine()
    machine.send(R.SET_PROTOCOL_FEATURES, U64(F.STATUS))
    machine.send(R.SET_OWNER)
    machine.send(R.SET_STATUS, U64(0x0B))
    assert machine.get(R.GET_STATUS) == 0x03


def test_status_0_stops_queues_but_keeps_session_and_bases_for_a_guest_that_was_only_paused() -> None:
    machine = Machine()
    machine.negotiate()
    machine.set_up_ring(1)
    machine.enable(1)
    machine.back_end.next_base = 11
    machine.send(R.SET_STATUS, U64(0))
    assert machine.running == set()
    assert not any(isinstance(action, ResetDevice) for action in machine.back_end.log)
    assert machine.get_base(1) == 11
    machine.close()


def test_reset_device_stops_everything_and_ends_the_session() -> None:
    machine = Machine()
    machine.negotiate()
    for index in range(2):
        machine.set_up_ring(index)
        machine.enable(index)
    machine.back_end.next_base = 11
    assert machine.acknowledged(R.RESET_DEVICE)
    assert isinstance(machine.back_end.log[-1], ResetDevice)
    assert machine.device.negotiated.state is DeviceState.OWNED
    assert machine.get_base(1) == 0
    machine.send(R.SET_FEATURES, U64(MODERN))
    machine.set_up_ring(1)
    machine.enable(1)
    assert machine.running == {1}
    machine.close()


def test_a_back_end_channel_is_kept_and_replaced() -> None:
    machine = Machine()
    machine.negotiate()
    for _ in range(2):
        machine.send(R.SET_BACKEND_REQ_FD, fds=1)
    assert len(machine.ledger.open) == 1
    machine.close()


def test_what_was_negotiated_can_be_seen() -> None:
    machine = Machine()
    machine.negotiate(protocol=F.MQ | F.REPLY_ACK)
    machine.set_up_ring(1, size=128)
    machine.enable(1)
    seen = machine.device.negotiated
    assert seen.state is DeviceState.NEGOTIATED
    assert seen.features_acked == MODERN
    assert seen.protocol_features_acked == F.MQ | F.REPLY_ACK
    assert seen.queue_sizes == {1: 128}
    assert seen.regions == (REGION,)
    assert str(seen) == "features protocol_features version_1; protocol mq reply_ack"


# ---- anything at all ------------------------------------------------------------------------------------

EXAMPLES: dict[FrontEndRequest, tuple[Payload, int]] = {
    R.SET_FEATURES: (U64(MODERN), 0),
    R.RESET_OWNER: (Empty(), 0),
    R.SET_MEM_TABLE: (MemoryTable((REGION,)), 1),
    R.SET_VRING_NUM: (VringState(0, 8), 0),
    R.SET_VRING_ADDR: (VringAddress(0, 0, 0, 0, 0, 0), 0),
    R.SET_VRING_BASE: (VringState(0, 0), 0),
    R.GET_VRING_BASE: (VringState(0, 0), 0),
    R.SET_VRING_KICK: (VringFile(0, True), 1),
    R.SET_VRING_CALL: (VringFile(0, True), 1),
    R.SET_VRING_ERR: (VringFile(0, True), 1),
    R.SET_VRING_ENABLE: (VringState(0, 1), 0),
    R.SET_CONFIG: (ConfigAccess(0, 0, b"\0"), 0),
    R.RESET_DEVICE: (Empty(), 0),
    R.ADD_MEM_REG: (SingleRegion(REGION), 1),
    R.REM_MEM_REG: (SingleRegion(REGION), 0),
    R.SET_STATUS: (U64(1), 0),
}

indexes = st.sampled_from([0, 1, 2, 2, 6, 255])
some_regions = st.sampled_from([REGION, HIGH_REGION, MemoryRegion(0x100, 0x1000, 0x1000, 0)])
some_addresses = st.sampled_from([REGION.user_addr, REGION.user_addr + 0x4000, HIGH_REGION.user_addr, 0, 8])
features = st.sampled_from([MODERN, MODERN, VirtioFeature.VERSION_1, 0, (1 << 64) - 1])
protocol_features = st.sampled_from([0x1A229, 0x1A229, 0x1A229, F.REPLY_ACK, 0, 1 << 63])


def steps_of(request: R) -> st.SearchStrategy[tuple[int, Payload, int]]:
    payload: st.SearchStrategy[Payload]
    fds: st.SearchStrategy[int] = st.just(0)
    match request:
        case R.SET_FEATURES:
            payload = st.builds(U64, features)
        case R.SET_PROTOCOL_FEATURES:
            payload = st.builds(U64, protocol_features)
        case R.SET_STATUS:
            payload = st.builds(U64, st.sampled_from([0, 1, 15, 256]))
        case R.SET_VRING_NUM:
            payload = st.builds(VringState, indexes, st.sampled_from([8, 8, 16, 32768, 0, 7]))
        case R.SET_VRING_BASE | R.GET_VRING_BASE | R.SET_VRING_ENABLE:
            payload = st.builds(VringState, indexes, st.sampled_from([0, 1, 1, 65536]))
        case R.SET_VRING_ADDR:
            address = some_addresses
            payload = st.builds(VringAddress, indexes, st.just(0), address, address, address, st.just(0))
        case R.SET_VRING_KICK | R.SET_VRING_CALL | R.SET_VRING_ERR:
            payload = st.builds(VringFile, indexes, st.booleans())
            fds = st.sampled_from([0, 1, 1, 2])
        case R.SET_MEM_TABLE:
            payload = st.builds(lambda some: MemoryTable(tuple(some)), st.lists(some_regions, max_size=3))
            fds = st.sampled_from([0, 1, 1, 2])
        case R.ADD_MEM_REG | R.REM_MEM_REG:
            payload = st.builds(SingleRegion, some_regions)
            fds = st.sampled_from([0, 1, 1])
        case R.GET_CONFIG | R.SET_CONFIG:
            payload = st.builds(
                ConfigAccess, st.sampled_from([0, 40, 1 << 31]), st.just(0), st.binary(max_size=50)
            )
        case R.SET_BACKEND_REQ_FD:
            payload, fds = st.just(Empty()), st.just(1)
        case _ if request in MESSAGES:
            payload = st.just(Empty())
        case _:
            payload, fds = st.builds(Unparsed, st.binary(max_size=40)), st.integers(0, 3)
    return st.tuples(st.just(int(request)), payload, fds)


any_steps = st.lists(
    st.tuples(
        st.sampled_from(list(FrontEndRequest)).flatmap(steps_of),
        st.booleans(),
        st.sampled_from([0, 0, 0, 0, -errno.ENOMEM]),
    ),
    max_size=60,
)


@settings(
    max_examples=int(os.environ.get("VHOSTFS_EXAMPLES", "300")), suppress_health_check=[HealthCheck.too_slow]
)
@given(steps=any_steps, is_negotiated=st.booleans(), base=st.integers(0, 65535))
def test_whatever_comes_the_back_end_gets_only_what_it_can_do_and_no_descriptor_leaks(
    steps: list[tuple[tuple[int, Payload, int], bool, int]], is_negotiated: bool, base: int
) -> None:
    machine = Machine()
    machine.back_end.next_base = base
    try:
        if is_negotiated:
            machine.negotiate()
            for index in range(2):
                machine.set_up_ring(index)
        for (request, payload, fds), ack, error in steps:
            machine.back_end.fail = lambda _action, error=error: error  # type: ignore[misc]
            flags = HeaderFlag.NEED_REPLY if ack else 0
            machine.feed(serialize(request, flags, payload), machine.ledger.new(fds))
    except ProtocolError as error:
        line = str(error)
    else:
        line = "nothing wrong"
    assert line
    assert "\n" not in line
    machine.close()


@given(data=st.binary(min_size=1, max_size=600))
def test_noise_is_a_protocol_error_or_waits_for_more(data: bytes) -> None:
    machine = Machine()
    with contextlib.suppress(ProtocolError):
        machine.feed(data, machine.ledger.new(1))
    machine.close()


def test_a_connection_that_ends_during_an_action_leaks_nothing() -> None:
    machine = Machine()
    machine.negotiate(memory=False)
    data = serialize(R.SET_MEM_TABLE, 0, MemoryTable((REGION,)))
    machine.device.receive(data[:12], machine.ledger.new(1))
    machine.device.receive(data[12:])
    assert isinstance(machine.device.next_action(), MapMemory)
    machine.close()


def test_too_many_queues_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="max_queues 257"):
        Device(DeviceOptions(max_queues=257))
