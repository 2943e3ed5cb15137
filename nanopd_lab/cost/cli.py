"""`nanopd-lab profile` and `nanopd-lab fit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: _Subparsers) -> None:
    """Add both commands; they set `run`, which takes the arguments and returns an exit code."""
    profile = subparsers.add_parser("profile", help="time steps of the engine over a grid")
    profile.add_argument("--model", default="smollm2", help="default smollm2, the embedded model")
    profile.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    profile.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto")
    profile.add_argument("--quick", action="store_true", help="a smaller grid")
    profile.add_argument("--rounds", type=int, default=3, help="the median of so many (default 3)")
    profile.add_argument("--compilation", default="off", help="off, default or tuned")
    profile.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    profile.add_argument("--no-transfers", action="store_true", help="steps only, no pulls of KV blocks")
    profile.add_argument(
        "--result-filename",
        type=Path,
        required=True,
        help="JSON, written as it grows; one with the same settings is continued",
    )
    profile.set_defaults(run=run_profile)
    fit = subparsers.add_parser(
        "fit", help="a cost model from a profile, checked on steps that were held out"
    )
    fit.add_argument("profile", type=Path, help="made by `nanopd-lab profile`")
    fit.add_argument(
        "--transfer",
        type=Path,
        help="a record of `nanopd-lab transfer bench`, instead of the profile's own pulls",
    )
    fit.add_argument(
        "--transport",
        help="whose link (default: what workers of their own would choose; of a --transfer record, shm)",
    )
    fit.add_argument(
        "--launched",
        type=Path,
        help="a profile without CUDA graphs: the host time of the same device without them",
    )
    fit.add_argument("--prompt-tokens", type=int, default=512, help="where α and γ are derived")
    fit.add_argument("--context", type=int, default=512, help="where β and the threshold are derived")
    fit.add_argument("--result-filename", type=Path, help="write the cost model there, as JSON")
    fit.set_defaults(run=run_fit)


def run_profile(args: argparse.Namespace) -> int:
    """Measure and write the record."""
    from nanopd_lab.cost.profile import profile

    record = profile(
        args.model,
        device=args.device,
        dtype=args.dtype,
        quick=args.quick,
        rounds=args.rounds,
        result=args.result_filename,
        compilation=args.compilation,
        cuda_graphs=not args.enforce_eager,
        transfers=not args.no_transfers,
    )
    print(f"{len(record['points'])} steps timed; next: nanopd-lab fit {args.result_filename}")
    return 0


def run_fit(args: argparse.Namespace) -> int:
    """Fit, print, write."""
    from nanopd_lab.cost.calibrate import describe, fit_link, fit_profile, own_link, with_launched
    from nanopd_lab.cost.files import read_json

    profile = read_json(args.profile)
    if args.transfer:
        transfer = read_json(args.transfer)
        cost = fit_profile(profile, fit_link(transfer, args.transport or "shm"), transfer["provenance"])
    else:
        cost = fit_profile(profile, own_link(profile, args.transport))
    if args.launched:
        cost = with_launched(cost, read_json(args.launched))
    print(describe(cost, args.prompt_tokens, args.context))
    if args.result_filename:
        cost.save(args.result_filename)
    return 0
