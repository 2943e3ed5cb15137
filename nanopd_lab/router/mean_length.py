"""The mean output length, also while only the short outputs have ended.

A policy has to plan before it has seen many ends, and the first to end are the short ones. What has ended counts by its
density, what is under way by the probability of coming so far, of a log-normal length whose median is looked for on a
grid (maximum likelihood with censoring, averaged over a prior). As ends outnumber what is under way, their plain mean
takes over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SIGMA = 0.8  # of the logarithm, where nothing is known of it
MEDIANS = [16.0 * 2 ** (step / 2) for step in range(17)]
PRIOR_MEDIAN, PRIOR_SIGMA = 128.0, 1.2
FORGET_ENDS = 500.0  # an output counts until about so many others have ended


class MeanLength:
    """See the module. Lengths are tokens."""

    def __init__(self) -> None:
        self._logs = [math.log(median) for median in MEDIANS]
        prior = math.log(PRIOR_MEDIAN)
        self._prior = [-0.5 * ((each - prior) / PRIOR_SIGMA) ** 2 for each in self._logs]
        self._seen = [0.0] * len(MEDIANS)  # log likelihood of what has ended
        self._ends = self._tokens = 0.0
        self.mean = PRIOR_MEDIAN * math.exp(SIGMA**2 / 2)

    def ended(self, tokens: int) -> None:
        """An output has ended after so many."""
        kept, value = 1 - 1 / FORGET_ENDS, math.log(tokens)
        self._ends = self._ends * kept + 1
        self._tokens = self._tokens * kept + tokens
        self._seen = [
            kept * seen - 0.5 * ((value - each) / SIGMA) ** 2
            for seen, each in zip(self._seen, self._logs, strict=True)
        ]

    def look(self, under_way: int, sample: Sequence[float]) -> None:
        """Work the mean out: so many are under way, and some of them have produced these numbers of tokens."""
        # How far they are is a guess, and wrong for all at once: they count half.
        weight = under_way / len(sample) / 2 if sample else 0.0
        scores = []
        for prior, seen, each in zip(self._prior, self._seen, self._logs, strict=True):
            alive = 0.0
            for produced in sample:
                z = (math.log(produced + 1.0) - each) / (SIGMA * math.sqrt(2))
                alive += math.log(max(0.5 * math.erfc(z), 1e-12))
            scores.append(prior + seen + weight * alive)
        best = max(scores)
        shares = [math.exp(score - best) for score in scores]
        log_median = sum(s * each for s, each in zip(shares, self._logs, strict=True)) / sum(shares)
        believed = math.exp(log_median + SIGMA**2 / 2)
        plain = self._ends / (self._ends + under_way + 1)
        self.mean = believed if not self._ends else (1 - plain) * believed + plain * self._tokens / self._ends
