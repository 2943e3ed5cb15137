"""The conjugate model against textbook forms, numerical integration and grids of the true posterior."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from nanopd_lab.router.predictor.conjugate import Evidence, NormalInverseGamma, StudentT

VALUES = st.lists(st.floats(-20, 20), min_size=1, max_size=20)
PRIORS = st.builds(
    NormalInverseGamma, st.floats(-5, 5), st.floats(0.1, 50), st.floats(0.05, 9), st.floats(3, 60)
)


def evidence(values: list[float]) -> Evidence:
    found = Evidence()
    for value in values:
        found.add(value)
    return found


@given(VALUES)
def test_evidence_is_count_mean_and_squares(values: list[float]) -> None:
    seen = evidence(values)
    assert seen.weight == len(values)
    assert seen.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert seen.squares == pytest.approx(np.var(values) * len(values), abs=1e-7)


@given(PRIORS, VALUES)
def test_the_posterior_is_that_of_the_textbook(prior: NormalInverseGamma, values: list[float]) -> None:
    """Normal-inverse-gamma as Murphy (2007), "Conjugate Bayesian analysis of the Gaussian distribution", section 6."""
    alpha, beta, n, mean = prior.df / 2, prior.df * prior.variance / 2, len(values), float(np.mean(values))
    beta += sum((x - mean) ** 2 for x in values) / 2
    beta += prior.strength * n * (mean - prior.mean) ** 2 / (2 * (prior.strength + n))
    alpha += n / 2
    post = prior.given(evidence(values))
    assert post.mean == pytest.approx(
        (prior.strength * prior.mean + n * mean) / (prior.strength + n), abs=1e-9
    )
    assert post.strength == prior.strength + n
    assert post.df / 2 == alpha
    assert post.df * post.variance / 2 == pytest.approx(beta)
    ahead = post.predictive
    assert ahead.df == 2 * alpha
    assert ahead.scale == pytest.approx(math.sqrt(beta * (post.strength + 1) / (alpha * post.strength)))


@given(PRIORS, st.floats(-10, 10))
def test_the_predictive_is_the_normal_averaged_over_the_belief(prior: NormalInverseGamma, x: float) -> None:
    variance = stats.invgamma(prior.df / 2, scale=prior.df * prior.variance / 2)
    logs = np.linspace(np.log(variance.ppf(1e-15)), np.log(variance.isf(1e-15)), 20_001)
    each = np.exp(logs)
    normal = stats.norm.pdf(x, prior.mean, np.sqrt(each * (1 + 1 / prior.strength)))  # over the mean: known
    found = integrate.trapezoid(normal * variance.pdf(each) * each, logs)
    t = prior.predictive
    assert stats.t.pdf(x, t.df, t.mean, t.scale) == pytest.approx(found, rel=1e-4, abs=1e-9)


@given(st.floats(2.5, 200), st.floats(-8, 30))
def test_moments_beyond_a_bound_are_those_of_numerical_integration(df: float, bound: float) -> None:
    t, truth = StudentT(df, 1.0, 2.0), stats.t(df, 1.0, 2.0)
    assert t.above(bound) == pytest.approx(truth.sf(bound), rel=1e-9)
    tail = truth.sf(bound)
    if tail < 1e-200:
        return
    # x = bound + y/(1-y) maps the tail to 0..1
    moments = [
        integrate.quad(
            lambda y, k=k: (y / (1 - y)) ** k * truth.pdf(bound + y / (1 - y)) / tail / (1 - y) ** 2, 0, 1, limit=500
        )[0]
        for k in (1, 2)
    ]  # fmt: skip
    mean, variance = t.moments_beyond(bound)
    assert mean - bound == pytest.approx(moments[0], rel=1e-4, abs=1e-6)
    if df > 4:
        assert variance == pytest.approx(moments[1] - moments[0] ** 2, rel=2e-3, abs=1e-5)


def test_beyond_all_probability_the_power_law_goes_on() -> None:
    """Of a t's tail, x^-(df+1), the mean beyond a is a·df/(df-1)."""
    mean, variance = StudentT(200.0, 0.0, 1.0).moments_beyond(1e4)
    assert mean == pytest.approx(1e4 * 200 / 199, rel=1e-3)
    assert variance > 0


def grid_after(prior: NormalInverseGamma, bound: float) -> tuple[float, float, float]:
    """E[mean], Var[mean], E[variance] given one observation above `bound`, without any conjugacy."""
    variances = stats.invgamma(prior.df / 2, scale=prior.df * prior.variance / 2).ppf(
        (np.arange(4000) + 0.5) / 4000
    )
    z = stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    means = prior.mean + z[None, :] * np.sqrt(variances / prior.strength)[:, None]
    like = special.ndtr((means - bound) / np.sqrt(variances)[:, None])
    like /= like.sum()
    centre = (like * means).sum()
    return centre, (like * (means - centre) ** 2).sum(), (like.sum(1) * variances).sum()


@pytest.mark.parametrize("bound", [-6.0, -1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("strength", [1.0, 5.0, 40.0])
def test_a_cut_off_observation_gives_the_moments_of_the_true_posterior(bound: float, strength: float) -> None:
    prior = NormalInverseGamma(0.2, strength, 1.3, 12.0)
    mean, spread, variance = grid_after(prior, bound)
    worth = prior.beyond(bound)
    seen = Evidence()
    if worth is not None:
        seen.add(*worth)
    post = prior.given(seen)
    found = post.df * post.variance / (post.df - 2)
    assert post.mean == pytest.approx(mean, abs=2e-3)
    assert found == pytest.approx(variance, rel=0.01)
    assert found / post.strength == pytest.approx(spread, rel=0.01)


@given(PRIORS, st.floats(-50, 50))
def test_a_cut_off_observation_is_worth_at_most_one_and_never_lowers(
    prior: NormalInverseGamma, bound: float
) -> None:
    worth = prior.beyond(bound)
    if worth is not None:
        value, weight, df = worth
        assert value >= prior.mean
        assert 0 < weight <= 1 + 1e-9
        assert 0 <= df < 2
    low = prior.beyond(prior.mean - 1e3 * prior.predictive.scale)
    assert low is None or low[1] < 0.1  # no news
