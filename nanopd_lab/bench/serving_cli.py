"""`nanopd-lab bench`: a workload through a cluster that is started for it."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nanopd_lab.bench.metrics_cli import add_metric_options, selection_of, slo_of
from nanopd_lab.bench.workload_cli import add_workload_options, workload_of
from nanopd_lab.cluster.ray_cli import LAUNCHER_HELP, add_ray_options, ray_options

if TYPE_CHECKING:
    from nanopd_lab.bench.load import Progress, Report
    from nanopd_lab.cluster.config import ClusterConfig

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LAUNCHERS = ("process", "inline", "ray")
INTERRUPTED = 130  # exit status, as of a shell
LOST = 1


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "bench", help="serve a workload at its times; flags and result as of `vllm bench serve`"
    )
    add_engine_options(parser)
    parser.add_argument(
        "--policy", default="least-loaded", help="collocated, 1p2d (any xPyD), round-robin, least-loaded, ..."
    )
    parser.add_argument(
        "--cost-model", help="for policies that estimate: a name in data/hardware, or a file of `fit`"
    )
    add_workload_options(parser)
    add_load_options(parser)
    add_metric_options(parser)
    parser.set_defaults(run=run)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the cluster, but for its policy and its cost model."""
    parser.add_argument("--model", default="smollm2", help="default smollm2, the embedded model")
    parser.add_argument("--workers", type=int, default=2, help="each with an engine (default 2)")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="process", help=LAUNCHER_HELP)
    parser.add_argument(
        "--transport", default="auto", help="auto, inproc, shm, p2p, pinned, torchdist[:HOST], nixl[:HOST]"
    )
    parser.add_argument("--device", default="auto", help="of all workers: auto, cpu, cuda")
    parser.add_argument("--share-devices", action="store_true", help="allow more workers than GPUs")
    parser.add_argument("--threads", type=int, help="of each worker on a CPU; default: the cores, divided")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="tokens a step may hold")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences that run at once on a worker")
    parser.add_argument("--max-model-len", type=int, help="most tokens of a prompt with its output")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="size of each worker's KV pool")
    parser.add_argument("--block-size", type=int, default=16, help="tokens a KV block")
    parser.add_argument("--compilation", default="off", help="off, default or tuned")
    parser.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="default: yes"
    )
    add_ray_options(parser)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a workload is sent."""
    parser.add_argument("--max-concurrency", type=int, help="requests that may run at once; others wait")
    parser.add_argument("--num-warmups", type=int, help="requests before, not counted; default: 2 a worker")
    parser.add_argument("--ready-check-timeout-sec", type=float, default=600.0, help="of the very first one")
    parser.add_argument("--drain-timeout-sec", type=float, default=600.0, help="then the rest has failed")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def cluster_config(args: argparse.Namespace, policy: str) -> ClusterConfig:
    """The cluster that the flags of `add_engine_options` ask for. Raises ValueError."""
    from nanopd_lab.cluster.config import ClusterConfig

    names = (
        "dtype", "max_num_batched_tokens", "max_num_seqs", "max_model_len", "kv_cache_memory_bytes", "block_size",
        "compilation", "enable_prefix_caching",
    )  # fmt: skip
    return ClusterConfig(
        args.model,
        workers=args.workers,
        policy=policy,
        cost_model=args.cost_model,
        goodput=tuple(args.goodput),
        launcher=args.launcher,
        ray=ray_options(args),
        transport=args.transport,
        devices=None if args.device == "auto" else (args.device,) * args.workers,
        share_devices=args.share_devices,
        threads=args.threads,
        engine={name: value for name in names if (value := getattr(args, name)) is not None},
    )


def load_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `bench_cluster` takes from the flags of `add_load_options`."""
    return {
        "max_concurrency": args.max_concurrency,
        "num_warmups": args.num_warmups,
        "ready_timeout_s": args.ready_check_timeout_sec,
        "drain_s": args.drain_timeout_sec,
        "temperature": args.temperature,
    }


def run(args: argparse.Namespace) -> int:
    """Serve, print the summary, write the result; 130 after an interrupt, 1 if the cluster was lost."""
    from nanopd_lab.bench.load import LoadOptions
    from nanopd_lab.bench.report import summary
    from nanopd_lab.bench.serving import bench_cluster
    from nanopd_lab.cluster.cluster import Cluster

    slo, selection, settings = slo_of(args), selection_of(args), load_settings(args)
    LoadOptions(**settings)  # what is wrong is said before anything is started
    config = cluster_config(args, args.policy)
    workload = workload_of(args, tokenizer=text_tokenizer(args))
    with terminable(), Cluster(config) as cluster, progress_bar(not args.disable_tqdm) as report:
        record = bench_cluster(
            cluster,
            workload,
            slo,
            selection,
            args.label,
            args.save_detailed,
            report,
            keep_text=args.save_detailed,
            **settings,
        )
        if args.result_filename:
            args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record))
    if not record["partial"]:
        return 0
    return INTERRUPTED if record["pd"]["interrupted"] == "interrupted" else LOST


def text_tokenizer(args: argparse.Namespace) -> str:
    """That of the model, if it has one."""
    return str(args.tokenizer if args.model.startswith("random:") else args.model)


@contextmanager
def progress_bar(shown: bool) -> Iterator[Report]:
    """Something to report to, that shows a bar on standard error."""
    from tqdm import tqdm

    with tqdm(unit="req", disable=not shown, dynamic_ncols=True, file=sys.stderr) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.total
            bar.n = progress.completed + progress.failed
            bar.set_postfix_str(
                f"{progress.sent} sent, {progress.running} running, {progress.failed} failed", refresh=False
            )
            bar.refresh()

        yield show


@contextmanager
def terminable() -> Iterator[None]:
    """A request to terminate is taken as an interrupt: what was measured is written."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
