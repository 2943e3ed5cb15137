"""Policies that look at queues only: collocated, static xPyD, round-robin, least-loaded."""

from __future__ import annotations

from collections.abc import Sequence

from nanopd_lab.core import Route
from nanopd_lab.router.fleet import Fleet, least, num_targets
from nanopd_lab.router.policy import Decision, JobView, Role, WorkerView


def _prefer(job: JobView, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
    """Without those that failed the job before, if others are left."""
    if not job.avoid:
        return workers
    return [worker for worker in workers if worker.name not in job.avoid] or workers


def _mixed_jobs(worker: WorkerView) -> int | None:
    return worker.jobs if worker.role is Role.MIXED else None


def _prefilling(worker: WorkerView) -> tuple[int, int] | None:
    return (worker.prefill_tokens, worker.jobs) if worker.role.prefills else None


def _decoding(worker: WorkerView) -> tuple[int, int] | None:
    return (worker.decoding, worker.jobs) if worker.role.decodes else None


def _source_jobs(worker: WorkerView) -> int | None:
    return worker.jobs if worker.role.prefills else None


def _target_jobs(worker: WorkerView) -> int | None:
    return worker.jobs if worker.role.decodes else None


class Collocated:
    """Every request stays on one worker: the mixed one with the fewest jobs."""

    name = "collocated"

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        best = least(_prefer(job, workers), _mixed_jobs) or least(workers, _mixed_jobs)
        if best is None:
            return None
        return Decision(Route(best.name, best.name), f"fewest jobs ({best.jobs})")


class Disaggregated:
    """Prefill on the prefill worker with the fewest prompt tokens to do, decode on the one with the fewest outputs.

    This is static xPyD where roles are PREFILL and DECODE; mixed workers serve as both, but a route has two workers.
    """

    name = "disaggregated"

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        decoder = least(workers, _decoding)
        if decoder is None:
            return None
        if num_targets(workers) == 1:
            # A source needs somebody else to hand over to.
            workers = [worker for worker in workers if worker is not decoder]
            source = least(_prefer(job, workers), _prefilling) or least(workers, _prefilling)
            target: WorkerView | None = decoder
        else:
            source = least(_prefer(job, workers), _prefilling) or least(workers, _prefilling)
            if source is None:
                return None
            if job.avoid or decoder is source:
                target = least(_prefer(job, workers), _decoding, source.name)
                target = target or least(workers, _decoding, source.name)
            else:
                target = decoder
        if source is None or target is None:
            return None
        return Decision(
            Route(source.name, target.name),
            f"{source.prefill_tokens} prompt tokens queued, {target.decoding} decoding",
        )


class RoundRobin:
    """All legal routes in turn, whatever they cost."""

    name = "round-robin"

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        for choice in (_prefer(job, workers), workers):
            if isinstance(choice, Fleet):
                sources, targets = choice.sources, choice.targets
            else:
                sources = [worker.name for worker in choice if worker.role.prefills]
                targets = [worker.name for worker in choice if worker.role.decodes]
            if count := len(sources) * len(targets):
                source, target = divmod(self._turn % count, len(targets))
                self._turn += 1
                return Decision(Route(sources[source], targets[target]), "its turn")
        return None


class LeastLoaded:
    """The legal route whose two workers have the fewest jobs; collocated where that is level."""

    name = "least-loaded"

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        for choice in (_prefer(job, workers), workers):
            source, target = least(choice, _source_jobs), least(choice, _target_jobs)
            if source is None or target is None:
                continue
            # No route can do with less than the busier of the two; one worker alone is best if it has so few.
            jobs, mixed = max(source.jobs, target.jobs), least(choice, _mixed_jobs)
            if mixed is not None and mixed.jobs == jobs:
                source = target = mixed
            return Decision(Route(source.name, target.name), f"{jobs} jobs")
        return None
