# SPDX-License-Identifier: Apache-2.0
"""The listening socket: where it may be made, who may connect, and what is left behind."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostfs.cli.listen import SOCKET_PATH_MAX_BYTES, Listener, ListenError, bind_at, take_listener


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Listener]:
    listener = bind_at(str(tmp_path / "s"), None)
    listener.listen()
    yield listener
    listener.socket.close()
    listener.remove_files()
    os.close(listener.lock_fd)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_a_new_socket_is_its_owners_alone_and_names_the_process(made: Listener, tmp_path: Path) -> None:
    assert connects(tmp_path / "s")
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o700
    assert (tmp_path / "s.pid").read_text() == f"{os.getpid()}\n"


def test_a_group_may_be_let_in(tmp_path: Path) -> None:
    listener = bind_at(str(tmp_path / "s"), str(os.getgid()))
    found = os.stat(tmp_path / "s")
    assert stat.S_IMODE(found.st_mode) == 0o770
    assert found.st_gid == os.getgid()
    listener.socket.close()
    listener.remove_files()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ListenError, match="there is no such group"):
        bind_at(str(tmp_path / "s"), "no-such-group")
    assert list(tmp_path.iterdir()) == []


def test_two_servers_do_not_share_a_path(made: Listener, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=rf"another server \(pid {os.getpid()}\) uses this path"):
        bind_at(str(tmp_path / "s"), None)
    assert connects(tmp_path / "s")


def test_a_dead_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    (tmp_path / "s.pid").write_text("1234567\n")
    listener = bind_at(str(tmp_path / "s"), None)
    assert not connects(tmp_path / "s")
    listener.listen()
    assert connects(tmp_path / "s")
    assert (tmp_path / "s.pid").read_text() == f"{os.getpid()}\n"
    listener.socket.close()
    listener.remove_files()


def test_a_live_socket_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen(0)
        for _ in range(3):  # also with its queue full
            with pytest.raises(ListenError, match="something listens there"):
                bind_at(str(tmp_path / "s"), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_not_a_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(ListenError, match="a file that is not a socket is in the way"):
        bind_at(str(path), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_a_path_that_cannot_be_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=f"at most {SOCKET_PATH_MAX_BYTES}"):
        bind_at("/tmp/" + "x" * SOCKET_PATH_MAX_BYTES, None)
    with pytest.raises(ListenError, match=r"the directory .*missing does not exist"):
        bind_at(str(tmp_path / "missing" / "s"), None)


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    listener = bind_at(str(tmp_path / "s"), None)
    for name in ("s", "s.pid"):
        (tmp_path / name).unlink()
        (tmp_path / name).write_text("somebody else's")
    listener.remove_files()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "s.pid"]
    listener.socket.close()


def test_a_socket_that_listens_can_be_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(tmp_path / "s"))
        theirs.listen()
        fd = os.dup(theirs.fileno())
    os.set_inheritable(fd, True)
    taken = take_listener(fd)
    assert connects(tmp_path / "s")
    assert not os.get_inheritable(fd)
    taken.remove_files()
    assert (tmp_path / "s").exists()
    taken.socket.close()


def test_what_cannot_be_listened_on_is_explained(tmp_path: Path) -> None:
    a, b = socket.socketpair()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    file = os.open(tmp_path, os.O_RDONLY)
    for fd, expected in (
        (a.detach(), "does not listen"),
        (udp.detach(), "is not a UNIX stream socket"),
        (file, "is not a socket"),
    ):
        with pytest.raises(ListenError, match=expected):
            take_listener(fd)
        os.close(fd)
    with pytest.raises(ListenError, match="no such descriptor is open"):
        take_listener(100_000)
    b.close()
