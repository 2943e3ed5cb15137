"""`nanopd-lab simulate-fleet`: thousands of workers, several controllers, links and failures, in virtual time."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd_lab.bench.fleet.cells import FleetCell
    from nanopd_lab.bench.fleet.controller_time import ControllerTimes
    from nanopd_lab.sim.shard import ControllerTime

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PARTS = ("saturation-1000", "saturation-10000", "news", "links", "failures")


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "simulate-fleet", help="thousands of workers behind one controller or many, with links and failures"
    )
    add = parser.add_argument
    add("--workers", type=int, default=1000)
    add(
        "--shards",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        help="controllers; workers are divided among them",
    )
    add("--policies", nargs="+", default=["adaptive"], help="least-loaded, adaptive, half (static, 1:1)")
    add("--request-rates", type=float, nargs="+", default=[2.0, 6.0], help="requests a second and worker")
    add("--workload", default="code", help="code or conversation: lengths like those of Azure's traces")
    add("--goodput", nargs="+", default=["ttft:500", "tpot:50"], help="what is promised, ms")
    add("--seconds", type=float, default=2.0, help="virtual, of arrivals")
    add("--warm", type=float, default=0.5, help="of these, that are not judged")
    add("--front-door", default="random", help="random, round-robin, prefix, two-choices or least")
    add(
        "--digest-age",
        type=float,
        default=0.0,
        help="seconds between a shard's reports, which the front door goes by",
    )
    add("--instant", action="store_true", help="controllers take no time; else as long as was measured")
    add("--nic-gbit", type=float, help="a network: of a node of 8 GPUs, Gb/s")
    add("--oversubscription", type=float, default=1.0, help="of a rack's uplink (4 nodes), with --nic-gbit")
    add("--accelerate", type=float, help="GPUs fail so many times as often as in Llama 3's training")
    add("--restart", type=float, default=1.0, help="seconds until a failed worker is back")
    add(
        "--controller-dies", type=float, nargs=2, metavar=("AT", "RESTART"), help="that of the first shard, s"
    )
    add("--failover", type=float, default=1.0, help="seconds until the front door gives a controller up")
    add(
        "--measure",
        action="store_true",
        help="measure controllers on this computer instead of taking recorded times",
    )
    add("--sizes", type=int, nargs="+", help="of controllers to measure, workers")
    add("--rounds", type=int, default=5, help="of measuring")
    add("--study", nargs="*", choices=PARTS, help="the recorded grids instead, or some of them")
    add("--seeds", type=int, default=1)
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    add("--result-filename", type=Path, help="JSON; parts of a study that it has already are kept")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure or read controllers' times, simulate, print, write."""
    from nanopd_lab.bench.fleet.record import SCHEMA, cell_table, controller_table, controllers, load, newest
    from nanopd_lab.bench.fleet.study import Section, run_section, sections
    from nanopd_lab.provenance import provenance
    from nanopd_lab.router.slo import Slo

    if args.seeds < 1 or args.jobs < 1 or args.rounds < 1:
        raise ValueError(f"seeds {args.seeds}, jobs {args.jobs}, rounds {args.rounds}; all must be positive")
    if args.sizes and min(args.sizes) < 1:
        raise ValueError(f"sizes has {min(args.sizes)}; a controller to measure has at least 1 worker")
    path: Path | None = args.result_filename
    begun = time.perf_counter()
    kept = load(path) if path is not None and path.is_file() else {}
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "modelled": True,
        "controllers": [],
        "parts": {},
        "provenance": {},
    } | kept
    if args.measure:
        record["controllers"] = [point.record() for point in _measured(args)]
        record["provenance"]["controllers"] = provenance()
    elif not record["controllers"] and not args.instant:
        recorded = load(newest())
        record["controllers"] = recorded["controllers"]
        record["provenance"]["controllers"] = recorded["provenance"]["controllers"]
    points = controllers(record)
    if points:
        print(controller_table(points))
    wanted: dict[str, Section] = {}
    slo = Slo.parse(args.goodput)
    if args.study is not None:
        every = sections(_times(points))
        wanted = {name: every[name] for name in args.study or PARTS}
    elif not args.measure or args.result_filename is None:
        wanted = {"fleet": Section(tuple(_cells(args, points)), args.seeds)}
    for name, section in wanted.items():
        report = _progress(name) if sys.stderr.isatty() else lambda line: None
        record["parts"][name] = {"slo": str(slo), "rows": run_section(section, args.jobs, slo, report)}
        record["provenance"][name] = provenance()
        print(f"\n{name}: modelled, promised {slo}\n{cell_table(record['parts'][name]['rows'])}")
        _write(record, path)
    _write(record, path)
    print(f"\n{time.perf_counter() - begun:.0f} s in {args.jobs} processes")
    return 0


def _write(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _progress(name: str) -> Any:
    return lambda line: print(f"{name}, {line}", file=sys.stderr)


def _measured(args: argparse.Namespace) -> Any:
    from nanopd_lab.bench.fleet.controller_time import SIZES, measure

    report = _progress("controllers") if sys.stderr.isatty() else lambda line: None
    return measure(tuple(args.sizes or SIZES), rounds=args.rounds, report=report)


def _times(points: Any) -> ControllerTimes:
    from nanopd_lab.bench.fleet.controller_time import ControllerTimes

    return ControllerTimes(points)


def _cells(args: argparse.Namespace, points: Any) -> list[FleetCell]:
    from nanopd_lab.bench.fleet.cells import FleetCell
    from nanopd_lab.sim.failures import FailureRate
    from nanopd_lab.sim.fleet import FleetConfig
    from nanopd_lab.sim.front_door import DoorRule
    from nanopd_lab.sim.network import Topology
    from nanopd_lab.sim.shard import ControllerTime

    for shards in args.shards:
        FleetConfig(args.workers, shards)

    def busy(policy: str, workers: int) -> ControllerTime:
        return ControllerTime() if args.instant else _times(points).of(policy)(workers)

    topology = None
    if args.nic_gbit is not None:
        topology = Topology(nic_bytes_per_s=1.25e8 * args.nic_gbit, oversubscription=args.oversubscription)
    failures = None
    if args.accelerate is not None:
        failures = FailureRate(accelerate=args.accelerate, restart_s=args.restart)
    return [
        FleetCell(
            args.workers,
            shards,
            policy,
            rate,
            args.seconds,
            args.warm,
            workload=args.workload,
            door=DoorRule(args.front_door, args.digest_age),
            busy=busy(policy, -(-args.workers // shards)),
            topology=topology,
            failures=failures,
            controller_kill=tuple(args.controller_dies) if args.controller_dies else None,
            failover_s=args.failover,
        )
        for policy in args.policies
        for shards in args.shards
        for rate in args.request_rates
    ]
