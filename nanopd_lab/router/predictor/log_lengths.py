"""Output lengths learnt in the simplest Bayesian way: one normal for the logarithm of all of them, whatever the prompt.

`BayesianLengths` is this for each bucket of prompts, with a parent above the buckets and a shape beside them, and takes
outputs that were cut off more exactly.
"""

from __future__ import annotations

import copy
import math

import numpy as np

from nanopd_lab.router.lengths import check_observation, check_question, check_remaining
from nanopd_lab.router.predictor.conjugate import NormalInverseGamma

FIRST_BELIEF = NormalInverseGamma(mean=5.0, strength=1.0, variance=1.0, df=4.0)
"""A median of 148 tokens and a factor of about e around it, worth one observation and four: weak."""

_LEVELS = (np.arange(32) + 0.5) / 32  # a forecast's mean is that of these quantiles


class LogLengths:
    """What is believed of log lengths, updated by each output that ends.

    belief: of their mean and variance
    """

    def __init__(self, belief: NormalInverseGamma = FIRST_BELIEF) -> None:
        self.belief = belief

    def observe(self, tokens: int, censored: bool) -> None:
        """An output has ended after so many tokens; `censored`: it was cut off, and would have gone on.

        The belief is conjugate: it stays of its kind (Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.3). A
        length that is only known to exceed `tokens` counts as what is expected of those that do, and their variance
        goes into the squares: the average of what each of them would teach. Approximated: it counts as one observation,
        though it says less.
        """
        mean, strength, variance, df = self.belief
        value, spread = math.log(tokens), 0.0
        if censored:
            value, spread = self.belief.predictive.moments_beyond(value)
        gap = value - mean
        squares = df * variance + (gap**2 + spread) * strength / (strength + 1)
        self.belief = NormalInverseGamma(
            mean + gap / (strength + 1), strength + 1, squares / (df + 1), df + 1
        )

    def quantile(self, p: float) -> float:
        """Tokens that the next output does not exceed with probability `p`, in 0..1 without the ends."""
        return math.exp(self.belief.predictive.quantile(p))


class OneBelief:
    """A `LengthPredictor` of one belief for all prompts.

    Args:
        lengths: a `LogLengths`, or what a learner has in its place
    """

    def __init__(self, lengths: LogLengths | None = None) -> None:
        self.lengths = lengths or LogLengths()

    def predict(self, prompt_tokens: int, max_tokens: int) -> LogForecast:
        """See `LengthPredictor`."""
        check_question(prompt_tokens, max_tokens)
        return LogForecast(copy.copy(self.lengths), max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """See `LengthPredictor`."""
        check_observation(prompt_tokens, output_tokens, censored)
        if output_tokens:
            self.lengths.observe(output_tokens, censored)


class LogForecast:
    """See `LengthForecast`."""

    def __init__(self, lengths: LogLengths, max_tokens: int) -> None:
        self.lengths, self.max_tokens = lengths, max_tokens

    @property
    def mean(self) -> float:
        return self.remaining_mean(0)

    def quantile(self, p: float) -> float:
        return self.remaining_quantile(0, p)

    def remaining_mean(self, produced: int) -> float:
        check_remaining(produced)
        left = max(0, self.max_tokens - produced)
        return float(np.mean([self.remaining_quantile(produced, p) for p in _LEVELS])) if left else 0.0

    def remaining_quantile(self, produced: int, p: float) -> float:
        check_remaining(produced, p)
        left = float(max(0, self.max_tokens - produced))
        if p == 1 or not left:
            return left
        share = 1 - (1 - p) * self._above(produced)
        longest = math.ceil(min(self.lengths.quantile(share), 1e9) - 0.5) if share > 0 else 0
        return min(left, float(max(1, longest - produced)))

    def _above(self, tokens: int) -> float:
        """The probability of more than so many tokens: where quantiles reach them."""
        if tokens < 1:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.lengths.quantile(middle) < tokens + 0.5:
                low = middle
            else:
                high = middle
        return 1 - low
