"""`nanopd-lab regret`: how far each routing policy stays behind the best routes in hindsight."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd_lab.bench.regret.cells import Cell
    from nanopd_lab.bench.regret.grid import Settings

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MACHINES = ("h100-qwen3-8b", "h200-qwen3-8b", "h20", "rtx-4090", "a100")
POLICIES = ("least-loaded", "round-robin", "threshold", "nanopd", "adaptive")
PREDICTORS = ("adaptive:mean", "adaptive:constant", "adaptive:truth")
SLOS = ("ttft:500 tpot:12", "ttft:1500 tpot:8")
MORE = (
    "chat/ramp",
    "chat/bursts",
    "prefill-heavy>decode-heavy/steady",
    "chat/steady/12.5",
    "prefill-heavy/steady/12.5",
)
QUICK = {
    "workers": 4,
    "num_prompts": 120,
    "simulations": 16,
    "loads": [1.0],
    "mixes": ["chat"],
    "links": ["own"],
}


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "regret", help="routing policies beside the best routes in hindsight, over a grid of simulated cells"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a result's tables, and run nothing")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small grid, in less than a minute, but for what other flags say",
    )
    parser.add_argument(
        "--cost-model", default="h100-qwen3-8b", help="a name in data/hardware, or a file of `fit`"
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--num-prompts",
        type=int,
        default=2000,
        help="requests of a cell, for each seed; a few hundred are over before most outputs have ended",
    )
    parser.add_argument("--seeds", type=int, default=3, help="so many, from 0 on")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[*POLICIES, *PREDICTORS],
        metavar="NAME[:PREDICTOR]",
        help="beside all static ones; with a predictor of bayesian, mean, constant or truth",
    )
    parser.add_argument("--mixes", nargs="+", default=["chat", "prefill-heavy", "decode-heavy"])
    parser.add_argument(
        "--slos", nargs="+", default=list(SLOS), metavar="'NAME:MS ...'", help="each as of --goodput"
    )
    parser.add_argument(
        "--links", nargs="+", default=["own"], help="GB/s of a worker's card; own: the cost model's"
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        type=float,
        default=[0.8, 1.1],
        help="arrival rates, by the highest at which a static policy serves 90 %% of requests as promised",
    )
    parser.add_argument(
        "--more",
        nargs="*",
        default=list(MORE),
        metavar="MIX/SHAPE[/LINK]",
        help="further cells, with the first of --slos and --links: load that varies (ramp, bursts), a mix that shifts "
        "(one>another), steady with another link",
    )
    parser.add_argument(
        "--trace", type=Path, help="recorded requests: a cell more, with their bursts and lengths"
    )
    parser.add_argument(
        "--simulations",
        type=int,
        default=15,
        help="of a cell, that the oracle may make; 0: it is the best policy, without a bound",
    )
    parser.add_argument(
        "--random-cells",
        type=int,
        default=0,
        metavar="N",
        help="instead of the grid so many cells drawn at random, without the oracle; loads by the planner's formulas",
    )
    parser.add_argument("--cell-seed", type=int, default=0, help="of random cells")
    parser.add_argument(
        "--machines", nargs="+", default=list(MACHINES), help="of random cells: cost models or devices"
    )
    parser.add_argument("--num-blocks", type=int, default=20_000, help="KV blocks a worker")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="NAME", help="policies that the result has, to be run anew"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--result-filename",
        type=Path,
        help="written after every cell, as JSON; what it has of the same settings already is not run again",
    )
    defaults = {name: parser.get_default(name) for name in (*QUICK, "slos", "more")}
    parser.set_defaults(run=run, defaults=defaults)


def run(args: argparse.Namespace) -> int:
    """Run the grid, print tables, write the file."""
    from nanopd_lab.bench.regret.contenders import contender
    from nanopd_lab.bench.regret.runner import load, run_grid, write

    if args.table is not None:
        print(tables(load(args.table)))
        return 0
    if args.quick:
        less = {**QUICK, "slos": args.slos[:1], "more": args.more[:1]}
        for name, value in less.items():
            if getattr(args, name) == args.defaults[name]:
                setattr(args, name, value)
    if args.random_cells:
        args.simulations = 0
    bench, trace = _bench(args)
    path: Path | None = args.result_filename
    before = load(path) if path is not None and path.is_file() else None
    for unit in (before or {}).get("units", []):
        unit["met"] = {name: met for name, met in unit["met"].items() if name not in args.again}
    provenance = [*(before or {}).get("provenance", []), _provenance(args)]
    begun = time.perf_counter()

    def save(record: dict[str, Any]) -> None:
        if path is not None:
            write({**record, "provenance": provenance}, path)

    grid = _grid(args, bench)
    for name in grid.policies:  # one that there isn't is refused before anything runs
        contender(name, bench.workers_of(grid.cells[0]), bench.outlook(grid.cells[0]))
    record = run_grid(bench, grid, args.jobs, before, trace, save, progress=sys.stderr.isatty())
    save(record)
    print(tables(record))
    print(
        f"\n{len(record['units'])} cells x seeds; {time.perf_counter() - begun:.0f} s in {args.jobs} processes"
    )
    return 0


def tables(record: dict[str, Any]) -> str:
    """All tables of a result, as Markdown."""
    from nanopd_lab.bench.regret.margins import margin_table
    from nanopd_lab.bench.regret.tables import predictor_table, regret_table, summary_table

    settings = record["settings"]
    if not record["units"]:
        return "no cell has been run yet"
    head = (
        f"modelled: {settings['workers']} workers of {settings['cost_model']}, {settings['num_prompts']} requests a "
        f"cell and seed, {len({unit['seed'] for unit in record['units']})} seeds; goodput in percent of the oracle's, "
        "differences with 95 % intervals over seeds (in the summaries: over cells)"
    )
    known = any("oracle" in unit for unit in record["units"])
    parts = [head, regret_table(record), summary_table(record)] if known else [head]
    parts += [margin_table(record)] if "adaptive" in record["units"][0]["met"] else []
    parts.append(predictor_table(record))
    return "\n\n".join(part for part in parts if part)


def _bench(args: argparse.Namespace) -> tuple[Any, dict[str, Any] | None]:
    from nanopd_lab.bench.regret.grid import Bench, Settings
    from nanopd_lab.cost.hardware import load_model
    from nanopd_lab.sim.request_trace import read_trace

    settings = Settings(args.cost_model, args.workers, args.num_prompts, args.simulations, args.num_blocks)
    _check(args, settings)
    bench = Bench(settings, load_model(args.cost_model))
    if args.trace is None:
        return bench, None
    source: dict[str, Any] = {
        "name": args.trace.name,
        "sha256": hashlib.sha256(args.trace.read_bytes()).hexdigest(),
    }
    trace, most = read_trace(args.trace), bench.longest
    held = tuple(each for each in trace if each.prompt_tokens + each.output_tokens <= most)
    if len(held) < len(trace):
        source["left_out"] = len(trace) - len(held)
        print(
            f"{args.trace.name}: {source['left_out']} of {len(trace)} requests have more than the {most} tokens that a "
            "worker takes, and are left out",
            file=sys.stderr,
        )
    return replace(bench, trace=held), source


def _check(args: argparse.Namespace, settings: Settings) -> None:
    for name, least in (("workers", 2), ("num_prompts", 10), ("simulations", 0), ("num_blocks", 1)):
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.seeds < 1 or args.jobs < 1 or min(args.loads) <= 0:
        raise ValueError(f"seeds {args.seeds}, jobs {args.jobs}, loads {args.loads}; all must be positive")


def _grid(args: argparse.Namespace, bench: Any) -> Any:
    from nanopd_lab.bench.regret.cells import TRACE, Cell
    from nanopd_lab.bench.regret.knee import planned_knee
    from nanopd_lab.bench.regret.random_cells import random_cells
    from nanopd_lab.bench.regret.runner import Grid

    policies, seeds = tuple(args.policies), tuple(range(args.seeds))
    if args.random_cells:
        drawn = random_cells(bench, args.random_cells, args.cell_seed, args.machines)
        return Grid(tuple(drawn), policies, seeds, planned_knee)
    links = [_bandwidth(text) for text in args.links]
    cells: list[Cell] = [
        Cell(mix, "steady", slo, link, load)
        for mix, slo, link, load in product(args.mixes, args.slos, links, args.loads)
    ]
    for each in [*args.more, *([f"{TRACE}/steady"] if args.trace else [])]:
        mix, *parts = each.split("/")
        shape = parts[0] if parts else "steady"
        link = _bandwidth(parts[1]) if len(parts) > 1 else links[0]
        cells += [Cell(mix, shape, args.slos[0], link, load) for load in args.loads]
    return Grid(tuple(dict.fromkeys(cells)), policies, seeds)


def _bandwidth(text: str) -> float | None:
    if text == "own":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"link {text!r}; give GB/s, such as 12.5, or own for the cost model's")
    return value


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Files are named without their folders."""
    from nanopd_lab.provenance import provenance

    found = provenance()
    for path in (args.trace, args.result_filename):
        if path is not None:
            found["command"] = found["command"].replace(str(path), path.name)
    return found
