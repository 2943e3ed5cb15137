"""`nanopd-lab parity`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd_lab.cluster.config import ClusterConfig
    from nanopd_lab.cluster.host import StepRecord
    from nanopd_lab.cost.files import CostModel
    from nanopd_lab.sim import SimConfig, SimRequest

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


SERVICE_SEED = 1 << 20  # no round's
AHEAD = "{} goes by steps' times, which say little where steps are launched ahead, as this model's are; leave it out"


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "parity", help="the same Poisson requests served by a real cluster and simulated, side by side"
    )
    parser.add_argument("--model", default="smollm2", help="default smollm2, the embedded model")
    parser.add_argument(
        "--cost-model",
        type=Path,
        required=True,
        help="of this machine: a file of `nanopd-lab fit`; if there is none, it is measured and written there",
    )
    parser.add_argument(
        "--simulate-with",
        type=Path,
        help="another cost model for the simulated steps, as of a profile made afterwards: all rounds are simulated "
        "anew with it, and policies go by --cost-model as before; if there is none, it is measured and written there",
    )
    parser.add_argument(
        "--own-pace",
        action="store_true",
        help="simulate each round at the pace that its own steps show: for machines that others use too; not together "
        "with --simulate-with",
    )
    parser.add_argument(
        "--service-rate",
        type=float,
        metavar="RATE",
        help="correct a cost model that is measured by steps in service: first serve --num-prompts requests at so many "
        "a second by `collocated` and with one worker for prompts; another rate than those of --request-rates",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--policies", nargs="+", default=["round-robin", "1p1d"], help="each against the simulator"
    )
    parser.add_argument("--request-rates", nargs="+", type=float, default=[0.5], help="requests a second")
    parser.add_argument("--num-prompts", type=int, default=40, help="of each round")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a round each; medians count")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS", help="objectives: ttft:500 tpot:100"
    )
    parser.add_argument("--input-median", type=float, default=120.0, help="tokens; log-normal with sigma 0.6")
    parser.add_argument("--output-median", type=float, default=24.0, help="tokens; log-normal with sigma 0.5")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compilation", default="off", help="off, default or tuned")
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--kv-blocks", type=int, default=2000, help="of 16 tokens, a worker")
    parser.add_argument("--share-devices", action="store_true", help="let workers share a GPU")
    parser.add_argument(
        "--rounds-filename", type=Path, help="keep each round there, and go on with what it has"
    )
    parser.add_argument("--ranking-filename", type=Path, help="write there how the policies rank, as JSON")
    parser.add_argument("--result-filename", type=Path, help="write the records there, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure the cost model if need be, serve, simulate, print the tables, write the records.

    Raises:
        ValueError: arguments that don't go together, or rounds of other settings.
    """
    from nanopd_lab.bench.parity import (
        RANKING_SCHEMA,
        Rounds,
        compare,
        figures,
        ranking_table,
        rankings_of,
        records_of,
        table,
    )
    from nanopd_lab.bench.steps_pace import Pace, pace_of, shows_pace, works_of
    from nanopd_lab.provenance import provenance
    from nanopd_lab.router import Slo, Veiled, create_policy
    from nanopd_lab.sim import SimResult, Simulator
    from nanopd_lab.sim.timing import CostTime

    if args.own_pace and args.simulate_with:
        # A pace is relative to one model, and the steps that it was taken from are not kept.
        raise ValueError(
            "--own-pace is measured by the model of --cost-model, and --simulate-with is another model; leave one of "
            "them out"
        )
    if args.service_rate in args.request_rates:
        raise ValueError(
            f"--service-rate {args.service_rate:g} is one of --request-rates, at which the model is to be checked; "
            "take another, as one in between"
        )
    cost = _cost_model(args, args.cost_model)
    if args.own_pace and not shows_pace(cost):
        raise ValueError(AHEAD.format("--own-pace"))
    config = _config(args, cost, cost_model=str(args.cost_model), goodput=tuple(args.goodput))
    times = _cost_model(args, args.simulate_with) if args.simulate_with else cost
    settings, outlook = _settings(args, times), config.outlook()

    def simulate(name: str, requests: Sequence[SimRequest], pace: Pace | None) -> SimResult:
        policy, roles = create_policy(name, args.workers, outlook)
        model = times.iteration if pace is None else pace.of(times.iteration)
        return Simulator(Veiled(policy), roles, CostTime(model), requests, settings).run()

    def paced(steps: Mapping[str, Sequence[StepRecord]]) -> Pace:
        return pace_of(works_of(steps, cost.company), cost.iteration)

    for policy in args.policies:  # all are checked before the first is measured
        create_policy(policy, args.workers, outlook)
    rounds = Rounds(args.rounds_filename, _shared(args, cost))
    turns = [
        (policy, rate, seed)
        for number, seed in enumerate(args.seeds)
        for rate in args.request_rates
        for policy in _turned(args.policies, number)
        if (policy, rate, seed) not in rounds.done
    ]

    loads = {turn: _requests(args, turn[1], turn[2]) for turn in turns}
    for found in compare(config, loads, simulate, paced if args.own_pace else None) if loads else ():
        rounds.add(found)
        print(f"{found.policy}, {found.rate:g} requests/s, seed {found.seed}: done", flush=True)
    done = list(rounds.done.values())
    if args.simulate_with:
        slo = Slo.parse(args.goodput)
        done = [
            each._replace(
                simulated=figures(simulate(each.policy, _requests(args, each.rate, each.seed), None), slo)
            )
            for each in done
        ]
    shared = {"workers": args.workers, "model": args.model, "device": cost.device}
    records = [{**record, **shared} for record in records_of(done)]
    rankings = rankings_of(done)
    for record in records:
        print(f"{record['policy']}, {args.workers} workers, {record['request_rate']:g} requests/s")
        print(table(record))
    print(ranking_table(rankings))
    if args.result_filename:
        args.result_filename.write_text(json.dumps(records, indent=1) + "\n")
    if args.ranking_filename:
        ranking = {
            "schema": RANKING_SCHEMA,
            **shared,
            "settings": rounds.settings,
            "cost_model": json.loads(args.cost_model.read_text()),
            **({"simulated_with": times.to_record()} if args.simulate_with else {}),
            "rankings": rankings,
            "provenance": provenance(),
        }
        args.ranking_filename.write_text(json.dumps(ranking, indent=1) + "\n")
    return 0


def _turned(policies: Sequence[str], number: int) -> list[str]:
    """Each seed begins with another one."""
    number %= len(policies)
    return [*policies[number:], *policies[:number]]


def _cost_model(args: argparse.Namespace, path: Path) -> CostModel:
    """Of a file, or measured by as many processes at once as there will be workers, and in service if that is asked."""
    from nanopd_lab.bench.in_service import in_service
    from nanopd_lab.cluster.config import ClusterConfig
    from nanopd_lab.cost.files import CostModel
    from nanopd_lab.cost.measure import ProfileJob, measure_cost_model

    if path.exists():
        cost = CostModel.load(path)
        if args.service_rate is not None and "in_service" not in cost.fit:
            raise ValueError(
                f"{path} is there already, of steps that were not in service; leave --service-rate out, or name "
                "another file"
            )
        return cost
    config = ClusterConfig(args.model, workers=args.workers, share_devices=args.share_devices)
    cuda = config.worker_devices()[0].type == "cuda"
    if cuda and args.service_rate is not None:  # said now, and not when all has been profiled
        raise ValueError(AHEAD.format("--service-rate"))
    job = ProfileJob.of(
        args.model,
        cuda,
        args.dtype,
        args.compilation,
        args.workers,
        config.worker_threads(),
        tiny=args.model == "random:tiny",
    )
    with tempfile.TemporaryDirectory() as folder:  # beside the file there may be another `cost-model.json`
        cost = measure_cost_model(job, Path(folder))
    if args.service_rate is not None:
        policies = ["collocated", *([f"1p{args.workers - 1}d"] if args.workers > 1 else [])]
        requests = _requests(args, args.service_rate, SERVICE_SEED)
        cost = in_service(cost, _config(args, cost), policies, requests)
    cost.save(path)
    return cost


def _config(args: argparse.Namespace, cost: CostModel, **given: Any) -> ClusterConfig:
    from nanopd_lab.cluster.config import ClusterConfig

    engine = {
        "dtype": args.dtype,
        "compilation": args.compilation,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": args.kv_blocks * cost.fit["block_bytes"],
    }
    return ClusterConfig(
        args.model, workers=args.workers, engine=engine, share_devices=args.share_devices, **given
    )


def _requests(args: argparse.Namespace, rate: float, seed: int) -> list[SimRequest]:
    from nanopd_lab.sim.workload import Lengths, poisson_arrivals

    lengths = (
        Lengths(args.input_median, 0.6, round(6 * args.input_median)),
        Lengths(args.output_median, 0.5, round(5 * args.output_median)),
    )
    return poisson_arrivals(args.num_prompts, rate, lengths, seed)


def _shared(args: argparse.Namespace, cost: CostModel) -> Mapping[str, Any]:
    """What all rounds share."""
    names = (
        "model", "workers", "num_prompts", "input_median", "output_median", "dtype", "compilation",
        "max_num_batched_tokens", "kv_blocks", "goodput",
    )  # fmt: skip
    asked: dict[str, Any] = {"own_pace": ["reading", "computing"]} if args.own_pace else {}
    if args.service_rate is not None:
        asked["service_rate"] = args.service_rate
    return {**{name: getattr(args, name) for name in names}, **asked, "profiled": cost.source}


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
        company=cost.company,
    )
