# SPDX-License-Identifier: Apache-2.0
"""The sandbox, seen from outside and inside of real processes. Most of it takes root."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhostfs
from tests.conftest import lacking
from tests.limits import AT_ONCE_S, HANG_S
from vhostfs.share.capabilities import SERVER_CAPABILITIES, Capability, capability_mask

SCRIPT = Path(__file__).with_name("sandboxed_process.py")
NOBODY = 65534


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {HANG_S:.0f} s: {what}"
        time.sleep(0.01)


class Sandboxed:
    """A running sandboxed_process.py."""

    def __init__(self, request: dict[str, Any], prefix: tuple[str, ...] = (), **settings: Any) -> None:
        self.ended = Path(request["ended"])
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(SCRIPT), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(vhostfs.__file__).parents[1])},
            **settings,
        )
        line = self._line()
        assert line, self.process.communicate()[1]
        self.report: dict[str, Any] = json.loads(line)
        # The serving process, by its number out here.
        self.pid = self.process.pid
        if self.report.get("supervised"):
            pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self.pid = int(pids[0])

    def _line(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline())

    def tell(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line().strip()

    def finish(self) -> tuple[int, str]:
        """Exit status and stderr of a process that ends by itself."""
        self.process.wait(HANG_S)  # stdin stays open: its end would be another reason to stop
        _, stderr = self.process.communicate(timeout=HANG_S)
        return self.process.returncode, stderr

    def status(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def has_own_namespace(self, kind: str) -> bool:
        return os.readlink(f"/proc/{self.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()


Enter = Callable[..., Sandboxed]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter and write, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="vhostfs-test-") as name:
        path = Path(name)
        path.chmod(0o777)
        (path / "share").mkdir()
        (path / "share" / "inside").write_text("")
        (path / "outside").write_text("")
        yield path


@pytest.fixture
def enter(place: Path) -> Iterator[Enter]:
    running: list[Sandboxed] = []

    def start(
        sandbox: str, *, prefix: tuple[str, ...] = (), pass_fds: tuple[int, ...] = (), **more: Any
    ) -> Sandboxed:
        request = {"sandbox": sandbox, "share": str(place / "share"), "ended": str(place / "ended"), **more}
        entered = Sandboxed(request, prefix, pass_fds=pass_fds)
        running.append(entered)
        return entered

    yield start
    for entered in running:
        entered.close()


def mask_in(status: dict[str, str], name: str) -> int:
    return int(status[name], 16)


# ---- what is seen from inside


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("sandbox", ["namespace", "chroot"])
def test_the_share_is_the_root_directory_and_nothing_is_above_it(enter: Enter, sandbox: str) -> None:
    inside = enter(sandbox).report
    assert inside["root"] == inside["share"] == inside["above_share"] == ["inside"]


@pytest.mark.usefixtures("needs_root")
def test_nothing_is_above_the_descriptors_of_proc(enter: Enter) -> None:
    inside = enter("namespace").report
    assert set(inside["above_proc_fd"]) - set(inside["proc_fd"]) <= {str(n) for n in range(10)}
    assert "environ" not in inside["above_proc_fd"]


def test_without_a_sandbox_the_descriptors_are_the_same(enter: Enter) -> None:
    inside = enter("none").report
    assert inside["share"] == ["inside"]
    assert "outside" in inside["above_share"]
    assert str(inside["known"][0]) in inside["proc_fd"]


@pytest.mark.usefixtures("needs_root")
def test_mounts_below_the_share_are_inside_too(enter: Enter, place: Path) -> None:
    shell = 'mount -t tmpfs none "$1" && touch "$1/mounted" && shift && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-ec", shell, "sh", str(place / "share"))
    assert enter("namespace", prefix=prefix).report["share"] == ["mounted"]


@pytest.mark.usefixtures("needs_root")
def test_the_whole_host_can_be_shared(enter: Enter) -> None:
    entered = enter("namespace", share="/")
    assert entered.report["share"] == sorted(os.listdir("/"))
    assert entered.has_own_namespace("mnt")


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("sandbox", ["namespace", "chroot"])
def test_python_imports_nothing_that_the_guest_wrote(enter: Enter, place: Path, sandbox: str) -> None:
    library = Path(json.__file__).parents[1]
    planted = place / "share" / library.relative_to("/")
    planted.mkdir(parents=True)
    (planted / "planted.py").write_text("raise SystemExit('the guest runs code')")
    assert enter(sandbox, **{"import": "planted"}).report["import"] == "refused"


@pytest.mark.usefixtures("needs_root")
def test_descriptors_that_were_inherited_are_closed(enter: Enter, place: Path) -> None:
    leak, kept = os.open("/", os.O_RDONLY), os.open(place, os.O_RDONLY)
    try:
        inside = enter("namespace", pass_fds=(leak, kept), keep_fds=[kept]).report
    finally:
        os.close(leak)
        os.close(kept)
    expected = {0, 1, 2, kept, *inside["known"]}
    listing = 2  # the directory's own descriptors while it is read
    found = {int(name) for name in inside["proc_fd"]}
    assert expected <= found
    assert len(found - expected) == listing


# ---- what is seen from outside


@pytest.mark.usefixtures("needs_root")
def test_namespace_gives_own_mounts_processes_and_an_empty_network(enter: Enter, place: Path) -> None:
    entered = enter("namespace")
    assert entered.report["pid"] == 1
    for kind in ("mnt", "pid", "net"):
        assert entered.has_own_namespace(kind), kind
    devices = Path(f"/proc/{entered.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]
    assert os.path.samefile(f"/proc/{entered.pid}/root", place / "share")
    mounts = Path(f"/proc/{entered.pid}/mountinfo").read_text().splitlines()
    assert [line.split()[4] for line in mounts] == ["/"]


@pytest.mark.usefixtures("needs_root")
def test_chroot_makes_no_namespaces(enter: Enter, place: Path) -> None:
    entered = enter("chroot")
    assert os.path.samefile(f"/proc/{entered.pid}/root", place / "share")
    assert not any(entered.has_own_namespace(kind) for kind in ("mnt", "pid", "net"))


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("sandbox", ["namespace", "chroot", "none"])
def test_only_the_servers_capabilities_are_left_and_a_filter_is_loaded(enter: Enter, sandbox: str) -> None:
    entered = enter(sandbox)
    status = entered.status()
    expected = capability_mask(SERVER_CAPABILITIES)
    assert mask_in(status, "CapEff") == mask_in(status, "CapPrm") == mask_in(status, "CapBnd") == expected
    assert mask_in(status, "CapInh") == mask_in(status, "CapAmb") == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Groups"] == ""
    # The hook for what takes more rights came before.
    assert entered.report["capabilities_while_privileged"] & 1 << Capability.SYS_ADMIN


@pytest.mark.usefixtures("needs_root")
def test_file_handles_and_modcaps_change_the_capabilities(enter: Enter) -> None:
    status = enter("chroot", handles=True, modcaps="+sys_admin:-mknod").status()
    wanted = SERVER_CAPABILITIES | {Capability.DAC_READ_SEARCH, Capability.SYS_ADMIN}
    assert mask_in(status, "CapEff") == capability_mask(wanted - {Capability.MKNOD})


@pytest.mark.usefixtures("needs_root")
def test_the_process_outside_keeps_no_more_rights_than_it_needs(enter: Enter) -> None:
    entered = enter("namespace")
    entered.pid = entered.process.pid
    kept = capability_mask(frozenset({Capability.DAC_OVERRIDE, Capability.KILL}))
    until(lambda: mask_in(entered.status(), "CapEff") == kept, "capabilities dropped")
    assert not entered.has_own_namespace("mnt")


# ---- the system call filter


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("command", ["socket", "thread-socket", "mount"])
@pytest.mark.parametrize("seccomp", ["kill", "trap"])
def test_a_forbidden_system_call_ends_the_server(enter: Enter, command: str, seccomp: str) -> None:
    entered = enter("namespace", seccomp=seccomp)
    assert entered.tell(command) == ""
    status, stderr = entered.finish()
    assert status == 128 + signal.SIGSYS
    assert "a system call that its filter forbids" in stderr
    # Of mount(2) and socket(2) on x86-64.
    number = 165 if command == "mount" else 41
    assert (f"forbidden system call, number {number}\n" in stderr) == (seccomp == "trap")
    assert entered.ended.exists()


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("seccomp", ["log", "none"])
def test_a_forbidden_system_call_may_be_let_through(enter: Enter, seccomp: str) -> None:
    assert enter("namespace", seccomp=seccomp).tell("socket") == '"done"'


def test_nothing_can_be_typed_into_the_users_terminal(enter: Enter) -> None:
    entered = enter("none")
    assert entered.tell("inject") == ""
    assert entered.finish()[0] == -signal.SIGSYS


# ---- the process outside


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_ends_both_processes_at_once(enter: Enter, number: signal.Signals) -> None:
    entered = enter("namespace")
    started_s = time.monotonic()
    entered.process.send_signal(number)
    assert entered.finish() == (0, "")
    assert time.monotonic() - started_s < AT_ONCE_S
    assert entered.ended.exists()
    assert not Path(f"/proc/{entered.pid}").exists()


@pytest.mark.usefixtures("needs_root")
def test_the_server_dies_with_the_process_outside(enter: Enter) -> None:
    entered = enter("namespace")
    entered.process.kill()
    entered.process.wait(HANG_S)
    until(lambda: not Path(f"/proc/{entered.pid}").exists(), "the server's end")


@pytest.mark.usefixtures("needs_root")
def test_a_server_that_does_not_stop_is_killed(enter: Enter) -> None:
    entered = enter("namespace", stop_timeout_s=0.2)
    assert entered.tell("ignore-stop") == '"done"'
    entered.process.terminate()
    status, stderr = entered.finish()
    assert status == 128 + signal.SIGKILL
    assert "did not end within" in stderr
    assert entered.ended.exists()


@pytest.mark.usefixtures("needs_root")
def test_the_exit_status_is_the_servers(enter: Enter) -> None:
    entered = enter("namespace")
    entered.tell("exit")
    assert entered.finish()[0] == 7
    assert entered.ended.exists()


@pytest.mark.usefixtures("needs_root")
def test_an_exception_is_told_without_reading_files_of_the_guest(enter: Enter, place: Path) -> None:
    planted = place / "share" / SCRIPT.relative_to("/")
    planted.parent.mkdir(parents=True)
    os.mkfifo(planted)  # whoever opens it to show a source line would wait for ever
    entered = enter("namespace")
    entered.tell("crash")
    status, stderr = entered.finish()
    assert status == 1
    assert "RuntimeError: asked for" in stderr


# ---- where there is no way


IN_A_CHROOT = """
mount -t tmpfs none "$1"
mkdir "$1/root"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$1/root/"
    elif [ -d "$entry" ]; then mkdir "$1/root$entry" && mount --rbind "$entry" "$1/root$entry"
    fi
done
root=$1
shift
exec chroot "$root/root" "$@"
"""


@pytest.mark.usefixtures("needs_root")
def test_a_root_directory_that_is_no_mount_point_is_left_alone_and_chroot_does(
    enter: Enter, tmp_path: Path
) -> None:
    prefix = ("unshare", "--mount", "sh", "-ec", IN_A_CHROOT, "sh", str(tmp_path))
    error = enter("namespace", prefix=prefix).report["error"]
    assert "the root directory is no mount point" in error
    assert "use --sandbox=chroot" in error
    assert enter("chroot", prefix=prefix).report["root"] == ["inside"]


# ---- without root


def entered_or_lacking(entered: Sandboxed) -> Sandboxed:
    if "cannot make namespaces" in entered.report.get("error", ""):
        lacking("user namespaces for users")
    return entered


@pytest.mark.usefixtures("needs_root")
def test_without_root_a_user_namespace_with_ones_own_ids_does(enter: Enter, place: Path) -> None:
    entered = entered_or_lacking(enter("namespace", uid=NOBODY))
    assert entered.report["root"] == ["inside"]
    assert entered.report["ids"] == [NOBODY] * 6
    for kind in ("user", "mnt", "pid", "net"):
        assert entered.has_own_namespace(kind), kind
    assert Path(f"/proc/{entered.pid}/uid_map").read_text().split() == [str(NOBODY), str(NOBODY), "1"]
    assert Path(f"/proc/{entered.pid}/setgroups").read_text() == "deny\n"
    assert mask_in(entered.status(), "CapEff") == capability_mask(SERVER_CAPABILITIES)
    assert entered.status()["Seccomp"] == "2"


@pytest.mark.usefixtures("needs_root")
def test_without_root_ones_own_id_may_be_root_inside(enter: Enter) -> None:
    entered = entered_or_lacking(
        enter("namespace", uid=NOBODY, uid_map=[f":0:{NOBODY}:1:"], gid_map=[f":0:{NOBODY}:1:"])
    )
    assert entered.report["ids"] == [0] * 6
    assert Path(f"/proc/{entered.pid}/gid_map").read_text().split() == ["0", str(NOBODY), "1"]


@pytest.mark.usefixtures("needs_root")
def test_root_may_map_ids_as_it_likes(enter: Enter) -> None:
    entered = entered_or_lacking(
        enter("namespace", uid_map=[":0:100000:1000:", ":1000:7:1:"], gid_map=[":0:200000:65536:"])
    )
    assert entered.report["ids"] == [0] * 6
    assert Path(f"/proc/{entered.pid}/uid_map").read_text().split() == [
        "0",
        "100000",
        "1000",
        "1000",
        "7",
        "1",
    ]
    assert Path(f"/proc/{entered.pid}/status").read_text().count("100000") == 4


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("installed", [True, False])
def test_more_ids_take_newuidmap(enter: Enter, place: Path, installed: bool, monkeypatch: Any) -> None:
    directory = place / "bin"
    directory.mkdir()
    if installed:
        tool = directory / "newuidmap"
        tool.write_text('#!/bin/sh\nshift\necho "refused: $*" >&2\nexit 1\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    error = enter("namespace", uid=NOBODY, uid_map=[":0:100000:1000:", ":1000:7:1:"]).report["error"]
    if "cannot make namespaces" in error:
        lacking("user namespaces for users")
    expected = (
        "refused: 0 100000 1000 1000 7 1 (see /etc/subuid)" if installed else "newuidmap is not installed"
    )
    assert expected in error


@pytest.mark.usefixtures("needs_root")
def test_newuidmap_itself_maps_the_ids(enter: Enter, place: Path) -> None:
    if shutil.which("newuidmap") is None or shutil.which("newgidmap") is None:
        lacking("newuidmap (Debian: uidmap)")
    (place / "sub").write_text(f"{NOBODY}:100000:1000\n")
    shell = 'for f in /etc/subuid /etc/subgid; do mount --bind "$0" $f; done; exec "$@"'
    entered = entered_or_lacking(
        enter(
            "namespace",
            prefix=("unshare", "--mount", "sh", "-ec", shell, str(place / "sub")),
            uid=NOBODY,
            uid_map=[f":0:{NOBODY}:1:", ":1:100000:1000:"],
            gid_map=[f":0:{NOBODY}:1:", ":1:100000:1000:"],
        )
    )
    for kind in ("uid", "gid"):
        lines = Path(f"/proc/{entered.pid}/{kind}_map").read_text().splitlines()
        assert [line.split() for line in lines] == [["0", str(NOBODY), "1"], ["1", "100000", "1000"]]


@pytest.mark.usefixtures("needs_root")
def test_what_takes_root_says_so(enter: Enter) -> None:
    error = enter("chroot", uid=NOBODY).report["error"]
    assert error.startswith("--sandbox=chroot needs")
    assert "use --sandbox=namespace" in error
