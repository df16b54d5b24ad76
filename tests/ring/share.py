# SPDX-License-Identifier: Apache-2.0
"""The directory that one ring test works in, the server that exports it, and the checks at the end.

Must not know what a test does. Servers are kept between tests with the same options, as each test has a
directory of its own below the exported one; a server that comes out of a test in bad shape fails that test.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server import BAD_LOG, ServerProcess
from vhostfs.frontend import FuseClient, Machine, Session, Vmm
from vhostfs.frontend import fuse_abi as abi

KNOWN_DEFAULT_FLAGS = abi.LINUX_7_FLAGS


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The operation inside fails with one of these error numbers."""
    names = "/".join(errno.errorcode[number] for number in numbers)
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"expected {names}, got {error}") from error
    else:
        raise AssertionError(f"expected {names}, but it succeeded")


class Share:
    """`path` is the test's directory on the host; `mount` connects a guest whose `root` is that directory."""

    def __init__(self, server: ServerProcess, path: Path) -> None:
        self.server = server
        self.path = path
        self.may_end = False
        """Set by a test that expects the server to end."""
        self._mounts: list[FuseClient] = []
        self._log_mark = server.log_size()
        # A foreign server may end with its connection, at any moment from now.
        if server.is_foreign() or not server.running:
            server.start()
        if not server.is_foreign() and "--once" not in server.options:
            server.note_idle_descriptors()

    @property
    def relative(self) -> str:
        """The test's directory seen from the exported one; empty when it is that one."""
        inside = self.path.relative_to(self.server.shared_dir)
        return "" if inside == Path(".") else str(inside)

    def mount(self, machine: Machine | None = None, flags: int = KNOWN_DEFAULT_FLAGS) -> FuseClient:
        client = FuseClient.mount(self.server.socket_path, machine, flags)
        self._mounts.append(client)
        if self.relative:
            client.root = client.walk(self.relative).nodeid
        return client

    def boot(self, machine: Machine | None = None) -> Session:
        """Connects a guest that has not sent FUSE_INIT."""
        client = FuseClient(Session(Vmm.boot(self.server.socket_path, machine)))
        self._mounts.append(client)
        return client.session

    def log(self) -> str:
        """What the server has written since the test began."""
        return self.server.log_since(self._log_mark)

    def unmount(self) -> None:
        while self._mounts:
            self._mounts.pop().close()

    def serves(self) -> bool:
        """Hangs up and comes back as a new front end: does the server answer as if nothing had been?"""
        self.unmount()
        client = self.mount()
        probe = os.urandom(8).hex()
        (self.path / probe).write_text(probe)
        content = client.read_file(client.lookup(client.root, probe).nodeid)
        self.unmount()
        (self.path / probe).unlink()
        return content == probe.encode()

    def finish(self) -> None:
        """Fails the test when the server crashed, complained like a crash, or kept descriptors."""
        self.unmount()
        server = self.server
        if self.may_end:
            return
        trouble = BAD_LOG.search(self.log())
        if trouble:
            pytest.fail(f"the server logged {trouble.group()!r}:\n{self.log()}", pytrace=False)
        if server.is_foreign():
            return
        if not server.running:
            pytest.fail(
                f"the server ended with status {server.process.returncode}; log:\n{self.log()}", pytrace=False
            )
        leaked = server.leaked_descriptors()
        if leaked:
            server.kill()
            pytest.fail("descriptors left open after the session:\n" + "\n".join(leaked), pytrace=False)


class ServerPool:
    """Servers by what they were started with."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._servers: dict[tuple[tuple[str, ...], int | None], ServerProcess] = {}
        self._count = 0

    def _new_directory(self) -> Path:
        self._count += 1
        path = self._base / f"export{self._count}"
        path.mkdir()
        return path

    def start(
        self, options: Sequence[str], descriptor_limit: int | None, directory: Path | None = None
    ) -> ServerProcess:
        return ServerProcess(directory or self._new_directory(), options, descriptor_limit=descriptor_limit)

    def shared(self, options: Sequence[str], descriptor_limit: int | None) -> ServerProcess:
        key = tuple(options), descriptor_limit
        if key not in self._servers:
            self._servers[key] = self.start(options, descriptor_limit)
        return self._servers[key]

    def new_test_directory(self, server: ServerProcess) -> Path:
        self._count += 1
        path = server.shared_dir / f"test{self._count}"
        path.mkdir()
        path.chmod(0o777)
        return path

    def close(self) -> list[str]:
        """Ends all servers; what each that did not end well has to say."""
        complaints = []
        for (options, _), server in self._servers.items():
            if server.running:
                status = server.terminate()
                # 0, or the signal itself: libvirt and systemd take either as an orderly end.
                if status not in (0, -15) and not server.is_foreign():
                    complaints.append(
                        f"server {options}: status {status} after SIGTERM; log ends:\n{server.log()[-500:]}"
                    )
            server.discard()
        return complaints
