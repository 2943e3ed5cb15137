"""The small policy: its estimates by hand, its rule on made-up ones, and what it does in a simulation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.router import JobView, Outlook, Role, Slo, WorkerView, create_policy, legal_routes
from nanopd_lab.router.pair_rule import (
    AIM_TPOT,
    AIM_TTFT,
    ByEstimate,
    Estimate,
    RouterParts,
    first_fit,
    time_to_first_token,
)
from nanopd_lab.router.predictor.conjugate import NormalInverseGamma
from nanopd_lab.router.predictor.log_lengths import LogLengths
from nanopd_lab.sim import ConstantTime, CostTime, SimConfig, SimRequest, Simulator, Veiled

SLO = Slo(0.4, 0.02)
# A step takes 10 ms, and 1 ms for each token: nothing for context or attention.
MODEL = IterationModel(0.01, 0.0, 1e-3, 0.0, 0.0, 0.0, sharpness=1.0)
LINK = TransferModel(0.05, 0.0, math.inf)


def job(tokens: int, arrival: float = 0.0, avoid: frozenset[str] = frozenset()) -> JobView:
    return JobView(tokens, tokens, SamplingParams(max_tokens=2048), arrival, avoid)


def step_s(tokens: int, outputs: int) -> float:
    return 0.01 + 1e-3 * (tokens + 2 * outputs)


def test_time_to_first_token_by_hand() -> None:
    # 1,500 tokens, 500 a step: three steps of 10 + 500 + 24 ms.
    assert time_to_first_token(700, 800, 12, 512, step_s) == pytest.approx(3 * 0.534)
    assert time_to_first_token(0, 250, 0, 100, step_s) == pytest.approx(0.11 + 0.11 + 0.06)


@pytest.mark.parametrize(("queued", "prompt", "budget"), [(0, 300, 128), (256, 300, 128), (100, 500, 256)])
def test_time_to_first_token_is_what_the_simulator_takes(queued: int, prompt: int, budget: int) -> None:
    requests = [SimRequest("queue", 0.0, queued, 1)] if queued else []
    requests.append(SimRequest("it", 0.0, prompt, 1))
    config = SimConfig(max_num_batched_tokens=budget)
    result = Simulator(*create_policy("collocated", 1), CostTime(MODEL), requests, config).run()

    def seconds(tokens: int, outputs: int) -> float:
        return 0.01 + 1e-3 * (tokens + outputs)

    expected = time_to_first_token(queued, prompt, 0, budget, seconds)
    assert result.records[-1].ttft_s == pytest.approx(expected)


def test_an_estimate_by_hand() -> None:
    policy = ByEstimate(Outlook(MODEL, SLO, LINK, 16, 16, 110))
    source = WorkerView("w0", Role.MIXED, 1, 50, 10, decode_tokens=1000, prefill_since=1.0)
    # Queue and prompt: 250 tokens in steps with room for 100 beside 10 outputs; half a queue of 70 ms is done.
    found = policy.source(job(200, arrival=0.9), source, output=100.0, now=1.03)
    whole = 0.12 + 0.12 + 0.07
    assert found.ttft_s == pytest.approx(0.13 + whole - 0.03)
    assert (found.outputs, found.before_s) == (10, pytest.approx(0.02))
    # The prompt adds 310 - 70 ms, of which its outputs would have used 2 steps of 20 ms, over half an output each.
    assert found.after_s == pytest.approx(0.02 + (whole - 0.07 - 2 * 0.02) / 50)
    assert policy.target(WorkerView("w1", Role.DECODE, decoding=4), 100.0) == pytest.approx(0.015)
    # Behind 50 tokens of a prompt: one step of 10 + 50 + 5 ms in place of one of 15.
    assert policy.target(WorkerView("w1", Role.MIXED, 1, 50, 4), 100.0) == pytest.approx(0.015 + 0.05 / 100)
    assert policy.handover(job(200), 101.0) == pytest.approx(0.05 / 100)


MIXED = [WorkerView(f"w{n}", Role.MIXED) for n in range(3)]
FINE, LATE = Estimate(0.1, 0.01), Estimate(0.9, 0.01)


def test_the_rule_fills_from_both_ends() -> None:
    assert first_fit(job(8), MIXED, lambda s, t: FINE, SLO) == Route("w0", "w2")
    full = lambda s, t: LATE if s.name == "w0" or t.name == "w2" else FINE  # noqa: E731
    assert first_fit(job(8), MIXED, full, SLO) == Route("w1", "w1")
    # Where all are late, the least late.
    late = lambda s, t: Estimate(0.9 - 0.1 * int(s.name[1]), 0.01)  # noqa: E731
    assert first_fit(job(8), MIXED, late, SLO) == Route("w2", "w2")
    assert first_fit(job(8), [WorkerView("w0", Role.DECODE)], lambda s, t: FINE, SLO) is None


@settings(deadline=None)
@given(
    roles=st.lists(st.sampled_from(list(Role)), min_size=0, max_size=4),
    numbers=st.lists(st.floats(0.001, 2.0), min_size=64, max_size=64),
    avoid=st.frozensets(st.sampled_from(("w0", "w1", "w2", "w3"))),
)
def test_the_rule_is_legal_and_breaks_the_fewest(
    roles: list[Role], numbers: list[float], avoid: frozenset[str]
) -> None:
    workers = [WorkerView(f"w{n}", role) for n, role in enumerate(roles)]

    def estimate(source: WorkerView, target: WorkerView) -> Estimate:
        place = 8 * int(source.name[1]) + 2 * int(target.name[1])
        return Estimate(numbers[place], numbers[place + 1] / 40, place % 3, 0.01, 0.01 + numbers[place] / 90)

    legal = legal_routes(workers)
    route = first_fit(job(8, avoid=avoid), workers, estimate, SLO)
    assert (route is None) == (not legal)
    if route is None:
        return
    views = {view.name: view for view in workers}
    others = [each for each in legal if not avoid & set(each)] or legal
    missed = {each: sum(estimate(views[each[0]], views[each[1]]).missed(SLO).values()) for each in others}
    assert missed[route] == min(missed.values())


def test_outputs_that_miss_anyway_are_not_broken() -> None:
    assert Estimate(0.5, 0.03, 7, 0.01, 0.03).missed(SLO) == {"own_ttft": 1, "own_tpot": 1, "others_tpot": 7}
    assert sum(Estimate(0.4, 0.02, 7, 0.021, 0.03).missed(SLO).values()) == 0


def test_the_rule_sees_stricter_objectives_and_the_policy_needs_both() -> None:
    seen = []

    def spy(job: JobView, workers: object, estimate: object, slo: Slo) -> Route | None:
        seen.append(slo)
        return None

    policy = ByEstimate(Outlook(MODEL, SLO), RouterParts(rule=spy))
    assert policy.choose(job(8), MIXED, 0.0) is None
    assert seen == [Slo(AIM_TTFT * 0.4, AIM_TPOT * 0.02)]
    for slo in (Slo(), Slo(0.4), Slo(tpot_s=0.02)):
        with pytest.raises(ValueError, match="promise both"):
            ByEstimate(Outlook(MODEL, slo))


def test_a_decision_explains_itself() -> None:
    policy = ByEstimate(Outlook(MODEL, SLO, LINK, 16, 16, 2048))
    busy = WorkerView("w0", Role.MIXED, 2, 4000, 0)
    decision = policy.choose(job(100), [busy, MIXED[1]], 0.0)
    assert decision is not None
    found = decision.explain()
    assert found.route == decision.route == found.candidates[0].route == Route("w1", "w1")
    assert len(found.candidates) == 4
    assert found.decided_by == "missed_own_ttft" or found.candidates[1].cost == found.candidates[0].cost
    assert "first token in 110 ms" in decision.reason


def test_it_learns_lengths_with_its_own_part() -> None:
    made = []

    class Mine(LogLengths):
        def __init__(self, belief: NormalInverseGamma) -> None:
            super().__init__(belief)
            made.append(self)

    policy = ByEstimate(Outlook(MODEL, SLO), RouterParts(lengths=Mine))
    policy.finished(10, 50, False, 1.0)
    policy.finished(10, 0, True, 2.0)
    right = LogLengths()
    right.observe(50, False)
    assert [each.belief for each in made] == [right.belief]


def test_it_serves_everything_and_loses_nothing() -> None:
    requests = [SimRequest(f"r{n}", 0.02 * n, 20 + 37 * n % 300, 1 + 13 * n % 60) for n in range(80)]
    config = SimConfig(max_num_batched_tokens=128, num_blocks=400)
    for time in (CostTime(MODEL), ConstantTime(0.01)):
        policy = Veiled(ByEstimate(Outlook(MODEL, SLO, LINK, 16, 16, 128)))
        result = Simulator(policy, [Role.MIXED] * 3, time, requests, config).run()
        assert len(result.completed) == 80
        assert result.problems() == []
        assert len({record.route for record in result.records}) > 2


def test_it_is_a_policy_by_name() -> None:
    policy, roles = create_policy("first-fit", 2, Outlook(MODEL, SLO, LINK, 16, 16, 2048))
    assert isinstance(policy, ByEstimate)
    assert policy.name == "first-fit"
    assert roles == [Role.MIXED] * 2
    with pytest.raises(ValueError, match="no cost model"):
        create_policy("first-fit", 2)
