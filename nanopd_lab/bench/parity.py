"""Does the simulator say what the real cluster does? The same requests, served and simulated, side by side.

    nanopd-lab parity --model smollm2 --workers 2 --policies 1p1d adaptive --cost-model model.json --request-rates 0.5

Requests arrive on a Poisson schedule, are served by worker processes, and then once more in virtual time by the same
controller, workers and schedulers with steps from the cost model. Times count from the scheduled arrival, as the
caller sees them; a late submission counts against the system. Policies take turns, so that what slows the machine down
for a while slows all alike, and each begins every round anew; none is told how long outputs will be.

A shared machine's speed changes by the minute, which no model of its steps can know. At its own pace (`--own-pace`),
what all of its steps took by what the cost model says of them, a round is simulated at the speed that the machine had:
what is compared then is everything but two numbers, of what reads and of what computes.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nanopd_lab.bench.load import LoadOptions, run_load
from nanopd_lab.bench.metrics import LoadRecord
from nanopd_lab.bench.ranking import agreement
from nanopd_lab.bench.steps_pace import Pace
from nanopd_lab.bench.workload import Workload
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.outputs import RequestFailedError
from nanopd_lab.provenance import provenance
from nanopd_lab.router import Slo
from nanopd_lab.sim.results import SimResult
from nanopd_lab.sim.workload import SimRequest, in_order

SCHEMA = "nanopd-lab/parity/1"
RANKING_SCHEMA = "nanopd-lab/ranking/1"
METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
PERCENTS = (50, 90)
ATTAINMENT = "attainment"
RANKED = (
    "mean_ttft_ms",
    "p90_ttft_ms",
    "mean_tpot_ms",
    "p90_tpot_ms",
    "mean_e2el_ms",
    "p90_e2el_ms",
    ATTAINMENT,
)

Figures = dict[str, float]
Simulate = Callable[[str, Sequence[SimRequest], Pace | None], SimResult]
"""Serves requests in virtual time, by a policy's name, on a machine at such a pace; None: the model's own."""
Paced = Callable[[Mapping[str, Sequence[StepRecord]]], Pace]
"""The pace that the steps of all workers show, see `steps_pace.pace_of`."""
Key = tuple[str, float, int]
"""Policy, requests a second, seed."""


class Round(NamedTuple):
    """The same requests, served and simulated; `provenance` of the former.

    pace: what its steps took by what the cost model says of the same steps; None: not measured
    """

    policy: str
    rate: float
    seed: int
    num_prompts: int
    real: Figures
    simulated: Figures
    provenance: dict[str, Any]
    pace: Pace | None = None

    @property
    def key(self) -> Key:
        return self.policy, self.rate, self.seed


def serve(cluster: Cluster, requests: Sequence[SimRequest], seed: int = 0) -> list[LoadRecord]:
    """Serve all requests at their times, with random tokens; returns when the last one has settled.

    Raises:
        RequestFailedError: one was refused or ended with an error.
    """
    workload = Workload(tuple(in_order(requests)), "parity", seed=seed)
    run = run_load(cluster, workload, LoadOptions(num_warmups=0, ready_timeout_s=0))
    if run.cause is not None:
        raise run.cause
    for record in run.records:
        if not record.ok:
            raise RequestFailedError(f"{record.request_id} failed: {record.error}")
    return run.records


def warm_up(cluster: Cluster, workers: int) -> None:
    """Serve two requests for each worker, which count nowhere."""
    serve(cluster, [SimRequest(f"warm-up-{n}", 0.0, 40, 4) for n in range(2 * workers)])


def figures(result: SimResult, slo: Slo | None = None) -> Figures:
    """Means and percentiles in ms, throughputs, and the share in time if anything is promised, by name."""
    found = {f"mean_{name}_ms": 1e3 * result.mean(metric) for name, metric in METRICS.items()}
    found |= {
        f"p{percent}_{name}_ms": 1e3 * result.percentile(metric, percent)
        for name, metric in METRICS.items()
        for percent in PERCENTS
    }
    found |= {
        "request_throughput": result.request_throughput,
        "output_throughput": result.output_throughput,
    }
    return found | ({ATTAINMENT: result.attainment(slo)} if slo is not None and slo.given else {})


def compare(
    config: ClusterConfig,
    loads: Mapping[Key, Sequence[SimRequest]],
    simulate: Simulate,
    paced: Paced | None = None,
) -> Iterator[Round]:
    """Serve and simulate each of `loads`, in their order, all on one real cluster; a round for each as it is done.

    Args:
        config: its policy is not looked at; without a prefix cache, which would know the prompts of other policies
        paced: measures the pace of each from its steps, which are kept then

    Raises:
        RequestFailedError: a request was refused or ended with an error.
        ValueError: a round has no pace.
    """
    slo = Slo.parse(config.goodput)
    with Cluster(replace(config, policy="collocated", trace=paced is not None)) as cluster:
        warm_up(cluster, config.workers)
        for (policy, rate, seed), requests in loads.items():
            cluster.use_policy(policy)
            if paced is not None:
                cluster.steps()  # those of before are thrown away
            named = [replace(each, request_id=f"{rate}-{seed}-{each.request_id}") for each in requests]
            real = SimResult(list(serve(cluster, named, seed=seed)), [], 0, 0)
            cluster.check_integrity()
            pace = None if paced is None else paced(cluster.steps())
            yield Round(
                policy,
                rate,
                seed,
                len(requests),
                figures(real, slo),
                figures(simulate(policy, requests, pace), slo),
                provenance(),
                pace,
            )


class Rounds:
    """Rounds that were done, in memory and, if there is a path, in a file of JSON lines that a later run goes on with.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[Key, Round] = {}
        if path is None or not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.pop("settings") != self.settings:
                raise ValueError(f"{path.name} holds rounds of other settings; give another file")
            pace = record.pop("pace")
            found = Round(**record, pace=None if pace is None else Pace(*pace))
            self.done[found.key] = found

    def add(self, found: Round) -> None:
        """Keep one, for good."""
        self.done[found.key] = found
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self.settings, **found._asdict()}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def records_of(rounds: Iterable[Round]) -> list[dict[str, Any]]:
    """One for each policy and rate: medians over the seeds on both sides, and how far the simulated ones are off."""
    groups: dict[tuple[str, float], list[Round]] = defaultdict(list)
    for each in rounds:
        groups[each.policy, each.rate].append(each)
    found = []
    for (policy, rate), group in groups.items():
        names = group[0].real
        real = {name: statistics.median(each.real[name] for each in group) for name in names}
        modelled = {name: statistics.median(each.simulated[name] for each in group) for name in names}
        found.append(
            {
                "schema": SCHEMA,
                "provenance": group[-1].provenance,
                "policy": policy,
                "request_rate": rate,
                "num_prompts": group[0].num_prompts,
                "real": real,
                "simulated": modelled,
                "error": {
                    name: modelled[name] - real[name]  # points
                    if name == ATTAINMENT
                    else modelled[name] / real[name] - 1
                    for name in real
                },
                "rounds": [
                    {
                        "seed": each.seed,
                        "real": each.real,
                        "simulated": each.simulated,
                        **({} if each.pace is None else {"pace": each.pace._asdict()}),
                    }
                    for each in group
                ],
            }
        )
    return found


def rankings_of(rounds: Iterable[Round]) -> list[dict[str, Any]]:
    """One for each rate and figure: whether the simulator puts the policies in the order of the real cluster."""
    by_rate: dict[float, list[Round]] = defaultdict(list)
    for each in sorted(rounds, key=lambda each: each.seed):
        by_rate[each.rate].append(each)
    found = []
    for rate, group in by_rate.items():
        for name in RANKED:
            if name not in group[0].real:
                continue
            real: dict[str, list[float]] = defaultdict(list)
            modelled: dict[str, list[float]] = defaultdict(list)
            for each in group:
                real[each.policy].append(each.real[name])
                modelled[each.policy].append(each.simulated[name])
            if len(real) > 1:
                means = {
                    policy: {
                        "real": statistics.fmean(real[policy]),
                        "simulated": statistics.fmean(modelled[policy]),
                    }
                    for policy in real
                }
                found.append(
                    {
                        "request_rate": rate,
                        "figure": name,
                        "seeds": len(next(iter(real.values()))),
                        "means": means,
                        **agreement(real, modelled).as_json(),
                    }
                )
    return found


def ranking_table(rankings: Iterable[Mapping[str, Any]]) -> str:
    """For people."""
    lines = [f"{'req/s':>8} {'figure':14}{'tau-b':>8}{'rho':>8}{'told apart':>12}{'contradicted':>14}"]
    for each in rankings:
        tau, rho = ("-" if each[name] is None else f"{each[name]:.2f}" for name in ("kendall", "spearman"))
        lines.append(
            f"{each['request_rate']:8g} {each['figure']:14}{tau:>8}{rho:>8}{each['told_apart']:>12}"
            f"{len(each['contradictions']):>14}"
        )
    return "\n".join(lines)


def table(record: Mapping[str, Any]) -> str:
    """The record for people."""
    lines = [f"{'':22}{'real':>12}{'simulated':>12}{'error':>9}"]
    for name, real in record["real"].items():
        lines.append(f"{name:22}{real:12.2f}{record['simulated'][name]:12.2f}{record['error'][name]:9.1%}")
    return "\n".join(lines)
