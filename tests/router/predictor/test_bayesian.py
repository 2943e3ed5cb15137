"""The Bayesian length predictor: what holds for any events, and whether it is right."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nanopd_lab.router.lengths import LengthForecast, LengthPredictor
from nanopd_lab.router.predictor import (
    BayesianLengths,
    BucketedMean,
    BucketedQuantiles,
    OverallQuantiles,
    Prior,
)
from nanopd_lab.router.predictor.bayesian import bucket_of

SHARES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
KINDS = (BayesianLengths, BucketedMean, BucketedQuantiles, OverallQuantiles)
TOKENS = st.one_of(st.integers(1, 40), st.integers(1, 10**6))
EVENTS = st.lists(st.tuples(TOKENS, TOKENS, st.booleans()), max_size=40)


def fed(predictor: Any, events: list[tuple[int, int, bool]]) -> Any:
    for event in events:
        predictor.observe(*event)
    return predictor


# ---------------------------------------------------------------------- any predictor, any events


@pytest.mark.parametrize("kind", KINDS)
@given(events=EVENTS, prompt=TOKENS, most=TOKENS, produced=TOKENS)
def test_forecasts_stay_within_bounds_and_in_order(
    kind: type, events: list[tuple[int, int, bool]], prompt: int, most: int, produced: int
) -> None:
    predictor: LengthPredictor = fed(kind(), events)
    forecast: LengthForecast = predictor.predict(prompt, most)
    lengths = [forecast.quantile(p) for p in SHARES]
    assert lengths == sorted(lengths)
    assert all(1 <= each <= most and each == int(each) for each in lengths)
    assert 1 <= forecast.mean <= most
    left = [forecast.remaining_quantile(produced, p) for p in SHARES]
    if produced < most:
        assert left == sorted(left)
        assert all(1 <= each <= most - produced for each in left)
        assert 1 <= forecast.remaining_mean(produced) <= most - produced
    else:
        assert left == [0.0] * len(SHARES)
        assert forecast.remaining_mean(produced) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_is_a_snapshot(kind: type) -> None:
    predictor = fed(kind(), [(100, 20, False)] * 8)
    forecast = predictor.predict(100, 512)
    before = [forecast.quantile(p) for p in SHARES], forecast.mean
    fed(predictor, [(100, 400, False)] * 30)
    assert ([forecast.quantile(p) for p in SHARES], forecast.mean) == before
    assert predictor.predict(100, 512).mean > before[1]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_says_what_is_wrong(kind: type) -> None:
    predictor = kind()
    forecast = predictor.predict(10, 10)
    survey: Any = ([(5, -3)],) if hasattr(predictor, "survey") else (5, -3)
    for call, words in (
        (lambda: predictor.predict(-1, 10), "prompt_tokens is -1; it must be 0 or more"),
        (lambda: predictor.predict(10, 0), "max_tokens is 0; it must be at least 1"),
        (lambda: predictor.observe(-3, 10), "prompt_tokens is -3"),
        (lambda: predictor.observe(3, 0), "output of 0 tokens has ended; that is at least 1"),
        (lambda: predictor.observe(3, -1, censored=True), "output of -1 tokens"),
        (lambda: getattr(predictor, "survey", predictor.observe)(*survey), "-3"),
        (lambda: forecast.quantile(90), "quantile 90.*0.9, not 90"),
        (lambda: forecast.remaining_quantile(3, math.nan), "quantile nan"),
        (lambda: forecast.remaining_mean(-2), "produced is -2 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# ---------------------------------------------------------------------- the model


@given(EVENTS, st.randoms(use_true_random=False))
def test_the_order_of_what_has_ended_does_not_matter_without_forgetting(
    events: list[tuple[int, int, bool]], rng: random.Random
) -> None:
    """Not so with a shape, which depends on the forecasts made on the way, or with outputs that were cut off."""
    ended = [(prompt, output, False) for prompt, output, _ in events]
    shuffled = rng.sample(ended, len(ended))
    first, second = (fed(BayesianLengths(shape=None, half_life=None), each) for each in (ended, shuffled))
    for prompt in (0, 7, 100, 10**6):
        a, b = (each.predict(prompt, 4096).t for each in (first, second))
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


@given(EVENTS, st.integers(1, 5000))
def test_a_quantile_is_students_t_of_the_logarithm_rounded(
    events: list[tuple[int, int, bool]], prompt: int
) -> None:
    forecast = fed(BayesianLengths(shape=None), events).predict(prompt, 10**9)
    t = stats.t(forecast.t.df, forecast.t.mean, forecast.t.scale)
    for p in SHARES[1:-1]:
        exact = math.exp(min(30, t.ppf(p)))
        assert forecast.quantile(p) == pytest.approx(
            min(10**9, max(1, math.ceil(exact - 0.5))), abs=1, rel=1e-6
        )


@given(EVENTS, st.integers(0, 80), st.floats(0.001, 0.999))
def test_what_remains_is_the_same_distribution_given_that_it_has_not_ended(
    events: list[tuple[int, int, bool]], produced: int, p: float
) -> None:
    """From the probabilities of every length, added up one by one."""
    most = 100
    forecast = fed(BayesianLengths(), events).predict(20, most)
    above = [forecast.above(tokens) for tokens in range(most)] + [0.0]
    assert above == sorted(above, reverse=True)
    if above[produced] < 1e-9:
        return
    left = next(
        n
        for n in range(1, most + 1)
        if above[produced + n] <= (1 - p) * above[produced] or n == most - produced
    )
    found = forecast.remaining_quantile(produced, p)
    if found != left:  # only where the two round differently
        low = int(min(found, left))
        assert abs(found - left) == 1
        assert above[produced + low] == pytest.approx((1 - p) * above[produced], rel=1e-6)
    mean = sum(above[produced:most]) / above[produced]
    assert forecast.remaining_mean(produced) == pytest.approx(mean, rel=0.04)


def test_a_bucket_leans_on_the_others_as_much_as_a_full_posterior_does() -> None:
    """Against Gibbs sampling of the whole hierarchy, which takes a million times as long."""
    rng = np.random.default_rng(8)
    counts, means, prior = (2, 8, 30, 50), (4.0, 5.5, 5.0, 6.5), Prior()
    logs = [rng.normal(mean, 0.8, count) for mean, count in zip(means, counts, strict=True)]
    predictor = BayesianLengths(shape=None, half_life=None)
    for number, each in enumerate(logs):
        for log in each:
            predictor.observe(2 ** (number + 4), max(1, round(math.exp(log))))
    found = [predictor.belief(bucket_of(2 ** (number + 4))) for number in range(4)]

    sampled, mean, between = [], 5.0, 0.5
    within = np.full(4, 0.64)
    n, y = np.array(counts), np.array([each.mean() for each in logs])
    common = 0.64
    for _ in range(20_000):
        precision = n / within + 1 / between
        b = rng.normal((n * y / within + mean / between) / precision, precision**-0.5)
        squares = np.array([((each - m) ** 2).sum() for each, m in zip(logs, b, strict=True)])
        within = (squares + prior.bucket_df * common) / rng.chisquare(n + prior.bucket_df)
        # The buckets' variances tell of the common one, with its prior.
        shape = (prior.bucket_df * 4 + prior.df) / 2
        common = rng.gamma(
            shape, 1 / (prior.bucket_df / 2 * (1 / within).sum() + prior.df / (2 * prior.variance))
        )
        guess = common / prior.strength
        between = (((b - mean) ** 2).sum() + prior.strength_df * guess) / rng.chisquare(4 + prior.strength_df)
        precision = 4 / between + prior.mean_sd**-2
        mean = rng.normal((b.sum() / between + prior.mean / prior.mean_sd**2) / precision, precision**-0.5)
        sampled.append((*b, *within))
    truth = np.mean(sampled[2000:], 0)
    spread = np.std(sampled[2000:], 0)
    for number, belief in enumerate(found):
        assert belief.mean == pytest.approx(truth[number], abs=0.25 * spread[number])
        post = math.sqrt(belief.variance / belief.strength)
        assert post == pytest.approx(spread[number], rel=0.25)
        assert belief.variance == pytest.approx(truth[4 + number], rel=0.15)
    # It does lean: the bucket of two is drawn towards the others, the bucket of fifty hardly.
    assert found[0].mean > logs[0].mean() + 0.05
    assert abs(found[3].mean - logs[3].mean()) < 0.05


@pytest.mark.parametrize("seen", [0, 1, 4, 30])
def test_intervals_are_right_for_data_drawn_from_the_prior(seen: int) -> None:
    """Each of 1,500 worlds is drawn from the prior, observed, and asked for one more length."""
    rng, prior, worlds = np.random.default_rng(seen), Prior(), 1500
    inside = {0.5: 0, 0.9: 0}
    for _ in range(worlds):
        variance = prior.df * prior.variance / rng.chisquare(prior.df)
        parent = rng.normal(prior.mean + 4, prior.mean_sd)  # long outputs, that rounding does not matter
        own = variance * prior.bucket_df / rng.chisquare(prior.bucket_df, 4)
        means = rng.normal(parent, np.sqrt(variance / prior.strength), 4)
        predictor = BayesianLengths(prior._replace(mean=prior.mean + 4), shape=None, half_life=None)
        buckets = rng.integers(0, 4, seen + 1)
        logs = np.minimum(rng.normal(means[buckets], np.sqrt(own[buckets])), 39)
        for bucket, log in zip(buckets[:-1], logs[:-1], strict=True):
            predictor.observe(2 ** (int(bucket) + 5), max(1, round(math.exp(log))))
        forecast = predictor.predict(2 ** (int(buckets[-1]) + 5), 10**17)
        for share in inside:
            low, high = (forecast.quantile(0.5 + side * share / 2) for side in (-1, 1))
            inside[share] += low <= math.exp(logs[-1]) <= high
    for share, count in inside.items():
        assert count / worlds == pytest.approx(share, abs=0.01 + 3 * math.sqrt(share * (1 - share) / worlds))


def test_outputs_that_were_cut_off_count_as_longer() -> None:
    """Of log-normal lengths, median 100, everything over 60 is cut there: 69 % of them."""
    rng = random.Random(4)
    cut, naive = BayesianLengths(), BayesianLengths()
    for _ in range(1500):
        length = max(1, round(100 * math.exp(rng.gauss(0, 1))))
        cut.observe(500, min(length, 60), censored=length > 60)
        naive.observe(500, min(length, 60))
    assert cut.predict(500, 10**6).quantile(0.5) == pytest.approx(100, rel=0.2)
    assert naive.predict(500, 10**6).quantile(0.5) <= 60
    # And below the cut, where lengths are known, it is as good as if nothing had been cut.
    assert cut.predict(500, 10**6).quantile(0.25) == pytest.approx(100 * math.exp(-0.674), rel=0.15)


@given(st.integers(0, 5000))
def test_a_cut_off_output_does_not_lower_the_median(bound: int) -> None:
    events = [(100, output, False) for output in (3, 10, 12, 20, 40, 41, 70, 100, 200, 500)]
    before, after = (fed(BayesianLengths(), events) for _ in range(2))
    after.observe(100, bound, censored=True)
    assert after.predict(100, 10**6).quantile(0.5) >= before.predict(100, 10**6).quantile(0.5)


def test_a_survey_takes_the_place_of_the_last_one() -> None:
    predictor = fed(BayesianLengths(), [(100, output, False) for output in (10, 12, 20, 40, 41, 70)])
    before = [predictor.predict(prompt, 4096).quantile(p) for prompt in (100, 3000) for p in SHARES]
    predictor.survey([(100, 300)] * 20 + [(100, 0), (3000, 5)])
    assert predictor.predict(100, 4096).quantile(0.5) > 2 * before[SHARES.index(0.5)]
    assert predictor.stats()["buckets"][0]["observations"] == pytest.approx(6, rel=0.01)
    predictor.survey([])
    assert [predictor.predict(prompt, 4096).quantile(p) for prompt in (100, 3000) for p in SHARES] == before


def test_the_shape_learns_what_is_not_log_normal() -> None:
    """Two kinds of requests, about 10 and 1,000 tokens: no log-normal has these quantiles."""
    rng = random.Random(3)
    outputs = [round(rng.choice((10, 1000)) * math.exp(rng.gauss(0, 0.3))) for _ in range(3000)]
    inside = {True: 0, False: 0}
    for shaped in inside:
        predictor = BayesianLengths(shape=50.0 if shaped else None)
        for number, output in enumerate(outputs):
            forecast = predictor.predict(100, 4096)
            if number >= 1000:
                inside[shaped] += forecast.quantile(0.05) <= output <= forecast.quantile(0.95)
            predictor.observe(100, output)
        # 50 tokens are there: it must be one of the long ones.
        left = predictor.predict(100, 4096).remaining_quantile(50, 0.5)
        assert left == pytest.approx(950, rel=0.15) or not shaped
    assert inside[True] / 2000 == pytest.approx(0.9, abs=0.04)
    assert inside[False] / 2000 > 0.97


def test_old_observations_count_less_by_the_half_life() -> None:
    medians = {}
    for half_life in (None, 50.0):
        predictor = fed(BayesianLengths(half_life=half_life), [(100, 20, False), (100, 30, False)] * 500)
        fed(predictor, [(100, 200, False), (100, 300, False)] * 100)
        medians[half_life] = predictor.predict(100, 4096).quantile(0.5)
    assert medians[None] < 100
    assert 200 <= medians[50.0] <= 300


def test_long_runs_with_forgetting_stay_exact() -> None:
    """Weights grow for 30 half-lives, then are scaled down together."""
    predictor = BayesianLengths(half_life=5.0)
    for number in range(5000):
        predictor.observe(100, 100 + number % 3)
    weight = predictor.stats()["buckets"][0]["observations"]
    assert weight == pytest.approx(1 / (1 - 2**-0.2), rel=1e-6)
    assert predictor.predict(100, 4096).quantile(0.5) == pytest.approx(101, abs=1)


# ---------------------------------------------------------------------- files, speed


@given(EVENTS, EVENTS)
@settings(max_examples=30)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(
    events: list[tuple[int, int, bool]], later: list[tuple[int, int, bool]]
) -> None:
    original = fed(BayesianLengths(half_life=20.0), events)
    restored = BayesianLengths.from_record(json.loads(json.dumps(original.to_record())))
    assert restored.to_record() == original.to_record()
    assert fed(restored, later).to_record() == fed(original, later).to_record()


def test_a_saved_state_goes_on_in_the_midst_of_what_is_not_worked_out_anew() -> None:
    rng = random.Random(6)
    events = [(rng.randrange(1, 5000), rng.randrange(1, 900), rng.random() < 0.1) for _ in range(900)]
    original = fed(BayesianLengths(half_life=300.0), events[:797])
    restored = BayesianLengths.from_record(json.loads(json.dumps(original.to_record())))
    assert original._new > 1
    for event in events[797:]:
        for each in (original, restored):
            each.predict(event[0] // 2, 100)
            each.observe(*event)
    assert restored.to_record() == original.to_record()


def test_a_state_that_is_not_one_is_refused() -> None:
    record = BayesianLengths().to_record()
    for change, words in (
        ({"schema": "nanopd-lab/length-predictor/0"}, "it has schema .*/0'.*start a new predictor"),
        ({"gain": None}, "it: .*NoneType"),
        ({"gain": math.nan}, "it: gain is nan"),
        ({"buckets": [[0, 0, 0, 0]]}, "it: 1 buckets; there are 18"),
        ({"buckets": [[-1, 0, 0, 0]] * 18}, "it: a bucket's evidence is"),
        ({"parent": {**record["parent"], "variance": 0}}, "it: the parent is"),
        ({"table": [0, 1]}, "it: a table of 2"),
        ({"half_life": -3}, "it: half_life is -3"),
        ({"shape": {**record["shape"], "cut": [1.0]}}, "it: shape: 'cut' must hold"),
    ):
        with pytest.raises(ValueError, match=words):
            BayesianLengths.from_record({**record, **change}, "it")
    del record["parent"]
    with pytest.raises(ValueError, match="the record: 'parent' is missing"):
        BayesianLengths.from_record(record)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_predictor_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"half_life is .*positive number of observations, or None"):
        BayesianLengths(half_life=value)
    with pytest.raises(ValueError, match="shape is "):
        BayesianLengths(shape=value)


def test_stats_say_what_has_been_learnt() -> None:
    predictor = fed(BayesianLengths(), [(100, 20, False)] * 5 + [(3000, 90, True)])
    found = predictor.stats()
    assert (found["ended"], found["censored"]) == (5, 1)
    assert [each["prompt_tokens"] for each in found["buckets"]] == [[64, 127], [2048, 4095]]
    assert found["buckets"][0]["own_median"] == pytest.approx(20)
    assert 20 < found["buckets"][0]["median"] < 128
    json.dumps(found)
