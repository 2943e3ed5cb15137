"""Compare how an implementation is called with how the reference is, before it is called at all."""

from __future__ import annotations

import inspect
from typing import Any


class SignatureError(TypeError):
    """An implementation cannot be called the way the engine calls it."""


def require_same_signature(exercise: str, impl: Any, reference: Any) -> None:
    """Names, order and kinds of parameters must be the reference's; extra ones with a default are fine.

    For a class this holds for each public method of the reference.

    Raises:
        SignatureError: they differ; the message shows both.
    """
    if inspect.isclass(reference):
        if not inspect.isclass(impl):
            raise SignatureError(f"{exercise} is a class with methods {_methods(reference)}, not {impl!r}")
        for method in _methods(reference):
            if not callable(getattr(impl, method, None)):
                raise SignatureError(
                    f"{impl.__name__} lacks the method {method}{inspect.signature(getattr(reference, method))}"
                )
            _compare(f"{exercise}.{method}", getattr(impl, method), getattr(reference, method))
    elif callable(reference):
        if inspect.isclass(impl) or not callable(impl):
            raise SignatureError(f"{exercise} is a function, but {impl!r} is not")
        _compare(exercise, impl, reference)
    elif isinstance(reference, str):
        if not isinstance(impl, str):
            raise SignatureError(f"{exercise} is a text of CUDA C++, not {impl!r}")
    elif not isinstance(impl, type(reference)):
        raise SignatureError(f"{exercise} is a {type(reference).__name__}, not {impl!r}")


def _methods(reference: type) -> list[str]:
    return [name for name, member in vars(reference).items() if callable(member) and not name.startswith("_")]


def _compare(exercise: str, impl: Any, reference: Any) -> None:
    wanted = list(inspect.signature(reference).parameters.values())
    found = list(inspect.signature(impl).parameters.values())
    extra = [
        p
        for p in found[len(wanted) :]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    alike = len(found) >= len(wanted) and all(
        (a.name, a.kind) == (b.name, b.kind) for a, b in zip(found, wanted, strict=False)
    )
    if alike and not extra:
        return
    have, need = [p.name for p in found], [p.name for p in wanted]
    problems = []
    if missing := [name for name in need if name not in have]:
        problems.append(f"missing: {', '.join(missing)}")
    if unknown := [
        name for name in have if name not in need and (name in [p.name for p in extra] or missing)
    ]:
        problems.append(f"unknown: {', '.join(unknown)}")
    if not problems:
        problems.append("the order or the kind of the parameters differs")
    name = exercise.rpartition(".")[2]
    raise SignatureError(
        f"{exercise}: {'; '.join(problems)}\n"
        f"  yours  {name}({', '.join(map(_bare, found))})\n"
        f"  needed {name}({', '.join(map(_bare, wanted))})"
    )


def _bare(parameter: inspect.Parameter) -> str:
    """Without annotations: they don't matter, and make lines long."""
    return str(parameter.replace(annotation=inspect.Parameter.empty))
