# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/protocol.md are what a real server and a real driver say to each other, byte by byte.

VHOSTFS_WRITE_EXAMPLES=1 writes them into the document instead of comparing.
Specification: docs/protocol.md, "Examples".
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.control import event_counters
from tests.ring.event_sources import FILESYSTEM_MARK, start_share
from tests.ring.events import NOTIFYING, write
from tests.ring.share import Share
from tests.server import REPOSITORY, awaited
from vhostfs.frontend import FuseClient, NotificationQueue
from vhostfs.frontend import fsnotify as wire
from vhostfs.frontend.fsnotify import CHANGES, OVERFLOW, Event
from vhostfs.frontend.operations import Call

pytestmark = pytest.mark.usefixtures("ours")

DOCUMENT = REPOSITORY / "docs" / "protocol.md"

IN_HEADER = "len:I opcode:I unique:Q nodeid:Q uid:I gid:I pid:I total_extlen:H padding:H"
OUT_HEADER = "len:I error:i unique:Q"
INIT_IN = "major:I minor:I flags:Q mask:Q buf_size:I reserved:I"
INIT_OUT = "major:I minor:I flags:Q mask:Q notify_buf_size:I max_watches:I max_parked:I reserved:I"
WATCH_IN = "mask:Q generation:I flags:I"
ELEMENT = (
    "nodeid:Q generation:I reserved:I mask:Q namelen:I cookie:I flags:I child_generation:I child_nodeid:Q"
)
HEXADECIMAL = {"opcode", "flags", "mask"}


def annotated(data: bytes, *layouts: str) -> str:
    """One line a field: offset, bytes in the order of memory, name, value; what is left is a name."""
    lines, offset = [], 0
    for field in " ".join(layouts).split():
        name, code = field.split(":")
        part = data[offset : offset + struct.calcsize(code)]
        (value,) = struct.unpack("<" + code, part)
        is_notify_code = name == "error" and value > 0
        shown = f"{value:#x}" if name in HEXADECIMAL or is_notify_code else str(value)
        lines.append(f"{offset:4}  {part.hex(' '):<23}  {name} {shown}")
        offset += len(part)
    while offset < len(data):
        part = data[offset : offset + 8]
        lines.append(f"{offset:4}  {part.hex(' '):<23}  {part.decode()!r}")
        offset += len(part)
    return "\n".join(lines)


class Conversation:
    """What is said in one small session, in the order of the document."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.path = share.path
        self.fs: FuseClient = share.mount(NOTIFYING)
        self.queue = NotificationQueue(self.fs.vmm, buffers=4)
        self.examples: dict[str, str] = {}

    def ask(self, name: str, call: Call[object], arguments: str, answer: str = "") -> None:
        pending = self.fs.submit(call)
        request = pending.request_bytes
        pending.wait()
        self.examples[f"{name}, request"] = annotated(request, IN_HEADER, arguments)
        self.examples[f"{name}, reply"] = annotated(pending.reply_bytes, OUT_HEADER, answer)

    def see(self, *names: str, change: Callable[[Path], object]) -> None:
        change(self.path / "src")
        for name in names:
            self.queue.take()
            if name:
                self.examples[name] = annotated(self.queue.last_bytes, OUT_HEADER, ELEMENT)

    def lose(self, name: str) -> None:
        """Without a buffer at the device and with room for two, the third finds none."""
        self.queue.give_back = False
        for i in range(7):
            os.mknod(self.path / "src" / f"burst{i}")
        for _ in range(4):
            self.queue.take()
        assert awaited(lambda: event_counters(self.share)["lost"] > 0)
        self.queue.give_back = True
        self.queue.give_back_all()
        self.queue.until(lambda element: element == OVERFLOW)
        self.examples[name] = annotated(self.queue.last_bytes, OUT_HEADER, ELEMENT)


def converse(share: Share) -> dict[str, str]:
    (share.path / "src").mkdir()
    (share.path / "src/main.c").touch()
    talk = Conversation(share)
    init: Call[object] = wire.init()  # type: ignore[assignment]
    talk.ask("FUSE_FSNOTIFY_INIT", init, INIT_IN, INIT_OUT)
    src = talk.fs.lookup(1, "src")
    talk.fs.lookup(src.nodeid, "main.c")
    watch: Call[object] = wire.watch(src.nodeid, CHANGES | Event.EVENT_ON_CHILD, src.generation)  # type: ignore[assignment]
    talk.ask("FUSE_FSNOTIFY_WATCH", watch, WATCH_IN)
    talk.see("mknod src/new.txt", change=lambda src: os.mknod(src / "new.txt"))
    talk.see("write to src/main.c", "", change=lambda src: write(src / "main.c"))
    talk.see(
        "rename src/new.txt src/old.txt, first half",
        "rename src/new.txt src/old.txt, second half",
        change=lambda src: os.rename(src / "new.txt", src / "old.txt"),
    )
    talk.see("chmod src", change=lambda src: os.chmod(src, 0o700))
    talk.lose("events were lost")
    return talk.examples


def test_the_examples_are_what_is_said(make_share: MakeShare) -> None:
    share = start_share(make_share, FILESYSTEM_MARK, "--event-queue=2", "--max-watches=524288", private=True)
    examples = converse(share)
    text = DOCUMENT.read_text()
    written = re.compile(r"(<!-- example: (.*?) -->\n+```text\n)(.*?)(\n```)", re.DOTALL)
    assert [found[1] for found in written.findall(text)] == list(examples)
    current = written.sub(lambda found: found[1] + examples[found[2]] + found[4], text)
    if os.environ.get("VHOSTFS_WRITE_EXAMPLES"):
        DOCUMENT.write_text(current)
    assert current == DOCUMENT.read_text()


def test_the_registry_has_the_numbers_that_are_used() -> None:
    """Every number of the decoder is in the document with this value."""
    text = DOCUMENT.read_text()
    numbers = {
        "FUSE_FSNOTIFY_INIT": wire.OPCODE_INIT,
        "FUSE_FSNOTIFY_WATCH": wire.OPCODE_WATCH,
        "FUSE_FSNOTIFY_PARK": wire.OPCODE_PARK,
        "FUSE_NOTIFY_FSNOTIFY": wire.NOTIFY_FSNOTIFY,
    }
    for name, number in numbers.items():
        assert re.search(rf"\| `{name}` \|[^|\n]*\| `{number:#06x}`", text), name
    for bit in Event:
        assert re.search(rf"\| `{bit.name}` \| `{bit:#010x}`", text), bit.name
    for flag in wire.Granted:
        assert re.search(rf"\| {flag.value.bit_length() - 1} \| `{flag.name}`", text), flag.name
