# SPDX-License-Identifier: Apache-2.0
"""--xattrmap as people write it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.share.xattrmap import (
    MAX_RULES,
    XattrMapError,
    XattrRule,
    XattrRuleKind,
    XattrScope,
    parse_xattrmap,
)

PREFIX, OK, BAD = XattrRuleKind.PREFIX, XattrRuleKind.OK, XattrRuleKind.BAD
CLIENT, SERVER, ALL = XattrScope.CLIENT, XattrScope.SERVER, XattrScope.ALL


def host_name(rules: tuple[XattrRule, ...], name: bytes) -> bytes | XattrRuleKind:
    """What a name from the guest becomes, by the documentation's words."""
    for rule in rules:
        if rule.scope & CLIENT and name.startswith(rule.key):
            return rule.prepend + name if rule.kind is PREFIX else name if rule.kind is OK else rule.kind
    raise AssertionError("no rule ended the search")


def guest_name(rules: tuple[XattrRule, ...], name: bytes) -> bytes | XattrRuleKind:
    """What a name in a host's listing becomes."""
    for rule in rules:
        if rule.scope & SERVER and name.startswith(rule.prepend):
            return (
                name[len(rule.prepend) :] if rule.kind is PREFIX else name if rule.kind is OK else rule.kind
            )
    raise AssertionError("no rule ended the search")


def test_rules_are_read_in_order_each_with_its_own_separator() -> None:
    text = "/prefix/all/trusted./user.virtiofs./\n /bad/server//trusted./ |unsupported|client|x||:ok:all:::"
    assert parse_xattrmap(text) == (
        XattrRule(PREFIX, ALL, b"trusted.", b"user.virtiofs."),
        XattrRule(BAD, SERVER, b"", b"trusted."),
        XattrRule(XattrRuleKind.UNSUPPORTED, CLIENT, b"x", b""),
        XattrRule(OK, ALL, b"", b""),
    )


def test_map_of_everything_prefixes_all_and_hides_what_the_host_has_besides() -> None:
    rules = parse_xattrmap(":map::user.virtiofs.:")
    assert rules == parse_xattrmap(":prefix:all::user.virtiofs.::bad:all:::")
    assert host_name(rules, b"security.selinux") == b"user.virtiofs.security.selinux"
    assert guest_name(rules, b"user.virtiofs.security.selinux") == b"security.selinux"
    assert guest_name(rules, b"user.host") is BAD


def test_map_of_a_prefix_protects_both_ends_and_passes_the_rest() -> None:
    rules = parse_xattrmap("/map/trusted./user.virtiofs./")
    assert host_name(rules, b"trusted.x") == b"user.virtiofs.trusted.x"
    assert guest_name(rules, b"user.virtiofs.trusted.x") == b"trusted.x"
    assert guest_name(rules, b"trusted.hosts_own") is BAD
    assert host_name(rules, b"user.virtiofs.trusted.x") is BAD
    assert host_name(rules, b"user.plain") == guest_name(rules, b"user.plain") == b"user.plain"


def test_a_map_without_an_end_refuses_what_no_rule_matches() -> None:
    rules = parse_xattrmap(":prefix:all:trusted.:user.v.:")
    assert host_name(rules, b"user.x") is BAD
    assert guest_name(rules, b"user.x") is BAD
    assert parse_xattrmap(":ok:all:::") == (XattrRule(OK, ALL, b"", b""),)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no rule"),
        ("  \n", "no rule"),
        (":foo:all:::", "at character 2: 'foo' is no type of rule; one of prefix, ok, bad, unsupported, map"),
        (":ok:both:::", "at character 5: 'both' is no scope; one of client, server, all"),
        (":ok:all", "at character 5: no ':' ends the scope; a rule is :type:scope:key:prepend:"),
        ("/ok/all//", "at character 10: no '/' ends the prepend; a rule is /type/scope/key/prepend/"),
        (":map:a:b", "at character 8: no ':' ends the prepend; a rule is :map:key:prepend:"),
        (":map:a::", "needs something to prepend"),
        (":map::a.: :ok:all:::", "'map' must be the last rule"),
        (f":ok:all:{'x' * 256}::", "longer than 255 bytes"),
        (":ok:all:::" * (MAX_RULES + 1), f"more than {MAX_RULES} rules"),
    ],
)
def test_a_wrong_map_says_where_and_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(XattrMapError, match=complaint.replace("'", ".")):
        parse_xattrmap(text)


@given(st.text(alphabet=":/ \nokbadprefixmlscvr.", max_size=80))
def test_every_accepted_map_has_an_answer_for_every_name(text: str) -> None:
    try:
        rules = parse_xattrmap(text)
    except XattrMapError:
        return
    for name in (b"user.a", b"", b"security.capability"):
        host_name(rules, name)
        guest_name(rules, name)
