"""`nanopd-lab transfer bench | pairs | explain`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: _Subparsers) -> None:
    """Add the `transfer` command; its parsers set `run`, which takes the arguments and returns an exit code."""
    parser = subparsers.add_parser("transfer", help="moving KV blocks between workers: measure, choose")
    commands = parser.add_subparsers(dest="transfer_command", required=True)
    bench = commands.add_parser("bench", help="each transport against the link under it, in one run")
    bench.add_argument("--tokens", nargs="+", type=int, default=[256, 2048, 8192], help="of a pull")
    bench.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="source and reader in 1 or 2")
    bench.set_defaults(run=run_bench)
    pairs = commands.add_parser("pairs", help="every pair of GPUs, in both directions, beside the links")
    pairs.add_argument("--devices", nargs="+", help="one a worker; default: every GPU")
    pairs.add_argument("--tokens", type=int, default=2048, help="of a pull (default 2048)")
    pairs.set_defaults(run=run_pairs)
    for measuring in (bench, pairs):
        measuring.add_argument("--transports", nargs="+", help="default: those that work there")
        measuring.add_argument(
            "--shape", default="qwen3-8b", help="model whose KV is moved, in bf16 (default qwen3-8b)"
        )
        measuring.add_argument("--rounds", type=int, default=9, help="the median of so many (default 9)")
        measuring.add_argument("--result-filename", type=Path, help="write the record there, as JSON")
    explain = commands.add_parser("explain", help="which transport serves these workers, and why")
    explain.add_argument("--devices", nargs="+", default=["cpu", "cpu"], help="one a worker: cpu, cuda:0, …")
    explain.add_argument("--one-process", action="store_true", help="the workers share a process")
    explain.set_defaults(run=run_explain)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print the table, write the record."""
    from nanopd_lab.bench.transfer import bench, table

    record = bench(args.transports, args.tokens, args.shape, args.processes, args.rounds, report=_progress)
    return _show(record, table(record), args.result_filename)


def run_pairs(args: argparse.Namespace) -> int:
    """Measure every pair, print the matrices, write the record."""
    from nanopd_lab.bench.transfer_pairs import bench_pairs, table

    record = bench_pairs(
        args.devices, args.transports, args.tokens, args.shape, args.rounds, report=_progress
    )
    return _show(record, table(record), args.result_filename)


def _progress(line: str) -> None:
    print(line, file=sys.stderr)


def _show(record: dict[str, Any], shown: str, path: Path | None) -> int:
    print(shown)
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Print the choice, and what there is for workers on several machines."""
    from nanopd_lab.transfer.offers import own_offer
    from nanopd_lab.transfer.registry import choose_transport

    choice = choose_transport(args.devices, args.one_process)
    print(f"{choice.name}: {choice.reason}")
    offer = own_offer("here", "cpu")
    lacking = f"; nixl: {offer.without_nixl}" if "nixl" not in offer.transports else ""
    print(f"between machines: {', '.join(offer.transports)} can be loaded here ({offer.host}){lacking}")
    return 0
