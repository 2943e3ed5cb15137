"""The result of a serving benchmark: one JSON object whether it was measured or simulated, and a summary for people.

Its keys are those of `vllm bench serve`, and four more: `schema`, `partial` (an interrupt or a fault ended the run
before its time; what was measured is kept), `pd` (see `bench.disaggregation`) and `provenance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nanopd_lab.bench.disaggregation import disaggregation, per_request
from nanopd_lab.bench.metrics import LATENCIES, Selection, Served, details, serving_metrics
from nanopd_lab.bench.workload import Workload
from nanopd_lab.provenance import provenance
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.results import RequestRecord

SCHEMA = "nanopd-lab/serving/1"
MEASURED, MODELLED = "nanopd-lab", "nanopd-lab simulate (modelled)"


@dataclass(frozen=True)
class Setting:
    """What served the workload.

    settings: what else tells runs apart, for `pd`: launcher, transport, hardware, …
    modelled: simulated, nothing was measured
    """

    model: str
    workers: int
    policy: str
    tokenizer: str | None = None
    label: str | None = None
    max_concurrency: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    modelled: bool = False


def serving_result(
    records: Sequence[RequestRecord],
    workload: Workload,
    setting: Setting,
    slo: Slo | None = None,
    selection: Selection | None = None,
    interrupted: str | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """The JSON object; times in ms, those of the lists of `detailed` in s.

    Args:
        interrupted: what ended the run before its time
    """
    served = Served(records)
    arrivals = workload.arrivals
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": MODELLED if setting.modelled else MEASURED,
        "backend": MODELLED if setting.modelled else MEASURED,
        "label": setting.label,
        "model_id": setting.model,
        "tokenizer_id": setting.tokenizer,
        "num_prompts": len(workload.requests),
        "request_rate": _finite(workload.request_rate),
        "burstiness": None if arrivals is None else _finite(arrivals.burstiness),
        "max_concurrency": setting.max_concurrency,
    }
    if arrivals is not None and arrivals.ramp_up is not None:
        ramp = arrivals.ramp_up
        found["ramp_up_strategy"] = ramp.strategy
        found["ramp_up_start_rps"], found["ramp_up_end_rps"] = ramp.start_rps, ramp.end_rps
    found |= serving_metrics(records, slo, selection, served)
    if detailed:
        found |= details(records)
    found["partial"] = interrupted is not None
    found["pd"] = {
        "policy": setting.policy,
        **setting.settings,
        "dataset_name": workload.name,
        **({"dataset": dict(workload.source)} if workload.source else {}),
        "seed": workload.seed,
        **disaggregation(records, setting.workers, slo, selection, served),
        **({"per_request": per_request(records)} if detailed else {}),
        **({} if interrupted is None else {"interrupted": interrupted}),
        **(
            {"first_error": error}
            if (error := next((each.error for each in records if each.error), None))
            else {}
        ),
    }
    found["provenance"] = provenance(measured=not setting.modelled)
    return found


def summary(record: Mapping[str, Any]) -> str:
    """For people, laid out as vLLM's."""
    pd = record["pd"]
    hardware = f" of {pd['hardware']}" if "hardware" in pd else ""
    kind = "modelled" if record["backend"] == MODELLED else "measured here"
    counts = pd["requests"]
    missing = [
        f"{counts[name]} {name}" for name in counts if name not in ("scheduled", "completed") and counts[name]
    ]
    requests = ", ".join([f"{counts['completed']} of {counts['scheduled']} completed", *missing])
    lines = [
        f"{kind}: {pd['workers']} workers{hardware}, {record['model_id']}, {pd['policy']}",
        _title("Serving Benchmark Result", "="),
        _line("Requests:", requests),
        *([f"The first that was not served: {pd['first_error']}"] if "first_error" in pd else []),
        _line("Request rate (req/s):", record["request_rate"]),
        *([_line("Maximum concurrency:", record["max_concurrency"])] if record["max_concurrency"] else []),
        _line("Benchmark duration (s):", record["duration"]),
        _line("Total input tokens:", record["total_input_tokens"]),
        _line("Total generated tokens:", record["total_output_tokens"]),
        _line("Request throughput (req/s):", record["request_throughput"]),
    ]
    if "slo" in pd:
        goals = ", ".join(f"{name[:-3]} {pd['slo'][name]:g}" for name in pd["slo"] if name.endswith("_ms"))
        lines += [
            _line("Request goodput (req/s):", record["request_goodput"]),
            _line(f"In time ({goals} ms):", _percent(pd["slo"]["attainment"])),
        ]
    lines += [
        _line("Output throughput (tok/s):", record["output_throughput"]),
        _line("  of each worker:", pd["per_gpu"]["output_throughput"]),
        _line("Total throughput (tok/s):", record["total_token_throughput"]),
        _line("Mean concurrent requests:", pd["mean_concurrency"]),
        _line("Peak concurrent requests:", record["max_concurrent_requests"]),
    ]
    for name, title in LATENCIES.items():
        if f"mean_{name}_ms" not in record:
            continue
        lines.append(_title(title, "-"))
        lines += _latency(record, f"_{name}_ms")
        if name in ("ttft", "e2el"):
            lines.append(_line("Mean from the schedule (ms):", pd["from_schedule"][f"mean_{name}_ms"]))
    lines.append(_title("Where the time goes, mean (ms)", "-"))
    lines += [_line(f"{name.replace('_', ' ')}:", stage["mean_ms"]) for name, stage in pd["stages"].items()]
    lines.append(
        f"{pd['disaggregated']} disaggregated, {pd['transferred_tokens']:,} tokens "
        f"({pd['transferred_bytes'] / 1e6:,.1f} MB) pulled, {pd['cached_tokens']:,} from the prefix cache, "
        f"{pd['retries']} retries"
    )
    if (late := pd["lateness"]["p99_lateness_ms"]) is not None:
        why = "sent late by" if record["max_concurrency"] is None else "waited for a place for"
        lines.append(f"{why} {late:.1f} ms (p99), {pd['lateness']['p100_lateness_ms']:.1f} ms at most")
    if record["partial"]:
        lines.append(f"PARTIAL: {pd['interrupted']}")
    return "\n".join(lines)


def _latency(record: Mapping[str, Any], ending: str) -> list[str]:
    keys = [key for key in record if key.endswith(ending) and not key.startswith(("std_", "p50_"))]
    return [_line(f"{key.removesuffix(ending).capitalize()} (ms):", record[key]) for key in keys]


def _title(text: str, mark: str) -> str:
    return f" {text} ".center(50, mark)


def _line(name: str, value: Any) -> str:
    text = "–" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)
    return f"{name:34}{text}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _finite(value: float) -> float | str:
    return value if value < math.inf else "inf"
