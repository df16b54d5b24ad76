# SPDX-License-Identifier: Apache-2.0
"""Owns Record: what dataclass(frozen=True, slots=True) is, for modules that a server imports when it starts.
Must not know any of the classes.
Specification: dataclasses, which compile six methods for each class at every start; PEP 681."""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

R = TypeVar("R", bound="Record")

_set = object.__setattr__  # records' own refuses


@dataclass_transform(frozen_default=True)
class _RecordType(type):
    """Makes slots of a class's annotations and keeps its defaults; the methods of all are Record's."""

    record_fields: tuple[str, ...]
    record_defaults: dict[str, Any]
    is_keyword_only: bool

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, kw_only: bool = False
    ) -> _RecordType:
        own = [
            field
            for field, kind in namespace.get("__annotations__", {}).items()
            if not kind.startswith("ClassVar")
        ]
        fields = tuple(own)
        defaults = {field: namespace.pop(field) for field in own if field in namespace}
        for base in bases:
            if isinstance(base, _RecordType):
                fields = (*base.record_fields, *fields)
                defaults = {**base.record_defaults, **defaults}
        namespace["__slots__"] = own
        namespace["__match_args__"] = () if kw_only else fields
        made = super().__new__(cls, name, bases, namespace)
        made.record_fields = fields
        made.record_defaults = defaults
        made.is_keyword_only = kw_only
        return made


class Record(metaclass=_RecordType):
    """
    Base of immutable values: each annotation is a field, what is assigned to it is its default.

        class Point(Record):
            x: int
            y: int = 0

    Equal when class and fields are; hashable when the fields are; `class Point(Record, kw_only=True)` takes
    its fields by name alone. __post_init__, where there is one, may refuse. Modules with records must have
    `from __future__ import annotations`.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        kind = type(self)
        fields = kind.record_fields
        if named or len(values) != len(fields) or kind.is_keyword_only:
            values = _in_order(kind, values, named)
        for field, value in zip(fields, values, strict=True):
            _set(self, field, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Checks fields that must go together."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} does not change: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} does not change: {name}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))

    def __repr__(self) -> str:
        shown = ", ".join(f"{field}={value!r}" for field, value in as_dict(self).items())
        return f"{type(self).__name__}({shown})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), as_dict(self))


def _in_order(kind: _RecordType, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """One value for each field, from what was given and the defaults. Raises TypeError as calls do."""
    fields = kind.record_fields
    if len(values) > (0 if kind.is_keyword_only else len(fields)):
        raise TypeError(f"{kind.__name__}: too many values: {len(values)}")
    given = dict(zip(fields, values, strict=False))
    for field in named:
        if field in given or field not in fields:
            raise TypeError(f"{kind.__name__}: {'two of' if field in given else 'no field'} {field}")
    given = {**kind.record_defaults, **given, **named}
    missing = [field for field in fields if field not in given]
    if missing:
        raise TypeError(f"{kind.__name__}: without {', '.join(missing)}")
    return tuple(given[field] for field in fields)


def _remade(kind: type[R], named: dict[str, Any]) -> R:
    return kind(**named)


def _values(record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, field) for field in type(record).record_fields)


def field_names(kind: type[Record]) -> tuple[str, ...]:
    """In the order in which they are declared."""
    return kind.record_fields


def as_dict(record: Record) -> dict[str, Any]:
    """The values by their fields' names; values are not taken apart."""
    return {field: getattr(record, field) for field in type(record).record_fields}


def replace(record: R, **changes: Any) -> R:
    """Another one with these fields changed, checked like any."""
    return type(record)(**{**as_dict(record), **changes})
