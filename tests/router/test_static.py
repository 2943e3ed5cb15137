"""Policies that look at queues: always a legal route, the right one where it can be computed by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.router import (
    POLICIES,
    Collocated,
    Disaggregated,
    Fleet,
    JobView,
    LeastLoaded,
    Role,
    RoundRobin,
    WorkerView,
    create_policy,
    legal_routes,
)

JOB = JobView(100, 100, SamplingParams(), arrival=0.0)


def view(
    name: str, role: Role = Role.MIXED, prefilling: int = 0, tokens: int = 0, decoding: int = 0
) -> WorkerView:
    return WorkerView(name, role, prefilling, tokens, decoding, blocks_free=10, max_num_seqs=8)


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    return [
        view(f"w{number}", draw(st.sampled_from(list(Role))), draw(st.integers(0, 9)), draw(st.integers(0, 999)),
             draw(st.integers(0, 9)))
        for number in range(draw(st.integers(1, 6)))
    ]  # fmt: skip


@given(fleets(), st.sampled_from(list(POLICIES)), st.sets(st.sampled_from(["w0", "w1", "w2"])))
def test_a_route_is_legal_and_there_is_one_where_there_can_be(
    workers: list[WorkerView], name: str, avoid: set[str]
) -> None:
    job = JobView(100, 100, SamplingParams(), 0.0, frozenset(avoid))
    decision = POLICIES[name]().choose(job, workers, 0.0)
    routes = legal_routes(workers)
    wanted = {
        "collocated": [route for route in routes if route.collocated],
        "disaggregated": [route for route in routes if not route.collocated],
    }.get(name, routes)
    if decision is None:
        assert not wanted
    else:
        assert decision.route in wanted
        assert decision.reason
        chosen = {decision.route.prefill, decision.route.decode}
        if name in ("round-robin", "least-loaded") and chosen & avoid:
            assert not [route for route in routes if not {route.prefill, route.decode} & avoid]


@given(st.data(), st.sampled_from(list(POLICIES)))
def test_a_fleet_is_to_a_policy_what_a_list_is(data: st.DataObject, name: str) -> None:
    """The same route for the same workers, whatever came and went before."""
    names = [f"w{number}" for number in range(5)]
    fleet = Fleet(names)
    now: dict[str, WorkerView | None] = dict.fromkeys(names)
    quick, plain = POLICIES[name](), POLICIES[name]()
    for _ in range(data.draw(st.integers(1, 12))):
        for changed in data.draw(st.sets(st.sampled_from(names))):
            new = data.draw(st.one_of(st.none(), fleets()))
            now[changed] = new[0]._replace(name=changed) if new else None
            fleet.put(changed, now[changed])
        workers = [worker for worker in now.values() if worker is not None]
        assert list(fleet) == workers
        assert len(fleet) == fleet.num_members == len(workers)
        avoid = frozenset(data.draw(st.sets(st.sampled_from(names), max_size=2)))
        job = JobView(100, 100, SamplingParams(), 0.0, avoid)
        assert quick.choose(job, fleet, 0.0) == plain.choose(job, workers, 0.0)


def test_least_loaded_is_the_best_of_all_pairs() -> None:
    """The definition, by looking at every pair."""
    rng = random.Random(1)
    for _ in range(300):
        workers = [
            view(f"w{number}", rng.choice(list(Role)), rng.randrange(3), 0, rng.randrange(3))
            for number in range(rng.randrange(1, 6))
        ]
        jobs = {worker.name: worker.jobs for worker in workers}
        routes = legal_routes(workers)
        decision = LeastLoaded().choose(JOB, workers, 0.0)
        if not routes:
            assert decision is None
            continue
        assert decision is not None
        costs = {r: (max(jobs[r.prefill], jobs[r.decode]), not r.collocated) for r in routes}
        assert costs[decision.route] == min(costs.values())


def test_collocated_takes_the_mixed_worker_with_the_fewest_jobs() -> None:
    workers = [view("a", decoding=3), view("b", prefilling=1, decoding=1), view("c", Role.DECODE)]
    decision = Collocated().choose(JOB, workers, 0.0)
    assert decision is not None
    assert decision.route == Route("b", "b")


def test_disaggregated_looks_at_prompt_tokens_and_at_outputs() -> None:
    workers = [
        view("p0", Role.PREFILL, prefilling=1, tokens=900),
        view("p1", Role.PREFILL, prefilling=3, tokens=300),
        view("d0", Role.DECODE, decoding=2),
        view("d1", Role.DECODE, decoding=1),
    ]
    decision = Disaggregated().choose(JOB, workers, 0.0)
    assert decision is not None
    assert str(decision.route) == "p1→d1"


def test_round_robin_takes_every_route_in_turn() -> None:
    policy, workers = RoundRobin(), [view("a"), view("b"), view("c", Role.PREFILL)]
    routes = legal_routes(workers)
    taken = [policy.choose(JOB, workers, 0.0) for _ in range(2 * len(routes))]
    assert [decision.route for decision in taken if decision] == routes * 2


def test_least_loaded_prefers_one_worker_where_that_is_level() -> None:
    decision = LeastLoaded().choose(JOB, [view("a", decoding=2), view("b", decoding=1)], 0.0)
    assert decision is not None
    assert decision.route == Route("b", "b")


def test_names_give_policies_and_roles() -> None:
    policy, roles = create_policy("2p1d", 3)
    assert isinstance(policy, Disaggregated)
    assert roles == [Role.PREFILL, Role.PREFILL, Role.DECODE]
    assert create_policy("collocated", 2)[1] == [Role.MIXED] * 2


@pytest.mark.parametrize(
    ("name", "workers", "message"),
    [
        ("1p1d", 3, r"needs 1 \+ 1 workers, at least one of each, and there are 3; set workers=2, or .* policy='1p2d'"),
        ("0p2d", 2, "at least one of each"),
        ("fastest", 2, "unknown policy 'fastest'; choose xPyD"),
        ("disaggregated", 1, "needs 2 workers or more"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_explained(name: str, workers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_policy(name, workers)
