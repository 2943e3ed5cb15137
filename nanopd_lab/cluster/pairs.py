"""Which pair of workers of those that a policy may choose takes the longest sequence.

Both workers of a route must be able to hold all of a sequence, so a pair takes what the smaller of the two takes. Where
pools are alike that is every worker's; where they are not, roles decide who goes with whom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from nanopd_lab.cluster.actions import State
from nanopd_lab.cluster.records import WorkerRecord
from nanopd_lab.router import (
    Collocated,
    Disaggregated,
    LeastLoaded,
    NanoPDRule,
    Policy,
    Role,
    RoundRobin,
    Threshold,
    Veiled,
)
from nanopd_lab.router.pair_rule import ByEstimate

# Whole types: a subclass may do something else. Others may give any worker any role.
_BY_ROLES = (LeastLoaded, RoundRobin, Threshold, NanoPDRule, ByEstimate)


def takes(worker: WorkerRecord) -> float:
    """Tokens of a sequence; infinite before it has told."""
    return math.inf if worker.capacity is None else worker.capacity.longest


class Pair(NamedTuple):
    """A prefill and a decode worker, which may be the same."""

    source: WorkerRecord
    target: WorkerRecord

    @property
    def takes(self) -> float:
        """Tokens of a sequence that both can hold."""
        return min(takes(self.source), takes(self.target))

    @property
    def smaller(self) -> WorkerRecord:
        return min(self, key=takes)


def largest_pair(policy: Policy, workers: Iterable[WorkerRecord]) -> Pair | None:
    """Of the workers that are not gone for good; None if none is left.

    Where roles allow no pair at all, as while they change one by one, the largest worker stands for both.
    """
    left = [worker for worker in workers if worker.state is not State.GONE]
    while isinstance(policy, Veiled):
        policy = policy.policy
    kind, found = type(policy), None
    if kind is Collocated:
        found = _alone(worker for worker in left if worker.role is Role.MIXED)
    elif kind is Disaggregated or kind in _BY_ROLES:
        found = _of_roles(left, apart=kind is Disaggregated)
    return found or _alone(left)


def _alone(workers: Iterable[WorkerRecord]) -> Pair | None:
    largest = _largest(workers)
    return None if largest is None else Pair(largest, largest)


def _largest(workers: Iterable[WorkerRecord]) -> WorkerRecord | None:
    return max(workers, key=takes, default=None)


def _of_roles(workers: list[WorkerRecord], apart: bool) -> Pair | None:
    """`apart`: of two workers."""
    sources = [worker for worker in workers if worker.role.prefills]
    targets = [worker for worker in workers if worker.role.decodes]
    source, target = _largest(sources), _largest(targets)
    if source is None or target is None:
        return None
    if not apart or source is not target:
        return Pair(source, target)
    # The largest is one of the two, whoever the other one is.
    other_source = _largest(worker for worker in sources if worker is not source)
    other_target = _largest(worker for worker in targets if worker is not target)
    pairs = [Pair(other_source, target)] if other_source else []
    pairs += [Pair(source, other_target)] if other_target else []
    return max(pairs, key=lambda pair: pair.takes, default=None)
