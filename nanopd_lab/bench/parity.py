"""Does the simulator say what the real cluster does? The same requests, served and simulated, side by side.

    nanopd-lab parity --model smollm2 --workers 2 --policies 1p1d --cost-model model.json --request-rates 0.5

Requests arrive on a Poisson schedule, are served by worker processes, and then once more in virtual time by the same
controller, workers and schedulers with steps from the cost model. Times count from the scheduled arrival, as the
caller sees them; a late submission counts against the system.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanopd_lab.bench.provenance import provenance
from nanopd_lab.cluster.cluster import Cluster, ClusterOutput
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.core import SamplingParams
from nanopd_lab.sim.results import RequestRecord, SimResult
from nanopd_lab.sim.workload import SimRequest, in_order

SCHEMA = "nanopd-lab/parity/1"
METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
PERCENTS = (50, 90)
POLL_S = 0.25  # the controller's thread stamps the tokens; asking seldom leaves it and the workers alone
LEAD_S = 0.5


def serve(cluster: Cluster, requests: Sequence[SimRequest], seed: int = 0) -> list[RequestRecord]:
    """Serve all requests at their times, with random tokens; returns when the last one has settled.

    Raises:
        RuntimeError: one ended with an error.
    """
    rng = random.Random(seed)
    outputs: dict[str, ClusterOutput] = {}

    def take(timeout: float) -> None:
        outputs.update((output.request_id, output) for output in cluster.poll(timeout))

    ordered = in_order(requests)
    prompts = {
        each.request_id: [rng.randrange(cluster.vocab_size) for _ in range(each.prompt_tokens)]
        for each in ordered
    }
    begun = cluster.clock() + LEAD_S
    for each in ordered:
        while (left := begun + each.arrival - cluster.clock()) > 0:
            time.sleep(min(left, POLL_S))
            if left > POLL_S:
                take(0.0)
        params = SamplingParams(
            temperature=0, max_tokens=each.output_tokens, ignore_eos=True, detokenize=False
        )
        cluster.submit(prompts[each.request_id], params, each.request_id)
    while len(outputs) < len(ordered) or not all(output.settled for output in outputs.values()):
        time.sleep(POLL_S)
        take(0.0)
    return [_record(each, outputs[each.request_id], begun) for each in ordered]


def _record(request: SimRequest, output: ClusterOutput, begun: float) -> RequestRecord:
    metrics, (sample,) = output.metrics, output.outputs
    if sample.error is not None or metrics.first_token_time is None or metrics.finished_time is None:
        raise RuntimeError(f"{request.request_id} failed: {sample.error}")
    scheduled = metrics.first_scheduled_time
    return RequestRecord(
        request.request_id,
        request.arrival,
        request.prompt_tokens,
        len(sample.token_ids),
        None if scheduled is None else scheduled - begun,
        metrics.first_token_time - begun,
        metrics.finished_time - begun,
        sample.finish_reason or "error",
        path=output.paths[0] if output.paths else None,
    )


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
                sides.append((figures(SimResult(records, [], 0, 0)), figures(simulate(requests))))
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
