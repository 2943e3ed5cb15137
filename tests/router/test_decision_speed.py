"""How long decisions take, by policy and number of workers: `pytest tests/router/test_decision_speed.py`.

Questions are those that a simulated fleet of H100s under load asks; each is put to the policy that has served it so
far, over a fleet that is kept as the controller keeps it. `-k run -s` prints the CPU time of all decisions of whole
runs instead, the first ones, role plans and replays among them, which their mean spreads over all. Nothing is asserted
of the times: they depend on the machine.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pytest

from nanopd_lab.cost.hardware import load_model
from nanopd_lab.router import (
    Decision,
    Fleet,
    JobView,
    Outlook,
    Policy,
    Postponed,
    Slo,
    Veiled,
    WorkerView,
    create_policy,
    legal_routes,
)
from nanopd_lab.sim import AZURE_LIKE, CostTime, LinkModel, SimConfig, Simulator, poisson_arrivals

COST = load_model("h100-qwen3-8b")
SLO = Slo(0.4, 0.012)
PER_WORKER = 4.0  # requests a second
ROUNDS = 300
POLICIES = ("collocated", "xpxd", "round-robin", "least-loaded", "threshold", "nanopd", "adaptive")


class Keeping:
    """A policy that keeps the newest questions."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy, policy.name
        self.asked: list[tuple[JobView, list[WorkerView]]] = []

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        self.asked.append((job, list(workers)))
        del self.asked[:-ROUNDS]
        return self.policy.choose(job, workers, now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


class Timed:
    """A policy that notes the CPU time of each decision, in µs."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy, policy.name
        self.times_us: list[float] = []

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        begun = time.thread_time_ns()
        answer = self.policy.choose(job, workers, now)
        self.times_us.append((time.thread_time_ns() - begun) / 1e3)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


@pytest.mark.parametrize("per_worker", [PER_WORKER, 11.0])
@pytest.mark.parametrize("workers", [8, 64, pytest.param(256, marks=pytest.mark.slow)])
def test_decisions_of_a_run(workers: int, per_worker: float) -> None:
    link = COST.transfer or LinkModel()
    block_bytes = int(COST.fit.get("block_bytes", 0))
    outlook = Outlook(COST.iteration, SLO, link, block_bytes, ahead=True)
    chosen, roles = create_policy("adaptive", workers, outlook)
    config = SimConfig(25_000, max_num_seqs=256, block_bytes=block_bytes, link=link, ahead=True)
    requests = poisson_arrivals(max(1600, 6 * workers), per_worker * workers, AZURE_LIKE, 0)
    timed = Timed(chosen)
    Simulator(Veiled(timed), roles, CostTime(COST.iteration), requests, config).run()
    times = sorted(timed.times_us)
    assert len(times) >= len(requests)
    print(
        f"\n{workers} workers, {per_worker:g} requests/s each: {len(times)} decisions, median "
        f"{statistics.median(times):.0f} µs, mean {statistics.mean(times):.0f}, p99 {times[len(times) * 99 // 100]:.0f}"
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", [2, 8, 64, pytest.param(256, marks=pytest.mark.slow)])
def test_decisions(benchmark: Any, workers: int, policy: str) -> None:
    link = COST.transfer or LinkModel()
    block_bytes = int(COST.fit.get("block_bytes", 0))
    outlook = Outlook(COST.iteration, SLO, link, block_bytes, ahead=True)
    half = workers // 2
    chosen, roles = create_policy(f"{half}p{half}d" if policy == "xpxd" else policy, workers, outlook)
    config = SimConfig(25_000, max_num_seqs=256, block_bytes=block_bytes, link=link, ahead=True)
    requests = poisson_arrivals(max(400, 6 * workers), PER_WORKER * workers, AZURE_LIKE, 0)
    keeping = Keeping(chosen)
    simulator = Simulator(Veiled(keeping), roles, CostTime(COST.iteration), requests, config)
    simulator.run()
    begun = simulator.queue.now
    fleet = Fleet(simulator.names)
    rounds = itertools.count(1)
    questions = itertools.cycle(keeping.asked)
    answers: list[tuple[JobView, Decision | Postponed | None]] = []

    def ask() -> tuple[tuple[JobView, Fleet, float], dict[str, Any]]:
        job, views = next(questions)
        now = begun + next(rounds) / (PER_WORKER * workers)
        present = {view.name: view for view in views}
        for name in simulator.names:
            fleet.put(name, present.get(name))
        return (job._replace(arrival=now), fleet, now), {}

    def choose(job: JobView, workers: Fleet, now: float) -> None:
        answers.append((job, chosen.choose(job, workers, now)))

    benchmark.pedantic(choose, setup=ask, rounds=ROUNDS)
    benchmark.extra_info.update(workers=workers, policy=policy, requests=len(requests))
    while len(answers) < ROUNDS:  # where timing is off, as under xdist, it has been called once
        choose(*ask()[0])
    decided = [answer for _, answer in answers if isinstance(answer, Decision)]
    assert len(decided) > ROUNDS / 2
    last = decided[-1]
    roles_then = dict(last.roles)
    views = [view._replace(role=roles_then.get(view.name, view.role)) for view in fleet]
    assert last.route in legal_routes(views) or not isinstance(answers[-1][1], Decision)
