"""Exercises that are a piece of a class: the engine gets a subclass in which the piece is the learner's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nanopd_lab.engine.config import EngineParts


def with_piece(base: Any, name: str, impl: Any) -> Any:
    """A subclass of `base` in which `name` is `impl`; everything else, the name too, stays."""
    return type(base.__name__, (base,), {name: impl, "__doc__": base.__doc__, "__module__": base.__module__})


def plug_piece(part: str, name: str, static: bool = False) -> Callable[[EngineParts, Any], EngineParts]:
    """An exercise's `plug`: the engine's part, a class, with `impl` as its method (or static method) `name`."""

    def plug(parts: EngineParts, impl: Any) -> EngineParts:
        piece = staticmethod(impl) if static else impl
        return replace(parts, **{part: with_piece(getattr(parts, part), name, piece)})

    return plug
