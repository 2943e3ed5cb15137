"""Student's t, from scipy, which takes a sixth of a second to import: whoever predicts nothing need not wait for it."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def special_functions() -> Any:
    """The module of scipy's, imported when it is asked for first."""
    from scipy import special

    return special


def stdtr(df: float, t: float) -> float:
    """The probability of at most `t`."""
    return float(special_functions().stdtr(df, t))


def stdtrit(df: float, p: Any) -> Any:
    """What is not exceeded with a probability of `p`, a number or an array of them."""
    return special_functions().stdtrit(df, p)
