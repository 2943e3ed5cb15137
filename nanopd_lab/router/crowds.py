"""What becomes of single requests' times when there are many: steps that are shared, batches that swing, and what
routing to the fewest jobs does to mixed workers. Some of it is fitted to simulations, where it says so.
"""

from __future__ import annotations

from nanopd_lab.router.queueing import Array, Service, mean, wait_power


def shared_services(rate: float, alone: Array, full: Array, servers: int) -> tuple[float, Array]:
    """(load, service times) of workers whose prompts share steps when two of them wait: S = p·full + (1 − p)·alone with
    p the load times the probability to wait, and the load ρ = λE[S]."""
    of_alone, of_full = rate * mean(alone), rate * mean(full)
    if of_full >= 1:
        return of_full, full
    power, load, gain = 1 + wait_power(servers), min(of_alone, 1.0), of_alone - of_full
    for _ in range(4):  # Newton's; ρ + (λA - λF)·ρ^k is convex, so that it comes down from above
        part = load**power
        load -= (load + gain * part - of_alone) / (1 + gain * power * part / load)
    part = load**power
    return load, part * full + (1 - part) * alone


def queued_services(rate: float, services: Array, full: Array) -> tuple[float, Service]:
    """(load, services) of the queue behind a step: steps get fuller with it, half of the way."""
    between = (services + full) / 2
    return rate * mean(between), Service.of(between)


def crowding(jobs: float, workers: int) -> float:
    """How many of those that decode a prompt disturbs, as a part of a mixed worker's mean: it goes where nobody is, as
    long as there is such a worker, and else where there are fewer (half a job fewer, fitted to simulations)."""
    return min(1.0, jobs) ** wait_power(workers) * (1 - 0.5 * (1 - 1 / workers) / max(1.0, jobs))


def blindness(batch: float, workers: int) -> float:
    """How far requests come to a mixed worker as if nobody looked where prompts are computed: 0 to 1.

    Routing to the fewest jobs sees a prompt as one job beside the batch's. How fast that gets lost in larger batches,
    and what follows for waiting, is fitted to simulations and not derived.
    """
    return batch / (batch + 1.2 * (workers - 1)) if workers > 1 else 1.0


def swing_of(batch: float, share: float, workers: int) -> float:
    """Variance of a worker's batch: a shared processor's, B/(1 − share), evened out by routing to the emptiest."""
    whole = batch / max(1 - share, 0.05)
    return whole / workers + 0.5 * min(1.0, batch) * (1 - 1 / workers)
