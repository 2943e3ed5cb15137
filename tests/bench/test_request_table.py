"""Objectives judged again from a file's requests say what the run itself would have said; intervals cover the truth."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.bootstrap import block_length, interval, intervals, resamples
from nanopd_lab.bench.disaggregation import UNFINISHED, UNSENT, disaggregation, per_request
from nanopd_lab.bench.metrics import LoadRecord, details, serving_metrics
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router import Slo
from tests.bench.test_metrics import loaded


def result_of(records: list[LoadRecord], slo: Slo, detailed: bool = True) -> dict[str, Any]:
    """What `serving_result` writes, without its provenance, for which git is asked each time."""
    found = {
        "backend": "nanopd-lab",
        "request_rate": 5.0,
        **serving_metrics(records, slo),
        **(details(records) if detailed else {}),
        "pd": {
            "policy": "1p2d",
            **disaggregation(records, 3, slo),
            **({"per_request": per_request(records)} if detailed else {}),
        },
    }
    return json.loads(json.dumps(found))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 2), st.floats(0.005, 0.3), st.floats(0.05, 5))
def test_goodput_is_the_runs_own(seed: int, ttft_s: float, tpot_s: float, e2e_s: float) -> None:
    slo, records = Slo(ttft_s, tpot_s, e2e_s), loaded(seed)
    result, table = result_of(records, slo), RequestTable.of(result_of(records, Slo(1, 1)))
    nearest = [
        np.abs(values - limit).min()
        for late in (0.0, table.late)
        for values, limit in ((table.ttft - late, ttft_s), (table.tpot, tpot_s), (table.e2e - late, e2e_s))
        for values in [values[table.completed]]
        if len(values)
    ]
    assume(min(nearest, default=1.0) > 1e-9)  # on the limit itself, the last bit decides
    assert table.goodput(slo, from_sending=True) == pytest.approx(result["request_goodput"], abs=1e-12)
    assert table.goodput(slo) == pytest.approx(result["pd"]["slo"]["goodput"], abs=1e-12)
    assert table.attainment(slo) == pytest.approx(result["pd"]["slo"]["attainment"], abs=1e-12)
    assert RequestTable.of(result).slo == pytest.approx(slo)


def test_who_never_came_to_an_end_is_not_judged_and_the_failed_is_a_miss() -> None:
    records = loaded(3, 12)
    for number, reason in ((0, UNSENT), (1, UNFINISHED), (2, "error")):
        records[number].finish_reason, records[number].finished = reason, None
    records[0].sent = records[0].first_token = None
    for number in range(3, 12):
        records[number].finish_reason = "length"
    table = RequestTable.of(result_of(records, Slo(1, 1)))
    assert list(table.judged) == [False, False, *[True] * 10]
    assert table.attainment(Slo(1e9, 1e9, 1e9)) == pytest.approx(9 / 10)
    assert table.scheduled[0] == records[0].arrival


def test_a_result_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="--save-detailed"):
        RequestTable.of(result_of(loaded(1), Slo(1, 1), detailed=False))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200))
def test_samples_are_blocks_of_neighbours(count: int) -> None:
    found = resamples(count, draws=50)
    length = block_length(count)
    assert found.shape == (50, count)
    inside = np.arange(count - 1) % length != length - 1
    assert ((np.diff(found, axis=1) % count)[:, inside] == 1 % count).all()


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    bounds = [interval(rng.normal(3.0, 1.0, 150)) for _ in range(120)]
    covered = sum(low <= 3.0 <= high for _, low, high in bounds)
    assert 100 <= covered <= 120  # 114 expected; blocks of 5 of 150 make them a little short


def test_columns_have_the_intervals_of_each() -> None:
    values = np.random.default_rng(2).normal(size=(40, 3))
    for column, bounds in zip(values.T, zip(*intervals(values), strict=True), strict=True):
        assert bounds == pytest.approx(interval(column))


def test_intervals_of_requests_that_depend_on_their_neighbours_are_wider() -> None:
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=40), 5)
    shuffled = rng.permutation(values)
    wide, narrow = (interval(each).high - interval(each).low for each in (values, shuffled))
    assert wide > 1.4 * narrow
