"""Mean output lengths, also while only the short outputs have ended.

A policy has to plan before it has seen many ends, and the first to end are the short ones. What has ended counts by its
density, what is under way by the probability of coming so far, of a log-normal length whose median and spread are
looked for on a grid (maximum likelihood with censoring, averaged over a prior). A spread that is taken for granted has
outputs that are all under way after 200 tokens, as many have about 280, end at 900 on average. As ends outnumber what
is under way, all tokens that have been produced, by the ends, take over: what is under way are the long ones, so that
the mean of those that have ended would be too short. Prompts whose lengths have as many bits are of one kind; what a
kind is believed to be before it has been seen is what all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import erfc

SIGMA = 0.8  # of the logarithm, where nothing is known of it
SIGMAS = {0.35: 0.2, 0.55: 0.25, 0.8: 0.35, 1.1: 0.2}  # how much each is believed before
MEDIANS = [16.0 * 2**step for step in range(9)]
LOGS = [math.log(median) for median in MEDIANS]
PRIOR, PRIOR_SIGMA, KIND_SIGMA = (
    math.log(128.0),
    1.2,
    0.8,
)  # of the logarithm of the median: of all, of a kind about it
KNOWN_ENDS = 12  # from which on all of them say something of a kind
FORGET_ENDS = 300.0  # an output counts until about so many others have ended


class MeanLength:
    """Of one kind of requests. Lengths are tokens."""

    def __init__(self) -> None:
        self._weight = self._tokens = 0.0
        self._logs = self._squares = 0.0  # sums over what has ended, of the logarithm and of its square
        self.ends = 0
        self.log_median = PRIOR
        self.mean = math.exp(PRIOR + SIGMA**2 / 2)

    def ended(self, tokens: int) -> None:
        """An output has ended after so many."""
        kept, value = 1 - 1 / FORGET_ENDS, math.log(tokens)
        self.ends += 1
        self._weight = self._weight * kept + 1
        self._tokens = self._tokens * kept + tokens
        self._logs = self._logs * kept + value
        self._squares = self._squares * kept + value * value

    def look(
        self, under_way: int, sample: Sequence[float], prior: float = PRIOR, sigma: float = PRIOR_SIGMA
    ) -> None:
        """Work the mean out.

        Args:
            under_way: outputs; `sample`: tokens that some of them have produced, 25 at most
            prior, sigma: of the logarithm of the median
        """
        # How far they are is a guess, and wrong for all at once: they count half.
        weight = under_way / len(sample) / 2 if sample else 0.0
        produced = [math.log(tokens + 1.0) for tokens in sample]
        scores = []
        for spread, share in SIGMAS.items():
            scale, before = 1 / (spread * math.sqrt(2)), math.log(share) - self._weight * math.log(spread)
            for each in LOGS:
                alive = math.prod([0.5 * erfc((point - each) * scale) + 1e-12 for point in produced])
                seen = self._squares - each * (2 * self._logs - each * self._weight)
                score = before + weight * math.log(alive) - 0.5 * seen / spread**2
                scores.append((score - 0.5 * ((each - prior) / sigma) ** 2, each, spread))
        best = max(scores)[0]
        shares = [(math.exp(score - best), each, spread) for score, each, spread in scores]
        total = sum(share for share, _, _ in shares)
        self.log_median = sum(share * each for share, each, _ in shares) / total
        believed = math.exp(
            self.log_median + sum(share * spread**2 for share, _, spread in shares) / total / 2
        )
        plain = self._weight / (self._weight + under_way + 1)
        tokens = self._tokens + (under_way * sum(sample) / len(sample) if sample else 0.0)
        self.mean = believed if not self._weight else (1 - plain) * believed + plain * tokens / self._weight


class MeanLengths:
    """Of requests of all kinds."""

    def __init__(self) -> None:
        self.all = MeanLength()
        self._kinds: dict[int, MeanLength] = {}

    def of(self, kind: int) -> MeanLength:
        """Of prompts whose length has so many bits."""
        if kind not in self._kinds:
            self._kinds[kind] = MeanLength()
        return self._kinds[kind]

    def ended(self, kind: int, tokens: int) -> int:
        """An output has ended; returns how many of its kind have."""
        self.all.ended(tokens)
        own = self.of(kind)
        own.ended(tokens)
        return own.ends

    def look(self, kind: int, under_way: int, sample: Sequence[float]) -> float:
        """The mean of a kind, worked out anew; see `MeanLength.look`."""
        own = self.of(kind)
        known = self.all.ends >= KNOWN_ENDS
        own.look(
            under_way,
            sample,
            self.all.log_median if known else PRIOR,
            KIND_SIGMA if known else PRIOR_SIGMA,
        )
        return own.mean
