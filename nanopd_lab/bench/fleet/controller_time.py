"""How long a controller takes, measured: its own code, under a load that fills its workers, on this computer.

For each number of workers and policy one simulated cluster is brought to a steady state; then all are run on in turn, a
piece each, so that what slows the computer slows them alike. Timed is the processor's time in `Controller.submit` (a
decision) and in `Controller.handle` (a message of a worker). The workers are simulated, the controller is the real one.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from nanopd_lab.bench.fleet.machine import Gpu, PolicyMaker, requests_of
from nanopd_lab.router.policy import Decision, JobView, Policy, Postponed, Role, WorkerView
from nanopd_lab.router.static import LeastLoaded
from nanopd_lab.sim.fleet import FleetConfig, FleetSimulator
from nanopd_lab.sim.shard import ControllerTime, MakePolicy
from nanopd_lab.sim.simulator import uncollected

SIZES = (8, 64, 256, 1024, 10_000)
POLICIES = ("least-loaded", "adaptive")
_A_MOMENT = ControllerTime(1e-9, 1e-9)  # so that whatever it does passes through `Shard`'s queue


class Round(NamedTuple):
    """One piece: what was done, and the seconds of the processor that it took."""

    decisions: int
    decisions_s: float
    messages: int
    messages_s: float


@dataclass(frozen=True)
class Point:
    """A controller with so many workers. `*_s` are medians of the rounds' means.

    jobs: that a worker had, on average, at the end
    """

    workers: int
    policy: str
    decision_s: float
    message_s: float
    messages_per_request: float
    jobs: float
    rounds: tuple[Round, ...] = ()

    @property
    def decisions_per_s(self) -> float:
        """If it did nothing else."""
        return 1 / self.decision_s

    @property
    def request_s(self) -> float:
        """Of a request, from its decision to the last message."""
        return self.decision_s + self.messages_per_request * self.message_s

    @property
    def requests_per_s(self) -> float:
        """That one controller can take."""
        return 1 / self.request_s

    def record(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self) | {"rounds": [each._asdict() for each in self.rounds]}
        return found | {"decisions_per_s": self.decisions_per_s, "requests_per_s": self.requests_per_s}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Point:
        """From `record`."""
        names = ("workers", "policy", "decision_s", "message_s", "messages_per_request", "jobs")
        return cls(
            **{name: record[name] for name in names}, rounds=tuple(Round(**each) for each in record["rounds"])
        )


class ControllerTimes:
    """A controller's times for any number of workers: between two sizes measured, by logarithms.

    Raises:
        ValueError: no points.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        if not points:
            raise ValueError("no controller was measured; nanopd-lab simulate-fleet --measure does it")
        self.points = sorted(points, key=lambda point: point.workers)

    def of(self, policy: str) -> Callable[[int], ControllerTime]:
        """With one policy; static splits take the time of least-loaded, which asks the same questions.

        Raises:
            ValueError: a policy that was not measured.
        """
        name = "least-loaded" if policy == "half" else policy
        points = [point for point in self.points if point.policy == name]
        if not points:
            known = sorted({point.policy for point in self.points})
            raise ValueError(
                f"no controller with policy {policy!r} was measured; choose {' or '.join(known)}"
            )
        return lambda workers: ControllerTime(
            _between(points, workers, lambda point: point.decision_s),
            _between(points, workers, lambda point: point.message_s),
        )


def _between(points: Sequence[Point], workers: int, value: Callable[[Point], float]) -> float:
    """Of fewer workers than were measured: as of the fewest."""
    if workers > points[-1].workers:
        raise ValueError(
            f"a controller of {workers} workers; the largest that was measured has {points[-1].workers}: take more "
            "shards, or measure it"
        )
    place = bisect_left([point.workers for point in points], workers)
    right = points[place]
    if place == 0 or right.workers == workers:
        return value(right)
    left = points[place - 1]
    part = math.log(workers / left.workers) / math.log(right.workers / left.workers)
    return value(left) ** (1 - part) * value(right) ** part


# ---------------------------------------------------------------------- measuring


class _Warmed:
    """Fewest jobs until it is told to go on by the policy, which has learnt from all outputs meanwhile: a clever policy
    would take minutes to fill ten thousand workers."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name, self.warm = policy, policy.name, False
        self._first = LeastLoaded()
        if (finished := getattr(policy, "finished", None)) is not None:
            self.finished = finished

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        return (self.policy if self.warm else self._first).choose(job, workers, now)


class _Live:
    """A controller under load; `go_on` runs a piece of it."""

    def __init__(
        self, gpu: Gpu, policy: str, workers: int, rate: float, warm_s: float, decisions: int, seed: int
    ) -> None:
        self.workers, self.policy = workers, policy
        self.rounds: list[Round] = []
        self._warmed: _Warmed

        def maker(size: int) -> MakePolicy:
            def make() -> tuple[Policy, list[Role]]:
                chosen, roles = PolicyMaker(policy, gpu.outlook)(size)()
                self._warmed = _Warmed(chosen)
                return self._warmed, roles

            return make

        seconds = warm_s + 1.5 * decisions / (rate * workers)
        requests = requests_of("code", rate * workers, seconds, seed)
        self._fleet = FleetSimulator(
            FleetConfig(workers, busy=lambda size: _A_MOMENT), maker, gpu.time, requests, gpu.config
        )
        (self._shard,) = self._fleet.shards
        self._shard.clock = time.thread_time
        self._fleet.begin()
        self._fleet.go_on(lambda: self._fleet.queue.now >= warm_s)
        self._warmed.warm = True

    def go_on(self, decisions: int, cpu_s: float) -> Round:
        """So many decisions, or fewer if they take too long."""
        shard = self._shard
        shard.submitted, shard.messages, shard.submit_s, shard.handle_s = 0, 0, 0.0, 0.0
        over = self._fleet.go_on(
            lambda: shard.submitted >= decisions or (shard.submitted >= 10 and shard.submit_s > cpu_s)
        )
        if over:
            raise ValueError(f"{self.workers} workers: no requests were left to measure; take fewer rounds")
        lost = _clock_s()
        return Round(
            shard.submitted,
            max(0.0, shard.submit_s - lost * shard.submitted),
            shard.messages,
            max(0.0, shard.handle_s - lost * shard.messages),
        )

    def point(self) -> Point:
        """What was measured."""
        rounds = self.rounds
        return Point(
            self.workers,
            self.policy,
            statistics.median(each.decisions_s / each.decisions for each in rounds),
            statistics.median(each.messages_s / max(1, each.messages) for each in rounds),
            sum(each.messages for each in rounds) / sum(each.decisions for each in rounds),
            self._shard.load / self.workers,
            tuple(rounds),
        )


def _clock_s() -> float:
    """What reading the clock adds to a time."""
    begun = time.thread_time()
    for _ in range(1000):
        time.thread_time()
    return (time.thread_time() - begun) / 1000


def measure(
    sizes: Sequence[int] = SIZES,
    policies: Sequence[str] = POLICIES,
    rounds: int = 5,
    rate: float = 6.0,
    warm_s: float = 1.0,
    decisions: int = 400,
    cpu_s: float = 1.5,
    report: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Measure controllers of these sizes, one after the other in every round.

    Args:
        rate: requests a second and worker
        warm_s: virtual seconds before anything is timed
        decisions, cpu_s: of a round, at most
        report: told of what is done
    """
    gpu = Gpu.load()
    with uncollected():
        live = []
        for workers in sizes:
            for policy in policies:
                live.append(_Live(gpu, policy, workers, rate, warm_s, (rounds + 2) * decisions, seed=0))
                report(f"{workers:,} workers, {policy}: warm")
        for each in live:
            each.go_on(decisions, cpu_s)  # with the policy itself, untimed
        for number in range(rounds):
            for each in live:
                each.rounds.append(each.go_on(decisions, cpu_s))
            report(f"round {number + 1} of {rounds}")
    return [each.point() for each in live]
