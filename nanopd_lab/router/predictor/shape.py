"""Where lengths really fall within the forecasts made for them, learnt, so that a forecast can be put right.

A forecast that is right puts the truth above its median every second time, above its 90 % quantile every tenth time:
the share `v` that the forecast puts above the truth is uniform in 0..1. Outputs are not exactly log-normal, so it is
not. `Shape` counts where it falls, in cells, and says what share of the truths lies above a share `v` of the forecast:
quantiles are looked up through it (recalibration; Kuleshov, Fenner & Ermon, ICML 2018).

It is conjugate too: a Dirichlet process over the cells whose base is "the forecast is right", worth `strength`
observations. Each cell's share of what reaches it is then a beta variable of its own, which stays conjugate when truths
are cut off: they count as having reached the cells before (Susarla & Van Ryzin, JASA 71, 1976).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_TAIL = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04)
EDGES: list[float] = [*_TAIL, *(step / 40 for step in range(2, 39)), *(1 - edge for edge in reversed(_TAIL))]
"""Between cells, of the share above; finer where few lengths are and much depends on them."""


class Shape:
    """See the module.

    Args:
        strength: how many observations the belief that forecasts are right is worth
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.ended = np.zeros(len(EDGES) - 1)
        self.cut = np.zeros(len(EDGES) - 1)

    def add(self, above: float, weight: float = 1.0, censored: bool = False) -> None:
        """A truth (or, censored, a bound below it) that its forecast put `above` of the probability above."""
        cell = min(bisect_right(EDGES, above), len(EDGES) - 1) - 1
        (self.cut if censored else self.ended)[cell] += weight

    def scale(self, factor: float) -> None:
        """Every observation counts `factor` of what it did."""
        self.ended *= factor
        self.cut *= factor

    def table(self, gain: float = 1.0, running: Sequence[float] = ()) -> list[float]:
        """The share of truths above each of EDGES.

        Args:
            gain: what an observation of now weighs
            running: bounds, as for `add`, of truths that are not known yet
        """
        strength, cut = self.strength * gain, self.cut
        if running:
            cut = cut + gain * np.histogram(running, EDGES)[0]
        ended = strength * np.diff(EDGES) + self.ended  # in cells from the longest lengths to the shortest
        reached = strength * np.array(EDGES[1:]) + np.cumsum(self.ended + cut)
        # A truth cut off within a cell was there, on average, for half of it.
        stays = (1.0 - ended / (reached - cut / 2))[::-1]
        return [0.0, *np.cumprod(stays)[-2::-1].tolist(), 1.0]

    def to_record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ended": self.ended.tolist(), "cut": self.cut.tolist()}

    def load(self, record: Mapping[str, Any]) -> None:
        """What `to_record` made.

        Raises:
            ValueError: another number of cells, or a count that is negative.
        """
        for name in ("ended", "cut"):
            counts = np.array(record[name], dtype=float)
            if counts.shape != (len(EDGES) - 1,) or not (counts >= 0).all():
                raise ValueError(f"shape: {name!r} must hold {len(EDGES) - 1} counts, none negative")
            setattr(self, name, counts)


def between(x: float, xs: list[float], ys: list[float]) -> float:
    """`numpy.interp` of one number, which for one number is much quicker."""
    right = min(max(1, bisect_right(xs, x)), len(xs) - 1)
    left = right - 1
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])
