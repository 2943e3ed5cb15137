"""Replays of arrivals, beside the simulator that they stand for."""

from __future__ import annotations

import random
import statistics

import pytest

from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.router import Outlook, create_policy
from nanopd_lab.router.replay import JOINING_STEPS, ReplayJob, Room, Running, StepCosts, decode_times
from nanopd_lab.sim import CostTime, SimConfig, SimRequest, Simulator

# Every step takes 10 ms, and 0.1 ms more for each token.
MODEL = IterationModel(10e-3, 0.0, 0.1e-3, 0.0, 0.0, 0.0)
ROOM = Room(64, 1e6)


def drained(steps: object) -> list[float]:
    """What a generator returns."""
    try:
        while True:
            next(steps)  # type: ignore[call-overload]
    except StopIteration as stop:
        found: list[float] = stop.value
        return found


def test_who_comes_to_a_busy_decode_worker_waits_for_steps() -> None:
    costs = StepCosts(Outlook(MODEL))
    jobs = [ReplayJob(1.0, 100, 11)]
    (alone,) = drained(decode_times(costs, jobs, [], ROOM))
    assert alone == pytest.approx(10 * costs.decode(1, 0))
    (beside,) = drained(decode_times(costs, jobs, [Running(100, 10_000)], ROOM))
    assert beside == pytest.approx(JOINING_STEPS * costs.decode(1, 0) + 10 * costs.decode(2, 0))


def test_in_the_simulator_handovers_wait_for_steps_too() -> None:
    """2.4 steps where nobody else hands over; in a busy cluster, which the constant is for, 3.3 to 3.9 were seen."""
    rng = random.Random(0)
    probes = [SimRequest(f"p{n}", 1.0 + 0.5 * n + rng.random() / 4, 16, 2) for n in range(40)]
    requests = [SimRequest("long", 0.0, 16, 4000), *probes]
    policy, roles = create_policy("1p1d", 2)
    result = Simulator(policy, roles, CostTime(MODEL), requests, SimConfig(ahead=True)).run()
    pace = StepCosts(Outlook(MODEL)).decode(2, 0)
    waited = [
        (each.finished - each.first_token) / pace - 1  # type: ignore[operator]
        for each in result.records
        if each.request_id != "long"
    ]
    assert 2.0 < statistics.mean(waited) < JOINING_STEPS
