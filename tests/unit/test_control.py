# SPDX-License-Identifier: Apache-2.0
"""The control socket: the conversation without I/O, then a server and a client over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import HANG_S
from vhostfs.caps import names
from vhostfs.control.client import ControlClient, ControlError, find_control_socket
from vhostfs.control.negotiated import NegotiatedState, negotiated_message
from vhostfs.control.protocol import (
    MAX_LINE_BYTES,
    MAX_WAITING_BYTES,
    ControlSession,
    StatsCommand,
    WatchCommand,
    encode_line,
)
from vhostfs.control.report import ServerState, event_message, stats_message, utc_text
from vhostfs.control.server import MAX_CLIENTS, ControlServer
from vhostfs.events.feed import SeenEvent, Watcher
from vhostfs.events.masks import FsEvent
from vhostfs.events.records import EventFate, EventsStats, EventTrace
from vhostfs.fuse.abi import InitIn, InitOut
from vhostfs.fuse.fsnotify import Delivery, FsnotifyAnswer, FsnotifyInitIn, FsnotifyInitOut
from vhostfs.fuse.operations import AgreedSession
from vhostfs.record import replace
from vhostfs.share.native_share import ShareStats
from vhostfs.vhost_user.device import Device, DeviceOptions
from vhostfs.vhost_user.messages import MemoryRegion
from vhostfs.virtio.config import FsConfig
from vhostfs.virtio.features import DeviceStatus

T = TypeVar("T")

TRACE = EventTrace(
    time_ns=1_763_709_296_123_456_789,
    nodeid=1,
    child_nodeid=5,
    mask=int(FsEvent.CREATE | FsEvent.ISDIR),
    cookie=0,
    fate=EventFate.DELIVERED,
    pid=42,
    skipped=0,
    name=b"new",
)


# ---- the conversation


def lines(session: ControlSession) -> list[dict[str, Any]]:
    """Everything that waits, taken."""
    data = b""
    while part := session.waiting_bytes():
        session.sent(len(part))
        data += part
    return [json.loads(line) for line in data.splitlines()]


def greeted() -> ControlSession:
    session = ControlSession()
    assert lines(session)[0]["type"] == "hello"
    return session


def test_the_server_speaks_first_and_says_which_protocol() -> None:
    (hello,) = lines(ControlSession())
    assert hello["type"] == "hello"
    assert hello["control"] == 1


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_commands_are_understood_however_their_bytes_arrive(step: int) -> None:
    data = b'{"command":"stats"}\n\n{"command":"watch","fates":["lost","overflow"]}\n{"command":"watch"}\n'
    session = greeted()
    commands: list[object] = []
    for at in range(0, len(data), step):
        session.receive(data[at : at + step])
        while (command := session.next_command()) is not None:
            commands.append(command)
    assert commands == [
        StatsCommand(),
        WatchCommand(frozenset({EventFate.LOST, EventFate.OVERFLOW})),
        WatchCommand(frozenset(EventFate)),
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"hello", "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[" * 4000, "not a line of JSON"),
        (b"[]", "not a JSON object"),
        (b'{"command":"reboot"}', "use stats, negotiated or watch"),
        (b'{"command":["stats"]}', "use stats, negotiated or watch"),
        (b"{}", "use stats, negotiated or watch"),
        (b'{"command":"watch","fates":[]}', "fates is not"),
        (b'{"command":"watch","fates":["gone"]}', "fates is not"),
        (b'{"command":"watch","fates":{"lost":1}}', "fates is not"),
    ],
)
def test_a_wrong_command_is_answered_and_the_next_one_served(line: bytes, text: str) -> None:
    session = greeted()
    session.receive(line + b'\n{"command":"stats"}\n')
    assert session.next_command() == StatsCommand()
    (answer,) = lines(session)
    assert answer["type"] == "error"
    assert text in answer["error"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_without_end_ends_the_conversation(end: bytes) -> None:
    session = greeted()
    session.receive(b"x" * (MAX_LINE_BYTES + 1) + end)
    assert session.next_command() is None
    assert session.is_over
    assert not session.wants_input
    assert "at most 4096 bytes" in lines(session)[0]["error"]


@given(chunks=st.lists(st.binary(max_size=60)))
def test_any_bytes_are_answered_by_lines_of_json(chunks: list[bytes]) -> None:
    session = greeted()
    for chunk in chunks:
        session.receive(chunk)
        while session.next_command() is not None:
            pass
    for message in lines(session):
        assert message["type"] == "error"


def watching(fates: str = '["delivered"]') -> ControlSession:
    session = greeted()
    session.receive(b'{"command":"watch","fates":' + fates.encode() + b"}\n")
    assert session.next_command() is not None
    return session


def test_only_the_fates_that_were_asked_for_are_wanted() -> None:
    session = watching('["lost"]')
    assert session.wants(EventFate.LOST)
    assert not session.wants(EventFate.DELIVERED)
    assert not greeted().wants(EventFate.DELIVERED)


def test_a_client_that_does_not_read_costs_bounded_memory_and_learns_what_it_missed() -> None:
    session = watching()
    line = encode_line({"type": "event", "text": "x" * 1000})
    sent = MAX_WAITING_BYTES // len(line) + 1
    for _ in range(sent + 250):
        session.send_event(line)
    assert not session.wants_input
    seen = lines(session)
    assert len(seen) == sent
    assert session.wants_input
    session.send_event(line)
    assert [message["type"] for message in lines(session)] == ["skipped", "event"]
    session.send_event(line)
    assert [message["type"] for message in lines(session)] == ["event"]


def test_the_count_of_what_is_missing_holds_both_what_never_came_and_what_did_not_fit() -> None:
    session = watching()
    line = encode_line({"type": "event", "text": "x" * (MAX_WAITING_BYTES - 10)})
    session.send_event(line)
    session.send_event(line)
    session.send_skipped(7)
    lines(session)
    session.send_skipped(0)
    assert lines(session) == [{"type": "skipped", "count": 8}]


# ---- what is told


def test_an_event_has_the_path_of_its_object() -> None:
    message = event_message(SeenEvent(TRACE, "/sub"))
    assert message == {
        "type": "event",
        "time": "2025-11-21T07:14:56.123456Z",
        "path": "/sub/new",
        "name": "new",
        "nodeid": 1,
        "child_nodeid": 5,
        "events": ["CREATE", "ISDIR"],
        "is_dir": True,
        "cookie": 0,
        "fate": "delivered",
        "reason": "given to the guest",
        "pid": 42,
    }
    assert event_message(SeenEvent(TRACE, "/"))["path"] == "/new"
    assert event_message(SeenEvent(replace(TRACE, name=b""), "/sub"))["path"] == "/sub"
    assert event_message(SeenEvent(TRACE, None))["path"] is None


@given(name=st.binary(min_size=1, max_size=255))
def test_a_name_of_any_bytes_comes_back_from_json(name: bytes) -> None:
    line = encode_line(event_message(SeenEvent(replace(TRACE, name=name), "/")))
    assert line.count(b"\n") == 1
    assert json.loads(line)["name"].encode(errors="surrogateescape") == name


def test_times_are_utc_with_microseconds() -> None:
    assert utc_text(0) == "1970-01-01T00:00:00.000000Z"
    assert utc_text(999_999_999) == "1970-01-01T00:00:00.999999Z"


STATE = ServerState(
    uptime_s=1.5,
    tag="share",
    share=ShareStats(1, 2, 3, 4, 5, 6),
    source="inotify",
    reason="inotify (asked for)",
    events=EventsStats(received=9, latency=(0, 0, 3, *[0] * 21)),
    front_end=None,
    agreed=None,
)


def test_statistics_hold_everything_under_its_name() -> None:
    stats = stats_message(STATE)
    assert stats["share"]["requests"] == 5
    assert stats["events"]["counters"]["received"] == 9
    assert stats["events"]["latency"]["p99_us"] == 4
    assert len(stats["events"]["latency"]["below_us"]) == len(stats["events"]["latency"]["counts"]) == 24
    assert stats["guest"] is None
    json.dumps(stats)


def test_statistics_say_what_was_negotiated() -> None:
    device = Device(DeviceOptions(max_queues=2, notification=True)).negotiated
    state = replace(STATE, front_end=replace(device, features_acked=1 | 1 << 32, queue_sizes={1: 16}))
    guest = stats_message(state)["guest"]
    assert guest["virtio_features"] == ["fs_notification", "version_1"]
    assert "ring_event_idx" in guest["virtio_features_offered"]
    assert guest["protocol_features"] == []
    assert guest["queue_sizes"] == {"1": 16}
    assert guest["fsnotify"] is None
    agreed = FsnotifyAnswer(0, FsnotifyInitOut(flags=9, mask=0x103, max_watches=7), "", 0x100)
    fsnotify = stats_message(replace(state, agreed=agreed))["guest"]["fsnotify"]
    assert fsnotify["flags"] == ["VIRTQUEUE", "RENAME"]
    assert fsnotify["driver_mask"] == ["CREATE"]
    assert fsnotify["host_mask"] == ["ACCESS", "MODIFY", "CREATE"]
    assert fsnotify["max_watches"] == 7


AGREED = NegotiatedState(
    shared_dir="/srv/data",
    sandbox="namespace",
    tag="data",
    source="inotify",
    reason="inotify (asked for)",
    host_mask=0x102,
    transports=3,
    config=FsConfig("data", 1, 320),
    max_queues=66,
    delivery=Delivery.NONE,
    missing="the guest has not mounted the share",
    front_end=None,
    session=None,
    events=None,
)


def test_what_is_not_agreed_yet_is_null() -> None:
    told = negotiated_message(AGREED)
    assert [told[key] for key in ("vmm", "fuse", "fsnotify")] == [None] * 3
    assert told["server"]["config"] == {"tag": "data", "num_request_queues": 1, "notify_buf_size_bytes": 320}
    assert told["source"]["reports"] == ["MODIFY", "CREATE"]
    assert told["delivery"] == {
        "chosen": "none",
        "missing": "the guest has not mounted the share",
        "offered": ["virtqueue", "parked"],
    }
    assert negotiated_message(replace(AGREED, transports=2))["delivery"]["offered"] == ["parked"]
    assert negotiated_message(replace(AGREED, config=None))["server"]["config"] is None
    json.dumps(told)


def test_what_was_agreed_has_the_names_of_the_specifications() -> None:
    device = Device(DeviceOptions(max_queues=3, notification=True)).negotiated
    region = MemoryRegion(0, 1 << 20, 0x7000_0000, 0)
    front_end = replace(
        device,
        features_acked=1 | 1 << 32,
        protocol_features_acked=1 << 3,
        status=DeviceStatus.DRIVER_OK,
        queue_sizes={2: 128, 0: 16, 1: 64},
        regions=(region, region),
    )
    session = AgreedSession(InitIn(7, 41, 131072, 1 | 1 << 36), InitOut(41, flags=1, max_write_bytes=1 << 20))
    offer = FsnotifyInitIn(1, 3, 0x1B, 0x1FFF, 512)
    answer = FsnotifyAnswer(
        0,
        FsnotifyInitOut(flags=9, mask=0x103, max_watches=7),
        "",
        0x100,
        ("events for the guest: less: x",),
        offer,
    )
    told = negotiated_message(replace(AGREED, front_end=front_end, session=session, events=answer))
    assert told["vmm"] == {
        "state": "new",
        "features_offered": [
            "VIRTIO_FS_F_NOTIFICATION",
            "VIRTIO_F_INDIRECT_DESC",
            "VIRTIO_F_EVENT_IDX",
            "VHOST_USER_F_PROTOCOL_FEATURES",
            "VIRTIO_F_VERSION_1",
        ],
        "features_acked": ["VIRTIO_FS_F_NOTIFICATION", "VIRTIO_F_VERSION_1"],
        "protocol_features_offered": names.protocol_feature_names(device.protocol_features_offered),
        "protocol_features_acked": ["VHOST_USER_PROTOCOL_F_REPLY_ACK"],
        "device_status": ["DRIVER_OK"],
        "memory_regions": 2,
        "memory_bytes": 2 << 20,
        "queues": [
            {"index": 0, "role": "hiprio", "size": 16},
            {"index": 1, "role": "notification", "size": 64},
            {"index": 2, "role": "request", "size": 128},
        ],
    }
    assert told["fuse"] == {
        "guest_version": "7.41",
        "version": "7.41",
        "flags_offered": ["FUSE_ASYNC_READ", "FUSE_DIRECT_IO_ALLOW_MMAP"],
        "flags_granted": ["FUSE_ASYNC_READ"],
        "max_write_bytes": 1 << 20,
        "max_readahead_bytes": 0,
        "max_background": 0,
        "max_pages": 0,
    }
    assert told["fsnotify"] == {
        "refused": None,
        "driver_version": "1.3",
        "flags_wanted": [
            "FUSE_FSNOTIFY_VIRTQUEUE",
            "FUSE_FSNOTIFY_PARKED",
            "FUSE_FSNOTIFY_RENAME",
            "FUSE_FSNOTIFY_CHILD",
        ],
        "driver_can_raise": names.event_bit_names(0x1FFF),
        "driver_buf_size_bytes": 512,
        "flags_granted": ["FUSE_FSNOTIFY_VIRTQUEUE", "FUSE_FSNOTIFY_RENAME"],
        "host_can_report": ["ACCESS", "MODIFY", "CREATE"],
        "events": ["CREATE"],
        "notify_buf_size_bytes": 320,
        "max_watches": 7,
        "max_parked": 0,
        "reductions": ["x"],
    }


def test_an_offer_that_was_refused_is_told_with_the_reason() -> None:
    offer = FsnotifyInitIn(2, 0)
    answer = FsnotifyAnswer(71, FsnotifyInitOut(), "", 0, (), offer, "version 2.0")
    told = negotiated_message(replace(AGREED, events=answer))["fsnotify"]
    assert told["refused"] == "version 2.0"
    assert "flags_granted" not in told


# ---- over sockets


class FakeFeed:
    def __init__(self) -> None:
        self.watchers: list[Watcher] = []

    def add_watcher(self, watcher: Watcher) -> None:
        self.watchers.append(watcher)

    def remove_watcher(self, watcher: Watcher) -> None:
        self.watchers.remove(watcher)


class Console:
    """A control server at `path`; client() runs a blocking function beside the loop."""

    def __init__(self, path: str, uids: frozenset[int], feed: FakeFeed | None) -> None:
        self.path = path
        self.feed = feed
        self.listen_socket = socket.socket(socket.AF_UNIX)
        self.listen_socket.bind(path)
        self.listen_socket.listen()
        self.server = ControlServer(self.listen_socket, uids, feed, self.stats, self.negotiated)

    @staticmethod
    def stats() -> Mapping[str, Any]:
        return stats_message(STATE)

    @staticmethod
    def negotiated() -> Mapping[str, Any]:
        return negotiated_message(AGREED)

    async def client(self, body: Callable[[ControlClient], T]) -> T:
        def run() -> T:
            with ControlClient(self.path) as client:
                return body(client)

        return await asyncio.wait_for(asyncio.to_thread(run), HANG_S)

    def close(self) -> None:
        self.server.close()
        self.listen_socket.close()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("c") / "s.ctl")


@pytest.fixture
async def console(place: str) -> AsyncIterator[Console]:
    made = Console(place, frozenset({os.geteuid()}), FakeFeed())
    yield made
    made.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_statistics_are_asked_for_and_come(console: Console) -> None:
    assert (await console.client(lambda client: client.stats()))["events"]["counters"]["received"] == 9


async def test_what_was_negotiated_is_asked_for_and_comes(console: Console) -> None:
    told = await console.client(lambda client: client.negotiated())
    assert told["server"]["shared_dir"] == "/srv/data"


async def test_a_watcher_gets_what_it_asked_for_until_the_server_ends(console: Console) -> None:
    assert console.feed is not None
    watch = asyncio.ensure_future(console.client(lambda client: list(client.watch(["delivered", "lost"]))))
    await until(lambda: bool(console.feed and console.feed.watchers))
    batch = [
        SeenEvent(TRACE, "/"),
        SeenEvent(replace(TRACE, fate=EventFate.OWN), "/"),
        SeenEvent(replace(TRACE, fate=EventFate.LOST, skipped=4), "/sub"),
    ]
    console.feed.watchers[0](batch)
    console.server.close()
    messages = await watch
    assert [message["type"] for message in messages] == ["event", "skipped", "event"]
    assert messages[1]["count"] == 4
    assert messages[2]["path"] == "/sub/new"
    assert console.feed.watchers == []


async def test_a_watcher_that_leaves_is_forgotten(console: Console) -> None:
    assert console.feed is not None
    await console.client(lambda client: client._send({"command": "watch"}))
    feed = console.feed
    await until(lambda: not feed.watchers)
    assert (await console.client(lambda client: client.stats()))["type"] == "stats"


async def test_a_watcher_that_never_reads_does_not_hold_up_the_others(console: Console) -> None:
    feed = console.feed
    assert feed is not None
    with socket.socket(socket.AF_UNIX) as sluggish:
        sluggish.connect(console.path)
        sluggish.sendall(b'{"command":"watch"}\n')
        await until(lambda: len(feed.watchers) == 1)
        watch = asyncio.create_task(console.client(lambda client: list(islice(client.watch(), 3))))
        await until(lambda: len(feed.watchers) == 2)
        batch = [SeenEvent(TRACE, "/x" * 50)] * 256
        for _ in range(100):
            feed.watchers[0](batch)
        feed.watchers[1]([SeenEvent(TRACE, "/")] * 3)
        assert len(await watch) == 3


async def test_without_events_there_is_nothing_to_watch(place: str) -> None:
    console = Console(place, frozenset({os.geteuid()}), None)
    try:
        with pytest.raises(ControlError, match="events are off"):
            await console.client(lambda client: list(client.watch()))
    finally:
        console.close()


async def test_another_user_is_turned_away(place: str) -> None:
    console = Console(place, frozenset({os.geteuid() + 1}), FakeFeed())
    try:
        with pytest.raises(ControlError, match="only the server's own user"):
            await console.client(lambda client: client.stats())
    finally:
        console.close()


async def test_clients_are_bounded(console: Console) -> None:
    crowd = [socket.socket(socket.AF_UNIX) for _ in range(MAX_CLIENTS)]
    try:
        for member in crowd:
            await asyncio.to_thread(member.connect, console.path)
            assert b"hello" in await asyncio.to_thread(member.recv, 4096)
        with pytest.raises(ControlError, match="16 clients are connected already"):
            await console.client(lambda client: client.stats())
        crowd.pop().close()
        await until(lambda: len(console.server._clients) < MAX_CLIENTS)
        assert await console.client(lambda client: client.stats())
    finally:
        for member in crowd:
            member.close()


# ---- what is no control socket


def refusal(path: str) -> str:
    with pytest.raises(ControlError) as caught:
        ControlClient(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_connected_to_is_said_in_a_line(tmp_path: Path, place: str) -> None:
    assert "there is no such socket" in refusal(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert "is not a socket" in refusal(str(tmp_path / "file"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(place)
    assert "nobody listens there any more" in refusal(place)


@pytest.fixture
def talker(place: str) -> Iterator[list[bytes]]:
    """Something else that listens at `place`: says what is in the list, then closes."""
    says: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()

        def talk() -> None:
            peer, _ = listener.accept()
            with peer:
                for part in says:
                    peer.sendall(part)
                peer.recv(1)

        thread = threading.Thread(target=talk)
        thread.start()
        yield says
        thread.join(20)


@pytest.mark.parametrize("said", [b"220 mail ready\r\n", b'{"type":"hello"}\n', b"[]\n", b"\n"])
def test_another_programs_socket_is_not_spoken_to(talker: list[bytes], place: str, said: bytes) -> None:
    talker.append(said)
    assert "is not a control socket" in refusal(place)


def test_a_server_of_another_protocol_is_named(talker: list[bytes], place: str) -> None:
    talker.append(b'{"type":"hello","control":2}\n')
    assert "version 2 of the control protocol" in refusal(place)


def test_silence_is_not_waited_for_long(
    talker: list[bytes], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhostfs.control.client.HELLO_TIMEOUT_S", 0.05)
    assert "does not answer" in refusal(place)


def test_the_control_socket_beside_a_vhost_user_socket_is_found(place: str) -> None:
    vhost_user = place.removesuffix(".ctl")
    assert find_control_socket(vhost_user) == vhost_user
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as front:
        control.bind(place)
        control.listen()
        front.bind(vhost_user)
        front.listen()
        assert find_control_socket(vhost_user) == place
        assert find_control_socket(place) == place
        try:
            assert find_control_socket(None) == place
        except ControlError as error:  # other servers of this machine
            assert place in str(error)
