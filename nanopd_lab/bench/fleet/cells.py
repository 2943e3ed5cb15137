"""One simulated fleet, from what it is to its figures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nanopd_lab.bench.fleet.machine import SLO, Gpu, requests_of
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.failures import ControllerKill, FailureRate
from nanopd_lab.sim.fleet import FleetConfig, FleetResult, FleetSimulator
from nanopd_lab.sim.front_door import DoorRule
from nanopd_lab.sim.network import Topology
from nanopd_lab.sim.results import RequestRecord, percentile
from nanopd_lab.sim.shard import ControllerTime


@dataclass(frozen=True)
class FleetCell:
    """A fleet and its load.

    rate: requests a second and worker, `seconds` long; those of the first `warm_s` are not judged
    busy: of a controller with as many workers as a shard has
    controller_kill: (time, restart_s) of the first shard's controller

    Raises:
        ValueError: as `FleetConfig`; a rate or a time that is not positive, or nothing left to judge.
    """

    workers: int
    shards: int = 1
    policy: str = "least-loaded"
    rate: float = 6.0
    seconds: float = 2.0
    warm_s: float = 0.5
    seed: int = 0
    workload: str = "code"
    door: DoorRule = field(default_factory=DoorRule)
    busy: ControllerTime = field(default_factory=ControllerTime)
    topology: Topology | None = None
    failures: FailureRate | None = None
    controller_kill: tuple[float, float] | None = None
    failover_s: float = 1.0

    def __post_init__(self) -> None:
        FleetConfig(self.workers, self.shards, failover_s=self.failover_s)
        if not (0 < self.rate < math.inf and 0 <= self.warm_s < self.seconds < math.inf):
            raise ValueError(
                f"rate {self.rate}, {self.seconds} s of which {self.warm_s} warm up; the rate must be positive and "
                "finite, and the warm-up shorter than the whole"
            )
        if self.controller_kill is not None and not all(
            0 <= each < math.inf for each in self.controller_kill
        ):
            when, restart_s = self.controller_kill
            raise ValueError(
                f"a controller dies at {when:g} s and is back {restart_s:g} s later; neither may be negative or endless"
            )


def run_cell(cell: FleetCell, slo: Slo = SLO) -> dict[str, Any]:
    """Simulate it; its settings and figures, as JSON."""
    begun = time.process_time()
    gpu = Gpu.load(slo=slo)
    requests = requests_of(cell.workload, cell.rate * cell.workers, cell.seconds, cell.seed)
    fleet = FleetConfig(
        cell.workers,
        cell.shards,
        cell.door,
        lambda workers: cell.busy,
        cell.topology,
        cell.failover_s,
        slo,
    )
    kills = cell.failures.kills(cell.workers, cell.seconds, cell.seed) if cell.failures else ()
    controllers = (
        [ControllerKill(cell.controller_kill[0], 0, cell.controller_kill[1])] if cell.controller_kill else ()
    )
    simulator = FleetSimulator(
        fleet, gpu.policies(cell.policy), gpu.time, requests, gpu.config, kills, controllers, cell.seed
    )
    found = simulator.run()
    figures = figures_of(found, cell, slo)
    figures["failures"] = len(kills)
    return {"cell": settings_of(cell), **figures, "cpu_s": time.process_time() - begun}


def settings_of(cell: FleetCell) -> dict[str, Any]:
    """A cell as JSON."""
    return asdict(cell) | {"busy": cell.busy._asdict()}


def figures_of(found: FleetResult, cell: FleetCell, slo: Slo) -> dict[str, Any]:
    """What came out, of the requests that are judged. Of one without a first token its age at the end counts, which is
    too little: such percentiles are lower bounds (`censored`)."""
    judged = [record for record in found.result.records if record.arrival >= cell.warm_s]
    if not judged:
        raise ValueError(
            f"none of {len(found.result.records)} requests of {cell.workers} workers at {cell.rate:g} requests/s comes "
            f"after the first {cell.warm_s:g} s; give more --seconds, or less to --warm"
        )
    firsts = sorted(_ttft_s(record, found.ended_s) for record in judged)
    in_time = sum(record.meets(slo) for record in judged)
    waits = sorted(found.waits)
    rate = cell.rate * cell.workers / cell.shards
    again = [record for record in found.result.records if record.path and len(record.path.attempts) > 1]
    decisions = found.result.decisions
    per_request = found.messages / decisions if decisions else 0.0
    return {
        "judged": len(judged),
        "in_time": in_time / len(judged),
        "goodput_per_worker": in_time / (cell.seconds - cell.warm_s) / cell.workers,
        "open": sum(record.finish_reason == "open" for record in judged),
        "censored": sum(record.first_token is None for record in judged),
        **{f"p{percent}_ttft_s": percentile(firsts, percent) for percent in (50, 99)},
        "mean_tpot_s": _mean([record.tpot_s for record in judged if record.tpot_s is not None]),
        "mean_transfer_visible_s": _mean(
            [
                record.path.transfer_visible_s
                for record in judged
                if record.path and record.path.transfer_visible_s is not None
            ]
        ),
        "decisions": decisions,
        "messages_per_request": per_request,
        "mean_wait_s": _mean(found.waits),
        "p99_wait_s": percentile(waits, 99) if waits else math.nan,
        "formula_wait_s": controller_wait_s(rate, cell.busy, per_request),
        "controller_load": rate * (cell.busy.decision_s + per_request * cell.busy.message_s),
        "uneven": max(found.offered) / (sum(found.offered) / cell.shards),
        "retried_requests": len(again),
        "retried_tokens": sum(
            each.known_tokens for record in again if record.path for each in record.path.attempts[1:]
        ),
        "lost_tokens": found.lost_tokens,
        "failed_over": found.failed_over,
        "sent_bytes": found.sent_bytes,
        "virtual_s": found.ended_s,
        "events": found.result.events,
    }  # fmt: skip


def _ttft_s(record: RequestRecord, ended_s: float) -> float:
    return ended_s - record.arrival if record.ttft_s is None else record.ttft_s


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def controller_wait_s(rate: float, busy: ControllerTime, messages: float) -> float | None:
    """How long a request waits for its controller's turn, by formula: requests at `rate` a second, and `messages` for
    each that go first (a queue with two priorities, Cobham 1954; without messages it is M/D/1). None: for ever.

    Messages count as coming at random; they come in answer to decisions, which is more even.
    """
    of_messages = rate * messages * busy.message_s
    load = rate * busy.decision_s + of_messages
    if load >= 1:
        return None
    left = rate * (busy.decision_s**2 + messages * busy.message_s**2) / 2
    return left / ((1 - of_messages) * (1 - load))
