# SPDX-License-Identifier: Apache-2.0
"""Owns the text form of --xattrmap: rules that rename or hide extended attributes.
Must not know how a rule is applied to a name (native/op_xattr.c).
Specification: virtiofsd(1) of QEMU 7.2, "Extended attribute mapping"; virtiofsd's doc/xattr-mapping.md."""

from __future__ import annotations

import enum
import os
from typing import NamedTuple

XATTR_NAME_MAX_BYTES = 255  # linux/limits.h
MAX_RULES = 1000


class XattrMapError(ValueError):
    """A mapping that cannot be understood; the text says where (from 1) and what is right."""


class XattrRuleKind(enum.IntEnum):
    """enum vf_xattr_rule_kind of native/api.h."""

    OK = 0
    BAD = 1
    UNSUPPORTED = 2
    PREFIX = 3


class XattrScope(enum.IntFlag):
    """enum vf_xattr_scope of native/api.h."""

    CLIENT = 1
    SERVER = 2
    ALL = 3


class XattrRule(NamedTuple):
    """struct vf_xattr_rule of native/api.h: the first rule that matches a name decides."""

    kind: XattrRuleKind
    scope: XattrScope
    key: bytes
    prepend: bytes


_KINDS = {
    "prefix": XattrRuleKind.PREFIX,
    "ok": XattrRuleKind.OK,
    "bad": XattrRuleKind.BAD,
    "unsupported": XattrRuleKind.UNSUPPORTED,
}
_SCOPES = {"client": XattrScope.CLIENT, "server": XattrScope.SERVER, "all": XattrScope.ALL}


class _Reader:
    """Fields of one mapping text, with the place of each."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.field_at = 0
        self.separator = ""

    def start_rule(self) -> bool:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        if self.at == len(self.text):
            return False
        self.separator = self.text[self.at]
        self.at += 1
        return True

    def field(self, name: str, form: str) -> str:
        self.field_at = self.at
        end = self.text.find(self.separator, self.at)
        if end < 0:
            raise XattrMapError(
                f"at character {self.at + 1}: no '{self.separator}' ends the {name}; "
                f"a rule is {form.replace(':', self.separator)}"
            )
        self.at = end + 1
        return self.text[self.field_at : end]

    def prefix(self, name: str, form: str) -> bytes:
        value = os.fsencode(self.field(name, form))
        if len(value) > XATTR_NAME_MAX_BYTES:
            raise self.wrong(f"the {name} is longer than {XATTR_NAME_MAX_BYTES} bytes")
        return value

    def wrong(self, text: str) -> XattrMapError:
        return XattrMapError(f"at character {self.field_at + 1}: {text}")


def _expand_map(key: bytes, prepend: bytes) -> list[XattrRule]:
    """What the shorthand `:map:key:prepend:` stands for."""
    rules = [XattrRule(XattrRuleKind.PREFIX, XattrScope.ALL, key, prepend)]
    if not key:
        # Every guest name is prefixed; what is not prefixed on the host stays hidden.
        rules.append(XattrRule(XattrRuleKind.BAD, XattrScope.ALL, b"", b""))
        return rules
    rules += [
        # The host's own attributes under the mapped name are hidden,
        XattrRule(XattrRuleKind.BAD, XattrScope.SERVER, b"", key),
        # the guest cannot reach the place mapped to by its direct name,
        XattrRule(XattrRuleKind.BAD, XattrScope.CLIENT, prepend, b""),
        # and everything else passes.
        XattrRule(XattrRuleKind.OK, XattrScope.ALL, b"", b""),
    ]
    return rules


def parse_xattrmap(text: str) -> tuple[XattrRule, ...]:
    """Rules in order; a final "bad" is added where no rule ends the search. Raises XattrMapError."""
    reader = _Reader(text)
    rules: list[XattrRule] = []
    mapped = False
    while reader.start_rule():
        form = ":type:scope:key:prepend:"
        if mapped:
            raise XattrMapError(f"at character {reader.at}: 'map' must be the last rule")
        kind_word = reader.field("type", form)
        if kind_word == "map":
            form = ":map:key:prepend:"
            key, prepend = reader.prefix("key", form), reader.prefix("prepend", form)
            if not prepend:
                raise reader.wrong("'map' needs something to prepend, such as user.virtiofs.")
            rules += _expand_map(key, prepend)
            mapped = True
            continue
        kind = _KINDS.get(kind_word)
        if kind is None:
            raise reader.wrong(f"'{kind_word}' is no type of rule; one of {', '.join(_KINDS)}, map")
        scope_word = reader.field("scope", form)
        scope = _SCOPES.get(scope_word)
        if scope is None:
            raise reader.wrong(f"'{scope_word}' is no scope; one of {', '.join(_SCOPES)}")
        rules.append(XattrRule(kind, scope, reader.prefix("key", form), reader.prefix("prepend", form)))
        if len(rules) > MAX_RULES:
            raise reader.wrong(f"more than {MAX_RULES} rules")
    if not rules:
        raise XattrMapError("no rule; for instance ':map::user.virtiofs.:'")
    ends_client = any(r.scope & XattrScope.CLIENT and not r.key for r in rules)
    ends_server = any(r.scope & XattrScope.SERVER and not r.prepend for r in rules)
    if not (ends_client and ends_server):
        rules.append(XattrRule(XattrRuleKind.BAD, XattrScope.ALL, b"", b""))
    return tuple(rules)
