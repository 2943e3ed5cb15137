"""`nanopd-lab simulate`: what a cluster would do, in virtual time, from a cost model."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nanopd_lab.sim.machine import Machine

if TYPE_CHECKING:
    from nanopd_lab.bench.report import Setting
    from nanopd_lab.cost.company import Company
    from nanopd_lab.router import Slo
    from nanopd_lab.sim.results import SimResult
    from nanopd_lab.sim.workload import Kill, SimRequest

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_RATE = 20.0  # requests a second
ENGINE_DEFAULTS = {"model": "qwen3-8b", "max_num_batched_tokens": 2048, "max_num_seqs": 256}
WEIGHT_SHARE = 0.9  # of a GPU's memory for weights and KV, as gpu_memory_utilization


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    from nanopd_lab.bench.metrics_cli import add_metric_options
    from nanopd_lab.bench.workload_cli import add_workload_options

    parser = subparsers.add_parser(
        "simulate", help="the same controller, workers and schedulers in virtual time, from a cost model"
    )
    add_machine_options(parser)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--policy",
        default="least-loaded",
        help="collocated, 1p2d (any xPyD), round-robin, least-loaded, threshold, nanopd, first-fit, adaptive; or "
        "oracle: the best routes that can be found, in hindsight, for a --goodput",
    )
    add_workload_options(parser, rate=DEFAULT_RATE)
    add_metric_options(parser)
    parser.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="WORKER@SECONDS[+RESTART]",
        help="w0@12.5: this worker dies; w0@12.5+3: and is back 3 s later; may be given several times",
    )
    parser.add_argument("--trace", type=Path, help="write what happened for Perfetto")
    parser.set_defaults(run=run, outputs=("trace",))


def add_machine_options(parser: argparse.ArgumentParser, engine: bool = True) -> None:
    """Add the flags that say what is simulated.

    Args:
        engine: also those that a real engine has as well
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--hardware", default="h100", help="h100, h200, a100, h20, rtx-4090, or a file (default h100)"
    )
    source.add_argument(
        "--cost-model", help="a fitted model instead: a name in data/hardware, or a file of `fit`"
    )
    parser.add_argument("--num-blocks", type=int, help="KV blocks a worker; default: what its memory holds")
    parser.add_argument(
        "--block-bytes", type=int, help="of KV in a block of 16 tokens, for a --cost-model that doesn't say"
    )
    parser.add_argument(
        "--oracle-simulations", type=int, default=50, help="that --policy oracle may make, to find its routes"
    )
    parser.add_argument(
        "--beat", type=float, help="seconds between workers' reports; without: policies see none"
    )
    if not engine:
        return
    parser.add_argument(
        "--model",
        default=ENGINE_DEFAULTS["model"],
        help="a named shape (default qwen3-8b); not with --cost-model",
    )
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="look for prompts in the KV cache; default: where prompts share a prefix, as it takes time",
    )
    for name, text in (
        ("max_num_batched_tokens", "tokens a step may hold"),
        ("max_num_seqs", "sequences that run at once on a worker"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=ENGINE_DEFAULTS[name], help=text)


def run(args: argparse.Namespace) -> int:
    """Simulate, print a summary, write the files asked for."""
    from nanopd_lab.sim.simulator import uncollected

    with uncollected():
        code = _run(args)
        gc.freeze()  # what is left of a million requests is not looked through any more, here or on the way out
    return code


def _run(args: argparse.Namespace) -> int:
    from nanopd_lab.bench.metrics_cli import selection_of, slo_of
    from nanopd_lab.bench.report import serving_result, summary
    from nanopd_lab.bench.workload_cli import workload_of
    from nanopd_lab.sim.trace import write_trace
    from nanopd_lab.sim.workload import Kill

    slo, selection = slo_of(args), selection_of(args)
    if args.workers < 1:
        raise ValueError(f"workers is {args.workers}; it must be at least 1")
    workload = workload_of(args)
    machine = machine_of(args, shared=any(each.shared() for each in workload.requests))
    kills = [Kill.parse(text) for text in args.kill]
    begun = time.perf_counter()
    if args.policy == "oracle":
        result = _hindsight(args, workload.requests, machine, slo)
    else:
        result = simulated(machine, workload.requests, args.policy, args.workers, slo, kills)
    seconds = time.perf_counter() - begun
    setting = setting_of(machine, args.workers, args.policy, args.label)
    record = serving_result(result.records, workload, setting, slo, selection, detailed=args.save_detailed)
    print(summary(record))
    print(
        f"simulated {record['duration']:.1f} s in {seconds:.1f} s: {len(result.records) / seconds:,.0f} requests a "
        f"second of this computer's, {result.events:,} events, {result.steps:,} steps"
    )
    if args.result_filename:
        args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    if args.trace:
        write_trace(result, args.trace)
    return 0


def _hindsight(
    args: argparse.Namespace, requests: Sequence[SimRequest], machine: Machine, slo: Slo
) -> SimResult:
    """The best routes that are found, all arrivals and lengths being known."""
    from nanopd_lab.router import Role
    from nanopd_lab.sim.oracle import Instance, Planned, oracle, upper_bound
    from nanopd_lab.sim.simulator import Simulator

    if args.kill or args.beat is not None:
        raise ValueError("the oracle knows no --kill and needs no --beat; leave them out")
    if args.oracle_simulations < 1:
        raise ValueError(f"oracle-simulations is {args.oracle_simulations}; it must be at least 1")
    if not slo.given:
        raise ValueError("the oracle needs objectives, and there are none: --goodput ttft:500 tpot:100")
    # Bounds hold for steps of fixed times.
    machine = replace(machine, config=replace(machine.config, company=None))
    config = replace(machine.config, trace=False)
    instance = Instance(tuple(requests), args.workers, machine.time, slo, config)
    found = oracle(instance, machine.outlook(slo), args.oracle_simulations, args.seed)
    print(
        f"oracle: {found.met} of {len(instance.requests)} requests served as promised, {found.started} by "
        f"{found.start}, at most {upper_bound(instance, found.met).met} by any routing; {found.effort:.0f} simulations"
    )
    planned, roles = Planned(found.outcome.plan), [Role.MIXED] * args.workers
    return Simulator(planned, roles, machine.time, requests, machine.config).run()


def simulated(
    machine: Machine,
    requests: Sequence[SimRequest],
    policy: str,
    workers: int,
    slo: Slo | None = None,
    kills: Iterable[Kill] = (),
) -> SimResult:
    """Serve the requests in virtual time; the policy does not see how long their outputs will be.

    Args:
        slo: what policies that estimate try to keep

    Raises:
        ValueError: an unknown policy, or one for another number of workers.
        RuntimeError: the simulation lost a request or a block: a bug.
    """
    from nanopd_lab.router import create_policy
    from nanopd_lab.router.veil import Veiled
    from nanopd_lab.sim.simulator import Simulator

    chosen, roles = create_policy(policy, workers, machine.outlook(slo))
    result = Simulator(Veiled(chosen), roles, machine.time, requests, machine.config, kills).run()
    if problems := result.problems():
        raise RuntimeError(f"the simulation lost something: {problems[0]}")
    return result


def machine_of(args: argparse.Namespace, shared: bool = False) -> Machine:
    """What the flags of `add_machine_options` ask for.

    Args:
        shared: prompts share prefixes

    Raises:
        ValueError: an unknown name, a model that does not fit, or a fitted model without its block's size.
    """
    if args.enable_prefix_caching is None:
        args = argparse.Namespace(**{**vars(args), "enable_prefix_caching": shared})
    return _fitted(args) if args.cost_model else _prior(args)


def setting_of(machine: Machine, workers: int, policy: str, label: str | None = None) -> Setting:
    """What a result says about it."""
    from nanopd_lab.bench.report import Setting

    settings = {"hardware": machine.name}
    return Setting(machine.model, workers, policy, label=label, settings=settings, modelled=True)


def _prior(args: argparse.Namespace) -> Machine:
    from nanopd_lab.cost.hardware import load_hardware
    from nanopd_lab.cost.roofline import ModelDims
    from nanopd_lab.model.shape_table import shape_fields
    from nanopd_lab.sim.links import LinkModel

    if args.block_bytes is not None:
        raise ValueError(
            f"block-bytes is {args.block_bytes}, and the model's shape tells how large a block is; it goes with "
            "--cost-model"
        )
    hardware = load_hardware(args.hardware)
    name = args.model.removeprefix("random:")
    dims = ModelDims.from_config(SimpleNamespace(**shape_fields(name)), name=name, weight_itemsize=2)
    left = WEIGHT_SHARE * hardware.memory.value - dims.weight_bytes
    blocks = int(left // (16 * dims.kv_bytes_per_token)) if args.num_blocks is None else args.num_blocks
    if blocks < 1 and args.num_blocks is None:
        raise ValueError(
            f"{name} takes {dims.weight_bytes / 1e9:.1f} GB of weights, which leaves no room for KV in "
            f"{WEIGHT_SHARE:.0%} of {hardware.device}'s {hardware.memory.value / 1e9:.0f} GB; take a smaller model"
        )
    link = LinkModel(bytes_per_s=hardware.link.value)
    return _machine(
        args,
        hardware.name,
        name,
        hardware.prior(dims),
        link,
        blocks,
        16 * dims.kv_bytes_per_token,
        ahead=True,
    )


def _fitted(args: argparse.Namespace) -> Machine:
    from nanopd_lab.cost.hardware import load_model
    from nanopd_lab.sim.links import LinkModel

    cost = load_model(args.cost_model)
    block_bytes = args.block_bytes or cost.fit.get("block_bytes")
    if cost.transfer is not None and not block_bytes:
        raise ValueError(
            f"{args.cost_model} has a link that moves {cost.transfer.bytes_per_s / 1e9:.1f} GB/s; say how large a "
            "block of 16 tokens is: --block-bytes (737280 for smollm2 in float32)"
        )
    return _machine(
        args,
        cost.device,
        cost.model,
        cost.iteration,
        cost.transfer or LinkModel(),
        4096 if args.num_blocks is None else args.num_blocks,
        block_bytes or 0,
        bool(cost.fit.get("ahead", False)),
        cost.company,
    )


def _machine(
    args: argparse.Namespace,
    name: str,
    model: str,
    iteration: Any,
    link: Any,
    blocks: int,
    block_bytes: int,
    ahead: bool,
    company: Company | None = None,
) -> Machine:
    from nanopd_lab.sim.config import SimConfig
    from nanopd_lab.sim.timing import CostTime

    config = SimConfig(
        num_blocks=blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_bytes=block_bytes,
        enable_prefix_caching=args.enable_prefix_caching,
        ahead=ahead,
        company=company,
        link=link,
        beat_s=args.beat,
        trace=getattr(args, "trace", None) is not None,
    )
    return Machine(name, model, CostTime(iteration), config, iteration)
