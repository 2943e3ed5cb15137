"""The baselines do what nanoPD's predictor does, and what its numbers would say of quantiles."""

from __future__ import annotations

import pytest

from nanopd_lab.router.predictor import BucketedMean, BucketedQuantiles, OverallQuantiles


def test_the_bucketed_mean_answers_as_nanopds_own_example() -> None:
    """The sequence at the end of its source, with its 5 samples: a bucket of 3 falls back to all."""
    predictor = BucketedMean()
    assert predictor.predict(80, 4096).quantile(0.5) == 256
    for output in (120, 130, 110, 140, 125):
        predictor.observe(80, output)
    for output in (400, 420, 380):
        predictor.observe(500, output)
    assert predictor.predict(80, 4096).mean == predictor.predict(100, 4096).mean == 125
    everything = round((120 + 130 + 110 + 140 + 125 + 400 + 420 + 380) / 8)
    assert predictor.predict(500, 4096).mean == predictor.predict(9000, 4096).mean == everything
    assert {predictor.predict(80, 4096).quantile(p) for p in (0, 0.1, 0.9, 1)} == {125}
    assert predictor.predict(80, 100).mean == 100
    assert predictor.predict(80, 4096).remaining_mean(25) == 100
    assert predictor.predict(80, 4096).remaining_mean(200) == 1


def test_buckets_end_where_nanopds_do_and_hold_50() -> None:
    predictor = BucketedMean()
    for _ in range(60):
        predictor.observe(64, 10)
        predictor.observe(65, 30)
    assert predictor.predict(64, 4096).mean == predictor.predict(1, 4096).mean == 10
    assert predictor.predict(65, 4096).mean == predictor.predict(128, 4096).mean == 30
    for _ in range(50):
        predictor.observe(60, 20)
    assert predictor.predict(64, 4096).mean == 20


@pytest.mark.parametrize("kind", [BucketedQuantiles, OverallQuantiles])
def test_quantiles_are_those_of_what_was_seen(kind: type) -> None:
    predictor = kind()
    for output in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100):
        predictor.observe(100, output)
    forecast = predictor.predict(100, 4096)
    assert [forecast.quantile(p) for p in (0, 0.1, 0.11, 0.5, 0.9, 1)] == [10, 10, 20, 50, 90, 100]
    assert forecast.mean == 55
    assert forecast.remaining_mean(60) == (10 + 20 + 30 + 40) / 4
    assert forecast.remaining_quantile(60, 0.5) == 20
    assert forecast.remaining_quantile(100, 0.5) == 1
    assert predictor.predict(100, 64).quantile(0.9) == 64
