"""Fleets: one shard is the simulator to the bit, controllers queue as theory says, nothing is lost when things die."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cost.hardware import load_model
from nanopd_lab.router import Outlook, Slo, create_policy
from nanopd_lab.sim import (
    ConstantTime,
    CostTime,
    Kill,
    Lengths,
    LinearTime,
    LinkModel,
    SimConfig,
    SimRequest,
    Simulator,
    Veiled,
    poisson_arrivals,
)
from nanopd_lab.sim.failures import LLAMA3_GPU_HOURS, ControllerKill, FailureRate
from nanopd_lab.sim.fleet import FleetConfig, FleetResult, FleetSimulator
from nanopd_lab.sim.front_door import RULES, DoorRule
from nanopd_lab.sim.network import Topology
from nanopd_lab.sim.shard import ControllerTime, MakePolicy
from tests.sim.test_theory import lindley

H100 = load_model("h100-qwen3-8b")
SLO = Slo(ttft_s=0.4, tpot_s=0.012)
CONFIG = SimConfig(
    num_blocks=20_000,
    max_num_seqs=256,
    block_bytes=H100.fit["block_bytes"],
    link=H100.transfer or LinkModel(),
    ahead=True,
)
QUICK = LinearTime(0.01, 1e-4, 1e-7, 1e-4)


class Policies:
    """Makes policies by a name; "half" is as many that prefill as that decode."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, workers: int) -> MakePolicy:
        name = f"{workers // 2}p{workers - workers // 2}d" if self.name == "half" else self.name

        def make() -> tuple[Veiled, list]:  # type: ignore[type-arg]
            policy, roles = create_policy(name, workers, Outlook.of(H100, SLO))
            return Veiled(policy), roles

        return make


def some(count: int, rate: float, seed: int = 0, prompt: int = 600, output: int = 60) -> list[SimRequest]:
    return poisson_arrivals(count, rate, (Lengths(prompt, 0.8, 6000), Lengths(output, 0.8, 500)), seed)


@pytest.mark.parametrize("name", ["least-loaded", "half", "adaptive", "round-robin"])
@pytest.mark.parametrize("message_s", [0.0, 1e-4])
def test_one_shard_whose_controller_takes_no_time_is_the_simulator_to_the_bit(
    name: str, message_s: float
) -> None:
    """With kills and preemptions, records, totals, events and all."""
    config = SimConfig(**{**vars(CONFIG), "num_blocks": 700, "message_s": message_s})
    kills = [Kill(1.0, "w2", 0.5), Kill(2.0, "w5")]
    policy, time, requests = Policies(name), CostTime(H100.iteration), some(600, 60.0)
    plain = Simulator(*policy(8)(), time, requests, config, kills).run()
    fleet = FleetSimulator(FleetConfig(8), policy, time, requests, config, kills).run()
    assert repr(fleet.result) == repr(plain)
    assert fleet.lost_tokens > 0


def one_at_a_time(rate: float, count: int, busy: ControllerTime, seed: int = 3) -> FleetResult:
    """Many workers, hardly any work for them, and one controller."""
    fleet = FleetConfig(64, busy=lambda workers: busy)
    requests = poisson_arrivals(count, rate, (Lengths(10, 0.0, 10), Lengths(1, 0.0, 1)), seed)
    return FleetSimulator(fleet, Policies("collocated"), ConstantTime(1e-4), requests, SimConfig()).run()


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_requests_wait_for_the_controller_as_in_m_d_1(load: float) -> None:
    """Each of them as Lindley's recursion says, whose mean over Poisson arrivals is the formula's (`test_theory`); and
    this run's own mean is off the formula's at the load it had by no more than its spread over 20 parts explains."""
    service = 1e-3
    rate, count = load / service, 20_000
    found = one_at_a_time(rate, count, ControllerTime(service))
    arrivals = np.array([record.arrival for record in found.result.records])
    waits = np.concatenate([[0.0], lindley(np.diff(arrivals), np.full(count - 1, service))])
    np.testing.assert_allclose(np.array(found.waits), waits, rtol=0, atol=1e-9)
    parts = waits.reshape(20, -1).mean(axis=1)
    load = service * count / float(arrivals[-1])
    off = abs(waits.mean() - load * service / (2 * (1 - load)))
    assert off < 4 * parts.std(ddof=1) / math.sqrt(20)
    assert sum(found.busy_s) == pytest.approx(count * service)


def test_a_controller_beyond_its_limit_serves_what_it_can_and_the_rest_waits() -> None:
    """At twice its rate every second is 1,000 decisions; who comes at time t waits t."""
    found = one_at_a_time(2000.0, 4000, ControllerTime(1e-3))
    late = [record.ttft_s / record.arrival for record in found.result.records[3000:] if record.ttft_s]
    assert found.result.decisions == 4000
    assert found.result.duration_s == pytest.approx(4.0, rel=0.02)
    assert late == pytest.approx([1.0] * 1000, rel=0.1)


def test_messages_take_their_turn_too() -> None:
    """One request alone: a decision, the first token's message, the last one's and the end of its accounts."""
    fleet = FleetConfig(2, busy=lambda workers: ControllerTime(0.25, 0.0625))
    request = SimRequest("r", 1.0, 10, 3)
    found = FleetSimulator(fleet, Policies("collocated"), ConstantTime(0.5), [request], SimConfig()).run()
    (record,) = found.result.records
    assert (record.arrival, record.first_token, record.finished) == (1.0, 1.75, 2.75)
    assert found.busy_s == [0.25 + 3 * 0.0625]
    assert found.result.problems() == []


def accounts(found: FleetResult, requests: list[SimRequest]) -> None:
    """Every request has one record, whole if it was served; nothing is left on a worker."""
    assert found.result.problems() == []
    assert [each.request_id for each in found.result.records] == [each.request_id for each in requests]
    for record, request in zip(found.result.records, requests, strict=True):
        assert record.arrival == request.arrival
        if record.ok:
            assert record.output_tokens == request.output_tokens
            assert record.first_token is not None
            assert record.finished is not None
            assert record.arrival <= record.first_token <= record.finished
        else:
            assert record.error
    assert sum(found.offered) == len(requests) + found.failed_over


DOORS = [DoorRule(name, age) for name in RULES for age in (0.0, 0.3)]
TIMES = st.floats(0.1, 4.0)
CASES = st.fixed_dictionaries(
    {
        "shards": st.integers(1, 5),
        "door": st.sampled_from(DOORS),
        "busy": st.sampled_from([ControllerTime(), ControllerTime(2e-3, 1e-4), ControllerTime(0.02)]),
        "policy": st.sampled_from(["least-loaded", "half", "round-robin"]),
        "network": st.booleans(),
        "kills": st.lists(st.tuples(TIMES, st.integers(0, 9), st.sampled_from([0.2, 3.0])), max_size=4),
        "controllers": st.lists(st.tuples(TIMES, st.integers(0, 4), st.sampled_from([0.3, 2.5])), max_size=3),
        "seed": st.integers(0, 3),
    }
)


def served(case: dict) -> tuple[FleetResult, list[SimRequest]]:  # type: ignore[type-arg]
    shards = case["shards"]
    requests = some(120, 40.0, case["seed"], prompt=300, output=20)
    fleet = FleetConfig(
        10,
        shards,
        case["door"],
        lambda workers: case["busy"],
        Topology(2, 2, 1e9, 1e8, 4.0) if case["network"] else None,
        failover_s=1.0,
    )
    config = SimConfig(num_blocks=200, block_bytes=100_000, link=LinkModel(1e-3, 0.0, 1e8), message_s=1e-4)
    simulator = FleetSimulator(
        fleet, Policies(case["policy"]), QUICK, requests, config,
        [Kill(time, f"w{worker}", back) for time, worker, back in case["kills"]],
        [ControllerKill(time, shard % shards, back) for time, shard, back in case["controllers"]],
        case["seed"],
    )  # fmt: skip
    return simulator.run(), requests


@settings(deadline=None, max_examples=60)
@given(CASES)
def test_nothing_is_lost_whatever_dies(case: dict) -> None:  # type: ignore[type-arg]
    found, requests = served(case)
    accounts(found, requests)
    tries = max(len(record.path.attempts) for record in found.result.records if record.path)
    assert all(record.ok for record in found.result.records) or tries > 1
    if not case["controllers"]:
        assert found.failed_over == 0
    if not case["kills"] and not case["controllers"]:
        assert found.lost_tokens == 0


@settings(deadline=None, max_examples=10)
@given(CASES)
def test_the_same_seed_gives_the_same_fleet_to_the_bit(case: dict) -> None:  # type: ignore[type-arg]
    assert repr(served(case)[0]) == repr(served(case)[0])


def test_who_was_at_a_controller_that_died_is_served_elsewhere_after_the_timeout() -> None:
    """Two shards in turn; the first one's controller dies at 1 s and is back at 6 s. Its request of 0.5 s had begun."""
    requests = [SimRequest(f"r{n}", 0.5 * (n + 1), 8, 5) for n in range(8)]
    fleet = FleetConfig(2, 2, DoorRule("round-robin"), failover_s=2.0)
    found = FleetSimulator(
        fleet,
        Policies("collocated"),
        ConstantTime(0.25),
        requests,
        SimConfig(),
        controller_kills=[ControllerKill(1.1, 1, 5.0)],
    ).run()
    accounts(found, requests)
    # The second shard has those of 0.5, 1.5 and 2.5 s; they are given up at 3.1 s, and all go to the first from then.
    late = {
        record.request_id: record.first_token
        for record in found.result.records
        if record.ttft_s and record.ttft_s > 0.5
    }
    assert set(late) == {"r0", "r2", "r4"}
    assert all(first is not None and 3.1 < first < 4.0 for first in late.values())
    assert found.failed_over == 3
    assert found.lost_tokens > 0


def test_the_only_controller_that_dies_is_waited_for() -> None:
    requests = [SimRequest(f"r{n}", float(n), 8, 2) for n in range(6)]
    found = FleetSimulator(
        FleetConfig(2, failover_s=1.0),
        Policies("collocated"),
        ConstantTime(0.1),
        requests,
        SimConfig(),
        controller_kills=[ControllerKill(1.5, 0, 2.0)],
    ).run()
    accounts(found, requests)
    assert found.result.records[2].first_token == pytest.approx(3.6)


def test_news_decide_where_requests_go() -> None:
    """64 shards of one worker. Two choices by live news are more even than chance; by old news whoever looks at all
    sends everybody to few, and whoever compares two does much less harm."""

    def unevenness(rule: DoorRule) -> float:
        requests = some(6000, 400.0, 1, prompt=200, output=20)
        found = FleetSimulator(
            FleetConfig(64, 64, rule), Policies("collocated"), QUICK, requests, CONFIG
        ).run()
        return found.result.percentile("ttft_s", 99)

    chance = unevenness(DoorRule("random"))
    assert unevenness(DoorRule("two-choices")) < chance
    assert unevenness(DoorRule("least", 2.0)) > 2 * chance
    assert unevenness(DoorRule("two-choices", 2.0)) < 1.5 * chance


def test_prompts_that_begin_alike_go_to_one_shard() -> None:
    rng = random.Random(1)
    requests = [SimRequest(f"r{n}", n / 20, 200, 5, rng.randrange(6), 160) for n in range(200)]
    config = SimConfig(**{**vars(CONFIG), "enable_prefix_caching": True})

    def cached(rule: str) -> int:
        fleet = FleetConfig(4, 4, DoorRule(rule))
        found = FleetSimulator(
            fleet, Policies("collocated"), CostTime(H100.iteration), requests, config
        ).run()
        accounts(found, requests)
        return sum(record.path.cached_tokens for record in found.result.records if record.path)

    assert cached("prefix") >= (200 - 6) * 160 * 0.9
    assert cached("random") < cached("prefix")


def test_the_end_leaves_open_only_what_could_not_be_in_time() -> None:
    """What is judged when the run ends early is judged as in the whole run."""
    requests = some(900, 300.0, 2)
    fleet = FleetConfig(16, 4, busy=lambda workers: ControllerTime(0.08, 1e-3))
    whole = FleetSimulator(fleet, Policies("least-loaded"), CostTime(H100.iteration), requests, CONFIG).run()
    cut = FleetConfig(16, 4, busy=fleet.busy, slo=SLO)
    short = FleetSimulator(cut, Policies("least-loaded"), CostTime(H100.iteration), requests, CONFIG).run()
    meets = lambda found: [record.meets(SLO) for record in found.result.records]  # noqa: E731
    assert meets(short) == meets(whole)
    reasons = Counter(record.finish_reason for record in short.result.records)
    assert reasons["open"] > 0
    assert not all(meets(whole))
    assert requests[-1].arrival < short.ended_s < 0.7 * whole.ended_s


def test_failures_come_at_the_rate_that_was_seen() -> None:
    assert round(LLAMA3_GPU_HOURS) == 50_677
    rate = FailureRate(accelerate=1000)
    kills = rate.kills(10_000, 3600.0, seed=1)
    assert len(kills) == pytest.approx(10_000 * 1000 / LLAMA3_GPU_HOURS, abs=4 * math.sqrt(200))
    assert {kill.restart_after for kill in kills} == {30.0}
    assert kills == sorted(kills, key=lambda kill: kill.time)
    assert kills == rate.kills(10_000, 3600.0, seed=1)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="5 shards of 4 workers"):
        FleetConfig(4, 5)
    with pytest.raises(ValueError, match="front door 'best'"):
        DoorRule("best")
    with pytest.raises(ValueError, match="digest age -1"):
        DoorRule("random", -1)
    with pytest.raises(ValueError, match="accelerate is 0"):
        FailureRate(accelerate=0)
    for kills, controllers, message in (
        ([Kill(1.0, "w9")], [], "'w9'"),
        ([], [ControllerKill(1.0, 3, 1.0)], "shard 3"),
    ):
        with pytest.raises(ValueError, match=message):
            FleetSimulator(
                FleetConfig(4, 2), Policies("collocated"), QUICK, [], SimConfig(), kills, controllers
            )
