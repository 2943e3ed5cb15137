"""`nanopd-lab bench-handover`, and `generate` over a cluster."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanopd_lab.cluster.ray_cli import LAUNCHER_HELP, add_ray_options, ray_options

if TYPE_CHECKING:
    from nanopd_lab.cluster.cluster import Cluster

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(commands: _Subparsers) -> None:
    """Add the commands; their parsers set `run`."""
    bench = commands.add_parser(
        "bench-handover",
        help="one prompt at a time through a prefill and a decode worker: what the transfer costs",
    )
    bench.add_argument("--model", default="smollm2")
    bench.add_argument(
        "--transports",
        nargs="+",
        default=["auto"],
        help="auto, shm, p2p, pinned, torchdist[:HOST], nixl[:HOST]",
    )
    bench.add_argument("--prompt-lengths", nargs="+", type=int, default=[256, 1024])
    bench.add_argument("--rounds", type=int, default=5, help="prompts of each length; the median counts")
    bench.add_argument("--dtype", default="auto")
    bench.add_argument("--max-num-batched-tokens", type=int, default=256, help="the chunk of the prefill")
    bench.add_argument("--max-model-len", type=int)
    bench.add_argument("--kv-cache-memory-bytes", type=int, help="of each worker's pool")
    bench.add_argument("--compilation", default="off", help="off, default or tuned")
    bench.add_argument("--threads", type=int, help="of each worker on a CPU; default: the cores, divided")
    bench.add_argument("--result-filename", type=Path, help="write a record with its provenance, as JSON")
    bench.set_defaults(run=_bench)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that can run on one engine or on many."""
    parser.add_argument(
        "--workers", type=int, default=1, help="worker processes, each with an engine (default 1)"
    )
    parser.add_argument(
        "--policy", default="least-loaded", help="collocated, 1p2d, round-robin, least-loaded, ..."
    )
    parser.add_argument(
        "--transport", default="auto", help="auto, shm, p2p, pinned, torchdist[:HOST], nixl[:HOST]"
    )
    parser.add_argument("--share-devices", action="store_true", help="allow more workers than GPUs")
    parser.add_argument("--launcher", choices=("process", "ray"), default="process", help=LAUNCHER_HELP)
    add_ray_options(parser)


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The cluster that the options ask for."""
    from nanopd_lab.cluster.cluster import Cluster
    from nanopd_lab.cluster.config import ClusterConfig

    devices = None if args.device == "auto" else (args.device,) * args.workers
    return Cluster(
        ClusterConfig(
            args.model,
            workers=args.workers,
            policy=args.policy,
            transport=args.transport,
            devices=devices,
            share_devices=args.share_devices,
            launcher=args.launcher,
            ray=ray_options(args),
            engine={
                "dtype": args.dtype,
                "block_size": args.block_size,
                "max_num_batched_tokens": args.max_num_batched_tokens,
                "max_num_seqs": args.max_num_seqs,
                "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
                "compilation": args.compilation,
                "cuda_graphs": not args.enforce_eager,
                "gpu_memory_utilization": args.gpu_memory_utilization,
                "enable_prefix_caching": not args.no_enable_prefix_caching,
            },
        )
    )


def _bench(args: argparse.Namespace) -> int:
    from nanopd_lab.bench.handover import format_handover, run_handover

    engine = {
        "dtype": args.dtype,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": args.max_model_len,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "compilation": args.compilation,
    }
    record = run_handover(
        args.model,
        args.transports,
        args.prompt_lengths,
        rounds=args.rounds,
        engine=engine,
        threads=args.threads,
    )
    if args.result_filename:
        args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    print(format_handover(record))
    return 0
