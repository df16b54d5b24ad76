# SPDX-License-Identifier: Apache-2.0
"""A day's work on the host: some of everything, for guests of every kernel.

Must not know which kernel, cache mode or source. Specification: inotify(7).
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.guest.events.watching import Watch


def a_day(watch: Watch) -> None:
    """`watch` is on "." and "sub"; beside them is "outside", which nobody watches."""
    host = watch.place.host
    f, n = host / "f", host / "n"
    watch.step(lambda: f.write_text("first\n"), "CREATE f", "MODIFY f", "CLOSE_WRITE f")
    watch.step(lambda: _append(f), "MODIFY f", "CLOSE_WRITE f")
    watch.step(lambda: os.truncate(f, 2), "MODIFY f")
    watch.step(lambda: f.chmod(0o600), "ATTRIB f")
    watch.step(lambda: os.utime(f, (1, 2)), "ATTRIB f")
    watch.step(n.touch, "CREATE n", "CLOSE_WRITE n")
    watch.step((host / "d").mkdir, "CREATE|ISDIR d")
    watch.step((host / "d").rmdir, "DELETE|ISDIR d")
    watch.step(lambda: (host / "s").symlink_to("f"), "CREATE s")
    watch.step(lambda: (host / "l").hardlink_to(n), "CREATE l")
    watch.step(lambda: os.rename(f, host / "g"), "MOVED_FROM f #1", "MOVED_TO g #1")
    watch.step(lambda: os.rename(host / "g", host / "sub/g"), "MOVED_FROM g #1", "1 MOVED_TO g #1")
    watch.step(lambda: os.rename(host / "sub/g", host / "s"), "1 MOVED_FROM g #1", "MOVED_TO s #1")
    watch.step(lambda: os.rename(host / "s", host / "outside/s"), "MOVED_FROM s #1")
    watch.step(lambda: os.rename(host / "outside/s", host / "f"), "MOVED_TO f #1")
    watch.step((host / "l").unlink, "DELETE l")
    watch.step(f.unlink, "DELETE f")
    watch.ends()


def _append(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("more\n")
