# SPDX-License-Identifier: Apache-2.0
"""One guest for all tests, with a share for each way of serving, every share with a server of its own.

Must not know single operations. VHOSTFS_TEST_KERNEL chooses another of the guest kernels for all tests,
VHOSTFS_SERVER another server (docs/guest.md). Specification: docs/guest.md.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.guest.place import Place
from vhostfs.vm.accel import choose_accelerator
from vhostfs.vm.cache import cache_root
from vhostfs.vm.driver import BrokenDriverError
from vhostfs.vm.errors import VmError
from vhostfs.vm.guest import Guest
from vhostfs.vm.image import Image, ImageSpec, build_image
from vhostfs.vm.kernel import DEFAULT_SERIES
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import Accelerator, Machine, Share, smallest_memory_bytes
from vhostfs.vm.qemu import Qemu, find_qemu
from vhostfs.vm.server import TEMPLATE_VARIABLE, ServerSpec, ShareServer

PACKAGES = ("acl", "attr", "fio", "python3-minimal", "tar")
"""One image for all tests that need more than busybox."""
TEST_TIMEOUT_S = 400
_BAD_LOG = re.compile(
    r"Traceback \(most recent call last\)|AddressSanitizer|runtime error:|panicked at|Fatal Python error"
    r"|free\(\): |malloc\(\): |stack smashing|internal:|[Ee]rror"
)
_BAD_CONSOLE = re.compile(r"BUG:|WARNING:|Oops|blocked for more than|virtiofs|virtio_fs|fuse:|Call Trace")
_FREE_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Serving:
    """How one share is served."""

    options: tuple[str, ...] = ()
    read_only: bool = False
    request_queues: int = 1


SERVINGS = {
    "share": Serving(("--xattr",)),
    "never": Serving(("--cache=never",)),
    "always": Serving(("--cache=always", "--writeback")),
    "acl": Serving(("--posix-acl",)),
    "readonly": Serving(read_only=True),
    "queues": Serving(("--num-request-queues=2", "--thread-pool-size=2"), request_queues=2),
}
"""By tag; each is mounted at /TAG."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A guest test that hangs fails; starting the guest, which may download, has limits of its own."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S, func_only=True))


class Launchpad:
    """What guests need on this machine: cache, QEMU, images, an accelerator that works."""

    def __init__(self) -> None:
        """Raises VmError when there is no QEMU and none can be fetched."""
        self.cache = cache_root()
        self.qemu: Qemu = find_qemu(None, self.cache)
        self._accelerator: Accelerator | None = None

    def machine(
        self, image: Image, shares: tuple[Share, ...] = (), cpus: int = 1, qemu: Qemu | None = None
    ) -> Machine:
        """A machine with that image and memory enough; finds out about KVM when asked first."""
        memory_bytes = smallest_memory_bytes(image) + _FREE_MEMORY_BYTES
        plain = Machine(qemu or self.qemu, image, Accelerator.TCG, memory_bytes=memory_bytes)
        if self._accelerator is None:
            self._accelerator = choose_accelerator("auto", plain, self.cache)
        return Machine(plain.qemu, image, self._accelerator, shares, memory_bytes, cpus)


@pytest.fixture(scope="session")
def launchpad() -> Launchpad:
    try:
        return Launchpad()
    except VmError as error:
        lacking(f"a QEMU: {error}")


def image_or_lacking(launchpad: Launchpad, spec: ImageSpec) -> Image:
    """The image, or a loud skip with the reason, such as no network for Debian's packages."""
    try:
        return build_image(spec, launchpad.cache)
    except BrokenDriverError:
        raise
    except VmError as error:
        lacking(f"what a guest image is made of: {error}")


@pytest.fixture(scope="session")
def exported() -> Iterator[Path]:
    """A directory on a real file system that holds what is shared; users of the guest can enter it."""
    before = os.umask(0o022)
    root = Path(tempfile.mkdtemp(prefix="vhostfs-guest-tests-"))
    root.chmod(0o755)
    yield root
    os.umask(before)
    shutil.rmtree(root)


@dataclass(frozen=True, slots=True)
class Session:
    """The running guest with its servers, by tag."""

    guest: Guest
    servers: dict[str, ShareServer]
    exported: Path


@pytest.fixture(scope="session")
def session(launchpad: Launchpad, exported: Path) -> Iterator[Session]:
    """The one guest of the tests; its end checks that servers and guest had nothing to complain about."""
    kernel = os.environ.get("VHOSTFS_TEST_KERNEL", DEFAULT_SERIES)
    image = image_or_lacking(launchpad, ImageSpec(kernel, PACKAGES))
    with Lifeline() as lifeline:
        servers, shares = {}, []
        for tag, serving in SERVINGS.items():
            directory = exported / tag
            directory.mkdir()
            socket_path = lifeline.directory / f"{tag}.sock"
            foreign = TEMPLATE_VARIABLE in os.environ
            options = ("--readonly",) if foreign and serving.read_only else serving.options
            spec = ServerSpec(directory, socket_path, tag, serving.read_only and not foreign, options)
            servers[tag] = ShareServer(spec, lifeline)
            shares.append(Share(tag, socket_path, f"/{tag}", request_queues=serving.request_queues))
        guest = Guest(launchpad.machine(image, tuple(shares), cpus=2), lifeline=lifeline)
        with guest:
            yield Session(guest, servers, exported)
        complaints = [f"guest: {line}" for line in lines_matching(_BAD_CONSOLE, guest.console_path)]
        for tag, server in servers.items():
            status = server.stop()
            if status != 0 and TEMPLATE_VARIABLE not in os.environ:
                complaints.append(server.describe_end())
            complaints += [f"server of {tag}: {line}" for line in lines_matching(_BAD_LOG, server.log_path)]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def lines_matching(pattern: re.Pattern[str], path: Path) -> list[str]:
    """The lines of a log that match."""
    return [line for line in path.read_text(errors="replace").splitlines() if pattern.search(line)]


MakePlace = Callable[[str], Place]
_numbers = itertools.count(1)


@pytest.fixture
def place_on(session: Session, request: pytest.FixtureRequest) -> MakePlace:
    """place_on(tag) -> a new directory of that share, for everyone to write in."""

    def make(tag: str) -> Place:
        assert session.guest.alive, "the guest ended in an earlier test"
        name = f"{next(_numbers):03}-{re.sub(r'[^a-z0-9_-]', '-', request.node.originalname.lower())}"
        directory = session.exported / tag / name
        directory.mkdir()
        directory.chmod(0o777)
        return Place(session.guest, directory, f"/{tag}/{name}")

    return make


@pytest.fixture
def place(place_on: MakePlace) -> Place:
    """A new directory of the share with default options and extended attributes."""
    return place_on("share")


@pytest.fixture(params=["share", "never", "always"])
def any_place(place_on: MakePlace, request: pytest.FixtureRequest) -> Place:
    """A new directory of a share of each cache mode."""
    tag: str = request.param
    return place_on(tag)
