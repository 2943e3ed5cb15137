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


class Service(NamedTuple):
    """E[S], E[S²] and E[S³] of service times, in s, s² and s³."""

    mean_s: float
    square_s2: float
    cube_s3: float

    @classmethod
    def of(cls, times: Array) -> Service:
        """Of a sample, `[n]`."""
        squares = times * times
        return cls(mean(times), mean(squares), mean(squares * times))

    @property
    def residual(self) -> tuple[float, float]:
        """(mean, variance) of what is left of a service when somebody comes: E[S²]/2E[S], E[S³]/3E[S]."""
        left = self.square_s2 / (2 * self.mean_s)
        return left, self.cube_s3 / (3 * self.mean_s) - left * left


def waiting(
    servers: int,
    load: float,
    service: Service,
    *,
    probability: float | None = None,
    queued: tuple[float, Service] | None = None,
    unevenness: float = 1.0,
) -> Waiting:
    """Of Poisson arrivals at `servers` of which each takes what comes first (M/G/c).

    Who waits does so for what is left of a service, and then as long as anybody (Pollaczek and Khinchine's formula,
    taken apart): W|W>0 = R + W, with E[W] = ρE[R]/(1 − ρ) and Var W = E[W]² + ρE[R²]/(1 − ρ). For one server this is
    exact. For c servers the probability to wait is ρ^(√(2(c+1)) − 1) (Sakasegawa, 1977), and who waits does so as at
    one server that is c times as fast (Lee and Longton, 1959). Sending each arrival to the server with the least work
    left is the same as one queue for all.

    Args:
        load: ρ, the share of time a server is busy; 1 or more: all wait, for ever
        probability: to wait, if known better
        queued: load and services of the queue behind the service under way, where they are others
        unevenness: of arrivals, the variance of their number in a long time over that of Poisson arrivals
    """
    behind, queue = queued or (load, service)
    if max(load, behind) >= 1:
        return Waiting(1.0, math.inf, math.inf)
    if load <= 0 or service.mean_s <= 0:
        return Waiting(0.0, 0.0, 0.0)
    (left, spread), (left_q, spread_q) = service.residual, queue.residual
    more = behind * left_q / (1 - behind)
    variance = more * more + behind * (spread_q + left_q * left_q) / (1 - behind)
    return Waiting(
        load ** wait_power(servers) if probability is None else probability,
        (left + unevenness * more) / servers,
        (spread + unevenness * variance) / servers**2,
    )


def mean(values: Array) -> float:
    """Of `[n]`, in a third of the time of `values.mean()`."""
    return float(np.add.reduce(values)) / len(values)


def wait_power(servers: int) -> float:
    """The probability to wait is the load to this power."""
    return math.sqrt(2 * (servers + 1)) - 1


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
