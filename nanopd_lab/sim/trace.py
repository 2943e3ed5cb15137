"""What happened in a simulation, for https://ui.perfetto.dev or chrome://tracing.

The format is Chrome's Trace Event Format (JSON object form): times in microseconds, `X` for a span of a thread, `b` and
`e` for the two ends of a span that may overlap others, `M` for names. One process a worker, with its steps on a thread
and its pulls beside them, and one process for all requests with their phases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanopd_lab.sim.results import RequestRecord, SimResult

REQUESTS_PID = 0
STEPS_TID = 1

Event = dict[str, Any]


def trace_events(result: SimResult) -> list[Event]:
    """All events, in order of time behind the names.

    Raises:
        ValueError: the simulation kept no trace.
    """
    if result.steps and not result.spans:
        raise ValueError("the simulation kept no trace; run it with SimConfig(trace=True)")
    workers = sorted({each.worker for each in result.workers}, key=lambda name: (len(name), name))
    pids = {name: pid for pid, name in enumerate(workers, 1)}
    names = [_name("process_name", REQUESTS_PID, "requests")]
    for name, pid in pids.items():
        names += [_name("process_name", pid, name), _name("thread_name", pid, "steps", STEPS_TID)]
    events = list(_steps(result, pids))
    events += _pulls(result, pids)
    for record in result.records:
        events += _request(record)
    return names + sorted(events, key=lambda event: event["ts"])


def write_trace(result: SimResult, path: str | Path) -> None:
    """Write the trace as JSON. Raises ValueError as `trace_events`."""
    document = {"traceEvents": trace_events(result), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")


def _steps(result: SimResult, pids: dict[str, int]) -> Iterator[Event]:
    for span in result.spans:
        kind = "prefill" if span.prefill_tokens else "decode"
        if span.prefill_tokens and span.sequences > 1:
            kind = "batch with prefill"
        yield {
            "name": kind if span.steps == 1 else f"{span.steps} decode steps",
            "cat": "step",
            "ph": "X",
            "ts": span.begin * 1e6,
            "dur": (span.end - span.begin) * 1e6,
            "pid": pids[span.worker],
            "tid": STEPS_TID,
            "args": {
                "steps": span.steps,
                "sequences": span.sequences,
                "prefill_tokens": span.prefill_tokens,
            },
        }


def _pulls(result: SimResult, pids: dict[str, int]) -> Iterator[Event]:
    for number, pull in enumerate(result.pulls):
        args = {"blocks": pull.blocks, "bytes": pull.num_bytes, "status": pull.status}
        name = f"pull from {pull.source}"
        yield from _pair(name, "pull", f"pull {number}", pids[pull.target], pull.begin, pull.end, args)


def _request(record: RequestRecord) -> Iterator[Event]:
    """The whole request, and within it the phases of each attempt as far as it came."""
    path = record.path
    if path is None or record.finished is None:
        return
    args = {
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "route": record.route,
        "finish_reason": record.finish_reason,
    }
    start, end, identity = record.arrival, record.finished, record.request_id
    yield from _pair(identity, "request", identity, REQUESTS_PID, start, end, args)
    for number, attempt in enumerate(path.attempts):
        last = end if attempt is path.last else attempt.ended
        marks = [
            ("queued" if number == 0 else "queued again", attempt.started),
            ("prefill", attempt.first_token),
            ("transfer", attempt.received),
            ("decode" if attempt.first_token is not None else "prefill", last),
        ]
        for phase, until in marks:
            if until is None:
                continue
            yield from _pair(phase, "request", identity, REQUESTS_PID, start, max(start, until), {})
            start = max(start, until)


def _pair(
    name: str, category: str, identity: str, pid: int, begin: float, end: float, args: dict[str, Any]
) -> Iterator[Event]:
    common: Event = {"name": name, "cat": category, "id": identity, "pid": pid, "tid": 0}
    yield {**common, "ph": "b", "ts": begin * 1e6, "args": args}
    yield {**common, "ph": "e", "ts": end * 1e6}


def _name(what: str, pid: int, name: str, tid: int = 0) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
