"""What a grid says: goodput as a share of the oracle's, and paired differences with intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanopd_lab.bench.regret.cells import Cell
from nanopd_lab.bench.regret.grid import oracle_met
from nanopd_lab.sim.oracle import is_static

Unit = dict[str, Any]
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and the half width of its interval by Student's t; infinite for one value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of values that are independent of one another, such as those of seeds."""
        if len(values) < 2:
            return cls(statistics.fmean(values), math.inf)
        from scipy.special import stdtrit

        quantile = float(stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2))
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}" if self.half < math.inf else f"{self.mean:+.1f}"


def by_cell(record: dict[str, Any]) -> dict[Cell, list[Unit]]:
    """The units of each cell, in the order of the record."""
    found: dict[Cell, list[Unit]] = {}
    for unit in record["units"]:
        found.setdefault(Cell(**unit["cell"]), []).append(unit)
    return found


def best_static(units: Sequence[Unit]) -> str:
    """Of a cell, over all its seeds: what an operator would choose who knew all of that."""
    names = [name for name in units[0]["met"] if is_static(name)]
    return max(names, key=lambda name: sum(unit["met"][name] for unit in units))


def of_oracle(units: Sequence[Unit], met: Callable[[Unit], float]) -> float:
    """Percent of the oracle's goodput, over all seeds; the duration is the same, so that requests are counted."""
    return 100 * sum(map(met, units)) / max(1, sum(map(oracle_met, units)))


def difference(units: Sequence[Unit], name: str, other: str) -> Interval:
    """Goodput of a policy less that of another, in percent of the oracle's, paired by seed."""
    return Interval.of(
        [100 * (unit["met"][name] - unit["met"][other]) / max(1, oracle_met(unit)) for unit in units]
    )


def regret_table(record: dict[str, Any], versus: str | None = None) -> str:
    """Markdown: a row a cell. `versus` is the policy whose difference to the best static one is given.

    The oracle's own column is how much of the bound it reaches: the true regret lies between what is given and that
    much more.
    """
    cells = by_cell(record)
    names = _shown(record)
    versus = versus or next((name for name in names if name == "adaptive"), None)
    others = [name for name in names if ":" not in name]
    heads = ["cell", "load", "req/s", "oracle, % of bound", "best static", *others]
    heads += [f"{versus} − best static, % of oracle"] if versus else []
    rows = []
    for cell, units in cells.items():
        best = best_static(units)
        bounds = sum(unit["oracle"]["bound"] for unit in units if "oracle" in unit)
        bound = 100 * sum(map(oracle_met, units)) / bounds if bounds else math.nan
        row = [cell.group, f"{cell.load:g}", f"{units[0]['rate']:.1f}", f"{bound:.1f}"]
        row += [f"{of_oracle(units, lambda unit: unit['met'][best]):.1f} ({best})"]  # noqa: B023
        row += [f"{of_oracle(units, lambda unit: unit['met'][name]):.1f}" for name in others]  # noqa: B023
        row += [str(difference(units, versus, best))] if versus else []
        rows.append(row)
    return markdown(heads, rows)


def summary_table(record: dict[str, Any]) -> str:
    """Markdown: a row a policy, over all cells: goodput in percent of the oracle's, and behind the best static one."""
    cells = by_cell(record)
    bests = {cell: best_static(units) for cell, units in cells.items()}
    rows = []
    lines = [("best static of each cell", bests)]
    lines += [(name, dict.fromkeys(cells, name)) for name in _shown(record, record["units"])]
    for label, chosen in lines:
        shares, ahead = [], []
        for cell, units in cells.items():
            name = chosen[cell]
            shares.append(of_oracle(units, lambda unit: unit["met"][name]))  # noqa: B023
            ahead.append(difference(units, name, bests[cell]).mean)
        interval = Interval.of(ahead)
        rows.append(
            [
                label,
                f"{statistics.fmean(shares):.1f}",
                f"{100 - statistics.fmean(shares):.1f}",
                f"{min(shares):.1f}",
                "" if label == lines[0][0] else str(interval),
                "" if label == lines[0][0] else f"{min(ahead):+.1f}",
                "" if label == lines[0][0] else f"{sum(each >= -3 for each in ahead)} of {len(ahead)}",
            ]
        )
    heads = ["policy", "% of oracle, mean", "regret, %", "worst cell", "− best static", "worst", "within 3 %"]
    return markdown(heads, rows)


def predictor_table(record: dict[str, Any]) -> str:
    """Markdown: what a policy gains from each predictor, over the cells; empty where only one was run."""
    names = _names(record)
    rows = []
    for name in names:
        base, _, predictor = name.partition(":")
        if not predictor or base not in names:
            continue
        gains = [difference(units, name, base).mean for units in by_cell(record).values()]
        rows.append([base, predictor, str(Interval.of(gains)), f"{min(gains):+.1f} to {max(gains):+.1f}"])
    heads = ["policy", "with", "− with its own predictor, % of oracle", "cells"]
    return markdown(heads, rows) if rows else ""


def _names(record: dict[str, Any]) -> list[str]:
    """Policies that every unit has, in the order of the first."""
    units = record["units"]
    return [name for name in units[0]["met"] if all(name in unit["met"] for unit in units)] if units else []


def _shown(record: dict[str, Any], everywhere: Sequence[Unit] = ()) -> list[str]:
    """Without the xPyD, but for the one that is best over all of `everywhere`."""
    names = _names(record)
    fixed = [name for name in names if is_static(name) and name != "collocated"]
    best = (
        max(fixed, key=lambda name: sum(unit["met"][name] for unit in everywhere), default="")
        if everywhere
        else ""
    )
    return [name for name in names if name not in fixed or name == best]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
