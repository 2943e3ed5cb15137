"""Does the simulator say what the real cluster does? The same requests, served and simulated, side by side.

    nanopd-lab parity --model smollm2 --workers 2 --policies 1p1d --cost-model model.json --request-rates 0.5

Requests arrive on a Poisson schedule, are served by worker processes, and then once more in virtual time by the same
controller, workers and schedulers with steps from the cost model. Times count from the scheduled arrival, as the
caller sees them; a late submission counts against the system.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanopd_lab.bench.load import LoadOptions, run_load
from nanopd_lab.bench.metrics import LoadRecord
from nanopd_lab.bench.provenance import provenance
from nanopd_lab.bench.workload import Workload
from nanopd_lab.cluster.cluster import Cluster, RequestFailedError
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.sim.results import SimResult
from nanopd_lab.sim.workload import SimRequest, in_order

SCHEMA = "nanopd-lab/parity/1"
METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
PERCENTS = (50, 90)


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


def figures(result: SimResult) -> dict[str, float]:
    """Percentiles in ms and throughputs, by name."""
    found = {
        f"p{percent}_{name}_ms": 1e3 * result.percentile(metric, percent)
        for name, metric in METRICS.items()
        for percent in PERCENTS
    }
    return {
        **found,
        "request_throughput": result.request_throughput,
        "output_throughput": result.output_throughput,
    }


def compare(
    config: ClusterConfig,
    loads: Mapping[float, Sequence[Sequence[SimRequest]]],
    simulate: Callable[[Sequence[SimRequest]], SimResult],
) -> Iterator[dict[str, Any]]:
    """A record for each load, all of which one real cluster serves; made while it serves.

    Args:
        loads: by request rate, several schedules of it, for example one a seed; figures are medians over them
        simulate: serves the same requests in virtual time
    """
    with Cluster(config) as cluster:
        serve(cluster, [SimRequest(f"warm-up-{n}", 0.0, 40, 4) for n in range(2 * config.workers)])
        for rate, rounds in loads.items():
            sides: list[tuple[dict[str, float], dict[str, float]]] = []
            for number, requests in enumerate(rounds):
                named = [replace(each, request_id=f"{rate}-{number}-{each.request_id}") for each in requests]
                records = serve(cluster, named, seed=number)
                sides.append((figures(SimResult(list(records), [], 0, 0)), figures(simulate(requests))))
            cluster.check_integrity()
            real, modelled = (
                {name: statistics.median(each[side][name] for each in sides) for name in sides[0][0]}
                for side in (0, 1)
            )
            yield {
                "schema": SCHEMA,
                "provenance": provenance(),
                "request_rate": rate,
                "num_prompts": len(rounds[0]),
                "real": real,
                "simulated": modelled,
                "error": {name: modelled[name] / real[name] - 1 for name in real},
                "rounds": [{"real": a, "simulated": b} for a, b in sides],
            }


def table(record: Mapping[str, Any]) -> str:
    """The record for people."""
    lines = [f"{'':22}{'real':>12}{'simulated':>12}{'error':>9}"]
    for name, real in record["real"].items():
        lines.append(f"{name:22}{real:12.2f}{record['simulated'][name]:12.2f}{record['error'][name]:9.1%}")
    return "\n".join(lines)
