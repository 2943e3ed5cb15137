"""Intervals from one run: requests that come one after another share queues, so they are drawn again in blocks.

The circular block bootstrap (Politis and Romano, 1992). It says how far a figure would move if the same process sent
other requests; it knows nothing of what the machine does on another day. Runs of the same requests are compared request
by request: what both share then cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
CONFIDENCE = 0.95
ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


class Bounds(NamedTuple):
    """A figure, and between what it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def block_length(count: int) -> int:
    """Requests of a block: about `count ** (1/3)`, which is optimal for the variance of a mean up to a factor."""
    return max(1, round(count ** (1 / 3)))


def resamples(count: int, draws: int = DRAWS, seed: int = 0) -> NDArray[np.int64]:
    """Indices of so many samples with as many requests: [draws, count].

    Raises:
        ValueError: no requests.
    """
    if count < 1:
        raise ValueError("there are no requests to draw from")
    length = block_length(count)
    rng = np.random.default_rng(seed)
    starts = rng.integers(count, size=(draws, -(-count // length)))
    found = (starts[:, :, None] + np.arange(length)) % count
    return found.reshape(draws, -1)[:, :count]


def interval(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], Any] = lambda rows: rows.mean(axis=-1),
) -> Bounds:
    """Of a statistic of the values, in order of arrival.

    Args:
        statistic: of the last axis

    Raises:
        ValueError: no values.
    """
    found = statistic(values[resamples(len(values))])
    low, high = np.quantile(found, ENDS)
    return Bounds(float(statistic(values[None])[0]), float(low), float(high))


def intervals(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """(means, low, high) of each column of `values` [requests, columns], from the same samples.

    Raises:
        ValueError: no values.
    """
    drawn = resamples(len(values))
    times = np.zeros((len(drawn), len(values)))
    np.add.at(times, (np.arange(len(drawn))[:, None], drawn), 1 / len(values))
    low, high = np.quantile(times @ values, ENDS, axis=0)
    return values.mean(axis=0), low, high
