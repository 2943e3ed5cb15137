"""Waiting by formula: how long work waits for servers that are busy, and how far sums of random parts spread.

All are approximations but for one server's mean, which is exact (Pollaczek, Khinchine). They need means and variances
only, so that an answer takes microseconds. Seconds everywhere; `[...]` arrays are of floats.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Waiting(NamedTuple):
    """How long an arrival waits: not at all, or with `probability` for a time of this mean and variance."""

    probability: float
    mean_s: float
    variance_s2: float

    @property
    def overall_s(self) -> float:
        """Mean over all arrivals."""
        return self.probability * self.mean_s if self.probability else 0.0

    def within(self, seconds: Array) -> Array:
        """Share that waits no longer than this; 0 where it is negative, `[n]` to `[n]`."""
        if not self.probability:
            return np.where(seconds >= 0, 1.0, 0.0)
        if self.mean_s == math.inf:
            return np.zeros_like(seconds)
        late = self.probability * (1.0 - sum_below(seconds, self.mean_s, self.variance_s2))
        return np.where(seconds >= 0, 1.0 - late, 0.0)


def waiting(servers: int, load: float, mean_s: float, square_s2: float, cube_s3: float) -> Waiting:
    """Of Poisson arrivals at `servers` of which each takes what comes first (M/G/c).

    For one server the first two moments are exact (Pollaczek and Khinchine; Takács): with ρ the load, a share of ρ
    waits, E[W] = λE[S²]/(2(1 − ρ)) and E[W²] = 2E[W]² + λE[S³]/(3(1 − ρ)). For c servers the probability is
    ρ^(√(2(c+1)) − 1) (Sakasegawa, 1977), and who waits does so as at one server that is c times as fast (Lee and
    Longton, 1959). Between the moments a gamma distribution stands in. Sending each arrival to the server with the
    least work left is the same as one queue for all.

    Args:
        load: ρ, the share of time a server is busy; 1 or more: all wait, for ever
        mean_s, square_s2, cube_s3: E[S], E[S²] and E[S³] of a service
    """
    if load >= 1:
        return Waiting(1.0, math.inf, math.inf)
    if load <= 0 or mean_s <= 0:
        return Waiting(0.0, 0.0, 0.0)
    probability = load ** (math.sqrt(2 * (servers + 1)) - 1)
    mean = square_s2 / mean_s / (2 * servers * (1 - load))
    square = 2 * load * mean * mean + cube_s3 / mean_s / (3 * servers * servers * (1 - load))
    return Waiting(probability, mean, square - mean * mean)


def normal_below(z: Array) -> Array:
    """Φ(z) to 2e-4, `[n]` to `[n]`, by a tanh (Page, Applied Statistics 26, 1977)."""
    found: Array = 0.5 * (1.0 + np.tanh(math.sqrt(2 / math.pi) * z * (1.0 + 0.044715 * z * z)))
    return found


def sum_below(limit: Array, mean: Array | float, variance: Array | float) -> Array:
    """Share of a sum of positive parts that stays below `limit`, `[n]` or one for all: a gamma distribution of the same
    mean and variance, whose cube root is nearly normal (Wilson and Hilferty, 1931)."""
    spread = np.maximum(variance, 1e-12 * mean * mean) / (9.0 * mean * mean)
    root = np.cbrt(np.maximum(limit, 0.0) / mean)
    return normal_below((root - 1.0 + spread) / np.sqrt(spread))
