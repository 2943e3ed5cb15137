"""How good forecasts of output lengths are: predict, then learn, in the order of a trace.

Every figure is a mean over requests of something that one forecast and one length give, so that intervals come from
resampling requests: whole blocks of consecutive ones, since neighbours may be alike. Interval forecasts are judged as
in Gneiting & Raftery, JASA 102, 2007: by the pinball loss of their quantiles and by how often they hold.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanopd_lab.router.lengths import LengthPredictor
from nanopd_lab.router.predictor.baselines import BucketedMean, BucketedQuantiles, OverallQuantiles
from nanopd_lab.router.predictor.bayesian import BayesianLengths
from nanopd_lab.router.predictor.past import Answered

Array = NDArray[np.float64]
Factory = Callable[[], LengthPredictor]

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
BLOCK = 50  # requests resampled together
RESAMPLES = 1000
SURVEY_S = 1.0  # as often as workers report, or seldomer
FIRST = 200  # requests that a predictor's start is judged by
PREDICTORS: dict[str, Factory] = {
    "bayesian": BayesianLengths,
    "bayesian, log-normal only": lambda: BayesianLengths(shape=None),
    "overall quantiles": OverallQuantiles,
    "bucketed quantiles": BucketedQuantiles,
    "bucketed mean (nanoPD)": BucketedMean,
}


@dataclass(frozen=True)
class Learning:
    """When a predictor is told of an output, and of how much of it.

    prefill_s, token_s: it ends so long after its arrival, and so long again for each token; None: at once
    survey_s:           so often a predictor that has a `survey` is told what is running
    cancelled:          clients go away after a random number of tokens (log-uniform in 4..4096), and what an output
                        would have been is never told, only that it was longer
    """

    prefill_s: float | None = None
    token_s: float = 0.0
    survey_s: float = math.inf
    cancelled: bool = False


@dataclass(frozen=True)
class Replay:
    """Forecasts that were made for requests, and what came of them.

    quantiles: [requests, LEVELS]; means, lengths: [requests]
    """

    quantiles: Array
    means: Array
    lengths: Array

    def figures(self) -> dict[str, Array]:
        """For each request, what each figure is the mean of."""
        length, quantiles = self.lengths, self.quantiles
        miss = length[:, None] - quantiles
        levels = np.array(LEVELS)
        pinball = np.maximum(levels * miss, (levels - 1) * miss)
        found = {
            "mae_of_median": np.abs(miss[:, LEVELS.index(0.5)]),
            "mae_of_mean": np.abs(length - self.means),
            "error_of_mean": self.means - length,
            "pinball": pinball.mean(1),
        }
        found |= {f"pinball_{100 * level:02.0f}": pinball[:, k] for k, level in enumerate(LEVELS)}
        for name, low, high in (("50", 0.25, 0.75), ("90", 0.05, 0.95)):
            lower, upper = quantiles[:, LEVELS.index(low)], quantiles[:, LEVELS.index(high)]
            # Lengths are whole numbers, and many fall on an end; a right interval holds between these two.
            found[f"within_{name}"] = ((lower <= length) & (length <= upper)).astype(float)
            found[f"strictly_within_{name}"] = ((lower < length) & (length < upper)).astype(float)
        return found


def replay(
    predictor: LengthPredictor,
    requests: Sequence[Answered],
    max_tokens: int,
    learning: Learning = Learning(),
    seed: int = 0,
) -> Replay:
    """Predict each request's length when it arrives; tell it when it is known."""
    rng = random.Random(seed)
    running: list[tuple[float, int, int, int, bool]] = []
    survey, due = getattr(predictor, "survey", None), -math.inf
    quantiles, means = np.empty((len(requests), len(LEVELS))), np.empty(len(requests))
    for number, request in enumerate(requests):
        while running and running[0][0] <= request.arrival:
            predictor.observe(*heapq.heappop(running)[2:])
        if survey is not None and learning.survey_s < math.inf and request.arrival >= due:
            due = request.arrival + learning.survey_s
            survey(_produced(running, requests, request.arrival, learning))
        forecast = predictor.predict(request.prompt_tokens, max_tokens)
        quantiles[number] = [forecast.quantile(level) for level in LEVELS]
        means[number] = forecast.mean
        bound = min(max_tokens, round(4 * 1024 ** rng.random()) if learning.cancelled else max_tokens)
        known, cut = min(request.output_tokens, bound), request.output_tokens > bound
        if learning.prefill_s is None:
            predictor.observe(request.prompt_tokens, known, cut)
        else:
            end = request.arrival + learning.prefill_s + known * learning.token_s
            heapq.heappush(running, (end, number, request.prompt_tokens, known, cut))
    lengths = [min(max_tokens, request.output_tokens) for request in requests]
    return Replay(quantiles, means, np.array(lengths, dtype=float))


def _produced(
    running: Sequence[tuple[float, int, int, int, bool]],
    requests: Sequence[Answered],
    now: float,
    learning: Learning,
) -> list[tuple[int, int]]:
    """Of each running request its prompt, and the tokens of its output that there are."""
    assert learning.prefill_s is not None
    found = []
    for _, number, prompt_tokens, known, _ in running:
        decoded_s = now - requests[number].arrival - learning.prefill_s
        tokens = int(decoded_s / learning.token_s) if learning.token_s and decoded_s > 0 else 0
        found.append((prompt_tokens, min(tokens, known - 1)))
    return found


def evaluate(
    requests: Sequence[Answered],
    max_tokens: int = 4096,
    skip: float = 0.3,
    serving: tuple[float, float] = (0.2, 0.03),
    predictors: Mapping[str, Factory] = PREDICTORS,
    known: Factory | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All predictors on one trace, JSON-ready: figures with 95 % intervals, each beside the first predictor's.

    `immediate`, `delayed` and `cancelled` are ways of learning; predictors see all requests and are judged by those
    behind `skip`, the part that choices may be made on. `starts, ...`: new predictors for every 200 of those.

    Args:
        max_tokens: that every request may produce
        skip: share of the trace that is not judged
        serving: seconds to the first token, and for each token, for `delayed`
        known: what forecasts the truth, if the requests were drawn from it; judged as "the truth"

    Raises:
        ValueError: fewer than 2 blocks of 50 requests are left to judge, or a skip that is no share.
    """
    if not 0 <= skip < 1:
        raise ValueError(f"skip is {skip}; it must be a share in 0..1, below 1")
    first = int(len(requests) * skip)
    judged = requests[first:]
    if len(judged) < 2 * BLOCK:
        raise ValueError(
            f"{len(judged)} requests are left to judge behind {first}; there must be {2 * BLOCK}: take a longer trace "
            "or a smaller skip"
        )
    ways = {
        "immediate": Learning(),
        "delayed": Learning(*serving, survey_s=SURVEY_S),
        "cancelled": Learning(cancelled=True),
    }
    found: dict[str, Any] = {"judged": len(judged), "skipped": first, "scenarios": {}, "us_per_request": {}}
    for way, learning in ways.items():
        rows = {}
        whole = dict(predictors) if known is None else {**predictors, "the truth": known}
        for name, factory in whole.items():
            done = replay(factory(), requests, max_tokens, learning, seed)
            rows[name] = {key: values[first:] for key, values in done.figures().items()}
        found["scenarios"][way] = summary(rows, seed)
    starts = [judged[k : k + FIRST] for k in range(0, len(judged) - FIRST + 1, FIRST)]
    for way in ("immediate", "delayed") if starts else ():
        rows = {}
        for name, factory in predictors.items():
            each = [replay(factory(), part, max_tokens, ways[way], seed).figures() for part in starts]
            rows[name] = {key: np.concatenate([part[key] for part in each]) for key in each[0]}
        found["scenarios"][f"starts, {way}"] = summary(rows, seed)
    for name, factory in predictors.items():
        found["us_per_request"][name] = 1e6 * seconds_per_request(factory(), requests[:2000], max_tokens)
    return found


def summary(rows: Mapping[str, Mapping[str, Array]], seed: int = 0) -> dict[str, Any]:
    """Of each predictor and figure `[mean, low, high]`; a tenth of the requests after the other, `over_time`; and by
    how much its pinball loss and error exceed the first predictor's, as shares of that, `excess`."""
    names = list(rows)
    count = len(next(iter(rows[names[0]].values())))
    blocks = max(2, count // BLOCK)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES)
    sizes = np.array([len(part) for part in np.array_split(np.empty(count), blocks)])

    def resampled(values: Array) -> Array:
        sums = np.array([part.sum() for part in np.array_split(values, blocks)])
        return np.asarray(draws @ sums / (draws @ sizes))

    def spread(mean: float, values: Array) -> list[float]:
        return [float(mean), *(float(each) for each in np.quantile(values, (0.025, 0.975)))]

    found: dict[str, Any] = {}
    base = {key: resampled(rows[names[0]][key]) for key in ("pinball", "mae_of_median")}
    for name in names:
        each: dict[str, Any] = {
            key: spread(values.mean(), resampled(values)) for key, values in rows[name].items()
        }
        each["excess"] = {
            key: spread(
                rows[name][key].mean() / rows[names[0]][key].mean() - 1,
                resampled(rows[name][key]) / base[key] - 1,
            )
            for key in base
        }
        each["over_time"] = {
            key: [float(part.mean()) for part in np.array_split(rows[name][key], 10)]
            for key in ("pinball", "mae_of_median", "within_50", "within_90")
        }
        found[name] = each
    return found


def seconds_per_request(predictor: LengthPredictor, requests: Sequence[Answered], max_tokens: int) -> float:
    """What routing spends on a request: a forecast, two quantiles of it, and learning; the best of five passes."""
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        for request in requests:
            forecast = predictor.predict(request.prompt_tokens, max_tokens)
            forecast.quantile(0.5)
            forecast.quantile(0.9)
            predictor.observe(request.prompt_tokens, request.output_tokens)
        best = min(best, time.perf_counter() - begun)
    return best / len(requests)
