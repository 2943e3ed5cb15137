"""The simulator against queueing theory, which knows nothing of schedulers and blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.router import create_policy
from nanopd_lab.sim import ConstantTime, LinearTime, SimConfig, SimRequest, SimResult, Simulator
from nanopd_lab.sim.timing import StepTime

ONE_AT_A_TIME = SimConfig(
    max_num_seqs=1, limits=Limits(heartbeat_s=math.inf, max_jobs=1_000_000), num_blocks=1000
)


def poisson(rng: np.random.Generator, count: int, rate: float) -> np.ndarray:
    """Gaps between arrivals, `[count]`; several calls go on in the same stream."""
    return rng.exponential(1 / rate, count)


def serve(times: list[float], prompts: list[int], model: StepTime) -> SimResult:
    policy, roles = create_policy("collocated", 1)
    requests = [SimRequest(f"r{i}", t, n, 1) for i, (t, n) in enumerate(zip(times, prompts, strict=True))]
    return Simulator(policy, roles, model, requests, ONE_AT_A_TIME).run()


def lindley(gaps: np.ndarray, services: np.ndarray, waiting: float = 0.0) -> np.ndarray:
    """Waiting of each job at a single first-come-first-served server: W' = max(0, W + S - A), `[jobs]`.

    Unrolled, W_n = X_n - min(0, X_1, ..., X_n) where X adds up S - A from the waiting of the first on: two passes and
    no loop. `gaps[i]` and `services[i]` lie between job i and i + 1; `waiting` is job 0's, which is not returned.
    """
    walk = waiting + np.cumsum(services - gaps)
    lowest = np.minimum(np.minimum.accumulate(walk), 0.0)
    found: np.ndarray = walk - lowest
    return found


def long_mean(jobs: int, chunk: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean waiting of `jobs` jobs, from (gaps, services) of a million at a time."""
    waiting, total, size = 0.0, 0.0, 1_000_000
    for _ in range(jobs // size):
        each = lindley(*chunk(size), waiting)
        waiting, total = float(each[-1]), total + float(each.sum())
    return total / jobs


def assert_each_waits_as_lindley_says(gaps: np.ndarray, prompts: list[int], model: StepTime) -> None:
    """Of every single request, to 1e-9 s. The first comes at 0."""
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    result = serve(times.tolist(), prompts, model)
    services = np.array([model.seconds([(0, prompt)]) for prompt in prompts])
    expected = np.concatenate([[0.0], lindley(gaps, services[:-1])])
    found = np.array([record.waiting_s for record in result.records])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert result.problems() == []


@pytest.mark.parametrize(
    ("load", "jobs"), [(0.3, 2_000_000), (0.5, 4_000_000), (0.7, 10_000_000), (0.9, 40_000_000)]
)
def test_mean_waiting_is_that_of_m_d_1(load: float, jobs: int) -> None:
    """W = rho D / (2 (1 - rho)), within 1 %: in two steps, since at a load of 0.9 the mean of what a simulation of
    seconds can serve is itself off by more. Each request of the simulator waits exactly as Lindley's recursion says;
    and over tens of millions of arrivals of the same kind the recursion's mean is the formula's."""
    service = load_model("a100-opt-13b-distserve").iteration.seconds([ChunkShape(512)])
    rng = np.random.default_rng(7)
    assert_each_waits_as_lindley_says(
        poisson(rng, 5_000, load / service), [512] * 5_001, ConstantTime(service)
    )
    mean = long_mean(jobs, lambda n: (poisson(rng, n, load / service), np.full(n, service)))
    assert mean == pytest.approx(load * service / (2 * (1 - load)), rel=0.01)
    # And so DistServe's mean times to a first token, in ms.
    published = {0.3: 87.6, 0.5: 108.3, 0.7: 156.3, 0.9: 397.0}[load]
    assert 1e3 * (service + mean) == pytest.approx(published, rel=0.01)


def test_mean_waiting_is_that_of_m_g_1() -> None:
    """Pollaczek and Khinchine: W = lambda E[S^2] / (2 (1 - rho)), prompts of two lengths, one ten times the other."""
    model, rng, load = LinearTime(0.01, token_s=0.001), np.random.default_rng(3), 0.6
    lengths, share = np.array([10, 190]), [0.8, 0.2]
    services = np.array([model.seconds([(0, int(length))]) for length in lengths])
    rate = load / float(services @ share)
    drawn = rng.choice(lengths, 2_001, p=share).tolist()
    assert_each_waits_as_lindley_says(poisson(rng, 2_000, rate), drawn, model)
    mean = long_mean(
        20_000_000, lambda n: (poisson(rng, n, rate), services[(rng.random(n) >= share[0]).astype(int)])
    )
    assert mean == pytest.approx(rate * float(services**2 @ share) / (2 * (1 - load)), rel=0.01)


def test_littles_law() -> None:
    """Jobs in the system, integrated over time from arrivals and departures, are rate times mean time in it."""
    rng = random.Random(5)
    times = np.cumsum(poisson(np.random.default_rng(5), 3_000, 8.0)).tolist()
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
