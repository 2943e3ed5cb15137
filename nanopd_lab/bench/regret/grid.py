"""One cell with one seed: every policy on the same requests, the oracle on them, and the bound over all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanopd_lab.bench.regret.cells import Cell, requests_of
from nanopd_lab.bench.regret.contenders import contender
from nanopd_lab.bench.regret.machines import machine_cost
from nanopd_lab.cost.files import CostModel
from nanopd_lab.router import Outlook, Slo
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.links import LinkModel
from nanopd_lab.sim.oracle import Instance, Outcome, best_routes, upper_bound
from nanopd_lab.sim.timing import CostTime
from nanopd_lab.sim.workload import SimRequest

BEST_STARTS = 5  # outcomes that the search takes pieces of


@dataclass(frozen=True)
class Settings:
    """What all cells have in common.

    cost_model:  its name in data/hardware, or a file
    simulations: what the oracle may simulate, see `search_routes`; 0: neither search nor
                 bound, the best policy stands for it
    """

    cost_model: str = "h100-qwen3-8b"
    workers: int = 8
    num_prompts: int = 2000
    simulations: int = 60
    num_blocks: int = 20_000
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """The settings with what they name loaded; `trace` is what the mix of this name is taken from."""

    settings: Settings
    cost: CostModel
    trace: tuple[SimRequest, ...] = ()

    def cost_of(self, cell: Cell) -> CostModel:
        """Of the cell's machine."""
        return machine_cost(cell.machine) if cell.machine else self.cost

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output, that a worker of the settings takes."""
        return self.config(Cell("chat", "steady", "", None, 1.0)).longest

    def workers_of(self, cell: Cell) -> int:
        """In the cell."""
        return cell.workers or self.settings.workers

    def instance(self, cell: Cell, rate: float, seed: int) -> Instance:
        """The cell's routing problem."""
        settings, cost = self.settings, self.cost_of(cell)
        requests = requests_of(cell, rate, settings.num_prompts, seed, cost.iteration, self.trace)
        slo = Slo.parse(cell.slo.split())
        workers = self.workers_of(cell)
        return Instance(tuple(requests), workers, CostTime(cost.iteration), slo, self.config(cell))

    def config(self, cell: Cell) -> SimConfig:
        """The cell's workers."""
        settings, fit = self.settings, self.cost_of(cell).fit
        return SimConfig(
            num_blocks=int(fit.get("num_blocks", settings.num_blocks)),
            block_size=int(fit.get("block_size", 16)),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            block_bytes=int(fit.get("block_bytes", 0)),
            ahead=bool(fit.get("ahead", False)),
            link=self._link(cell),
        )

    def outlook(self, cell: Cell) -> Outlook:
        """What policies that estimate are told."""
        slo = Slo.parse(cell.slo.split())
        told = Outlook.of(self.cost_of(cell), slo, self.settings.max_num_batched_tokens)
        return replace(told, transfer=self._link(cell))

    def serve(self, instance: Instance, cell: Cell, name: str) -> Outcome:
        """What a policy makes of it.

        Raises:
            RuntimeError: the simulation lost something.
        """
        policy, roles = contender(name, self.workers_of(cell), self.outlook(cell))
        result = instance.simulate(policy, roles)
        if problems := result.problems():
            raise RuntimeError(f"{name} in {cell}: the simulation lost something: {problems[0]}")
        return instance.outcome(result.records)

    def _link(self, cell: Cell) -> LinkModel:
        found = self.cost_of(cell).transfer
        setup_s, block_s, own = (
            (found.setup_s, found.block_s, found.bytes_per_s) if found else (0.0, 0.0, float("inf"))
        )
        return LinkModel(setup_s, block_s, own if cell.link_gbs is None else 1e9 * cell.link_gbs)


def run_unit(
    bench: Bench,
    cell: Cell,
    rate: float,
    seed: int,
    policies: Sequence[str],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A cell with one seed, as JSON. `before` is what is known of it already: only policies that it lacks are run."""
    instance = bench.instance(cell, rate, seed)
    met: dict[str, int] = dict(before["met"]) if before else {}
    outcomes: dict[str, Outcome] = {}
    for name in policies:
        if name not in met:
            outcomes[name] = bench.serve(instance, cell, name)
            met[name] = outcomes[name].score.met
    unit: dict[str, Any] = {"cell": cell._asdict(), "seed": seed, "rate": rate, "met": met}
    unit["requests"] = len(instance.requests)
    if bench.settings.simulations:
        unit["oracle"] = dict(before["oracle"]) if before else _oracle(bench, instance, outcomes, seed)
    return unit


def _oracle(bench: Bench, instance: Instance, outcomes: Mapping[str, Outcome], seed: int) -> dict[str, Any]:
    """Found and bound; see `sim.oracle`."""
    begun = time.perf_counter()
    found = best_routes(instance, outcomes, bench.settings.simulations, seed)
    searched = time.perf_counter()
    bound = upper_bound(instance, found.met)
    return {
        "found": found.met,
        "start": found.start,
        "started": found.started,
        "simulations": round(found.effort, 1),
        "search_s": round(searched - begun, 2),
        "bound": bound.met,
        "possible": bound.possible,
        "bound_s": round(time.perf_counter() - searched, 2),
    }


def oracle_met(unit: Mapping[str, Any]) -> int:
    """Requests served as promised by the best routing known: the search's, or a policy's."""
    return max([*unit["met"].values(), unit.get("oracle", {}).get("found", 0)])
