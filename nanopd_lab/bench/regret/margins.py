"""How far a policy is ahead of the best fixed one of each cell, as a distribution over cells.

Fixed is what an operator could have chosen instead, once and for all: collocated, every xPyD, and the simple rules. A
cell's difference is in percent of the best fixed policy's goodput, paired by seed on the same arrivals. The best is
chosen with hindsight, by the same seeds, so that it is flattered a little.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from nanopd_lab.bench.regret.cells import Cell
from nanopd_lab.bench.regret.tables import Interval, Unit, best_static, by_cell, markdown

TOLERATED = -3.0  # percent


class Margin(NamedTuple):
    """Of one cell: `ahead` of `best`, %, which serves `served` % of the requests as promised."""

    cell: Cell
    best: str
    served: float
    ahead: Interval


def best_fixed(units: Sequence[Unit]) -> str:
    """Of a cell, over all its seeds."""
    names = [name for name in units[0]["met"] if not name.startswith("adaptive")]
    return max(names, key=lambda name: sum(unit["met"][name] for unit in units))


def margins(record: dict[str, Any], versus: str = "adaptive", layouts_only: bool = False) -> list[Margin]:
    """Of all cells, the worst first.

    Args:
        layouts_only: beside collocated and xPyD only
    """
    found = []
    for cell, units in by_cell(record).items():
        best = best_static(units) if layouts_only else best_fixed(units)
        mean = max(1.0, statistics.fmean(unit["met"][best] for unit in units))
        ahead = Interval.of([100 * (unit["met"][versus] - unit["met"][best]) / mean for unit in units])
        served = 100 * mean / units[0]["requests"]
        found.append(Margin(cell, best, served, ahead))
    return sorted(found, key=lambda each: each.ahead.mean)


def margin_table(record: dict[str, Any], versus: str = "adaptive", rows: int = 12) -> str:
    """Markdown: the distribution, and the worst cells."""
    found = margins(record, versus)
    lines = []
    for label, layouts_only in (("of all fixed policies", False), ("of collocated and xPyD", True)):
        values = [each.ahead.mean for each in margins(record, versus, layouts_only)]
        for kind, wanted in (("", None), (", steady", True), (", varying", False)):
            some = [
                each.ahead.mean
                for each in margins(record, versus, layouts_only)
                if wanted is None or is_steady(each.cell) is wanted
            ]
            if some and (wanted is None or len(some) < len(values)):
                lines.append([label + kind, str(len(some)), *_distribution(some)])
    heads = [f"{versus} − best", "cells", "worst", "p5", "median", "mean", "under −3 %", "ahead"]
    worst = [[str(each.cell), f"{each.best} ({each.served:.0f} %)", str(each.ahead)] for each in found[:rows]]
    return "\n\n".join(
        [markdown(heads, lines), markdown(["worst cells", "best fixed (in time)", "%"], worst)]
    )


def is_steady(cell: Cell) -> bool:
    """True if its load and its mix do not change."""
    return cell.shape == "steady" and ">" not in cell.mix and cell.mix != "trace"


def _distribution(values: Sequence[float]) -> list[str]:
    ordered = sorted(values)
    p5 = ordered[int(0.05 * len(ordered))]
    figures = [ordered[0], p5, statistics.median(ordered), statistics.fmean(ordered)]
    low, ahead = sum(each < TOLERATED for each in values), sum(each > 0 for each in values)
    return [*(f"{each:+.1f}" for each in figures), str(low), str(ahead)]
