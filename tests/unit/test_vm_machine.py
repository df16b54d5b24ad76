# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line, versions and devices, server commands, kernels and caches: the VM layer's pure parts.

Must not start QEMU.
Specification: vhostfs/vm/machine.py, qemu.py, server.py, kernel.py, cache.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.limits import HANG_S
from vhostfs.cli.run import add_arguments, command_text, parse_share, parse_size
from vhostfs.vm.cache import locked, published_directory
from vhostfs.vm.errors import VmError
from vhostfs.vm.image import Image
from vhostfs.vm.kernel import (
    SERIES,
    Kernel,
    debian_version,
    module_dependencies,
    modules_in_load_order,
    newest_image,
    vmlinuz_banner,
)
from vhostfs.vm.lifeline import Lifeline
from vhostfs.vm.machine import (
    Accelerator,
    Machine,
    Share,
    ShareDevice,
    kernel_command_line,
    qemu_command,
    queue_device,
)
from vhostfs.vm.qemu import Qemu, find_qemu, inspect_qemu, kit_place, parse_devices, parse_version
from vhostfs.vm.server import ServerSpec, server_command

QEMU = Qemu(("/bin/qemu",), (7, 2, 0), has_fs_device=True, has_test_device=False, is_kit=False)
IMAGE = Image("6.12", Path("/i/vmlinuz"), Path("/i/initrd"), 10 << 20)
MACHINE = Machine(QEMU, IMAGE, Accelerator.TCG)


def arguments(machine: Machine) -> list[str]:
    return qemu_command(machine, agent_fd=9, console_path=Path("/c,d/console"))


def test_guest_memory_is_shared_with_the_servers() -> None:
    command = arguments(replace(MACHINE, memory_bytes=512 << 20))
    assert "memory-backend-memfd,id=mem,size=512M,share=on" in command
    assert "q35,memory-backend=mem" in command


def test_each_share_has_its_own_socket_and_tag() -> None:
    shares = (Share("one", Path("/s/1")), Share("two", Path("/s/2"), "/two"))
    command = arguments(replace(MACHINE, shares=shares))
    assert "socket,id=share0,path=/s/1" in command
    assert "socket,id=share1,path=/s/2" in command
    assert any(word.startswith("vhost-user-fs-pci,chardev=share1,tag=two,") for word in command)


def test_commas_in_paths_do_not_end_a_qemu_option() -> None:
    assert "file,id=console,path=/c,,d/console" in arguments(MACHINE)


def test_extra_arguments_come_last() -> None:
    assert arguments(replace(MACHINE, qemu_arguments=("-x", "y")))[-2:] == ["-x", "y"]
    assert kernel_command_line(replace(MACHINE, kernel_arguments=("quiet",))).endswith(" quiet")


def test_a_device_that_qemu_lacks_is_refused_with_advice() -> None:
    share = Share("t", Path("/s"), device=ShareDevice.PASS_THROUGH)
    with pytest.raises(VmError, match="--qemu kit"):
        arguments(replace(MACHINE, shares=(share,)))
    command = arguments(replace(MACHINE, qemu=replace(QEMU, has_test_device=True), shares=(share,)))
    assert any(
        word.startswith("vhost-user-test-device-pci,") and "virtio-id=26" in word and "num_vqs=3" in word
        for word in command
    )


def test_the_queue_comes_by_the_usual_device_where_qemu_has_our_patch() -> None:
    tested = replace(QEMU, has_test_device=True)
    both = replace(tested, has_queue_property=True)
    assert [queue_device(qemu) for qemu in (QEMU, tested, both)] == [
        None,
        ShareDevice.PASS_THROUGH,
        ShareDevice.QUEUE,
    ]
    share = Share("t", Path("/s"), device=ShareDevice.QUEUE, request_queues=2)
    word = next(w for w in arguments(replace(MACHINE, qemu=both, shares=(share,))) if "tag=t" in w)
    assert word.startswith("vhost-user-fs-pci,notification=on,chardev=share0,")
    assert "num-request-queues=2" in word
    with pytest.raises(VmError, match="--qemu kit"):
        arguments(replace(MACHINE, qemu=tested, shares=(share,)))


def test_too_little_memory_and_impossible_tags_are_refused() -> None:
    with pytest.raises(VmError, match="too little"):
        arguments(replace(MACHINE, memory_bytes=64 << 20))
    with pytest.raises(VmError, match="36 bytes"):
        arguments(replace(MACHINE, shares=(Share("t" * 37, Path("/s")),)))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright", (7, 2, 22)),
        ("QEMU emulator version 11.0\n", (11, 0, 0)),
    ],
)
def test_qemus_version_is_read(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_another_program_is_not_taken_for_qemu() -> None:
    with pytest.raises(VmError, match="expected 'QEMU emulator version'"):
        parse_version("busybox v1.35")


def test_qemus_devices_are_read() -> None:
    text = (
        'Storage devices:\nname "vhost-user-fs-pci", bus PCI\nname "virtio-serial-pci", bus PCI, alias "x"\n'
    )
    assert parse_devices(text) == {"vhost-user-fs-pci", "virtio-serial-pci"}


def test_a_patched_qemu_is_known_by_its_devices_property_and_not_by_its_version(tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-x86_64"
    for patched in (True, False):
        line = "  notification=<OnOffAuto> - on/off/auto (default: off)" if patched else ""
        program.write_text(
            f"""#!/bin/sh
case "$*" in
-version) echo 'QEMU emulator version 7.2.22' ;;
'-device help') echo 'name "vhost-user-fs-pci", bus PCI' ;;
'-device vhost-user-fs-pci,help') echo '  notify_on_empty=<bool> - on/off (default: on)'; echo '{line}' ;;
esac
"""
        )
        program.chmod(0o755)
        qemu = inspect_qemu(program)
        assert (qemu.has_fs_device, qemu.has_queue_property, qemu.passes_queue) == (True, patched, patched)


def test_a_patched_qemu_that_was_never_built_is_asked_for_in_vain(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="scripts/qemu-patched"):
        find_qemu("patched", tmp_path)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64"),
        ("/usr/lib/x86_64-linux-gnu/libaio.so.1t64.0.2", "lib/libaio.so.1t64.0.2"),
        ("/usr/lib64/ld-linux-x86-64.so.2", "ld-linux-x86-64.so.2"),
        ("/usr/share/seabios/bios-256k.bin", "share/bios-256k.bin"),
        ("/usr/lib/x86_64-linux-gnu/qemu/hw-display-qxl.so", None),
        ("/usr/bin/qemu-img", None),
    ],
)
def test_the_kit_keeps_only_what_qemu_needs(path: str, place: str | None) -> None:
    assert kit_place(path) == place


def test_our_server_is_started_unless_another_is_named() -> None:
    spec = ServerSpec(Path("/d"), Path("/s.sock"), "tag", read_only=True, options=("--xattr",))
    ours = server_command(spec, None)
    assert ours[:4] == [sys.executable, "-m", "vhostfs", "serve"]
    assert ours[-2:] == ["--readonly", "--xattr"]
    other = server_command(spec, "other --socket={socket} -o 'source={dir}'")
    assert other == ["other", "--socket=/s.sock", "-o", "source=/d", "--xattr"]
    with pytest.raises(VmError, match="must contain"):
        server_command(spec, "other {socket}")


def test_a_kernels_release_is_read_from_its_header() -> None:
    image = bytearray(0x400)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x100).to_bytes(2, "little")
    image[0x300:0x320] = b"6.12.1-test (builder@host) #1\0\0\0"
    assert vmlinuz_banner(bytes(image)) == "6.12.1-test (builder@host) #1"
    with pytest.raises(VmError, match="not an x86 Linux boot image"):
        vmlinuz_banner(b"\x7fELF" + bytes(0x400))


def test_modules_come_after_those_that_they_need(tmp_path: Path) -> None:
    folder = tmp_path / "kernel/fs"
    folder.mkdir(parents=True)
    for name, needs in (("virtiofs", "fuse,virtio-ring"), ("fuse", ""), ("virtio-ring", "virtio")):
        (folder / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + needs.encode() + b"\0name=x\0")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    kernel = Kernel("6.12", tmp_path / "vmlinuz", tmp_path)
    ordered = [module.name for module in modules_in_load_order(kernel, ["virtiofs", "fuse", "virtio"])]
    assert ordered == ["fuse", "virtio_ring", "virtiofs"]
    with pytest.raises(VmError, match=r"6\.12 has no module nothing"):
        modules_in_load_order(kernel, ["nothing"])


def test_a_module_from_elsewhere_comes_after_the_kernels_own_that_it_needs(tmp_path: Path) -> None:
    folder = tmp_path / "kernel/fs"
    folder.mkdir(parents=True)
    (folder / "fuse.ko").write_bytes(b"\x7fELF\0depends=\0name=x\0")
    (tmp_path / "modules.builtin").write_text("")
    ours = tmp_path / "ours.ko"
    ours.write_bytes(b"\x7fELF\0depends=fuse\0name=x\0")
    kernel = Kernel("6.12", tmp_path / "vmlinuz", tmp_path)
    assert [m.name for m in modules_in_load_order(kernel, ["ours"], [ours])] == ["fuse", "ours"]


def test_a_module_without_dependencies_has_none() -> None:
    assert module_dependencies(b"\0depends=\0") == ()
    assert module_dependencies(b"\0license=GPL\0") == ()


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    with published_directory(target) as fresh:
        (fresh / "file").write_text("first")
        assert not target.exists()
    with contextlib.suppress(KeyboardInterrupt), published_directory(target) as fresh:
        (fresh / "file").write_text("second")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_lock_is_held_against_other_processes(tmp_path: Path) -> None:
    probe = ["flock", "--nonblock", str(tmp_path / "lock"), "true"]
    with locked(tmp_path / "lock"):
        assert subprocess.run(probe, check=False).returncode == 1
    assert subprocess.run(probe, check=False).returncode == 0


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers(required=True).add_parser("run"))
    return parser.parse_args(["run", *words])


def test_options_may_stand_on_both_sides_of_the_directory() -> None:
    args = parse("--cpus", "3", "dir", "--memory", "2G", "--", "ls", "-l", "--", "x")
    assert (args.directory, args.cpus, args.memory) == (Path("dir"), 3, 2 << 30)
    assert args.command == ["ls", "-l", "--", "x"]
    assert parse("dir").command == []


def test_one_command_word_is_shell_text_and_several_are_quoted() -> None:
    assert command_text(["ls | wc -l"]) == "ls | wc -l"
    assert command_text(["echo", "a b", "$HOME"]) == "echo 'a b' '$HOME'"


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 << 20), ("2G", 2 << 30), ("100", 100 << 20), ("1GiB", 1 << 30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1.5G", "-1M", "1T"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


def test_a_further_share_names_itself_unless_told() -> None:
    plain, full = parse_share("/usr/my docs"), parse_share("/d:tag:/mnt/x:ro")
    assert (plain.tag, plain.mount_point, plain.read_only) == ("my-docs", "/share-my-docs", False)
    assert (full.tag, full.mount_point, full.read_only) == ("tag", "/mnt/x", True)
    for bad in (":x", "/d:a b", "/d:a:b"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_share(bad)


def test_processes_and_scratch_directory_end_with_the_lifeline() -> None:
    with Lifeline() as lifeline:
        process = lifeline.start(["sleep", "100"], log=lifeline.directory / "log")
        directory = lifeline.directory
        assert directory.is_dir()
    assert process.returncode == -signal.SIGTERM
    assert not directory.exists()


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from vhostfs.vm.lifeline import Lifeline\n"
        "lifeline = Lifeline()\n"
        "lifeline.stop(lifeline.start(['true'], log=lifeline.directory / 'log'))\n"
        "process = lifeline.start(['sleep', '100'], log=lifeline.directory / 'log')\n"
        "print(process.pid, lifeline.directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, directory = done.stdout.split()
    pidfd = _pidfd_or_none(int(pid))
    if pidfd is not None:
        assert select.select([pidfd], [], [], HANG_S)[0], "the process still runs"
        os.close(pidfd)
    _await_gone(Path(directory))


def _pidfd_or_none(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _await_gone(path: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while path.exists():
        assert time.monotonic() < deadline, f"{path} is still there"
        time.sleep(0.01)


def test_a_debian_kernel_says_which_source_package_it_was_built_from() -> None:
    banner = "6.1.0-56-amd64 (someone@host) #1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)"
    assert debian_version(banner) == "6.1.192-2"
    assert debian_version("6.1.0 (someone@host) #1 SMP PREEMPT_DYNAMIC") is None


@pytest.mark.parametrize(
    ("series", "names", "newest"),
    [
        (
            "6.1",
            ["6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-11-rt-amd64", "6.12.9+deb12-amd64"],
            "6.1.0-10-amd64",
        ),
        (
            "6.12",
            [
                "6.12.90+deb12-amd64",
                "6.12.9+deb12-amd64",
                "6.12.90+deb12.1-amd64",
                "6.12.99+deb12-cloud-amd64",
            ],
            "6.12.90+deb12.1-amd64",
        ),
        (
            "7.2",
            ["7.2.9+deb13-amd64", "7.2.12+deb13-amd64", "7.2.13+deb13-amd64-dbg", "7.3.1+deb13-amd64"],
            "7.2.12+deb13-amd64",
        ),
        ("7.2", ["7.3.1+deb13-amd64"], None),
    ],
)
def test_the_newest_kernel_of_a_series_is_chosen_whatever_else_the_archive_has(
    series: str, names: list[str], newest: str | None
) -> None:
    found = newest_image([f"linux-image-{name}" for name in names], SERIES[series].image_pattern)
    assert found == (f"linux-image-{newest}" if newest else None)


def test_what_an_image_needs_of_the_kernel_command_line_is_there() -> None:
    image = replace(IMAGE, kernel_arguments=("initcall_blacklist=x",))
    assert "initcall_blacklist=x" in kernel_command_line(replace(MACHINE, image=image)).split()


def test_a_guest_ends_at_its_reboot_unless_that_is_allowed() -> None:
    assert "-no-reboot" in arguments(MACHINE)
    assert "-no-reboot" not in arguments(replace(MACHINE, allow_reboot=True))
