"""The oracle as a whole: what policies did and triage to start with, then the search."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nanopd_lab.router import Outlook, create_policy
from nanopd_lab.sim.oracle.bound import work_of
from nanopd_lab.sim.oracle.instance import Instance, Outcome, plan_of
from nanopd_lab.sim.oracle.search import Found, search_routes
from nanopd_lab.sim.oracle.triage import triage

BEST_STARTS = 5  # that the search takes pieces of
SIMULATIONS = 50


def statics(num_workers: int) -> list[str]:
    """What an operator would choose from once and for all: collocated, and every xPyD."""
    return ["collocated", *(f"{count}p{num_workers - count}d" for count in range(1, num_workers))]


def is_static(name: str) -> bool:
    """True if it is one of `statics` for some number of workers."""
    return name == "collocated" or (name[:1].isdigit() and name.endswith("d"))


def best_routes(
    instance: Instance, outcomes: Mapping[str, Outcome], simulations: int, seed: int = 0
) -> Found:
    """The best routes that are found from what policies made of the instance; never worse than any of them.

    Args:
        outcomes: by the policies' names, at least one
        simulations, seed: of `search_routes`

    Raises:
        ValueError: as of `search_routes` and `floors_of`.
    """
    starts = dict(sorted(outcomes.items(), key=lambda each: -each[1].score.met)[:BEST_STARTS])
    most = sum(seconds < math.inf for seconds in work_of(instance))
    if max((each.score.met for each in starts.values()), default=0) < most:
        starts |= triage(instance, _prefills(outcomes, instance.num_workers))
    return search_routes(instance, starts, simulations, seed, most)


def _prefills(outcomes: Mapping[str, Outcome], num_workers: int) -> list[int]:
    """Numbers of prefill workers, 0 for none: the best static policy's, and one less, as the dearest are given up."""
    fixed = [name for name in outcomes if is_static(name)]
    best = max(fixed, key=lambda name: outcomes[name].score.met, default="collocated")
    if best == "collocated":
        return [0, num_workers // 2]
    count = int(best.partition("p")[0])
    return [count, count - 1]


def oracle(instance: Instance, outlook: Outlook, simulations: int = SIMULATIONS, seed: int = 0) -> Found:
    """The best routes that are found from all static policies, the least loaded workers and adaptive routing.

    `Planned` repeats them: where a policy put a request off, its route is tried without.

    Raises:
        ValueError: as of `best_routes`.
    """
    outcomes = {}
    for name in (*statics(instance.num_workers), "least-loaded", "adaptive"):
        policy, roles = create_policy(name, instance.num_workers, outlook)
        outcomes[name] = instance.follow(plan_of(instance.simulate(policy, roles).records))
    return best_routes(instance, outcomes, simulations, seed)
