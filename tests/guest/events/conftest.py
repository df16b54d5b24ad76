# SPDX-License-Identifier: Apache-2.0
"""Guests with our driver and servers that tell them of the host's events, for the tests of this folder.

Must not know single events. VHOSTFS_TEST_QEMU chooses the QEMU for shares with the notification queue, as
`vhostfs run --qemu` does: "patched" (qemu/README.md). VHOSTFS_TEST_DELIVERY=parked has all shares without
that queue, on the machine's own QEMU. Specification: docs/guest.md, docs/events.md.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.guest.conftest import Launchpad, image_or_lacking, lines_matching
from tests.guest.events import torture
from tests.guest.events.watching import CHANGES, FANOTIFY_PROGRAM, PROGRAM, Control, In, Watch
from tests.guest.place import Place
from tests.writers import following
from tests.writers.following import compile_static
from vhostfs.vm.errors import VmError
from vhostfs.vm.guest import Guest
from vhostfs.vm.image import ImageSpec
from vhostfs.vm.kernel import DEFAULT_SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Share, ShareDevice, queue_device
from vhostfs.vm.qemu import Qemu, find_qemu
from vhostfs.vm.server import ServerSpec, ShareServer

HOLDER_PROGRAM = "/usr/bin/hold-directory"
CHANGER_PROGRAM = "/usr/bin/change-file"
_HERE = Path(__file__).parent
PROGRAM_SOURCES = {
    PROGRAM: _HERE / "watch-events.c",
    FANOTIFY_PROGRAM: _HERE / "watch-fanotify.c",
    following.PROGRAM: Path(following.__file__).with_name("follow-events.c"),
    torture.PROGRAM: _HERE / "compare-tree.c",
    HOLDER_PROGRAM: _HERE / "hold-directory.c",
    CHANGER_PROGRAM: _HERE / "change-file.c",
}
"""What guests with events run, by their path there."""
CACHE_MODES = {
    "auto": (),
    "never": ("--cache=never",),
    "always": ("--cache=always", "--writeback"),
    "coherent": ("--cache=coherent", "--xattr"),
}
PARKED = "--delivery=parked"
"""Of a server: its share has the device of every QEMU."""
DELIVERY = tuple(f"--delivery={way}" for way in os.environ.get("VHOSTFS_TEST_DELIVERY", "").split())
"""Of every server that is not told otherwise."""
SOURCES = {"inodes": ("--events=fanotify:inodes",), "inotify": ("--events=inotify",)}
WRITTEN = {
    "written-auto": (),
    "written-never": ("--cache=never", "--events=inotify"),
    "written-always": ("--cache=always", "--writeback", "--events=fanotify:inodes"),
}
"""All three share one directory: one writer on the host is seen in every cache mode and by every source."""
SHARES = {
    **CACHE_MODES,
    **SOURCES,
    **WRITTEN,
    "parked": (PARKED,),
    "tiny": (PARKED,),
    "user": (),
    "brief": ("--cache=coherent", "--event-queue=2"),
    "few": ("--events=inotify",),
}
"""Options of the server by tag; each is mounted at /TAG. Those of CACHE_MODES have the best source."""
TINY_QUEUE_SIZE = 8
"""Of the share "tiny", all of whose descriptors are in the ring: the least that the kernel's driver takes."""
NOBODY = 65534
MAX_WATCHES_OF_FEW = 6
_LIMITED = f'echo {MAX_WATCHES_OF_FEW} >/proc/sys/user/max_inotify_watches && exec "$@"'
UNDER = {
    "user": ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"),
    "few": ("unshare", "--user", "--map-root-user", "sh", "-c", _LIMITED, "sh"),
}
"""Under what its server runs: as somebody without rights; where the host has room for few watches.

A machine that cannot do it has no such share.
"""
_BAD_LOG = re.compile(
    r"Traceback \(most recent call last\)|AddressSanitizer|runtime error:|Fatal Python error"
    r"|free\(\): |malloc\(\): |stack smashing|internal:|[Ee]rror"
)
_BAD_CONSOLE = re.compile(
    r"BUG:|WARNING:|Oops|blocked for more than|Call Trace|KASAN|refcount|leaked|Busy inodes"
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What guests with events are made of."""

    launchpad: Launchpad
    qemu: Qemu
    programs: dict[str, Path]
    """Of PROGRAM_SOURCES, by their path in the guest. Static: those that watch are for the host, too."""

    def image_spec(self, kernel: str, packages: tuple[str, ...] = ()) -> ImageSpec:
        """An image with the driver and the programs."""
        return ImageSpec(kernel, packages, files=dict(self.programs), driver=True)


@pytest.fixture(scope="package")
def parts(launchpad: Launchpad, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    try:
        choice = os.environ.get("VHOSTFS_TEST_QEMU")
        qemu = find_qemu(choice, launchpad.cache, notifications=PARKED not in DELIVERY)
    except VmError as error:
        lacking(f"a QEMU that passes the notification queue: {error}")
    if PARKED not in DELIVERY and not qemu.passes_queue:
        lacking(f"a QEMU that passes the notification queue: {qemu.version_text} does not")
    folder = tmp_path_factory.mktemp("programs")
    programs = {
        path: compile_static(source, folder / source.stem) for path, source in PROGRAM_SOURCES.items()
    }
    return Parts(launchpad, qemu, programs)


def watchdog_files() -> dict[str, Path]:
    """The host's watchdog library, by path in the guest."""
    spec = importlib.util.find_spec("watchdog")
    if spec is None or not spec.submodule_search_locations:
        lacking("the Python library watchdog")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {
        f"/usr/lib/python3/dist-packages/watchdog/{path.relative_to(folder)}": path
        for path in folder.rglob("*.py")
    }


@dataclass(frozen=True, slots=True)
class EventShare:
    """One directory with its server."""

    tag: str
    directory: Path
    server: ShareServer
    control: Control


def start_share(
    lifeline: Lifeline,
    directory: Path,
    tag: str,
    options: Sequence[str] = (),
    *,
    name: str | None = None,
    sockets: Path | None = None,
    under: tuple[str, ...] = (),
    delivery: tuple[str, ...] = DELIVERY,
) -> EventShare:
    """Starts a server with events on; its control socket is asked from now on."""
    sockets = sockets or lifeline.directory
    socket_path = sockets / f"{name or tag}.sock"
    control_path = sockets / f"{name or tag}.ctl"
    own = ("--events=auto", f"--control-socket={control_path}")
    spec = ServerSpec(directory, socket_path, tag, options=(*own, *delivery, *options), under=under)
    server = ShareServer(spec, lifeline)
    return EventShare(tag, directory, server, Control(control_path))


def as_share(share: EventShare, qemu: Qemu) -> Share:
    """The guest's side of it, mounted at /TAG."""
    spec = share.server.spec
    place = Share(share.tag, spec.socket_path, f"/{share.tag}", device=device_of(share, qemu))
    if share.tag == "tiny":
        place = replace(place, queue_size=TINY_QUEUE_SIZE, properties=("indirect_desc=off",))
    return place


def device_of(share: EventShare, qemu: Qemu) -> ShareDevice:
    """By which QEMU can give it what its server wants."""
    device = ShareDevice.STOCK if PARKED in share.server.spec.options else queue_device(qemu)
    assert device is not None
    return device


def complaints_of(guest: Guest, shares: Sequence[EventShare]) -> list[str]:
    """Bad lines of the guest's kernel and of the servers, which end with this."""
    console = guest.console_path
    found = [f"guest: {line}" for line in lines_matching(_BAD_CONSOLE, console)]
    for share in shares:
        share.control.close()
        if share.server.stop() != 0:
            found.append(share.server.describe_end())
        lines = lines_matching(_BAD_LOG, share.server.log_path)
        found += [f"server of {share.tag}: {line}" for line in lines]
    return found


@dataclass(frozen=True, slots=True)
class EventSession:
    """A running guest with its shares, by tag."""

    guest: Guest
    shares: dict[str, EventShare]
    parts: Parts


@pytest.fixture(scope="package")
def real_directory() -> Iterator[Path]:
    """On a real file system, for users of the guest to enter."""
    before = os.umask(0o022)
    root = Path(tempfile.mkdtemp(prefix="vhostfs-events-tests-"))
    root.chmod(0o755)
    yield root
    os.umask(before)
    shutil.rmtree(root)


@pytest.fixture(scope="package")
def session(parts: Parts, real_directory: Path) -> Iterator[EventSession]:
    """The guest for most tests, with Python; its end checks that nobody had anything to complain about."""
    kernel = os.environ.get("VHOSTFS_TEST_KERNEL", DEFAULT_SERIES)
    spec = parts.image_spec(kernel, ("python3",))
    spec = ImageSpec(kernel, spec.packages, files={**spec.files, **watchdog_files()}, driver=True)
    image = image_or_lacking(parts.launchpad, spec)
    with Lifeline() as lifeline:
        shares = {}
        for tag, options in SHARES.items():
            probe = [*UNDER.get(tag, ()), sys.executable, "-c", "import vhostfs"]
            if tag in UNDER and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
                continue
            directory = real_directory / ("written" if tag in WRITTEN else tag)
            directory.mkdir(exist_ok=True)
            sockets = None
            if tag == "user":
                sockets = real_directory / "sockets"
                sockets.mkdir()
                os.chown(sockets, NOBODY, NOBODY)
            under = UNDER.get(tag, ())
            shares[tag] = start_share(lifeline, directory, tag, options, sockets=sockets, under=under)
        places = tuple(as_share(share, parts.qemu) for share in shares.values())
        guest = Guest(parts.launchpad.machine(image, places, qemu=parts.qemu), lifeline=lifeline)
        with guest:
            yield EventSession(guest, shares, parts)
        complaints = complaints_of(guest, list(shares.values()))
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


_numbers = itertools.count(1)


class WatchedPlace:
    """A new directory of a share, and watchers on it."""

    def __init__(self, session: EventSession, tag: str, name: str) -> None:
        assert session.guest.alive, "the guest ended in an earlier test"
        share = session.shares[tag]
        directory = share.directory / f"{next(_numbers):03}-{name}"
        directory.mkdir()
        directory.chmod(0o777)
        self.host = directory
        self.place = Place(session.guest, directory, f"/{tag}/{directory.name}")
        self.control = share.control
        self._program = session.parts.programs[PROGRAM]
        self._watches: list[Watch] = []

    def watch(
        self, *names: str, mask: In = CHANGES, look: str = "", with_twin: bool = True, known: int = 0
    ) -> Watch:
        """A watcher on `names` in it (default: itself) in the guest and, as its twin, on the host."""
        program = self._program if with_twin else None
        watch = Watch(self.place, self.control, program, mask, names or (".",), look, known)
        self._watches.append(watch)
        return watch

    def close(self) -> None:
        """Ends the watchers."""
        for watch in reversed(self._watches):
            watch.close()


MakeWatchedPlace = Callable[[str], WatchedPlace]


@pytest.fixture
def watched_on(session: EventSession, request: pytest.FixtureRequest) -> Iterator[MakeWatchedPlace]:
    """watched_on(tag) -> a new directory of that share."""
    made: list[WatchedPlace] = []

    def make(tag: str) -> WatchedPlace:
        if tag not in session.shares:
            lacking(f"a server under {' '.join(UNDER[tag])}")
        name = re.sub(r"[^a-z0-9_-]", "-", request.node.originalname.lower())[:40]
        made.append(WatchedPlace(session, tag, name))
        return made[-1]

    yield make
    for place in made:
        place.close()


@pytest.fixture
def watched(watched_on: MakeWatchedPlace) -> WatchedPlace:
    """A new directory of the share with default options."""
    return watched_on("auto")
