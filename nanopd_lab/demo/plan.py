"""What the demo serves, and what it promises: derived from the fitted model unless somebody says it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nanopd_lab.bench.workload import Workload
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.demo.strategies import routing
from nanopd_lab.router import Slo
from nanopd_lab.sim import LinkModel, SimConfig, SimResult, Simulator
from nanopd_lab.sim.timing import CostTime
from nanopd_lab.sim.workload import SimRequest

IN_TIME = 0.7
TTFT_FACTOR, TPOT_FACTOR = 4.0, 1.5  # of an idle worker's times
PLANNED = 240  # requests that a rate is tried with
MakeWorkload = Callable[[float, int], Workload]  # of a rate and a number of requests


@dataclass(frozen=True)
class Machine:
    """The workers as the simulator sees them: all alike, with the fitted times."""

    cost: CostModel
    workers: int
    config: SimConfig

    @classmethod
    def of(cls, cost: CostModel, workers: int, config: SimConfig) -> Machine:
        """`config` with what the cost model knows of blocks and links."""
        known = replace(
            config,
            block_bytes=int(cost.fit["block_bytes"]),
            block_size=int(cost.fit["block_size"]),
            ahead=bool(cost.fit.get("ahead", False)),
            link=cost.transfer or LinkModel(),
            company=cost.company,
        )
        return cls(cost, workers, known)

    def simulate(self, policy: str, requests: Sequence[SimRequest], slo: Slo) -> SimResult:
        """What the cluster would do with these requests.

        Raises:
            ValueError: as of `create_policy`.
        """
        chosen, roles = routing(policy, self.workers, self.cost, slo, self.config.max_num_batched_tokens)
        return Simulator(chosen, roles, CostTime(self.cost.iteration), requests, self.config).run()


@dataclass(frozen=True)
class Unloaded:
    """Times of an average request on a worker that has nothing else to do, modelled; s."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float

    @classmethod
    def of(cls, machine: Machine, workload: Workload) -> Unloaded:
        """Of the average prompt and output of a workload."""
        prompt = round(statistics.fmean(each.prompt_tokens for each in workload.requests))
        output = round(statistics.fmean(each.output_tokens for each in workload.requests))
        model, budget = machine.cost.iteration, machine.config.max_num_batched_tokens
        starts = range(0, prompt, budget)
        ttft = sum(model.seconds([ChunkShape(min(budget, prompt - start), start)]) for start in starts)
        return cls(prompt, output, ttft, model.decode_seconds(1, prompt + output // 2))

    def objectives(self) -> Slo:
        """Four times the TTFT and half as much again of the TPOT, to two digits: tight enough that neighbours show."""
        return Slo(_two_digits(TTFT_FACTOR * self.ttft_s), _two_digits(TPOT_FACTOR * self.tpot_s))


def telling_rate(
    machine: Machine, policies: Sequence[str], make: MakeWorkload, slo: Slo, share: float = IN_TIME
) -> float:
    """The request rate at which the best of the policies serves `share` of the requests in time, simulated.

    Below, all strategies keep their promises; far above, none does.
    """

    def kept(rate: float) -> bool:
        requests = make(rate, PLANNED).requests
        return any(machine.simulate(policy, requests, slo).attainment(slo) >= share for policy in policies)

    low, high = 0.0, 1.0
    while kept(high) and high < 1e6:
        low, high = high, 2 * high
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return _two_digits((low + high) / 2)


def best_split(machine: Machine, make: MakeWorkload, rate: float, slo: Slo) -> str:
    """The xPyD with most requests in time at this rate, simulated.

    Raises:
        ValueError: fewer than two workers.
    """
    if machine.workers < 2:
        raise ValueError(f"disaggregation needs 2 workers or more, and there is {machine.workers}")
    requests = make(rate, PLANNED).requests
    names = [f"{count}p{machine.workers - count}d" for count in range(1, machine.workers)]
    if len(names) == 1:
        return names[0]
    return max(names, key=lambda name: machine.simulate(name, requests, slo).attainment(slo))


def _two_digits(value: float) -> float:
    return round(value, 1 - math.floor(math.log10(value))) if value > 0 else value
