# SPDX-License-Identifier: Apache-2.0
"""Chooses KVM or emulation, finding out once per boot of the host whether KVM really starts a guest.

Must not know of shares: the trial guest has none, so that no server sees a connection that goes away.
Specification: docs/guest.md, section on acceleration.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from vhostfs.vm.cache import Progress, quiet, write_atomically
from vhostfs.vm.errors import VmError
from vhostfs.vm.guest import Guest
from vhostfs.vm.machine import Accelerator, Machine, smallest_memory_bytes

SIGN_OF_LIFE_TIMEOUT_S = 20.0
_KVM = Path("/dev/kvm")


def choose_accelerator(choice: str, machine: Machine, cache: Path, progress: Progress = quiet) -> Accelerator:
    """The accelerator for `--accel choice`: "kvm", "tcg" or "auto", which takes KVM if it starts a guest
    here.

    `machine` is what will be launched; its shares and accelerator are passed over. Raises VmError.
    """
    if choice == "tcg":
        return Accelerator.TCG
    if choice == "kvm":
        if not os.access(_KVM, os.R_OK | os.W_OK):
            raise VmError(f"--accel kvm: {_KVM} cannot be opened; join the group kvm, or use --accel tcg")
        return Accelerator.KVM
    if choice != "auto":
        raise VmError(f"--accel {choice}: expected auto, kvm or tcg")
    if not _KVM.exists():
        progress("this machine has no KVM: the guest is emulated, which is slower")
        return Accelerator.TCG
    if not os.access(_KVM, os.R_OK | os.W_OK):
        progress(f"{_KVM} is not yours to open (group kvm?): the guest is emulated, which is slower")
        return Accelerator.TCG
    record = cache / "kvm" / f"{_boot_id()}.json"
    problem = _known_problem(record)
    if problem is None:
        progress("trying KVM")
        problem = _try_kvm(machine)
        for old in record.parent.glob("*.json"):
            old.unlink(missing_ok=True)
        write_atomically(record, json.dumps({"problem": problem}))
        if problem:
            progress(f"KVM is of no use here ({problem}): the guest is emulated, which is slower")
    elif problem:
        progress(f"KVM was of no use before ({problem}), emulating; --accel kvm insists")
    return Accelerator.TCG if problem else Accelerator.KVM


def kvm_record(cache: Path) -> str | None:
    """What a trial of this boot has found: "" all well, a problem, or None where there was none."""
    return _known_problem(cache / "kvm" / f"{_boot_id()}.json")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _known_problem(record: Path) -> str | None:
    """What an earlier trial of this boot said: "" for all well, None for no trial."""
    try:
        problem = json.loads(record.read_text(encoding="utf-8"))["problem"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return problem if isinstance(problem, str) else None


def _try_kvm(machine: Machine) -> str:
    """Boots a guest without shares under KVM; "" when it came up, else what was seen instead."""
    trial = replace(
        machine,
        shares=(),
        qemu_arguments=(),
        accelerator=Accelerator.KVM,
        memory_bytes=smallest_memory_bytes(machine.image),
        kernel_arguments=(*machine.kernel_arguments, "loglevel=7"),
    )
    guest = Guest(trial)
    try:
        guest.launch(silence_timeout_s=SIGN_OF_LIFE_TIMEOUT_S)
    except VmError as error:
        return str(error).splitlines()[0]
    finally:
        guest.close(graceful=False)
    return ""
