"""When requests come: the arrival processes of `vllm bench serve`, drawn before anything is sent.

Gaps are gamma-distributed with shape `burstiness` and mean `1 / rate`: 1 is a Poisson process, less comes in bursts,
more evenly, infinity at constant gaps. The times are then stretched so that the last of `count` requests comes at
`count / rate`, which takes one source of noise from runs of different seeds. While the rate ramps up nothing is
stretched. An infinite rate is all at once.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

STRATEGIES = ("linear", "exponential")


@dataclass(frozen=True)
class RampUp:
    """The rate goes from `start_rps` with the first request to `end_rps` with the last, in requests a second.

    Raises:
        ValueError: an unknown strategy, or a rate that is not positive, or one that falls.
    """

    strategy: str
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"ramp-up strategy {self.strategy!r}; choose {' or '.join(map(repr, STRATEGIES))}"
            )
        if not 0 < self.start_rps <= self.end_rps < math.inf:
            raise ValueError(
                f"ramp-up from {self.start_rps} to {self.end_rps} requests/s; both must be positive and finite, and "
                "the end no lower than the start"
            )

    def rate(self, number: int, count: int) -> float:
        """At the `number`th of `count` requests."""
        progress = number / max(count - 1, 1)
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)


@dataclass(frozen=True)
class Arrivals:
    """An arrival process, see the module; `rate` is in requests a second, and does not count while `ramp_up` does.

    Raises:
        ValueError: a rate or a burstiness that is not positive.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp_up: RampUp | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate:g} requests/s; it must be positive (inf: all at once)")
        if not self.burstiness > 0:
            raise ValueError(f"burstiness is {self.burstiness:g}; it must be positive (1 is Poisson)")

    def times(self, count: int, rng: random.Random) -> list[float]:
        """Seconds at which each of `count` requests comes, in order."""
        if self.ramp_up is None:
            return arrival_times(count, self.rate, self.burstiness, rng)
        rates = [self.ramp_up.rate(number, count) for number in range(count)]
        return list(itertools.accumulate(_gap(rate, self.burstiness, rng) for rate in rates))


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds at which each of `count` requests comes: gamma gaps, added up, the last stretched to `count / rate`."""
    if rate == math.inf:
        return [0.0] * count
    times = list(itertools.accumulate(_gap(rate, burstiness, rng) for _ in range(count)))
    stretch = count / rate / times[-1] if times and times[-1] else 1.0
    return [each * stretch for each in times]


def _gap(rate: float, burstiness: float, rng: random.Random) -> float:
    if burstiness == math.inf:
        return 1.0 / rate
    return rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
