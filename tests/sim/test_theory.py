"""The simulator against queueing theory, which knows nothing of schedulers and blocks."""

from __future__ import annotations

import math
import random

import pytest

from nanopd_lab.cluster.actions import Limits
from nanopd_lab.router import create_policy
from nanopd_lab.sim import ConstantTime, LinearTime, SimConfig, SimRequest, SimResult, Simulator
from nanopd_lab.sim.timing import StepTime

ONE_AT_A_TIME = SimConfig(
    max_num_seqs=1, limits=Limits(heartbeat_s=math.inf, max_jobs=1_000_000), num_blocks=1000
)


def stationary_arrivals(count: int, rate: float, rng: random.Random) -> list[float]:
    """Exponential gaps, stratified: their order is random, their distribution exact, so that the mean waiting
    converges with fewer requests than with independent draws."""
    gaps = [-math.log1p(-(i + rng.random()) / count) / rate for i in range(count)]
    rng.shuffle(gaps)
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    return times


def serve(times: list[float], prompts: list[int], model: StepTime) -> SimResult:
    policy, roles = create_policy("collocated", 1)
    requests = [SimRequest(f"r{i}", t, n, 1) for i, (t, n) in enumerate(zip(times, prompts, strict=True))]
    return Simulator(policy, roles, model, requests, ONE_AT_A_TIME).run()


def lindley(times: list[float], services: list[float]) -> float:
    """Mean waiting of a single first-come-first-served server, by the recursion W' = max(0, W + S - A)."""
    waiting, total = 0.0, 0.0
    for i in range(1, len(times)):
        waiting = max(0.0, waiting + services[i - 1] - (times[i] - times[i - 1]))
        total += waiting
    return total / len(times)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.9])
def test_mean_waiting_is_that_of_m_d_1(load: float) -> None:
    """W = rho D / (2 (1 - rho)). Over seeds, since one path's mean has an error of its own; the Lindley recursion,
    which needs no events, is the control variate that takes it away."""
    service, seeds, count = 0.05, 2, 3_000
    expected = load * service / (2 * (1 - load))
    found = []
    for seed in range(seeds):
        times = stationary_arrivals(count, load / service, random.Random(seed))
        result = serve(times, [8] * count, ConstantTime(service))
        assert result.mean("waiting_s") == pytest.approx(lindley(times, [service] * count), rel=1e-6)
        found.append(result.mean("waiting_s"))
    control = []  # many more arrivals through the recursion that was just shown to be the same
    for seed in range(12):
        times = stationary_arrivals(40_000, load / service, random.Random(seed))
        control.append(lindley(times, [service] * len(times)))
    assert math.fsum(control) / len(control) == pytest.approx(expected, rel=0.01)
    assert math.fsum(found) / seeds == pytest.approx(expected, rel=0.25)


def test_mean_waiting_is_that_of_m_g_1() -> None:
    """Pollaczek and Khinchine: W = lambda E[S^2] / (2 (1 - rho)), prompts of two lengths."""
    model, rng = LinearTime(0.01, token_s=0.001), random.Random(3)
    short, long = 10, 190  # 0.02 s and 0.2 s
    services = {short: 0.02, long: 0.2}
    rate = 0.6 / (0.8 * 0.02 + 0.2 * 0.2)
    second = 0.8 * 0.02**2 + 0.2 * 0.2**2
    expected = rate * second / (2 * (1 - 0.6))
    count, found = 5_000, []
    for _ in range(2):
        prompts = [short] * (count * 8 // 10) + [long] * (count * 2 // 10)
        rng.shuffle(prompts)
        times = stationary_arrivals(count, rate, rng)
        result = serve(times, prompts, model)
        same = lindley(times, [services[n] for n in prompts])
        assert result.mean("waiting_s") == pytest.approx(same, rel=1e-6)
        found.append(result.mean("waiting_s"))
    assert math.fsum(found) / len(found) == pytest.approx(expected, rel=0.1)


def test_littles_law() -> None:
    """Jobs in the system, integrated over time from arrivals and departures, are rate times mean time in it."""
    rng = random.Random(5)
    times = stationary_arrivals(3_000, 8.0, rng)
    policy, roles = create_policy("collocated", 2)
    requests = [SimRequest(f"r{i}", t, rng.randint(1, 400), rng.randint(1, 60)) for i, t in enumerate(times)]
    result = Simulator(policy, roles, LinearTime(0.01, 1e-5), requests, SimConfig()).run()
    changes = sorted(
        [(r.arrival, 1) for r in result.records]
        + [(r.finished, -1) for r in result.records if r.finished is not None]
    )
    area, inside, last = 0.0, 0, changes[0][0]
    for time, change in changes:
        area += inside * (time - last)
        inside, last = inside + change, time
    assert inside == 0
    rate = len(result.completed) / result.duration_s
    assert area / result.duration_s == pytest.approx(rate * result.mean("e2e_s"), rel=1e-9)
    # A busy worker has at least one and at most max_num_seqs sequences in its step.
    assert all(0 < worker.busy_s <= result.duration_s for worker in result.workers)
