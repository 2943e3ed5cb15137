"""What a result has beside vLLM's keys, in its `pd` object: where requests ran and what they waited for, times from
the schedule, and whether every request got what it was promised.

Times counted from when a request was to be sent, and not from when it was, hide no delay of the sender or of a cap on
concurrency (coordinated omission). Requests that failed or were refused are misses of every objective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nanopd_lab.bench.metrics import Floats, LoadRecord, Selection, Served, column, concurrency, spread
from nanopd_lab.cluster.accounts import AttemptReport, PathReport
from nanopd_lab.router.slo import NAMES, Slo
from nanopd_lab.sim.results import RequestRecord

STAGES: dict[str, Callable[[PathReport, AttemptReport], float | None]] = {
    "queue": lambda path, last: last.started - path.arrival,
    "prefill_queue": lambda path, last: last.prefill_queue_s,
    "prefill": lambda path, last: last.prefill_s,
    "transfer_visible": lambda path, last: last.transfer_visible_s or 0.0,
    "transfer_hidden": lambda path, last: last.transfer_hidden_s,
    "decode": lambda path, last: path.decode_s,
}
"""Of the last attempt: in the controller's queue; in the worker's, until the first chunk is planned; until the first
token; waiting for KV; pulls that cost nothing; from there to the last token."""

UNSENT, UNFINISHED, REFUSED = (
    "unsent",
    "unfinished",
    "refused",
)  # finish reasons of requests that no worker ended


def disaggregation(
    records: Sequence[RequestRecord],
    workers: int,
    slo: Slo | None = None,
    selection: Selection | None = None,
    served: Served | None = None,
) -> dict[str, Any]:
    """The `pd` object; times in ms.

    Args:
        workers: GPUs, or worker processes on a CPU; figures per GPU are divided by it
        served: of the same records, if somebody has it
    """
    served, selection = served or Served(records), selection or Selection()
    duration = served.duration_s
    paths = [record.path for record in served.records if record.path is not None]
    scheduled, routes = served.since(served.scheduled), Counter(path.route for path in paths)
    tokens = float(served.output_tokens.sum())

    def per_gpu(count: float) -> float:
        return count / duration / workers if duration else 0.0

    found: dict[str, Any] = {
        "workers": workers,
        "requests": outcomes(records),
        "from_schedule": {
            key: value
            for name in ("ttft", "e2el")
            for key, value in spread(name, scheduled[name], selection.percentiles).items()
        },
        "lateness": spread("lateness", _lateness(records), (50, 99, 100)),
        "stages": stages(paths, selection.percentiles),
        "routes": {str(route): count for route, count in routes.most_common() if route is not None},
        "disaggregated": sum(
            count for route, count in routes.items() if route is not None and not route.collocated
        ),
        **_totals(paths),
        "retries": sum(max(0, len(record.path.attempts) - 1) for record in records if record.path),
        "mean_concurrency": mean_concurrency(served),
        "per_gpu": {
            "request_throughput": per_gpu(len(served.records)),
            "output_throughput": per_gpu(tokens),
            "total_token_throughput": per_gpu(tokens + float(served.prompt_tokens.sum())),
        },
    }
    if slo is not None and slo.given:
        good, judged = served.good(slo, served.scheduled), judged_requests(records)
        found["slo"] = {
            **{f"{name}_ms": 1e3 * value for name, value in zip(NAMES, slo, strict=True) if value < np.inf},
            "attainment": good / judged if judged else None,
            "goodput": good / duration if duration else 0.0,
        }
        found["per_gpu"]["request_goodput"] = per_gpu(good)
    return found


def _totals(paths: Iterable[PathReport]) -> dict[str, int]:
    """Tokens by where their KV came from, over all attempts, and bytes; one pass, as a simulation has a million."""
    transferred = num_bytes = cached = computed = preemptions = 0
    for path in paths:
        for attempt in path.attempts:
            for usage in (attempt.prefill, attempt.decode):
                if usage is not None:
                    transferred += usage.received
                    num_bytes += usage.received_bytes
                    cached += usage.cached
                    computed += usage.computed
                    preemptions += usage.preemptions
    return {
        "transferred_tokens": transferred,
        "transferred_bytes": num_bytes,
        "cached_tokens": cached,
        "computed_tokens": computed,
        "preemptions": preemptions,
    }


def outcomes(records: Iterable[RequestRecord]) -> dict[str, int]:
    """What became of every request: the five at the end add up to `scheduled`.

    refused: by the controller, at once; unfinished, unsent: when the run was interrupted
    """
    found = dict.fromkeys(("scheduled", "completed", "failed", REFUSED, UNFINISHED, UNSENT), 0)
    for record in records:
        found["scheduled"] += 1
        if record.ok:
            found["completed"] += 1
        else:
            found[record.finish_reason if record.finish_reason in found else "failed"] += 1
    return found


def per_request(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """What `--save-detailed` adds: lists with an entry a request; stages in s, None: not reached."""
    last = [
        (each.path, each.path.attempts[-1]) if each.path and each.path.attempts else None for each in records
    ]
    return {
        "scheduled_times": [record.arrival for record in records],
        "outcomes": ["completed" if record.ok else record.finish_reason for record in records],
        "routes": [record.route for record in records],
        "stages": {
            name: [None if pair is None else stage(*pair) for pair in last] for name, stage in STAGES.items()
        },
    }


def judged_requests(records: Iterable[RequestRecord]) -> int:
    """Requests that objectives are judged on: all but those that an interrupt kept from ending."""
    return sum(record.finish_reason not in (UNFINISHED, UNSENT) for record in records)


def stages(paths: Iterable[PathReport], percentiles: Sequence[float]) -> dict[str, dict[str, float | None]]:
    """Spread of the time in each of `STAGES`, in ms; all but `transfer_hidden` add up to a request's time."""
    both = [(path, path.attempts[-1]) for path in paths if path.attempts]
    found = {}
    for name, stage in STAGES.items():
        values = column([stage(path, last) for path, last in both])
        values = values[~np.isnan(values)]
        found[name] = {
            key.replace(f"_{name}_", "_"): value for key, value in spread(name, values, percentiles).items()
        }
    return found


def mean_concurrency(served: Served) -> float:
    """Completed requests in the system, averaged over the time from the first sent to the last ended. By Little's law
    it is their throughput times their mean E2EL."""
    times, counts = concurrency(served.sent, served.finished)
    if len(times) < 2 or times[-1] == times[0]:
        return 0.0
    return float((counts[:-1] * np.diff(times)).sum() / (times[-1] - times[0]))


def _lateness(records: Iterable[RequestRecord]) -> Floats:
    return np.array([r.sent - r.arrival for r in records if isinstance(r, LoadRecord) and r.sent is not None])
