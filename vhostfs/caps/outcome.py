# SPDX-License-Identifier: Apache-2.0
"""Owns the result of one trial: it works, or the error that was seen.
Must not know what was tried.
Specification: errno(3); docs/caps.md, "Trials"."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """error: 0, or the errno that the kernel answered with. reason: in words, "" when it works."""

    error: int
    reason: str = ""

    @classmethod
    def of(cls, result: int) -> Outcome:
        """From a descriptor or 0, or a negative errno."""
        return cls(0) if result >= 0 else cls(-result, os.strerror(-result))

    @property
    def works(self) -> bool:
        return not self.error and not self.reason

    @property
    def error_name(self) -> str | None:
        """As EPERM; None when it works, or when no system call said no."""
        return errno.errorcode.get(self.error, str(self.error)) if self.error else None

    def as_json(self) -> dict[str, Any]:
        return {"works": self.works, "error": self.error_name, "reason": self.reason or None}
