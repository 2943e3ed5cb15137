"""The best routes of a tiny instance: all of them are tried."""

from __future__ import annotations

from collections.abc import Iterator

from nanopd_lab.core import Route
from nanopd_lab.sim.oracle.instance import Instance, Outcome, Plan

MOST_PLANS = 200_000


def plans(names: tuple[str, ...], count: int, symmetric: bool = True) -> Iterator[Plan]:
    """All plans for `count` requests.

    Workers are alike, so of plans that differ in the workers' names only one is needed: the one that takes an unused
    worker in the order of `names` (restricted growth, as of set partitions).

    Args:
        symmetric: leave those out
    """

    def extend(plan: Plan, used: int) -> Iterator[Plan]:
        if len(plan) == count:
            yield plan
            return
        for source in range(min(used + 1, len(names)) if symmetric else len(names)):
            after = max(used, source + 1)
            for target in range(min(after + 1, len(names)) if symmetric else len(names)):
                yield from extend((*plan, Route(names[source], names[target])), max(after, target + 1))
        yield from extend((*plan, None), used)

    return extend((), 0)


def count_plans(num_workers: int, count: int) -> int:
    """How many `plans` has, without making them."""

    def one_worker(ways: dict[int, int]) -> dict[int, int]:
        after: dict[int, int] = {}
        for used, number in ways.items():
            if used:
                after[used] = after.get(used, 0) + used * number
            if used < num_workers:
                after[used + 1] = after.get(used + 1, 0) + number
        return after

    ways = {0: 1}  # by the number of workers in use
    for _ in range(count):
        given_up, ways = ways, one_worker(one_worker(ways))
        ways = {used: ways.get(used, 0) + given_up.get(used, 0) for used in {*ways, *given_up}}
    return sum(ways.values())


def enumerate_routes(instance: Instance, symmetric: bool = True) -> Outcome:
    """The best plan of all, the first of equal ones.

    Raises:
        ValueError: there are more than MOST_PLANS plans.
    """
    count = len(instance.requests)
    number = count_plans(instance.num_workers, count) if symmetric else (instance.num_workers**2 + 1) ** count
    if number > MOST_PLANS:
        raise ValueError(
            f"{count} requests on {instance.num_workers} workers have {number:,} plans, more than {MOST_PLANS:,}; use "
            "search_routes and upper_bound"
        )
    best: Outcome | None = None
    for plan in plans(instance.names, count, symmetric):
        outcome = instance.follow(plan)
        if best is None or outcome.score.beats(best.score):
            best = outcome
        if not best.missed:
            break
    assert best is not None
    return best
