"""The grids that answer: where does one controller saturate, what does dividing it do, what do old news, links and
failures cost? Each is a list of cells, which run in processes of their own and become a row for all their seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nanopd_lab.bench.fleet.cells import FleetCell, run_cell, settings_of
from nanopd_lab.bench.fleet.controller_time import ControllerTimes
from nanopd_lab.bench.fleet.machine import SLO
from nanopd_lab.bench.processes import process_pool
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.failures import FailureRate
from nanopd_lab.sim.front_door import DoorRule
from nanopd_lab.sim.network import Topology

Row = dict[str, Any]
"""`settings` (of the cell, without its seed), `seeds`, `in_time_by_seed`, and the mean of each figure."""


@dataclass(frozen=True)
class Section:
    """Cells that belong together. seeds: of each cell that does not say"""

    cells: tuple[FleetCell, ...]
    seeds: int = 3


def saturation(
    workers: int,
    cases: Iterable[tuple[str, Sequence[int], Sequence[float]]],
    times: ControllerTimes,
    **more: Any,
) -> tuple[FleetCell, ...]:
    """Cells of (policy, shards, rates a worker), each controller as busy as was measured."""
    return tuple(
        FleetCell(workers, shards, policy, rate, busy=times.of(policy)(-(-workers // shards)), **more)
        for policy, every, rates in cases
        for shards in every
        for rate in rates
    )


def sections(times: ControllerTimes) -> dict[str, Section]:
    """All of the study, by name."""
    thousand = (
        ("adaptive", (1, 2, 4, 16), (0.5, 1.0, 2.0, 4.0, 8.0, 12.0)),
        ("least-loaded", (1, 4), (8.0, 12.0, 14.0)),
    )
    ten_thousand = (
        ("adaptive", (1, 16, 64, 256), (0.25, 1.0, 2.0, 4.0)),
        ("least-loaded", (1,), (0.25, 1.0, 1.5, 2.0)),
        ("least-loaded", (4, 16), (1.0, 2.0, 4.0)),
    )
    doors = [DoorRule("random"), DoorRule("round-robin")]
    doors += [DoorRule("two-choices", age) for age in (0.0, 0.05, 0.2, 0.5, 1.0, 2.0)]
    doors += [DoorRule("least", age) for age in (0.0, 0.05, 0.2, 0.5, 1.0)]
    pools = FleetCell(256, 32, "least-loaded", 14.0, seconds=3.0, warm_s=1.0)
    networks = [Topology(oversubscription=ratio) for ratio in (1.0, 2.0, 4.0)] + [
        Topology(nic_bytes_per_s=12.5e9)
    ]
    split = FleetCell(128, 1, "half", 5.0, seconds=1.0, warm_s=0.4)
    fleet = FleetCell(1000, 16, "least-loaded", 6.0, seconds=2.0, busy=times.of("least-loaded")(63))
    often = FailureRate(accelerate=6e5, restart_s=1.0)
    four = replace(fleet, shards=4, busy=times.of("least-loaded")(250))
    return {
        "saturation-1000": Section(saturation(1000, thousand, times), seeds=2),
        "saturation-10000": Section(
            saturation(10_000, ten_thousand, times, seconds=1.0, warm_s=0.4), seeds=1
        ),
        "news": Section(tuple(replace(pools, door=door) for door in doors)),
        "links": Section(
            tuple(
                replace(split, shards=shards, topology=topology)
                for topology in networks
                for shards in (1, 4, 16)
            )
        ),
        "failures": Section(
            (
                fleet,
                replace(fleet, failures=often),
                replace(fleet, controller_kill=(1.0, 1.0)),
                four,
                replace(four, controller_kill=(1.0, 1.0)),
                replace(four, controller_kill=(1.0, 1.0), failover_s=0.2),
            )
        ),
    }


def run_section(
    section: Section, jobs: int = 1, slo: Slo = SLO, report: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Every cell with every seed, in `jobs` processes; a row a cell."""
    tasks = [replace(cell, seed=seed) for cell in section.cells for seed in range(section.seeds)]
    found: list[dict[str, Any]] = []
    for figures in _results(tasks, jobs, slo):
        found.append(figures)
        report(f"{len(found)} of {len(tasks)}: {figures['cpu_s']:.0f} s of CPU")
    return [
        _row(section.cells[place // section.seeds], found[place : place + section.seeds])
        for place in range(0, len(found), section.seeds)
    ]


def _results(tasks: Sequence[FleetCell], jobs: int, slo: Slo) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(partial(run_cell, slo=slo), tasks)
        return
    with process_pool(jobs) as pool:
        yield from pool.map(partial(run_cell, slo=slo), tasks)


def _row(cell: FleetCell, found: Sequence[dict[str, Any]]) -> Row:
    settings = settings_of(cell)
    del settings["seed"]
    row: Row = {
        "settings": settings,
        "seeds": len(found),
        "in_time_by_seed": [each["in_time"] for each in found],
    }
    for name, value in found[0].items():
        if name in ("cell", "sent_bytes"):
            continue
        values = [each[name] for each in found if each[name] is not None]
        row[name] = _short(math.fsum(values) / len(values)) if len(values) == len(found) else None
        if value is not None and isinstance(value, int) and row[name] is not None and len(found) == 1:
            row[name] = value
    row["sent_bytes"] = {kind: _short(size) for kind, size in found[0]["sent_bytes"].items()}
    return row


def _short(value: float) -> float:
    return float(f"{value:.5g}")
