"""Checks on tensors: the case in words in place of its numbers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.lab.checking import Counterexample, call, same

Tensor = torch.Tensor


@dataclass(frozen=True)
class Case:
    """What is called, in words, and how to say that it went wrong."""

    name: str
    lines: tuple[str, ...]
    written: str

    def call(self, impl: Callable[..., Any], **inputs: Any) -> Any:
        """`checking.call`, with the case in words in place of tensors."""
        try:
            return call(impl, **inputs)
        except Counterexample as found:
            raise self.wrong(found.got, found.want, found.why, found.where) from None

    def wrong(self, got: str, want: str, why: str = "", where: str = "") -> Counterexample:
        return Counterexample(f"{self.name}({self.written})", None, got, want, why, where, self.lines)

    def expect(self, condition: bool, got: str, want: str, why: str) -> None:
        if not condition:
            raise self.wrong(got, want, why)

    def expect_tensor(self, got: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
        """A tensor of that shape and type."""
        kind = f"Tensor{list(got.shape)}, {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
        want = f"Tensor{list(shape)}, {dtype}"
        self.expect(
            isinstance(got, Tensor),
            kind,
            want,
            f"{what} is a tensor" + ("; is a `return` missing?" if got is None else ""),
        )
        self.expect(got.shape == shape, kind, want, f"the shape of {what}")
        self.expect(got.dtype == dtype, kind, want, f"{what} has the type of what came in")


class Earlier:
    """The latest results and copies: what was returned must not change when the function is called again."""

    def __init__(self) -> None:
        self.kept: deque[tuple[Any, Any]] = deque(maxlen=4)

    def compare(self, case: Case, got: Any) -> None:
        why = "this call changed what a call before has returned: return new tensors each time"
        unchanged = all(same(result, as_it_was) for result, as_it_was in self.kept)
        case.expect(unchanged, "an earlier result changed", "earlier results as they were", why)
        self.kept.append((got, copy.deepcopy(got)))


def numbers(values: Tensor, digits: int = 4) -> str:
    """The first few, short."""
    text = ", ".join(f"{value:.{digits}g}" for value in values.reshape(-1)[:4].tolist())
    return f"[{text}{', …' if values.numel() > 4 else ''}]"


def two_numbers(got: Tensor, want: Tensor) -> tuple[str, str]:
    """`numbers` of both, with as many digits as it takes to tell them apart in what is shown."""
    texts = numbers(got), numbers(want)
    return texts if texts[0] != texts[1] else (numbers(got, 9), numbers(want, 9))


def close(got: Tensor, other: Tensor, tolerance: float) -> bool:
    """Everywhere within `tolerance`; NaN is not."""
    return got.shape == other.shape and bool(((got - other).abs() < tolerance).all())


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors of a few bytes: on a busy machine, waiting for a second thread takes ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
