"""What the simulator says, with the model that was just fitted: of the requests served, and of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanopd_lab.bench.report import Setting, serving_result
from nanopd_lab.bench.workload import Workload
from nanopd_lab.demo.plan import Machine, MakeWorkload
from nanopd_lab.router import Slo

CURVE = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0)
MAP_RATES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
VARIANTS = {
    "as served": (1.0, 1.0),
    "prompts half as long": (0.5, 1.0),
    "prompts twice as long": (2.0, 1.0),
    "outputs half as long": (1.0, 0.5),
    "outputs twice as long": (1.0, 2.0),
}
REQUESTS = 240  # simulated at each rate and for each cell of the map


@dataclass(frozen=True)
class PaysMap:
    """How much larger the share of requests in time is with `split` than collocated: [variant][rate], -1 to 1."""

    split: str
    rates: tuple[float, ...]
    variants: tuple[str, ...]
    gain: tuple[tuple[float, ...], ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def predicted(machine: Machine, policy: str, workload: Workload, slo: Slo) -> dict[str, Any]:
    """A detailed result of the same kind as a measured one."""
    run = machine.simulate(policy, workload.requests, slo)
    if problems := run.problems():
        raise RuntimeError(f"the simulation lost something: {problems[0]}")
    setting = Setting(
        machine.cost.model, machine.workers, policy, settings={"hardware": machine.cost.device}, modelled=True
    )
    return serving_result(run.records, workload, setting, slo, detailed=True)


def curve(
    machine: Machine,
    policies: Sequence[str],
    make: MakeWorkload,
    rate: float,
    slo: Slo,
    count: int = REQUESTS,
) -> list[dict[str, Any]]:
    """Detailed results at rates from well below to above the one served."""
    loads = [make(share * rate, count) for share in CURVE]
    return [predicted(machine, policy, load, slo) for policy in policies for load in loads]


def pays_map(
    machine: Machine, split: str, make: MakeWorkload, rate: float, slo: Slo, count: int = REQUESTS
) -> PaysMap:
    """Collocated against `split` with other rates and lengths, the same requests for both; promises stay."""
    rates = tuple(share * rate for share in MAP_RATES)
    gain = []
    for prompts, outputs in VARIANTS.values():
        row = []
        for each in rates:
            load = stretched(make(each, count), prompts, outputs)
            first, second = (
                machine.simulate(policy, load.requests, slo).attainment(slo)
                for policy in ("collocated", split)
            )
            row.append(second - first)
        gain.append(tuple(row))
    return PaysMap(split, rates, tuple(VARIANTS), tuple(gain))


def stretched(workload: Workload, prompts: float, outputs: float) -> Workload:
    """The same requests with other lengths, which are at least 1; what they share is left out."""
    return replace(
        workload,
        requests=tuple(
            replace(
                each,
                prompt_tokens=max(1, round(prompts * each.prompt_tokens)),
                output_tokens=max(1, round(outputs * each.output_tokens)),
                prefix_tokens=0,
                hash_ids=(),
            )
            for each in workload.requests
        ),
        prompts=(),
    )
