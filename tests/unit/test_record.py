# SPDX-License-Identifier: Apache-2.0
"""Records: what dataclass(frozen=True, slots=True) promises, without what it costs at a start.

Must not know any class of the project's.
Specification: vhostfs/record.py.
"""

from __future__ import annotations

import pickle
from typing import ClassVar

import pytest

from vhostfs.record import Record, as_dict, field_names, replace


class Point(Record):
    """As most are."""

    dimensions: ClassVar[int] = 2

    x: int
    y: int = 0

    @property
    def sum(self) -> int:
        return self.x + self.y


class Point3(Point):
    z: int = 9


class Other(Record):
    x: int
    y: int = 0


class Named(Record, kw_only=True):
    name: str = "none"
    size_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            raise ValueError("a size is 0 or more")


def test_fields_are_given_by_place_or_by_name() -> None:
    assert (Point(1).x, Point(1).y, Point(1, 2).y, Point(1, y=3).y, Point(y=4, x=5).sum) == (1, 0, 2, 3, 9)
    assert Named(size_bytes=1).name == "none"


@pytest.mark.parametrize(
    ("values", "named", "text"),
    [
        ((), {}, "Point: without x"),
        ((1, 2, 3), {}, "Point: too many values: 3"),
        ((1,), {"x": 2}, "Point: two of x"),
        ((1,), {"z": 2}, "Point: no field z"),
        ((1,), {"dimensions": 3}, "Point: no field dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(values: tuple[int, ...], named: dict[str, int], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Point(*values, **named)


def test_by_name_alone_where_the_class_says_so() -> None:
    with pytest.raises(TypeError, match="too many values"):
        Named("x", 1)  # type: ignore[call-arg]


def test_a_class_may_refuse_values() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        Named(size_bytes=-1)
    with pytest.raises(ValueError, match="0 or more"):
        replace(Named(size_bytes=1), size_bytes=-1)


def test_nothing_can_be_changed_or_added() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="does not change: x"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="does not change: x"):
        del point.x
    with pytest.raises(AttributeError):
        point.z = 2
    assert not hasattr(point, "__dict__")


def test_equal_are_those_of_one_class_with_equal_fields() -> None:
    assert Point(1, 2) == Point(1, 2)
    assert hash(Point(1, 2)) == hash(Point(1, 2))
    assert Point(1, 2) != Point(1, 3)
    assert Point(1, 2) != Other(1, 2)
    assert Point(1, 2) != (1, 2)
    assert len({Point(1), Point(1), Point(2)}) == 2


def test_a_class_inherits_fields_and_defaults() -> None:
    assert field_names(Point3) == ("x", "y", "z")
    assert as_dict(Point3(1, z=3)) == {"x": 1, "y": 0, "z": 3}
    assert Point3.dimensions == 2


def test_patterns_take_it_apart() -> None:
    match Point(1, 2):
        case Point(x, y=2):
            assert x == 1
        case _:
            pytest.fail("not matched")


def test_it_is_shown_with_its_fields() -> None:
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"


def test_one_with_other_values_is_another() -> None:
    point = Point(1, 2)
    assert replace(point, y=3) == Point(1, 3)
    assert point == Point(1, 2)


def test_it_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(Point3(1, 2, 3))) == Point3(1, 2, 3)
    assert pickle.loads(pickle.dumps(Named(size_bytes=3))) == Named(size_bytes=3)
