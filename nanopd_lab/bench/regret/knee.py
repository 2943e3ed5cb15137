"""The rate at which the best static policy begins to fail, by which loads are given: cells near it tell most."""

from __future__ import annotations

import random

from nanopd_lab.bench.regret.cells import Cell, lengths_of, work_s
from nanopd_lab.bench.regret.grid import Bench
from nanopd_lab.router.layouts import Workload
from nanopd_lab.router.plan import Planner
from nanopd_lab.sim.oracle import statics
from nanopd_lab.sim.oracle.bound import work_of

SEEDS = (1_000_003, 1_000_033, 1_000_037)  # none of those that are judged
ATTAINED = 0.9  # share of requests that the best static policy must serve as promised below the knee
FINENESS = 1.05
MOST = 30.0  # times the first guess, where arrivals are no matter any more
SAMPLE = 2000  # lengths from which the formulas take their strata
STEP = 1.4  # of the rate, until the knee lies between two


def knee(bench: Bench, cell: Cell) -> float:
    """The highest rate (requests/s) at which a static policy serves ATTAINED of all requests as promised.

    By bisection to a factor of FINENESS, on requests of seeds of their own; the cell's load does not matter.

    Raises:
        ValueError: no rate is low enough, or none too high.
    """
    order = statics(bench.workers_of(cell))

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


def planned_knee(bench: Bench, cell: Cell) -> float:
    """About the same by formula, in milliseconds (`router.plan`); 0 where no layout can do it.

    Raises:
        ValueError: a mix that is read from a trace.
    """
    workers, outlook, config = bench.workers_of(cell), bench.outlook(cell), bench.config(cell)
    rates = []
    model = bench.cost_of(cell).iteration
    for prompts, outputs in (phases := [lengths_of(name) for name in cell.mix.split(">")]):
        rng = random.Random(SEEDS[0])
        drawn = [[float(each.draw(rng)) for _ in range(SAMPLE)] for each in (prompts, outputs)]
        planner = Planner(
            outlook,
            Workload.of(drawn[0], drawn[1]),
            max_num_seqs=config.max_num_seqs,
            num_blocks=config.num_blocks,
            ahead=config.ahead,
            share=ATTAINED,
        )
        rates.append(planner.search(workers)[0].rate)
    # Each phase gets the same time, at rates at which a request's work comes evenly.
    speeds = [1.0 / work_s(model, *lengths) for lengths in phases]
    scale = min(rate / speed for rate, speed in zip(rates, speeds, strict=True))
    return scale * sum(speeds) / len(speeds)


def _guess(bench: Bench, cell: Cell) -> float:
    """The rate at which the work that requests need at least is three quarters of what there is."""
    instance = bench.instance(cell, 1.0, SEEDS[0])
    work = [seconds for seconds in work_of(instance) if seconds < float("inf")]
    return 0.75 * instance.num_workers * len(work) / sum(work) if sum(work) > 0 else 1.0
