"""Goodput is what the results of runs say it is, measured or simulated."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.disaggregation import UNSENT, disaggregation
from nanopd_lab.bench.goodput import Goodput, goodput, outcomes_of
from nanopd_lab.bench.metrics import LoadRecord
from nanopd_lab.router import Role, Slo, create_policy
from nanopd_lab.sim import LinearTime, Simulator
from nanopd_lab.sim.workload import AZURE_LIKE, poisson_arrivals
from tests.bench.test_metrics import loaded


@given(st.integers(0, 200), st.floats(0.05, 2), st.floats(0.01, 0.2), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_it_is_what_a_result_says(seed: int, ttft_s: float, tpot_s: float, gpus: int) -> None:
    records, slo = loaded(seed), Slo(ttft_s, tpot_s)
    found = goodput(outcomes_of(records), slo, gpus)
    pd = disaggregation(records, gpus, slo)
    assert found.share == pytest.approx(pd["slo"]["attainment"])
    assert found.per_gpu == pytest.approx(pd["per_gpu"]["request_goodput"])


def test_it_is_what_the_simulator_says_with_requests_that_are_dropped() -> None:
    requests = poisson_arrivals(80, 20.0, AZURE_LIKE, seed=2)
    requests = [
        type(r)(r.request_id, r.arrival, r.prompt_tokens, r.output_tokens, deadline=r.arrival + 5)
        for r in requests
    ]
    time, slo = LinearTime(0.01, 0.0001, 0.0, 0.0005), Slo(1.0, 0.1)
    result = Simulator(create_policy("collocated", 2)[0], [Role.MIXED] * 2, time, requests).run()
    assert 0 < len(result.completed) < 80
    found = goodput(outcomes_of(result.records), slo, 2)
    assert found.share == pytest.approx(result.attainment(slo))
    assert found.per_gpu == pytest.approx(result.goodput(slo) / 2)


def test_what_was_never_sent_is_not_judged_and_nothing_is_nothing() -> None:
    unsent = LoadRecord("r", 9.0, 5, 0, finish_reason=UNSENT)
    assert len(outcomes_of([*loaded(1), unsent])) == 40
    refused = LoadRecord("r", 0.5, 5, 0, finish_reason="refused", sent=0.5)
    assert goodput(outcomes_of([refused]), Slo(), 1) == Goodput(0.0, 0.0)
    assert goodput([], Slo(), 1) == Goodput(0.0, 0.0)
    at_once = LoadRecord("r", 0.5, 5, 1, 0.5, 0.5, 0.5, finish_reason="length", sent=0.5)
    assert goodput(outcomes_of([at_once]), Slo(ttft_s=1.0), 1) == Goodput(1.0, 0.0)
