"""Requests as a predictor of lengths learns from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Answered(Protocol):
    """A request of which all is known: when it came (seconds), how long its prompt was and how long its output."""

    @property
    def arrival(self) -> float: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PastRequest:
    """The least that is `Answered`."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
