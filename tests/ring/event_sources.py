# SPDX-License-Identifier: Apache-2.0
"""The ways by which a server learns of changes on its host, each forced by options.

Must not test anything. What the host does not permit is a loud skip.
Specification: docs/protocol.md, "What the sources tell"; docs/events.md for the options.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import lacking
from tests.ring.conftest import MakeShare
from tests.ring.share import Share

CHILD_OF_A_GONE_NAME = re.compile(r"^((?:ISDIR\|)?(?:DELETE [^=]*|MOVED_FROM [^=]*(?=.* half$)))=\S*")


@dataclass(frozen=True, slots=True)
class Source:
    """`option`: what forces it."""

    name: str
    option: str

    def sees(self, expected: list[str]) -> list[str]:
        """What this source can tell of these elements: inotify has no child for a name that is gone."""
        if not self.option.endswith("inotify"):
            return expected
        return [CHILD_OF_A_GONE_NAME.sub(r"\1", line) for line in expected]


FILESYSTEM_MARK = Source("filesystem mark", "--events=fanotify:filesystem")
INODE_MARKS = Source("inode marks", "--events=fanotify:inodes")
FANOTIFY = (FILESYSTEM_MARK, INODE_MARKS)
INOTIFY = Source("inotify", "--events=inotify")
SOURCES = (*FANOTIFY, INOTIFY)


def start_share(
    make_share: MakeShare,
    source: Source,
    *options: str,
    private: bool = False,
    directory: Path | None = None,
    descriptor_limit: int | None = None,
) -> Share:
    """A share whose server has this source, and so also the notification queue."""
    try:
        return make_share(
            "--tag=events",
            source.option,
            *options,
            private=private,
            directory=directory,
            descriptor_limit=descriptor_limit,
        )
    except AssertionError as error:
        refusal = next((line for line in str(error).splitlines() if "is not possible" in line), None)
        if refusal is None:
            raise
        lacking(f"{source.name}: {refusal}")


def file_system_marks(share: Share) -> list[str]:
    """Of all processes of the server, as the kernel lists them."""
    lines: list[str] = []
    for pid in share.server.pids():
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                lines += entry.read_text().splitlines()
    return [line for line in lines if line.startswith("fanotify sdev:")]
