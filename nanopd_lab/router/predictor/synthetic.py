"""Workloads whose output lengths are drawn from a known distribution: the best forecast there is can be compared."""

from __future__ import annotations

import math
import random

from nanopd_lab.router.predictor.bayesian import bucket_of
from nanopd_lab.router.predictor.conjugate import StudentT
from nanopd_lab.router.predictor.forecast import BayesianForecast
from nanopd_lab.router.predictor.past import PastRequest
from nanopd_lab.router.predictor.shape import EDGES

KINDS = ("alike", "buckets", "drift")


class KnownLengths:
    """The distribution that each request's length was drawn from, in the order in which they are asked for.

    Args:
        logs: mean and standard deviation of log length, of each request
    """

    def __init__(self, logs: list[tuple[float, float]]) -> None:
        self._logs, self._next = logs, 0

    def predict(self, prompt_tokens: int, max_tokens: int) -> BayesianForecast:
        """See `LengthPredictor`."""
        mean, sigma = self._logs[self._next % len(self._logs)]
        self._next += 1
        return BayesianForecast(StudentT(1e6, mean, sigma), EDGES, max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """There is nothing to learn."""


def workload(
    kind: str, count: int, rate: float = 5.0, seed: int = 0
) -> tuple[list[PastRequest], list[tuple[float, float]]]:
    """Poisson arrivals with log-normal prompts and outputs, and what each output was drawn from.

    Args:
        kind: "alike": outputs have nothing to do with prompts; "buckets": median and spread differ from bucket to
            bucket of prompts; "drift": the median goes up and down by a factor of 1.65, twice in all
        rate: requests a second

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown synthetic workload {kind!r}; choose one of {', '.join(KINDS)}")
    rng = random.Random(seed)
    buckets = [(5.0 + 0.7 * rng.gauss(0, 1), 0.8 * math.exp(0.3 * rng.gauss(0, 1))) for _ in range(18)]
    now, requests, logs = 0.0, [], []
    for number in range(count):
        now += rng.expovariate(rate)
        prompt = max(1, round(700 * math.exp(1.2 * rng.gauss(0, 1))))
        mean, sigma = buckets[bucket_of(prompt)] if kind == "buckets" else (5.0, 0.9)
        if kind == "drift":
            mean += 0.5 * math.sin(4 * math.pi * number / count)
        output = max(1, round(math.exp(rng.gauss(mean, sigma))))
        requests.append(PastRequest(now, prompt, output))
        logs.append((mean, sigma))
    return requests, logs
