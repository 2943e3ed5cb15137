"""`nanopd-lab simulate`: what a cluster would do, in virtual time, from a cost model."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nanopd_lab.sim.results import SimResult

if TYPE_CHECKING:
    from nanopd_lab.cost.iteration import IterationModel
    from nanopd_lab.router import Outlook, Slo
    from nanopd_lab.sim.simulator import SimConfig
    from nanopd_lab.sim.timing import StepTime
    from nanopd_lab.sim.workload import SimRequest

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SCHEMA = "nanopd-lab/simulation/1"
METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
WEIGHT_SHARE = 0.9  # of a GPU's memory for weights and KV, as gpu_memory_utilization


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "simulate", help="the same controller, workers and schedulers in virtual time, from a cost model"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--hardware", default="h100", help="h100, h200, a100, h20, rtx-4090, or a file (default h100)"
    )
    source.add_argument(
        "--cost-model", help="a fitted model instead: a name in data/hardware, or a file of `fit`"
    )
    parser.add_argument(
        "--model", default="qwen3-8b", help="a named shape (default qwen3-8b); not with --cost-model"
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--policy",
        default="least-loaded",
        help="collocated, 1p2d (any xPyD), round-robin, least-loaded, threshold, nanopd",
    )
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="what is promised, as ttft:500 tpot:100"
    )
    parser.add_argument(
        "--request-rate", type=float, default=20.0, help="requests a second; inf: all at once"
    )
    parser.add_argument(
        "--burstiness", type=float, default=1.0, help="of gamma gaps: 1 is Poisson, less is burstier"
    )
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument(
        "--dataset-name", choices=("random", "prefix_repetition", "azure-like"), default="random"
    )
    parser.add_argument(
        "--random-input-len", type=int, default=1024, help="tokens of each prompt of `random`"
    )
    parser.add_argument("--random-output-len", type=int, default=128, help="and of each output")
    parser.add_argument(
        "--random-prefix-len", type=int, default=0, help="tokens in front of them that all prompts share"
    )
    for name, default, text in (
        ("prefix", 256, "tokens that prompts of `prefix_repetition` share"),
        ("suffix", 256, "tokens of their own behind them"),
        ("output", 128, "and of each output"),
    ):
        parser.add_argument(f"--prefix-repetition-{name}-len", type=int, default=default, help=text)
    parser.add_argument(
        "--prefix-repetition-num-prefixes", type=int, default=10, help="how many different ones there are"
    )
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="look for prompts in the KV cache; default: where prompts share a prefix, as it takes time",
    )
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens a step may hold")
    parser.add_argument(
        "--max-num-seqs", type=int, default=256, help="sequences that run at once on a worker"
    )
    parser.add_argument("--num-blocks", type=int, help="KV blocks a worker; default: what its memory holds")
    parser.add_argument(
        "--block-bytes", type=int, help="of KV in a block of 16 tokens, for a --cost-model that doesn't say"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="WORKER@SECONDS[+RESTART]",
        help="w0@12.5: this worker dies; w0@12.5+3: and is back 3 s later; may be given several times",
    )
    parser.add_argument(
        "--beat", type=float, help="seconds between workers' reports; without: policies see none"
    )
    parser.add_argument("--trace", type=Path, help="write what happened for Perfetto")
    parser.add_argument("--result-filename", type=Path, help="write the result, as JSON")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Machine:
    """What is simulated: how long steps take, and what a worker holds."""

    name: str
    model: str
    time: StepTime
    config: SimConfig
    iteration: IterationModel

    def outlook(self, slo: Slo) -> Outlook:
        """What policies that estimate are told of it."""
        from nanopd_lab.cost.transfer_time import TransferModel
        from nanopd_lab.router import Outlook

        link = self.config.link
        return Outlook(
            self.iteration,
            slo,
            TransferModel(link.setup_s, link.block_s, link.bytes_per_s),
            self.config.block_bytes,
            self.config.block_size,
            self.config.max_num_batched_tokens,
        )


def run(args: argparse.Namespace) -> int:
    """Simulate, print a summary, write the files asked for."""
    from nanopd_lab.router import Slo, create_policy
    from nanopd_lab.sim.simulator import Simulator
    from nanopd_lab.sim.trace import write_trace
    from nanopd_lab.sim.veil import Veiled
    from nanopd_lab.sim.workload import Kill

    slo = Slo.parse(args.goodput)
    machine = _fitted(args) if args.cost_model else _prior(args)
    begun = time.perf_counter()
    policy, roles = create_policy(args.policy, args.workers, machine.outlook(slo))
    kills = [Kill.parse(text) for text in args.kill]
    result = Simulator(Veiled(policy), roles, machine.time, _requests(args), machine.config, kills).run()
    seconds = time.perf_counter() - begun
    if problems := result.problems():
        raise RuntimeError(f"the simulation lost something: {problems[0]}")
    record = summary(result, args, machine, slo)
    print(_table(record))
    print(
        f"simulated {record['duration']:.1f} s in {seconds:.1f} s: {len(result.records) / seconds:,.0f} requests a "
        f"second of this computer's, {result.events:,} events, {result.steps:,} steps"
    )
    if args.result_filename:
        args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    if args.trace:
        write_trace(result, args.trace)
    return 0


def _prior(args: argparse.Namespace) -> Machine:
    from nanopd_lab.cost.hardware import load_hardware
    from nanopd_lab.cost.roofline import ModelDims
    from nanopd_lab.model.shape_table import shape_fields
    from nanopd_lab.sim.links import LinkModel

    hardware = load_hardware(args.hardware)
    name = args.model.removeprefix("random:")
    dims = ModelDims.from_config(SimpleNamespace(**shape_fields(name)), name=name, weight_itemsize=2)
    left = WEIGHT_SHARE * hardware.memory.value - dims.weight_bytes
    blocks = args.num_blocks or int(left // (16 * dims.kv_bytes_per_token))
    if blocks < 1:
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

    cost, transfer = load_model(args.cost_model), LinkModel()
    block_bytes = args.block_bytes or cost.fit.get("block_bytes")
    if cost.transfer is not None:
        transfer = LinkModel(cost.transfer.setup_s, cost.transfer.block_s, cost.transfer.bytes_per_s)
        if not block_bytes:
            raise ValueError(
                f"{args.cost_model} has a link that moves {cost.transfer.bytes_per_s / 1e9:.1f} GB/s; say how large a "
                "block of 16 tokens is: --block-bytes (737280 for smollm2 in float32)"
            )
    return _machine(
        args,
        cost.device,
        cost.model,
        cost.iteration,
        transfer,
        args.num_blocks or 4096,
        block_bytes or 0,
        bool(cost.fit.get("ahead", False)),
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
) -> Machine:
    from nanopd_lab.sim.simulator import SimConfig
    from nanopd_lab.sim.timing import CostTime

    config = SimConfig(
        num_blocks=blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_bytes=block_bytes,
        enable_prefix_caching=_shared_prefix(args) > 0
        if args.enable_prefix_caching is None
        else args.enable_prefix_caching,
        ahead=ahead,
        link=link,
        beat_s=args.beat,
        trace=args.trace is not None,
    )
    return Machine(name, model, CostTime(iteration), config, iteration)


def _requests(args: argparse.Namespace) -> list[SimRequest]:
    from nanopd_lab.sim.workload import AZURE_LIKE, Lengths, gamma_arrivals

    if args.num_prompts < 1:
        raise ValueError(f"num-prompts is {args.num_prompts}; it must be at least 1")
    lengths, num_prefixes = AZURE_LIKE, 1
    if args.dataset_name != "azure-like":
        prompt, output = args.random_input_len, args.random_output_len
        if args.dataset_name == "prefix_repetition":
            prompt, output = args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
            num_prefixes = args.prefix_repetition_num_prefixes
        if min(prompt, output) < 1:
            raise ValueError(
                f"prompts of {prompt} tokens of their own and outputs of {output}; both must be at least 1"
            )
        lengths = Lengths(prompt, 0.0, prompt), Lengths(output, 0.0, output)
    return gamma_arrivals(
        args.num_prompts,
        args.request_rate,
        lengths,
        args.seed,
        args.burstiness,
        _shared_prefix(args),
        num_prefixes,
    )


def _shared_prefix(args: argparse.Namespace) -> int:
    """Tokens that a prompt shares with others."""
    if args.dataset_name == "prefix_repetition":
        return int(args.prefix_repetition_prefix_len)
    return int(args.random_prefix_len) if args.dataset_name == "random" else 0


def summary(result: SimResult, args: argparse.Namespace, machine: Machine, slo: Slo) -> dict[str, Any]:
    """The result under the keys of `vllm bench serve`, as far as a simulation has them; times in ms.

    `slo_attainment`, the share of requests that got what they were promised, is ours.
    """
    done = result.completed
    tokens_in, tokens_out = (
        sum(getattr(r, name) for r in done) for name in ("prompt_tokens", "output_tokens")
    )
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": "nanopd-lab simulate (modelled)",
        "model_id": machine.model,
        "hardware": machine.name,
        "workers": args.workers,
        "policy": args.policy,
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if args.request_rate < float("inf") else "inf",
        "burstiness": args.burstiness,
        "duration": result.duration_s,
        "completed": len(done),
        "failed": len(result.records) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": result.request_throughput,
        "output_throughput": result.output_throughput,
        "total_token_throughput": (tokens_in + tokens_out) / result.duration_s if result.duration_s else 0.0,
    }
    if slo.given:
        record["goodput_slo"] = str(slo)
        record["request_goodput"] = result.goodput(slo)
        record["slo_attainment"] = result.attainment(slo)
    for name, metric in METRICS.items():
        values = [1e3 * value for value in result.values(metric)]
        record[f"mean_{name}_ms"] = statistics.fmean(values) if values else None
        record[f"median_{name}_ms"] = statistics.median(values) if values else None
        record[f"std_{name}_ms"] = statistics.pstdev(values) if values else None
        for percent in (90, 99):
            record[f"p{percent}_{name}_ms"] = 1e3 * result.percentile(metric, percent) if values else None
    record["pd"] = {
        "disaggregated": sum(r.path is not None and r.path.transferred_tokens > 0 for r in done),
        "transferred_tokens": sum(r.path.transferred_tokens for r in done if r.path),
        "cached_tokens": sum(r.path.cached_tokens for r in done if r.path),
        "preemptions": sum(worker.preemptions for worker in result.workers),
    }
    return record


def _table(record: dict[str, Any]) -> str:
    lines = [
        f"modelled: {record['workers']} workers of {record['hardware']}, {record['model_id']}, {record['policy']}",
        f"{record['completed']} of {record['num_prompts']} requests, {record['request_throughput']:.2f} a second, "
        f"{record['output_throughput']:,.0f} output tokens/s; {record['pd']['disaggregated']} disaggregated, "
        f"{record['pd']['cached_tokens']:,} of {record['total_input_tokens']:,} prompt tokens from the prefix cache",
    ]
    if "request_goodput" in record:
        lines.append(
            f"goodput {record['request_goodput']:.2f} requests/s: {record['slo_attainment']:.1%} within "
            f"{record['goodput_slo']} ms"
        )
    lines.append(f"{'ms':8}{'mean':>10}{'median':>10}{'p90':>10}{'p99':>10}")
    for name in METRICS:
        cells = (record[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p90", "p99"))
        lines.append(
            f"{name:8}" + "".join("         –" if cell is None else f"{cell:10.1f}" for cell in cells)
        )
    return "\n".join(lines)
