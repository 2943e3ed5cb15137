"""Jumping over runs of decode steps changes nothing: every time and every account is as step by step."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.router import create_policy
from nanopd_lab.sim import (
    ConstantTime,
    Kill,
    LinearTime,
    LinkModel,
    SimConfig,
    SimRequest,
    SimResult,
    Simulator,
)
from nanopd_lab.sim.timing import StepTime

POLICIES = {"collocated": 2, "1p1d": 2, "2p1d": 3, "disaggregated": 3, "round-robin": 3, "least-loaded": 2}


class Stepwise:
    """A cost model without a closed form for runs, so that both simulations add up the very same numbers."""

    def __init__(self, model: StepTime) -> None:
        self.seconds = model.seconds


def flat(value: object) -> list[object]:
    """Every field of every dataclass inside, in order, for comparison."""
    if dataclasses.is_dataclass(value):
        return [item for each in dataclasses.fields(value) for item in flat(getattr(value, each.name))]
    if isinstance(value, list | tuple):
        return [item for each in value for item in flat(each)]
    return [value]


def assert_same(one: SimResult, other: SimResult, rel: float) -> None:
    for mine, theirs in zip(one.records, other.records, strict=True):
        for a, b in zip(flat(mine), flat(theirs), strict=True):
            if isinstance(a, float) and rel:
                assert a == pytest.approx(b, rel=rel), f"{mine}\n{theirs}"
            else:
                assert a == b, f"{mine}\n{theirs}"
    for mine, theirs in zip(one.workers, other.workers, strict=True):
        assert mine.busy_s == pytest.approx(theirs.busy_s, rel=1e-9)
        # A dead worker's pool is a matter of whether the blocks of its last step count.
        ignored = {"busy_s": 0.0, **({"blocks_used": 0, "peak_blocks": 0} if mine.killed else {})}
        assert dataclasses.replace(mine, **ignored) == dataclasses.replace(theirs, **ignored)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[SimRequest], SimConfig, list[Kill]]:
    policy = draw(st.sampled_from(sorted(POLICIES)))
    caching = draw(st.booleans())
    blocks = draw(st.sampled_from([12, 16, 40, 400]))
    longest = blocks * 4 - 24
    spread = draw(st.sampled_from([0.0, 1.0, 30.0]))
    grid = draw(st.booleans())  # arrivals on the steps' own grid: ties
    requests = []
    for number in range(draw(st.integers(1, 25))):
        prompt = draw(st.integers(1, min(40, longest)))
        arrival = draw(st.floats(0.0, 1.0)) * spread
        requests.append(
            SimRequest(
                f"r{number}",
                round(arrival * 8) / 8 if grid else arrival,
                prompt,
                draw(st.integers(1, 24)),
                prefix=draw(st.integers(0, 1)),
                prefix_tokens=min(prompt, draw(st.sampled_from([0, 8, 21]))),
                deadline=arrival + draw(st.sampled_from([float("inf")] * 4 + [3.0])),
            )
        )
    config = SimConfig(
        num_blocks=blocks,
        block_size=4,
        max_num_seqs=draw(st.sampled_from([2, 4, 16])),
        max_num_batched_tokens=draw(st.sampled_from([3, 16, 64])),
        enable_prefix_caching=caching,
        block_bytes=100,
        link=LinkModel(draw(st.sampled_from([0.0, 0.25])), 0.0, draw(st.sampled_from([float("inf"), 777.0]))),
        terms=LeaseTerms(draw(st.sampled_from([1.0, 30.0])), draw(st.sampled_from([0.7, 30.0]))),
        limits=Limits(heartbeat_s=float("inf"), max_jobs=draw(st.sampled_from([None, 3]))),
        message_s=draw(st.sampled_from([0.0, 0.0, 0.03])),
        beat_s=draw(st.sampled_from([None, 0.4])),
        ahead=draw(st.booleans()),
    )
    kills = [
        Kill(draw(st.floats(0.0, 20.0)), f"w{draw(st.integers(0, 1))}", draw(st.sampled_from([None, 0.5])))
        for _ in range(draw(st.sampled_from([0, 0, 1, 3])))
    ]
    return policy, requests, config, kills


def both(
    case: tuple[str, list[SimRequest], SimConfig, list[Kill]], time: StepTime, skipped_time: StepTime
) -> tuple[SimResult, SimResult]:
    name, requests, config, kills = case
    results = []
    for skip, model in ((True, skipped_time), (False, time)):
        policy, roles = create_policy(name, POLICIES[name])
        config = dataclasses.replace(config, skip=skip)
        results.append(Simulator(policy, roles, model, requests, config, kills).run())
    return results[0], results[1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_runs_change_nothing_to_the_bit(
    case: tuple[str, list[SimRequest], SimConfig, list[Kill]], constant: bool
) -> None:
    """With the same additions the results are the same floats, ties between events included."""
    time = Stepwise(ConstantTime(0.125) if constant else LinearTime(0.01, 0.003, 0.0001, 0.002))
    skipped, stepwise = both(case, time, time)
    assert_same(skipped, stepwise, 0.0)
    assert skipped.problems() == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_runs_in_closed_form_agree(case: tuple[str, list[SimRequest], SimConfig, list[Kill]]) -> None:
    """Sums in closed form differ from step-by-step ones by rounding only: 1e-9 of every time."""
    time = LinearTime(0.0123456, 0.0031234, 0.000101, 0.00213)
    skipped, stepwise = both(case, time, time)
    assert_same(skipped, stepwise, 1e-9)


def test_cost_grows_with_events_and_not_with_tokens() -> None:
    requests = [SimRequest(f"r{i}", 0.0, 100, 10_000) for i in range(4)]
    policy, roles = create_policy("collocated", 1)
    result = Simulator(policy, roles, LinearTime(0.01, 0.0, 1e-7), requests, SimConfig(num_blocks=4000)).run()
    assert result.steps == 10_000
    assert result.events < 30
    assert all(record.output_tokens == 10_000 for record in result.completed)
