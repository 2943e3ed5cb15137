"""The highest rate at which a share of all requests still gets what it was promised: goodput as DistServe counts it
(Zhong et al., OSDI 2024), found by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

FEWEST, MOST = 1e-4, 1e6  # requests a second between which a rate is looked for


class Capacity(NamedTuple):
    """Between which rates (requests a second) the share of requests in time falls below `target`.

    rate: the highest that reached it, 0 if none did; its share is `attainment`
    above: the lowest above it that did not; infinite if all did
    reason: why the search ended without a rate that is too high, if it did
    """

    target: float
    rate: float
    attainment: float
    above: float
    reason: str = ""


def check_search(target: float, start: float, tolerance: float) -> None:
    """Before anything is measured: raise ValueError for what `find_capacity` refuses."""
    if not 0 < target <= 1:
        raise ValueError(f"attainment target {target}; it must lie in (0, 1], as 0.9")
    if not FEWEST <= start <= MOST or not 0 < tolerance < math.inf:
        raise ValueError(
            f"search from {start} requests/s to a tolerance of {tolerance}; give a rate from {FEWEST:g} to {MOST:g}, "
            "and a positive tolerance"
        )


def find_capacity(
    attainment: Callable[[float], float],
    target: float,
    start: float = 1.0,
    tolerance: float = 0.05,
    step: float = 2.0,
) -> Capacity:
    """Double or halve from `start` until the target lies between two rates, then halve their ratio until it is at most
    `1 + tolerance`.

    Args:
        attainment: the share of requests in time at a rate; taken to fall with the rate, and asked once for each
        step: smaller than 2 if the start is a good guess; it grows to 2 while the guess turns out wrong

    Raises:
        ValueError: a target outside (0, 1], a start or a tolerance that is not positive, or a step outside (1, 2].
    """
    check_search(target, start, tolerance)
    if not 1 < step <= 2:
        raise ValueError(f"steps of {step}; a step multiplies a rate by more than 1 and at most 2")
    shares: dict[float, float] = {}

    def reached(rate: float) -> bool:
        shares[rate] = attainment(rate)
        return shares[rate] >= target

    low, high = 0.0, math.inf
    rate = start
    while FEWEST <= rate <= MOST and (low == 0 or high == math.inf):
        if reached(rate):
            low, rate = rate, rate * step
        else:
            high, rate = rate, rate / step
        step = min(2.0, step * step)
    while low > 0 and high < math.inf and high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if reached(middle):
            low = middle
        else:
            high = middle
    reason = f"no rate up to {MOST:g} requests/s is too high" if high == math.inf else ""
    return Capacity(target, low, shares.get(low, math.nan), high, reason)
