"""`nanopd-lab plan`: which layout of so many GPUs, and what it is expected to serve."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopd_lab.bench.planning import Simulated

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SIMULATED = 3  # layouts
MANY_GPUS = 64  # from here on nothing is simulated unless asked for


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    from nanopd_lab.bench.workload_cli import add_workload_options
    from nanopd_lab.sim.cli import add_machine_options

    parser = subparsers.add_parser(
        "plan",
        help="mixed workers, xPyD or adaptive: which serves a workload as promised, and how much of it",
    )
    add_machine_options(parser)
    parser.add_argument("--gpus", type=int, default=8, help="workers, each on one GPU (default 8)")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS", help="what is promised: ttft:300 tpot:20"
    )
    parser.add_argument(
        "--attainment", type=float, default=0.9, help="share of requests that must get it (default 0.9)"
    )
    add_workload_options(parser)
    parser.add_argument(
        "--simulate",
        type=int,
        metavar="N",
        help=f"the N best layouts, and mixed workers (default {SIMULATED}; from {MANY_GPUS} GPUs on 0: formulas only)",
    )
    parser.add_argument(
        "--policies", nargs="*", help="to simulate beside them, as of `simulate` (default adaptive)"
    )
    parser.add_argument("--result-filename", type=Path, help="write the plan, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    from nanopd_lab.bench.plan_report import (
        advice,
        forecast_table,
        plan_record,
        simulated_line,
        simulated_table,
    )
    from nanopd_lab.bench.planning import Plan
    from nanopd_lab.bench.workload_cli import workload_of
    from nanopd_lab.router import ESTIMATING, Slo, create_policy
    from nanopd_lab.sim.cli import machine_of

    slo = Slo.parse(args.goodput)
    if args.simulate is not None and args.simulate < 0:
        raise ValueError(f"--simulate is {args.simulate}; it must be 0 or more layouts")
    workload = workload_of(args)
    machine = machine_of(args, shared=any(each.shared() for each in workload.requests))
    rate = workload.request_rate if workload.arrivals is None else args.request_rate
    plan = Plan.make(machine, workload, slo, args.gpus, rate, args.attainment)
    for policy in args.policies or ():  # before others are simulated
        create_policy(policy, args.gpus, machine.outlook(slo))
    print(forecast_table(plan))
    count = args.simulate
    if count is None:
        count = SIMULATED if args.gpus < MANY_GPUS else 0
    policies = plan.candidates(count)
    if args.policies is not None:
        policies += args.policies
    elif count and "adaptive" in ESTIMATING:
        policies.append("adaptive")

    def report(found: Simulated) -> None:
        print(simulated_line(found), file=sys.stderr)

    plan.simulate(dict.fromkeys(policies), report)
    if plan.simulated:
        print(simulated_table(plan))
    print(advice(plan))
    if args.result_filename:
        args.result_filename.write_text(json.dumps(plan_record(plan), indent=1) + "\n")
    return 0
