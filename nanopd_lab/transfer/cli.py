"""`nanopd-lab transfer bench | pairs | explain`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: _Subparsers) -> None:
    """Add the `transfer` command; its parsers set `run`, which takes the arguments and returns an exit code."""
    parser = subparsers.add_parser("transfer", help="moving KV blocks between workers: measure, choose")
    commands = parser.add_subparsers(dest="transfer_command", required=True)
    bench = commands.add_parser("bench", help="each transport against the link under it, in one run")
    bench.add_argument("--transports", nargs="+", help="default: those that work here")
    bench.add_argument("--tokens", nargs="+", type=int, default=[256, 2048, 8192], help="of a pull")
    bench.add_argument(
        "--shape", default="qwen3-8b", help="model whose KV is moved, in bf16 (default qwen3-8b)"
    )
    bench.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="source and reader in 1 or 2")
    bench.add_argument("--rounds", type=int, default=9, help="the median of so many (default 9)")
    bench.add_argument("--result-filename", type=Path, help="write the record there, as JSON")
    bench.set_defaults(run=run_bench)
    pairs = commands.add_parser("pairs", help="every pair of GPUs, in both directions, beside the links")
    pairs.add_argument("--devices", nargs="+", help="one a worker; default: every GPU")
    pairs.add_argument("--transports", nargs="+", help="default: those that work between the two")
    pairs.add_argument("--tokens", type=int, default=2048, help="of a pull (default 2048)")
    pairs.add_argument(
        "--shape", default="qwen3-8b", help="model whose KV is moved, in bf16 (default qwen3-8b)"
    )
    pairs.add_argument("--rounds", type=int, default=9, help="the median of so many (default 9)")
    pairs.add_argument("--result-filename", type=Path, help="write the record there, as JSON")
    pairs.set_defaults(run=run_pairs)
    explain = commands.add_parser("explain", help="which transport serves these workers, and why")
    explain.add_argument("--devices", nargs="+", default=["cpu", "cpu"], help="one a worker: cpu, cuda:0, …")
    explain.add_argument("--one-process", action="store_true", help="the workers share a process")
    explain.set_defaults(run=run_explain)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print the table, write the record."""
    from nanopd_lab.bench import transfer

    record = transfer.bench(
        args.transports,
        args.tokens,
        args.shape,
        args.processes,
        args.rounds,
        report=lambda line: print(line, file=sys.stderr),
    )
    print(transfer.table(record))
    if args.result_filename:
        args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def run_pairs(args: argparse.Namespace) -> int:
    """Measure every pair, print the matrices, write the record."""
    from nanopd_lab.bench import transfer_pairs

    record = transfer_pairs.bench_pairs(
        args.devices,
        args.transports,
        args.tokens,
        args.shape,
        args.rounds,
        report=lambda line: print(line, file=sys.stderr),
    )
    print(transfer_pairs.table(record))
    if args.result_filename:
        args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Print the choice."""
    from nanopd_lab.transfer.registry import choose_transport

    choice = choose_transport(args.devices, args.one_process)
    print(f"{choice.name}: {choice.reason}")
    return 0
