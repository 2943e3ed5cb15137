"""Which layout of so many GPUs serves a workload best: by formula for all of them, by simulation for the best few.

    plan = Plan.make(machine, workload, slo, gpus=8)     # the formulas, see `router.plan`
    plan.simulate(["collocated", "5p3d", "adaptive"])    # the highest rate of each, or what it does at the given one
    plan.best, plan.advice()

A simulation serves requests of the workload's lengths at the rate in question. Those that come while the cluster fills
don't count: what is looked for is what goes on for ever.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nanopd_lab.bench.capacity import find_capacity
from nanopd_lab.bench.climb import saturated
from nanopd_lab.bench.workload import Workload
from nanopd_lab.router import Slo, create_policy
from nanopd_lab.router.layouts import Forecast
from nanopd_lab.router.layouts import Workload as Lengths
from nanopd_lab.router.plan import SHARE, Planner
from nanopd_lab.router.veil import Veiled
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.sim.machine import Machine
from nanopd_lab.sim.results import RequestRecord
from nanopd_lab.sim.simulator import Simulator
from nanopd_lab.sim.workload import SimRequest

FILLING = 0.2  # of the requests come first and do not count
LIVES = 6  # so many times as many requests as are served at once, for a cluster to forget how it began
PATIENCE = 30  # and for so many times as long as a first token may take, for a queue to grow as long
MOST_REQUESTS = 20_000
STEP = 1.07  # between rates that are tried: formulas are off by about as much
TOLERANCE = 0.03


class Simulated(NamedTuple):
    """What a policy did at a rate: the highest with enough of the requests in time, or the one given.

    rate, goodput: requests a second, all and in time; where what is promised leaves room for any queue, as a time per
        token alone does, those that are completed
    attainment: share in time
    ttft_ms, tpot_ms: means
    """

    policy: str
    rate: float
    attainment: float
    goodput: float
    ttft_ms: float
    tpot_ms: float
    requests: int
    completed_per_s: float = math.nan


class _QueueGrows(Exception):  # noqa: N818 - no error
    """All is in time at a rate, a `Simulated`, that is more than the cluster completes."""


class UnreachableError(ValueError):
    """Nobody can be served as promised, at any rate and with any number of GPUs."""


@dataclass
class Plan:
    """See the module; `make` makes one.

    forecasts: of all layouts, best first: at their capacity, or at `rate` if one is given
    simulated: by policy
    """

    machine: Machine
    workload: Workload
    slo: Slo
    gpus: int
    share: float
    rate: float | None
    planner: Planner
    forecasts: list[Forecast]
    simulated: dict[str, Simulated] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        machine: Machine,
        workload: Workload,
        slo: Slo,
        gpus: int,
        rate: float | None = None,
        share: float = SHARE,
    ) -> Plan:
        """By formula only.

        Args:
            rate: requests a second that come; None: ask for the highest
            share: of the requests that must get what they were promised

        Raises:
            UnreachableError: an objective is below the time that a request takes on its own.
            ValueError: no objective, or no GPU.
        """
        if not slo.given:
            raise ValueError(
                "without an objective every layout will do; give one, as --goodput ttft:500 tpot:50"
            )
        if gpus < 1:
            raise ValueError(f"{gpus} GPUs; a plan needs at least 1")
        lengths = Lengths.of(
            [each.prompt_tokens for each in workload.requests],
            [each.output_tokens for each in workload.requests],
        )
        config = machine.config
        planner = Planner(
            machine.outlook(slo),
            lengths,
            max_num_seqs=config.max_num_seqs,
            num_blocks=config.num_blocks,
            ahead=config.ahead,
            share=share,
        )
        _check_reachable(planner, machine)
        return cls(machine, workload, slo, gpus, share, rate, planner, planner.search(gpus, rate))

    # ---- simulation ------------------------------------------------------------------------------------

    def candidates(self, count: int) -> list[str]:
        """Policies worth simulating: of the best layouts by formula, and of mixed workers, to compare with."""
        names = [each.layout.policy for each in self.forecasts[:count]]
        return names if not count or "collocated" in names else [*names, "collocated"]

    def simulate(self, policies: Iterable[str], report: Callable[[Simulated], None] | None = None) -> None:
        """Fill in `simulated`.

        Raises:
            ValueError: an unknown policy.
        """
        for policy in policies:
            found = self._capacity(policy) if self.rate is None else self._serve(policy, self.rate)
            self.simulated[policy] = found
            if report is not None:
                report(found)

    def _capacity(self, policy: str) -> Simulated:
        """The highest rate at which `share` of the requests get what they were promised, from the formulas' on."""
        tried: dict[float, Simulated] = {}
        met: Simulated | None = None
        missed = False

        def attainment(rate: float) -> float:
            nonlocal met, missed
            tried[rate] = now = self._serve(policy, rate)
            missed = missed or now.attainment < self.share
            if not missed:
                if met is not None and saturated(met, now):
                    raise _QueueGrows(now)
                met = now
            return now.attainment

        try:
            found = find_capacity(attainment, self.share, self._start(policy), TOLERANCE, STEP)
        except _QueueGrows as end:
            (last,) = end.args
            most = last.completed_per_s
            return last._replace(rate=most, goodput=most * last.attainment)
        if found.rate:
            return tried[found.rate]
        return tried[found.above]._replace(rate=0.0, goodput=0.0)

    def _start(self, policy: str) -> float:
        """A rate to begin the search with: a layout's by formula, or the best that is known."""
        for each in self.forecasts:
            if each.layout.policy == policy:
                return each.rate or 0.1 * self.planner.ceiling(each.layout)
        return max((each.rate for each in self.simulated.values()), default=0.0) or self.forecasts[0].rate

    def _serve(self, policy: str, rate: float) -> Simulated:
        router, roles = create_policy(policy, self.gpus, self.planner.outlook)
        requests = self._requests(rate)
        result = Simulator(Veiled(router), roles, self.machine.time, requests, self.machine.config).run()
        records = result.records[int(FILLING * len(requests)) :]
        attainment = sum(each.meets(self.slo) for each in records) / len(records)
        ttft, tpot = (
            [value for each in records if (value := getattr(each, name)) is not None]
            for name in ("ttft_s", "tpot_s")
        )
        return Simulated(
            policy,
            rate,
            attainment,
            rate * attainment,
            1e3 * math.fsum(ttft) / len(ttft) if ttft else math.nan,
            1e3 * math.fsum(tpot) / len(tpot) if tpot else math.nan,
            len(requests),
            _completed_per_s(result.records),
        )

    def _requests(self, rate: float) -> list[SimRequest]:
        """Of the workload's lengths, over and over, so many that the cluster gets into its stride."""
        known, arrivals = self.workload.requests, self.workload.arrivals
        if arrivals is None:  # a trace keeps its own times, faster or slower
            faster = self.workload.request_rate / rate
            return [replace(each, arrival=each.arrival * faster) for each in known]
        times = self.planner.times
        step_s = min(self.slo.tpot_s, times.step_s(times.places)[0])
        long_s = max(LIVES * times.mean_gaps * step_s, PATIENCE * min(self.slo.ttft_s, 1.0))
        count = max(len(known), min(MOST_REQUESTS, round(rate * long_s)))
        again = itertools.islice(itertools.cycle(known), count)
        when = Arrivals(rate, arrivals.burstiness).times(
            count, random.Random(f"{self.workload.seed} arrivals")
        )
        return [
            replace(each, request_id=f"r{number}", arrival=at)
            for number, (each, at) in enumerate(zip(again, when, strict=True))
        ]

    # ---- the answer ------------------------------------------------------------------------------------

    @property
    def best(self) -> str:
        """The policy to take: of those simulated, or by formula if none was."""
        if self.simulated:
            key = (lambda each: each.attainment) if self.rate else (lambda each: each.rate)
            return max(self.simulated.values(), key=key).policy
        return self.forecasts[0].layout.policy

    def gpus_needed(self) -> Forecast | None:
        """The smallest number of GPUs that serves the given rate, by formula; None if eight times as many don't."""
        assert self.rate is not None
        for gpus in range(1, 8 * self.gpus + 1):
            found = self.planner.search(gpus, self.rate)[0]
            if found.attainment >= self.share:
                return found
        return None

    def forecast_of(self, policy: str) -> Forecast | None:
        """Of the layout that the policy is, if it is one."""
        return next((each for each in self.forecasts if each.layout.policy == policy), None)


def _completed_per_s(records: Sequence[RequestRecord]) -> float:
    ends = [each.finished for each in records if each.ok and each.finished is not None]
    return len(ends) / (max(ends) - records[0].arrival) if ends else 0.0


def _check_reachable(planner: Planner, machine: Machine) -> None:
    slo, (ttft_s, tpot_s) = planner.outlook.slo, planner.unloaded()
    times: Sequence[tuple[str, float, float, str]] = (
        ("ttft", slo.ttft_s, ttft_s, f"{planner.share:.0%} of the prompts take up to"),
        ("tpot", slo.tpot_s, tpot_s, "a decode step of one sequence takes"),
        ("e2el", slo.e2e_s, ttft_s + planner.times.mean_gaps * tpot_s, "prompt and mean output take"),
    )
    for name, promised, alone, what in times:
        if promised < alone:
            raise UnreachableError(
                f"{name}:{1e3 * promised:g} cannot be met: on {machine.name} {what} {1e3 * alone:.3g} ms with nobody "
                f"else there, {alone / promised - 1:.0%} more; promise {name}:{1e3 * 1.5 * alone:.2g}, or take faster "
                "hardware or a smaller model"
            )
