# SPDX-License-Identifier: Apache-2.0
"""Owns how arguments are parsed and how a wrong one is answered: one line, with what would be right.
Must not know any command's options.
Specification: argparse; house style "errors to people"."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from ..errors import UserError

T = TypeVar("T")


class UsageError(UserError):
    """Arguments that cannot be meant."""

    exit_status = 2


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'X'?`, or nothing when no word is near."""
    import difflib  # for mistakes alone

    found = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as written and gives long options room."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines that are too long are broken, the others kept."""
        import textwrap  # for help alone

        lines = (line if len(line) <= width else textwrap.fill(line, width) for line in text.splitlines())
        return "".join(f"{indent}{line}\n" for line in lines)


class Parser(argparse.ArgumentParser):
    """
    Raises UsageError instead of printing the usage and exiting.

    No abbreviations: `--cach=auto` may become another option's name tomorrow.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        # argparse says "argument --x: expected one argument" and the like.
        text = message.removeprefix("argument ")
        name, separator, value = text.partition(": ignored explicit argument ")
        raise UsageError(f"{name} takes no value; seen: {value}" if separator else text)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args)
        for word in unknown:
            if word.startswith("-") and word != "-":
                name = word.split("=", 1)[0]
                known = [option for action in self._actions for option in action.option_strings]
                if name in known:
                    raise UsageError(f"{word}: {name} takes no value")
                raise UsageError(
                    f"{name} is no option of {self.prog}{nearest(name, known) or '; see --help'}"
                )
        if unknown:
            raise UsageError(f"'{unknown[0]}' is one argument too many; see {self.prog} --help")
        return parsed


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type from a function that raises ValueError with the text to show."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"'{text}': {error}") from None

    return convert


def choice(values: dict[str, T], *, hidden: dict[str, T] | None = None) -> Callable[[str], T]:
    """An argparse type for one of some words, in any case; hidden: understood, but not offered."""

    def convert(text: str) -> T:
        found = {**values, **(hidden or {})}.get(text.lower())
        if found is None:
            words = list(values)
            offered = f"{', '.join(words[:-1])} or {words[-1]}"
            raise argparse.ArgumentTypeError(f"'{text}' is not possible: use {offered}{nearest(text, words)}")
        return found

    return convert


def whole_number(text: str) -> int:
    """An argparse type for 0, 1, 2 ..."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


class Collect(argparse.Action):
    """Appends each value's tuple to one tuple; an option that may be given more than once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))
