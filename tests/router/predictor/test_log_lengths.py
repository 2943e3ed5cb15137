"""The simple belief against closed forms, integration by brute force and the package's batch update."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from nanopd_lab.router.predictor.conjugate import Evidence, NormalInverseGamma
from nanopd_lab.router.predictor.log_lengths import FIRST_BELIEF, LogLengths, OneBelief

LENGTHS = (12, 700, 45, 45, 2000, 130, 88)


def learnt(lengths: tuple[int, ...], belief: NormalInverseGamma = FIRST_BELIEF) -> LogLengths:
    found = LogLengths(belief)
    for tokens in lengths:
        found.observe(tokens, censored=False)
    return found


def test_one_after_the_other_is_all_at_once_in_any_order() -> None:
    seen = Evidence()
    for tokens in LENGTHS:
        seen.add(math.log(tokens))
    for order in (LENGTHS, LENGTHS[::-1], tuple(sorted(LENGTHS))):
        assert learnt(order).belief == pytest.approx(FIRST_BELIEF.given(seen))


def test_by_hand() -> None:
    found = LogLengths(NormalInverseGamma(5.0, 1.0, 1.0, 4.0))
    found.observe(round(math.exp(7)), False)
    assert found.belief == pytest.approx((6.0, 2.0, 1.2, 5.0), abs=2e-3)


def test_without_a_prior_it_is_the_textbooks_prediction_interval() -> None:
    """mean ± t(n - 1) · s · sqrt(1 + 1/n), of the logarithms: what a prior worth nothing must give."""
    logs = [math.log(tokens) for tokens in LENGTHS]
    n, mean, s = len(logs), statistics.fmean(logs), statistics.stdev(logs)
    found = learnt(LENGTHS, NormalInverseGamma(0.0, 1e-12, 1e-12, 1e-12))
    # Its df is n: a mean that nothing is known of takes one of them, which the textbook's has lost.
    found.belief = found.belief._replace(df=n - 1, variance=found.belief.variance * n / (n - 1))
    for p in (0.05, 0.5, 0.9):
        expected = math.exp(mean + stats.t(n - 1).ppf(p) * s * math.sqrt(1 + 1 / n))
        assert found.quantile(p) == pytest.approx(expected, rel=1e-6)


def test_what_was_cut_counts_as_the_average_of_what_it_may_have_been() -> None:
    belief = learnt(LENGTHS).belief
    found = LogLengths(belief)
    found.observe(300, censored=True)
    t = stats.t(belief.df, loc=belief.mean, scale=belief.predictive.scale)
    x = t.isf(np.linspace(0, 1, 400_001)[1:-1] * t.sf(math.log(300)))  # longer ones, equally likely
    mean, strength, variance, df = belief
    squares = df * variance + (x - mean) ** 2 * strength / (strength + 1)
    assert found.belief.mean == pytest.approx(float(np.mean(mean + (x - mean) / (strength + 1))), rel=1e-4)
    assert found.belief.variance == pytest.approx(float(np.mean(squares)) / (df + 1), rel=1e-3)
    assert found.belief[1::2] == (strength + 1, df + 1)


def test_cut_outputs_do_not_make_it_believe_in_short_ones() -> None:
    rng = random.Random(0)
    lengths = [max(1, round(math.exp(rng.gauss(5.0, 0.9)))) for _ in range(2000)]
    right, dropped, ended = LogLengths(), LogLengths(), LogLengths()
    for tokens in lengths:
        cut = tokens > 200
        right.observe(min(tokens, 200), cut)
        ended.observe(min(tokens, 200), False)
        if not cut:
            dropped.observe(tokens, False)
    truth = math.exp(5.0)
    assert abs(right.quantile(0.5) / truth - 1) < 0.1
    assert dropped.quantile(0.5) / truth - 1 < -0.25
    assert ended.quantile(0.9) <= 0.75 * right.quantile(0.9)


def test_forecasts_are_snapshots_within_their_limits() -> None:
    predictor = OneBelief()
    forecast = predictor.predict(100, 400)
    before = [forecast.quantile(p) for p in (0.0, 0.1, 0.5, 0.9, 1.0)]
    for _ in range(50):
        predictor.observe(100, 20)
    assert [forecast.quantile(p) for p in (0.0, 0.1, 0.5, 0.9, 1.0)] == before
    assert before == sorted(before)
    assert (before[0], before[2], before[-1]) == (1.0, 148.0, 400.0)
    later = predictor.predict(100, 400)
    assert later.mean < forecast.mean
    assert 1 <= later.remaining_quantile(100, 0.5) <= 300
    assert later.remaining_mean(400) == later.remaining_quantile(400, 0.5) == 0
    # Given that 100 are there, at most half exceed the median of what is still to come.
    total = 100 + forecast.remaining_quantile(100, 0.5)
    above = 1 - stats.t(4, loc=5.0, scale=math.sqrt(2)).cdf(np.log([100.5, total + 0.5]))
    assert above[1] <= 0.5 * above[0] < above[1] * 1.02
    for wrong in ((-1, 10), (1, 0)):
        with pytest.raises(ValueError, match="must be"):
            predictor.predict(*wrong)
    predictor.observe(5, 0, censored=True)  # says nothing
