"""Workers on one host: a step's time depends on what the others do. By hand, by fractions, and within its bounds."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import Route
from nanopd_lab.cost.company import Company
from nanopd_lab.router import Role, Slo, create_policy
from nanopd_lab.sim import ConstantTime, Kill, LinearTime, SimConfig, SimRequest, SimResult, Simulator
from nanopd_lab.sim.oracle import Instance, Planned
from tests.sim.test_skipping import assert_same, both, cases

HALF = Company(2, 0.5, 0.25)  # decode steps alone in half the time, prompts in a quarter


def simulate(
    requests: list[SimRequest],
    company: Company | None,
    workers: int = 2,
    kills: tuple[Kill, ...] = (),
    skip: bool = True,
) -> SimResult:
    """Each request on the next worker, steps of 1 s."""
    config = SimConfig(num_blocks=100, company=company, skip=skip, trace=True)
    routes = [Route(f"w{n % workers}", f"w{n % workers}") for n in range(len(requests))]
    roles = [Role.MIXED] * workers
    result = Simulator(Planned(routes), roles, ConstantTime(1.0), requests, config, kills).run()
    assert not result.problems()
    return result


def finished(result: SimResult) -> list[float | None]:
    return [record.finished for record in result.records]


def test_steps_that_overlap_by_hand() -> None:
    """A prompt of 1 s of work at 4 s/s alone: at 0.125 half of it is left, which takes 0.5 s beside the other one.

    That has done 0.5 by then, and gets the rest done in 0.125 s.
    """
    prompts = [SimRequest("a", 0.0, 8, 1), SimRequest("b", 0.125, 8, 1)]
    assert finished(simulate(prompts, HALF)) == [0.625, 0.75]
    assert finished(simulate(prompts, None)) == [1.0, 1.125]


def test_one_busy_worker_goes_at_the_speed_of_one_alone() -> None:
    """A prompt and nine decode steps, jumped over in one go; and who comes later."""
    assert finished(simulate([SimRequest("a", 0.0, 8, 10)], HALF)) == [0.25 + 9 * 0.5]
    requests = [SimRequest("a", 0.0, 8, 10), SimRequest("b", 2.0, 8, 1)]
    # At 2 s 5.5 of a's steps are left. b's prompt takes 1 s, in which one of them gets done; the others 2.25 s.
    result = simulate(requests, HALF)
    assert finished(result) == [2.0 + 1.0 + 4.5 * 0.5, 3.0]
    assert result.records[0].first_token == 0.25


def test_a_worker_that_dies_is_no_company() -> None:
    requests = [SimRequest("a", 0.0, 8, 10), SimRequest("b", 0.0, 8, 10)]
    result = simulate(requests, HALF, kills=(Kill(2.5, "w1"),))
    spans = [span for span in result.spans if span.worker == "w0"]
    assert (spans[0].begin, spans[0].end) == (0.0, 1.0)
    # The step from 2 to 3 s is half done as w1 dies, and ends a quarter of a second after.
    assert 2.75 in {span.end for span in spans}


def test_few_others_are_less_company_than_as_many_as_were_profiled() -> None:
    four = Company(4, 0.25, 0.25)
    assert [four.speed(True, n, 0) for n in range(5)] == [4.0, 2.0, pytest.approx(4 / 3), 1.0, 1.0]
    pair = [SimRequest("a", 0.0, 8, 1), SimRequest("b", 0.0, 8, 1)]
    assert finished(simulate(pair, four, workers=4)) == [0.5, 0.5]


def test_beside_steps_of_the_other_kind_by_hand() -> None:
    """A decode step takes half beside a prompt and a prompt twice beside decodes, in powers of two throughout."""
    mixed = Company(2, 0.25, 0.5, decode_beside_prompts=0.5, prompt_beside_decodes=2.0)
    assert [mixed.speed(True, *others) for others in ((0, 0), (1, 0), (0, 1), (0, 9))] == [4, 1, 2, 2]
    assert [mixed.speed(False, *others) for others in ((0, 0), (1, 0), (0, 1), (9, 0))] == [2, 0.5, 1, 0.5]
    three = dataclasses.replace(mixed, processes=3)
    assert three.speed(True, 1, 1) == 1 / 0.75
    assert three.speed(True, 0, 1) == 1 / 0.375
    # a's prompt ends at 0.5; its decodes take 0.25 s each alone, so that 6 of 9 are done at 2.0, and 0.5 s each beside
    # b's prompt, which has 0.25 of its work left at 3.5, and ends 0.125 s later.
    result = simulate([SimRequest("a", 0.0, 8, 10), SimRequest("b", 2.0, 8, 1)], mixed)
    assert finished(result) == [3.5, 3.625]


def by_fractions(starts: list[Fraction], steps: list[int], alone: Fraction) -> list[Fraction]:
    """When workers that begin at `starts`, and have so many steps of 1 s of work to do, end.

    An independent reckoning: from event to event, all that are busy do the same work a second.
    """
    left, ends, now = [Fraction(n) for n in steps], [Fraction(0)] * len(steps), Fraction(0)
    count = len(steps)
    while any(left):
        busy = [n for n in range(count) if left[n] and starts[n] <= now]
        coming = [start for n, start in enumerate(starts) if left[n] and start > now]
        rate = 1 / (alone + (1 - alone) * Fraction(max(0, len(busy) - 1), count - 1))
        until = min([now + left[n] / rate for n in busy] + coming)
        for n in busy:
            left[n] -= (until - now) * rate
            if not left[n]:
                ends[n] = until
        now = until
    return ends


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=2, max_size=5),
    st.integers(1, 8),
    st.booleans(),
)
def test_ends_are_those_of_fluid_work(jobs: list[tuple[int, int]], eighths: int, skip: bool) -> None:
    """One request a worker: the ends of all are those of work that flows at a speed by the number of busy ones."""
    jobs.sort()
    starts, steps = [Fraction(start, 7) for start, _ in jobs], [n for _, n in jobs]
    alone = Fraction(eighths, 8)
    company = Company(len(jobs), float(alone), float(alone))
    requests = [SimRequest(f"r{n}", float(starts[n]), 8, count) for n, count in enumerate(steps)]
    result = simulate(requests, company, len(jobs), skip=skip)
    wanted = by_fractions(starts, steps, alone)
    assert finished(result) == pytest.approx([float(end) for end in wanted], rel=1e-9)


companies = st.builds(
    Company,
    st.integers(2, 4),
    st.sampled_from([0.37, 0.61, 0.9, 1.0]),
    st.sampled_from([0.41, 0.73, 1.0]),
    st.sampled_from([0.83, 1.0, 1.27]),
    st.sampled_from([0.9, 1.0, 1.31]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), companies)
def test_runs_in_company_agree_with_steps(case, company: Company) -> None:  # type: ignore[no-untyped-def]
    """Jumping over runs changes nothing but the rounding: transfers, preemptions, kills and all.

    Not with steps that all take the same: workers would end at the same time, and rounding would say who is first.
    """
    name, requests, config, kills = case
    time = LinearTime(0.0123456, 0.0031234, 0.000101, 0.00213)
    case = name, requests, dataclasses.replace(config, company=company), kills
    skipped, stepwise = both(case, time, time)
    assert_same(skipped, stepwise, 1e-9)
    assert skipped.problems() == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), companies)
def test_every_step_lies_between_alone_and_in_company(case, company: Company) -> None:  # type: ignore[no-untyped-def]
    """Of steps of 1 s beside their own kind. (Times of requests need not: who is later may meet a better batch.)"""
    name, requests, config, kills = case
    policy, roles = create_policy(name, {"collocated": 2, "1p1d": 2, "least-loaded": 2}.get(name, 3))
    config = dataclasses.replace(config, company=company, trace=True)
    result = Simulator(policy, roles, ConstantTime(1.0), requests, config, kills).run()
    _, *parts = dataclasses.astuple(company)
    for span in result.spans:
        each = (span.end - span.begin) / span.steps
        assert min(parts) * (1 - 1e-9) <= each <= max(1.0, *parts) * (1 + 1e-9)


def test_a_company_that_costs_nothing_changes_nothing() -> None:
    requests = [SimRequest(f"r{n}", n / 3, 8 + n, 5) for n in range(9)]
    assert finished(simulate(requests, Company(2, 1.0, 1.0))) == finished(simulate(requests, None))


def test_bounds_of_the_oracle_are_for_steps_of_fixed_times() -> None:
    with pytest.raises(ValueError, match="share a host; set company=None"):
        Instance((SimRequest("a", 0.0, 8, 1),), 2, ConstantTime(1.0), Slo(1.0, 1.0), SimConfig(company=HALF))
