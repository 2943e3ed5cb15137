"""Settings come from people: each is of the type that its dataclass says, or is refused when it is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from numbers import Real
from typing import Any


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError
    found: int = value.__index__()  # NumPy's become Python's
    return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return value if isinstance(value, int) else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError
    return str(value)


def _flag(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's has either name
        raise TypeError
    return bool(value)


def _several(each: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return tuple(map(each, value))

    return check


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("an integer", _integer),
    "float": ("a number", _number),
    "str": ("a string", _text),
    "bool": ("True or False", _flag),
    "tuple[str, ...]": ("a tuple of strings", _several(_text)),
    "tuple[int, ...]": ("a tuple of integers", _several(_integer)),
}


def check_fields(settings: Any) -> None:
    """Check the fields of a frozen dataclass that are numbers, strings, flags or tuples of them; others are left.

    NumPy's numbers, paths and lists become Python's own integers, strings and tuples.

    Raises:
        ValueError: a value of another type; the message names the field, the value and the type.
    """
    for each in fields(settings):
        kind = str(each.type).removesuffix(" | None")
        optional = kind != each.type
        value = getattr(settings, each.name)
        if kind not in _KINDS or (value is None and optional):
            continue
        wanted, check = _KINDS[kind]
        try:
            found = check(value)
        except TypeError:
            either = " or None" if optional else ""
            raise ValueError(f"{each.name} is {value!r}; it must be {wanted}{either}") from None
        if found is not value:
            object.__setattr__(settings, each.name, found)
