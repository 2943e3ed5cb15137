"""`nanopd-lab parity`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopd_lab.cost.files import CostModel
    from nanopd_lab.sim import SimConfig

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "parity", help="the same Poisson requests served by a real cluster and simulated, side by side"
    )
    parser.add_argument("--model", default="smollm2", help="default smollm2, the embedded model")
    parser.add_argument(
        "--cost-model", type=Path, required=True, help="of this machine: a file of `nanopd-lab fit`"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--policies", nargs="+", default=["round-robin", "1p1d"], help="each against the simulator"
    )
    parser.add_argument("--request-rates", nargs="+", type=float, default=[0.5], help="requests a second")
    parser.add_argument("--num-prompts", type=int, default=40, help="of each round")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a round each; medians count")
    parser.add_argument("--input-median", type=float, default=120.0, help="tokens; log-normal with sigma 0.6")
    parser.add_argument("--output-median", type=float, default=24.0, help="tokens; log-normal with sigma 0.5")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compilation", default="off", help="off, default or tuned")
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--kv-blocks", type=int, default=2000, help="of 16 tokens, a worker")
    parser.add_argument("--share-devices", action="store_true", help="let workers share a GPU")
    parser.add_argument("--result-filename", type=Path, help="write the records there, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve, simulate, print the table, write the record."""
    from nanopd_lab.bench.parity import compare, table
    from nanopd_lab.cluster.config import ClusterConfig
    from nanopd_lab.cost.files import CostModel
    from nanopd_lab.router import create_policy
    from nanopd_lab.sim import SimRequest, SimResult, Simulator
    from nanopd_lab.sim.timing import CostTime
    from nanopd_lab.sim.workload import Lengths, poisson_arrivals

    cost = CostModel.load(args.cost_model)
    lengths = (
        Lengths(args.input_median, 0.6, round(6 * args.input_median)),
        Lengths(args.output_median, 0.5, round(5 * args.output_median)),
    )
    block_bytes = cost.fit["block_bytes"]
    engine = {
        "dtype": args.dtype,
        "compilation": args.compilation,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": args.kv_blocks * block_bytes,
    }
    settings = _settings(args, cost)
    records = []
    for policy in args.policies:
        config = ClusterConfig(
            args.model, workers=args.workers, policy=policy, engine=engine, share_devices=args.share_devices
        )

        def simulate(requests: Sequence[SimRequest], name: str = policy) -> SimResult:
            return Simulator(
                *create_policy(name, args.workers), CostTime(cost.iteration), requests, settings
            ).run()

        loads = {
            rate: [poisson_arrivals(args.num_prompts, rate, lengths, seed) for seed in args.seeds]
            for rate in args.request_rates
        }
        for record in compare(config, loads, simulate):
            records.append({"policy": policy, "workers": args.workers, "model": args.model, **record})
            print(f"{policy}, {args.workers} workers, {record['request_rate']:g} requests/s")
            print(table(record), flush=True)
    if args.result_filename:
        args.result_filename.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def _settings(args: argparse.Namespace, cost: CostModel) -> SimConfig:
    from nanopd_lab.engine.config import EngineConfig
    from nanopd_lab.sim import LinkModel, SimConfig

    return SimConfig(
        num_blocks=args.kv_blocks,
        max_num_seqs=EngineConfig(args.model).max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_bytes=cost.fit["block_bytes"],
        link=cost.transfer or LinkModel(),
        ahead=bool(cost.fit.get("ahead", False)),
    )
