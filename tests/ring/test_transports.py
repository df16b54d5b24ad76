# SPDX-License-Identifier: Apache-2.0
"""Every way to lay out rings and memory serves the same: sizes, indirect or not, EVENT_IDX or not, regions.

Must not test operations beyond one round trip of data. Specification: virtio 1.2, section 2.7.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random

import pytest

from tests.ring.share import Share
from tests.server import awaited
from vhostfs.frontend import Feature, Framing, FuseClient, Machine, ProtocolFeature
from vhostfs.frontend import operations as op
from vhostfs.frontend.ring import AVAIL_F_NO_INTERRUPT
from vhostfs.frontend.vmm import ALL_PROTOCOL_FEATURES

CONTENT = random.Random(5).randbytes(300_000)


def round_trip(fs: FuseClient) -> None:
    """Names, small requests, bulk data and a listing."""
    directory = fs.mkdir(fs.root, "dir")
    entry, opened = fs.create(directory.nodeid, "file")
    for start in range(0, len(CONTENT), 100_000):
        assert fs.write(entry.nodeid, opened.fh, CONTENT[start : start + 100_000], start) == 100_000
    for start, size in ((0, 131_072), (131_072, 131_072), (1, 50_000), (299_999, 4096)):
        assert fs.read(entry.nodeid, opened.fh, size, start) == CONTENT[start : start + size]
    fs.release(entry.nodeid, opened.fh)
    assert fs.list(directory.nodeid, 8192) == [b"file"]
    fs.unlink(directory.nodeid, "file")
    fs.forget(entry.nodeid)
    fs.rmdir(fs.root, "dir")
    fs.forget(directory.nodeid)


def features(event_idx: bool, indirect: bool) -> Feature:
    chosen = Feature.VERSION_1
    chosen |= Feature.EVENT_IDX if event_idx else Feature(0)
    return chosen | (Feature.INDIRECT_DESC if indirect else Feature(0))


@pytest.mark.parametrize("regions", [1, 2, 5])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
def test_every_combination_of_features_serves(
    share: Share, event_idx: bool, indirect: bool, regions: int
) -> None:
    machine = Machine(features=features(event_idx, indirect)).with_regions(regions)
    fs = share.mount(machine)
    fs.session.use(Framing(data_bytes=4096))
    for _ in range(3):
        round_trip(fs)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 256, 1024, 32768])
def test_every_queue_size_serves(share: Share, size: int, ours: None) -> None:
    """With indirect descriptors one slot is enough for a request."""
    fs = share.mount(Machine(queue_size=size))
    fs.session.use(Framing(data_bytes=16384))
    for _ in range(2):
        round_trip(fs)


@pytest.mark.parametrize("size", [8, 64, 1024])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
def test_direct_chains_fill_queues_of_every_size(share: Share, size: int, event_idx: bool) -> None:
    fs = share.mount(Machine(features=features(event_idx, False), queue_size=size))
    fs.session.use(Framing(data_bytes=65536))
    round_trip(fs)


@pytest.mark.parametrize("data_bytes", [2048, 4096, 65536, 1 << 20])
def test_one_mebibyte_in_segments_of_any_size(share: Share, data_bytes: int, ours: None) -> None:
    # A chain may have as many descriptors as the queue.
    fs = share.mount(Machine(queue_size=1024).with_regions(3))
    fs.session.use(Framing(data_bytes=data_bytes))
    content = random.Random(9).randbytes(1 << 20)
    entry, opened = fs.create(fs.root, "a")
    assert fs.write(entry.nodeid, opened.fh, content) == len(content)
    assert fs.read(entry.nodeid, opened.fh, 1 << 20) == content


@pytest.mark.parametrize(
    "without",
    [
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
        ALL_PROTOCOL_FEATURES & ~ProtocolFeature.MQ,
    ],
    ids=str,
)
def test_every_protocol_feature_can_be_missing(share: Share, without: ProtocolFeature) -> None:
    fs = share.mount(Machine(protocol_features=ALL_PROTOCOL_FEATURES & ~without).with_regions(2))
    round_trip(fs)


def test_batches_are_announced_once_with_event_idx(share: Share) -> None:
    fs = share.mount()
    queue = fs.vmm.request_queue()
    for _ in range(50):
        pending = [fs.session.submit(op.getattr_(fs.root), publish=False) for _ in range(10)]
        queue.publish(*(one.head for one in pending))
        for one in pending:
            one.wait()


def test_no_interrupt_is_sent_to_a_driver_that_does_not_want_any(share: Share, ours: None) -> None:
    fs = share.mount(Machine(features=features(False, True)))
    queue = fs.vmm.request_queue()
    queue.set_available_flags(AVAIL_F_NO_INTERRUPT)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(queue.call_fd)
    for _ in range(20):
        pending = fs.submit(op.getattr_(fs.root))
        assert awaited(lambda pending=pending: pending.done)  # type: ignore[misc]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(queue.call_fd)


@pytest.mark.parametrize(("event_idx", "indirect"), list(itertools.product((False, True), repeat=2)), ids=str)
def test_hundreds_of_requests_of_mixed_size_in_flight(share: Share, event_idx: bool, indirect: bool) -> None:
    fs = share.mount(Machine(features=features(event_idx, indirect), queue_size=1024))
    fs.session.use(Framing(data_bytes=16384))
    rng = random.Random(1)
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, CONTENT[:200_000])
    for _ in range(6):
        plan = [(rng.randrange(200_000), rng.choice((1, 100, 4096, 40_000))) for _ in range(60)]
        pending = [fs.submit(op.read(entry.nodeid, opened.fh, size, at)) for at, size in plan]
        order = list(range(len(plan)))
        rng.shuffle(order)
        for i in order:
            at, size = plan[i]
            assert pending[i].wait() == CONTENT[at : min(at + size, 200_000)]
