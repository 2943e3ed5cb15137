"""Policies that look at queues only: collocated, static xPyD, round-robin, least-loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nanopd_lab.core import Route
from nanopd_lab.router.policy import Decision, JobView, Policy, Role, WorkerView, legal_routes


def _prefer(job: JobView, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
    """Without those that failed the job before, if others are left."""
    return [worker for worker in workers if worker.name not in job.avoid] or workers


class Collocated:
    """Every request stays on one worker: the mixed one with the fewest jobs."""

    name = "collocated"

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        mixed = _prefer(job, [worker for worker in workers if worker.role is Role.MIXED])
        if not mixed:
            return None
        best = min(mixed, key=lambda worker: worker.jobs)
        return Decision(Route(best.name, best.name), f"fewest jobs ({best.jobs})")


class Disaggregated:
    """Prefill on the prefill worker with the fewest prompt tokens to do, decode on the one with the fewest outputs.

    This is static xPyD where roles are PREFILL and DECODE; mixed workers serve as both, but a route has two workers.
    """

    name = "disaggregated"

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        decoders = [worker for worker in workers if worker.role.decodes]
        # A source needs somebody else to hand over to.
        sources = _prefer(job, [w for w in workers if w.role.prefills and decoders and decoders != [w]])
        if not sources:
            return None
        source = min(sources, key=lambda worker: (worker.prefill_tokens, worker.jobs))
        targets = _prefer(job, [worker for worker in decoders if worker is not source])
        target = min(targets, key=lambda worker: (worker.decoding, worker.jobs))
        reason = f"{source.prefill_tokens} prompt tokens queued, {target.decoding} decoding"
        return Decision(Route(source.name, target.name), reason)


class RoundRobin:
    """All legal routes in turn, whatever they cost."""

    name = "round-robin"

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        routes = legal_routes(_prefer(job, workers)) or legal_routes(workers)
        if not routes:
            return None
        route = routes[self._turn % len(routes)]
        self._turn += 1
        return Decision(route, "its turn")


class LeastLoaded:
    """The legal route whose two workers have the fewest jobs; collocated where that is level."""

    name = "least-loaded"

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        routes = legal_routes(_prefer(job, workers)) or legal_routes(workers)
        if not routes:
            return None
        load = {worker.name: worker.jobs for worker in workers}

        def cost(route: Route) -> tuple[int, bool]:
            return max(load[route.prefill], load[route.decode]), not route.collocated

        best = min(routes, key=cost)
        return Decision(best, f"{cost(best)[0]} jobs")


POLICIES: dict[str, Callable[[], Policy]] = {
    "collocated": Collocated,
    "disaggregated": Disaggregated,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}


def create_policy(name: str, num_workers: int) -> tuple[Policy, list[Role]]:
    """The policy and the workers' roles; `name` is one of POLICIES, or static xPyD such as "1p2d".

    Raises:
        ValueError: an unknown name, or numbers that don't add up to `num_workers`.
    """
    match = re.fullmatch(r"(\d+)p(\d+)d", name)
    if match:
        prefills, decodes = int(match[1]), int(match[2])
        if prefills < 1 or decodes < 1 or prefills + decodes != num_workers:
            raise ValueError(
                f"policy {name!r} needs {prefills} + {decodes} workers, at least one of each, and there are "
                f"{num_workers}; set workers={prefills + decodes}, or for example policy='1p{num_workers - 1}d'"
            )
        return Disaggregated(), [Role.PREFILL] * prefills + [Role.DECODE] * decodes
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; choose xPyD (as 1p2d) or one of {', '.join(POLICIES)}")
    if name == "disaggregated" and num_workers < 2:
        raise ValueError("policy 'disaggregated' needs 2 workers or more, and there is 1; set workers=2")
    return POLICIES[name](), [Role.MIXED] * num_workers
