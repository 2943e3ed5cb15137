"""Plans that give up the dearest requests for the others.

Where more is asked than can be met, it is best to lose those that need most. They wait until all others have ended,
which are served as a static policy does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanopd_lab.core import Route
from nanopd_lab.router import Collocated, Decision, Disaggregated, JobView, Postponed, Role, WorkerView
from nanopd_lab.sim.oracle.bound import work_of
from nanopd_lab.sim.oracle.instance import Instance, LastOnes, Outcome, plan_of

SHARES = (0.03, 0.07, 0.15, 0.3)  # of requests, to give up


class _Triage:
    """`given_up` (numbers of requests, in order of arrival) wait, the others are served with these roles."""

    name = "triage"

    def __init__(self, given_up: Iterable[int], count: int, roles: Sequence[Role]) -> None:
        self._given_up, self._count = frozenset(given_up), count
        self._policy = Collocated() if Role.MIXED in roles else Disaggregated()
        self._roles = {f"w{number}": role for number, role in enumerate(roles)}
        self._next = 0
        self._last = LastOnes()

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        if job.avoid or job.postponed:
            return self._last.choose(job, workers, self._next == self._count)
        if self._next in self._given_up:
            self._next += 1
            return Postponed("given up")
        decision = self._policy.choose(
            job, [worker._replace(role=self._roles[worker.name]) for worker in workers], now
        )
        self._next += decision is not None
        return decision


def triage(
    instance: Instance, prefills: Iterable[int], shares: Iterable[float] = SHARES
) -> dict[str, Outcome]:
    """Outcomes by name, for each number of prefill workers (0: collocated) and each share of requests that is given up.

    Numbers that leave no worker for decode, and shares that give nobody up, are left out.

    Raises:
        ValueError: see `floors_of`.
    """
    total, dearest, found = instance.num_workers, _dearest_first(instance), {}
    for count in prefills:
        if not 0 <= count < total:
            continue
        roles = [Role.PREFILL] * count + [Role.DECODE] * (total - count) if count else [Role.MIXED] * total
        for share in shares:
            given_up = dearest[: round(share * len(dearest))]
            if given_up:
                records = instance.simulate(_Triage(given_up, len(dearest), roles)).records
                plan: list[Route | None] = [*plan_of(records)]
                for number in given_up:
                    plan[number] = None
                name = f"{count}p{total - count}d" if count else "collocated"
                found[f"{name} without {share:.0%}"] = instance.outcome(records, plan)
    return found


def _dearest_first(instance: Instance) -> list[int]:
    """Numbers of the requests: those that cannot be helped, then by the work that they need."""
    work = work_of(instance)
    return sorted(range(len(work)), key=lambda number: -work[number])
