"""`nanopd-lab sweep`: policies against one another on the same number of workers, over rates and seeds."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nanopd_lab.bench import serving_cli
from nanopd_lab.bench.metrics_cli import add_metric_options, selection_of, slo_of
from nanopd_lab.bench.workload_cli import add_workload_options, workload_of
from nanopd_lab.sim import cli as simulate_cli

if TYPE_CHECKING:
    from nanopd_lab.bench.capacity import Capacity
    from nanopd_lab.bench.sweep import Measure, Point, Result, Results
    from nanopd_lab.bench.workload import Workload
    from nanopd_lab.cluster.cluster import Cluster

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SEARCH_S = 30.0
TARGETS = (0.9, 0.99)  # of a search, where none is given
ENGINE_DEFAULTS = {"model": "smollm2", "max_num_batched_tokens": 512, "max_num_seqs": 64}
# Flags that change where a result goes or how it is shown, and not what is measured.
ELSEWHERE = {
    "command", "run", "policies", "request_rates", "seeds", "request_rate", "seed", "default_rate", "search",
    "search_start", "search_tolerance", "result_filename", "summary_filename", "disable_tqdm", "label",
    "save_detailed",
}  # fmt: skip


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "sweep",
        help="policies × rates × seeds on the engine or simulated, with intervals; goes on where it was",
    )
    parser.add_argument("--policies", nargs="+", default=["collocated", "1p1d"], help="each on all workers")
    parser.add_argument("--request-rates", nargs="+", type=float, default=[], help="requests a second; inf")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument(
        "--search",
        nargs="*",
        type=float,
        metavar="SHARE",
        help="find the highest rate at which this share meets --goodput (default 0.9 and 0.99)",
    )
    parser.add_argument(
        "--search-start", type=float, default=1.0, help="first rate of the search (default 1)"
    )
    parser.add_argument(
        "--search-tolerance", type=float, default=0.05, help="it ends at rates this near (default 0.05)"
    )
    parser.add_argument(
        "--min-duration",
        type=float,
        help="seconds for which requests keep coming, at any rate: more of them than --num-prompts if need be. "
        "Default: 30 with --search, else 0. A rate that is kept up for a moment only is no capacity",
    )
    parser.add_argument("--simulate", action="store_true", help="in virtual time, from a cost model")
    serving_cli.add_engine_options(parser)
    simulate_cli.add_machine_options(parser, engine=False)
    # Whose default they get is known once --simulate is.
    parser.set_defaults(**dict.fromkeys(ENGINE_DEFAULTS), enable_prefix_caching=None)
    add_workload_options(parser, num_prompts=100, rates=False)
    serving_cli.add_load_options(parser)
    add_metric_options(parser)
    parser.add_argument("--summary-filename", type=Path, help="write intervals and searches, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, print the table, write the files."""
    from nanopd_lab.bench.sweep import SUMMARY_SCHEMA, Results, points_of, rows_of, sweep, table
    from nanopd_lab.provenance import provenance
    from nanopd_lab.router import create_policy

    defaults = simulate_cli.ENGINE_DEFAULTS if args.simulate else ENGINE_DEFAULTS
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.simulate and args.enable_prefix_caching is None:
        args.enable_prefix_caching = True
    if args.min_duration is None:
        args.min_duration = 0.0 if args.search is None else SEARCH_S
    slo = slo_of(args)
    if args.search is not None and not slo.given:
        raise ValueError("--search needs objectives: --goodput ttft:500 tpot:100")
    if args.search is None and not args.request_rates:
        raise ValueError("nothing to measure: give --request-rates, or --search")
    _check(args)
    for policy in args.policies:  # all are checked before the first is measured
        if args.simulate:
            create_policy(policy, args.workers, simulate_cli.machine_of(args).outlook(slo))
        else:
            serving_cli.cluster_config(args, policy)
    results = Results(args.result_filename, _settings(args))
    searches: dict[str, list[Capacity]] = {}
    interrupted = None
    with serving_cli.terminable(), _measuring(args) as measure:
        points = points_of(args.policies, args.request_rates, args.seeds)
        for policy in args.policies:  # its cluster serves its search as well
            for result in sweep([each for each in points if each.policy == policy], measure, results):
                interrupted = result["pd"].get("interrupted")
            if interrupted is None and args.search is not None:
                searches[policy], interrupted = _search(args, policy, measure, results)
            if interrupted is not None:
                break
    rows = rows_of(results.by_point.values())
    print(table(rows))
    for policy, found in searches.items():
        for each in found:
            print(_sentence(policy, each, args.workers))
    if args.summary_filename:
        record = {
            "schema": SUMMARY_SCHEMA,
            "workers": args.workers,
            "modelled": args.simulate,
            "settings": results.settings,
            "rows": [row.as_json() for row in rows],
            "search": {
                policy: [_finite(each._asdict()) for each in found] for policy, found in searches.items()
            },
            "partial": interrupted is not None,
            "provenance": provenance(measured=not args.simulate),
        }
        args.summary_filename.write_text(json.dumps(record, indent=1) + "\n")
    if interrupted is None:
        return 0
    print(f"ended before its time: {interrupted}; the same command goes on from there", file=sys.stderr)
    return serving_cli.INTERRUPTED if interrupted == "interrupted" else serving_cli.LOST


def _check(args: argparse.Namespace) -> None:
    """What the points are made of, before a cluster is started for them."""
    from nanopd_lab.bench.capacity import check_search
    from nanopd_lab.bench.sweep import Point
    from nanopd_lab.bench.workload_cli import TEXTS

    if not 0 <= args.min_duration < math.inf:
        raise ValueError(f"min-duration is {args.min_duration:g} s; it must be finite and not negative")
    for target in (args.search or TARGETS) if args.search is not None else ():
        check_search(target, args.search_start, args.search_tolerance)
    rates = [*args.request_rates, *([] if args.search is None else [args.search_start])]
    if args.dataset_name not in TEXTS:  # whose tokenizer takes its time
        for rate in rates:
            _workload(args, Point(args.policies[0], rate, args.seeds[0]))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all points share; files by name and content."""
    found: dict[str, Any] = {}
    for name, value in vars(args).items():
        if name in ELSEWHERE:
            continue
        if isinstance(value, Path):
            from nanopd_lab.bench.workload import source_of

            value = source_of(value)
        found[name] = value
    return found


def _workload(args: argparse.Namespace, point: Point, tokenizer: str | None = None) -> Workload:
    """That of one point, of as many requests as keep coming for `min_duration`."""
    from nanopd_lab.bench.texts import TooFewConversationsError

    count = args.num_prompts
    if point.rate < math.inf:
        count = max(count, math.ceil(point.rate * args.min_duration))
    sized = argparse.Namespace(**{**vars(args), "num_prompts": count})
    try:
        return workload_of(sized, point.rate, point.seed, tokenizer)
    except TooFewConversationsError as error:
        if count == args.num_prompts:
            raise
        most_s = math.floor(1000 * error.fit / point.rate) / 1000
        both = f" and num-prompts to {error.fit}" if args.num_prompts > error.fit else ""
        raise ValueError(
            f"{error.told}, as requests keep coming for min-duration = {args.min_duration:g} s at {point.rate:g} a "
            f"second; lower min-duration to {most_s:g} s or less{both}, or give a longer file"
        ) from None


@contextmanager
def _measuring(args: argparse.Namespace) -> Iterator[Measure]:
    """What measures a point: a simulation, or a cluster that is started when it is first asked for.

    Without a prefix cache one cluster serves all policies; else each has its own.
    """
    slo, selection = slo_of(args), selection_of(args)
    if args.simulate:
        yield _simulation(args)
        return
    from nanopd_lab.bench.serving import bench_cluster
    from nanopd_lab.cluster.cluster import Cluster

    settings = serving_cli.load_settings(args)
    tokenizer = serving_cli.text_tokenizer(args)
    with ExitStack() as stack:
        current: tuple[str, Cluster] | None = None

        def measure(point: Point) -> Result:
            nonlocal current
            if current is not None and current[0] != point.policy and not args.enable_prefix_caching:
                current[1].use_policy(point.policy)  # to start GPUs anew takes most of a minute
                current = point.policy, current[1]
            if current is None or current[0] != point.policy:
                stack.close()  # the one before it: its caches know the prompts that come again
                cluster = stack.enter_context(Cluster(serving_cli.cluster_config(args, point.policy)))
                current = point.policy, cluster
            workload = _workload(args, point, tokenizer)
            print(f"{point.policy}, {point.rate:g} requests/s, seed {point.seed}", file=sys.stderr)
            with serving_cli.progress_bar(not args.disable_tqdm) as report:
                return bench_cluster(
                    current[1],
                    workload,
                    slo,
                    selection,
                    args.label,
                    args.save_detailed,
                    report,
                    **settings,
                )

        yield measure


def _simulation(args: argparse.Namespace) -> Callable[[Point], Result]:
    from nanopd_lab.bench.report import serving_result

    slo, selection = slo_of(args), selection_of(args)

    def measure(point: Point) -> Result:
        workload = _workload(args, point)
        shared = any(each.shared() for each in workload.requests)
        machine = simulate_cli.machine_of(args, shared)
        found = simulate_cli.simulated(machine, workload.requests, point.policy, args.workers, slo)
        setting = simulate_cli.setting_of(machine, args.workers, point.policy, args.label)
        return serving_result(found.records, workload, setting, slo, selection, detailed=args.save_detailed)

    return measure


def _search(
    args: argparse.Namespace, policy: str, measure: Measure, results: Results
) -> tuple[list[Capacity], str | None]:
    """(one of each share, None), or what there is and why it ended."""
    from nanopd_lab.bench.climb import Served, climb
    from nanopd_lab.bench.sweep import points_of, sweep

    class Interrupted(Exception):  # noqa: N818 - no error
        pass

    def serve(rate: float) -> Served:
        served = []
        for result in sweep(points_of([policy], [rate], args.seeds), measure, results):
            if result["partial"]:
                raise Interrupted(result["pd"]["interrupted"])
            served.append(result)
        return Served(
            rate,
            served[0]["num_prompts"],
            fmean(each["request_throughput"] for each in served),
            fmean(each["pd"]["slo"]["attainment"] for each in served),
        )

    found: list[Capacity] = []
    try:
        for target in args.search or TARGETS:
            found.append(climb(serve, target, args.search_start, args.search_tolerance, args.min_duration))
    except Interrupted as reason:
        return found, str(reason)
    return found, None


def _sentence(policy: str, found: Capacity, workers: int) -> str:
    if not found.rate:
        return f"{policy}: {found.target:.0%} in time at no rate down to {found.above:g} requests/s"
    if found.reason:
        return f"{policy}: {found.target:.0%} in time at every rate tried: {found.reason}"
    return (
        f"{policy}: {found.target:.0%} in time up to {found.rate:.3g} requests/s, {found.rate / workers:.3g} a worker "
        f"({found.attainment:.1%} there; fewer at {found.above:.3g})"
    )


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor nan."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
