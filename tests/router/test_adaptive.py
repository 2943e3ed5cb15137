"""The adaptive policy: legal, the best of all pairs by its own estimates, these by hand, roles that come to rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.router import (
    Adaptive,
    Decision,
    JobView,
    Outlook,
    Postponed,
    Role,
    Slo,
    WorkerView,
    create_policy,
    legal_routes,
)
from nanopd_lab.router.estimates import Typical, first_token_s, terms_of
from nanopd_lab.router.step_costs import StepCosts
from nanopd_lab.sim import CostTime, Lengths, LinkModel, SimConfig, SimRequest, Simulator, Veiled
from nanopd_lab.sim.workload import gamma_arrivals

# A step takes 10 ms and 0.1 ms a token; context costs nothing. 100 tokens of KV take 1 ms to move.
MODEL = IterationModel(10e-3, 0.0, 0.1e-3, 0.0, 0.0, 0.0)
LINK = TransferModel(0.0, 0.0, 1e8)
PARAMS = SamplingParams(max_tokens=2048)


def outlook(slo: Slo | None = None) -> Outlook:
    return Outlook(MODEL, slo or Slo(0.5, 0.03), LINK, block_bytes=16_000, max_num_batched_tokens=512)


def job(tokens: int = 200, arrival: float = 0.0, avoid: frozenset[str] = frozenset()) -> JobView:
    return JobView(tokens, tokens, PARAMS, arrival, avoid)


def mixed(name: str, **changes: object) -> WorkerView:
    view = WorkerView(
        name, Role.MIXED, 0, 0, 0, 0, 64, num_blocks=1000, block_size=16, max_num_batched_tokens=512
    )
    return view._replace(**changes)  # type: ignore[arg-type]


@st.composite
def fleets(draw: st.DrawFn, most: int = 6) -> list[WorkerView]:
    found = []
    for number in range(draw(st.integers(1, most))):
        prefilling, decoding = draw(st.integers(0, 4)), draw(st.integers(0, 20))
        arriving = draw(st.integers(0, decoding))
        tokens = draw(st.integers(1, 3000))
        found.append(
            mixed(
                f"w{number}",
                role=draw(st.sampled_from(list(Role))),
                prefilling=prefilling,
                prefill_tokens=prefilling * tokens,
                decoding=decoding,
                decode_tokens=decoding * tokens,
                arriving=arriving,
                arriving_tokens=arriving * tokens,
                leaving_tokens=draw(st.integers(0, 1)) * tokens,
                prefill_since=draw(st.floats(0.0, 1.0)),
            )
        )
    return found


OBJECTIVES = st.sampled_from([Slo(), Slo(0.2, 0.02), Slo(ttft_s=1.0), Slo(tpot_s=0.015), Slo(e2e_s=3.0)])


@settings(max_examples=200, deadline=None)
@given(fleets(), OBJECTIVES, st.integers(1, 4000), st.sets(st.sampled_from(["w0", "w1"])))
def test_a_route_is_legal_under_the_roles_it_comes_with(
    workers: list[WorkerView], slo: Slo, tokens: int, avoid: set[str]
) -> None:
    answers = [
        Adaptive(outlook(slo)).choose(job(tokens, avoid=frozenset(avoid)), workers, 1.0) for _ in range(2)
    ]
    assert str(answers[0]) == str(answers[1]) or isinstance(answers[0], Decision)
    answer = answers[0]
    if isinstance(answer, Postponed):
        assert any(view.prefilling for view in workers)
        return
    assert isinstance(answer, Decision)
    assert isinstance(answers[1], Decision)
    assert answer[:3] == answers[1][:3]
    roles = dict(answer.roles)
    after = [view._replace(role=roles.get(view.name, view.role)) for view in workers]
    assert answer.route in legal_routes(after)


@settings(max_examples=200, deadline=None)
@given(fleets(), OBJECTIVES, st.integers(1, 4000))
def test_the_choice_is_the_best_of_all_pairs_that_are_explained(
    workers: list[WorkerView], slo: Slo, tokens: int
) -> None:
    """Brute force over all pairs, each from its own terms, against the one pass."""
    answer = Adaptive(outlook(slo)).choose(job(tokens, arrival=0.5), workers, 1.0)
    if not isinstance(answer, Decision):
        return
    found = answer.explain()
    assert found.route == answer.route
    chosen = next(each for each in found.candidates if each.route == answer.route)
    assert chosen.cost == pytest.approx(min(each.cost for each in found.candidates), abs=1e-9)
    for each in found.candidates:
        assert each.cost == pytest.approx(math.fsum(each.terms.values()))
    if len(found.candidates) > 1:
        assert found.decided_by in chosen.terms


def test_an_estimate_by_hand() -> None:
    """Two prompts of 300 tokens are queued since 0, of which 20 ms are over; beside them 5 outputs run.

    A prompt of 300 (320 in steps of 32) beside 5 (8 in steps of 8) makes a step of 328 tokens (336 in steps of 16):
    43.6 ms, 32.8 more than the 10.8 of 8 decodes. A decode step takes 10 + 5·0.1 = 10.5 ms, and 600 tokens fill 600/507
    steps. A quarter of that comes on top, as others will come and share the step, and the own prompt: 224 + 8 tokens,
    240 in steps of 16.
    """
    costs = StepCosts(outlook())
    view = mixed("a", prefilling=2, prefill_tokens=600, decoding=5, decode_tokens=500)
    terms = terms_of(view, costs, Slo(0.5, 0.03), Typical(300, 100.0, 0.0), 0.0, 0.0, 0.02)
    assert terms.pace_s == pytest.approx(10.5e-3)
    queued = 2 * 32.8e-3 + 600 / 507 * 10.5e-3
    assert terms.free_at == pytest.approx(queued)
    policy = Adaptive(outlook())
    first_s = first_token_s(terms, policy._ask(job(200), 0.02), costs, 0.02)
    assert first_s == pytest.approx(queued - 0.02 + queued / 4 + 23.2e-3 + 10.5e-3)


def test_an_idle_worker_is_taken_before_a_busy_one() -> None:
    busy = mixed("a", prefilling=1, prefill_tokens=4000, decoding=3, decode_tokens=6000, arriving=1)
    answer = Adaptive(outlook()).choose(job(), [busy, mixed("b")], 0.0)
    assert isinstance(answer, Decision)
    assert answer.route == Route("b", "b")


def test_what_decides_is_named() -> None:
    """Both queues are empty; b decodes near its limit of 30 ms a token."""
    full = mixed("b", decoding=190, decode_tokens=190_00)
    answer = Adaptive(outlook()).choose(job(), [full, mixed("a", decoding=2, decode_tokens=200)], 0.0)
    assert isinstance(answer, Decision)
    assert answer.route == Route("a", "a")
    found = answer.explain()
    assert found.decided_by in ("tpot_misses", "misses_by_prompt", "misses_by_output")
    assert "decided by" in str(found)


def test_who_would_be_late_lets_others_pass_but_not_for_ever() -> None:
    policy = Adaptive(outlook(Slo(0.1, 0.03)))
    late = mixed("a", prefilling=9, prefill_tokens=9000)
    assert isinstance(policy.choose(job(arrival=0.0), [late], 0.0), Postponed)
    assert isinstance(policy.choose(job(arrival=0.0)._replace(postponed=True), [late], 29.0), Postponed)
    assert isinstance(policy.choose(job(arrival=0.0)._replace(postponed=True), [late], 30.0), Decision)
    # Nobody is late for a worker that has nothing else to do.
    assert isinstance(policy.choose(job(9000), [mixed("a")], 0.0), Decision)


def requests(count: int, rate: float, prompt: int, output: int, seed: int = 0) -> list[SimRequest]:
    lengths = Lengths(prompt, 0.3, 4 * prompt), Lengths(output, 0.3, 4 * output)
    return gamma_arrivals(count, rate, lengths, seed)


def simulated(
    arrivals: list[SimRequest], slo: Slo, workers: int = 4, policy: str = "adaptive"
) -> tuple[Simulator, float]:
    chosen, roles = create_policy(policy, workers, outlook(slo))
    config = SimConfig(
        num_blocks=4000, max_num_seqs=128, max_num_batched_tokens=512, block_bytes=16_000,
        link=LinkModel(bytes_per_s=LINK.bytes_per_s),
    )  # fmt: skip
    simulator = Simulator(Veiled(chosen), roles, CostTime(MODEL), arrivals, config)
    result = simulator.run()
    assert not result.problems()
    assert len(result.completed) == len(arrivals)  # nobody is left over
    return simulator, result.attainment(slo)


def test_tight_time_per_token_separates_the_roles() -> None:
    """Prompts of 400 tokens hold up decodes of 10 ms by 40 ms: at 12 ms a token only workers that don't prefill do."""
    arrivals = requests(300, 25.0, 400, 100)
    slo = Slo(2.0, 0.0125)
    simulator, attained = simulated(arrivals, slo)
    assert simulator.controller.role_changes
    assert {view.role for view in simulator.controller.views()} == {Role.PREFILL, Role.DECODE}
    assert attained > simulated(arrivals, slo, policy="collocated")[1] + 0.3


def test_tight_time_to_first_token_takes_all_workers_for_prompts() -> None:
    """At 65 requests a second prompts take 3.4 workers' time: three that prefill are too few."""
    arrivals = requests(400, 65.0, 400, 20)
    slo = Slo(0.3, 0.2)
    simulator, attained = simulated(arrivals, slo)
    assert {view.role for view in simulator.controller.views()} == {Role.MIXED}
    best = simulated(arrivals, slo, policy="collocated")[1]
    assert best > simulated(arrivals, slo, policy="3p1d")[1] + 0.1
    assert attained > best - 0.05


def test_in_an_overload_some_are_served_in_time() -> None:
    """First come, first served keeps its promise to nobody once the queue is longer than the objective."""
    arrivals = requests(400, 150.0, 400, 20)
    slo = Slo(0.3, 0.5)
    assert simulated(arrivals, slo)[1] > simulated(arrivals, slo, policy="collocated")[1] + 0.1


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.sampled_from([5.0, 20.0, 60.0]), st.sampled_from([(400, 20), (100, 150)]))
def test_a_steady_load_does_not_move_roles_for_ever(seed: int, rate: float, lengths: tuple[int, int]) -> None:
    """Each change of layout moves four roles at most; a plan is made every 64 arrivals, and most change nothing."""
    arrivals = requests(600, rate, *lengths, seed)
    simulator, _ = simulated(arrivals, Slo(0.5, 0.03))
    assert simulator.controller.role_changes <= 4 * 5


def test_the_same_events_give_the_same_decisions() -> None:
    arrivals = requests(200, 40.0, 300, 60)
    first, second = (simulated(arrivals, Slo(0.3, 0.02))[0] for _ in range(2))
    routes = [
        [str(first.controller.explain(each.request_id).route) for each in arrivals]
        for first in (first, second)
    ]
    assert routes[0] == routes[1]


@pytest.mark.parametrize(("rate", "prefills"), [(60.0, 2), (30.0, 1)])
def test_a_queue_that_grows_slowly_is_seen_before_it_breaks_promises(rate: float, prefills: int) -> None:
    """Prompts of 25 ms at one of four workers, and two seconds for each: at 60 a second the ones that a plan looks at
    are all in time, and those of ten seconds later are not."""
    policy = Adaptive(outlook(Slo(2.0, 0.05)))
    roles = {f"w{number}": Role.DECODE if number else Role.PREFILL for number in range(4)}
    for number in range(600):
        now = number / rate
        views = [mixed(name, role=role) for name, role in roles.items()]
        answer = policy.choose(job(200, arrival=now), views, now)
        assert isinstance(answer, Decision)
        roles.update(answer.roles)
        policy.finished(200, 20, False, now)
    assert [*roles.values()].count(Role.PREFILL) == prefills


def test_a_decision_that_expects_misses_hurries_the_next_plan() -> None:
    """Outputs that take 26 ms a token, and 100 are promised, or 20: the plans of a thousand arrivals."""
    plans = []
    for promised_s in (0.1, 0.02):
        policy = Adaptive(outlook(Slo(5.0, promised_s)))
        views = [
            mixed(f"w{number}", decoding=160, decode_tokens=16_000, num_blocks=9000) for number in range(2)
        ]
        for number in range(1000):
            policy.choose(job(50, arrival=number / 10), views, number / 10)
            policy.finished(50, 20, False, number / 10)
        plans.append(policy.plan.plans)
    calm, troubled = plans
    assert troubled > 1.5 * calm
