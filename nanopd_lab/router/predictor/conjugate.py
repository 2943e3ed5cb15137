"""Normal observations of unknown mean and variance: the textbook's conjugate model, with observations cut off.

Formulas: Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.3. The normal-inverse-gamma distribution with shape
`df / 2` and scale `df * variance / 2` is written there by what it means: mean and variance as a guess, and how many
observations each guess is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from nanopd_lab.router.predictor.student_t import stdtr, stdtrit


@dataclass
class Evidence:
    """What a normal model needs to know of its observations.

    It changes: `add` is Welford's update, with weights.

    weight, mean: how many there are, and their mean
    df, squares:  how many they count as for the variance, and their squares about the mean
    """

    weight: float = 0.0
    mean: float = 0.0
    df: float = 0.0
    squares: float = 0.0

    def add(self, value: float, weight: float = 1.0, df: float | None = None) -> None:
        """One observation, which counts `weight` (and `df` for the variance, if that differs)."""
        total = self.weight + weight
        gap = value - self.mean
        self.mean += gap * weight / total
        self.squares += gap * gap * self.weight * weight / total
        self.weight = total
        self.df += weight if df is None else df

    def plus(self, other: Evidence) -> Evidence:
        """Both together."""
        found = Evidence(self.weight, self.mean, self.df, self.squares + other.squares)
        if other.weight:
            found.add(other.mean, other.weight, other.df)
        return found

    def times(self, factor: float) -> Evidence:
        """The same, every observation counting `factor` of what it did."""
        return Evidence(self.weight * factor, self.mean, self.df * factor, self.squares * factor)


class NormalInverseGamma(NamedTuple):
    """What is believed of a normal's mean and variance.

    mean, strength: of the mean, and how many observations that is worth
    variance, df:   of the variance, and how many observations that is worth
    """

    mean: float
    strength: float
    variance: float
    df: float

    def given(self, seen: Evidence) -> NormalInverseGamma:
        """The posterior."""
        strength, df = self.strength + seen.weight, self.df + seen.df
        gap = seen.mean - self.mean
        squares = self.df * self.variance + seen.squares
        squares += gap * gap * self.strength * seen.weight / strength
        return NormalInverseGamma(self.mean + gap * seen.weight / strength, strength, squares / df, df)

    @property
    def predictive(self) -> StudentT:
        """The next observation's distribution."""
        return StudentT(self.df, self.mean, math.sqrt(self.variance * (1 + 1 / self.strength)))

    def beyond(self, bound: float) -> tuple[float, float, float] | None:
        """What an observation known only to exceed `bound` is worth: `(value, weight, df)` for `Evidence.add`.

        The true posterior is a mixture, over what the observation may be, of the posteriors that it would give. The
        three are chosen so that the posterior keeps the mixture's mean and variance of the mean, and its mean of the
        variance (assumed-density filtering; Minka 2001). A bound that is no news has a weight near 0; None: none.

        Approximated: the posterior's shape.
        """
        expected, spread = self.predictive.moments_beyond(bound)
        gap, grown, squares = expected - self.mean, self.strength + 1, self.df * self.variance
        variance = (squares + (spread + gap * gap) * self.strength / grown) / (self.df - 1)
        strength = grown / (1 + spread / (variance * grown))
        weight = strength - self.strength
        if weight < 1e-9:
            return None
        step = gap * strength / (grown * weight)
        df = (squares + step * step * self.strength * weight / strength) / variance + 2 - self.df
        return self.mean + step, weight, max(0.0, df)


class StudentT(NamedTuple):
    """Student's t with `df` > 2 degrees of freedom, moved and stretched."""

    df: float
    mean: float
    scale: float

    def above(self, value: float) -> float:
        """The probability of more than `value`."""
        return stdtr(self.df, (self.mean - value) / self.scale)

    def quantile(self, p: float) -> float:
        """What is not exceeded with a probability of `p`."""
        return self.mean + self.scale * float(stdtrit(self.df, p))

    def moments_beyond(self, bound: float) -> tuple[float, float]:
        """Mean and variance of what exceeds `bound`.

        The first moment is the density's own antiderivative; the second leads to the tail of a t with two degrees
        less (integrate by parts).
        """
        df, a = self.df, (bound - self.mean) / self.scale
        tail = stdtr(df, -a)
        if tail < 1e-290:  # nothing is left but the power law
            first = a * df / (df - 1)
            spread = a * a * df / ((df - 1) ** 2 * (df - 2))
        else:
            density = math.exp(_log_peak(df) - (df + 1) / 2 * math.log1p(a * a / df))
            first = density * (df + a * a) / (df - 1) / tail
            lighter = stdtr(df - 2, -a * math.sqrt((df - 2) / df))
            spread = df * (df - 1) / (df - 2) * lighter / tail - df - first * first
        return self.mean + self.scale * first, self.scale**2 * max(0.0, spread)


@lru_cache(maxsize=4096)
def _log_peak(df: float) -> float:
    return math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
