"""Student's t, from scipy, which takes a sixth of a second to import: whoever predicts nothing need not wait for it."""

from __future__ import annotations

from typing import Any


def stdtr(df: float, t: float) -> float:
    """The probability of at most `t`."""
    from scipy import special

    return float(special.stdtr(df, t))


def stdtrit(df: float, p: Any) -> Any:
    """What is not exceeded with a probability of `p`, a number or an array of them."""
    from scipy import special

    return special.stdtrit(df, p)
