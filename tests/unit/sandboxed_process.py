# SPDX-License-Identifier: Apache-2.0
"""Run by test_sandbox_walls.py: enters a sandbox as its argument (JSON) says, reports, obeys stdin.

Stands in for a server; all it needs is imported before enter_sandbox, as a server must.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess  # noqa: F401 (found while this process still may read Python's library)
import sys
import threading
from pathlib import Path
from typing import Any

from vhostfs._native import lib
from vhostfs.errors import UserError
from vhostfs.share import sandbox
from vhostfs.share.capabilities import Capability, parse_modcaps
from vhostfs.share.idmap import parse_namespace_range
from vhostfs.share.options import SandboxMode, SeccompAction, ServeOptions

_PR_SET_DUMPABLE = 4


def report(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def names(fd: int, path: str = ".") -> list[str]:
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
    try:
        return sorted(os.listdir(opened))
    finally:
        os.close(opened)


def import_result(name: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError:
        return "refused"
    return "imported"


def do(command: str) -> None:
    match command:
        case "socket":
            socket.socket(socket.AF_UNIX)
        case "thread-socket":
            thread = threading.Thread(target=socket.socket)
            thread.start()
            thread.join()
        case "inject":
            import fcntl  # a built-in module of CPython, or imported above by another

            fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI
        case "mount":
            ctypes.CDLL(None).mount(b"/", b"/", None, 0x1000, None)
        case "ignore-stop":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "crash":
            raise RuntimeError("asked for")
        case "exit":
            sys.exit(7)
    report("done")


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    if "uid" in request:
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
        # After a change of user /proc/self belongs to root; a server that was started as a user has its own.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    if "stop_timeout_s" in request:
        sandbox.STOP_TIMEOUT_S = request["stop_timeout_s"]
    listener = socket.socket(socket.AF_UNIX)
    share = os.path.realpath(request["share"])
    options = ServeOptions(
        shared_dir=share,
        listen_fd=listener.fileno(),
        sandbox=SandboxMode(request["sandbox"]),
        seccomp=SeccompAction(request.get("seccomp", "kill")),
        modcaps=parse_modcaps(request.get("modcaps", "-kill")),
        uid_map=tuple(parse_namespace_range(text) for text in request.get("uid_map", ())),
        gid_map=tuple(parse_namespace_range(text) for text in request.get("gid_map", ())),
    )
    privileged: list[int] = []

    def while_privileged(root_fd: int) -> frozenset[Capability]:
        privileged.append(lib.vf_effective_capabilities())
        return frozenset({Capability.DAC_READ_SEARCH} if request.get("handles") else ())

    try:
        entered = sandbox.enter_sandbox(
            options,
            share,
            keep_fds=request.get("keep_fds", ()),
            listener_fds=[listener.fileno()],
            when_ended=lambda: Path(request["ended"]).touch(),
            while_privileged=while_privileged,
        )
    except UserError as error:
        report({"error": str(error)})
        sys.exit(1)
    report(
        {
            "root": sorted(os.listdir("/")),
            "share": names(entered.root_fd),
            "above_share": names(entered.root_fd, ".."),
            "proc_fd": names(entered.proc_fd_dir),
            "above_proc_fd": names(entered.proc_fd_dir, ".."),
            "supervised": entered.supervised,
            "pid": os.getpid(),
            "ids": [*os.getresuid(), *os.getresgid()],
            "known": [listener.fileno(), entered.root_fd, entered.proc_fd_dir],
            "import": import_result(request.get("import", "wave")),
            "capabilities_while_privileged": privileged[0],
        }
    )
    for line in sys.stdin:
        do(line.strip())


main()
