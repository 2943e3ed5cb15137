"""`nanopd-lab demo` and `nanopd-lab chat`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd_lab.bench import serving_cli
from nanopd_lab.bench.workload_cli import add_workload_options, workload_of

if TYPE_CHECKING:
    from nanopd_lab.bench.load import Report
    from nanopd_lab.bench.workload import Workload
    from nanopd_lab.demo.session import DemoConfig

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MOST_WORKERS = 8
CPU_DEFAULTS: dict[str, Any] = {
    "dataset_name": "log-normal", "input_median": 120, "output_median": 24, "max_num_batched_tokens": 256,
    "dtype": "float32", "compilation": "off",
}  # fmt: skip
GPU_DEFAULTS: dict[str, Any] = {
    "dataset_name": "log-normal", "input_median": 1000, "output_median": 120, "max_num_batched_tokens": 2048,
    "dtype": "bfloat16", "compilation": "default",
}  # fmt: skip


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "demo",
        help="profile, serve a minute of requests collocated, disaggregated and adaptively, and write an HTML report",
    )
    serving_cli.add_engine_options(parser)
    add_workload_options(parser)
    parser.set_defaults(
        workers=None, num_prompts=None, enable_prefix_caching=False, **dict.fromkeys(CPU_DEFAULTS)
    )
    parser.add_argument(
        "--duration", type=float, default=60.0, help="seconds for which requests come (default 60)"
    )
    parser.add_argument(
        "--policies", nargs="+", default=[], help="default: collocated, the best xPyD, adaptive"
    )
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS",
        help="what requests are promised: ttft:500 tpot:100 e2el:5000; default: from an idle worker's times",
    )  # fmt: skip
    parser.add_argument(
        "--skip-profile",
        action="store_true",
        help="take --cost-model, or that of an earlier demo, or a recorded one",
    )
    parser.add_argument(
        "--cost-model", help="a name in data/hardware or a file of `fit`, with --skip-profile"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("nanopd-demo"), help="default ./nanopd-demo")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; 130 after an interrupt, 1 if a cluster was lost."""
    if missing := [name for name in ("matplotlib", "PIL") if find_spec(name) is None]:
        raise ValueError(f"the report's figures need {missing[0]}: pip install 'nanopd-lab[lab]'")
    from nanopd_lab.demo.chat import ask
    from nanopd_lab.demo.session import REPORT, run_demo
    from nanopd_lab.viz.strategies import look_of

    config = demo_config(args)

    def say(line: str) -> None:
        print(line, flush=True)

    @contextmanager
    def progress(policy: str) -> Iterator[Report]:
        say(f"Serving: {look_of(policy).label}")
        with serving_cli.progress_bar(not args.disable_tqdm) as report:
            yield report

    with serving_cli.terminable():
        outcome = run_demo(config, say, progress, lambda cluster: ask(cluster, say))
    print(f"Report: {config.folder / REPORT}")
    if not outcome.partial:
        return 0
    print(f"partial: {outcome.problem}", file=sys.stderr)
    return serving_cli.INTERRUPTED if outcome.problem == "interrupted" else serving_cli.LOST


def demo_config(args: argparse.Namespace) -> DemoConfig:
    """What the flags ask for, with defaults for this machine.

    Raises:
        ValueError: flags that don't go together, or more workers than cores or GPUs.
    """
    import torch

    from nanopd_lab.cost.measure import ProfileJob
    from nanopd_lab.demo.session import DemoConfig
    from nanopd_lab.router import Slo

    cuda = torch.cuda.is_available() and not args.device.startswith("cpu")
    for name, value in (GPU_DEFAULTS if cuda else CPU_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places, kind = (torch.cuda.device_count(), "GPU") if cuda else (cores, "core")
    args.workers = args.workers or min(places, MOST_WORKERS)
    if args.workers > places and not args.share_devices:
        raise ValueError(
            f"{args.workers} workers for {places} {kind}{'s' * (places != 1)}: they would measure one another; lower "
            "--workers" + (", or add --share-devices" if cuda else "")
        )
    if args.cost_model and not args.skip_profile:
        raise ValueError("--cost-model goes with --skip-profile: the demo fits its own otherwise")
    if args.request_rate is not None and args.num_prompts is None:
        args.num_prompts = max(2, round(args.request_rate * args.duration))
    cluster = serving_cli.cluster_config(args, "collocated")
    job = ProfileJob.of(
        args.model, cuda, args.dtype, args.compilation, args.workers, cluster.worker_threads(),
        tiny=args.model == "random:tiny",
    )  # fmt: skip
    tokenizer = serving_cli.text_tokenizer(args)

    def make(rate: float, count: int) -> Workload:
        asked = copy(args)
        asked.num_prompts = count
        return workload_of(asked, rate=rate, tokenizer=tokenizer)

    make(1.0, 2)  # what is wrong with the data set is said now
    return DemoConfig(
        cluster, make, args.output_dir, None if args.skip_profile else job, args.cost_model, args.duration,
        args.request_rate, args.num_prompts, tuple(args.policies), Slo.parse(args.goodput), not args.disable_tqdm,
    )  # fmt: skip
