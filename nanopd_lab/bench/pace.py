"""Poisson arrivals at a rate that changes while they come."""

from __future__ import annotations

import math
import random


class Pace:
    """Moments of a Poisson process whose rate may change at any time.

    What is left until the next one is kept in units of the mean gap, so that a change counts at once, and the moments
    are those of the process with that rate over time (time rescaling).

    Args:
        rate: a second; 0: nothing comes
        now: s
    """

    def __init__(self, rate: float, rng: random.Random, now: float) -> None:
        self._rng = rng
        self._left = rng.expovariate(1.0)
        self._since = now
        self.rate = rate

    @property
    def next(self) -> float:
        """When the next one comes at this rate; infinite at 0."""
        return self._since + self._left / self.rate if self.rate > 0 else math.inf

    def due(self, now: float) -> list[float]:
        """Those that have come since the last call, in order."""
        found = []
        while (moment := self.next) <= now:
            found.append(moment)
            self._since, self._left = moment, self._rng.expovariate(1.0)
        return found

    def change(self, rate: float, now: float) -> None:
        """From `now` on; what was due before has been taken."""
        self._left = max(0.0, self._left - max(0.0, now - self._since) * self.rate)
        self._since, self.rate = max(now, self._since), rate
