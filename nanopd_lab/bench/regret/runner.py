"""Runs a grid over several processes, writes after every unit, and goes on where an earlier run ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopd_lab.bench.processes import process_pool
from nanopd_lab.bench.regret.cells import Cell
from nanopd_lab.bench.regret.grid import Bench, run_unit
from nanopd_lab.bench.regret.knee import ATTAINED, knee
from nanopd_lab.sim.oracle import statics

SCHEMA = "nanopd-lab/regret/1"


@dataclass(frozen=True)
class Grid:
    """What is to be run: in every cell with every seed all static policies for its workers, and these.

    find_knee: says how much a load of 1 is
    """

    cells: tuple[Cell, ...]
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    find_knee: Callable[[Bench, Cell], float] = knee

    def policies_of(self, workers: int) -> tuple[str, ...]:
        """In a cell with so many."""
        return tuple(dict.fromkeys([*statics(workers), *self.policies]))


def load(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none, or of another version.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        schema = record.get("schema")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path.name} is no result of `nanopd-lab regret`: {error}") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{path.name} has schema {schema!r}, and this version reads {SCHEMA!r}; run the grid anew"
        )
    return record


def run_grid(
    bench: Bench,
    grid: Grid,
    jobs: int = 1,
    before: dict[str, Any] | None = None,
    trace: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
    progress: bool = True,
) -> dict[str, Any]:
    """All units of the grid; those of `before`, with the policies that it has, are not run again.

    Args:
        trace: name and sha256 of what `bench.trace` was read from
        save: called after every unit

    Raises:
        ValueError: `before` is of other settings or of another trace.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": bench.settings.as_json(),
        "trace": trace,
        "attained_at_knee": ATTAINED,
        "knees": {},
        "units": [],
    }
    if before is not None:
        for key in ("settings", "trace", "attained_at_knee"):
            if before[key] != record[key]:
                raise ValueError(
                    f"the result there is of another {key}: {before[key]}, and now {record[key]}; give another "
                    "--result-filename, or the same flags"
                )
        record |= {key: before[key] for key in ("knees", "units")}
    units = {(_cell(unit), unit["seed"]): unit for unit in record["units"]}
    with _pool(bench, jobs) as pool:
        groups = {cell.group: cell for cell in grid.cells if cell.group not in record["knees"]}
        for group, rate in _all(
            pool, {group: (grid.find_knee, cell) for group, cell in groups.items()}, "knees", progress
        ):
            record["knees"][group] = rate
            save(record)
        todo = {}
        for cell in grid.cells:
            for seed in grid.seeds:
                known, policies = units.get((cell, seed)), grid.policies_of(bench.workers_of(cell))
                if known is None or not {*policies} <= {*known["met"]}:
                    rate = cell.load * record["knees"][cell.group]
                    todo[cell, seed] = (run_unit, cell, rate, seed, policies, known)
        for key, unit in _all(pool, todo, "cells x seeds", progress):
            units[key] = unit
            record["units"] = [units[each] for each in sorted(units, key=lambda each: _place(grid, *each))]
            save(record)
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """Replace the file in one go."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, separators=(",", ":")).replace('},{"cell"', '},\n{"cell"') + "\n")
    part.replace(path)


def _place(grid: Grid, cell: Cell, seed: int) -> tuple[int, str, int]:
    """In the order of the grid; cells of an earlier run that are not in it come last."""
    found = grid.cells.index(cell) if cell in grid.cells else len(grid.cells)
    return found, str(cell), seed


def _cell(unit: dict[str, Any]) -> Cell:
    return Cell(**unit["cell"])


# ---- processes --------------------------------------------------------------------------------------


class _Worker:
    """What a process of the pool keeps between its tasks."""

    bench: Bench


def _begin(bench: Bench) -> None:
    _Worker.bench = bench


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(_Worker.bench, *args)


@contextlib.contextmanager
def _pool(bench: Bench, jobs: int) -> Iterator[ProcessPoolExecutor | Bench]:
    """Processes; or this one, for one job."""
    if jobs == 1:
        yield bench
        return
    with process_pool(jobs, _begin, (bench,)) as pool:
        yield pool


def _all(
    pool: ProcessPoolExecutor | Bench, tasks: dict[Any, tuple[Any, ...]], what: str, progress: bool
) -> Iterator[tuple[Any, Any]]:
    """(key, result) of each task `(function of a bench, further arguments)`, as they end."""
    from tqdm import tqdm

    shown = {"total": len(tasks), "desc": what, "disable": not progress or not tasks}
    if isinstance(pool, Bench):
        for key, (function, *args) in tqdm(tasks.items(), **shown):
            yield key, function(pool, *args)
        return
    futures = {pool.submit(_call, *task): key for key, task in tasks.items()}
    for future in tqdm(as_completed(futures), **shown):
        yield futures[future], future.result()
