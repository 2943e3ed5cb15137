"""`nanopd-lab kernels check | bench | plans`, also as `python -m nanopd_lab.kernels.cli`."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: _Subparsers) -> None:
    """Add the `kernels` command; its parsers set `run`, which takes the arguments and returns an exit
    code."""
    parser = subparsers.add_parser("kernels", help="check and time the hand-written CUDA kernels")
    commands = parser.add_subparsers(dest="kernels_command", required=True)
    check = commands.add_parser(
        "check",
        help="compile every kernel for every architecture; run every rung in the emulator (and on a GPU)",
    )
    check.add_argument("--full", action="store_true", help="compile every combination of constants (minutes)")
    check.set_defaults(run=run_check)
    bench = commands.add_parser(
        "bench", help="time all rungs on a GPU against the memory roof, SDPA and FlashInfer"
    )
    bench.add_argument("--rungs", nargs="+", default=None, help="rungs of the decode ladder (default: all)")
    bench.add_argument("--rounds", type=int, default=31, help="timed launches of each candidate (default 31)")
    bench.add_argument("--no-peers", action="store_true", help="leave out SDPA and FlashInfer")
    bench.add_argument(
        "--result-filename", default=None, help="JSON file (default data/recorded/kernels-<gpu>-<date>.json)"
    )
    bench.add_argument("--plot", default=None, help="also draw the ladder against the roof to this PNG")
    bench.set_defaults(run=run_bench)
    plans = commands.add_parser(
        "plans", help="what cuDNN's plan for a prompt length costs on a GPU, and what a call gains"
    )
    plans.add_argument("--rounds", type=int, default=15, help="timed launches of each kernel (default 15)")
    plans.add_argument("--result-filename", default=None, help="JSON file to write")
    plans.set_defaults(run=run_plans)
    plot = commands.add_parser("plot", help="draw the ladder of a recorded bench")
    plot.add_argument("record", help="JSON file of `kernels bench`")
    plot.add_argument("--out", default="ladder.png", help="PNG to write (default ladder.png)")
    plot.set_defaults(run=run_plot)


def run_check(arguments: argparse.Namespace) -> int:
    """Print a line for each check; 1 if any failed."""
    from nanopd_lab.kernels import check

    failed = 0
    for line in itertools.chain(
        check.check_compiles(arguments.full), check.check_emulator(), check.check_gpu()
    ):
        mark = {True: "ok  ", False: "FAIL", None: "–   "}[line.ok]
        print(f"{mark} {line.what}: {line.detail}", flush=True)
        failed += line.ok is False
    print("all kernels are right" if not failed else f"{failed} checks failed")
    return 1 if failed else 0


def default_record_path(record: dict[str, Any]) -> Path:
    """data/recorded/kernels-<gpu>-<date>.json"""
    from nanopd_lab.resources import data_dir

    device = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    return data_dir() / "recorded" / f"kernels-{device}-{record['provenance']['date'][:10]}.json"


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the record; 2 where there is no GPU or an argument is wrong."""
    from nanopd_lab.bench import kernels
    from nanopd_lab.kernels.decode_launches import RUNGS

    unknown = set(arguments.rungs or ()) - set(RUNGS)
    if unknown or arguments.rounds < 3:
        problem = (
            f"unknown rungs {sorted(unknown)}; choose from {', '.join(RUNGS)}"
            if unknown
            else "--rounds: at least 3"
        )
        print(f"nanopd-lab kernels bench: {problem}", file=sys.stderr)
        return 2
    try:
        record = kernels.bench(arguments.rungs or RUNGS, arguments.rounds, not arguments.no_peers)
    except ValueError as error:
        print(f"nanopd-lab kernels bench: {error}", file=sys.stderr)
        return 2
    path = Path(arguments.result_filename) if arguments.result_filename else default_record_path(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(kernels.table(record))
    print(f"written to {path}")
    if arguments.plot:
        _draw(record, arguments.plot)
    return 0


def run_plans(arguments: argparse.Namespace) -> int:
    """Measure and print; 2 where there is no GPU or an argument is wrong."""
    import torch

    if problem := (
        "--rounds: at least 3"
        if arguments.rounds < 3
        else "it measures a GPU, and torch sees none here"
        if not torch.cuda.is_available()
        else None
    ):
        print(f"nanopd-lab kernels plans: {problem}", file=sys.stderr)
        return 2
    from nanopd_lab.bench.kernel_plans import bench_plans
    from nanopd_lab.bench.kernel_timer import Timer

    record = bench_plans(Timer(), arguments.rounds)
    for row in record["calls"]:
        print(
            f"{row['tokens']:>6} tokens: cuDNN {row['cudnn']['median_us']:>7.1f} µs, FlashAttention "
            f"{row['flash']['median_us']:>7.1f} µs, {1e12 * row['gain_per_pair_s']:>6.1f} ps a pair"
        )
    pays = record["pairs_that_pay"]
    print(
        f"a plan takes {1e3 * record['plan_s']:.1f} ms; "
        + (f"{pays:.2e} pairs pay for it" if pays else "cuDNN gains nothing here")
    )
    if arguments.result_filename:
        Path(arguments.result_filename).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def run_plot(arguments: argparse.Namespace) -> int:
    """Draw a recorded bench; 2 when the file is not one."""
    from nanopd_lab.bench.kernels import SCHEMA

    try:
        record = json.loads(Path(arguments.record).read_text())
        if record.get("kind") != "kernels" or record.get("schema") != SCHEMA:
            raise ValueError(f"not a record of `kernels bench` with schema {SCHEMA}")
    except (OSError, ValueError) as error:
        print(f"nanopd-lab kernels plot: {arguments.record}: {error}", file=sys.stderr)
        return 2
    _draw(record, arguments.out)
    return 0


def _draw(record: dict[str, Any], path: str) -> None:
    from nanopd_lab.viz.ladder import ladder_figure

    ladder_figure(record).savefig(path, dpi=120)
    print(f"drawn to {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m nanopd_lab.kernels.cli`."""
    parser = argparse.ArgumentParser(prog="nanopd_lab.kernels.cli")
    subparsers = parser.add_subparsers(required=True)
    register(subparsers)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given if given[:1] == ["kernels"] else ["kernels", *given])
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
