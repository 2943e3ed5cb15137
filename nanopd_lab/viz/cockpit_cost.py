"""What it costs a run to be watched: the same workload with the dashboard and without, in turns, in one process.

    python -m nanopd_lab.viz.cockpit_cost --model smollm2 --launcher process --rounds 5

Each round is two runs, whose order changes from round to round, so that a slow moment of a shared machine hits both.
`with/without` is the median over rounds of the ratio of the two. On a machine that others use too only the processor
time says something: of this process, and of the workers' where there is a /proc.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from nanopd_lab.bench.workload import Uniform, Workload, random_workload
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import LAUNCHERS, ClusterConfig
from nanopd_lab.cluster.launcher import WorkerLauncher
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.viz.watch import Watch

FIGURES = {
    "processor_s": "processor time (s)",
    "duration": "duration (s)",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "median TTFT (ms)",
    "median_tpot_ms": "median TPOT (ms)",
    "p99_tpot_ms": "p99 of TPOT (ms)",
}
SLO = Slo(1.0, 0.2)


class Cost(NamedTuple):
    """Medians over rounds of each of `FIGURES`, `ratio` of those of a round; and the looks' share of a processor."""

    without: Mapping[str, float]
    watched: Mapping[str, float]
    ratio: Mapping[str, float]
    busy: float

    def __str__(self) -> str:
        lines = [f"{'':20}{'without':>12}{'watched':>12}{'with/without':>14}"]
        for key, name in FIGURES.items():
            lines.append(
                f"{name:20}{self.without[key]:12.2f}{self.watched[key]:12.2f}{self.ratio[key]:14.3f}"
            )
        lines.append(f"the looks themselves: {100 * self.busy:.2f} % of a processor")
        return "\n".join(lines)


def processor_s(cluster: Cluster) -> float:
    """Processor time so far of this process and of a cluster's workers, as far as the system tells."""
    found = time.process_time()
    if isinstance(cluster.launcher, WorkerLauncher):
        for name in cluster.config.names:
            stat = Path(f"/proc/{cluster.launcher.pid(name)}/stat")
            if stat.exists():
                fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
                found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime
    return found


def cost_of_watching(cluster: Cluster, workload: Workload, rounds: int, interval_s: float = 0.25) -> Cost:
    """Serve the workload `2 * rounds` times.

    Raises:
        ValueError: no rounds, or a run did not complete all requests.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    runs: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    watch, shares = Watch(cluster, SLO, interval_s=interval_s), []
    for number in range(rounds):
        for watched in (False, True) if number % 2 == 0 else (True, False):
            begun = processor_s(cluster)
            with watch if watched else nullcontext():
                result = cluster.bench(workload, SLO, num_warmups=0, ready_timeout_s=0)
            result["processor_s"] = processor_s(cluster) - begun
            if watched:
                shares.append(watch.recorder.busy_s / watch.recorder.frames[-1].time_s)
            if result["completed"] < len(workload.requests):
                raise ValueError(f"only {result['completed']} of {len(workload.requests)} requests completed")
            runs[watched].append(result)

    def medians(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {key: statistics.median(each[key] for each in found) for key in FIGURES}

    ratios = [
        {key: one[key] / other[key] for key in FIGURES}
        for one, other in zip(runs[True], runs[False], strict=True)
    ]
    return Cost(medians(runs[False]), medians(runs[True]), medians(ratios), statistics.median(shares))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="process")
    parser.add_argument("--policy", default="1p1d")
    parser.add_argument("--request-rate", type=float, default=float("inf"), help="default: all at once")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    lengths = Uniform(16, 64), Uniform(16, 48)
    workload = random_workload(given.num_prompts, Arrivals(given.request_rate), lengths, seed=0)
    engine = {"kv_cache_memory_bytes": 1 << 26, "enable_prefix_caching": False}
    config = ClusterConfig(
        given.model,
        policy=given.policy,
        launcher=given.launcher,
        devices=("cpu",) * 2,
        engine=engine,
        threads=1,
    )
    with Cluster(config) as cluster:
        cluster.bench(workload, num_warmups=0, ready_timeout_s=0)  # the first run is slower
        found = cost_of_watching(cluster, workload, given.rounds)
    print(
        f"{given.model}, {given.policy}, {given.launcher}, {given.num_prompts} requests, {given.rounds} rounds"
    )
    print(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
