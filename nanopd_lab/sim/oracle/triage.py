"""Plans that give up the dearest requests for the others: what hindsight can do that no policy does.

Where more is asked than can be met, it is best to lose those that need most. They all go to one worker, and the others
are served by the other workers as a policy does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanopd_lab.core import Route
from nanopd_lab.router import Collocated, Decision, Disaggregated, JobView, Policy, Role, WorkerView
from nanopd_lab.sim.oracle.bound import work_of
from nanopd_lab.sim.oracle.instance import Instance, Outcome

SHARES = (0.03, 0.07, 0.15, 0.3)  # of requests, to give up


class _Triage:
    """`given_up` (numbers of requests, in order of arrival) go to the last worker, the others to the other workers."""

    name = "triage"

    def __init__(self, given_up: Iterable[int], policy: Policy, roles: Sequence[Role], last: str) -> None:
        self._given_up, self._policy, self._last = frozenset(given_up), policy, last
        self._roles = {f"w{number}": role for number, role in enumerate(roles)}
        self._next = 0

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        others = [
            worker._replace(role=self._roles[worker.name]) for worker in workers if worker.name in self._roles
        ]
        if job.avoid:
            return self._policy.choose(job, others, now)
        if self._next in self._given_up:
            self._next += 1
            return Decision(Route(self._last, self._last), "given up")
        decision = self._policy.choose(job, others, now)
        self._next += decision is not None
        return decision


def triage(
    instance: Instance, prefills: Iterable[int], shares: Iterable[float] = SHARES
) -> dict[str, Outcome]:
    """Outcomes by name, for each number of prefill workers (0: collocated) and each share of requests that is given up.

    Of n workers one is for those; the others are so many for prefill, and the rest for decode. What leaves no worker
    for one of the two is left out, and so are shares that give nobody up.

    Raises:
        ValueError: see `floors_of`.
    """
    others, dearest = instance.num_workers - 1, _dearest_first(instance)
    found: dict[str, Outcome] = {}
    for count in prefills:
        if not (0 < count < others or (count == 0 and others > 0)):
            continue
        roles = [Role.PREFILL] * count + [Role.DECODE] * (others - count) if count else [Role.MIXED] * others
        for share in shares:
            given_up = dearest[: round(share * len(dearest))]
            if given_up:
                policy = _Triage(
                    given_up, Disaggregated() if count else Collocated(), roles, instance.names[-1]
                )
                name = f"{count}p{others - count}d" if count else f"{others} collocated"
                found[f"{name} without {share:.0%}"] = instance.outcome(instance.simulate(policy).records)
    return found


def _dearest_first(instance: Instance) -> list[int]:
    """Numbers of the requests: those that cannot be helped, then by the work that they need."""
    work = work_of(instance)
    return sorted(range(len(work)), key=lambda number: -work[number])
