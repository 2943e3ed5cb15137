"""What the Bayesian predictor of output lengths has to beat: moving averages and plain quantiles.

All count an output that was cut off as one that ended there, as nanoPD's does.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

from nanopd_lab.router.lengths import check_observation, check_question, check_remaining

NANOPD_BUCKETS = (64, 128, 256, 512, 1024, 2048)  # longest prompts; longer ones go with the last
NANOPD_WINDOW = 50
NANOPD_DEFAULT = 256
NANOPD_MIN_SAMPLES = 5


class Empirical:
    """Each of the lengths seen is as likely. See `LengthForecast`.

    Args:
        lengths: sorted, at least one
    """

    def __init__(self, lengths: Sequence[float], max_tokens: int) -> None:
        self._lengths, self.max_tokens = lengths, max_tokens

    @property
    def mean(self) -> float:
        return self.remaining_mean(0)

    def quantile(self, p: float) -> float:
        return self.remaining_quantile(0, p)

    def remaining_mean(self, produced: int) -> float:
        check_remaining(produced)
        left, longer = self._longer(produced)
        return sum(min(left, each - produced) for each in longer) / len(longer) if longer else min(left, 1.0)

    def remaining_quantile(self, produced: int, p: float) -> float:
        check_remaining(produced, p)
        left, longer = self._longer(produced)
        if not longer:  # none has gone on so far
            return min(left, 1.0)
        return min(left, longer[max(0, math.ceil(p * len(longer)) - 1)] - produced)

    def _longer(self, produced: int) -> tuple[float, Sequence[float]]:
        longer = self._lengths[bisect_right(self._lengths, produced) :]
        return float(max(0, self.max_tokens - produced)), longer


class BucketedQuantiles:
    """The last 50 lengths of a bucket; of all buckets while it has fewer than 5; 256 before any.

    Buckets and numbers are nanoPD's (`OutputLengthPredictor`, read in its source), which keeps only the average.
    """

    def __init__(self) -> None:
        self._recent: list[deque[int]] = [deque(maxlen=NANOPD_WINDOW) for _ in NANOPD_BUCKETS]
        self._all: deque[int] = deque(maxlen=NANOPD_WINDOW * len(NANOPD_BUCKETS))

    def predict(self, prompt_tokens: int, max_tokens: int) -> Empirical:
        """See `LengthPredictor`."""
        check_question(prompt_tokens, max_tokens)
        return Empirical(self._summary(self._seen(prompt_tokens)), max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """See `LengthPredictor`."""
        check_observation(prompt_tokens, output_tokens, censored)
        self._recent[_bucket(prompt_tokens)].append(output_tokens)
        self._all.append(output_tokens)

    def _seen(self, prompt_tokens: int) -> Sequence[int]:
        own = self._recent[_bucket(prompt_tokens)]
        return own if len(own) >= NANOPD_MIN_SAMPLES else self._all or [NANOPD_DEFAULT]

    def _summary(self, seen: Sequence[int]) -> Sequence[float]:
        return sorted(seen)


class BucketedMean(BucketedQuantiles):
    """nanoPD's "online Bayesian" predictor: the rounded average of those lengths, and no idea of how sure it is.

    Every quantile of its forecast is that one number, which is what a router that asks for one gets.
    """

    def _summary(self, seen: Sequence[int]) -> Sequence[float]:
        return [max(1, round(sum(seen) / len(seen)))]


class OverallQuantiles:
    """All lengths there have been, whatever the prompt."""

    def __init__(self) -> None:
        self._lengths: list[float] = []
        self._snapshot: tuple[float, ...] | None = (float(NANOPD_DEFAULT),)

    def predict(self, prompt_tokens: int, max_tokens: int) -> Empirical:
        """See `LengthPredictor`."""
        check_question(prompt_tokens, max_tokens)
        if self._snapshot is None:
            self._snapshot = tuple(self._lengths)
        return Empirical(self._snapshot, max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """See `LengthPredictor`."""
        check_observation(prompt_tokens, output_tokens, censored)
        insort(self._lengths, float(output_tokens))
        self._snapshot = None


def _bucket(prompt_tokens: int) -> int:
    return min(bisect_left(NANOPD_BUCKETS, prompt_tokens), len(NANOPD_BUCKETS) - 1)
