"""Threshold and nanoPD's rule, against decisions worked out by hand; what they say of them."""

from __future__ import annotations

import pytest

from nanopd_lab.core import SamplingParams
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.cost.nanopd import NanoPDModel
from nanopd_lab.router import JobView, NanoPDRule, Outlook, Role, Threshold, WorkerView, create_policy


def job(tokens: int, cached: int = 0, max_tokens: int = 500) -> JobView:
    return JobView(tokens, tokens, SamplingParams(max_tokens=max_tokens), 0.0, cached_tokens=cached)


PREFILL = WorkerView("p", Role.PREFILL, max_num_seqs=8)
MIXED = [WorkerView("a", Role.MIXED, decoding=2, max_num_seqs=8), WorkerView("b", Role.MIXED, max_num_seqs=8)]


@pytest.mark.parametrize(("tokens", "cached", "route"), [
    (512, 0, "b"), (513, 0, "p→b"), (2000, 1488, "b"), (2000, 1487, "p→b"),
])  # fmt: skip
def test_prompts_over_the_threshold_take_two_workers(tokens: int, cached: int, route: str) -> None:
    decision = Threshold(512).choose(job(tokens, cached), [PREFILL, *MIXED], 0.0)
    assert decision is not None
    assert str(decision.route) == route
    assert str(tokens - cached) in decision.reason


def test_what_cannot_be_disaggregated_stays_on_one_and_the_other_way() -> None:
    short, long = job(8), job(4000)
    policy = Threshold(512)
    alone = policy.choose(long, [MIXED[0]], 0.0)
    apart = policy.choose(short, [PREFILL, WorkerView("d", Role.DECODE)], 0.0)
    assert str(alone and alone.route) == "a"
    assert str(apart and apart.route) == "p→d"
    assert policy.choose(short, [PREFILL], 0.0) is None


def test_threshold_by_name() -> None:
    policy, roles = create_policy("threshold-64", 8)
    assert isinstance(policy, Threshold)
    assert policy.tokens == 64
    assert roles == [Role.PREFILL] * 2 + [Role.MIXED] * 6
    assert create_policy("threshold", 1)[1] == [Role.MIXED]


MODEL = NanoPDModel(1e-3, 20e-3, 4, 0.5e-3, 1e6, 1000)  # a token of KV takes 1 ms as well


def test_nanopds_rule_by_hand() -> None:
    """One worker: 100·1 + 256·20·max(1, load/4) + 0.5·100·min(load, 4)/4 ms; two: 200 + 256·20·max(1, (batch+1)/4)."""
    rule = NanoPDRule(MODEL)
    idle = [WorkerView("a", Role.MIXED), WorkerView("b", Role.MIXED)]
    decision = rule.choose(job(100), idle, 0.0)
    assert str(decision and decision.route) == "a"
    # Load 8 on both: 100 + 10,240 + 50 ms, against 200 + 256·20·9/4 = 11,720.
    busy = [view._replace(decoding=8) for view in idle]
    decision = rule.choose(job(100), busy, 0.0)
    assert decision is not None
    assert str(decision.route) == "a"
    found = decision.explain()
    assert [each.cost for each in found.candidates] == pytest.approx([10.39, 11.72])
    assert found.candidates[0].route == decision.route
    assert found.decided_by == "decode_s"
    # A mixed worker with 8 against a decode worker with 2: 100 + 10,240 + 50, against 200 + 5,120.
    roles = [busy[0], PREFILL, WorkerView("d", Role.DECODE, decoding=2)]
    decision = rule.choose(job(100), roles, 0.0)
    assert str(decision and decision.route) == "p→d"


def test_nanopds_rule_learns_lengths() -> None:
    """With outputs of 1 token, prefill and transfer decide: 100 + 20 + 25 ms at load 2 on one, 200 + 20 on two."""
    rule = NanoPDRule(MODEL)
    for _ in range(5):
        rule.finished(100, 1, False, 0.0)
    views = [WorkerView("a", Role.MIXED, decoding=2), PREFILL, WorkerView("d", Role.DECODE)]
    decision = rule.choose(job(100), views, 0.0)
    assert decision is not None
    assert [each.cost for each in decision.explain().candidates] == pytest.approx([0.145, 0.220])


def test_nanopds_parameters() -> None:
    policy, _ = create_policy("nanopd-rtx-4090", 2)
    assert isinstance(policy, NanoPDRule)
    assert policy.model.alpha_s == pytest.approx(0.1247e-3)
    with pytest.raises(ValueError, match=r"rtx-4090, h20"):
        create_policy("nanopd-tpu", 2)
    with pytest.raises(ValueError, match=r"no cost model is given; name one"):
        create_policy("nanopd", 2)
    outlook = Outlook.of(load_model("h100-qwen3-8b"))
    derived, _ = create_policy("nanopd", 2, outlook)
    assert isinstance(derived, NanoPDRule)
    assert derived.model.kv_bytes_per_token == 147_456
    assert derived.model.beta_s == pytest.approx(outlook.iteration.decode_seconds(1, 512))
