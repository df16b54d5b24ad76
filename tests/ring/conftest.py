# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the ring tests: a server, a directory on it, and a guest that has mounted it.

Must not know single operations. `make_share` takes server options; `share` and `fs` are the default ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ring.share import ServerPool, Share
from tests.server import ServerProcess, UnsupportedByServerError
from vhostfs.frontend import FuseClient

MakeShare = Callable[..., Share]


@pytest.fixture(scope="session")
def server_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    os.umask(0o022)
    pool = ServerPool(tmp_path_factory.mktemp("ring"))
    yield pool
    complaints = pool.close()
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def make_share(server_pool: ServerPool) -> Iterator[MakeShare]:
    """make_share(*options, private=False, descriptor_limit=None, directory=None) -> Share.

    A private share has a server of its own and is its exported directory itself.
    """
    shares: list[Share] = []
    own: list[ServerProcess] = []

    def make(
        *options: str,
        private: bool = False,
        descriptor_limit: int | None = None,
        directory: Path | None = None,
    ) -> Share:
        try:
            if private or directory is not None:
                server = server_pool.start(options, descriptor_limit, directory)
                own.append(server)
                share = Share(server, server.shared_dir)
            else:
                server = server_pool.shared(options, descriptor_limit)
                share = Share(server, server_pool.new_test_directory(server))
        except UnsupportedByServerError as error:
            pytest.skip(str(error))
        shares.append(share)
        return share

    yield make
    try:
        for share in shares:
            share.finish()
    finally:
        for server in own:
            server.discard()


@pytest.fixture
def share(make_share: MakeShare) -> Share:
    return make_share()


@pytest.fixture
def fs(share: Share) -> FuseClient:
    return share.mount()


@pytest.fixture
def ours() -> None:
    """For what only this project's server promises; skipped when VHOSTFS_SERVER names another."""
    if ServerProcess.is_foreign():
        pytest.skip("another server is under test")
