"""Flags that say what of a benchmark goes into its result, named as those of `vllm bench serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopd_lab.bench.metrics import Selection
    from nanopd_lab.router.slo import Slo


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="objectives: ttft:500 tpot:100 e2el:5000; requests that meet all are counted",
    )
    parser.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el", help="the latencies to report")
    parser.add_argument("--metric-percentiles", default="50,90,99", help="and their percentiles")
    parser.add_argument("--label", help="a name for the result, written into it")
    parser.add_argument("--save-detailed", action="store_true", help="with every request's times in the file")
    parser.add_argument("--result-filename", type=Path, help="write the result, as JSON")


def slo_of(args: argparse.Namespace) -> Slo:
    """The objectives. Raises ValueError."""
    from nanopd_lab.router.slo import Slo

    return Slo.parse(args.goodput)


def selection_of(args: argparse.Namespace) -> Selection:
    """The latencies and percentiles. Raises ValueError."""
    from nanopd_lab.bench.metrics import Selection

    return Selection.parse(args.percentile_metrics, args.metric_percentiles)
