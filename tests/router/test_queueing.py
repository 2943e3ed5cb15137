"""Waiting by formula against theory: exact results where there are any, and a brute-force queue."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from nanopd_lab.router.queueing import Service, normal_below, sum_below, waiting


@pytest.mark.parametrize(("load", "ttft_ms"), [(0.3, 87.6), (0.5, 108.3), (0.7, 156.3), (0.9, 397.0)])
def test_md1_mean_is_distserves(load: float, ttft_ms: float) -> None:
    """REFERENCES, section 2: DistServe's OPT-13B at 512 tokens takes 72.1 ms; D + ρD/(2(1 - ρ))."""
    step = 72.14e-3
    found = waiting(1, load, Service(step, step**2, step**3))
    assert step + found.overall_s == pytest.approx(ttft_ms / 1e3, rel=2e-3)


def test_one_exponential_server_is_exact() -> None:
    """M/M/1: P(W > t) = ρ·exp(-(1 - ρ)t/E[S]); the gamma distribution of its moments is that exponential one."""
    found = waiting(1, 0.6, Service(1.0, 2.0, 6.0))
    assert found.probability == pytest.approx(0.6)
    assert (found.mean_s, found.variance_s2) == pytest.approx((2.5, 2.5**2))
    times = np.array([0.0, 1.0, 3.0, 8.0])
    assert found.within(times)[1:] == pytest.approx(1 - 0.6 * np.exp(-0.4 * times[1:]), abs=0.01)


def test_md1_tail_is_erlangs() -> None:
    """P(W <= t) of M/D/1 by Erlang's sum (exact), at D = 1."""
    for load in (0.3, 0.6, 0.8):
        times = np.array([0.5, 1.3, 2.2, 4.0])
        exact = [
            (1 - load)
            * sum(
                (load * (k - t)) ** k / math.factorial(k) * math.exp(-load * (k - t))
                for k in range(math.floor(t) + 1)
            )
            for t in times
        ]
        assert waiting(1, load, Service(1.0, 1.0, 1.0)).within(times) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("servers", [2, 5, 12])
@pytest.mark.parametrize("load", [0.5, 0.8, 0.92])
def test_many_servers_as_a_queue_that_is_played(servers: int, load: float) -> None:
    """First come, first served by the first that is free, log-normal services: means within a tenth of a service."""
    rng = np.random.default_rng(5)
    count = 200_000
    services = rng.lognormal(0.0, 0.5, count)
    services /= services.mean()
    arrivals = np.cumsum(rng.exponential(1 / (load * servers), count))
    free, waited = [0.0] * servers, np.empty(count)
    for number, (now, service) in enumerate(zip(arrivals.tolist(), services.tolist(), strict=True)):
        start = max(now, free[0])
        heapq.heapreplace(free, start + service)
        waited[number] = start - now
    found = waiting(servers, load, Service.of(services))
    assert found.overall_s == pytest.approx(float(waited.mean()), abs=0.1)
    for limit in (0.5, 1.0):
        assert float(found.within(np.array(limit))) == pytest.approx(
            float((waited <= limit).mean()), abs=0.05
        )


def test_a_full_server_lets_everybody_wait_for_ever() -> None:
    found = waiting(3, 1.0, Service(1.0, 1.0, 1.0))
    assert found.overall_s == math.inf
    assert not found.within(np.array([1e9])).any()


def test_nobody_waits_without_load_and_nothing_meets_a_negative_limit() -> None:
    for load in (0.0, 0.5):
        within = waiting(1, load, Service(1.0, 1.0, 1.0)).within(np.array([-1.0, 1e6]))
        assert within == pytest.approx([0.0, 1.0])


def test_normal_and_gamma_below_a_limit() -> None:
    """Φ from the error function; a gamma of shape 4 by its closed form."""
    z = np.linspace(-4, 4, 33)
    exact = [0.5 * (1 + math.erf(each / math.sqrt(2))) for each in z]
    assert normal_below(z) == pytest.approx(exact, abs=2e-4)
    limits = np.array([1.0, 3.0, 4.0, 6.0, 9.0])
    exact = [1 - math.exp(-x) * sum(x**k / math.factorial(k) for k in range(4)) for x in limits]
    assert sum_below(limits, 4.0, 4.0) == pytest.approx(exact, abs=5e-3)
    assert sum_below(limits, 4.0, 0.0) == pytest.approx([0, 0, 0.5, 1, 1])
