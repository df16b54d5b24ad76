# SPDX-License-Identifier: Apache-2.0
"""Id maps as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfs.share.idmap import (
    END_OF_IDS,
    IdMapError,
    IdRule,
    IdRuleKind,
    NamespaceRange,
    check_namespace_ranges,
    check_translations,
    parse_namespace_range,
    parse_translation,
)


@pytest.mark.parametrize(
    "text", [":0:100000:65536:", "/0/100000/65536/", ",0,100000,65536,", " 0 100000 65536 "]
)
def test_a_namespace_range_may_use_any_separator(text: str) -> None:
    assert parse_namespace_range(text) == NamespaceRange(0, 100000, 65536)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected :NAMESPACE_ID:HOST_ID:COUNT:"),
        (":", "expected :NAMESPACE_ID:HOST_ID:COUNT:"),
        ("0:1:2:", "same separator at the start"),
        (":0:1:2", "same separator at the start"),
        (":0:1:", "found 2"),
        (":0:1:2:3:", "found 4"),
        (":0:x:2:", "'x' is not an id"),
        (":0:-1:2:", "'-1' is not an id"),
        (":0:1:0:", "count of 0"),
        (":0:4294967295:1:", "goes past the last id"),
        (":4294967290:0:10:", "goes past the last id"),
        (":99999999999:0:10:", "too large"),
        (":0:\u0663:1:", "is not an id"),
    ],
)
def test_a_wrong_namespace_range_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(IdMapError, match=complaint):
        parse_namespace_range(text)


def test_namespace_ranges_may_not_overlap_on_either_side() -> None:
    check_namespace_ranges((NamespaceRange(0, 1000, 1), NamespaceRange(1, 100000, 65535)))
    with pytest.raises(IdMapError, match="namespace id 5 is mapped twice"):
        check_namespace_ranges((NamespaceRange(0, 1000, 10), NamespaceRange(5, 100000, 10)))
    with pytest.raises(IdMapError, match="host id 1009 is mapped twice"):
        check_namespace_ranges((NamespaceRange(0, 1000, 10), NamespaceRange(50, 1009, 1)))


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("guest:0:1000:10", (IdRule(IdRuleKind.GUEST_TO_HOST, 0, 1000, 10),)),
        ("host:1000:0:10", (IdRule(IdRuleKind.HOST_TO_GUEST, 1000, 0, 10),)),
        ("squash-guest:0:1001:4294967295", (IdRule(IdRuleKind.SQUASH_GUEST, 0, 1001, 4294967295),)),
        ("squash-host:5:0:7", (IdRule(IdRuleKind.SQUASH_HOST, 5, 0, 7),)),
        ("forbid-guest:0:1", (IdRule(IdRuleKind.FORBID_GUEST, 0, 0, 1),)),
        (
            "map:0:1000:10",
            (IdRule(IdRuleKind.GUEST_TO_HOST, 0, 1000, 10), IdRule(IdRuleKind.HOST_TO_GUEST, 1000, 0, 10)),
        ),
    ],
)
def test_every_kind_of_translation_is_understood(text: str, rules: tuple[IdRule, ...]) -> None:
    assert parse_translation(text) == rules


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is no kind of map"),
        ("both:0:1:2", "'both' is no kind of map; one of guest, host, "),
        ("map:0:1", "expected map:GUEST_BASE:HOST_BASE:COUNT"),
        ("forbid-guest:0:0:1", "expected forbid-guest:GUEST_BASE:COUNT"),
        ("guest:0:1:0", "count of 0"),
        ("guest:4294967290:0:6", "source range"),
        ("guest:0:4294967290:6", "target range"),
        # The kernel takes the last id as "leave unchanged": a guest would act as the server itself.
        ("squash-guest:0:4294967295:1", "target range"),
    ],
)
def test_a_wrong_translation_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(IdMapError, match=complaint):
        parse_translation(text)


def test_one_id_may_not_be_translated_in_two_ways_but_each_direction_is_its_own() -> None:
    check_translations(parse_translation("guest:0:1000:10") + parse_translation("host:0:50:10"))
    check_translations(parse_translation("map:0:1000:10") + parse_translation("forbid-guest:10:5"))
    for other in ("guest:9:1:1", "squash-guest:0:7:1", "forbid-guest:5:1"):
        with pytest.raises(IdMapError, match=r"guest id . is mapped twice"):
            check_translations(parse_translation("map:0:1000:10") + parse_translation(other))
    with pytest.raises(IdMapError, match="host id 1005 is mapped twice"):
        check_translations(parse_translation("map:0:1000:10") + parse_translation("squash-host:1005:0:1"))


@given(st.text())
def test_no_text_is_answered_with_anything_but_rules_or_an_id_map_error(text: str) -> None:
    for parse in (parse_namespace_range, parse_translation):
        with contextlib.suppress(IdMapError):
            parse(text)


@given(
    st.sampled_from(["guest", "host", "map"]),
    st.integers(0, END_OF_IDS),
    st.integers(0, END_OF_IDS),
    st.integers(0, END_OF_IDS),
)
def test_an_accepted_range_never_reaches_the_id_that_means_no_id(word: str, a: int, b: int, n: int) -> None:
    try:
        rules = parse_translation(f"{word}:{a}:{b}:{n}")
    except IdMapError:
        assert n == 0 or a + n > END_OF_IDS or b + n > END_OF_IDS
        return
    for rule in rules:
        assert rule.source + rule.size <= END_OF_IDS
        assert rule.target + rule.size <= END_OF_IDS
