"""All that a demo has found: what figures and page are made of, and what its JSON says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.steps_pace import Pace
from nanopd_lab.cost.files import CostModel
from nanopd_lab.demo.plan import Unloaded
from nanopd_lab.demo.predict import PaysMap
from nanopd_lab.demo.strategies import ADAPTIVE
from nanopd_lab.demo.verdict import Comparison, Row, compare, row_of
from nanopd_lab.provenance import provenance
from nanopd_lab.router import Slo

SCHEMA = "nanopd-lab/demo/1"
Result = Mapping[str, Any]


@dataclass
class Outcome:
    """See the module; lists grow while the demo runs.

    policies:   that were to be measured
    notes:      how rate and objectives came about
    measured, simulated: detailed results, of the same requests
    curve:      simulated results at other rates
    problem:    what ended it before its time
    """

    model: str
    workers: int
    policies: Sequence[str]
    cost: CostModel
    slo: Slo
    rate: float
    unloaded: Unloaded
    notes: Sequence[str]
    profiled: bool
    measured: list[dict[str, Any]] = field(default_factory=list)
    simulated: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    pays: PaysMap | None = None
    problem: str | None = None

    @property
    def partial(self) -> bool:
        """True if anything that was to be measured is not, or not wholly."""
        whole = [result for result in self.measured if not result["partial"]]
        return self.problem is not None or len(whole) < len(self.policies)

    def tables(self, simulated: bool = False) -> dict[str, RequestTable]:
        """The requests by policy, of runs in which any came to an end."""
        found = {}
        for result in self.simulated if simulated else self.measured:
            table = RequestTable.of(result)
            if table.judged.any():
                found[table.policy] = table
        return found

    def rows(self, simulated: bool = False) -> list[Row]:
        """The table of strategies."""
        partial = {result["pd"]["policy"]: bool(result["partial"]) for result in self.measured}
        return [
            row_of(table, self.slo, not simulated and partial[name])
            for name, table in self.tables(simulated).items()
        ]

    def comparisons(self, simulated: bool = False) -> list[Comparison]:
        """Every strategy with the first one, and what adapts with each before it."""
        tables = list(self.tables(simulated).values())
        pairs = [
            (tables[i], tables[j])
            for i in range(len(tables))
            for j in range(i)
            if j == 0 or tables[i].policy == ADAPTIVE
        ]
        return [found for better, than in pairs if (found := compare(better, than, self.slo))]

    def paces(self) -> dict[str, Pace]:
        """How many times as long as by the cost model steps took, by policy, of whole runs."""
        return {
            result["pd"]["policy"]: Pace(**pace)
            for result in self.measured
            if (pace := result["pd"].get("pace")) is not None
        }

    def pairs(self) -> list[tuple[Result, Result]]:
        """Whole measured runs beside the simulation of the same requests."""
        modelled = {result["pd"]["policy"]: result for result in self.simulated}
        return [
            (result, modelled[name])
            for result in self.measured
            if (name := result["pd"]["policy"]) in modelled and not result["partial"]
        ]

    def as_json(self) -> dict[str, Any]:
        """Without the requests, which are in files of their own."""
        return {
            "schema": SCHEMA,
            "partial": self.partial,
            "problem": self.problem,
            "model": self.model,
            "workers": self.workers,
            "policies": list(self.policies),
            "request_rate": self.rate,
            "goodput": str(self.slo),
            "notes": list(self.notes),
            "profiled": self.profiled,
            "cost_model": self.cost.to_record(),
            "paces": {policy: pace._asdict() for policy, pace in self.paces().items()},
            "measured": [row._asdict() for row in self.rows()],
            "simulated": [row._asdict() for row in self.rows(simulated=True)],
            "comparisons": [each._asdict() for each in self.comparisons()],
            "pays": self.pays.as_json() if self.pays else None,
            "provenance": provenance(),
        }
