"""Routing in hindsight: enumeration, search and bound check one another on small instances; floors are below steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.cost.iteration import CapturedSizes, IterationModel
from nanopd_lab.router import JobView, Role, Slo, WorkerView, create_policy
from nanopd_lab.sim import (
    ConstantTime,
    CostTime,
    Lengths,
    LinearTime,
    LinkModel,
    SimConfig,
    SimRequest,
    StepTime,
    poisson_arrivals,
)
from nanopd_lab.sim.oracle import (
    Instance,
    Outcome,
    Planned,
    Score,
    enumerate_routes,
    floors_of,
    search_routes,
    triage,
    upper_bound,
)
from nanopd_lab.sim.oracle.exact import count_plans, plans
from nanopd_lab.sim.oracle.instance import plan_of

MODEL = IterationModel(
    t0_s=0.001,
    weight_s=0.005,
    token_s=2e-5,
    pair_s=2e-9,
    context_s=5e-8,
    sequence_s=1e-6,
    host_s=0.0055,
    vocab_share=0.09,
    sharpness=1.5,
    short_pair_s=1e-9,
    mixed_s=8e-4,
    captured=CapturedSizes((1, 2, 4, 8, 16), (64, 128, 256, 512)),
)
TIMES: list[StepTime] = [
    CostTime(MODEL),
    LinearTime(0.004, 3e-5, 1e-7, 1e-4),
    ConstantTime(0.01),
]
CONFIG = SimConfig(
    num_blocks=4000,
    max_num_batched_tokens=512,
    block_bytes=1000,
    link=LinkModel(1e-3, 0.0, 5e7),
    ahead=True,
)


def instances(most_requests: int = 4, most_workers: int = 3) -> st.SearchStrategy[Instance]:
    """Small ones, in which some requests can't have what they are promised."""

    def make(
        count: int, workers: int, time: StepTime, ttft_s: float, tpot_s: float, e2e_s: float, seed: int
    ) -> Instance:
        lengths = Lengths(500.0, 0.8, 2000), Lengths(8.0, 0.8, 40)
        requests = poisson_arrivals(count, 60.0 * workers, lengths, seed)
        return Instance(tuple(requests), workers, time, Slo(ttft_s, tpot_s, e2e_s), CONFIG)

    infinite = float("inf")
    return st.builds(
        make,
        st.integers(1, most_requests),
        st.integers(1, most_workers),
        st.sampled_from(TIMES),
        st.sampled_from((0.02, 0.04, 0.08, infinite)),
        st.sampled_from((0.008, 0.011, 0.015)),
        st.sampled_from((0.15, infinite)),
        st.integers(0, 10_000),
    )


def starts_of(instance: Instance) -> dict[str, Outcome]:
    names = ["collocated", "round-robin"] + ["1p1d"] * (instance.num_workers == 2)
    return {
        name: instance.outcome(instance.simulate(*create_policy(name, instance.num_workers)).records)
        for name in names
    }


@given(instances())
@settings(max_examples=25, deadline=None, derandomize=True)  # a search may fail: the same instances each time
def test_search_finds_the_best_of_all_routes_and_the_bound_is_not_below(instance: Instance) -> None:
    best = enumerate_routes(instance)
    bound = upper_bound(instance)
    assert best.score.met <= bound.met <= bound.possible <= len(instance.requests)
    found = search_routes(instance, starts_of(instance), 2000, seed=1, bound=best.score.met)
    assert found.met == best.score.met
    assert instance.follow(found.outcome.plan).score == found.outcome.score


@given(instances(3, 3))
@settings(max_examples=10, deadline=None)
def test_workers_are_alike_so_that_plans_with_other_names_are_not_needed(instance: Instance) -> None:
    assert enumerate_routes(instance).score == enumerate_routes(instance, symmetric=False).score


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_plans_without_repetition(workers: int) -> None:
    """Against a filter over all of them: a plan's names in order of appearance are its class."""
    names = tuple(f"w{number}" for number in range(workers))
    for count in range(4):
        every = list(plans(names, count, symmetric=False))
        assert len(every) == len(set(every)) == (workers**2 + 1) ** count
        classes = set()
        for plan in every:
            order = list(dict.fromkeys(name for route in plan if route for name in route))
            alike = [route and Route(*(names[order.index(name)] for name in route)) for route in plan]
            classes.add(tuple(alike))
        assert set(plans(names, count)) == classes
        assert count_plans(workers, count) == len(classes)


@given(
    st.sampled_from(TIMES),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 512)), min_size=1, max_size=12),
    st.lists(st.integers(1, 3000), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_no_step_is_below_a_floor(time: StepTime, chunks: list[tuple[int, int]], decodes: list[int]) -> None:
    for floor in floors_of(time):
        everything = [*chunks, *((context, 1) for context in decodes)]
        assert time.seconds(everything) >= floor.base_s + sum(floor.chunk_s(*chunk) for chunk in everything)
        if decodes:
            assert isinstance(time, CostTime | LinearTime | ConstantTime)
            run = time.decode_run(len(decodes), sum(decodes))(3)
            least = sum(
                floor.base_s + sum(floor.chunk_s(context + step, 1) for context in decodes)
                for step in range(3)
            )
            assert run >= least * (1 - 1e-12)


def test_floors_of_some_step_are_nearly_its_time() -> None:
    """A floor that is far below everywhere would make bounds worth nothing."""
    time = CostTime(MODEL)
    for chunks in ([(0, 512)], [(0, 256)] * 2, [(1000, 1)] * 16, [(500, 1)]):
        best = max(f.base_s + sum(f.chunk_s(*chunk) for chunk in chunks) for f in floors_of(time))
        assert 0.85 < best / time.seconds(chunks) <= 1.0


@given(instances(12, 4), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_search_is_never_worse_than_a_start_and_repeats_itself(instance: Instance, seed: int) -> None:
    starts = starts_of(instance)
    best = max(start.score.met for start in starts.values())
    whole = search_routes(instance, starts, 20, seed)
    rolling = search_routes(instance, starts, 20, seed, window=3)
    for found in (whole, rolling):
        assert best <= found.met <= upper_bound(instance).met
        assert found.started == best
        assert found.effort < 20 + 45  # a visit to a window is not cut short
        assert instance.follow(found.outcome.plan).score == found.outcome.score
    again = search_routes(instance, starts, 20, seed, window=3)
    assert again.outcome.plan == rolling.outcome.plan


@pytest.mark.parametrize("name", ["collocated", "1p2d", "2p1d", "round-robin", "least-loaded"])
def test_a_plan_repeats_a_policy(name: str) -> None:
    """Roles are admission rules only: the same routes over mixed workers give the same times."""
    requests = poisson_arrivals(40, 150.0, (Lengths(400.0, 0.8, 2000), Lengths(20.0, 0.8, 100)), 3)
    instance = Instance(tuple(requests), 3, TIMES[0], Slo(0.05, 0.01), CONFIG)
    records = instance.simulate(*create_policy(name, 3)).records
    outcome = instance.follow(plan_of(records))
    assert outcome.score == instance.score(records)
    assert [record.finished for record in outcome.records] == [record.finished for record in records]


def test_a_full_worker_is_waited_for_and_a_retry_goes_elsewhere() -> None:
    policy = Planned([Route("w0", "w1"), Route("w2", "w2")])
    job = JobView(10, 10, SamplingParams(), 0.0)
    w0, w1, w2 = (
        WorkerView(name, Role.MIXED, jobs, 0, 0) for name, jobs in (("w0", 0), ("w1", 1), ("w2", 2))
    )
    assert policy.choose(job, [w0, w2], 0.0) is None
    retried = policy.choose(job._replace(avoid=frozenset({"w0"})), [w0, w1, w2], 0.0)
    assert retried is not None
    assert retried.route == Route("w1", "w1")
    first, second = (policy.choose(job, [w0, w1, w2], 0.0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.route, second.route) == (Route("w0", "w1"), Route("w2", "w2"))


def test_hindsight_parts_requests_that_would_be_in_each_others_way() -> None:
    """Two prompts at once on two workers: one each, though the first free worker looks as good for both."""
    requests = tuple(SimRequest(f"r{number}", 0.0, 500, 2) for number in range(2))
    instance = Instance(requests, 2, LinearTime(0.001, 1e-4), Slo(ttft_s=0.06), CONFIG)
    both = instance.follow([Route("w0", "w0")] * 2)
    # 512 tokens, of which 12 are the second's; then its other 488, beside a decode step of the first.
    assert both.score == (1, pytest.approx((0.001 + 0.0512 + 0.001 + 0.0489) / 0.06 - 1))
    best = enumerate_routes(instance)
    assert best.score == Score(2, 0.0)
    assert len({route.prefill for route in best.plan}) == 2


def test_the_bound_knows_what_a_cluster_can_compute() -> None:
    """100 prompts of 10 ms at once, in 0.2 s, on 2 workers: 40 at most, and that many can."""
    requests = tuple(SimRequest(f"r{number}", 0.0, 100, 1) for number in range(100))
    instance = Instance(
        requests, 2, LinearTime(0.0, 1e-4), Slo(ttft_s=0.2 + 1e-6), SimConfig(max_num_batched_tokens=100)
    )
    assert upper_bound(instance) == (40, 100)
    turns = [Route(name, name) for name in instance.names] * 50
    assert instance.follow(turns).score.met == 40


def test_the_bound_knows_what_a_tight_tpot_costs() -> None:
    """Steps of 8 + 1 ms a sequence, of which a TPOT of 10 ms allows two: 4 outputs at a time on 2 workers."""
    requests = tuple(SimRequest(f"r{number}", 0.0, 1, 101) for number in range(20))
    instance = Instance(
        requests, 2, LinearTime(0.008, 0.001), Slo(ttft_s=0.1, tpot_s=0.01 + 1e-9), SimConfig()
    )
    assert upper_bound(instance) == (4, 20)


def test_triage_gives_the_dearest_up_for_the_others() -> None:
    """Prompts of 60 ms come every 25 ms to three workers, and some that can't be met: those wait."""
    requests = [SimRequest(f"r{number}", 0.025 * number, 500, 1) for number in range(40)]
    requests += [SimRequest(f"dear{number}", 0.1 + 0.1 * number, 3000, 1) for number in range(6)]
    instance = Instance(tuple(requests), 3, LinearTime(0.01, 1e-4), Slo(ttft_s=0.15), CONFIG)
    collocated = instance.outcome(instance.simulate(*create_policy("collocated", 3)).records)
    found = triage(instance, [0, 1, 2, 3], [0.0, 6 / 46])
    assert list(found) == [f"{name} without 13%" for name in ("collocated", "1p2d", "2p1d")]
    given_up = {number for number, each in enumerate(instance.requests) if each.request_id.startswith("dear")}
    for outcome in found.values():
        assert {number for number, route in enumerate(outcome.plan) if route is None} == given_up
        others = [each for number, each in enumerate(outcome.records) if number not in given_up]
        last = max(each.finished or 0.0 for each in others)
        for number in given_up:  # when all others have ended
            assert (outcome.records[number].scheduled or 0.0) >= last
        assert all(each.ok for each in outcome.records)
    assert found["collocated without 13%"].score.met == 40 > collocated.score.met
    assert upper_bound(instance) == (40, 40)
    again = instance.follow(found["collocated without 13%"].plan)
    assert again.score.met == 40
    assert [each.finished for each in again.records] == [
        each.finished for each in found["collocated without 13%"].records
    ]


def test_what_is_no_instance_is_refused() -> None:
    request = SimRequest("r", 0.0, 100, 10)
    slo = Slo(ttft_s=1.0)
    for requests, workers, objectives, config, reason in (
        ((), 1, slo, CONFIG, "0 requests"),
        ((request,), 0, slo, CONFIG, "0 workers"),
        ((request,), 1, Slo(), CONFIG, "objectives 'none'"),
        ((request,), 1, slo, SimConfig(enable_prefix_caching=True), "prefix cache"),
        ((request,), 1, slo, SimConfig(max_model_len=109), "has 110 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            Instance(requests, workers, TIMES[1], objectives, config)
    instance = Instance((request,), 1, TIMES[1], slo, CONFIG)
    for plan in ([], [Route("w0", "w1")]):
        with pytest.raises(ValueError, match="a plan of"):
            instance.follow(plan)
    with pytest.raises(ValueError, match="0 starts"):
        search_routes(instance, {}, 10)
    many = tuple(SimRequest(f"r{number}", 0.0, 100, 10) for number in range(10))
    with pytest.raises(ValueError, match="use search_routes"):
        enumerate_routes(Instance(many, 3, TIMES[1], slo, CONFIG))

    class Unknown:
        def seconds(self, chunks: object) -> float:
            return random.random()

    with pytest.raises(ValueError, match="no lower bounds are known for Unknown"):
        upper_bound(Instance((request,), 1, Unknown(), slo, CONFIG))
