# SPDX-License-Identifier: Apache-2.0
"""Owns the text forms of id maps: --uid-map/--gid-map and --translate-uid/--translate-gid.
Must not know how they are applied (the kernel's user namespace; native/idmap.c).
Specification: virtiofsd 1.13's README on these options; user_namespaces(7)."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable
from typing import NamedTuple

# 4294967295 is "no id" to the kernel (setresuid(2) takes it as "leave unchanged"): never part of a range.
END_OF_IDS = 0xFFFF_FFFF
# /proc/PID/uid_map takes at most this many lines (user_namespaces(7)).
MAX_NAMESPACE_RANGES = 340


class IdMapError(ValueError):
    """A map that cannot be meant; the text says what was seen and what is right."""


class NamespaceRange(NamedTuple):
    """One line of a user namespace's uid_map or gid_map."""

    inside: int
    outside: int
    size: int


class IdRuleKind(enum.IntEnum):
    """enum vf_id_rule_kind of native/api.h."""

    GUEST_TO_HOST = 0
    HOST_TO_GUEST = 1
    SQUASH_GUEST = 2
    SQUASH_HOST = 3
    FORBID_GUEST = 4


class IdRule(NamedTuple):
    """struct vf_id_rule of native/api.h: ids [source, source + size) and what becomes of them."""

    kind: IdRuleKind
    source: int
    target: int
    size: int


_GUEST_SIDE = frozenset({IdRuleKind.GUEST_TO_HOST, IdRuleKind.SQUASH_GUEST, IdRuleKind.FORBID_GUEST})

_TRANSLATE_FORMS = {
    "guest": "guest:GUEST_BASE:HOST_BASE:COUNT",
    "host": "host:HOST_BASE:GUEST_BASE:COUNT",
    "squash-guest": "squash-guest:GUEST_BASE:HOST_ID:COUNT",
    "squash-host": "squash-host:HOST_BASE:GUEST_ID:COUNT",
    "forbid-guest": "forbid-guest:GUEST_BASE:COUNT",
    "map": "map:GUEST_BASE:HOST_BASE:COUNT",
}


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise IdMapError(f"'{text}' is not an id or count (decimal digits)")
    value = int(text)
    if value > END_OF_IDS:
        raise IdMapError(f"{text} is too large (ids end at {END_OF_IDS - 1})")
    return value


def _check_range(what: str, start: int, count: int) -> None:
    if start + count > END_OF_IDS:
        raise IdMapError(f"the {what} range {start}+{count} goes past the last id, {END_OF_IDS - 1}")


def _check_overlap(what: str, ranges: Iterable[tuple[int, int]]) -> None:
    ordered = sorted(ranges)
    for (start, count), (next_start, _) in itertools.pairwise(ordered):
        if next_start < start + count:
            raise IdMapError(f"{what} id {next_start} is mapped twice")


def parse_namespace_range(text: str) -> NamespaceRange:
    """`:inside:outside:count:`; the first character, not a digit, is the separator."""
    form = "expected :NAMESPACE_ID:HOST_ID:COUNT:"
    if not text or text[0].isdigit() or text[-1] != text[0] or len(text) < 2:
        raise IdMapError(f"{form} with the same separator at the start, between and at the end")
    fields = text[1:-1].split(text[0])
    if len(fields) != 3:
        raise IdMapError(f"{form}, three numbers; found {len(fields)}")
    inside, outside, count = (_number(field) for field in fields)
    if count == 0:
        raise IdMapError("a count of 0 maps nothing; leave the option out")
    _check_range("namespace", inside, count)
    _check_range("host", outside, count)
    return NamespaceRange(inside, outside, count)


def check_namespace_ranges(ranges: tuple[NamespaceRange, ...]) -> None:
    """All ranges of one kind together: the kernel refuses overlaps and too many. IdMapError."""
    if len(ranges) > MAX_NAMESPACE_RANGES:
        raise IdMapError(f"{len(ranges)} ranges; the kernel takes at most {MAX_NAMESPACE_RANGES}")
    _check_overlap("namespace", ((r.inside, r.size) for r in ranges))
    _check_overlap("host", ((r.outside, r.size) for r in ranges))


def parse_translation(text: str) -> tuple[IdRule, ...]:
    """One --translate-uid/--translate-gid value; `map` gives a rule for each direction. IdMapError."""
    word, *fields = text.split(":")
    form = _TRANSLATE_FORMS.get(word)
    if form is None:
        raise IdMapError(f"'{word}' is no kind of map; one of {', '.join(_TRANSLATE_FORMS)}")
    if len(fields) != form.count(":"):
        raise IdMapError(f"expected {form}")
    numbers = [_number(field) for field in fields]
    if word == "forbid-guest":
        numbers.insert(1, 0)
    source, target, count = numbers
    if count == 0:
        raise IdMapError("a count of 0 maps nothing; leave the option out")
    _check_range("source", source, count)
    match word:
        case "squash-guest" | "squash-host":
            _check_range("target", target, 1)
            kind = IdRuleKind.SQUASH_GUEST if word == "squash-guest" else IdRuleKind.SQUASH_HOST
            return (IdRule(kind, source, target, count),)
        case "forbid-guest":
            return (IdRule(IdRuleKind.FORBID_GUEST, source, 0, count),)
    _check_range("target", target, count)
    rules: list[IdRule] = []
    if word in ("guest", "map"):
        rules.append(IdRule(IdRuleKind.GUEST_TO_HOST, source, target, count))
    if word == "host":
        rules.append(IdRule(IdRuleKind.HOST_TO_GUEST, source, target, count))
    elif word == "map":
        rules.append(IdRule(IdRuleKind.HOST_TO_GUEST, target, source, count))
    return tuple(rules)


def check_translations(rules: tuple[IdRule, ...]) -> None:
    """All rules for uids (or gids) together: no source id may have two answers. IdMapError."""
    _check_overlap("guest", ((r.source, r.size) for r in rules if r.kind in _GUEST_SIDE))
    _check_overlap("host", ((r.source, r.size) for r in rules if r.kind not in _GUEST_SIDE))
