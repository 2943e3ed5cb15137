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
    """How long an arrival waits: not at all, or with `probability` for an exponential time of `mean_s`."""

    probability: float
    mean_s: float

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
        late = self.probability * np.exp(-np.maximum(seconds, 0.0) / self.mean_s)
        return np.where(seconds >= 0, 1.0 - late, 0.0)


def waiting(servers: int, load: float, mean_s: float, square_s2: float) -> Waiting:
    """Of Poisson arrivals at `servers` of which each takes what comes first (M/G/c).

    The probability to wait is ρ^(√(2(c+1)) − 1) (Sakasegawa, 1977; for one server ρ, exactly), and the mean of those
    that wait is that of M/M/c times half of E[S²]/E[S]² (Lee and Longton, 1959), which for one server gives Pollaczek
    and Khinchine's λE[S²]/(2(1 − ρ)). That their times are exponential is Kingman's limit of heavy traffic (1962); at
    small loads the far tail comes out too long. Sending each arrival to the server with the least work left is the
    same as one queue for all.

    Args:
        load: ρ, the share of time a server is busy; 1 or more: all wait, for ever
        mean_s, square_s2: E[S] and E[S²] of a service
    """
    if load >= 1:
        return Waiting(1.0, math.inf)
    if load <= 0 or mean_s <= 0:
        return Waiting(0.0, 0.0)
    probability = load ** (math.sqrt(2 * (servers + 1)) - 1)
    return Waiting(probability, square_s2 / mean_s / (2 * servers * (1 - load)))


def normal_below(z: Array) -> Array:
    """Φ(z) to 2e-4, `[n]` to `[n]`, by a tanh (Page, Applied Statistics 26, 1977)."""
    found: Array = 0.5 * (1.0 + np.tanh(math.sqrt(2 / math.pi) * z * (1.0 + 0.044715 * z * z)))
    return found


def sum_below(limit: Array, mean: Array, variance: Array) -> Array:
    """Share of a sum of positive parts that stays below `limit`, `[n]` each: a gamma distribution of the same mean and
    variance, whose cube root is nearly normal (Wilson and Hilferty, 1931)."""
    spread = np.maximum(variance, 1e-12 * mean * mean) / (9.0 * mean * mean)
    root = np.cbrt(np.maximum(limit, 0.0) / mean)
    return normal_below((root - 1.0 + spread) / np.sqrt(spread))
