"""A routing problem with everything known, and what a list of routes is worth on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanopd_lab.core import Route
from nanopd_lab.router import Decision, JobView, LeastLoaded, Policy, Postponed, Role, Slo, WorkerView
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.results import RequestRecord, SimResult
from nanopd_lab.sim.simulator import Simulator
from nanopd_lab.sim.timing import StepTime
from nanopd_lab.sim.workload import SimRequest, in_order

Plan = tuple[Route | None, ...]
"""A route for every request, in order of arrival; None: it is given up, and waits until all others have ended."""


class Score(NamedTuple):
    """What routing is judged by.

    met:      requests that got what they were promised
    lateness: of the others, the sum of the largest relative excess over an objective (0.2: 20 % too late), each at most
              1, so that it pays to come nearer but not to help those that are hopeless anyway
    """

    met: int
    lateness: float

    def beats(self, other: Score) -> bool:
        """True if more requests are met, or as many with less lateness."""
        return (self.met, -self.lateness) > (other.met, -other.lateness)


class Planned:
    """Follows a plan. A retry, which a plan does not foresee, goes where there are the fewest jobs."""

    name = "planned"

    def __init__(self, plan: Sequence[Route | None]) -> None:
        self._plan = plan
        self._next = 0
        self._last = LastOnes()

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        if job.avoid or job.postponed:
            return self._last.choose(job, workers, self._next == len(self._plan))
        route = self._plan[self._next]
        if route is None:
            self._next += 1
            return Postponed("given up")
        if not {*route} <= {worker.name for worker in workers}:
            return None  # one of them is full: it waits for it
        self._next += 1
        return Decision(route, "planned")


class LastOnes:
    """Routes for retries at once, and for those given up when nobody else is left: where there are the fewest jobs."""

    def __init__(self) -> None:
        self._begun = False
        self._policy = LeastLoaded()

    def choose(
        self, job: JobView, workers: Sequence[WorkerView], all_routed: bool
    ) -> Decision | Postponed | None:
        """`all_routed`: no other request is to come."""
        self._begun |= all_routed and not any(worker.jobs for worker in workers)
        if job.postponed and not self._begun:
            return Postponed("given up")
        return self._policy.choose(job, workers, 0.0)


@dataclass(frozen=True)
class Outcome:
    """What happened on certain routes; `records` and `plan` are in order of arrival."""

    plan: Plan
    records: Sequence[RequestRecord]
    score: Score
    missed: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """Requests and a cluster of equal workers, named w0, w1, …; a route is any ordered pair of them.

    Raises:
        ValueError: no request, worker or objective; a prefix cache or a shared host, for which bounds do not hold; a
            request that every worker refuses.
    """

    requests: tuple[SimRequest, ...]
    num_workers: int
    time: StepTime
    slo: Slo
    config: SimConfig = field(default_factory=SimConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", tuple(in_order(self.requests)))
        if not self.requests or self.num_workers < 1 or not self.slo.given:
            raise ValueError(
                f"{len(self.requests)} requests, {self.num_workers} workers, objectives {str(self.slo) or 'none'!r}; "
                "an instance needs at least one of each"
            )
        if self.config.enable_prefix_caching:
            raise ValueError("an instance with a prefix cache; set enable_prefix_caching=False")
        if self.config.company is not None:
            raise ValueError("an instance of workers that share a host; set company=None")
        longest = self.config.longest
        for request in self.requests:
            if (total := request.prompt_tokens + request.output_tokens) > longest:
                raise ValueError(
                    f"{request.request_id} has {total} tokens and a worker takes {longest}; leave it out, or raise "
                    "num_blocks or max_model_len"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the workers."""
        return tuple(f"w{number}" for number in range(self.num_workers))

    def simulate(self, policy: Policy, roles: Sequence[Role] | None = None) -> SimResult:
        """What a policy makes of it; roles default to mixed ones."""
        roles = roles or [Role.MIXED] * self.num_workers
        return Simulator(policy, roles, self.time, self.requests, self.config).run()

    def follow(self, plan: Sequence[Route | None]) -> Outcome:
        """What a plan makes of it.

        Raises:
            ValueError: the plan has not a route for every request, or names a worker that there is not.
        """
        if len(plan) != len(self.requests) or not {name for route in plan if route for name in route} <= {
            *self.names
        }:
            raise ValueError(
                f"a plan of {len(plan)} routes for {len(self.requests)} requests on {', '.join(self.names)}; give one "
                "for each, over these workers"
            )
        return self.outcome(self.simulate(Planned(plan)).records, plan)

    def outcome(
        self, records: Sequence[RequestRecord], plan: Sequence[Route | None] | None = None
    ) -> Outcome:
        """Of a simulation of it, by whatever policy; the plan, if not given, is the routes that requests took first."""
        plan = plan_of(records) if plan is None else tuple(plan)
        return Outcome(plan, records, self.score(records), self.missed(records))

    def missed(self, records: Sequence[RequestRecord]) -> tuple[int, ...]:
        """Which did not get what they were promised."""
        return tuple(number for number, record in enumerate(records) if not record.meets(self.slo))

    def score(self, records: Sequence[RequestRecord]) -> Score:
        """Of a simulation of it."""
        missed = self.missed(records)
        return Score(len(records) - len(missed), sum(self.excess(records[number]) for number in missed))

    def excess(self, record: RequestRecord) -> float:
        """By how much a request exceeds its objectives, relative to the worst exceeded one; from 0 to 1."""
        if not record.ok or record.ttft_s is None or record.e2e_s is None:
            return 1.0
        times = (record.ttft_s, record.tpot_s or 0.0, record.e2e_s)
        worst = max(time / limit for time, limit in zip(times, self.slo, strict=True))
        return min(1.0, max(0.0, worst - 1.0))


def plan_of(records: Sequence[RequestRecord]) -> tuple[Route, ...]:
    """The routes that requests took at first; one that was refused has the route of the one before it."""
    found: list[Route] = []
    for record in records:
        attempts = record.path.attempts if record.path else []
        found.append(attempts[0].route if attempts else found[-1] if found else Route("w0", "w0"))
    return tuple(found)
