"""The rate at which the best static policy begins to fail, by which loads are given: cells near it tell most."""

from __future__ import annotations

from nanopd_lab.bench.regret.cells import Cell
from nanopd_lab.bench.regret.grid import Bench
from nanopd_lab.sim.oracle import statics
from nanopd_lab.sim.oracle.bound import work_of

SEEDS = (1_000_003, 1_000_033, 1_000_037)  # none of those that are judged
ATTAINED = 0.9  # share of requests that the best static policy must serve as promised below the knee
FINENESS = 1.05
MOST = 30.0  # times the first guess, where arrivals are no matter any more
STEP = 1.4  # of the rate, until the knee lies between two


def knee(bench: Bench, cell: Cell) -> float:
    """The highest rate (requests/s) at which a static policy serves ATTAINED of all requests as promised.

    By bisection to a factor of FINENESS, on requests of seeds of their own; the cell's load does not matter.

    Raises:
        ValueError: no rate is low enough, or none too high.
    """
    order = statics(bench.settings.workers)

    def holds(name: str, rate: float) -> bool:
        """True if this policy serves so many; it is not simulated on, once it can't any more."""
        left = (1 - ATTAINED) * bench.settings.num_prompts * len(SEEDS)
        for seed in SEEDS:
            instance = bench.instance(cell, rate, seed)
            left -= len(instance.requests) - bench.serve(instance, cell, name).score.met
            if left < 0:
                return False
        return True

    def held(rate: float) -> bool:
        for name in list(order):
            if holds(name, rate):
                order.remove(name)
                order.insert(0, name)  # likely to be the best at the next rate too
                return True
        return False

    low = high = guess = _guess(bench, cell)
    if held(low):
        while held(high := STEP * high):
            low = high
            if high > MOST * guess:
                raise ValueError(
                    f"{cell.group}: {bench.settings.num_prompts} requests are no load, even all at once; take more "
                    "(--num-prompts), or fewer workers"
                )
    else:
        while not held(low := low / STEP):
            high = low
            if low < 1e-3:
                raise ValueError(
                    f"{cell.group}: no static policy serves {ATTAINED:.0%} of requests as promised at any rate; relax "
                    "the objectives"
                )
    while high / low > FINENESS:
        middle = (low * high) ** 0.5
        if held(middle):
            low = middle
        else:
            high = middle
    return low


def _guess(bench: Bench, cell: Cell) -> float:
    """The rate at which the work that requests need at least is three quarters of what there is."""
    instance = bench.instance(cell, 1.0, SEEDS[0])
    work = [seconds for seconds in work_of(instance) if seconds < float("inf")]
    return 0.75 * instance.num_workers * len(work) / sum(work) if sum(work) > 0 else 1.0
