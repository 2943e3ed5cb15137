"""What the buckets of a hierarchical model have in common, estimated from all of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from nanopd_lab.router.predictor.conjugate import Evidence


class Prior(NamedTuple):
    """What is believed before anything is seen. Weak: a request's worth or a few.

    mean, mean_sd:         of the mean of log length: somewhere around 128 tokens
    variance, df:          of the variance of log length within a bucket, and how many observations that is worth
    strength, strength_df: of a bucket's mean, how many observations the parent is worth; and how many buckets
                           that is worth
    bucket_df:             of a bucket's variance, how many observations the parent is worth
    """

    mean: float = math.log(128)
    mean_sd: float = 1.5
    variance: float = 1.0
    df: float = 4.0
    strength: float = 32.0
    strength_df: float = 2.0
    bucket_df: float = 64.0


class Parent(NamedTuple):
    """What the buckets have in common.

    mean, uncertainty: of the buckets' means, and the variance of that estimate
    from_prior:        the share of that variance which is the prior's, and not the data's
    variance:          of log length within a bucket
    strength, df:      how many observations the mean and the variance are worth as a bucket's prior
    """

    mean: float
    uncertainty: float
    from_prior: float
    variance: float
    strength: float
    df: float

    @classmethod
    def of(cls, prior: Prior, seen: list[Evidence]) -> Parent:
        """Estimated from the buckets that have any evidence."""
        df = prior.df + sum(max(0.0, each.df - 1) for each in seen)
        variance = (prior.df * prior.variance + sum(each.squares for each in seen)) / df
        # The variance between buckets by moments (one-way analysis of variance, random effects), and a guess.
        between, others = prior.strength_df * variance / prior.strength, len(seen) - 1
        if others > 0:
            total = sum(each.weight for each in seen)
            middle = sum(each.weight * each.mean for each in seen) / total
            scatter = sum(each.weight * (each.mean - middle) ** 2 for each in seen)
            scale = total - sum(each.weight**2 for each in seen) / total
            between += others * max(0.0, (scatter - others * variance) / scale)
        between /= prior.strength_df + max(0, others)
        # The mean of their means, each as precise as its own observations and the variance between buckets make it.
        precision = 1 / prior.mean_sd**2
        mean = precision * prior.mean
        for each in seen:
            own = 1 / (between + variance / each.weight)
            precision += own
            mean += own * each.mean
        # Relative uncertainties of the common variance, and of a bucket's about it, add up.
        df = 1 / (1 / prior.bucket_df + 1 / df)
        from_prior = 1 / (prior.mean_sd**2 * precision)
        return cls(mean / precision, 1 / precision, from_prior, variance, variance / between, df)
