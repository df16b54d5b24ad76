# SPDX-License-Identifier: Apache-2.0
"""Owns how text from elsewhere and numbers are shown on a terminal.
Must not know what they mean.
Specification: ECMA-48 for the few colours; house style "errors to people"."""

from __future__ import annotations

import enum
import os
from typing import TextIO


class Style(enum.Enum):
    """What a piece of text is; the terminal's own colours."""

    PLAIN = ""
    GOOD = "32"
    BAD = "1;31"
    FAINT = "2"
    STRONG = "1"


def wants_colour(stream: TextIO) -> bool:
    """Only on a terminal that has colours, and not where NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: Style, *, is_coloured: bool) -> str:
    return f"\x1b[{style.value}m{text}\x1b[0m" if is_coloured and style.value else text


def printable(text: str) -> str:
    """Nothing in it moves the cursor, hides or breaks the line; bytes that are not UTF-8 as \\x9f."""
    if text.isprintable():
        return text.replace("\\", "\\\\") if "\\" in text else text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def duration_text(seconds: float) -> str:
    """As 47 s, 12 min, 3 h 20 min or 5 d 3 h."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 1:
        return f"{minutes} min"
    if days < 1:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def microseconds_text(value_us: int) -> str:
    """As 64 us, 4.1 ms or 2.1 s."""
    if value_us < 1000:
        return f"{value_us} us"
    if value_us < 1_000_000:
        return f"{value_us / 1000:.3g} ms"
    return f"{value_us / 1_000_000:.3g} s"
