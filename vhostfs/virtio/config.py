# SPDX-License-Identifier: Apache-2.0
"""The virtio-fs configuration space.

Must not know how it is fetched.
Specification: virtio 1.3, section 5.11.4.
"""

from __future__ import annotations

import struct

from ..record import Record

TAG_BYTES = 36
_LAYOUT = struct.Struct(f"<{TAG_BYTES}sII")

CONFIG_BYTES = _LAYOUT.size


class TagError(ValueError):
    """A tag that does not fit; one line for people."""


def encode_tag(tag: str) -> bytes:
    """The tag in UTF-8, not padded; raises TagError unless it has 1 to 36 bytes and no NUL."""
    data = tag.encode()
    if not data:
        raise TagError("the tag is empty; give it 1 to 36 bytes")
    if len(data) > TAG_BYTES:
        raise TagError(f"the tag {tag!r} has {len(data)} bytes; at most {TAG_BYTES} are possible")
    if b"\0" in data:
        raise TagError(f"the tag {tag!r} contains a NUL byte")
    return data


class FsConfig(Record):
    """The whole space; tag is "" when the VMM has its own.

    notify_buf_size_bytes exists for the driver only with VIRTIO_FS_F_NOTIFICATION; without it the
    four bytes are there as well and 0, for a VMM that fetches a fixed 44 bytes.
    """

    tag: str
    num_request_queues: int
    notify_buf_size_bytes: int = 0

    def pack(self) -> bytes:
        """44 bytes, little-endian; raises TagError."""
        tag = encode_tag(self.tag) if self.tag else b""
        return _LAYOUT.pack(tag, self.num_request_queues, self.notify_buf_size_bytes)

    @classmethod
    def unpack(cls, data: bytes) -> FsConfig:
        """The reverse of pack(); raises ValueError when data is not 44 bytes of it."""
        if len(data) != CONFIG_BYTES:
            raise ValueError(f"virtio-fs configuration of {len(data)} bytes, expected {CONFIG_BYTES}")
        tag, queues, notify = _LAYOUT.unpack(data)
        return cls(tag.rstrip(b"\0").decode(), queues, notify)
