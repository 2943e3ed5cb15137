"""`nanopd-lab predictor`: how well output lengths can be forecast on a trace, and by what."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd_lab.router.predictor.past import Answered

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SCHEMA = "nanopd-lab/length-forecasts/1"


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "predictor", help="forecasts of output lengths on a trace, beside nanoPD's and plain quantiles"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="requests of Azure, Vidur, BurstGPT or Mooncake layout")
    source.add_argument("--synthetic", help="alike, buckets or drift: lengths of a known distribution")
    parser.add_argument("--num-prompts", type=int, help="of the trace, the first so many; default: all")
    parser.add_argument("--max-tokens", type=int, default=4096, help="that a request may produce")
    parser.add_argument("--skip", type=float, default=0.3, help="share that is learnt from, and not judged")
    parser.add_argument("--ttft-ms", type=float, default=200.0, help="when outputs end, for `delayed`")
    parser.add_argument("--tpot-ms", type=float, default=30.0, help="and for each token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result-filename", type=Path, help="write the result, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the file asked for."""
    from nanopd_lab.router.predictor.evaluation import evaluate
    from nanopd_lab.router.predictor.synthetic import KnownLengths, workload
    from nanopd_lab.sim.request_trace import read_trace

    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"num-prompts is {args.num_prompts}; it must be at least 1")
    if args.max_tokens < 1 or min(args.ttft_ms, args.tpot_ms) < 0:
        raise ValueError("max-tokens must be at least 1, and ttft-ms and tpot-ms not negative")
    known = None
    requests: Sequence[Answered]
    if args.trace is not None:
        requests = read_trace(args.trace)[: args.num_prompts]
        sha256 = hashlib.sha256(args.trace.read_bytes()).hexdigest()
        source = {"trace": args.trace.name, "sha256": sha256}
    else:
        requests, logs = workload(args.synthetic, args.num_prompts or 10_000, seed=args.seed)
        known = partial(KnownLengths, logs)
        source = {"synthetic": args.synthetic}
    serving = args.ttft_ms / 1e3, args.tpot_ms / 1e3
    found = evaluate(requests, args.max_tokens, args.skip, serving, known=known, seed=args.seed)
    names = ("max_tokens", "skip", "ttft_ms", "tpot_ms", "seed")
    settings = {name: getattr(args, name) for name in names}
    record = {
        "schema": SCHEMA,
        "requests": {**source, "count": len(requests)},
        "settings": settings,
        **found,
    }
    print(table(record))
    if args.result_filename:
        args.result_filename.write_text(
            json.dumps({**record, "provenance": _provenance(args)}, indent=1) + "\n"
        )
    return 0


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Files are named without their folders."""
    from nanopd_lab.provenance import provenance

    found = provenance()
    for path in (args.trace, args.result_filename):
        if path is not None:
            found["command"] = found["command"].replace(str(path), path.name)
    return found


def table(record: dict[str, Any]) -> str:
    """For people: each scenario's figures, and how far they are behind the first predictor's."""
    what = record["requests"]
    lines = [
        f"{what.get('trace') or what['synthetic']}: {record['judged']:,} of {what['count']:,} requests judged; "
        "tokens; 95 % intervals of the difference to the first line",
    ]
    for way, rows in record["scenarios"].items():
        lines += [
            "",
            f"{way:27}{'MAE':>7}{'pinball':>9}{'p90':>7}  {'more pinball':24}{'50 % hold':>10}{'90 % hold':>12}",
        ]
        for name, row in rows.items():
            value = {key: each[0] for key, each in row.items() if isinstance(each, list)}
            more, low, high = (100 * each for each in row["excess"]["pinball"])
            holds = [
                f"{100 * value[f'strictly_within_{k}']:.0f}–{100 * value[f'within_{k}']:.0f}"
                for k in (50, 90)
            ]
            behind = f"{more:+.1f} % ({low:+.1f} to {high:+.1f})" if name != next(iter(rows)) else ""
            lines.append(
                f"{name:27}{value['mae_of_median']:7.1f}{value['pinball']:9.2f}{value['pinball_90']:7.1f}  "
                f"{behind:24}{holds[0]:>10}{holds[1]:>12}"
            )
    times = ", ".join(f"{name} {each:.0f}" for name, each in record["us_per_request"].items())
    return "\n".join([*lines, "", f"µs a request (a forecast, two quantiles, learning): {times}"])
